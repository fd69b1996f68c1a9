# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The folder of a report: the names of its files, and how it appears, complete or not at all.

Without PyTorch, so that a command can refuse a folder at once.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

REPORT_TEXT, REPORT_JSON, TRUE_REPORT = "report.txt", "report.json", "true_report.txt"
DIFFERENCE_MAP, FIGURE = "difference_map.nii.gz", "figure.png"
DIAGNOSTIC_REPORT = "diagnostic_report.json"  # from `diffvp report --fhir`
REPORT_FILES = {REPORT_TEXT, REPORT_JSON, TRUE_REPORT, DIFFERENCE_MAP, FIGURE, DIAGNOSTIC_REPORT}


class ReportError(ValueError):
    """A report cannot be written as asked; the message says what to change."""


def check_output(output: Path) -> None:
    """
    Check that a folder for a report is absent, empty, or holds an earlier report, which will be replaced.

    Raises:
        ReportError: it holds other files, or is a file.
    """
    if output.is_dir():
        others = sorted({path.name for path in output.iterdir()} - REPORT_FILES)
        if others:
            raise ReportError(f"{output} holds other files ({', '.join(others[:3])}): choose another output folder.")
    elif output.exists():
        raise ReportError(f"{output} is a file: choose another output folder.")


@contextlib.contextmanager
def staged(output: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` if nothing fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.part"
    stage.mkdir()
    try:
        yield stage
        _publish(stage, output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # it no longer exists if it was published


def _publish(stage: Path, output: Path) -> None:
    """Move a complete folder to its place by renaming; an earlier report is replaced."""
    if not output.exists():
        os.rename(stage, output)
        return
    check_output(output)  # it may have changed in the meantime
    previous = stage.with_suffix(".old")
    os.rename(output, previous)
    try:
        os.rename(stage, output)
    except BaseException:
        os.rename(previous, output)
        raise
    shutil.rmtree(previous)
