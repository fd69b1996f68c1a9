# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores of size and location of known findings, on hand-written reports."""

import json
import re

import numpy as np
import pytest

from diffvp.data.cases import DatasetError
from diffvp.data.lesions import read_patients, true_place
from diffvp.data.phantom import FINDING_NETWORK, Finding, sample_attributes, sample_patient
from diffvp.data.phantom_report import region_sentences, report_text
from diffvp.experiments.lesion_scores import score_findings, size_bin

NORMAL = (
    "Lung: No nodule, mass or infiltration was detected in both lungs.\nPleura: Pleural effusion was not observed."
)


def nodule(size, lobe="right upper lobe", count=1):
    return Finding("Lung nodule", {"count": count, "lobe": lobe, "size_mm": size})


def effusion(size, side):
    return Finding("Pleural effusion", {"side": side, "thickness_mm": size})


def details(finding, report):
    """Return the detail counts of one finding in a report; `None` if the report does not name it."""
    return score_findings({"case": [finding]}, {"case": report})["details"].get(finding.label)


def test_findings_are_counted_by_size():
    findings = {
        "a": [nodule(6), effusion(12, "left")],
        "b": [nodule(8)],
        "c": [nodule(9)],
        "d": [nodule(28), Finding("Emphysema", {"severity": "severe", "side": "both"})],
        "e": [Finding("Emphysema", {"severity": "mild", "side": "both"}), effusion(34, "right")],
        "f": [],
        "never reported": [nodule(7)],
    }
    reports = {
        "a": "Lung: A nodule measuring 6 mm is observed in the right upper lobe.\nPleura: There is no effusion.",
        "b": NORMAL,
        "c": "Lung: There is a 9 mm solid nodule in the right upper lobe.",
        "d": "Lung: Severe emphysematous changes are observed in both lungs, mainly in the upper zone.",
        "e": "Pleura: Right pleural effusion measuring 34 mm in thickness is observed.",
        "f": "Lung: A nodule measuring 6 mm is observed in the right upper lobe.",  # a false finding
    }
    result = score_findings(findings, reports)
    assert result["by_size"] == {
        "Lung nodule": {
            "6-8 mm": {"cases": 2, "found": 1},
            "9-15 mm": {"cases": 1, "found": 1},
            "from 16 mm": {"cases": 1, "found": 0},
        },
        "Pleural effusion": {"10-19 mm": {"cases": 1, "found": 0}, "20-34 mm": {"cases": 1, "found": 1}},
        "Emphysema": {"mild": {"cases": 1, "found": 0}, "severe": {"cases": 1, "found": 1}},
    }
    assert list(result["by_size"]["Lung nodule"]) == ["6-8 mm", "9-15 mm", "from 16 mm"]
    assert list(result["by_size"]["Emphysema"]) == ["mild", "severe"]
    assert result["counts"] == {"reports": 6, "findings": 8, "sized": 8, "found": 4}
    assert result["details"]["Emphysema"] == {
        "found": 1, "with_place": 1, "place_right": 1, "with_size": 0, "size_right": 0
    }  # fmt: skip


def test_findings_without_a_size_count_but_have_no_bin():
    findings = {"a": [Finding("Atelectasis", {"kind": "linear", "lobes": ["left lower lobe"]})]}
    result = score_findings(findings, {"a": "Lung: Linear atelectasis is observed in both lower lobes."})
    assert result["by_size"] == {} and result["counts"] == {"reports": 1, "findings": 1, "sized": 0, "found": 1}
    assert result["details"]["Atelectasis"]["place_right"] == 0  # one lobe too many


@pytest.mark.parametrize(
    ("size", "stated", "right"),
    [(20, "25 mm", 1), (20, "26 mm", 0), (20, "15 mm", 1), (20, "14 mm", 0), (12, "9.4 mm", 1), (12, "8 mm", 0)],
)
def test_size_is_right_within_a_quarter_of_the_true_one(size, stated, right):
    row = details(
        nodule(size), f"Lung: A solitary nodule with a diameter of {stated} is seen in the right upper lobe."
    )
    assert row == {"found": 1, "with_place": 1, "place_right": 1, "with_size": 1, "size_right": right}


def test_place_is_read_in_wordings_of_radiologists():
    finding = nodule(10, "right middle lobe")
    for place, right in (
        ("middle lobe", 1),
        ("right middle lobe", 1),
        ("middle lobe of the right lung", 1),
        ("lingula", 0),
    ):
        assert details(finding, f"Lung: There is a 10 mm solid nodule in the {place}.")["place_right"] == right, place


def test_details_are_read_only_from_sentences_naming_the_finding():
    other = "A consolidation of 40 mm with air bronchogram is observed in the left lower lobe."
    row = details(nodule(10), f"Lung: {other} There is a 10 mm solid nodule in the right upper lobe.")
    assert (row["place_right"], row["size_right"]) == (1, 1)
    row = details(nodule(10), "Lung: A nodule is observed.")  # states no location and no size
    assert row == {"found": 1, "with_place": 1, "place_right": 0, "with_size": 1, "size_right": 0}
    # Two contradictory sentences count as wrong, even if one of them is right.
    twice = (
        "There is a 10 mm solid nodule in the right upper lobe. There is a 30 mm solid nodule in the left lower lobe."
    )
    row = details(nodule(10), twice)
    assert (row["found"], row["place_right"], row["size_right"]) == (1, 0, 0)
    assert details(nodule(10), NORMAL) is None


def test_all_sides_and_no_other_must_be_named():
    both = "Pleura: Bilateral pleural effusion measuring 20 mm in thickness is observed."
    right = "Pleura: There is pleural effusion on the right side reaching 20 mm."
    for truth, text, expected in (("both", both, 1), ("both", right, 0), ("right", both, 0), ("right", right, 1),
                                  ("left", right, 0)):  # fmt: skip
        assert details(effusion(20, truth), text)["place_right"] == expected, (truth, text)
    # A right and a left effusion in two sentences count as both sides.
    apart = f"{right} There is pleural effusion on the left side reaching 20 mm."
    assert details(effusion(20, "both"), apart)["place_right"] == 1


def test_true_phantom_reports_are_right_in_every_detail():
    """This includes rare wordings, and every drawn size has a bin."""
    patients = [sample_patient(6, index, "valid") for index in range(400)]
    rng = np.random.default_rng(0)
    reports = {patient.name: report_text(region_sentences(patient, rng)) for patient in patients}
    result = score_findings({patient.name: patient.findings for patient in patients}, reports)
    assert result["counts"]["found"] == result["counts"]["findings"] > 1000
    for bins in result["by_size"].values():
        assert all(of_bin["cases"] == of_bin["found"] for of_bin in bins.values())
    for label, row in result["details"].items():
        assert row["place_right"] == row["with_place"] and row["size_right"] == row["with_size"], label
    placed = {label for label, row in result["details"].items() if row["with_place"]}
    assert placed == {
        "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
        "Peribronchial thickening", "Consolidation", "Bronchiectasis",
    }  # fmt: skip
    # If every patient gets the next patient's report, most details are wrong.
    names = list(reports)
    moved = {name: reports[other] for name, other in zip(names, names[1:] + names[:1], strict=True)}
    moved = score_findings({patient.name: patient.findings for patient in patients}, moved)["details"]["Lung nodule"]
    assert 0 < moved["place_right"] < 0.4 * moved["found"] and 0 < moved["size_right"] < 0.6 * moved["found"]


def test_every_phantom_size_has_a_bin():
    for label in FINDING_NETWORK:
        for seed in range(200):
            finding = Finding(label, sample_attributes(label, np.random.default_rng(seed)))
            lengths = [value for key, value in finding.attributes.items() if key.endswith("_mm")]
            name = size_bin(finding)
            if lengths:
                low, *high = map(int, re.findall(r"\d+", name))
                assert low <= lengths[0] and all(lengths[0] <= bound for bound in high)
            else:
                assert name == finding.attributes.get("severity")
    with pytest.raises(ValueError, match="Lung nodule of 3 mm: no bin"):
        size_bin(nodule(3))
    with pytest.raises(ValueError, match="Emphysema of 3 mm: no bin"):
        size_bin(Finding("Emphysema", {"bulla_mm": 3}))


def test_catheters_have_no_scored_side():
    assert true_place(Finding("Medical material", {"kind": "central venous catheter", "side": "right"})) == frozenset()


def test_patients_of_a_cohort_are_read_and_their_errors_named(tmp_path):
    with pytest.raises(DatasetError, match="patients.jsonl: file: missing"):
        read_patients(tmp_path)
    patients = [sample_patient(6, index, "valid") for index in range(3)]
    path = tmp_path / "phantom" / "patients.jsonl"
    path.parent.mkdir()
    lines = [json.dumps(patient.to_dict()) for patient in patients]
    path.write_text("\n".join(lines) + "\n")
    assert read_patients(tmp_path) == {patient.name: list(patient.findings) for patient in patients}
    for broken in ("{", '{"name": "valid_1_a_1"}', '{"name": "valid_1_a_1", "findings": [{"size": 3}]}'):
        path.write_text(f"{lines[0]}\n{broken}\n")
        with pytest.raises(DatasetError, match=r"patients.jsonl, row 2: line: \w+Error"):
            read_patients(tmp_path)
    with pytest.raises(ValueError, match="1 report.* without known findings, such as valid_9_a_1"):
        score_findings({}, {"valid_9_a_1": ""})
