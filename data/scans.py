# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Find the scans in a folder."""

import os
from pathlib import Path

from ..slices_diffvp import is_dicom
from .cases import SCAN_SUFFIXES

DICOM_SUFFIXES = ("", ".dcm", ".dicom", ".ima")  # or a number, since DICOM files are often named by their UID
HEAD = 132  # bytes that identify a DICOM file


def find_scans(folder: str | os.PathLike) -> list[Path]:
    """
    Find all scans below a folder, sorted by path: files with a known suffix, and folders of DICOM slices, each as one
    scan. Hidden files and folders are skipped.
    """
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name) for name in sorted(files) if not name.startswith(".")]
        found += [path for path in paths if path.name.lower().endswith(SCAN_SUFFIXES)]
        if any(_is_slice(path) for path in paths):
            found.append(Path(root))
    return sorted(found)


def _is_slice(path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix not in DICOM_SUFFIXES and not suffix[1:].isdigit():
        return False
    if path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    with path.open("rb") as file:
        return is_dicom(file.read(HEAD))
