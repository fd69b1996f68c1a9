# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Intervals and tests for scores of reports. Every result says on how many cases it rests and how it was computed.

- One system, many cases: [`bootstrap_mean`] for scores that are a mean over cases (BLEU, ROUGE-L),
  [`bootstrap_counts`] for scores of pooled counts (micro-F1), which no mean over cases gives, and [`bootstrap_auroc`].
- One system, several seeds: [`mean_std`].
- Two systems on the same cases: [`compare_means`] and, for pooled counts, [`compare_counts`]: a bootstrap, or below 30
  cases a permutation test. Also [`paired_t_test`] and [`wilcoxon_test`].
- Two sets of runs, or different cases: [`welch_test`], the two-sided t-test of the paper's Table 5 without its
  assumption that both vary alike.
- A difference that is not shown: [`detectable_difference`] says how large it would have had to be.
- Several comparisons: [`holm`]. At the 5 % level one of twenty comparisons of equal systems comes out "significant" by
  chance; a table that tests every metric, or every label, has to be corrected for that.

The bootstrap draws whole cases, and orders them by their values first: the same cases in another order have the same
interval, to the last bit.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

RESAMPLES = 1000  # of an interval
# Of a test. With 1,000 no p is below 0.002, which Holm's correction over 11 metrics turns into 0.022.
TEST_RESAMPLES = 10_000
# Below so many cases a bootstrap calls too many equal systems different: 8 % at 20 cases for a level of 5 %
# (tests/test_statistics.py measures it). A permutation test keeps its level.
FEW_CASES = 30
POWER = 0.8
LEVEL = 0.95
# Resamples are drawn in blocks, so that a big test set does not need resamples x cases numbers at once.
BLOCK_NUMBERS = 4_000_000
ROUNDING_DIGITS = 12  # of what is compared, in parts of the greatest score

Statistic = Callable[[NDArray], NDArray]


@dataclass(frozen=True)
class Interval:
    """A score with its confidence interval. `n` counts the cases."""

    estimate: float
    low: float
    high: float
    level: float
    n: int
    method: str


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs. `n` counts the runs; `ddof` is what the divisor n - ddof lacks."""

    mean: float
    std: float
    ddof: int
    n: int
    method: str


@dataclass(frozen=True)
class Comparison:
    """
    A two-sided test of a first system against a second one.

    Attributes:
        difference: score of the first minus score of the second.
        statistic: what the test is of (t, W); the difference itself for the bootstrap.
        p_value: uncorrected; see [`holm`].
        n: cases (or runs) of the first and of the second; the same number, of pairs, in a paired test.
        interval: of the difference, where the test has one.
    """

    difference: float
    statistic: float
    p_value: float
    n: tuple[int, int]
    method: str
    interval: Interval | None = None


# Bootstrap ----------------------------------------------------------------------------------------------------------


def bootstrap_mean(values: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
    """
    Percentile interval of the mean of one score a case.

    Args:
        values: (cases,).

    Raises:
        ValueError: there are fewer than two cases, or a value is not finite.
    """
    values = np.sort(_vector("values", values, at_least=2))
    means = np.concatenate([values[chosen].mean(axis=1) for chosen in _draws(len(values), resamples, seed)])
    return _interval(values.mean(), means, len(values), level, seed)


def bootstrap_counts(
    counts: ArrayLike, statistic: Statistic, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """
    Percentile interval of a score of counts that are summed over cases, such as micro-F1.

    Args:
        counts: (cases, ...), what each case adds; see `label_counts` of `metrics/clinical_efficacy`.
        statistic: scores of many sums at once, (resamples, ...) to (resamples,); also called with the one sum over all
            cases, (1, ...). NaN where the score is undefined: such resamples are left out, and counted in `method`.

    Raises:
        ValueError: there are fewer than two cases, a count is not finite, or the score of all cases is undefined.
    """
    (counts,) = _ordered(_counts("counts", counts))
    sums = _resampled_sums(counts, resamples, seed)
    return _interval(statistic(counts.sum(axis=0)[None])[0], statistic(sums), len(counts), level, seed)


def bootstrap_auroc(
    scores: ArrayLike, positive: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """
    Area under the ROC curve: the chance that a positive case scores higher than a negative one, ties counting half,
    with its percentile interval over cases. Resamples with cases of one kind alone are left out.

    Args:
        scores: (cases,). positive: (cases,) of 0 and 1, or of truth values.

    Raises:
        ValueError: all cases are positive, or none is; the lengths differ; or a score is not finite.
    """
    scores, positive = _vector("scores", scores, at_least=2), np.asarray(positive, dtype=bool)
    if scores.shape != positive.shape:
        raise ValueError(f"{len(scores)} scores of {len(positive)} cases: expected one each")
    if positive.all() or not positive.any():
        raise ValueError(f"{int(positive.sum())} of {len(scores)} cases are positive: expected some of either kind")
    order = np.lexsort((scores, positive))
    scores, positive = scores[order], positive[order]
    above, below = scores[positive][:, None], scores[~positive]
    wins = (above > below) + 0.5 * (above == below)  # (positives, negatives)

    def areas(times: NDArray) -> NDArray:
        of_pairs = ((times[:, positive] @ wins) * times[:, ~positive]).sum(axis=1)
        pairs = times[:, positive].sum(axis=1) * times[:, ~positive].sum(axis=1)
        return np.divide(of_pairs, pairs, out=np.full(len(times), np.nan), where=pairs > 0)

    # How often each case was drawn: the sums of the rows of an identity.
    drawn = _resampled_sums(np.eye(len(scores)), resamples, seed)
    return _interval(float(areas(np.ones((1, len(scores))))[0]), areas(drawn), len(scores), level, seed)


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, *, resamples: int = TEST_RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """
    Difference of two systems' means on the same cases, by drawing cases with both scores.

    The p-value is twice the share of resamples on the rarer side of 0, those at 0 included, and the observed case
    counted among them, so that it is never 0: with 10,000 resamples at least 0.0002.

    Args:
        first, second: (cases,), in the same order of cases.

    Raises:
        ValueError: the lengths differ, there are fewer than two cases, or a value is not finite.
    """
    differences = np.sort(_differences(first, second))
    count = len(differences)
    means = np.concatenate([differences[chosen].mean(axis=1) for chosen in _draws(count, resamples, seed)])
    return _bootstrap_comparison(differences.mean(), means, count, level, seed)


def paired_bootstrap_counts(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Statistic,
    *,
    resamples: int = TEST_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """
    [`paired_bootstrap`] for scores of summed counts; `first`, `second` and `statistic` as in [`bootstrap_counts`].

    Raises:
        ValueError: the shapes differ, or as of [`bootstrap_counts`].
    """
    first, second = _ordered(*_paired_counts(first, second))

    def difference(sums: NDArray) -> NDArray:
        return statistic(sums[:, 0]) - statistic(sums[:, 1])

    both = np.stack([first, second], axis=1)  # (cases, 2, ...): one draw for both systems
    differences = difference(_resampled_sums(both, resamples, seed))
    return _bootstrap_comparison(difference(both.sum(axis=0)[None])[0], differences, len(both), level, seed)


def compare_means(
    first: ArrayLike, second: ArrayLike, *, resamples: int = TEST_RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """
    Difference of two systems' means on the same cases: [`paired_bootstrap`], whose p-value is replaced by that of a
    permutation test where there are fewer than 30 cases.

    The permutation test swaps the two systems' scores case by case, in all 2^n ways where these are no more than
    `resamples`, else at random; p is the share of ways in which the difference is at least as far from 0 as observed.

    Args:
        first, second: (cases,), in the same order of cases.

    Raises:
        ValueError: as of [`paired_bootstrap`].
    """
    result = paired_bootstrap(first, second, resamples=resamples, level=level, seed=seed)
    if result.n[0] >= FEW_CASES:
        return result
    # A difference d or -d. Rounded ones, so that equal sums are equal.
    (differences,) = _ordered(_differences(first, second)[:, None])
    return _permuted(result, differences, -differences, lambda sums: sums[:, 0] / result.n[0], resamples, seed)


def compare_counts(
    first: ArrayLike,
    second: ArrayLike,
    statistic: Statistic,
    *,
    resamples: int = TEST_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Comparison:
    """
    [`compare_means`] for scores of summed counts; `first`, `second` and `statistic` as in [`bootstrap_counts`].

    Raises:
        ValueError: the shapes differ, or as of [`bootstrap_counts`].
    """
    result = paired_bootstrap_counts(first, second, statistic, resamples=resamples, level=level, seed=seed)
    if result.n[0] >= FEW_CASES:
        return result
    first, second = _ordered(*_paired_counts(first, second))
    own, swapped = np.stack([first, second], axis=1), np.stack([second, first], axis=1)

    def difference(sums: NDArray) -> NDArray:
        return statistic(sums[:, 0]) - statistic(sums[:, 1])

    return _permuted(result, own, swapped, difference, resamples, seed)


def _permuted(
    result: Comparison, own: NDArray, swapped: NDArray, difference: Statistic, resamples: int, seed: int
) -> Comparison:
    """`result` with the p-value of a permutation test; `own` and `swapped` are each case (cases, ...) either way."""
    cases = len(own)
    exact = 2**cases <= resamples
    if exact:
        swaps = (np.arange(2**cases)[:, None] >> np.arange(cases)) & 1
    else:
        swaps = np.random.default_rng(seed).integers(0, 2, (resamples, cases))
    flat = [side.reshape(cases, -1) for side in (own, swapped)]
    sums = ((1 - swaps) @ flat[0] + swaps @ flat[1]).reshape(len(swaps), *own.shape[1:])
    differences = difference(sums)
    differences = differences[~np.isnan(differences)]
    # A sum in another order differs in its last bits.
    scale = max(np.abs(differences).max(initial=0.0), abs(result.difference)) or 1.0
    far = int((np.abs(differences) >= abs(result.difference) - 10.0**-ROUNDING_DIGITS * scale).sum())
    p_value = far / len(differences) if exact else (far + 1) / (len(differences) + 1)
    ways = f"all {2**cases}" if exact else f"{resamples} random"
    method = f"paired permutation test, two-sided, {ways} ways to swap; interval: {result.interval.method}"
    return replace(result, p_value=p_value, method=method)


def _paired_counts(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = _counts("first", first), _counts("second", second)
    if first.shape != second.shape:
        raise ValueError(f"first has shape {first.shape}, second {second.shape}: a paired test takes the same cases")
    return first, second


def _draws(count: int, resamples: int, seed: int):
    """Indices of cases, in blocks (some, count) that add up to `resamples` rows. The same for any block size."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_NUMBERS // count)
    for start in range(0, resamples, block):
        yield generator.integers(0, count, (min(block, resamples - start), count))


def _resampled_sums(counts: NDArray, resamples: int, seed: int) -> NDArray[np.float64]:
    """(cases, ...) to the sums over the cases of each resample, (resamples, ...)."""
    cases = len(counts)
    flat = counts.reshape(cases, -1)
    sums = []
    for chosen in _draws(cases, resamples, seed):
        # How often each case was drawn, times its counts: a matrix product instead of gathering every draw. Exact, for
        # the counts are whole numbers.
        offsets = cases * np.arange(len(chosen))[:, None]
        times = np.bincount((chosen + offsets).ravel(), minlength=cases * len(chosen)).reshape(len(chosen), cases)
        sums.append(times.astype(np.float64) @ flat)
    return np.concatenate(sums).reshape(resamples, *counts.shape[1:])


def _ordered(*tables: NDArray) -> list[NDArray]:
    """Tables (cases, ...) with their rows in an order that depends on the values alone, the same for all of them."""
    flat = np.concatenate([table.reshape(len(table), -1) for table in tables], axis=1)
    order = np.lexsort(flat.T[::-1])
    return [table[order] for table in tables]


def _interval(estimate: float, resampled: NDArray, n: int, level: float, seed: int) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    if np.isnan(estimate):
        raise ValueError(f"the score of all {n} cases is undefined (NaN): there is nothing to put an interval around")
    defined = resampled[~np.isnan(resampled)]
    if not len(defined):
        raise ValueError(f"the score is undefined (NaN) in each of {len(resampled)} resamples")
    method = f"percentile bootstrap over cases, {len(resampled)} resamples, seed {seed}"
    if len(defined) < len(resampled):
        method += f", {len(resampled) - len(defined)} of them left out: undefined there"
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(estimate), float(low), float(high), level, n, method)


def _bootstrap_comparison(estimate: float, resampled: NDArray, n: int, level: float, seed: int) -> Comparison:
    interval = _interval(estimate, resampled, n, level, seed)
    defined = resampled[~np.isnan(resampled)]
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    p_value = min(1.0, 2 * float(rarer + 1) / (len(defined) + 1))
    method = f"paired {interval.method}, two-sided"
    return Comparison(interval.estimate, interval.estimate, p_value, (n, n), method, interval)


# Seeds and tests ----------------------------------------------------------------------------------------------------


def mean_std(values: ArrayLike, *, ddof: int = 1) -> Spread:
    """
    Mean and standard deviation of one score a run.

    Args:
        values: (runs,).
        ddof: 1, the estimate of how much runs vary (n - 1 in the divisor), or 0, the spread of these runs alone, which
            NumPy computes unless told.

    Raises:
        ValueError: a value is not finite, `ddof` is neither, or there are not more runs than `ddof`.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    values = _vector("values", values, at_least=ddof + 1)
    n = len(values)
    return Spread(float(values.mean()), float(values.std(ddof=ddof)), ddof, n, f"mean ± std over runs, ddof {ddof}")


def welch_test(first: ArrayLike, second: ArrayLike) -> Comparison:
    """
    Welch's t-test of two means, for scores that do not come in pairs: runs with different seeds, different cases.

    Args:
        first: (n,). second: (m,).

    Raises:
        ValueError: fewer than two values on a side, a value that is not finite, or no variance on either side although
            the means differ: then no t exists.
    """
    first, second = _two_sides(first, second)
    method = "Welch's t-test, two-sided"
    n = len(first), len(second)
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return _without_variance(first[0] - second[0], n, method, "both sides are constant")
    moments = [moment for side in (first, second) for moment in (side.mean(), side.std(ddof=1), len(side))]
    result = stats.ttest_ind_from_stats(*moments, equal_var=False)
    return Comparison(float(first.mean() - second.mean()), float(result.statistic), float(result.pvalue), n, method)


def detectable_difference(first: ArrayLike, second: ArrayLike, *, power: float = POWER, alpha: float = 0.05) -> float:
    """
    How far apart two means must lie for [`welch_test`] to show it with probability `power`, if both sides vary as
    these values do: by the noncentral t distribution. What a sentence like "a difference is not shown" is worth.

    Args:
        first: (n,). second: (m,).

    Raises:
        ValueError: fewer than two values on a side, a value that is not finite, `power` or `alpha` not between 0 and
            1, or no variance on either side: then any difference would show.
    """
    first, second = _vector("first", first, at_least=2), _vector("second", second, at_least=2)
    if not (0 < alpha < power < 1):
        raise ValueError(f"expected 0 < alpha < power < 1, got alpha {alpha} and power {power}")
    squares = [side.var(ddof=1) / len(side) for side in (first, second)]
    error = math.sqrt(sum(squares))
    if error == 0:
        raise ValueError("both sides are constant: nothing is known of how they vary")
    freedom = sum(squares) ** 2 / sum(s**2 / (len(side) - 1) for s, side in zip(squares, (first, second), strict=True))
    critical = stats.t.isf(alpha / 2, freedom)

    # The noncentral t as a mixture of normal distributions over its denominator, at 2,000 equally likely values of it:
    # scipy's own (nct) is NaN at some large shifts.
    spreads = critical * np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom) / freedom)

    def lacking(shift: float) -> float:
        return float((stats.norm.cdf(shift - spreads) + stats.norm.cdf(-shift - spreads)).mean()) - power

    return error * float(optimize.brentq(lacking, 0.0, 100 * critical))


def paired_t_test(first: ArrayLike, second: ArrayLike) -> Comparison:
    """
    t-test of the differences case by case.

    Args:
        first, second: (cases,), in the same order of cases.

    Raises:
        ValueError: the lengths differ, fewer than two cases, a value that is not finite, or differences that are all
            the same but not 0: then no t exists.
    """
    differences = _differences(first, second)
    method = "paired t-test, two-sided"
    n = len(differences), len(differences)
    if np.ptp(differences) == 0:
        return _without_variance(differences[0], n, method, "the differences are constant")
    result = stats.ttest_1samp(differences, 0.0)
    return Comparison(float(differences.mean()), float(result.statistic), float(result.pvalue), n, method)


def wilcoxon_test(first: ArrayLike, second: ArrayLike) -> Comparison:
    """
    Wilcoxon's signed-rank test of the differences case by case, which needs no normal distribution.

    Cases without a difference are left out, as Wilcoxon did, and counted in `method`. `difference` is that of the
    means.

    Args:
        first, second: (cases,), in the same order of cases.

    Raises:
        ValueError: the lengths differ, there are fewer than two cases, or a value is not finite.
    """
    differences = _differences(first, second)
    equal = int((differences == 0).sum())
    n = len(differences), len(differences)
    method = f"Wilcoxon signed-rank test, two-sided, {equal} case(s) without a difference left out"
    if equal == len(differences):
        return Comparison(0.0, 0.0, 1.0, n, method)
    # Left out here and not by scipy, which chooses between the exact and the approximate test before it leaves out.
    result = stats.wilcoxon(differences[differences != 0])
    return Comparison(float(differences.mean()), float(result.statistic), float(result.pvalue), n, method)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """
    Holm's correction for several comparisons: p-values (m,) to corrected ones (m,), in the same order.

    A comparison counts as significant at 5 % where its corrected value is at most 0.05; the chance of one or more
    false ones among all m is then at most 5 %, however they depend on each other.

    Raises:
        ValueError: there is none, or one is not between 0 and 1.
    """
    p_values = _vector("p_values", p_values, at_least=1)
    if ((p_values < 0) | (p_values > 1)).any():
        raise ValueError(f"p_values must be between 0 and 1, got {p_values.min()} to {p_values.max()}")
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    # The maximum of all smaller ones, so that a larger p-value never gets a smaller corrected one.
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return corrected


def _without_variance(difference: float, n: tuple[int, int], method: str, what: str) -> Comparison:
    """Equal systems do not differ (p = 1); a constant difference has no t."""
    if difference != 0:
        raise ValueError(f"{what} and differ by {difference}: without variance there is no t-test")
    return Comparison(0.0, 0.0, 1.0, n, f"{method} (equal and constant)")


def _vector(name: str, values: ArrayLike | Sequence[float], at_least: int) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} must be one value a case, got shape {vector.shape}")
    if len(vector) < at_least:
        raise ValueError(f"{name} has {len(vector)} value(s): this takes at least {at_least}")
    if not np.isfinite(vector).all():
        index = int(np.argmin(np.isfinite(vector)))
        raise ValueError(f"{name}[{index}] is {vector[index]}: every value must be finite")
    return vector


def _two_sides(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both vectors, without what equal scores differ by when they were summed in another order."""
    first, second = _vector("first", first, at_least=2), _vector("second", second, at_least=2)
    scale = _scale(first, second)
    return _rounded(first, scale), _rounded(second, scale)


def _differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """First minus second by case, equal differences to the last bit."""
    first, second = _vector("first", first, at_least=2), _vector("second", second, at_least=2)
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} values, second {len(second)}: a paired test takes the same cases")
    # Rounded once: sides that were rounded before give equal differences that lie on both sides of a half.
    return _rounded(first - second, _scale(first, second))


def _scale(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return max(np.abs(first).max(), np.abs(second).max()) or 1.0


def _rounded(values: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """
    `values` to [`ROUNDING_DIGITS`] digits of `scale`.

    Rounding errors would rank as differences in Wilcoxon's test, and make a variance out of nothing in the t-tests.
    """
    return np.round(values / scale, ROUNDING_DIGITS) * scale


def _counts(name: str, values: ArrayLike) -> NDArray[np.float64]:
    counts = np.asarray(values, dtype=np.float64)
    if counts.ndim < 2:
        raise ValueError(f"{name} must be (cases, ...), the counts of each case, got shape {counts.shape}")
    if len(counts) < 2:
        raise ValueError(f"{name} has {len(counts)} case(s): this takes at least 2")
    wrong = ~np.isfinite(counts)
    if wrong.any():
        index = tuple(int(position) for position in np.argwhere(wrong)[0])
        raise ValueError(f"{name}{list(index)} is {counts[index]}: every count must be finite")
    return counts
