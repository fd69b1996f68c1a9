# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Clinical efficacy: agreement of the findings in generated and true reports."""

from .scores import LabelScores, averages, classification_scores, crg, label_counts, per_report, precision_recall_f1

__all__ = [
    "LabelScores",
    "averages",
    "classification_scores",
    "crg",
    "label_counts",
    "per_report",
    "precision_recall_f1",
]
