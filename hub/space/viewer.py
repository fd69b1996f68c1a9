# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Slices of a study as images, and the HTML of the page for images and report.

Planes are in radiological convention, as in `inference/figure.py`: the patient's right is on the left of axial and
coronal images, anterior on the left of sagittal ones. Images are embedded in the HTML, so none is written to disk.
"""

import base64
import io
from html import escape

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...inference.figure import COLORS, EDGES, PLANES, plane
from ...inference.figure import WINDOWS as FIGURE_WINDOWS
from ...report_diffvp import RESEARCH_USE, stated_domain
from .session import LARGEST, MAX_FILE_BYTES, PageStudy

WINDOWS = {name.capitalize(): hu for name, hu in FIGURE_WINDOWS.items()} | {"Bone": (-450, 1050)}  # HU: black, white
PIXEL_MM = 0.9  # pixel size of an image
LETTER_PIXELS = 20
WAITING = "Choose a sample phantom, or drop a scan of your own."
LIMITS = (
    f"One .nii, .nii.gz, or .zip of DICOM slices, up to {MAX_FILE_BYTES // 2**20} MB. It is deleted as soon as it has "
    "been read; images and report are deleted when you leave. Do not upload data that names a patient."
)


def grey(hu: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Convert HU to uint8: black at or below the lower end of the window, white at or above the upper end."""
    low, high = window
    return np.rint((hu.astype(np.float32) - low).clip(0, high - low) * (255 / (high - low))).astype(np.uint8)


def blend(image: np.ndarray, difference: np.ndarray, body: np.ndarray, opacity: float) -> np.ndarray:
    """
    Lay a map over a grey image (rows, columns); returns RGB (rows, columns, 3).

    Args:
        difference: (rows, columns) in [0, 1]: transparent at 0, and `opacity` at 1.
        body: mask (rows, columns); the map is shown inside it only.
        opacity: in [0, 1]; 0 leaves the image unchanged.
    """
    colors = matplotlib.colormaps[COLORS](difference)[..., :3] * 255
    alpha = (opacity * difference * body)[..., None]
    return np.rint(image[..., None] * (1 - alpha) + colors * alpha).astype(np.uint8)


def letters(image: Image.Image, name: str) -> None:
    """Write the side of the patient at each edge of a plane."""
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(LETTER_PIXELS)
    width, height = image.size
    places = (
        (4, height / 2, "lm"),
        (width - 4, height / 2, "rm"),
        (width / 2, 4, "mt"),
        (width / 2, height - 4, "mb"),
    )
    for letter, (x, y, anchor) in zip(EDGES[name], places, strict=True):
        draw.text((x, y), letter, anchor=anchor, font=font, fill="white", stroke_width=2, stroke_fill="black")


def slice_image(
    study: PageStudy,
    name: str,
    index: int,
    window: tuple[float, float],
    *,
    reference: bool = False,
    opacity: float = 0.0,
) -> np.ndarray:
    """
    Draw a slice as RGB (rows, columns, 3), with square pixels of `PIXEL_MM` and the letters of its sides.

    Args:
        name, index: plane and slice, see [`inference.figure.plane`].
        reference: show the reference instead of the target.
        opacity: opacity of the difference map at its largest value.
    """
    scan = study.reference if reference else study.scan
    depth, height, width = scan.spacing
    row, column = {"axial": (height, width), "coronal": (depth, width), "sagittal": (depth, height)}[name]
    image = grey(plane(scan.hu, name, index), window)
    pixels = blend(image, plane(study.difference, name, index), plane(study.body, name, index), opacity)
    rows, columns = image.shape
    drawn = Image.fromarray(pixels).resize(
        (max(round(columns * column / PIXEL_MM), 1), max(round(rows * row / PIXEL_MM), 1)), Image.Resampling.BICUBIC
    )
    letters(drawn, name)
    return np.asarray(drawn)


def data_uri(image: np.ndarray) -> str:
    """Return an RGB image as a PNG data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=4)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def plane_html(study: PageStudy | None, name: str, number: int, window: str, opacity: float) -> str:
    """Return target and reference of a plane; `number` counts slices from 1. Without a study, panels are black."""
    cells = []
    for label in ("Target", "Reference"):
        picture = '<div class="none"></div>'
        if study is not None:
            reference = label == "Reference"
            shown = 0.0 if reference else opacity
            image = slice_image(study, name, number - 1, WINDOWS[window], reference=reference, opacity=shown)
            over = " with difference map" if shown else ""
            size = f'width="{image.shape[1]}" height="{image.shape[0]}"'
            text = f"{label}{over}: {name} slice {number}, {window.lower()} window"
            picture = f'<img alt="{text}" {size} src="{data_uri(image)}">'
        cells.append(f'<figure class="cell">{picture}<figcaption>{label}</figcaption></figure>')
    return f'<div class="plane" data-plane="{name}">{"".join(cells)}</div>'


def report_html(study: PageStudy | None, writing: bool = False) -> str:
    """Return the report by region, as far as it is written, followed by the true report of a phantom."""
    if study is None:
        return '<div class="report"><p class="quiet">The report appears here, region by region.</p></div>'
    # The last line is a region heading only once its colon is written.
    text = study.text
    if writing and ":" not in text[text.rfind("\n") + 1 :]:
        text = text[: text.rfind("\n") + 1]
    regions = study.desk.processor.post_process(text)
    blocks = [f"<h3>{escape(region.capitalize())}</h3><p>{escape(words)}</p>" for region, words in regions.items()]
    if not writing and study.document is None:
        blocks.append('<p class="quiet">Stopped before the end.</p>')
    if study.document is not None:
        blocks += [f'<p class="warning">{escape(warning)}</p>' for warning in study.document["warnings"]]
        blocks.append(f'<p class="quiet">{RESEARCH_USE}</p>')
    if study.document is not None and study.truth is not None:
        blocks.append(_truth(study))
    busy = "true" if writing else "false"
    return f'<div class="report" aria-live="polite" aria-busy="{busy}">{"".join(blocks)}</div>'


def _truth(study: PageStudy) -> str:
    truth = study.document["truth"]
    counts = ", ".join(f"{name}: {', '.join(truth[name]) or 'none'}" for name in ("hit", "missed", "false"))
    regions = "".join(
        f"<h3>{escape(region.capitalize())}</h3><p>{escape(words)}</p>" for region, words in truth["regions"].items()
    )
    return f"<details><summary>The true report of this phantom</summary><p>{escape(counts)}.</p>{regions}</details>"


def status_html(text: str, error: bool = False) -> str:
    """Return the status line, or an error message."""
    kind = 'class="status error" role="alert"' if error else 'class="status" role="status"'
    return f"<div {kind}>{escape(text)}</div>"


def header_html(intended_domain: str | None) -> str:
    """Return the banner, which is always visible."""
    return (
        '<header><h1>DiffVP</h1><p class="what">CT report by comparison with a normal scan</p>'
        f'<p class="use">{RESEARCH_USE}</p>'
        f'<p class="domain">This checkpoint is intended for: {escape(stated_domain(intended_domain))}.</p></header>'
    )


def choices(study: PageStudy | None) -> list[tuple[str, str]]:
    """Return the places to go to as (caption, name); the largest difference comes first."""
    if study is None:
        return [(LARGEST, LARGEST)]
    named = [(f"{one['label']}  {one['probability']:.2f}", one["label"]) for one in study.positive]
    return [(LARGEST, LARGEST), *named]


def position(place: tuple[int, int, int]) -> dict[str, int]:
    """Return the slice numbers, from 1, of an index (depth, height, width)."""
    return {name: index + 1 for name, index in zip(PLANES, place, strict=True)}
