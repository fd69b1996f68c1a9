# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write the reports of many scans on many machines, as a Ray Data pipeline. `cli/ray.py` is the command.

1. CPU tasks read and resample the scans: `workers` at a time, on any node with a free core.
2. Actors, one per GPU, encode and decode them. Each holds the model, its engine and its encoded references.
3. This process writes the reports as the batches arrive, to the same file as `diffvp batch`: a few kB per report.

At most `workers` tasks of a few scans each and two batches per actor are in flight. If a process or node dies, Ray
Data runs its tasks again and restarts its actors, without a limit. Only this process writes, so no report is written
twice. If it dies, the next run writes the missing reports.

Scans, and a checkpoint that is not on the Hub, must have the same path on every node.
"""

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data.scans import NEAREST, ListedScan
from ..processing_diffvp import DiffVPImageProcessor
from ..references_diffvp import path_sha256
from .batch import ReportWriter
from .report_file import ReportFile

# Scans per reading task. If a task dies, these are read again; one task per scan would overload the scheduler.
SCANS_PER_TASK = 8
READING_BYTES = 600 * 2**20  # peak memory of a task, for a scan of 512 x 512 x 300


@dataclass(frozen=True)
class Resources:
    """
    Resources of the pipeline.

    Args:
        workers: number of concurrent reading tasks.
        engines: number of actors.
        gpus: GPUs per actor; 0 computes on the CPU.
        cpus: cores per actor.
    """

    workers: int
    engines: int = 1
    gpus: float = 1.0
    cpus: float = 1.0


class ReportActor:
    """A [`ReportWriter`] on a GPU. It takes a batch of pickled scans and returns a row of JSON."""

    def __init__(self, **options):
        self.writer = ReportWriter(**options)

    def __call__(self, batch: dict) -> dict:
        scans = [pickle.loads(scan) for scan in batch["scan"]]  # made by `read_scan`, never from outside the pipeline
        digests = [digest or None for digest in batch["file_sha256"].tolist()]
        records, failures = self.writer.write(zip(batch["id"].tolist(), digests, scans, strict=True))
        return {"result": [json.dumps({"header": self.writer.header, "records": records, "failures": failures})]}


def read_scan(row: dict, image_processor: DiffVPImageProcessor, allow_any_anatomy: bool = False) -> dict:
    """Return the pickled features of a scan, or the error that refused it."""
    path = Path(row["path"])
    file_sha256 = path_sha256(path) if path.exists() else ""  # hashed before reading, as in `ReportWriter.read`
    [features] = image_processor.stream([path], digest=True, allow_any_anatomy=allow_any_anatomy)
    return {"id": row["id"], "file_sha256": file_sha256, "scan": pickle.dumps(features)}


def write_reports_with_ray(
    scans: Sequence[ListedScan],
    output: str | os.PathLike,
    *,
    batch_size: int,
    resources: Resources,
    on_progress: Callable[[ReportFile], None] = lambda file: None,
    on_replaced: Callable[[int], None] = lambda count: None,
    **options,
) -> ReportFile:
    """
    Write the reports of all scans that `output` does not hold yet. Ray must be running (`ray.init`).

    Args:
        batch_size: number of scans that an actor decodes together.
        on_progress: called after each batch.
        on_replaced: as in `batch.write_reports`.
        options: options of [`ReportWriter`].

    Raises:
        BatchError: `output` is not a file of reports, or was started with other settings.
    """
    import ray

    if os.path.isdir(options["checkpoint"]):
        options["checkpoint"] = os.path.abspath(options["checkpoint"])  # workers run in other folders
    if options.get("reference") not in (None, NEAREST):
        options["reference"] = os.path.abspath(options["reference"])
    hub_kwargs = options.get("hub_kwargs") or {}
    image_processor = DiffVPImageProcessor.from_pretrained(options["checkpoint"], **hub_kwargs)
    with ReportFile(output) as file:
        waiting, replaced = file.waiting(scans)
        if replaced:
            on_replaced(replaced)
        on_progress(file)
        rows = [{"id": scan.id, "path": str(scan.path)} for scan in waiting]
        if not rows:
            return file
        results = (
            ray.data.from_items(rows, override_num_blocks=-(-len(rows) // SCANS_PER_TASK))
            .map(
                read_scan,
                fn_kwargs={
                    "image_processor": image_processor,
                    "allow_any_anatomy": options.get("allow_any_anatomy", False),
                },
                compute=ray.data.TaskPoolStrategy(resources.workers),
                num_cpus=1,
                memory=READING_BYTES,
            )
            .map_batches(
                ReportActor,
                fn_constructor_kwargs=options,
                batch_size=batch_size,
                compute=ray.data.ActorPoolStrategy(size=resources.engines, max_tasks_in_flight_per_actor=2),
                num_cpus=resources.cpus,
                num_gpus=resources.gpus,
            )
        )
        for row in results.iter_rows():
            result = json.loads(row["result"])
            file.begin(result["header"])
            file.add(result["records"], result["failures"])
            on_progress(file)
    return file
