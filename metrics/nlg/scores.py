# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Language scores of a set of reports by one of three scorers, in a form that a bootstrap can resample."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bleu import MAX_ORDER, bleu_counts, bleu_from_counts, bleu_signature
from .coco import (
    coco_bleu_counts,
    coco_bleu_from_counts,
    coco_cider_per_report,
    coco_rouge_per_report,
    coco_signature,
)
from .meteor import meteor_per_report, meteor_signature
from .rouge import rouge_per_report, rouge_signature
from .texts import check_pairs, clean_reg2rg

SCORERS = ("paper", "corpus", "coco")
BLEU_NAMES = tuple(f"bleu_{order}" for order in range(1, MAX_ORDER + 1))
ROUGE_NAMES = ("rouge_1", "rouge_2", "rouge_l")


@dataclass(frozen=True)
class ReportScores:
    """
    Scores of n reports, between 0 and 1 except CIDEr (0 to 10). Resamples are scored without reading the texts again.

    Attributes:
        per_report: {name: (n,)}, the scores that are a mean over reports. A bootstrap resamples these values.
        counts: (n, COUNTS), counts of each report for the corpus BLEU; `None` if BLEU is a mean over reports.
        corpus_bleu: maps sums of `counts` (..., COUNTS) to BLEU-1 to BLEU-4 (..., 4); `None` without `counts`.
        signature: how each score was computed, one word per score.
    """

    per_report: dict[str, NDArray[np.float64]]
    counts: NDArray[np.int64] | None
    corpus_bleu: Callable[[NDArray], NDArray[np.float64]] | None
    signature: str

    @property
    def n(self) -> int:
        return len(next(iter(self.per_report.values())))

    def summary(self) -> dict[str, float | int | str]:
        """Return each score by name, the population standard deviation of means as `NAME_std`, `n`, and `signature`.

        Sums are exact before rounding, so the order of the reports does not change the last bit.
        """
        result: dict[str, float | int | str] = {}
        if self.counts is not None:
            bleu = self.corpus_bleu(self.counts.sum(axis=0))
            result |= {name: float(value) for name, value in zip(BLEU_NAMES, bleu, strict=True)}
        for name, values in self.per_report.items():
            mean = math.fsum(values) / self.n
            result[name] = mean
            result[f"{name}_std"] = math.sqrt(math.fsum((values - mean) ** 2) / self.n)
        return result | {"n": self.n, "signature": self.signature}


def score_reports(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    scorer: str = "paper",
    clean: str | None = None,
    meteor: bool = True,
    workers: int = 1,
) -> ReportScores:
    """
    Score generated reports against the true ones.

    Args:
        scorer: "paper" for the mean over reports of `evaluate`'s smoothed BLEU, METEOR and ROUGE, as the paper and
            Reg2RG report them; "corpus" for the same with corpus BLEU (Reg2RG's "Overall"); "coco" for pycocoevalcap's
            corpus BLEU, ROUGE-L and CIDEr, without ROUGE-1, ROUGE-2 and METEOR.
        clean: "reg2rg" to prepare both texts with [`clean_reg2rg`]; `None` to score them unchanged.
        meteor: False to skip METEOR, which needs WordNet and the Punkt model.
        workers: number of processes for METEOR, which takes most of the time.

    Raises:
        LexiconError: METEOR is requested, but WordNet or the Punkt model is not installed.
        TypeError, ValueError: see [`check_pairs`]; also for an unknown `scorer` or `clean`.
    """
    if scorer not in SCORERS:
        raise ValueError(f"scorer: {scorer!r} (expected one of {', '.join(SCORERS)})")
    if clean not in (None, "reg2rg"):
        raise ValueError(f"clean: {clean!r} (expected 'reg2rg' or None)")
    predictions, references = check_pairs(predictions, references)
    if clean == "reg2rg":
        predictions, references = ([clean_reg2rg(text) for text in texts] for texts in (predictions, references))
    prepared = f"prepared:{clean or 'no'}"
    if scorer == "coco":
        counts = coco_bleu_counts(predictions, references)
        per_report = {
            "rouge_l": coco_rouge_per_report(predictions, references),
            "cider": coco_cider_per_report(predictions, references),
        }
        return ReportScores(per_report, counts, coco_bleu_from_counts, f"{prepared} {coco_signature()}")

    counts = bleu_counts(predictions, references)
    per_report, signatures = {}, [prepared]
    if scorer == "paper":
        per_report |= zip(BLEU_NAMES, bleu_from_counts(counts).T, strict=True)
        signatures.append(bleu_signature())
    else:
        signatures.append(bleu_signature("corpus"))
    if meteor:
        per_report["meteor"] = meteor_per_report(predictions, references, workers)
        signatures.append(meteor_signature())
    per_report |= zip(ROUGE_NAMES, rouge_per_report(predictions, references).T, strict=True)
    signatures.append(rouge_signature())
    corpus = (counts, bleu_from_counts) if scorer == "corpus" else (None, None)
    return ReportScores(per_report, *corpus, " ".join(signatures))
