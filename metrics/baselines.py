# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""What a report generator has to beat before it can be said to see anything.

Of text: one normal report for everybody, which scores high on BLEU and ROUGE-L where most of a report says that things
are normal, and the report of the most similar training scan. Of findings: every label, no label, and what the
prevalence in the training data alone says. None of them may look at the test split.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray


def most_frequent_report(reports: Sequence[str]) -> str:
    """
    The report that occurs most often, the first of these where several do.

    Args:
        reports: of the normal cases of the training split.

    Raises:
        ValueError: there is none.
    """
    _check_any(reports)
    return Counter(reports).most_common(1)[0][0]


def most_frequent_report_by_region(
    reports: Sequence[str], split: Callable[[str], Mapping[str, str]], regions: Sequence[str]
) -> str:
    """
    The most frequent text of each region, as one report.

    A whole report seldom occurs twice where regions are described one by one; its parts do.

    Args:
        reports: of the normal cases of the training split.
        split: from a report to {region: text}, such as `DiffVPProcessor.post_process`.
        regions: the order in which they are written; a region that no report has is left out.

    Raises:
        ValueError: there is no report.
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
    For each scan the report of the training scan that looks most alike, by the cosine of standardised features.

    Args:
        query: (scans, C), features of the test scans.
        keys: (training scans, C), those of the training scans.
        reports: of the training scans, in the order of `keys`.

    Returns:
        one report a row of `query`.

    Raises:
        ValueError: the shapes do not fit each other, or a feature is not finite.
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
    # The length of a query does not change which key is nearest; a key that is all average points nowhere.
    lengths = np.linalg.norm(keys, axis=1)
    similarity = query @ (keys / np.where(lengths > 0, lengths, 1)[:, None]).T
    return [reports[index] for index in similarity.argmax(axis=1)]


def label_baselines(count: int, training_labels: ArrayLike, *, seed: int = 0) -> dict[str, NDArray[np.int8]]:
    """
    Labels for `count` scans that nobody has looked at, by the name of the baseline.

    - `all-positive`: every label, `all-negative`: none. CRG gives both 1/3.
    - `prevalence-majority`: a label for everybody where at least half of the training cases have it, else for nobody.
    - `prevalence-draw`: drawn for each scan and label, as often as in training.

    Args:
        training_labels: (training cases, labels) of 0 and 1.
        seed: of the draw.

    Returns:
        {name: int8 (count, labels)}

    Raises:
        ValueError: `count` is not positive, or `training_labels` is empty or holds anything but 0 and 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    training = np.asarray(training_labels)
    if training.ndim != 2 or not training.size:
        raise ValueError(f"training_labels must be (cases, labels) and not empty, got shape {training.shape}")
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
        raise ValueError("there is no report to take a constant one from: it needs the normal cases of training")
