# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Template collapse: does a generator write reports, or a few templates?

A model that writes the same fluent, mostly normal report for everybody scores well on BLEU and ROUGE-L, for most of
every report says that things are normal (CLarGen, arXiv 2605.30984). [`collapse_panel`] measures that on one set of
reports. Its numbers mean something beside those of the true reports of the same scans and of baselines that see
nothing; they are no ranking by themselves.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .clinical_efficacy import averages, label_counts
from .clinical_efficacy.reports import Labeler, label_reports
from .consistency import contradictions
from .nlg import check_pairs
from .statistics import bootstrap_counts, bootstrap_mean, value_entry

RARE = 0.1  # findings of fewer than a tenth of the true reports

COLUMNS = {
    "distinct_reports": "distinct reports / n",
    "distinct_sentences": "distinct sentences / n",
    "commonest_report": "share of the commonest report",
    "normal_reports": "reports without a finding",
    "normal_regions": "regions without a finding",
    "rare_recall": "recall of rare findings",
    "contradicting_reports": "reports that contradict themselves",
}

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")


def sentences(report: str, split: Callable[[str], Mapping[str, str]] | None = None) -> list[str]:
    """The sentences of a report, spaces collapsed and without the headings of its regions."""
    parts = [report] if split is None else split(report).values()
    found = (" ".join(sentence.split()) for part in parts for sentence in _SENTENCE.split(part))
    return [sentence for sentence in found if sentence]


def rare_findings(labels: ArrayLike) -> NDArray[np.bool_]:
    """(labels,): which findings some, but fewer than a tenth, of the reports have; `labels` is (reports, labels)."""
    prevalence = np.asarray(labels).mean(axis=0)
    return (prevalence > 0) & (prevalence < RARE)


def collapse_panel(
    reports: Sequence[str],
    actual: ArrayLike,
    labeler: Labeler,
    *,
    split: Callable[[str], Mapping[str, str]] | None = None,
    predicted: ArrayLike | None = None,
) -> dict[str, dict]:
    """
    The panel of one set of reports. Call it with the true reports as well, and read the two beside each other.

    Args:
        reports: (n,), generated or true.
        actual: (n, 18) of 0 and 1, the true findings of the same scans. They also say which findings are rare.
        labeler: reads the findings out of the reports and out of each region.
        split: a report to {region: text}; `None` where reports are not divided into regions.
        predicted: (n, 18), what the labeler finds in the reports, where that is known already.

    Returns:
        by measure {"value", "interval"}. A value is `None` where the measure is undefined (no rare finding in the
        truth, no regions), an interval, [low, high] at 95 % over reports, is `None` where the measure is no mean over
        reports.

        - distinct_reports, distinct_sentences: how many different ones there are, over n. The second may exceed 1.
          Both fall as n grows: only sets of the same size compare.
        - commonest_report: the share of reports that are equal to the commonest one.
        - normal_reports, normal_regions: the share in which the labeler finds nothing. Above the truth's, the
          generator leans to the normal template; below, to inventing.
        - rare_recall: of the true findings that fewer than a tenth of the reports have, the share that is written.
        - contradicting_reports: the share in which a region states a thing twice with two values
          ([`contradictions`]).

    Raises:
        TypeError, ValueError: a report is not text, there is none, or the shapes do not fit.
    """
    # An empty report is what a model may write.
    reports, _ = check_pairs(reports, ["-"] * len(reports))
    n = len(reports)
    predicted = label_reports(labeler, reports) if predicted is None else np.asarray(predicted)
    counts = label_counts(predicted, actual)
    distinct = {sentence for report in reports for sentence in sentences(report, split)}
    panel = {
        "distinct_reports": value_entry(len({_words(report) for report in reports}) / n),
        "distinct_sentences": value_entry(len(distinct) / n),
        "commonest_report": value_entry(Counter(map(_words, reports)).most_common(1)[0][1] / n),
        "normal_reports": _mean(~predicted.astype(bool).any(axis=1)),
        "normal_regions": value_entry(None) if split is None else _normal_regions(reports, labeler, split),
    }
    rare = rare_findings(actual)
    of_rare = counts[..., rare]
    if of_rare[:, 2].sum():

        def recall(sums: NDArray) -> NDArray:
            # Undefined in a resample without a rare finding.
            return np.where(sums[..., 2, :].sum(-1) > 0, averages(sums)["micro"][..., 1], np.nan)

        interval = bootstrap_counts(of_rare, recall) if n > 1 else None
        panel["rare_recall"] = value_entry(float(recall(of_rare.sum(axis=0)[None])[0]), interval)
    else:
        panel["rare_recall"] = value_entry(None)
    contradicting = {report: bool(contradictions(report)) for report in set(reports)}
    panel["contradicting_reports"] = _mean([contradicting[report] for report in reports])
    return panel


def _normal_regions(reports: Sequence[str], labeler: Labeler, split: Callable[[str], Mapping[str, str]]) -> dict:
    """Pooled over all regions that are written; a resample draws reports with all their regions."""
    parts = [[f"{region.capitalize()}: {text}" for region, text in split(report).items()] for report in reports]
    # Few texts of regions are different: each is read once.
    known = sorted({text for texts in parts for text in texts})
    if not known:
        return value_entry(None)
    normal = dict(zip(known, ~label_reports(labeler, known).astype(bool).any(axis=1), strict=True))
    counts = np.array([[sum(bool(normal[text]) for text in texts), len(texts)] for texts in parts])

    def share(sums: NDArray) -> NDArray:
        return np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)

    interval = bootstrap_counts(counts, share) if len(counts) > 1 else None
    return value_entry(float(share(counts.sum(axis=0)[None].astype(float))[0]), interval)


def _words(report: str) -> str:
    return " ".join(report.split())


def _mean(values: ArrayLike) -> dict:
    values = np.asarray(values, dtype=float)
    return value_entry(float(values.mean()), bootstrap_mean(values) if len(values) > 1 else None)
