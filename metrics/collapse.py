# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Template collapse: measure if a generator writes individual reports or repeats a few templates.

A model that writes the same fluent, mostly normal report for every scan scores well on BLEU and ROUGE-L, because most
sentences of most reports are normal (CLarGen, arXiv 2605.30984). [`collapse_panel`] measures this on one set of
reports. Compare its values with those of the true reports of the same scans and of baselines that never see a scan;
on their own they do not rank systems.
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

RARE = 0.1  # a finding is rare if its prevalence in the true reports is below this

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
    """Split a report into sentences, with spaces collapsed and without region headings."""
    parts = [report] if split is None else split(report).values()
    found = (" ".join(sentence.split()) for part in parts for sentence in _SENTENCE.split(part))
    return [sentence for sentence in found if sentence]


def rare_findings(labels: ArrayLike) -> NDArray[np.bool_]:
    """Return the mask (labels,) of findings with a prevalence above 0 and below 10 % in `labels` (reports, labels)."""
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
    Measure template collapse on one set of reports. Call it on the true reports, too, to compare.

    Args:
        reports: (n,), generated or true.
        actual: (n, 18) of 0 and 1, the true findings of the same scans. They also define the rare findings.
        labeler: labels the reports and each region.
        split: maps a report to {region: text}; `None` for reports without regions.
        predicted: (n, 18), the labels of the reports, if they are known already.

    Returns:
        {measure: {"value", "interval"}}. A value is `None` if the measure is undefined (no rare finding in the truth,
        no regions). An interval is [low, high] at 95 % over reports, or `None` for a single report and for the first
        three measures, which are not means over reports.

        - distinct_reports, distinct_sentences: number of different ones divided by n. The second may exceed 1.
          Both fall as n grows, so compare only sets of the same size.
        - commonest_report: share of reports equal to the most frequent one.
        - normal_reports, normal_regions: share in which the labeler finds nothing. A value above that of the true
          reports shows a bias to the normal template, a value below it invented findings.
        - rare_recall: share of the rare true findings (in fewer than 10 % of the reports) that are written.
        - contradicting_reports: share of reports in which a region contradicts itself ([`contradictions`]).

    Raises:
        TypeError, ValueError: a report is not text, there are no reports, or the shapes do not match.
    """
    # An empty report is a valid prediction, so it is checked like one.
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
            # A resample without a rare finding has no recall.
            return np.where(sums[..., 2, :].sum(-1) > 0, averages(sums)["micro"][..., 1], np.nan)

        interval = bootstrap_counts(of_rare, recall) if n > 1 else None
        panel["rare_recall"] = value_entry(float(recall(of_rare.sum(axis=0)[None])[0]), interval)
    else:
        panel["rare_recall"] = value_entry(None)
    contradicting = {report: bool(contradictions(report)) for report in set(reports)}
    panel["contradicting_reports"] = _mean([contradicting[report] for report in reports])
    return panel


def _normal_regions(reports: Sequence[str], labeler: Labeler, split: Callable[[str], Mapping[str, str]]) -> dict:
    """Share of normal regions, pooled over all written regions. Resamples draw whole reports."""
    parts = [[f"{region.capitalize()}: {text}" for region, text in split(report).items()] for report in reports]
    # Region texts repeat often, so label each different one once.
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
