# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
import csv
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffvp.metrics.clinical_efficacy import classification_scores
from diffvp.metrics.nlg import bleu, rouge_l, sentence_bleu

AVERAGES = ("micro", "macro", "weighted", "samples")


def _read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# BLEU and ROUGE-L


def test_bleu_by_hand():
    # 5 tokens against 6. Unigrams: the, lungs, are, "." of 5 match; bigrams: "the lungs", "lungs are" of 4;
    # trigrams: "the lungs are" of 3; no fourgram of 2. Each order counts one more of both.
    prediction, reference = "the lungs are clear .", "the lungs are well aerated ."
    precisions = [5 / 6, 3 / 5, 2 / 4, 1 / 3]
    brevity = math.exp(1 - 6 / 5)
    for order in range(1, 5):
        expected = brevity * math.prod(precisions[:order]) ** (1 / order)
        assert sentence_bleu(prediction, reference, max_order=order) == pytest.approx(expected, rel=1e-12)


def test_bleu_tokenises_as_13a_and_keeps_case():
    # 13a splits the full stop off the word but not the decimal point, so all 4 tokens match.
    assert sentence_bleu("Nodule of 4.6.", "Nodule of 4.6 .", max_order=1) == 1.0
    # 3 of 4 tokens match when the case differs, smoothed to (3 + 1) / (4 + 1).
    assert sentence_bleu("nodule of 4.6.", "Nodule of 4.6.", max_order=1) == pytest.approx(4 / 5)


def test_bleu_clips_repeated_words_and_does_not_penalise_length():
    # "the" counts once of 4; a longer prediction has no brevity penalty.
    assert sentence_bleu("the the the the", "the", max_order=1) == pytest.approx((1 + 1) / (4 + 1))


def test_empty_texts():
    assert sentence_bleu("", "The lungs are clear.") == 0.0
    assert rouge_l([""], ["The lungs are clear."])["rougeL"] == 0.0
    with pytest.raises(ValueError, match="reference has no tokens"):
        sentence_bleu("The lungs are clear.", " ")
    with pytest.raises(ValueError, match="report 1: the reference has no tokens"):
        bleu(["a", "b"], ["a", ""])


@pytest.mark.parametrize("score", [bleu, rouge_l])
def test_unusable_report_lists(score):
    with pytest.raises(ValueError, match="2 predictions .* 1 references"):
        score(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no reports"):
        score([], [])


def test_bleu_refuses_order_zero():
    with pytest.raises(ValueError, match="max_order must be at least 1, got 0"):
        sentence_bleu("a", "a", max_order=0)


def test_bleu_is_the_mean_over_reports_and_says_how_it_was_computed():
    predictions = ["The heart is large.", "Both lungs are clear and aerated."]
    references = ["The heart is of normal size.", "Both lungs are clear."]
    result = bleu(predictions, references)
    for order in range(1, 5):
        per_report = [sentence_bleu(p, r, max_order=order) for p, r in zip(predictions, references, strict=True)]
        assert result[f"bleu{order}"] == pytest.approx(sum(per_report) / 2, rel=1e-12)
    assert set(result) == {"bleu1", "bleu2", "bleu3", "bleu4", "signature"}
    assert result["signature"].startswith("bleu|per-sample-mean|order:1-4|smooth:add1|case:mixed|tok:13a|sacrebleu:")


def test_rouge_l_by_hand():
    # The longest common subsequence "the heart is" has 3 of 4 and 3 of 5 words: F = 2 PR / (P + R) = 6 / 9.
    # Without a stemmer "sizes" and "size" would not match either; case is ignored.
    result = rouge_l(["The heart is enlarged."], ["the heart is normal size"])
    assert result["rougeL"] == pytest.approx(6 / 9)
    assert rouge_l(["nodules"], ["nodule"])["rougeL"] == 0.0
    assert "stemmer:no" in result["signature"]


def test_scores_are_the_published_ones(check_data):
    """Reg2RG published both its 361 reference and generated CTRG reports and their scores."""
    reports = check_data / "reports"
    rows = _read_csv(reports / "reg2rg_ctrg_combined_reports_rm_region_text.csv")
    assert len(rows) == 361
    predictions = [row["Pred_whole_report"] for row in rows]
    references = [row["GT_whole_report"] for row in rows]
    result = {**bleu(predictions, references), **rouge_l(predictions, references)}

    [published] = _read_csv(reports / "reg2rg_nlg_evaluation_results.csv")  # "mean±std", four decimals
    columns = {"bleu1": "BLEU-1", "bleu2": "BLEU-2", "bleu3": "BLEU-3", "bleu4": "BLEU-4", "rougeL": "ROUGE-L"}
    for key, column in columns.items():
        assert result[key] == pytest.approx(float(published[column].split("±")[0]), abs=5.1e-5), column
    assert [round(100 * result[f"bleu{order}"], 2) for order in range(1, 5)] == [49.63, 41.43, 35.91, 32.04]


# Findings


def test_findings_by_hand():
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
    # The reports score F1 1, 2/3 and 0.
    assert result["samples"]["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert "zero-division:0" in result["signature"]


def test_zero_division_is_the_callers_choice():
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
def test_findings_agree_with_scikit_learn(shape, rates, seed, zero_division):
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
            continue  # scikit-learn then counts every label alike; see the next test for ours
        np.testing.assert_allclose(ours(result[average]), oracle(average), atol=1e-12, err_msg=average)
    per_label = np.array([ours(result["labels"][label]) for label in labels]).T
    np.testing.assert_allclose(per_label, oracle(None), atol=1e-12)


def test_weighted_average_without_any_finding_is_undefined():
    result = classification_scores([[1, 0]], [[0, 0]], labels="ab", zero_division=1)
    assert [result["weighted"][key] for key in ("precision", "recall", "f1")] == [1.0, 1.0, 1.0]
    assert result["weighted"]["support"] == 0


@pytest.mark.parametrize(
    ("predictions", "references", "labels", "zero_division", "message"),
    [
        ([[1, 0]], [[1, 0], [0, 0]], "ab", 0, r"shape \(1, 2\), references \(2, 2\)"),
        ([[1, 0]], [[1, 0]], "abc", 0, "2 columns, but there are 3 label names"),
        ([[1, 0]], [[1, 0]], "aa", 0, "label names must differ"),
        ([[0.7, 0]], [[1, 0]], "ab", 0, r"predictions\[0, 0\] is 0.7"),
        ([[1, 0]], [[1, float("nan")]], "ab", 0, r"references\[0, 1\] is nan"),
        ([[1, 0]], [[1, -1]], "ab", 0, r"references\[0, 1\] is -1"),
        ([1, 0], [1, 0], "ab", 0, r"predictions must be a matrix .* \(2,\)"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "ab", 0, "nothing to score"),
        ([[1, 0]], [[1, 0]], "ab", 0.5, "zero_division must be 0 or 1, got 0.5"),
    ],
)
def test_unusable_findings(predictions, references, labels, zero_division, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(predictions, references, labels=list(labels), zero_division=zero_division)


def test_findings_score_the_published_values(check_data):
    """Reg2RG published the labels of its 361 CTRG reports, the scores by label and scikit-learn's averages."""
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


# evaluate modules


def test_evaluate_loads_both_modules_with_the_package_absent(repository_root, tmp_path):
    """As a user of evaluate does it: a path, another working directory, no `diffvp` to import, no network."""
    code = """
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
assert importlib.util.find_spec("diffvp") is None
import evaluate
root = sys.argv[1]
nlg = evaluate.load(root + "/metrics/nlg")
nlg.add_batch(predictions=["The lungs are clear."], references=["The lungs are clear."])
result = nlg.compute()
assert result["bleu4"] == result["rougeL"] == 1.0, result
assert "tok:13a" in result["signature"] and "rougeL" in result["signature"], result
findings = evaluate.load(root + "/metrics/clinical_efficacy")
result = findings.compute(predictions=[[1, 0], [1, 1]], references=[[1, 0], [0, 1]], labels=["a", "b"])
assert result["labels"]["a"]["precision"] == 0.5, result
assert result["micro"]["f1"] == 0.8, result
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", code, str(repository_root)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
