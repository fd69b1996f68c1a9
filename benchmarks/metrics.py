# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Time to score a test split of the size of RadGenome-ChestCT: 1,564 reports of about 250 words.

    python benchmarks/metrics.py --workers 2 --output benchmarks/results

Reports consist of sentences of phantoms. Scores: all language metrics of the paper and the findings of the rule
labeler, each with a 1,000-fold bootstrap.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np

from diffvp.data.phantom import sample_patient
from diffvp.data.phantom_report import region_sentences, report_text
from diffvp.metrics.clinical_efficacy.reports import finding_scores, label_reports
from diffvp.metrics.labelers import RuleLabeler
from diffvp.metrics.nlg import score_reports
from diffvp.metrics.statistics import bootstrap_mean
from diffvp.provenance import machine

REPORTS, WORDS = 1564, 250


def make_reports(seed: int) -> list[str]:
    """Make reports of at least `WORDS` words, each from several phantoms."""
    rng = np.random.default_rng(seed)
    single = [report_text(region_sentences(sample_patient(seed, index, "benchmark"))) for index in range(400)]
    reports = []
    for _ in range(REPORTS):
        words = []
        while len(words) < WORDS:
            words += single[rng.integers(len(single))].split()
        reports.append(" ".join(words))
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    predictions, references = make_reports(0), make_reports(1)
    start = time.perf_counter()
    scores = score_reports(predictions, references, workers=options.workers)
    for values in scores.per_report.values():
        bootstrap_mean(values)
    language = time.perf_counter()
    labeler = RuleLabeler()
    predicted, actual = (label_reports(labeler, reports) for reports in (predictions, references))
    finding_scores(predicted, actual, truth="labeler", labeler=labeler.signature)
    findings = time.perf_counter()
    results = {
        "reports": REPORTS,
        "mean_words": float(np.mean([len(report.split()) for report in predictions])),
        "workers": options.workers,
        "machine": machine(),
        "language_metrics_s": language - start,
        "findings_s": findings - language,
        "signature": scores.signature,
    }
    page = "\n".join([
        "# Scoring", "",
        f"`python benchmarks/metrics.py --workers {options.workers}` on {results['machine']}: {REPORTS:,} reports of "
        f"{results['mean_words']:.0f} words,", "each score with a 1,000-fold bootstrap.", "",
        f"- BLEU-1 to -4, METEOR, ROUGE-1, -2, -L: {results['language_metrics_s']:.1f} s.",
        f"- The 18 findings of both sides, read by rules, with all averages: {results['findings_s']:.1f} s.", "",
        f"`{results['signature']}`", "",
    ])  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "metrics.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "metrics.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
