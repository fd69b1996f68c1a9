# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""From a [`CTVolume`] to the tensor that the model reads, with the geometry that leads back to the file's voxels.

The tensor is indexed [depth, height, width] = [z, y, x], in the LPS order of the volume.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .volume_diffvp import CTIntensityError, CTVolume, is_tensor, triple

if TYPE_CHECKING:
    import torch  # importing it takes longer than reading a scan, so it is imported where a tensor is made


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
    box = foreground_box(volume, foreground_hu) if crop_foreground else tuple((0, n) for n in lengths)
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
        taps(_positions(offset[axis], scale[axis], counts[axis], limits[axis][0]), *limits[axis],
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
        size=triple(int(n) for n in size),
        offset=triple(float(value) for value in offset),
        scale=triple(float(value) for value in scale),
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


def foreground_box(volume: CTVolume, threshold: float) -> tuple[tuple[int, int], ...]:
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
class Taps:
    """Linear interpolation along one axis: output i is the sum over t of `weights[i, t]` * input[`indices[i, t]`]."""

    indices: np.ndarray
    weights: np.ndarray

    @property
    def touched(self) -> tuple[int, int]:
        """Half-open range of the inputs with a weight above 0."""
        used = self.indices[self.weights > 0]
        return (int(used.min()), int(used.max()) + 1) if used.size else (0, 1)

    def shifted(self, start: int) -> Taps:
        """Return the same interpolation for an input that begins at `start`."""
        return Taps(np.where(self.weights > 0, self.indices - start, 0), self.weights)

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


def taps(positions: np.ndarray, start: int, stop: int, width: float = 1.0) -> Taps:
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
    return Taps(indices.clip(start, stop - 1), weights.astype(np.float32))


__all__ = ["CTGeometry", "Taps", "foreground_box", "resample", "taps"]
