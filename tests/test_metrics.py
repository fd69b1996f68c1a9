# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffvp.metrics.clinical_efficacy import classification_scores

AVERAGES = ("micro", "macro", "weighted", "samples")


def _read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# Findings


def test_scores_match_a_hand_computation():
    predictions = [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    references = [[1, 0, 0], [0, 1, 0], [0, 1, 0]]
    result = classification_scores(predictions, references, labels=["a", "b", "c"])
    # a: TP 1, FP 1, FN 0; b: TP 1, FP 0, FN 1; c: never predicted, never true, so all of its ratios count as 0.
    assert result["labels"]["a"] == {"precision": 1 / 2, "recall": 1.0, "f1": 2 / 3, "predicted": 2, "support": 1}
    assert result["labels"]["b"] == {"precision": 1.0, "recall": 1 / 2, "f1": 2 / 3, "predicted": 1, "support": 2}
    assert result["labels"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "predicted": 0, "support": 0}
    assert result["micro"] == {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "predicted": 3, "support": 3}
    assert result["macro"]["f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert result["weighted"]["recall"] == pytest.approx((1 * 1.0 + 2 * 0.5) / 3)
    # F1 per report: 1, 2/3 and 0.
    assert result["samples"]["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert "zero-division:0" in result["signature"]


def test_zero_division_argument_sets_undefined_scores():
    nothing = np.zeros((2, 3), dtype=int)
    as_zero = classification_scores(nothing, nothing, labels="abc")
    as_one = classification_scores(nothing, nothing, labels="abc", zero_division=1)
    for average in AVERAGES:
        assert as_zero[average]["f1"] == 0.0
        assert as_one[average]["f1"] == 1.0
    assert "zero-division:1" in as_one["signature"]


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 8), st.integers(2, 6)),
    rates=st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.1, 0.5, 1.0])),
    seed=st.integers(0, 2**32 - 1),
    zero_division=st.sampled_from([0.0, 1.0]),
)
def test_scores_agree_with_scikit_learn(shape, rates, seed, zero_division):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(seed)
    predictions, references = ((generator.random(shape) < rate).astype(int) for rate in rates)
    labels = [f"label {index}" for index in range(shape[1])]
    result = classification_scores(predictions, references, labels=labels, zero_division=zero_division)

    def oracle(average):
        precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(
            references, predictions, average=average, zero_division=zero_division
        )
        return np.array([precision, recall, f1])

    def ours(scores):
        return [scores["precision"], scores["recall"], scores["f1"]]

    for average in AVERAGES:
        if average == "weighted" and not references.any():
            continue  # scikit-learn then weights all labels equally; the next test covers ours
        np.testing.assert_allclose(ours(result[average]), oracle(average), atol=1e-12, err_msg=average)
    per_label = np.array([ours(result["labels"][label]) for label in labels]).T
    np.testing.assert_allclose(per_label, oracle(None), atol=1e-12)


def test_weighted_average_without_findings_equals_zero_division():
    result = classification_scores([[1, 0]], [[0, 0]], labels="ab", zero_division=1)
    assert [result["weighted"][key] for key in ("precision", "recall", "f1")] == [1.0, 1.0, 1.0]
    assert result["weighted"]["support"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "labels", "zero_division", "message"),
    [
        ([[1, 0]], [[1, 0], [0, 0]], "ab", 0, r"shape \(1, 2\), references \(2, 2\)"),
        ([[1, 0]], [[1, 0]], "abc", 0, "2 columns, but there are 3 label names"),
        ([[1, 0]], [[1, 0]], "aa", 0, "distinct names"),
        ([[0.7, 0]], [[1, 0]], "ab", 0, r"predictions\[0, 0\] is 0.7"),
        ([[1, 0]], [[1, float("nan")]], "ab", 0, r"references\[0, 1\] is nan"),
        ([[1, 0]], [[1, -1]], "ab", 0, r"references\[0, 1\] is -1"),
        ([1, 0], [1, 0], "ab", 0, r"predictions: shape \(2,\)"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "ab", 0, "nothing to score"),
        ([[1, 0]], [[1, 0]], "ab", 0.5, r"zero_division: 0.5 \(expected"),
    ],
)
def test_invalid_label_matrices_are_refused(predictions, references, labels, zero_division, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(predictions, references, labels=list(labels), zero_division=zero_division)


def test_scores_match_the_published_reg2rg_values(check_data):
    """Reg2RG published the labels of its 361 CTRG reports, the scores per label and scikit-learn's averages."""
    reports = check_data / "reports"
    rows = _read_csv(reports / "reg2rg_label_inferred.csv")
    labels = [column.removeprefix("GT_") for column in rows[0] if column.startswith("GT_") and "report" not in column]
    assert len(labels) == 18

    def matrix(prefix):
        return np.array([[float(row[prefix + label]) for label in labels] for row in rows])

    result = classification_scores(matrix("Pred_"), matrix("GT_"), labels=labels)
    micro = result["micro"]
    assert [round(micro[key], 4) for key in ("precision", "recall", "f1")] == [0.5434, 0.1847, 0.2757]

    by_label = {row["Label"]: row for row in _read_csv(reports / "reg2rg_metrics_manual.csv")}
    published_weighted = by_label.pop("Weighted Average")
    assert set(by_label) == set(labels)
    pairs = [(label, result["labels"][label], row) for label, row in by_label.items()]
    pairs.append(("Weighted Average", result["weighted"], published_weighted))
    columns = {"precision": "Precision", "recall": "Recall", "f1": "F1 Score", "support": "Support"}
    for name, scores, row in pairs:
        for key, column in columns.items():
            assert scores[key] == pytest.approx(float(row[column]), abs=1e-12), (name, column)

    text = (reports / "reg2rg_test_classification_report.txt").read_text(encoding="utf-8")
    for average in AVERAGES:
        [line] = [line.split() for line in text.splitlines() if line.strip().startswith(f"{average} avg")]
        published = [float(value) for value in line[2:5]]
        assert [round(result[average][key], 2) for key in ("precision", "recall", "f1")] == published, average


# The evaluate module


@pytest.mark.slow
def test_evaluate_loads_the_module_without_the_package(repository_root, tmp_path):
    """Load it as a user of `evaluate` does: by path, from another working directory, without `diffvp` or network."""
    code = """
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert importlib.util.find_spec("diffvp") is None
import evaluate
root = sys.argv[1]
findings = evaluate.load(root + "/metrics/clinical_efficacy")
result = findings.compute(predictions=[[1, 0], [1, 1]], references=[[1, 0], [0, 1]], labels=["a", "b"])
assert result["labels"]["a"]["precision"] == 0.5, result
assert result["micro"]["f1"] == 0.8, result
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(repository_root)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
