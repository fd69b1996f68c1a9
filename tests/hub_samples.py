# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""An uploadable checkpoint of a tiny model, shared by the tests of the Hub and of the pipeline."""

import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import pytest
import torch
from peft import LoraConfig

from diffvp.hub import card as card_module
from diffvp.hub.card import PHANTOM, write_card, write_licence
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.provenance import weights_sha256
from diffvp.references_diffvp import index_references

from .ct_samples import lps_affine, make_ct
from .hub_server import Hub

WITHOUT_PACKAGE = """
import sys

class Blocked:  # as if the package were not installed
    def find_spec(self, name, *_):
        if name.split(".")[0] == "diffvp":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocked())
"""


def run_client(hub: Hub, folder: Path, script: str, installed: bool = True, **environment):
    """Run a script as a user of the Hub would, in a separate folder, and return its variable `answer`."""
    script = ("" if installed else WITHOUT_PACKAGE) + textwrap.dedent(script)
    ending = '\nimport json; json.dump(answer, open("answer.json", "w"))\n'
    settings = os.environ | hub.environment(folder / "home") | environment
    done = subprocess.run(
        [sys.executable, "-c", script + ending], cwd=folder, env=settings, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "answer.json").read_text())


def run_command(hub: Hub, folder: Path, program: str, *arguments, cwd: Path | None = None) -> str:
    """Run a command of this environment in the same way, and return its output."""
    command = [Path(sys.executable).with_name(program), *arguments]
    settings = os.environ | hub.environment(folder / "home")
    done = subprocess.run(command, cwd=cwd or folder, env=settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def make_chest(seed: int):
    """Return the body of `make_ct` with two lungs, because reports require a chest."""
    chest = make_ct(seed=seed)
    chest[7:12, 6:13, 5:14] = chest[15:20, 6:13, 5:14] = -850
    return chest


def write_scan(path: Path, seed: int) -> Path:
    nib.save(nib.Nifti1Image(make_chest(seed), lps_affine()), path)
    return path


def make_results(folder: Path) -> dict:
    """Return results of three cases in the format of `diffvp evaluate`."""
    score = {"precision": 0.51234, "recall": 0.25, "f1": 1 / 3, "f1_interval": [0.1, 0.6]}
    text = {"bleu4": 0.4, "bleu4_interval": [0.3, 0.5], "rougeL": 0.6}
    label = {"precision": 1.0, "recall": 0.125, "f1": 0.2222, "predicted": 1, "support": 8}
    reports = ["Lung: A nodule measuring 8 mm is observed in the right upper lobe.", "Heart: Heart size is normal."]
    pairs = [(0, 0), (0, 1), (1, 0)]
    return {
        "command": "diffvp evaluate phantom --output experiments/results",
        "checkpoint": {"name": folder.name, "sha256": weights_sha256(folder)},
        "cases": 3,
        "signatures": ["bleu|order:1-4"],
        "systems": {"DiffVP": score | text, "diagnosis classifier alone": score},
        "per_label": dict.fromkeys(DIAGNOSIS_LABELS, label),
        "lesion_sizes": {"Lung nodule, 6-8 mm": {"cases": 40, "found": 9}},
        "predictions": [
            {"name": f"case_{a}_{b}", "prediction": reports[a], "reference": reports[b]} for a, b in pairs
        ],
    }


def make_pushable(folder: Path, base: Path, fields: dict, tokenizer, base_name: str, base_revision: str) -> Path:
    """Write a tiny checkpoint with adapter, references, card and results, and a base on the Hub."""
    processor = DiffVPProcessor(DiffVPImageProcessor(size=(32, 32, 32)), pickle.loads(pickle.dumps(tokenizer)))
    own = {
        "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(processor.tokenizer),
        "instruction_ids": processor(text=processor.instruction)["input_ids"][0].tolist(),
        "intended_domain": "boxes of noise",
    }
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = DiffVPForConditionalGeneration.from_base(str(base), lora_config=lora, config={**own, **fields})
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    model.generation_config.update(max_new_tokens=9)
    model.config.base_model_name_or_path = model.config.text_config.name_or_path = base_name
    model.config.base_model_revision = base_revision
    model.save_pretrained(folder)
    (folder / "references").mkdir()
    for seed in (1, 2):
        write_scan(folder / f"references/normal_{seed}.nii.gz", seed)
    index_references(folder / "references")
    processor.load_references(folder / "references")
    processor.save_pretrained(folder)
    document(folder)
    return folder


def document(folder: Path) -> None:
    """Write licence, card and results of a checkpoint. Its base is on a Hub unknown to this process."""
    with pytest.MonkeyPatch.context() as patch:
        findings = {"hit": [], "missed": ["Lung nodule"], "false": []}
        shown = {"report": "Lung: clear.", "truth": "Lung: a nodule.", "reference": "normal_1", "complete": True}
        patch.setattr(card_module, "demo_report", lambda _: shown | {"findings": findings})
        write_licence(folder)
        write_card(folder, PHANTOM, make_results(folder))
