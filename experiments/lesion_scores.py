# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Findings of the phantoms in a report: named or not, by size, and for named ones correctness of side, lobe and size.

Only phantoms allow this: no dataset of patients has the size of every finding.
"""

import re
from collections.abc import Mapping, Sequence

from ..data.lesions import size_mm, true_place
from ..data.phantom import LOBES, SEVERITIES, Finding
from ..data.phantom_report import labels_from_report
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..metrics.places import named_lobes, named_sides

# Lower bounds of the bins in mm. Nodules: 9, above which guidelines shorten the follow-up. Pericardial effusion: 10
# and 20, from which on it is called moderate and large. Others: so that each bin has about a third of the cases. No
# finding is smaller than the first number, see `data/phantom.py`.
BINS_MM = {
    "Lung nodule": (6, 9, 16),
    "Consolidation": (28, 40, 55),
    "Pleural effusion": (10, 20, 35),
    "Pericardial effusion": (8, 10, 20),
    "Lymphadenopathy": (12, 16, 21),
    "Hiatal hernia": (30, 40, 55),
}
SIZE_TOLERANCE = 0.25  # of the true size

# The same sentence ends as in `labels_from_report`.
_SENTENCE = re.compile(r"[.;\n]+(?=\s|$)|\n")
_MILLIMETRES = re.compile(r"(\d+(?:\.\d+)?) ?mm\b")


# Truth --------------------------------------------------------------------------------------------------------------


def size_bin(finding: Finding) -> str | None:
    """Return the size bin ("9-15 mm") or the severity of a finding, or `None` if it has neither.

    Raises:
        ValueError: there is no bin for the length of the finding.
    """
    size = size_mm(finding)
    if size is None:
        return finding.attributes.get("severity")
    starts = BINS_MM.get(finding.label, ())
    reached = [index for index, start in enumerate(starts) if size >= start]
    if not reached:
        raise ValueError(f"{finding.label} of {size:g} mm: no bin; expected one of those that begin at {starts} mm")
    return _bin_names(starts)[reached[-1]]


def _bin_names(starts: Sequence[int]) -> list[str]:
    names = [f"{start}-{following - 1} mm" for start, following in zip(starts, starts[1:], strict=False)]
    return [*names, f"from {starts[-1]} mm"]


# Reports ------------------------------------------------------------------------------------------------------------


def sentences_about(report: str, label: str) -> list[str]:
    """Return the sentences of a report that state a finding, in lower case."""
    return [part for part in _SENTENCE.split(report.lower()) if labels_from_report(part)[label]]


def named_twice(report: str) -> list[str]:
    """Return the findings that more than one sentence of a report states. A correct report states each once."""
    read = [labels_from_report(part) for part in _SENTENCE.split(report.lower())]
    return [label for label in DIAGNOSIS_LABELS if sum(of[label] for of in read) > 1]


def place_is_right(finding: Finding, sentences: Sequence[str]) -> bool:
    """True if the sentences together name all lobes (or sides) of the finding and no other."""
    truth = true_place(finding)
    read = named_lobes if truth <= set(LOBES) else named_sides
    return frozenset().union(*map(read, sentences)) == truth


def size_is_right(finding: Finding, sentences: Sequence[str]) -> bool:
    """True if the sentences state a length and all stated lengths are within a quarter of the true one."""
    truth = size_mm(finding)
    stated = [float(number) for sentence in sentences for number in _MILLIMETRES.findall(sentence)]
    return bool(stated) and all(abs(number - truth) <= SIZE_TOLERANCE * truth for number in stated)


# Scores -------------------------------------------------------------------------------------------------------------


def score_findings(findings: Mapping[str, Sequence[Finding]], reports: Mapping[str, str]) -> dict:
    """
    Count the true findings that the reports name, by size, and those with the right place and size.

    Args:
        findings: the findings of each case by its name, see [`read_patients`]. Cases without a report are ignored.
        reports: generated reports by case name.

    Returns:
        "by_size": {label: {bin: {"cases", "found"}}} for findings with a length or a severity, in ascending order,
        without empty bins; "details": {label: {"found", "with_place", "place_right", "with_size", "size_right"}} for
        the findings that were named; "counts": numbers of "reports", "findings", "sized" findings (those in
        `by_size`) and "found" findings.

    Raises:
        ValueError: the findings of a case with a report are unknown.
    """
    unknown = sorted(set(reports) - set(findings))
    if unknown:
        raise ValueError(f"{len(unknown)} report(s) of cases without known findings, such as {unknown[0]}")
    by_size: dict[str, dict[str, dict[str, int]]] = {}
    details: dict[str, dict[str, int]] = {}
    counts = {"reports": len(reports), "findings": 0, "sized": 0, "found": 0}
    for name, report in reports.items():
        for finding in findings[name]:
            sentences = sentences_about(report, finding.label)
            counts["findings"] += 1
            counts["found"] += bool(sentences)
            size = size_bin(finding)
            if size is not None:
                counts["sized"] += 1
                of_bin = by_size.setdefault(finding.label, {}).setdefault(size, {"cases": 0, "found": 0})
                of_bin["cases"] += 1
                of_bin["found"] += bool(sentences)
            if sentences:
                _add_details(details, finding, sentences)
    ordered = {
        label: {size: bins[size] for size in _bin_order(label) if size in bins} for label, bins in by_size.items()
    }
    return {"by_size": ordered, "details": details, "counts": counts}


def _bin_order(label: str) -> Sequence[str]:
    return _bin_names(BINS_MM[label]) if label in BINS_MM else SEVERITIES


def _add_details(details: dict[str, dict[str, int]], finding: Finding, sentences: Sequence[str]) -> None:
    empty = dict.fromkeys(("found", "with_place", "place_right", "with_size", "size_right"), 0)
    row = details.setdefault(finding.label, empty)
    row["found"] += 1
    if true_place(finding):
        row["with_place"] += 1
        row["place_right"] += place_is_right(finding, sentences)
    if size_mm(finding) is not None:
        row["with_size"] += 1
        row["size_right"] += size_is_right(finding, sentences)
