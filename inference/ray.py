# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Run `diffvp batch` on many machines, as a Ray Data pipeline. Needs the extra `ray`.

    python -m diffvp.inference.ray scans.csv --output reports.jsonl --checkpoint NAME/MODEL --engines 4 --workers 40

1. CPU tasks read and resample the scans: `--workers` at a time, on any node with a free core.
2. Actors, one per GPU, encode and decode them. Each holds the model, its engine and its encoded references.
3. This process writes the reports as the batches arrive, to the same file as `diffvp batch`: a few kB per report.

At most `--workers` tasks of a few scans each and two batches per actor are in flight. If a process or node dies, Ray
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
from typing import Annotated

import typer

from ..cli.console import (
    check_found,
    check_kept,
    check_writable,
    err,
    find_checkpoint,
    listed_problems,
    one_line_errors,
    resumable,
    say,
    warn,
)
from ..cli.options import AnyAnatomy, Checkpoint, Dtype, Engine, MaxNewTokens, ReferenceSeed, Revision
from ..data.scans import NEAREST, ListedScan, list_scans
from ..extras import needs_libraries
from ..processing_diffvp import DiffVPImageProcessor
from ..progress import counting
from ..references_diffvp import path_sha256
from ..report_diffvp import RESEARCH_USE
from .batch import ReportWriter
from .report import EXPECTED_ERRORS
from .report_file import BatchError, ReportFile

# Scans per reading task. This is what is read again if a task dies; one task per scan would overload the scheduler.
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


def main(
    scans: Annotated[
        Path,
        typer.Argument(help="Folder of scans, a list of them (text, or .csv with a column `path`), or one scan."),
    ],
    output: Annotated[Path, typer.Option(help="JSON lines file. An interrupted run continues with it.")] = Path(
        "outputs/reports.jsonl"
    ),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    engine: Engine = "vllm",
    dtype: Dtype = None,
    engines: Annotated[int, typer.Option(min=1, help="Number of actors that encode and decode.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per actor; 0 computes on the CPU.")] = 1.0,
    cpus: Annotated[float, typer.Option(min=0, help="Cores per actor.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of scans to decode together.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Number of concurrent tasks that read scans.")] = 8,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Normal scan, folder or list of normal scans, or `nearest` (default: drawn from the checkpoint's)."
        ),
    ] = None,
    seed: ReferenceSeed = 0,
    max_new_tokens: MaxNewTokens = None,
    allow_any_anatomy: AnyAnatomy = False,
    allow_failures: Annotated[
        bool, typer.Option("--allow-failures", help="Exit with status 0 even if scans could not be read.")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster (default: RAY_ADDRESS, or a local cluster).")
    ] = None,
) -> None:
    """Write the reports of many scans with Ray, one JSON line each. Unreadable scans are skipped and listed."""
    check_writable(files=[output])
    check_kept(output, scans)
    check_found(scans, what="list", expected="a folder of scans, or a list of them: text in UTF-8, or a .csv table")
    if engine == "vllm" and dtype == "int8":
        raise typer.BadParameter("--dtype int8 is for the engine transformers.")
    if reference not in (None, NEAREST):
        expected = f"a normal scan, a folder or a list of them, or {NEAREST}"
        check_found(Path(reference), what="reference", expected=expected)
    name, hub_kwargs = find_checkpoint(checkpoint, revision)
    with needs_libraries():
        import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # disables telemetry
    with one_line_errors(*EXPECTED_ERRORS, BatchError), listed_problems():
        listed = list_scans(scans)
        ReportFile(output)  # another file is refused before the cluster starts
        err.print(RESEARCH_USE, style="bold yellow")
        ray.init(address=address)
        with resumable(output), counting("Scans", err) as count:
            file = write_reports_with_ray(
                listed, output, batch_size=batch_size, resources=Resources(workers, engines, gpus, cpus),
                on_progress=lambda file: count(len(file.done) + file.failed, len(listed)),
                on_replaced=lambda count: warn(
                    f"{output.name} already has reports under the names of {count} of these scans, whose content is "
                    "different: they are read, and their reports are added.", style=None,
                ),
                checkpoint=name, engine=engine, reference=reference, reference_seed=seed,
                max_new_tokens=max_new_tokens, dtype=dtype, allow_any_anatomy=allow_any_anatomy, hub_kwargs=hub_kwargs,
            )  # fmt: skip
    say(f"{len(file.done)} reports: {file.path}")
    if file.failed:
        say(f"{file.failed} scans could not be read: {file.failures}")
        if not allow_failures:
            raise typer.Exit(1)


app = typer.Typer(pretty_exceptions_enable=False)  # as in `diffvp`: its traceback would show paths and report text
app.command()(main)

if __name__ == "__main__":
    app()
