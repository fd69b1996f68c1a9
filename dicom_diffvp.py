# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A folder or a zip of DICOM slices in, a validated CT out: [`read_dicom`]."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .volume_diffvp import (
    LPS_TO_RAS,
    MAX_TILT_COSINE,
    MIN_LENGTH,
    CTGeometryError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    make_volume,
)

MAX_SLICE_OFFSET = 0.1  # of the slice spacing: how far a slice may lie from its place in an even stack


@dataclass(frozen=True)
class _Slice:
    """The tags of one DICOM slice that decide whether and where it belongs to the stack."""

    path: str
    series: str
    position: np.ndarray
    orientation: np.ndarray
    size: tuple[int, ...]
    spacing: tuple[float, ...]


def read_dicom(folder: Path, series: int | str | None = None, allow_non_hu: bool = False) -> CTVolume:
    """One DICOM series. Slices are sorted by position here, for file names and instance numbers need not follow it."""
    source = folder.name
    slices = [found for path in sorted(folder.iterdir()) if path.is_file() for found in [_dicom_slice(path)] if found]
    if not slices:
        raise CTReadError(source, "content", "no DICOM file", "the slices of one CT series")
    counts = {}
    for one in slices:
        counts[one.series] = counts.get(one.series, 0) + 1
    if len(counts) > 1:
        sizes = ", ".join(str(count) for count in sorted(counts.values(), reverse=True))
        raise CTReadError(
            source, "series", f"{len(counts)} (of {sizes} slices)", "one: give the folder of the series that you mean"
        )
    if len(slices) < MIN_LENGTH:
        raise CTGeometryError(source, "number of slices", len(slices), f"at least {MIN_LENGTH}")
    first = slices[0]
    for one in slices:
        for name in ("size", "spacing", "orientation"):
            if not np.allclose(getattr(one, name), getattr(first, name), atol=1e-4):
                raise CTGeometryError(source, f"slice {name}", "not the same in all slices", "one grid")
    row, column = first.orientation.reshape(2, 3)
    normal = np.cross(row, column)
    slices.sort(key=lambda one: float(one.position @ normal))
    positions = np.array([one.position for one in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    thickness = float(step @ normal)
    if thickness < 1e-3:
        raise CTGeometryError(source, "slice positions", "all the same", "one position per slice")
    tilt = math.degrees(math.acos(min(1.0, thickness / float(np.linalg.norm(step)))))
    if math.sin(math.radians(tilt)) > MAX_TILT_COSINE:
        raise CTGeometryError(source, "gantry tilt", f"{tilt:.1f} degrees", "slices stacked at right angles")
    even = positions[0] + np.arange(len(slices))[:, None] * step
    if np.abs((positions - even) @ normal).max() > MAX_SLICE_OFFSET * thickness:
        gaps = np.diff(positions @ normal)
        raise CTGeometryError(
            source,
            "slice spacing",
            f"{gaps.min():.3g} to {gaps.max():.3g} mm",
            "even: no slice missing, duplicate or out of step",
        )
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([one.path for one in slices])
    try:
        array = sitk.GetArrayFromImage(reader.Execute()).T
    except RuntimeError as error:
        raise CTReadError(source, "pixel data", "unreadable", "slices that GDCM can decode") from error
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * first.spacing[0], column * first.spacing[1], step], axis=1)
    affine[:3, 3] = positions[0]
    return make_volume(array, LPS_TO_RAS @ affine, source, "DICOM", allow_non_hu=allow_non_hu)


def _dicom_slice(path: Path) -> _Slice | None:
    """The slice in a file; `None` for a file of another kind, as folders also hold notes and licences."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        with path.open("rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        if is_dicom and path.name != "DICOMDIR":
            raise CTReadError(path.name, "content", "damaged", "a readable DICOM slice") from error
        return None
    tag = {key: reader.GetMetaData(key).strip("\0 ") for key in reader.GetMetaDataKeys()}
    if tag.get("0008|0060", "CT") not in ("CT", ""):
        raise CTReadError(path.name, "Modality", tag["0008|0060"], "CT")
    if tag.get("0028|0004") != "MONOCHROME2" or reader.GetNumberOfComponents() != 1:
        raise CTIntensityError(path.name, "PhotometricInterpretation", tag.get("0028|0004", "missing"), "MONOCHROME2")
    numbers = {}
    for key, name, length in (("0020|0032", "ImagePositionPatient", 3), ("0020|0037", "ImageOrientationPatient", 6)):
        try:
            numbers[name] = np.array([float(number) for number in tag.get(key, "").split("\\")])
        except ValueError as error:
            raise CTGeometryError(path.name, name, "missing or not numbers", f"{length} numbers") from error
        if numbers[name].size != length or not np.isfinite(numbers[name]).all():
            raise CTGeometryError(path.name, name, f"{numbers[name].size} numbers", f"{length} finite numbers")
    size = reader.GetSize()
    if len(size) > 2 and size[2] != 1:
        raise CTReadError(path.name, "number of frames", size[2], "1: one file per slice")
    return _Slice(
        path=str(path),
        series=tag.get("0020|000e", ""),
        position=numbers["ImagePositionPatient"],
        orientation=numbers["ImageOrientationPatient"],
        size=size[:2],
        spacing=reader.GetSpacing()[:2],
    )


__all__ = ["read_dicom"]
