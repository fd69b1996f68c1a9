# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Label a table of reports (`diffvp label`)."""

import csv
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from ...data.cases import Case, Problem, check_kind, is_missing, plain_text, raise_problems, shown
from ...labels_diffvp import DIAGNOSIS_LABELS
from ...storage_diffvp import replacing
from ..clinical_efficacy.reports import Labeler, label_reports
from ..report_files import read_report_rows
from .rules import RuleLabeler


def label_table(
    source: str | os.PathLike,
    output: str | os.PathLike,
    labeler: Labeler,
    *,
    report_column: str = "report",
    id_column: str = "id",
    explanations: str | os.PathLike | None = None,
) -> np.ndarray:
    """
    Label every report of a file. Write a CSV file with the ids and one column of 0 and 1 per label.

    Args:
        source: file of reports, of the kinds that [`score_table`] reads.
        output: CSV file to write.
        report_column, id_column: columns of the reports and the ids.
        explanations: JSON lines file to write with every mention of a finding, its span in the report, and the reason
            why it does or does not set the label. It needs a [`RuleLabeler`], and contains sentences of the reports.

    Returns:
        int8 (reports, 18).

    Raises:
        DatasetError: a column is missing, an id is empty or duplicated, a report is no text, or there are no rows.
        ValueError: `explanations` is given with another labeler than the rules.
    """
    if explanations is not None and not isinstance(labeler, RuleLabeler):
        raise ValueError(f"explanations: with {type(labeler).__name__} (expected the rule labeler)")
    source, problems = Path(source), []
    rows = read_report_rows(source, problems)
    if not (rows or problems):
        problems.append(Problem(source.name, None, "rows", "none", "at least one report"))
    known = dict.fromkeys(column for row in rows for column in row.values)
    missing = [column for column in dict.fromkeys((id_column, report_column)) if rows and column not in known]
    if missing:
        found = ", ".join(map(shown, known)) or "empty"
        problems.append(Problem(source.name, 1, "header", found, f"also {', '.join(missing)}"))
    raise_problems(problems)
    seen: dict[str, int] = {}
    names, reports = [], []
    for row in rows:
        value, report = row.values.get(id_column), row.values.get(report_column)
        name = "" if is_missing(value) else str(value).strip()
        check_kind(value, source.name, row.number, id_column, "", problems, number=True)
        check_kind(report, source.name, row.number, report_column, name, problems)
        names.append(name)
        reports.append(plain_text(report) if isinstance(report, str) else "")
        if not name:
            problems.append(Problem(source.name, row.number, id_column, "empty", "an id"))
        elif name in seen:
            found = f"the same as in row {seen[name]}"
            problems.append(Problem(source.name, row.number, id_column, found, "one row per id", name))
        seen.setdefault(name, row.number)
    raise_problems(problems)
    labels = label_reports(labeler, reports)
    values = [[name, *row] for name, row in zip(names, labels.tolist(), strict=True)]
    _write(Path(output), [[id_column, *DIAGNOSIS_LABELS], *values])
    if explanations is not None:
        lines = [
            json.dumps({id_column: name, **asdict(hit)}, ensure_ascii=False)
            for name, report in zip(names, reports, strict=True)
            for hit in labeler.explain(report)
        ]
        with replacing(explanations) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return labels


def label_cases(cases: list[Case], labeler: Labeler) -> list[Case]:
    """Return the cases, with labels read from the reports for those that have none."""
    missing = [case for case in cases if case.labels is None]
    if not missing:
        return cases
    read = dict(zip((case.name for case in missing), label_reports(labeler, [c.report for c in missing]), strict=True))
    return [replace(case, labels=read[case.name]) if case.labels is None else case for case in cases]


def _write(path: Path, rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
