# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Scores of difference maps against the true lesions of the phantoms.

All arrays are on the grid of the model's tensor, (depth, height, width). If several voxels tie for the deciding value,
a score is its expected value under a random choice among them. A constant map therefore scores as chance, never as a
hit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage, special, stats

from ..data.cache import VolumeCache
from ..data.cases import Case
from ..data.lesions import lesion_mask_path, lesion_voxels
from ..data.pool import is_normal
from ..inference.figure import TISSUE_HU, to_hu
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..metrics.statistics import bootstrap_counts, compare_means, holm
from ..modeling_diffvp import DiffVPForConditionalGeneration, DiffVPModel
from ..progress import counted
from ..training.features import Features
from .references import ranked_references
from .runs import scan_inputs
from .system_scores import mean_and_interval

# Largest distance between a maximum and the lesion that it points at: two tensor voxels in depth on the phantom's
# grid. A reader who scrolls to the maximum still sees the lesion.
TOLERANCE_MM = 10.0
TOP_PERCENT = 1.0  # of the body: about one and a half voxel tokens of the phantom encoder
# Standard deviation of the Gaussian that smooths the pixel subtraction. Without it, single voxels of noise or of
# mismatched edges decide the maximum.
SMOOTHING_MM = 10.0
SCORES = ("pointing", "pointing_body", "pointing_lesion", "auroc")


# Scores of one map --------------------------------------------------------------------------------------------------


def body_voxels(volume: NDArray, hu_window: Sequence[float] = (-1000.0, 200.0)) -> NDArray[np.bool_]:
    """Return the voxels inside the skin, for each axial plane of a volume in [-1, 1] (the HU of the window).

    `inference.figure.body_mask` does not fit: it removes structures thinner than 9 voxels as the scanner's table, and
    at the spacing of the tensor these include the chest wall.
    """
    return np.stack([ndimage.binary_fill_holes(tissue) for tissue in to_hu(volume, hu_window) > TISSUE_HU])


def dilated(mask: NDArray[np.bool_], spacing: Sequence[float], tolerance_mm: float) -> NDArray[np.bool_]:
    """Dilate a non-empty mask by `tolerance_mm`; `spacing` in mm (depth, height, width)."""
    return ndimage.distance_transform_edt(~mask, sampling=spacing) <= tolerance_mm


def pointing(values: NDArray, target: NDArray[np.bool_]) -> float:
    """Return 1 if the largest value lies in the target, else 0; for ties, the share of the largest in the target."""
    return float(target[values == values.max()].mean())


def auroc(values: NDArray, positive: NDArray[np.bool_]) -> float:
    """Return the probability that a value in the target is larger than one outside it; ties count half.

    Raises:
        ValueError: all values are in the target, or none.
    """
    inside = int(positive.sum())
    outside = positive.size - inside
    if not inside or not outside:
        raise ValueError(f"{inside} voxels in the target and {outside} outside it: expected some on either side")
    ranks = stats.rankdata(values)
    return float((ranks[positive].sum() - inside * (inside + 1) / 2) / (inside * outside))


def reaches_top(values: NDArray, target: NDArray[np.bool_], percent: float) -> float:
    """Return 1 if the target holds one of the largest `percent` of the values (at least one value), else 0.

    If several values tie for the last places, return the probability that the target gets one in a random draw.
    """
    room = max(1, round(percent / 100 * values.size))
    limit = np.partition(values, values.size - room)[values.size - room]
    if (values[target] > limit).any():
        return 1.0
    room -= int((values > limit).sum())
    tied = values == limit
    others, all_tied = int((tied & ~target).sum()), int(tied.sum())
    if others < room:
        return 1.0
    # Probability of no target voxel: C(others, room) / C(all tied, room).
    missed = special.gammaln(others + 1) - special.gammaln(others - room + 1)
    missed -= special.gammaln(all_tied + 1) - special.gammaln(all_tied - room + 1)
    return float(1 - np.exp(missed))


@dataclass(frozen=True)
class MapScores:
    """
    Scores of one map.

    Attributes:
        pointing: 1 if the maximum lies in a lesion or within the tolerance of one.
        pointing_body: the same for the maximum inside the body.
        pointing_lesion: 1 if the maximum inside the body lies in a lesion itself.
        auroc: AUROC of lesion voxels against the rest of the body.
        reached: by label, 1 if the lesion holds one of the map's top voxels of the body.
    """

    pointing: float
    pointing_body: float
    pointing_lesion: float
    auroc: float
    reached: dict[str, float]


@dataclass(frozen=True)
class Truth:
    """
    Lesions of a case; arrays are (depth, height, width).

    Attributes:
        lesions: voxels of each finding inside the body, by label; none is empty.
        near: voxels in a lesion or within the tolerance of one.
        body: voxels inside the body.
        spacing: mm (depth, height, width).
    """

    lesions: dict[str, NDArray[np.bool_]]
    near: NDArray[np.bool_]
    body: NDArray[np.bool_]
    spacing: tuple[float, float, float]

    @classmethod
    def from_codes(
        cls,
        codes: NDArray[np.int32],
        body: NDArray[np.bool_],
        spacing: tuple[float, float, float],
        tolerance_mm: float = TOLERANCE_MM,
    ) -> "Truth":
        """Decode bit-coded lesions (see [`lesion_voxels`]), some of which lie in the body."""
        lesions = {label: ((codes >> bit) & 1 == 1) & body for bit, label in enumerate(DIAGNOSIS_LABELS)}
        lesions = {label: mask for label, mask in lesions.items() if mask.any()}
        return cls(lesions, dilated(codes != 0, spacing, tolerance_mm), body, spacing)


def score_map(difference: NDArray, truth: Truth, top_percent: float = TOP_PERCENT) -> MapScores:
    """
    Score a map against the lesions of its case.

    Raises:
        ValueError: the map is not on the grid of the lesions, or a value is not finite.
    """
    if difference.shape != truth.body.shape:
        raise ValueError(f"the map has shape {difference.shape}, the lesions {truth.body.shape}: expected one grid")
    if not np.isfinite(difference).all():
        raise ValueError("the map has values that are not finite")
    values = difference[truth.body]
    inside = {label: mask[truth.body] for label, mask in truth.lesions.items()}
    lesions = np.any(list(inside.values()), axis=0)
    return MapScores(
        pointing=pointing(difference, truth.near),
        pointing_body=pointing(values, truth.near[truth.body]),
        pointing_lesion=pointing(values, lesions),
        auroc=auroc(values, lesions),
        reached={label: reaches_top(values, mask, top_percent) for label, mask in inside.items()},
    )


def score_ball(truth: Truth, top_percent: float = TOP_PERCENT) -> MapScores:
    """
    Score chance for a compact map: a ball with the volume of the top voxels, centred anywhere in the body.

    The same number of voxels scattered at random reaches almost every lesion, but the top voxels of a smooth map lie
    together.
    """
    flat = score_map(np.zeros(truth.body.shape, np.float32), truth, top_percent)
    volume = top_percent / 100 * truth.body.sum() * np.prod(truth.spacing)
    radius = float((3 * volume / (4 * np.pi)) ** (1 / 3))
    reached = {
        label: float(dilated(mask, truth.spacing, radius)[truth.body].mean()) for label, mask in truth.lesions.items()
    }
    return replace(flat, reached=reached)


# Scores of a model --------------------------------------------------------------------------------------------------


def difference_map(
    model: DiffVPForConditionalGeneration, features: Features, case: Case, reference: Case
) -> NDArray[np.float32]:
    """Compute the difference map of a case (depth, height, width), from the caches."""
    return model.difference_map(**scan_inputs(model, features, [case], [[reference]]))[0].float().cpu().numpy()


def target_maps(
    model: DiffVPForConditionalGeneration, features: Features, case: Case
) -> dict[str, NDArray[np.float32]]:
    """
    Compute maps without a reference, (depth, height, width).

    "target alone" is the norm of each voxel token of the scan. For an aligned difference, "target alone, whitened" is
    the norm of the whitened tokens that it compares with the reference.
    """
    return token_maps(model, features.load(case)["features"])


def token_maps(model: DiffVPModel, tokens: torch.Tensor) -> dict[str, NDArray[np.float32]]:
    """Compute [`target_maps`] from the voxel tokens (N, C) of a scan."""
    tokens = tokens.float().cpu()
    forms = {"target alone": tokens}
    if model.config.difference_level == "aligned":
        of = model.aligned_difference
        forms["target alone, whitened"] = (tokens - of.mean.float().cpu()) @ of.whitening.float().cpu().T
    grid, size = model.config.feature_grid, tuple(model.config.image_size)
    return {
        name: F.interpolate(values.norm(dim=1).view(1, 1, *grid), size, mode="trilinear")[0, 0].numpy()
        for name, values in forms.items()
    }


def pixel_maps(target: NDArray, reference: NDArray, spacing: Sequence[float]) -> dict[str, NDArray]:
    """Subtract the voxels of two volumes: |target - reference|, as it is and after a Gaussian."""
    subtraction = np.abs(target - reference)
    sigma = [SMOOTHING_MM / mm for mm in spacing]
    return {"pixel": subtraction, "pixel, smoothed": ndimage.gaussian_filter(subtraction, sigma)}


def true_lesions(
    volumes: VolumeCache, lesion_root: str | Path, case: Case, volume: NDArray, tolerance_mm: float
) -> Truth | None:
    """Return the lesions of a case, or `None` if none lies in its tensor, the `volume`.

    Raises:
        DatasetError: the lesion mask is missing or has another shape.
    """
    geometry = volumes.preprocess(case)["geometry"][0]
    codes = lesion_voxels(lesion_mask_path(lesion_root, case.name), geometry).numpy()
    body = body_voxels(volume, volumes.image_processor.hu_window)
    if not codes[body].any():
        return None
    return Truth.from_codes(codes, body, geometry.tensor_spacing, tolerance_mm)


def score_with_chance(maps: dict[str, NDArray], truth: Truth) -> dict[str, MapScores]:
    """Score the maps of a case, and chance on its lesions: scattered voxels, and voxels that lie together."""
    scattered = np.zeros(truth.body.shape, np.float32)
    scores = {name: score_map(values, truth) for name, values in (maps | {"chance": scattered}).items()}
    return scores | {"chance, in one piece": score_ball(truth)}


def correlation(first: NDArray, second: NDArray) -> float:
    """Return Pearson's correlation of two maps: 0 if one is constant, 1 if both are."""
    constant = [np.ptp(values) == 0 for values in (first, second)]
    return float(all(constant)) if any(constant) else float(np.corrcoef(first, second)[0, 1])


def other_references(cases: Sequence[Case], references: Mapping[str, Case]) -> dict[str, Case]:
    """Draw a second reference for each case from the references of all cases, by names only.

    Raises:
        ValueError: a case has no other reference.
    """
    known = {reference.name: reference for reference in references.values()}
    chosen = {}
    for case in cases:
        own = references[case.name]
        order = ranked_references(case, known, "other")
        others = [name for name in order if known[name].scan_id != own.scan_id]
        if not others:
            raise ValueError(f"{case.name} has one reference, {own.name}, among {len(known)}: expected another")
        chosen[case.name] = known[others[0]]
    return chosen


def score_maps(
    model: DiffVPForConditionalGeneration,
    features: Features,
    volumes: VolumeCache,
    lesion_root: str | Path,
    cases: Sequence[Case],
    references: Mapping[str, Case],
    tolerance_mm: float = TOLERANCE_MM,
) -> dict:
    """
    Score the model's difference maps of the cases with findings, with baselines.

    Maps:

    - "latent": map of the case and its reference (for a pixel-level model, the model's map, not the subtraction
      below);
    - "latent, another reference": the same with another reference;
    - "latent, another patient": map of the next case, scored against the lesions of this one. It measures how much a
      map owes to the usual places of lesions, and unlike "chance" it is as smooth as the first map;
    - "target alone", and for an aligned difference "target alone, whitened": maps without a reference, see
      [`target_maps`];
    - "pixel": |target - reference| of the model's tensors;
    - "pixel, smoothed": the same after a Gaussian;
    - "chance": a constant map, so that its top voxels are scattered over the body;
    - "chance, in one piece": see [`score_ball`]. It differs from "chance" only in the sensitivity.

    Args:
        lesion_root: the phantom cohort of the cases, with masks.
        references: the reference of each case, by its name.
        tolerance_mm: largest distance between a maximum and the lesion that it points at.

    Returns:
        For each map the scores of [`MapScores`] as means over cases with 95 % intervals, "above_chance" (pointing in
        the body minus chance on the same lesions), "sensitivity" by label and of "all" findings (the share whose
        lesion holds one of the top voxels), and paired comparisons of the first map with each other map.
        "correlation" of the first map with the second, within the body: 1 if the reference changes nothing.

    Raises:
        ValueError: fewer than two cases have a lesion in the tensor, or there are too few references.
        DatasetError: a lesion mask is missing or has another shape.
    """
    targets = [case for case in cases if not is_normal(case)]
    others = other_references(targets, references)

    @lru_cache(2)  # the map of a case is also that of another patient, for the case before it
    def own_map(index: int) -> NDArray[np.float32]:
        return difference_map(model, features, targets[index], references[targets[index].name])

    scores: dict[str, list[MapScores]] = {}
    scored, outside, correlations = [], [], []
    for index, case in enumerate(counted(targets, "Difference maps")):
        target, reference = (volumes.load(of)[0].float().numpy() for of in (case, references[case.name]))
        truth = true_lesions(volumes, lesion_root, case, target, tolerance_mm)
        if truth is None:
            outside.append(case.name)
            continue
        scored.append(case.name)
        maps = {
            "latent": own_map(index),
            "latent, another reference": difference_map(model, features, case, others[case.name]),
            "latent, another patient": own_map((index + 1) % len(targets)),
            **target_maps(model, features, case),
            **pixel_maps(target, reference, truth.spacing),
        }
        for name, of_map in score_with_chance(maps, truth).items():
            scores.setdefault(name, []).append(of_map)
        correlations.append(correlation(*(maps[name][truth.body] for name in ("latent", "latent, another reference"))))
    if len(scored) < 2:
        raise ValueError(f"{len(scored)} of {len(cases)} case(s) have a lesion in the tensor: this takes at least 2")
    return {
        "cases": len(scored),
        "without_lesion_in_tensor": outside,
        "tolerance_mm": tolerance_mm,
        "top_percent": TOP_PERCENT,
        "smoothing_mm": SMOOTHING_MM,
        "maps": {name: summary(of_map, scores["chance"]) for name, of_map in scores.items()},
        "comparisons": compare_maps(scores, "latent"),
        "correlation": mean_and_interval(correlations),
        "per_case": {
            case: {name: {score: getattr(of_map[row], score) for score in SCORES} for name, of_map in scores.items()}
            for row, case in enumerate(scored)
        },
    }


def summary(scores: Sequence[MapScores], by_chance: Sequence[MapScores]) -> dict:
    """Compute means over cases with their intervals, and the sensitivity by label and of all findings together."""
    columns = {name: np.array([getattr(of_case, name) for of_case in scores]) for name in SCORES}
    columns["above_chance"] = columns["pointing_body"] - [of_case.pointing_body for of_case in by_chance]
    result = {name: mean_and_interval(values) for name, values in columns.items()}
    by_label = {
        label: [of_case.reached[label] for of_case in scores if label in of_case.reached] for label in DIAGNOSIS_LABELS
    }
    sensitivity = {
        label: {"findings": len(values), **mean_and_interval(values)} for label, values in by_label.items() if values
    }
    # The findings of a case are not independent: draw cases, not findings.
    sums = np.array([[sum(of_case.reached.values()), len(of_case.reached)] for of_case in scores])
    interval = bootstrap_counts(sums, lambda drawn: drawn[..., 0] / drawn[..., 1])
    sensitivity["all"] = {
        "findings": int(sums[:, 1].sum()),
        "mean": interval.estimate,
        "interval": [interval.low, interval.high],
    }
    return result | {"sensitivity": sensitivity}


def compare_maps(scores: Mapping[str, Sequence[MapScores]], first: str) -> list[dict]:
    """Compare one map with each other map, paired by case; `p_cases_holm` corrects over all comparisons."""
    entries = []
    for second in scores:
        if second in (first, "chance, in one piece"):  # the latter equals "chance" in these metrics
            continue
        metrics = {}
        for name in ("pointing_body", "auroc"):
            sides = [[getattr(of_case, name) for of_case in scores[side]] for side in (first, second)]
            comparison = compare_means(*sides)
            metrics[name] = {
                "difference": comparison.difference,
                "interval": [comparison.interval.low, comparison.interval.high],
                "p_cases": comparison.p_value,
            }
        entries.append({"first": first, "second": second, "metrics": metrics})
    tests = [metric for entry in entries for metric in entry["metrics"].values()]
    for test, corrected in zip(tests, holm([test["p_cases"] for test in tests]), strict=True):
        test["p_cases_holm"] = float(corrected)
    return entries
