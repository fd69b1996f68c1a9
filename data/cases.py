# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The common form of all datasets: a list of [`Case`], or one [`DatasetError`] that lists all problems.

The loaders (`ct_rate.py`, `radgenome.py`, `ctrg.py`, `table.py`) check every table and volume before they raise, so
that all problems are known before a run starts and can be corrected together. Messages name tables, rows, columns, ids
and files. They never contain the text of a report, even if columns are swapped.
"""

import hashlib
import html
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from numbers import Number
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from ..nifti_diffvp import read_table
from ..reading_diffvp import CTMetadata
from ..volume_diffvp import CTReadError

SHOWN_PROBLEMS = 20
# The ten regions of RadGenome, and "others" for sentences without a region.
REGION_NAMES = (*REGIONS, "others")
SPLITS = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "testing"),
}
SCAN_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".zip")
# CT-RATE writes "Not given." for an empty field, and pandas converts one to the text "nan".
EMPTY_REPORTS = ("", "not given", "nan")
# Escapes that Office writes for characters not allowed in XML, with a following line break, and their replacements.
_ESCAPE = re.compile(r"_x(00[01][0-9A-Fa-f]|FFFF)_(?:(?<=_x000[Dd]_)\r?\n)?")
_CONTROLS = {"000D": "\n", "000A": "\n", "0009": " "}
_ENTITY = re.compile(r"&(?:[A-Za-z][A-Za-z0-9]{1,30}|#\d{1,7}|#[xX][0-9A-Fa-f]{1,6});")
_INLINE = "a|b|em|font|i|small|span|strong|sub|sup|u"
_BLOCK = "br|div|h[1-6]|hr|li|ol|p|pre|table|tbody|td|tr|ul"
_ATTRIBUTES = r"""(?:\s+[\w:-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s<>"']+))*\s*/?>"""
_TAG = re.compile(rf"</?(?:({_INLINE})|{_BLOCK}){_ATTRIBUTES}", re.I)
# Markup of any other kind. A report may contain a plain "<", as in "nodules < 5 mm".
_MARKUP = re.compile(
    rf"</?[A-Za-z][\w:-]*{_ATTRIBUTES}|<!--|<!\[CDATA\[|<!DOCTYPE|<\?xml|_x[0-9A-F]{{4}}_|\{{\\rtf", re.I
)
# Text with a space may be a sentence of a report.
_HARMLESS = re.compile(r"[A-Za-z0-9_.:/\\+()=-]{1,100}")


@dataclass(frozen=True, eq=False)
class Case:
    """One volume with its report.

    Attributes:
        name: unique within the dataset.
        patient_id: identifier by which splits are made.
        scan_id: shared by the reconstructions of one scan, which also share the report.
        volume: path of a file or DICOM folder, or the undecoded {"path", "bytes"} value of a `datasets` stream;
            `read_ct` takes both.
        report: the findings, never empty.
        labels: int8 (18,) of 0 and 1 in the order of `DIAGNOSIS_LABELS`; `None` if the dataset has none.
        region_sentences: region -> its part of the report, if the dataset divides reports.
        disorders: RadGenome's summary, "no findings" for a normal scan; empty if there is none.
        normal: value of the table's column `normal`; `None` without this column.
        row: row number in the table that lists the cases, as in a spreadsheet (the header is row 1); for tables
            without a header, the position from 1.
        metadata: spacing and rescale of a volume with a blank header, for `read_ct(metadata=)`.
    """

    name: str
    patient_id: str
    scan_id: str
    volume: Path | dict
    report: str = field(repr=False)
    labels: np.ndarray | None = None
    region_sentences: dict[str, str] = field(default_factory=dict, repr=False)
    disorders: str = ""
    normal: bool | None = None
    row: int = 0
    metadata: CTMetadata | None = None

    @property
    def identity(self) -> bytes:
        """Name, report and labels as bytes, for digests of cases."""
        labels = "" if self.labels is None else self.labels.tolist()
        return f"{self.name}\0{self.report}\0{labels}\0".encode()


@dataclass(frozen=True)
class Problem:
    """One problem: its location (`table`, `row`, `field`, `name` of the case), what was found, and what was expected.

    `found` is safe to show in a message. `name` is the original value of the table, made safe when it is shown.
    """

    table: str
    row: int | None
    field: str
    found: str
    expected: str
    name: str = field(default="", repr=False)

    def __str__(self) -> str:
        place = self.table + (f", row {self.row}" if self.row is not None else "")
        place += f" ({shown(self.name)})" if self.name else ""
        return f"{place}: {self.field}: {self.found} (expected {self.expected})"


class DatasetError(ValueError):
    """All problems of a dataset, in `problems`. The message shows the first 20 and counts the rest."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = len(self.problems)
        lines = [f"{count} problem{'s' if count != 1 else ''} in the dataset:"]
        lines += [f"- {problem}" for problem in self.problems[:SHOWN_PROBLEMS]]
        if count > SHOWN_PROBLEMS:
            lines.append(f"... and {count - SHOWN_PROBLEMS} more")
        if any(problem.name for problem in self.problems):
            lines.append("Correct the tables, or name the cases to leave out (`exclude`).")
        return "\n".join(lines)


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise a [`DatasetError`] if there are problems."""
    if problems:
        raise DatasetError(problems)


# Choosing among cases -----------------------------------------------------------------------------------------------


def split_by_patient(cases: Sequence[Case], fraction: float, seed: int | str) -> tuple[list[Case], list[Case]]:
    """
    Split cases into (training, validation). About `fraction` of the patients, with all their scans, go to validation.

    The side of a patient depends only on (seed, patient), and so does not change when cases are added or reordered. If
    a side would be empty, the patient closest to the limit moves to it.

    Raises:
        ValueError: `fraction` is not between 0 and 1, or there are fewer than two patients.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: expected a number between 0 and 1")
    patients = {case.patient_id for case in cases}
    if len(patients) < 2:
        raise ValueError(f"{len(patients)} patient(s): expected at least two, one for each side")

    def position(patient: str) -> float:
        return chance(f"{seed}:{patient}")

    ordered = sorted(patients, key=position)
    count = sum(position(patient) < fraction for patient in ordered)
    held_out = set(ordered[: min(max(count, 1), len(ordered) - 1)])
    return (
        [case for case in cases if case.patient_id not in held_out],
        [case for case in cases if case.patient_id in held_out],
    )


def chance(key: str) -> float:
    """Return a number in [0, 1) that depends only on the key and is uniform over keys."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def first_reconstructions(cases: Sequence[Case]) -> list[Case]:
    """Keep one case per scan: the one whose name ends in the lowest number, or the first if names end in none."""
    first: dict[str, Case] = {}
    for case in cases:
        if case.scan_id not in first or _reconstruction(case) < _reconstruction(first[case.scan_id]):
            first[case.scan_id] = case
    # Keep the order of the cases, whichever reconstruction of a scan came first.
    chosen = {case.name for case in first.values()}
    return [case for case in cases if case.name in chosen]


def _reconstruction(case: Case) -> int:
    digits = re.search(r"_(\d+)$", case.name)
    return int(digits[1]) if digits else 0


def check_no_leak(train: Iterable[Case], validation: Iterable[Case], other: str = "validation") -> None:
    """
    Check that two sides share no patient and no file.

    Args:
        other: name of the second side in messages.

    Raises:
        DatasetError: a patient or a file is on both sides.
    """
    train = list(train)
    patients = {case.patient_id for case in train}
    volumes = {case.volume for case in train if isinstance(case.volume, Path)}
    problems, seen = [], set()
    for case in validation:
        if case.patient_id in patients and case.patient_id not in seen:
            seen.add(case.patient_id)
            found = f"{shown(case.patient_id)} in training and in {other}"
            problems.append(Problem("splits", case.row, "patient_id", found, "one of the two", case.name))
        elif isinstance(case.volume, Path) and case.volume in volumes:
            found = f"{shown(case.volume.name)} in training and in {other}"
            problems.append(Problem("splits", case.row, "volume", found, "one of the two", case.name))
    raise_problems(problems)


# Reading tables -----------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A table row: its number, and its values by column."""

    number: int
    values: Mapping[str, object]


def canonical_split(split: str, known: Collection[str] = tuple(SPLITS)) -> str:
    """Return "train", "valid" or "test" for any of their usual names.

    Raises:
        ValueError: the split is not one of `known`.
    """
    for name in known:
        if split in SPLITS[name]:
            return name
    raise ValueError(f"unknown split {split!r}: expected one of {sorted(known)}")


def shown(value: object, limit: int = 100) -> str:
    """Make a value safe for a message: itself if it can only be an id, a number or a file name, else its length."""
    text = value if isinstance(value, str) else repr(value)
    if not text.strip():
        return "empty"
    if len(text) <= limit and _HARMLESS.fullmatch(text):
        return repr(text)
    return f"text of {len(text)} characters"


def shown_path(path: Path, root: Path) -> str:
    """Make a path, relative to the root of the dataset, safe for a message."""
    return shown(path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix())


def is_missing(value: object) -> bool:
    """True if a table value is missing: None, NaN, or only white space."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or not str(value).strip()


def check_kind(
    value: object, table: str, row: int, column: str, name: str, problems: list[Problem], *, number: bool = False
) -> bool:
    """
    True if a value is text or missing; else add a problem, since the `str` of a list or an object is no report or id.

    Args:
        number: also accept numbers, as ids are written in JSON.
    """
    numeric = isinstance(value, Number) and not isinstance(value, bool)
    if isinstance(value, str) or is_missing(value) or (number and numeric):
        return True
    kinds = {"true or false": bool, "a number": Number, "an object": Mapping, "a list": (list, tuple, np.ndarray)}
    found = next((found for found, kind in kinds.items() if isinstance(value, kind)), f"a {type(value).__name__}")
    problems.append(Problem(table, row, column, found, "text or a number" if number else "text", name))
    return False


def plain_text(value: object) -> str:
    """Remove markup that spreadsheets and web pages leave in a text; a model would learn to write it.

    Escapes of control characters (`_x000D_`) and tags (`<br>`) become a line break or nothing, and entities (`&gt;`,
    `&nbsp;`) become their characters. A text without any of them is unchanged.
    """
    text, before = str(value), None
    while text != before:  # repeat, since entities may encode tags or other entities
        before = text
        text = _ESCAPE.sub(lambda found: _CONTROLS.get(found[1].upper(), ""), text)
        text = _ENTITY.sub(lambda found: html.unescape(found[0]).replace("\xa0", " "), text)
        text = _TAG.sub(lambda found: "" if found[1] else "\n", text)
    return text


def _text_or_empty(value: object) -> str:
    """Return the report text of a table value, or "" for the usual ways to mark a missing report."""
    if is_missing(value) or str(value).strip().rstrip(".").lower() in EMPTY_REPORTS:
        return ""
    text = plain_text(value)
    return text if text.strip() else ""


def check_report(value: object, table: str, row: int, column: str, name: str, problems: list[Problem]) -> str:
    """Return the report of a case, and add a problem if it is missing, no text, or has markup."""
    if not check_kind(value, table, row, column, name, problems):
        return ""
    text = _text_or_empty(value)
    if not text:
        found = "empty" if is_missing(value) else repr(str(value).strip()[:12])
        problems.append(Problem(table, row, column, found, "the text of a report", name))
    check_markup(text, table, row, column, name, problems)
    return text


def check_markup(text: str, table: str, row: int, column: str, name: str, problems: list[Problem]) -> None:
    """Add a problem if a text contains markup."""
    found = _MARKUP.search(text)
    if found:
        place = f"with markup at character {found.start() + 1}"
        problems.append(Problem(table, row, column, place, "plain text", name))


def check_flag(value: object, table: str, row: int, column: str, name: str, problems: list[Problem]) -> int:
    """Return 0 or 1, also for 1.0 (from tables with gaps) and true (JSON); add a problem for other values."""
    text = str(int(value)) if isinstance(value, bool) else str(value).strip()
    if text.removesuffix(".0") in ("0", "1"):
        return int(text[0])
    found = "missing" if is_missing(value) else shown(value, limit=12)
    problems.append(Problem(table, row, column, found, "0 or 1", name))
    return 0


def check_labels(
    values: Mapping[str, object],
    table: str,
    row: int,
    name: str,
    problems: list[Problem],
    columns: Sequence[str] = DIAGNOSIS_LABELS,
) -> np.ndarray:
    """Return the labels of a row, int8 (columns,), and add a problem for each value other than 0 and 1."""
    return np.array([check_flag(values.get(label), table, row, label, name, problems) for label in columns], np.int8)


def read_csv(
    path: Path,
    required: Iterable[str],
    problems: list[Problem],
    *,
    check_columns: Callable[[list[str], list[Problem]], None] | None = None,
) -> list[Row] | None:
    """
    Read the rows of a table (see [`read_table`]). If it is unreadable or lacks a column, add a problem and return
    `None`.

    Args:
        check_columns: called with the columns and `problems`, to add problems of the columns.
    """
    if not path.is_file():
        problems.append(Problem(path.name, None, "file", "missing", f"a table in {path.parent.name}/"))
        return None
    before = len(problems)
    try:
        with closing(read_table(path)) as table:
            _, columns = next(table, (1, []))
            missing = [column for column in required if column not in columns]
            if missing:
                found = ", ".join(column if column in DIAGNOSIS_LABELS else shown(column) for column in columns)
                problems.append(Problem(path.name, 1, "header", found or "empty", f"also {', '.join(missing)}"))
            double = sorted({column for column in columns if columns.count(column) > 1})
            problems += [
                Problem(path.name, 1, "header", f"{shown(column)} twice", "each column once") for column in double
            ]
            if check_columns is not None:
                check_columns(columns, problems)
            if len(problems) > before:
                return None
            rows = []
            for number, fields in table:
                if len(fields) == len(columns):
                    rows.append(Row(number, dict(zip(columns, fields, strict=True))))
                elif fields:  # not an empty line
                    problems.append(
                        Problem(path.name, number, "row", f"{len(fields)} fields", f"{len(columns)} as in the header")
                    )
            return rows
    except CTReadError as error:
        problems.append(Problem(path.name, None, error.field, error.found, error.expected))
        return None


def read_json_lines(path: Path, problems: list[Problem]) -> list[Row]:
    """Read a file of JSON lines, and add a problem for each line that is no object, or if the file is unreadable."""
    rows = []
    try:
        # newline: reports may contain other characters that Python counts as line ends.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    except UnicodeDecodeError:
        problems.append(Problem(path.name, None, "content", "not UTF-8", "JSON lines in UTF-8"))
        return rows
    except OSError:
        problems.append(Problem(path.name, None, "file", "unreadable", "a readable table"))
        return rows
    for number, line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(Problem(path.name, number, "line", f"unreadable from column {error.colno} on", "JSON"))
            continue
        if isinstance(values, dict):
            rows.append(Row(number, values))
        else:
            problems.append(Problem(path.name, number, "line", f"a {type(values).__name__}", "an object"))
    return rows


def volume_name(value: object) -> str:
    """Return the name of a volume for an id, which tables and lists write with or without the suffix."""
    return str(value).strip().removesuffix(".nii.gz")


def by_name(
    rows: list[Row] | None, column: str, table: str, keep: Callable[[str], bool], problems: list[Problem]
) -> dict[str, Row] | None:
    """Index the rows of a table by volume, and add a problem for each empty or repeated name."""
    if rows is None:
        return None
    found: dict[str, Row] = {}
    for row in rows:
        name = volume_name(row.values[column])
        if not name:
            problems.append(Problem(table, row.number, column, "empty", "the name of a volume"))
        elif name in found:
            again = f"the same as in row {found[name].number}"
            problems.append(Problem(table, row.number, column, again, "one row per id", name))
        elif keep(name):
            found[name] = row
    return found


def check_rows(
    listed: Mapping[str, int], rows: Collection[str] | None, table: str, lists: str, problems: list[Problem]
) -> list[str]:
    """
    Return the listed names that also have a row in another table, and add a problem for each name without one.

    Args:
        listed: row number of each name in the table that lists the cases.
        rows: names in the other table; `None` if it was unreadable.
        table, lists: names of the other table and of the one that lists the cases.
    """
    if rows is None:
        return []
    for name in listed:
        if name not in rows:
            expected = f"a row for this id, which is in row {listed[name]} of {lists}"
            problems.append(Problem(table, None, "row", "missing", expected, name))
    return [name for name in listed if name in rows]


def selection(include: Collection[str] | None, exclude: Collection[str]) -> Callable[[str], bool]:
    """Return a function that is True for a name in `include` (any name if `None`) and not in `exclude`."""
    wanted = None if include is None else {volume_name(name) for name in _names(include)}
    unwanted = {volume_name(name) for name in _names(exclude)}
    return lambda name: name not in unwanted and (wanted is None or name in wanted)


def _names(names: str | Collection[str]) -> Collection[str]:
    """Return a collection of names, also for a single string."""
    return [names] if isinstance(names, str) else names


def row_numbers(rows: Mapping[str, Row] | None) -> dict[str, int]:
    """Return the row number of each name; empty for an unreadable table."""
    return {name: row.number for name, row in (rows or {}).items()}


def check_included(
    include: Collection[str] | None, names: Collection[str], table: str, problems: list[Problem]
) -> None:
    """Add a problem for each name in `include` that does not exist."""
    for name in _names(include or ()):
        if volume_name(name) not in names:
            problems.append(Problem(table, None, "row", "missing", "a row for this id, which `include` names", name))


def read_ids(path: str | Path) -> list[str]:
    """Read ids from a text file, one per line, optionally followed by a tab and a path; empty lines are ignored."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    return [line.strip().partition("\t")[0].strip() for line in lines if line.strip()]
