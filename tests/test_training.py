# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Both training stages on a phantom cohort of a few cases, and their building blocks."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from diffvp import train_accelerate
from diffvp.cli import app
from diffvp.collator_diffvp import pair_reference
from diffvp.data.cache import ContentHashes, TensorCache, VolumeCache
from diffvp.data.cases import Case, DatasetError
from diffvp.data.lesions import CELL, lesion_cells, token_targets
from diffvp.data.phantom_cases import load_phantom
from diffvp.data.regions import RegionMasks, region_mask_path
from diffvp.labels_diffvp import REGIONS
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.train_accelerate import build_generator, run
from diffvp.training.checkpoints import Checkpoints
from diffvp.training.config import TrainingConfig
from diffvp.training.diagnosis_stage import augment, best_thresholds
from diffvp.training.loop import share
from diffvp.training.report_stage import ReportBatches

from .processes import fork


def test_both_stages_make_a_checkpoint_that_auto_classes_load(settings, small_cohort, tmp_path):
    config = TrainingConfig.load(settings)
    run(config)
    log = [json.loads(line) for line in (tmp_path / "run/report.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert len(losses) == 2 and losses[1] < losses[0]
    checkpoint = tmp_path / "run/model"
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    volume = sorted(small_cohort.rglob("*.nii.gz"))
    inputs = processor(ct=str(volume[0]), reference=str(volume[1]))
    ids = model.generate(**inputs, max_new_tokens=5)
    assert torch.equal(ids, model.generate(inputs["ct"], inputs["reference"], max_new_tokens=5))
    assert len(model.config.diagnosis_threshold) == 18

    # Stage 2 leaves the weights of stage 1 unchanged, and shares the classifier's encoder.
    classifier = AutoModel.from_pretrained(tmp_path / "run/diagnosis", trust_remote_code=True).classifier
    assert model.config.share_encoder and model.diagnosis.vision_encoder is None
    for name, value in classifier.head.state_dict().items():
        assert torch.equal(value, model.diagnosis.head.state_dict()[name]), name
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


def test_losses_are_logged_to_tensorboard(settings, tmp_path):
    run(TrainingConfig.load(settings, ["stage=diagnosis", "diagnosis.epochs=1", "log_with=[tensorboard]"]))
    reader = EventAccumulator(str(tmp_path / "run/diffvp"))
    reader.Reload()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/diagnosis.jsonl").read_text().splitlines()[:-1]]
    assert [point.value for point in reader.Scalars("diagnosis/loss")] == pytest.approx(losses)


def log_to_trackio(settings, folder):
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")
    run(TrainingConfig.load(settings, ["stage=diagnosis", "diagnosis.epochs=1", "log_with=[trackio]"]))
    from trackio import Api, SQLiteStorage

    [name] = [run.name for run in Api().runs("diffvp")]
    rows = SQLiteStorage.get_logs("diffvp", name)
    losses = [row["diagnosis/loss"] for row in rows if "diagnosis/loss" in row]
    (folder / "curve.json").write_text(json.dumps(losses))


def test_losses_are_logged_to_trackio(settings, tmp_path):
    """Run in a separate process, because trackio keeps threads and a folder for the whole process."""
    process = fork(log_to_trackio, settings, tmp_path, output=tmp_path / "output.txt")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output.txt").read_text()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/diagnosis.jsonl").read_text().splitlines()[:-1]]
    assert json.loads((tmp_path / "curve.json").read_text()) == pytest.approx(losses)


@pytest.mark.slow
def test_training_stops_when_validation_no_longer_improves(settings, tmp_path):
    overrides = ["stage=diagnosis", "diagnosis.epochs=40", "diagnosis.patience=2", "diagnosis.learning_rate=0.1"]
    run(TrainingConfig.load(settings, overrides))
    log = [json.loads(line) for line in (tmp_path / "run/diagnosis.jsonl").read_text().splitlines()]
    losses = [line["validation_loss"] for line in log if "validation_loss" in line]
    assert 3 <= len(losses) < 40 and losses.index(min(losses)) == len(losses) - 3
    best = Checkpoints(tmp_path / "run/checkpoints/diagnosis", 2)
    kept = load_file(tmp_path / "run/diagnosis/model.safetensors")
    step = 2 * (losses.index(min(losses)) + 1)
    weights = best.load(step).load("weights")
    assert all(
        torch.equal(value, weights[f"model.{name}"]) for name, value in kept.items() if "num_batches" not in name
    )


def test_launched_run_ends_with_the_lines_of_the_command(settings, tmp_path, monkeypatch, capsys):
    finished = train_accelerate.Finished(tmp_path / "model", epoch=2, epochs=3, loss=0.5, tested=True)
    monkeypatch.setattr(train_accelerate, "prepare", lambda config: None)
    monkeypatch.setattr(train_accelerate, "run", lambda config, cohort=None: finished)
    shown = CliRunner().invoke(app, ["train", str(settings), "seed=5"]).stdout
    monkeypatch.setattr(sys, "argv", ["train_accelerate.py", str(settings), "seed=5"])
    train_accelerate.main()
    assert capsys.readouterr().out == shown
    for words in ("epoch 2 of 3", "--reference NORMAL_SCAN", f"diffvp evaluate {settings} seed=5", "diffvp push"):
        assert words in shown


def test_overrides_apply_and_typos_are_refused(settings):
    assert TrainingConfig.load(settings, ["seed=7", "report.epochs=9"]).report.epochs == 9
    with pytest.raises(ValueError, match=r"report\.epoch: unknown \(expected epochs\)"):
        TrainingConfig.load(settings, ["report.epoch=9"])
    with pytest.raises(ValueError, match="not of the form"):
        TrainingConfig.load(settings, ["seed"])


def test_cases_outside_the_split_are_refused(settings):
    with pytest.raises(ValueError, match=r"\[26, 30\], but the split has 26 cases"):
        run(TrainingConfig.load(settings, ["data.diagnosis_cases=[26,30]", "stage=diagnosis"]))


def test_overlapping_cases_are_refused(settings):
    with pytest.raises(ValueError, match="overlap at case 11"):
        TrainingConfig.load(settings, ["data.validation_cases=[11,18]"])


def test_processes_unknown_to_accelerate_are_refused(settings, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were launched, but accelerate sees 1"):
        run(TrainingConfig.load(settings))


def test_paired_reference_depends_only_on_seed_epoch_and_case():
    pool = [f"train_{i}" for i in range(20)]
    chosen = {(seed, epoch): pair_reference("train_3", pool, seed, epoch) for seed in range(3) for epoch in range(30)}
    assert all(pair_reference("train_3", pool[::-1], *key) == value for key, value in chosen.items())
    assert "train_3" not in chosen.values()
    assert len(set(chosen.values())) > 15, "every epoch must draw anew"
    counts = Counter(pair_reference(f"case_{i}", pool, 0, 0) for i in range(2000))
    assert len(counts) == 20 and min(counts.values()) > 60, "draws must be uniform over the pool"
    with pytest.raises(ValueError, match="No reference for a"):
        pair_reference("a", ["a"], 0, 0)


def test_cache_is_keyed_by_content_and_recipe(tmp_path):
    file, calls = tmp_path / "scan", []
    hashes = ContentHashes(tmp_path / "cache")

    def compute():
        calls.append(1)
        return {"x": torch.full((2,), float(len(calls)))}

    def get(recipe):
        return TensorCache(tmp_path / "cache", recipe).get(hashes(file), compute)["x"][0]

    file.write_bytes(b"one")
    assert get({"size": 1}) == get({"size": 1}) == 1
    assert get({"size": 2}) == 2
    # Same length and modification time: only the content differs.
    times = os.stat(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert get({"size": 1}) == 3
    assert not list((tmp_path / "cache").glob(".writing-*"))


def test_damaged_cache_entry_is_never_used(tmp_path):
    cache = TensorCache(tmp_path, {})
    entry = {"a": torch.arange(5.0), "b": torch.arange(3, dtype=torch.int32)}
    path = cache.path("digest")
    for _ in range(2):  # the second time from the file
        stored = cache.get("digest", lambda: entry)
    content = path.read_bytes()
    assert torch.equal(stored["a"], entry["a"]) and (cache.hits, cache.misses, cache.damaged) == (1, 1, 0)
    accepted = []
    for position in range(len(content)):
        for bit in (0, 3, 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            found = cache.get("digest", lambda: {"recomputed": torch.zeros(1)})
            if "recomputed" not in found and not (
                set(found) == set(entry) and all(torch.equal(found[name], entry[name]) for name in entry)
            ):
                accepted.append((position, bit))
    assert not accepted
    assert cache.damaged > 2.5 * len(content), "only padding may change unnoticed"
    path.write_bytes(content[:-1])
    assert "recomputed" in cache.get("digest", lambda: {"recomputed": torch.zeros(1)})


def test_hash_of_a_folder_covers_names_and_contents(tmp_path):
    hashes, folder = ContentHashes(tmp_path / "cache"), tmp_path / "series"
    folder.mkdir()
    (folder / "1.dcm").write_bytes(b"1")
    (folder / "2.dcm").write_bytes(b"2")
    first = hashes(folder)
    assert hashes({"path": str(folder), "bytes": None}) == first == ContentHashes(tmp_path / "cache")(folder)
    (folder / "2.dcm").rename(folder / "3.dcm")
    renamed = hashes(folder)
    (folder / "3.dcm").write_bytes(b"3")
    assert len({first, renamed, hashes(folder), hashes({"path": "x", "bytes": b"3"})}) == 4


def write_to_cache(root):
    cache = TensorCache(root, {})
    for key in range(40):
        entry = cache.get(str(key), lambda key=key: {"x": torch.full((1000,), float(key))})
        assert torch.equal(entry["x"], torch.full((1000,), float(key)))
    hashes = ContentHashes(root)
    for key in range(40):
        hashes(cache.path(str(key)))


def test_several_processes_can_write_one_cache(tmp_path):
    workers = [fork(write_to_cache, tmp_path) for _ in "1234"]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(list(tmp_path.glob("*.safetensors"))) == 40 and not list(tmp_path.glob(".writing-*"))


def test_lesion_cells_match_the_lesion_in_the_tensor(tmp_path):
    """Store a bright block and its mask in an odd orientation: bright cells and mask cells must be equal."""
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


def test_missing_masks_and_masks_of_another_shape_are_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((9, 9, 9), np.int16), np.eye(4)), tmp_path / "mask.nii.gz")
    geometry = SimpleNamespace(shape=(8, 8, 8))
    with pytest.raises(DatasetError, match=r"mask.nii.gz: shape: \(9, 9, 9\) \(expected \(8, 8, 8\)"):
        lesion_cells(tmp_path / "mask.nii.gz", geometry)
    with pytest.raises(DatasetError, match="none.nii.gz: lesion mask: missing"):
        lesion_cells(tmp_path / "none.nii.gz", geometry)


def test_region_tokens_lie_in_their_regions(small_cohort, tmp_path):
    """Compare the mean position of a region's tokens, in world coordinates, with the centre of mass of its mask."""
    processor = DiffVPImageProcessor(size=(32, 32, 32), target_spacing=(12.0, 14.0, 14.0), foreground_hu=-500.0)
    volumes = VolumeCache(tmp_path, processor)
    case, grid = load_phantom(small_cohort, "train")[3], (8, 8, 8)
    masks = RegionMasks(small_cohort, tmp_path, volumes, grid)
    shares = masks.load(case)
    assert shares.shape == (10, 512) and torch.allclose(shares.sum(1), torch.ones(10))
    centres = torch.stack(torch.meshgrid(*[torch.arange(8.0) * 4 + 1.5] * 3, indexing="ij"), dim=-1).reshape(-1, 3)
    pooled = masks.pool(case, centres)
    assert pooled.shape == (11, 3) and torch.allclose(pooled[10], torch.full((3,), 15.5))
    geometry = volumes.preprocess(case)["geometry"][0]
    found = nib.affines.apply_affine(geometry.tensor_affine, pooled[:10].numpy())
    for region, place in zip(REGIONS, found, strict=True):
        mask = nib.load(region_mask_path(small_cohort, case.name, region))
        expected = nib.affines.apply_affine(mask.affine, np.argwhere(np.asarray(mask.dataobj)).mean(0))
        # A token is 48 x 56 x 56 mm, so a region as small as a token is located at the centre of that token.
        assert np.abs(place - expected).max() < (28 if region in ("thyroid", "esophagus") else 15), region
    with pytest.raises(DatasetError, match="abdomen.nii.gz: region mask: missing"):
        RegionMasks(tmp_path, tmp_path, volumes, grid).load(case)


def test_augmentation_shifts_and_never_mirrors():
    """A bright block on the patient's right must stay there; shifts are in steps of one cell."""
    volume = torch.full((1, 32, 32, 32), -1.0)
    volume[0, 12:16, 12:16, 8:12] = 0.5
    places = set()
    for seed in range(12):
        bright = (augment(volume, np.random.default_rng(seed))[0] > 0).nonzero()
        assert len(bright) == 64
        places.add(tuple(bright.min(dim=0).values.tolist()))
    assert len(places) > 6
    assert {z % CELL for z, _, _ in places} == {0} and max(x for _, _, x in places) <= 8 + 2 * CELL


def test_best_thresholds_find_the_gap():
    rng = np.random.default_rng(0)
    labels = (rng.random((200, 2)) < 0.3).astype(int)
    probabilities = np.where(labels == 1, 0.4, 0.2) + rng.uniform(-0.05, 0.05, labels.shape)
    assert all(0.25 <= threshold <= 0.35 for threshold in best_thresholds(probabilities, labels))


def test_unpredictable_label_is_not_predicted_for_everyone():
    """Alone, its best threshold would be 0. Together with the other labels, that costs more than it gains."""
    rng = np.random.default_rng(0)
    labels = (rng.random((400, 3)) < [0.3, 0.3, 0.12]).astype(int)
    probabilities = np.where(labels == 1, 0.7, 0.2) + rng.uniform(-0.05, 0.05, labels.shape)
    probabilities[:, 2] = rng.uniform(0.1, 0.14, 400)  # only its prevalence
    thresholds = best_thresholds(probabilities, labels)
    assert thresholds[2] > 0.13 and max(thresholds[:2]) < 0.7


class FrozenFeatures:
    """Mock features of cases; their values do not matter here."""

    def __init__(self, config):
        self.model = SimpleNamespace(config=config)

    def load(self, case):
        return {"features": torch.zeros(8, 16), "diagnosis_logits": torch.zeros(18)}

    def inputs(self, case, references, frozen=None):
        return {"ct_features": torch.zeros(8, 16), "reference_features": torch.zeros(8, 16)}


@pytest.fixture
def processor(tokenizer, tiny_fields):
    size = dict(zip(("depth", "height", "width"), tiny_fields["image_size"], strict=True))
    return DiffVPProcessor(DiffVPImageProcessor(size=size), tokenizer)


def phantom_cases(count, **fields):
    return [
        Case(
            f"case_{k}",
            f"p{k}",
            f"s{k}",
            Path("x"),
            "y" * (k % 7 + 1),
            labels=np.eye(18, dtype=np.int8)[k % 18],
            **fields,
        )
        for k in range(count)
    ]


def test_true_findings_depend_only_on_case_and_epoch(processor, tiny_config):
    cases = phantom_cases(60)

    def drawn(share, size, epoch):
        split = ReportBatches(
            cases,
            cases,
            FrozenFeatures(tiny_config),
            processor,
            max_tokens=9,
            seed=3,
            shuffle=True,
            true_findings=share,
        )
        given = {}
        for indices in split.batches(epoch, size):
            batch = split.collate([split.sample(index, epoch) for index in indices])
            for row, index in enumerate(indices):
                known = bool(batch["diagnosis_logits"][row].abs().min() > 20)
                assert not known or torch.equal(batch["diagnosis_logits"][row] > 0, batch["diagnosis_labels"][row] > 0)
                given[int(index)] = known
        return given

    first = drawn(0.5, 7, 0)
    assert first == drawn(0.5, 16, 0) != drawn(0.5, 7, 1)
    assert 15 < sum(first.values()) < 45
    assert not any(drawn(0.0, 7, 0).values()) and all(drawn(1.0, 7, 0).values())


def test_reconstruction_of_the_same_scan_is_never_its_reference(processor, tiny_config):
    cases = [Case(f"p_{k // 3}_a_{k % 3}", f"p{k // 3}", f"s{k // 3}", Path("x"), "y") for k in range(9)]
    split = ReportBatches(cases, cases, FrozenFeatures(tiny_config), processor, max_tokens=9, seed=0, shuffle=True)
    pairs = {
        (cases[index].scan_id, split.reference(index, epoch).scan_id) for index in range(9) for epoch in range(20)
    }
    assert len(pairs) == 6 and all(target != reference for target, reference in pairs)


def test_step_is_shared_without_loss_or_repetition():
    for cases in range(1, 14):
        for processes in (1, 2, 3, 4):
            for size in (1, 2, 5):
                step = np.arange(cases)
                parts = [share(step, process, processes, size) for process in range(processes)]
                assert len({len(part) for part in parts}) == 1, (
                    "every process needs the same number of collective calls"
                )
                counted = [index for part in parts for indices, counts in part if counts for index in indices]
                assert sorted(counted) == step.tolist()
                assert all(1 <= len(indices) <= size for part in parts for indices, _ in part)
