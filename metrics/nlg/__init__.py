# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""BLEU, METEOR, ROUGE and CIDEr of generated reports, with three scorers: the paper's, corpus, and pycocoevalcap's.

[`score_reports`] computes all scores of one scorer, [`region_scores`] also by region. docs/metrics.md defines them.
"""

from .bleu import bleu_counts, bleu_from_counts, bleu_signature
from .coco import (
    coco_bleu_counts,
    coco_bleu_from_counts,
    coco_cider_per_report,
    coco_rouge_per_report,
    coco_signature,
)
from .lexicon import LexiconError
from .meteor import check_meteor_data, meteor_per_report, meteor_signature, meteor_tokens
from .regions import canonical_report, region_scores, region_views, split_reg2rg
from .rouge import common_subsequence_length, rouge_per_report, rouge_signature
from .scores import BLEU_NAMES, ROUGE_NAMES, SCORERS, ReportScores, score_reports
from .texts import check_pairs, clean_reg2rg

__all__ = [
    "BLEU_NAMES",
    "ROUGE_NAMES",
    "SCORERS",
    "LexiconError",
    "ReportScores",
    "bleu_counts",
    "bleu_from_counts",
    "bleu_signature",
    "canonical_report",
    "check_meteor_data",
    "check_pairs",
    "clean_reg2rg",
    "coco_bleu_counts",
    "coco_bleu_from_counts",
    "coco_cider_per_report",
    "coco_rouge_per_report",
    "coco_signature",
    "common_subsequence_length",
    "meteor_per_report",
    "meteor_signature",
    "meteor_tokens",
    "region_scores",
    "region_views",
    "rouge_per_report",
    "rouge_signature",
    "score_reports",
    "split_reg2rg",
]
