# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Marks for tests with many values."""

from collections.abc import Collection, Iterable

import pytest


def slow_except(fast: Collection, values: Iterable) -> list:
    """Return all values for `parametrize`, and leave those outside `fast` to `make test-slow`."""
    values = list(values)
    assert all(value in values for value in fast)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]
