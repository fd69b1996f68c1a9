# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Goal scores of a checkpoint on phantoms, compared with known answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from diffvp.data.cases import Case
from diffvp.data.phantom import sample_patient
from diffvp.data.phantom_report import region_sentences, report_text
from diffvp.experiments.goals import classifier_scores, goal_lines, naming_scores, pool_cases, report_scores
from diffvp.experiments.lesion_scores import named_twice
from diffvp.experiments.map_scores import correlation, target_maps
from diffvp.experiments.system_scores import PhantomReader
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.statistics import bootstrap_auroc, bootstrap_macro_auroc
from diffvp.references_diffvp import ReferencePool, index_references

NODULE = DIAGNOSIS_LABELS.index("Lung nodule")


@pytest.fixture(scope="module")
def cohort():
    """(60 patients as cases, their findings by name)."""
    patients = [sample_patient(9, index, "valid") for index in range(60)]
    cases = [
        Case(
            of.name, of.name, of.name, Path(of.name), report_text(region_sentences(of)),
            labels=np.array([of.labels[label] for label in DIAGNOSIS_LABELS], np.int8),
        )
        for of in patients
    ]  # fmt: skip
    return cases, {of.name: list(of.findings) for of in patients}


def labels_of(cases):
    return np.stack([case.labels for case in cases]).astype(int)


# AUROC with its interval ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_auroc_and_its_interval_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.random(80) < 0.3
    scores = np.round(rng.normal(size=80) + truth, 1)  # with ties
    found = bootstrap_auroc(scores, truth)
    assert found.estimate == pytest.approx(roc_auc_score(truth, scores))
    draws = np.random.default_rng(1).integers(0, 80, (1000, 80))
    expected = np.percentile([roc_auc_score(truth[of], scores[of]) for of in draws], [2.5, 97.5])
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.01)
    order = rng.permutation(80)
    assert bootstrap_auroc(scores[order], truth[order]) == found
    assert bootstrap_auroc(-scores, truth).estimate == pytest.approx(1 - found.estimate)


def test_macro_auroc_averages_labels_and_runs_as_scikit_learn():
    rng = np.random.default_rng(0)
    truth = rng.random((60, 3)) < [0.3, 0.5, 0.02]
    runs = {name: np.round(rng.normal(size=(2, 60, 3)) + truth * gain, 1) for name, gain in (("a", 1), ("b", 0))}
    found, [test] = bootstrap_macro_auroc(runs, truth, [("a", "b")], resamples=2000)
    tested = [label for label in range(3) if truth[:, label].any()]
    for name, interval in found.items():
        areas = [[roc_auc_score(truth[:, label], run[:, label]) for label in tested] for run in runs[name]]
        assert interval.estimate == pytest.approx(np.mean(areas)) and interval.low < interval.estimate < interval.high
    assert test.difference == pytest.approx(found["a"].estimate - found["b"].estimate) and test.p_value < 0.01
    few, _ = bootstrap_macro_auroc({"a": [[[0.1], [0.2], [0.9]]]}, [[0], [0], [1]])
    assert few["a"].estimate == 1 and "left out: undefined there" in few["a"].method


def test_auroc_requires_positive_and_negative_cases():
    found = bootstrap_auroc([0.1, 0.2, 0.9], [0, 0, 1])
    assert found.estimate == 1 and "left out: undefined there" in found.method
    for truth in ([0, 0], [1, 1]):
        with pytest.raises(ValueError, match="of 2 cases are positive"):
            bootstrap_auroc([0.1, 0.2], truth)
    with pytest.raises(ValueError, match="2 scores of 3 cases"):
        bootstrap_auroc([0.1, 0.2], [0, 1, 1])


# Findings named ------------------------------------------------------------------------------------------------------


def test_naming_scores_agree_with_scikit_learn_and_counts(cohort):
    cases, patients = cohort
    truth = labels_of(cases)
    rng = np.random.default_rng(0)
    predicted = np.where(rng.random(truth.shape) < 0.2, 1 - truth, truth)
    scores = naming_scores(predicted, cases, patients)
    assert scores["micro_f1"]["value"] == pytest.approx(f1_score(truth, predicted, average="micro"))
    assert scores["macro_f1"]["value"] == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    small = [
        row
        for row, case in enumerate(cases)
        for of in patients[case.name]
        if of.label == "Lung nodule" and of.attributes["size_mm"] < 9
    ]
    assert scores["small_nodules"]["cases"] == len(small) > 3
    assert scores["small_nodules"]["value"] == pytest.approx(predicted[small, NODULE].mean())
    normal = truth.sum(axis=1) == 0
    assert scores["false_findings"]["cases"] == normal.sum() > 2
    assert scores["false_findings"]["count"] == predicted[normal].sum() > 0
    assert scores["false_findings"]["value"] == pytest.approx(predicted[normal].sum() / normal.sum())
    low, high = scores["micro_f1"]["interval"]
    assert low < scores["micro_f1"]["value"] < high


def test_undefined_scores_of_a_cohort_are_none(cohort):
    cases, patients = cohort
    abnormal = [case for case in cases if case.labels.any() and not case.labels[NODULE]][:4]
    scores = classifier_scores(np.full((4, 18), 0.5), 0.5, abnormal, patients)
    assert scores["small_nodules"] == {"cases": 0, "value": None, "interval": None}
    assert scores["false_findings"]["value"] is None and scores["auroc"]["Lung nodule"] is None


def test_finding_is_positive_from_its_own_threshold(cohort):
    cases, patients = cohort
    truth = labels_of(cases)
    thresholds = np.linspace(0.1, 0.9, 18)
    exactly = np.where(truth, thresholds, thresholds - 1e-6)
    scores = classifier_scores(exactly, thresholds.tolist(), cases, patients)
    assert scores["micro_f1"]["value"] == 1 and scores["false_findings"]["count"] == 0
    assert {of["value"] for of in scores["auroc"].values() if of is not None} == {1.0}


# Reports -------------------------------------------------------------------------------------------------------------


def scored(cohort, reports, classifier=None):
    cases, patients = cohort
    named = PhantomReader().label_all(reports).astype(int)
    return report_scores(reports, named, labels_of(cases) if classifier is None else classifier, cases, patients)


def test_true_reports_reach_every_goal(cohort):
    scores = scored(cohort, [case.report for case in cohort[0]])
    values = [scores[key]["value"] for key in ("micro_f1", "place_right", "size_right", "named_twice")]
    assert values == [1, 1, 1, 0]
    assert scores["below_classifier"] == {"value": 0, "interval": [0, 0]} and scores["named_twice"]["labels"] == {}


def test_errors_in_reports_are_counted(cohort):
    cases, _ = cohort
    reports = [case.report for case in cases]
    scores = scored(cohort, reports[1:] + reports[:1])
    assert 0 < scores["place_right"]["value"] < 0.6 and scores["size_right"]["value"] < 0.6
    assert scores["below_classifier"]["value"] == pytest.approx(1 - scores["micro_f1"]["value"])
    assert scores["below_classifier"]["interval"][0] > 0
    # Every second report mentions a nodule again.
    again = [
        report.replace("\nMediastinum", " A nodule is observed.\nMediastinum") if row % 2 else report
        for row, report in enumerate(reports)
    ]
    twice = scored(cohort, again)["named_twice"]
    assert twice["count"] == sum(case.labels[NODULE] for case in cases[1::2]) > 3
    assert twice["labels"] == {"Lung nodule": twice["count"]} and twice["cases"] == 60


def test_phantom_reports_name_no_finding_twice():
    rng = np.random.default_rng(0)
    for index in range(150):
        report = report_text(region_sentences(sample_patient(3, index, "valid"), rng))
        assert named_twice(report) == []
    nodules = "Lung: There is a 10 mm solid nodule in the right upper lobe. Nodules are seen. No nodule in the apex."
    assert named_twice(nodules) == ["Lung nodule"]
    assert named_twice("Lung: No nodule, mass or infiltration was detected in both lungs.\nThyroid: No nodule.") == []


# Maps ----------------------------------------------------------------------------------------------------------------


def test_map_of_the_target_alone_is_the_norm_of_its_tokens(make_model):
    model = make_model(difference_level="aligned")
    grid, width = model.config.feature_grid, model.config.encoder_hidden_size
    tokens = torch.randn(int(np.prod(grid)), width)
    model.aligned_difference.fit(torch.randn(200, width) * 3 + 1)

    class Stored:
        def load(self, case):
            return {"features": tokens}

    maps = target_maps(model, Stored(), None)
    assert list(maps) == ["target alone", "target alone, whitened"]
    zeros = torch.zeros(1, *grid)
    white = model.aligned_difference.align(tokens[None], tokens[None])[0][0]
    for name, expected in (
        ("target alone", tokens.norm(dim=1).view(grid)),
        ("target alone, whitened", white.norm(dim=0)),
    ):
        assert maps[name].shape == tuple(model.config.image_size)
        steps = [size // count for size, count in zip(model.config.image_size, grid, strict=True)]
        means = maps[name].reshape([n for pair in zip(grid, steps, strict=True) for n in pair]).mean((1, 3, 5))
        assert np.corrcoef(means.ravel(), expected.detach().ravel())[0, 1] > 0.9, (name, zeros.shape)


def test_correlation_of_maps_agrees_with_numpy():
    rng = np.random.default_rng(0)
    one, other = rng.random(50), rng.random(50)
    assert correlation(one, 3 * one + 2) == pytest.approx(1)
    assert correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    assert correlation(np.zeros(50), np.ones(50)) == 1 and correlation(one, np.ones(50)) == 0


def test_maps_of_a_pool_of_one_are_refused(tmp_path):
    (tmp_path / "normal_1.nii.gz").write_bytes(b"scan")
    index_references(tmp_path)
    pool = ReferencePool.load(tmp_path.parent, tmp_path.name)
    with pytest.raises(ValueError, match=r"has 1 reference\(s\)"):
        pool_cases(pool)
    with pytest.raises(ValueError, match=r"has 0 reference\(s\)"):
        pool_cases(None)
    (tmp_path / "normal_2.nii.gz").write_bytes(b"another")
    index_references(tmp_path)
    cases = pool_cases(ReferencePool.load(tmp_path.parent, tmp_path.name))
    assert [(case.name, case.volume.name) for case in cases] == [
        ("normal_1", "normal_1.nii.gz"), ("normal_2", "normal_2.nii.gz")
    ]  # fmt: skip


# Page ----------------------------------------------------------------------------------------------------------------


def test_page_gives_the_measured_value_next_to_each_goal(cohort):
    cases, patients = cohort
    probabilities = np.clip(labels_of(cases) + np.random.default_rng(0).normal(0, 0.3, (60, 18)), 0, 1)
    flat = {key: {"mean": 0.9, "interval": [0.8, 1.0]} for key in ("pointing_body", "pointing_lesion", "auroc")}
    other = {key: {"mean": 0.123, "interval": None} for key in flat}
    metrics = {key: {"difference": 0.05, "interval": [0.01, 0.09]} for key in ("pointing_body", "auroc")}
    maps = {
        "cases": 50, "tolerance_mm": 10.0, "correlation": {"mean": 0.77, "interval": [0.7, 0.8]},
        "maps": {"latent": flat, "latent, another patient": other, "target alone": other},
        "comparisons": [{"second": "target alone", "metrics": metrics}],
    }  # fmt: skip
    result = {
        "classifier": classifier_scores(probabilities, 0.5, cases, patients),
        "report": scored(cohort, [case.report for case in cases]),
        "bleu4": {"value": 0.61, "interval": [0.6, 0.62]},
        "maps": maps,
    }
    page = "\n".join(goal_lines(result))
    assert "| BLEU-4 | ≥ 0.60 | 0.610 (0.600–0.620) |" in page
    assert "| its maximum lies on a lesion | ≥ 0.90 | 0.900 (0.800–1.000) |" in page
    assert "| maximum of another patient's map lies on a lesion | ≤ 0.20 | 0.123 |" in page
    assert "| AUROC, minus target alone | interval above 0 | +0.050 (+0.010 to +0.090) |" in page
    assert "| reports that name a finding twice | 0 | 0.000 (0.000–0.000), 0 in 60 |" in page
    assert "volume labels" not in page
    page = "\n".join(goal_lines(result | {"volume_labels": result["classifier"]}))
    assert "classifier, volume labels alone" in page
