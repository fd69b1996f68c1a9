# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

CORES = os.cpu_count() or 1


def _installed(engine: str) -> str:
    if find_spec(engine) is None:
        raise typer.BadParameter(f"{engine} is not installed in this environment; see docs/scaling.md.")
    return engine


Checkpoint = Annotated[
    str | None, typer.Option(help="Checkpoint folder or Hub id (default: the checkpoint shipped with the package).")
]
Revision = Annotated[str | None, typer.Option(help="Commit of a checkpoint on the Hub; pinning one is recommended.")]
Engine = Annotated[
    Literal["transformers", "vllm"], typer.Option(help="Decoding engine (docs/scaling.md).", callback=_installed)
]
AnyAnatomy = Annotated[
    bool, typer.Option("--allow-any-anatomy", help="Also write reports of scans that show no lungs.")
]
Scans = Annotated[
    Path, typer.Argument(help="Folder of scans, a list of them (text, or .csv with a column `path`), or one scan.")
]
ReportLines = Annotated[
    Path, typer.Option(help="Output file (JSON lines). The same command continues an interrupted run.")
]
References = Annotated[
    str | None,
    typer.Option(
        help="Normal scan, folder or list of normal scans, or `nearest` (default: drawn from the checkpoint's)."
    ),
]
AllowFailures = Annotated[
    bool, typer.Option("--allow-failures", help="Exit with status 0 even if scans could not be read.")
]
Dicom = Annotated[
    Path | None,
    typer.Option(help="Write structured report and difference map as DICOM to this folder (docs/clinical.md)."),
]
Fhir = Annotated[bool, typer.Option("--fhir", help="Also write a FHIR DiagnosticReport (docs/clinical.md).")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of terminal tables.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "int8"] | None,
    typer.Option(help="Data type of the weights. int8 is for the LLM only, on a CPU (default: the checkpoint's)."),
]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Open the figure when it is written.")]
ReferenceSeed = Annotated[int, typer.Option(min=0, help="Random seed for the choice of the reference.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Maximum length of a report, in tokens (default: the checkpoint's).")
]
Readers = Annotated[int, typer.Option(min=1, help="Number of threads that read scans.")]
Radbert = Annotated[
    str | None,
    typer.Option(help="Label with RadBERT instead of the rules: a folder, or IAMJB/RadBERT-CT on the Hub."),
]
ReportsLeaveMachine = Annotated[
    bool,
    typer.Option("--reports-leave-machine", help="Allow a server on another machine. It will see all reports."),
]
