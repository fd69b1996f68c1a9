# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals and tests for report scores. Every result states its number of cases and its method.

- One system, many cases: [`bootstrap_mean`] for scores that are a mean over cases (BLEU, ROUGE-L),
  [`bootstrap_counts`] for scores of pooled counts, such as micro-F1, and [`bootstrap_auroc`].
- Several systems, many labels: [`bootstrap_macro_auroc`], with tests of pairs.
- One system, several seeds: [`mean_std`].
- Two systems on the same cases: [`compare_means`] and, for pooled counts, [`compare_counts`]. Both use a bootstrap, or
  a permutation test if there are fewer than 30 cases. Also [`paired_t_test`].
- Two sets of runs, or different cases: [`welch_test`], the two-sided t-test of the paper's Table 5 without its
  assumption of equal variances.
- A difference that is not significant: [`detectable_difference`] returns the smallest difference that would be found.
- Several comparisons: [`holm`]. At the 5 % level, one in twenty comparisons of equal systems is "significant" by
  chance, so a table that tests every metric or label needs a correction.

The bootstrap resamples whole cases. It sorts them by value first, so the interval does not depend on the order of the
cases, to the last bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

RESAMPLES = 1000  # for an interval
# For a test. With 1,000 resamples no p is below 0.002, which Holm's correction over 11 metrics raises to 0.022.
TEST_RESAMPLES = 10_000
# Below this number of cases a bootstrap test exceeds its level: it calls 8 % of equal systems different at 20 cases
# and a level of 5 % (measured in tests/test_statistics.py). A permutation test keeps its level.
FEW_CASES = 30
POWER = 0.8
LEVEL = 0.95
# Largest number of indices to draw at once, so that a large test set does not need resamples x cases in memory.
BLOCK_NUMBERS = 4_000_000
ROUNDING_DIGITS = 12  # precision of compared values, relative to the greatest score

Statistic = Callable[[NDArray], NDArray]


@dataclass(frozen=True)
class Interval:
    """A score with its confidence interval; `n` is the number of cases."""

    estimate: float
    low: float
    high: float
    level: float
    n: int
    method: str


def value_entry(value: float | None, interval: Interval | None = None) -> dict:
    """Return {"value", "interval"} for JSON; the interval is [low, high], or `None` without one."""
    return {"value": value, "interval": None if interval is None else [interval.low, interval.high]}


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over runs; `n` is the number of runs, n - `ddof` the divisor of the variance."""

    mean: float
    std: float
    ddof: int
    n: int
    method: str


@dataclass(frozen=True)
class Comparison:
    """
    Two-sided test of a first system against a second one.

    Attributes:
        difference: score of the first minus score of the second.
        statistic: t for a t-test; the difference itself for the bootstrap and the permutation test.
        p_value: uncorrected; see [`holm`].
        n: numbers of cases (or runs) of the first and the second system; both are the number of pairs in a paired
            test.
        interval: confidence interval of the difference, or `None` if the test has none.
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
    Mean of one score per case, with its percentile bootstrap interval.

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
    Score of counts summed over cases, such as micro-F1, with its percentile bootstrap interval.

    Args:
        counts: (cases, ...), the counts of each case; see `label_counts` in `metrics/clinical_efficacy`.
        statistic: maps sums (resamples, ...) to scores (resamples,). It is also called with the sum over all cases,
            (1, ...). Return NaN for an undefined score: such resamples are left out, and `method` states their number.

    Raises:
        ValueError: there are fewer than two cases, a count is not finite, or the score over all cases is undefined.
    """
    (counts,) = _ordered(_counts("counts", counts))
    sums = _resampled_sums(counts, resamples, seed)
    return _interval(statistic(counts.sum(axis=0)[None])[0], statistic(sums), len(counts), level, seed)


def bootstrap_auroc(
    scores: ArrayLike, positive: ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Interval:
    """
    Area under the ROC curve, with its percentile bootstrap interval.

    It is the probability that a positive case scores higher than a negative one, with ties counting half. Resamples
    without a positive or without a negative case are left out.

    Args:
        scores: (cases,).
        positive: (cases,) of 0 and 1, or of booleans.

    Raises:
        ValueError: all cases or no cases are positive, the lengths differ, or a score is not finite.
    """
    scores, positive = _vector("scores", scores, at_least=2), np.asarray(positive, dtype=bool)
    if scores.shape != positive.shape:
        raise ValueError(f"{len(scores)} scores of {len(positive)} cases: expected one each")
    if positive.all() or not positive.any():
        raise ValueError(f"{int(positive.sum())} of {len(scores)} cases are positive: expected some of either kind")
    order = np.lexsort((scores, positive))
    scores, positive = scores[order], positive[order]
    # Resampled row sums of an identity matrix: the number of times that each case was drawn.
    drawn = _resampled_sums(np.eye(len(scores)), resamples, seed)
    once = np.ones((1, len(scores)))
    of_all, resampled = (_areas(scores, positive, times) for times in (once, drawn))
    return _interval(float(of_all[0]), resampled, len(scores), level, seed)


def _areas(scores: NDArray, positive: NDArray[np.bool_], times: NDArray) -> NDArray:
    """Area under the ROC curve with each case drawn `times`, (resamples, cases) → (resamples,); NaN if undefined."""
    above, below = scores[positive][:, None], scores[~positive]
    wins = (above > below) + 0.5 * (above == below)  # (positives, negatives)
    of_pairs = ((times[:, positive] @ wins) * times[:, ~positive]).sum(axis=1)
    pairs = times[:, positive].sum(axis=1) * times[:, ~positive].sum(axis=1)
    return np.divide(of_pairs, pairs, out=np.full(len(times), np.nan), where=pairs > 0)


def bootstrap_macro_auroc(
    systems: Mapping[str, ArrayLike],
    positive: ArrayLike,
    pairs: Sequence[tuple[str, str]] = (),
    *,
    resamples: int = TEST_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[dict[str, Interval], list[Comparison]]:
    """
    Mean AUROC over labels of several systems on the same cases, with intervals and paired tests as of
    [`paired_bootstrap`]. All systems share their resamples. Labels without a positive or a negative case in a resample
    do not count there, nor do labels that have none at all.

    Args:
        systems: by name, (runs, cases, labels); the score of a system is the mean over its runs.
        positive: (cases, labels) of 0 and 1, or of booleans.
        pairs: names of the first and the second system of each test.

    Raises:
        ValueError: no label has both kinds of cases, or the shapes do not fit.
    """
    positive = np.asarray(positive, dtype=bool)
    tested = np.flatnonzero(positive.any(axis=0) & ~positive.all(axis=0))
    if not len(tested):
        raise ValueError("no label has positive and negative cases: expected one or more")
    cases = len(positive)
    # First every case once, then the resamples.
    times = np.concatenate([np.ones((1, cases)), _resampled_sums(np.eye(cases), resamples, seed)])

    means = {}
    for name, runs in systems.items():
        runs = np.asarray(runs, dtype=np.float64)
        if runs.ndim != 3 or runs.shape[1:] != positive.shape:
            raise ValueError(f"{name} has scores {runs.shape}: expected (runs, {cases}, {positive.shape[1]})")
        of_labels = ([_areas(one[:, label], positive[:, label], times) for label in tested] for one in runs)
        means[name] = np.mean([_mean_of_defined(areas) for areas in of_labels], axis=0)
    intervals = {name: _interval(of[0], of[1:], cases, level, seed) for name, of in means.items()}
    tests = [means[first] - means[second] for first, second in pairs]
    return intervals, [_bootstrap_comparison(of[0], of[1:], cases, level, seed) for of in tests]


def _mean_of_defined(areas: Sequence[NDArray]) -> NDArray:
    """Average areas of labels, (resamples,) each, without NaN; NaN where none is defined."""
    defined = ~np.isnan(areas)
    count = defined.sum(axis=0)
    return np.divide(np.where(defined, areas, 0).sum(axis=0), count, out=np.full(len(count), np.nan), where=count > 0)


def paired_bootstrap(
    first: ArrayLike, second: ArrayLike, *, resamples: int = TEST_RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """
    Difference of two systems' means on the same cases, by resampling cases together with both scores.

    The p-value is twice the share of resamples on the rarer side of 0. Resamples at 0 count, and so does the observed
    case, so it is never 0: with 10,000 resamples it is at least 0.0002.

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
        ValueError: the shapes differ; otherwise as for [`bootstrap_counts`].
    """
    first, second = _ordered(*_paired_counts(first, second))

    def difference(sums: NDArray) -> NDArray:
        return statistic(sums[:, 0]) - statistic(sums[:, 1])

    both = np.stack([first, second], axis=1)  # (cases, 2, ...), so that both systems share their resamples
    differences = difference(_resampled_sums(both, resamples, seed))
    return _bootstrap_comparison(difference(both.sum(axis=0)[None])[0], differences, len(both), level, seed)


def compare_means(
    first: ArrayLike, second: ArrayLike, *, resamples: int = TEST_RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """
    Difference of two systems' means on the same cases: [`paired_bootstrap`], with the p-value of a permutation test if
    there are fewer than 30 cases.

    The permutation test swaps the two systems' scores case by case: in all 2^n ways if there are at most `resamples`,
    otherwise at random. p is the share of swaps whose difference is at least as far from 0 as the observed one.

    Args:
        first, second: (cases,), in the same order of cases.

    Raises:
        ValueError: as for [`paired_bootstrap`].
    """
    result = paired_bootstrap(first, second, resamples=resamples, level=level, seed=seed)
    if result.n[0] >= FEW_CASES:
        return result
    # A swap turns the difference d into -d. The differences are rounded, so that equal sums are equal.
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
        ValueError: the shapes differ; otherwise as for [`bootstrap_counts`].
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
    """Return `result` with the p-value of a permutation test. `own` and `swapped` are (cases, ...)."""
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
    # Sums in another order differ in their last bits.
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
    """Yield indices of cases in blocks (n, count), `resamples` rows in all. They do not depend on the block size."""
    if resamples < 1:
        raise ValueError(f"resamples: {resamples} (expected at least 1)")
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK_NUMBERS // count)
    for start in range(0, resamples, block):
        yield generator.integers(0, count, (min(block, resamples - start), count))


def _resampled_sums(counts: NDArray, resamples: int, seed: int) -> NDArray[np.float64]:
    """Sum `counts` (cases, ...) over the cases of each resample: (resamples, ...)."""
    cases = len(counts)
    flat = counts.reshape(cases, -1)
    sums = []
    for chosen in _draws(cases, resamples, seed):
        # Multiply the number of draws of each case by its counts: one matrix product instead of gathering every draw.
        # The result is exact because the counts are whole numbers.
        offsets = cases * np.arange(len(chosen))[:, None]
        times = np.bincount((chosen + offsets).ravel(), minlength=cases * len(chosen)).reshape(len(chosen), cases)
        sums.append(times.astype(np.float64) @ flat)
    return np.concatenate(sums).reshape(resamples, *counts.shape[1:])


def _ordered(*tables: NDArray) -> list[NDArray]:
    """Sort the rows of tables (cases, ...) by their values, in one order for all tables."""
    flat = np.concatenate([table.reshape(len(table), -1) for table in tables], axis=1)
    order = np.lexsort(flat.T[::-1])
    return [table[order] for table in tables]


def _interval(estimate: float, resampled: NDArray, n: int, level: float, seed: int) -> Interval:
    if not 0 < level < 1:
        raise ValueError(f"level: {level} (expected a number between 0 and 1)")
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
    Mean and standard deviation of one score per run.

    Args:
        values: (runs,).
        ddof: 1 for the sample standard deviation (divisor n - 1), or 0 for the population's, NumPy's default.

    Raises:
        ValueError: a value is not finite, `ddof` is neither 0 nor 1, or there are no more runs than `ddof`.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof: {ddof} (expected 0 or 1)")
    values = _vector("values", values, at_least=ddof + 1)
    n = len(values)
    return Spread(float(values.mean()), float(values.std(ddof=ddof)), ddof, n, f"mean ± std over runs, ddof {ddof}")


def welch_test(first: ArrayLike, second: ArrayLike) -> Comparison:
    """
    Welch's t-test of two means, for unpaired scores: runs with different seeds, or different cases.

    Args:
        first: (n,).
        second: (m,).

    Raises:
        ValueError: a side has fewer than two values, a value is not finite, or both sides are constant and differ, so
            that t is undefined.
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
    Smallest difference of two means that [`welch_test`] finds with probability `power`, if both sides vary as these
    values do. It is computed with the noncentral t distribution, and qualifies a result of "no difference found".

    Args:
        first: (n,).
        second: (m,).

    Raises:
        ValueError: a side has fewer than two values, a value is not finite, 0 < `alpha` < `power` < 1 does not hold,
            or both sides are constant, so that any difference would be found.
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

    # The noncentral t as a mixture of normal distributions over its denominator, at 2,000 equally likely values of the
    # denominator, because scipy's nct is NaN at some large shifts.
    spreads = critical * np.sqrt(stats.chi2.ppf((np.arange(2000) + 0.5) / 2000, freedom) / freedom)

    def lacking(shift: float) -> float:
        return float((stats.norm.cdf(shift - spreads) + stats.norm.cdf(-shift - spreads)).mean()) - power

    return error * float(optimize.brentq(lacking, 0.0, 100 * critical))


def paired_t_test(first: ArrayLike, second: ArrayLike) -> Comparison:
    """
    Paired t-test: a t-test of the differences case by case.

    Args:
        first, second: (cases,), in the same order of cases.

    Raises:
        ValueError: the lengths differ, there are fewer than two cases, a value is not finite, or all differences are
            the same and not 0, so that t is undefined.
    """
    differences = _differences(first, second)
    method = "paired t-test, two-sided"
    n = len(differences), len(differences)
    if np.ptp(differences) == 0:
        return _without_variance(differences[0], n, method, "the differences are constant")
    result = stats.ttest_1samp(differences, 0.0)
    return Comparison(float(differences.mean()), float(result.statistic), float(result.pvalue), n, method)


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """
    Correct p-values (m,) for multiple comparisons by Holm's method, in the given order.

    A comparison is significant at 5 % if its corrected p-value is at most 0.05. The probability of one or more false
    positives among all m is then at most 5 %, whatever their dependence.

    Raises:
        ValueError: there are no p-values, or one is not between 0 and 1.
    """
    p_values = _vector("p_values", p_values, at_least=1)
    if ((p_values < 0) | (p_values > 1)).any():
        raise ValueError(f"p_values: {p_values.min()} to {p_values.max()} (expected values from 0 to 1)")
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty_like(p_values)
    # The running maximum, so that a larger p-value never gets a smaller corrected one.
    corrected[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1.0)
    return corrected


def _without_variance(difference: float, n: tuple[int, int], method: str, what: str) -> Comparison:
    """Return p = 1 for equal systems; raise a ValueError for a constant difference, which has no t."""
    if difference != 0:
        raise ValueError(f"{what} and differ by {difference}: without variance there is no t-test")
    return Comparison(0.0, 0.0, 1.0, n, f"{method} (equal and constant)")


def _vector(name: str, values: ArrayLike | Sequence[float], at_least: int) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name}: shape {vector.shape} (expected one value per case)")
    if len(vector) < at_least:
        raise ValueError(f"{name} has {len(vector)} value(s): this takes at least {at_least}")
    if not np.isfinite(vector).all():
        index = int(np.argmin(np.isfinite(vector)))
        raise ValueError(f"{name}[{index}] is {vector[index]}: every value must be finite")
    return vector


def _two_sides(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Validate both vectors and remove the rounding errors of sums in another order."""
    first, second = _vector("first", first, at_least=2), _vector("second", second, at_least=2)
    scale = _scale(first, second)
    return _rounded(first, scale), _rounded(second, scale)


def _differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """Subtract second from first by case, so that equal differences are equal to the last bit."""
    first, second = _vector("first", first, at_least=2), _vector("second", second, at_least=2)
    if len(first) != len(second):
        raise ValueError(f"first has {len(first)} values, second {len(second)}: a paired test takes the same cases")
    # Round the differences, not the sides: rounded sides can put equal differences on either side of a half.
    return _rounded(first - second, _scale(first, second))


def _scale(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    return max(np.abs(first).max(), np.abs(second).max()) or 1.0


def _rounded(values: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """
    Round `values` to [`ROUNDING_DIGITS`] digits relative to `scale`.

    Otherwise the t-tests would take rounding errors for variance.
    """
    return np.round(values / scale, ROUNDING_DIGITS) * scale


def _counts(name: str, values: ArrayLike) -> NDArray[np.float64]:
    counts = np.asarray(values, dtype=np.float64)
    if counts.ndim < 2:
        raise ValueError(f"{name}: shape {counts.shape} (expected (cases, ...), the counts of each case)")
    if len(counts) < 2:
        raise ValueError(f"{name} has {len(counts)} case(s): this takes at least 2")
    wrong = ~np.isfinite(counts)
    if wrong.any():
        index = tuple(int(position) for position in np.argwhere(wrong)[0])
        raise ValueError(f"{name}{list(index)} is {counts[index]}: every count must be finite")
    return counts
