# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Baselines that never see the scan: a report generator has to beat them.

- Text: one normal report for every scan, which scores high on BLEU and ROUGE-L if most of each report is normal, and
  the report of the most similar training scan.
- Findings: all labels, no labels, and labels from the prevalence in the training data.

No baseline uses the test split.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def most_frequent_report(reports: Sequence[str]) -> str:
    """
    Return the most frequent report; of equally frequent ones, the first.

    Args:
        reports: reports of the normal training cases.

    Raises:
        ValueError: there are no reports.
    """
    _check_any(reports)
    return Counter(reports).most_common(1)[0][0]


def most_frequent_report_by_region(
    reports: Sequence[str], split: Callable[[str], Mapping[str, str]], regions: Sequence[str]
) -> str:
    """
    Return the most frequent text of each region, as one report.

    Whole reports written region by region rarely repeat, but their regions do.

    Args:
        reports: reports of the normal training cases.
        split: maps a report to {region: text}, such as `split_report`.
        regions: regions in the order of the report; a region that no report has is left out.

    Raises:
        ValueError: there are no reports.
    """
    _check_any(reports)
    counts = {region: Counter() for region in regions}
    for report in reports:
        for region, text in split(report).items():
            if region in counts:
                counts[region][text] += 1
    frequent = {region: counter.most_common(1)[0][0] for region, counter in counts.items() if counter}
    return "\n".join(f"{region.capitalize()}: {text}" for region, text in frequent.items())


def nearest_reports(query: NDArray, keys: NDArray, reports: Sequence[str]) -> list[str]:
    """
    Return the report of the most similar training scan for each scan, by cosine similarity of standardised features.

    Args:
        query: (scans, C), features of the test scans.
        keys: (training scans, C), features of the training scans.
        reports: reports of the training scans, in the order of `keys`.

    Returns:
        One report for each row of `query`.

    Raises:
        ValueError: the shapes do not match, or a feature is not finite.
    """
    if query.ndim != 2 or keys.ndim != 2 or query.shape[1] != keys.shape[1]:
        raise ValueError(f"query has shape {query.shape}, keys {keys.shape}: expected (scans, C) and (training, C)")
    if len(keys) != len(reports) or not len(reports):
        raise ValueError(f"{len(keys)} rows of keys and {len(reports)} reports: expected one report a row")
    for name, features in (("query", query), ("keys", keys)):
        if not np.isfinite(features).all():
            row = int(np.argwhere(~np.isfinite(features))[0, 0])
            raise ValueError(f"{name}[{row}] has a feature that is not finite")
    mean, scale = keys.mean(0), keys.std(0) + 1e-6
    query, keys = (query - mean) / scale, (keys - mean) / scale
    # The norm of a query does not change its nearest key. A key equal to the mean has norm 0 and similarity 0.
    lengths = np.linalg.norm(keys, axis=1)
    similarity = query @ (keys / np.where(lengths > 0, lengths, 1)[:, None]).T
    return [reports[index] for index in similarity.argmax(axis=1)]


def label_baselines(count: int, training_labels: ArrayLike, *, seed: int = 0) -> dict[str, NDArray[np.int8]]:
    """
    Assign labels to `count` scans without reading the scans, by several baselines.

    - `all-positive`: every label; `all-negative`: no label. CRG scores both 1/3.
    - `prevalence-majority`: the labels that at least half of the training cases have, for every scan.
    - `prevalence-draw`: each label of each scan drawn with its prevalence in training.

    Args:
        training_labels: (training cases, labels) of 0 and 1.
        seed: seed of `prevalence-draw`.

    Returns:
        {name: int8 (count, labels)}

    Raises:
        ValueError: `count` is not positive, `training_labels` is empty, or a label is neither 0 nor 1.
    """
    if count < 1:
        raise ValueError(f"count: {count} (expected at least 1)")
    training = np.asarray(training_labels)
    if training.ndim != 2 or not training.size:
        raise ValueError(f"training_labels: shape {training.shape} (expected (cases, labels) and not empty)")
    wrong = ~np.isin(training, (0, 1))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"training_labels[{row}, {column}] is {training[row, column]}: labels must be 0 or 1")
    shape = count, training.shape[1]
    prevalence = training.mean(axis=0)
    drawn = np.random.default_rng(seed).random(shape) < prevalence
    return {
        "all-positive": np.ones(shape, np.int8),
        "all-negative": np.zeros(shape, np.int8),
        "prevalence-majority": np.broadcast_to(prevalence >= 0.5, shape).astype(np.int8),
        "prevalence-draw": drawn.astype(np.int8),
    }


def _check_any(reports: Sequence[str]) -> None:
    if not reports:
        raise ValueError("reports is empty: a constant report needs the reports of normal training cases")
