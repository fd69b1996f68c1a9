# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The source DICOM series of a report. Patient data goes from here to DICOM objects only, never to logs or files."""

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

MAX_PIXEL_BYTES = 2**32 - 2  # size of one element: a thousand slices of 1024 x 1024 in float32

# Elements that an object in the study of the source must copy.
SHARED_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")


@dataclass(frozen=True)
class Frame:
    """A slice as other objects refer to it.

    Attributes:
        sop_class, sop_instance: UIDs of its file.
        number: number of the frame in a multi-frame file, from 1; `None` for other files.
        position: position of its first voxel, (x, y, z) in LPS+ mm, from its header.
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
        header: header of the first slice with patient and study, without pixels and functional groups.
        frames: frames in the order of the last axis of the volume that the reader makes of them.
        orientation: direction cosines of row and column (6).
        pixel_spacing: mm between rows, between columns.
        thickness: slice thickness in mm from the header, or the distance between two slices.
        affine, shape: grid of the volume, index (column, row, slice) -> RAS+ world mm.
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
        """SOP class and instance UIDs of the files, in the order of the frames."""
        return list(dict.fromkeys((frame.sop_class, frame.sop_instance) for frame in self.frames))

    @property
    def slice_spacing(self) -> float:
        """Distance between the centres of two slices in mm."""
        return float(np.linalg.norm(self.affine[:3, 2]))

    def check_grid(self, shape: tuple[int, ...], affine: np.ndarray) -> None:
        """
        Check that a volume was read from these slices.

        Raises:
            CTReadError: its shape or affine differs.
        """
        if tuple(shape[:3]) != self.shape or not np.allclose(affine, self.affine, rtol=1e-6, atol=1e-3):
            raise CTReadError(self.source, "slices", "not those that were read before", "files that do not change")


def read_source(
    path: str | os.PathLike, series: int | str | None = None, allow_incomplete: bool = False
) -> SourceSeries:
    """
    Return the series that [`read_ct`] reads from the same arguments.

    Raises:
        CTReadError: it is not DICOM, or lacks elements that objects in its study must copy.
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
                _position(one),
            )
            for one in found.slices
        )  # fmt: skip
    rows, columns = first.shape
    between_rows, between_columns = first.numbers("PixelSpacing", 2)
    size = 4 * rows * columns * len(frames)
    if size > MAX_PIXEL_BYTES:
        raise CTReadError(found.source, "difference map", f"{size} bytes", f"at most {MAX_PIXEL_BYTES} in DICOM")
    return SourceSeries(
        source=found.source,
        header=header,
        frames=frames,
        orientation=tuple(first.numbers("ImageOrientationPatient", 6)),
        pixel_spacing=(between_rows, between_columns),
        thickness=_thickness(first) or float(np.linalg.norm(found.affine[:3, 2])),
        affine=found.affine,
        shape=(columns, rows, len(frames)),
    )


@contextlib.contextmanager
def values_as_they_are() -> Iterator[None]:
    """
    Make pydicom accept values unchanged. Its warnings would quote values, which may name patients, and an object must
    have the birth date of its study even if that is invalid.

    Only one thread at a time can enter, because pydicom has one global setting.
    """
    with _validation, disable_value_validation():
        yield


def _position(one: Slice) -> tuple[float, float, float]:
    x, y, z = one.numbers("ImagePositionPatient", 3)
    return x, y, z


def _thickness(one: Slice) -> float | None:
    try:
        thickness = float(one.text("SliceThickness"))
    except ValueError:  # missing or not a number; only this function needs it
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
    """Return the header of a slice without pixels and functional groups, with values unchanged."""
    try:
        with values_as_they_are():
            header = pydicom.dcmread(one.file.path, stop_before_pixels=True, force=True)
            for name in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
                header.pop(name, None)
            header.decode()  # decoded from any character set, because the objects are UTF-8
    except DAMAGED as error:
        raise CTReadError(one.file.name, "content", "damaged", "a readable DICOM header") from error
    header.SOPClassUID = one.text("SOPClassUID")  # some files have it in the meta header only
    return header
