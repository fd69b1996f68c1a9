# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Weights of the LLM in 8-bit integers."""

import pytest
import torch
from torch import nn

from diffvp.checkpoint_diffvp import DiffVPCheckpointError
from diffvp.inference.engines import EngineError, merged_engine
from diffvp.inference.int8 import Int8Linear, is_int8, round_weights

EPSILON = 2.0**-8  # relative rounding error of bfloat16


@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("bias", [False, True])
def test_layer_multiplies_with_the_rounded_weights(rows, bias):
    """The reference multiplies the dequantised weights in float64. The kernel rounds input and output to bfloat16."""
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


def test_all_but_head_and_adapter_is_rounded(make_model, scans):
    model, whole = make_model(lora=True), make_model(lora=True)
    round_weights(model.language_model)
    names = {name for name, module in model.language_model.named_modules() if isinstance(module, Int8Linear)}
    assert len(names) == 2 * 7  # query, key, value, output, gate, up, down
    assert sum(name.endswith("base_layer") for name in names) == 2 * 2  # of query and value, which have LoRA
    assert is_int8(model.language_model) and not is_int8(whole.language_model)
    kept = dict(whole.language_model.named_parameters())
    assert all(torch.equal(value, kept[name]) for name, value in model.language_model.named_parameters())
    with torch.no_grad():
        found, expected = model(*scans).logits, whole(*scans).logits
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_rounded_weights_are_neither_saved_nor_merged(make_model, tmp_path):
    model = make_model(lora=True)
    round_weights(model.language_model)
    with pytest.raises(DiffVPCheckpointError, match="quantised"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(DiffVPCheckpointError, match="quantised"):
        model.merge_adapter()
    assert not list((tmp_path / "saved").glob("*"))
    with pytest.raises(EngineError, match="vllm"):
        merged_engine("vllm", model, None)
