# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Choice of normal references under a test condition. All draws depend only on names and seeds."""

from collections.abc import Callable, Sequence

from ..data.cases import Case, chance
from ..data.pool import is_normal, other_scans
from .study import Condition


def reference_pool(
    cases: Sequence[Case], condition: Condition, seed: int, foreign: Sequence[Case] = ()
) -> dict[str, Case]:
    """
    Draw the pool of references of a condition, by name.

    Contaminating scans replace a share of the pool, so that all pools have the same size.

    Args:
        cases: the test split. Its normal scans form the pool, its abnormal scans contaminate it.
        foreign: normal scans of another scanner.

    Raises:
        ValueError: there are fewer scans than the condition needs.
    """

    def drawn(candidates: Sequence[Case], count: int, what: str) -> list[Case]:
        if count > len(candidates):
            raise ValueError(f"The condition {condition.name} takes {count} {what} scans; there are {len(candidates)}")
        return sorted(candidates, key=lambda case: chance(f"{seed}:{what}:{case.name}"))[:count]

    normal = [case for case in cases if is_normal(case)]
    size = len(normal) if condition.pool_size is None else condition.pool_size
    abnormal, others = round(condition.abnormal * size), round(condition.foreign * size)
    pool = drawn(normal, size - abnormal - others, "normal")
    pool += drawn([case for case in cases if not is_normal(case)], abnormal, "abnormal")
    pool += drawn(foreign, others, "foreign")
    return {case.name: case for case in pool}


def ranked_references(case: Case, pool: dict[str, Case], draw: str) -> list[str]:
    """
    Rank the references that a pool has for a case at random, by name. A scan is never its own reference.

    Args:
        draw: key of the order, such as the seed.
    """
    # Not `ReferencePool.choose`: it reads scans for their digests, and stored results were drawn by names.
    return sorted(other_scans(case, list(pool.values())), key=lambda name: chance(f"{draw}:{case.name}:{name}"))


def choose_references(
    cases: Sequence[Case],
    pool: dict[str, Case],
    condition: Condition,
    seed: int,
    distance: Callable[[Case, Case], float] | None = None,
) -> dict[str, list[Case]]:
    """
    Choose the references of each case, by its name. A scan is never its own reference.

    Args:
        distance: distance between the features of two cases; required for the choice "nearest".

    Raises:
        ValueError: the pool has too few other scans for a case.
    """
    chosen = {}
    for case in cases:
        order = ranked_references(case, pool, str(seed))
        if len(order) < condition.references:
            raise ValueError(
                f"{case.name} has {len(order)} reference(s) in a pool of {len(pool)}; the condition "
                f"{condition.name} takes {condition.references}"
            )
        if condition.choice == "nearest":
            order.sort(key=lambda name: (distance(case, pool[name]), name))
        chosen[case.name] = [pool[name] for name in order[: condition.references]]
    return chosen
