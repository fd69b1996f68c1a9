# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""CRG, and scores from text and from label tables. test_metrics.py tests precision, recall and F1."""

import csv
import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffvp.data.cases import DatasetError
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.clinical_efficacy import averages, classification_scores, crg, label_counts
from diffvp.metrics.clinical_efficacy.reports import (
    finding_scores,
    label_reports,
    read_label_table,
    table_labels,
)

HEADER = ["VolumeName", *DIAGNOSIS_LABELS]
IDS = ["valid_1_a_1", "valid_2_a_1", "valid_3_a_1", "valid_4_a_1"]
LABELS = np.random.default_rng(5).integers(0, 2, (4, 18)).astype(np.int8)


class NamesLabels:
    """Labeler for tests: a report has the labels it names."""

    def label_all(self, reports):
        return np.array([[label in report for label in DIAGNOSIS_LABELS] for report in reports], np.int8)


def report_of(labels):
    return ". ".join(label for label, positive in zip(DIAGNOSIS_LABELS, labels, strict=True) if positive)


def score_texts(predictions, references, labeler):
    """Score reports with one labeler for both sides."""
    predicted, actual = (label_reports(labeler, reports) for reports in (predictions, references))
    return finding_scores(predicted, actual, truth="labeler", labeler=type(labeler).__name__)


def write_table(path, rows, header=HEADER):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def rows():
    return [[f"{name}.nii.gz", *map(int, labels)] for name, labels in zip(IDS, LABELS, strict=True)]


# CRG


def crg_oracle(predicted, actual):
    """Compute CRG by its definition, cell by cell, in fractions; `None` if the definition divides by 0."""
    cells = [(p, a) for row in zip(predicted, actual, strict=True) for p, a in zip(*row, strict=True)]
    x, a = len(cells), sum(actual for _, actual in cells)
    if a in (0, x):
        return None
    tp = sum(p == 1 and a == 1 for p, a in cells)
    fn = sum(p == 0 and a == 1 for p, a in cells)
    fp = sum(p == 1 and a == 0 for p, a in cells)
    r, u = Fraction(x - a, 2 * a), Fraction(x - a, 2)
    s = r * tp - r * fn - fp
    return u / (2 * u - s)


def test_crg_equals_a_hand_computed_value():
    # X = 8, A = 2: r = 1.5, U = 3. TP 1, FN 1, FP 1: s = 1.5 - 1.5 - 1 = -1. CRG = 3 / (6 + 1).
    predictions, references = [[1, 0, 0, 0], [1, 0, 0, 0]], [[1, 0, 0, 0], [0, 1, 0, 0]]
    result = classification_scores(predictions, references, labels="abcd")
    assert result["crg"] == pytest.approx(3 / 7, rel=1e-15)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    rates=st.tuples(st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.sampled_from([0.0, 0.2, 0.5, 1.0])),
    seed=st.integers(0, 2**32 - 1),
)
def test_crg_agrees_with_the_definition(shape, rates, seed):
    generator = np.random.default_rng(seed)
    predictions, references = ((generator.random(shape) < rate).astype(int) for rate in rates)
    result = classification_scores(predictions, references, labels=[str(index) for index in range(shape[1])])["crg"]
    expected = crg_oracle(predictions.tolist(), references.tolist())
    assert result == (expected if expected is None else pytest.approx(float(expected), rel=1e-12))
    if expected is not None:
        everything, nothing = np.ones(shape, int), np.zeros(shape, int)
        perfect, all_positive, all_negative = (
            float(crg(label_counts(labels, references).sum(0), shape[0]))
            for labels in (references, everything, nothing)
        )
        assert perfect == pytest.approx(1)
        assert all_positive == pytest.approx(1 / 3) and all_negative == pytest.approx(1 / 3)


def test_undefined_crg_is_none_and_json_serialisable():
    for references in (np.zeros((2, 3), int), np.ones((2, 3), int)):
        result = classification_scores(np.eye(2, 3, dtype=int), references, labels="abc")
        assert result["crg"] is None
        json.dumps(result)


def test_vectorised_averages_equal_single_ones():
    generator = np.random.default_rng(0)
    counts = label_counts(generator.integers(0, 2, (6, 18)), generator.integers(0, 2, (6, 18)))
    chosen = generator.integers(0, 6, (5, 6))
    together = averages(counts[chosen].sum(1))
    for number, rows in enumerate(chosen):
        hits, claims, facts = counts[rows].transpose(1, 0, 2)
        assert (hits == claims * facts).all()
        single = classification_scores(claims, facts, DIAGNOSIS_LABELS)
        for name, values in together.items():
            np.testing.assert_allclose(values[number], [single[name][key] for key in ("precision", "recall", "f1")])
        assert crg(counts[rows].sum(0), 6) == pytest.approx(single["crg"])


# From text


def test_scores_agree_from_reports_and_from_a_label_table(rows, tmp_path):
    predicted = LABELS.copy()
    predicted[0] ^= 1
    predictions = [report_of(labels) for labels in predicted]
    references = [report_of(labels) for labels in LABELS]
    expected = classification_scores(predicted, LABELS, DIAGNOSIS_LABELS)

    by_text = score_texts(predictions, references, NamesLabels())
    # The rows of the table are in another order, and one of them is not used.
    others = [rows[2], ["valid_9_a_1.nii.gz", *[0] * 18], rows[0], rows[3], rows[1]]
    table = read_label_table(write_table(tmp_path / "labels.csv", others))
    labels = label_reports(NamesLabels(), predictions)
    by_table = finding_scores(labels, table_labels(table, IDS), truth="csv", labeler="names|version:1")
    for result in (by_text, by_table):
        assert result["n"] == 4
        for key in ("micro", "macro", "weighted", "samples", "labels", "crg"):
            assert result[key] == expected[key]
        interval = result["intervals"]["micro"]["f1"]
        assert interval.low <= interval.estimate <= interval.high and interval.n == 4
        assert interval.estimate == pytest.approx(expected["micro"]["f1"])
        assert result["intervals"]["crg"].estimate == pytest.approx(expected["crg"])
    assert "|truth:labeler|labeler:NamesLabels|" in by_text["signature"]
    assert "|truth:csv|labeler:names,version:1|" in by_table["signature"]


def test_order_of_reports_changes_neither_scores_nor_intervals():
    generator = np.random.default_rng(1)
    predicted, actual = generator.integers(0, 2, (2, 30, 18))
    order = generator.permutation(30)
    first = finding_scores(predicted, actual, truth="given")
    second = finding_scores(predicted[order], actual[order], truth="given")
    assert first["intervals"] == second["intervals"]
    assert first["crg"] == second["crg"] and first["micro"] == second["micro"]


def test_single_report_has_scores_but_no_interval():
    result = score_texts([report_of(LABELS[0])], [report_of(LABELS[0])], NamesLabels())
    assert result["micro"]["f1"] == result["crg"] == 1 and result["n"] == 1
    assert result["intervals"] is None and "interval" not in result["signature"]


def test_empty_predictions_have_zero_f1_and_constant_intervals():
    result = score_texts([""] * 4, [report_of(labels) for labels in LABELS], NamesLabels())
    assert result["micro"]["f1"] == 0 and result["crg"] == pytest.approx(1 / 3)
    interval = result["intervals"]["micro"]["f1"]
    assert (interval.low, interval.high) == (0, 0)
    nothing = score_texts([""] * 4, [""] * 4, NamesLabels())
    assert nothing["crg"] is None and nothing["intervals"]["crg"] is None


def test_unusable_reports_and_labelers_are_refused():
    class Short:
        def label_all(self, reports):
            return np.zeros((len(reports), 17))

    with pytest.raises(TypeError, match=r"predictions\[1\] is float"):
        label_reports(NamesLabels(), ["a", float("nan")], "predictions")
    with pytest.raises(ValueError, match=r"Short.label_all returned shape \(2, 17\), expected \(2, 18\)"):
        label_reports(Short(), ["a", "b"])


# Tables of labels


def test_columns_match_by_name_and_ids_without_suffix(rows, tmp_path):
    order = np.random.default_rng(2).permutation(19)
    shuffled = write_table(
        tmp_path / "shuffled.csv", [[row[i] for i in order] for row in rows], [HEADER[i] for i in order]
    )
    table = read_label_table(shuffled)
    ids = [IDS[2], f"{IDS[0]}.nii.gz"]
    np.testing.assert_array_equal(table_labels(table, ids), LABELS[[2, 0]])
    assert table_labels(table, ids).dtype == np.int8
    # pandas writes 1.0 if a column has gaps; the manual labels of CT-CLIP have another id column and the report.
    other = write_table(
        tmp_path / "train.csv",
        [[row[0], "Text, with a comma.", *map(float, row[1:])] for row in rows],
        ["AccessionNo", "report_text", *DIAGNOSIS_LABELS],
    )
    table = read_label_table(other, id_column="AccessionNo", ignore=("report_text",))
    np.testing.assert_array_equal(table_labels(table, IDS), LABELS)


def test_unusable_values_are_named_by_row_and_column(rows, tmp_path):
    rows[0][1] = "nan"
    rows[1][2] = ""
    rows[2][18] = 0.7
    rows[3][0] = rows[0][0]
    rows.append(["", *[0] * 18])
    rows.append([0, "valid_7_a_1.nii.gz", *[0] * 17])  # id and first label swapped
    rows.append(["valid_8_a_1", 0, 1])
    with pytest.raises(DatasetError) as caught:
        read_label_table(write_table(tmp_path / "labels.csv", rows))
    message = str(caught.value)
    for line in (
        "labels.csv, row 2 ('valid_1_a_1'): Medical material: 'nan' (expected 0 or 1)",
        "labels.csv, row 3 ('valid_2_a_1'): Arterial wall calcification: missing (expected 0 or 1)",
        "labels.csv, row 4 ('valid_3_a_1'): Interlobular septal thickening: '0.7' (expected 0 or 1)",
        "labels.csv, row 5 ('valid_1_a_1'): VolumeName: the same as in row 2 (expected one row per id)",
        "labels.csv, row 6: VolumeName: empty (expected the name of a volume)",
        "labels.csv, row 7 ('0'): Medical material: text of 18 characters (expected 0 or 1)",
        "labels.csv, row 8: row: 3 fields (expected 19 as in the header)",
    ):
        assert line in message
    assert len(caught.value.problems) == 7


def test_unusable_columns_are_named(rows, tmp_path):
    renamed = [*HEADER[:-1], "Interlobular thickening"]
    with pytest.raises(DatasetError, match="also Interlobular septal thickening") as caught:
        read_label_table(write_table(tmp_path / "labels.csv", rows, renamed))
    assert "unknown" in str(caught.value)
    double = ["VolumeName", DIAGNOSIS_LABELS[1], *DIAGNOSIS_LABELS[1:]]
    with pytest.raises(DatasetError, match="also Medical material"):
        read_label_table(write_table(tmp_path / "labels.csv", rows, double))
    extra = write_table(tmp_path / "labels.csv", [[*row, 1] for row in rows], [*HEADER, "Pneumonia"])
    with pytest.raises(DatasetError, match="header: unknown column 'Pneumonia'"):
        read_label_table(extra)
    assert len(read_label_table(extra, ignore=("Pneumonia",))) == 4
    with pytest.raises(DatasetError, match="empty.csv: table: empty"):
        read_label_table(write_table(tmp_path / "empty.csv", []))
    with pytest.raises(DatasetError, match="absent.csv: file: missing"):
        read_label_table(tmp_path / "absent.csv")


def test_missing_and_repeated_ids_are_refused(rows, tmp_path):
    table = read_label_table(write_table(tmp_path / "labels.csv", rows))
    with pytest.raises(DatasetError) as caught:
        table_labels(table, [IDS[0], "valid_7_a_1", f"{IDS[0]}.nii.gz"], "labels.csv")
    message = str(caught.value)
    assert "labels.csv ('valid_7_a_1'): row: missing (expected a row for this id, which report 2 has)" in message
    assert "reports, row 3 ('valid_1_a_1'): id: the same as of report 1 (expected each id once)" in message
    with pytest.raises(ValueError, match="no id"):
        table_labels(table, [])


# Published values


def test_all_positive_predictor_has_known_scores_on_published_labels(check_data):
    """CT-RATE validation labels, one volume per scan: 5,358 positives; micro-F1 0.320 if all are predicted."""
    table = read_label_table(check_data / "reports" / "ctrate_valid_labels.csv")
    assert len(table) == 3039
    ids = sorted({name.rsplit("_", 1)[0] for name in table})
    truth = table_labels(table, [f"{scan}_1.nii.gz" for scan in ids])
    assert truth.shape == (1564, 18) and truth.sum() == 5358
    result = finding_scores(np.ones_like(truth), truth, truth="csv")
    assert round(result["micro"]["f1"], 3) == 0.320
    assert result["crg"] == pytest.approx(1 / 3)


def test_published_averages_are_reproduced_from_text_and_table(check_data, tmp_path):
    """Reg2RG's labels give its published averages, both through a labeler that looks them up and from a table."""
    reports = check_data / "reports"
    with (reports / "reg2rg_label_inferred.csv").open(encoding="utf-8", newline="") as file:
        published = list(csv.DictReader(file))

    def matrix(prefix):
        return np.array([[int(float(row[prefix + label])) for label in DIAGNOSIS_LABELS] for row in published])

    predicted, actual = matrix("Pred_"), matrix("GT_")
    ids = [row["AccNum"] for row in published]
    assert len(set(ids)) == 361
    texts = {f"p {name}": labels for name, labels in zip(ids, predicted, strict=True)}
    texts |= {f"g {name}": labels for name, labels in zip(ids, actual, strict=True)}

    class Known:
        def label_all(self, reports):
            return np.array([texts[report] for report in reports])

    rows = [[name, *labels] for name, labels in zip(ids, actual.tolist(), strict=True)]
    path = write_table(tmp_path / "labels.csv", rows[::-1])
    predictions = [f"p {name}" for name in ids]
    results = (
        score_texts(predictions, [f"g {name}" for name in ids], Known()),
        finding_scores(label_reports(Known(), predictions), table_labels(read_label_table(path), ids), truth="csv"),
    )
    with (reports / "reg2rg_metrics_manual.csv").open(encoding="utf-8", newline="") as file:
        [weighted] = [row for row in csv.DictReader(file) if row["Label"] == "Weighted Average"]
    for result in results:
        for key, column in (("precision", "Precision"), ("recall", "Recall"), ("f1", "F1 Score")):
            assert result["weighted"][key] == pytest.approx(float(weighted[column]), abs=1e-6)
        assert [round(result["micro"][key], 4) for key in ("precision", "recall", "f1")] == [0.5434, 0.1847, 0.2757]
        assert result["crg"] == pytest.approx(float(crg_oracle(predicted.tolist(), actual.tolist())))
        interval = result["intervals"]["micro"]["f1"]
        assert 0.2 < interval.low < 0.2757 < interval.high < 0.35
