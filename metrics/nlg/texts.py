# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Validate pairs of texts, and prepare them as the paper does."""

import re
from collections.abc import Sequence


def check_pairs(predictions: Sequence[str], references: Sequence[str]) -> tuple[list[str], list[str]]:
    """Check that two lists can be scored against each other, and return both. References must not be empty.

    Raises:
        TypeError: a text is not a str (for example, NaN from an empty cell), or a list is a single str.
        ValueError: the two lists differ in length or are empty, or a reference is blank.
    """
    for name, texts in (("predictions", predictions), ("references", references)):
        if isinstance(texts, str):
            raise TypeError(f"{name}: one text (expected a list of texts)")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{name}[{index}]: {text!r} (expected a text)")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be scored against {len(references)} references")
    if len(predictions) == 0:
        raise ValueError("there are no reports to score: a mean over 0 reports is undefined")
    for index, reference in enumerate(references):
        if not reference.strip():
            raise ValueError(f"references[{index}] is empty: nothing can be scored against it")
    return list(predictions), list(references)


def clean_reg2rg(text: str) -> str:
    """Prepare a report as Reg2RG and the paper do: remove "The region 3 is heart: ", collapse spaces, keep case."""
    return " ".join(re.sub(r"The region \d+ is [^:]+: ", "", text).split())
