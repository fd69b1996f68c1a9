# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Wrong uses of the command: each ends with status 2 and a sentence that names the remedy, and writes nothing.

`make test-road` (DIFFVP_ROAD=1) also runs each in its own process and measures the time.
"""

import os
import socket
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from diffvp.cli import app
from diffvp.files import writing_problem

from .batch_samples import write_box
from .ct_samples import make_ct, write_dicom

# Each command, and a part of its sentence. The commands run in the folder that `place` makes.
WRONG = {
    "report absent.nii.gz": "absent.nii.gz: path: missing",
    "report scan.txt": "scan.txt: suffix",
    "report empty": "empty: ",
    "report scan --hu-window 200 -1000": "--hu-window: 200 -1000 (expected two rising HU)",
    "report scan --output file/report": "file/report: output: below the file file",
    "report scan --output file": "file: output: a file (expected a folder",
    "report scan --dicom file": "file: output: a file (expected a folder",
    "report box.nii.gz --output others": "others holds other files (thesis.doc): choose another output folder",
    "report box.nii.gz --reference box.nii.gz": "box.nii.gz: reference: the scan itself (expected another scan",
    "report box.nii.gz --checkpoint empty": "empty has no config.json: not a checkpoint, or an incomplete one",
    "report box.nii.gz --checkpoint bert": "bert: model_type: bert (expected diffvp",
    "report box.nii.gz --engine vlm": "'vlm' is not one of 'transformers', 'vllm'",
    "report box.nii.gz --checkpoint=": "has no config.json: not a checkpoint, or an incomplete one",
    "report box.nii.gz --engine vllm": "vllm is not installed in this environment; see docs/scaling.md",
    "report box.nii.gz --dtype int4": "'int4' is not one of 'float32', 'bfloat16', 'int8'",
    "demo --checkpoint empty": "empty has no config.json: not a checkpoint, or an incomplete one",
    "report box.nii.gz --revision main": "--revision: main, of a folder (expected with --checkpoint NAME/MODEL",
    "report scan --allow-any-anatomy --checkpoint runs/finetunee/model": "no such folder; expected a folder",
    "batch empty": "scans: none in the folder",
    "batch absent": "absent: list: missing (expected a folder of scans",
    "batch list.txt --output file/reports.jsonl": "output: below the file file",
    "batch list.txt --output empty": "empty: output: a folder (expected a file",
    "batch list.txt --output list.txt": "list.txt: output: a file that is read or written",
    "batch list.txt --output reports.csv": "reports.csv: line 1 is unknown; expected a file that `diffvp batch` wrote",
    "batch list.txt --reference absent": "absent: reference: missing (expected a normal scan, a folder",
    "batch list.txt --reference list.csv": "column path missing",
    "batch list.txt --reference lost.txt": "reference: missing (expected an existing file or folder)",
    "batch scan.failed.jsonl --output scan.jsonl": "scan.failed.jsonl: output: a file that is read or written",
    "batch list.csv": "column path missing",
    "init absent": "absent: folder: missing (expected a folder of scans)",
    "init empty": "empty: scans: none (expected NIfTI",
    "train absent.yaml": "absent.yaml: file: missing (expected a YAML file",
    "train empty": "empty: file: a folder (expected a YAML file, such as `diffvp init` writes)",
    "train bad.yaml": "bad.yaml: content: no YAML, expected the node content",
    "train config.yaml report.epochs=[": "report.epochs: '[': no YAML",
    "train config.yaml --dry-run --tflops 0": "--tflops",
    "evaluate bad.yaml": "bad.yaml: content: no YAML",
    "train config.yaml sede=5": "config.yaml: sede: unknown (expected seed)",
    "train config.yaml report.epochs=two": "report.epochs: 'two' (expected a valid integer)",
    "train config.yaml data.layout=tabel": "data.layout: 'tabel' (expected 'phantom'",
    "train config.yaml seed": "key=value",
    "evaluate absent --output results": "absent: data: missing (expected a training file",
    "evaluate list.csv --layout table --output results": "list.csv: data: a file (expected a training file, .yaml, or",
    "evaluate config.yaml": "checkpoint: missing (expected a folder, which `diffvp train` makes)",
    "evaluate empty seed=1 --output results": "seed=1: given with a folder (expected only with a training file)",
    "evaluate config.yaml --layout table": "--layout, --split, --training-split: given (expected only with the folder",
    "label absent.csv --output labels.csv": "absent.csv: file: missing",
    "label reports.csv --output file/labels.csv": "output: below the file file",
    "label reports.csv --output reports.csv": "reports.csv: output: a file that is read or written",
    "label reports.csv --output a.csv --explain a.csv": "a.csv: output: a file that is read or written",
    "score absent.jsonl": "absent.jsonl: file: missing (expected a table",
    "score reports.csv": "also prediction",
    "score reports.csv --labels absent.csv": "absent.csv: file: missing (expected a table",
    "judge reports.csv absent.csv --judge rules": "absent.csv: file: missing (expected a table",
    "judge reports.csv reports.csv --judge coin": "'coin' is not one of 'model', 'rules'",
    "judge reports.csv reports.csv --calibrate": "expected two tables of reports, A.csv and B.csv, or --calibrate",
    "encoder convert reports.csv empty": "empty: output: a folder (expected a file",
    "experiment table4 --study absent.yaml": "absent.yaml: file: missing (expected a YAML file",
    "experiment seed=1": "names: none (expected a table or figure of the paper",
    "phantom file --train 1 --valid 1": "file: output: a file (expected a folder",
    "phantom cohort --train 1 --valid 1 --push me/my/cohort": "me/my/cohort",
    "serve --host 0.0.0.0": "host is 0.0.0.0, which admits other machines; expected a token in $DIFFVP_TOKEN",
    "push absent me/model --dry-run": "absent: folder: missing (expected the folder of a checkpoint)",
    "pool build empty --layout csv --output pool.txt": "'csv' is not one of 'phantom', 'radgenome'",
    "pool build absent --layout table --output pool.txt": "absent: data: missing (expected the folder of a dataset",
}


@pytest.fixture
def place(tmp_path, monkeypatch, repository_root):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "thesis.doc").touch()
    write_dicom(tmp_path / "scan", make_ct((16, 16, 12)))
    write_box(tmp_path / "box.nii.gz", 0)
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    for name, content in {
        "scan.txt": "no scan",
        "file": "",
        "reports.csv": "id,report\na,Lung: clear.\n",
        "list.txt": "a.nii.gz\n",
        "list.csv": "name\na.nii.gz\n",
        "lost.txt": "lost.nii.gz\n",
        "scan.failed.jsonl": '{"id": "a.nii.gz", "error": "CTReadError", "message": "damaged"}\n',
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


def test_port_in_use_is_refused_before_the_checkpoint_is_loaded(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["serve", "--port", str(taken.getsockname()[1]), "--checkpoint", "absent"]
        result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "address: Address already in use (expected a free --port" in result.stderr


def test_output_in_a_folder_of_another_user_is_refused(place):
    """Its content cannot be looked at, which must not end in a traceback."""
    (place / "private").mkdir(mode=0o000)
    user = os.getuid()
    if user == 0:  # who may look everywhere
        os.setresuid(65534, 65534, 0)
    try:
        assert writing_problem(place / "private" / "deeper" / "labels.csv") == "in a folder that is not writable"
    finally:
        if user == 0:
            os.setresuid(0, 0, 0)
        (place / "private").chmod(0o700)


def test_wrong_uses_are_refused_before_pytorch_loads(place):
    """PyTorch and what needs it take seconds to import; the time itself depends on the machine."""
    script = f"""
import sys
from typer.testing import CliRunner
from diffvp.cli import app
from diffvp.tests.commands import keep_command_tree
keep_command_tree()
for command in {list(WRONG)!r}:
    assert CliRunner().invoke(app, command.split()).exit_code == 2, command
    assert "torch" not in sys.modules, command
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(not os.environ.get("DIFFVP_ROAD"), reason="starts a process for each: make test-road")
@pytest.mark.parametrize("command", WRONG)
def test_wrong_use_ends_within_3_seconds(command, place):
    """Time the faster of two runs, because the first one also reads the libraries from the disk."""
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "diffvp.cli", *command.split()], capture_output=True, text=True)
        seconds.append(time.monotonic() - start)
    assert done.returncode == 2 and WRONG[command].split()[0] in done.stderr
    assert min(seconds) < 3
