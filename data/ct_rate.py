# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""CT-RATE in the layout of the Hub (`ibrahimhamamci/CT-RATE`), versions 1 and 2.

    dataset/train_fixed/train_1/train_1_a/train_1_a_1.nii.gz       version 2: Hounsfield units and a valid header
    dataset/train/train_1/train_1_a/train_1_a_1.nii.gz             version 1: raw values with a blank header
    dataset/multi_abnormality_labels/{train,valid}_predicted_labels.csv
    dataset/radiology_text_reports/{train,validation}_reports.csv
    dataset/metadata/{train,validation}_metadata.csv, no_chest_{train,valid}.txt

A name is split_patient_scan_reconstruction. The reconstructions of a scan share its report and labels.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ..labels_diffvp import DIAGNOSIS_LABELS
from ..reading_diffvp import CTMetadata
from ..volume_diffvp import CTInputError
from .cases import (
    SPLITS,
    Case,
    Problem,
    Row,
    by_name,
    canonical_split,
    check_included,
    check_labels,
    check_report,
    check_rows,
    raise_problems,
    read_csv,
    read_ids,
    row_numbers,
    selection,
    shown,
    shown_path,
    volume_name,
)

# The second, older name is used in the report tables of CT2Rep and CT-CLIP.
NAME_COLUMNS = ("VolumeName", "AccessionNo")
REPORT_COLUMN = "Findings_EN"
_NAME = re.compile(r"(train|valid)_([0-9]+)_([a-z]+)_([0-9]+)")


def load_ct_rate(
    root: str | Path, split: str, *, include: Collection[str] | None = None, exclude: Collection[str] = ()
) -> list[Case]:
    """Load all chest scans of a split, in the order of the label table.

    Version 2 is used if its folder exists. In version 1, each case has the `metadata` needed to read its volume.

    Args:
        root: folder that contains `dataset/`.
        split: "train" or "valid" ("validation").
        include: volumes to load, for a part of the dataset; `None` for all.
        exclude: volumes to leave out, with all their problems.

    Raises:
        ValueError: the split is unknown.
        DatasetError: lists all problems with tables and volumes.
    """
    split = canonical_split(split, ("train", "valid"))
    problems: list[Problem] = []
    cases = read_cases(Path(root), split, include, exclude, problems)
    raise_problems(problems)
    return cases


def read_cases(
    root: Path, split: str, include: Collection[str] | None, exclude: Collection[str], problems: list[Problem]
) -> list[Case]:
    """Read the cases of [`load_ct_rate`]; incomplete if there are problems."""
    dataset = root / "dataset"
    keep = selection(include, {*exclude, *_no_chest(dataset, split)})
    label_path, label_rows = read_label_rows(dataset, split, keep, problems)
    report_path, report_rows = _read_report_rows(dataset, split, keep, problems)
    listed, lists = row_numbers(label_rows), label_path.name
    if label_rows is None:  # still report the problems of the other tables
        listed, lists = row_numbers(report_rows), report_path.name
    check_rows(row_numbers(report_rows), label_rows, label_path.name, report_path.name, problems)
    check_included(include, listed, lists, problems)
    names = check_names(listed, lists, split, problems)
    labels = {
        name: check_labels(row.values, label_path.name, row.number, name, problems)
        for name, row in (label_rows or {}).items()
    }
    reports = {}
    for name in check_rows(listed, report_rows, report_path.name, lists, problems):
        row = report_rows[name]
        text = row.values[REPORT_COLUMN]
        reports[name] = check_report(text, report_path.name, row.number, REPORT_COLUMN, name, problems)
    folder = dataset / f"{split}_fixed"
    if not folder.is_dir():
        folder = dataset / split
    volumes, metadata = {}, {}
    if folder.is_dir():
        volumes = {name: folder.joinpath(*patient_and_scan(name), f"{name}.nii.gz") for name in names}
        check_volumes(volumes, root, lists, listed, problems)
        if folder.name == split:  # version 1
            metadata = _read_metadata(dataset, split, {name: listed[name] for name in names}, lists, keep, problems)
    else:
        expected = f"{split}_fixed/ of version 2 or {split}/ of version 1"
        problems.append(Problem("dataset", None, "folder of volumes", "missing", expected))
    return [
        Case(
            name,
            *patient_and_scan(name),
            volumes.get(name, folder),
            reports.get(name, ""),
            labels.get(name),
            row=listed[name],
            metadata=metadata.get(name),
        )
        for name in names
    ]


def read_label_rows(
    dataset: Path, split: str, keep: Callable[[str], bool], problems: list[Problem]
) -> tuple[Path, dict[str, Row] | None]:
    """Read CT-RATE's label table: return its path, and its rows by volume name."""
    path = table_path(dataset / "multi_abnormality_labels", split, "predicted_labels.csv", "valid")

    def check_columns(columns: list[str], problems: list[Problem]) -> None:
        for column in columns:
            if column not in ("VolumeName", *DIAGNOSIS_LABELS):
                problems.append(
                    Problem(path.name, 1, "header", f"unknown label {shown(column)}", "the 18 labels of CT-RATE")
                )

    rows = read_csv(path, ["VolumeName", *DIAGNOSIS_LABELS], problems, check_columns=check_columns)
    return path, by_name(rows, "VolumeName", path.name, keep, problems)


def table_path(folder: Path, split: str, ending: str, documented: str) -> Path:
    """Return the path of a table of a split. Its name has "valid" or "validation"; an existing file is preferred.

    Args:
        documented: name of the second split in the dataset's documentation of this table.
    """
    names = (split,) if split == "train" else (documented, *(name for name in SPLITS[split] if name != documented))
    paths = [folder / f"{name}_{ending}" for name in names]
    return next((path for path in paths if path.is_file()), paths[0])


def patient_and_scan(name: str) -> tuple[str, str]:
    """Split a name into patient and scan: train_1_a_1 -> (train_1, train_1_a)."""
    scan = name.rsplit("_", 1)[0]
    return scan.rsplit("_", 1)[0], scan


def check_names(listed: Mapping[str, int], table: str, split: str, problems: list[Problem]) -> list[str]:
    """Return the names in the form of CT-RATE that belong to the split, and add a problem for each other name."""
    good = []
    for name, row in listed.items():
        match = _NAME.fullmatch(name)
        if match and match[1] == split:
            good.append(name)
        else:
            expected = f"{split}_patient_scan_reconstruction, such as {split}_1_a_1.nii.gz"
            problems.append(Problem(table, row, "VolumeName", shown(name), expected))
    return good


def _no_chest(dataset: Path, split: str) -> set[str]:
    """Read the names of volumes that the dataset lists as scans of other body parts."""
    path = dataset / "metadata" / f"no_chest_{split}.txt"
    return {volume_name(line.split("/")[-1]) for line in read_ids(path)} if path.is_file() else set()


def _read_report_rows(
    dataset: Path, split: str, keep: Callable[[str], bool], problems: list[Problem]
) -> tuple[Path, dict[str, Row] | None]:
    """Read the table of reports: return its path, and its rows by volume name from either name column."""
    path = table_path(dataset / "radiology_text_reports", split, "reports.csv", "validation")

    def check_columns(columns: list[str], problems: list[Problem]) -> None:
        if not any(column in columns for column in NAME_COLUMNS):
            problems.append(
                Problem(path.name, 1, "header", f"column {NAME_COLUMNS[0]} missing", "the names of the volumes")
            )

    rows = read_csv(path, [REPORT_COLUMN], problems, check_columns=check_columns)
    column = next((column for column in NAME_COLUMNS if rows and column in rows[0].values), NAME_COLUMNS[0])
    return path, by_name(rows, column, path.name, keep, problems)


def check_volumes(
    paths: dict[str, Path], root: Path, table: str, listed: Mapping[str, int], problems: list[Problem]
) -> None:
    """Add a problem for each missing file."""
    for name, path in paths.items():
        if not path.is_file():
            problems.append(Problem(table, listed[name], "volume", "missing", shown_path(path, root), name))


def _read_metadata(
    dataset: Path,
    split: str,
    listed: Mapping[str, int],
    lists: str,
    keep: Callable[[str], bool],
    problems: list[Problem],
) -> dict[str, CTMetadata]:
    path = table_path(dataset / "metadata", split, "metadata.csv", "validation")
    rows = by_name(read_csv(path, ["VolumeName"], problems), "VolumeName", path.name, keep, problems)
    metadata = {}
    for name in check_rows(listed, rows, path.name, lists, problems):
        try:
            metadata[name] = CTMetadata.from_ct_rate(rows[name].values)
        except CTInputError as error:
            found = str(error.found)[:60]
            problems.append(Problem(path.name, rows[name].number, error.field, found, error.expected, name))
    return metadata
