# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The DICOM series that a report is of. Its patient goes from here into DICOM objects, and to no log or other file."""

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.config import disable_value_validation

from ..dicom_diffvp import open_series
from ..reading_diffvp import FORMATS
from ..slices_diffvp import DAMAGED, MAX_NUMBER, MULTI_FRAME, Slice
from ..volume_diffvp import CTReadError

_validation = threading.Lock()

MAX_PIXEL_BYTES = 2**32 - 2  # of one element: a thousand slices of 1024 x 1024 in float32

# What an object in the source's study has to say of it.
SHARED_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Frame:
    """A slice where others refer to it.

    Attributes:
        sop_class, sop_instance: UIDs of its file.
        number: of the frame in a multi-frame file, from 1; `None` in others.
        position: of its first voxel, (x, y, z) in LPS+ mm, as its header has it.
    """

    sop_class: str
    sop_instance: str
    number: int | None
    position: tuple[float, float, float]


@dataclass(frozen=True, eq=False)
class SourceSeries:
    """A CT series, without its pixels.

    Attributes:
        source: name of the folder, archive or file, for messages.
        header: patient, study and the rest that the first slice says, without pixels and functional groups.
        frames: in the order of the last axis of the volume that the reader makes of them.
        orientation: direction cosines of row and column (6).
        pixel_spacing: mm between rows, between columns.
        thickness: of a slice in mm, as the header says; else the distance between two.
        affine, shape: of the volume's grid, index (column, row, slice) -> RAS+ world mm.
    """

    source: str
    header: pydicom.Dataset
    frames: tuple[Frame, ...]
    orientation: tuple[float, ...]
    pixel_spacing: tuple[float, float]
    thickness: float
    affine: np.ndarray
    shape: tuple[int, int, int]

    @property
    def instances(self) -> list[tuple[str, str]]:
        """SOP class and instance UID of each file, in the order of the frames."""
        return list(dict.fromkeys((frame.sop_class, frame.sop_instance) for frame in self.frames))

    @property
    def slice_spacing(self) -> float:
        """mm between the middles of two slices."""
        return float(np.linalg.norm(self.affine[:3, 2]))

    def check_grid(self, shape: tuple[int, ...], affine: np.ndarray) -> None:
        """
        Raises:
            CTReadError: a volume of this shape and affine was not read of these slices.
        """
        if tuple(shape[:3]) != self.shape or not np.allclose(affine, self.affine, rtol=1e-6, atol=1e-3):
            raise CTReadError(self.source, "slices", "not those that were read before", "files that do not change")


def read_source(
    path: str | os.PathLike, series: int | str | None = None, allow_incomplete: bool = False
) -> SourceSeries:
    """
    The series that [`read_ct`] reads from the same arguments.

    Raises:
        CTReadError: it is no DICOM, or lacks what objects in its study have to say of it.
        CTGeometryError: as `read_ct`.
    """
    path = Path(path)
    kind = next((kind for suffix, kind in FORMATS.items() if path.name.lower().endswith(suffix)), None)
    if kind is not None:
        raise CTReadError(path.name, "format", kind, "a DICOM series, in whose study DICOM objects can lie")
    with open_series(path, series, allow_incomplete) as found:
        first = found.slices[0]
        _check_uids(found.slices, found.source)
        header = _header(first)
        frames = tuple(
            Frame(
                one.text("SOPClassUID"), one.text("SOPInstanceUID"),
                one.frame + 1 if one.text("SOPClassUID") in MULTI_FRAME else None,
                tuple(one.numbers("ImagePositionPatient", 3).tolist()),
            )
            for one in found.slices
        )  # fmt: skip
    rows, columns = first.shape
    size = 4 * rows * columns * len(frames)
    if size > MAX_PIXEL_BYTES:
        raise CTReadError(found.source, "difference map", f"{size} bytes", f"at most {MAX_PIXEL_BYTES} in DICOM")
    return SourceSeries(
        source=found.source,
        header=header,
        frames=frames,
        orientation=tuple(first.numbers("ImageOrientationPatient", 6).tolist()),
        pixel_spacing=tuple(first.numbers("PixelSpacing", 2).tolist()),
        thickness=_thickness(first) or float(np.linalg.norm(found.affine[:3, 2])),
        affine=found.affine,
        shape=(columns, rows, len(frames)),
    )


@contextlib.contextmanager
def values_as_they_are() -> Iterator[None]:
    """
    pydicom takes values as the source has them. Its warnings would quote them, and they name patients; and an object
    has the birth date of its study, valid or not.

    One thread at a time: pydicom has one setting for all.
    """
    with _validation, disable_value_validation():
        yield


def _thickness(one: Slice) -> float | None:
    try:
        thickness = float(one.text("SliceThickness"))
    except ValueError:  # missing, or no number; nothing but this needs it
        return None
    return thickness if 0 < thickness < MAX_NUMBER else None


def _check_uids(slices: tuple[Slice, ...], source: str) -> None:
    for name in SHARED_UIDS:
        values = {one.text(name) for one in slices}
        if values == {""}:
            raise CTReadError(source, name, "missing", "one, for objects that refer to the series")
        if len(values) > 1:
            raise CTReadError(source, name, f"{len(values)} different ones", "one in all slices")
    instances = {(one.text("SOPInstanceUID"), one.frame) for one in slices}
    if len(instances) < len(slices) or any(not uid for uid, _ in instances):
        raise CTReadError(source, "SOPInstanceUID", "missing, or the same in two slices", "one of its own for each")
    if not all(one.text("SOPClassUID") for one in slices):
        raise CTReadError(source, "SOPClassUID", "missing", "one in all slices")


def _header(one: Slice) -> pydicom.Dataset:
    """The elements of a slice's file that are not pixels or functional groups, with values as they are."""
    try:
        with values_as_they_are():
            header = pydicom.dcmread(one.file.path, stop_before_pixels=True, force=True)
            for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
                header.pop(name, None)
            header.decode()  # to text, whatever the character set: the objects are UTF-8
    except DAMAGED as error:
        raise CTReadError(one.file.name, "content", "damaged", "a readable DICOM header") from error
    header.SOPClassUID = one.text("SOPClassUID")  # some have it in the meta header alone
    return header
