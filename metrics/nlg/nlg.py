# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: F401
"""Module for `evaluate.load("metrics/nlg")`. The scores are computed in the other files of this folder."""

# Import every file of this folder here, used or not, one per line and without trailing comments: evaluate parses local
# imports line by line, takes a comment for an address, and does not follow the imports of the imported files.
import datasets
import evaluate

from .bleu import bleu_signature
from .coco import coco_signature
from .lexicon import LexiconError
from .meteor import meteor_signature
from .regions import region_scores
from .rouge import rouge_signature
from .scores import score_reports
from .texts import clean_reg2rg

_DESCRIPTION = (
    "BLEU-1 to BLEU-4, METEOR, ROUGE-1, ROUGE-2, ROUGE-L and CIDEr of generated radiology reports: as means over "
    "reports with their standard deviations, over the corpus, as pycocoevalcap's, and by region."
)

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
@inproceedings{banerjee-lavie-2005-meteor,
  title = {{METEOR}: An Automatic Metric for {MT} Evaluation with Improved Correlation with Human Judgments},
  author = {Banerjee, Satanjeev and Lavie, Alon},
  booktitle = {Proceedings of the {ACL} Workshop on Intrinsic and Extrinsic Evaluation Measures},
  year = {2005},
  pages = {65--72},
}
"""

_INPUTS = """
Args:
    predictions (list of str): generated reports.
    references (list of str): true reports, one for each generated one.
    scorer (str): "paper" (default; means over reports), "corpus" (BLEU over the corpus) or "coco" (pycocoevalcap's).
    clean (str): "reg2rg" to remove Reg2RG's region headings and collapse spaces.
    meteor (bool): False to skip METEOR, which needs WordNet and NLTK's Punkt model.
    workers (int): number of processes for METEOR.
    per_report (bool): True to also return the scores of each report.
    split (callable) and regions (list of str): a function from a report to {region: text}, and the regions in
        canonical order, to also return the scores in that order and by region.
Returns:
    bleu_1, bleu_2, bleu_3, bleu_4, meteor, rouge_1, rouge_2, rouge_l (float, 0 to 1) and cider (float, 0 to 10), those
    of the scorer; for means over reports, their standard deviations with _std after the name; n (int); signature
    (str): how the scores were computed. On request: per_report (dict of list of float), canonical_order (dict as
    above) and regions (dict of such dicts).
"""


class NLG(evaluate.Metric):
    """BLEU, METEOR, ROUGE and CIDEr; see `metrics/nlg/scores.py`."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions,
        references,
        scorer="paper",
        clean=None,
        meteor=True,
        workers=1,
        per_report=False,
        split=None,
        regions=None,
    ):
        if (split is None) != (regions is None):
            raise ValueError("split and regions go together: pass both or neither")
        options = {"scorer": scorer, "clean": clean, "meteor": meteor, "workers": workers}
        scores = score_reports(predictions, references, **options)
        result = scores.summary()
        if per_report:
            result["per_report"] = {name: values.tolist() for name, values in scores.per_report.items()}
        if split is not None:
            views = region_scores(predictions, references, split, regions, **options)
            result |= {"canonical_order": views["canonical_order"], "regions": views["regions"]}
        return result
