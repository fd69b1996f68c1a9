# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Reports of many scans: each is written once, equals the report of the scan alone, and survives interruptions."""

import importlib.util
import json
import os
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from diffvp import cli
from diffvp.data.cases import DatasetError
from diffvp.data.scans import list_scans
from diffvp.document_diffvp import SCHEMA_VERSION
from diffvp.inference import batch
from diffvp.inference import report as reporting
from diffvp.inference.batch import ReportWriter, write_reports
from diffvp.inference.engines import EngineError, TransformersEngine, merged_engine
from diffvp.inference.report import greedy, load_checkpoint, write_report
from diffvp.inference.report_file import BatchError
from diffvp.references_diffvp import ReferencePoolError
from diffvp.storage_diffvp import DiffVPCheckpointError

from .batch_samples import read_lines, write_box, write_checkpoint, write_cohort
from .ct_samples import make_ct, write_dicom

SCANS = 5
# Fields shared by a JSON line and report.json: docs/reports.md.
SHARED = (
    "schema_version", "statement", "intended_domain", "warnings", "report", "regions", "findings", "complete",
    "consistency", "coverage",
)  # fmt: skip


@pytest.fixture(scope="module")
def make_checkpoint(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    def make(**changes):
        folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
        return write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields, **changes)

    return make


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint()


@pytest.fixture(scope="module")
def writer(checkpoint):
    return ReportWriter(checkpoint)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """A folder of scans, two of them broken."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, SCANS)
    return folder


def write(cohort, output, writer, **options):
    return write_reports(list_scans(cohort), output, writer, **{"batch_size": 2, "workers": 2} | options)


def names(path) -> list[str]:
    return [entry["id"] for entry in read_lines(path)[1:]]


# Engines


def test_engine_output_equals_model_generate(make_model, scans):
    """Prompts differ in length because the diagnoses differ; each is decoded as if alone, up to its end token."""
    model = make_model(diagnosis_threshold=0.5)
    logits = torch.full((2, 18), -3.0)
    logits[1, 4:9] = 3.0
    prompts = model.embed_prompt(*scans, diagnosis_logits=logits)
    assert len({len(prompt) for prompt in prompts}) == 2 and prompts[0].shape[1] == 32
    model.generation_config.update(max_new_tokens=12, eos_token_id=2, pad_token_id=0)
    written = TransformersEngine(model).generate(prompts, greedy(model))
    for row in range(2):
        ct, reference = (volume[row : row + 1] for volume in scans)
        alone = model.generate(ct, reference, diagnosis_logits=logits[row : row + 1], do_sample=False)
        assert written[row] == alone[0].tolist()


def test_engine_stops_at_an_end_token(make_model, scans):
    model = make_model()
    prompts = model.embed_prompt(*scans)
    [first, _] = TransformersEngine(model).generate(prompts, greedy(model, 12))
    decoding = greedy(model, 12)
    decoding.update(eos_token_id=[first[3], 95], pad_token_id=0)
    ended, _ = TransformersEngine(model).generate(prompts, decoding)
    assert ended == first[: first.index(first[3]) + 1]


def test_unknown_or_missing_engine_is_refused(make_model, tokenizer):
    with pytest.raises(EngineError, match="engine is 'none'; expected transformers or vllm"):
        merged_engine("none", make_model(), tokenizer)
    if importlib.util.find_spec("vllm") is None:
        with pytest.raises(EngineError, match="not installed"):
            merged_engine("vllm", make_model(), tokenizer)


# Lists of scans


def test_scans_are_listed_from_folders_text_and_csv(tmp_path):
    for name in ("b.nii.gz", "deep/a.NII", "deep/c.mha"):
        write_box(tmp_path / "scans" / name.replace(".mha", ".nii"), seed=0)
    (tmp_path / "scans" / "notes.txt").write_text("no scan")
    assert [scan.id for scan in list_scans(tmp_path / "scans")] == ["b.nii.gz", "deep/a.NII", "deep/c.nii"]
    (tmp_path / "list.txt").write_text("scans/b.nii.gz\n\n/elsewhere/dicom\n")
    [first, second] = list_scans(tmp_path / "list.txt")
    assert first.id == "scans/b.nii.gz" and first.path == tmp_path / "scans/b.nii.gz"
    assert second.id == "/elsewhere/dicom" == str(second.path)
    (tmp_path / "list.csv").write_text("id,path\none,scans/b.nii.gz\n,scans/deep/a.NII\n")
    assert [scan.id for scan in list_scans(tmp_path / "list.csv")] == ["one", "scans/deep/a.NII"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", "a.nii\nb.nii\na.nii\n", "row 3: id: 'a.nii', as in row 1 "),
        ("list.csv", "id,file\na,b.nii\n", "row 1: header: column path missing"),
        ("list.csv", "id,path\na,\n", "row 2: path: empty"),
        ("list.csv", "path\n", "list: empty"),
        ("list.txt", "\n", "list: empty"),
    ],
)
def test_invalid_list_is_refused_with_its_row(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetError, match=message):
        list_scans(tmp_path / name)


@pytest.mark.parametrize("name", ["list.txt", "list.csv"])
def test_missing_list_is_refused_by_name(tmp_path, name):
    """A mistyped path is reported by its name."""
    with pytest.raises(DatasetError) as caught:
        list_scans(tmp_path / name)
    assert [problem.table for problem in caught.value.problems] == [name]


def test_folder_without_scans_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="scans: none in the folder"):
        list_scans(tmp_path)


# Reports


def test_scan_without_lungs_fails_unless_any_anatomy_is_allowed(checkpoint, writer, tmp_path):
    voxels = np.full((24, 24, 20), -1000, np.int16)
    voxels[4:-4, 4:-4, 2:-2] = np.random.default_rng(0).integers(-100, 100, (16, 16, 16))
    (tmp_path / "scans").mkdir()
    nib.save(nib.Nifti1Image(voxels, np.diag([-9.0, -9.0, 9.0, 1.0])), tmp_path / "scans" / "knee.nii.gz")
    file = write(tmp_path / "scans", tmp_path / "reports.jsonl", writer)
    [failure] = read_lines(file.failures)
    assert failure["error"] == "CTAnatomyError" and file.failed == 1
    write(tmp_path / "scans", tmp_path / "any.jsonl", ReportWriter(checkpoint, allow_any_anatomy=True))
    [_, record] = read_lines(tmp_path / "any.jsonl")
    assert record["coverage"]["lung_volume_ml"] == 0 and any("not of a chest" in one for one in record["warnings"])
    assert set(record["consistency"]) == {"text_against_findings", "contradictions"}


def test_batch_report_equals_the_report_of_the_scan_alone(cohort, checkpoint, writer, tmp_path, monkeypatch):
    monkeypatch.setattr(reporting, "draw_figure", lambda path, *volumes, **options: path.write_bytes(b""))
    file = write(cohort, tmp_path / "reports.jsonl", writer)
    header, *records = read_lines(tmp_path / "reports.jsonl")
    assert len(records) == len(file.done) == SCANS and file.failed == 2
    assert header["settings"]["checkpoint"]["sha256"]["model.safetensors"]
    assert header["settings"]["decoding"]["engine"].startswith("transformers ")
    for record in records:
        single = write_report(*load_checkpoint(checkpoint), cohort / record["id"], tmp_path / "single").document
        assert {name: record[name] for name in SHARED} == {name: single[name] for name in SHARED}
        assert record["sha256"] == single["provenance"]["scan"]["sha256"]
        assert record["reference"] == single["provenance"]["reference"]["id"]
        assert record["complete"] is (not any("cut off after" in warning for warning in single["warnings"]))
        assert record["checkpoint"] == {"name": "tiny", "commit": None}
    failures = read_lines(tmp_path / "reports.failed.jsonl")
    assert [failure["id"] for failure in failures] == ["ward 0/broken.nii.gz", "ward 1/half.nii.gz"]
    assert all(failure["error"] == "CTReadError" and "expected" in failure["message"] for failure in failures)


def test_a_reference_is_encoded_once(cohort, checkpoint, tmp_path, monkeypatch):
    writer = ReportWriter(checkpoint)
    encoded = []
    extract = writer.model.extract_features
    monkeypatch.setattr(writer.model, "extract_features", lambda ct: encoded.append(ct) or extract(ct))
    write(cohort, tmp_path / "reports.jsonl", writer)
    references = {record["reference"] for record in read_lines(tmp_path / "reports.jsonl")[1:]}
    assert len(encoded) == SCANS + len(references)


@pytest.mark.parametrize("changes", [{"difference_level": "pixel"}, {"use_diagnosis": False}])
def test_models_with_pixel_difference_or_no_diagnosis_write_reports(make_checkpoint, cohort, tmp_path, changes):
    writer = ReportWriter(make_checkpoint(**changes), max_new_tokens=3)
    write(cohort, tmp_path / "reports.jsonl", writer)
    assert len(names(tmp_path / "reports.jsonl")) == SCANS


def test_a_scan_is_never_its_own_reference(checkpoint, writer, tmp_path):
    for path in (checkpoint / "references").glob("*.nii.gz"):
        (tmp_path / "scans").mkdir(exist_ok=True)
        (tmp_path / "scans" / path.name).write_bytes(path.read_bytes())
    write(tmp_path / "scans", tmp_path / "reports.jsonl", writer)
    records = read_lines(tmp_path / "reports.jsonl")[1:]
    assert len(records) == 3 and all(record["id"] != f"{record['reference']}.nii.gz" for record in records)


# Interruptions


def test_resume_does_not_repeat_reports(cohort, writer, tmp_path):
    output = tmp_path / "reports.jsonl"
    write(cohort, output, writer)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # killed while writing the third record
    file = write(cohort, output, writer)
    assert sorted(output.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert output.read_bytes().startswith(b"".join(lines[:3]))
    assert len(file.done) == SCANS and file.failed == 2, "failures are retried"
    before = output.read_bytes()
    write(cohort, output, writer)
    assert output.read_bytes() == before


def test_report_belongs_to_file_content_not_file_name(writer, tmp_path):
    """A file is replaced by one of the same size and times; a second folder has the same file names."""
    first, second, output = (
        tmp_path / "first" / "scan.nii.gz",
        tmp_path / "second" / "scan.nii.gz",
        tmp_path / "reports",
    )
    digests, replaced = [], []
    for seed, path in enumerate((first, second)):
        path.parent.mkdir()
        write_box(path, seed=seed)
        digests.append(writer.processor.image_processor(path, digest=True)["geometry"][0].sha256)
    options = {"on_replaced": replaced.append}
    for folder in (first.parent, first.parent, second.parent):
        write(folder, output, writer, **options)
    assert [entry["sha256"] for entry in read_lines(output)[1:]] == digests and replaced == [1]
    status = first.stat()
    os.replace(second, first)
    os.utime(first, ns=(status.st_atime_ns, status.st_mtime_ns))
    write(first.parent, output, writer, **options)  # now the content of the second scan, which already has a report
    assert [entry["sha256"] for entry in read_lines(output)[1:]] == digests and replaced == [1]


def test_report_without_file_digest_is_written_again(cohort, writer, tmp_path):
    """Versions before 0.2 wrote such reports."""
    output = tmp_path / "reports.jsonl"
    write(cohort, output, writer)
    header, *records = read_lines(output)
    for record in records:
        del record["file_sha256"]
    output.write_text("".join(json.dumps(entry) + "\n" for entry in (header, *records)))
    write(cohort, output, writer)
    assert sorted(names(output)) == sorted(2 * [record["id"] for record in records])


def test_interrupted_batch_resumes_with_the_same_command(cohort, checkpoint, tmp_path, monkeypatch):
    output, written, whole = tmp_path / "reports.jsonl", [], ReportWriter.write

    def interrupted(self, scans):
        if written:
            raise KeyboardInterrupt
        written.append(scans)
        return whole(self, scans)

    monkeypatch.setattr(ReportWriter, "write", interrupted)
    arguments = ["batch", str(cohort), "--output", str(output), "--checkpoint", str(checkpoint), "--batch-size", "3"]
    stopped = CliRunner().invoke(cli.app, arguments)
    assert stopped.exit_code == 130 and "Run the same command again" in stopped.output
    assert 0 < len(names(output)) <= 3
    monkeypatch.undo()
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1 and f"{SCANS} reports" in done.stdout, "two of the scans are broken"
    assert CliRunner().invoke(cli.app, [*arguments, "--allow-failures"]).exit_code == 0
    assert len(names(output)) == len(set(names(output))) == SCANS


def test_changed_settings_are_refused(cohort, checkpoint, writer, tmp_path):
    output = tmp_path / "reports.jsonl"
    write(cohort, output, writer)
    before = output.read_bytes()
    other = ReportWriter(checkpoint, reference_seed=1, max_new_tokens=4)
    with pytest.raises(BatchError, match="reference_seed was 0, is 1; .*max_new_tokens was 9, is 4"):
        write(cohort, output, other)
    assert output.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"id,report\n", b'{"id": 1}\n', b"\x1f\x8b\x00", b'{"settings": {}}\n[]\n'])
def test_unrelated_output_file_is_left_unchanged(cohort, writer, tmp_path, content):
    output = tmp_path / "notes.jsonl"
    output.write_bytes(content)
    with pytest.raises(BatchError, match="notes.jsonl"):
        write(cohort, output, writer)
    assert output.read_bytes() == content


def test_internal_error_ends_the_run(cohort, writer, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("a defect")

    monkeypatch.setattr(batch, "checked_report", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        write(cohort, tmp_path / "reports.jsonl", writer)


# References given by the caller


def test_reference_is_a_scan_a_folder_or_the_nearest(cohort, checkpoint, writer, tmp_path):
    scans = list_scans(cohort)
    for seed in (7, 8):
        write_box(tmp_path / "pool" / f"own_{seed}.nii.gz", seed)
    used = {}
    for reference in (tmp_path / "pool/own_7.nii.gz", tmp_path / "pool", "nearest"):
        one = ReportWriter(checkpoint, reference=reference)
        output = tmp_path / f"{len(used)}.jsonl"
        write_reports(scans, output, one, batch_size=8, workers=1)
        used[str(reference)] = {record["id"]: record["reference"] for record in read_lines(output)[1:]}
    alone, pool, nearest = used.values()
    assert set(alone.values()) == {"own_7.nii.gz"} and set(pool.values()) <= {"own_7.nii.gz", "own_8.nii.gz"}
    # Nearest by the mean of the features, computed one scan at a time.
    model, processor = load_checkpoint(checkpoint)

    def mean(path) -> torch.Tensor:
        return model.extract_features(processor.image_processor(path)["ct"]).mean(1)

    normal = {entry["id"]: mean(processor.reference_pool.fetch(entry)) for entry in processor.reference_pool.entries}
    for scan in scans:
        if scan.id in nearest:
            own = mean(scan.path)
            assert nearest[scan.id] == min(normal, key=lambda name: float(torch.dist(normal[name], own)))
    with pytest.raises(BatchError, match="references"):
        write_reports(scans, tmp_path / "0.jsonl", writer, batch_size=8, workers=1)


def test_unreadable_reference_is_named_as_such(cohort, checkpoint, tmp_path):
    write_box(tmp_path / "pool" / "bad.nii.gz", 7)
    (tmp_path / "pool" / "bad.nii.gz").write_bytes(b"no scan")
    one = ReportWriter(checkpoint, reference=tmp_path / "pool")
    with pytest.raises(ReferencePoolError, match=r"Reference bad\.nii\.gz cannot be used: .*bad\.nii\.gz: "):
        write_reports(list_scans(cohort), tmp_path / "reports.jsonl", one, batch_size=8, workers=1)


def test_pool_of_normal_scans_is_a_list_of_references(cohort, checkpoint, tmp_path):
    rows = ["path,report,id,normal"]
    for seed in (7, 8, 9):
        write_box(tmp_path / "own" / f"scan_{seed}.nii.gz", seed)
        rows.append(f"scan_{seed}.nii.gz,Clear.,case_{seed},{int(seed < 9)}")
    (tmp_path / "own" / "metadata.csv").write_text("\n".join(rows) + "\n")
    pool = tmp_path / "lists" / "pool.txt"
    commands = [
        ["pool", "build", tmp_path / "own", "--layout", "table", "--output", pool],
        ["batch", cohort, "--reference", pool, "--checkpoint", checkpoint, "--output", tmp_path / "reports.jsonl"],
    ]
    for words in commands:
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
        assert result.exit_code in (0, 1), result.output  # 1: two of the scans are broken
    references = [record["reference"] for record in read_lines(tmp_path / "reports.jsonl")[1:]]
    assert len(references) == SCANS and set(references) <= {"case_7", "case_8"}


def test_scan_that_is_its_only_reference_fails_alone(cohort, checkpoint, tmp_path):
    scans = list_scans(cohort)
    only = next(scan for scan in scans if scan.path.name == "scan_0.nii.gz")
    writer = ReportWriter(checkpoint, reference=only.path)
    file = write_reports(scans, tmp_path / "reports.jsonl", writer, batch_size=8, workers=1)
    assert only.id not in file.done and len(file.done) == SCANS - 1
    [own] = [line for line in read_lines(file.failures) if line["id"] == only.id]
    assert own["error"] == "NoOtherReferenceError"


def test_folders_of_dicom_slices_are_scans(tmp_path):
    write_box(tmp_path / "a.nii.gz", seed=0)
    for name in ("study/thin", "study/thick"):
        write_dicom(tmp_path / name, make_ct((12, 12, 4)))
    (tmp_path / "study/DICOMDIR").write_bytes(b"")
    assert [scan.id for scan in list_scans(tmp_path)] == ["a.nii.gz", "study/thick", "study/thin"]
    assert [scan.id for scan in list_scans(tmp_path / "study/thin")] == ["thin"]
    assert [scan.id for scan in list_scans(tmp_path / "a.nii.gz")] == ["a.nii.gz"]


# The command


def test_command_names_scans_only_in_its_files(cohort, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    output = tmp_path / "reports.jsonl"
    (tmp_path / "list.csv").write_text(
        "id,path\n" + "".join(f"case {row},{scan.path}\n" for row, scan in enumerate(list_scans(cohort)))
    )
    arguments = ["batch", tmp_path / "list.csv", "--output", output, "--checkpoint", checkpoint, "--workers", 1]
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 1, result.output
    assert f"{SCANS} reports: {output}" in result.stdout
    assert f"2 scans could not be read: {tmp_path / 'reports.failed.jsonl'}" in result.stdout
    assert "Research use only" in result.stderr
    assert "ward" not in result.output and "scan_1" not in result.output and "case 1" not in result.output
    assert str(cohort) not in output.read_text()


def test_command_errors_are_one_line(cohort, checkpoint, tmp_path):
    def run(*arguments):
        return CliRunner().invoke(cli.app, ["batch", *map(str, arguments)])

    output = tmp_path / "reports.jsonl"
    result = run(cohort, "--checkpoint", checkpoint, "--output", output, "--engine", "other")
    assert result.exit_code == 2 and "'transformers', 'vllm'" in result.stderr and not output.exists()
    output.write_text("mine\n")
    result = run(cohort, "--checkpoint", checkpoint, "--output", output)
    assert result.exit_code == 2 and "choose another output" in " ".join(result.stderr.split())
    result = run(tmp_path / "absent.txt", "--checkpoint", checkpoint)
    assert result.exit_code == 2 and "absent.txt: list: missing" in result.stderr
    (checkpoint / "references").rename(tmp_path / "aside")
    try:
        result = run(cohort, "--checkpoint", checkpoint, "--output", tmp_path / "other.jsonl")
        assert result.exit_code == 2 and "no normal references" in " ".join(result.stderr.split())
    finally:
        os.rename(tmp_path / "aside", checkpoint / "references")


def test_report_fields_are_documented(repository_root):
    page = (repository_root / "docs" / "reports.md").read_text(encoding="utf-8")
    table = page.split("## Fields of every report (schema version 1)")[1].split("\n\n")[1]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(SHARED)
    assert SCHEMA_VERSION == 1


def test_reports_of_rounded_weights_state_the_type(checkpoint, cohort, tmp_path):
    with pytest.raises(DiffVPCheckpointError, match="dtype: int8 on cuda .expected device cpu"):
        load_checkpoint(checkpoint, device="cuda", dtype="int8")
    command = ["batch", cohort, "--checkpoint", checkpoint, "--output", tmp_path / "reports.jsonl"]
    result = CliRunner().invoke(cli.app, list(map(str, [*command, "--dtype", "int8", "--allow-failures"])))
    assert result.exit_code == 0, result.output
    header, *records = read_lines(tmp_path / "reports.jsonl")
    assert header["settings"]["decoding"]["dtype"] == "int8" and len(records) == SCANS
