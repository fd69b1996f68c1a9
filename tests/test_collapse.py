# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Template collapse measures on reports small enough to count by hand."""

import numpy as np
import pytest

from diffvp.data.phantom import sample_patient
from diffvp.data.phantom_report import region_sentences, report_text
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.collapse import COLUMNS, collapse_panel, rare_findings, sentences
from diffvp.metrics.labelers import RuleLabeler
from diffvp.processing_diffvp import DiffVPProcessor

LABELER = RuleLabeler()
NORMAL = "Heart: Heart size is normal.\nLung: No nodule was detected."
LARGE = "Heart: Heart size is increased.\nLung: No nodule was detected."
BOTH = "Lung: A nodule of 6 mm is observed in the right lung. No nodule was detected."
FULL = "Heart: There is cardiomegaly.\nLung: A nodule of 6 mm is observed in the right lung."


def panel(reports, actual=None, **options):
    actual = LABELER.label_all(reports) if actual is None else actual
    return collapse_panel(reports, actual, LABELER, **options)


def values(result):
    return {name: entry["value"] for name, entry in result.items()}


def test_every_measure_equals_its_hand_count():
    reports = [NORMAL, NORMAL, NORMAL + " ", LARGE, BOTH, FULL]
    found = values(panel(reports, split=DiffVPProcessor.post_process))
    assert list(found) == list(COLUMNS)
    assert found["distinct_reports"] == 4 / 6 and found["commonest_report"] == 3 / 6  # trailing spaces are ignored
    # Heart: normal, increased, cardiomegaly; lung: no nodule, a nodule.
    assert found["distinct_sentences"] == 5 / 6
    assert found["normal_reports"] == 3 / 6
    assert found["normal_regions"] == (2 + 2 + 2 + 1 + 0 + 0) / 11
    assert found["contradicting_reports"] == 1 / 6
    assert found["rare_recall"] is None  # both findings are in more than a tenth of the reports


def test_rare_recall_pools_only_rare_findings():
    actual = np.zeros((40, 18), int)
    actual[:20, 0] = 1  # common
    actual[:3, 1] = 1
    actual[3:4, 2] = 1
    actual[:4, 3] = 1  # exactly a tenth is not rare
    predicted = np.zeros_like(actual)
    predicted[:, 0] = 1
    predicted[0, 1] = predicted[3, 2] = 1
    assert np.flatnonzero(rare_findings(actual)).tolist() == [1, 2]
    result = collapse_panel([NORMAL] * 40, actual, LABELER, predicted=predicted)["rare_recall"]
    assert result["value"] == 2 / 4
    assert 0 <= result["interval"][0] <= 0.5 <= result["interval"][1] <= 1


def test_constant_reports_show_collapse_and_true_phantom_reports_do_not():
    patients = [sample_patient(3, index, "valid") for index in range(60)]
    truth = [report_text(region_sentences(patient)) for patient in patients]
    actual = np.array([[patient.labels[label] for label in DIAGNOSIS_LABELS] for patient in patients])
    true = panel(truth, actual, split=DiffVPProcessor.post_process)
    constant = panel([NORMAL] * 60, actual, split=DiffVPProcessor.post_process)
    assert values(constant) | {"distinct_sentences": None} == {
        "distinct_reports": 1 / 60,
        "distinct_sentences": None,
        "commonest_report": 1.0,
        "normal_reports": 1.0,
        "normal_regions": 1.0,
        "rare_recall": 0.0,
        "contradicting_reports": 0.0,
    }
    assert true["rare_recall"]["value"] == 1 and true["distinct_reports"]["value"] > 0.9
    assert true["normal_regions"]["value"] == pytest.approx(
        np.mean([not any(LABELER.label(f"{region.capitalize()}: {' '.join(lines)}").values())
                 for patient in patients for region, lines in region_sentences(patient).items()])
    )  # fmt: skip
    low, high = true["normal_regions"]["interval"]
    assert low < true["normal_regions"]["value"] < high < 1


def test_single_and_empty_reports_are_handled():
    assert panel([FULL])["normal_reports"] == {"value": 0.0, "interval": None}
    assert panel([FULL])["normal_regions"]["value"] is None
    found = values(panel(["", "", NORMAL], split=DiffVPProcessor.post_process))
    assert found["commonest_report"] == 2 / 3 and found["normal_regions"] == 1.0
    assert values(panel(["", ""], split=DiffVPProcessor.post_process))["normal_regions"] is None
    with pytest.raises(ValueError, match="no reports"):
        panel([], np.zeros((0, 18)))
    with pytest.raises(TypeError, match=r"predictions\[1\]: nan"):
        panel(["a", float("nan")], np.zeros((2, 18)))
    with pytest.raises(ValueError, match="shape"):
        panel([NORMAL], np.zeros((2, 18), int))


def test_sentences_are_split_without_headings_and_extra_spaces():
    text = "Heart: Normal size.  No effusion.\nLung: Clear; no nodule of 4.5 mm."
    assert sentences(text, DiffVPProcessor.post_process) == [
        "Normal size.",
        "No effusion.",
        "Clear;",
        "no nodule of 4.5 mm.",
    ]
    assert sentences("One.\nTwo") == ["One.", "Two"]
