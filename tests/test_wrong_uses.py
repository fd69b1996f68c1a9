# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Wrong uses of the command: each ends with status 2 and a sentence that names the remedy, and writes nothing.

`make test-road` (DIFFVP_ROAD=1) also runs each in its own process and measures the time.
"""

import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from diffvp.cli import app

from .ct_samples import make_ct, write_dicom

# Each command, and a part of its sentence. The commands run in the folder that `place` makes.
WRONG = {
    "report absent.nii.gz": "absent.nii.gz: path: missing",
    "report scan.txt": "scan.txt: suffix",
    "report empty": "empty: ",
    "report scan --hu-window 200 -1000": "--hu-window: 200 -1000 (expected two rising HU)",
    "report scan --output file/report": "file/report: output: below the file file",
    "report scan --allow-any-anatomy --checkpoint runs/finetunee/model": "no such folder; expected a folder",
    "batch empty": "scans: none in the folder",
    "batch absent": "absent: list: missing (expected a folder of scans",
    "batch list.txt --output file/reports.jsonl": "output: below the file file",
    "batch list.csv": "column path missing",
    "init absent": "absent: folder: missing (expected a folder of scans)",
    "init empty": "empty: scans: none (expected NIfTI",
    "train absent.yaml": "absent.yaml",
    "train bad.yaml": "bad.yaml",
    "train config.yaml sede=5": "config.yaml: sede: unknown (expected seed)",
    "train config.yaml report.epochs=two": "report.epochs: 'two' (expected a valid integer)",
    "train config.yaml data.layout=tabel": "data.layout: 'tabel' (expected 'phantom'",
    "train config.yaml seed": "key=value",
    "evaluate absent --output results": "absent: data: missing (expected a training file",
    "evaluate config.yaml": "checkpoint: missing (expected a folder, which `diffvp train` makes)",
    "label absent.csv --output labels.csv": "absent.csv: file: missing",
    "label reports.csv --output file/labels.csv": "output: below the file file",
    "score absent.jsonl": "absent.jsonl: file: missing (expected a table",
    "score reports.csv": "also prediction",
    "push absent me/model --dry-run": "absent is not a folder",
    "pool build absent --layout table --output pool.txt": "metadata.csv or metadata.jsonl",
}


@pytest.fixture
def place(tmp_path, monkeypatch, repository_root):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_dicom(tmp_path / "scan", make_ct((16, 16, 12)))
    for name, content in {
        "scan.txt": "no scan",
        "file": "",
        "reports.csv": "id,report\na,Lung: clear.\n",
        "list.txt": "a.nii.gz\n",
        "list.csv": "name\na.nii.gz\n",
        "bad.yaml": "seed: [",
        "config.yaml": (repository_root / "configs/own_scans.yaml").read_text(),
    }.items():
        (tmp_path / name).write_text(content)
    return tmp_path


@pytest.mark.parametrize("command", WRONG)
def test_wrong_use_ends_with_a_sentence_that_names_the_remedy(command, place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    before = sorted(place.rglob("*"))
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 2, (result.output, result.exception)
    assert WRONG[command] in result.stderr
    assert "Traceback" not in result.output and "pydantic" not in result.output
    assert sorted(place.rglob("*")) == before


@pytest.mark.skipif(not os.environ.get("DIFFVP_ROAD"), reason="starts a process for each: make test-road")
@pytest.mark.parametrize("command", WRONG)
def test_wrong_use_ends_within_3_seconds(command, place):
    """Allow 3 s beyond the import of the libraries, which depends on the machine."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", "import diffvp.train_accelerate, diffvp.inference.report"], check=True)
    libraries = time.monotonic() - start
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "diffvp.cli", *command.split()], capture_output=True, text=True)
    assert done.returncode == 2 and WRONG[command].split()[0] in done.stderr
    assert time.monotonic() - start < libraries + 3
