# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Contradictions within a report and with the classifier: pairs of sentences, phantoms, and real reports."""

import csv

import pytest

from diffvp.data.phantom import sample_patient
from diffvp.data.phantom_report import NORMAL, region_sentences, report_text
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.consistency import contradictions, label_consistency, report_consistency

# (text, label, kind, values)
CONTRADICTORY = [
    (
        "Pleura: No pleural effusion or thickening was detected. Right pleural effusion measuring 12 mm is observed.",
        "Pleural effusion", "presence", ("absent", "present"),
    ),
    (
        "Pleura: Bilateral pleural effusion up to 9 mm is seen. No pleural effusion was observed on the left.",
        "Pleural effusion", "presence", ("present", "absent"),
    ),
    (
        "Heart: Heart size is increased, consistent with severe cardiomegaly. Heart contour and size are normal.",
        "Cardiomegaly", "presence", ("present", "absent"),
    ),
    (
        "Lung: No nodule, mass or infiltration was detected in both lungs. There is a 6 mm solid nodule in the right "
        "upper lobe.",
        "Lung nodule", "presence", ("absent", "present"),
    ),
    (
        "Lung: Both lungs have normal aeration. There is severe emphysema in both lungs.",
        "Emphysema", "presence", ("absent", "present"),
    ),
    (
        "Pleura: There is pleural effusion on the right side reaching 20 mm. A right sided pleural effusion up to 3.5 "
        "cm is seen.",
        "Pleural effusion", "size", ("20 mm", "35 mm"),
    ),
    (
        "Heart: Pericardial effusion measuring 9 mm in thickness is observed. "
        "There is pericardial effusion reaching 21 mm.",
        "Pericardial effusion", "size", ("9 mm", "21 mm"),
    ),
    (
        "Lung: A nodule measuring 6 mm is observed in the right upper lobe. There is a 9 mm solid nodule in the right "
        "upper lobe.",
        "Lung nodule", "size", ("6 mm", "9 mm"),
    ),
    (
        "Lung: Two nodules are observed in the lungs, the largest measuring 6 mm in the left lower lobe. "
        "There are two solid nodules, the largest 11 mm in the left lower lobe.",
        "Lung nodule", "size", ("6 mm", "11 mm"),
    ),
    (
        "Lung: A solitary nodule with a diameter of 8 mm is seen in the right upper lobe. A solitary nodule with a "
        "diameter of 8 mm is seen in the left upper lobe.",
        "Lung nodule", "side", ("right", "left"),
    ),
    (
        "Heart: There is a pacemaker in the left anterior chest wall. A pacemaker is observed in the right chest wall "
        "with its lead in the right heart.",
        "Medical material", "side", ("left", "right"),
    ),
    (
        "Lung: There is mild emphysema in both lungs. Severe centrilobular emphysema is seen in both lungs.",
        "Emphysema", "severity", ("mild", "severe"),
    ),
]  # fmt: skip

AT_ONE = [
    # Two lesions, or one finding at two sites.
    "Lung: A 4 mm nodule is seen in the right upper lobe. A 9 mm nodule is seen in the left lower lobe.",
    "Lung: A 4 mm nodule is seen in the right upper lobe. Another 9 mm nodule is seen in the right upper lobe.",
    "Lung: A 7 mm nodule is seen in the posterobasal segment of the right lower lobe. A 3 mm nodule is seen in the "
    "superior segment of the right lower lobe.",
    "Lung: There are nodules of 4 mm in the right upper lobe. There are nodules of 9 mm in the right upper lobe.",
    "Lung: There is mild emphysema in the right lung. There is severe emphysema in the left lung.",
    "Pleura: Right pleural effusion measuring 20 mm is observed. Left pleural effusion measuring 35 mm is observed.",
    "Pleura: Right pleural effusion is observed. No pleural effusion was observed on the left.",
    "Pleura: Pleural effusion reaches the apex. No pleural effusion was observed on the left.",
    "Heart: Heart size is normal. Pericardial effusion of 9 mm is observed.",
    # Negations that concern a subtype, further lesions, another site, or a previous scan.
    "Lung: A 4 mm calcified nodule is seen in the right upper lobe. No other nodule was detected.",
    "Lung: A 4 mm calcified nodule is seen in the right upper lobe. No suspicious nodule was detected.",
    "Mediastinum: Enlarged lymph nodes are seen in the mediastinum. No enlarged lymph node was seen in the axilla.",
    "Pleura: Right pleural effusion measures 20 mm. The right pleural effusion measured 35 mm in the previous scan.",
    # The same size in other units, and a suspicion.
    "Pleura: Right pleural effusion of 20 mm is observed. Right pleural effusion of 2 cm is observed.",
    "Lung: No consolidation was detected. There may be a consolidation in the left lower lobe.",
    # Two regions of the report are two organs.
    "Lung: There is a 4 mm nodule in the right upper lobe.\nThyroid: No nodule was detected in the thyroid gland.",
    "",
]


@pytest.mark.parametrize(("text", "label", "kind", "values"), CONTRADICTORY)
def test_contradictory_sentences_are_found(text, label, kind, values):
    [found] = contradictions(text)
    assert (found.label, found.kind, found.values) == (label, kind, values)
    assert found.region == text.split(":")[0].lower()
    assert all(sentence in text for sentence in found.sentences) and found.sentences[0] != found.sentences[1]
    # Without headings, the same sentences form one region, "other".
    [alike] = contradictions(text.split(": ", 1)[1])
    assert (alike.label, alike.kind, alike.values, alike.region) == (label, kind, values, "other")


@pytest.mark.parametrize("text", AT_ONE)
def test_compatible_sentences_are_not_contradictions(text):
    assert contradictions(text) == []


def test_reversed_sentences_reverse_the_values():
    [one] = contradictions("Pericardial effusion of 9 mm is seen. There is pericardial effusion of 20 mm.")
    [other] = contradictions("There is pericardial effusion of 20 mm. Pericardial effusion of 9 mm is seen.")
    assert one.values == other.values[::-1] and one.sentences == other.sentences[::-1]


def test_phantom_reports_contradict_only_if_altered():
    spoilt = 0
    for index in range(60):
        regions = region_sentences(sample_patient(3, index, "train"))
        assert contradictions(report_text(regions)) == []
        if any("effusion" in sentence and "mm" in sentence for sentence in regions["pleura"]):
            for normal in NORMAL["pleura"]:
                text = report_text(regions | {"pleura": [*regions["pleura"], normal]})
                [found] = contradictions(text)
                assert (found.label, found.region) == ("Pleural effusion", "pleura")
                spoilt += 1
    assert spoilt >= 15


def test_real_reports_rarely_contradict_themselves(check_data):
    csv.field_size_limit(10**8)
    with (check_data / "reports/ctclip_train.csv").open(newline="", encoding="utf-8") as file:
        reports = [row["report_text"] for row in csv.DictReader(file)]
    accused = {index for index, report in enumerate(reports) if contradictions(report)}
    assert len(reports) == 800 and len(accused) <= 10
    # "There is bilateral minimal pleural effusion. ... No pleural or pericardial effusion was detected."
    assert 503 in accused


def finding(label, positive):
    return {"label": label, "probability": 0.9 if positive else 0.1, "threshold": 0.5, "positive": positive}


def test_text_is_compared_with_the_findings():
    text = "Lung: There is a 6 mm solid nodule in the right upper lobe.\nHeart: Heart size is normal."
    findings = [finding(label, label in ("Cardiomegaly", "Emphysema")) for label in DIAGNOSIS_LABELS]
    assert label_consistency(text, findings) == {
        "labels": 18,
        "agree": 15,
        "only_in_text": ["Lung nodule"],
        "only_in_findings": ["Cardiomegaly", "Emphysema"],
    }
    findings = [finding("Lung nodule", True), finding("Sarcoidosis", True)]
    assert label_consistency(text, findings) == {
        "labels": 1, "agree": 1, "only_in_text": [], "only_in_findings": [],
    }  # fmt: skip


def test_consistency_entry_lists_agreement_and_contradictions():
    text, label, kind, values = CONTRADICTORY[0]
    entry = report_consistency(text, [finding("Pleural effusion", True)])
    assert entry["text_against_findings"]["agree"] == 1
    [found] = entry["contradictions"]
    assert (found["label"], found["kind"], found["values"]) == (label, kind, list(values))
    # A model without a classifier has nothing to compare the text with.
    assert report_consistency("", []) == {"text_against_findings": None, "contradictions": []}


def test_none_as_text_is_refused():
    with pytest.raises(TypeError):
        contradictions(None)
    with pytest.raises(TypeError):
        label_consistency(None, [finding("Emphysema", True)])
