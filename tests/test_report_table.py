# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`diffvp score`: from a table of reports to all scores, with intervals and baselines."""

import csv
import json

import numpy as np
import pytest
from sklearn.metrics import f1_score
from typer.testing import CliRunner

from diffvp.cli import app
from diffvp.data.cases import DatasetError
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.labelers import RuleLabeler
from diffvp.metrics.nlg import score_reports
from diffvp.metrics.report_table import score_table, table_page

pytestmark = pytest.mark.usefixtures("meteor_data")

NORMAL = "Heart: Heart size is normal.\nLung: No nodule was detected."
REPORTS = [
    "Heart: Heart size is increased.\nLung: No nodule was detected.",
    "Heart: Heart size is normal.\nLung: A nodule of 6 mm is observed in the right upper lobe.",
    NORMAL,
    "Heart: Heart size is normal.\nLung: Consolidation in the left lower lobe.\nPleura: Pleural effusion is seen.",
]


def write(path, columns, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path):
    rows = [
        (f"case_{i}", predicted, true) for i, (predicted, true) in enumerate(zip(REPORTS[::-1], REPORTS, strict=True))
    ]
    return write(tmp_path / "reports.csv", ["id", "prediction", "reference"], rows)


@pytest.fixture
def training(tmp_path):
    return write(tmp_path / "train.csv", ["report"], [[NORMAL], [REPORTS[0]], [NORMAL], [REPORTS[0]], [REPORTS[0]]])


def test_scores_equal_those_of_the_metrics(table, training):
    document = score_table(table, RuleLabeler(), training=training)
    expected = score_reports(REPORTS[::-1], REPORTS).summary()
    ours = document["systems"]["predictions"]
    for name in ("bleu_1", "bleu_4", "meteor", "rouge_l"):
        assert ours[name]["value"] == pytest.approx(expected[name], abs=1e-12)
        low, high = ours[name]["interval"]
        assert low <= ours[name]["value"] <= high
    labels = np.array(RuleLabeler().label_all(REPORTS))
    assert ours["micro f1"]["value"] == pytest.approx(f1_score(labels, labels[::-1], average="micro"))
    constant = document["systems"]["constant normal report"]
    assert constant["bleu_4"]["value"] == pytest.approx(score_reports([NORMAL] * 4, REPORTS).summary()["bleu_4"])
    assert constant["micro recall"]["value"] == 0
    everything = document["systems"]["labels alone, all-positive"]
    assert everything["micro precision"]["value"] == pytest.approx(labels.mean()) and "bleu_4" not in everything
    heart = np.zeros((4, 18), int)
    heart[:, DIAGNOSIS_LABELS.index("Cardiomegaly")] = 1  # increased in three of the five training reports
    majority = document["systems"]["labels alone, prevalence-majority"]
    assert majority["micro f1"]["value"] == pytest.approx(f1_score(labels, heart, average="micro"))


def test_page_has_n_intervals_signatures_and_baselines(table, training):
    page = table_page(score_table(table, RuleLabeler(), training=training, regions="diffvp"))
    assert page.startswith("4 reports; 95 % bootstrap intervals")
    assert "| constant normal report |" in page and "| labels alone, all-negative |" in page
    assert "`bleu|" in page and "`meteor|" in page and "|labeler:" in page
    assert "| canonical_order | 4 |" in page and "| pleura | 1 | 1 | 1 |" in page and "| heart | 4 | 0 | 0 |" in page
    rows = [line for line in page.splitlines() if line.startswith(("| predictions |", "| heart"))]
    assert all(cell.count("–") == 1 for line in rows for cell in line.split(" | ")[4:]), rows


def test_page_says_what_is_missing_without_training_reports(table):
    page = table_page(score_table(table, RuleLabeler()))
    assert "no constant normal report" in page and "| labels alone, all-positive |" in page


def test_labels_from_a_table_are_matched_by_id(table, tmp_path):
    truth = np.array(RuleLabeler().label_all(REPORTS))
    rows = [(f"case_{i}", *truth[i]) for i in (2, 0, 3, 1)]
    labels = write(tmp_path / "labels.csv", ["VolumeName", *DIAGNOSIS_LABELS], rows)
    document = score_table(table, RuleLabeler(), labels=labels)
    expected = score_table(table, RuleLabeler())
    value = document["systems"]["predictions"]["micro f1"]
    assert value == expected["systems"]["predictions"]["micro f1"]
    assert any("truth:csv" in signature for signature in document["signatures"])
    write(tmp_path / "labels.csv", ["VolumeName", *DIAGNOSIS_LABELS], rows[:3])
    with pytest.raises(DatasetError, match="case_1"):
        score_table(table, RuleLabeler(), labels=labels)


def test_one_report_has_no_interval(tmp_path):
    path = write(tmp_path / "one.csv", ["id", "prediction", "reference"], [("a", NORMAL, NORMAL)])
    document = score_table(path, RuleLabeler())
    assert document["systems"]["predictions"]["bleu_4"] == {"value": 1.0, "interval": None}
    assert "| 1.000 |" in table_page(document)


@pytest.mark.parametrize("scorer", ["corpus", "coco"])
def test_scorer_option_selects_the_scorer(table, scorer):
    ours = score_table(table, RuleLabeler(), scorer=scorer)["systems"]["predictions"]
    expected = score_reports(REPORTS[::-1], REPORTS, scorer=scorer).summary()
    assert ours["bleu_4"]["value"] == pytest.approx(expected["bleu_4"]) and len(ours["bleu_4"]["interval"]) == 2


def test_all_problems_are_listed(tmp_path):
    rows = [("a", "x", NORMAL), ("a", "x", NORMAL), ("", "x", NORMAL), ("b", "x", " "), ("c", "", NORMAL)]
    path = write(tmp_path / "wrong.csv", ["id", "prediction", "reference"], rows)
    with pytest.raises(DatasetError) as caught:
        score_table(path, RuleLabeler())
    assert [(p.row, p.field) for p in caught.value.problems] == [(3, "id"), (4, "id"), (5, "reference")]
    result = CliRunner().invoke(app, ["score", str(path), "--prediction-column", "pred"])
    assert result.exit_code == 2 and "pred" in result.output and "wrong.csv" in result.output


def test_training_table_without_a_normal_report_is_refused(table, tmp_path):
    path = write(tmp_path / "train.csv", ["report"], [[REPORTS[0]]])
    with pytest.raises(DatasetError, match="normal reports: none"):
        score_table(table, RuleLabeler(), training=path)


def test_command_prints_json(table):
    result = CliRunner().invoke(app, ["score", str(table), "--json", "--workers", "1"])
    assert result.exit_code == 0 and json.loads(result.output)["n"] == 4


@pytest.mark.slow
def test_published_reg2rg_scores_are_reproduced(check_data):
    source = check_data / "reports/reg2rg_ctrg_combined_reports_rm_region_text.csv"
    columns = {"id_column": "AccNum", "prediction_column": "Pred_whole_report", "reference_column": "GT_whole_report"}
    ours = score_table(source, RuleLabeler(), workers=2, **columns)["systems"]["predictions"]
    with open(check_data / "reports/reg2rg_nlg_evaluation_results.csv", newline="", encoding="utf-8") as file:
        published = next(csv.DictReader(file))
    for name, column in (("bleu_1", "BLEU-1"), ("bleu_4", "BLEU-4"), ("meteor", "METEOR"), ("rouge_l", "ROUGE-L")):
        assert f"{ours[name]['value']:.4f}" == f"{float(published[column].split('±')[0]):.4f}"


def test_collapse_panel_includes_truth_and_baselines(tmp_path, training):
    rows = [(f"case_{i}", NORMAL, true, REPORTS[0]) for i, true in enumerate(REPORTS)]
    path = write(tmp_path / "reports.csv", ["id", "prediction", "reference", "near"], rows)
    document = score_table(path, RuleLabeler(), training=training, regions="diffvp", nearest_column="near")
    panels = document["collapse"]
    assert list(panels) == ["predictions", "constant normal report", "nearest training report", "true reports"]
    assert panels["predictions"] == panels["constant normal report"]
    assert panels["predictions"]["distinct_reports"]["value"] == 0.25
    assert panels["predictions"]["normal_regions"]["value"] == 1
    assert panels["true reports"]["distinct_reports"]["value"] == 1
    assert panels["true reports"]["normal_regions"]["value"] == pytest.approx(5 / 9)
    assert document["systems"]["nearest training report"]["micro recall"]["value"] == 0.25
    page = table_page(document)
    assert "| template collapse | predictions | constant normal report | nearest training report | true" in page
    assert "Rare, below 10 % of the true reports: none." in page
    with pytest.raises(DatasetError, match="absent"):
        score_table(path, RuleLabeler(), nearest_column="absent")
