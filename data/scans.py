# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Find the scans of a folder or of a list."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..slices_diffvp import is_dicom
from .cases import SCAN_SUFFIXES, DatasetError, Problem, raise_problems, read_csv, shown
from .table import PATH_COLUMNS

NEAREST = "nearest"  # in place of a list of normal scans: the checkpoint's own, most similar to the scan
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


@dataclass(frozen=True)
class ListedScan:
    """A scan with its name in the output."""

    id: str
    path: Path


def listed_path(scan: Path, listing: Path) -> str:
    """Return the path of a scan for a list: relative to the list if the scan is in its folder, else absolute."""
    scan, folder = scan.absolute(), listing.absolute().parent
    return scan.relative_to(folder).as_posix() if scan.is_relative_to(folder) else str(scan)


def list_scans(source: str | os.PathLike) -> list[ListedScan]:
    """
    List the scans of a folder, at any depth, or of a list; a single scan is a list of one.

    A list is a text file with one path per line, optionally after a name and a tab (as in the file of `diffvp pool
    build`), or a .csv file with a column `path` (or `file_name`) and optionally a column `id` with the names. Without
    names, paths are names. Paths are relative to the list. A folder of DICOM slices is one scan.

    Raises:
        DatasetError: all problems of the list. The scans themselves are not read here.
    """
    source, problems = Path(source).absolute(), []
    if source.is_dir():
        found = find_scans(source)
        if not found:
            expected = f"one of {', '.join(SCAN_SUFFIXES)}, or folders of DICOM slices"
            raise DatasetError([Problem(source.name, None, "scans", "none in the folder", expected)])
        names = [source.name if path == source else path.relative_to(source).as_posix() for path in found]
        return list(map(ListedScan, names, found))
    if source.name.lower().endswith(SCAN_SUFFIXES) and source.is_file():
        return [ListedScan(source.name, source)]
    scans, rows = [], {}
    for number, name, path in _listed(source, problems):
        if not path:
            problems.append(Problem(source.name, number, "path", "empty", "the path of a scan"))
        elif name in rows:
            found = f"{shown(name)}, as in row {rows[name]}"
            problems.append(Problem(source.name, number, "id", found, "one row per id"))
        rows.setdefault(name, number)
        scans.append(ListedScan(name, source.parent / path))
    if not (scans or problems):
        problems.append(Problem(source.name, None, "list", "empty", "paths of scans"))
    raise_problems(problems)
    return scans


def _listed(source: Path, problems: list[Problem]) -> Iterator[tuple[int, str, str]]:
    """Yield row number, name and path of each scan of a list."""
    if source.suffix.lower() not in (".csv", ".tsv"):
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            found = "missing" if isinstance(error, FileNotFoundError) else "no text"
            expected = "a folder of scans, or a list of them: text in UTF-8, or a table with a column path"
            problems.append(Problem(source.name, None, "list", found, expected))
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                name, _, path = (part.strip() for part in line.strip().rpartition("\t"))
                yield number, name or path, path
        return
    rows = read_csv(source, (), problems) or []
    column = next((column for column in PATH_COLUMNS if rows and column in rows[0].values), None)
    if rows and column is None:
        problems.append(
            Problem(source.name, 1, "header", "column path missing", "path or file_name, with the paths of the scans")
        )
        return
    for number, values in rows:
        path = values[column].strip()
        yield number, (values.get("id") or path).strip(), path
