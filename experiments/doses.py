# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Phantom patients compared with references that come closer and closer to them.

The phantoms are rendered here, from a seed of their own, because the last two references exist for no patient: his
earlier, healthy scan and the exact twin without findings. Each patient is encoded and compared once and kept on disk,
so that an interrupted run resumes.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import nibabel as nib
import torch

from ..data.cache import TensorCache, encoder_recipe, preprocessing
from ..data.cases import chance
from ..data.phantom import RENDERING, PhantomPatient, earlier_scan, render_patient, sample_patient, without_findings
from ..encoders_diffvp import raw_bytes
from ..inference.report import load_checkpoint
from ..progress import counted
from .processes import completed, worker_processes

# References, from the farthest to the closest. Normal ones are other patients of the pool, without their findings.
RANDOM, BODY, NEAREST, EARLIER, TWIN = ARMS = (
    "random normal",
    "same body",
    "nearest of the pool",
    "earlier scan",
    "exact twin",
)
# Controls: zeros for the reference (half the visual work), and second scans that are no normal reference.
ZEROS, ITSELF, ABNORMAL = CONTROLS = ("zeros", "the scan itself", "another patient")
DRAWN = {RANDOM, ABNORMAL}  # one for each seed; the others are unique
# Increased with every change of the stored tensors.
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Doses:
    """
    Settings of the comparisons.

    Attributes:
        checkpoint: folder of the model; only its frozen encoder, its classifier and the whitening of the aligned
            difference are used here.
        cache: folder for the results.
        seed: seed of the phantoms.
        pool: number of patients of the pool.
        draws: seeds of the references that are drawn.
        matrix: pixels per row and column of a phantom's slices.
    """

    checkpoint: str
    cache: str
    seed: int
    pool: int
    draws: tuple[int, ...]
    matrix: int = 144

    def patients(self, split: str, count: int) -> list[PhantomPatient]:
        """Draw the first patients of a split: "train", "valid" or "pool"."""
        return [sample_patient(self.seed, index, split) for index in range(count)]


def arm_key(name: str, draw: int) -> str:
    """Return the key of a reference in the result of [`Comparer`]."""
    return f"{name}, {draw}" if name in DRAWN else name


class Comparer:
    """
    Comparisons of patients with all references.

    Args:
        model, processor: a loaded checkpoint with an aligned difference.
    """

    def __init__(self, doses: Doses, model, processor):
        self.doses, self.model, self.processor = doses, model, processor
        difference = model.aligned_difference
        recipe = {
            "version": VERSION,
            "rendering": RENDERING,
            "matrix": doses.matrix,
            "preprocessing": preprocessing(processor.image_processor),
            **encoder_recipe(model),
        }
        self.tokens = TensorCache(Path(doses.cache) / "dose_pool", recipe)
        recipe |= {
            "whitening": hashlib.sha256(raw_bytes(difference.whitening)).hexdigest(),
            "mean": hashlib.sha256(raw_bytes(difference.mean)).hexdigest(),
            "classifier": hashlib.sha256(raw_bytes(model.diagnosis.head.weight)).hexdigest(),
            "settings": [difference.radius, difference.temperature, difference.num_places],
            "pool": [doses.seed, doses.pool, list(doses.draws)],
        }
        self.comparisons = TensorCache(Path(doses.cache) / "dose_comparisons", recipe)

    @cached_property
    def pool(self) -> list[PhantomPatient]:
        return self.doses.patients("pool", self.doses.pool)

    def volume(self, patient: PhantomPatient) -> torch.Tensor:
        """Render a patient: the model's input, (1, 1, D, H, W)."""
        scan = render_patient(patient, matrix=self.doses.matrix)
        return self.processor.image_processor(nib.Nifti1Image(scan.hu, scan.affine))["ct"]

    def encode(self, patient: PhantomPatient) -> torch.Tensor:
        """Render and encode a patient: voxel tokens (N, C)."""
        return self.model.extract_features(self.volume(patient))[0].float()

    def encode_of_pool(self, patient: PhantomPatient) -> torch.Tensor:
        """Return [`encode`] of a scan of the pool, from the cache."""
        return self.tokens.get(_digest(patient), lambda: {"tokens": self.encode(patient)})["tokens"]

    @cached_property
    def normal_means(self) -> dict[str, torch.Tensor]:
        """Mean tokens of the normal references, by name, as `diffvp batch --reference nearest` compares them."""
        return {one.name: self.encode_of_pool(without_findings(one)).mean(0) for one in self.pool}

    def references(self, patient: PhantomPatient, own: torch.Tensor) -> dict[str, PhantomPatient]:
        """
        Choose the references from the pool.

        Args:
            own: voxel tokens of the patient, (N, C).
        """

        def drawn(candidates: Iterable[PhantomPatient], draw: int, what: str) -> PhantomPatient:
            return min(candidates, key=lambda one: chance(f"{draw}:{what}:{patient.name}:{one.name}"))

        others = [one for one in self.pool if one.name != patient.name]
        normal = [without_findings(one) for one in others]
        abnormal = [one for one in others if one.findings]
        mean = own.mean(0)
        chosen = {
            BODY: min(normal, key=lambda one: body_distance(patient, one)),
            NEAREST: min(normal, key=lambda one: float(torch.dist(self.normal_means[one.name], mean))),
        }
        for draw in self.doses.draws:
            chosen[arm_key(RANDOM, draw)] = drawn(normal, draw, "normal")
            chosen[arm_key(ABNORMAL, draw)] = drawn(abnormal, draw, "abnormal")
        return chosen

    def compare(self, patient: PhantomPatient) -> dict[str, torch.Tensor]:
        """
        Compare a patient with all references, or read the result.

        Returns:
            "scan" (3, C): mean, maximum and minimum over the whitened tokens of the scan. "logits" (labels,): the
            classifier's. For each reference: "KEY: residual" (3, C), the same of the residual; "KEY: pair" (2, K, C),
            the tokens of scan and aligned reference at its K peaks; "KEY: places" (K,).
        """
        return self.comparisons.get(_digest(patient), lambda: self._compare(patient))

    @torch.no_grad()
    def _compare(self, patient: PhantomPatient) -> dict[str, torch.Tensor]:
        seen = self.model.encode_inputs(ct=self.volume(patient))
        own = seen["ct_features"][0].float()
        difference = self.model.aligned_difference
        references = {
            ITSELF: own,
            EARLIER: self.encode(earlier_scan(patient)),
            TWIN: self.encode(without_findings(patient)),
        }
        chosen = self.references(patient, own)
        references |= {key: self.encode_of_pool(one) for key, one in chosen.items()}
        found = {"logits": seen["diagnosis_logits"][0].float()}
        white = None
        for key, reference in references.items():
            white, aligned = difference.align(own[None], reference[None])
            found |= _summary(key, difference, white, aligned)
        found |= _summary(ZEROS, difference, white, torch.zeros_like(white))
        return found | {"scan": _pooled(white)}


def body_distance(patient: PhantomPatient, other: PhantomPatient) -> tuple[bool, float]:
    """Return a sort key: another sex last, then the distance in width, depth and height of the body in mm."""
    a, b = patient.anatomy, other.anatomy
    sizes = [(a.half_width, b.half_width), (a.half_depth, b.half_depth), (a.lung_height, b.lung_height)]
    return patient.sex != other.sex, sum((one - two) ** 2 for one, two in sizes)


def _pooled(volume: torch.Tensor) -> torch.Tensor:
    """Whitened tokens (1, C, *grid) → mean, maximum and minimum, (3, C)."""
    tokens = volume[0].flatten(1)
    return torch.stack([tokens.mean(1), tokens.amax(1), tokens.amin(1)])


def _summary(key: str, difference, white: torch.Tensor, aligned: torch.Tensor) -> dict[str, torch.Tensor]:
    places = difference.peaks(white - aligned)[0]
    pair = [volume[0].flatten(1).T[places[0]] for volume in (white, aligned)]
    return {
        f"{key}: residual": _pooled(white - aligned),
        f"{key}: pair": torch.stack(pair),
        f"{key}: places": places[0].to(torch.int32),
    }


def _digest(patient: PhantomPatient) -> str:
    return hashlib.sha256(json.dumps(patient.to_dict(), sort_keys=True).encode()).hexdigest()


def compare_all(doses: Doses, patients: Sequence[PhantomPatient], workers: int, comparer: Comparer) -> list[dict]:
    """
    Compare all patients in several processes, in the given order.

    Args:
        comparer: that of this process, which reads the results.
    """
    pool = [scan for one in comparer.pool for scan in (without_findings(one), one)]
    if workers == 1:
        for scan in pool:
            comparer.encode_of_pool(scan)
        return [comparer.compare(patient) for patient in counted(patients, "Patients")]
    with worker_processes(workers, initializer=_start, initargs=(doses,)) as processes:
        for function, scans, title in ((_encode, pool, "Pool"), (_compare, patients, "Patients")):
            tasks = [(function, scan) for scan in scans]
            for future in counted(completed(processes, tasks, workers), title, len(tasks)):
                future.result()
    return [comparer.compare(patient) for patient in patients]


_COMPARER: list[Comparer] = []  # of a worker process


def _start(doses: Doses) -> None:
    torch.set_num_threads(1)
    _COMPARER.append(Comparer(doses, *load_checkpoint(doses.checkpoint, "cpu")))


def _encode(patient: PhantomPatient) -> None:
    _COMPARER[0].encode_of_pool(patient)


def _compare(patient: PhantomPatient) -> None:
    _COMPARER[0].compare(patient)
