# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""RadGenome-ChestCT in the layout of the Hub. `phantom_cohort.py` writes and reads its tables, too.

    dataset/train_preprocessed/train_1/train_1a/train_1_a_1.nii.gz          no underscore in the scan's folder
    dataset/radgenome_files/{train,validation}_region_report.csv            Volumename, Anatomy, Sentence
    dataset/radgenome_files/{train,validation}_case_disorders.csv           Volumename, Disorders
    dataset/multi_abnormality_labels/{train,valid}_predicted_labels.csv     CT-RATE's; optional

It contains the first reconstruction of each scan of CT-RATE, resampled. In the region reports, the row without an
anatomy has the whole report. Anatomies are nested ("lung/lung/right lung"); the first is one of the ten regions or
"others".
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from .cases import (
    REGION_NAMES,
    Case,
    Problem,
    Row,
    by_name,
    canonical_split,
    check_included,
    check_labels,
    check_markup,
    check_report,
    check_rows,
    is_missing,
    plain_text,
    raise_problems,
    read_csv,
    selection,
    shown,
    volume_name,
)
from .ct_rate import (
    check_names,
    check_volumes,
    patient_and_scan,
    read_label_rows,
    table_path,
)

# Names of the row without an anatomy in published code.
WHOLE_REPORT = ("nan", "whole", "whole scan")


def load_radgenome(
    root: str | Path, split: str, *, include: Collection[str] | None = None, exclude: Collection[str] = ()
) -> list[Case]:
    """Load all volumes of a split, in the order of the region reports. Labels come from CT-RATE's table, if it exists.

    Arguments and errors are those of [`load_ct_rate`].
    """
    split = canonical_split(split, ("train", "valid"))
    problems: list[Problem] = []
    root = Path(root)
    dataset, keep = root / "dataset", selection(include, exclude)
    region_path = region_table_path(dataset, split)
    listed, whole, regions = read_regions(region_path, keep, problems)
    names = check_names(listed, region_path.name, split, problems)
    check_included(include, listed, region_path.name, problems)
    reports = {}
    for name, first in listed.items():
        row = whole.get(name)
        if row is None:
            expected = "a row with an empty Anatomy"
            problems.append(Problem(region_path.name, first, "rows", "no whole report", expected, name))
        else:
            text = row.values["Sentence"]
            reports[name] = check_report(text, region_path.name, row.number, "Sentence", name, problems)
    disorders = read_disorders(dataset, split, listed, region_path.name, keep, problems)
    labels = {}
    if table_path(dataset / "multi_abnormality_labels", split, "predicted_labels.csv", "valid").is_file():
        label_path, label_rows = read_label_rows(dataset, split, keep, problems)
        for name in check_rows(listed, label_rows, label_path.name, region_path.name, problems):
            row = label_rows[name]
            labels[name] = check_labels(row.values, label_path.name, row.number, name, problems)
    volumes = {}
    for name in names:
        patient, scan = patient_and_scan(name)
        folder = patient + scan.rsplit("_", 1)[1]
        volumes[name] = dataset / f"{split}_preprocessed" / patient / folder / f"{name}.nii.gz"
    check_volumes(volumes, root, region_path.name, listed, problems)
    raise_problems(problems)
    return [
        Case(
            name,
            *patient_and_scan(name),
            volumes[name],
            reports[name],
            labels=labels.get(name),
            region_sentences=regions.get(name, {}),
            disorders=disorders[name],
            row=whole[name].number,
        )
        for name in names
    ]


def region_table_path(dataset: Path, split: str) -> Path:
    return table_path(dataset / "radgenome_files", split, "region_report.csv", "validation")


def read_regions(
    path: Path, keep: Callable[[str], bool], problems: list[Problem]
) -> tuple[dict[str, int], dict[str, Row], dict[str, dict[str, str]]]:
    """Read, for each volume, the number of its first row, the row of its whole report, and the text of each region."""
    first: dict[str, int] = {}
    whole: dict[str, Row] = {}
    regions: dict[str, dict[str, str]] = {}
    for row in read_csv(path, ["Volumename", "Anatomy", "Sentence"], problems) or ():
        name, anatomy = volume_name(row.values["Volumename"]), str(row.values["Anatomy"]).strip()
        if not name:
            problems.append(Problem(path.name, row.number, "Volumename", "empty", "the name of a volume"))
        if not name or not keep(name):
            continue
        first.setdefault(name, row.number)
        if not anatomy or anatomy.lower() in WHOLE_REPORT:
            before = whole.setdefault(name, row)
            texts = before.values["Sentence"], row.values["Sentence"]
            if texts[0] in texts[1]:  # a second such row may repeat the report or one of its sentences
                whole[name] = row
            elif texts[1] not in texts[0]:
                found = f"empty, as in row {before.number}, but with another text"
                problems.append(Problem(path.name, row.number, "Anatomy", found, "one whole report per volume", name))
            continue
        region, sentence = anatomy.split("/")[0].strip(), plain_text(row.values["Sentence"])
        if region not in REGION_NAMES:
            expected = f"one of {', '.join(REGION_NAMES)}"
            problems.append(Problem(path.name, row.number, "Anatomy", shown(anatomy), expected, name))
        elif not is_missing(sentence):
            check_markup(sentence, path.name, row.number, "Sentence", name, problems)
            texts = regions.setdefault(name, {})
            texts[region] = _joined(texts[region], sentence) if region in texts else sentence
    return first, whole, regions


def _joined(text: str, sentence: str) -> str:
    """Join two texts of a region, unless one of them (from a nested anatomy) is part of the other."""
    if sentence in text:
        return text
    return sentence if text in sentence else f"{text} {sentence}"


def read_disorders(
    dataset: Path,
    split: str,
    listed: Mapping[str, int],
    lists: str,
    keep: Callable[[str], bool],
    problems: list[Problem],
) -> dict[str, str]:
    """Read the disorders of the listed volumes."""
    path = table_path(dataset / "radgenome_files", split, "case_disorders.csv", "validation")
    rows = by_name(read_csv(path, ["Volumename", "Disorders"], problems), "Volumename", path.name, keep, problems)
    disorders = {}
    for name in check_rows(listed, rows, path.name, lists, problems):
        value = rows[name].values["Disorders"]
        if is_missing(value):  # must not count as a normal scan
            expected = "RadGenome's summary, such as 'no findings'"
            problems.append(Problem(path.name, rows[name].number, "Disorders", "empty", expected, name))
        disorders[name] = str(value)
    return disorders
