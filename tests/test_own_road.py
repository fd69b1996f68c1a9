# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
A user's way from their own scans and reports to a model, using only the commands of docs/training.md.

By default the tests use a few phantoms and a base LLM of two layers. `make test-road` (DIFFVP_ROAD=1) uses 40
phantoms, the base that docs/training.md names, and an environment made from a wheel, outside the clone.
"""

import csv
import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open
from typer.testing import CliRunner

from diffvp.cli import app
from diffvp.data.start import set_in_text

from .ct_samples import make_ct, write_dicom
from .own_scans import write_own_dicom, write_own_scans, write_table

full = pytest.mark.skipif(not os.environ.get("DIFFVP_ROAD"), reason="takes an hour on two cores: make test-road")
DOMAIN = "phantoms in the place of patients"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def check(result) -> str:
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def commands(page: Path) -> list[str]:
    """Return the `diffvp` commands in the first shell block of the page, without its installation."""
    [block, *_] = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [line.partition("  #")[0].strip() for line in block.splitlines() if line.startswith("diffvp ")]


@pytest.mark.slow
def test_documented_commands_lead_from_a_table_to_a_scored_checkpoint(
    run, tmp_path, tiny_base_with_tokenizer, repository_root, caplog
):
    write_own_scans(tmp_path / "my_scans", normal=9, others=7, matrix=48)
    road = commands(repository_root / "docs/training.md")
    assert [command.split()[1] for command in road] == ["init", "train", "train", "evaluate", "report", "push"]
    for command in road:
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', command)][1:]
        if words[0] == "init":
            words += ["--quick", "--base", tiny_base_with_tokenizer]
        result = run(*words)
        if words[0] != "push":
            check(result)
        if words[0] == "init":  # a vocabulary of 258 makes even short reports long; one epoch is enough here
            path = tmp_path / "my_scans/own_scans.yaml"
            text = path.read_text()
            for dotted, value in {
                "report.max_report_tokens": 1600,
                "diagnosis.epochs": 1,
                "report.epochs": 1,
                "report.samples": 0,
                "num_workers": 0,
            }.items():
                text = set_in_text(text, dotted, value)
            path.write_text(text)
        if words[0] == "train" and "--dry-run" in words:
            assert "No problems found" in result.output and not (tmp_path / "my_scans/runs").exists()
        elif words[0] == "train":
            assert "epoch 1 of 1" in result.output and "Score it" in result.output and "Share it" in result.output
            assert "too few to score" in caplog.text and "micro-F1" not in caplog.text
        elif words[0] == "evaluate":
            page = (tmp_path / "my_scans/runs/evaluation/model_checkpoint.md").read_text()
            for row in ("DiffVP", "constant normal report", "nearest training report", "labels alone, all-positive"):
                assert f"| {row} | " in page
            assert "95 % bootstrap intervals" in result.output and "by label" in result.output

    model = tmp_path / "my_scans/runs/model"
    # Everything that push refuses concerns the base of this test, which exists only on this machine.
    problems = [line for line in result.output.splitlines() if line.startswith("- ")]
    assert problems and all("a place on this machine" in line for line in problems)
    config = json.loads((model / "config.json").read_text())
    assert config["intended_domain"] == "chest CT of our hospital, 2020 to 2025, without contrast"
    assert (
        json.loads((tmp_path / "outputs/report/report.json").read_text())["intended_domain"]
        == config["intended_domain"]
    )
    with safe_open(model / "model.safetensors", "pt") as file:
        assert not any(name.startswith("language_model.") for name in file.keys())  # noqa: SIM118

    # Neither scans nor their paths are published with the checkpoint.
    local = json.loads((model / "references.local.json").read_text())
    assert local and all(set(one) == {"id", "path", "sha256"} for one in local)
    assert not (model / "references").exists() and not list(model.rglob("*.nii.gz"))
    assert str(tmp_path / "my_scans") not in (model / "README.md").read_text()
    evaluation = json.loads((model / "evaluation.json").read_text())
    tested = json.loads((tmp_path / "my_scans/runs/evaluation/model_checkpoint.json").read_text())
    assert "predictions" not in evaluation and evaluation["cases"] == len(tested["predictions"]) >= 2

    # Test cases are neither references nor training data, and git ignores the whole folder.
    names = {one["name"] for one in tested["predictions"]}
    assert not names & {one["id"] for one in local}
    assert (tmp_path / "my_scans/.gitignore").read_text().splitlines()[1] == "*"

    # Train, batch, score.
    table = tmp_path / "my_scans/metadata.csv"
    check(run("batch", "my_scans", "--checkpoint", model, "--output", "all.jsonl", "--max-new-tokens", 4))
    scored = check(run("score", "all.jsonl", "--reference", table, "--training", table, "--no-meteor", "--markdown"))
    assert "16 reports" in scored and "constant normal report" in scored


@pytest.mark.slow
def test_run_fails_with_the_same_message_as_its_dry_run(run, tmp_path, tiny_base_with_tokenizer):
    write_own_scans(tmp_path / "my_scans", normal=8, others=2, matrix=32)
    check(run("init", "my_scans", "--quick", "--base", tiny_base_with_tokenizer, "--domain", DOMAIN))
    config = "my_scans/own_scans.yaml"
    for override, said in {
        "report.max_report_tokens=40": "report: ",
        "output_dir=my_scans/metadata.csv/run": "output_dir: below the file metadata.csv",
        "encoder_weights=absent.safetensors": "encoder_weights: missing",
        "base.name=absent/base": "absent/base",
        "report.epochs=none": "own_scans.yaml: report.epochs: 'none' (expected a valid integer)",
        "data.test_split=test": "test_fraction and test_split are both set",
        "model.hu_range=[-1000, 200]": "expected the same HU",
        "diagnosis.crops={per_epoch: 8, validation: 2, size: [16, 16, 16], near_lesions: 0.5}": "expected crops: null",
    }.items():
        dry, wet = run("train", config, "--dry-run", override), run("train", config, override)
        assert dry.exit_code == wet.exit_code == 2, (override, dry.output, dry.exception, wet.exception)
        assert said in dry.stderr and dry.stderr.splitlines()[-1] == wet.stderr.splitlines()[-1], override
    (tmp_path / "my_scans/scan_00.nii.gz").write_bytes(b"no scan")
    dry = run("train", config, "--dry-run", "report.max_report_tokens=1600", "num_workers=0")
    assert dry.exit_code == 2 and "scan_00" in dry.stderr
    assert not (tmp_path / "my_scans/runs").exists()


# diffvp init


def start(run, *words):
    return run("init", "my_scans", *words)


def test_init_asks_for_missing_reports_and_then_continues(run, tmp_path):
    write_own_scans(tmp_path / "my_scans", normal=3, others=1, matrix=32)
    folder = tmp_path / "my_scans"
    rows = list(csv.reader((folder / "metadata.csv").read_text().splitlines()))
    (folder / "metadata.csv").unlink()
    (folder / "scan_02.txt").write_text("Lung: clear.\n")
    result = start(run)
    assert result.exit_code == 2 and "3 of 4 reports" in result.stderr and "same command again" in result.stderr
    written = list(csv.reader((folder / "metadata.csv").read_text().splitlines()))
    assert written[3] == ["scan_02.nii.gz", "Lung: clear."] and written[1] == ["scan_00.nii.gz", ""]
    assert not (folder / "own_scans.yaml").exists()
    write_table(folder, rows)
    assert "Next: diffvp train" in check(start(run, "--domain", DOMAIN))
    assert start(run).exit_code == 2, "init must not replace an existing training file"


def test_init_uses_the_columns_of_the_table(run, tmp_path):
    """Cover DICOM folders, a column `normal`, splits from the table, and one report longer than usual."""
    rows = [["path", "report", "normal", "patient_id", "split"]]
    for number in range(12):
        write_dicom(tmp_path / f"my_scans/p{number}/series", make_ct((20, 20, 6)))
        split = "test" if number > 9 else "valid" if number > 7 else "train"
        report = "Lung: clear. " * (400 if number == 0 else 1)
        rows.append([f"p{number}/series", report, int(number < 6), f"patient {number // 2}", split])
    write_table(tmp_path / "my_scans", rows)
    printed = check(start(run, "--domain", DOMAIN, "--output", "work"))
    assert "12 scans, 12 of them folders of DICOM slices" in printed
    assert "6 rows, by the column normal" in printed and "12 rows of 6 patients" in printed
    values = yaml.safe_load((tmp_path / "work/own_scans.yaml").read_text())
    assert values["data"]["split"] == "train" and values["data"]["test_split"] == "test"
    assert values["data"]["validation_split"] == "valid" and values["data"]["validation_fraction"] is None
    assert values["data"]["test_fraction"] is None and values["data"]["labeler"] == "rules"
    assert values["report"]["max_report_tokens"] == 1792 and values["model"]["intended_domain"] == DOMAIN

    from diffvp.training.cohort import load_cohort
    from diffvp.training.config import TrainingConfig

    cohort = load_cohort(TrainingConfig.load("work/own_scans.yaml"))
    assert [len(of) for of in (cohort.report, cohort.validation, cohort.test, cohort.pool)] == [8, 2, 2, 6]


def test_test_patients_are_the_same_for_every_seed(tmp_path, run, tiny_base_with_tokenizer):
    from diffvp.training.cohort import load_cohort
    from diffvp.training.config import TrainingConfig

    write_own_scans(tmp_path / "my_scans", normal=10, others=2, matrix=32)
    check(start(run, "--quick", "--base", tiny_base_with_tokenizer))
    cohorts = [load_cohort(TrainingConfig.load("my_scans/own_scans.yaml", [f"seed={seed}"])) for seed in range(4)]
    tested = [{case.patient_id for case in cohort.test} for cohort in cohorts]
    assert tested[0] and all(one == tested[0] for one in tested)
    assert len({tuple(case.name for case in cohort.validation) for cohort in cohorts}) > 1
    for cohort in cohorts:
        others = cohort.diagnosis + cohort.report + cohort.validation + cohort.pool
        assert not tested[0] & {case.patient_id for case in others}


# End to end


def shell(command: str, folder: Path, environment: dict) -> str:
    print(f"$ {command}", file=sys.stderr)  # noqa: T201 (shows progress during the hour)
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_documented_commands_work_with_an_installed_wheel(kind, repository_root, tmp_path):
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, repository_root]
    subprocess.run(wheel, check=True, cwd=tmp_path)
    [built] = tmp_path.glob("diffvp-*.whl")
    # The libraries come from this environment, because they take gigabytes; only diffvp comes from the wheel.
    venv.create(tmp_path / "env", with_pip=True, system_site_packages=False)
    libraries = next(Path(sys.prefix).glob("lib/python*/site-packages"))
    [site] = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    shell(f"env/bin/pip install --quiet --no-deps --force-reinstall {built.name}", tmp_path, dict(os.environ))
    path = f"{tmp_path / 'env/bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
    where = shell("python -c 'import diffvp; print(diffvp.__file__)'", tmp_path, environment)
    assert str(tmp_path / "env") in where
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    if kind == "nifti":
        write_own_scans(folder / "my_scans")
    else:
        write_own_dicom(folder / "my_scans")
    shell("diffvp demo", folder, environment)
    for command in commands(repository_root / "docs/training.md"):
        if command.split()[1] == "init":
            command += " --quick"
        if kind == "dicom":
            command = command.replace("scan_00.nii.gz", "scan_00")
        printed = shell(command, folder, environment)
    assert "files," in printed and "references.local.json" not in printed
    results = json.loads((folder / "my_scans/runs/evaluation/model_checkpoint.json").read_text())
    assert all(len(of["f1_interval"]) == 2 for of in results["systems"].values())
