# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Phantoms as a user's own data come: a folder of scans and a table. What the tests of that road share.

    python -m diffvp.tests.own_scans my_scans
"""

import csv
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from diffvp.data.phantom import render_patient, sample_patient
from diffvp.data.phantom_report import region_sentences, report_text

SPLIT = "own"  # a stream of patients that nothing else uses


def write_own_scans(folder: Path, *, normal: int = 14, others: int = 26, matrix: int = 96) -> list[bool]:
    """`normal` patients without findings and `others` with some, mixed, as NIfTI, and `metadata.csv` of path and
    report; which of them are normal."""
    folder.mkdir(parents=True)
    left, rows, flags = {True: normal, False: others}, [], []
    index = 0
    while any(left.values()):
        patient = sample_patient(0, index, SPLIT)
        index += 1
        is_normal = not patient.findings
        if not left[is_normal]:
            continue
        left[is_normal] -= 1
        scan = render_patient(patient, matrix=matrix)
        name = f"scan_{len(rows):02}.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(scan.hu), scan.affine), folder / name)
        rows.append([name, report_text(region_sentences(patient))])
        flags.append(is_normal)
    write_table(folder, [["path", "report"], *rows])
    return flags


def write_table(folder: Path, rows: list[list]) -> None:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    write_own_scans(Path(sys.argv[1]))
