# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Picture of difference maps next to the true lesions, Fig. 5a."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from ..data.cache import VolumeCache
from ..data.cases import Case
from ..data.lesions import lesion_mask_path, lesion_voxels
from ..inference.figure import COLORS, EDGES, OPACITY, plane
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..report_diffvp import RESEARCH_USE
from ..training.features import Features
from .map_scores import body_voxels, difference_map

MARGIN = 4  # voxels of air shown around the body


@dataclass(frozen=True)
class MapExample:
    """
    Row of Fig. 5a; volumes are (depth, height, width).

    Attributes:
        title: case and its findings.
        shown: finding that the axial plane cuts.
        index: index of the plane.
        lesions: mask of all findings.
        lesion: mask of the shown finding.
        spacing: mm (depth, height, width).
        hu_window: HU at -1 and 1 of target and reference.
    """

    title: str
    shown: str
    index: int
    target: NDArray
    reference: NDArray
    difference: NDArray
    lesions: NDArray[np.bool_]
    lesion: NDArray[np.bool_]
    spacing: tuple[float, float, float]
    hu_window: tuple[float, float]


def map_example(
    model: DiffVPForConditionalGeneration,
    features: Features,
    volumes: VolumeCache,
    lesion_root: str | Path,
    case: Case,
    reference: Case,
) -> MapExample:
    """
    Compute the map of a case. The axial plane cuts most of its smallest finding: chosen by the truth, not by the map.

    Raises:
        ValueError: the case has no lesion in the tensor.
    """
    geometry = volumes.preprocess(case)["geometry"][0]
    codes = lesion_voxels(lesion_mask_path(lesion_root, case.name), geometry).numpy()
    lesions = {label: (codes >> bit) & 1 == 1 for bit, label in enumerate(DIAGNOSIS_LABELS)}
    sizes = {label: int(mask.sum()) for label, mask in lesions.items() if mask.any()}
    if not sizes:
        raise ValueError(f"{case.name} has no lesion in the tensor: expected a case with a finding")
    shown = min(sizes, key=sizes.get)
    return MapExample(
        title=f"{case.name}: {', '.join(sizes)}",
        shown=shown,
        index=int(lesions[shown].sum(axis=(1, 2)).argmax()),
        target=volumes.load(case)[0].float().numpy(),
        reference=volumes.load(reference)[0].float().numpy(),
        difference=difference_map(model, features, case, reference),
        lesions=codes != 0,
        lesion=lesions[shown],
        spacing=geometry.tensor_spacing,
        hu_window=tuple(volumes.image_processor.hu_window),
    )


def draw_maps(path: str | Path, examples: Sequence[MapExample], about: str = "Synthetic phantoms.") -> None:
    """
    Draw Fig. 5a as PNG, a case in each row.

    Columns: target, reference, difference map over the target, outlines of the true lesions (the shown one in green,
    others in blue), and pixel subtraction. Axial planes are seen from the feet: the patient's right is on the left.
    Both maps are scaled between their smallest and largest value in the whole body, not in the plane.
    """
    titles = ("target", "normal reference", "difference map", "true lesions", "pixel subtraction")
    figure = Figure((13, 2.2 * len(examples) + 0.6), dpi=110, facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot, whose global state would outlive the experiment
    rows = figure.subplots(len(examples), len(titles), squeeze=False)
    for panel, title in zip(rows[0], titles, strict=True):
        panel.set_title(title, color="white", fontsize=11)
    for panels, example in zip(rows, examples, strict=True):
        images = _axial_images(example)
        backgrounds = [images[name] for name in ("target", "reference", "target", "target")]
        for panel, image in zip(panels, [*backgrounds, images["subtraction"]], strict=True):
            low, colors = (0, COLORS) if panel is panels[-1] else (-1, "gray")
            _, height, width = example.spacing
            panel.imshow(image, cmap=colors, vmin=low, vmax=1, aspect=height / width)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(False)
        # The root makes values of half the maximum visible, too.
        opacity = OPACITY * np.sqrt(images["difference"]) * images["body"]
        panels[2].imshow(images["difference"], cmap=COLORS, vmin=0, vmax=1, aspect=height / width, alpha=opacity)
        for name, color in (("lesions", "cyan"), ("lesion", "lime")):
            panels[3].contour(images[name], levels=[0.5], colors=color, linewidths=0.8)
        for letter, (x, y) in zip(EDGES["axial"], ((0.03, 0.5), (0.97, 0.5), (0.5, 0.95), (0.5, 0.05)), strict=True):
            text = panels[0].text(x, y, letter, transform=panels[0].transAxes, color="white", ha="center", va="center")
            text.set_path_effects([withStroke(linewidth=2, foreground="black")])
        panels[0].set_ylabel(f"plane {example.index}: {example.shown}", color="white", fontsize=8)
        panels[2].set_xlabel(example.title, color="white", fontsize=8)
    figure.supxlabel(f"{about} {RESEARCH_USE}", color="white", fontsize=8)
    figure.savefig(path, format="png")


def _axial_images(example: MapExample) -> dict[str, NDArray]:
    """Return the images of a row, cropped to the bodies; both maps between 0 and 1."""
    body = body_voxels(example.target, example.hu_window)
    volumes = {
        "target": example.target,
        "reference": example.reference,
        "difference": _scaled(example.difference, body),
        "subtraction": _scaled(np.abs(example.target - example.reference), body),
        "lesions": example.lesions,
        "lesion": example.lesion,
        "body": body,
    }
    images = {name: plane(volume, "axial", example.index) for name, volume in volumes.items()}
    shown = images["body"] | plane(body_voxels(example.reference, example.hu_window), "axial", example.index)
    box = []
    for axis in (1, 0):
        span = np.flatnonzero(shown.any(axis=axis))
        box.append(slice(max(int(span[0]) - MARGIN, 0), int(span[-1]) + 1 + MARGIN))
    return {name: image[tuple(box)] for name, image in images.items()}


def _scaled(values: NDArray, body: NDArray[np.bool_]) -> NDArray:
    low, high = values[body].min(), values[body].max()
    return np.clip((values - low) / ((high - low) or 1.0), 0, 1)
