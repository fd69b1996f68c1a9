# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Weights of the LLM in 8-bit integers."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from diffvp.inference.engines import merged_engine
from diffvp.inference.int8 import Int8Linear, is_int8, round_weights
from diffvp.storage_diffvp import DiffVPCheckpointError

EPSILON = 2.0**-8  # relative rounding error of bfloat16


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_multiplies_with_the_rounded_weights(rows, bias):
    """Compare with the dequantised weights multiplied in float64. The kernel rounds input and output to bfloat16."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 80, bias=bias)
    layer, hidden = Int8Linear(linear), torch.randn(2, rows, 96)
    weight = layer.weight.double() * layer.scale.double()[:, None]
    assert (weight - linear.weight.double()).abs().max() <= 0.51 * layer.scale.double().max()
    exact = hidden.double() @ weight.T + (linear.bias.double() if bias else 0)
    bound = 2 * EPSILON * (hidden.double().abs() @ weight.abs().T).max()
    assert (layer(hidden).double() - exact).abs().max() <= bound


def test_a_channel_of_zeros_gives_zero():
    linear = nn.Linear(64, 64, bias=False)
    nn.init.zeros_(linear.weight)
    assert torch.equal(Int8Linear(linear)(torch.ones(3, 64)), torch.zeros(3, 64))


def rounded(model) -> set[str]:
    return {name for name, module in model.language_model.named_modules() if isinstance(module, Int8Linear)}


@pytest.mark.parametrize(
    ("options", "merged"),
    [({}, False), ({"use_dora": True}, True), ({"target_modules": ["down_proj", "lm_head"]}, True)],
    ids=str,
)
def test_logits_stay_close_to_those_with_the_adapter(options, merged, make_model, scans):
    model, whole = (make_model(lora={"init_lora_weights": False, **options}) for _ in range(2))
    round_weights(model)
    assert len(rounded(model)) == 2 * 7  # query, key, value, output, gate, up, down; not the head
    assert sum(name.endswith("base_layer") for name in rounded(model)) == (0 if merged else 2 * 2)
    assert is_int8(model.language_model) and not is_int8(whole.language_model)
    with torch.no_grad():
        found, expected = model(*scans).logits, whole(*scans).logits
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_layers_that_torch_cannot_multiply_stay_as_they_are(make_model):
    model = make_model()
    narrow = nn.Linear(40, 32)
    model.language_model.model.layers[0].mlp.gate_proj = narrow
    round_weights(model)
    assert model.language_model.model.layers[0].mlp.gate_proj is narrow and len(rounded(model)) == 2 * 7 - 1


def test_llm_without_linear_layers_is_refused(make_model):
    model = make_model()
    model.language_model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96))
    with pytest.raises(DiffVPCheckpointError, match="GPT2LMHeadModel has no linear layer"):
        round_weights(model)


def test_rounded_weights_are_not_saved(make_model, tmp_path):
    model = make_model(lora=True)
    round_weights(model)
    with pytest.raises(DiffVPCheckpointError, match="quantised"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*"))
    with pytest.raises(DiffVPCheckpointError, match="quantised"):
        model.merge_adapter()
    assert merged_engine("transformers", model, None).language_model is model.language_model
