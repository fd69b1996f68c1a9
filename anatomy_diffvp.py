# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Check that a CT shows a chest: find the air-filled lungs on a coarse grid, in a few milliseconds.

A voxel is inside the body if there is tissue on all four sides of it in its axial slice, and if the tissue in front
and behind is thicker than a table top. Air inside the body counts as lung if enough of it has the density of lung
tissue: the air in bowel and trachea has lower HU. Lengths and areas are relative to the size of the body, so that
infants pass too. No limit requires two lungs, healthy lungs, or lungs of a particular shape.
"""

import operator
from functools import reduce

import numpy as np

from .volume_diffvp import CTInputError, CTVolume

GRID = (64, 64, 32)  # number of voxels sampled along x, y, z, or up to twice as many
BLOCK = 4  # side length, in pixels of that grid, of the squares that are classified as lung or not
TISSUE = -250.0  # HU threshold of tissue: noisy fat at -100 is above it, lung below
LUNG = (-960.0, -500.0)  # HU range of lung tissue: bowel gas is below; partial volumes of the bowel wall are excluded
MIN_LUNG_SHARE = 0.3  # least share of lung tissue in the air of a square; severe emphysema leaves more
# The size of the body is the square root of its median axial area: 26 cm in adults, 9 cm in newborns.
MIN_BESIDE, MIN_BEHIND = 0.02, 0.05  # least tissue at the sides, and in front and behind, as a share of the size
MIN_AREA = 0.03  # share of the body's area; a slice with less lung counts as a slice without lung
# Share of the size cubed. Healthy lungs have 0.2 to 0.5, the lung bases on an abdominal CT 0.01 or less.
MIN_VOLUME = 0.01
MIN_EXTENT = 0.5  # share of the size; less lung, cut off next to a longer part without lung, is another body region
NEIGHBOURS = ((np.s_[:, 1:], np.s_[:, :-1]), (np.s_[:, :, 1:], np.s_[:, :, :-1]))  # adjacent pixels in a slice
BLOOD = (-50.0, 500.0)  # HU range of heart and vessels, with and without contrast medium
CONTRAST = 75.0  # HU threshold: blood has 30 to 60 without contrast medium, 90 or more with it


class CTAnatomyError(CTInputError):
    """The CT does not show a chest."""


def measure_coverage(volume: CTVolume) -> dict | None:
    """
    Measure how much of the lungs a scan shows. Returns `None` if the voxels are not in Hounsfield units.

    Returns:
        lung_volume_ml: volume of air-filled lung (mL), accurate to about 10 %; consolidated, collapsed or fluid-filled
            lung is not counted.
        lung_extent_mm: height (mm) of the slices in which lung takes more than 3 % of the body's area; about 2 cm less
            than from apex to base.
        above_mm, below_mm: height (mm) of the scan above and below these slices; `None` without lung.
        cut_off: ends of the scan at which the lungs are cut off: "top", "bottom", both or none.
        lung_share, extent_share: volume and extent relative to the body's size; the limits apply to these.
        blood_hu: upper quartile of HU between the lungs, in heart and great vessels; `None` if there is no such place.
        contrast: `True` if there is contrast medium, according to the header or else to `blood_hu`; `None` if unknown.
    """
    if not volume.is_hu:
        return None
    steps = [max(1, length // wanted) for length, wanted in zip(volume.array.shape, GRID, strict=True)]
    hu = np.ascontiguousarray(volume.array[:: steps[0], :: steps[1], :: steps[2]].T)  # [z, y, x]
    if (volume.slope, volume.intercept) != (1, 0):
        hu = hu.astype(np.float32) * np.float32(volume.slope) + np.float32(volume.intercept)
    dx, dy, dz = (spacing * step for spacing, step in zip(volume.spacing, steps, strict=True))
    tissue, airy = hu > TISSUE, (hu > LUNG[0]) & (hu < LUNG[1])
    inside, area = _inside(tissue, airy, dx, dy)
    size = area**0.5
    lung = _lung_areas(hu, airy, inside) * (dx * dy)
    start, stop = _largest_run(lung, MIN_AREA * area)
    volume_mm3, extent = float(lung[start:stop].sum() * dz), float((stop - start) * dz)
    blood = _blood(hu[start:stop], tissue[start:stop], inside[start:stop])
    contrast = volume.contrast
    if contrast is None and blood is not None:
        contrast = blood > CONTRAST
    return {
        "lung_volume_ml": round(volume_mm3 / 1000),
        "lung_extent_mm": round(extent),
        "above_mm": round((len(hu) - stop) * dz) if extent else None,
        "below_mm": round(start * dz) if extent else None,
        "cut_off": [end for end, cut in (("top", stop == len(hu)), ("bottom", start == 0)) if cut and extent],
        "lung_share": round(volume_mm3 / size**3, 4) if size else 0.0,
        "extent_share": round(extent / size, 3) if size else 0.0,
        "blood_hu": None if blood is None else round(blood),
        "contrast": contrast,
    }


def check_chest(coverage: dict | None, source: str) -> None:
    """
    Refuse a scan without lungs, or with only the edge of the lungs, as in a CT of the abdomen or the neck.

    Args:
        coverage: from [`measure_coverage`]. `None` is accepted: without Hounsfield units the lungs are not measured.
        source: name of the scan for the message.

    Raises:
        CTAnatomyError: the scan does not show a chest.
    """
    if coverage is None:
        return
    expected = "a CT of the chest; --allow-any-anatomy (allow_any_anatomy=True) accepts any"
    if coverage["lung_share"] < MIN_VOLUME:
        raise CTAnatomyError(source, "lungs", f"{coverage['lung_volume_ml']} mL with air in them", expected)
    rest = {"top": coverage["below_mm"], "bottom": coverage["above_mm"]}
    for end in coverage["cut_off"]:
        if coverage["extent_share"] < MIN_EXTENT and rest[end] > coverage["lung_extent_mm"]:
            found = f"the {coverage['lung_extent_mm']} mm at the {end} of the scan, beside {rest[end]} mm without lung"
            raise CTAnatomyError(source, "lungs", found, expected)


def anatomy_warnings(coverage: dict | None) -> list[str]:
    """Warnings about the scanned part of the body, for the reader of the report."""
    if coverage is None:
        return []
    try:
        check_chest(coverage, "scan")
    except CTAnatomyError as error:
        return [f"The scan is not of a chest; this was overridden (allow_any_anatomy). Lungs: {error.found}."]
    missing = {"top": "the apices", "bottom": "the bases"}
    return [
        f"The scan is of a part of the chest: the lungs are cut off at the {end}, without {missing[end]}."
        for end in coverage["cut_off"]
    ]


def _inside(tissue: np.ndarray, airy: np.ndarray, dx: float, dy: float) -> tuple[np.ndarray, float]:
    """Return the mask of air inside the body, with tissue on all four sides, and the body's median area (mm²)."""
    left, right = _around(tissue, axis=2)
    front, back = _around(tissue, axis=1)
    beside, behind = np.minimum(left, right), np.minimum(front, back)
    inside = ~tissue & (beside > 0) & (behind > 0)
    areas = np.count_nonzero(tissue | inside, axis=(1, 2)) * (dx * dy)
    area = float(np.median(areas[areas > 0])) if areas.any() else 0.0
    enough = behind >= MIN_BEHIND * area**0.5 / dy
    # A small field of view may cut through a lung. The border then shows lung tissue, with the body in front and
    # behind, unlike a table that reaches the border.
    for side, (border, next_to_it) in ((left, (0, 1)), (right, (-1, -2))):
        cut = airy[:, :, border] & airy[:, :, next_to_it] & enough[:, :, border]
        side += np.uint8(tissue.shape[2]) * cut[:, :, None]
    return ~tissue & enough & (np.minimum(left, right) >= max(1, MIN_BESIDE * area**0.5 / dx)), area


def _around(mask: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Count the voxels of a mask (at most 127 in a line) before and behind each voxel along an axis."""
    before = np.cumsum(mask, axis, dtype=np.uint8)
    return before, before.take([-1], axis) - before


def _lung_areas(hu: np.ndarray, airy: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Count the lung pixels per slice: air inside the body, in squares with enough lung tissue and adjacent ones."""
    core = inside.copy()  # without the pixels at a wall, where tissue and air mix
    for one, other in NEIGHBOURS:
        core[one] &= inside[other]
        core[other] &= inside[one]
    air = _squares(core.view(np.uint8))
    lung = _squares((core & airy).view(np.uint8)) >= np.maximum(1, MIN_LUNG_SHARE * air)
    # Noise lifts every fourth voxel of gas into the range of lung tissue, but not the mean of a square.
    lung &= _squares(np.where(core, np.maximum(hu, -1024), 0)) > LUNG[0] * air
    near = lung.copy()
    for one, other in NEIGHBOURS:
        near[one] |= lung[other]
        near[other] |= lung[one]
    return (_squares(inside.view(np.uint8)) * near).sum(axis=(1, 2), dtype=np.int64)


def _squares(values: np.ndarray) -> np.ndarray:
    """Sum the values over each square of a slice; incomplete squares at the end are dropped."""
    height, width = (length // BLOCK * BLOCK for length in values.shape[1:])
    values = values[:, :height, :width]
    values = reduce(operator.add, (values[:, :, k::BLOCK] for k in range(BLOCK)))
    return reduce(operator.add, (values[:, k::BLOCK] for k in range(BLOCK)))


def _largest_run(areas: np.ndarray, least: float) -> tuple[int, int]:
    """Half-open range of consecutive slices with areas above `least` and the largest total area; (0, 0) if none."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], areas > least, [0]))))
    runs = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    return max(runs, key=lambda run: areas[run[0] : run[1]].sum(), default=(0, 0))


def _blood(hu: np.ndarray, tissue: np.ndarray, inside: np.ndarray) -> float | None:
    """Upper quartile of HU between the lungs, in front of the spine, over means of 2 x 2 pixels to reduce noise."""
    rows = np.flatnonzero(inside.any(axis=(0, 2)))
    if not rows.size:
        return None
    front = slice(rows[0], rows[0] + max(2, int(0.6 * (rows[-1] + 1 - rows[0]))))
    hu, air = hu[:, front].astype(np.float32), inside[:, front]
    between = np.logical_or.accumulate(air, axis=2) & np.logical_or.accumulate(air[:, :, ::-1], axis=2)[:, :, ::-1]
    between &= tissue[:, front] & (hu > BLOOD[0]) & (hu < BLOOD[1])
    height, width = (length // 2 * 2 for length in hu.shape[1:])
    quarters = [np.s_[:, y:height:2, x:width:2] for y in (0, 1) for x in (0, 1)]
    whole = np.logical_and.reduce([between[quarter] for quarter in quarters])
    if np.count_nonzero(whole) < 20:
        return None
    return float(np.percentile(reduce(operator.add, (hu[quarter] for quarter in quarters))[whole] / 4, 75))


__all__ = ["CTAnatomyError", "anatomy_warnings", "check_chest", "measure_coverage"]
