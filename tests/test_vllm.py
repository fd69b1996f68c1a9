# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""vLLM writes the same words as transformers. `make test-vllm` runs these tests in their own environment."""

import os

import nibabel as nib
import pytest

pytest.importorskip("vllm", reason="vllm is not installed: make test-vllm makes an environment that has it")

# Read when an engine starts. By default vLLM binds threads to cores that containers may not have, and keeps 4 GB for
# keys and values.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.data.phantom_cohort import single_phantom
from diffvp.data.scans import list_scans
from diffvp.inference import report as reporting
from diffvp.inference.batch import ReportWriter, write_reports
from diffvp.inference.engines import EngineError
from diffvp.inference.report import write_report

from .batch_samples import read_lines

CASES = 20


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Write phantoms that no training saw."""
    folder = tmp_path_factory.mktemp("phantoms")
    for seed in range(CASES):
        nib.save(single_phantom(seed, "engines")[0], folder / f"phantom_{seed:02d}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def by_transformers(cohort, tmp_path_factory):
    output = tmp_path_factory.mktemp("transformers") / "reports.jsonl"
    write_reports(list_scans(cohort), output, ReportWriter(SHIPPED_CHECKPOINT), batch_size=CASES, workers=1)
    return read_lines(output)


@pytest.fixture(scope="module")
def writer():
    # Eager, because compiling takes a minute and changes the last digits of sums.
    options = {"enforce_eager": True, "max_model_len": 1024}
    return ReportWriter(SHIPPED_CHECKPOINT, "vllm", engine_options=options)


@pytest.mark.timeout(1800)
def test_vllm_and_transformers_write_the_same_reports(cohort, by_transformers, writer, tmp_path):
    output = tmp_path / "reports.jsonl"
    write_reports(list_scans(cohort), output, writer, batch_size=CASES, workers=1)
    header, *records = read_lines(output)
    expected_header, *expected = by_transformers
    assert len(records) == CASES
    assert header["settings"]["decoding"].pop("engine").startswith("vllm ")
    assert expected_header["settings"]["decoding"].pop("engine").startswith("transformers ")
    assert header["settings"] == expected_header["settings"]
    assert len({record["report"] for record in records}) > CASES // 2, "reports must differ between patients"
    for record, wanted in zip(records, expected, strict=True):
        del record["settings_sha256"], wanted["settings_sha256"]
        assert record == wanted


@pytest.mark.timeout(600)
def test_single_report_has_a_difference_map(cohort, by_transformers, writer, tmp_path, monkeypatch):
    """Use the parts of the model outside vLLM, which the difference map needs."""
    monkeypatch.setattr(reporting, "draw_figure", lambda path, *volumes, **options: path.write_bytes(b""))
    record = by_transformers[1]
    report = write_report(
        writer.model, writer.processor, cohort / record["id"], tmp_path / "report", engine=writer.engine
    )
    assert report.text == record["report"] and (tmp_path / "report" / "difference_map.nii.gz").is_file()
    assert report.document["provenance"]["decoding"]["engine"] == writer.engine.name


def test_unsupported_decoding_option_is_refused(writer, monkeypatch):
    decoding = reporting.greedy(writer.model)
    decoding.update(repetition_penalty=1.2)
    with pytest.raises(EngineError, match="sets repetition_penalty; expected none"):
        writer.engine.generate([], decoding)
