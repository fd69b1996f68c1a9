# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
`diffvp batch` on many machines, as a pipeline of Ray Data. Needs the extra `ray`.

    python -m diffvp.inference.ray scans.csv --output reports.jsonl --checkpoint NAME/MODEL --engines 4 --readers 40

1. Tasks on CPUs read and resample the scans: `--readers` of them at a time, on whichever node has a core.
2. Actors, one for each GPU, encode and decode them; each holds the model, its engine and the references that it has
   encoded.
3. This process writes the file of reports, the same that `diffvp batch` writes, as the batches come: a few kB each
   report.

In flight are at most `--readers` tasks of a few scans and two batches for each actor: the rest waits in the list. A
task of a process or node that dies is run again, and an actor started anew, as often as it takes: so does Ray Data.
Since one process alone writes, no report is there twice; what it had not written when it dies, the next run does.

Each node must find the scans, and a checkpoint that is not on the Hub, under the same path.
"""

import argparse
import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..extras import needs_libraries
from ..processing_diffvp import DiffVPImageProcessor
from ..references_diffvp import path_sha256
from .batch import NEAREST, ListedScan, ReportFile, ReportWriter, list_scans

# Scans of a reading task: what is lost when it dies. A task for each of a million would be many for the scheduler.
SCANS_PER_TASK = 8
READING_BYTES = 600 * 2**20  # that a task may take at its peak, for a scan of 512 x 512 x 300


@dataclass(frozen=True)
class Resources:
    """
    Args:
        readers: tasks that read at a time.
        engines: actors.
        gpus: for each actor; 0 computes on CPU.
        cpus: cores for each actor.
    """

    readers: int
    engines: int = 1
    gpus: float = 1.0
    cpus: float = 1.0


class ReportActor:
    """A [`ReportWriter`] on a GPU: a batch of pickled scans in, a row of JSON out."""

    def __init__(self, **options):
        self.writer = ReportWriter(**options)

    def __call__(self, batch: dict) -> dict:
        scans = [pickle.loads(scan) for scan in batch["scan"]]  # of `read_scan`, and of nobody outside the pipeline
        digests = [digest or None for digest in batch["file_sha256"].tolist()]
        records, failures = self.writer.write(zip(batch["id"].tolist(), digests, scans, strict=True))
        return {"result": [json.dumps({"header": self.writer.header, "records": records, "failures": failures})]}


def read_scan(row: dict, image_processor: DiffVPImageProcessor, allow_any_anatomy: bool = False) -> dict:
    """Features of a scan, or the error that refused it, pickled."""
    path = Path(row["path"])
    file_sha256 = path_sha256(path) if path.exists() else ""  # before it is read, as `ReportWriter.read` does
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
        batch_size: scans that an actor decodes together.
        on_progress: is told after each batch.
        on_replaced: as in `batch.write_reports`.
        options: of [`ReportWriter`].

    Raises:
        BatchError: `output` is no file of reports, or was begun with other settings.
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
                compute=ray.data.TaskPoolStrategy(resources.readers),
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


def main() -> None:
    with needs_libraries():
        import ray

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", type=Path, help="folder of scans, or list of them (text or .csv)")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines file; goes on where it was interrupted")
    parser.add_argument("--checkpoint", required=True, help="folder or Hub id")
    parser.add_argument("--revision", help="commit of a checkpoint on the Hub; pin one")
    parser.add_argument("--engine", default="vllm", help="transformers or vllm")
    parser.add_argument("--engines", type=int, default=1, help="actors that encode and decode")
    parser.add_argument("--gpus", type=float, default=1.0, help="for each actor; 0 computes on CPU")
    parser.add_argument("--cpus", type=float, default=1.0, help="cores for each actor")
    parser.add_argument("--readers", type=int, default=8, help="tasks that read at a time")
    parser.add_argument("--batch-size", type=int, default=64, help="scans that are decoded together")
    parser.add_argument("--reference", help="a normal scan, a folder or list of them, or nearest")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of references")
    parser.add_argument("--max-new-tokens", type=int, help="where to stop (default: the checkpoint's)")
    parser.add_argument("--allow-any-anatomy", action="store_true", help="also of scans without lungs")
    parser.add_argument("--address", help="of the Ray cluster (default: that of RAY_ADDRESS, or one started here)")
    arguments = parser.parse_args()

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers that it is in use
    ray.init(address=arguments.address)
    scans = list_scans(arguments.scans)
    file = write_reports_with_ray(
        scans,
        arguments.output,
        batch_size=arguments.batch_size,
        resources=Resources(arguments.readers, arguments.engines, arguments.gpus, arguments.cpus),
        checkpoint=arguments.checkpoint,
        engine=arguments.engine,
        reference=arguments.reference,
        reference_seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
        allow_any_anatomy=arguments.allow_any_anatomy,
        hub_kwargs={} if arguments.revision is None else {"revision": arguments.revision},
    )
    Console().print(f"{len(file.done)} reports; {file.failed} scans could not be read", highlight=False)


if __name__ == "__main__":
    main()
