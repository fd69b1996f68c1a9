# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Which causal LLMs can be a base: each family is right in a batch, or refused when the model is made.

To try another family, add its tiny config to `FAMILIES` or `REFUSED`.
"""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from diffvp.bases_diffvp import DiffVPBaseModelError
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **TOKENS}
LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2}
GEMMA = {**LLAMA, "head_dim": 8}
WINDOW = {"sliding_window": 24, "query_pre_attn_scalar": 8}
# A window is shorter than a prompt: padding inside it would push tokens out.
FAMILIES = {
    "Llama": ("LlamaConfig", LLAMA),
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
REFUSED = {
    # It takes an attention mask and does not heed it.
    "RWKV": ("RwkvConfig", {**TOKENS, "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}),
    # Its word embeddings are narrower than its layers.
    "OPT, projected": ("OPTConfig", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16}),
}


def write_base(folder, family: tuple[str, dict]):
    """A folder with a random LLM of two layers, large enough weights that a mistake shows."""
    name, fields = family
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config = GenerationConfig(**TOKENS)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def make_on(tiny_fields, tmp_path):
    def make(family: tuple[str, dict]) -> DiffVPForConditionalGeneration:
        base = write_base(tmp_path / "base", family)
        torch.manual_seed(0)
        return DiffVPForConditionalGeneration.from_base(str(base), config=tiny_fields)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_a_scan_has_the_logits_tokens_and_loss_in_a_batch_that_it_has_alone(make_on, scans, family):
    """Its neighbour has all findings and it has none, so that its prompt is padded."""
    model = make_on(FAMILIES[family])
    findings = torch.full((2, 18), -9.0)
    findings[1] = 9.0
    text = torch.randint(40, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = text.clone()
    labels[:, :4] = -100
    batch, *alone = (
        [*(scan[rows] for scan in scans), text[rows], None, labels[rows], None, None, None, findings[rows]]
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2))
    )
    with torch.no_grad():
        whole, first, second = (model(*inputs) for inputs in (batch, *alone))
    torch.testing.assert_close(whole.logits[:1], first.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.logits[1:], second.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.loss, (first.loss + second.loss) / 2, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 10, "do_sample": False}
    written = model.generate(*batch[:3], diagnosis_logits=findings, **options)[0].tolist()
    [expected] = model.generate(*alone[0][:3], diagnosis_logits=findings[:1], **options).tolist()
    assert written[: len(expected)] == expected and not any(written[len(expected) :])


@pytest.mark.parametrize("family", REFUSED)
def test_a_base_that_would_be_wrong_is_refused_when_the_model_is_made(make_on, family):
    with pytest.raises(DiffVPBaseModelError):
        make_on(REFUSED[family])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_not_taken_for_a_mistake(tiny_fields, tmp_path, dtype):
    base = write_base(tmp_path / "base", FAMILIES["Llama"])
    assert DiffVPForConditionalGeneration.from_base(str(base), config=tiny_fields, dtype=dtype).dtype == dtype


def test_padding_of_instructions_of_two_lengths_stands_left_of_the_whole_prompt(make_model, scans):
    model = make_model()
    ids = torch.tensor([[0, 0, 40, 41], [40, 41, 42, 43]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    short, _ = model.embed_prompt(*scans, ids, mask)
    [alone] = model.embed_prompt(*(scan[:1] for scan in scans), ids[:1, 2:])
    torch.testing.assert_close(short, alone)
    with torch.no_grad():
        padded = model(*scans, ids, mask).logits[0, 2:]
        torch.testing.assert_close(
            padded, model(*(scan[:1] for scan in scans), ids[:1, 2:]).logits[0], atol=1e-5, rtol=0
        )
