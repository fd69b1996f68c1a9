# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The map of one scan with a lesion mask: read, drawn and scored on scans with a planted lesion."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch

from diffvp.data.cases import DatasetError
from diffvp.encoders_diffvp import DiffVPEncoderError
from diffvp.experiments import real_map
from diffvp.experiments.real_map import Seen, inflated_model, make, read_lesion, score, share_of_places
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.reading_diffvp import read_ct
from diffvp.training.encoder import convert_encoder

from .encoder_samples import INFLATED, I3ResNet, medicalnet, with_statistics

AFFINE = np.array([[0, 0, 3.0, -40], [-2.0, 0, 0, 90], [0, -2.5, 0, 60], [0, 0, 0, 1]])


@pytest.fixture
def scans(tmp_path):
    """Write a body with a bright ball, the mask of the ball, and a body without it."""
    index = np.stack(np.meshgrid(*map(np.arange, (70, 60, 50)), indexing="ij"), -1)
    body = (((index - [35, 30, 25]) / [25, 22, 21]) ** 2).sum(-1) < 1
    lesion = (((index - [45, 38, 18]) * [2.0, 2.5, 3.0]) ** 2).sum(-1) < 9**2
    noise = np.random.default_rng(0).normal(0, 8, body.shape)
    for name, hu in (("scan", np.where(lesion, 150, 30)), ("normal", np.full(body.shape, 30))):
        values = np.where(body, hu + noise, -1000).astype(np.int16)
        nib.save(nib.Nifti1Image(values, AFFINE), tmp_path / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(lesion.astype(np.uint8), AFFINE), tmp_path / "mask.nii.gz")
    return {name: tmp_path / f"{name}.nii.gz" for name in ("scan", "mask", "normal")}


def test_mask_is_read_only_on_the_grid_of_its_scan(scans, tmp_path):
    scan = read_ct(scans["scan"])
    lesion = read_lesion(scans["mask"], scan)
    hu = scan.array * scan.slope + scan.intercept
    assert hu[lesion].min() > 90 and hu[~lesion].max() < 90
    mask = nib.load(scans["mask"])
    moved = AFFINE.copy()
    moved[0, 3] += 3
    for name, image, message in (
        ("moved", nib.Nifti1Image(np.asarray(mask.dataobj), moved), "moved.nii: grid: "),
        ("cut", nib.Nifti1Image(np.asarray(mask.dataobj)[:-1], AFFINE), "cut.nii: grid: "),
        ("empty", nib.Nifti1Image(np.zeros(mask.shape, np.uint8), AFFINE), "empty.nii: voxels: none is above 0"),
    ):
        nib.save(image, tmp_path / f"{name}.nii")
        with pytest.raises(DatasetError, match=message):
            read_lesion(tmp_path / f"{name}.nii", scan)
    (tmp_path / "text.nii").write_text("no mask")
    with pytest.raises(DatasetError, match="text.nii: file: unreadable"):
        read_lesion(tmp_path / "text.nii", scan)


def seen_of(values, lesion):
    return Seen(
        np.zeros(lesion.shape), np.zeros(lesion.shape), lesion, {"difference": values}, (3.0, 2.0, 2.0), (-1000, 200)
    )


def test_hand_made_maps_get_the_expected_scores():
    lesion = np.zeros((20, 30, 30), bool)
    lesion[8:11, 10:14, 12:16] = True
    perfect = score(lesion.astype(float), seen_of(None, lesion))
    assert (perfect["inside"], perfect["near"], perfect["auroc"], perfect["dice"]) == (1, 1, 1, 1)
    assert perfect["rank"] == 1 and perfect["distance_mm"] == 0 and perfect["by_chance"] < 0.001
    # A larger maximum three planes above the lesion, 9 mm from its edge.
    beside = lesion.astype(float)
    beside[13, 12, 13] = 2
    near = score(beside, seen_of(None, lesion))
    assert (near["inside"], near["near"], near["rank"], near["distance_mm"]) == (0, 1, 2, 9)
    assert near["dice"] == pytest.approx(1 - 1 / lesion.sum())
    flat = score(np.zeros(lesion.shape), seen_of(None, lesion))
    assert flat["auroc"] == 0.5 and flat["by_chance"] == 1


def test_share_of_places_equals_a_count_over_all_places():
    rng = np.random.default_rng(0)
    values, body = rng.random((9, 10, 11)), np.ones((9, 10, 11), bool)
    body[:2] = False
    lesion = np.zeros(values.shape, bool)
    lesion[4, 3:5, 6:9] = lesion[5, 3, 6] = True
    box = lesion[4:6, 3:5, 6:9]
    ranks = np.where(body, 0.0, np.nan)
    ranks[body] = values[body].argsort().argsort() + 1
    own, scores = ranks[lesion].mean(), []
    for start in np.ndindex(8, 9, 9):
        held = ranks[tuple(slice(at, at + size) for at, size in zip(start, box.shape, strict=True))][box]
        if not np.isnan(held).any():
            scores.append(held.mean())
    assert share_of_places(values, lesion, body) == pytest.approx(np.mean(np.array(scores) >= own - 1e-9))


@pytest.mark.slow
def test_page_shows_both_encoders(scans, make_model, tokenizer, tmp_path, monkeypatch):
    model = make_model(difference_level="aligned")
    processor = DiffVPProcessor(DiffVPImageProcessor(size=(32, 32, 32), foreground_hu=-500.0), tokenizer)
    monkeypatch.setattr(real_map, "load_checkpoint", lambda name: (model, processor))
    monkeypatch.setattr(real_map, "INFLATED_SIZE", (32, 64, 64))
    torch.manual_seed(0)
    network = with_statistics(I3ResNet(INFLATED["encoder_layers"], INFLATED["encoder_block_channels"]))
    torch.save({"state_dict": network.state_dict()}, tmp_path / "astra.pt")
    convert_encoder(tmp_path / "astra.pt", tmp_path / "astra.safetensors")
    page = make(
        scans["scan"],
        scans["mask"],
        scans["normal"],
        tmp_path / "out",
        "tiny-checkpoint",
        tmp_path / "astra.safetensors",
    )
    result = json.loads((tmp_path / "out/real_map.json").read_text())
    assert list(result["scores"]) == ["tiny-checkpoint", "astra.pt"]
    kinds = ["difference", "target alone", "target alone, whitened", "pixels subtracted, smoothed"]
    assert all(list(maps) == kinds for maps in result["scores"].values())
    # The ball is the difference between the two scans.
    assert all(maps[kinds[3]]["near"] == 1 and maps[kinds[3]]["auroc"] > 0.9 for maps in result["scores"].values())
    assert "n = 1" in page.read_text() and (tmp_path / "out/real_map.png").stat().st_size > 10_000
    assert str(tmp_path) not in page.read_text() + json.dumps(result)
    torch.save(medicalnet().state_dict(), tmp_path / "resnet_18.pth")
    convert_encoder(tmp_path / "resnet_18.pth", tmp_path / "resnet.safetensors")
    with pytest.raises(DiffVPEncoderError, match="resnet.safetensors: encoder_type: resnet .expected i3resnet"):
        inflated_model(tmp_path / "resnet.safetensors")


def test_tumour_of_a_real_scan_is_read_at_its_place(check_data):
    """Find the tumour: 13 mm of soft tissue in the right lung."""
    folder = check_data / "ct" / "pyradiomics"
    scan = read_ct(folder / "lung1_image.nrrd")
    lesion = read_lesion(folder / "lung1_label.nrrd", scan)
    hu = scan.array[lesion] * scan.slope + scan.intercept
    assert lesion.sum() == 837 and -100 < hu.mean() < 0
    assert np.argwhere(lesion).mean(axis=0)[0] < scan.array.shape[0] / 2  # x runs to the patient's left
