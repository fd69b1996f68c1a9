# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Measure how reliable a judge is: let it compare reports of phantoms for which the better report is known.

The reports are generated from a patient's findings after some findings were dropped, moved to the other side, resized
or invented. The better report follows from these changes, without reading any text.
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
SPLIT = "judge"  # phantom split of these patients, which no cohort contains
SEED = 0

_OTHER_SIDE = {"right": "left", "left": "right"}


@dataclass(frozen=True)
class Item:
    """
    A comparison with a known result.

    Args:
        kind: "graded" for two faulty reports, one of [`KINDS`] for the truth against a report with that fault, or
            "self" for a report against itself.
        winners: by counted dimension, 1 if the first report is better and 0 if the second is. Dimensions in which
            they are equal are left out.
    """

    kind: str
    comparison: Comparison
    winners: dict[str, int]


# Reports with known faults ------------------------------------------------------------------------------------------


def true_place(finding: Finding) -> frozenset[str]:
    """Return the lobes of a finding of the lungs or the pleura, or its sides if it has no lobe."""
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
    """Return the length in mm that a report states, or the severity if there is no length."""
    lengths = [value for key, value in finding.attributes.items() if key.endswith("_mm")]
    return lengths[0] if lengths else finding.attributes.get("severity")


def other_side(finding: Finding) -> Finding | None:
    """Move a finding to the other side; `None` if it has no side, or both."""
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
    return (
        mirrored if mirrored in LOBES else "left upper lobe"
    )  # it contains the lingula, the counterpart of the middle lobe


def other_size(finding: Finding) -> Finding | None:
    """Double the length of a finding, or change its severity; `None` if it has neither."""
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
    """Draw a finding that this patient does not have from another patient."""
    own = {finding.label for finding in patient.findings}
    while True:
        others = sample_patient(int(rng.integers(2**31)), 0, SPLIT).findings
        new = [finding for finding in others if finding.label not in own]
        if new:
            return new[int(rng.integers(len(new)))]


def written(patient: PhantomPatient, findings: Sequence[Finding], rng: np.random.Generator) -> str:
    """Write the report of a patient with these findings, with newly drawn wordings."""
    return report_text(region_sentences(replace(patient, findings=tuple(findings)), rng))


def faulty(patient: PhantomPatient, rng: np.random.Generator) -> list[Finding]:
    """Return the patient's findings with faults of all kinds, each with a probability of 20 to 25 %."""
    stated = []
    for finding in patient.findings:
        kind = rng.choice(("right", "dropped", "side", "size"), p=(0.4, 0.2, 0.2, 0.2))
        changed = {"side": other_side, "size": other_size}.get(kind, lambda same: same)(finding)
        stated += [] if kind == "dropped" else [changed or finding]
    return [*stated, invented(patient, rng)] if rng.random() < 0.25 else stated


def right(patient: PhantomPatient, stated: Sequence[Finding]) -> dict[str, int]:
    """Count the patient's findings that are stated, stated at the right place, and stated with the right quantity."""
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
    Build the comparisons for the first `patients` phantoms that have a finding.

    Each phantom gives two faulty reports against each other, and the truth against a report with one fault; the kinds
    of faults alternate. Each fourth phantom also gives the truth against itself.
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
    """Return the patient's findings with one fault; `None` if no finding can have it."""
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
    Let a judge compare reports for which the better one is known.

    Args:
        judge: a [`RuleJudge`] or a [`ModelJudge`].
        patients: number of phantoms; see [`calibration_items`].

    Returns:
        - "agreement": agreement with the known winner by counted dimension, over the comparisons that have one.
        - "corruptions": share of comparisons that the truth wins, by kind of fault and dimension.
        - "self": share in which the first of two equal reports wins; 0.5 for an unbiased judge.
        - "position": see [`position_bias`].
        - "unanswered": number of comparisons without an answer, by dimension.
        - "patients", "comparisons", "refused", "repaired", "signature".
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
