# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Read a CT from a folder of DICOM files, a .zip, a DICOMDIR or a multi-frame file, and validate it: [`read_dicom`].

`slices_diffvp.py` reads headers and `pixels_diffvp.py` pixels. This module chooses the slices of one series, checks
that they are complete, and stacks them.

Messages contain file names, numbers and DICOM's own codes, but no UIDs, names or descriptions.
"""

import contextlib
import itertools
import math
import os
import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from .inflate_diffvp import MAX_FILES, extract
from .pixels_diffvp import check_slice, equal_pixels, read_voxels, rescale_of
from .slices_diffvp import PARTS, DicomFile, Slice, is_dicom, read_directory, read_header
from .volume_diffvp import (
    DICOM,
    LPS_TO_RAS,
    MAX_TILT_COSINE,
    MIN_LENGTH,
    CTGeometryError,
    CTReadError,
    CTVolume,
    check_shape,
    make_volume,
)

# Tolerated distance of a slice from its place in an even stack, as a share of the slice spacing and in mm. Headers
# round positions to 0.1 mm.
MAX_SLICE_OFFSET, ROUNDING = 0.1, 0.1
MAX_COSINE_DIFFERENCE = 2e-3  # between slices: 0.1 degrees
MAX_SPACING_DIFFERENCE = 5e-3  # relative, between pixel spacings: half a voxel at the edge of 200
MIN_INTERLEAVED = 0.75  # parts are interleaved if their slices lie closer together than this share of their spacing
DICOM_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")


def read_dicom(
    path: Path, series: int | str | None = None, allow_non_hu: bool = False, allow_incomplete: bool = False
) -> CTVolume:
    """Read one CT series from a folder or .zip with its subfolders, the files of a DICOMDIR, or a multi-frame file.

    Slices and frames are sorted by position; file names and instance numbers may have another order. Left and right
    follow from position and orientation in patient coordinates, whatever the position of the patient. Files that are
    not DICOM, localizers, projections, reports, other modalities and exact duplicates are skipped. If parts of a
    series (contrast phases, acquisitions, kernels) interleave, each part is a separate stack.

    Args:
        path: the folder, archive, DICOMDIR or file. An archive is unpacked to a temporary folder.
        series: selects one of several series, by its number in the list that the error message gives (as `int` or
            `str`), or by its SeriesInstanceUID.
        allow_non_hu: accept voxels that are not Hounsfield units, and slices without a rescale to them.
        allow_incomplete: read a series although files are damaged, or missing at its ends. The volume then has a
            warning.

    Raises:
        CTReadError: no series or several, a damaged or missing file, or pixels that cannot be decoded.
        CTGeometryError: the slices are not an even stack of one grid at right angles.
        CTIntensityError: no rescale to Hounsfield units, or voxels that are not Hounsfield units.
    """
    with open_series(path, series, allow_incomplete) as found:
        rescales = [rescale_of(one, allow_non_hu) for one in found.slices]
        array, slope, intercept = read_voxels(list(found.slices), rescales, found.source)
    distinct = set(rescales)
    rescale = "rescale slope {:g} intercept {:g}".format(*rescales[0]) if len(distinct) == 1 else "varying rescale"
    volume = make_volume(
        array, found.affine, found.source, f"{DICOM}, {len(rescales)} slices, {rescale}",
        slope=slope, intercept=intercept, allow_non_hu=allow_non_hu,
    )  # fmt: skip
    agents = {one.text("ContrastBolusAgent").upper() for one in found.slices} - {"", "NO", "NONE", "N"}
    return replace(volume, warnings=found.warnings, contrast=True if agents else None)


@dataclass(frozen=True, eq=False)
class Series:
    """The slices of one CT, in the order of their positions.

    Attributes:
        source: name of the folder, archive or file.
        affine: 4x4, index (column, row, slice) -> RAS+ world mm.
        warnings: missing or unreadable parts of the series.
    """

    source: str
    slices: tuple[Slice, ...]
    affine: np.ndarray
    warnings: tuple[str, ...]


@contextlib.contextmanager
def open_series(path: Path, series: int | str | None = None, allow_incomplete: bool = False) -> Iterator[Series]:
    """Open the slices that [`read_dicom`] reads. Files unpacked from an archive are deleted on exit.

    Raises:
        CTReadError, CTGeometryError: as in `read_dicom`, except for errors in the pixels.
    """
    source = path.name or str(path)
    with _files(path) as files:
        found, lost, damaged = [], [], []
        for file in files:
            try:
                slices = read_header(file)
            except CTReadError as error:
                if not allow_incomplete:
                    raise
                damaged.append(replace(file, why=error.found))
                continue
            if isinstance(slices, DicomFile):
                lost.append(slices)
            else:
                found.extend(slices)
        slices = _choose(found, series, source)
        if allow_incomplete:
            damaged += [replace(one.file, why="truncated") for one in slices if one.length < 0]
            slices = [one for one in slices if one.length >= 0]
        warnings = _check_complete(slices, found, _alike(slices, lost) + damaged, source, allow_incomplete)
        if path.is_file() and len(files) == 1 and len(slices) == 1 and path.suffix.lower() != ".zip":
            raise CTReadError(source, "number of frames", 1, "a multi-frame CT; for single slices, give their folder")
        if len(slices) < MIN_LENGTH:
            raise CTGeometryError(source, "number of slices", len(slices), f"at least {MIN_LENGTH}")
        for one in slices:
            check_slice(one)
        order, affine = _stack(slices, source)
        yield Series(source, tuple(slices[k] for k in order), LPS_TO_RAS @ affine, warnings)


# Files


@contextlib.contextmanager
def _files(path: Path) -> Iterator[list[DicomFile]]:
    """Find the files of a folder, an archive or a DICOMDIR, in a fixed order, without the "._" files of macOS."""
    if path.is_dir():
        files = []
        for folder, folders, names in os.walk(path):
            folders.sort()
            files += [DicomFile(Path(folder, name), folder, name) for name in sorted(names) if name[:2] != "._"]
            if len(files) > MAX_FILES:
                raise CTReadError(path.name, "number of files", "too large", f"at most {MAX_FILES}: one study")
        yield files
    elif path.suffix.lower() == ".zip":
        with tempfile.TemporaryDirectory(prefix="diffvp-") as folder:
            try:
                members = extract(path, Path(folder), is_dicom)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
                expected = "a zip with valid checksums"
                raise CTReadError(path.name, "content", "a damaged archive", expected) from error
            files = [DicomFile(at, *os.path.split(name), "" if at else "not DICOM") for at, name in members]
            yield [file for file in files if not (file.name[:2] == "._" or file.folder.startswith("__MACOSX"))]
    else:
        yield _listed(path) if path.name.upper() == "DICOMDIR" else [DicomFile(path, "", path.name)]


def _listed(path: Path) -> list[DicomFile]:
    """Return the files that a DICOMDIR lists, including missing ones. Names may differ in case from the list."""

    @cache
    def inside(folder: Path) -> dict[str, str]:
        return {name.casefold(): name for name in os.listdir(folder)} if folder.is_dir() else {}

    files = []
    for parts in read_directory(path, path.name):
        if not all(re.fullmatch(r"\w[\w .-]*", part, re.ASCII) for part in parts):
            raise CTReadError(path.name, "ReferencedFileID", "outside its folder", "files in the DICOMDIR's folder")
        place = path.parent
        for part in parts:
            place = place / inside(place).get(part.casefold(), part)
        files.append(DicomFile(place, os.path.join(*parts[:-1], ""), parts[-1]))
    return files


# Series


def _choose(found: list[Slice], series: int | str | None, source: str) -> list[Slice]:
    """Return the slices of the stack that was selected, or of the only one, without exact duplicates."""
    if not found:
        raise CTReadError(source, "content", "no DICOM file", "the slices of one CT series")
    groups: dict[str, list[Slice]] = {}
    others: dict[str, list[CTReadError]] = {}  # a localizer may share the UID of the slices planned on it
    for one in found:
        if other := one.other:
            others.setdefault(one.text("SeriesInstanceUID"), []).append(CTReadError(one.name, *other))
        else:
            groups.setdefault(one.text("SeriesInstanceUID"), []).append(one)
    if series in others and series not in groups:
        raise others[series][0]
    if not groups:
        raise max(others.values(), key=len)[0]
    stacks = [(uid, stack) for uid in sorted(groups) for stack in _split(_distinct(groups[uid]))]
    stacks.sort(key=lambda one: -len(one[1]))
    matching = [stack for uid, stack in stacks if series in (None, uid)]
    if len(matching) == 1:
        return matching[0]
    number = int(series) if isinstance(series, int) or (series and series.isdecimal()) else None
    if number is not None and 1 <= number <= len(stacks):
        return stacks[number - 1][1]
    listed = "; ".join(f"{n}: {_describe(stack)}" for n, (_, stack) in enumerate(stacks, 1))
    state = "none chosen" if series is None else f"{number}" if number is not None else "an unknown UID"
    state = "several under this UID" if matching and series is not None else state
    raise CTReadError(source, "series", f"{state}; available: {listed}", "one of them, by series=N or --series N")


def _distinct(slices: list[Slice]) -> list[Slice]:
    """Return the slices without duplicates: copies and second exports, whose pixels and header or UID are equal."""
    kept: dict[str, list[Slice]] = {}
    for one in slices:
        same = kept.setdefault(one.text("ImagePositionPatient"), [])
        if not (one.text("ImagePositionPatient") and any(_equal(one, other) for other in same)):
            same.append(one)
    return [one for same in kept.values() for one in same]


def _equal(one: Slice, other: Slice) -> bool:
    fields = "RescaleSlope", "RescaleIntercept", "ImageOrientationPatient", "PixelSpacing"
    if (uid := one.text("SOPInstanceUID")) and (uid, one.frame) == (other.text("SOPInstanceUID"), other.frame):
        header = all(one.text(name) == other.text(name) for name in fields)
    else:
        header = one.values | {"SOPInstanceUID": ""} == other.values | {"SOPInstanceUID": ""}
    return header and equal_pixels(one, other)


def _split(slices: list[Slice]) -> list[list[Slice]]:
    """Split a series into its stacks. Consecutive parts that do not overlap are one stack."""
    try:
        places = {id(one): one.place() for one in slices}
    except CTGeometryError:
        return [slices]  # the error is raised if the stack is chosen

    def step(part: list[Slice]) -> float:
        return float(np.diff(sorted(places[id(one)] for one in part)).min()) if len(part) > 1 else math.inf

    for name in PARTS:
        parts: dict[str, list[Slice]] = {}
        for one in slices:
            parts.setdefault(str(one.values.get(name, "")), []).append(one)
        ends = sorted((min(at), max(at)) for at in ([places[id(one)] for one in part] for part in parts.values()))
        overlap = any(lower[1] >= upper[0] - 1e-3 for lower, upper in itertools.pairwise(ends))
        finest = min(step(part) for part in parts.values())
        if overlap and max(map(len, parts.values())) >= MIN_LENGTH and step(slices) < MIN_INTERLEAVED * finest:
            return [
                stack
                for _, part in sorted(parts.items(), key=lambda one: (len(one[0]), one[0]))
                for stack in _split(part)
            ]
    return [slices]


def _describe(slices: list[Slice]) -> str:
    """Describe a stack in a list to choose from: distinguishing fields, number of slices, matrix, spacing in mm."""
    first, said = slices[0], []
    for name, word in (
        ("SeriesNumber", "series "), ("ConvolutionKernel", "kernel "), ("ImageType", ""),
        ("AcquisitionNumber", "acquisition "), ("TemporalPositionIdentifier", "phase "),
        ("NominalPercentageOfCardiacPhase", "cardiac phase "), ("SliceThickness", "thickness "),
    ):  # fmt: skip
        codes = [code for code in first.text(name).split("\\") if re.fullmatch(r"[\w .+/-]{1,16}", code, re.ASCII)]
        if codes:
            said.append(word + "/".join(codes))
    text = f"{len(slices)} slices of {first.values.get('Columns', '?')} x {first.values.get('Rows', '?')}"
    try:
        places = sorted(one.place() for one in slices)
    except CTGeometryError:
        return ", ".join([*said, text + " without a position"])
    return ", ".join([*said, text, *([f"{np.median(np.diff(places)):.3g} mm apart"] if len(slices) > 1 else [])])


def _alike(slices: list[Slice], lost: list[DicomFile]) -> list[DicomFile]:
    """Return the files that are not DICOM but are named like the slices next to them; others are notes or viewers."""
    names = {(one.file.folder, one.file.name) for one in slices}
    shapes = {(one.file.folder, shape) for one in slices for shape in one.file.shapes}
    folders = {one.file.folder for one in slices}
    found = []
    for file in lost:
        # IM0018.dcm.part stands for IM0018.dcm, unless that also exists.
        stem = replace(file, name=os.path.splitext(file.name)[0])
        tried = [file] if (file.folder, stem.name) in names else [file, stem]
        named = any((file.folder, shape) in shapes for one in tried for shape in one.shapes)
        if named or (file.folder in folders and file.name.lower().endswith(DICOM_SUFFIXES)):
            found.append(file)
    return found


def _check_complete(
    slices: list[Slice], found: list[Slice], lost: list[DicomFile], source: str, allow_incomplete: bool
) -> tuple[str, ...]:
    """Check that a stack is complete also at its ends, where a missing slice leaves no gap.

    Args:
        slices: the stack.
        found: all slices, and images that are not slices.
        lost: files of the stack that could not be read.

    Returns:
        Warnings of missing and unreadable files, if `allow_incomplete`.

    Raises:
        CTReadError: files are missing or unreadable, and `allow_incomplete` is not set.
    """
    missing = []
    for count, name in (
        ("ImagesInAcquisition", "AcquisitionNumber"), ("NumberOfSeriesRelatedInstances", "SeriesInstanceUID"),
        ("InConcatenationTotalNumber", "ConcatenationUID"),
    ):  # fmt: skip
        for value in sorted({one.text(name) for one in slices}):
            part = [one for one in slices if one.text(name) == value]
            promises = [str(one.values.get(count, "")) for one in part]
            promised = max((int(number) for number in promises if number.isdecimal()), default=0)
            # Reformatted slices may carry the number of the slices that they were made from. The images of an
            # acquisition may be divided among several series.
            derived = count == "ImagesInAcquisition" and any("DERIVED" in one.text("ImageType") for one in part)
            everywhere = [one for one in found if one.text(name) == value]
            series = [one for one in everywhere if one.text("SeriesInstanceUID") == part[0].text("SeriesInstanceUID")]
            there, total = (
                len({one.text("SOPInstanceUID") or one.file.path for one in ones}) for ones in (series, everywhere)
            )
            if there < promised != total and not derived:
                missing.append((count, promised, there))
    if allow_incomplete:
        unread = [f"Files of the series that could not be read: {len(lost)}."] if lost else []
        return (
            *unread,
            *(f"{count} is {promised}, but only {there} are there." for count, promised, there in missing),
        )
    allowed = "allow_incomplete=True (--allow-incomplete) reads what is there"
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CTReadError(lost[0].name, "content", lost[0].why + more, f"a slice, as its name suggests; {allowed}")
    if missing:
        count, promised, there = missing[0]
        raise CTReadError(source, count, f"{promised}, with {there} files there", f"all of the scan; {allowed}")
    return ()


# Grid


def _stack(slices: list[Slice], source: str) -> tuple[list[int], np.ndarray]:
    """Return the order of the slices along their normal, and the 4x4 from index (column, row, slice) to LPS+ world mm.

    Headers round. Spacing and orientation are therefore medians over the slices, and the grid is the even one closest
    to all positions.

    Raises:
        CTGeometryError: the slices are not an even stack of one grid at right angles, or one is missing or doubled.
    """
    sizes = np.array([one.shape for one in slices])
    spacings = np.array([one.numbers("PixelSpacing", 2) for one in slices])
    orientations = np.array([one.numbers("ImageOrientationPatient", 6) for one in slices])
    positions = np.array([one.numbers("ImagePositionPatient", 3) for one in slices])
    spacing, orientation = np.median(spacings, axis=0), np.median(orientations, axis=0)
    for name, values, usual, tolerance in (
        ("Rows and Columns", sizes, np.median(sizes, axis=0), 0),
        ("PixelSpacing", spacings, spacing, MAX_SPACING_DIFFERENCE * abs(spacing).min()),
        ("ImageOrientationPatient", orientations, orientation, MAX_COSINE_DIFFERENCE),
    ):
        differs = np.abs(values - usual).max(axis=1) > tolerance
        if differs.any():
            pair = f"{slices[int(differs.argmin())].name} and {slices[int(differs.argmax())].name}"
            raise CTGeometryError(source, name, f"not the same in all slices ({pair} differ)", "one grid")
    if spacings.min() <= 0:
        raise CTGeometryError(source, "PixelSpacing", f"{spacings.min():g} mm", "above 0 mm")
    check_shape((*slices[0].shape[::-1], len(slices)), source)
    row, column = orientation.reshape(2, 3)
    if max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > 3e-3:
        raise CTGeometryError(source, "ImageOrientationPatient", "not a rotation", "two unit vectors at right angles")
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column /= np.linalg.norm(column)
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable").tolist()
    positions = positions[order]
    gaps, names = np.diff(positions @ normal), [slices[k].name for k in order]
    step, start = np.polyfit(np.arange(len(slices)), positions, 1).round(6)
    thickness = float(step @ normal)
    if thickness < 1e-3:
        raise CTGeometryError(source, "slice positions", "all the same", "one position per slice")
    tilt = math.degrees(math.acos(min(1.0, thickness / float(np.linalg.norm(step)))))
    if math.sin(math.radians(tilt)) > MAX_TILT_COSINE:
        raise CTGeometryError(source, "gantry tilt", f"{tilt:.1f} degrees", "slices stacked at right angles")
    if gaps.min() < MAX_SLICE_OFFSET * thickness:
        k = int(gaps.argmin())
        pair = [slices[order[k]].file, slices[order[k + 1]].file]
        if len({file.name for file in pair}) == 1 < len({file.folder for file in pair}):
            names[k : k + 2] = [os.path.join(file.folder, name) for file, name in zip(pair, names[k:], strict=False)]
        found = f"the same in {names[k]} and {names[k + 1]}"
        raise CTGeometryError(source, "slice positions", found, "a different position for each slice")
    tolerance = max(MAX_SLICE_OFFSET * thickness, min(ROUNDING, 0.3 * thickness))
    offsets = positions - (start + np.arange(len(slices))[:, None] * step)
    if np.abs(offsets @ normal).max() > tolerance:
        usual = float(np.median(gaps))
        steps = gaps / usual
        if np.abs(steps - np.rint(steps)).max() <= max(MAX_SLICE_OFFSET, 2 * ROUNDING / usual):
            k = int(steps.argmax())
            found = f"{gaps.max():.3g} mm between {names[k]} and {names[k + 1]}"
            raise CTGeometryError(source, "slice spacing", found, f"{usual:.3g} mm: slices are missing there")
        raise CTGeometryError(source, "slice spacing", f"{gaps.min():.3g} to {gaps.max():.3g} mm", "an even stack")
    aside = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if aside.max() > tolerance:
        found = f"{aside.max():.3g} mm aside in {names[int(aside.argmax())]}"
        raise CTGeometryError(source, "slice positions", found, "slices stacked in line")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * spacing[1], column * spacing[0], step], axis=1)
    affine[:3, 3] = start
    return order, affine


__all__ = ["Series", "open_series", "read_dicom"]
