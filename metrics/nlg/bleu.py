# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""BLEU as `evaluate.load("bleu")` computes it with `smooth=True`, of one report at a time or of the whole test set.

The paper and Reg2RG report the mean over reports. pycocoevalcap's BLEU (coco.py) and sacrebleu's own sentence BLEU,
whose smoothing differs, give other numbers on the same texts, by up to three points.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from .texts import check_pairs

MAX_ORDER = 4
# One row of counts: matches of 1- to 4-grams, candidates of 1- to 4-grams, tokens of the prediction, of the reference.
COUNTS = 2 * MAX_ORDER + 2


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()


def tokens_13a(text: str) -> list[str]:
    return _tokenizer()(text).split()


def bleu_signature(averaging: str = "per-sample-mean") -> str:
    return f"bleu|{averaging}|order:1-{MAX_ORDER}|smooth:add1|case:mixed|tok:13a|sacrebleu:{version('sacrebleu')}"


def ngrams(tokens: list[str], order: int) -> Counter:
    """How often each n-gram of an order occurs, as tuples of tokens."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def ngram_counts(prediction: list[str], reference: list[str]) -> list[int]:
    """The `COUNTS` numbers of one tokenised report that every BLEU is made of."""
    matches, candidates = [], []
    for order in range(1, MAX_ORDER + 1):
        written = ngrams(prediction, order)
        matches.append((written & ngrams(reference, order)).total())
        candidates.append(written.total())
    return [*matches, *candidates, len(prediction), len(reference)]


def bleu_counts(
    predictions: Sequence[str], references: Sequence[str], tokenize: Callable[[str], list[str]] = tokens_13a
) -> NDArray[np.int64]:
    """(reports, `COUNTS`). Rows add up: the sum over a resample of the reports gives the resample's corpus BLEU.

    Raises:
        TypeError, ValueError: see [`check_pairs`]; also where a reference has no tokens (13a drops "<skipped>").
    """
    predictions, references = check_pairs(predictions, references)
    rows = []
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        expected = tokenize(reference)
        if not expected:
            raise ValueError(f"references[{index}] has no tokens: BLEU is undefined without a reference length")
        rows.append(ngram_counts(tokenize(prediction), expected))
    return np.array(rows, dtype=np.int64)


def bleu_from_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """BLEU-1 to BLEU-4, (..., `COUNTS`) to (..., 4): of each report, or corpus BLEU where the rows were summed before.

    Every order's precision is (matches + 1) / (candidates + 1), the unigrams' too: that is the smoothing of
    `evaluate`'s BLEU, not the one of Lin and Och, which leaves the unigrams alone. It gives a report with no word in
    common a small score above 0. An empty prediction scores 0, for which `evaluate` divides by zero.
    """
    counts = np.asarray(counts, dtype=np.float64)
    matches, candidates = counts[..., :MAX_ORDER], counts[..., MAX_ORDER : 2 * MAX_ORDER]
    precisions = np.cumsum(np.log((matches + 1) / (candidates + 1)), axis=-1) / np.arange(1, MAX_ORDER + 1)
    with np.errstate(divide="ignore"):  # an empty prediction: the penalty is exp(-infinity)
        brevity = np.minimum(0.0, 1.0 - counts[..., -1:] / counts[..., -2:-1])
    return np.exp(precisions + brevity)
