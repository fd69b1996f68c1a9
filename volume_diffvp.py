# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A validated CT: its voxels in Hounsfield units, its grid in the patient, and the errors for everything else.

`reading_diffvp.py` turns a file or object into a [`CTVolume`] through [`make_volume`]; `resampling_diffvp.py` turns it
into the tensor that the model reads.

Axes: a `CTVolume` is indexed [x, y, z] with x growing to the patient's Left, y to Posterior, z to Superior (LPS).
World coordinates are RAS+ millimetres, as in NIfTI.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import nibabel as nib
import numpy as np

if TYPE_CHECKING:
    import torch  # importing it takes longer than reading a scan, so it is imported where a tensor is made

T = TypeVar("T")

# Limits of what counts as a chest CT. Everything else is refused with the reason.
MIN_SPACING, MAX_SPACING = 0.1, 10.0  # mm
MIN_LENGTH = 8  # voxels along each axis
MAX_LENGTH = 4096  # the longest CT-RATE volume has 1,617 slices
MAX_TILT_COSINE = 0.01  # |cosine| between two grid axes: 0.6 degrees of shear moves a voxel by 3 mm over 300 mm
MAX_ROTATION = 30.0  # degrees between a grid axis and the patient axis that it stands for
ACCEPT_NON_HU = "allow_non_hu=True (--allow-non-hu) accepts it with your own hu_window (--hu-window)"
MAX_HU_MINIMUM = -500.0  # HU: air is -1000, and every chest CT contains air
MIN_HU_MAXIMUM = 0.0  # HU: water is 0, and every patient contains water
SOFT_TISSUE = (-200.0, 200.0)  # HU: fat, muscle, blood
# Minimum share of soft tissue among all voxels, and among the voxels above BODY_HU, which are neither air nor lung.
# One of the two suffices, because a small patient's field of view is mostly air. Real chest CTs have above 0.3 and
# 0.75. The same scans have below 0.015 and 0.2 after a second rescale or with swapped bytes, errors that the range of
# the voxels may not show.
MIN_SOFT_TISSUE, MIN_SOFT_BODY, BODY_HU = 0.02, 0.25, -700.0
# A rescale of the wrong sign makes air the densest material. In a chest, bone and metal above DENSE_HU take a few
# percent of the voxels, fewer than air and lung below AIRY_HU.
AIRY_HU, DENSE_HU, MAX_DENSE = -500.0, 500.0, 0.25
MAX_VALUE = 1e30  # of any voxel, also without Hounsfield units, because resampling computes in float32
MIN_HU, MAX_HU = -32768.0, 65535.0  # lowest padding of scanners, and highest value of extended CT scales at metal

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

# Increment it when a change of reading or resampling changes the tensors, so that caches drop the older ones.
PREPROCESSING_VERSION = 2

# Common values of `CTVolume.layout`: how grid and Hounsfield units were found.
STATED = "grid and Hounsfield units as the file states them"
GIVEN = "spacing and LPS order as the caller states them"
QFORM = "grid as the qform states it; the sform is of another space"
DICOM = "DICOM series"  # prefix; slices and rescales follow


def is_assumed(layout: str) -> bool:
    """True if the file states no grid: `CTVolume.layout` then tells which one was assumed."""
    return layout not in (STATED, GIVEN, QFORM) and not is_series(layout)


def is_series(layout: str) -> bool:
    """True if `CTVolume.layout` is that of a DICOM series."""
    return layout.startswith(DICOM)


class CTInputError(ValueError):
    """The input is not a usable chest CT. States the source, the field, the value found and the value expected.

    Messages contain no free text from headers, which may name the patient.
    """

    def __init__(self, source: str, field: str, found, expected: str):
        super().__init__(f"{source}: {field}: {found} (expected {expected})")
        self.source, self.field, self.found, self.expected = source, field, found, expected

    def __reduce__(self):
        return type(self), (self.source, self.field, self.found, self.expected)


class CTReadError(CTInputError):
    """The source is missing, of an unknown kind, or cannot be decoded."""


class CTGeometryError(CTInputError):
    """The grid is unusable: wrong number of axes, spacing, orientation, tilt, uneven or missing slices."""


class CTIntensityError(CTInputError):
    """The voxels are unusable: not Hounsfield units, not finite, or constant."""


@dataclass(frozen=True, eq=False)
class CTVolume:
    """A validated CT.

    Attributes:
        array: stored voxels [x, y, z] in LPS order; z is the slowest axis in memory. Hounsfield units are
            `slope * array + intercept` if `is_hu`.
        affine: 4x4, voxel index of the *file's* grid -> RAS+ world mm.
        shape: shape of the file's grid, including any trailing axes of length 1.
        axes: the file axis that each LPS axis (x, y, z) comes from.
        flips: for each LPS axis, True if it runs against its file axis.
        spacing: mm along x, y, z.
        source: name of the file or kind of the object.
        layout: how grid and Hounsfield units were found, in words.
        slope, intercept: rescale from stored values to Hounsfield units.
        is_hu: False if the caller overrode the test for Hounsfield units.
        contrast: True if the header names a contrast medium; `None` if it does not say.
        warnings: defects that the reader was allowed to accept, in words that identify no patient.
    """

    array: np.ndarray
    affine: np.ndarray
    shape: tuple[int, ...]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing: tuple[float, float, float]
    source: str
    layout: str
    slope: float = 1.0
    intercept: float = 0.0
    is_hu: bool = True
    contrast: bool | None = None
    warnings: tuple[str, ...] = ()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the content: the shape, and the LPS voxels rounded to whole HU.

        A scan has the same digest in every file format, storage orientation and number type.
        """
        digest = hashlib.sha256(repr(self.array.shape).encode())
        stored_hu = self.array.dtype == np.int16 and (self.slope, self.intercept) == (1, 0)
        for plane in self.array.T:
            if not stored_hu:
                plane = np.clip(np.rint(plane * self.slope + self.intercept), -32768, 32767)
            digest.update(np.ascontiguousarray(plane, dtype="<i2").data)
        return digest.hexdigest()

    @cached_property
    def coverage(self) -> dict | None:
        """Part of the chest that the scan shows, from [`measure_coverage`]."""
        from .anatomy_diffvp import measure_coverage  # which imports this file

        return measure_coverage(self)


def triple(values: Iterable[T]) -> tuple[T, T, T]:
    """Return three values as a tuple, one per axis."""
    first, second, third = values
    return first, second, third


def make_volume(
    array: np.ndarray,
    affine: np.ndarray,
    source: str,
    layout: str,
    *,
    slope: float = 1.0,
    intercept: float = 0.0,
    allow_non_hu: bool = False,
) -> CTVolume:
    """Check geometry and intensities, and view the array in LPS order. Every reader ends with this function.

    Args:
        array: stored voxels in the file's own axis order, (i, j, k), with any number of trailing axes of length 1.
        affine: 4x4, index -> RAS+ world mm.
        source, layout, slope, intercept: see [`CTVolume`].
        allow_non_hu: accept voxels that are not Hounsfield units.

    Raises:
        CTGeometryError: the shape or the affine is unusable.
        CTIntensityError: the voxels or the rescale are unusable.
    """
    shape = array.shape
    check_shape(shape, source)
    affine = np.asarray(affine, dtype=np.float64)
    _check_affine(affine, source)
    if array.dtype.kind not in "iuf":
        raise CTIntensityError(source, "data type", array.dtype.name, "one real number per voxel")
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope != 0):
        raise CTIntensityError(
            source, "rescale slope and intercept", f"{slope:g} and {intercept:g}", "finite, and a slope other than 0"
        )
    array = array.reshape(shape[:3])
    is_hu = _check_intensities(array, slope, intercept, source, allow_non_hu)
    orientation = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(("L", "P", "S"))
    )
    axes = triple(int(axis) for axis in np.argsort(orientation[:, 0]))
    flips = triple(bool(orientation[axis, 1] < 0) for axis in axes)
    lps = array.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    if abs(lps.strides[2]) < max(map(abs, lps.strides)):
        # Later steps go through the volume plane by plane along z, so make these planes contiguous in memory. A fixed
        # order also makes the tensor of a scan identical bit for bit, whatever the storage order of the file.
        lps = np.asfortranarray(lps)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return CTVolume(
        array=lps,
        affine=affine,
        shape=tuple(int(n) for n in shape),
        axes=axes,
        flips=flips,
        spacing=triple(float(spacing[axis]) for axis in axes),
        source=source,
        layout=layout,
        slope=float(slope),
        intercept=float(intercept),
        is_hu=is_hu,
    )


def is_tensor(value) -> TypeGuard[torch.Tensor]:
    """True if a value is a torch tensor. Does not import torch: a caller that has a tensor has imported it."""
    return "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor)


def lps_affine(spacing, source: str) -> np.ndarray:
    """Return the RAS affine of an array in LPS order, with the origin at its first voxel.

    Raises:
        CTGeometryError: `spacing` is not three numbers above 0.
    """
    expected = "three numbers (x, y, z) in mm, above 0"
    try:
        numbers = tuple(float(mm) for mm in spacing)
    except (TypeError, ValueError) as error:
        raise CTGeometryError(source, "spacing", f"a value of type {type(spacing).__name__}", expected) from error
    if len(numbers) != 3 or not all(0 < mm < math.inf for mm in numbers):  # a negative spacing mirrors the patient
        raise CTGeometryError(source, "spacing", numbers, expected)
    return LPS_TO_RAS @ np.diag([*numbers, 1.0])


def lps_grid(axes: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """Return the RAS affine of a grid from its axes (columns, in mm) and origin in LPS."""
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = axes, origin
    return LPS_TO_RAS @ affine


def check_shape(shape: tuple[int, ...], source: str) -> None:
    """Check that the shape is a volume of plausible size. Readers also call this before they allocate memory.

    Raises:
        CTGeometryError: the shape has fewer or more than three axes, or an axis is too short or too long.
    """
    shape = tuple(int(n) for n in shape)
    if len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise CTGeometryError(source, "shape", shape, "three axes, and any further ones of length 1")
    if min(shape[:3]) < MIN_LENGTH or max(shape[:3]) > MAX_LENGTH:
        raise CTGeometryError(source, "shape", shape, f"{MIN_LENGTH} to {MAX_LENGTH} voxels along each axis")


def _check_intensities(array: np.ndarray, slope: float, intercept: float, source: str, allow_non_hu: bool) -> bool:
    """True if the voxels are Hounsfield units. Other voxels are an error unless `allow_non_hu` is set."""
    # One plane at a time: it is still in the CPU cache for the second pass. A NaN carries over into the extremes.
    extremes = np.array([(plane.min(), plane.max()) for plane in array.T])
    stored = float(extremes[:, 0].min()), float(extremes[:, 1].max())
    low, high = sorted(value * slope + intercept for value in stored)  # a negative slope exchanges them
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CTIntensityError(source, "voxels", "some are NaN or infinite", "finite numbers")
    if max(abs(value) for value in (*stored, low, high)) > MAX_VALUE:
        raise CTIntensityError(source, "voxel range", f"{low:g} to {high:g}", f"at most {MAX_VALUE:g}")
    if low == high:
        raise CTIntensityError(source, "voxels", f"{low:g} everywhere", "an image")
    in_range = MIN_HU <= low <= MAX_HU_MINIMUM and MIN_HU_MAXIMUM <= high <= MAX_HU
    sample = array[tuple(slice(None, None, max(1, n // 32)) for n in array.shape)] * float(slope) + float(intercept)
    soft = float(np.mean((sample > SOFT_TISSUE[0]) & (sample < SOFT_TISSUE[1])))
    body = float(np.mean(sample > BODY_HU))
    airy, dense = float(np.mean(sample < AIRY_HU)), float(np.mean(sample > DENSE_HU))
    inverted = dense > max(airy, MAX_DENSE)
    enough = soft >= MIN_SOFT_TISSUE or soft > MIN_SOFT_BODY * body
    if in_range and enough and not inverted:
        return True
    if allow_non_hu:
        return False
    if in_range and not enough:
        raise CTIntensityError(
            source,
            "soft tissue",
            f"{soft:.1%} of the voxels",
            f"at least {MIN_SOFT_TISSUE:.0%}, or {MIN_SOFT_BODY:.0%} of the body, between {SOFT_TISSUE[0]:g} and "
            f"{SOFT_TISSUE[1]:g} HU; a rescale is missing or was applied twice, or the byte order is wrong; "
            + ACCEPT_NON_HU,
        )
    if in_range:
        raise CTIntensityError(
            source, "voxels", f"{dense:.0%} above {DENSE_HU:g} HU and {airy:.0%} below {AIRY_HU:g} HU",
            "more air than bone: the rescale seems to have the wrong sign; " + ACCEPT_NON_HU,
        )  # fmt: skip
    if low >= 0 and high <= 255:
        reason = "this looks like an 8-bit export, as in CTRG, whose Hounsfield units are lost"
    elif low >= 0:
        reason = "the rescale to HU is missing, as in version 1 of CT-RATE, where metadata= (--metadata) states it"
    else:
        reason = "a rescale is missing or was applied twice"
    raise CTIntensityError(
        source,
        "voxel range",
        f"{low:g} to {high:g}",
        f"Hounsfield units, with air below {MAX_HU_MINIMUM:g} and tissue above {MIN_HU_MAXIMUM:g}; {reason}; "
        + ACCEPT_NON_HU,
    )


def _check_affine(affine: np.ndarray, source: str) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise CTGeometryError(source, "affine", "not 4x4 or not finite", "a 4x4 matrix of finite numbers")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not spacing.all() or abs(np.linalg.det(affine[:3, :3] / np.where(spacing, spacing, 1))) < 1e-3:
        raise CTGeometryError(source, "affine", "singular", "three independent axes")
    # The tolerance covers spacings that come from rounded positions.
    if spacing.min() < MIN_SPACING * (1 - 1e-4) or spacing.max() > MAX_SPACING * (1 + 1e-4):
        found = " x ".join(f"{mm:.4g}" for mm in spacing)
        raise CTGeometryError(source, "spacing", f"{found} mm", f"{MIN_SPACING} to {MAX_SPACING} mm along each axis")
    units = affine[:3, :3] / spacing
    tilt = np.abs(units.T @ units - np.eye(3)).max()
    if tilt > MAX_TILT_COSINE:
        found = f"{90 - math.degrees(math.acos(min(1.0, tilt))):.1f} degrees"
        raise CTGeometryError(source, "gantry tilt", found, "axes at right angles")
    rotation = math.degrees(math.acos(min(1.0, np.abs(units).max(axis=0).min())))
    if rotation > MAX_ROTATION:
        raise CTGeometryError(
            source,
            "rotation against the patient's axes",
            f"{rotation:.0f} degrees",
            f"at most {MAX_ROTATION:.0f} degrees; resample the scan to its closest axial grid first",
        )


_MOVED = {"CTGeometry": ".resampling_diffvp", "resample": ".resampling_diffvp"}
_MOVED |= {"save_map": ".map_diffvp", "to_input_grid": ".map_diffvp"}


def __getattr__(name: str) -> Any:
    """Find the names that were in this file, because programs import them from here."""
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MOVED[name], __package__), name)


__all__ = [
    "DICOM",
    "GIVEN",
    "PREPROCESSING_VERSION",
    "QFORM",
    "STATED",
    "CTGeometryError",
    "CTInputError",
    "CTIntensityError",
    "CTReadError",
    "CTVolume",
    "check_shape",
    "is_assumed",
    "is_series",
    "is_tensor",
    "lps_affine",
    "lps_grid",
    "make_volume",
    "triple",
]
