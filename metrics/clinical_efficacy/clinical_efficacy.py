# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Module for `evaluate.load("metrics/clinical_efficacy")`. The scores are computed in scores.py."""

# Keep one import per line, and `from .scores import` on one line: evaluate parses the requirements line by line.
import datasets
import evaluate

from .scores import classification_scores

_DESCRIPTION = (
    "Precision, recall and F1 of the findings in reports: micro, macro, weighted, samples and per label; CRG."
)

_INPUTS = """
Args:
    predictions (list of list of int): one row of 0/1 labels per generated report.
    references (list of list of int): one row of 0/1 labels per true report.
    labels (list of str): names of the columns.
    zero_division (float, 0 or 1): value of undefined ratios; 0 by default.
Returns:
    micro, macro, weighted, samples (dict of precision, recall, f1, predicted, support), labels (the same by label
    name), crg (float, or None if undefined) and signature (str): how the scores were computed.
"""


class ClinicalEfficacy(evaluate.Metric):
    """Precision, recall and F1 of findings; see `metrics/clinical_efficacy/scores.py`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("int32")),
                    "references": datasets.Sequence(datasets.Value("int32")),
                }
            ),
        )

    def _compute(self, predictions, references, labels, zero_division=0.0):
        return classification_scores(predictions, references, labels=labels, zero_division=zero_division)
