# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Small datasets in their original layouts, with empty files in place of the volumes."""

import csv
import json
from pathlib import Path

from diffvp.labels_diffvp import DIAGNOSIS_LABELS

TRAIN = ["train_1_a_1", "train_1_a_2", "train_1_b_1", "train_2_a_1"]
METADATA = {
    "RescaleSlope": "1.0",
    "RescaleIntercept": "-8192.0",
    "XYSpacing": "[1.5, 1.25]",
    "ZSpacing": "2.5",
    "ImageOrientationPatient": "[1, 0, 0, 0, 1, 0]",
    "PatientPosition": "HFS",
}


def write_csv(path: Path, rows: list[dict], columns=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def touch(path: Path) -> Path:
    """Create an empty file; the loaders only check that it exists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def label_row(name: str, *findings: str) -> dict:
    return {"VolumeName": name + ".nii.gz"} | {label: int(label in findings) for label in DIAGNOSIS_LABELS}


def write_ct_rate(root: Path, split="train", names=TRAIN, folder="train_fixed", long="train") -> Path:
    """Write version 2 with the tables as on the Hub: one scan has two reconstructions, the last volume is a brain."""
    dataset = root / "dataset"
    for name in names:
        scan = name.rsplit("_", 1)[0]
        touch(dataset / folder / scan.rsplit("_", 1)[0] / scan / f"{name}.nii.gz")
    write_csv(
        dataset / f"multi_abnormality_labels/{split}_predicted_labels.csv",
        [label_row(name, *(["Emphysema"] if "_b_" in name else [])) for name in names],
    )
    write_csv(
        dataset / f"radiology_text_reports/{long}_reports.csv",
        [
            {
                "VolumeName": f"{name}.nii.gz",
                "ClinicalInformation_EN": "Not given.",
                "Technique_EN": "",
                "Findings_EN": f"Report of {name[:-2]}.",
                "Impressions_EN": "",
            }
            for name in names
        ],
    )
    (dataset / "metadata").mkdir(exist_ok=True)
    (dataset / f"metadata/no_chest_{split}.txt").write_text(f"dataset/train/train_2/train_2_a/{names[-1]}.nii.gz\n")
    write_csv(
        dataset / f"metadata/{long}_metadata.csv",
        [{"VolumeName": f"{name}.nii.gz", "Manufacturer": "Philips", **METADATA} for name in names],
    )
    return root


def write_radgenome(root: Path, split="train") -> Path:
    dataset, long = root / "dataset", {"train": "train", "valid": "validation"}[split]
    rows, disorders = [], []
    for name, findings in ((f"{split}_1_a_1", "Emphysema"), (f"{split}_2_b_1", "no findings")):
        scan = name.rsplit("_", 1)[0]
        patient, letter = scan.rsplit("_", 1)
        touch(dataset / f"{split}_preprocessed" / patient / f"{patient}{letter}" / f"{name}.nii.gz")
        anatomies = {
            "": f"Whole report of {name}.",
            "lung": "Emphysema in the right lung.",
            "lung/lung/right lung": "Emphysema in the right lung.",
            "lung/lung/left lung": "Clear left lung.",
            "trachea and bronchie/trachea": "Open.",
            "others": "No more.",
            "heart": "",
        }
        rows += [{"Volumename": f"{name}.nii.gz", "Anatomy": a, "Sentence": s} for a, s in anatomies.items()]
        disorders.append({"Volumename": f"{name}.nii.gz", "Disorders": findings})
    write_csv(dataset / f"radgenome_files/{long}_region_report.csv", rows)
    write_csv(dataset / f"radgenome_files/{long}_case_disorders.csv", disorders)
    return root


def write_ctrg(root: Path, content: dict) -> Path:
    (root / "annotation.json").write_text(json.dumps(content), encoding="utf-8")
    for items in content.values():
        for item in items:
            if "id" in item:
                touch(root / f"CTRG-Chest-548K_volume/{item['id']}.nii.gz")
    return root
