# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests against scipy and plain NumPy, and the trivial baselines."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from diffvp.metrics import statistics
from diffvp.metrics.baselines import (
    label_baselines,
    most_frequent_report,
    most_frequent_report_by_region,
    nearest_reports,
)
from diffvp.metrics.clinical_efficacy import averages, classification_scores, crg, label_counts
from diffvp.metrics.statistics import (
    bootstrap_counts,
    bootstrap_macro_auroc,
    bootstrap_mean,
    compare_counts,
    compare_means,
    detectable_difference,
    holm,
    mean_std,
    paired_bootstrap,
    paired_bootstrap_counts,
    paired_t_test,
    welch_test,
)

# Scores on a grid, so that differences are exact and equal differences tie.
SCORES = st.lists(st.integers(-64, 64).map(lambda number: number / 64), min_size=2, max_size=12)


def micro_f1(counts):
    return averages(counts)["micro"][..., 2]


def findings(seed, cases=40, labels=6):
    generator = np.random.default_rng(seed)
    actual = generator.random((cases, labels)) < 0.3
    predicted = actual ^ (generator.random((cases, labels)) < 0.2)
    return predicted.astype(int), actual.astype(int)


# Bootstrap


def test_interval_of_a_mean_equals_explicit_resampling():
    values = np.random.default_rng(3).normal(size=30)
    result = bootstrap_mean(values, seed=7)
    generator, ordered = np.random.default_rng(7), np.sort(values)
    means = [ordered[generator.integers(0, 30, 30)].mean() for _ in range(1000)]
    assert [result.low, result.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), rel=1e-12)
    assert result.estimate == pytest.approx(values.mean()) and result.n == 30 and result.level == 0.95
    assert result.method == "percentile bootstrap over cases, 1000 resamples, seed 7"


def test_macro_auroc_equals_explicit_resampling():
    generator = np.random.default_rng(1)
    truth = (generator.random((12, 3)) < 0.3).astype(int)
    truth[:, 2] = 0  # no positive case at all
    truth[0, 1], truth[1:, 1] = 1, 0  # none in many resamples
    systems = {name: np.round(generator.random((2, 12, 3)) + 0.3 * truth, 1) for name in "ab"}
    intervals, [test] = bootstrap_macro_auroc(systems, truth, [("a", "b")], resamples=50, seed=5)

    def macro(runs, chosen):
        of = truth[chosen]
        labels = [label for label in range(3) if 0 < of[:, label].sum() < 12]
        areas = [[roc_auc_score(of[:, label], run[chosen][:, label]) for label in labels] for run in runs]
        return np.mean(areas) if labels else np.nan

    draws = list(np.random.default_rng(5).integers(0, 12, (50, 12)))
    means = {name: np.array([macro(runs, chosen) for chosen in draws]) for name, runs in systems.items()}
    for name, runs in systems.items():
        assert intervals[name].estimate == pytest.approx(macro(runs, np.arange(12)))
        expected = np.nanpercentile(means[name], [2.5, 97.5])
        assert [intervals[name].low, intervals[name].high] == pytest.approx(expected)
    difference = means["a"] - means["b"]
    assert test.difference == pytest.approx(intervals["a"].estimate - intervals["b"].estimate)
    assert [test.interval.low, test.interval.high] == pytest.approx(np.nanpercentile(difference, [2.5, 97.5]))
    with pytest.raises(ValueError, match="no label"):
        bootstrap_macro_auroc(systems, np.zeros((12, 3)))


def test_interval_of_a_mean_agrees_with_scipy_and_theory():
    values = np.random.default_rng(4).normal(0.5, 0.2, size=200)
    result = bootstrap_mean(values, resamples=9999)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    for ours, scipys, normal in (
        (result.low, theirs.low, values.mean() - half),
        (result.high, theirs.high, values.mean() + half),
    ):
        assert ours == pytest.approx(scipys, abs=0.1 * half)
        assert ours == pytest.approx(normal, abs=0.1 * half)
    wider = bootstrap_mean(values, level=0.99)
    assert wider.low < result.low < result.high < wider.high


def test_interval_of_pooled_counts_equals_explicit_resampling():
    predicted, actual = findings(0)
    result = bootstrap_counts(label_counts(predicted, actual), micro_f1, resamples=200, seed=1)
    # Score the same resamples one by one from the matrices, with cases in the order of their rows of counts.
    rows = np.concatenate([predicted & actual, predicted, actual], axis=1)
    order = sorted(range(40), key=lambda case: rows[case].tolist())
    generator, scores = np.random.default_rng(1), []
    for _ in range(200):
        chosen = np.array(order)[generator.integers(0, 40, 40)]
        scores.append(classification_scores(predicted[chosen], actual[chosen], list("abcdef"))["micro"]["f1"])
    assert [result.low, result.high] == pytest.approx(np.percentile(scores, [2.5, 97.5]), rel=1e-12)
    whole = classification_scores(predicted, actual, list("abcdef"))["micro"]["f1"]
    assert result.estimate == pytest.approx(whole) and result.n == 40


def test_block_size_does_not_change_the_intervals(monkeypatch):
    counts = label_counts(*findings(1))
    values = np.random.default_rng(0).random(40)
    expected = bootstrap_counts(counts, micro_f1), bootstrap_mean(values)
    monkeypatch.setattr(statistics, "BLOCK_NUMBERS", 40 * 7)
    assert (bootstrap_counts(counts, micro_f1), bootstrap_mean(values)) == expected


@settings(deadline=None, max_examples=30)
@given(values=SCORES, seed=st.integers(0, 1000), data=st.data())
def test_order_of_cases_does_not_change_the_intervals(values, seed, data):
    order = data.draw(st.permutations(range(len(values))))
    values = np.array(values)
    assert bootstrap_mean(values, resamples=50) == bootstrap_mean(values[order], resamples=50)
    predicted, actual = findings(seed, cases=len(values))
    counts = label_counts(predicted, actual)
    assert bootstrap_counts(counts, micro_f1, resamples=50) == bootstrap_counts(counts[order], micro_f1, resamples=50)
    others = label_counts(1 - predicted, actual)
    assert paired_bootstrap_counts(counts, others, micro_f1, resamples=50) == paired_bootstrap_counts(
        counts[order], others[order], micro_f1, resamples=50
    )
    first = paired_bootstrap(values, values[::-1], resamples=50)
    assert first == paired_bootstrap(values[order], values[::-1][order], resamples=50)


def test_constant_values_have_an_interval_of_zero_width():
    result = bootstrap_mean([0.25] * 5)
    assert (result.estimate, result.low, result.high) == (0.25, 0.25, 0.25)


def test_undefined_resamples_are_left_out_and_counted():
    # One of three cases has the only finding, so CRG is undefined in (2/3)^3 = 30 % of the resamples.
    predicted, actual = np.array([[1, 0], [0, 0], [0, 1]]), np.array([[1, 0], [0, 0], [0, 0]])
    result = bootstrap_counts(label_counts(predicted, actual), lambda sums: crg(sums, 3))
    left_out = int(result.method.split("seed 0, ")[1].split(" of them left out")[0])
    assert 240 < left_out < 350 and np.isfinite([result.low, result.high]).all()
    with pytest.raises(ValueError, match="the score of all 3 cases is undefined"):
        bootstrap_counts(label_counts(predicted, np.zeros((3, 2))), lambda sums: crg(sums, 3))


def test_paired_bootstrap_gives_difference_interval_and_p_value():
    generator = np.random.default_rng(0)
    first = generator.random(60)
    second = first - 0.05 + 0.01 * generator.normal(size=60)
    result = paired_bootstrap(first, second)
    assert result.difference == pytest.approx((first - second).mean()) and result.n == (60, 60)
    assert result.p_value == pytest.approx(2 / 10001)  # no resample on the other side: the smallest p-value
    assert result.interval.low > 0 and result.interval.level == 0.95
    assert paired_bootstrap(second, first).difference == pytest.approx(-result.difference)
    # Without a common direction, the p-value is close to that of the t-test.
    noise = generator.normal(0.02, 0.1, size=(2, 200))
    approximate = paired_bootstrap(*noise, resamples=5000).p_value
    assert approximate == pytest.approx(stats.ttest_rel(*noise).pvalue, abs=0.05)


def test_paired_bootstrap_of_counts_draws_the_same_cases_for_both():
    predicted, actual = findings(2)
    worse = predicted & ~((np.arange(40) % 2).astype(bool))[:, None]
    first, second = label_counts(predicted, actual), label_counts(worse, actual)
    result = paired_bootstrap_counts(first, second, micro_f1)
    assert result.difference == pytest.approx(float(micro_f1(first.sum(0)) - micro_f1(second.sum(0))))
    assert result.p_value == pytest.approx(2 / 10001) and result.interval.low > 0
    same = paired_bootstrap_counts(first, first, micro_f1)
    assert same.difference == 0 and same.p_value == 1 and (same.interval.low, same.interval.high) == (0, 0)
    with pytest.raises(ValueError, match=r"first has shape \(40, 3, 6\), second \(39, 3, 6\)"):
        paired_bootstrap_counts(first, second[1:], micro_f1)


@pytest.mark.parametrize("count", [2, 5, 12, 20])
def test_few_cases_are_compared_by_permutation(count):
    generator = np.random.default_rng(count)
    first = generator.random(count)
    second = first - 0.1 + 0.2 * generator.random(count)
    result = compare_means(first, second)
    assert result.difference == pytest.approx((first - second).mean()) and result.n == (count, count)
    theirs = stats.permutation_test(
        (first, second),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=10_000,
        rng=1,
    )
    if count <= 13:
        assert "all " in result.method and result.p_value == pytest.approx(theirs.pvalue)
    else:
        assert "10000 random" in result.method and result.p_value == pytest.approx(theirs.pvalue, abs=0.02)
    bootstrap = paired_bootstrap(first, second)
    assert result.interval == bootstrap.interval and result.p_value >= 2 / 2**count


def test_few_pooled_counts_are_compared_by_permutation():
    predicted, actual = findings(2)
    worse = predicted & ~((np.arange(40) % 2).astype(bool))[:, None]
    first, second = (label_counts(of, actual)[:8] for of in (predicted, worse))
    result = compare_counts(first, second, micro_f1)
    swapped = []
    for swap in itertools.product([False, True], repeat=8):
        mask = np.array(swap)[:, None, None]
        sides = np.where(mask, second, first).sum(0), np.where(mask, first, second).sum(0)
        swapped.append(float(micro_f1(sides[0]) - micro_f1(sides[1])))
    observed = float(micro_f1(first.sum(0)) - micro_f1(second.sum(0)))
    assert result.difference == pytest.approx(observed)
    assert result.p_value == pytest.approx(np.mean(np.abs(swapped) >= abs(observed) - 1e-12))
    assert compare_counts(first, first, micro_f1).p_value == 1


def test_many_cases_are_compared_by_bootstrap():
    generator = np.random.default_rng(0)
    first, second = generator.random((2, 30))
    assert compare_means(first, second) == paired_bootstrap(first, second)
    predicted, actual = findings(2)
    counts = label_counts(predicted, actual), label_counts(actual, actual)
    assert compare_counts(*counts, micro_f1) == paired_bootstrap_counts(*counts, micro_f1)


@pytest.mark.slow
def test_permutation_has_5_percent_false_positives_and_bootstrap_more():
    # 1,500 pairs of equal systems on 20 cases. The standard error of a share of 5 % is 0.6 points.
    generator = np.random.default_rng(5)
    false = {"permutation": 0, "bootstrap": 0}
    for _ in range(1500):
        first, second = generator.normal(size=(2, 20))
        false["permutation"] += compare_means(first, second, resamples=1000).p_value <= 0.05
        false["bootstrap"] += paired_bootstrap(first, second, resamples=1000).p_value <= 0.05
    shares = {name: count / 1500 for name, count in false.items()}
    assert 0.035 < shares["permutation"] < 0.065, shares
    assert 0.065 < shares["bootstrap"] < 0.1, shares


def test_detectable_difference_is_found_with_the_stated_power():
    generator = np.random.default_rng(3)
    first, second = generator.normal(0, 0.02, 5), generator.normal(0, 0.01, 5)
    shift = detectable_difference(first, second)
    # Simulate the design: values with exactly these variances on average, and means apart by `shift`.
    noise = generator.normal(size=(2, 20_000, 5))
    sides = noise[0] * first.std(ddof=1), noise[1] * second.std(ddof=1) + shift
    found = stats.ttest_ind(*sides, axis=1, equal_var=False).pvalue <= 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.03)
    assert detectable_difference(first, second, power=0.9) > shift
    # With equal variances and sizes, compare with the textbook power of the two-sample t-test: 64 values per side show
    # a difference of 0.5 std with a power of 0.80 (Cohen, 1988, table 2.4.1).
    values = np.tile([-1.0, 1.0], 32)
    assert detectable_difference(values, values) / values.std(ddof=1) == pytest.approx(0.5, abs=0.005)
    with pytest.raises(ValueError, match="constant"):
        detectable_difference([1, 1], [2, 2])
    with pytest.raises(ValueError, match="alpha"):
        detectable_difference([1, 2], [2, 3], power=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([0.5]), r"values has 1 value\(s\): this takes at least 2"),
        (lambda: bootstrap_mean([0.5, float("nan")]), r"values\[1\] is nan"),
        (lambda: bootstrap_mean([[0.5], [1.0]]), r"shape \(2, 1\)"),
        (lambda: bootstrap_mean([0.5, 1], resamples=0), r"resamples: 0 \(expected"),
        (lambda: bootstrap_mean([0.5, 1], level=95), r"level: 95 \(expected"),
        (lambda: bootstrap_counts(np.zeros((1, 3, 2)), micro_f1), r"counts has 1 case\(s\)"),
        (lambda: bootstrap_counts([1, 2], micro_f1), r"shape \(2,\)"),
        (lambda: bootstrap_counts([[1.0], [float("nan")]], micro_f1), r"counts\[1, 0\] is nan"),
        (lambda: paired_bootstrap([1, 2], [1, 2, 3]), "first has 2 values, second 3"),
        (lambda: paired_t_test([1, 2], [1, 2, 3]), "first has 2 values, second 3"),
        (lambda: paired_t_test([1], [2]), r"first has 1 value\(s\): this takes at least 2"),
        (lambda: paired_t_test([0.3, 0.6], [0.2, 0.5]), "differences are constant and differ by 0.1"),
        (lambda: welch_test([1, 1], [2, 2, 2]), "both sides are constant and differ by -1.0"),
        (lambda: welch_test([1, 2], [float("inf"), 2]), r"second\[0\] is inf"),
        (lambda: paired_t_test([1, 2], [float("nan"), 2]), r"second\[0\] is nan"),
        (lambda: mean_std([0.5]), r"values has 1 value\(s\): this takes at least 2"),
        (lambda: mean_std([0.5, 1], ddof=2), r"ddof: 2 \(expected"),
        (lambda: holm([]), r"p_values has 0 value\(s\)"),
        (lambda: holm([0.5, 1.2]), "p_values: 0.5 to 1.2"),
    ],
)
def test_invalid_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Seeds and tests


def test_mean_and_std_over_seeds_match_a_hand_computation():
    values = [0.47, 0.49, 0.48]
    sample, population = mean_std(values), mean_std(values, ddof=0)
    assert sample.mean == pytest.approx(0.48) and sample.std == pytest.approx(0.01)
    assert population.std == pytest.approx(0.01 * math.sqrt(2 / 3))
    assert (sample.n, sample.ddof, sample.method) == (3, 1, "mean ± std over runs, ddof 1")
    assert mean_std([0.5], ddof=0).std == 0


@settings(deadline=None, max_examples=60)
@given(first=SCORES, second=SCORES)
def test_welch_agrees_with_its_formula(first, second):
    a, b = np.array(first), np.array(second)
    assume(a.std() > 0 or b.std() > 0)
    result = welch_test(a, b)
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    t = (a.mean() - b.mean()) / math.sqrt(va + vb)
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    assert result.statistic == pytest.approx(t, rel=1e-9, abs=1e-12)
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(t), freedom), rel=1e-9)
    assert result.n == (len(a), len(b)) and result.difference == pytest.approx(a.mean() - b.mean())
    swapped = welch_test(b, a)
    assert swapped.p_value == pytest.approx(result.p_value, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(pairs=st.lists(st.tuples(st.integers(-64, 64), st.integers(-64, 64)), min_size=2, max_size=8))
@example(pairs=[(0, 52), (7, 8), (-28, -29)])  # rounding the sides before the differences broke a tie
def test_paired_t_test_agrees_with_scipy(pairs):
    first, second = np.array(pairs).T / 64
    differences = first - second
    assume(np.ptp(differences) > 0)
    result = paired_t_test(first, second)
    theirs = stats.ttest_rel(first, second)
    assert result.statistic == pytest.approx(theirs.statistic, rel=1e-6, abs=1e-9)
    assert result.p_value == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(values=SCORES, data=st.data())
def test_equal_systems_do_not_differ(values, data):
    values = np.array(values)
    for test in (paired_t_test, paired_bootstrap, compare_means, welch_test):
        result = test(values, values)
        assert result.difference == 0 and result.p_value == 1, test.__name__
        # Equal except for the rounding of a sum.
        nearly = values * (1 + 1e-15)
        assert test(values, nearly).p_value == pytest.approx(1), test.__name__
    order = data.draw(st.permutations(range(len(values))))
    assert welch_test(values, values[order]).p_value == pytest.approx(1)


@settings(deadline=None, max_examples=40)
@given(pairs=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=9), data=st.data())
def test_order_of_pairs_does_not_change_the_tests(pairs, data):
    first, second = np.array(pairs).T / 8
    assume(np.ptp(first - second) > 0)
    order = data.draw(st.permutations(range(len(pairs))))
    for test in (paired_t_test, compare_means):
        one, other = test(first, second), test(first[order], second[order])
        assert one.p_value == pytest.approx(other.p_value, rel=1e-9)
        assert one.difference == pytest.approx(other.difference, abs=1e-12)


def test_holm_matches_a_hand_computation():
    # Sorted, times 4, 3, 2, 1: 0.04, 0.06, 0.06 and 0.04; the last may not be smaller than those before it.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1, 1])
    assert holm([0.03]) == pytest.approx(0.03)


@settings(deadline=None, max_examples=60)
@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=12), data=st.data())
def test_holm_agrees_with_the_step_down_procedure(p_values, data):
    corrected = holm(p_values)
    level = data.draw(st.floats(0.001, 0.999))
    # Step down: reject the smallest while p <= level / number left; stop at the first that is larger.
    order, rejected = sorted(range(len(p_values)), key=lambda index: p_values[index]), set()
    for step, index in enumerate(order):
        if p_values[index] * (len(p_values) - step) > level:
            break
        rejected.add(index)
    assert {index for index, value in enumerate(corrected) if value <= level} == rejected
    assert (corrected >= np.array(p_values)).all() and (corrected <= 1).all()


# Baselines


def test_most_frequent_report_is_the_first_of_the_commonest():
    assert most_frequent_report(["a", "b", "b", "c"]) == "b"
    assert most_frequent_report(["b", "a", "a", "b"]) == "b"  # the first of those that tie
    with pytest.raises(ValueError, match="reports is empty"):
        most_frequent_report([])


def test_most_frequent_text_is_chosen_per_region():
    reports = ["lung=clear;heart=normal", "lung=clear;heart=small;other=x", "lung=open;heart=small"]

    def split(report):
        return dict(part.split("=") for part in report.split(";"))

    result = most_frequent_report_by_region(reports, split, ("heart", "bone", "lung"))
    assert result == "Heart: small\nLung: clear"
    with pytest.raises(ValueError, match="reports is empty"):
        most_frequent_report_by_region([], split, ("heart",))


def test_nearest_report_has_the_highest_cosine():
    generator = np.random.default_rng(0)
    keys = generator.normal(size=(8, 5)) * [1, 10, 100, 1, 1]
    query = keys[[3, 0, 7]] + generator.normal(size=(3, 5)) * 1e-3
    assert nearest_reports(query, keys, list("abcdefgh")) == ["d", "a", "h"]
    # The definition: cosine of features, standardised with the mean and spread of the training scans.
    other = generator.normal(size=(4, 5)) * [1, 10, 100, 1, 1]
    standard = [(features - keys.mean(0)) / (keys.std(0) + 1e-6) for features in (other, keys)]
    cosine = [[float(q @ k / (np.linalg.norm(q) * np.linalg.norm(k))) for k in standard[1]] for q in standard[0]]
    assert nearest_reports(other, keys, list("abcdefgh")) == ["abcdefgh"[int(np.argmax(row))] for row in cosine]
    for query, reports, message in (
        (np.zeros((2, 4)), list("abcdefgh"), r"query has shape \(2, 4\), keys \(8, 5\)"),
        (other, list("abc"), "8 rows of keys and 3 reports"),
        (np.full((2, 5), np.nan), list("abcdefgh"), r"query\[0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            nearest_reports(query, keys, reports)


def test_label_baselines_follow_their_definitions():
    training = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 0], [1, 0, 1]])
    baselines = label_baselines(2000, training, seed=3)
    assert {matrix.shape for matrix in baselines.values()} == {(2000, 3)}
    assert all(matrix.dtype == np.int8 for matrix in baselines.values())
    assert baselines["all-positive"].all() and not baselines["all-negative"].any()
    assert (baselines["prevalence-majority"] == [1, 1, 0]).all()  # one half counts as a majority
    drawn = baselines["prevalence-draw"]
    np.testing.assert_allclose(drawn.mean(0), [1, 0.5, 0.25], atol=0.04)
    np.testing.assert_array_equal(drawn, label_baselines(2000, training, seed=3)["prevalence-draw"])
    assert (drawn != label_baselines(2000, training, seed=4)["prevalence-draw"]).any()


@pytest.mark.parametrize(
    ("count", "training", "message"),
    [
        (0, [[1, 0]], r"count: 0 \(expected"),
        (1, [1, 0], r"shape \(2,\)"),
        (1, np.zeros((0, 2)), r"shape \(0, 2\)"),
        (1, [[1, float("nan")]], r"training_labels\[0, 1\] is nan"),
    ],
)
def test_invalid_training_labels_are_refused(count, training, message):
    with pytest.raises(ValueError, match=message):
        label_baselines(count, training)
