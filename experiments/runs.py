# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Models of a study and their reports on its test cases. Each is made once and shared by all tables.

    RUNS/STUDY/VARIANT/seed-21/                                 training run, as of `diffvp train`
    RESULTS/STUDY/reports/VARIANT/seed-21/random.json.gz        its reports on the test cases

Interrupted training resumes. Runs and reports made with other settings are refused. Reports are part of the results:
if they are stored, a table is made from them without training a model.
"""

import contextlib
import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch

from ..data.cache import VolumeCache
from ..data.cases import Case, first_reconstructions
from ..data.lesions import read_patients
from ..data.load import load_dataset_cases
from ..data.phantom import Finding
from ..data.pool import is_normal
from ..encoders_diffvp import state_sha256
from ..inference.report import load_checkpoint
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..processing_diffvp import DiffVPProcessor
from ..progress import counted
from ..provenance import compare, made_on, weights_sha256
from ..train_accelerate import load_classifier
from ..train_accelerate import run as run_training
from ..training.config import DataSection, TrainingConfig
from ..training.features import Features, make_features
from .references import choose_references, reference_pool
from .result_files import json_text, write_bytes, write_json
from .study import Condition, StudyConfig, Variant


class RunError(ValueError):
    """Stored runs or reports were made with other settings or other weights."""


@dataclass(frozen=True)
class Run:
    """A model of a study. `folder` holds the training output, `reports` the reports that the model writes."""

    study: StudyConfig
    variant: Variant
    key: str  # key of the variant
    seed: int
    folder: Path
    reports: Path

    @property
    def config(self) -> TrainingConfig:
        return self.study.training_config(self.variant, self.seed, self.folder)

    def train(self) -> None:
        """Train the model, or resume its training. Do nothing if it is finished.

        Raises:
            RunError: the folder holds a run with other settings.
        """
        settings = self.folder / "settings.json"
        wanted = self.config.of_the_result("report")
        if settings.is_file():
            differences = compare(json.loads(settings.read_text(encoding="utf-8")), wanted)
            if differences:
                raise RunError(
                    f"{self.folder} holds a run with other settings: {'; '.join(differences)}. Delete it, or choose "
                    "another folder of runs."
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(settings, wanted)
        if not self.trained:
            run_training(self.config)

    @property
    def trained(self) -> bool:
        """True if the model is trained."""
        return (self.folder / "model").is_dir()

    def reports_under(self, condition: Condition) -> Path:
        """Return the path of the reports under a condition. The file may not exist yet."""
        return self.reports / f"{condition.name}.json.gz"

    def load(self) -> tuple[DiffVPForConditionalGeneration, DiffVPProcessor]:
        """Load the model with LoRA merged, on a GPU if there is one. Train it first if necessary."""
        self.train()
        model, processor = load_checkpoint(self.folder / "model")
        model.merge_adapter()
        return model, processor

    def features(self, model: DiffVPForConditionalGeneration, processor: DiffVPProcessor) -> Features:
        """Return the frozen features, read through the caches of the training."""
        data = self.config.data
        return make_features(data, VolumeCache(data.cache_dir, processor.image_processor, data.spacing), model)


class HeldOut:
    """Test cases of a study and their references."""

    def __init__(self, study: StudyConfig):
        self.study = study
        self.data = DataSection.model_validate(study.training["data"])
        self.root = self.data.root

    @cached_property
    def cases(self) -> list[Case]:
        """First cases of the split.

        Raises:
            DatasetError: lists all problems of the data.
        """
        cases = load_dataset_cases(self.data.layout, self.root, self.study.test.split)
        if self.data.reconstructions == "first":
            cases = first_reconstructions(cases)
        return cases[: self.study.test.cases]

    @cached_property
    def foreign(self) -> list[Case]:
        """Cases of another scanner, which only some conditions need.

        Raises:
            ValueError: the study has no section `foreign`.
        """
        section = self.study.foreign
        if section is None:
            raise ValueError(f"study {self.study.name}: foreign: missing (expected data of another scanner)")
        return load_dataset_cases(section.layout, section.root, section.split)

    def cases_of(self, patients: str) -> list[Case]:
        """Return the tested cases: the study's ("own"), or those of another scanner ("foreign")."""
        return self.cases if patients == "own" else self.foreign[: self.study.test.cases]

    @cached_property
    def patients(self) -> dict[str, list[Finding]]:
        """Findings of each case, by its name. Only for a phantom cohort."""
        return read_patients(self.root)

    def references(self, condition: Condition, seed: int, features: Features) -> dict[str, list[Case]]:
        """Choose the references of each case, by its name.

        Raises:
            ValueError: the study lacks scans that the condition needs.
        """
        draw = seed if condition.draw is None else condition.draw
        foreign = [case for case in self.foreign if is_normal(case)] if condition.foreign else []
        pool = reference_pool(self.cases, condition, draw, foreign)
        pooled: dict[str, torch.Tensor] = {}

        def summary(case: Case) -> torch.Tensor:
            if case.name not in pooled:
                pooled[case.name] = features.load(case)["features"].float().mean(0)
            return pooled[case.name]

        def distance(case: Case, other: Case) -> float:
            return float((summary(case) - summary(other)).norm())

        return choose_references(self.cases_of(condition.patients), pool, condition, draw, distance)


def make_reports(run: Run, test: HeldOut, condition: Condition) -> dict:
    """Read the reports of a model on the test cases under a condition, or write them if there are none.

    Raises:
        RunError: the stored reports were made with other settings, cases or weights.
    """
    path = run.reports_under(condition)
    tested = test.cases_of(condition.patients)
    made_by = {
        "settings": run.config.of_the_result("report"),
        "frozen": frozen_sha256(run.study.training.get("classifier")),
        "condition": condition.model_dump(),
        "cases": cases_sha256(tested),
        "max_new_tokens": run.study.test.max_new_tokens,
    }
    if path.is_file():
        document = json.loads(gzip.decompress(path.read_bytes()))
        if run.trained:
            made_by["weights"] = weights_sha256(run.folder / "model")
        stored = {key: document["made_by"][key] for key in made_by}
        # Older reports lack newer fields.
        stored["condition"] = Condition.model_validate(stored["condition"]).model_dump()
        differences = compare(stored, made_by)
        if differences:
            raise RunError(
                f"{path} has other settings: {'; '.join(differences)}. Delete it, or choose another folder of results."
            )
        return document
    model, processor = run.load()
    features = run.features(model, processor)
    references = test.references(condition, run.seed, features)
    rows = []
    for cases in counted(batches(tested, run.study.test.batch_size), f"{run.key} {run.seed} {condition.name}"):
        inputs = model_inputs(model, features, cases, [references[case.name] for case in cases])
        with changed_prompt(model, condition.prompt):
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=run.study.test.max_new_tokens)
        texts = processor.batch_decode(ids, skip_special_tokens=True)
        rows += [
            {"id": case.name, "references": [r.name for r in references[case.name]], "report": text.strip()}
            for case, text in zip(cases, texts, strict=True)
        ]
    made_by["weights"] = weights_sha256(run.folder / "model")
    document = {"made_by": made_by, "made_on": made_on(), "reports": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, gzip.compress(json_text(document).encode(), mtime=0))
    return document


def cases_sha256(cases: Sequence[Case]) -> str:
    """Return the digest of names, reports and labels."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(case.identity)
    return digest.hexdigest()


@cache
def frozen_sha256(classifier: str | None) -> dict[str, str]:
    """Return the digests of the shared encoder and classifier; empty if each model trains its own."""
    if classifier is None:
        return {}
    return dict(zip(("encoder", "classifier"), map(state_sha256, load_classifier(classifier)), strict=True))


def batches(cases: Sequence[Case], size: int) -> list[list[Case]]:
    """Split cases into batches of 2 to `size`: shuffled prompts need a second patient in the batch."""
    count = -(-len(cases) // size)
    return [[cases[index] for index in part] for part in np.array_split(np.arange(len(cases)), count)]


def model_inputs(
    model: DiffVPForConditionalGeneration, features: Features, cases: Sequence[Case], references: Sequence[list[Case]]
) -> dict[str, torch.Tensor]:
    """Return the arguments of `generate`, from the caches."""
    inputs = scan_inputs(model, features, cases, references)
    if model.config.use_diagnosis:
        logits = torch.stack([features.load(case)["diagnosis_logits"] for case in cases])
        inputs["diagnosis_logits"] = logits.to(model.device)
    return inputs


def scan_inputs(
    model: DiffVPForConditionalGeneration, features: Features, cases: Sequence[Case], references: Sequence[list[Case]]
) -> dict[str, torch.Tensor]:
    """Return the features of scans and references, from the caches. Several references are averaged."""
    pairs = [features.inputs(case, of) for case, of in zip(cases, references, strict=True)]
    return {name: torch.stack([pair[name] for pair in pairs]).to(model.device) for name in pairs[0]}


@contextlib.contextmanager
def changed_prompt(model: DiffVPForConditionalGeneration, prompt: str) -> Iterator[None]:
    """Replace the difference prompts of a batch by those of other patients ("shuffled") or by zeros ("zeroed").

    Raises:
        ValueError: the model has no difference prompt.
    """
    if prompt == "own":
        yield
        return
    if model.prompt_generator is None:
        raise ValueError(f"prompt is {prompt!r}, but this model has no difference prompt")

    def change(module, inputs, own: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(own) if prompt == "zeroed" else own.roll(1, dims=0)

    hook = model.prompt_generator.register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()
