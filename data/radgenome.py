# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Reader of the CT-RATE v2 / RadGenome-ChestCT layout, as far as the phantom cohort needs it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from diffvp.configuration_diffvp import DIAGNOSIS_LABELS, REGIONS

LONG_NAME = {"train": "train", "valid": "validation"}
NO_FINDINGS = "No findings"


class DatasetLayoutError(ValueError):
    """A table or volume of the dataset is missing or does not have the documented form."""


@dataclass(frozen=True)
class Case:
    """One scan with its report.

    `labels` is int8 (18,), in the order of `DIAGNOSIS_LABELS`; `region_sentences` maps a region to its text;
    `disorders` is RadGenome's summary ("No findings" for a normal scan).
    """

    name: str
    patient_id: str
    volume: Path
    report: str
    labels: np.ndarray
    region_sentences: dict[str, str] = field(default_factory=dict)
    disorders: str = ""


def read_table(path: Path, required: Iterable[str]) -> list[dict[str, str]]:
    """Rows of a CSV file; raises `DatasetLayoutError` if the file or a required column is missing."""
    if not path.is_file():
        raise DatasetLayoutError(f"{path}: no such file; expected a table of the CT-RATE / RadGenome layout")
    with path.open(newline="", encoding="utf-8") as handle:
        reader = csv.DictReader(handle)
        found = reader.fieldnames or []
        missing = [column for column in required if column not in found]
        if missing:
            raise DatasetLayoutError(f"{path}: missing column(s) {missing}; found {found}")
        return list(reader)


def load_cases(root: str | Path, split: str) -> list[Case]:
    """All cases of a split ("train" or "valid") in the order of the label table.

    Raises:
        ValueError: If the split is unknown.
        DatasetLayoutError: If a table, a column, a volume or a case's row is missing, or a label is not 0 or 1.
    """
    if split not in LONG_NAME:
        raise ValueError(f"unknown split {split!r}: expected one of {sorted(LONG_NAME)}")
    dataset, long_name = Path(root) / "dataset", LONG_NAME[split]
    label_path = dataset / "multi_abnormality_labels" / f"{split}_predicted_labels.csv"
    report_path = dataset / "radiology_text_reports" / f"{long_name}_reports.csv"
    region_path = dataset / "radgenome_files" / f"{long_name}_region_report.csv"
    disorder_path = dataset / "radgenome_files" / f"{long_name}_case_disorders.csv"

    rows = read_table(label_path, ["VolumeName", *DIAGNOSIS_LABELS])
    reports = {row["VolumeName"]: row["Findings_EN"] for row in read_table(report_path, ["VolumeName", "Findings_EN"])}
    regions: dict[str, dict[str, str]] = {}
    for row in read_table(region_path, ["Volumename", "Anatomy", "Sentence"]):
        if not row["Anatomy"]:  # the whole report
            continue
        # RadGenome nests regions ("lung/right lung"): the first name is one of the ten, or "others".
        region = row["Anatomy"].split("/")[0]
        if region not in (*REGIONS, "others"):
            raise DatasetLayoutError(
                f"{region_path}: unknown region {row['Anatomy']!r} of {row['Volumename']}; "
                f"expected one of {REGIONS} or 'others'"
            )
        texts = regions.setdefault(row["Volumename"], {})
        texts[region] = f"{texts[region]} {row['Sentence']}" if region in texts else row["Sentence"]
    disorders = {row["Volumename"]: row["Disorders"] for row in read_table(disorder_path, ["Volumename", "Disorders"])}

    unknown = [column for column in (rows[0] if rows else {}) if column not in ("VolumeName", *DIAGNOSIS_LABELS)]
    if unknown:
        raise DatasetLayoutError(f"{label_path}: unknown label column(s) {unknown}; expected the 18 of CT-RATE")
    cases = []
    for row in rows:
        volume_name = row["VolumeName"]
        for table, path in ((reports, report_path), (disorders, disorder_path)):
            if volume_name not in table:
                raise DatasetLayoutError(f"{path}: no row for {volume_name}, which {label_path.name} lists")
        name = volume_name.removesuffix(".nii.gz")
        parts = name.split("_")
        if len(parts) != 4:
            raise DatasetLayoutError(f"{label_path}: VolumeName {volume_name!r} is not split_patient_scan_series")
        patient, scan = "_".join(parts[:2]), "_".join(parts[:3])
        volume = dataset / f"{split}_fixed" / patient / scan / volume_name
        if not volume.is_file():
            raise DatasetLayoutError(f"{volume}: no such volume, but {label_path.name} lists {volume_name}")
        values = [row[label] for label in DIAGNOSIS_LABELS]
        bad = {label: value for label, value in zip(DIAGNOSIS_LABELS, values, strict=True) if value not in ("0", "1")}
        if bad:
            raise DatasetLayoutError(f"{label_path}: labels of {volume_name} must be 0 or 1, found {bad}")
        cases.append(
            Case(
                name,
                patient,
                volume,
                reports[volume_name],
                np.array(values).astype(np.int8),
                regions.get(volume_name, {}),
                disorders[volume_name],
            )
        )
    return cases


def normal_pool(cases: Iterable[Case]) -> list[Case]:
    """The normal scans among the cases of one split: no label set and RadGenome's disorders say "No findings"."""
    return [case for case in cases if not case.labels.any() and case.disorders == NO_FINDINGS]
