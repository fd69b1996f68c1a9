# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`diffvp evaluate` on datasets in their layouts: scans and references are read with what their files lack."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from diffvp.cli import app

from .batch_samples import write_box, write_checkpoint
from .dataset_samples import TRAIN, write_ct_rate, write_ctrg, write_radgenome

NORMAL, EMPHYSEMA = "Both lungs are clear.", "Emphysema is observed in both lungs."


@pytest.fixture(scope="module")
def checkpoint(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    """A tiny model without references, which therefore come from the training split of the dataset."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields)
    shutil.rmtree(folder / "references")
    return folder


@pytest.fixture
def evaluate(checkpoint, tmp_path):
    def run(*words, of=checkpoint):
        options = ["--checkpoint", of, "--output", tmp_path / "results", "--cache-dir", tmp_path / "cache"]
        return CliRunner().invoke(app, [str(word) for word in ("evaluate", *words, *options)])

    return run


def write_volumes(root, convert=None):
    """Write a scan of its own in place of each empty file; `convert(hu)` returns the voxels of a blank header."""
    for seed, path in enumerate(sorted(root.rglob("*.nii.gz"))):
        write_box(path, seed)
        if convert is not None:
            nib.save(nib.Nifti1Image(convert(np.asarray(nib.load(path).dataobj)), None), path)


def results_of(result, tmp_path) -> dict:
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return json.loads((tmp_path / "results/tiny_checkpoint.json").read_text())


@pytest.mark.parametrize("version", [1, 2])
def test_ct_rate_is_evaluated(evaluate, tmp_path, version):
    root = tmp_path / "ct-rate"
    valid = [name.replace("train", "valid") for name in TRAIN]
    for names, split, long in ((TRAIN, "train", "train"), (valid, "valid", "validation")):
        write_ct_rate(root, split, names, split if version == 1 else f"{split}_fixed", long)
    write_volumes(root, convert=(lambda hu: hu.astype(np.float32) + 8192) if version == 1 else None)
    results = results_of(evaluate(root, "--layout", "ct-rate"), tmp_path)
    assert [one["name"] for one in results["predictions"]] == valid[:3]
    assert results["command"] == (
        "diffvp evaluate ct-rate --layout ct-rate --split valid --training-split train --output results"
    )
    assert results["per_label"]["Emphysema"]["support"] == 1, "the labels of the dataset"


def test_radgenome_is_evaluated(evaluate, tmp_path):
    for split in ("train", "valid"):
        write_radgenome(tmp_path / "radgenome", split)
    write_volumes(tmp_path / "radgenome")
    results = results_of(evaluate(tmp_path / "radgenome", "--layout", "radgenome"), tmp_path)
    assert [one["name"] for one in results["predictions"]] == ["valid_1_a_1", "valid_2_b_1"]


def test_ctrg_is_evaluated_with_a_spacing(evaluate, checkpoint, tmp_path):
    root, of_grey = tmp_path / "ctrg", shutil.copytree(checkpoint, tmp_path / "tiny")
    root.mkdir()
    reports = (NORMAL, NORMAL, EMPHYSEMA)
    write_ctrg(
        root,
        {
            split: [{"id": first + number, "finding": report} for number, report in enumerate(reports)]
            for split, first in (("train", 0), ("test", 10))
        },
    )
    write_volumes(root, convert=lambda hu: ((np.clip(hu, -1000, 200) + 1000) / 1200 * 255).astype(np.uint8))
    settings = json.loads((of_grey / "processor_config.json").read_text())
    settings["image_processor"] |= {"allow_non_hu": True, "hu_window": [0, 255], "foreground_hu": 100.0}
    (of_grey / "processor_config.json").write_text(json.dumps(settings))
    words = [root, "--layout", "ctrg", "--split", "test"]
    without = evaluate(*words, of=of_grey)
    assert without.exit_code == 2 and "spacing" in without.stderr
    results = results_of(evaluate(*words, "--spacing", 9, 9, 9.5, of=of_grey), tmp_path)
    assert [one["name"] for one in results["predictions"]] == ["10", "11", "12"]
    assert " --split test --training-split train --spacing 9 9 9.5 --output" in results["command"]
    assert results["per_label"]["Emphysema"]["support"] == 1, "read from the true reports"


def test_hub_dataset_is_evaluated(evaluate, tmp_path):
    from datasets import Dataset, Features, Nifti, Value

    features = Features({"id": Value("string"), "scan": Nifti(), "report": Value("string")})
    for split, first in (("train", 0), ("validation", 10)):
        rows = {"id": [], "scan": [], "report": []}
        for number, report in enumerate((NORMAL, NORMAL, EMPHYSEMA), start=first):
            write_box(tmp_path / "scans" / f"{number}.nii.gz", number)
            content = (tmp_path / "scans" / f"{number}.nii.gz").read_bytes()
            rows["id"].append(f"case {number}")
            rows["scan"].append({"path": f"{number}.nii.gz", "bytes": content})
            rows["report"].append(report)
        (tmp_path / "dataset").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "dataset" / f"{split}.parquet")
    shutil.rmtree(tmp_path / "scans")
    results = results_of(evaluate(tmp_path / "dataset", "--layout", "hub", "--split", "validation"), tmp_path)
    assert [one["name"] for one in results["predictions"]] == ["case 10", "case 11", "case 12"]
    assert "evaluate dataset --layout hub --split validation" in results["command"]
    assert len(list((tmp_path / "cache/hub").glob("*.nii.gz"))) == 6


@pytest.mark.parametrize(
    "words, message",
    [
        (["--spacing", 1, 1, 5], "--spacing: "),
        (["--layout", "ctrg", "--revision", "abc"], "--revision: abc (expected only with --layout hub)"),
    ],
)
def test_options_of_other_layouts_are_refused(evaluate, tmp_path, words, message):
    result = evaluate(tmp_path, *words)
    assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "results").exists()
