# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The figure of a report: target, reference and difference map in three planes, in radiological convention.

Volumes are indexed [depth, height, width] as the model's tensors: depth runs from inferior to superior, height from
anterior to posterior, width from the patient's right to left. Axial and coronal planes are shown as seen from the feet
and from the front, so that the patient's right is on the left of the image; sagittal ones have anterior on the left.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

PLANES = ("axial", "coronal", "sagittal")
# What stands at the left, right, top and bottom of each plane.
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}
COLORS = "inferno"
OPACITY = 0.65  # of the map's largest value in the body; its smallest is transparent
MARGIN = 8  # voxels of air that are shown around the bodies
TABLE = 9  # voxels: what is thinner in an axial plane is the scanner's table or a blanket
# Inches: the three planes side by side, and what stands around them.
INCHES, LEFT, RIGHT, TOP, BOTTOM = 9.5, 0.4, 0.9, 0.7, 0.6


def plane(volume: np.ndarray, name: str, index: int) -> np.ndarray:
    """One plane of a volume [depth, height, width] as an image: rows from top to bottom, columns from left to right.

    `index` counts along depth for "axial", along height for "coronal", along width for "sagittal".
    """
    if name == "axial":
        return volume[index]
    if name == "coronal":
        return volume[::-1, index]
    if name == "sagittal":
        return volume[::-1, :, index]
    raise ValueError(f"Unknown plane {name!r}; expected one of {', '.join(PLANES)}.")


def body_mask(volume: np.ndarray, level: float) -> np.ndarray:
    """The inside of the body: in each axial plane, what has solid tissue above `level` on all four sides (or is some).

    A volume without any counts as body throughout.
    """
    tissue = torch.from_numpy(volume > level).float()[:, None]
    for sign in (-1, 1):  # an opening: shrunk, then grown
        for kernel in ((TABLE, 1), (1, TABLE)):  # row by column, which is the same
            padding = [size // 2 for size in kernel]
            tissue = sign * F.max_pool2d(sign * tissue, kernel, stride=1, padding=padding)
    tissue = tissue[:, 0].numpy() > 0
    inside = np.ones_like(tissue)
    for axis in (1, 2):
        before = np.logical_or.accumulate(tissue, axis=axis)
        after = np.flip(np.logical_or.accumulate(np.flip(tissue, axis), axis=axis), axis)
        inside &= before & after
    return inside if inside.any() else np.ones_like(inside)


def peak(difference: np.ndarray, body: np.ndarray) -> tuple[int, int, int]:
    """Index of the map's largest value inside the body; the centre of the body where the map is flat."""
    values = np.where(body, difference, -np.inf)
    if values.max() == difference[body].min():
        return tuple(int(np.median(indices)) for indices in np.nonzero(body))
    return tuple(int(index) for index in np.unravel_index(values.argmax(), values.shape))


def draw_figure(
    path: str | Path,
    target: np.ndarray,
    reference: np.ndarray,
    difference: np.ndarray,
    *,
    level: float,
    target_spacing: tuple[float, float, float],
    reference_spacing: tuple[float, float, float],
    title: str,
    footer: str,
) -> None:
    """
    Write a PNG: rows target, reference, target with map; columns axial, coronal, sagittal through the map's peak.

    Args:
        target, difference: (depth, height, width); grey values in [-1, 1], and a map that is not negative.
        reference: (depth, height, width), of the same shape: the model compares its voxels with the target's voxels of
            the same index.
        level: grey value above which a voxel is tissue.
        target_spacing, reference_spacing: mm (depth, height, width).
    """
    shapes = {volume.shape for volume in (target, reference, difference)}
    if len(shapes) != 1:
        raise ValueError(f"Target, reference and map must have one shape, got {sorted(shapes)}.")
    body = body_mask(target, level)
    box = _bounding_box(body | body_mask(reference, level))
    target, reference, difference, body = (volume[box] for volume in (target, reference, difference, body))
    at = peak(difference, body)
    # Units are arbitrary: what can be read off is where the difference is large against its largest value.
    difference = difference / (difference[body].max() or 1.0)
    scale = Normalize(difference[body].min(), 1, clip=True)

    depth, height, width = (size * mm for size, mm in zip(target.shape, target_spacing, strict=True))
    widths, tallest = (width, width, height), max(depth, height)
    panel_height = INCHES / sum(widths) * tallest
    size = (INCHES + LEFT + RIGHT, 3 * panel_height + TOP + BOTTOM)
    figure = Figure(size, dpi=130, facecolor="black")
    FigureCanvasAgg(figure)  # the object itself: pyplot's global state would outlive the report
    left, right = LEFT / size[0], 1 - RIGHT / size[0]
    bottom, top = BOTTOM / size[1], 1 - TOP / size[1]
    grid = {"left": left, "right": right, "bottom": bottom, "top": top, "wspace": 0.02, "hspace": 0.03}
    axes = figure.subplots(3, 3, gridspec_kw={"width_ratios": widths, **grid})
    rows = [("target", target, target_spacing), ("reference", reference, reference_spacing)]
    rows.append(("target with difference map", target, target_spacing))
    colors = ScalarMappable(scale, COLORS)
    for row, (label, volume, spacing) in enumerate(rows):
        for column, name in enumerate(PLANES):
            panel = axes[row, column]
            _show(panel, plane(volume, name, at[column]), name, spacing)
            if row == 0:
                panel.set_title(name, color="white", fontsize=11)
            if column == 0:
                panel.set_ylabel(label, color="white", fontsize=11)
            if row < 2:
                _mark(panel, name, at, volume.shape)
                continue
            values = plane(difference, name, at[column])
            overlay = colors.to_rgba(values)
            overlay[..., 3] = OPACITY * plane(body, name, at[column]) * scale(values)
            panel.imshow(overlay, aspect=panel.get_aspect(), interpolation="bilinear")
    place = figure.add_axes((right + 0.01, bottom, 0.012, panel_height / size[1]))
    bar = figure.colorbar(colors, cax=place, format="%.3g", ticks=MaxNLocator(4))
    bar.set_label("difference / its maximum", color="white", fontsize=9)
    bar.ax.tick_params(colors="white", labelsize=8)
    bar.outline.set_edgecolor("white")
    figure.suptitle(title, y=1 - 0.12 / size[1], va="top", color="white", fontsize=12)
    figure.text(0.5, 0.12 / size[1], footer, ha="center", va="bottom", color="white", fontsize=9)
    figure.savefig(path, format="png")


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The voxels of a mask with a margin, without ends that hold little of it (raised arms, the tip of the nose)."""
    sections = [mask.sum(axis=others) for others in ((1, 2), (0, 2), (0, 1))]
    spans = [np.flatnonzero(section > 0.05 * section.max()) for section in sections]
    return tuple(slice(max(int(span[0]) - MARGIN, 0), int(span[-1]) + 1 + MARGIN) for span in spans)


def _show(panel, image: np.ndarray, name: str, spacing: tuple[float, float, float]) -> None:
    depth, height, width = spacing
    row, column = {"axial": (height, width), "coronal": (depth, width), "sagittal": (depth, height)}[name]
    panel.imshow(image, cmap="gray", vmin=-1, vmax=1, aspect=row / column, interpolation="bilinear")
    panel.set_anchor("N")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places += ((0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    for letter, (x, y, across, along) in zip(EDGES[name], places, strict=True):
        text = panel.text(x, y, letter, transform=panel.transAxes, ha=across, va=along, color="white", fontsize=9)
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])


def _mark(panel, name: str, at: tuple[int, int, int], shape: tuple[int, int, int]) -> None:
    """Thin lines where the two other planes cut this one."""
    row = at[1] if name == "axial" else shape[0] - 1 - at[0]
    column = at[1] if name == "sagittal" else at[2]
    for draw, position in ((panel.axhline, row), (panel.axvline, column)):
        draw(position, color="deepskyblue", linewidth=0.6, alpha=0.7, linestyle=(0, (5, 5)))
