# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Train DiffVP in the paper's two stages (appendix D): the diagnosis classifier, then report generation.

    diffvp train configs/phantom.yaml                      # both stages
    diffvp train configs/phantom.yaml stage=report seed=1  # one stage, with an override

Stage 1 trains a 3D ResNet-18 on the 18 labels. Its backbone also becomes the frozen visual encoder unless
`encoder_weights` names another. Stage 2 caches what is frozen (voxel features, predicted findings) once per volume and
trains resampler, deltas, prompt generator, projection, auxiliary head and LoRA.
"""

import json
import logging
import math
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict
from rich.progress import track
from safetensors.torch import load_file
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup

from .checkpoint_diffvp import locate_base_model
from .configuration_diffvp import DiffVPConfig
from .data.cache import TensorCache, VolumeCache, preprocessing, state_sha256
from .data.lesions import CELL, lesion_cells, lesion_mask_path, token_targets
from .data.pairing import chance, pair_reference
from .data.radgenome import Case, load_cases, normal_pool
from .modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis
from .processing_diffvp import DiffVPImageProcessor, DiffVPProcessor

logger = logging.getLogger(__name__)

CERTAIN = 30.0  # logit of a finding that is known


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSection(_Section):
    root: str
    cache_dir: str
    diagnosis_cases: tuple[int, int]
    validation_cases: tuple[int, int]
    report_cases: tuple[int, int]


class BaseSection(_Section):
    name: str
    revision: str | None = None
    gguf_file: str | None = None


class DiagnosisSection(_Section):
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    head_learning_rate: float
    lesion_loss_weight: float = 0.0  # above 0: also learn where findings lie, from lesion masks (phantoms only)


class ReportSection(_Section):
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    lora_learning_rate: float
    max_report_tokens: int
    true_findings: float = 0.0  # share of training prompts that name the true findings, not the predicted ones


class TrainingConfig(_Section):
    """A training run; the YAML files under `configs/` explain the fields."""

    output_dir: str
    seed: int
    stage: Literal["all", "diagnosis", "report"] = "all"
    data: DataSection
    image_processor: dict
    base: BaseSection
    model: dict
    encoder_weights: str | None = None
    lora: dict | None = None
    diagnosis: DiagnosisSection
    report: ReportSection

    @classmethod
    def load(cls, path: str, overrides: list[str] | None = None) -> "TrainingConfig":
        """Read a YAML file; each override is `key=value` or `section.key=value`, the value in YAML."""
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
        for override in overrides or []:
            dotted, separator, value = override.partition("=")
            if not separator:
                raise ValueError(f"Override {override!r} is not of the form key=value.")
            *sections, key = dotted.split(".")
            target = values
            for section in sections:
                target = target[section]
            target[key] = yaml.safe_load(value)
        return cls.model_validate(values)


def load_lesions(root: str, case: Case, image_processor: DiffVPImageProcessor, cache: TensorCache) -> torch.Tensor:
    """The bit-coded lesion cells of a case, see [`lesion_cells`]."""
    mask = lesion_mask_path(root, case.name)
    return cache.get(mask, lambda: {"cells": lesion_cells(mask, image_processor(case.volume)["geometry"][0])})["cells"]


def check_disjoint(data: DataSection) -> None:
    """Refuse spans of cases that overlap: what is validated or prompted must be unseen by what trained on it."""
    spans = sorted((data.diagnosis_cases, data.validation_cases, data.report_cases))
    for (_, stop), (start, _) in zip(spans, spans[1:], strict=False):
        if start < stop:
            raise ValueError(f"data.diagnosis_cases, validation_cases and report_cases overlap at case {start}.")


def one_process() -> Accelerator:
    """An accelerator of a single process.

    Raises:
        ValueError: launched in several, each of which would train on the same batches and write the same files.
    """
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"Training runs in one process; it was launched in {accelerator.num_processes}.")
    return accelerator


def select(cases: list[Case], span: tuple[int, int], name: str) -> list[Case]:
    """The cases at positions [start, stop) of the split."""
    start, stop = span
    if not 0 <= start < stop <= len(cases):
        raise ValueError(f"data.{name} is [{start}, {stop}], but the split has {len(cases)} cases.")
    return cases[start:stop]


class Log:
    """One JSON line per event, to a file and to the console."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.start = time.monotonic()

    def __call__(self, **values) -> None:
        values = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps({"seconds": round(time.monotonic() - self.start, 1), **values})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        logger.info(line)


def augment(
    volumes: torch.Tensor, cells: torch.Tensor | None, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Shift by up to one lesion cell in depth and two in plane, mirror, and jitter density.

    Args:
        volumes: (batch, 1, D, H, W).
        cells: their lesion cells (batch, D / CELL, H / CELL, W / CELL), moved along; or `None`.
    """
    moved, moved_cells = [], []
    for index, volume in enumerate(volumes):
        shift = tuple(int(step) for step in rng.integers(-2, 3, 3) // (2, 1, 1))
        mirror = rng.random() < 0.5
        volume = torch.roll(volume, [CELL * step for step in shift], dims=(1, 2, 3))
        moved.append(volume.flip(-1) if mirror else volume)
        if cells is not None:
            rolled = torch.roll(cells[index], shift, dims=(0, 1, 2))
            moved_cells.append(rolled.flip(-1) if mirror else rolled)
    gain = torch.as_tensor(rng.uniform(0.95, 1.05, (len(volumes), 1, 1, 1, 1)), dtype=volumes.dtype)
    augmented = ((torch.stack(moved) + 1) * gain - 1).clamp(-1, 1)
    return augmented, torch.stack(moved_cells) if moved_cells else None


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
        self.lesion_head = torch.nn.Linear(model.config.encoder_hidden_size, model.config.num_labels_diagnosis)

    def forward(self, ct: torch.Tensor, labels: torch.Tensor, cells: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Losses of a batch; `cells` as in [`augment`]."""
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
    return float(2 * (predicted * labels).sum() / max(predicted.sum() + labels.sum(), 1))


def train_diagnosis(config: TrainingConfig) -> Path:
    """Stage 1. Writes `<output_dir>/diagnosis` and returns it."""
    accelerator = one_process()
    set_seed(config.seed)
    output = Path(config.output_dir) / "diagnosis"
    log = Log(Path(config.output_dir) / "diagnosis.jsonl")
    image_processor = DiffVPImageProcessor(**config.image_processor)
    cache = VolumeCache(config.data.cache_dir, image_processor)
    cases = load_cases(config.data.root, "train")
    splits = {}
    for name, span in (("train", config.data.diagnosis_cases), ("validation", config.data.validation_cases)):
        chosen = select(cases, span, name)
        volumes = torch.stack([cache.load(case.volume) for case in track(chosen, f"Volumes, {name}")])
        splits[name] = volumes, torch.from_numpy(np.stack([case.labels for case in chosen])).float()
    volumes, labels = splits["train"]
    section, cells = config.diagnosis, None
    if section.lesion_loss_weight > 0:
        chosen = select(cases, config.data.diagnosis_cases, "diagnosis_cases")
        lesions = TensorCache(Path(config.data.cache_dir) / "lesions", preprocessing(image_processor))
        masks = [load_lesions(config.data.root, case, image_processor, lesions) for case in track(chosen, "Lesions")]
        cells = torch.stack(masks)

    # Channels last halves the time of a step on CPU, and is the layout of tensor cores.
    model = DiffVPForDiagnosis(DiffVPConfig(**config.model)).to(memory_format=torch.channels_last_3d)
    # Start from the labels' prevalence: with hundreds of voxels, a voxel logit of 0 would mean certainty.
    prevalence = labels.mean(0).clamp(0.01, 0.99)
    voxels = math.prod(model.config.feature_grid)
    voxel_probability = 1 - (1 - prevalence) ** (1 / voxels)
    with torch.no_grad():
        model.classifier.head.bias.copy_(torch.logit(voxel_probability))

    objective = DiagnosisObjective(model, section.lesion_loss_weight)
    steps_per_epoch = math.ceil(len(volumes) / section.batch_size)
    # Noisy-OR spreads the gradient of a label over hundreds of voxels, and a linear head on top of it hardly moves at
    # the encoder's learning rate.
    heads = [parameter for name, parameter in objective.named_parameters() if "head." in name]
    encoder = [parameter for name, parameter in objective.named_parameters() if "head." not in name]
    optimizer = torch.optim.AdamW(
        [
            {"params": encoder, "lr": section.learning_rate},
            {"params": heads, "lr": section.head_learning_rate, "weight_decay": 0.0},
        ],
        weight_decay=section.weight_decay,
    )
    total = steps_per_epoch * section.epochs
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(section.warmup_ratio * total), total)
    objective, optimizer = accelerator.prepare(objective, optimizer)
    for epoch in range(section.epochs):
        rng = np.random.default_rng([config.seed, epoch])
        order = rng.permutation(len(volumes))
        objective.train()
        losses = []
        for step in track(range(steps_per_epoch), f"Diagnosis, epoch {epoch + 1}/{section.epochs}"):
            chosen = order[step * section.batch_size : (step + 1) * section.batch_size]
            batch, batch_cells = augment(volumes[chosen].float(), None if cells is None else cells[chosen], rng)
            step_losses = objective(
                batch.to(accelerator.device),
                labels[chosen].to(accelerator.device),
                None if batch_cells is None else batch_cells.to(accelerator.device),
            )
            accelerator.backward(step_losses["loss"])
            accelerator.clip_grad_norm_(objective.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append({name: value.item() for name, value in step_losses.items()})
            if len(losses) % 25 == 0:
                log(stage="diagnosis", epoch=epoch + 1, step=len(losses), **_mean(losses[-25:]))
        predicted = predict(model, splits["validation"][0], section.batch_size)
        truth = splits["validation"][1].numpy()
        thresholds = best_thresholds(predicted, truth)
        log(
            stage="diagnosis",
            epoch=epoch + 1,
            **_mean(losses),
            validation_f1=micro_f1(predicted >= 0.5, truth),
            validation_f1_best_thresholds=micro_f1(predicted >= np.array(thresholds), truth),
        )
        model.save_pretrained(output)
    return output


def _mean(losses: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([loss[name] for loss in losses])) for name in losses[0]}


@torch.no_grad()
def predict(model: torch.nn.Module, volumes: torch.Tensor, batch_size: int) -> np.ndarray:
    """Probabilities of a diagnosis model, (cases, labels)."""
    model.eval()
    device = next(model.parameters()).device
    return torch.cat(
        [model(batch.float().to(device)).logits.sigmoid().cpu() for batch in volumes.split(batch_size)]
    ).numpy()


def build_generator(config: TrainingConfig) -> tuple[DiffVPForConditionalGeneration, DiffVPProcessor]:
    """A model for stage 2 with the classifier of stage 1 inside, and its processor."""
    path, gguf_file = locate_base_model(config.base.name, config.base.revision, config.base.gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(path, **({"gguf_file": gguf_file} if gguf_file else {}))
    processor = DiffVPProcessor(DiffVPImageProcessor(**config.image_processor), tokenizer)
    model = DiffVPForConditionalGeneration.from_base(
        config.base.name,
        base_model_revision=config.base.revision,
        base_model_gguf_file=config.base.gguf_file,
        lora_config=LoraConfig(task_type="CAUSAL_LM", **config.lora) if config.lora else None,
        config={
            **config.model,
            "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(tokenizer),
            "instruction": processor.instruction,
            "instruction_ids": processor(text=processor.instruction)["input_ids"][0].tolist(),
        },
        dtype=torch.float32,
    )
    classifier = DiffVPForDiagnosis.from_pretrained(Path(config.output_dir) / "diagnosis").classifier
    model.diagnosis.load_state_dict(classifier.state_dict())
    if config.encoder_weights is None:
        model.vision_encoder.load_state_dict(classifier.vision_encoder.state_dict())
    else:
        model.vision_encoder.load_state_dict(load_file(config.encoder_weights))
    model.generation_config.update(do_sample=False, max_new_tokens=config.report.max_report_tokens)
    return model, processor


def cached_features(
    cases: list[Case], config: TrainingConfig, model: DiffVPForConditionalGeneration, processor: DiffVPProcessor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frozen encoder output (cases, N, C) and diagnosis logits (cases, labels) of each case, computed once."""
    volumes = VolumeCache(config.data.cache_dir, processor.image_processor)
    recipe = {
        "preprocessing": preprocessing(processor.image_processor),
        "encoder": state_sha256(model.vision_encoder),
        "diagnosis": state_sha256(model.diagnosis),
    }
    cache = TensorCache(Path(config.data.cache_dir) / "features", recipe)

    def compute(case: Case) -> dict[str, torch.Tensor]:
        ct = volumes.load(case.volume)[None].float().to(model.device)
        return {"features": model.extract_features(ct)[0].cpu(), "diagnosis_logits": model.diagnose(ct)[0].cpu()}

    entries = [cache.get(case.volume, lambda case=case: compute(case)) for case in track(cases, "Features")]
    return torch.stack([e["features"] for e in entries]), torch.stack([e["diagnosis_logits"] for e in entries])


class ReportBatches:
    """Batches of cached features and tokens; the order, the pairing and whose prompts are true depend on (seed, epoch,
    case) alone.

    Args:
        true_findings: share of prompts that name the true findings. A classifier that errs teaches the language model
            to pass over its prompt, and then the few cases of a small cohort do not teach it to follow.
    """

    def __init__(
        self,
        cases: list[Case],
        pool: list[Case],
        features: torch.Tensor,
        logits: torch.Tensor,
        processor: DiffVPProcessor,
        config: TrainingConfig,
        true_findings: float = 0.0,
    ):
        self.cases, self.features, self.logits, self.config = cases, features, logits, config
        self.true_findings = true_findings
        self.position = {case.name: index for index, case in enumerate(cases)}
        self.pool = [case.name for case in pool if case.name in self.position]
        self.instruction = processor(text=processor.instruction)["input_ids"][0].tolist()
        limit = config.report.max_report_tokens
        self.reports = [processor.encode_report(case.report, max_length=limit) for case in cases]
        self.pad = processor.tokenizer.pad_token_id

    def epoch(self, epoch: int, *, shuffle: bool) -> list[np.ndarray]:
        """Case indices by batch, reports of like length together."""
        order = np.arange(len(self.cases))
        size = self.config.report.batch_size
        if not shuffle:
            return np.split(order, range(size, len(order), size))
        rng = np.random.default_rng([self.config.seed, epoch])
        lengths = np.array([len(report) for report in self.reports])
        order = np.argsort(lengths + rng.uniform(0, 30, len(order)), kind="stable")
        batches = np.split(order, range(size, len(order), size))
        return [batches[index] for index in rng.permutation(len(batches))]

    def batch(self, indices: np.ndarray, epoch: int) -> dict[str, torch.Tensor]:
        names = [self.cases[i].name for i in indices]
        references = [pair_reference(name, self.pool, self.config.seed, epoch) for name in names]
        diagnosis_labels = torch.from_numpy(np.stack([self.cases[i].labels for i in indices])).float()
        true = torch.tensor([chance(f"{self.config.seed}:{epoch}:{name}") < self.true_findings for name in names])
        rows = [self.instruction + self.reports[i] for i in indices]
        length = max(map(len, rows))
        input_ids = torch.full((len(rows), length), self.pad)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, ids in enumerate(rows):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
            labels[row, len(self.instruction) : len(ids)] = torch.tensor(ids[len(self.instruction) :])
        return {
            "ct_features": self.features[indices],
            "reference_features": self.features[[self.position[name] for name in references]],
            "diagnosis_logits": torch.where(true[:, None], CERTAIN * (2 * diagnosis_labels - 1), self.logits[indices]),
            "diagnosis_labels": diagnosis_labels,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
        }


def train_report(config: TrainingConfig) -> Path:
    """Stage 2. Writes `<output_dir>/model` (the epoch with the lowest validation loss) and returns it."""
    accelerator = one_process()
    set_seed(config.seed)
    output = Path(config.output_dir) / "model"
    log = Log(Path(config.output_dir) / "report.jsonl")
    model, processor = build_generator(config)
    model.to(accelerator.device)  # before the caches, which it computes
    cases = load_cases(config.data.root, "train")
    normal = normal_pool(cases)
    train_cases = select(cases, config.data.report_cases, "report_cases")
    validation_cases = select(cases, config.data.validation_cases, "validation_cases")
    features, logits = cached_features(train_cases, config, model, processor)
    truth = np.stack([case.labels for case in train_cases])
    model.config.diagnosis_threshold = best_thresholds(logits.sigmoid().numpy(), truth)
    batches = ReportBatches(
        train_cases, normal, features, logits, processor, config, true_findings=config.report.true_findings
    )
    validation = ReportBatches(
        validation_cases, normal, *cached_features(validation_cases, config, model, processor), processor, config
    )
    predicted = logits.sigmoid().numpy() >= np.array(model.config.diagnosis_threshold)
    log(stage="report", pool=len(batches.pool), diagnosis_f1_of_prompts=micro_f1(predicted, truth))

    section = config.report
    lora = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith("language_model.")]
    own = [p for n, p in model.named_parameters() if p.requires_grad and not n.startswith("language_model.")]
    optimizer = torch.optim.AdamW(
        [{"params": own, "lr": section.learning_rate}, {"params": lora, "lr": section.lora_learning_rate}],
        weight_decay=section.weight_decay,
    )
    total = section.epochs * len(batches.epoch(0, shuffle=True))
    scheduler = get_cosine_schedule_with_warmup(optimizer, int(section.warmup_ratio * total), total)
    model, optimizer = accelerator.prepare(model, optimizer)
    best = math.inf
    for epoch in range(section.epochs):
        model.train()
        losses = []
        for indices in track(batches.epoch(epoch, shuffle=True), f"Report, epoch {epoch + 1}/{section.epochs}"):
            batch = {key: value.to(accelerator.device) for key, value in batches.batch(indices, epoch).items()}
            result = model(**batch)
            accelerator.backward(result.loss)
            accelerator.clip_grad_norm_(own + lora, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(result.generation_loss.item())
            if len(losses) % 20 == 0:
                log(stage="report", epoch=epoch + 1, step=len(losses), loss=float(np.mean(losses[-20:])))
        model.eval()
        with torch.no_grad():
            scored = [
                model(**{k: v.to(accelerator.device) for k, v in validation.batch(indices, 0).items()})
                for indices in validation.epoch(0, shuffle=False)
            ]
        loss = float(np.mean([result.generation_loss.item() for result in scored]))
        log(stage="report", epoch=epoch + 1, loss=float(np.mean(losses)), validation_loss=loss)
        if loss < best:
            best = loss
            accelerator.unwrap_model(model).save_pretrained(output)
            processor.save_pretrained(output)
    return output


def run(config: TrainingConfig) -> None:
    """Run the stages that the configuration asks for.

    Raises:
        ValueError: the configuration contradicts itself or the data.
    """
    check_disjoint(config.data)
    if config.stage in ("all", "diagnosis"):
        train_diagnosis(config)
    if config.stage in ("all", "report"):
        train_report(config)
