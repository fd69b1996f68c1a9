# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Both training stages on a phantom cohort of a few cases, and the pieces that they rest on."""

import json
from collections import Counter
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor

from diffvp import train_accelerate
from diffvp.data.cache import TensorCache
from diffvp.data.cases import DatasetError
from diffvp.data.lesions import CELL, lesion_cells, token_targets
from diffvp.data.pairing import pair_reference
from diffvp.data.phantom_cohort import write_cohort
from diffvp.modeling_diffvp import DiffVPForDiagnosis
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.train_accelerate import (
    DiagnosisObjective,
    ReportBatches,
    TrainingConfig,
    augment,
    best_thresholds,
    build_generator,
    run,
)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    # Seven of these 26 are normal, two or more in each span below that pairs with them.
    root = tmp_path_factory.mktemp("phantom")
    return write_cohort(root, train=26, valid=0, seed=23, matrix=48, masks=False, workers=1, progress=False)


@pytest.fixture
def settings(cohort, tmp_path, tiny_base_with_tokenizer, tiny_fields):
    """A YAML file for a run of seconds."""
    model = {k: v for k, v in tiny_fields.items() if k not in ("diagnosis_prompt_ids", "instruction_ids")}
    epoch = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_ratio": 0.0}
    values = {
        "output_dir": str(tmp_path / "run"),
        "seed": 0,
        "data": {
            "root": str(cohort),
            "cache_dir": str(tmp_path / "cache"),
            "diagnosis_cases": [0, 12],
            "validation_cases": [12, 18],
            "report_cases": [18, 26],
        },
        "image_processor": {"size": {"depth": 32, "height": 32, "width": 32}},
        "base": {"name": str(tiny_base_with_tokenizer)},
        "model": model,
        "lora": {"r": 2, "target_modules": ["q_proj", "v_proj"]},
        "diagnosis": {**epoch, "head_learning_rate": 1e-2},
        "report": {**epoch, "lora_learning_rate": 1e-3, "max_report_tokens": 1500},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_both_stages_make_a_checkpoint_that_auto_classes_load(settings, cohort, tmp_path):
    config = TrainingConfig.load(settings)
    run(config)
    log = [json.loads(line) for line in (tmp_path / "run/report.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    checkpoint = tmp_path / "run/model"
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    volume = sorted(cohort.rglob("*.nii.gz"))
    inputs = processor(ct=str(volume[0]), reference=str(volume[1]))
    ids = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(ids, model.generate(inputs["ct"], inputs["reference"], max_new_tokens=5))
    assert len(model.config.diagnosis_threshold) == 18

    # Stage 2 left what stage 1 made as it was, and the encoder is the classifier's.
    classifier = AutoModel.from_pretrained(tmp_path / "run/diagnosis", trust_remote_code=True).classifier
    for name, value in classifier.state_dict().items():
        assert torch.equal(value, model.diagnosis.state_dict()[name]), name
    for name, value in classifier.vision_encoder.state_dict().items():
        assert torch.equal(value, model.vision_encoder.state_dict()[name]), name

    # The same configuration gives the same weights.
    before = model.state_dict()
    run(TrainingConfig.load(settings, [f"output_dir={tmp_path / 'again'}"]))
    again = AutoModel.from_pretrained(tmp_path / "again/model", trust_remote_code=True).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in again.items())


def test_stage_two_starts_from_the_base_llm(settings, tmp_path):
    config = TrainingConfig.load(settings, ["diagnosis.epochs=1", "stage=diagnosis"])
    run(config)
    model, processor = build_generator(config)
    ids = torch.tensor([[1, 5, 9]])
    with_adapter = model.language_model(ids).logits
    model.language_model.disable_adapters()
    assert torch.equal(with_adapter, model.language_model(ids).logits)
    prompt, mask = model.diagnosis_prompt(torch.full((1, 18), -9.0))
    assert processor.tokenizer.decode(prompt[0]) == processor.tokenizer.decode(
        processor.tokenizer(processor.diagnosis_prompt([]), add_special_tokens=False)["input_ids"]
    )


def test_overrides_and_typos(settings):
    assert TrainingConfig.load(settings, ["seed=7", "report.epochs=9"]).report.epochs == 9
    with pytest.raises(ValueError, match="epoch\n"):
        TrainingConfig.load(settings, ["report.epoch=9"])
    with pytest.raises(ValueError, match="not of the form"):
        TrainingConfig.load(settings, ["seed"])


def test_cases_outside_the_split_are_named(settings):
    with pytest.raises(ValueError, match=r"\[26, 30\], but the split has 26 cases"):
        run(TrainingConfig.load(settings, ["data.diagnosis_cases=[26,30]", "stage=diagnosis"]))


def test_overlapping_cases_are_refused(settings):
    with pytest.raises(ValueError, match="overlap at case 11"):
        run(TrainingConfig.load(settings, ["data.validation_cases=[11,18]"]))


def test_several_processes_are_refused(settings, monkeypatch):
    monkeypatch.setattr(train_accelerate, "Accelerator", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(ValueError, match="launched in 2"):
        run(TrainingConfig.load(settings))


def test_pairing_depends_on_seed_epoch_and_case_alone():
    pool = [f"train_{i}" for i in range(20)]
    chosen = {(seed, epoch): pair_reference("train_3", pool, seed, epoch) for seed in range(3) for epoch in range(30)}
    assert all(pair_reference("train_3", pool[::-1], *key) == value for key, value in chosen.items())
    assert "train_3" not in chosen.values()
    assert len(set(chosen.values())) > 15, "every epoch draws anew"
    counts = Counter(pair_reference(f"case_{i}", pool, 0, 0) for i in range(2000))
    assert len(counts) == 20 and min(counts.values()) > 60, "uniform over the pool"
    with pytest.raises(ValueError, match="No reference for a"):
        pair_reference("a", ["a"], 0, 0)


def test_cache_is_keyed_by_content_and_recipe(tmp_path):
    file, calls = tmp_path / "scan", []

    def compute():
        calls.append(1)
        return {"x": torch.full((2,), float(len(calls)))}

    file.write_bytes(b"one")
    cache = TensorCache(tmp_path / "cache", {"size": 1})
    assert cache.get(file, compute)["x"][0] == cache.get(file, compute)["x"][0] == 1
    assert TensorCache(tmp_path / "cache", {"size": 2}).get(file, compute)["x"][0] == 2
    file.write_bytes(b"two")
    assert cache.get(file, compute)["x"][0] == 3
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_lesion_cells_lie_where_the_tensor_shows_the_lesion(tmp_path):
    """A bright block, stored in an odd orientation, and its mask: bright cells and mask cells must be the same."""
    hu = np.full((40, 36, 20), -1000, np.int16)
    hu[8:17, 20:31, 5:12] = 150
    codes = np.where(hu > 0, np.uint32(1 << 17 | 1), np.uint32(0))
    affine = np.array([[0, 0, 4.0, 0], [3.0, 0, 0, 0], [0, -2.5, 0, 0], [0, 0, 0, 1]])  # axes P, I, R in the file
    for name, array in (("ct", hu), ("mask", codes)):
        nib.save(nib.Nifti1Image(array, affine), tmp_path / f"{name}.nii.gz")
    processor = DiffVPImageProcessor(size=(32, 32, 32), target_spacing=(3.0, 4.0, 3.5), foreground_hu=-500.0)
    features = processor(tmp_path / "ct.nii.gz")
    cells = lesion_cells(tmp_path / "mask.nii.gz", features["geometry"][0])
    bright = torch.nn.functional.max_pool3d(features["ct"][0], CELL)[0] > 0
    assert bright.sum() > 8 and torch.equal(cells != 0, bright)
    assert set(cells.unique().tolist()) == {0, 1 << 17 | 1}
    targets = token_targets(cells[None], (2, 2, 2), 18)
    assert targets.shape == (1, 8, 18) and torch.equal(targets[..., 0], targets[..., 17])
    assert targets[..., 1:17].sum() == 0 and 0 < targets[..., 0].sum() <= 8


def test_missing_or_foreign_lesion_masks_are_named(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)), tmp_path / "mask.nii.gz")
    geometry = SimpleNamespace(shape=(8, 8, 8))
    with pytest.raises(DatasetError, match=r"mask.nii.gz: shape is \(9, 9, 9\); expected \(8, 8, 8\)"):
        lesion_cells(tmp_path / "mask.nii.gz", geometry)
    with pytest.raises(DatasetError, match="none.nii.gz: lesion mask is missing"):
        lesion_cells(tmp_path / "none.nii.gz", geometry)


def test_augmentation_moves_lesions_with_the_volume():
    cells = torch.zeros(6, 8, 8, 8, dtype=torch.int32)
    cells[:, 2, 3, 5] = 1
    volumes = cells.repeat_interleave(CELL, 1).repeat_interleave(CELL, 2).repeat_interleave(CELL, 3)[:, None].float()
    moved, moved_cells = augment(volumes, cells, np.random.default_rng(0))
    assert torch.equal(torch.nn.functional.max_pool3d(moved, CELL)[:, 0] > 0.5, moved_cells != 0)
    assert len({tuple(place.tolist()) for place in moved_cells.nonzero()[:, 1:]}) > 3, "every case moves by itself"


def test_lesions_teach_the_encoder_and_leave_no_trace_in_the_checkpoint(tiny_config):
    torch.manual_seed(0)
    model = DiffVPForDiagnosis(tiny_config)
    names = set(model.state_dict())
    objective = DiagnosisObjective(model, lesion_loss_weight=1.0)
    ct, labels = torch.randn(2, 1, 32, 32, 32), torch.zeros(2, 18)
    cells = torch.zeros(2, 8, 8, 8, dtype=torch.int32)
    cells[0, 0, 0, 0] = 1
    losses = objective(ct, labels, cells)
    torch.testing.assert_close(losses["loss"], losses["volume_loss"] + losses["lesion_loss"])
    losses["lesion_loss"].backward()
    assert model.classifier.head.weight.grad is None, "the lesions have a head of their own"
    assert model.classifier.vision_encoder.resnet.conv1.weight.grad.abs().max() > 0
    assert set(model.state_dict()) == names
    assert objective(ct, labels, None)["loss"] == objective(ct, labels, None)["volume_loss"]


def test_best_thresholds_find_the_gap():
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 2)) < 0.3).astype(int)
    probabilities = np.where(labels == 1, 0.4, 0.2) + rng.uniform(-0.05, 0.05, labels.shape)
    assert all(0.25 <= threshold <= 0.35 for threshold in best_thresholds(probabilities, labels))


def test_a_label_that_the_classifier_cannot_tell_is_not_said_of_everyone():
    """By itself its best threshold would be 0: half of 100 right beats none. Together with the rest it costs more."""
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 3)) < [0.3, 0.3, 0.12]).astype(int)
    probabilities = np.where(labels == 1, 0.7, 0.2) + rng.uniform(-0.05, 0.05, labels.shape)
    probabilities[:, 2] = rng.uniform(0.1, 0.14, 400)  # nothing but its prevalence
    thresholds = best_thresholds(probabilities, labels)
    assert thresholds[2] > 0.13 and max(thresholds[:2]) < 0.7


def test_true_findings_are_drawn_by_case_and_epoch_alone(tokenizer, tiny_fields):
    cases = [
        SimpleNamespace(name=f"case_{k}", labels=np.eye(18, dtype=np.int8)[k % 18], report="x") for k in range(60)
    ]
    config = SimpleNamespace(seed=3, report=SimpleNamespace(max_report_tokens=9, batch_size=7))
    size = dict(zip(("depth", "height", "width"), tiny_fields["image_size"], strict=True))
    processor = DiffVPProcessor(DiffVPImageProcessor(size=size), tokenizer)
    logits = torch.zeros(60, 18)
    features = torch.zeros(60, 8, 16)

    def drawn(share, size, epoch):
        config.report.batch_size = size
        batches = ReportBatches(cases, cases, features, logits, processor, config, true_findings=share)
        given = {}
        for indices in batches.epoch(epoch, shuffle=True):
            batch = batches.batch(indices, epoch)
            for row, index in enumerate(indices):
                known = bool(batch["diagnosis_logits"][row].abs().min() > 20)
                assert not known or torch.equal(batch["diagnosis_logits"][row] > 0, batch["diagnosis_labels"][row] > 0)
                given[int(index)] = known
        return given

    first = drawn(0.5, 7, 0)
    assert first == drawn(0.5, 16, 0) != drawn(0.5, 7, 1)
    assert 15 < sum(first.values()) < 45
    assert not any(drawn(0.0, 7, 0).values()) and all(drawn(1.0, 7, 0).values())
