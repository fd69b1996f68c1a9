# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The `evaluate` module: `evaluate.load("metrics/nlg")`. The scores themselves are in scores.py."""

# One import a line, and `from .scores import` as it stands: evaluate finds a module's requirements line by line.
import datasets
import evaluate

from .scores import bleu, bleu_signature, rouge_l, rouge_signature

_DESCRIPTION = "BLEU-1 to BLEU-4 and ROUGE-L of generated radiology reports, per report and averaged over the reports."

_CITATION = """\
@inproceedings{papineni-etal-2002-bleu,
  title = {{BLEU}: a Method for Automatic Evaluation of Machine Translation},
  author = {Papineni, Kishore and Roukos, Salim and Ward, Todd and Zhu, Wei-Jing},
  booktitle = {Proceedings of the 40th Annual Meeting of the Association for Computational Linguistics},
  year = {2002},
  pages = {311--318},
}
@inproceedings{lin-2004-rouge,
  title = {{ROUGE}: A Package for Automatic Evaluation of Summaries},
  author = {Lin, Chin-Yew},
  booktitle = {Text Summarization Branches Out},
  year = {2004},
  pages = {74--81},
}
"""

_INPUTS = """
Args:
    predictions (list of str): the generated reports.
    references (list of str): the true reports, one each.
Returns:
    bleu1, bleu2, bleu3, bleu4, rougeL (float, 0 to 1) and signature (str): how they were computed.
"""


class NLG(evaluate.Metric):
    """BLEU-1 to BLEU-4 and ROUGE-L; see `metrics/nlg/scores.py`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        signature = f"{bleu_signature()} {rouge_signature()}"
        return {**bleu(predictions, references), **rouge_l(predictions, references), "signature": signature}
