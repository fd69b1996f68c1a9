# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Precision, recall and F1 of multi-label findings, as plain functions.

The tables of the field mean different averages by "F1": CT report papers quote micro (Reg2RG, the paper), macro
(CT-GRAPH, VLM3D), weighted or per-sample values. All four come out here, so that no reader has to guess.
"""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray


class LabelScores(TypedDict):
    """Scores of one label or of one average. `predicted` and `support` count the positives they rest on."""

    precision: float
    recall: float
    f1: float
    predicted: int
    support: int


def _indicator_matrix(name: str, values: ArrayLike) -> NDArray[np.int64]:
    matrix = np.asarray(values)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must be a matrix (reports, labels), got shape {matrix.shape}")
    if matrix.size == 0:
        raise ValueError(f"{name} has shape {matrix.shape}: there is nothing to score")
    # A probability or a NaN would be truncated to a wrong count below. Thresholding is the caller's decision.
    wrong = ~np.isin(matrix, (0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"{name}[{row}, {column}] is {matrix[row, column]}: labels must be 0 or 1")
    return matrix.astype(np.int64)


def _ratio(numerator: NDArray, denominator: NDArray, zero_division: float) -> NDArray[np.float64]:
    numerator = np.asarray(numerator, dtype=np.float64)
    return np.divide(numerator, denominator, out=np.full_like(numerator, zero_division), where=denominator != 0)


def classification_scores(
    predictions: ArrayLike, references: ArrayLike, labels: Sequence[str], zero_division: float = 0.0
) -> dict[str, LabelScores | dict[str, LabelScores] | str]:
    """Precision, recall and F1 of 0/1 findings.

    Args:
        predictions: (reports, labels), 1 where the generated report states the finding.
        references: (reports, labels), 1 where the true report states it.
        labels: the names of the columns.
        zero_division: what an undefined ratio counts as, 0 or 1: the precision of a label that is never predicted, the
            recall of one that never occurs, and the F1 of one that does neither. 0 is what the published tables use.
            It weighs most in the macro and the per-sample average, where an all-normal report is such a case.

    Returns:
        `micro` (counts pooled), `macro` (mean over labels), `weighted` (mean over labels by support), `samples` (mean
        over reports), `labels` (the same per label, by name) and `signature`.

    Raises:
        ValueError: the shapes differ or do not fit `labels`, a value is neither 0 nor 1, or `zero_division` is not.
    """
    predicted = _indicator_matrix("predictions", predictions)
    actual = _indicator_matrix("references", references)
    if predicted.shape != actual.shape:
        raise ValueError(f"predictions have shape {predicted.shape}, references {actual.shape}")
    if predicted.shape[1] != len(labels):
        raise ValueError(f"the matrices have {predicted.shape[1]} columns, but there are {len(labels)} label names")
    if len(set(labels)) != len(labels):
        raise ValueError(f"label names must differ, got {list(labels)}")
    if zero_division not in (0, 1):
        raise ValueError(f"zero_division must be 0 or 1, got {zero_division}")

    true_positives = predicted * actual

    def triple(axis: int | None) -> NDArray[np.float64]:
        """(3,) or (3, n): precision, recall and F1 with the counts summed over `axis`."""
        hits, claims, facts = (matrix.sum(axis=axis) for matrix in (true_positives, predicted, actual))
        return np.stack(
            [
                _ratio(hits, claims, zero_division),
                _ratio(hits, facts, zero_division),
                _ratio(2 * hits, claims + facts, zero_division),
            ]
        )

    support, claimed = actual.sum(axis=0), predicted.sum(axis=0)

    def scores(values: NDArray[np.float64], count_predicted: int, count_actual: int) -> LabelScores:
        precision, recall, f1 = values.tolist()
        return LabelScores(
            precision=precision, recall=recall, f1=f1, predicted=int(count_predicted), support=int(count_actual)
        )

    per_label = triple(axis=0)
    if support.any():
        weighted = np.average(per_label, axis=1, weights=support)
    else:
        weighted = np.full(3, float(zero_division))  # no finding in any report: the weights sum to 0
    averages = {
        "micro": triple(axis=None),
        "macro": per_label.mean(axis=1),
        "weighted": weighted,
        "samples": triple(axis=1).mean(axis=1),
    }
    return {
        **{name: scores(values, claimed.sum(), support.sum()) for name, values in averages.items()},
        "labels": {
            label: scores(per_label[:, column], claimed[column], support[column])
            for column, label in enumerate(labels)
        },
        "signature": f"clinical-efficacy|multi-label|labels:{len(labels)}|zero-division:{zero_division:g}",
    }
