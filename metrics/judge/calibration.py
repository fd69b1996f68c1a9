# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What a judge is worth: it is asked about reports of phantoms, whose better one is known.

Reports are written from a patient's findings after some were left out, moved to the other side, resized or invented.
Which report has more of the findings, places and quantities right follows from that, and no text is read for it.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...data.phantom import Finding, PhantomPatient, sample_patient
from ...data.phantom_geometry import LOBES
from ...data.phantom_report import region_sentences, report_text
from .rules import DIMENSIONS as COUNTED
from .rules import PLACED
from .verdicts import Comparison, Verdicts, mean_interval, position_bias

KINDS = {
    "dropped": "a finding left out",
    "side": "a side swapped",
    "size": "a size or severity changed",
    "invented": "a finding invented",
}
SPLIT = "judge"  # of the phantoms: no cohort has these patients
SEED = 0

_OTHER_SIDE = {"right": "left", "left": "right"}


@dataclass(frozen=True)
class Item:
    """
    A comparison whose result is known.

    Args:
        kind: "graded", two faulty reports; one of [`KINDS`], the truth against a report with that fault; "self".
        winners: 1 where the first report is the better one, 0 where the second is, by counted dimension; nothing of
            those in which they are equal.
    """

    kind: str
    comparison: Comparison
    winners: dict[str, int]


# Reports with known faults ------------------------------------------------------------------------------------------


def true_place(finding: Finding) -> frozenset[str]:
    """Lobes, or else sides, of a finding of the lungs or the pleura."""
    attributes = finding.attributes
    if finding.label not in PLACED:
        return frozenset()
    if "lobe" in attributes:
        return frozenset([attributes["lobe"]])
    if "lobes" in attributes:
        return frozenset(attributes["lobes"])
    if attributes.get("zone") == "both lower lobes":
        return frozenset(("right lower lobe", "left lower lobe"))
    side = attributes.get("side", "both")
    return frozenset(_OTHER_SIDE if side == "both" else (side,))


def true_quantity(finding: Finding) -> int | str | None:
    """The length in mm that a report states, or the severity."""
    lengths = [value for key, value in finding.attributes.items() if key.endswith("_mm")]
    return lengths[0] if lengths else finding.attributes.get("severity")


def other_side(finding: Finding) -> Finding | None:
    """The finding on the other side; `None` of one that has no side, or both."""
    attributes = dict(finding.attributes)
    if finding.label not in PLACED:
        return None
    if attributes.get("side") in _OTHER_SIDE:
        attributes["side"] = _OTHER_SIDE[attributes["side"]]
    elif "lobe" in attributes or "lobes" in attributes:
        mirrored = [_mirrored(lobe) for lobe in sorted(true_place(finding))]
        if true_place(finding) & set(mirrored):
            return None
        attributes |= {"lobe": mirrored[0]} if "lobe" in attributes else {"lobes": sorted(set(mirrored))}
    else:
        return None
    return Finding(finding.label, attributes)


def _mirrored(lobe: str) -> str:
    side, level, _ = lobe.split()
    mirrored = f"{_OTHER_SIDE[side]} {level} lobe"
    return mirrored if mirrored in LOBES else "left upper lobe"  # which holds the lingula, the middle lobe's twin


def other_size(finding: Finding) -> Finding | None:
    """The finding with twice its length, or of another severity; `None` of one that has neither."""
    attributes = dict(finding.attributes)
    for key, value in attributes.items():
        if key.endswith("_mm"):
            attributes[key] = 2 * value
            return Finding(finding.label, attributes)
    if "severity" not in attributes:
        return None
    attributes["severity"] = {"mild": "severe", "moderate": "mild", "severe": "mild"}[attributes["severity"]]
    return Finding(finding.label, attributes)


def invented(patient: PhantomPatient, rng: np.random.Generator) -> Finding:
    """A finding of another patient that this one does not have."""
    own = {finding.label for finding in patient.findings}
    while True:
        others = sample_patient(int(rng.integers(2**31)), 0, SPLIT).findings
        new = [finding for finding in others if finding.label not in own]
        if new:
            return new[int(rng.integers(len(new)))]


def written(patient: PhantomPatient, findings: Sequence[Finding], rng: np.random.Generator) -> str:
    """The report of a patient with these findings, its wordings drawn anew."""
    return report_text(region_sentences(replace(patient, findings=tuple(findings)), rng))


def faulty(patient: PhantomPatient, rng: np.random.Generator) -> list[Finding]:
    """The patient's findings with faults of all kinds, each with a probability of a quarter or so."""
    stated = []
    for finding in patient.findings:
        kind = rng.choice(("right", "dropped", "side", "size"), p=(0.4, 0.2, 0.2, 0.2))
        changed = {"side": other_side, "size": other_size}.get(kind, lambda same: same)(finding)
        stated += [] if kind == "dropped" else [changed or finding]
    return [*stated, invented(patient, rng)] if rng.random() < 0.25 else stated


def right(patient: PhantomPatient, stated: Sequence[Finding]) -> dict[str, int]:
    """How many of a patient's findings are stated, at their place, and with their quantity."""
    by_label = {finding.label: finding for finding in stated}
    pairs = [(finding, by_label[finding.label]) for finding in patient.findings if finding.label in by_label]
    return {
        "finding_coverage": len(pairs),
        "anatomical_specificity": sum(bool(true_place(of)) and true_place(of) == true_place(one) for of, one in pairs),
        "quantification_detail": sum(
            true_quantity(of) is not None and true_quantity(of) == true_quantity(one) for of, one in pairs
        ),
    }


def calibration_items(patients: int) -> list[Item]:
    """
    Comparisons of reports of the first so many phantoms with a finding: of each two faulty reports, and the truth
    against a report with one fault, whose kind takes turns; of each fourth, the truth against itself.
    """
    everyone = (sample_patient(SEED, index, SPLIT) for index in itertools.count())
    abnormal = itertools.islice((patient for patient in everyone if patient.findings), patients)
    items: list[Item] = []
    for patient, kind in zip(abnormal, itertools.cycle(KINDS), strict=False):
        rng = patient.rng("calibration")
        truth = report_text(region_sentences(patient))
        items.append(_item("graded", patient, truth, faulty(patient, rng), faulty(patient, rng), rng))
        corrupted = _corrupted(patient, kind, rng)
        if corrupted is not None:
            items.append(_item(kind, patient, truth, patient.findings, corrupted, rng))
        if kind == "dropped":
            items.append(Item("self", Comparison(truth, truth, truth), {}))
    return items


def _corrupted(patient: PhantomPatient, kind: str, rng: np.random.Generator) -> list[Finding] | None:
    """The patient's findings with one fault; `None` where none can have it."""
    findings = list(patient.findings)
    if kind == "invented":
        return [*findings, invented(patient, rng)]
    change = {"dropped": lambda finding: (), "side": other_side, "size": other_size}[kind]
    changed = {at: change(finding) for at, finding in enumerate(findings)}
    possible = [at for at, of in changed.items() if of is not None]
    if not possible:
        return None
    at = possible[int(rng.integers(len(possible)))]
    findings[at : at + 1] = [] if kind == "dropped" else [changed[at]]
    return findings


def _item(kind: str, patient: PhantomPatient, truth: str, first, second, rng) -> Item:
    counts = right(patient, first), right(patient, second)
    winners = {name: int(counts[0][name] > counts[1][name]) for name in COUNTED if counts[0][name] != counts[1][name]}
    return Item(kind, Comparison(truth, *(written(patient, of, rng) for of in (first, second))), winners)


# Scores -------------------------------------------------------------------------------------------------------------


def calibrate(judge, patients: int, on_progress: Callable[[int, int], None] = lambda done, total: None) -> dict:
    """
    Args:
        judge: a [`RuleJudge`] or a [`ModelJudge`].
        patients: phantoms; see [`calibration_items`].

    Returns:
        "agreement" with the known winner, by counted dimension, over the comparisons that have one;
        "corruptions": how often the truth wins, by kind of fault and dimension; "self": how often the first of two
        equal reports wins, which is one half without chance; "position", see [`position_bias`]; "patients",
        "comparisons", "unanswered" (of the comparisons, by dimension), "refused".
    """
    items = calibration_items(patients)
    verdicts = judge.judge([item.comparison for item in items], on_progress)

    def rows(kind: str) -> Verdicts:
        return verdicts.part([row for row, item in enumerate(items) if item.kind == kind])

    agreement = {}
    for name in COUNTED:
        column = verdicts.dimensions.index(name)
        of = [(verdicts.scores[row, column], item.winners[name]) for row, item in enumerate(items)
              if name in item.winners]  # fmt: skip
        scores = np.array([score if first else 1 - score for score, first in of])
        agreement[name] = {**mean_interval(scores), "asked": len(of)}
    return {
        "signature": judge.signature,
        "patients": patients,
        "comparisons": len(items),
        "agreement": agreement,
        "corruptions": {kind: _rates(rows(kind)) for kind in KINDS},
        "self": _rates(rows("self")),
        "position": position_bias(verdicts),
        "unanswered": {
            name: int(np.isnan(verdicts.scores[:, column]).sum()) for column, name in enumerate(verdicts.dimensions)
        },
        "refused": verdicts.refused,
        "repaired": verdicts.repaired,
    }


def _rates(verdicts: Verdicts) -> dict[str, dict]:
    return {name: mean_interval(verdicts.scores[:, column]) for column, name in enumerate(verdicts.dimensions)}
