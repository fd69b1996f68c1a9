# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Random draws that depend only on a key."""

import hashlib


def chance(key: str) -> float:
    """Return a number in [0, 1) that depends only on the key and is uniform over keys."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
