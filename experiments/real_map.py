# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Score the aligned difference map of a real scan against a lesion mask, for one or two encoders.

    python -m diffvp.experiments.real_map SCAN MASK REFERENCE --encoder astra.safetensors --output OUT

Writes `real_map.json`, `real_map.md` and `real_map.png`. One scan is an example, not an evaluation of a method. The
last column is the share of places in this body where a lesion of this shape would score as high by chance.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from numpy.typing import NDArray
from scipy import ndimage, signal, stats

from ..cli import SHIPPED_CHECKPOINT
from ..configuration_diffvp import DiffVPConfig
from ..data.cases import DatasetError, Problem
from ..data.lesions import mask_voxels
from ..encoders_diffvp import DiffVPEncoderError
from ..inference.report import load_checkpoint
from ..metrics.markdown import p_text, table_lines
from ..modeling_diffvp import DiffVPModel
from ..processing_diffvp import DiffVPImageProcessor
from ..reading_diffvp import read_ct
from ..training.encoder import load_encoder, read_header
from ..volume_diffvp import CTVolume
from .map_figure import MapExample, draw_maps
from .map_scores import SMOOTHING_MM, TOLERANCE_MM, auroc, body_voxels, dilated, pointing, token_maps
from .result_files import write_bytes, write_json

# Input of Merlin and Astra: the region above -1000 HU, resized to this shape.
INFLATED_SIZE, INFLATED_FOREGROUND = (160, 224, 224), -1000.0
# Their tokens are about 25 x 40 x 40 mm, so a radius of one token matches two or more of the phantom's encoder.
# Squared distances grow with the number of channels; the phantom's encoder has 48 at a temperature of 8.
INFLATED_RADIUS, TEMPERATURE_PER_CHANNEL = 1, 8 / 48
PEAK_MM = 12.0
INSIDE = 0.95  # share of a shifted lesion that must lie in the body


@dataclass(frozen=True)
class Seen:
    """
    Two preprocessed scans and the maps of the first; arrays are (depth, height, width).

    Attributes:
        lesion: mask of the lesion in the target.
        maps: maps by name; "difference" is the aligned difference map.
        spacing: mm (depth, height, width).
        hu_window: HU at -1 and 1.
    """

    target: NDArray
    reference: NDArray
    lesion: NDArray[np.bool_]
    maps: dict[str, NDArray]
    spacing: tuple[float, float, float]
    hu_window: tuple[float, float]


def read_lesion(path: str | Path, scan: CTVolume) -> NDArray[np.bool_]:
    """
    Read a mask in any format of SimpleITK, as [x, y, z] like the array of the scan.

    Our own reader refuses masks: they compress so well that it takes them for decompression bombs.

    Raises:
        DatasetError: the mask cannot be read, is not on the grid of the scan, or is empty.
    """
    source = Path(path).name

    def refuse(field: str, found, expected: str) -> DatasetError:
        return DatasetError([Problem(source, None, field, str(found), expected)])

    try:
        mask = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    except RuntimeError as error:
        raise refuse("file", "unreadable", "a mask that SimpleITK reads") from error
    lesion = sitk.GetArrayViewFromImage(mask).T > 0
    # Position of the array's first voxel: in the grid of the file, then in world coordinates (LPS).
    first = np.zeros(3)
    for axis, flip in zip(scan.axes, scan.flips, strict=True):
        first[axis] = (scan.shape[axis] - 1) * flip
    origin = (scan.affine[:3, :3] @ first + scan.affine[:3, 3]) * [-1, -1, 1]
    grids = [(lesion.shape, *np.round(mask.GetOrigin(), 1)), (scan.array.shape, *np.round(origin, 1))]
    if lesion.shape != scan.array.shape or not np.allclose(mask.GetOrigin(), origin, atol=0.1):
        raise refuse("grid", f"{grids[0]}", f"{grids[1]}, as the scan has")
    if not lesion.any():
        raise refuse("voxels", "none is above 0", "some, of a lesion")
    return lesion


@torch.no_grad()
def see(
    model: DiffVPModel,
    image_processor: DiffVPImageProcessor,
    scan: CTVolume,
    lesion: NDArray[np.bool_],
    reference: CTVolume,
    fit: bool = False,
) -> Seen:
    """
    Compute the maps of a scan.

    Args:
        fit: fit the whitening to the tokens of the reference's body, for a model without a pool of normal scans.
    """
    given = [image_processor(of) for of in (scan, reference)]
    tokens = [model.extract_features(of["ct"]) for of in given]
    window, geometry = tuple(image_processor.hu_window), given[0]["geometry"][0]
    volumes = [of["ct"][0, 0].numpy() for of in given]
    if fit:
        body = torch.from_numpy(body_voxels(volumes[1], window)).float()[None, None]
        inside = torch.nn.functional.adaptive_max_pool3d(body, model.config.feature_grid).flatten() > 0
        model.aligned_difference.fit(tokens[1][0].float().cpu()[inside])
    difference = model.difference_map(ct_features=tokens[0], reference_features=tokens[1])[0].cpu().numpy()
    subtraction = np.abs(volumes[0] - volumes[1])
    sigma = [SMOOTHING_MM / mm for mm in geometry.tensor_spacing]
    maps = {
        "difference": difference,
        **token_maps(model, tokens[0][0]),
        "pixels subtracted, smoothed": ndimage.gaussian_filter(subtraction, sigma),
    }
    mask = mask_voxels(lesion.astype(np.uint32), geometry).numpy() != 0
    return Seen(*volumes, mask, maps, geometry.tensor_spacing, window)


def inflated_model(path: str | Path) -> tuple[DiffVPModel, DiffVPImageProcessor]:
    """
    Build a model around the converted encoder of Merlin or Astra. Only the encoder is trained.

    Raises:
        DiffVPEncoderError: the file has other weights.
    """
    fields = json.loads(read_header(path).get("encoder", "{}"))
    if fields.get("encoder_type") != "i3resnet":
        raise DiffVPEncoderError(Path(path).name, "encoder_type", fields.get("encoder_type"), "i3resnet")
    width = 4 * fields["encoder_block_channels"][-1]
    config = DiffVPConfig(
        **fields,
        image_size=INFLATED_SIZE,
        use_diagnosis=False,
        difference_level="aligned",
        difference_radius=INFLATED_RADIUS,
        difference_temperature=TEMPERATURE_PER_CHANNEL * width,
    )
    model = DiffVPModel(config).eval()
    load_encoder(model, path)
    size = dict(zip(("depth", "height", "width"), INFLATED_SIZE, strict=True))
    return model, DiffVPImageProcessor(size=size, foreground_hu=INFLATED_FOREGROUND)


def score(values: NDArray, seen: Seen) -> dict[str, float]:
    """
    Score a map against the lesion, within the body.

    Returns:
        "inside": 1 if the maximum lies in the lesion; "near": 1 if it lies in the lesion or within the tolerance;
        "distance_mm" from the maximum to the lesion; "rank" of the lesion among the local maxima of the map (the
        largest value within 12 mm to each side); "auroc"; "dice" of the lesion with the same number of largest values;
        "by_chance": see [`share_of_places`].
    """
    body = body_voxels(seen.target, seen.hu_window)
    lesion = seen.lesion & body
    inside, of_body = lesion[body], values[body]
    distance = ndimage.distance_transform_edt(~lesion, sampling=seen.spacing)
    sides = [2 * round(PEAK_MM / mm) + 1 for mm in seen.spacing]
    peaks = body & (ndimage.maximum_filter(np.where(body, values, -np.inf), sides) == values)
    top = np.argsort(-of_body, kind="stable")[: inside.sum()]
    return {
        "inside": pointing(of_body, inside),
        "near": pointing(of_body, dilated(lesion, seen.spacing, TOLERANCE_MM)[body]),
        "distance_mm": float(distance[body][of_body.argmax()]),
        "rank": 1 + int((peaks & (values > values[lesion].max())).sum()),
        "auroc": auroc(of_body, inside),
        "dice": float(inside[top].mean()),
        "by_chance": share_of_places(values, lesion, body),
    }


def share_of_places(values: NDArray, lesion: NDArray[np.bool_], body: NDArray[np.bool_]) -> float:
    """
    Return the share of places in the body where a lesion of this shape has at least this mean rank.

    It is the probability that an equally smooth map, independent of the lesion, scores as high by chance.
    """
    ranks = np.zeros(values.shape)
    ranks[body] = stats.rankdata(values[body]) / body.sum()
    shape = lesion[ndimage.find_objects(lesion.astype(np.int8))[0]].astype(float)[::-1, ::-1, ::-1]
    held = signal.fftconvolve(body.astype(float), shape, mode="valid")
    means = signal.fftconvolve(ranks, shape, mode="valid") / np.maximum(held, 1)
    places = held >= INSIDE * shape.sum()
    return float((means[places] >= ranks[lesion].mean() - 1e-6).mean())


def make(
    scan: str | Path,
    mask: str | Path,
    reference: str | Path,
    output: str | Path,
    checkpoint: str | Path = SHIPPED_CHECKPOINT,
    encoder: str | Path | None = None,
) -> Path:
    """Write page, numbers and picture; return the path of the page. `encoder` comes from `diffvp encoder convert`."""
    target, normal = read_ct(scan), read_ct(reference)
    lesion = read_lesion(mask, target)
    model, processor = load_checkpoint(checkpoint)
    seen = {Path(checkpoint).name: see(model, processor.image_processor, target, lesion, normal)}
    sources = {Path(checkpoint).name: model.config.encoder_name or "its own encoder"}
    if encoder is not None:
        model, image_processor = inflated_model(encoder)
        name = model.config.encoder_name
        seen[name] = see(model, image_processor, target, lesion, normal, fit=True)
        sources[name] = f"SHA-256 {model.config.encoder_sha256}"
    result = {
        "scans": {"target": target.sha256, "reference": normal.sha256},
        "encoders": sources,
        "lesion_share": {name: _share(of) for name, of in seen.items()},
        "scores": {name: {kind: score(values, of) for kind, values in of.maps.items()} for name, of in seen.items()},
    }
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    draw_maps(output / "real_map.png", [_example(name, of) for name, of in seen.items()], about="A real scan.")
    write_json(output / "real_map.json", result)
    write_bytes(output / "real_map.md", ("\n".join(_page(result)) + "\n").encode())
    return output / "real_map.md"


def _share(seen: Seen) -> float:
    body = body_voxels(seen.target, seen.hu_window)
    return float((seen.lesion & body).sum() / body.sum())


def _example(name: str, seen: Seen) -> MapExample:
    index = int(seen.lesion.sum(axis=(1, 2)).argmax())
    return MapExample(
        title=f"encoder: {name}",
        shown="the lesion",
        index=index,
        target=seen.target,
        reference=seen.reference,
        difference=seen.maps["difference"],
        lesions=seen.lesion,
        lesion=seen.lesion,
        spacing=seen.spacing,
        hu_window=seen.hu_window,
    )


def _page(result: Mapping) -> list[str]:
    head = [
        "encoder", "map", "maximum in the lesion", f"or within {TOLERANCE_MM:g} mm", "distance in mm",
        "rank of the lesion", "AUROC in the body", "Dice with as many voxels", "share of places that score as high",
    ]  # fmt: skip
    rows = [
        [
            encoder,
            kind,
            *("yes" if of[key] == 1 else "no" for key in ("inside", "near")),
            f"{of['distance_mm']:.0f}",
            str(of["rank"]),
            f"{of['auroc']:.3f}",
            f"{of['dice']:.3f}",
            p_text(of["by_chance"]),
        ]
        for encoder, maps in result["scores"].items()
        for kind, of in maps.items()
    ]
    shares = ", ".join(f"{share:.5f} ({name})" for name, share in result["lesion_share"].items())
    return [
        "# The difference map of a real scan",
        "",
        "![Target, reference, difference map, lesion, subtraction](real_map.png)",
        "",
        *table_lines(head, rows),
        "",
        f"One scan (n = 1). Share of the lesion in the body, the expected maximum and Dice by chance: {shares}.",
        f"Rank: among the local maxima of the map, the largest values within {PEAK_MM:g} mm to each side.",
        "Last column: share of the places in the body, with room for this lesion, that have as high a mean rank.",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", help="CT in any supported format")
    parser.add_argument("mask", help="lesion mask (above 0) on the same grid")
    parser.add_argument("reference", help="normal CT")
    parser.add_argument("--checkpoint", default=SHIPPED_CHECKPOINT, help="checkpoint with an aligned difference")
    parser.add_argument("--encoder", help="encoder of Merlin or Astra, from `diffvp encoder convert`")
    parser.add_argument("--output", required=True, help="output folder")
    given = parser.parse_args()
    make(given.scan, given.mask, given.reference, given.output, given.checkpoint, given.encoder)
