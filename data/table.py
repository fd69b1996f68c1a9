# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Your own scans: a table in their folder, or a Hugging Face dataset with a `Nifti` column.

A table is `metadata.csv` or `metadata.jsonl` in the folder of the scans (the convention of the folder builders of
`datasets`), or any .csv, .tsv or .jsonl file. Two columns are required:

    path (or file_name)   NIfTI, NRRD, MetaImage, a folder or .zip of DICOM slices, a multi-frame DICOM file;
                          relative to the table
    report

Optional columns:

    id            default: the path without its suffix
    patient_id    default: each row is a separate patient, so that a split may separate two scans of one patient
    scan_id       common to the reconstructions of one scan, which share a report; default: the id
    split         train, valid (validation, val, dev) or test
    normal        1 for a scan that may serve as normal reference, else 0
    Medical material, ..., Interlobular septal thickening    the 18 labels, 0 or 1: all of them or none
    abdomen, ..., others                                     the report by region
"""

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..folders_diffvp import HEAD, is_dicom
from ..labels_diffvp import DIAGNOSIS_LABELS
from .cases import (
    REGION_NAMES,
    SCAN_SUFFIXES,
    SPLITS,
    Case,
    DatasetError,
    Problem,
    Row,
    canonical_split,
    check_flag,
    check_included,
    check_kind,
    check_labels,
    check_markup,
    check_report,
    is_missing,
    plain_text,
    raise_problems,
    read_csv,
    read_json_lines,
    selection,
    shown,
    shown_path,
    volume_name,
)

TABLE_NAMES = ("metadata.csv", "metadata.jsonl")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
FILE_SUFFIXES = (*SCAN_SUFFIXES, ".dcm")  # of a file named as a scan; in a folder, a .dcm file usually is one slice
PATH_COLUMNS = ("path", "file_name")
# Names of the two classes of a label, in whichever order a `ClassLabel` has them.
CLASSES = (("0", "no", "false", "negative", "absent"), ("1", "yes", "true", "positive", "present"))
OPTIONAL_COLUMNS = ("id", "patient_id", "scan_id", "split", "normal")
KNOWN_COLUMNS = (*PATH_COLUMNS, "report", *OPTIONAL_COLUMNS, *DIAGNOSIS_LABELS, *REGION_NAMES)


def load_table(
    root: str | Path,
    split: str | None = None,
    *,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    labels: Sequence[str] = DIAGNOSIS_LABELS,
) -> list[Case]:
    """Load the cases of your own table, in its order.

    Args:
        root: the table, or the folder with `metadata.csv` or `metadata.jsonl`, either directly or by split
            (`train/metadata.csv`).
        split: split to load, by the column `split` or the folder; `None` for all rows.
        include, exclude: see [`load_ct_rate`].
        labels: columns of the findings, in the order of a case's labels. If they are a subset of `DIAGNOSIS_LABELS`
            and the table has all of these, cases have all of them.

    Raises:
        ValueError: the split is unknown.
        DatasetError: lists all problems with the table and its files.
    """
    split = None if split is None else canonical_split(split)
    problems: list[Problem] = []
    path, by_folder = _find_table(Path(root), split)
    check_columns = partial(_check_columns, path.name, labels=labels)
    rows = read_rows(path, problems, check_columns)
    if rows is None:
        raise DatasetError(problems)
    columns = {column for row in rows for column in row.values}
    labels = _label_columns(columns, labels)
    wanted = None if by_folder else split
    if wanted is not None and rows and "split" not in columns:
        expected = "a split in every row, or split=None and split_by_patient"
        problems.append(Problem(path.name, 1, "header", "column split missing", expected))
        wanted = None
    keep = selection(include, exclude)
    cases, ids, files = [], {}, {}
    for row in rows:
        here = _row_split(row, path.name, problems) if "split" in columns else split
        # Problems in rows of other splits are ignored.
        case = _row_case(row, path, columns, labels, keep, problems if wanted in (None, here) else [])
        if case is None:
            continue
        # Also checked across splits, where it would be a leak.
        for value, seen, name in ((case.name, ids, "id"), (case.volume, files, "path")):
            if value in seen:
                found = f"the same as in row {seen[value]}"
                problems.append(Problem(path.name, row.number, name, found, f"one row per {name}", case.name))
            seen.setdefault(value, row.number)
        if wanted in (None, here):
            cases.append(case)
    check_included(include, {case.name for case in cases}, path.name, problems)
    raise_problems(problems)
    return cases


def load_hub(name: str, split: str, *, streaming: bool = True, **options) -> Iterator[Case]:
    """Load the cases of a dataset with a `Nifti` column through `datasets`, from the Hub or a local folder.

    Args:
        name, options: arguments of `datasets.load_dataset` (`data_dir=`, `revision=`: pin one). For a local folder of
            NIfTI files with a `metadata.csv`, use "niftifolder" and `data_dir=`.
        split: name of the split in the dataset.
        streaming: fetch volumes one by one without storing them.

    Raises:
        DatasetError: `datasets` cannot load it, or [`hub_cases`] refuses it.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(name, split=split, streaming=streaming, **options)
    except (DatasetsError, FileNotFoundError, IndexError) as error:  # IndexError: a metadata table without rows
        missing = isinstance(error, FileNotFoundError)
        found = "missing or empty" if missing else f"refused by `datasets` ({type(error).__name__})"
        raise DatasetError([Problem(name, None, "dataset", found, "a dataset with at least one row")]) from error
    return hub_cases(dataset, name)


def hub_cases(dataset, source: str = "dataset") -> Iterator[Case]:
    """Yield the cases of a `datasets.Dataset` or `IterableDataset`, with the undecoded {"path", "bytes"} as `volume`.

    Columns are those of a table, with a `Nifti` column in place of the path. Without `id`, a row is named by its file.
    The values of a `ClassLabel` are its names; those of a label must tell which class is 1, such as "positive".

    Raises:
        DatasetError: for a `Dataset`, lists all problems with its texts before the first case; for a stream, the
            problems of each row when it is read.
    """
    from datasets import ClassLabel, Dataset, Nifti

    dataset = dataset.with_format(None)  # plain Python values instead of NumPy or torch
    columns = [name for name, feature in (dataset.features or {}).items() if isinstance(feature, Nifti)]
    if len(columns) != 1:
        raise DatasetError([Problem(source, None, "columns of type Nifti", f"{len(columns)}", "1, the scans")])
    [volume] = columns
    problems: list[Problem] = []
    texts = [name for name in dataset.features if name != volume]
    _check_columns(source, [*texts, "path"], problems)
    raise_problems(problems)
    features = dataset.features.items()
    classes = {name: _class_values(name, one.names) for name, one in features if isinstance(one, ClassLabel)}
    if isinstance(dataset, Dataset):
        for number, values in enumerate(dataset.select_columns(texts), start=1):
            _hub_case(Row(number, _with_class_values(values, classes)), None, source, problems)
    raise_problems(problems)
    seen: dict[str, int] = {}
    for number, values in enumerate(dataset.cast_column(volume, Nifti(decode=False)), start=1):
        others = {key: value for key, value in values.items() if key != volume}
        row = Row(number, _with_class_values(others, classes))
        case = _hub_case(row, values[volume] or {}, source, problems)
        if not case.name:
            problems.append(Problem(source, number, "id", "missing", "a column id, as the scan has no file name"))
        elif case.name in seen:
            found = f"the same as in row {seen[case.name]}"
            problems.append(Problem(source, number, "id", found, "one row per id", case.name))
        raise_problems(problems)
        seen[case.name] = number
        yield case


def _class_values(column: str, names: Sequence[str]) -> list[str | int]:
    """Return the values that the classes of a `ClassLabel` stand for: their names, or 0 and 1 in a column of these."""
    if column not in ("normal", *DIAGNOSIS_LABELS):
        return list(names)
    return [next((flag for flag, known in enumerate(CLASSES) if name.lower() in known), name) for name in names]


def _with_class_values(values: Mapping[str, Any], classes: Mapping[str, list[str | int]]) -> dict[str, object]:
    """Replace the numbers of `ClassLabel` columns by their values. `datasets` marks an unknown class by -1."""
    given = dict(values)
    for column, meanings in classes.items():
        number = values[column]
        given[column] = None if number is None or number < 0 else meanings[number]
    return given


def _find_table(root: Path, split: str | None) -> tuple[Path, bool]:
    """Return the table, and True if it is in the folder of the split. A table in the root covers all splits."""
    if root.is_file() and root.suffix.lower() in TABLE_SUFFIXES:
        return root, False
    for folder in (root, *(root / name for name in SPLITS.get(split, ()))):
        found = [folder / name for name in TABLE_NAMES if (folder / name).is_file()]
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise DatasetError([Problem(folder.name or ".", None, "table", names, f"only one of {names}")])
        if found:
            return found[0], folder != root
    expected = f"{' or '.join(TABLE_NAMES)}, or a file that ends in {', '.join(TABLE_SUFFIXES)}"
    raise DatasetError([Problem(root.name or ".", None, "table", "missing", expected)])


def _label_columns(columns: Collection[str], labels: Sequence[str]) -> Sequence[str]:
    everything = set(labels) <= set(DIAGNOSIS_LABELS) <= set(columns)
    return DIAGNOSIS_LABELS if everything else labels


def _check_columns(
    table: str, columns: Collection[str], problems: list[Problem], labels: Sequence[str] = DIAGNOSIS_LABELS
) -> None:
    if not any(column in columns for column in PATH_COLUMNS):
        problems.append(
            Problem(table, 1, "header", "column path missing", "path or file_name, with the paths of the scans")
        )
    if "report" not in columns:
        problems.append(Problem(table, 1, "header", "column report missing", "report, with the text of each report"))
    absent = [label for label in labels if label not in columns]
    if 0 < len(absent) < len(labels):
        expected = f"all {len(labels)} labels or none"
        problems.append(Problem(table, 1, "header", f"labels missing: {', '.join(absent)}", expected))
    for column in columns:
        # A typo is dangerous: with "PatientID" for "patient_id", each scan would be a separate patient.
        close = difflib.get_close_matches(str(column).lower(), KNOWN_COLUMNS, n=1, cutoff=0.8)
        if column not in (*KNOWN_COLUMNS, *labels) and close and close[0] not in columns:
            problems.append(
                Problem(table, 1, "header", f"column {shown(column)}", f"{close[0]}, or a less similar name")
            )


def read_rows(
    path: Path, problems: list[Problem], check_columns: Callable[[list[str], list[Problem]], None] | None = None
) -> list[Row] | None:
    """Read the rows of a table of any kind as [`read_csv`] does; those of JSON lines may lack columns."""
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return read_csv(path, (), problems, check_columns=check_columns)
    rows = read_json_lines(path, problems)
    before = len(problems)
    if rows and check_columns is not None:
        check_columns(list(dict.fromkeys(key for row in rows for key in row.values)), problems)
    return rows if len(problems) == before else None


def _row_split(row: Row, table: str, problems: list[Problem]) -> str | None:
    value = str(row.values.get("split") or "").strip()
    try:
        return canonical_split(value)
    except ValueError:
        expected = ", ".join(name for names in SPLITS.values() for name in names)
        problems.append(Problem(table, row.number, "split", shown(value), f"one of {expected}"))
        return None


def _row_case(
    row: Row,
    table: Path,
    columns: Collection[str],
    labels: Sequence[str],
    keep: Callable[[str], bool],
    problems: list[Problem],
) -> Case | None:
    """Return the case of a row, or `None` if it is not selected or has no path."""
    column = next(column for column in PATH_COLUMNS if column in columns)
    value = row.values.get(column)
    if is_missing(value):
        problems.append(Problem(table.name, row.number, column, "empty", "the path of a scan"))
        return None
    wrong: list[Problem] = []
    if not check_kind(value, table.name, row.number, column, "", wrong) or not _check_id(row, table.name, wrong):
        problems += wrong
        return None
    volume = table.parent / str(value).strip()
    default = Path(str(value).strip())
    default = without_suffix(default.name if default.is_absolute() else default.as_posix())
    name = default if is_missing(row.values.get("id")) else volume_name(row.values["id"])
    if not keep(name):
        return None
    # os.path, since Path raises an error for text that is too long, such as a report in the wrong column.
    folder = os.path.isdir(volume)
    if not os.path.exists(volume):
        found = f"missing ({shown_path(volume, table.parent)})"
        problems.append(Problem(table.name, row.number, column, found, "an existing file or folder", name))
    elif not folder and not is_scan_file(volume):
        expected = f"a folder of DICOM slices, a multi-frame DICOM file or one of {', '.join(SCAN_SUFFIXES)}"
        problems.append(Problem(table.name, row.number, column, shown_path(volume, table.parent), expected, name))
    elif folder and not any(volume.iterdir()):
        problems.append(Problem(table.name, row.number, column, "an empty folder", "DICOM slices in it", name))
    return _text_case(row, name, volume, table.name, columns, problems, labels)


def _check_id(row: Row, table: str, problems: list[Problem]) -> bool:
    """True if the id of a row is a text, a number or missing; else add a problem."""
    return check_kind(row.values.get("id"), table, row.number, "id", "", problems, number=True)


def _hub_case(row: Row, value: Mapping | None, source: str, problems: list[Problem]) -> Case:
    """Return the case of a row; `None` for its scan checks only the texts."""
    path = None if value is None else value.get("path")
    if path is not None:
        # `datasets` writes "gzip://scan.nii::folder/scan.nii.gz" for files that it can open itself.
        path = path.split("::")[-1]
    default = without_suffix(Path(path or "").name)
    given = _check_id(row, source, problems) and not is_missing(row.values.get("id"))
    name = volume_name(row.values["id"]) if given else default
    volume = {"path": path, "bytes": None if value is None else value.get("bytes")}
    if value is not None and volume["bytes"] is None:
        if path is None:
            problems.append(Problem(source, row.number, "scan", "missing", "the file of a scan", name))
        elif "://" not in path and not os.path.isfile(path):
            found = f"missing ({shown_path(Path(path), Path.cwd())})"
            problems.append(Problem(source, row.number, "scan", found, "an existing file", name))
    return _text_case(row, name, volume, source, row.values, problems)


def _text_case(
    row: Row,
    name: str,
    volume: Path | dict,
    table: str,
    columns: Collection[str],
    problems: list[Problem],
    label_columns: Sequence[str] = DIAGNOSIS_LABELS,
) -> Case:
    """Make a case from all columns except the path."""
    values = row.values
    ids = {}
    for column in ("patient_id", "scan_id"):
        ids[column] = name
        if column in columns:
            value = values.get(column)
            ids[column] = "" if is_missing(value) else str(value).strip()
            if check_kind(value, table, row.number, column, name, problems, number=True) and not ids[column]:
                problems.append(Problem(table, row.number, column, "empty", "an id in every row or no column", name))
    labels = normal = None
    if label_columns[0] in columns:
        labels = check_labels(values, table, row.number, name, problems, label_columns)
    if "normal" in columns:
        normal = bool(check_flag(values.get("normal"), table, row.number, "normal", name, problems))
    regions = {}
    for region in REGION_NAMES:
        value = values.get(region)
        if check_kind(value, table, row.number, region, name, problems) and not is_missing(value):
            regions[region] = plain_text(value)
            check_markup(regions[region], table, row.number, region, name, problems)
    report = check_report(values.get("report"), table, row.number, "report", name, problems)
    return Case(
        name, ids["patient_id"], ids["scan_id"], volume, report, labels, regions, normal=normal, row=row.number
    )


def is_scan_file(path: Path) -> bool:
    """True if a file is a scan by its suffix, or a DICOM file, which may have any name."""
    if path.name.lower().endswith(FILE_SUFFIXES):
        return True
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(HEAD))
    except OSError:
        return False


def without_suffix(name: str) -> str:
    """Remove the suffix of a scan file from a name."""
    suffix = next((suffix for suffix in FILE_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]
