# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores of the rows of a table: means over seeds, intervals over cases, tests between rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.cases import Case
from ..data.phantom_report import labels_from_report
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..metrics.clinical_efficacy import averages, label_counts
from ..metrics.clinical_efficacy.reports import Labeler, label_reports
from ..metrics.labelers import load_labeler
from ..metrics.nlg import score_reports
from ..metrics.statistics import (
    bootstrap_counts,
    bootstrap_mean,
    compare_counts,
    compare_means,
    holm,
    mean_std,
    paired_t_test,
    welch_test,
)

FINDING_SCORES = ("precision", "recall", "f1")
LANGUAGE = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_1", "rouge_2", "rouge_l")


class PhantomReader:
    """Labeler for the sentences of the phantom report writer. Exact for reports in its wording."""

    signature = "phantom-reader"

    def label_all(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """Return 0 or 1 for each label, (reports, 18)."""
        read = [labels_from_report(report) for report in reports]
        return np.array([[labels[label] for label in DIAGNOSIS_LABELS] for labels in read], np.int8)


def study_labeler(name: str) -> Labeler:
    """Load the labeler of a study: "phantom", "rules", or the folder of a converted RadBERT."""
    return PhantomReader() if name == "phantom" else load_labeler(None if name == "rules" else name)


def findings_signature(labeler: Labeler) -> str:
    """Return the signature of findings from a labeler, scored against the labels of the dataset."""
    return f"clinical-efficacy|truth:dataset|labeler:{labeler.signature.replace('|', ',')}"


@dataclass(frozen=True)
class SystemScores:
    """
    Scores of one set of reports.

    Attributes:
        per_report: language scores by name, (cases,); empty for labels without text.
        counts: (cases, 3, labels), see `label_counts`.
        signature: method of the scores.
    """

    per_report: dict[str, NDArray]
    counts: NDArray
    signature: str

    def value(self, metric: str) -> float:
        if metric in FINDING_SCORES:
            return float(micro(self.counts.sum(0), metric))
        return float(self.per_report[metric].mean())


def micro(counts: NDArray, metric: str) -> NDArray:
    """Compute a micro-averaged score (...) from sums of `label_counts` (..., 3, labels)."""
    return averages(counts)["micro"][..., FINDING_SCORES.index(metric)]


def true_labels(cases: Sequence[Case]) -> NDArray[np.int64]:
    """Return the labels of the cases, (cases, labels)."""
    return np.stack([case.labels for case in cases]).astype(int)


def score_system(reports: Sequence[str], cases: Sequence[Case], labeler: Labeler, workers: int = 1) -> SystemScores:
    """Score the text of reports against the true reports, and their findings against the labels of the cases.

    Raises:
        LexiconError: METEOR's data are not installed.
    """
    scores = score_reports(reports, [case.report for case in cases], workers=workers)
    counts = label_counts(label_reports(labeler, reports), true_labels(cases))
    return SystemScores(scores.per_report, counts, f"{scores.signature} {findings_signature(labeler)}")


def score_labels(predicted: NDArray, cases: Sequence[Case]) -> SystemScores:
    """Score predicted labels without a text."""
    return SystemScores({}, label_counts(predicted.astype(int), true_labels(cases)), "")


def mean_and_interval(values: Sequence[float]) -> dict:
    """Return the mean and its 95 % interval; the interval of a single value is `None`."""
    if len(values) < 2:
        return {"mean": float(values[0]), "interval": None}
    interval = bootstrap_mean(values)
    return {"mean": interval.estimate, "interval": [interval.low, interval.high]}


def row_summary(seeds: dict[int, SystemScores], metrics: Sequence[str]) -> dict[str, dict]:
    """
    Summarize each metric of a row: value by seed, mean, standard deviation, and the 95 % interval over cases.

    The interval is that of the mean over seeds. The bootstrap draws cases, each with the reports of all seeds.
    """
    summary = {}
    systems = list(seeds.values())
    for metric in metrics:
        if metric not in FINDING_SCORES and not systems[0].per_report:
            continue
        values = [system.value(metric) for system in systems]
        if metric in FINDING_SCORES:
            # (cases, seeds, 3, labels)
            counts = np.stack([system.counts for system in systems], axis=1)
            interval = bootstrap_counts(counts, lambda sums, m=metric: micro(sums, m).mean(-1))
        else:
            interval = bootstrap_mean(np.mean([system.per_report[metric] for system in systems], axis=0))
        spread = mean_std(values) if len(values) > 1 else None
        summary[metric] = {
            "by_seed": dict(zip(map(str, seeds), values, strict=True)),
            "mean": float(np.mean(values)),
            "std": None if spread is None else spread.std,
            "interval": [interval.low, interval.high],
        }
    return summary


def compare_rows(
    first: dict[int, SystemScores],
    second: dict[int, SystemScores],
    metrics: Sequence[str],
    *,
    same_models: bool = False,
) -> dict:
    """
    Compare two rows, metric by metric; the difference is first minus second.

    Two tests: Welch's two-sided t-test over seeds, as in the paper's Table 5, and a paired test over cases, for the
    generalization to other patients. `holm` corrects over the metrics.

    Args:
        same_models: True if both rows have the same models under two conditions: the t-test is then paired by seed.
    """
    test = paired_t_test if same_models else welch_test
    result = {}
    for metric in metrics:
        values = [[system.value(metric) for system in side.values()] for side in (first, second)]
        entry = {"difference": float(np.mean(values[0]) - np.mean(values[1]))}
        if min(map(len, values)) > 1:
            entry["p_seeds"] = test(*values).p_value
        entry |= _over_cases(first, second, metric)
        result[metric] = entry
    for name in ("p_seeds", "p_cases"):
        tested = [metric for metric in metrics if name in result[metric]]
        corrected = holm([result[metric][name] for metric in tested]) if tested else []
        for metric, value in zip(tested, corrected, strict=True):
            result[metric][f"{name}_holm"] = float(value)
    return result


def _over_cases(first: dict[int, SystemScores], second: dict[int, SystemScores], metric: str) -> dict:
    sides = [list(side.values()) for side in (first, second)]
    if metric not in FINDING_SCORES:
        means = [np.mean([system.per_report[metric] for system in side], axis=0) for side in sides]
        comparison = compare_means(*means)
    else:
        seeds = min(map(len, sides))  # equal numbers of runs, to stack the counts
        counts = [np.stack([system.counts for system in side[:seeds]], axis=1) for side in sides]
        comparison = compare_counts(*counts, lambda sums: micro(sums, metric).mean(-1))
    return {"p_cases": comparison.p_value, "interval": [comparison.interval.low, comparison.interval.high]}
