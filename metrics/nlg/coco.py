# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""BLEU, ROUGE-L and CIDEr as pycocoevalcap computes them; most report-generation papers use these.

Words are separated by spaces, so "clear." and "clear" differ, and reports score several points below `evaluate`'s
BLEU. Case is kept; some papers lower-case the texts first.

pycocoevalcap is not a dependency, because its package contains 100 MB of Java programs for other metrics. The tests
compare with values that it computed.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bleu import MAX_ORDER, bleu_counts, ngrams
from .rouge import common_subsequence_length
from .texts import check_pairs

BETA = 1.2  # weight of the recall in ROUGE-L
SIGMA = 6.0  # standard deviation of CIDEr's Gaussian length penalty
CIDER_SCALE = 10.0
# pycocoevalcap's guards against division by zero and the logarithm of zero. They change its values in the ninth digit.
SMALL, TINY = 1e-9, 1e-15


def coco_signature() -> str:
    return (
        f"bleu|corpus|order:1-{MAX_ORDER}|smooth:none|case:mixed|tok:whitespace|diffvp-coco:1 "
        f"rougeL|per-sample-mean|fbeta:{BETA}|stemmer:no|case:mixed|tok:space|diffvp-coco:1 "
        f"cider|per-sample-mean|cider-d|scale:{CIDER_SCALE:g}|sigma:{SIGMA:g}|df:references|case:mixed|tok:whitespace"
        "|diffvp-coco:1"
    )


def coco_bleu_counts(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.int64]:
    """Count n-grams as [`bleu_counts`] does, of words separated by white space."""
    return bleu_counts(predictions, references, tokenize=str.split)


def coco_bleu_from_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """Compute BLEU-1 to BLEU-4 of summed counts (..., COUNTS): (..., 4). Near 0 if no n-gram of an order matches."""
    counts = np.asarray(counts, dtype=np.float64)
    matches, candidates = counts[..., :MAX_ORDER], counts[..., MAX_ORDER : 2 * MAX_ORDER]
    precisions = (matches + TINY) / (candidates + SMALL)
    means = np.cumprod(precisions, axis=-1) ** (1 / np.arange(1, MAX_ORDER + 1))
    ratio = (counts[..., -2:-1] + TINY) / (counts[..., -1:] + SMALL)
    return means * np.exp(np.minimum(0.0, 1 - 1 / ratio))


def coco_rouge_per_report(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """ROUGE-L with beta 1.2, (reports,).

    Texts are split at each single space, as in pycocoevalcap, so a double space gives an empty word.

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


def coco_cider_per_report(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """
    CIDEr as in pycocoevalcap, (reports,), between 0 and 10: CIDEr-D (Vedantam et al., 2015) with one reference each.

    Let g be the counts of the n-grams of order n times log(reports / references with the n-gram), and l the number of
    2-grams (pycocoevalcap's measure of length). The score is 10 times the mean over n = 1 to 4 of

        sum(min(g_prediction, g_reference) * g_reference) / (|g_prediction| * |g_reference|) * exp(-(l - l')^2 / 72)

    The logarithm makes a report's score depend on all references: it is 0 in a set of one report, and scores on
    different test sets are not comparable.

    Raises:
        TypeError, ValueError: see [`check_pairs`].
    """
    predictions, references = check_pairs(predictions, references)
    expected = [_ngrams_by_order(reference) for reference in references]
    documents = Counter(gram for orders in expected for grams in orders for gram in grams)
    total = math.log(len(references))

    def weighted(orders: list[Counter]) -> list[dict]:
        return [
            {gram: count * (total - math.log(max(1, documents[gram]))) for gram, count in grams.items()}
            for grams in orders
        ]

    scores = []
    for prediction, theirs in zip(predictions, expected, strict=True):
        ours = _ngrams_by_order(prediction)
        similarities = []
        for written, true in zip(weighted(ours), weighted(theirs), strict=True):
            product = sum(min(weight, true.get(gram, 0.0)) * true.get(gram, 0.0) for gram, weight in written.items())
            norm = math.hypot(*written.values()) * math.hypot(*true.values())
            similarities.append(product / norm if norm else 0.0)
        difference = ours[1].total() - theirs[1].total()
        penalty = math.exp(-(difference**2) / (2 * SIGMA**2))
        scores.append(CIDER_SCALE * penalty * sum(similarities) / MAX_ORDER)
    return np.array(scores)


def _ngrams_by_order(text: str) -> list[Counter]:
    words = text.split()
    return [ngrams(words, order) for order in range(1, MAX_ORDER + 1)]
