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

from .folders_diffvp import DICOM_SUFFIXES, is_dicom, walk_files
from .inflate_diffvp import MAX_FILES, extract
from .pixels_diffvp import check_slice, equal_pixels, read_voxels, rescale_of
from .slices_diffvp import PARTS, DicomFile, Slice, read_directory, read_header
from .volume_diffvp import (
    DICOM,
    LPS_TO_RAS,
    MAX_TILT_COSINE,
    MIN_LENGTH,
    CTGeometryError,
    CTInputError,
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
LETTERS = re.compile("[A-Z0-9]{6,}")  # names that exports to CDs draw at random
GRID = ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient")  # must be equal in all slices of a stack


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
        if not found:
            names = [file.name for file in files if file.path != path]
            state = f"no DICOM file, but {', '.join(names[:5])}" if names else "no DICOM file"
            raise CTReadError(source, "content", state, "the slices of one CT series")
        slices = _choose(found, series, source)
        if allow_incomplete:
            damaged += [replace(one.file, why="truncated") for one in slices if one.length < 0]
            slices = [one for one in slices if one.length >= 0]
        warnings = _check_complete(slices, found, _alike(slices, lost, found) + damaged, source, allow_incomplete)
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
        try:
            for folder, names in walk_files(path):
                inside = _inside(path, Path(folder))
                files += [DicomFile(Path(folder, name), inside, name) for name in names if name[:2] != "._"]
                if len(files) > MAX_FILES:
                    raise CTReadError(path.name, "number of files", "too large", f"at most {MAX_FILES}: one study")
        except OSError as error:
            raise CTReadError(path.name, "folder", "unreadable, or one in it", "folders that may be read") from error
        yield files + [file for one in files if one.name.upper() == "DICOMDIR" for file in _absent(path, one)]
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


def _inside(folder: Path, other: Path) -> str:
    """Return the path of a folder within another one; empty for that one itself."""
    return os.path.relpath(other, folder).removeprefix(os.curdir)


def _absent(folder: Path, directory: DicomFile) -> list[DicomFile]:
    """Return the files that a DICOMDIR within a folder lists, and that are not there."""
    assert directory.path is not None
    try:
        listed = _listed(directory.path)
    except CTReadError:  # an index that cannot be read takes nothing from the files, which were found without it
        return []
    return [
        replace(one, folder=_inside(folder, one.path.parent)) for one in listed if one.path and not one.path.exists()
    ]


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
    groups: dict[str, list[Slice]] = {}
    others: dict[str, list[CTReadError]] = {}  # a localizer may share the UID of the slices planned on it
    placed = sum(one.other is None and one.is_placed for one in found) >= MIN_LENGTH
    for one in found:
        other = one.other
        if other is None and placed and not one.is_placed:  # such as a page of the dose report
            other = "ImagePositionPatient", "missing, with orientation and pixel spacing", "a slice"
        if other:
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


def _numbers(text: str) -> tuple[float, ...] | str:
    """Return the numbers of a field, which programs write differently (1 and 1.0); the text if it holds none."""
    try:
        return tuple(float(number) for number in text.split("\\"))
    except ValueError:
        return text


def _distinct(slices: list[Slice]) -> list[Slice]:
    """Return the slices without duplicates: copies and second exports, whose pixels and header or UID are equal."""
    kept: dict[tuple[float, ...] | str, list[Slice]] = {}
    for one in slices:
        same = kept.setdefault(_numbers(one.text("ImagePositionPatient")), [])
        if not (one.text("ImagePositionPatient") and any(_equal(one, other) for other in same)):
            same.append(one)
    return [one for same in kept.values() for one in same]


def _equal(one: Slice, other: Slice) -> bool:
    fields = "RescaleSlope", "RescaleIntercept", "ImageOrientationPatient", "PixelSpacing"
    if (uid := one.text("SOPInstanceUID")) and (uid, one.frame) == (other.text("SOPInstanceUID"), other.frame):
        header = all(_numbers(one.text(name)) == _numbers(other.text(name)) for name in fields)
    else:
        header = one.values | {"SOPInstanceUID": ""} == other.values | {"SOPInstanceUID": ""}
    return header and equal_pixels(one, other)


def _split(slices: list[Slice]) -> list[list[Slice]]:
    """
    Split a series into its stacks. Consecutive parts that do not overlap are one stack, if its grid is even.

    A series has one study and one frame of reference (PS3.3, C.7.3.1 and C.7.4.1): those of two patients never join.
    """
    try:
        places = {id(one): one.place() for one in slices}
    except CTGeometryError:
        return [slices]  # the error is raised if the stack is chosen

    def step(part: list[Slice]) -> float:
        return float(np.diff(sorted(places[id(one)] for one in part)).min()) if len(part) > 1 else math.inf

    def interleaved(parts: list[list[Slice]]) -> bool:
        ends = sorted((min(at), max(at)) for at in ([places[id(one)] for one in part] for part in parts))
        overlap = any(lower[1] >= upper[0] - 1e-3 for lower, upper in itertools.pairwise(ends))
        finest = min(map(step, parts))
        return overlap and max(map(len, parts)) >= MIN_LENGTH and step(slices) < MIN_INTERLEAVED * finest

    # Most fields have one value in all slices, and divide nothing.
    divided = {name: parts for name in (*PARTS, *GRID) if len(parts := _parts(slices, name)) > 1}
    for name, parts in divided.items():
        if name in PARTS and interleaved(parts):
            return [stack for part in parts for stack in _split(part)]
    whole = {name: parts for name, parts in divided.items() if min(map(len, parts)) >= MIN_LENGTH}
    for name in ("StudyInstanceUID", "FrameOfReferenceUID"):
        if name in whole:
            return [stack for part in whole[name] for stack in _split(part)]
    if whole and not _is_even(slices):  # such as acquisitions at a distance from each other, or of different grids
        for parts in whole.values():
            if all(map(_is_even, parts)):
                return parts
    return [slices]


def _parts(slices: list[Slice], name: str) -> list[list[Slice]]:
    """Return the slices by the value of a field, in the order of the values; shorter ones come first."""
    if len({one.values.get(name, "") for one in slices}) == 1:
        return [slices]
    parts: dict[str, list[Slice]] = {}
    for one in slices:
        parts.setdefault(str(one.values.get(name, "")), []).append(one)
    return [part for _, part in sorted(parts.items(), key=lambda one: (len(one[0]), one[0]))]


def _is_even(slices: list[Slice]) -> bool:
    """True if slices are an even stack of one grid."""
    if any(name not in one.values for one in slices for name in ("Rows", "Columns")):
        return False
    try:
        _stack(slices, "")
    except CTInputError:
        return False
    return True


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


def _alike(slices: list[Slice], lost: list[DicomFile], found: list[Slice]) -> list[DicomFile]:
    """
    Return the files that are not DICOM but are named like the slices; others are notes or viewers.

    A file is compared with the slices of its folder. A file in a folder without any readable image is compared by its
    whole path with all slices: D2/IM18 with D1/IM17.
    """
    names = {(one.file.folder, one.file.name) for one in slices}
    shapes = {(one.file.folder, shape) for one in slices for shape in one.file.shapes}
    folders = {one.file.folder for one in slices}
    letters = {(one.file.folder, len(one.file.name)) for one in slices if LETTERS.fullmatch(one.file.name)}
    readable, paths = {one.file.folder for one in found}, {one.file.path_shape for one in slices}
    alike = []
    for file in lost:
        # IM0018.dcm.part, .IM0018.dcm.x7Hq2a and IM0018.dcm~ stand for IM0018.dcm, unless that also exists.
        plain = file.name.strip(".~")
        stems = [replace(file, name=name) for name in (plain, os.path.splitext(plain)[0]) if name != file.name]
        tried = [file] if any((file.folder, stem.name) in names for stem in stems) else [file, *stems]
        numbered = any((file.folder, shape) in shapes for one in tried for shape in one.shapes)
        suffixed = file.folder in folders and file.name.lower().endswith(DICOM_SUFFIXES)
        elsewhere = file.folder not in readable and file.why != "missing" and file.path_shape in paths
        # Names such as ZKGH2MQX have no number that could be compared.
        lettered = file.why in ("empty", "zeros") and LETTERS.fullmatch(file.name) is not None
        if numbered or suffixed or elsewhere or (lettered and (file.folder, len(file.name)) in letters):
            alike.append(file)
    return alike


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
            if not promised:
                continue
            # Reformatted slices may carry the number of the slices that they were made from. The images of an
            # acquisition may be divided among several series.
            derived = count == "ImagesInAcquisition" and any("DERIVED" in one.text("ImageType") for one in part)
            everywhere = [one for one in found if one.text(name) == value]
            series = [one for one in everywhere if one.text("SeriesInstanceUID") == part[0].text("SeriesInstanceUID")]
            there, total = (len(set(map(_instance, ones))) for ones in (series, everywhere))
            if there < promised != total and not derived:
                missing.append((count, promised, there))
    if allow_incomplete:
        unread = [f"Files of the series that could not be read: {len(lost)}."] if lost else []
        return (
            *unread,
            *(f"{count} is {promised}, but only {there} are there." for count, promised, there in missing),
        )
    allowed = "allow_incomplete=True (--allow-incomplete) reads the others"
    if lost:
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CTReadError(lost[0].name, "content", lost[0].why + more, f"a slice, as its name suggests; {allowed}")
    if missing:
        count, promised, there = missing[0]
        raise CTReadError(source, count, f"{promised}, with {there} files there", f"all of the scan; {allowed}")
    return ()


def _instance(one: Slice) -> tuple[object, ...]:
    """Return what identifies the object of a slice. Some exports give the slices of a series one SOPInstanceUID."""
    uid = one.text("SOPInstanceUID")
    return (uid, _numbers(one.text("ImagePositionPatient")) if one.frames == 1 else "") if uid else (one.file.path,)


def _both(one: Slice, other: Slice) -> str:
    """Name two slices in a message, with their folders if their names are equal."""
    within = one.file.name == other.file.name
    return " and ".join(os.path.join(of.file.folder, of.name) if within else of.name for of in (one, other))


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
            one = int(differs.argmax())
            other = int(np.abs(values - values[one]).max(axis=1).argmax())
            pair = _both(slices[min(one, other)], slices[max(one, other)])
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
        found = f"the same in {_both(slices[order[k]], slices[order[k + 1]])}"
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
