# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Frozen inputs of cases: encoder output and predicted findings, computed once and then read from the cache."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, Dataset

from ..data.cache import TensorCache, VolumeCache, encoder_recipe
from ..data.cases import Case, DatasetError, Problem
from ..data.regions import RegionMasks
from ..encoders_diffvp import state_sha256
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..progress import counted
from ..volume_diffvp import CTInputError
from .config import DataSection
from .encoder import read_features


class Features:
    """Frozen encoder output and diagnosis logits of cases, computed once and then read from the cache.

    The two are cached separately, so that models with the same encoder share its output even if their classifiers
    differ.

    Args:
        root: folder of all caches; these use `features/` and `diagnosis/`.
        regions: average the features within each region instead of returning one per voxel token.
        stored: folder of precomputed features; see [`read_features`].
    """

    def __init__(
        self,
        root: str | Path,
        volumes: VolumeCache,
        model: DiffVPForConditionalGeneration,
        regions: RegionMasks | None = None,
        stored: str | None = None,
    ):
        self.volumes, self.model, self.regions, self.stored = volumes, model, regions, stored
        recipe = {"preprocessing": volumes.recipe, **encoder_recipe(model)}
        self.cache = TensorCache(Path(root) / "features", recipe)
        self.logits = None
        if model.config.use_diagnosis:
            self.logits = TensorCache(Path(root) / "diagnosis", recipe | {"diagnosis": state_sha256(model.diagnosis)})

    def load(self, case: Case) -> dict[str, torch.Tensor]:
        """Return `features` (N, C), or (11, C) for regions; with a classifier, also `diagnosis_logits` (labels,)."""
        digest, model = self.volumes.digest(case), self.model

        @torch.no_grad()
        def compute(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
            # The cached volumes are in half precision, so that a hit and a miss give the same features.
            return {name: function(self.volumes.load(case)[None].float().to(model.device))[0]}

        if self.stored is None:
            frozen = self.cache.get(digest, lambda: compute("features", model.extract_features))
        else:
            shape = (math.prod(model.config.feature_grid), model.config.encoder_hidden_size)
            frozen = {"features": read_features(self.stored, case.name, shape)}
        if self.logits is not None:
            diagnose = partial(model.diagnose, ct_features=frozen["features"][None])
            frozen |= self.logits.get(digest, lambda: compute("diagnosis_logits", diagnose))
        if self.regions is not None:
            frozen["features"] = self.regions.pool(case, frozen["features"])
        return frozen

    def inputs(
        self, case: Case, references: Sequence[Case], frozen: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Return the inputs of `model.compare`, without a batch axis. Several references are averaged, except
        for the aligned difference, which gets all of them.

        Args:
            frozen: result of `load` for the case, if the caller has it, to avoid reading it twice.
        """
        if self.model.config.compares_voxels:
            names, load = ("ct", "reference"), lambda one: self.volumes.load(one).float()
            own = load(case)
        else:
            names, load = ("ct_features", "reference_features"), lambda one: self.load(one)["features"]
            own = load(case) if frozen is None else frozen["features"]
        several = torch.stack(list(map(load, references)))
        if self.model.config.difference_level != "aligned" or len(references) == 1:
            several = several.mean(0)
        return dict(zip(names, (own, several), strict=True))


def make_features(data: DataSection, volumes: VolumeCache, model: DiffVPForConditionalGeneration) -> Features:
    """
    Make the frozen features that a training file specifies.

    Raises:
        ValueError: precomputed features are given for a model with its own encoder.
    """
    if data.features is not None and model.config.encoder_type != "external":
        raise ValueError(
            f"data.features is {data.features} and model.encoder_type {model.config.encoder_type}; expected external"
        )
    regions = None
    if data.region_tokens:
        regions = RegionMasks(data.root, data.cache_dir, volumes, model.config.feature_grid)
    return Features(data.cache_dir, volumes, model, regions, data.features)


class _Loading(Dataset):
    def __init__(self, cases: list[Case], load: Callable[[Case], object]):
        self.cases, self.load = cases, load

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> list[Problem]:
        case = self.cases[index]
        try:
            self.load(case)
        except CTInputError as error:
            return [Problem(error.source, case.row, error.field, str(error.found), error.expected, case.name)]
        except DatasetError as error:
            return list(error.problems)
        return []


def compute_all(
    cases: list[Case],
    load: Callable[[Case], object],
    accelerator: Accelerator,
    description: str,
    skip: bool,
    workers: int = 0,
) -> list[Problem]:
    """
    Cache every case with `load`, divided over the processes, and return the problems of unreadable volumes.

    Args:
        skip: return the problems instead of raising them.
        workers: loading processes per process, for work that needs no GPU; 0 for none.

    Raises:
        DatasetError: volumes are unreadable, and `skip` is false. All other cases are cached by then.
    """
    problems = []
    share = cases[accelerator.process_index :: accelerator.num_processes]
    loading = DataLoader(_Loading(share, load), batch_size=None, num_workers=min(workers, len(share)))
    for problem in counted(loading, description, len(share), accelerator.is_main_process):
        problems += problem
    if accelerator.num_processes > 1:
        problems = gather_object(problems)
    if problems and not skip:
        raise DatasetError(problems)
    return problems
