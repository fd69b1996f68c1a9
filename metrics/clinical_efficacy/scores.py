# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Precision, recall and F1 of multi-label findings, as plain functions.

Published "F1" values are different averages: CT report papers quote micro (Reg2RG, the paper), macro (CT-GRAPH,
VLM3D), weighted or per-sample values. All four are returned here.

All but the per-sample average are functions of counts summed over reports. These functions take many such sums at
once, so a bootstrap is a single call.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray


class LabelScores(TypedDict):
    """Scores of one label or one average; `predicted` and `support` count its predicted and true positives."""

    precision: float
    recall: float
    f1: float
    predicted: int
    support: int


def _indicator_matrix(name: str, values: ArrayLike) -> NDArray[np.int64]:
    matrix = np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"{name}: shape {matrix.shape} (expected a matrix (reports, labels))")
    if matrix.size == 0:
        raise ValueError(f"{name} has shape {matrix.shape}: there is nothing to score")
    # The cast below would truncate a probability or a NaN. Thresholding is the caller's decision.
    wrong = ~np.isin(matrix, (0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"{name}[{row}, {column}] is {matrix[row, column]}: labels must be 0 or 1")
    return matrix.astype(np.int64)


def _ratio(numerator: NDArray, denominator: NDArray, zero_division: float) -> NDArray[np.float64]:
    numerator = np.asarray(numerator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full_like(numerator, zero_division), where=denominator != 0)


def label_counts(predictions: ArrayLike, references: ArrayLike) -> NDArray[np.int64]:
    """
    Count true positives, predicted positives and actual positives of each report and label.

    Args:
        predictions, references: (reports, labels) of 0 and 1, as in [`classification_scores`].

    Returns:
        (reports, 3, labels): positive in both reports, in the generated one, in the true one. [`averages`] and
        [`crg`] take sums of these over any set of reports.

    Raises:
        ValueError: the shapes differ, or a value is neither 0 nor 1.
    """
    predicted = _indicator_matrix("predictions", predictions)
    actual = _indicator_matrix("references", references)
    if predicted.shape != actual.shape:
        raise ValueError(f"predictions have shape {predicted.shape}, references {actual.shape}")
    return np.stack([predicted * actual, predicted, actual], axis=1)


def precision_recall_f1(counts: ArrayLike, zero_division: float = 0.0) -> NDArray[np.float64]:
    """Precision, recall and F1 of each label, (..., 3, labels), of counts (..., 3, labels) of [`label_counts`]."""
    hits, claims, facts = np.moveaxis(np.asarray(counts), -2, 0)
    return np.stack(
        [
            _ratio(hits, claims, zero_division),
            _ratio(hits, facts, zero_division),
            _ratio(2 * hits, claims + facts, zero_division),
        ],
        axis=-2,
    )


def averages(counts: ArrayLike, zero_division: float = 0.0) -> dict[str, NDArray[np.float64]]:
    """
    Average over labels, for many sums of counts at once.

    Args:
        counts: (..., 3, labels), counts of [`label_counts`] summed over reports.

    Returns:
        `micro`, `macro` and `weighted`, each (..., 3): precision, recall, F1.
    """
    counts = np.asarray(counts)
    per_label = precision_recall_f1(counts, zero_division)
    support = counts[..., 2, :]
    weighted = _ratio((per_label * support[..., None, :]).sum(-1), support.sum(-1)[..., None], zero_division)
    return {
        "micro": precision_recall_f1(counts.sum(-1, keepdims=True), zero_division)[..., 0],
        "macro": per_label.mean(-1),
        "weighted": weighted,  # undefined if no report has a finding: the weights sum to 0
    }


def per_report(counts: ArrayLike, zero_division: float = 0.0) -> NDArray[np.float64]:
    """Precision, recall and F1 of each report, (reports, 3), of [`label_counts`]; `samples` is their mean."""
    return precision_recall_f1(np.asarray(counts).sum(-1, keepdims=True), zero_division)[..., 0]


def crg(counts: ArrayLike, reports: int) -> NDArray[np.float64]:
    """
    CRG of VLM3D, which weights positives by their rarity: 1 for perfect labels, 1/3 for all positive or all negative.

    With X cells (labels times reports) of which A are positive: r = (X - A) / 2A, U = (X - A) / 2, s = r TP - r FN -
    FP, CRG = U / (2U - s).

    Args:
        counts: (..., 3, labels), counts of [`label_counts`] summed over reports.
        reports: number of summed reports.

    Returns:
        (...), NaN if undefined: no cell, or every cell, is positive.
    """
    counts = np.asarray(counts, dtype=np.float64)
    cells = counts.shape[-1] * reports
    hits, claims, facts = np.moveaxis(counts.sum(-1), -1, 0)
    defined = (facts > 0) & (facts < cells)
    weight = _ratio(cells - facts, 2 * facts, 0.0)
    greatest = (cells - facts) / 2
    score = weight * hits - weight * (facts - hits) - (claims - hits)
    return np.where(defined, _ratio(greatest, 2 * greatest - score, 0.0), np.nan)


def classification_scores(
    predictions: ArrayLike, references: ArrayLike, labels: Sequence[str], zero_division: float = 0.0
) -> dict[str, LabelScores | dict[str, LabelScores] | float | None | str]:
    """Precision, recall and F1 of 0/1 findings, and CRG.

    Args:
        predictions: (reports, labels), 1 if the generated report states the finding.
        references: (reports, labels), 1 if the true report states the finding.
        labels: names of the columns.
        zero_division: value of undefined ratios, 0 or 1: the precision of a label that is never predicted, the recall
            of a label that never occurs, and the F1 of a label with neither. Published tables use 0. The choice
            matters most for the macro and the per-sample average, which is undefined for every all-normal report.

    Returns:
        `micro` (counts pooled), `macro` (mean over labels), `weighted` (mean over labels by support), `samples` (mean
        over reports), `labels` (the same scores by label), `crg` (`None` if undefined, see [`crg`]) and `signature`.

    Raises:
        ValueError: the shapes differ or do not match `labels`, or a value or `zero_division` is neither 0 nor 1.
    """
    counts = label_counts(predictions, references)
    if counts.shape[2] != len(labels):
        raise ValueError(f"the matrices have {counts.shape[2]} columns, but there are {len(labels)} label names")
    if len(set(labels)) != len(labels):
        raise ValueError(f"labels: {list(labels)} (expected distinct names)")
    if zero_division not in (0, 1):
        raise ValueError(f"zero_division: {zero_division} (expected 0 or 1)")
    totals = counts.sum(axis=0)
    _, claimed, support = totals

    def scores(values: NDArray[np.float64], count_predicted: int, count_actual: int) -> LabelScores:
        precision, recall, f1 = values.tolist()
        return LabelScores(
            precision=precision, recall=recall, f1=f1, predicted=int(count_predicted), support=int(count_actual)
        )

    by_label = precision_recall_f1(totals, zero_division)
    by_average = averages(totals, zero_division) | {"samples": per_report(counts, zero_division).mean(axis=0)}
    balanced = float(crg(totals, len(counts)))
    return {
        **{name: scores(values, claimed.sum(), support.sum()) for name, values in by_average.items()},
        "labels": {
            label: scores(by_label[:, column], claimed[column], support[column]) for column, label in enumerate(labels)
        },
        "crg": None if np.isnan(balanced) else balanced,
        "signature": f"clinical-efficacy|multi-label|labels:{len(labels)}|zero-division:{zero_division:g}",
    }
