# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Uploads other than checkpoints: phantom datasets, benchmark scores, a Space and a job. The real clients run in
separate processes against a local server.
"""

import json
import os
import re
import subprocess
import sys

import nibabel as nib
import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from diffvp.data.phantom_cases import load_phantom
from diffvp.hub.card import EVALUATION, measured_values
from diffvp.labels_diffvp import DIAGNOSIS_LABELS

from .hub_samples import make_pushable, run_client, run_command, write_scan
from .hub_server import Hub

BASE, MODEL, PHANTOMS = "tester/tiny-llama", "tester/diffvp-tiny", "tester/phantoms"


@pytest.fixture(scope="module")
def hub(tiny_base_with_tokenizer):
    with Hub() as hub:
        hub.put(f"models/{BASE}", tiny_base_with_tokenizer)
        yield hub


@pytest.fixture(scope="module")
def pushable(tiny_base_with_tokenizer, tiny_fields, tokenizer, hub, tmp_path_factory):
    revision = hub.repos[f"models/{BASE}"].branches["main"]
    folder = tmp_path_factory.mktemp("pushable") / "diffvp-tiny"
    return make_pushable(folder, tiny_base_with_tokenizer, tiny_fields, tokenizer, BASE, revision)


@pytest.fixture(scope="module")
def uploaded(hub, pushable, tmp_path_factory):
    """
    Upload a cohort with `diffvp phantom --push`, and a checkpoint with scores on it as benchmark, in one process.

    Returns:
        Folder of the cohort; commit of the checkpoint; error of a benchmark that does not exist.
    """
    folder = tmp_path_factory.mktemp("phantoms")
    options = ["--train", "3", "--valid", "2", "--matrix", "32", "--workers", "1", "--no-masks", "--push", PHANTOMS]
    script = f"""
        from huggingface_hub import HfApi
        from typer.testing import CliRunner
        from diffvp import cli
        from diffvp.hub.push import PushError, push
        made = CliRunner().invoke(cli.app, ["phantom", "cohort", *{options!r}, "--private"], catch_exceptions=False)
        assert made.exit_code == 0, made.output
        push({str(pushable)!r}, {MODEL!r}, benchmark={PHANTOMS!r})
        HfApi().upload_file(path_or_fileobj=b"- {{}}", path_in_repo=".eval_results/others.yaml", repo_id={MODEL!r})
        answer = [made.output, push({str(pushable)!r}, {MODEL!r}).commit]
        try:
            push({str(pushable)!r}, {MODEL!r}, benchmark="tester/nowhere")
        except PushError as error:
            answer.append(str(error))
    """
    said, commit, refused = run_client(hub, folder, script)
    repo = hub.repos[f"datasets/{PHANTOMS}"]
    assert f"Uploaded as commit {repo.branches['main']}" in said and repo.private
    return folder / "cohort", commit, refused


@pytest.fixture(scope="module")
def phantoms(uploaded):
    return uploaded[0]


@pytest.mark.slow
def test_phantom_dataset_loads_by_its_name(hub, phantoms, tmp_path):
    script = f"""
        import numpy as np
        from datasets import Nifti, load_dataset
        loaded = load_dataset({PHANTOMS!r}, revision={hub.repos[f"datasets/{PHANTOMS}"].branches["main"]!r})
        sums = {{row["report"]: float(np.asarray(row["nifti"].dataobj, dtype=np.float64).sum())
                 for rows in loaded.values() for row in rows}}
        answer = {{split: [[row["report"], row["impression"], row["Lung nodule"], list(row["nifti"].shape)]
                           for row in rows] for split, rows in loaded.items()}}
        answer["sums"] = sums
        answer["columns"] = loaded["train"].column_names
        answer["is_nifti"] = loaded["train"].features["nifti"] == Nifti()
    """
    answer = run_client(hub, tmp_path, script, installed=False)
    sums = answer.pop("sums")
    assert set(answer.pop("columns")) == {"nifti", "report", "impression", *DIAGNOSIS_LABELS}
    assert answer.pop("is_nifti") and {split: len(rows) for split, rows in answer.items()} == {
        "train": 3, "validation": 2
    }  # fmt: skip
    for split, name in (("train", "train"), ("valid", "validation")):
        cases = {case.report: case for case in load_phantom(phantoms, split)}
        for report, impression, nodule, shape in answer[name]:
            assert (
                impression
                and nodule == cases[report].labels[DIAGNOSIS_LABELS.index("Lung nodule")]
                and shape[:2] == [32, 32]
            )
            assert sums[report] == pytest.approx(float(nib.load(cases[report].volume).get_fdata().sum()))


@pytest.mark.slow
def test_downloaded_phantom_dataset_can_be_trained_on(hub, phantoms, tmp_path):
    run_command(hub, tmp_path, "hf", "download", PHANTOMS, "--repo-type", "dataset", "--local-dir", "got")
    for split in ("train", "valid"):
        ours, theirs = load_phantom(phantoms, split), load_phantom(tmp_path / "got", split)
        assert [case.report for case in ours] == [case.report for case in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.volume.read_bytes() == other.volume.read_bytes()
    card = (tmp_path / "got" / "README.md").read_text()
    assert "`diffvp phantom FOLDER --train 3 --valid 2 --seed 0 --matrix 32`" in card and "Research use" in card
    assert not re.search(r"\{[{%]", card) and str(phantoms.parent) not in card


@pytest.mark.slow
def test_benchmark_scores_are_pushed_and_existing_ones_kept(hub, pushable, uploaded):
    _, commit, refused = uploaded
    assert "Repository" in refused and "Nothing was uploaded" in refused
    files = hub.repos[f"models/{MODEL}"].commits[commit]
    assert {".eval_results/phantoms.yaml", ".eval_results/others.yaml"} <= set(files)
    entries = parse_eval_result_entries(yaml.safe_load(files[".eval_results/phantoms.yaml"]))
    evaluation = json.loads((pushable / EVALUATION).read_text())
    assert [entry.value for entry in entries] == list(measured_values(evaluation).values())
    revision = hub.repos[f"datasets/{PHANTOMS}"].branches["main"]
    assert {(entry.dataset_id, entry.dataset_revision) for entry in entries} == {(PHANTOMS, revision)}
    assert len({entry.task_id for entry in entries}) == len(entries) == 5


def test_card_states_paper_version_and_changes(pushable, repository_root):
    text = (pushable / "README.md").read_text()
    ModelCard(text)
    [citation] = re.findall(r"```bibtex.*?```", (repository_root / "README.md").read_text(), re.DOTALL)
    assert citation in text and citation in (repository_root / "checkpoints/diffvp-phantom/README.md").read_text()
    assert "https://arxiv.org/abs/2603.17718" in text and "## Changes" in text and "- **0.1.0**:" in text
    assert "| Written by | version" in text


@pytest.mark.slow
def test_job_writes_reports_of_a_dataset(hub, pushable, repository_root, tmp_path):
    """A user without the package runs the script alone, as `hf jobs uv run` does."""
    (tmp_path / "scans").mkdir()
    for seed in (5, 6):
        write_scan(tmp_path / "scans" / f"scan_{seed}.nii.gz", seed=seed)
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"no scan")
    (tmp_path / "scans" / "notes.pdf").write_bytes(b"%PDF")
    hub.put("datasets/tester/scans", tmp_path / "scans")
    hub.put("models/tester/job", pushable)
    commit = hub.repos["models/tester/job"].branches["main"]
    script = f"""
        import runpy
        sys.argv = ["job.py", "tester/scans", "tester/reports", "--model", "tester/job", "--revision", {commit!r}]
        runpy.run_path({str(repository_root / "hub" / "job.py")!r}, run_name="__main__")
        answer = "diffvp" in sys.modules
    """
    assert run_client(hub, tmp_path, script, installed=False) is False
    repo = hub.repos["datasets/tester/reports"]
    files = repo.commits[repo.branches["main"]]
    reports, failed = (
        [json.loads(line) for line in files[name].splitlines()] for name in ("reports.jsonl", "reports.failed.jsonl")
    )
    assert repo.private and [one["id"] for one in reports] == ["scan_5.nii.gz", "scan_6.nii.gz"]
    assert all(one["statement"].startswith("Research use only") and one["revision"] == commit for one in reports)
    assert len({one["sha256"] for one in reports}) == 2
    [failure] = failed
    assert failure["id"] == "broken.nii.gz" and "sizeof_hdr" in failure["message"]


def _requirements(text: str) -> dict[str, str]:
    found = re.findall(r'^[# \t"]*([A-Za-z][\w.-]*)((?:[<>=]=?[\d.]+,?)*)"?,?[ \t]*(?:#.*)?$', text, re.MULTILINE)
    return {name.lower(): version for name, version in found}


def test_hub_requirements_agree_with_the_package(repository_root):
    project = (repository_root / "pyproject.toml").read_text()
    core = _requirements(project[project.index("\ndependencies = [") :].split("]\n")[0].split("[\n")[1])
    job = (repository_root / "hub" / "job.py").read_text().split("dependencies = [\n")[1].split("# ]")[0]
    space = (repository_root / "hub" / "space" / "requirements.txt").read_text()
    endpoint = (repository_root / "hub" / "handler_requirements.txt").read_text()
    own = {"job": job, "space": space, "endpoint": endpoint}
    for name, text in own.items():
        wanted = {package: version for package, version in _requirements(text).items() if package != "spaces"}
        assert len(wanted) >= 8 and wanted == {package: core[package] for package in wanted}, name
    assert "spaces" in _requirements(space)


@pytest.mark.slow
def test_uploaded_space_writes_reports(hub, pushable, repository_root, tiny_base_with_tokenizer, tmp_path):
    """Upload the Space by the commands of its README, download it, and run it without the rest of the repository."""
    readme = (repository_root / "hub" / "space" / "README.md").read_text()
    commands = [line.split() for line in readme.splitlines() if line.startswith("hf ")]
    assert len(commands) == 3
    for command in commands:
        arguments = [part.strip('"').replace("NAME/", "tester/") for part in command[1:]]
        run_command(hub, tmp_path, "hf", *arguments, cwd=repository_root)
    run_command(hub, tmp_path, "hf", "download", "tester/diffvp", "--repo-type", "space", "--local-dir", "got")
    got = tmp_path / "got"
    assert (got / "app.py").is_file() and (got / "requirements.txt").is_file() and not list(got.rglob("test_*.py"))
    write_scan(tmp_path / "scan.nii.gz", seed=5)
    code = f"""if True:
        import shutil, sys
        from pathlib import Path
        import diffvp
        assert Path(diffvp.__file__).parent == Path({str(got / "diffvp")!r}), diffvp.__file__
        from diffvp.hub.space.session import Desk, PageStudy
        desk = Desk({str(pushable)!r}, Path("desk"))
        scan = desk.receive(shutil.copy("scan.nii.gz", desk.uploads))
        study = PageStudy(desk, scan, desk.reference("normal_1"), reference_name="normal_1")
        for _ in study.stream():
            pass
        print(study.document["statement"])
    """
    settings = os.environ | hub.environment(tmp_path / "home") | {"PYTHONPATH": str(got)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("Research use only"), done.stderr[-3000:]
    app = (got / "app.py").read_text()
    assert app.index("import spaces") < app.index("from diffvp"), "spaces must be imported before torch"
