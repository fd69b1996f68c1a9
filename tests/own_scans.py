# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Phantoms in the form of user data: a folder of scans and a table, shared by the tests of training on such data.

    python -m diffvp.tests.own_scans my_scans
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib

from diffvp.data.phantom import PhantomScan, render_patient, sample_patient
from diffvp.data.phantom_report import region_sentences, report_text
from diffvp.tests.ct_samples import write_dicom

SPLIT = "own"  # a stream of patients used by nothing else


def own_patients(normal: int, others: int, matrix: int) -> Iterator[tuple[str, PhantomScan, str, bool]]:
    """Yield (name, scan, report, is_normal) of `normal` patients without findings and `others` with some, mixed."""
    left, index, count = {True: normal, False: others}, 0, 0
    while any(left.values()):
        patient = sample_patient(0, index, SPLIT)
        index += 1
        is_normal = not patient.findings
        if left[is_normal]:
            left[is_normal] -= 1
            scan = render_patient(patient, matrix=matrix)
            yield f"scan_{count:02}", scan, report_text(region_sentences(patient)), is_normal
            count += 1


def write_own_scans(folder: Path, *, normal: int = 14, others: int = 26, matrix: int = 96) -> None:
    """Write NIfTI files, and `metadata.csv` with their paths and reports."""
    folder.mkdir(parents=True)
    rows = [["path", "report"]]
    for name, scan, report, _ in own_patients(normal, others, matrix):
        nib.save(nib.Nifti1Image(scan.hu, scan.affine), folder / f"{name}.nii.gz")
        rows.append([f"{name}.nii.gz", report])
    write_table(folder, rows)


def write_own_dicom(folder: Path, *, normal: int = 8, others: int = 4, matrix: int = 96) -> None:
    """Write folders of DICOM slices, and `metadata.csv` with their paths, reports and normal flags."""
    folder.mkdir(parents=True)
    rows = [["path", "report", "normal"]]
    for name, scan, report, is_normal in own_patients(normal, others, matrix):
        columns, lines, slices = (abs(float(scan.affine[axis, axis])) for axis in range(3))

        def change(_, dataset, spacing=(lines, columns)) -> None:
            dataset.PixelSpacing = list(spacing)

        write_dicom(folder / name, scan.hu, step=(0.0, 0.0, slices), change=change)
        rows.append([name, report, int(is_normal)])
    write_table(folder, rows)


def write_table(folder: Path, rows: list[list]) -> None:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


if __name__ == "__main__":
    write_own_scans(Path(sys.argv[1]))
