# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Encoder with fine tokens, locations and sizes of the voxel head, aligned difference, and training on crops."""

import json
import math
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.data.cache import VolumeCache
from diffvp.data.lesions import (
    CELL,
    largest_lesions,
    lesion_cells,
    lesion_mask_path,
    lobe_cells,
    lobe_mask_path,
    read_patients,
    true_sizes,
)
from diffvp.data.phantom import LOBES, Finding
from diffvp.data.phantom_cases import load_phantom
from diffvp.encoders_diffvp import DiffVPConv3d, DiffVPDiagnosisClassifier, DiffVPVisionEncoder, noisy_or
from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.modeling_diffvp import DiffVPForDiagnosis
from diffvp.modules_diffvp import (
    SIDES,
    DiffVPAlignedDifference,
    diagnosis_prompt_ids,
    named_places,
    read_attributes,
)
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.report_diffvp import describe_findings
from diffvp.train_accelerate import run
from diffvp.training.config import CropSection, SettingsError, TrainingConfig
from diffvp.training.diagnosis_stage import Crops, DiagnosisObjective, Truth, calibrate
from diffvp.training.loop import Interrupted, Log

FINE = {
    "image_size": [32, 48, 32],
    "encoder_block_channels": [4, 8, 8, 8],
    "encoder_stride": 2,
    "encoder_max_pool": False,
    "encoder_shortcut_type": "B",
    "encoder_windows": [[-1000, -200], [-160, 240], [150, 1200]],
    "hu_range": [-1000, 1200],
    "encoder_coordinates": True,
    "encoder_pyramid_channels": 6,
    "share_encoder": True,
    "finding_regions": list(LOBES),
    "finding_attributes": {
        "Lung nodule": {"place": "region", "size": True},
        "Lung opacity": {"place": "regions", "margin": 1.0},
        "Emphysema": {"place": "side", "margin": 0.5},
        "Hiatal hernia": {"size": True},
    },
}
NODULE, OPACITY, EMPHYSEMA, HERNIA = map(DIAGNOSIS_LABELS.index, FINE["finding_attributes"])


def config(**changes):
    sizes = {"num_latents": 4, "latent_size": 24, "resampler_heads": 2, "global_delta_heads": 3}
    return DiffVPConfig(**{**FINE, **sizes, **changes})


# Configuration -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hu_range": None}, "hu_range"),
        ({"hu_range": [5, -5]}, "hu_range"),
        ({"encoder_windows": []}, "encoder_windows"),
        ({"encoder_windows": [[0, 0]]}, "encoder_windows"),
        ({"encoder_pyramid_channels": 0}, "encoder_pyramid_channels"),
        ({"image_size": [32, 40, 32]}, "multiples of 16"),
        ({"encoder_stride": 1}, "encoder_stride"),
        ({"encoder_max_pool": True}, "encoder_max_pool"),
        ({"finding_attributes": {"Broken heart": {}}}, "Broken heart"),
        ({"finding_attributes": {"Lung nodule": {"place": "left"}}}, "Lung nodule"),
        ({"finding_attributes": {"Lung nodule": {"colour": 1}}}, "Lung nodule"),
        ({"finding_regions": None}, "finding_regions"),
        ({"share_encoder": False}, "share_encoder"),
        ({"difference_radius": 0}, "difference_radius"),
        ({"difference_temperature": 0.0}, "difference_temperature"),
    ],
)
def test_contradictory_fields_are_named(changes, message):
    with pytest.raises(Exception, match=message):
        config(**changes)


def test_default_encoder_is_the_one_of_the_paper():
    default = DiffVPConfig()
    assert default.encoder_windows is None and default.encoder_pyramid_channels is None
    assert default.difference_level == "latent" and default.finding_attributes is None
    assert default.feature_grid == default.resampler_grid
    names = set(DiffVPVisionEncoder(DiffVPConfig(encoder_block_channels=[4, 4, 4, 4])).state_dict())
    assert all(name.startswith("resnet.") for name in names), "MedicalNet's weights match by name"


def test_config_survives_saving_and_loading(tmp_path):
    config(difference_level="aligned").save_pretrained(tmp_path)
    again = DiffVPConfig.from_pretrained(tmp_path)
    assert again.finding_attributes == FINE["finding_attributes"]
    assert again.feature_grid == (8, 12, 8) and again.resampler_grid == (4, 6, 4)
    assert again.encoder_hidden_size == 6


# Encoder -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pyramid", [None, 6])
@pytest.mark.parametrize("coordinates", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_are_the_windowed_voxels_and_the_coordinates(pyramid, coordinates, dtype):
    """Compare with each channel computed in NumPy, from the definition."""
    fields = {"encoder_pyramid_channels": pyramid, "encoder_coordinates": coordinates}
    encoder = DiffVPVisionEncoder(config(**fields, finding_regions=None, finding_attributes=None)).to(dtype)
    torch.manual_seed(0)
    ct = torch.rand(2, 1, *FINE["image_size"]) * 2 - 1
    hu = -1000 + (ct[:, 0].numpy().astype(float) + 1) * 1100
    step = 1 if pyramid is None else 2
    expected = []
    for low, high in FINE["encoder_windows"]:
        windowed = ((hu - low) / (high - low)).clip(0, 1) * 2 - 1
        for z, y, x in np.ndindex(step, step, step):
            expected.append(windowed[:, z::step, y::step, x::step])
    if coordinates:
        for axis, size in enumerate(FINE["image_size"]):
            centres = (np.arange(size // step) + 0.5) * step / size * 2 - 1
            shape = [1, 1, 1, 1]
            shape[1 + axis] = -1
            expected.append(np.broadcast_to(centres.reshape(shape), expected[0].shape))
    found = encoder.channels(ct)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last_3d)
    assert found.shape[1] == len(expected)
    error = np.abs(found.float().numpy() - np.stack(expected, axis=1)).max()
    assert error < (1e-5 if dtype == torch.float32 else 2**-8)


def test_crop_gives_the_channels_of_its_position_in_the_scan():
    encoder, ct = DiffVPVisionEncoder(config()), torch.rand(2, 1, 32, 48, 32) * 2 - 1
    whole = encoder.channels(ct)
    start = torch.tensor([[0, 16, 8], [16, 0, 0]])
    crops = torch.stack([ct[0, :, 0:16, 16:48, 8:24], ct[1, :, 16:32, 0:32, 0:16]])
    seen = encoder.channels(crops, start)
    torch.testing.assert_close(seen[0], whole[0, :, 0:8, 8:24, 4:12])
    torch.testing.assert_close(seen[1], whole[1, :, 8:16, 0:16, 0:8])
    depth, height, width = whole[0, -3:]
    assert (depth.diff(dim=0) > 0).all() and (height.diff(dim=1) > 0).all() and (width.diff(dim=2) > 0).all()
    assert whole[0, -3:].abs().max() < 1 and torch.allclose(whole[0, -3:].mean(), torch.tensor(0.0), atol=1e-6)
    assert encoder.eval()(crops, start).shape == (2, 4 * 8 * 4, 6)
    with pytest.raises(ValueError, match="32, 48, 32"):
        encoder(crops)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_convolution_of_one_volume_equals_that_in_a_batch(layout):
    # batch * channels * depth * height ≤ 20,480: torch computes one such volume by another algorithm, slowly
    pair = torch.rand(2, 48, 8, 10, 12).contiguous(memory_format=layout)
    convolution = DiffVPConv3d(48, 48, 3, padding=1)
    with torch.profiler.profile() as profile:
        alone = [convolution(volume[None]) for volume in pair]
    assert torch.equal(torch.cat(alone), convolution(pair))
    assert "aten::slow_conv3d_forward" not in {event.name for event in profile.events()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_convolution_has_the_values_and_gradients_of_torch(dtype):
    ours = DiffVPConv3d(3, 5, 3, stride=2, padding=1).to(dtype)
    theirs = nn.Conv3d(3, 5, 3, stride=2, padding=1).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    grown = []
    for convolution in (ours, theirs):
        volume = torch.rand(1, 3, 6, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        out = convolution(volume)
        out.square().sum().backward()
        grown.append([out, volume.grad, *[parameter.grad for parameter in convolution.parameters()]])
    for mine, expected in zip(*grown, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, expected)


def test_convolution_follows_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert DiffVPConv3d(3, 5, 3)(torch.rand(1, 3, 6, 7, 8)).dtype == torch.bfloat16


def test_model_with_fine_tokens_runs_in_all_parts(make_model):
    fields = {key: value for key, value in FINE.items() if key != "finding_attributes"}
    model = make_model(**fields, difference_level="aligned", diagnosis_prompt_ids=fragments())
    ct, reference = (torch.rand(2, 1, 32, 48, 32) * 2 - 1 for _ in range(2))
    output = model(ct=ct, reference=reference)
    assert output.latents.shape == (2, 4, 24) and output.difference_weights.shape == (2, 4)
    assert model.difference_map(ct, reference).shape == (2, 32, 48, 32)
    encoded = model.encode_inputs(ct, reference)
    assert encoded["ct_features"].shape == (2, 8 * 12 * 8, 6)
    torch.testing.assert_close(model(**encoded).logits, output.logits)
    several = model.encode_inputs(ct, torch.cat([reference, ct], dim=1))
    assert several["reference_features"].shape == (2, 2, 8 * 12 * 8, 6)
    assert (model.difference_map(**several_features(several)) <= model.difference_map(ct, reference) + 1e-3).any()


def several_features(encoded):
    return {key: value for key, value in encoded.items() if key.endswith("features")}


# Aligned difference --------------------------------------------------------------------------------------------------


def aligned_by_loops(target, references, grid, mean, whitening, radius, temperature):
    """Compute the definition token by token: (N, C) and R times (N, C) → whitened target and aligned references."""
    target, references = (target - mean) @ whitening.T, [(one - mean) @ whitening.T for one in references]
    places = list(np.ndindex(*grid))
    against = np.zeros_like(target)
    for index, place in enumerate(places):
        near = [
            one[other]
            for one in references
            for other, there in enumerate(places)
            if max(abs(a - b) for a, b in zip(place, there, strict=True)) <= radius
        ]
        near = np.stack(near)
        scores = -((target[index] - near) ** 2).sum(1) / temperature
        weights = np.exp(scores - scores.max())
        against[index] = (weights[:, None] * near).sum(0) / weights.sum()
    return target, against


@pytest.mark.parametrize("references", [1, 3])
def test_residual_equals_its_definition(references):
    torch.manual_seed(0)
    settings = config(image_size=[16, 16, 32], difference_radius=1, difference_temperature=3.0)
    module = DiffVPAlignedDifference(settings)
    module.fit(torch.randn(500, 6) @ torch.randn(6, 6) + 2)
    target, others = torch.randn(2, 128, 6), torch.randn(2, references, 128, 6)
    white, aligned = module.align(target, others if references > 1 else others[:, 0])
    for scan in range(2):
        given = (one.double().numpy() for one in (module.mean, module.whitening))
        expected = aligned_by_loops(target[scan].numpy(), others[scan].numpy(), (4, 4, 8), *given, 1, 3.0)
        for found, wanted in zip((white, aligned), expected, strict=True):
            np.testing.assert_allclose(found[scan].flatten(1).T.numpy(), wanted, atol=1e-3)
    *pair, norm = module(target, others)
    residual = (white - aligned).flatten(2).square().sum(1).sqrt()
    if references > 1:
        torch.testing.assert_close(norm, residual)
    # The locations include the largest residual.
    step = module.projection.weight @ (white - aligned).flatten(2)[0, :, residual[0].argmax()]
    torch.testing.assert_close((pair[0] - pair[1])[0, 0], step, atol=1e-4, rtol=1e-4)


def test_whitened_tokens_of_the_pool_are_uncorrelated():
    torch.manual_seed(0)
    module, tokens = DiffVPAlignedDifference(config()), torch.randn(5000, 6) @ torch.randn(6, 6) + 3
    module.fit(tokens, shrinkage=1e-9)
    white = (tokens - module.mean) @ module.whitening.T
    torch.testing.assert_close(torch.cov(white.T), torch.eye(6), atol=0.02, rtol=0)
    assert {"mean", "whitening"} <= set(module.state_dict()), "a checkpoint stores them"


def test_residual_shows_a_lesion_but_not_a_shift():
    torch.manual_seed(0)
    module = DiffVPAlignedDifference(config(difference_temperature=0.1))
    reference = torch.randn(1, 6, 8, 12, 8)
    target = torch.roll(reference, 1, dims=4).clone()
    target[0, :, 4, 6, 4] += 20
    as_tokens = [one.flatten(2).transpose(1, 2) for one in (target, reference)]
    norm = module(*as_tokens)[2][0].view(8, 12, 8)
    assert norm.argmax() == (4 * 12 + 6) * 8 + 4
    inside = norm[:, :, 1:].clone()
    inside[4, 6, 3] = 0
    assert inside.max() < 0.1, "every token has an equal one a step away"


# Locations and sizes -------------------------------------------------------------------------------------------------


def fragments():
    return {
        "prefix": [5],
        "labels": [[10 + label] for label in range(18)],
        "separator": [7],
        "none": [8],
        "suffix": [9],
    }


def planted_classifier(tokens):
    """Classifier whose features are the logits of nodule, opacity and emphysema, then region and size."""
    classifier = DiffVPDiagnosisClassifier(config())
    with torch.no_grad():
        for layer in (classifier.head, classifier.region_head, classifier.size_head):
            layer.weight.zero_()
            layer.bias.zero_()
        classifier.head.bias.fill_(-8.0)
        for feature, label in enumerate((NODULE, OPACITY, EMPHYSEMA)):
            classifier.head.weight[label, feature] = 1.0
        classifier.region_head.weight[1:, 3] = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
        classifier.size_head.weight[NODULE, 4] = 1.0
    features = torch.zeros(1, 8, 12, 8, 6)
    for place, values in tokens.items():
        features[(0, *place)] = torch.tensor(values)
    return classifier, features.flatten(1, 3)


def test_largest_of_several_nodules_is_described():
    small, large = [14.0, 0, 0, 0, math.log(0.5), 0], [12.0, 0, 0, 0, math.log(1.5), 0]
    classifier, features = planted_classifier({(2, 3, 1): small, (5, 8, 6): large})
    found = classifier.locate(features)
    [known] = read_attributes(config(), found)
    assert known[NODULE]["size_mm"] == 30
    assert known[NODULE]["voxel"] == [5 * CELL + 1.5, 8 * CELL + 1.5, 6 * CELL + 1.5]
    assert known[HERNIA]["places"] == [] and known[OPACITY]["size_mm"] is None


def test_named_places_have_evidence_near_the_strongest():
    settings = config()
    found = {
        "region": torch.zeros(1, 18, dtype=torch.long) + 3,
        "region_evidence": torch.full((1, 18, 5), -3.0),
        "side_evidence": torch.zeros(1, 18, 2),
    }
    found["region_evidence"][0, OPACITY] = torch.tensor([2.0, -1.0, 1.1, 0.9, -3.0])
    assert named_places(settings, found, 0, NODULE) == [LOBES[3]]
    assert named_places(settings, found, 0, OPACITY) == [LOBES[0], LOBES[2]]
    assert named_places(settings, found, 0, EMPHYSEMA) == ["right", "left"]
    found["side_evidence"][0, EMPHYSEMA] = torch.tensor([-1.0, 0.0])
    assert named_places(settings, found, 0, EMPHYSEMA) == ["left"]
    assert named_places(settings, found, 0, HERNIA) == []


def test_opacity_across_a_fissure_belongs_to_the_lobe_of_its_peak():
    upper, lower = -10.0, 10.0  # values the region head assigns to the right upper and the left lower lobe
    faint = {(1, row, column): [0, 8.4, 0, upper, 0, 0] for row in range(3, 8) for column in (1, 2, 3)}  # p = 0.6
    classifier, features = planted_classifier({**faint, (6, 9, 6): [0, 16.0, 0, lower, 0, 0]})
    evidence = classifier.locate(features)["region_evidence"][0, OPACITY].exp()
    assert evidence.argmax() == 4, "the peak outweighs fifteen tokens of 0.6"
    assert 0.1 < evidence[0] < 0.65


def test_sides_are_those_of_the_patient():
    classifier, features = planted_classifier({(3, 3, 1): [0, 0, 14.0, 0, 0, 0]})  # width increases to the left
    assert named_places(config(), classifier.locate(features), 0, EMPHYSEMA) == ["right"]


def test_peak_is_in_file_coordinates(tmp_path):
    """A finding's peak is within half a token of a bright voxel, in a file of unusual orientation."""
    hu = np.full((40, 70, 60), -1000, np.int16)
    hu[8:32, 10:60, 10:50] = 40
    hu[20, 41, 33] = 1000
    affine = np.array([[0, 0, -2.0, 31], [1.5, 0, 0, -7], [0, -2.5, 0, 12], [0, 0, 0, 1]], float)
    nib.save(nib.Nifti1Image(hu, affine), tmp_path / "ct.nii.gz")
    window = {"hu_window": (-1000, 1200), "foreground_hu": -500.0}
    features = DiffVPImageProcessor(size=FINE["image_size"], **window)(tmp_path / "ct.nii.gz")
    [geometry] = features["geometry"]
    token = np.unravel_index(features["ct"][0, 0].numpy().argmax(), FINE["image_size"])
    place = tuple(index // CELL for index in token)
    classifier, planted = planted_classifier({place: [14.0, 0, 0, 0, 0, 0]})
    attributes = read_attributes(config(), classifier.locate(planted))
    [findings] = describe_findings(config(), noisy_or(classifier.head(planted)), attributes, [geometry])
    found = np.array(findings[NODULE]["peak"])
    half_token = np.abs(geometry.tensor_affine[:3, :3]) @ np.full(3, CELL / 2)
    assert (np.abs(found - nib.affines.apply_affine(affine, (20, 41, 33))) <= half_token + 2).all()
    assert findings[NODULE]["size_mm"] == 20 and findings[NODULE]["location"] in LOBES
    assert findings[HERNIA]["location"] is None
    assert set(describe_findings(config(), torch.zeros(1, 18))[0][0]) == {
        "label", "probability", "threshold", "positive"
    }  # fmt: skip


def test_prompt_names_attributes_after_their_finding(tokenizer):
    parts = DiffVPProcessor.diagnosis_prompt_ids(tokenizer, places=[*LOBES, *SIDES])
    known = [{"places": [], "size_mm": None} for _ in DIAGNOSIS_LABELS]
    known[NODULE] = {"places": ["right upper lobe"], "size_mm": 12}
    known[OPACITY] = {"places": ["right lower lobe", "left lower lobe"], "size_mm": None}
    known[HERNIA] = {"places": [], "size_mm": 105}
    positive = [label in (NODULE, OPACITY, HERNIA, 0) for label in range(18)]
    text = tokenizer.decode(diagnosis_prompt_ids(parts, positive, known))
    named = [DIAGNOSIS_LABELS[label] for label in (0, NODULE, OPACITY, HERNIA)]
    brackets = ("", "right upper lobe, 12 mm", "right lower lobe and left lower lobe", "105 mm")
    assert text == DiffVPProcessor.diagnosis_prompt(named, dict(zip(named, brackets, strict=True)))
    assert "lung nodule (right upper lobe, 12 mm)" in text
    without = diagnosis_prompt_ids(parts, positive)
    assert tokenizer.decode(without) == DiffVPProcessor.diagnosis_prompt(named)


# Training on crops ---------------------------------------------------------------------------------------------------


def test_lesions_and_lobes_are_on_the_tensor_grid(small_cohort, tmp_path):
    processor = DiffVPImageProcessor(size=(32, 32, 32), target_spacing=(12.0, 14.0, 14.0), foreground_hu=-500.0)
    volumes = VolumeCache(tmp_path, processor)
    for case in load_phantom(small_cohort, "train")[:4]:
        geometry = volumes.preprocess(case)["geometry"][0]
        path = lesion_mask_path(small_cohort, case.name)
        cells, largest = lesion_cells(path, geometry), largest_lesions(path, geometry)
        assert ((cells & largest) == largest).all()
        codes = np.asarray(nib.load(path).dataobj)
        for label in np.flatnonzero(case.labels):
            parts = ndimage.label((codes >> np.uint32(label)) & 1)[1]
            has_it = ((cells >> label) & 1).any()
            assert bool(((largest >> label) & 1).any()) == bool(has_it)
            if parts == 1:
                assert torch.equal((cells >> label) & 1, (largest >> label) & 1)
        lobes = lobe_cells(lobe_mask_path(small_cohort, case.name), geometry).float()
        width = torch.arange(8.0).expand(8, 8, 8)
        right, left = (width[(lobes >= low) & (lobes <= high)].mean() for low, high in ((1, 3), (4, 5)))
        assert right < left, "the right lung has the lower indices"
        depth = torch.arange(8.0)[:, None, None].expand(8, 8, 8)
        assert depth[(lobes == 1) | (lobes == 4)].mean() > depth[(lobes == 3) | (lobes == 5)].mean()


def test_true_sizes_equal_those_in_the_reports():
    sizes = true_sizes([Finding("Lung nodule", {"count": 1, "lobe": LOBES[0], "size_mm": 9})])
    assert sizes[NODULE] == 9 and sizes.isnan().sum() == 17


@pytest.fixture
def crops(small_cohort, tmp_path):
    """`make(seed)`: crops of four small phantoms."""
    processor = DiffVPImageProcessor(
        size=(32, 48, 32), target_spacing=(12.0, 9.0, 14.0), hu_window=(-1000.0, 1200.0), foreground_hu=-500.0
    )
    volumes, cases = VolumeCache(tmp_path, processor), load_phantom(small_cohort, "train")[:4]
    section = CropSection(per_epoch=8, validation=4, size=(16, 16, 16), near_lesions=1.0)
    truth = Truth(small_cohort, tmp_path, volumes)
    return lambda seed: Crops(cases, volumes, truth, section, seed, "cpu")


def test_crops_depend_only_on_seed_epoch_and_index(crops):
    one, again, validation = crops(1), crops(1), crops(None)
    plans = [one.plan(epoch, index) for epoch in (0, 1) for index in range(20)]
    for (epoch, index), plan in zip([(e, i) for e in (0, 1) for i in range(20)], plans, strict=True):
        assert str(again.plan(epoch, index)) == str(plan)
        assert str(validation.plan(0, index)) == str(validation.plan(1, index))
    assert len({str(plan) for plan in plans}) > 30
    near = [one.cut(case, start)["cells"].any() for case, start, _ in plans]
    assert np.mean(near) > 0.7, "most crops are near a lesion"
    cut = one.cut(*plans[0][:2])
    assert cut["ct"].shape == (1, 16, 16, 16) and cut["cells"].shape == cut["lobes"].shape == (4, 4, 4)
    case, start, _ = plans[0]
    assert torch.equal(cut["ct"][0, 0, 0, 0], one.volumes[case][tuple(start)].float())


def test_crops_without_masks_have_the_labels_of_their_volume(small_cohort, tmp_path):
    processor = DiffVPImageProcessor(size=(32, 48, 32), target_spacing=(12.0, 9.0, 14.0), foreground_hu=-500.0)
    cases = load_phantom(small_cohort, "train")[:4]
    section = CropSection(per_epoch=8, validation=4, size=(16, 16, 16))
    crops = Crops(cases, VolumeCache(tmp_path, processor), None, section, 1, "cpu")
    plans = [crops.plan(0, index) for index in range(40)]
    assert {case for case, _, _ in plans} == {0, 1, 2, 3}
    for case, start, _ in plans:
        cut = crops.cut(case, start)
        assert sorted(cut) == ["ct", "labels"] and cut["ct"].shape == (1, 16, 16, 16)
        assert cut["labels"].tolist() == cases[case].labels.tolist()


def test_crop_without_evidence_is_as_likely_positive_as_the_prevalence():
    model = DiffVPForDiagnosis(config())
    prevalence = torch.linspace(0.05, 0.6, 18)
    objective = DiagnosisObjective(model, prevalence=prevalence)
    torch.nn.init.zeros_(model.classifier.head.weight)
    ct, start, labels = torch.randn(2, 1, 32, 32, 32), torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 18)
    labels[1] = 1
    for per_token in (1e-6, 0.01):
        torch.nn.init.constant_(model.classifier.head.bias, math.log(per_token / (1 - per_token)))
        absent = (1 - prevalence) * (1 - per_token) ** (8 * 8 * 8)
        expected = torch.nn.functional.binary_cross_entropy((1 - absent).expand(2, -1), labels)
        loss = objective(ct, labels=labels, start=start)["loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    # Tokens that are as frequent in positive as in negative volumes are not learned.
    torch.nn.init.constant_(model.classifier.head.bias, -12.0)
    bias, gradients = model.classifier.head.bias, []
    for rates in (prevalence, torch.zeros(18)):
        bias.grad = None
        objective(ct, labels=rates.expand(2, -1), start=start)["loss"].backward()
        gradients.append(bias.grad.abs())
    assert (gradients[0] < 0.1 * gradients[1]).all()


def test_calibration_makes_noisy_or_match_the_prevalence():
    torch.manual_seed(0)
    model = DiffVPForDiagnosis(config())
    labels = (torch.rand(60, 18) < 0.4).float()

    class Planted:
        """Cases with slightly overconfident tokens: uncalibrated, Noisy-OR reports every finding for every case."""

        def __len__(self):
            return 60

        def sample(self, index, epoch):
            return {"ct": torch.full((1, 32, 48, 32), float(index))}

    class Features(torch.nn.Module):
        def forward(self, ct):
            case = int(ct.flatten()[0])
            return torch.randn(1, 768, 6, generator=torch.Generator().manual_seed(case)) * 0.1 + 0.1 * labels[case, :6]

    model.classifier.vision_encoder = Features()
    with torch.no_grad():
        model.classifier.head.weight.copy_(torch.eye(18, 6) * 3)
        model.classifier.head.bias.fill_(-3.0)

    def likelihood():
        with torch.no_grad():
            features = [model.classifier.vision_encoder(Planted().sample(case, 0)["ct"]) for case in range(60)]
            logits = torch.cat([model.classifier.classify(one)[0] for one in features])
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, labels), logits.sigmoid().mean()

    before, sure = likelihood()
    assert sure > 0.99
    calibrate(model, Planted(), labels)
    after, rate = likelihood()
    assert after < 0.7 < before and abs(rate - labels.mean()) < 0.05


@pytest.fixture
def crop_settings(settings):
    """Overrides for a first stage on crops that takes seconds."""
    model = {**FINE, "image_size": [32, 32, 32]}
    model["finding_attributes"] = {"Lung opacity": {"place": "regions"}, "Pleural effusion": {"size": True}}
    section = {"per_epoch": 16, "validation": 8, "size": [16, 16, 16], "near_lesions": 0.5}
    values = {
        "model": model,
        "image_processor": {
            "size": {"depth": 32, "height": 32, "width": 32},
            "target_spacing": [12.0, 14.0, 14.0],
            "hu_window": [-1000, 1200],
            "foreground_hu": -500.0,
        },
        "diagnosis.crops": section,
        "diagnosis.batch_size": 4,
        "diagnosis.epochs": 4,
        "diagnosis.learning_rate": 1e-2,
    }
    return settings, ["stage=diagnosis", *(f"{key}={json.dumps(value)}" for key, value in values.items())]


@pytest.mark.slow
def test_training_on_crops_lowers_the_lesion_loss(crop_settings, tmp_path):
    settings, overrides = crop_settings
    run(TrainingConfig.load(settings, overrides))
    log = [json.loads(line) for line in (tmp_path / "run/diagnosis.jsonl").read_text().splitlines()]
    losses = [line["validation_lesion_loss"] for line in log if "validation_loss" in line]
    assert min(losses[1:]) < losses[0]
    model = DiffVPForDiagnosis.from_pretrained(tmp_path / "run/diagnosis")
    assert 0 < model.config.finding_attributes["Lung opacity"]["margin"] <= 5
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_training_on_crops_without_masks_needs_only_labels(crop_settings, tmp_path, monkeypatch):
    settings, overrides = crop_settings
    changes = ["diagnosis.crops.near_lesions=null", "model.finding_attributes=null", "model.finding_regions=null"]
    monkeypatch.setattr("diffvp.train_accelerate.Truth", None)
    run(TrainingConfig.load(settings, [*overrides, *changes]))
    log = [json.loads(line) for line in (tmp_path / "run/diagnosis.jsonl").read_text().splitlines()]
    losses = [line["validation_volume_loss"] for line in log if "validation_loss" in line]
    assert min(losses[1:]) < losses[0]
    model = DiffVPForDiagnosis.from_pretrained(tmp_path / "run/diagnosis")
    assert model.config.diagnosis_threshold != [0.5] * 18, "a first stage alone has thresholds of its own"
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("of_crops", ["diagnosis.crops=null", "diagnosis.crops.near_lesions=null"])
def test_places_and_sizes_without_masks_are_refused(crop_settings, of_crops):
    settings, overrides = crop_settings
    with pytest.raises(SettingsError, match=r"model\.finding_attributes"):
        TrainingConfig.load(settings, [*overrides, of_crops])


@pytest.mark.slow
def test_interrupted_run_on_crops_resumes_to_the_same_weights(crop_settings, tmp_path, monkeypatch):
    settings, overrides = crop_settings
    overrides = [*overrides, "diagnosis.epochs=2", "save_every_steps=1"]
    run(TrainingConfig.load(settings, [*overrides, f"output_dir={tmp_path / 'straight'}"]))
    note = Log.__call__

    def interrupt(self, *, step, **values):
        note(self, step=step, **values)
        if step == 3:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Log, "__call__", interrupt)
        run(TrainingConfig.load(settings, overrides))
    run(TrainingConfig.load(settings, overrides))
    one, other = (
        DiffVPForDiagnosis.from_pretrained(tmp_path / name / "diagnosis").state_dict() for name in ("straight", "run")
    )
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], msg=name)


def test_step_without_finite_gradient_is_skipped_and_counted(crop_settings, tmp_path, monkeypatch):
    settings, overrides = crop_settings
    clip = torch.nn.utils.clip_grad_norm_
    norms = []

    def clip_once_infinite(parameters, *arguments, **options):
        parameters = list(parameters)
        if len(norms) == 2:
            parameters[0].grad[..., 0] = math.inf
        norms.append(clip(parameters, *arguments, **options))
        return norms[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_once_infinite)
    run(TrainingConfig.load(settings, [*overrides, "diagnosis.epochs=1"]))
    assert len(norms) == 4 and not math.isfinite(norms[2])
    log = [json.loads(line) for line in (tmp_path / "run/diagnosis.jsonl").read_text().splitlines()]
    assert log[-1]["skipped_steps"] == 1 and math.isfinite(log[-1]["validation_loss"])


def test_encoder_with_another_hu_range_is_refused(crop_settings):
    settings, overrides = crop_settings
    changed = [one.replace('"hu_range": [-1000, 1200]', '"hu_range": [-1000, 1000]') for one in overrides]
    with pytest.raises(ValueError, match="hu_range"):
        run(TrainingConfig.load(settings, changed))


def test_phantom_cohort_lists_its_patients(small_cohort):
    patients = read_patients(small_cohort)
    assert {case.name for case in load_phantom(small_cohort, "train")} <= set(patients)
