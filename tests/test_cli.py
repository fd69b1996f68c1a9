# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Output, files and errors of the command. The computations are tested with their modules."""

import csv
import json
import logging
import os
import pickle
import re
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from diffvp import cli
from diffvp.cli.console import quiet
from diffvp.cli.training import log_to_stderr
from diffvp.inference import report as reporting

from .ct_samples import make_ct, write_dicom

RESEARCH_USE = "Research use only. Not a medical device; not for diagnosis."


@pytest.fixture(scope="module")
def checkpoint(tiny_fields, tiny_base_with_tokenizer, tokenizer, tmp_path_factory):
    """A saved tiny model whose pool holds one empty box."""
    from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
    from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
    from diffvp.references_diffvp import index_references

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    image_processor = DiffVPImageProcessor(size=(32, 32, 32), target_spacing=(9.0, 11.0, 11.0), foreground_hu=-500.0)
    processor = DiffVPProcessor(image_processor, pickle.loads(pickle.dumps(tokenizer)))
    fields = {
        "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(processor.tokenizer),
        "instruction_ids": processor(text=processor.instruction)["input_ids"][0].tolist(),
        "intended_domain": "boxes of noise",
    }
    model = DiffVPForConditionalGeneration.from_base(str(tiny_base_with_tokenizer), config={**tiny_fields, **fields})
    model.generation_config.update(max_new_tokens=9)
    pool = tmp_path_factory.mktemp("pool")
    write_box(pool / "normal.nii.gz", seed=0)
    index_references(pool)
    processor.load_references(pool)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_box(path, seed: int, low: int = -1000) -> None:
    voxels = np.full((24, 24, 20), low, np.int16)
    voxels[4:-4, 4:-4, 2:-2] = np.random.default_rng(seed).integers(0, 100, (16, 16, 16))
    voxels[6:11, 7:17, 4:16] = voxels[13:18, 7:17, 4:16] = low + 150
    nib.save(nib.Nifti1Image(voxels, np.diag([-9.0, -9.0, 9.0, 1.0])), path)


@pytest.fixture
def scan(tmp_path):
    write_box(tmp_path / "scan.nii.gz", seed=1)
    return tmp_path / "scan.nii.gz"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """`run(*arguments)` in an empty folder, on a terminal too narrow for the paths, which must not be wrapped."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("COLUMNS", "60")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture
def no_figures(monkeypatch):
    """Leave out the figure, which would take most of the time."""
    monkeypatch.setattr(reporting, "draw_figure", lambda path, *_, **__: path.write_bytes(b"a figure"))


def assert_one_line_error(result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    last = result.stderr.strip().splitlines()[-1]
    assert re.match(r"\S+: .", last), result.stderr  # SOURCE: ...
    for part in parts:
        assert part in last, result.stderr


def test_report_command_writes_and_prints_the_report(run, scan, checkpoint, tmp_path):
    result = run("report", scan, "--checkpoint", checkpoint)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "work" / "outputs" / "report"
    written = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert written["report"] in result.stdout
    assert f"{folder / 'figure.png'}\n" in result.stdout and (folder / "figure.png").is_file()
    assert RESEARCH_USE in result.stderr and "boxes of noise" in result.stderr
    assert "Drawing the figure" in result.stderr, "progress"


def test_report_as_json_prints_nothing_else_to_stdout(run, scan, checkpoint, no_figures, tmp_path):
    write_box(tmp_path / "normal.nii", seed=2)
    result = run("report", scan, "--checkpoint", checkpoint, "--json", "--output", tmp_path / "here",
                 "--reference", tmp_path / "normal.nii", "--max-new-tokens", 3)  # fmt: skip
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "here" / "report.json").read_text(encoding="utf-8"))
    assert printed["statement"] == RESEARCH_USE and printed["provenance"]["reference"]["sampled"] is False
    assert printed["provenance"]["decoding"]["generation_config"]["max_new_tokens"] == 3
    assert RESEARCH_USE in result.stderr


@pytest.mark.slow
def test_demo_prints_the_report_next_to_the_true_one(run, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    result = run("demo", "--checkpoint", checkpoint, "--output", "demo", "--seed", 3)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "work" / "demo" / "report"
    truth = json.loads((folder / "report.json").read_text(encoding="utf-8"))["truth"]
    for region, sentence in truth["regions"].items():
        assert re.search(rf"{region}\b.*{re.escape(sentence[:20])}", result.stdout), region
    for kind in ("hit", "missed", "false"):
        assert f"Findings {kind}: {', '.join(truth[kind]) or 'none'}" in result.stdout
    assert str(folder / "figure.png") in result.stdout and "diffvp report FILE" in result.stdout
    assert RESEARCH_USE in result.stderr
    phantom = nib.load(tmp_path / "work" / "demo" / "phantom.nii.gz")
    assert nib.load(folder / "difference_map.nii.gz").shape == phantom.shape
    # The phantom is the stated patient, and the demo can be run again into the same folder.
    from diffvp.data.phantom import render_patient, sample_patient

    np.testing.assert_array_equal(phantom.get_fdata(), render_patient(sample_patient(3, 0, "demo")).hu)
    assert run("demo", "--checkpoint", checkpoint, "--output", "demo", "--seed", 4).exit_code == 0


def test_input_errors_are_one_line(run, checkpoint, tmp_path, scan):
    def report(*arguments):
        return run("report", *arguments, "--checkpoint", checkpoint)

    assert_one_line_error(report(tmp_path / "absent.nii.gz"), "CTReadError", "absent.nii.gz", "missing")
    (tmp_path / "scan.txt").write_text("no scan")
    assert_one_line_error(report(tmp_path / "scan.txt"), "CTReadError", "scan.txt", "suffix")
    write_box(tmp_path / "eight-bit.nii", seed=1, low=0)
    assert_one_line_error(report(tmp_path / "eight-bit.nii"), "CTIntensityError", "Hounsfield")
    assert not (tmp_path / "work" / "outputs").exists(), "a failed report leaves no output"
    assert_one_line_error(report(scan, "--output", scan.parent), "ReportError", "other files")


def test_input_errors_name_the_options_that_resolve_them(run, checkpoint, tmp_path, scan):
    def refused(path, *arguments) -> set[str]:
        result = run("report", path, "--checkpoint", checkpoint, *arguments)
        assert_one_line_error(result)
        return set(re.findall(r"--[a-z-]+", result.stderr))

    write_box(tmp_path / "eight-bit.nii", seed=1, low=0)
    nib.save(nib.Nifti1Image(make_ct((26, 22, 18)), None), tmp_path / "blank.nii")
    write_dicom(tmp_path / "series", make_ct())
    (tmp_path / "series" / "001.dcm").write_bytes(b"")
    found = [
        refused(tmp_path / "eight-bit.nii"),
        refused(tmp_path / "blank.nii"),
        refused(scan, "--spacing", 1, 1, 1),
        refused(scan, "--series", 1),
        refused(tmp_path / "series"),
    ]
    assert found == [
        {"--allow-non-hu", "--hu-window"},
        {"--metadata", "--spacing"},
        {"--spacing"},
        {"--series"},
        {"--allow-incomplete"},
    ]
    parameters = typer.main.get_command(cli.app).commands["report"].params
    assert set().union(*found) <= {option for parameter in parameters for option in parameter.opts}


def test_one_of_several_series_is_chosen_by_option(run, checkpoint, no_figures, tmp_path):
    for name, shape in (("thin", (26, 22, 30)), ("thick", (26, 22, 18))):
        write_dicom(tmp_path / "study" / name, make_ct(shape))
    arguments = ("report", tmp_path / "study", "--checkpoint", checkpoint, "--max-new-tokens", 2, "--json")
    arguments += ("--allow-any-anatomy",)
    refused = run(*arguments)
    assert_one_line_error(refused, "CTReadError", "series: none chosen", "30 slices", "18 slices", "--series")
    for series, slices in (("1", 30), ("2", 18)):
        result = run(*arguments, "--series", series)
        assert result.exit_code == 0, result.output
        scan = json.loads(result.stdout)["provenance"]["scan"]
        assert scan["shape"] == [26, 22, slices] and "DICOM" in scan["layout"]
        assert "secret" not in result.output.lower()


def test_incomplete_series_is_read_on_request(run, checkpoint, no_figures, tmp_path):
    folder = write_dicom(tmp_path / "series", make_ct())
    (folder / "001.dcm").write_bytes(b"")
    arguments = ("report", folder, "--checkpoint", checkpoint, "--max-new-tokens", 2, "--json", "--allow-any-anatomy")
    assert_one_line_error(run(*arguments), "CTReadError", "001.dcm: content: empty")
    result = run(*arguments, "--allow-incomplete")
    assert result.exit_code == 0, result.output
    assert "Files of the series that could not be read: 1." in json.loads(result.stdout)["warnings"]


def test_metadata_table_supplies_a_missing_grid(run, checkpoint, no_figures, tmp_path):
    scan, table = tmp_path / "valid_1_a_1.nii.gz", tmp_path / "validation_metadata.csv"
    raw = make_ct((26, 22, 18)).astype(np.float32) + 1024
    nib.save(nib.Nifti1Image(raw, None), scan)
    table.write_text(
        "VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing,ImageOrientationPatient,PatientPosition\n"
        'valid_1_a_1.nii.gz,1,-1024,"[9.0, 9.0]",9.0,"[1, 0, 0, 0, 1, 0]",HFS\n'
    )
    arguments = ("report", scan, "--checkpoint", checkpoint, "--max-new-tokens", 2, "--json", "--allow-any-anatomy")
    assert_one_line_error(run(*arguments), "CTGeometryError", "grid: not stated")
    result = run(*arguments, "--metadata", table)
    assert result.exit_code == 0, result.output
    assert "CT-RATE version 1" in json.loads(result.stdout)["provenance"]["scan"]["layout"]
    scan.rename(tmp_path / "valid_2_a_1.nii.gz")
    refused = run("report", tmp_path / "valid_2_a_1.nii.gz", "--checkpoint", checkpoint, "--metadata", table)
    assert_one_line_error(refused, "CTReadError", "no row for valid_2_a_1.nii.gz")


def test_checkpoint_errors_are_one_line(run, scan, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.console, "SHIPPED_CHECKPOINT", tmp_path / "not-there")
    assert_one_line_error(run("report", scan), "DiffVPCheckpointError", "not-there", "--checkpoint")
    assert_one_line_error(run("demo"), "DiffVPCheckpointError", "not-there", "--checkpoint")
    gone = tmp_path / "nowhere"
    assert_one_line_error(run("report", scan, "--checkpoint", gone), "DiffVPCheckpointError", "no such folder", "Hub")
    (checkpoint / "references" / "normal.nii.gz").rename(tmp_path / "aside.nii.gz")
    try:
        assert_one_line_error(run("report", scan, "--checkpoint", checkpoint), "ReferencePoolError", "missing")
    finally:
        (tmp_path / "aside.nii.gz").rename(checkpoint / "references" / "normal.nii.gz")


def test_unknown_engine_is_refused(run, scan, checkpoint):
    result = run("report", scan, "--checkpoint", checkpoint, "--engine", "other")
    assert result.exit_code == 2
    assert all(part in result.stderr for part in ("--engine", "'other'", "'transformers', 'vllm'"))


def test_internal_error_keeps_its_traceback(run, scan, checkpoint, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(reporting, "draw_figure", fail)
    result = run("report", scan, "--checkpoint", checkpoint)
    assert result.exit_code == 1 and isinstance(result.exception, RuntimeError)


def test_phantom_command_writes_a_cohort(run, tmp_path):
    options = ("--valid", 1, "--matrix", 48, "--no-masks", "--workers", 1)
    result = run("phantom", "cohort", "--train", 1, *options, "--seed", 7)
    assert result.exit_code == 0, result.output
    from diffvp.data.phantom_cases import load_phantom

    [case] = load_phantom(tmp_path / "work" / "cohort", "train")
    assert nib.load(case.volume).shape[:2] == (48, 48) and case.report
    assert len(load_phantom(tmp_path / "work" / "cohort", "valid")) == 1
    assert_one_line_error(run("phantom", "cohort", "--train", 1, *options, "--seed", 8), "cohort")
    assert run("phantom", "cohort", "--train", -1, *options).exit_code == 2


def test_label_command_writes_labels_and_evidence(run, tmp_path):
    (tmp_path / "work/reports.csv").write_text(
        "id,report\na,Lung: A nodule of 6 mm is seen. No pleural effusion.\nb,Heart size is increased.\nc,\n"
    )
    result = run("label", "reports.csv", "--output", "labels.csv", "--explain", "why.jsonl")
    assert result.exit_code == 0 and "3 reports, 2 findings" in result.output and "rule-labeler" in result.output
    rows = list(csv.DictReader((tmp_path / "work/labels.csv").read_text().splitlines()))
    found = {row["id"]: [name for name, value in row.items() if value == "1"] for row in rows}
    assert found == {"a": ["Lung nodule"], "b": ["Cardiomegaly"], "c": []}
    hits = [json.loads(line) for line in (tmp_path / "work/why.jsonl").read_text().splitlines()]
    assert {(hit["id"], hit["label"], hit["polarity"]) for hit in hits} == {
        ("a", "Lung nodule", "positive"),
        ("a", "Pleural effusion", "negated"),
        ("b", "Cardiomegaly", "positive"),
    }
    (tmp_path / "work/reports.csv").write_text("id,text\na,x\na,y\n")
    result = run("label", "reports.csv", "--output", "none.csv")
    assert result.exit_code == 2 and "report" in result.output and not (tmp_path / "work/none.csv").exists()
    result = run("label", "reports.csv", "--output", "none.csv", "--report-column", "text")
    assert result.exit_code == 2 and "row 3" in result.output and "the same as in row 2" in result.output


def test_train_reads_the_configuration(run, repository_root, tmp_path, monkeypatch):
    from diffvp import train_accelerate

    ran = []

    def finish(config, cohort):
        ran.append(config)
        return train_accelerate.Finished(tmp_path / "model", epoch=2, epochs=3, loss=0.5)

    monkeypatch.setattr(train_accelerate, "prepare", lambda config: SimpleNamespace(test=[]))
    monkeypatch.setattr(train_accelerate, "run", finish)
    config = repository_root / "configs" / "phantom.yaml"
    result = run("train", config, "seed=5", "data.root=elsewhere")
    assert result.exit_code == 0 and f"{tmp_path / 'model'}: epoch 2 of 3" in result.stdout, result.output
    assert "diffvp report SCAN" in result.stdout and "diffvp push" in result.stdout
    assert ran[0].seed == 5 and ran[0].data.root == "elsewhere"
    assert_one_line_error(run("train", config, "seed"), "key=value")
    for wrong, said in {
        "sede=5": "phantom.yaml: sede: unknown (expected seed)",
        "stages.one=5": "phantom.yaml: stages: unknown (expected stage)",
    }.items():
        refused = run("train", config, wrong)
        assert refused.exit_code == 2 and refused.stderr.splitlines() == [said]
    assert_one_line_error(run("train", tmp_path / "absent.yaml"), "absent.yaml")
    (tmp_path / "broken.yaml").write_text("seed: [")
    assert_one_line_error(run("train", tmp_path / "broken.yaml"), "broken.yaml")
    assert len(ran) == 1


def test_settings_of_a_command_are_undone_after_a_test(settings_restored):
    from transformers.utils import logging as transformers_logging

    def settings():
        shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        return dict(os.environ), logging.getLogger("diffvp").level, *shown

    before = settings()
    with settings_restored():
        quiet()
        log_to_stderr()
        assert all(one != other for one, other in zip(before, settings(), strict=True))
    assert settings() == before
