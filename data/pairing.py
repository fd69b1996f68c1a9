# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Draws that depend on a key alone, and the random pairing of a training case with a normal reference."""

import hashlib
from collections.abc import Sequence


def chance(key: str) -> float:
    """A number in [0, 1), uniform over keys and a function of the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def pair_reference(case: str, pool: Sequence[str], seed: int, epoch: int) -> str:
    """
    The reference of a case in an epoch: uniform over the pool, and a function of (seed, epoch, case) alone, so that
    it does not depend on the order of the data, the batch, or the number of workers. A case is never its own.

    Raises:
        ValueError: the pool holds nothing but the case itself.
    """
    candidates = [name for name in pool if name != case]
    if not candidates:
        raise ValueError(f"No reference for {case}: the pool holds {len(pool)} case(s), none of them another.")
    return min(candidates, key=lambda name: hashlib.sha256(f"{seed}:{epoch}:{case}:{name}".encode()).digest())
