# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The pool of normal references of a split.

A scan is normal where all 18 labels are 0 and, where the dataset sums its findings up, the summary is "no findings".
The paper's pools (1,787 training scans, 124 of validation) were "selected by report", it does not say how. By their
labels alone, 2,731 of CT-RATE's 24,128 training scans and 181 of its 1,564 validation scans are normal (5,226 and 346
volumes, with all reconstructions). A dataset without labels names its normal scans, in a list of ids or in the column
`normal` of its table.
"""

import math
import statistics
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib

from ..volume_diffvp import MAX_HU_MINIMUM
from .cases import Case, DatasetError, Problem, first_reconstructions, raise_problems, read_ids, shown, volume_name
from .phantom_report import labels_from_report

NO_FINDINGS = "no findings"  # RadGenome's files write it in small letters
RULE = 'all 18 labels 0, and the disorders "no findings" where there are any'
SAMPLE = 200  # cases whose headers say what is usual in a dataset
# What nibabel and SimpleITK (RuntimeError) raise on a file that they cannot read.
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)
FAR = 2.0  # a spacing or matrix this many times the median, or less than its inverse, is another kind of scan


@dataclass(frozen=True)
class Pool:
    """The normal references of a split.

    Attributes:
        cases: the members, in the order of the split's cases.
        rule: how they were chosen.
        counts: see [`count_normal`].
        warnings: what to look at before the pool is used; see [`pool_warnings`].
    """

    cases: list[Case]
    rule: str
    counts: dict[str, dict[str, int | None]]
    warnings: list[str]


def is_normal(case: Case) -> bool:
    """Whether a case with labels follows the rule."""
    return _no_label(case) and (not case.disorders or _no_disorder(case))


def normal_pool(cases: Sequence[Case]) -> list[Case]:
    """The normal cases among those with labels, every reconstruction of them."""
    return [case for case in cases if is_normal(case)]


def build_pool(cases: Sequence[Case], *, layout: str = "", ids: Sequence[str] | None = None) -> Pool:
    """
    The pool of a split, one volume per scan where the rule chooses.

    Args:
        cases: all cases of the split, and of no other.
        layout: as in [`load_dataset_cases`]; of "phantom" reports are read, too, for the warnings.
        ids: the normal scans, where somebody has chosen them.

    Raises:
        DatasetError: nothing says which scans are normal, none is, or an id is not one of this split.
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
    """The normal cases, every reconstruction of them, and by which rule; `None` where nothing tells which they are."""
    if any(case.normal is not None for case in cases):
        return [case for case in cases if case.normal], "the column normal of the table"
    if cases and all(case.labels is not None for case in cases):
        return normal_pool(cases), RULE
    return None


def load_pool(path: str | Path, cases: Sequence[Case]) -> list[Case]:
    """The members of a pool that `diffvp pool build` wrote, or anybody: ids, one a line.

    Raises:
        DatasetError: an id is not among `cases`, those of the split that the pool is for, or is there twice.
    """
    return named_cases(read_ids(path), cases, Path(path).name)


def named_cases(ids: Sequence[str], cases: Sequence[Case], source: str = "list of ids") -> list[Case]:
    """The cases of these names in their own order; errors as of [`load_pool`]."""
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
    """Names of the pool's members that are not of the case's own scan, in whatever reconstruction: its candidates."""
    return [member.name for member in pool if member.scan_id != case.scan_id]


def count_normal(cases: Sequence[Case]) -> dict[str, dict[str, int | None]]:
    """
    How many "volumes" and "scans" there are ("all"), how many of them have "all-zero labels", how many the disorders
    "no findings", and how many "both". `None` where the dataset has no labels or no disorders.
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
    # The whole field: "no findings except ..." is a finding.
    return case.disorders.strip().lower() == NO_FINDINGS


# Guards -------------------------------------------------------------------------------------------------------------


def pool_warnings(members: Sequence[Case], cases: Sequence[Case], layout: str = "") -> list[str]:
    """What is suspicious about a pool: a contaminated member, one of another kind of scanner, or too few of them.

    By the paper's own ablation (F.2), one abnormal or foreign reference in ten costs more than DiffVP gains.
    """
    warnings = []
    if len({case.scan_id for case in members}) == 1:
        warnings.append("The pool holds one scan, which has no reference itself.")
    for case in members:
        reasons = []
        if case.labels is not None and case.labels.any():
            reasons.append(f"{int(case.labels.sum())} of its labels are set")
        if case.disorders and not _no_disorder(case):
            reasons.append('its disorders are not "no findings"')
        if layout == "phantom" and any(labels_from_report(case.report).values()):
            reasons.append("its report names a finding")
        if reasons:
            warnings.append(f"{shown(case.name)} is no normal scan: {'; '.join(reasons)}.")
    return warnings + _foreign(members, cases)


class Grid(NamedTuple):
    """What a header says of a scan; NaN where it does not. `lowest` is the lowest value that it can hold."""

    in_plane: float  # mm
    slices: float  # mm from one to the next
    columns: float
    lowest: float


def read_grid(case: Case) -> Grid | None:
    """The grid of a case from its header, without reading a voxel; `None` where it cannot be had so."""
    path = case.volume
    if not isinstance(path, Path) or path.suffix.lower() == ".zip":
        return None
    try:
        return _nifti_grid(path, case) if path.name.lower().endswith((".nii", ".nii.gz")) else _other_grid(path)
    except UNREADABLE:
        # Not for this check to say what is wrong with a file: the reader does when it comes to it.
        return None


def _nifti_grid(path: Path, case: Case) -> Grid:
    header = nib.load(path).header
    spacing, lowest = header.get_zooms(), -math.inf
    if header.get_data_dtype().kind == "u":
        lowest = header.get_slope_inter()[1] or 0.0
    if case.metadata is not None:  # of a header that is blank, below which raw values are 0 or above
        spacing, lowest = case.metadata.spacing, case.metadata.intercept
    return Grid(float(spacing[0]), float(spacing[2]), float(header.get_data_shape()[0]), float(lowest))


def _other_grid(path: Path) -> Grid:
    import SimpleITK as sitk  # 100 MB, which cohorts of NIfTI files can do without

    folder = path.is_dir()
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(min(file for file in path.rglob("*") if file.is_file()) if folder else path))
    reader.ReadImageInformation()
    unsigned = "unsigned" in sitk.GetPixelIDValueAsString(reader.GetPixelID())
    # The thickness of one DICOM slice is not its distance to the next, and its rescale is in a tag.
    return Grid(
        reader.GetSpacing()[0],
        math.nan if folder else reader.GetSpacing()[2],
        reader.GetSize()[0],
        0.0 if unsigned and not folder else -math.inf,
    )


def _foreign(members: Sequence[Case], cases: Sequence[Case]) -> list[str]:
    """A warning for each member whose header lies far from what is usual among the cases."""
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
            f"{value:.3g} {unit}, where {middle:.3g} is usual"
            for value, middle, unit in zip(grid[:3], median[:3], units, strict=True)
            if value > FAR * middle or value < middle / FAR
        ]
        if grid.lowest > MAX_HU_MINIMUM >= median.lowest:
            reasons.append(f"no value below {grid.lowest:g}, so no Hounsfield units")
        if reasons:
            warnings.append(f"{shown(case.name)} looks like a scan of another kind: {'; '.join(reasons)}.")
    return warnings
