# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Stage 1: the diagnosis classifier (appendix D).

With lesion masks, the voxel head learns findings voxel by voxel from crops. Without, it learns from the labels of
whole scans through Noisy-OR: from whole scans, or from crops of them, whose Noisy-OR leaves room for a finding outside
the crop. Model and later steps are the same in all cases.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from ..data.cache import TensorCache, VolumeCache
from ..data.cases import Case
from ..data.lesions import (
    CELL,
    largest_lesions,
    lesion_cells,
    lesion_mask_path,
    lobe_cells,
    lobe_mask_path,
    read_patients,
    token_targets,
    true_place,
    true_sizes,
)
from ..encoders_diffvp import noisy_or
from ..modeling_diffvp import DiffVPForDiagnosis
from ..modules_diffvp import named_places
from .config import CropSection, DiagnosisSection
from .loop import BatchSource, Stage, in_order

STEP = 8  # voxels between two positions of a crop
POSITIVE_WEIGHT = 3.0  # weight of lesion tokens in the loss
REGION_WEIGHT, SIZE_WEIGHT = 0.3, 0.3
KEPT_CELLS = 40  # cells kept per finding of a case, as centres of crops
START_LOGIT = -4.0  # initial bias of the voxel head: few tokens show a finding
COUNTED_CROPS = 512  # crops for the usual number of tokens of each label
FEWEST_SCORED = 30  # minimum number of cases for a score
LARGEST_SHARE = 20.0  # upper limit of the loss of one label, relative to its usual number of tokens


def augment(volume: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """
    Shift a volume (1, D, H, W) by up to one lesion cell in depth and two in plane, and scale its density.

    There is no mirroring, since the heart lies on one side and reports name the side of findings.
    """
    shift = tuple(int(step) for step in rng.integers(-2, 3, 3) // (2, 1, 1))
    gain = float(rng.uniform(0.95, 1.05))
    volume = torch.roll(volume, [CELL * step for step in shift], dims=(1, 2, 3))
    return ((volume + 1) * gain - 1).clamp(-1, 1)


class Truth:
    """Ground truth of phantom cases per cell of the tensor, from their masks and cached; see `data/lesions.py`."""

    def __init__(self, dataset: str | Path, cache_dir: str | Path, volumes: VolumeCache):
        self.dataset, self.volumes = dataset, volumes
        self.cache = TensorCache(Path(cache_dir) / "lesions", volumes.recipe | {"content": "cells, largest, lobes"})
        self.patients = read_patients(dataset)

    def load(self, case: Case) -> dict[str, torch.Tensor]:
        """Return `cells`, `largest`, `lobes` (d, h, w), and `sizes` (labels,) in mm, NaN for labels without a size."""
        lesions, lobes = lesion_mask_path(self.dataset, case.name), lobe_mask_path(self.dataset, case.name)

        def compute() -> dict[str, torch.Tensor]:
            geometry = self.volumes.preprocess(case)["geometry"][0]
            return {
                "cells": lesion_cells(lesions, geometry),
                "largest": largest_lesions(lesions, geometry),
                "lobes": lobe_cells(lobes, geometry),
            }

        return self.cache.get(self.volumes.hashes(lesions), compute) | {"sizes": true_sizes(self.patients[case.name])}


class DiagnosisObjective(torch.nn.Module):
    """
    Losses of a batch: for whole scans, the BCE of the volume labels (appendix D); for crops with lesion masks, the BCE
    of the lesion tokens and the losses of regions and sizes; for crops without, the BCE of their volumes' labels.

    A crop does not show whether its volume has a finding elsewhere. Its Noisy-OR therefore has one more cause, the
    "leak", whose probability is the prevalence. A crop without evidence is then right
    for either label, and only tokens that occur more often in volumes with the finding are learned.

    Args:
        usual: mean number of tokens of each label in a crop, (labels,), for crops with lesion masks. The BCE of a
            label is divided by it. Otherwise, an effusion of hundreds of tokens would outweigh a nodule of one token.
        prevalence: of each label, (labels,), for crops without lesion masks.
    """

    def __init__(
        self, model: DiffVPForDiagnosis, usual: torch.Tensor | None = None, prevalence: torch.Tensor | None = None
    ):
        super().__init__()
        self.model = model
        if usual is not None:
            self.register_buffer("usual", usual.clamp(min=1.0), persistent=False)
        if prevalence is not None:
            self.register_buffer("leak", torch.logit(prevalence), persistent=False)

    def forward(
        self,
        ct: torch.Tensor,
        labels: torch.Tensor | None = None,
        start: torch.Tensor | None = None,
        cells: torch.Tensor | None = None,
        largest: torch.Tensor | None = None,
        lobes: torch.Tensor | None = None,
        sizes: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses from `labels` (batch, labels) for scans, or from `start` and [`Crops.cut`] for crops."""
        classifier = self.model.classifier
        features = classifier.vision_encoder(ct, start)
        if labels is not None:
            voxels = classifier.head(features)
            if start is not None:
                voxels = torch.cat([voxels.float(), self.leak.expand(len(ct), 1, -1)], dim=1)
            loss = F.binary_cross_entropy_with_logits(noisy_or(voxels), labels)
            return {"loss": loss, "volume_loss": loss}
        grid = self._grid(ct.shape[2:], features.shape[1])
        logits = classifier.head(features).float()
        targets = token_targets(cells, grid, logits.shape[2])
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        losses = (losses * (1 + (POSITIVE_WEIGHT - 1) * targets)).sum(dim=(0, 1))
        losses = losses / (len(ct) * self.usual * (1 + POSITIVE_WEIGHT))
        result = {"lesion_loss": losses.clamp(max=LARGEST_SHARE).mean()}
        loss = result["lesion_loss"]
        if classifier.region_head is not None:
            scores = classifier.region_head(features).float().transpose(1, 2)
            result["region_loss"] = F.cross_entropy(scores, self._nearest(lobes, grid).flatten(1).long())
            loss = loss + REGION_WEIGHT * result["region_loss"]
        if classifier.size_head is not None:
            of_size = token_targets(largest, grid, logits.shape[2]) * sizes.isfinite()[:, None]
            error = (classifier.sizes(features) - sizes.nan_to_num(1.0).log()[:, None]).abs()
            share = (error * of_size).sum(dim=(0, 1)) / (len(ct) * self.usual)
            result["size_loss"] = share.clamp(max=LARGEST_SHARE).mean()
            loss = loss + SIZE_WEIGHT * result["size_loss"]
        return {"loss": loss} | result

    def _grid(self, size: torch.Size, tokens: int) -> tuple[int, int, int]:
        """Return the token grid of a crop, in proportion to that of the whole volume."""
        config = self.model.config
        axes = zip(size, config.resnet_grid, config.image_size, strict=True)
        grid = tuple(-(-n * of // whole) for n, of, whole in axes)
        if math.prod(grid) != tokens:
            raise ValueError(f"crops of {tuple(size)} have {tokens} tokens, not a part of {config.resnet_grid}")
        return grid

    @staticmethod
    def _nearest(lobes: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        return F.interpolate(lobes[:, None].float(), size=grid, mode="nearest")[:, 0]


class Crops:
    """
    Crops of cases: class-balanced with lesion masks, and at random places of random cases without.

    All volumes and cells are on one device: in the memory of the GPU, so that a crop needs no transfer, or on the CPU
    as memory-mapped files of the cache. A crop depends only on (seed, epoch, index).

    Args:
        truth: findings in the masks; `None` for crops with the labels of their volumes.
        section: number and size of the crops.
        seed: `None` for validation: the same crops in every epoch, without jitter.
    """

    def __init__(
        self,
        cases: list[Case],
        volumes: VolumeCache,
        truth: Truth | None,
        section: CropSection,
        seed: int | None,
        device,
    ):
        self.section, self.seed = section, seed
        self.volumes = [volumes.load(case)[0].to(device) for case in cases]
        self.truth = []
        for case in cases:
            known = {"labels": torch.from_numpy(case.labels).float()} if truth is None else truth.load(case)
            self.truth.append({key: value.to(device) for key, value in known.items()})
        self.shape = np.array(self.volumes[0].shape)
        self.size = np.array(section.size)
        if (self.size % STEP).any() or (self.size > self.shape).any():
            expected = f"multiples of {STEP} up to {self.shape.tolist()}"
            raise ValueError(f"diagnosis.crops.size is {section.size}; expected {expected}")
        self.where: dict[int, list[tuple[int, np.ndarray]]] = {}
        rng = np.random.default_rng(0)
        for index, (case, known) in enumerate(zip(cases, self.truth, strict=True)):
            if "cells" not in known:
                continue
            codes = known["cells"].cpu().numpy()
            for label in np.flatnonzero(case.labels):
                places = np.argwhere((codes >> label) & 1)
                if len(places):
                    kept = places[rng.integers(0, len(places), min(len(places), KEPT_CELLS))]
                    self.where.setdefault(int(label), []).append((index, kept))
        self.labels = sorted(self.where)

    def plan(self, epoch: int, index: int) -> tuple[int, np.ndarray, tuple[float, float]]:
        """Return the case index, first voxel (3,), and density gain and offset of a crop."""
        rng = np.random.default_rng([self.seed or 0, 0 if self.seed is None else epoch, index, self.seed is None])
        if self.labels and rng.random() < self.section.near_lesions:
            found = self.where[self.labels[rng.integers(len(self.labels))]]
            case, places = found[rng.integers(len(found))]
            centre = places[rng.integers(len(places))] * CELL + CELL // 2
            start = centre - self.size // 2 + rng.integers(-(self.size // 3), self.size // 3 + 1)
        else:
            case, start = int(rng.integers(len(self.volumes))), rng.integers(0, self.shape - self.size + 1)
        start = np.clip(np.round(start / STEP).astype(int) * STEP, 0, (self.shape - self.size) // STEP * STEP)
        if self.seed is None:
            return case, start, (1.0, 0.0)
        return case, start, (float(rng.uniform(0.98, 1.02)), float(rng.normal(0, 0.004)))

    def cut(self, case: int, start: np.ndarray) -> dict[str, torch.Tensor]:
        """
        Return a crop that begins at the voxel `start`: `ct` (1, d, h, w) and the ground truth within it, or without
        masks, `labels` (labels,) of the volume.
        """
        size = self.size
        voxels = tuple(slice(int(first), int(first + n)) for first, n in zip(start, size, strict=True))
        cells = tuple(slice(one.start // CELL, one.stop // CELL) for one in voxels)
        known = {key: value[cells] if value.ndim == 3 else value for key, value in self.truth[case].items()}
        return {"ct": self.volumes[case][voxels][None].float(), **known}

    def usual_tokens(self, grid_of_cells: int, labels: int) -> torch.Tensor:
        """Return the mean number of tokens of each label in a crop, (labels,), over the first crops."""
        total = torch.zeros(labels)
        for index in range(COUNTED_CROPS):
            case, start, _ = self.plan(0, index)
            cells = self.cut(case, start)["cells"][None]
            grid = tuple(max(1, n // grid_of_cells) for n in cells.shape[1:])
            total += token_targets(cells, grid, labels).sum(dim=(0, 1)).cpu()
        return total / COUNTED_CROPS


class CropBatches(BatchSource):
    """Crops as samples: `sample` returns a position, and `losses` cuts the crop on the device of the volumes."""

    def __init__(self, crops: Crops, count: int):
        self.crops, self.count = crops, count

    def __len__(self) -> int:
        return self.count

    def batches(self, epoch: int, size: int) -> list[np.ndarray]:
        return in_order(self.count, size)  # the crops differ between epochs, not their order

    def sample(self, index: int, epoch: int) -> dict:
        case, start, (gain, offset) = self.crops.plan(epoch, index)
        return {"case": case, "start": torch.from_numpy(start), "gain": gain, "offset": offset}

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([torch.as_tensor(one[key]) for one in samples]) for key in samples[0]}

    def losses(self, model: torch.nn.Module, batch: dict, step: np.ndarray) -> dict[str, torch.Tensor]:
        cut = [
            self.crops.cut(case, np.array(start))
            for case, start in zip(batch["case"].tolist(), batch["start"].tolist(), strict=True)
        ]
        inputs = {key: torch.stack([one[key] for one in cut]) for key in cut[0]}
        gain, offset = (batch[key].float().view(-1, 1, 1, 1, 1) for key in ("gain", "offset"))
        inputs["ct"] = ((inputs["ct"] + 1) * gain - 1 + offset).clamp(-1, 1)
        inputs = {key: value.to(batch["start"].device) for key, value in inputs.items()}
        part = len(cut) / len(step)
        return {name: value * part for name, value in model(start=batch["start"], **inputs).items()}


class DiagnosisBatches(BatchSource):
    """Whole volumes with their labels.

    Args:
        seed: seed of shuffling and augmentation; `None` for neither.
    """

    def __init__(self, cases: list[Case], volumes: VolumeCache, seed: int | None):
        self.cases, self.volumes, self.seed = cases, volumes, seed

    def __len__(self) -> int:
        return len(self.cases)

    def batches(self, epoch: int, size: int) -> list[np.ndarray]:
        if self.seed is None:
            return in_order(len(self.cases), size)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.cases))
        return np.split(order, range(size, len(order), size))

    def sample(self, index: int, epoch: int) -> dict[str, torch.Tensor]:
        case = self.cases[index]
        volume = self.volumes.load(case).float()
        if self.seed is not None:
            key = hashlib.sha256(f"{self.seed}:{epoch}:{case.name}".encode()).digest()
            volume = augment(volume, np.random.default_rng(list(key)))
        return {"ct": volume, "labels": torch.from_numpy(case.labels).float()}

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return torch.utils.data.default_collate(samples)

    def losses(self, model: torch.nn.Module, batch: dict, step: np.ndarray) -> dict[str, torch.Tensor]:
        part = len(batch["ct"]) / len(step)
        return {name: value * part for name, value in model(**batch).items()}


class DiagnosisStage(Stage):
    """
    Training of the classifier.

    Args:
        volumes: cache of the cases' volumes.
        truth: ground truth of lesion masks; `None` to train on the labels of whole scans.
    """

    name = "diagnosis"

    def __init__(
        self,
        section: DiagnosisSection,
        model: DiffVPForDiagnosis,
        training: list[Case],
        validation: list[Case],
        volumes: VolumeCache,
        truth: Truth | None,
        seed: int,
        accelerator: Accelerator,
    ):
        self.diagnosis = model
        self.labels = np.stack([case.labels for case in validation])
        self.whole, self.on_crops = DiagnosisBatches(validation, volumes, None), section.crops is not None
        usual = None
        labels = torch.from_numpy(np.stack([case.labels for case in training])).float()
        prevalence = labels.mean(0).clamp(0.01, 0.99)
        if truth is None:
            seen = model.config.image_size if section.crops is None else section.crops.size
            start_at_prevalence(model, prevalence, seen)
        else:
            torch.nn.init.constant_(model.classifier.head.bias, START_LOGIT)
        if section.crops is None:
            sources = (DiagnosisBatches(training, volumes, seed), self.whole)
        else:
            options = (volumes, truth, section.crops)
            crops = Crops(training, *options, seed, accelerator.device)
            unseen = Crops(validation, *options, None, accelerator.device)
            sources = (CropBatches(crops, section.crops.per_epoch), CropBatches(unseen, section.crops.validation))
        if truth is not None:
            cells_of_token = model.config.image_size[0] // model.config.resnet_grid[0] // CELL
            usual = crops.usual_tokens(cells_of_token, self.labels.shape[1])
        # Channels last halves the time of a step on the CPU and is the layout of tensor cores.
        objective = DiagnosisObjective(model, usual, prevalence).to(memory_format=torch.channels_last_3d)
        # Noisy-OR spreads the gradient of a label over hundreds of voxels, so that the linear head would hardly change
        # at the encoder's learning rate.
        heads = [parameter for name, parameter in objective.named_parameters() if "head." in name]
        encoder = [parameter for name, parameter in objective.named_parameters() if "head." not in name]
        groups = [
            {"params": encoder, "lr": section.learning_rate},
            {"params": heads, "lr": section.head_learning_rate, "weight_decay": 0.0},
        ]
        super().__init__(section, objective, groups, *sources)

    def metrics(self, epoch: int) -> dict[str, float]:  # only the report stage needs the epoch
        if self.on_crops:
            return {}  # Noisy-OR over a head trained on crops means nothing before calibration
        predicted = predict(self.diagnosis, self.whole)
        fitted = crossfitted_f1(predicted, self.labels, [case.patient_id for case in self.whole.cases])
        if fitted is None:
            return {}
        return {
            "validation_f1": micro_f1(predicted >= 0.5, self.labels),
            "validation_f1_crossfitted_thresholds": fitted,
        }


def start_at_prevalence(model: DiffVPForDiagnosis, prevalence: torch.Tensor, size: Sequence[int]) -> None:
    """
    Set the bias to the prevalence of each label, since hundreds of voxel logits of 0 would mean certainty.

    Args:
        size: voxels of a training sample, of the whole volume or of a crop.
    """
    voxels = math.prod(model.config.resnet_grid) * math.prod(size) / math.prod(model.config.image_size)
    with torch.no_grad():
        model.classifier.head.bias.copy_(torch.logit(1 - (1 - prevalence) ** (1 / voxels)))


@torch.no_grad()
def predict(model: DiffVPForDiagnosis, source: DiagnosisBatches) -> np.ndarray:
    """Predict the probabilities of the cases of a source, (cases, labels)."""
    logits = [model.classifier.classify(features)[0] for features in encoded(model, source)]
    return torch.cat(logits).sigmoid().cpu().numpy()


@torch.no_grad()
def encoded(model: DiffVPForDiagnosis, source: DiagnosisBatches) -> Iterator[torch.Tensor]:
    """Yield the voxel features (1, N, C) of the cases of a source."""
    model.eval()
    device = next(model.parameters()).device
    for index in range(len(source)):
        yield model.classifier.vision_encoder(source.sample(index, 0)["ct"][None].to(device))


def calibrate(model: DiffVPForDiagnosis, source: DiagnosisBatches, labels: torch.Tensor) -> None:
    """
    Scale and shift the voxel logits of each label so that Noisy-OR gives calibrated label probabilities. Both are
    maximum-likelihood estimates on unseen cases, merged into the head.

    After training on crops, the logits are calibrated for crops, in which findings are frequent. Noisy-OR also assumes
    independent tokens, but neighbouring tokens are correlated. Without calibration, every volume would be predicted to
    show every finding.

    Args:
        labels: (cases, labels) in {0, 1}.
    """
    head = model.classifier.head
    with torch.no_grad():
        voxels = torch.cat([head(one).half() for one in encoded(model, source)])  # (cases, N, labels)
    labels = labels.to(voxels.device).float()
    # The penalty keeps the scale near 1 and the shift near 0 for rare labels, which have few cases.
    parameters = torch.zeros(2, labels.shape[1], device=voxels.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=60, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        total = parameters.new_zeros(())
        for part, truth in zip(voxels.split(16), labels.split(16), strict=True):
            logits = noisy_or(part.float() * parameters[0].exp() + parameters[1])
            loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
            loss.backward()
            total += loss.detach()
        penalty = parameters[0].square().sum() + 0.05 * parameters[1].square().sum()
        penalty.backward()
        return total + penalty.detach()

    optimizer.step(closure)
    if not parameters.isfinite().all():
        raise FloatingPointError("The calibration of the voxel head did not converge.")
    with torch.no_grad():
        scale, shift = parameters[0].exp(), parameters[1]
        head.weight.mul_(scale[:, None])
        head.bias.mul_(scale).add_(shift)


def fit_margins(model: DiffVPForDiagnosis, source: DiagnosisBatches, truth: Truth) -> dict[str, dict]:
    """
    Return `config.finding_attributes` with fitted margins for the labels that can have several places. The margin of a
    label maximizes the number of unseen cases with all places correct.
    """
    config = model.config
    located = [
        (case, {key: value.cpu() for key, value in model.classifier.locate(features).items()})
        for case, features in zip(source.cases, encoded(model, source), strict=True)
    ]
    fitted = {label: dict(wanted) for label, wanted in config.finding_attributes.items()}
    for label, wanted in fitted.items():
        if wanted.get("place") not in ("regions", "side"):
            continue
        index = config.diagnosis_labels.index(label)
        known = [
            (true_place(finding), found)
            for case, found in located
            for finding in truth.patients[case.name]
            if finding.label == label and true_place(finding)
        ]
        if not known:
            continue
        right = []
        margins = np.linspace(0.05, 5.0, 100)
        for margin in margins:
            wanted["margin"] = float(margin)
            config.finding_attributes = fitted
            right.append(sum(place == set(named_places(config, found, 0, index)) for place, found in known))
        best = np.flatnonzero(np.array(right) == max(right))
        wanted["margin"] = round(float(margins[best[len(best) // 2]]), 2)
    return fitted


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """Find the thresholds of all labels that maximize micro-F1 on cases that the classifier has not trained on.

    Thresholds are optimized in turn until none changes. With a separate optimum per label, a label that the classifier
    hardly recognizes would be predicted for every patient.
    """
    candidates = np.linspace(0.02, 0.98, 49)
    thresholds = np.full(labels.shape[1], 0.5)
    for _ in range(10):
        before = thresholds.copy()
        for column in range(labels.shape[1]):
            others = np.delete(probabilities >= thresholds, column, axis=1)
            hits = (others & np.delete(labels == 1, column, axis=1)).sum()
            predicted = probabilities[:, column, None] >= candidates
            hits = hits + (predicted & (labels[:, column, None] == 1)).sum(0)
            f1 = 2 * hits / np.maximum(others.sum() + predicted.sum(0) + labels.sum(), 1)
            best = np.flatnonzero(f1 >= f1.max() - 1e-9)
            # The middle of a plateau of best values is more robust than its edge.
            thresholds[column] = candidates[best[len(best) // 2]]
        if np.array_equal(before, thresholds):
            break
    return [round(float(value), 3) for value in thresholds]


def crossfitted_f1(probabilities: np.ndarray, labels: np.ndarray, patients: Sequence[str]) -> float | None:
    """
    Compute micro-F1 by two-fold cross-fitting: the thresholds for each half of the patients come from the other half.

    Args:
        probabilities, labels: (cases, labels).
        patients: patient of each case, (cases,).

    Returns:
        The score, or `None` for fewer than `FEWEST_SCORED` cases or a single patient.
    """
    if len(labels) < FEWEST_SCORED:
        return None
    order = {patient: number for number, patient in enumerate(dict.fromkeys(patients))}
    first = np.array([order[patient] % 2 == 0 for patient in patients])
    if first.all():
        return None
    predicted = np.zeros(labels.shape, bool)
    for half in (first, ~first):
        predicted[half] = probabilities[half] >= np.array(best_thresholds(probabilities[~half], labels[~half]))
    return micro_f1(predicted, labels)


def micro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Compute the micro-averaged F1 of two binary matrices (cases, labels)."""
    return float(2 * (predicted * labels).sum() / max(predicted.sum() + labels.sum(), 1))
