# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Read reports from CSV, JSON lines, Parquet, and the output of `diffvp batch`."""

from collections.abc import Mapping
from pathlib import Path

from ..data.cases import Problem, Row, check_kind, is_missing, read_csv, read_json_lines, shown
from ..data.table import PATH_COLUMNS, without_suffix


def read_report_rows(path: Path, problems: list[Problem]) -> list[Row]:
    """
    Read the rows of a file of reports. An unreadable file adds a problem and returns no rows.

    If a scan has several lines in a file of `diffvp batch`, the last one counts.
    """
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".parquet"):
        return read_csv(path, (), problems) or []
    if not path.is_file():
        problems.append(Problem(path.name, None, "file", "missing", "a table in .csv, .tsv, .jsonl or .parquet"))
        return []
    return _read_parquet(path, problems) if suffix == ".parquet" else _read_lines(path, problems)


def _read_lines(path: Path, problems: list[Problem]) -> list[Row]:
    rows = read_json_lines(path, problems)
    if rows and rows[0].number == 1 and "settings" in rows[0].values:
        del rows[0]  # the first line of `diffvp batch`, which describes the run
    if rows and all("settings_sha256" in row.values for row in rows):
        return list({str(row.values.get("id")): row for row in rows}.values())
    return rows


def _read_parquet(path: Path, problems: list[Problem]) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError):  # OSError: a column is damaged
        problems.append(Problem(path.name, None, "content", "unreadable", "Parquet"))
        return []
    return [Row(number, row) for number, row in enumerate(values, start=1)]


def rows_by_scan(
    path: Path, id_column: str, columns: tuple[str, ...], problems: list[Problem]
) -> tuple[dict[str, Row], str]:
    """
    Map the scans of a file of reports, named without file suffix, to their rows.

    The ids are in `id_column`; a table without that column is read by the paths of its scans.

    Returns:
        {scan: row}, and the first of `columns` that the file has.
    """
    before = len(problems)
    rows = read_report_rows(path, problems)
    known = list(dict.fromkeys(name for row in rows for name in row.values))
    column = next((name for name in columns if name in known), columns[0])
    ids = next((name for name in (id_column, *PATH_COLUMNS) if name in known), id_column)
    if len(problems) == before and not rows:
        problems.append(Problem(path.name, None, "rows", "none", "at least one report"))
    missing = [name for name in dict.fromkeys((ids, column)) if rows and name not in known]
    if missing:
        found = ", ".join(map(shown, known)) or "empty"
        problems.append(Problem(path.name, 1, "header", found, f"also {', '.join(missing)}"))
        return {}, column
    named: dict[str, Row] = {}
    for row in rows:
        if not check_kind(row.values.get(ids), path.name, row.number, ids, "", problems, number=True):
            continue
        name = _name(row.values, ids)
        if not name:
            problems.append(Problem(path.name, row.number, ids, "empty", "the name of a scan"))
        elif name in named:
            again = f"the same as in row {named[name].number}"
            problems.append(Problem(path.name, row.number, ids, again, "one row per id", name))
        else:
            named[name] = row
    return named, column


def _name(values: Mapping[str, object], column: str) -> str:
    value = values.get(column)
    return "" if is_missing(value) else without_suffix(str(value).strip())


def generated_report(value: object, table: str, row: int, column: str, name: str, problems: list[Problem]) -> str:
    """Return a generated report exactly as written, empty if it is missing, and add a problem if it is no text."""
    check_kind(value, table, row, column, name, problems)
    return value if isinstance(value, str) else ""
