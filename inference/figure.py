# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The figure of a report: target, reference and difference map in three planes, the named findings, and the text.

Volumes are indexed [depth, height, width] as the model's tensors: depth runs from inferior to superior, height from
anterior to posterior, width from the patient's right to left. Axial and coronal planes are shown as seen from the feet
and from the front, so that the patient's right is on the left of the image; sagittal ones have anterior on the left.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where a figure is drawn: most users of this module draw none, or not at first
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

PLANES = ("axial", "coronal", "sagittal")
# Letters at the left, right, top and bottom of each plane.
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
WINDOWS = {"lung": (-1350, 150), "mediastinum": (-160, 240)}  # HU: black, white
VIEWS = (("axial", "lung"), ("axial", "mediastinum"), ("coronal", "lung"), ("sagittal", "mediastinum"))
# Window of each finding of CT-RATE. The HU at its peak cannot decide this: a consolidation is as dense as soft tissue.
# A finding with another label is shown in the window of its surroundings.
LABEL_WINDOWS = dict.fromkeys(
    ("Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Consolidation")
    + ("Mosaic attenuation pattern", "Peribronchial thickening", "Bronchiectasis", "Interlobular septal thickening"),
    "lung",
) | dict.fromkeys(
    ("Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion", "Lymphadenopathy")
    + ("Coronary artery wall calcification", "Hiatal hernia", "Pleural effusion"),
    "mediastinum",
)
COLORS = "inferno"
OPACITY = 0.65  # of the map's largest value in the body; the smallest value is transparent
MARGIN = 8  # voxels of air shown around the bodies
TABLE = 9  # voxels: thinner structures in an axial plane are the scanner's table or a blanket
SOLID = 0.8  # minimum share of voxels denser than air in a square of that size, for it to hold lung
TISSUE_HU = -520.0  # voxels above it are tissue
AIR_HU = -960.0  # lung is above it, except for bullae; air around the patient is below
MIN_LUNG = 0.03  # minimum share of lung in the body, for the ends of the lungs to be meaningful
# Shares of the largest section through the lungs. Sections below END lie beyond the lungs. If the last section has
# more than CUT, the scan cuts the lungs off there.
END, CUT = 0.05, 0.3
NEAR_MM = 10.0  # a finding is marked on slices within this distance
SHOWN = 8  # maximum number of findings with a slice of their own
BARS_MM = (50, 10)  # scale bars: the longer one if it fits twice
# Inches: width of all columns, maximum height of a row, width of the text, and the margins.
INCHES, HIGHEST, TEXT, LEFT, TOP, BOTTOM, GAP = 12.0, 4.0, 4.0, 0.4, 0.85, 0.6, 0.05
TITLE = 0.45  # above the slice of a finding
LINE, LETTERS, REPORT_LINES = 0.165, 56, 26  # inches a line of text, letters in it, lines of the report
MARK = "lime"
OTHER_AXES = ((1, 2), (0, 2), (0, 1))  # of each axis of a volume


@dataclass(frozen=True)
class Drawn:
    """A volume (depth, height, width) in HU with its `affine`: 4x4, index -> RAS+ mm in the frame of the scan."""

    hu: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm (depth, height, width)."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def position(self, at: Sequence[float]) -> np.ndarray:
        """Return the position in RAS+ mm (x, y, z) of an index (depth, height, width)."""
        return (self.affine @ (*at, 1.0))[:3]

    def index(self, position: Sequence[float]) -> tuple[int, int, int]:
        """Return the voxel nearest to a position in RAS+ mm."""
        at = np.linalg.solve(self.affine, (*position, 1.0))[:3]
        return tuple(int(n) for n in np.clip(np.rint(at), 0, np.array(self.hu.shape) - 1))

    def cropped(self, box: tuple[slice, ...]) -> Drawn:
        affine = self.affine.copy()
        affine[:3, 3] = self.position([part.start for part in box])
        return Drawn(self.hu[box], affine)


def to_hu(grey: np.ndarray, hu_window: Sequence[float]) -> np.ndarray:
    """Convert grey values in [-1, 1] to the HU of the window that they are clipped to."""
    low, high = hu_window
    hu = grey + 1
    hu *= (high - low) / 2  # in place: new arrays of 40 MB take longer than the arithmetic
    hu += low
    return hu


def plane(volume: np.ndarray, name: str, index: int) -> np.ndarray:
    """Return a plane of a volume [depth, height, width] as an image: rows from top to bottom, columns left to right.

    `index` counts along depth for "axial", along height for "coronal", along width for "sagittal".
    """
    if name == "axial":
        return volume[index]
    if name == "coronal":
        return volume[::-1, index]
    if name == "sagittal":
        return volume[::-1, :, index]
    raise ValueError(f"Unknown plane {name!r}; expected one of {', '.join(PLANES)}.")


def body_mask(volume: np.ndarray, tissue_hu: float = TISSUE_HU, air_hu: float = AIR_HU) -> np.ndarray:
    """
    Return the mask of the inside of the body: in each axial plane, solid tissue, and voxels with tissue on four sides.

    Lung at the border of a small field of view has tissue on two or three sides only, and is denser than air. In a
    volume without tissue, every voxel counts as body.

    Args:
        tissue_hu, air_hu: thresholds for tissue and for lung, in the units of the volume.
    """
    # Morphological opening. A square is separable into a row and a column, and voxels outside the plane do not count.
    eroded = ~_any_across(_any_across(volume <= tissue_hu, 1), 2)
    tissue = _any_across(_any_across(eroded, 1), 2)
    sides = np.zeros(tissue.shape, np.uint8)
    for axis in (1, 2):
        places = np.arange(tissue.shape[axis], dtype=np.int16).reshape([-1 if n == axis else 1 for n in range(3)])
        some = tissue.any(axis=axis, keepdims=True)
        first, to_last = (line.argmax(axis=axis, keepdims=True) for line in (tissue, np.flip(tissue, axis)))
        sides += some & (places >= first.astype(np.int16))
        sides += some & (places < tissue.shape[axis] - to_last.astype(np.int16))
    # Noise gives single voxels the density of lung, and makes holes in lung. A blanket is denser than air, but thin.
    dense = volume > air_hu
    voxels = _sum_across(_sum_across(np.ones((1, *dense.shape[1:]), np.uint8), 1), 2)
    lung = _sum_across(_sum_across(dense.view(np.uint8), 1), 2) > (SOLID * voxels).astype(np.uint8)
    lung = dense & _any_across(_any_across(lung, 1), 2)
    inside = (sides == 4) | ((sides >= 2) & lung)
    return inside if inside.any() else np.ones_like(inside)


def _any_across(mask: np.ndarray, axis: int) -> np.ndarray:
    """Return the mask of voxels with a voxel of `mask` among the `TABLE` voxels around them along an axis."""
    return _across(np.logical_or, mask, axis)


def _sum_across(values: np.ndarray, axis: int) -> np.ndarray:
    """Return for each voxel the sum over the `TABLE` voxels around it along an axis."""
    return _across(np.add, values, axis)


def _across(combine: np.ufunc, values: np.ndarray, axis: int) -> np.ndarray:
    """Combine the `TABLE` voxels around each voxel along an axis. Outside the volume there are zeros."""
    result = values.copy()
    for step in range(1, TABLE // 2 + 1):
        low = tuple(slice(None, -step) if n == axis else slice(None) for n in range(values.ndim))
        high = tuple(slice(step, None) if n == axis else slice(None) for n in range(values.ndim))
        combine(result[low], values[high], out=result[low])
        combine(result[high], values[low], out=result[high])
    return result


def peak(difference: np.ndarray, body: np.ndarray) -> tuple[int, int, int]:
    """Return the index of the map's largest value inside the body, or the centre of the body if the map is flat."""
    highest = [np.where(inside, values, -np.inf).max() for values, inside in zip(difference, body, strict=True)]
    depth = int(np.argmax(highest))
    if highest[depth] == difference[body].min():
        return tuple(int(np.median(indices)) for indices in np.nonzero(body))
    place = np.where(body[depth], difference[depth], -np.inf).argmax()
    return depth, *(int(index) for index in np.unravel_index(place, body.shape[1:]))


def lung_ends(hu: np.ndarray, body: np.ndarray) -> list[tuple[tuple[int, bool], tuple[int, bool]]] | None:
    """
    Find the ends of the lungs along each axis.

    Returns:
        first and last voxel of the lungs along each axis, each with `True` if the lungs end there and `False` if the
        scan cuts them off; `None` if there is too little lung.
    """
    lung = body & (hu > AIR_HU) & (hu < TISSUE_HU)
    if lung.sum() < MIN_LUNG * body.sum():
        return None
    ends = []
    for others in OTHER_AXES:
        sections = lung.sum(axis=others) / lung.sum(axis=others).max()
        span = np.flatnonzero(sections > END)
        ends.append(tuple((int(end), bool(sections[end] < CUT)) for end in (span[0], span[-1])))
    return ends


def matching_place(at: Sequence[int], target: Drawn, reference: Drawn, ends, reference_ends) -> tuple[int, ...]:
    """
    Return the voxel of the reference at the same place of the lungs, or the same index if one scan shows no lungs.

    Along each axis, the position between the ends of the lungs is kept in proportion. If a scan cuts off one end, the
    distance in mm to the other end is kept; a voxel inside the lungs stays inside. If it cuts off both ends, the index
    is kept.

    Args:
        at: index in the target.
        ends, reference_ends: from [`lung_ends`].
    """
    if ends is None or reference_ends is None:
        return tuple(at)
    found = []
    steps = target.spacing / reference.spacing
    for index, ours, theirs, step, length in zip(at, ends, reference_ends, steps, reference.hu.shape, strict=True):
        (first, last), (start, stop) = (tuple(end for end, _ in span) for span in (ours, theirs))
        known = [(one, other) for (one, real), (other, true) in zip(ours, theirs, strict=True) if real and true]
        if len(known) == 2 and first < last:
            step = (stop - start) / (last - first)
        place = known[0][1] + (index - known[0][0]) * step if known else index
        if known and first <= index <= last:
            place = min(max(place, start), stop)
        found.append(int(np.clip(round(place), 0, length - 1)))
    return tuple(found)


def draw_figure(path: str | Path, *volumes: np.ndarray, **options) -> None:
    """Write the figure of [`compose_figure`] as a PNG."""
    # Level 1 makes the file an eighth larger, and takes less than half as long; the default takes as long as drawing.
    compose_figure(*volumes, **options).savefig(path, format="png", pil_kwargs={"compress_level": 1})


def compose_figure(
    target: np.ndarray,
    reference: np.ndarray,
    difference: np.ndarray,
    *,
    hu_window: tuple[float, float],
    is_hu: bool,
    has_lungs: bool,
    target_affine: np.ndarray,
    reference_affine: np.ndarray,
    findings: Sequence[dict],
    report: str,
    title: str,
    footer: str,
) -> Figure:
    """
    Compose the figure: rows target, reference, and target with map, through the peak of the map; below them an axial
    slice of each finding; at the side the first lines of the report and a legend.

    Args:
        target, difference: (depth, height, width); HU clipped to `hu_window`, and a non-negative map.
        reference: (depth, height, width), of the same shape.
        is_hu: `False` if the voxels have another unit; they are then shown in `hu_window` only.
        has_lungs: `False` if the target is not a chest. Slices are then not matched, because gas in the bowel looks
            like lung.
        target_affine, reference_affine: 4x4, index (depth, height, width) -> RAS+ mm in the frame of each scan.
        findings: findings to name: `label`, and optionally `peak`, RAS+ mm in the frame of the target, which gives the
            finding a slice of its own.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    shapes = {volume.shape for volume in (target, reference, difference)}
    if len(shapes) != 1:
        raise ValueError(f"target, reference, difference: shapes {sorted(shapes)} (expected one shape)")
    levels = {} if is_hu else dict.fromkeys(("tissue_hu", "air_hu"), to_hu(-0.2, hu_window))
    body, reference_body = body_mask(target, **levels), body_mask(reference, **levels)
    box = bounding_box(body | reference_body)
    one, other = Drawn(target, target_affine).cropped(box), Drawn(reference, reference_affine).cropped(box)
    difference, body = difference[box], body[box]
    at = peak(difference, body)
    place, matched = _place_in_reference(at, (one, body), (other, reference_body[box]), is_hu and has_lungs)
    # The units are arbitrary. The scale shows the difference relative to its largest value.
    inside = difference[body]
    largest = inside.max() or np.float32(1)
    colors = ScalarMappable(Normalize(inside.min() / largest, 1, clip=True), COLORS)

    views = list(dict.fromkeys((name, *shown_window(window, hu_window, is_hu)) for name, window in VIEWS))
    lengths = one.spacing * one.hu.shape
    widths = np.array([lengths[1] if name == "sagittal" else lengths[2] for name, *_ in views])
    inches = min(INCHES / widths.sum(), HIGHEST / max(lengths[:2]))  # per mm
    height, across = max(lengths[:2]) * inches, widths.sum() * inches + GAP * (len(views) - 1)
    marked = [(one.index(finding["peak"]), finding) for finding in findings if "peak" in finding][:SHOWN]
    columns = max(len(views), 4)
    own_width = (across - GAP * (columns - 1)) / columns
    own_height = min(own_width * lengths[1] / lengths[2], height)
    rows = -(-len(marked) // columns)
    lines = _text(report, findings, len(marked), matched)
    used = max(3 * (height + GAP) + rows * (own_height + TITLE), (len(lines) + 5) * LINE)
    size = np.array((LEFT + across + 0.2 + TEXT, TOP + used + BOTTOM))

    figure = Figure(size, dpi=130, facecolor="black")
    FigureCanvasAgg(figure)  # not pyplot, whose global state would outlive the report

    def panel(left: float, top: float, width: float, height: float):
        """Add axes at a distance in inches from the left edge and from the title."""
        return figure.add_axes((left / size[0], 1 - (TOP + top + height) / size[1], width / size[0], height / size[1]))

    shown = (("target", one, at), ("reference", other, place), ("target with difference map", one, at))
    _draw_planes(panel, views, widths * inches, height, shown, marked, (difference, largest, body, colors))
    for number, (where, finding) in enumerate(marked, 1):
        row, column = divmod(number - 1, columns)
        top = 3 * (height + GAP) + row * (own_height + TITLE) + TITLE
        axes = panel(LEFT + column * (own_width + GAP), top, own_width, own_height)
        around = "lung" if _in_lung(one, where) else "mediastinum"
        window = shown_window(LABEL_WINDOWS.get(finding["label"], around), hu_window, is_hu)
        _show_finding(axes, one, number, marked[number - 1], window)
    _write_beside(figure, panel, LEFT + across + 0.2, used, lines, colors)
    figure.suptitle(_drawable(title), y=1 - 0.12 / size[1], va="top", color="white", fontsize=12, parse_math=False)
    footer = "\n".join(textwrap.fill(line, int(size[0] * 13)) for line in _drawable(footer).splitlines())
    figure.text(
        0.5, 0.1 / size[1], footer, ha="center", va="bottom", color="white", fontsize=9, parse_math=False
    )  # fmt: skip
    return figure


def _place_in_reference(
    at: tuple[int, int, int], target: tuple[Drawn, np.ndarray], reference: tuple[Drawn, np.ndarray], by_lungs: bool
) -> tuple[tuple[int, ...], bool]:
    """Return the voxel of the reference to show, inside its body, and True if it was matched by the lungs."""
    ends = [lung_ends(drawn.hu, mask) if by_lungs else None for drawn, mask in (target, reference)]
    place = matching_place(at, target[0], reference[0], *ends)
    spans = [np.flatnonzero(reference[1].any(axis=others))[[0, -1]].tolist() for others in OTHER_AXES]
    inside = tuple(min(max(index, low), high) for index, (low, high) in zip(place, spans, strict=True))
    return inside, None not in ends


def _draw_planes(
    panel,
    views: Sequence[tuple],
    widths: np.ndarray,
    height: float,
    rows: Sequence[tuple],
    marked: Sequence,
    over: tuple,
) -> None:
    """
    Draw the rows of planes.

    Args:
        panel: function that adds axes.
        views: plane, caption of its window, and limits of the window, for each column.
        widths, height: inches.
        rows: label, volume and index of the target, of the reference, and of the target under the map.
        marked: findings to mark.
        over: map, its largest value, mask of the body, and colours.
    """
    for row, (label, drawn, where) in enumerate(rows):
        left = LEFT
        for width, (name, window, *limits) in zip(widths, views, strict=True):
            axes = panel(left, row * (height + GAP), width, height)
            axes.set_label(f"{label}: {name}, {window}")
            _show(axes, drawn, name, where, limits)
            if left == LEFT:
                axes.set_ylabel(label, color="white", fontsize=11)
            left += width + GAP
            if row < 2:
                _cross(axes, drawn, name, where)
            if row == 0:
                axes.set_title(f"{name}\n{window}", color="white", fontsize=9)
                _mark(axes, drawn, name, where, marked)
            if row == 2:
                difference, largest, body, colors = over
                values, mask = (plane(volume, name, where[PLANES.index(name)]) for volume in (difference, body))
                _overlay(axes, values / largest, mask, colors)


def _show_finding(axes, drawn: Drawn, number: int, marked: tuple, window: tuple[str, float, float]) -> None:
    """Show the axial slice of a finding."""
    (where, finding), (caption, *limits) = marked, window
    axes.set_label(f"finding {number}: axial, {caption}")
    _show(axes, drawn, "axial", where, limits)
    axes.set_title(f"{number}  {_drawable(finding['label'])}\n{caption}", color=MARK, fontsize=8, parse_math=False)
    _mark(axes, drawn, "axial", where, [marked], number)


def _overlay(axes, values: np.ndarray, body: np.ndarray, colors: ScalarMappable) -> None:
    """Lay a plane of the map over the image; it is transparent outside the body."""
    overlay = colors.to_rgba(values)
    overlay[..., 3] = OPACITY * body * colors.norm(values)
    axes.imshow(overlay, extent=axes.images[0].get_extent(), interpolation="bilinear")


def _write_beside(figure: Figure, panel, left: float, used: float, lines: list[str], colors: ScalarMappable) -> None:
    """Write the text and the colour bar at the side, `left` inches from the edge."""
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches()
    text = {"color": "white", "fontsize": 8.5, "ha": "left", "va": "top", "parse_math": False, "linespacing": 1.3}
    figure.text(left / width, 1 - TOP / height, _drawable("\n".join(lines)), **text)
    bar = figure.colorbar(
        colors, cax=panel(left, used - 0.45, TEXT * 0.75, 0.12), format="%.3g", orientation="horizontal",
        ticks=MaxNLocator(4),
    )  # fmt: skip
    bar.set_label("difference / its maximum", color="white", fontsize=9)
    bar.ax.tick_params(colors="white", labelsize=8)
    bar.outline.set_edgecolor("white")


def _drawable(text: str) -> str:
    """Replace letters that the font lacks with boxes, because a report may hold any text."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(letter if letter == "\n" or ord(letter) in known else "\N{WHITE SQUARE}" for letter in text)


def _text(report: str, findings: Sequence[dict], marked: int, matched: bool) -> list[str]:
    """Return the lines at the side of the pictures."""
    written = [line for part in report.splitlines() for line in textwrap.wrap(part, LETTERS)]
    if len(written) > REPORT_LINES:
        written = [*written[:REPORT_LINES], "... (the rest is in report.txt)"]
    others = [finding["label"] for finding in findings if "peak" not in finding]
    others += [finding["label"] for finding in findings if "peak" in finding][marked:]
    slices = (
        "Reference: slices at the same place between the ends of the lungs, not the ones that the model compares."
        if matched
        else "Reference: slices at the same place of the model's grid, or the nearest that show the reference."
    )
    legend = [
        "Target and map: slices through the maximum of the map in the body.",
        slices,
        "Dashed lines: the other two planes. x, y, z: position of the slice in RAS+ mm, in the frame of each scan.",
    ]
    if marked:
        legend.append(
            "Green rings: findings of the classifier, at the voxel with the most evidence; in the upper row if the "
            f"slice passes within {NEAR_MM:g} mm."
        )
    if others:
        legend.append(f"Named without a slice: {', '.join(others)}.")
    return [
        "Generated report",
        "",
        *(written or ["(empty)"]),
        "",
        *(line for part in legend for line in ["", *textwrap.wrap(part, LETTERS)]),
    ]


def shown_window(name: str, hu_window: tuple[float, float], is_hu: bool) -> tuple[str, float, float]:
    """Return caption and limits of a window; if `hu_window` covers less than half of it, those of `hu_window`."""
    low, high = WINDOWS[name]
    if is_hu and min(high, hu_window[1]) - max(low, hu_window[0]) >= (high - low) / 2:
        return f"{name} ({low:g} to {high:g} HU)", low, high
    low, high = hu_window
    return f"{low:g} to {high:g}{' HU' if is_hu else ''}", low, high


def _in_lung(drawn: Drawn, at: tuple[int, int, int]) -> bool:
    """True if there is lung around a finding."""
    reach = [round(15 / mm) for mm in drawn.spacing]
    around = drawn.hu[tuple(slice(max(n - size, 0), n + size + 1) for n, size in zip(at, reach, strict=True))]
    return ((around > AIR_HU) & (around < TISSUE_HU)).mean() > 0.25


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the box of a mask with a margin, without ends that hold little of it (raised arms, tip of the nose)."""
    sections = [mask.sum(axis=others) for others in OTHER_AXES]
    spans = [np.flatnonzero(section > 0.05 * section.max()) for section in sections]
    return tuple(slice(max(int(span[0]) - MARGIN, 0), int(span[-1]) + 1 + MARGIN) for span in spans)


def _show(axes, drawn: Drawn, name: str, at: Sequence[int], window: tuple[float, float]) -> None:
    """Show a slice with letters, position and scale bar. Axes are in mm from the centre of its upper left voxel."""
    from matplotlib.patheffects import withStroke

    image = plane(drawn.hu, name, at[PLANES.index(name)])
    depth, height, width = drawn.spacing
    row, column = {"axial": (height, width), "coronal": (depth, width), "sagittal": (depth, height)}[name]
    right, bottom = (image.shape[1] - 0.5) * column, (image.shape[0] - 0.5) * row
    extent = (-0.5 * column, right, bottom, -0.5 * row)
    axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], extent=extent, interpolation="bilinear")
    axes.set_anchor("N")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    outlined = {
        "color": "white",
        "transform": axes.transAxes,
        "path_effects": [withStroke(linewidth=2, foreground="black")],
    }
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places += ((0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    for letter, (x, y, across, along) in zip(EDGES[name], places, strict=True):
        axes.text(x, y, letter, ha=across, va=along, fontsize=9, **outlined)
    axis = PLANES[::-1].index(name)
    position = f"{'xyz'[axis]} {drawn.position(at)[axis]:.0f} mm"
    axes.text(0.02, 0.98, position, ha="left", va="top", fontsize=7.5, **outlined)
    length = next((mm for mm in BARS_MM if 2 * mm <= right), BARS_MM[-1])
    start, level = 0.03 * right, 0.96 * bottom
    axes.plot((start, start + length), (level, level), color="white", linewidth=2, solid_capstyle="butt", gid="scale")
    outlined["transform"] = axes.transData
    axes.text(start, level - 0.01 * bottom, f"{length} mm", ha="left", va="bottom", fontsize=7, **outlined)


def _point(drawn: Drawn, name: str, at: Sequence[int]) -> tuple[float, float]:
    """Return x and y of a voxel in the axes of a plane; it may lie in front of the plane or behind it."""
    depth, height, width = ((drawn.hu.shape[0] - 1 - at[0]), at[1], at[2]) * drawn.spacing
    return {"axial": (width, height), "coronal": (width, depth), "sagittal": (height, depth)}[name]


def _cross(axes, drawn: Drawn, name: str, at: Sequence[int]) -> None:
    """Draw thin lines where the other two planes cut this one."""
    x, y = _point(drawn, name, at)
    for draw, position in ((axes.axhline, y), (axes.axvline, x)):
        draw(position, color="deepskyblue", linewidth=0.6, alpha=0.7, linestyle=(0, (5, 5)))


def _mark(axes, drawn: Drawn, name: str, at: Sequence[int], marked: Sequence, first: int = 1) -> None:
    """Draw rings with the numbers of the findings near a slice; findings at the same place share a ring."""
    from matplotlib.patheffects import withStroke

    axis = PLANES.index(name)
    rings = {}
    for number, (place, _) in enumerate(marked, first):
        if abs(place[axis] - at[axis]) * drawn.spacing[axis] <= NEAR_MM:
            rings.setdefault(_point(drawn, name, place), []).append(str(number))
    for (x, y), numbers in rings.items():
        axes.plot(
            x, y, "o", markersize=15, markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=1, gid="ring"
        )
        text = axes.annotate(
            ", ".join(numbers), (x, y), (7, 7), textcoords="offset points", color=MARK, fontsize=8, fontweight="bold"
        )
        text.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
