# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""From the winners of each comparison to win rates, intervals and tests."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from ..statistics import bootstrap_mean, holm, value_entry


class Comparison(NamedTuple):
    """Two reports of one scan, and the true one."""

    truth: str
    first: str
    second: str


@dataclass(frozen=True)
class Verdicts:
    """
    What a judge found.

    Attributes:
        dimensions: those that it judges.
        scores: (comparisons, dimensions), how far the first report won: 1, 0, or 0.5 where the orders disagree or a
            rule finds no difference. NaN where an answer is missing.
        positions: (comparisons, orders, dimensions), 1 where the report that was shown first won, 0 where the second
            did, NaN without an answer; `None` of a judge that knows no order.
        refused: for each reason, how many answers lack a winner for it.
        repaired: answers that were no strict JSON.
    """

    dimensions: tuple[str, ...]
    scores: NDArray[np.float64]
    positions: NDArray[np.float64] | None = None
    refused: dict[str, int] = field(default_factory=dict)
    repaired: int = 0

    def part(self, chosen: Sequence[int] | NDArray) -> "Verdicts":
        """Those of some comparisons, without what is counted over all."""
        positions = None if self.positions is None else self.positions[chosen]
        return Verdicts(self.dimensions, self.scores[chosen], positions)


def mean_interval(values: NDArray) -> dict:
    """Mean with its bootstrap interval over cases: {"value", "interval", "n"}; the value of no cases is `None`."""
    values = values[~np.isnan(values)]
    if not len(values):
        return {"value": None, "interval": None, "n": 0}
    if len(values) == 1:
        return {"value": float(values[0]), "interval": None, "n": 1}
    interval = bootstrap_mean(values)
    return {**value_entry(interval.estimate, interval), "n": len(values)}


def win_rates(verdicts: Verdicts) -> dict[str, dict]:
    """
    By dimension: the first system's win rate ("value", "interval", over "n" cases), "wins" and "losses" (in all
    orders), "split" cases, "unanswered" ones, and the two-sided sign test over cases that are not split: "p", and
    "p_holm", corrected over the dimensions.
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
    By dimension: "first", the share of answers for the report that was shown first (0.5 without bias) with its
    interval, and "disagree", the share of comparisons whose two orders name different reports; `None` of a judge that
    knows no order.
    """
    if verdicts.positions is None:
        return None
    bias = {}
    for column, name in enumerate(verdicts.dimensions):
        of = verdicts.positions[:, :, column]
        answered = ~np.isnan(of)
        # The mean of each comparison, for its answers are not independent.
        means = np.where(answered, of, 0).sum(1)[answered.any(1)] / answered.sum(1)[answered.any(1)]
        both = of[answered.all(1)]
        disagree = float((both[:, 0] == both[:, 1]).mean()) if both.shape[1] == 2 and len(both) else None
        bias[name] = {"first": mean_interval(means), "disagree": disagree}
    return bias
