# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""ROUGE-1, ROUGE-2 and ROUGE-L per report, as in `evaluate.load("rouge")`.

Tokens are those of the rouge-score package. The longest common subsequence has its own implementation, because the
package fills a table of prediction x reference words in Python, which takes minutes and gigabytes for reports of
10,000 words.
"""

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray
from rouge_score.tokenize import tokenize

from .texts import check_pairs

# Report a plain mean: the bootstrap mean of `evaluate` varies in the fourth decimal from run to run.


def rouge_signature() -> str:
    return f"rouge1,2,L|per-sample-mean|fmeasure|stemmer:no|case:lower|tok:a-z0-9|rouge-score:{version('rouge-score')}"


def common_subsequence_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence of two lists of tokens.

    Each row of the usual table is stored as one integer with one bit per token of `second`, which is 0 if the value
    increases there (Hyyrö, 2004). One addition computes the row of the next token of `first`.
    """
    positions: dict[str, int] = {}
    for index, token in enumerate(second):
        positions[token] = positions.get(token, 0) | 1 << index
    full = (1 << len(second)) - 1
    row = full
    for token in first:
        matching = row & positions.get(token, 0)
        row = (row + matching | row - matching) & full
    return len(second) - row.bit_count()


def _f_measure(hits: int, predicted: int, expected: int) -> float:
    # Keep the order of operations of rouge-score, so that the values are equal to the last bit.
    precision, recall = hits / max(predicted, 1), hits / max(expected, 1)
    return 2 * precision * recall / (precision + recall) if hits else 0.0


def _ngram_f_measure(prediction: list[str], reference: list[str], order: int) -> float:
    written, expected = (
        Counter(zip(*(tokens[start:] for start in range(order)), strict=False)) for tokens in (prediction, reference)
    )
    return _f_measure((written & expected).total(), written.total(), expected.total())


def rouge_per_report(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, (reports, 3).

    Only a-z and 0-9 count, in lower case. A text without any of these scores 0, even against itself. ROUGE-2 of a
    single word is 0, too.

    Raises:
        TypeError, ValueError: see [`check_pairs`].
    """
    rows = []
    for prediction, reference in zip(*check_pairs(predictions, references), strict=True):
        written, expected = tokenize(prediction, None), tokenize(reference, None)
        common = common_subsequence_length(written, expected)
        rows.append(
            [
                _ngram_f_measure(written, expected, 1),
                _ngram_f_measure(written, expected, 2),
                _f_measure(common, len(written), len(expected)),
            ]
        )
    return np.array(rows)
