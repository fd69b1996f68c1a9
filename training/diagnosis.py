# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Stage 1: the diagnosis classifier (appendix D)."""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..data.cache import TensorCache, VolumeCache
from ..data.cases import Case
from ..data.lesions import CELL, lesion_cells, lesion_mask_path, token_targets
from ..modeling_diffvp import DiffVPForDiagnosis
from .config import DiagnosisSection
from .loop import Split, Stage, in_order


def augment(
    volume: torch.Tensor, cells: torch.Tensor | None, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Shift by up to one lesion cell in depth and two in plane, mirror, and jitter density.

    Args:
        volume: (1, D, H, W).
        cells: its lesion cells (D / CELL, H / CELL, W / CELL), moved along; or `None`.
    """
    shift = tuple(int(step) for step in rng.integers(-2, 3, 3) // (2, 1, 1))
    mirror, gain = rng.random() < 0.5, float(rng.uniform(0.95, 1.05))
    volume = torch.roll(volume, [CELL * step for step in shift], dims=(1, 2, 3))
    volume = (((volume.flip(-1) if mirror else volume) + 1) * gain - 1).clamp(-1, 1)
    if cells is not None:
        cells = torch.roll(cells, shift, dims=(0, 1, 2))
        cells = cells.flip(-1) if mirror else cells
    return volume, cells


class DiagnosisObjective(torch.nn.Module):
    """
    BCE of the volume labels (appendix D), plus `lesion_loss_weight` times a balanced BCE of where the lesions lie.

    The second term has a linear head of its own, thrown away after training: what it leaves behind is an encoder that
    has seen lesions as such. Volume labels alone would need far more cases than two cores can train on, and the
    paper's encoder is pretrained too.
    """

    def __init__(self, model: DiffVPForDiagnosis, lesion_loss_weight: float):
        super().__init__()
        self.model = model
        self.lesion_loss_weight = lesion_loss_weight
        if lesion_loss_weight > 0:
            self.lesion_head = torch.nn.Linear(model.config.encoder_hidden_size, model.config.num_labels_diagnosis)

    def forward(
        self, ct: torch.Tensor, labels: torch.Tensor, cells: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Losses of a batch; `cells` as in [`augment`], of every case."""
        classifier = self.model.classifier
        features = classifier.vision_encoder(ct)
        logits, _ = classifier.classify(features)
        volume_loss = F.binary_cross_entropy_with_logits(logits, labels)
        if cells is None:
            return {"loss": volume_loss, "volume_loss": volume_loss}
        targets = token_targets(cells, self.model.config.feature_grid, labels.shape[1])
        token_losses = F.binary_cross_entropy_with_logits(self.lesion_head(features), targets, reduction="none")
        present, absent = targets.sum().clamp(min=1), (1 - targets).sum()
        lesion_loss = (token_losses * targets).sum() / present + (token_losses * (1 - targets)).sum() / absent
        return {
            "loss": volume_loss + self.lesion_loss_weight * lesion_loss,
            "volume_loss": volume_loss,
            "lesion_loss": lesion_loss,
        }


class Lesions:
    """The lesion cells of phantom cases, from their masks and by way of a cache; see [`lesion_cells`]."""

    def __init__(self, dataset: str | Path, cache_dir: str | Path, volumes: VolumeCache):
        self.dataset, self.volumes = dataset, volumes
        self.cache = TensorCache(Path(cache_dir) / "lesions", volumes.recipe)

    def load(self, case: Case) -> torch.Tensor:
        mask = lesion_mask_path(self.dataset, case.name)

        def compute() -> dict[str, torch.Tensor]:
            return {"cells": lesion_cells(mask, self.volumes.preprocess(case)["geometry"][0])}

        return self.cache.get(self.volumes.hashes(mask), compute)["cells"]


class DiagnosisSplit(Split):
    """Volumes and labels.

    Args:
        lesions: of training cases, where they are learnt, too.
        seed: of shuffling and augmentation; `None` for neither.
    """

    def __init__(self, cases: list[Case], volumes: VolumeCache, lesions: Lesions | None, seed: int | None):
        self.cases, self.volumes, self.lesions, self.seed = cases, volumes, lesions, seed

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
        cells = None if self.lesions is None else self.lesions.load(case)
        if self.seed is not None:
            key = hashlib.sha256(f"{self.seed}:{epoch}:{case.name}".encode()).digest()
            volume, cells = augment(volume, cells, np.random.default_rng(list(key)))
        sample = {"ct": volume, "labels": torch.from_numpy(case.labels).float()}
        return sample if cells is None else sample | {"cells": cells}

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return torch.utils.data.default_collate(samples)

    def losses(self, model: torch.nn.Module, batch: dict, step: np.ndarray) -> dict[str, torch.Tensor]:
        part = len(batch["ct"]) / len(step)
        return {name: value * part for name, value in model(**batch).items()}


class DiagnosisStage(Stage):
    """Args:
    volumes: of the cases.
    lesions: where the training file asks for them.
    """

    name = "diagnosis"

    def __init__(
        self,
        section: DiagnosisSection,
        model: DiffVPForDiagnosis,
        training: list[Case],
        validation: list[Case],
        volumes: VolumeCache,
        lesions: Lesions | None,
        seed: int,
    ):
        self.diagnosis = model
        # Channels last halves the time of a step on CPU, and is the layout of tensor cores.
        objective = DiagnosisObjective(model, section.lesion_loss_weight).to(memory_format=torch.channels_last_3d)
        self.labels = np.stack([case.labels for case in validation])
        start_at_prevalence(model, torch.from_numpy(np.stack([case.labels for case in training])).float())
        # Noisy-OR spreads the gradient of a label over hundreds of voxels, and a linear head on top of it hardly moves
        # at the encoder's learning rate.
        heads = [parameter for name, parameter in objective.named_parameters() if "head." in name]
        encoder = [parameter for name, parameter in objective.named_parameters() if "head." not in name]
        groups = [
            {"params": encoder, "lr": section.learning_rate},
            {"params": heads, "lr": section.head_learning_rate, "weight_decay": 0.0},
        ]
        super().__init__(
            section,
            objective,
            groups,
            DiagnosisSplit(training, volumes, lesions, seed),
            DiagnosisSplit(validation, volumes, None, None),
        )

    def metrics(self, epoch: int) -> dict[str, float]:
        predicted = predict(self.diagnosis, self.validation, self.section.batch_size)
        thresholds = np.array(best_thresholds(predicted, self.labels))
        return {
            "validation_f1": micro_f1(predicted >= 0.5, self.labels),
            "validation_f1_best_thresholds": micro_f1(predicted >= thresholds, self.labels),
        }


def start_at_prevalence(model: DiffVPForDiagnosis, labels: torch.Tensor) -> None:
    """Start from the prevalence of each label: with hundreds of voxels, a voxel logit of 0 would mean certainty."""
    prevalence = labels.mean(0).clamp(0.01, 0.99)
    voxels = math.prod(model.config.feature_grid)
    with torch.no_grad():
        model.classifier.head.bias.copy_(torch.logit(1 - (1 - prevalence) ** (1 / voxels)))


@torch.no_grad()
def predict(model: DiffVPForDiagnosis, split: DiagnosisSplit, batch_size: int) -> np.ndarray:
    """Probabilities of a split's cases, (cases, labels)."""
    model.eval()
    device = next(model.parameters()).device
    rows = []
    for indices in split.batches(0, batch_size):
        ct = torch.stack([split.sample(int(index), 0)["ct"] for index in indices]).to(device)
        rows.append(model(ct).logits.float().sigmoid().cpu())
    return torch.cat(rows).numpy()


def best_thresholds(probabilities: np.ndarray, labels: np.ndarray) -> list[float]:
    """The threshold of each label that together give the highest micro-F1 on cases that did not train the classifier.

    One label after another until none changes. Each label for itself would rather be said of every patient than be
    missed, where the classifier knows little of it.
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
            # The middle of a plateau of best values is less of an accident than its edge.
            thresholds[column] = candidates[best[len(best) // 2]]
        if np.array_equal(before, thresholds):
            break
    return [round(float(value), 3) for value in thresholds]


def micro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Micro-averaged F1 of two binary matrices (cases, labels)."""
    return float(2 * (predicted * labels).sum() / max(predicted.sum() + labels.sum(), 1))
