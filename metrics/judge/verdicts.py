# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Compute win rates, intervals and tests from the winners of the comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ..statistics import bootstrap_mean, holm, value_entry


class Comparison(NamedTuple):
    """Two reports of one scan, with the true report."""

    truth: str
    first: str
    second: str


@dataclass(frozen=True)
class Verdicts:
    """
    Results of a judge.

    Attributes:
        dimensions: judged dimensions.
        scores: (comparisons, dimensions), 1 if the first report won, 0 if it lost, 0.5 if the two orders disagree or a
            rule finds no difference, NaN without an answer.
        positions: (comparisons, orders, dimensions), 1 if the report shown first won, 0 if the second one did, NaN
            without an answer; `None` for a judge without orders.
        refused: number of answers without all winners, by reason.
        repaired: number of answers that were not strict JSON.
    """

    dimensions: tuple[str, ...]
    scores: NDArray[np.float64]
    positions: NDArray[np.float64] | None = None
    refused: dict[str, int] = field(default_factory=dict)
    repaired: int = 0

    def part(self, chosen: Sequence[int] | NDArray) -> "Verdicts":
        """Return the results of some comparisons, without `refused` and `repaired`."""
        positions = None if self.positions is None else self.positions[chosen]
        return Verdicts(self.dimensions, self.scores[chosen], positions)


def mean_interval(values: NDArray) -> dict:
    """Mean with its bootstrap interval over cases: {"value", "interval", "n"}; the value is `None` without cases."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "interval": None, "n": 0}
    if len(values) == 1:
        return {"value": float(values[0]), "interval": None, "n": 1}
    interval = bootstrap_mean(values)
    return {**value_entry(interval.estimate, interval), "n": len(values)}


def win_rates(verdicts: Verdicts) -> dict[str, dict]:
    """
    Compute the win rates of the first system by dimension.

    Returns:
        {dimension: {...}} with the win rate as "value", "interval" and "n"; "wins" and "losses", the numbers of cases
        won or lost in all orders; "split" and "unanswered", the numbers of the other cases; "p" of a two-sided sign
        test over wins and losses; and "p_holm", corrected over the dimensions.
    """
    rates = {}
    for column, name in enumerate(verdicts.dimensions):
        scores = verdicts.scores[:, column]
        wins, losses = int((scores == 1).sum()), int((scores == 0).sum())
        rates[name] = {
            **mean_interval(scores),
            "wins": wins,
            "losses": losses,
            "split": int((scores == 0.5).sum()),
            "unanswered": int(np.isnan(scores).sum()),
            "p": float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0,
        }
    for of, corrected in zip(rates.values(), holm([of["p"] for of in rates.values()]), strict=True):
        of["p_holm"] = float(corrected)
    return rates


def position_bias(verdicts: Verdicts) -> dict[str, dict] | None:
    """
    Measure the position bias by dimension.

    Returns:
        {dimension: {"first", "disagree"}}: the share of answers for the report shown first (0.5 without bias), with
        its interval, and the share of comparisons whose two orders name different reports. `None` for a judge without
        orders.
    """
    if verdicts.positions is None:
        return None
    bias = {}
    for column, name in enumerate(verdicts.dimensions):
        of = verdicts.positions[:, :, column]
        answered = ~np.isnan(of)
        # Average within each comparison first, because its answers are not independent.
        means = np.where(answered, of, 0).sum(1)[answered.any(1)] / answered.sum(1)[answered.any(1)]
        both = of[answered.all(1)]
        disagree = float((both[:, 0] == both[:, 1]).mean()) if both.shape[1] == 2 and len(both) else None
        bias[name] = {"first": mean_interval(means), "disagree": disagree}
    return bias
