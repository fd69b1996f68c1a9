# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Find the scans of a folder or of a list."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..folders_diffvp import DICOM_SUFFIXES, HEAD, is_dicom, walk_files
from ..slices_diffvp import DicomFile, read_header
from ..volume_diffvp import CTReadError
from .cases import SCAN_SUFFIXES, DatasetError, Problem, check_kind, is_missing, raise_problems, shown, shown_path
from .table import PATH_COLUMNS, TABLE_SUFFIXES, is_scan_file, read_rows

NEAREST = "nearest"  # in place of a list of normal scans: the checkpoint's own, most similar to the scan


def find_scans(folder: str | os.PathLike) -> list[Path]:
    """
    Find all scans below a folder, sorted by path: files with a known suffix, and folders of DICOM slices, each as one
    scan. Hidden files and folders are skipped.

    Raises:
        OSError: a folder or a DICOM file cannot be read.
    """
    found = []
    for root, files in walk_files(folder, hidden=False):
        paths = [Path(root, name) for name in files if not name.startswith(".")]
        found += [path for path in paths if path.name.lower().endswith(SCAN_SUFFIXES)]
        if any(_is_slice(path) for path in paths):
            found += _separate(paths) or [Path(root)]
    return sorted(found)


def _separate(paths: list[Path]) -> list[Path]:
    """
    Return the DICOM files of a folder if each is a scan of its own: several multi-frame files, each of another series.

    The files of one series may be the parts of one scan. The first slice ends the search, so that only one header of a
    folder of slices is read.
    """
    found: dict[str, Path] = {}
    for path in filter(_is_slice, paths):
        try:
            frames = read_header(DicomFile(path, "", path.name))
        except CTReadError:  # named when the folder is read as a scan
            return []
        if not isinstance(frames, list) or len(frames) < 2 or (uid := frames[0].text("SeriesInstanceUID")) in found:
            return []
        found[uid] = path
    return list(found.values()) if len(found) > 1 else []


def _is_slice(path: Path) -> bool:
    suffix = path.suffix.lower()
    # Without a suffix, or with a number as one: DICOM files are often named by their UID.
    if suffix not in ("", *DICOM_SUFFIXES) and not suffix[1:].isdigit():
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
    build`), or a table (.csv, .tsv or .jsonl) with a column `path` (or `file_name`) and optionally a column `id` with
    the names. Without names, paths are names. Paths are relative to the list. A folder of DICOM slices is one scan.

    Raises:
        DatasetError: all problems of the list. The scans themselves are not read here.
    """
    source, problems = Path(source).absolute(), []
    if source.is_dir():
        try:
            found = find_scans(source)
        except OSError as error:
            where = shown_path(Path(error.filename or source), source)
            problem = Problem(source.name, None, "folder", f"unreadable ({where})", "a folder that may be read")
            raise DatasetError([problem]) from error
        if not found:
            expected = f"one of {', '.join(SCAN_SUFFIXES)}, or folders of DICOM slices"
            raise DatasetError([Problem(source.name, None, "scans", "none in the folder", expected)])
        names = [source.name if path == source else path.relative_to(source).as_posix() for path in found]
        return list(map(ListedScan, names, found))
    if source.is_file() and is_scan_file(source):
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


def list_references(source: str | os.PathLike) -> list[ListedScan]:
    """
    List the normal scans that a user names, as [`list_scans`] does; all of them must exist.

    Raises:
        DatasetError: all problems of the list, or all scans that are missing.
    """
    scans, expected = list_scans(source), "an existing file or folder"
    raise_problems(
        [
            Problem(Path(source).name, None, "reference", "missing", expected, scan.id)
            for scan in scans
            if not os.path.exists(scan.path)  # unlike Path.exists, it takes a text that is too long for a path
        ]
    )
    return scans


def _listed(source: Path, problems: list[Problem]) -> Iterator[tuple[int, str, str]]:
    """Yield row number, name and path of each scan of a list."""
    if source.suffix.lower() not in TABLE_SUFFIXES:
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
    rows = read_rows(source, problems) or []
    columns = {column for row in rows for column in row.values}
    column = next((column for column in PATH_COLUMNS if column in columns), None)
    if column is None:
        expected = "path or file_name, with the paths of the scans"
        problems += [Problem(source.name, 1, "header", "column path missing", expected)] if rows else []
        return
    for number, values in rows:
        path, name = values.get(column), values.get("id")
        texts = check_kind(path, source.name, number, column, "", problems)
        if check_kind(name, source.name, number, "id", "", problems, number=True) and texts:
            path = "" if is_missing(path) else str(path).strip()
            yield number, path if is_missing(name) else str(name).strip(), path
