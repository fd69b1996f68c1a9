# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write the drafts of a phantom checkpoint without its cohort: the report of a phantom is derived from its seed.

    python -m diffvp.training.phantom_drafts checkpoints/diffvp-phantom --first 2500 --last 3599

Training writes drafts itself. This script is for checkpoints trained before drafts existed, and documents the origin
of the drafts of the shipped checkpoint.
"""

import argparse
from pathlib import Path

from ..data.phantom import sample_patient
from ..data.phantom_report import region_sentences, report_text
from ..drafts_diffvp import MIN_PATIENTS, ReportDrafts
from ..processing_diffvp import DiffVPProcessor


def phantom_drafts(checkpoint: str | Path, seed: int, first: int, last: int) -> ReportDrafts:
    """Build drafts from the training reports `first` to `last` of the cohort of a seed, one patient each."""
    processor = DiffVPProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    patients = [sample_patient(seed, index, "train") for index in range(first, last + 1)]
    reports = [processor.encode_report(report_text(region_sentences(patient))) for patient in patients]
    return ReportDrafts.build(reports, [patient.name for patient in patients], MIN_PATIENTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint folder to add the drafts to")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the cohort (default: 0)")
    parser.add_argument("--first", type=int, required=True, help="index of the first training case of the generator")
    parser.add_argument("--last", type=int, required=True, help="index of the last training case of the generator")
    options = parser.parse_args()
    drafts = phantom_drafts(options.checkpoint, options.seed, options.first, options.last)
    drafts.save(options.checkpoint)
