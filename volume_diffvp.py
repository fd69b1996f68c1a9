# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A validated CT, its resampling to the tensor that the model reads, and the way back to the input file's voxels.

`reading_diffvp.py` turns a file or object into a [`CTVolume`] through [`make_volume`]. [`resample`] turns the volume
into a tensor and a [`CTGeometry`]. [`to_input_grid`] and [`save_map`] go the other way.

Axes: a `CTVolume` is indexed [x, y, z] with x growing to the patient's Left, y to Posterior, z to Superior (LPS). The
tensor is indexed [depth, height, width] = [z, y, x]. World coordinates are RAS+ millimetres, as in NIfTI.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import nibabel as nib
import numpy as np
from isal import igzip

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


@dataclass(frozen=True)
class CTGeometry:
    """Mapping from the tensor's grid back to the input file's grid. Serialises to JSON through `to_dict`.

    `size` is the tensor's (depth, height, width). Tensor index o along an axis lies at `offset + scale * o` on the LPS
    grid; `offset` and `scale` are in voxels, in the order x, y, z. `coverage` is the result of [`measure_coverage`].
    The other fields are those of [`CTVolume`]; `sha256` is `None` if it was not requested.
    """

    source: str
    layout: str
    sha256: str | None
    is_hu: bool
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing: tuple[float, float, float]
    size: tuple[int, int, int]
    offset: tuple[float, float, float]
    scale: tuple[float, float, float]
    coverage: dict | None = None
    warnings: tuple[str, ...] = ()

    @property
    def tensor_spacing(self) -> tuple[float, float, float]:
        """Spacing (depth, height, width) of the tensor's grid in mm."""
        x, y, z = (scale * spacing for scale, spacing in zip(self.scale, self.spacing, strict=True))
        return z, y, x

    @property
    def tensor_affine(self) -> np.ndarray:
        """4x4: tensor index (depth, height, width) -> RAS+ world mm."""
        to_file = np.zeros((4, 4))
        to_file[3, 3] = 1
        for lps, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            sign, start = (-1, self.shape[axis] - 1) if flip else (1, 0)
            to_file[axis, 2 - lps] = sign * self.scale[lps]
            to_file[axis, 3] = start + sign * self.offset[lps]
        return np.asarray(self.affine) @ to_file

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        """Return the geometry as a dict in a 0-dimensional array, which `datasets.Dataset.map` needs to store it.

        `datasets` would store a mapping, too, but code that moves batches to a device would take a mapping apart.
        """
        array = np.empty((), object)
        array[()] = self.to_dict()
        return array

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping | CTGeometry) -> CTGeometry:
        """Build a geometry from the result of `to_dict`.

        JSON and `datasets` may have turned its tuples into lists, arrays or tensors.

        Raises:
            TypeError: a field is missing or unknown.
        """
        if isinstance(values, CTGeometry):
            return values
        return cls(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    """Convert lists, arrays and tensors to tuples of numbers, at any depth."""
    if isinstance(value, (np.ndarray, np.generic)) or is_tensor(value):
        value = value.tolist()
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


def _triple(values: Iterable[T]) -> tuple[T, T, T]:
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
    axes = _triple(int(axis) for axis in np.argsort(orientation[:, 0]))
    flips = _triple(bool(orientation[axis, 1] < 0) for axis in axes)
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
        spacing=_triple(float(spacing[axis]) for axis in axes),
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


def resample(
    volume: CTVolume,
    size: tuple[int, int, int],
    spacing: tuple[float, float, float] | None = None,
    crop_foreground: bool = True,
    foreground_hu: float = -1000.0,
    hu_window: tuple[float, float] = (-1000.0, 200.0),
    antialias: bool = False,
    digest: bool = True,
) -> tuple[torch.Tensor, CTGeometry]:
    """Clip to the window, map it to [-1, 1], and interpolate once, trilinearly, to a fixed grid.

    Without `spacing`, the (cropped) volume is stretched to `size`. This equals MONAI's Orientation("LPS"),
    ScaleIntensityRange(clip=True), CropForeground, Resize(mode="trilinear"), without its copies of the full grid.
    With `spacing`, the grid has that spacing and is centred on the centre of the foreground box, so that a millimetre
    is the same number of voxels in every patient. Positions outside the volume are air.

    Args:
        size: voxels (depth, height, width).
        spacing: mm (depth, height, width), or `None` to stretch.
        crop_foreground: use the bounding box of the voxels above `foreground_hu` instead of the whole volume.
        foreground_hu: HU threshold separating patient from air.
        hu_window: lowest and highest HU, which become -1 and 1.
        antialias: if the tensor's grid is coarser than the scan's, average over a triangle as wide as two of the
            tensor's voxels, as PIL and `torch.nn.functional.interpolate(antialias=True)` do, instead of interpolating
            between two neighbours.
        digest: compute the SHA-256 of the content, which takes as long as the interpolation.

    Returns:
        float32 tensor (1, depth, height, width), and the geometry that maps it back to the file's grid.

    Raises:
        CTIntensityError: no voxel lies above `foreground_hu`.
    """
    lengths = volume.array.shape
    box = _foreground_box(volume, foreground_hu) if crop_foreground else tuple((0, n) for n in lengths)
    counts = size[::-1]
    if spacing is None:
        limits = box
        scale = [(stop - start) / count for (start, stop), count in zip(box, counts, strict=True)]
        # align_corners=False: the outer borders of the first and last voxel stay in place; their centres move.
        offset = [start + 0.5 * step - 0.5 for (start, _), step in zip(box, scale, strict=True)]
    else:
        limits = tuple((0, n) for n in lengths)
        scale = [mm / voxel for mm, voxel in zip(spacing[::-1], volume.spacing, strict=True)]
        offset = [
            (start + stop - 1) / 2 - step * (count - 1) / 2
            for (start, stop), step, count in zip(box, scale, counts, strict=True)
        ]
    x, y, z = (
        _taps(_positions(offset[axis], scale[axis], counts[axis], limits[axis][0]), *limits[axis],
              width=max(1.0, scale[axis]) if antialias else 1.0)
        for axis in range(3)
    )  # fmt: skip
    (x_start, x_stop), (y_start, y_stop) = x.touched, y.touched
    planes = volume.array[x_start:x_stop, y_start:y_stop].T  # [z, y, x]
    x, y = x.shifted(x_start), y.shifted(y_start)
    low, high = hu_window
    result = np.zeros(tuple(size), np.float32)
    windowed: dict[int, np.ndarray] = {}  # planes that the next slice of the tensor may need again
    spare = []  # arrays of planes no longer needed, for reuse: allocating memory costs more than writing to it
    mixed, term = (np.empty(planes.shape[1:], np.float32) for _ in range(2))
    rows, row_term = (np.empty((size[1], planes.shape[2]), np.float32) for _ in range(2))
    for depth, (indices, weights) in enumerate(zip(z.indices, z.weights, strict=True)):
        touched = [(int(k), weight) for k, weight in zip(indices, weights, strict=True) if weight]
        if not touched:
            continue
        first = min(k for k, _ in touched)
        for k in [k for k in windowed if k < first]:
            spare.append(windowed.pop(k))
        for number, (k, weight) in enumerate(touched):
            if k not in windowed:
                windowed[k] = spare.pop() if spare else np.empty(planes.shape[1:], np.float32)
                _window(planes[k], volume, low, high, windowed[k])
            np.multiply(windowed[k], weight, out=term if number else mixed)
            if number:
                mixed += term
        y.interpolate(mixed, 0, rows, row_term)
        result[depth] = x.interpolate(rows, 1)
    # Up to here, values are HU above the window's lower end: zero weights outside the volume give 0, which is air.
    result *= np.float32(2 / (high - low))
    result -= 1
    import torch

    tensor = torch.from_numpy(np.clip(result, -1, 1, out=result))[None]
    geometry = CTGeometry(
        source=volume.source,
        layout=volume.layout,
        sha256=volume.sha256 if digest else None,
        is_hu=volume.is_hu,
        shape=volume.shape,
        affine=tuple(tuple(float(value) for value in row) for row in volume.affine),
        axes=volume.axes,
        flips=volume.flips,
        spacing=volume.spacing,
        size=_triple(int(n) for n in size),
        offset=_triple(float(value) for value in offset),
        scale=_triple(float(value) for value in scale),
        warnings=volume.warnings,
    )
    return tensor, geometry


def _window(plane: np.ndarray, volume: CTVolume, low: float, high: float, values: np.ndarray) -> None:
    """Write a plane in HU above `low`, clipped to the window, into `values` (float32)."""
    np.copyto(values, plane, casting="same_kind")
    if volume.slope != 1:
        values *= np.float32(volume.slope)
    values += np.float32(volume.intercept - low)
    np.clip(values, 0, np.float32(high - low), out=values)


def _foreground_box(volume: CTVolume, threshold: float) -> tuple[tuple[int, int], ...]:
    """Return the half-open bounding box, per axis, of the voxels above a threshold in HU.

    Most scans have such voxels at every border. Every 16th plane is searched whole, and the other planes only outside
    the box found in these.

    Raises:
        CTIntensityError: no voxel lies above the threshold.
    """
    planes = volume.array.T  # [z, y, x]

    # Stored value of the densest voxel, which is the lowest value if the slope is negative.
    densest = np.max if volume.slope > 0 else np.min

    def above(values):
        return values * volume.slope + volume.intercept > threshold

    def span(projection: np.ndarray) -> tuple[int, int]:
        [indices] = np.nonzero(above(projection))
        return int(indices[0]), int(indices[-1]) + 1

    depths = range(len(planes))
    first = next((z for z in depths if above(densest(planes[z]))), None)
    if first is None:
        raise CTIntensityError(volume.source, "foreground", f"no voxel above {threshold:g} HU", "a patient")
    last = next(z for z in reversed(depths) if above(densest(planes[z])))
    planes = planes[first : last + 1]
    highest = densest(planes[::16], axis=0)
    (top, bottom), (left, right) = span(densest(highest, axis=1)), span(densest(highest, axis=0))
    whole = slice(None)
    for y, x in ((slice(top), whole), (slice(bottom, None), whole), (whole, slice(left)), (whole, slice(right, None))):
        highest[y, x] = densest(planes[:, y, x], axis=0)
    return span(densest(highest, axis=0)), span(densest(highest, axis=1)), (first, last + 1)


def _positions(offset: float, scale: float, count: int, start: int) -> np.ndarray:
    """Return the positions of the tensor's indices on the LPS grid, in voxels.

    They are computed in float32, relative to voxel `start`, to equal `torch.nn.functional.interpolate`: at voxel 400
    its rounding is 1e-5 of a voxel, which changes the result.
    """
    half = np.float32(offset - start + 0.5 - 0.5 * scale)
    steps = np.arange(count, dtype=np.float32) + np.float32(0.5)
    return (np.float32(scale) * steps - np.float32(0.5) + half).astype(np.float64) + start


@dataclass(frozen=True, eq=False)
class _Taps:
    """Linear interpolation along one axis: output i is the sum over t of `weights[i, t]` * input[`indices[i, t]`]."""

    indices: np.ndarray
    weights: np.ndarray

    @property
    def touched(self) -> tuple[int, int]:
        """Half-open range of the inputs with a weight above 0."""
        used = self.indices[self.weights > 0]
        return (int(used.min()), int(used.max()) + 1) if used.size else (0, 1)

    def shifted(self, start: int) -> _Taps:
        """Return the same interpolation for an input that begins at `start`."""
        return _Taps(np.where(self.weights > 0, self.indices - start, 0), self.weights)

    def interpolate(
        self, values: np.ndarray, axis: int, result: np.ndarray | None = None, term: np.ndarray | None = None
    ) -> np.ndarray:
        """Interpolate along an axis.

        Args:
            values: the input.
            axis: axis of `values` to interpolate along.
            result, term: optional work arrays of the output's shape, which save allocations.

        Returns:
            The output, in `result` if given.
        """
        shape = [1] * values.ndim
        shape[axis] = -1

        def weighted(tap: int, out: np.ndarray | None) -> np.ndarray:
            # mode="clip" is faster and changes nothing: every index lies inside.
            taken = values.take(self.indices[:, tap], axis, out=out, mode="clip")
            taken *= self.weights[:, tap].reshape(shape)
            return taken

        total = weighted(0, result)
        for tap in range(1, self.indices.shape[1]):
            total += weighted(tap, term)
        return total


def _taps(positions: np.ndarray, start: int, stop: int, width: float = 1.0) -> _Taps:
    """Return the weights of voxels start..stop-1 at `positions`, from a triangle that falls to 0 at `width` voxels.

    Width 1 is linear interpolation. Between the centre and the outer edge of a border voxel, its value is constant.
    Beyond the edge, all weights are 0.
    """
    inside = (positions > start - 0.5 - 1e-6) & (positions < stop - 0.5 + 1e-6)
    centres = positions if width > 1 else positions.clip(start, stop - 1)
    first = np.floor(centres - width).astype(int) + 1 if width > 1 else np.floor(centres).astype(int)
    indices = first[:, None] + np.arange(math.ceil(2 * width) if width > 1 else 2)
    weights = (1 - np.abs(indices - centres[:, None]) / width).clip(min=0)
    weights[~inside] = 0
    weights[(indices < start) | (indices >= stop)] = 0
    total = weights.sum(axis=1, keepdims=True)
    weights = np.divide(weights, total, out=weights, where=total > 0)
    return _Taps(indices.clip(start, stop - 1), weights.astype(np.float32))


def to_input_grid(map: torch.Tensor | np.ndarray, geometry: CTGeometry | Mapping) -> np.ndarray:
    """Resample a map from the tensor's grid to the voxels of the input file, trilinearly.

    Args:
        map: (depth, height, width), of shape `geometry.size`.
        geometry: the tensor's geometry, or its dict as stored by `datasets` or JSON.

    Returns:
        float32 array in the file's own shape and axis order; 0 outside the tensor.

    Raises:
        ValueError: the map's shape differs from `geometry.size`.
    """
    geometry = CTGeometry.from_dict(geometry)
    values = np.asarray(map.detach().cpu().float() if is_tensor(map) else map, dtype=np.float32)
    if values.shape != geometry.size:
        raise ValueError(f"The map has shape {values.shape}, but the geometry has size {geometry.size}.")
    for lps, axis in ((0, 2), (1, 1), (2, 0)):  # of [z, y, x]
        length = geometry.shape[geometry.axes[lps]]
        positions = (np.arange(length) - geometry.offset[lps]) / geometry.scale[lps]
        values = _taps(positions, 0, geometry.size[axis]).interpolate(values, axis)
    array = values.T[tuple(slice(None, None, -1 if flip else 1) for flip in geometry.flips)]
    # NIfTI's order of voxels, which most maps have at this point.
    return np.asfortranarray(array.transpose(np.argsort(geometry.axes))).reshape(geometry.shape, order="F")


def save_map(path: str | os.PathLike, map: torch.Tensor | np.ndarray, geometry: CTGeometry | Mapping) -> Path:
    """Write a map on the tensor's grid as NIfTI (.nii or .nii.gz) with the shape and affine of the input file.

    If the file states no grid, the map has the grid under which the file was read. The map is written atomically.

    Raises:
        ValueError: the suffix is not .nii or .nii.gz, or the map's shape differs from `geometry.size`.
    """
    from .storage_diffvp import replacing  # imports transformers, which takes longer than to read a scan

    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    if suffix not in (".nii", ".nii.gz"):
        raise ValueError(f"{path.name}: suffix: {suffix!r} (expected .nii or .nii.gz)")
    geometry = CTGeometry.from_dict(geometry)
    affine = np.asarray(geometry.affine)
    image = nib.Nifti1Image(to_input_grid(map, geometry), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    with replacing(path) as temporary:
        # Floats hardly compress at any level, and isal takes a tenth of the time of zlib.
        with igzip.open(temporary, "wb", compresslevel=1) if suffix == ".nii.gz" else open(temporary, "wb") as file:
            image.to_stream(file)
    return path


__all__ = [
    "GIVEN",
    "PREPROCESSING_VERSION",
    "STATED",
    "CTGeometry",
    "CTGeometryError",
    "CTInputError",
    "CTIntensityError",
    "CTReadError",
    "CTVolume",
    "check_shape",
    "is_tensor",
    "lps_affine",
    "lps_grid",
    "make_volume",
    "resample",
    "save_map",
    "to_input_grid",
]
