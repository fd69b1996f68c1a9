# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""`diffvp train CONFIG --dry-run`: estimate memory and compute from models without weights (PyTorch's meta device)."""

from dataclasses import dataclass

import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from ..adapter_diffvp import locate_adapter
from ..bases_diffvp import locate_base_model
from ..checkpoint_diffvp import BASE_PREFIX
from ..configuration_diffvp import DEFAULT_INSTRUCTION, DiffVPConfig
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..modeling_diffvp import DiffVPForConditionalGeneration
from .cohort import Cohort
from .config import TrainingConfig
from .report_stage import prompt_tokens

QUANTIZED_BYTES = {"4bit": 0.55, "8bit": 1.05}  # bytes per weight, with its scales
ADAM_BYTES = 8  # two moments in float32
# Activations kept for the backward pass of one transformer layer with fused attention, in units of tokens x width x
# bytes per number (Korthikanti et al. 2022, without the attention matrix); with checkpointing, only its input.
LAYER_ACTIVATIONS, CHECKPOINT_ACTIVATIONS = 17, 1
TOKENS_PER_WORD = 1.5  # LLaMA's tokenizer on English radiology reports; used without a tokenizer
ASSUMED_WORDS = 250  # per report, without data


@dataclass(frozen=True)
class Estimate:
    """Requirements of stage 2, per device of identical devices.

    Attributes:
        parameters: number of parameters by part.
        memory_gb: memory of one device under DDP, by part.
        tokens_per_sample: mean number of tokens in prompt and report.
        samples: samples per epoch.
        tflop_per_epoch: compute of the LLM, which dominates; frozen features are computed only once.
    """

    parameters: dict[str, int]
    memory_gb: dict[str, float]
    tokens_per_sample: int
    samples: int
    tflop_per_epoch: float

    def hours_per_epoch(self, tflops: float) -> float:
        """Return the hours per epoch at a total speed in TFLOP/s (half of the nominal speed is a good value)."""
        return self.tflop_per_epoch / tflops / 3600


def make_meta_model(config: TrainingConfig) -> DiffVPForConditionalGeneration:
    """Make the model of stage 2 without weights.

    Raises:
        OSError: the configuration of the base is unavailable, and the training file has no `base.expected_config`.
    """
    model_config, lora = _of_start(config) if config.init_from else _of_parts(config)
    with torch.device("meta"):
        language_model = AutoModelForCausalLM.from_config(model_config.text_config, dtype=_dtype(config))
        model = DiffVPForConditionalGeneration(model_config, language_model=language_model)
        if lora is not None:
            language_model.add_adapter(lora)
    return model


def _of_start(config: TrainingConfig) -> tuple[DiffVPConfig, LoraConfig | None]:
    model_config = DiffVPConfig.from_pretrained(config.init_from, **config.init_options)
    adapter = locate_adapter(config.init_from, **config.init_options) if model_config.has_adapter else None
    if adapter is None:
        return model_config, None
    lora = LoraConfig.from_pretrained(adapter)
    lora.inference_mode = False
    return model_config, lora


def _of_parts(config: TrainingConfig) -> tuple[DiffVPConfig, LoraConfig | None]:
    base = config.base
    if base.expected_config is not None:
        text_config = AutoConfig.for_model(**base.expected_config)
    else:
        path, gguf_file = locate_base_model(base.name, base.revision, base.gguf_file)
        options = {"gguf_file": gguf_file} if gguf_file else {"revision": base.revision or "main"}
        text_config = AutoConfig.from_pretrained(path, **options)
    labels = (config.model or {}).get("diagnosis_labels", DIAGNOSIS_LABELS)
    # Only the lengths matter: two tokens per word.
    prompt = {
        "prefix": [0] * 4,
        "labels": [[0] * (2 * len(label.split()) + 1) for label in labels],
        "separator": [0],
        "none": [0],
        "suffix": [0, 0],
    }
    model_config = DiffVPConfig(
        text_config=text_config,
        base_model_name_or_path=base.name,
        diagnosis_prompt_ids=prompt,
        instruction_ids=[0] * (2 * len(DEFAULT_INSTRUCTION.split())),
        **config.model,
    )
    return model_config, LoraConfig(task_type="CAUSAL_LM", **config.lora) if config.lora else None


def _dtype(config: TrainingConfig) -> torch.dtype:
    """Return the dtype of the LLM; a checkpoint to start from is loaded in float32."""
    return torch.float32 if config.base is None else getattr(torch, config.base.dtype)


def estimate(config: TrainingConfig, cohort: Cohort | None, processes: int = 1) -> Estimate:
    """Estimate the requirements of stage 2.

    Args:
        cohort: the cases; `None` assumes 1,000 reports of `ASSUMED_WORDS` words.
        processes: number of devices that share a step.
    """
    model = make_meta_model(config)
    own = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not n.startswith(BASE_PREFIX))
    lora = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and n.startswith(BASE_PREFIX))
    llm = sum(p.numel() for n, p in model.named_parameters() if n.startswith(BASE_PREFIX)) - lora
    frozen = sum(p.numel() for n, p in model.named_parameters()) - llm - lora - own
    words = [len(case.report.split()) for case in cohort.report] if cohort is not None else [ASSUMED_WORDS] * 1000
    limit = config.report.max_report_tokens
    reports = [min(limit, int(count * TOKENS_PER_WORD) + 1) for count in words]
    prompt = prompt_tokens(model.config)
    tokens = prompt + sum(reports) / len(reports)

    section, text = config.report, model.config.text_config
    batch = section.micro_batch_size or -(-section.batch_size // processes)
    number = _dtype(config).itemsize
    computed = number if config.mixed_precision == "no" else 2
    weight = number
    if config.base is not None and config.base.quantization is not None:
        weight = QUANTIZED_BYTES[config.base.quantization]
    longest = prompt + max(reports)
    layers = CHECKPOINT_ACTIVATIONS * text.num_hidden_layers + LAYER_ACTIVATIONS
    if not section.gradient_checkpointing:
        layers = LAYER_ACTIVATIONS * text.num_hidden_layers
    memory = {
        "LLM": llm * weight,
        "frozen encoder and classifier": frozen * number,
        "trained weights, gradients, Adam": (own + lora) * (4 + 4 + ADAM_BYTES),
        "activations of the longest batch": layers * batch * longest * text.hidden_size * computed,
        "logits of its report": batch * max(reports) * text.vocab_size * (4 + 4 + computed),
    }
    # Frozen weights need no gradients: 2 N forward, 2 N backward; checkpointing runs the forward pass again.
    flop = (6 if section.gradient_checkpointing else 4) * llm * tokens * len(reports)
    return Estimate(
        parameters={"LLM, frozen": llm, "LoRA": lora, "own modules": own, "frozen encoder and classifier": frozen},
        memory_gb={name: size / 1e9 for name, size in memory.items()},
        tokens_per_sample=round(tokens),
        samples=len(reports),
        tflop_per_epoch=flop / 1e12,
    )
