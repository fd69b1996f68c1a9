# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Judge reports by rules, without a server, in the three dimensions that can be counted.

The labeler finds the findings in the true report and in both others. A report scores one point for each true finding

- that it names (finding_coverage);
- whose place it gives as the truth does: the lobes, or the sides if there are no lobes (anatomical_specificity);
- whose length is within a quarter of the true one, or whose severity equals the true one (quantification_detail).

The point for the place is divided: two of a finding's three lobes count two thirds. Findings that the truth does not
have gain and lose nothing, so these rules do not detect invented findings. Places are read only for findings of the
lungs and the pleura.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..labelers.rules import RuleLabeler
from ..places import named_lobes, named_sides
from .verdicts import Comparison, Verdicts

DIMENSIONS = ("finding_coverage", "anatomical_specificity", "quantification_detail")
PLACED = frozenset(
    (
        "Emphysema",
        "Atelectasis",
        "Lung nodule",
        "Lung opacity",
        "Pulmonary fibrotic sequela",
        "Pleural effusion",
        "Peribronchial thickening",
        "Consolidation",
        "Bronchiectasis",
        "Interlobular septal thickening",
    )
)
SIZE_TOLERANCE = 0.25  # relative to the true size

_MILLIMETRES = re.compile(r"(\d+(?:[.,]\d+)?)(?: ?[x×] ?\d+(?:[.,]\d+)?)* ?(mm|cm)\b")
_SEVERITY = re.compile(r"\b(minimal|mild|moderate|severe|massive)(?:ly)?\b")


@dataclass(frozen=True)
class Statement:
    """Places, lengths and severities that a report states for one finding."""

    places: frozenset[str]
    lengths: tuple[float, ...]  # mm
    severities: frozenset[str]


def lengths_mm(sentence: str) -> tuple[float, ...]:
    """Return the lengths in a lower-case sentence, in mm; of "12 x 9 mm" the first."""
    found = _MILLIMETRES.findall(sentence)
    return tuple(float(number.replace(",", ".")) * (10 if unit == "cm" else 1) for number, unit in found)


def right_lengths(stated: Sequence[float], true: Sequence[float]) -> bool:
    """True if at least one length is stated and each is within a quarter of a true one."""
    return bool(stated) and all(any(abs(one - of) <= SIZE_TOLERANCE * of for of in true) for one in stated)


class RuleJudge:
    """Judge that compares the findings read by the labeler; see the module docstring."""

    dimensions = DIMENSIONS

    def __init__(self, labeler: RuleLabeler | None = None):
        self.labeler = labeler or RuleLabeler()

    @property
    def signature(self) -> str:
        labeler = self.labeler.signature.replace("|", ",")
        return f"judge|pairwise|dims:{len(DIMENSIONS)}|rules|labeler:{labeler}"

    def judge(
        self, comparisons: Sequence[Comparison], on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Verdicts:
        """Judge comparisons; 0.5 in a dimension in which the reports are equal."""
        scores = np.empty((len(comparisons), len(DIMENSIONS)))
        for row, (truth, first, second) in enumerate(comparisons):
            true = self.statements(truth)
            won = np.subtract(*(counted(true, self.statements(report)) for report in (first, second)))
            scores[row] = (np.sign(np.round(won, 9)) + 1) / 2
            on_progress(row + 1, len(comparisons))
        return Verdicts(DIMENSIONS, scores)

    def statements(self, report: str) -> dict[str, Statement]:
        """Return the statements of a report about its findings, by label."""
        sentences: dict[str, dict[str, None]] = defaultdict(dict)
        for hit in self.labeler.explain(report):
            if hit.counts:
                sentences[hit.label][hit.sentence.lower()] = None
        return {label: _statement(label, list(of)) for label, of in sentences.items()}


def _statement(label: str, sentences: Sequence[str]) -> Statement:
    places: frozenset[str] = frozenset()
    if label in PLACED:
        lobes = frozenset().union(*map(named_lobes, sentences))
        places = lobes or frozenset().union(*map(named_sides, sentences))
    lengths = tuple(length for sentence in sentences for length in lengths_mm(sentence))
    severities = frozenset(word for sentence in sentences for word in _SEVERITY.findall(sentence))
    return Statement(places, lengths, severities)


def counted(true: dict[str, Statement], stated: dict[str, Statement]) -> tuple[float, float, float]:
    """Count the true findings that a report covers, places and quantifies."""
    both = [(true[label], stated[label]) for label in true if label in stated]
    placed = sum(len(one.places & of.places) / len(one.places | of.places) for of, one in both if of.places)
    return float(len(both)), placed, float(sum(_quantified(of, one) for of, one in both))


def _quantified(true: Statement, stated: Statement) -> bool:
    if true.lengths:
        return right_lengths(stated.lengths, true.lengths)
    return bool(true.severities) and stated.severities == true.severities
