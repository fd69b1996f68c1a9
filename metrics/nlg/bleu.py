# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""BLEU as in `evaluate.load("bleu")` with `smooth=True`, per report or over the whole test set.

The paper and Reg2RG report the mean over reports. pycocoevalcap's BLEU (coco.py), and sacrebleu's sentence BLEU with
its own smoothing, differ by up to three points on the same texts.
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
# Columns of the counts: matches of 1- to 4-grams, candidates of 1- to 4-grams, prediction tokens, reference tokens.
COUNTS = 2 * MAX_ORDER + 2


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()


def tokens_13a(text: str) -> list[str]:
    return _tokenizer()(text).split()


def bleu_signature(averaging: str = "per-sample-mean") -> str:
    return f"bleu|{averaging}|order:1-{MAX_ORDER}|smooth:add1|case:mixed|tok:13a|sacrebleu:{version('sacrebleu')}"


def ngrams(tokens: list[str], order: int) -> Counter:
    """Count the n-grams of one order, as tuples of tokens."""
    return Counter(zip(*(tokens[start:] for start in range(order)), strict=False))


def ngram_counts(prediction: list[str], reference: list[str]) -> list[int]:
    """Return the `COUNTS` counts of one tokenised report from which BLEU is computed."""
    matches, candidates = [], []
    for order in range(1, MAX_ORDER + 1):
        written = ngrams(prediction, order)
        matches.append((written & ngrams(reference, order)).total())
        candidates.append(written.total())
    return [*matches, *candidates, len(prediction), len(reference)]


def bleu_counts(
    predictions: Sequence[str], references: Sequence[str], tokenize: Callable[[str], list[str]] = tokens_13a
) -> NDArray[np.int64]:
    """Count n-grams of each report: (reports, `COUNTS`). The sum over a set of reports gives the set's corpus BLEU.

    Raises:
        TypeError, ValueError: see [`check_pairs`]; also if a reference has no tokens (13a drops "<skipped>").
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
    """Compute BLEU-1 to BLEU-4 of counts (..., `COUNTS`): (..., 4). Counts of reports summed before give corpus BLEU.

    The precision of every order is (matches + 1) / (candidates + 1). Unigrams are smoothed as well, as in `evaluate`'s
    BLEU and unlike Lin and Och's smoothing, so a report without a common word scores slightly above 0. An empty
    prediction scores 0; `evaluate` divides by zero there.
    """
    counts = np.asarray(counts, dtype=np.float64)
    matches, candidates = counts[..., :MAX_ORDER], counts[..., MAX_ORDER : 2 * MAX_ORDER]
    precisions = np.cumsum(np.log((matches + 1) / (candidates + 1)), axis=-1) / np.arange(1, MAX_ORDER + 1)
    with np.errstate(divide="ignore"):  # an empty prediction: the penalty is exp(-infinity)
        brevity = np.minimum(0.0, 1.0 - counts[..., -1:] / counts[..., -2:-1])
    return np.exp(precisions + brevity)
