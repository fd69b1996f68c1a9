# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Tiny base LLMs of each family, for `test_bases.py` and `benchmarks/bases.py`, and a tiny DiffVP on them.

To try another family, add its tiny config to `FAMILIES` or `REFUSED`, and run `python -m diffvp.benchmarks.bases`.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 8}
WINDOW = {"sliding_window": 24, "query_pre_attn_scalar": 8}
# The windows are shorter than a prompt: padding inside a window would displace tokens.
FAMILIES = {
    "Llama": ("LlamaConfig", LLAMA),
    "Llama, tied": ("LlamaConfig", LLAMA | {"tie_word_embeddings": True}),
    "Mistral": ("MistralConfig", LLAMA | {"sliding_window": 24}),
    "Qwen2": ("Qwen2Config", LLAMA),
    "Qwen3": ("Qwen3Config", GEMMA),
    "Gemma": ("GemmaConfig", GEMMA),
    "Gemma 2": ("Gemma2Config", GEMMA | WINDOW),
    "Gemma 3": ("Gemma3TextConfig", GEMMA | WINDOW),
    "Phi-3": ("Phi3Config", LLAMA),
    "GPT-2": ("GPT2Config", {**TOKENS, "vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "GPT-NeoX": ("GPTNeoXConfig", COMMON | {"intermediate_size": 48}),
    "Falcon": ("FalconConfig", COMMON),
    "Falcon, ALiBi": ("FalconConfig", COMMON | {"alibi": True}),
    "Bloom": ("BloomConfig", {**TOKENS, "vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "MPT": ("MptConfig", {**TOKENS, "vocab_size": 96, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "Mamba": ("MambaConfig", {**TOKENS, "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}),
    "Mixtral": ("MixtralConfig", LLAMA | {"num_local_experts": 4}),
    "Qwen3 MoE": ("Qwen3MoeConfig", GEMMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
}
# One for each kind of cache and of positions.
FEW_FAMILIES = "Llama", "Gemma 3", "GPT-2", "Bloom", "MPT", "Mamba", "Mixtral"
REFUSED = {
    # It accepts an attention mask and ignores it.
    "RWKV": ("RwkvConfig", {**TOKENS, "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}),
    # Its word embeddings are narrower than its layers.
    "OPT, projected": ("OPTConfig", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
}
OWN_CODE = "code of its own"
# LoRA targets in the table: all linear layers, except if PEFT refuses these or a harder case is to be tested.
TARGETS = {
    "Llama, tied": ["q_proj", "v_proj", "lm_head"],
    "Mamba": ["in_proj", "x_proj"],  # PEFT refuses out_proj, whose weight Mamba's fused kernel reads past LoRA
}

TINY_FIELDS = {
    "image_size": [32, 32, 32],
    "encoder_block_channels": [4, 8, 8, 16],
    "encoder_max_pool": False,
    "encoder_shortcut_type": "B",
    "num_latents": 4,
    "latent_size": 24,
    "resampler_heads": 2,
    "global_delta_heads": 3,
    "num_prefix_tokens": 4,
    "prompt_hidden_size": 8,
    "diagnosis_prompt_ids": {
        "prefix": [5, 6],
        "labels": [[10 + label] for label in range(17)] + [[27, 28]],
        "separator": [7],
        "none": [8],
        "suffix": [9],
    },
    "instruction_ids": [1, 40, 41],
}


def make_scans() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two targets and two references for the tiny model."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.rand(2, 1, 32, 32, 32, generator=generator) * 2 - 1 for _ in range(2))


def write_base(folder: Path, family: tuple[str, dict]) -> Path:
    """Write a random LLM of two layers to a folder, with weights large enough for an error to show."""
    name, fields = family
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = GenerationConfig(**TOKENS)
    model.save_pretrained(folder)
    return folder


def write_base_with_own_code(folder: Path) -> Path:
    """Write a Llama with its class next to the weights, like a new architecture on the Hub."""
    write_base(folder, FAMILIES["Llama"])
    code = "from transformers import LlamaForCausalLM\n\n\nclass MyLLM(LlamaForCausalLM):\n    pass\n"
    (folder / "my_llama.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "my_llama.MyLLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
