# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
`diffvp batch` on many machines, with Ray. Needs the extra `ray` (docs/scaling.md).

    python -m diffvp.cli.ray scans.csv --output reports.jsonl --checkpoint NAME/MODEL --engines 4 --workers 40
"""

import functools
import os
from pathlib import Path
from typing import Annotated

import typer

from ..extras import needs_libraries
from ..report_diffvp import RESEARCH_USE
from .console import err, find_checkpoint, listed_problems, one_line_errors, quiet
from .options import (
    AllowFailures,
    AnyAnatomy,
    Checkpoint,
    Dtype,
    Engine,
    MaxNewTokens,
    References,
    ReferenceSeed,
    ReportLines,
    Revision,
    Scans,
)
from .reports import check_dtype, list_batch, run_batch

app = typer.Typer(pretty_exceptions_enable=False)  # as in `diffvp`: its traceback would show paths and report text


@app.command()
def batch(
    scans: Scans,
    output: ReportLines = Path("outputs/reports.jsonl"),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    engine: Engine = "vllm",
    dtype: Dtype = None,
    engines: Annotated[int, typer.Option(min=1, help="Number of actors that encode and decode.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs per actor; 0 computes on the CPU.")] = 1.0,
    cpus: Annotated[float, typer.Option(min=0, help="Cores per actor.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of scans to decode together.")] = 64,
    workers: Annotated[int, typer.Option(min=1, help="Number of concurrent tasks that read scans.")] = 8,
    reference: References = None,
    seed: ReferenceSeed = 0,
    max_new_tokens: MaxNewTokens = None,
    allow_any_anatomy: AnyAnatomy = False,
    allow_failures: AllowFailures = False,
    address: Annotated[
        str | None, typer.Option(help="Address of the Ray cluster (default: RAY_ADDRESS, or a local cluster).")
    ] = None,
) -> None:
    """Write the reports of many scans with Ray, one JSON line each. Unreadable scans are skipped and listed."""
    check_dtype(engine, dtype)
    listed = list_batch(scans, output, reference)
    name, hub_kwargs = find_checkpoint(checkpoint, revision)
    with needs_libraries():
        import ray
    quiet()
    from ..inference.ray import Resources, write_reports_with_ray
    from ..inference.report import EXPECTED_ERRORS

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # disables telemetry
    with one_line_errors(*EXPECTED_ERRORS), listed_problems():
        err.print(RESEARCH_USE, style="bold yellow")
        ray.init(address=address)
        write = functools.partial(
            write_reports_with_ray, listed, output, batch_size=batch_size,
            resources=Resources(workers, engines, gpus, cpus), checkpoint=name, engine=engine, reference=reference,
            reference_seed=seed, max_new_tokens=max_new_tokens, dtype=dtype, allow_any_anatomy=allow_any_anatomy,
            hub_kwargs=hub_kwargs,
        )  # fmt: skip
        run_batch(write, output, len(listed), allow_failures)


if __name__ == "__main__":
    app()
