# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Goals of a checkpoint on phantoms, and its scores: classifier, report and difference map.

The findings of phantoms are known with place and size. Each score is shown next to its goal.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.cache import VolumeCache
from ..data.cases import Case, chance
from ..data.phantom import Finding
from ..data.pool import is_normal
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..metrics.clinical_efficacy import averages, label_counts
from ..metrics.markdown import table_lines, with_interval
from ..metrics.statistics import Comparison, Interval, bootstrap_auroc, bootstrap_counts, compare_counts
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..references_diffvp import ReferencePool
from ..training.features import Features
from .lesion_scores import named_twice, score_findings, size_bin
from .map_scores import score_maps
from .system_scores import mean_and_interval, true_labels

SMALL_NODULE = ("Lung nodule", "6-8 mm")
NO_TRUTH = "not measured"  # shown if the cohort has no case for a score

# Classifier ---------------------------------------------------------------------------------------------------------


def naming_scores(
    predicted: NDArray, cases: Sequence[Case], patients: Mapping[str, Sequence[Finding]]
) -> dict[str, dict]:
    """
    Score the findings named by a classifier or a report against those of the cases.

    Args:
        predicted: 0 or 1, (cases, labels).
        patients: the findings of each case, by its name.

    Returns:
        "micro_f1" and "macro_f1"; "small_nodules", recall over patients with a nodule of 6 to 8 mm; "false_findings",
        number per normal patient. Each entry has `value` and `interval`, the last two also `cases`; `value` is `None`
        without such cases. "false_findings" also has the total `count`.
    """
    counts = label_counts(predicted, true_labels(cases))
    scores = {
        f"{average}_f1": _entry(bootstrap_counts(counts, lambda sums, name=average: averages(sums)[name][..., 2]))
        for average in ("micro", "macro")
    }
    label, size = SMALL_NODULE
    column = DIAGNOSIS_LABELS.index(label)
    small = [
        row
        for row, case in enumerate(cases)
        if any(of.label == label and size_bin(of) == size for of in patients[case.name])
    ]
    normal = [row for row, case in enumerate(cases) if is_normal(case)]
    false = predicted[normal].sum(axis=1)
    return scores | {
        "small_nodules": _mean(predicted[small, column]),
        "false_findings": _mean(false) | {"count": int(false.sum())},
    }


def classifier_scores(
    probabilities: NDArray, thresholds: float | Sequence[float], cases: Sequence[Case], patients: Mapping
) -> dict[str, dict]:
    """
    Compute [`naming_scores`] at the thresholds, and "auroc" by label.

    The AUROC of a label is `None` if all cases have the label, or none.

    Args:
        probabilities: (cases, labels).
    """
    predicted = (probabilities >= np.asarray(thresholds)).astype(int)
    truth = true_labels(cases)
    areas = {
        label: _entry(bootstrap_auroc(probabilities[:, column], truth[:, column]))
        if 0 < truth[:, column].sum() < len(truth)
        else None
        for column, label in enumerate(DIAGNOSIS_LABELS)
    }
    return naming_scores(predicted, cases, patients) | {"auroc": areas}


# Report -------------------------------------------------------------------------------------------------------------


def report_scores(
    reports: Sequence[str],
    named: NDArray,
    classifier: NDArray,
    cases: Sequence[Case],
    patients: Mapping[str, Sequence[Finding]],
) -> dict[str, dict]:
    """
    Compute [`naming_scores`] of reports, and scores of the details of rightly named findings.

    Args:
        named: findings of the reports, (cases, labels).
        classifier: findings of the diagnosis prompts, (cases, labels).

    Returns:
        "below_classifier", micro-F1 of the classifier minus that of the report; "place_right", share of findings with
        the right lobes or sides; "size_right", share with a size within a quarter of the true one; "named_twice",
        share of reports that state a finding in two sentences, with counts by label in `labels`.
    """
    truth = true_labels(cases)
    counts = [label_counts(side, truth) for side in (classifier, named)]
    below = compare_counts(*counts, lambda sums: averages(sums)["micro"][..., 2])
    details = [
        _details(score_findings({case.name: patients[case.name]}, {case.name: report})["details"])
        for case, report in zip(cases, reports, strict=True)
    ]
    twice = [named_twice(report) for report in reports]
    often = [label for of in twice for label in of]
    return naming_scores(named, cases, patients) | {
        "below_classifier": _entry(below),
        "place_right": _ratio([of[:2] for of in details]),
        "size_right": _ratio([of[2:] for of in details]),
        "named_twice": _mean([bool(of) for of in twice])
        | {"count": sum(map(bool, twice)), "labels": {label: often.count(label) for label in sorted(set(often))}},
    }


def _details(of_case: Mapping[str, Mapping[str, int]]) -> list[int]:
    keys = ("place_right", "with_place", "size_right", "with_size")
    return [sum(row[key] for row in of_case.values()) for key in keys]


# Map ----------------------------------------------------------------------------------------------------------------


def pool_cases(pool: ReferencePool | None) -> list[Case]:
    """
    Return the normal scans stored with a checkpoint, as cases without a report.

    Raises:
        ValueError: there are fewer than two; maps of two references are compared.
    """
    entries = () if pool is None else pool.entries
    if len(entries) < 2:
        raise ValueError(f"The checkpoint has {len(entries)} reference(s); expected at least 2 to compare maps")
    labels = np.zeros(len(DIAGNOSIS_LABELS), np.int8)
    return [Case(of["id"], of["id"], of["id"], pool.fetch(of), report="", labels=labels) for of in entries]


def map_scores(
    model: DiffVPForConditionalGeneration,
    volumes: VolumeCache,
    data: str | os.PathLike,
    cases: Sequence[Case],
    pool: Sequence[Case],
) -> dict:
    """
    Compute [`score_maps`] with one reference of the checkpoint for each case, drawn by names only.

    Args:
        data: folder of the phantom cohort, with masks.
        pool: see [`pool_cases`].

    Raises:
        DatasetError: the cohort has no masks.
    """
    drawn = {case.name: min(pool, key=lambda one, case=case: chance(f"{case.name}:{one.name}")) for case in cases}
    features = Features(volumes.cache.root.parent, volumes, model)
    return score_maps(model, features, volumes, data, cases, drawn)


# Page ---------------------------------------------------------------------------------------------------------------


def goal_lines(result: Mapping) -> list[str]:
    """
    Write the tables of the page.

    Args:
        result: "classifier" of [`classifier_scores`], "report" of [`report_scores`], "bleu4" of the report, "maps" of
            [`map_scores`], and optionally "volume_labels" of another classifier.
    """
    classifier, report, maps = (result[name] for name in ("classifier", "report", "maps"))
    alone = result.get("volume_labels")
    seen = [
        ("micro-F1", "micro_f1", "≥ 0.93, report ≥ 0.90"),
        ("macro-F1", "macro_f1", "≥ 0.88"),
        ("recall of nodules of 6–8 mm", "small_nodules", "≥ 0.45"),
        ("false findings per normal patient", "false_findings", "≤ 1 in 28"),
    ]
    columns = {"classifier": classifier, "report": report}
    if alone is not None:
        columns["classifier, volume labels alone"] = alone
    rows = [[name, goal, *(_cell(of[key]) for of in columns.values())] for name, key, goal in seen]
    known = {label: area for label, area in classifier["auroc"].items() if area is not None}
    if known:
        least = min(known, key=lambda label: known[label]["value"])
        areas = [_cell(of["auroc"][least]) if "auroc" in of else "no probability" for of in columns.values()]
        rows.append([f"lowest AUROC of {len(known)} labels ({least})", "≥ 0.93", *areas])
    said = [
        ["BLEU-4", "≥ 0.60", with_interval(**result["bleu4"])],
        ["micro-F1 below the classifier's", "≤ 0.02", _cell(report["below_classifier"])],
        ["lobes or sides right, of findings rightly named", "≥ 0.85", _cell(report["place_right"])],
        ["size within a quarter, of findings rightly named", "≥ 0.75", _cell(report["size_right"])],
        ["reports that name a finding twice", "0", _cell(report["named_twice"])],
    ]
    return [
        *table_lines(["findings named", "goal", *columns], rows),
        "",
        *table_lines(["report", "goal", "measured"], said),
        "",
        *_map_lines(maps),
        "",
        *table_lines(
            ["AUROC by label", *(name for name in columns if name != "report")],
            [
                [label, *(_cell(of["auroc"][label]) for name, of in columns.items() if name != "report")]
                for label in DIAGNOSIS_LABELS
            ],
        ),
    ]


def _map_lines(maps: Mapping) -> list[str]:
    rows = [
        [name, *(with_interval(of[key]["mean"], of[key]["interval"]) for key in _MAP_SCORES)]
        for name, of in maps["maps"].items()
    ]
    against = {entry["second"]: entry["metrics"] for entry in maps["comparisons"]}
    same = maps["correlation"]
    goals = [
        ["its maximum lies on a lesion", "≥ 0.90", _map_cell(maps["maps"]["latent"])],
        [
            "maximum of another patient's map lies on a lesion",
            "≤ 0.20",
            _map_cell(maps["maps"]["latent, another patient"]),
        ],
        ["correlation with the map of another reference", "≤ 0.90", with_interval(same["mean"], same["interval"])],
        *(
            [f"{metric}, minus {name}", "interval above 0", _difference(against[name][key])]
            for name in against
            if name.startswith("target alone")
            for metric, key in (("maximum on a lesion", "pointing_body"), ("AUROC", "auroc"))
        ),
    ]
    near = f"in a lesion or within {maps['tolerance_mm']:g} mm of one"
    return [
        *table_lines(["difference map", "goal", "measured"], goals),
        "",
        f"Maps of {maps['cases']} patients with findings. A maximum on a lesion lies {near}.",
        "",
        *table_lines(["map", "maximum on a lesion", "in a lesion itself", "AUROC in the body"], rows),
    ]


_MAP_SCORES = ("pointing_body", "pointing_lesion", "auroc")


def _map_cell(of: Mapping) -> str:
    return with_interval(of["pointing_body"]["mean"], of["pointing_body"]["interval"])


def _difference(of: Mapping) -> str:
    return f"{of['difference']:+.3f} ({of['interval'][0]:+.3f} to {of['interval'][1]:+.3f})"


def _cell(of: Mapping | None) -> str:
    if of is None or of["value"] is None:
        return NO_TRUTH
    counted = f", {of['count']} in {of['cases']}" if "count" in of else ""
    return with_interval(of["value"], of["interval"]) + counted


def _entry(of: Interval | Comparison) -> dict:
    of = of.interval if isinstance(of, Comparison) else of
    return {"value": of.estimate, "interval": [of.low, of.high]}


def _mean(values: Sequence[float]) -> dict:
    """Return the mean with interval. `value` is `None` without cases, `interval` also for a single case."""
    if not len(values):
        return {"cases": 0, "value": None, "interval": None}
    of = mean_and_interval(np.asarray(values, dtype=float))
    return {"cases": len(values), "value": of["mean"], "interval": of["interval"]}


def _ratio(counts: Sequence[Sequence[int]]) -> dict:
    """Return the share of right items, from counts of right ones and of all, (cases, 2)."""
    sums = np.array(counts)
    if not sums[:, 1].any():
        return {"findings": 0, "value": None, "interval": None}
    interval = bootstrap_counts(sums, lambda drawn: _divided(drawn[..., 0], drawn[..., 1]))
    return {"findings": int(sums[:, 1].sum()), **_entry(interval)}


def _divided(first: NDArray, second: NDArray) -> NDArray:
    return np.divide(first, second, out=np.full(np.shape(first), np.nan), where=np.asarray(second) > 0)
