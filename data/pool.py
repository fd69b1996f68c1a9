# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Pool of normal references of a split.

A scan is normal if all 18 labels are 0 and its summary, if the dataset has one, is "no findings". The paper's pools
(1,787 training scans, 124 validation scans) were "selected by report", without further detail. By labels only, 2,731
of CT-RATE's 24,128 training scans and 181 of its 1,564 validation scans are normal (5,226 and 346 volumes with all
reconstructions). A dataset without labels names its normal scans in a list of ids or in the column `normal` of its
table.
"""

import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

import nibabel as nib

from ..volume_diffvp import MAX_HU_MINIMUM
from .cases import Case, DatasetError, Problem, first_reconstructions, raise_problems, read_ids, shown, volume_name
from .phantom_report import labels_from_report
from .scans import listed_path

NO_FINDINGS = "no findings"  # lower case in the files of RadGenome
RULE = 'all 18 labels 0, and the disorders "no findings" where there are any'
SAMPLE = 200  # number of cases whose headers define the usual grid of a dataset
# Errors of nibabel and SimpleITK (RuntimeError) for unreadable files.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)
FAR = 2.0  # factor from the median spacing or matrix, in either direction, that marks another kind of scan


@dataclass(frozen=True)
class Pool:
    """Normal references of a split.

    Attributes:
        cases: the members, in the order of the split's cases.
        rule: how the members were chosen.
        counts: see [`count_normal`].
        warnings: points to check before using the pool; see [`pool_warnings`].
    """

    cases: list[Case]
    rule: str
    counts: dict[str, dict[str, int | None]]
    warnings: list[str]


def is_normal(case: Case) -> bool:
    """True if a labelled case is normal by the rule."""
    return _no_label(case) and (not case.disorders or _no_disorder(case))


def normal_pool(cases: Sequence[Case]) -> list[Case]:
    """Return the normal cases among those with labels, with all reconstructions."""
    return [case for case in cases if is_normal(case)]


def build_pool(cases: Sequence[Case], *, layout: str = "", ids: Sequence[str] | None = None) -> Pool:
    """
    Build the pool of a split, with one volume per scan if chosen by the rule.

    Args:
        cases: all cases of the split, and only these.
        layout: as in [`load_dataset_cases`]; for "phantom", the warnings also consider the reports.
        ids: ids of the normal scans, if chosen beforehand.

    Raises:
        DatasetError: the dataset does not tell which scans are normal, none is, or an id is not in this split.
    """
    if ids is not None:
        members, rule = named_cases(ids, cases), "a list of ids"
    elif (found := pool_by_rule(cases)) is not None:
        members, rule = first_reconstructions(found[0]), found[1]
    else:
        expected = (
            "the 18 labels, a column `normal` in the table, a list of ids of normal scans by --ids, or --read-reports "
            "to let rules read the reports"
        )
        raise DatasetError([Problem("dataset", None, "normal scans", "cannot tell which they are", expected)])
    if not members:
        raise DatasetError([Problem("dataset", None, "normal scans", f"none by {rule}", "at least one normal scan")])
    return Pool(members, rule, count_normal(cases), pool_warnings(members, cases, layout))


def pool_by_rule(cases: Sequence[Case]) -> tuple[list[Case], str] | None:
    """Return the normal cases with all reconstructions, and the rule; `None` if the dataset does not tell them."""
    if any(case.normal is not None for case in cases):
        return [case for case in cases if case.normal], "the column normal of the table"
    if cases and all(case.labels is not None for case in cases):
        return normal_pool(cases), RULE
    return None


def load_pool(path: str | Path, cases: Sequence[Case]) -> list[Case]:
    """Load the members of a pool from a file of ids (see [`read_ids`]), such as [`write_pool`] writes.

    Args:
        cases: cases of the pool's split.

    Raises:
        DatasetError: an id is not among `cases`, or is listed twice.
    """
    return named_cases(read_ids(path), cases, Path(path).name)


def write_pool(path: Path, cases: Sequence[Case]) -> None:
    """
    Write a pool as a text file with the id and the path of a case on each line.

    Training reads the ids, so that a dataset may move; `diffvp batch --reference` reads the paths.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{case.name}\t{listed_path(cast(Path, case.volume), path)}\n" for case in cases]
    path.write_text("".join(lines), encoding="utf-8")


def named_cases(ids: Sequence[str], cases: Sequence[Case], source: str = "list of ids") -> list[Case]:
    """Return the named cases in the order of `cases`. Raises the errors of [`load_pool`]."""
    known, problems, seen = {case.name for case in cases}, [], {}
    for number, name in enumerate(map(volume_name, ids), start=1):
        if name in seen:
            problems.append(Problem(source, number, "id", f"the same as in row {seen[name]}", "each id once", name))
        elif name not in known:
            problems.append(Problem(source, number, "id", f"{shown(name)}, not of this split", "a case of the split"))
        seen.setdefault(name, number)
    raise_problems(problems)
    return [case for case in cases if case.name in seen]


def other_scans(case: Case, pool: Sequence[Case]) -> list[str]:
    """Return the names of possible references of a case: members of the pool from other scans."""
    return [member.name for member in pool if member.scan_id != case.scan_id]


def count_normal(cases: Sequence[Case]) -> dict[str, dict[str, int | None]]:
    """
    Count "volumes" and "scans": "all", those with "all-zero labels", those with the disorders "no findings", and
    "both". Counts are `None` if the dataset has no labels or no disorders.
    """
    counts = {}
    for kind, counted in (("volumes", list(cases)), ("scans", first_reconstructions(cases))):
        labels = all(case.labels is not None for case in counted)
        disorders = any(case.disorders for case in counted)
        counts[kind] = {
            "all": len(counted),
            "all-zero labels": sum(map(_no_label, counted)) if labels else None,
            "no findings": sum(map(_no_disorder, counted)) if disorders else None,
            "both": sum(_no_label(case) and _no_disorder(case) for case in counted) if labels and disorders else None,
        }
    return counts


def _no_label(case: Case) -> bool:
    return case.labels is not None and not case.labels.any()


def _no_disorder(case: Case) -> bool:
    # Compare the whole field, since "no findings except ..." is a finding.
    return case.disorders.strip().lower() == NO_FINDINGS


# Guards -------------------------------------------------------------------------------------------------------------


def pool_warnings(members: Sequence[Case], cases: Sequence[Case], layout: str = "") -> list[str]:
    """Return warnings about abnormal members, members from another kind of scanner, and too few members.

    In the paper's ablation (F.2), one abnormal or foreign reference in ten costs more than DiffVP gains.
    """
    warnings = []
    if len({case.scan_id for case in members}) == 1:
        warnings.append("The pool has only one scan, for which there is no reference.")
    for case in members:
        reasons = []
        if case.labels is not None and case.labels.any():
            reasons.append(f"{int(case.labels.sum())} of its labels are set")
        if case.disorders and not _no_disorder(case):
            reasons.append('its disorders are not "no findings"')
        if layout == "phantom" and any(labels_from_report(case.report).values()):
            reasons.append("its report names a finding")
        if reasons:
            warnings.append(f"{shown(case.name)} is not a normal scan: {'; '.join(reasons)}.")
    return warnings + _foreign(members, cases)


class Grid(NamedTuple):
    """Grid of a scan by its header, NaN for unknown values. `lowest` is the lowest value that it can store."""

    in_plane: float  # mm
    slices: float  # mm between slices
    columns: float
    lowest: float


def read_grid(case: Case) -> Grid | None:
    """Read the grid of a case from its header, without the voxels; `None` if this is not possible."""
    path = case.volume
    if not isinstance(path, Path) or path.suffix.lower() == ".zip":
        return None
    try:
        return _nifti_grid(path, case) if path.name.lower().endswith((".nii", ".nii.gz")) else _other_grid(path)
    except UNREADABLE:
        # The reader will report what is wrong with the file.
        return None


def _nifti_grid(path: Path, case: Case) -> Grid:
    header = nib.load(path).header
    spacing, lowest = header.get_zooms(), -math.inf
    if header.get_data_dtype().kind == "u":
        lowest = header.get_slope_inter()[1] or 0.0
    if case.metadata is not None:  # of a blank header, with raw values of 0 or more
        spacing, lowest = case.metadata.spacing, case.metadata.intercept
    return Grid(float(spacing[0]), float(spacing[2]), float(header.get_data_shape()[0]), float(lowest))


def _other_grid(path: Path) -> Grid:
    import SimpleITK as sitk  # takes 100 MB of memory, and NIfTI files do not need it

    folder = path.is_dir()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(min(file for file in path.rglob("*") if file.is_file()) if folder else path))
    reader.ReadImageInformation()
    unsigned = "unsigned" in sitk.GetPixelIDValueAsString(reader.GetPixelID())
    # The thickness of a DICOM slice is not the distance between slices, and its rescale is in a tag.
    return Grid(
        reader.GetSpacing()[0],
        math.nan if folder else reader.GetSpacing()[2],
        reader.GetSize()[0],
        0.0 if unsigned and not folder else -math.inf,
    )


def _foreign(members: Sequence[Case], cases: Sequence[Case]) -> list[str]:
    """Return a warning for each member whose header differs strongly from the usual one among the cases."""
    usual = [grid for grid in map(read_grid, cases[:: max(1, len(cases) // SAMPLE)]) if grid is not None]
    if not usual:
        return []
    known = [[value for value in values if not math.isnan(value)] for values in zip(*usual, strict=True)]
    median = Grid(*(statistics.median(values) if values else math.nan for values in known))
    units = ("mm in plane", "mm between slices", "columns")
    warnings = []
    for case in members:
        grid = read_grid(case)
        if grid is None:
            continue
        reasons = [
            f"{value:.3g} {unit} (usually {middle:.3g})"
            for value, middle, unit in zip(grid[:3], median[:3], units, strict=True)
            if value > FAR * middle or value < middle / FAR
        ]
        if grid.lowest > MAX_HU_MINIMUM >= median.lowest:
            reasons.append(f"no value below {grid.lowest:g}, so not in Hounsfield units")
        if reasons:
            warnings.append(f"{shown(case.name)} looks like a scan of another kind: {'; '.join(reasons)}.")
    return warnings
