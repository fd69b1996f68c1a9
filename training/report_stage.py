# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Stage 2: report generation from frozen features and predicted findings."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, BitsAndBytesConfig

from ..checkpoint_diffvp import BASE_PREFIX
from ..collator_diffvp import DiffVPDataCollator, pair_reference
from ..configuration_diffvp import DiffVPConfig
from ..data.cases import Case, Problem, chance
from ..data.pool import other_scans
from ..drafts_diffvp import ReportDrafts
from ..files import write_texts
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..processing_diffvp import DiffVPProcessor
from .cohort import Cohort
from .config import BaseSection, ReportSection
from .features import Features
from .loop import BatchSource, Stage, by_length, in_order

CERTAIN = 30.0  # logit of a true finding


class BaseModelError(ValueError):
    """The base LLM does not match the training file."""


def quantization(base: BaseSection) -> dict:
    """Return the loading options of the LLM for 4 or 8 bits (as in QLoRA: NF4, double quantisation)."""
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
    Check the configuration of the LLM against the expected fields.

    Raises:
        BaseModelError: a field differs.
    """
    for key, value in (expected or {}).items():
        found = getattr(config, key, None)
        if found != value:
            raise BaseModelError(f"The base LLM has {key}={found}; base.expected_config says {value}.")


class ReportBatches(BatchSource):
    """
    Frozen features, findings and report tokens. The order of cases, their references, and the choice of prompts with
    true findings depend only on (seed, epoch, case).

    Args:
        cases, pool: targets and normal references.
        features: frozen features of both.
        max_tokens: maximum length of a report with its end token. Longer reports are cut; `check_reports` can refuse
            them beforehand.
        seed: seed of shuffling and pairing.
        shuffle: draw order and references anew in each epoch, for training.
        true_findings: fraction of prompts with the true findings. From an inaccurate classifier, the language model
            learns to ignore the diagnosis prompt, and a small cohort has too few cases to teach it otherwise. (If both
            stages train on the same cases, as in the paper, the predictions in training are nearly true anyway.)
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
        # With labels missing in some cases, eq. 11 would be learned only from the others.
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
        """Return the normal reference of a case in an epoch."""
        case = self.cases[index]
        others = other_scans(case, list(self.pool.values()))
        return self.pool[pair_reference(case.name, others, self.seed, epoch)]

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
        """Compute eq. 11. Eq. 10 is the mean over all report tokens of the step, across its batches."""
        tokens = sum(len(self.reports[index]) for index in step)
        result = model(**batch)
        generation_loss = result.generation_loss * ((batch["labels"] != -100).sum() / tokens)
        losses = {"loss": generation_loss, "generation_loss": generation_loss}
        if result.classification_loss is not None:
            losses["classification_loss"] = result.classification_loss * (len(batch["labels"]) / len(step))
            losses["loss"] = losses["loss"] + self.config.classification_loss_weight * losses["classification_loss"]
        return losses


class ReportStage(Stage):
    """
    Training of report generation.

    Args:
        cohort: provides the cases `report` and `validation` and the pool.
        samples: folder for the reports generated after each epoch.
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
        training = ReportBatches(cohort.report, cohort.pool, features, processor, shuffle=True, **options)
        # Validation uses predicted findings, as for a user's scans, even if training prompts have true ones.
        options = {"shuffle": False, **options, "true_findings": 0.0}
        validation = ReportBatches(cohort.validation, cohort.pool, features, processor, **options)
        views = {}
        if model.config.use_diagnosis and validation.labelled:
            # Shows the classifier's part of the loss: errors of the prompt cost more the more the model follows it.
            options["true_findings"] = 1.0
            views["true_findings"] = ReportBatches(cohort.validation, cohort.pool, features, processor, **options)
        if not training.labelled:
            model.classification_head.requires_grad_(False)  # eq. 11 without its second term
        if section.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        for _, value in trained:
            value.data = value.data.float()  # in bfloat16, as the LLM may be, 8 bits would lose small steps
        groups = [
            {"params": [v for n, v in trained if not n.startswith(BASE_PREFIX)], "lr": section.learning_rate},
            {"params": [v for n, v in trained if n.startswith(BASE_PREFIX)], "lr": section.lora_learning_rate},
        ]
        groups = [group for group in groups if group["params"]]
        super().__init__(section, model, groups, training, validation, views)

    @torch.no_grad()
    def metrics(self, epoch: int) -> dict[str, float]:
        """Generate the first validation reports with predicted findings, and write them to `samples`."""
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
        write_texts(self.samples, {f"epoch-{epoch}.jsonl": "\n".join(rows) + "\n"})
        return {"mean_words": float(np.mean([len(text.split()) for text in texts]))}


def make_drafts(cases: list[Case], processor: DiffVPProcessor, min_patients: int | None) -> ReportDrafts | None:
    """Make drafts only from the reports that the generator trains on, whose text its weights contain anyway."""
    if min_patients is None:
        return None
    reports = [processor.encode_report(case.report) for case in cases]
    drafts = ReportDrafts.build(reports, [case.patient_id for case in cases], min_patients)
    return drafts if drafts.following else None


def check_reports(
    cohort: Cohort, processor: DiffVPProcessor, section: ReportSection, config: DiffVPConfig
) -> list[Problem]:
    """Find reports longer than `max_report_tokens`, or too long for the context of the LLM after the prompt."""
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
    """Return the maximum prompt length: difference prompt, visual tokens, all findings, instruction."""
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
    """Return the maximum number of prompt tokens for the attributes of a finding."""
    fragments, wanted = config.diagnosis_prompt_ids["attributes"], config.finding_attributes[label]
    places = sum(map(len, fragments["places"].values())) + len(fragments["and"]) * (len(fragments["places"]) - 1)
    size = len(fragments["comma"]) + 3 * max(map(len, fragments["digits"])) + len(fragments["mm"])
    size = size if wanted.get("size") else 0
    return len(fragments["open"]) + (places if wanted.get("place") else 0) + size + len(fragments["close"])
