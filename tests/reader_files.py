# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The files that a reader of the documentation has: scans in each form, lists of them, reports and tables."""

import csv
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom

from .chat_server import write_tables
from .clinical_samples import enhanced, of_a_hospital
from .ct_samples import write_dicom
from .hub_samples import make_chest
from .own_scans import own_patients, write_own_scans


def write_reader_files(folder: Path) -> None:
    """Write them under the names that the pages use."""
    (folder / "scans").mkdir(parents=True)
    patients = list(own_patients(normal=1, others=4, matrix=96))
    for _, scan, _, is_normal in patients[:3]:
        nib.save(nib.Nifti1Image(scan.hu, scan.affine), folder / ("normal.nii.gz" if is_normal else "scan.nii.gz"))
    for name in ("a.nii.gz", "b.nii.gz"):
        shutil.copy(folder / "scan.nii.gz", folder / "scans" / name)
    (folder / "scans.csv").write_text("path\nscans/a.nii.gz\nscans/b.nii.gz\n")
    write_own_scans(folder / "my_scans", normal=9, others=7)
    names = [name for name, _, _, is_normal in own_patients(normal=9, others=7, matrix=96) if is_normal]
    (folder / "my_scans" / "normal.txt").write_text("\n".join(names))

    for seed, name in enumerate(("SERIES", "patient_7", "study/1", "study/2")):
        write_dicom(folder / name, make_chest(seed), change=of_a_hospital)
    (folder / "series.txt").write_text("SERIES\npatient_7\n")
    shutil.make_archive(folder / "scan", "zip", folder / "SERIES")
    enhanced(folder)

    raw = make_chest(5).astype(np.float32) + 1024  # as in version 1 of CT-RATE: blank header, no rescale
    nib.save(nib.Nifti1Image(raw, None), folder / "valid_1_a_1.nii.gz")
    (folder / "validation_metadata.csv").write_text(
        "VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing,ImageOrientationPatient,PatientPosition\n"
        'valid_1_a_1.nii.gz,1,-1024,"[1.5, 1.5]",2.5,"[1, 0, 0, 0, 1, 0]",HFS\n'
    )
    grey = np.interp(make_chest(6), (-1000, 200), (0, 255)).astype(np.uint8)
    nib.save(nib.Nifti1Image(grey, None), folder / "export.nii.gz")

    texts = [report for _, _, report, _ in patients]
    rows = [(f"case-{k}", texts[k - 1], text, text) for k, text in enumerate(texts)]
    write_csv(folder / "reports.csv", ("id", "prediction", "reference", "report"), rows)
    write_csv(folder / "train.csv", ("report",), [(text,) for text in texts])
    write_tables(folder, 3)  # A.csv, B.csv
    shutil.copy(folder / "A.csv", folder / "truth.csv")


def write_csv(path: Path, columns: tuple[str, ...], rows: list[tuple]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])


def read_series(folder: Path) -> list[pydicom.Dataset]:
    return [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
