# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Markdown tables of scores."""

from collections.abc import Sequence


def table_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, one for the head, one rule, one for each row."""
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def with_interval(value: float, interval: Sequence[float] | None) -> str:
    """Format a value as "0.545 (0.517–0.574)", or as "0.545" without an interval (a single case has none)."""
    return f"{value:.3f}" if interval is None else f"{value:.3f} ({interval[0]:.3f}–{interval[1]:.3f})"


def p_text(value: float) -> str:
    """Format a p-value: "0.037", or "< 0.001"."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
