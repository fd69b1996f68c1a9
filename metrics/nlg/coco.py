# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""BLEU and ROUGE-L as pycocoevalcap computes them: what most report-generation papers print.

Words are what stands between spaces, so "clear." and "clear" differ: the same reports score several points below
`evaluate`'s BLEU. Case is kept here; papers that lower-case do so before.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bleu import MAX_ORDER, bleu_counts
from .rouge import common_subsequence_length
from .texts import check_pairs

BETA = 1.2  # weight of the recall in ROUGE-L
# pycocoevalcap's guards against a division by zero and the logarithm of zero: part of its values, in the ninth digit.
SMALL, TINY = 1e-9, 1e-15


def coco_signature() -> str:
    return (
        f"bleu|corpus|order:1-{MAX_ORDER}|smooth:none|case:mixed|tok:whitespace|diffvp-coco:1 "
        f"rougeL|per-sample-mean|fbeta:{BETA}|stemmer:no|case:mixed|tok:space|diffvp-coco:1"
    )


def coco_bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """As [`bleu_counts`], of words between white space."""
    return bleu_counts(predictions, references, tokenize=str.split)


def coco_bleu_from_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """BLEU-1 to BLEU-4 of summed counts, (..., COUNTS) to (..., 4). Near 0 where no n-gram of an order matches."""
    counts = np.asarray(counts, dtype=np.float64)
    matches, candidates = counts[..., :MAX_ORDER], counts[..., MAX_ORDER : 2 * MAX_ORDER]
    precisions = (matches + TINY) / (candidates + SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (counts[..., -2:-1] + TINY) / (counts[..., -1:] + SMALL)
    return means * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def coco_rouge_per_report(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """ROUGE-L with beta 1.2, (reports,).

    Words are split at each single space, as pycocoevalcap does: a double space makes an empty word.

    Raises:
        TypeError, ValueError: see [`check_pairs`].
    """
    scores = []
    for prediction, reference in zip(*check_pairs(predictions, references), strict=True):
        written, expected = prediction.split(" "), reference.split(" ")
        common = common_subsequence_length(written, expected)
        precision, recall = common / len(written), common / len(expected)
        scores.append((1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if common else 0.0)
    return np.array(scores)
