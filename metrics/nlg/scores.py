# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""BLEU and ROUGE-L as the paper and Reg2RG report them, as plain functions.

BLEU is the value of `evaluate.load("bleu")` with `smooth=True` on one report at a time, averaged over the reports.
Corpus BLEU, pycocoevalcap's BLEU and sacrebleu's own sentence BLEU (whose smoothing differs) give other numbers on the
same texts, by up to three points, so every result says in its signature how it was computed.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

MAX_ORDER = 4


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer13a:
    return Tokenizer13a()


def bleu_signature() -> str:
    return f"bleu|per-sample-mean|order:1-{MAX_ORDER}|smooth:add1|case:mixed|tok:13a|sacrebleu:{version('sacrebleu')}"


def rouge_signature() -> str:
    return f"rougeL|per-sample-mean|fmeasure|stemmer:no|case:lower|rouge-score:{version('rouge-score')}"


def _ngrams(tokens: list[str], order: int) -> Counter:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def _bleu_up_to(prediction: list[str], reference: list[str], max_order: int) -> list[float]:
    """BLEU-1 to BLEU-`max_order` of one tokenised report.

    Every order's precision is (matches + 1) / (candidates + 1), the unigrams' too: that is the smoothing of
    `evaluate`'s BLEU, not the one of Lin and Och, which leaves the unigrams alone.
    """
    if not reference:
        raise ValueError("the reference has no tokens: BLEU is undefined without a reference length")
    if not prediction:
        # The brevity penalty exp(1 - reference length / 0) goes to 0; the formula itself would divide by zero.
        return [0.0] * max_order
    brevity = min(0.0, 1.0 - len(reference) / len(prediction))
    scores = []
    log_precisions = 0.0
    for order in range(1, max_order + 1):
        candidates = _ngrams(prediction, order)
        matches = sum((candidates & _ngrams(reference, order)).values())
        log_precisions += math.log((matches + 1) / (candidates.total() + 1))
        scores.append(math.exp(log_precisions / order + brevity))
    return scores


def sentence_bleu(prediction: str, reference: str, max_order: int = MAX_ORDER) -> float:
    """BLEU-`max_order` of one report, between 0 and 1.

    The +1 smoothing gives a report with no word in common a small score above 0. An empty prediction scores 0.

    Raises:
        ValueError: the reference is empty, or `max_order` is below 1.
    """
    if max_order < 1:
        raise ValueError(f"max_order must be at least 1, got {max_order}")
    tokenize = _tokenizer()
    return _bleu_up_to(tokenize(prediction).split(), tokenize(reference).split(), max_order)[-1]


def _check_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions cannot be scored against {len(references)} references")
    if not predictions:
        raise ValueError("there are no reports to score: a mean over 0 reports is undefined")


def bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """BLEU-1 to BLEU-4 per report, averaged over the reports: keys `bleu1` to `bleu4` (0 to 1) and `signature`.

    Raises:
        ValueError: the two lists differ in length or are empty, or a reference is empty.
    """
    _check_pairs(predictions, references)
    tokenize = _tokenizer()
    totals = [0.0] * MAX_ORDER
    for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
        try:
            scores = _bleu_up_to(tokenize(prediction).split(), tokenize(reference).split(), MAX_ORDER)
        except ValueError as error:
            raise ValueError(f"report {index}: {error}") from error
        totals = [total + score for total, score in zip(totals, scores, strict=True)]
    means = {f"bleu{order}": total / len(predictions) for order, total in enumerate(totals, start=1)}
    return {**means, "signature": bleu_signature()}


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """ROUGE-L F-measure per report, averaged over the reports: keys `rougeL` (0 to 1) and `signature`.

    A plain mean, not `evaluate`'s bootstrap aggregate, which moves in the fourth decimal from run to run.

    Raises:
        ValueError: the two lists differ in length or are empty.
    """
    _check_pairs(predictions, references)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    total = sum(
        scorer.score(reference, prediction)["rougeL"].fmeasure
        for prediction, reference in zip(predictions, references, strict=True)
    )
    return {"rougeL": total / len(predictions), "signature": rouge_signature()}
