# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores of the findings in report texts, against either of the two truths in use.

- `truth:labeler`: the same labeler reads the generated and the true report (Reg2RG and the paper). A finding that it
  misreads in both counts as agreement.
- `truth:csv`: a labeler reads the generated report, and a table such as CT-RATE's gives the labels of the scan (VLM3D,
  CT-GRAPH). A finding that the labeler misreads counts against the generator.

The two are different tests: for the same 1,564 scans of CT-RATE the first has 5,059 positive labels and the second
5,358. The signature names the truth used.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ...data.cases import Problem, by_name, check_labels, raise_problems, read_csv, shown, volume_name
from ...labels_diffvp import DIAGNOSIS_LABELS
from ..statistics import LEVEL, RESAMPLES, Interval, bootstrap_counts, bootstrap_mean
from .scores import averages, classification_scores, crg, label_counts, per_report

ID_COLUMN = "VolumeName"  # CT-RATE's
SCORES = ("precision", "recall", "f1")


class Labeler(Protocol):
    """Interface of the labelers, which find the 18 labels in reports."""

    def label_all(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """Return (reports, 18) of 0 and 1, in the order of `DIAGNOSIS_LABELS`."""
        ...


def read_label_table(
    path: str | Path, *, id_column: str = ID_COLUMN, ignore: Sequence[str] = ()
) -> dict[str, NDArray[np.int8]]:
    """
    Read labels from a CSV file with a column of ids and one column per label, in any order.

    Args:
        path: CSV file, such as CT-RATE's `valid_predicted_labels.csv`.
        id_column: column of the ids, with or without ".nii.gz".
        ignore: other columns that are allowed, such as the reports.

    Returns:
        {id without ".nii.gz": int8 (18,) in the order of `DIAGNOSIS_LABELS`}

    Raises:
        DatasetError: the file is unreadable, a column is missing, unknown or duplicated, an id is empty or
            duplicated, or a label is neither 0 nor 1. It lists all problems by row (the header is row 1) and column.
    """
    path, problems = Path(path), []
    known = {id_column, *DIAGNOSIS_LABELS, *ignore}

    def check_columns(columns: list[str], problems: list[Problem]) -> None:
        # A misspelt label, or one of another label set, must not be ignored.
        problems += [
            Problem(path.name, 1, "header", f"unknown column {shown(column)}", "the id and the 18 labels")
            for column in columns
            if column not in known
        ]

    rows = read_csv(path, (id_column, *DIAGNOSIS_LABELS), problems, check_columns=check_columns)
    named = by_name(rows, id_column, path.name, lambda name: True, problems)
    table = {
        name: check_labels(row.values, path.name, row.number, name, problems) for name, row in (named or {}).items()
    }
    if named is not None and not table and not problems:
        problems.append(Problem(path.name, None, "table", "empty", "a row for each report"))
    raise_problems(problems)
    return table


def table_labels(table: Mapping[str, ArrayLike], ids: Sequence[str], name: str = "label table") -> NDArray[np.int8]:
    """
    Look up the labels of reports by id: (reports, 18).

    Args:
        table: result of [`read_label_table`]. It may have more rows.
        ids: ids of the reports, with or without ".nii.gz".
        name: name of the table in error messages.

    Raises:
        DatasetError: ids are missing in the table or duplicated in `ids`. It lists all of them.
        ValueError: `ids` is empty.
    """
    if not ids:
        raise ValueError("there is no id to look up labels for")
    problems, seen = [], {}
    for number, one in enumerate(map(volume_name, ids), start=1):
        if one in seen:
            problems.append(
                Problem("reports", number, "id", f"the same as of report {seen[one]}", "each id once", one)
            )
        elif one not in table:
            problems.append(
                Problem(name, None, "row", "missing", f"a row for this id, which report {number} has", one)
            )
        seen.setdefault(one, number)
    raise_problems(problems)
    return np.stack([np.asarray(table[volume_name(one)]) for one in ids]).astype(np.int8)


def label_reports(labeler: Labeler, reports: Sequence[str], name: str = "reports") -> NDArray[np.int8]:
    """
    Label reports: (reports, 18). Reports may be empty, but not missing (NaN, None).

    Raises:
        TypeError: a report is not text, or `reports` is one text instead of a list.
        ValueError: the labeler does not return 18 labels per report.
    """
    if isinstance(reports, str):
        raise TypeError(f"{name} is one text: expected a list of them")
    reports = list(reports)
    for index, report in enumerate(reports):
        if not isinstance(report, str):
            raise TypeError(f"{name}[{index}] is {type(report).__name__}: every report must be text")
    labels = np.asarray(labeler.label_all(reports))
    expected = len(reports), len(DIAGNOSIS_LABELS)
    if labels.shape != expected:
        raise ValueError(f"{type(labeler).__name__}.label_all returned shape {labels.shape}, expected {expected}")
    return labels


def finding_scores(
    predicted: ArrayLike,
    actual: ArrayLike,
    *,
    truth: str,
    labeler: str | None = None,
    zero_division: float = 0.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict:
    """
    Score label matrices, with intervals.

    Args:
        predicted, actual: (reports, 18) of 0 and 1.
        truth: source of `actual` for the signature: "labeler", "csv" or "given".
        labeler: name of the labeler for the signature; `None` without one.
        zero_division: see [`classification_scores`].
        resamples, seed: number and seed of the bootstrap resamples over reports.

    Returns:
        The result of [`classification_scores`], `n`, and `intervals`: {average: {"precision", "recall", "f1":
        Interval}, "crg": Interval, or `None` if CRG is undefined}; `None` for a single report.

    Raises:
        ValueError: see [`classification_scores`].
    """
    scores = classification_scores(predicted, actual, DIAGNOSIS_LABELS, zero_division)
    counts = label_counts(predicted, actual)
    scores["n"] = len(counts)
    # A labeler's signature has fields itself; commas keep them together as one field of this signature.
    scores["signature"] += f"|truth:{truth}|labeler:{(labeler or 'none').replace('|', ',')}"
    scores["intervals"] = (
        _intervals(counts, zero_division, resamples, seed, with_crg=scores["crg"] is not None)
        if len(counts) > 1
        else None
    )
    if scores["intervals"] is not None:
        scores["signature"] += f"|interval:bootstrap-{LEVEL:g}-{resamples}-seed-{seed}"
    return scores


def _intervals(
    counts: NDArray[np.int64], zero_division: float, resamples: int, seed: int, with_crg: bool
) -> dict[str, dict[str, Interval] | Interval | None]:
    """Bootstrap intervals of all averages and of CRG, from the counts of [`label_counts`]."""
    result = {}
    for average in ("micro", "macro", "weighted"):
        result[average] = {
            score: bootstrap_counts(
                counts,
                # Bind the loop variables now; the lambda is called after they change.
                lambda sums, average=average, column=column: averages(sums, zero_division)[average][..., column],
                resamples=resamples,
                seed=seed,
            )
            for column, score in enumerate(SCORES)
        }
    by_report = per_report(counts, zero_division)
    result["samples"] = {
        score: bootstrap_mean(by_report[:, column], resamples=resamples, seed=seed)
        for column, score in enumerate(SCORES)
    }
    result["crg"] = (
        bootstrap_counts(counts, lambda sums: crg(sums, len(counts)), resamples=resamples, seed=seed)
        if with_crg
        else None
    )
    return result
