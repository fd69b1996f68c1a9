# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The checkpoint in this repository: complete, small, up to date, and the same however it is loaded."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from transformers import AutoModel

from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.data.cases import DatasetError
from diffvp.data.phantom import render_patient, sample_patient
from diffvp.data.phantom_cohort import write_cohort
from diffvp.experiments import evaluate as evaluate_module
from diffvp.experiments.evaluate import evaluate, phantom_set
from diffvp.inference.report import load_checkpoint

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """Write the scan of a phantom patient outside all training data."""
    scan = render_patient(sample_patient(5, 0, "demo"))
    path = tmp_path_factory.mktemp("scan") / "phantom.nii.gz"
    nib.save(nib.Nifti1Image(scan.hu, scan.affine), path)
    return path


@pytest.fixture(scope="module")
def loading(make_once) -> Path:
    """Output of a process that loads the checkpoint as a script does, and the modules imported before it loads."""

    def load(folder: Path) -> None:
        code = f"""
import json, sys
from diffvp.inference.report import load_checkpoint
json.dump(sorted(sys.modules), open("modules.json", "w"))
load_checkpoint({str(SHIPPED_CHECKPOINT)!r})
"""
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": "warning", "TQDM_DISABLE": "1"}
        with (folder / "output.txt").open("w") as output:
            command = [sys.executable, "-c", code]
            subprocess.run(command, cwd=folder, env=environment, stdout=output, stderr=output, timeout=300, check=True)

    return make_once("loading", load)


@pytest.mark.slow
def test_loading_prints_no_warnings(loading):
    assert (loading / "output.txt").read_text().strip() == ""


@pytest.mark.slow
def test_report_imports_nothing_for_other_tasks_before_its_first_token(loading):
    modules = json.loads((loading / "modules.json").read_text())
    assert "diffvp.inference.report" in modules
    assert not {"matplotlib", "diffvp.data.phantom", "transformers.pipelines"} & set(modules)


def test_files_are_small_and_up_to_date(repository_root):
    files = [path for path in SHIPPED_CHECKPOINT.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files if path.name not in ("LICENSE", "NOTICE", "requirements.txt")} <= {
        ".safetensors", ".json", ".py", ".md", ".gz", ".jinja"
    }  # fmt: skip
    assert (SHIPPED_CHECKPOINT / "handler.py").read_bytes() == (repository_root / "hub/handler.py").read_bytes()
    for path in SHIPPED_CHECKPOINT.glob("*_diffvp.py"):
        assert path.read_bytes() == (repository_root / path.name).read_bytes(), f"{path.name}: release again"


def test_process_without_the_package_generates_the_same_tokens(scan, tmp_path):
    model, processor = load_checkpoint(str(SHIPPED_CHECKPOINT))
    inputs = processor(ct=str(scan))
    expected = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
    script = textwrap.dedent(
        f"""
        import json, sys
        from transformers import AutoModel, AutoProcessor

        class Blocked:  # as if the package were not installed
            def find_spec(self, name, *_):
                if name.split(".")[0] == "diffvp":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Blocked())
        repo = {str(SHIPPED_CHECKPOINT)!r}
        processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
        model = AutoModel.from_pretrained(repo, trust_remote_code=True)
        inputs = processor(ct={str(scan)!r})
        assert "diffvp" not in sys.modules
        positional = model.generate(inputs["ct"], inputs["reference"], max_new_tokens={NEW_TOKENS})
        keywords = model.generate(**inputs, max_new_tokens={NEW_TOKENS})
        json.dump([inputs.reference_ids, positional.tolist(), keywords.tolist()], open("tokens.json", "w"))
        """
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    reference_ids, positional, keywords = json.loads((tmp_path / "tokens.json").read_text())
    assert reference_ids == inputs.reference_ids
    assert positional == keywords == expected.tolist()


def test_adapter_is_trained_and_the_base_is_left_out():
    model = AutoModel.from_pretrained(SHIPPED_CHECKPOINT, trust_remote_code=True)
    weights = dict(model.named_parameters())
    assert any(torch.count_nonzero(value) for name, value in weights.items() if "lora_B" in name)
    assert (SHIPPED_CHECKPOINT / "model.safetensors").stat().st_size < 15e6  # the base alone has 135 M parameters


@pytest.mark.slow
def test_evaluation_of_two_cases_fills_every_table(tmp_path, monkeypatch):
    """Evaluate a model that writes the true reports: its scores are perfect, and lower on another patient's scan."""

    def generate_truth(model, processor, targets, spacing, pool):
        pooled = np.zeros((len(targets), 2 * model.config.encoder_hidden_size), np.float32)
        labels = np.stack([case.labels for case in targets]).astype(float)
        return evaluate_module.Outputs([case.report for case in targets], pooled, labels)

    monkeypatch.setattr(evaluate_module, "generate_reports", generate_truth)
    cohort = write_cohort(tmp_path / "phantom", train=24, valid=2, seed=23, matrix=48, workers=1, progress=False)
    page, _ = evaluate(phantom_set(cohort), SHIPPED_CHECKPOINT, tmp_path / "results", tmp_path / "cache")
    page = page.read_text()
    result = json.loads((tmp_path / "results/phantom_checkpoint.json").read_text())
    assert str(tmp_path) not in page + json.dumps(result)
    assert len(list((tmp_path / "cache/pooled").glob("*.safetensors"))) == 24, "test scans are encoded once"
    assert set(result["systems"]) >= {
        "DiffVP",
        "constant normal report",
        "nearest training report",
        "DiffVP on another patient's scan",
    }
    assert all(f"| {name} |" in page for name in result["systems"])
    scores = {name: (one["f1"], one.get("bleu4")) for name, one in result["systems"].items()}
    assert scores["DiffVP"] == pytest.approx((1, 1)) and scores["diagnosis classifier alone"][0] == 1
    assert scores["DiffVP on another patient's scan"][0] < 1 and scores["DiffVP on another patient's scan"][1] < 1
    assert scores["constant normal report"][0] == 0
    assert [one["name"] for one in result["predictions"]] == ["valid_1_a_1", "valid_2_a_1"]
    assert len(result["per_label"]) == 18
    assert list(result["collapse"]) == ["DiffVP", "constant normal report", "nearest training report", "true reports"]
    assert result["collapse"]["DiffVP"] == result["collapse"]["true reports"]
    assert result["collapse"]["constant normal report"]["commonest_report"]["value"] == 1
    assert result["report"]["place_right"]["value"] == result["report"]["size_right"]["value"] == 1
    assert set(result["maps"]["maps"]) >= {"latent", "latent, another patient", "target alone", "chance"}
    assert set(result["predictions"][0]["map"]) == set(result["maps"]["maps"])
    assert result["maps"]["cases"] == 2 and "| its maximum lies on a lesion | ≥ 0.90 |" in page
    assert result["text_agrees_with_classifier"]["value"] == 1 and "| distinct reports / n |" in page


def test_incomplete_evaluation_is_refused_before_it_starts(tmp_path):
    cohort = write_cohort(
        tmp_path / "phantom", train=1, valid=2, seed=23, matrix=32, masks=False, workers=1, progress=False
    )
    with pytest.raises(DatasetError, match="valid_1_a_1.nii.gz: lesion mask: missing"):
        evaluate(phantom_set(cohort), SHIPPED_CHECKPOINT, tmp_path / "results", tmp_path / "cache")
    with pytest.raises(ValueError, match="The test split has 1 case"):
        evaluate(phantom_set(cohort), SHIPPED_CHECKPOINT, tmp_path / "results", tmp_path / "cache", limit=1)
    assert not (tmp_path / "results").exists()
