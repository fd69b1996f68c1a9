# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Stage 2: report generation, on frozen features and predicted findings."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, BitsAndBytesConfig

from ..checkpoint_diffvp import BASE_PREFIX
from ..collator_diffvp import DiffVPDataCollator, pair_reference
from ..configuration_diffvp import DiffVPConfig
from ..data.cases import Case, Problem
from ..data.pairing import chance
from ..data.pool import other_scans
from ..drafts_diffvp import ReportDrafts
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..processing_diffvp import DiffVPProcessor
from .cohort import Cohort, Features
from .config import BaseSection, ReportSection
from .loop import Split, Stage, by_length, in_order

CERTAIN = 30.0  # logit of a finding that is known


class BaseModelError(ValueError):
    """The base LLM is not the one that the training file describes."""


def quantization(base: BaseSection) -> dict:
    """Loading options of the LLM for a base in 4 or 8 bits (QLoRA's: NF4, double quantisation)."""
    if base.quantization is None:
        return {}
    if base.quantization == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, base.dtype),
        )
    }


def check_base(config: AutoConfig, expected: dict | None) -> None:
    """
    Raises:
        BaseModelError: a field of the LLM's configuration is not what the training file expects.
    """
    for key, value in (expected or {}).items():
        found = getattr(config, key, None)
        if found != value:
            raise BaseModelError(f"The base LLM has {key}={found}; base.expected_config says {value}.")


class ReportSplit(Split):
    """
    Frozen features, findings and tokens; the order, the pairing and whose prompts are true depend on (seed, epoch,
    case) alone.

    Args:
        cases, pool: targets and normal references.
        features: where both have their frozen features.
        max_tokens: longest report with its end token; longer ones are cut, which `check_reports` can forbid before.
        seed: of shuffling and pairing.
        shuffle: draw the order and the references anew in each epoch, as training does.
        true_findings: share of prompts that name the true findings. A classifier that errs teaches the language model
            to pass over its prompt, and then the few cases of a small cohort do not teach it to follow. (Where both
            stages train on the same cases, as in the paper, predictions are nearly true in training by themselves.)
    """

    def __init__(
        self,
        cases: list[Case],
        pool: list[Case],
        features: Features,
        processor: DiffVPProcessor,
        *,
        max_tokens: int,
        seed: int,
        shuffle: bool,
        true_findings: float = 0.0,
    ):
        self.cases, self.pool, self.features = cases, {case.name: case for case in pool}, features
        self.seed, self.shuffle, self.true_findings = seed, shuffle, true_findings
        self.collator = DiffVPDataCollator(processor)
        self.reports = [processor.encode_report(case.report, max_length=max_tokens, truncation=True) for case in cases]
        self.config = features.model.config
        # One model without labels in some cases would learn eq. 11 from the others alone.
        self.labelled = all(case.labels is not None for case in cases)
        if true_findings > 0 and not self.labelled:
            raise ValueError(f"report.true_findings is {true_findings}, but not all cases have labels; expected 0")

    def __len__(self) -> int:
        return len(self.cases)

    def batches(self, epoch: int, size: int) -> list[np.ndarray]:
        if not self.shuffle:
            return in_order(len(self.cases), size)
        rng = np.random.default_rng([self.seed, epoch])
        return by_length([len(report) for report in self.reports], size, rng)

    def reference(self, index: int, epoch: int) -> Case:
        """The normal reference of a case in an epoch."""
        case = self.cases[index]
        candidates = other_scans(case, list(self.pool.values()))
        return self.pool[pair_reference(case.name, candidates, self.seed, epoch)]

    def sample(self, index: int, epoch: int) -> dict:
        case, reference = self.cases[index], self.reference(index, epoch)
        frozen = self.features.load(case)
        sample = {"report": self.reports[index], **self.features.inputs(case, [reference], frozen)}
        if self.labelled:
            sample["diagnosis_labels"] = torch.from_numpy(case.labels).float()
        if "diagnosis_logits" in frozen:
            sample["diagnosis_logits"] = frozen["diagnosis_logits"]
            if self.true_findings and chance(f"{self.seed}:{epoch}:{case.name}") < self.true_findings:
                sample["diagnosis_logits"] = CERTAIN * (2 * sample["diagnosis_labels"] - 1)
        return sample

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        return self.collator(samples)

    def losses(self, model: torch.nn.Module, batch: dict, step: np.ndarray) -> dict[str, torch.Tensor]:
        """Eq. 11; eq. 10 is the mean over all report tokens of the step, whichever batch they are in."""
        tokens = sum(len(self.reports[index]) for index in step)
        result = model(**batch)
        generation_loss = result.generation_loss * ((batch["labels"] != -100).sum() / tokens)
        losses = {"loss": generation_loss, "generation_loss": generation_loss}
        if result.classification_loss is not None:
            losses["classification_loss"] = result.classification_loss * (len(batch["labels"]) / len(step))
            losses["loss"] = losses["loss"] + self.config.classification_loss_weight * losses["classification_loss"]
        return losses


class ReportStage(Stage):
    """Args:
    cohort: its `report` and `validation` cases and its pool.
    samples: folder for reports that are generated after each epoch.
    """

    name = "report"

    def __init__(
        self,
        section: ReportSection,
        model: DiffVPForConditionalGeneration,
        processor: DiffVPProcessor,
        cohort: Cohort,
        features: Features,
        seed: int,
        samples: Path,
    ):
        self.generator, self.processor, self.samples = model, processor, samples
        options = {"max_tokens": section.max_report_tokens, "seed": seed, "true_findings": section.true_findings}
        training = ReportSplit(cohort.report, cohort.pool, features, processor, shuffle=True, **options)
        # With predicted findings, as a user's scans will have them, whatever the prompts of training name.
        options = {"shuffle": False, **options, "true_findings": 0.0}
        validation = ReportSplit(cohort.validation, cohort.pool, features, processor, **options)
        views = {}
        if model.config.use_diagnosis and validation.labelled:
            # What of the loss is the classifier's: the more a model follows its prompt, the more an error there costs.
            options["true_findings"] = 1.0
            views["true_findings"] = ReportSplit(cohort.validation, cohort.pool, features, processor, **options)
        if not training.labelled:
            model.classification_head.requires_grad_(False)  # eq. 11 without its second term
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        for _, value in trained:
            value.data = value.data.float()  # beside an LLM in bfloat16: small steps would be lost in its 8 bits
        groups = [
            {"params": [v for n, v in trained if not n.startswith(BASE_PREFIX)], "lr": section.learning_rate},
            {"params": [v for n, v in trained if n.startswith(BASE_PREFIX)], "lr": section.lora_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(section, model, groups, training, validation, views)

    @torch.no_grad()
    def metrics(self, epoch: int) -> dict[str, float]:
        """Writes the first validation reports as the model now generates them, with predicted findings."""
        count = min(self.section.samples, len(self.validation))
        if not count:
            return {}
        self.generator.eval()
        batch = self.validation.collate([self.validation.sample(index, 0) for index in range(count)])
        given = ("ct", "reference", "ct_features", "reference_features", "diagnosis_logits")
        inputs = {key: batch[key].to(self.generator.device) for key in given if key in batch}
        texts = self.processor.batch_decode(self.generator.generate(**inputs), skip_special_tokens=True)
        self.samples.mkdir(parents=True, exist_ok=True)
        rows = [
            json.dumps({"id": case.name, "generated": text, "report": case.report}, ensure_ascii=False)
            for case, text in zip(self.validation.cases, texts, strict=False)
        ]
        (self.samples / f"epoch-{epoch}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return {"mean_words": float(np.mean([len(text.split()) for text in texts]))}


def make_drafts(cases: list[Case], processor: DiffVPProcessor, min_patients: int | None) -> ReportDrafts | None:
    """Drafts of the reports that the generator trains on: of them, and of no others, its weights know anyway."""
    if min_patients is None:
        return None
    reports = [processor.encode_report(case.report) for case in cases]
    drafts = ReportDrafts.build(reports, [case.patient_id for case in cases], min_patients)
    return drafts if drafts.following else None


def check_reports(
    cohort: Cohort, processor: DiffVPProcessor, section: ReportSection, config: DiffVPConfig
) -> list[Problem]:
    """Reports that do not fit: longer than `max_report_tokens`, or with the prompt than the LLM's context."""
    problems, longest = [], 0
    for case in {case.name: case for case in cohort.report + cohort.validation}.values():
        tokens = len(processor.encode_report(case.report))
        longest = max(longest, min(tokens, section.max_report_tokens))
        if tokens > section.max_report_tokens and not section.truncate_reports:
            expected = f"at most {section.max_report_tokens}, or report.truncate_reports: true"
            problems.append(Problem("dataset", case.row, "report", f"{tokens} tokens", expected, case.name))
    context = getattr(config.text_config, "max_position_embeddings", None)
    prompt = prompt_tokens(config)
    if context is not None and prompt + longest > context:
        found = f"{prompt} tokens and the longest report {longest}"
        expected = f"together at most {context}, the context of the base LLM"
        problems.append(Problem("base LLM", None, "longest prompt", found, expected))
    return problems


def prompt_tokens(config) -> int:
    """The most that may stand before a report: difference prompt, visual tokens, all findings, instruction."""
    count = config.num_visual_tokens + len(config.instruction_ids)
    if config.difference_level != "none":
        count += config.num_prefix_tokens
    if config.use_diagnosis:
        fragments = config.diagnosis_prompt_ids
        count += len(fragments["prefix"]) + sum(map(len, fragments["labels"])) + len(fragments["suffix"])
        count += len(fragments["separator"]) * (len(fragments["labels"]) - 1)
        count += sum(longest_attributes(config, label) for label in config.finding_attributes or ())
    return count


def longest_attributes(config, label: str) -> int:
    """The most tokens that the attributes of a finding take in the prompt."""
    fragments, wanted = config.diagnosis_prompt_ids["attributes"], config.finding_attributes[label]
    places = sum(map(len, fragments["places"].values())) + len(fragments["and"]) * (len(fragments["places"]) - 1)
    size = len(fragments["comma"]) + 3 * max(map(len, fragments["digits"])) + len(fragments["mm"])
    size = size if wanted.get("size") else 0
    return len(fragments["open"]) + (places if wanted.get("place") else 0) + size + len(fragments["close"])
