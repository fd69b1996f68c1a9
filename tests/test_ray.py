# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Batches with Ray on a cluster of one machine. `make test-ray` runs them in their own environment."""

import os
import sys
import threading
from types import SimpleNamespace

import psutil
import pytest
from typer.testing import CliRunner

from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.cli import ray as ray_command
from diffvp.data.scans import list_scans
from diffvp.inference import batch
from diffvp.inference import ray as on_ray
from diffvp.inference.batch import ReportWriter
from diffvp.inference.ray import Resources, write_reports_with_ray
from diffvp.inference.report_file import BatchError
from diffvp.report_diffvp import RESEARCH_USE

from .batch_samples import read_lines, write_checkpoint, write_cohort

SCANS, BROKEN = 50, {"ward 0/broken.nii.gz", "ward 1/half.nii.gz"}


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="ray is not installed: make test-ray makes an environment that has it")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # disables telemetry
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=200 * 2**20)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def checkpoint(cluster, tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, SCANS)
    return folder


def write(scans, output, checkpoint, **options):
    resources = Resources(workers=1, engines=1, gpus=0)
    defaults = {"batch_size": 8, "resources": resources, "engine": "transformers"}
    return write_reports_with_ray(scans, output, checkpoint=checkpoint, **defaults | options)


def kill(name: str) -> bool:
    """Kill one of this cluster's processes that run the named task or actor; return True if there was one."""
    for process in psutil.Process().children(recursive=True):
        if name in " ".join(process.cmdline()):
            process.kill()
            return True
    return False


@pytest.mark.timeout(600)
def test_run_finishes_despite_broken_scans_and_killed_processes(cohort, checkpoint, tmp_path):
    output, killed, over = tmp_path / "reports.jsonl", set(), threading.Event()

    def kill_reader():
        while not over.wait(0.02):
            if kill("read_scan"):
                killed.add("read_scan")
                return

    def kill_actor(file):
        if len(file.done) >= 8 and "ReportActor" not in killed and kill("ReportActor"):
            killed.add("ReportActor")

    thread = threading.Thread(target=kill_reader)
    thread.start()
    try:
        file = write(list_scans(cohort), output, checkpoint, on_progress=kill_actor)
    finally:
        over.set()
        thread.join()
    assert killed == {"read_scan", "ReportActor"}
    records = read_lines(output)[1:]
    assert len(records) == len({record["id"] for record in records}) == len(file.done) == SCANS
    failures = read_lines(tmp_path / "reports.failed.jsonl")
    assert {failure["id"] for failure in failures} == BROKEN and len(failures) == file.failed == 2

    # A single machine continues the same file and writes the same reports.
    writer = ReportWriter(checkpoint)
    batch.write_reports(list_scans(cohort), output, writer, batch_size=8, workers=1)
    assert read_lines(output)[1:] == records
    batch.write_reports(list_scans(cohort), tmp_path / "alone.jsonl", writer, batch_size=8, workers=1)
    alone = {record["id"]: record for record in read_lines(tmp_path / "alone.jsonl")[1:]}
    assert {record["id"]: record for record in records} == alone


@pytest.mark.timeout(600)
def test_resumed_run_repeats_no_scan(cohort, checkpoint, tmp_path):
    output, scans = tmp_path / "reports.jsonl", list_scans(cohort)
    write(scans[:12], output, checkpoint)
    begun = output.read_bytes()
    with output.open("ab") as file:
        file.write(b'{"id": "half a rec')  # as a killed driver leaves it
    write(scans[:24], output, checkpoint)
    assert output.read_bytes().startswith(begun)
    names = [record["id"] for record in read_lines(output)[1:]]
    assert sorted(names) == sorted({scan.id for scan in scans[:24]} - BROKEN)
    before = output.read_bytes()
    with pytest.raises(BatchError, match="reference_seed was 0, is 1"):
        write(scans, output, checkpoint, reference_seed=1)
    assert output.read_bytes() == before


# The command, without a cluster


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Return the arguments of the pipeline, which is replaced by one that fails on the second of two scans."""
    found = {}

    def pretend(scans, output, *, on_progress, on_replaced, **options):
        found.update(options)
        file = SimpleNamespace(path=output, failures=output, done={scans[0].id: "0"}, failed=len(scans) - 1)
        on_progress(file)
        return file

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=lambda address: found.update(address=address)))
    monkeypatch.setattr(on_ray, "write_reports_with_ray", pretend)
    (tmp_path / "scans.txt").write_text("a.nii.gz\nb.nii.gz\n")
    return found


def invoke(folder, *options):
    command = [str(folder / "scans.txt"), "--engine", "transformers", "--output", str(folder / "reports.jsonl")]
    return CliRunner().invoke(ray_command.app, [*command, *options])


def test_command_has_the_options_and_status_of_batch(asked, tmp_path):
    result = invoke(tmp_path, "--workers", "3", "--dtype", "bfloat16", "--gpus", "0")
    assert result.exit_code == 1 and "1 scans could not be read" in result.output, result.output
    assert RESEARCH_USE in " ".join(result.stderr.split())
    assert asked["resources"] == Resources(workers=3, gpus=0) and asked["dtype"] == "bfloat16"
    assert asked["checkpoint"] == str(SHIPPED_CHECKPOINT) and asked["address"] is None
    assert invoke(tmp_path, "--allow-failures").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "scans.txt/reports.jsonl"], "output: below the file scans.txt (expected a file"),
        (["--engine", "nosuch"], "nosuch"),
        (["--reference", "absent"], "reference: missing"),
        (["--checkpoint", "absent/folder/here"], "absent/folder/here"),
    ],
)
def test_wrong_options_are_refused_before_the_cluster_starts(asked, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = invoke(tmp_path, *options)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert not asked
