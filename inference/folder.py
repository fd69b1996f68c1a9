# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The folder of a report: the names of its files, and a check that a report may be written to it.

Without PyTorch, so that a command can refuse a folder at once.
"""

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
