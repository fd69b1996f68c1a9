# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Write the phantom cohort in the layouts of CT-RATE v2 and RadGenome-ChestCT.

The same seed gives the same bytes for any number of workers: a case depends only on (seed, split, index), gzip headers
have no time, and tables are written in order of the index. Each file is written under a temporary name and renamed, so
an interrupted run leaves only complete files and the next run continues.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

from ..labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from ..progress import counted
from ..storage_diffvp import replacing
from .phantom import RENDERING, PhantomPatient, PhantomScan, on_scanner, render_patient, sample_patient
from .phantom_report import impression, region_sentences, report_text

# CT-RATE and RadGenome-ChestCT call the second split "valid" in some names and "validation" in others.
LONG_NAME = {"train": "train", "valid": "validation"}
VOLUME_FOLDER = {"train": "train_fixed", "valid": "valid_fixed"}
MODEL_NAME = {"a": "DiffVP phantom", "b": "DiffVP phantom, scanner b"}
METADATA_COLUMNS = (
    "VolumeName",
    "Manufacturer",
    "SeriesDescription",
    "ManufacturerModelName",
    "PatientSex",
    "PatientAge",
    "ReconstructionDiameter",
    "ConvolutionKernel",
    "PatientPosition",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
    "XYSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "NumberofSlices",
    "ZSpacing",
    "StudyDate",
)


def write_cohort(
    root: str | Path,
    *,
    train: int,
    valid: int,
    seed: int = 0,
    matrix: int = 144,
    masks: bool = True,
    scanner: str = "a",
    workers: int = 2,
    progress: bool = True,
) -> Path:
    """Write `train` and `valid` phantom cases below `root` and return `root`.

    Args:
        root: Folder of the cohort; existing complete volumes of the same settings are kept.
        train: Number of cases of the training split.
        valid: Number of cases of the validation split.
        seed: Cohort seed; the same seed and matrix give the same bytes.
        matrix: Pixels per row and column of each slice.
        masks: Also write the ten region masks, the lesion masks and the lobes.
        scanner: "a", or "b" for the same patients in another hospital; see [`on_scanner`].
        workers: Number of rendering processes.
        progress: Show the progress on stderr.

    Raises:
        ValueError: If a count is negative, the scanner is unknown, or `root` contains a cohort of another seed, matrix
            or scanner.
    """
    root = Path(root)
    counts = {"train": train, "valid": valid}
    for split, count in counts.items():
        if count < 0:
            raise ValueError(f"{split}={count}: expected a number of cases >= 0")
    if workers < 1:
        raise ValueError(f"workers={workers}: expected at least 1")
    patients = {
        split: [on_scanner(sample_patient(seed, index, split), scanner) for index in range(count)]
        for split, count in counts.items()
    }
    everyone = [patient for of_split in patients.values() for patient in of_split]
    _check_settings(root, seed, matrix, scanner)
    jobs = [(root, patient, matrix, masks) for patient in everyone]
    done = counted(_run(jobs, workers), "Phantom cases", len(jobs), shown=progress)
    facts = {fact["name"]: fact for fact in done}
    for split, of_split in patients.items():
        _write_tables(root, split, of_split, [facts[patient.name] for patient in of_split])
    lines = "".join(json.dumps(patient.to_dict(), sort_keys=True) + "\n" for patient in everyone)
    _write(root / "phantom" / "patients.jsonl", lines.encode())
    return root


def _check_settings(root: Path, seed: int, matrix: int, scanner: str) -> None:
    path, settings = root / "phantom" / "cohort.json", {"seed": seed, "matrix": matrix, "rendering": RENDERING}
    if scanner != "a":  # settings of older cohorts, all of scanner "a", do not name it
        settings["scanner"] = scanner
    if path.exists():
        found = json.loads(path.read_text())
        if found != settings:
            raise ValueError(f"{path}: holds a cohort made with {found}, asked for {settings}; choose another folder")
    _write(path, (json.dumps(settings, sort_keys=True) + "\n").encode())


def _run(jobs: list[tuple], workers: int) -> Iterator[dict]:
    if workers == 1 or len(jobs) < 2:
        yield from map(_write_case, jobs)
        return
    # "spawn", since a fork of a process in which torch has started threads can hang.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap_unordered(_write_case, jobs, chunksize=4)


def volume_path(root: Path, name: str) -> Path:
    """Return CT-RATE's path of a volume: train_1_a_1 -> dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz."""
    split, patient, scan, _ = name.split("_")
    return (
        root
        / "dataset"
        / VOLUME_FOLDER[split]
        / f"{split}_{patient}"
        / f"{split}_{patient}_{scan}"
        / (name + ".nii.gz")
    )


def _write_case(job: tuple) -> dict:
    root, patient, matrix, with_masks = job
    path = volume_path(root, patient.name)
    mask_folder = root / "dataset" / f"{patient.split}_region_mask" / f"seg_{patient.name}"
    lesion_path, lobe_path = (
        root / "phantom" / f"{kind}_mask" / f"{patient.name}.nii.gz" for kind in ("lesion", "lobe")
    )
    # The volume is written last, so that its presence means that the case is complete. (Older cohorts lack the lobes.)
    complete = path.exists() and ((lesion_path.exists() and lobe_path.exists()) or not with_masks)
    if not complete:
        scan = render_patient(patient, matrix=matrix)
        if with_masks:
            for region in REGIONS:
                _write_nifti(mask_folder / f"{region}.nii.gz", scan.regions[region].astype(np.uint8), scan.affine)
            _write_nifti(lesion_path, encode_lesions(scan), scan.affine)
            _write_nifti(lobe_path, scan.lobes, scan.affine)
        _write_nifti(path, scan.hu, scan.affine)
    header = nib.load(path).header
    return {
        "name": patient.name,
        "shape": [int(n) for n in header.get_data_shape()],
        "spacing": [round(float(s), 6) for s in header.get_zooms()],
    }


def single_phantom(seed: int, split: str) -> tuple[nib.Nifti1Image, str]:
    """Render the scan of the first patient of a split, without writing a cohort, and return it with its report."""
    patient = sample_patient(seed, 0, split)
    scan = render_patient(patient)
    return nib.Nifti1Image(scan.hu, scan.affine), report_text(region_sentences(patient))


def encode_lesions(scan: PhantomScan) -> np.ndarray:
    """Encode lesion masks in one uint32 volume: bit i is set inside finding `DIAGNOSIS_LABELS[i]`."""
    code = np.zeros(scan.hu.shape, np.uint32, order="F")
    for label, mask in scan.lesions.items():
        code |= mask.astype(np.uint32) << np.uint32(DIAGNOSIS_LABELS.index(label))
    return code


def _write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    _write(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _write_csv(path: Path, columns, rows) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    _write(path, text.getvalue().encode())


def _write_tables(root: Path, split: str, patients: list[PhantomPatient], facts: list[dict]) -> None:
    dataset, name = root / "dataset", LONG_NAME[split]
    labels, reports, regions, disorders, metadata = [], [], [], [], []
    for patient, fact in zip(patients, facts, strict=True):
        volume = patient.name + ".nii.gz"
        sentences = region_sentences(patient)
        report = report_text(sentences)
        present = patient.labels
        labels.append([volume, *(present[label] for label in DIAGNOSIS_LABELS)])
        technique = f"Phantom CT, {patient.phase}, {patient.slice_mm:g} mm slices."
        reports.append([volume, "Not given.", technique, report, impression(patient)])
        regions.append([volume, "", report])
        regions += [[volume, region, " ".join(sentences[region])] for region in REGIONS]
        disorders.append([volume, ", ".join(label for label in DIAGNOSIS_LABELS if present[label]) or "No findings"])
        (columns, rows, slices), (sx, sy, sz) = fact["shape"], fact["spacing"]
        metadata.append(
            [
                volume,
                "DiffVP phantom",
                "synthetic thorax",
                MODEL_NAME[patient.scanner],
                patient.sex,
                f"{patient.age:03d}Y",
                round(sx * columns, 2),
                patient.kernel,
                "HFS",
                "[1, 0, 0, 0, 1, 0]",
                rows,
                columns,
                f"[{sx}, {sy}]",
                0,
                1,
                slices,
                sz,
                "",
            ]
        )
    _write_csv(
        dataset / "multi_abnormality_labels" / f"{split}_predicted_labels.csv",
        ["VolumeName", *DIAGNOSIS_LABELS],
        labels,
    )
    _write_csv(
        dataset / "radiology_text_reports" / f"{name}_reports.csv",
        ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"],
        reports,
    )
    _write_csv(dataset / "metadata" / f"{name}_metadata.csv", METADATA_COLUMNS, metadata)
    _write_csv(
        dataset / "radgenome_files" / f"{name}_region_report.csv", ["Volumename", "Anatomy", "Sentence"], regions
    )
    _write_csv(dataset / "radgenome_files" / f"{name}_case_disorders.csv", ["Volumename", "Disorders"], disorders)
