# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Lesions on the tensor's grid, scores of difference maps, token importance, and their figures."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from diffvp.data.cache import VolumeCache
from diffvp.data.cases import Case, DatasetError
from diffvp.data.lesions import lesion_mask_path, lesion_voxels
from diffvp.data.phantom_cases import load_phantom
from diffvp.data.phantom_cohort import write_cohort
from diffvp.data.pool import normal_pool
from diffvp.experiments.kinds.token_importance import (
    draw_importance,
    importance_statistics,
    score_importance,
    token_weights,
)
from diffvp.experiments.map_figure import MapExample, draw_maps, map_example
from diffvp.experiments.map_scores import (
    MapScores,
    Truth,
    auroc,
    body_voxels,
    compare_maps,
    difference_map,
    dilated,
    other_references,
    pointing,
    reaches_top,
    score_ball,
    score_map,
    score_maps,
    summary,
)
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.processing_diffvp import DiffVPImageProcessor
from diffvp.training.features import Features

NODULE = DIAGNOSIS_LABELS.index("Lung nodule")
RAS = np.diag([2.0, 2.5, 3.0, 1.0])
LPS = np.diag([-2.0, -2.5, 3.0, 1.0])
PIR = np.array([[0, 0, 3.0, 0], [-2.0, 0, 0, 0], [0, -2.5, 0, 0], [0, 0, 0, 1]])


def carried(path, geometry):
    """Sample the mask at the centre of each tensor voxel, going through world coordinates only."""
    mask = nib.load(path)
    index = np.stack(np.meshgrid(*map(np.arange, geometry.size), indexing="ij"), -1).reshape(-1, 3)
    world = np.c_[index, np.ones(len(index))] @ np.asarray(geometry.tensor_affine).T
    voxel = np.rint((world @ np.linalg.inv(mask.affine).T)[:, :3]).astype(int)
    inside = ((voxel >= 0) & (voxel < mask.shape)).all(1)
    codes = np.zeros(len(index), np.int32)
    codes[inside] = np.asarray(mask.dataobj)[tuple(voxel[inside].T)]
    return codes.reshape(geometry.size)


# Lesions on the tensor's grid ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [RAS, LPS, PIR], ids=["RAS", "LPS", "PIR"])
def test_lesion_lands_at_its_place_in_the_patient(tmp_path, axes):
    """A ball 30 mm to the left, 20 mm behind and 24 mm above the middle of a round body, in several orientations."""
    affine = axes.copy()
    affine[:3, 3] = -affine[:3, :3] @ (np.array([80, 80, 60]) - 1) / 2  # the middle of the grid is the origin
    index = np.stack(np.meshgrid(*map(np.arange, (80, 80, 60)), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]  # RAS
    body = np.linalg.norm(world, axis=-1) < 65
    lesion = np.linalg.norm(world - [-30, -20, 24], axis=-1) < 12
    hu = np.where(lesion, 150, np.where(body, -100, -1000)).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "ct.nii.gz")
    nib.save(nib.Nifti1Image(lesion.astype(np.uint32) << np.uint32(NODULE), affine), tmp_path / "mask.nii.gz")
    processor = DiffVPImageProcessor(size=(40, 48, 56), target_spacing=(4.1, 3.3, 2.7), foreground_hu=-500.0)
    features = processor(tmp_path / "ct.nii.gz")
    geometry = features["geometry"][0]
    codes = lesion_voxels(tmp_path / "mask.nii.gz", geometry).numpy()
    assert codes.shape == (40, 48, 56) and set(np.unique(codes)) == {0, 1 << NODULE}
    # Depth grows to superior, height to posterior, width to the patient's left.
    expected = [39 / 2 + 24 / 4.1, 47 / 2 + 20 / 3.3, 55 / 2 + 30 / 2.7]
    np.testing.assert_allclose(ndimage.center_of_mass(codes != 0), expected, atol=0.5)
    bright = features["ct"][0, 0].numpy() > 0.7  # 20 HU, between body and lesion
    assert bright.sum() > 100 and (bright & (codes != 0)).sum() > 0.95 * bright.sum()
    # All voxel centres inside the mask, plus at most a shell of voxels that contain a part of it.
    centres = carried(tmp_path / "mask.nii.gz", geometry)
    assert not (centres & ~codes).any()
    assert not ((codes != 0) & ~ndimage.binary_dilation(centres != 0)).any()


def test_resampled_lesions_have_no_gaps_and_are_never_lost(tmp_path):
    hu = np.full((40, 40, 12), -1000, np.int16)
    hu[5:35, 5:35, 1:11] = 0
    codes = np.zeros(hu.shape, np.uint32)
    codes[10:20, 10:20, 3:7] = 1  # four slices of 10 mm
    for bit, (x, y) in enumerate(((25, 25), (26, 27), (27, 24), (28, 26)), start=1):
        codes[x, y, 8] = 1 << bit  # single voxels; the tensor's voxel centres are 4 mm apart
    affine = np.diag([1.0, 1.0, 10.0, 1.0])
    for name, array in (("ct", hu), ("mask", codes)):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    processor = DiffVPImageProcessor(size=(64, 16, 16), target_spacing=(2.0, 4.0, 4.0), foreground_hu=-500.0)
    geometry = processor(tmp_path / "ct.nii.gz")["geometry"][0]
    voxels = lesion_voxels(tmp_path / "mask.nii.gz", geometry).numpy()
    planes = np.flatnonzero((voxels & 1).any(axis=(1, 2)))
    assert len(planes) in (19, 20, 21) and (np.diff(planes) == 1).all()  # 40 mm
    for bit in (1, 2, 3, 4):
        assert 1 <= (voxels & 1 << bit != 0).sum() <= 6  # 10 mm high: a column one voxel wide


def test_missing_masks_and_masks_of_another_shape_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)), tmp_path / "mask.nii.gz")
    with pytest.raises(DatasetError, match=r"mask.nii.gz: shape: \(9, 9, 9\) \(expected \(8, 8, 8\)"):
        lesion_voxels(tmp_path / "mask.nii.gz", SimpleNamespace(shape=(8, 8, 8)))
    with pytest.raises(DatasetError, match="none.nii.gz: lesion mask: missing"):
        lesion_voxels(tmp_path / "none.nii.gz", SimpleNamespace(shape=(8, 8, 8)))


# Scores of one map --------------------------------------------------------------------------------------------------


def test_pointing_averages_over_ties_and_scores_a_flat_map_as_chance():
    target = np.zeros(10, bool)
    target[[2, 3]] = True
    assert pointing(np.eye(10)[2], target) == 1 and pointing(np.eye(10)[5], target) == 0
    assert pointing(np.eye(10)[2] + np.eye(10)[5], target) == 0.5
    assert pointing(np.zeros(10), target) == pointing(np.full(10, 7.0), target) == 0.2


@pytest.mark.parametrize("levels", [3, 10**6])
def test_auroc_equals_scikit_learn_with_and_without_ties(levels):
    rng = np.random.default_rng(levels)
    positive = rng.random(500) < 0.1
    values = rng.integers(0, levels, 500) + 0.5 * levels * positive
    assert auroc(values, positive) == pytest.approx(roc_auc_score(positive, values), abs=1e-12)
    assert auroc(np.zeros(500), positive) == 0.5
    for nothing in (np.zeros(500, bool), np.ones(500, bool)):
        with pytest.raises(ValueError, match="expected some on either side"):
            auroc(values, nothing)


@pytest.mark.parametrize("seed", range(30))
def test_top_voxels_are_drawn_at_random_among_ties(seed):
    """Compare with an enumeration of all ways to break the ties."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 3, 9).astype(float)
    target = rng.random(9) < 0.3
    room = int(rng.integers(1, 9))
    best = sorted(values, reverse=True)[:room]
    ways = [way for way in itertools.combinations(range(9), room) if sorted(values[list(way)], reverse=True) == best]
    expected = np.mean([target[list(way)].any() for way in ways])
    assert reaches_top(values, target, 100 * room / 9) == pytest.approx(expected, abs=1e-12)


def test_tolerance_is_in_millimetres_along_each_axis():
    mask = np.zeros((9, 9, 9), bool)
    mask[4, 4, 4] = True
    near = dilated(mask, (5.0, 2.0, 3.0), 6.5)
    index = np.stack(np.meshgrid(*[np.arange(9) - 4] * 3, indexing="ij"), -1)
    np.testing.assert_array_equal(near, np.sqrt(((index * [5.0, 2.0, 3.0]) ** 2).sum(-1)) <= 6.5)
    assert 1 < near.sum() < 60


def test_body_includes_everything_inside_the_skin():
    volume = np.full((3, 24, 24), -1.0)
    volume[:, 4:20, 4:20] = 0.2
    volume[:, 6:18, 6:18] = -0.9  # lungs behind a thin wall
    body = body_voxels(volume)
    wide = (volume + 1) * (1200 / 2200) - 1  # the same HU in another window
    np.testing.assert_array_equal(body_voxels(wide, (-1000, 1200)), body)
    assert body[:, 4:20, 4:20].all() and body.sum() == 3 * 16 * 16


def truth_of(**lesions):
    """Make a body of 20 x 20 x 20 voxels in a tensor of 24 x 24 x 24, with box-shaped lesions."""
    codes, body = np.zeros((24, 24, 24), np.int32), np.zeros((24, 24, 24), bool)
    body[2:22, 2:22, 2:22] = True
    for label, box in lesions.items():
        codes[box] |= 1 << DIAGNOSIS_LABELS.index(label.replace("_", " "))
    return Truth.from_codes(codes, body, (4.0, 3.0, 3.0), tolerance_mm=4.0)


# Boxes in the patient's left and right half.
LEFT, RIGHT = np.s_[8:11, 8:11, 15:18], np.s_[12:14, 12:14, 5:7]


def test_map_scores_depend_on_where_the_map_is_large():
    truth = truth_of(Lung_nodule=LEFT, Consolidation=RIGHT)
    bump = np.zeros((24, 24, 24))
    bump[9, 9, 16] = 1
    bump = ndimage.gaussian_filter(bump, 1.0)
    scores = score_map(bump, truth, top_percent=0.2)  # 16 of 8,000 voxels
    assert (scores.pointing, scores.pointing_body) == (1, 1) and scores.auroc > 0.75
    assert scores.reached == {"Lung nodule": 1, "Consolidation": 0}
    # The mirrored map (right and left exchanged) misses.
    mirrored = score_map(bump[:, :, ::-1], truth, top_percent=0.2)
    assert (mirrored.pointing, mirrored.pointing_body) == (0, 0) and mirrored.auroc < scores.auroc
    # A maximum outside the body changes `pointing`, but not `pointing_body`.
    bump[0, 0, 0] = 2
    beside = score_map(bump, truth, top_percent=0.2)
    assert (beside.pointing, beside.pointing_body, beside.auroc) == (0, 1, scores.auroc)


def test_constant_map_scores_as_chance():
    truth = truth_of(Lung_nodule=LEFT)
    scores = score_map(np.full((24, 24, 24), 3.0), truth, top_percent=1.0)
    # The lesion has 3 x 3 x 3 voxels. A tolerance of 4 mm reaches one voxel along each axis but no in-plane diagonal
    # (4.24 mm).
    near = 27 + 6 * 9
    assert scores.pointing == near / 24**3 and scores.pointing_body == near / 20**3 and scores.auroc == 0.5
    missed = np.prod([1 - 27 / (8000 - drawn) for drawn in range(80)])
    assert scores.reached["Lung nodule"] == pytest.approx(1 - missed, rel=1e-9)


def test_chance_of_one_ball_averages_over_all_centres_in_the_body():
    truth = truth_of(Lung_nodule=LEFT)
    radius = (3 * 0.01 * 8000 * 36 / (4 * np.pi)) ** (1 / 3)  # 1 % of the body's volume
    spacing, lesion = np.array([4.0, 3.0, 3.0]), np.argwhere(truth.lesions["Lung nodule"]) * [4.0, 3.0, 3.0]
    hits = [np.linalg.norm(lesion - centre * spacing, axis=1).min() <= radius for centre in np.argwhere(truth.body)]
    scores = score_ball(truth, top_percent=1.0)
    assert scores.reached["Lung nodule"] == pytest.approx(np.mean(hits)) and 0.02 < np.mean(hits) < 0.2
    assert replace(scores, reached={}) == replace(score_map(np.zeros((24, 24, 24)), truth), reached={})


def test_maps_of_another_shape_or_with_nan_are_refused():
    truth = truth_of(Lung_nodule=LEFT)
    with pytest.raises(ValueError, match=r"shape \(12, 24, 24\), the lesions \(24, 24, 24\)"):
        score_map(np.zeros((12, 24, 24)), truth)
    broken = np.zeros((24, 24, 24))
    broken[3, 3, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        score_map(broken, truth)


def test_summary_averages_over_cases_and_findings():
    by_chance = [MapScores(0.1, 0.2, 0.1, 0.5, {}), MapScores(0.1, 0.4, 0.1, 0.5, {})]
    scores = [
        MapScores(1.0, 1.0, 1.0, 0.9, {"Lung nodule": 1.0}),
        MapScores(0.0, 1.0, 0.0, 0.7, {"Lung nodule": 0.0, "Emphysema": 1.0, "Atelectasis": 0.5}),
    ]
    result = summary(scores, by_chance)
    assert result["pointing"]["mean"] == 0.5 and result["above_chance"]["mean"] == pytest.approx(0.7)
    sensitivity = result["sensitivity"]
    assert list(sensitivity) == ["Emphysema", "Atelectasis", "Lung nodule", "all"]  # in the order of the labels
    assert sensitivity["Lung nodule"]["findings"] == 2 and sensitivity["Lung nodule"]["mean"] == 0.5
    assert sensitivity["Emphysema"] == {"findings": 1, "mean": 1.0, "interval": None}
    assert sensitivity["all"]["findings"] == 4 and sensitivity["all"]["mean"] == 2.5 / 4
    (comparison,) = compare_maps({"first": scores, "second": by_chance}, "first")
    assert (comparison["first"], comparison["second"]) == ("first", "second")
    assert comparison["metrics"]["auroc"]["difference"] == pytest.approx(0.3)


# Scores of a model --------------------------------------------------------------------------------------------------


def case(name, scan=None):
    return Case(name=name, patient_id=name, scan_id=scan or name, volume=Path(name), report="", labels=np.zeros(18))


def test_other_reference_depends_only_on_case_names():
    cases = [case(f"c{number}") for number in range(40)]
    pool = [case("r1"), case("r2"), case("r2b", "r2"), case("r3"), cases[0]]
    references = {of.name: pool[1 + number % 4] for number, of in enumerate(cases)} | {"c1": pool[0]}
    chosen = other_references(cases, references)
    assert chosen == other_references(cases[::-1], dict(reversed(references.items())))
    for of in cases:
        assert chosen[of.name].scan_id not in (of.scan_id, references[of.name].scan_id)
    assert len({reference.name for reference in chosen.values()}) >= 4
    with pytest.raises(ValueError, match="c0 has one reference, r1, among 1"):
        other_references(cases, dict.fromkeys(references, pool[0]))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp("maps")
    # Two of these nine are normal.
    write_cohort(root, train=0, valid=9, seed=14, matrix=56, workers=1, progress=False)
    cases = load_phantom(root, "valid")
    pool = normal_pool(cases)
    assert len(pool) == 2
    references = {
        of.name: next(reference for reference in pool[index % 2 :] + pool if reference.name != of.name)
        for index, of in enumerate(cases)
    }
    return root, cases, references


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    processor = DiffVPImageProcessor(size=(32, 32, 32), target_spacing=(9.0, 11.0, 11.0), foreground_hu=-500.0)
    return VolumeCache(tmp_path_factory.mktemp("cache"), processor)


class Oracle(Features):
    """Mock model whose features are its difference map: 1 in the target's true lesions, 0.5 in the voxels around."""

    config = SimpleNamespace(
        feature_grid=(32, 32, 32), image_size=(32, 32, 32), difference_level="latent", compares_voxels=False
    )
    device = torch.device("cpu")

    def __init__(self, root, volumes, mirror=False):
        self.root, self.volumes, self.mirror, self.model = root, volumes, mirror, self

    def load(self, of):
        path = lesion_mask_path(self.root, of.name)
        values = (carried(path, self.volumes.preprocess(of)["geometry"][0]) != 0).astype(np.float32)
        values = (values + ndimage.maximum_filter(values, 3)) / 2
        values = values[:, :, ::-1].copy() if self.mirror else values
        return {"features": torch.from_numpy(values).reshape(-1, 1)}

    def difference_map(self, ct_features, reference_features):
        assert not reference_features.any()  # a normal reference has no lesions
        return ct_features.view(-1, *self.config.image_size)


def test_perfect_map_gets_perfect_scores(cohort, volumes):
    root, cases, references = cohort
    oracle = Oracle(root, volumes)
    result = score_maps(oracle, oracle, volumes, root, cases, references)
    abnormal = [of for of in cases if of.labels.any()]
    assert result["cases"] == len(abnormal) == len(result["per_case"]) and result["without_lesion_in_tensor"] == []
    maps = result["maps"]
    for name in ("latent", "latent, another reference"):
        assert maps[name]["pointing"]["mean"] == maps[name]["pointing_body"]["mean"] == 1
        assert maps[name]["auroc"]["mean"] > 0.9
    assert maps["latent, another patient"]["auroc"]["mean"] < 0.8
    assert maps["chance"]["auroc"]["mean"] == 0.5 and maps["chance"]["above_chance"]["mean"] == 0
    assert 0 < maps["chance"]["pointing"]["mean"] < maps["chance"]["pointing_body"]["mean"] < 0.6
    present = np.any([of.labels for of in abnormal], axis=0)
    labels = {label for label, any_case in zip(DIAGNOSIS_LABELS, present, strict=True) if any_case}
    assert set(maps["latent"]["sensitivity"]) == labels | {"all"}
    names = [comparison["second"] for comparison in result["comparisons"]]
    assert names == [
        "latent, another reference", "latent, another patient", "target alone", "pixel", "pixel, smoothed", "chance"
    ]  # fmt: skip
    # The oracle ignores the reference, so its map equals that of the target alone.
    assert result["correlation"]["mean"] == pytest.approx(1) and maps["target alone"] == maps["latent"]
    assert maps["latent"]["pointing_lesion"]["mean"] == 1
    against_chance = result["comparisons"][-1]["metrics"]["pointing_body"]
    assert against_chance["difference"] > 0.4 and against_chance["p_cases"] <= against_chance["p_cases_holm"]
    mirrored = Oracle(root, volumes, mirror=True)
    wrong = score_maps(mirrored, mirrored, volumes, root, cases, references)["maps"]
    assert wrong["latent"]["auroc"]["mean"] < maps["latent"]["auroc"]["mean"] - 0.1
    assert wrong["pixel"] == maps["pixel"] and wrong["chance"] == maps["chance"]


def test_pixel_map_is_the_difference_of_the_tensors(cohort, volumes):
    """Compute one case by hand: the share of maxima of |target - reference| within 25 mm of a lesion."""
    root, cases, references = cohort
    oracle = Oracle(root, volumes)
    result = score_maps(oracle, oracle, volumes, root, cases, references, tolerance_mm=25.0)
    of = next(of for of in cases if of.labels.any())
    target, reference = (volumes.load(scan)[0].float().numpy() for scan in (of, references[of.name]))
    geometry = volumes.preprocess(of)["geometry"][0]
    lesions = np.argwhere(lesion_voxels(lesion_mask_path(root, of.name), geometry).numpy()) * geometry.tensor_spacing
    difference = np.abs(target - reference)
    peaks = np.argwhere(difference == difference.max()) * geometry.tensor_spacing
    hits = [np.linalg.norm(lesions - peak, axis=1).min() <= 25 for peak in peaks]
    assert result["per_case"][of.name]["pixel"]["pointing"] == pytest.approx(np.mean(hits))


def test_cases_without_a_lesion_are_listed_and_too_few_cases_are_refused(cohort, volumes, tmp_path):
    root, cases, references = cohort
    abnormal = [of for of in cases if of.labels.any()][:3]
    for of in abnormal:
        image = nib.load(lesion_mask_path(root, of.name))
        path = lesion_mask_path(tmp_path, of.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        codes = np.asarray(image.dataobj) * (of is not abnormal[1])
        nib.save(nib.Nifti1Image(codes.astype(np.uint32), image.affine), path)
    oracle = Oracle(root, volumes)
    result = score_maps(oracle, oracle, volumes, tmp_path, abnormal, references)
    assert result["cases"] == 2 and result["without_lesion_in_tensor"] == [abnormal[1].name]
    assert list(result["per_case"]) == [abnormal[0].name, abnormal[2].name]
    with pytest.raises(ValueError, match="1 of 2 case"):
        score_maps(oracle, oracle, volumes, tmp_path, abnormal[:2], references)


def test_model_is_scored_from_cached_features(cohort, volumes, make_model, tmp_path):
    root, cases, references = cohort
    cases = [of for of in cases if of.labels.any()][:3]
    model = make_model()
    features = Features(tmp_path, volumes, model)
    of, reference = cases[0], references[cases[0].name]
    ct, other = (volumes.load(scan)[None].float() for scan in (of, reference))
    expected = model.difference_map(ct, other)[0].numpy()
    np.testing.assert_allclose(difference_map(model, features, of, reference), expected, atol=1e-6)
    result = score_maps(model, features, volumes, root, cases, references)
    assert result["cases"] == 3 and 0 < result["maps"]["latent"]["auroc"]["mean"] < 1
    # A model with difference_level "pixel" needs the volumes.
    pixel = make_model(difference_level="pixel")
    expected = pixel.difference_map(ct, other)[0].numpy()
    found = difference_map(pixel, Features(tmp_path, volumes, pixel), of, reference)
    np.testing.assert_allclose(found, expected, atol=1e-6)


# Token importance ---------------------------------------------------------------------------------------------------


def test_importance_statistics_match_a_hand_computation():
    weights = np.array([[0.0, 0.7, 0.1, 0.2], [0.25, 0.25, 0.25, 0.25]])
    result = importance_statistics(weights, top=2)
    assert result["cases"] == 2 and result["top_mass"]["mean"] == pytest.approx((0.9 + 0.5) / 2)
    np.testing.assert_allclose(result["sorted"], [0.475, 0.225, 0.175, 0.125])
    assert importance_statistics(np.eye(4), top=1)["top_mass"]["mean"] == 1


def test_importance_matches_the_model_and_norms_ignore_the_reference(cohort, volumes, make_model, tmp_path):
    root, cases, references = cohort
    model = make_model()
    features = Features(tmp_path, volumes, model)
    of = cases[0]
    ct, reference = (volumes.load(scan)[None].float() for scan in (of, references[of.name]))
    weights, norms = token_weights(model, features, of, references[of.name])
    np.testing.assert_allclose(weights, model(ct, reference).difference_weights[0].detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(norms, token_weights(model, features, of, cases[-1])[1])
    assert weights.shape == norms.shape == (4,) and norms.sum() == pytest.approx(1)
    result = score_importance(model, features, cases, references, top=3)
    normal = sum(not of.labels.any() for of in cases)
    counts = {name: of_group["difference"]["cases"] for name, of_group in result["targets"].items()}
    assert counts == {"abnormal": len(cases) - normal, "normal": normal}
    assert (result["top"], result["tokens"], result["uniform_top_mass"]) == (3, 4, 0.75)
    draw_importance(tmp_path / "fig4a.png", result)
    assert Image.open(tmp_path / "fig4a.png").size[0] > 500
    with pytest.raises(ValueError, match='difference_level is "target"'):
        token_weights(make_model(difference_level="target"), features, of, of)
    with pytest.raises(ValueError, match="of no case"):
        score_importance(model, features, [], references)


# Figures ------------------------------------------------------------------------------------------------------------


def test_figure_shows_patient_left_on_the_right_and_the_back_below(tmp_path):
    target = np.full((6, 40, 60), -1.0)
    target[:, 5:35, 5:55] = 0.0
    lesion = np.zeros(target.shape, bool)
    lesion[2, 27:31, 45:49] = True  # behind, to the left
    example = MapExample(
        title="case",
        shown="Lung nodule",
        index=2,
        target=target,
        reference=target,
        difference=lesion.astype(float),
        lesions=lesion,
        lesion=lesion,
        spacing=(4.0, 3.0, 3.0),
        hu_window=(-1000.0, 200.0),
    )
    draw_maps(tmp_path / "fig5a.png", [example])
    image = np.asarray(Image.open(tmp_path / "fig5a.png").convert("RGB")).astype(int)
    height, width, _ = image.shape
    rows, columns = np.nonzero((image[..., 1] > 200) & (image[..., 0] < 80) & (image[..., 2] < 80))
    # Green pixels lie in the fourth of five panels, on its right side and in its lower half.
    assert len(rows) > 20 and 0.7 * width < columns.mean() < 0.8 * width
    grey = np.flatnonzero((np.abs(image[..., 0] - 127) < 8).sum(axis=1) > 0.2 * width)  # the rows of the bodies
    assert rows.mean() > (grey.min() + grey.max()) / 2
    # The map is drawn at the same place, one panel to the left.
    warm = (image[..., 0] > image[..., 2] + 40) & (image[..., 0] > 100)
    rows, columns = np.nonzero(warm & (np.arange(width) < 0.6 * width))
    assert len(rows) > 20 and 0.5 * width < columns.mean() < 0.6 * width
    assert rows.mean() > (grey.min() + grey.max()) / 2


def test_figure_plane_cuts_most_of_the_smallest_finding(cohort, volumes):
    root, cases, references = cohort
    oracle = Oracle(root, volumes)
    for of in (of for of in cases if of.labels.any()):
        example = map_example(oracle, oracle, volumes, root, of, references[of.name])
        codes = lesion_voxels(lesion_mask_path(root, of.name), volumes.preprocess(of)["geometry"][0]).numpy()
        sizes = {label: ((codes >> bit) & 1).sum() for bit, label in enumerate(DIAGNOSIS_LABELS)}
        sizes = {label: size for label, size in sizes.items() if size}
        assert example.shown == min(sizes, key=sizes.get) and all(label in example.title for label in sizes)
        planes = [int(plane.sum()) for plane in example.lesion]
        assert planes[example.index] == max(planes) > 0 and sum(planes) == min(sizes.values())
    with pytest.raises(ValueError, match="no lesion in the tensor"):
        map_example(oracle, oracle, volumes, root, references[of.name], of)
