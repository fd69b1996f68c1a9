# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Draws that depend on a key alone."""

import hashlib


def chance(key: str) -> float:
    """A number in [0, 1), uniform over keys and a function of the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
