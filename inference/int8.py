# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Weights of an LLM in 8-bit integers, for CPUs.

Each output channel of a linear layer has a scale. Only the weights are rounded: torch multiplies them with activations
in bfloat16. Rounding the activations too, as torch's `quantize_dynamic` does, gives other findings (docs/scaling.md).
"""

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..storage_diffvp import DiffVPCheckpointError

LEVELS = 127  # integers from -127 to 127
MANY = 32  # rows from which on it is faster to multiply with the weights in the type of the rows
WIDTH = 16  # torch 2.13 takes only inputs whose number of features is a multiple of this


class Int8Linear(nn.Module):
    """Linear layer with int8 weights (out, in) and one scale per output channel."""

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        # The scale is rounded before it divides the weights, because the product uses the rounded scale.
        scale = (weight.abs().amax(dim=1) / LEVELS).clamp(min=1e-12).to(torch.bfloat16)
        rounded = (weight / scale.float()[:, None]).round_().clamp_(-LEVELS, LEVELS)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features)
        if len(rows) < MANY:
            # Only with bfloat16: torch 2.13 has no fast code for float32 here.
            rows = rows.to(torch.bfloat16).contiguous()
            result = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale).to(hidden.dtype)
        else:
            result = F.linear(rows, self.weight.to(rows.dtype) * self.scale.to(rows.dtype)[:, None])
        result = result.view(*hidden.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias


def round_weights(model) -> None:
    """
    Replace the linear layers of a model's LLM on the CPU with [`Int8Linear`].

    Plain LoRA stays as it is; other adapters are merged first, because they compute with the weights that they change.
    The head stays as it is, too, because it decides between words that are almost equally likely.

    Raises:
        DiffVPCheckpointError: the adapter cannot be merged, or the LLM has no linear layer that can be rounded.
    """
    language_model, head = model.language_model, model.language_model.get_output_embeddings()
    tuned = [module for module in language_model.modules() if isinstance(module, BaseTunerLayer)]
    if head in tuned or not all(isinstance(module, LoraLinear) and not module.lora_variant for module in tuned):
        model.merge_adapter()
        head = language_model.get_output_embeddings()
    rounded: dict[nn.Module, Int8Linear] = {}  # a layer may have several places
    for parent in list(language_model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head and _can_be_rounded(parent, child):
                setattr(parent, name, rounded.setdefault(child, Int8Linear(child)))
    if not rounded:
        kind = type(language_model).__name__
        raise DiffVPCheckpointError(
            f"dtype: int8: {kind} has no linear layer whose number of inputs is a multiple of {WIDTH} (expected one)"
        )
    for layer in rounded:
        layer.register_parameter("weight", None)  # freed now and not by the garbage collector, which may be off
    for parameter in language_model.parameters():
        # Copies, because a file of which one tensor is in use stays mapped into memory as a whole.
        parameter.data = parameter.data.clone()
    language_model.is_quantized = True  # as in transformers: neither merged nor saved


def _can_be_rounded(parent: nn.Module, child: nn.Linear) -> bool:
    return not isinstance(parent, nn.ModuleDict) and child.in_features % WIDTH == 0  # LoRA's own are in a ModuleDict


def is_int8(language_model: nn.Module) -> bool:
    """True if [`round_weights`] has changed the LLM."""
    return any(isinstance(module, Int8Linear) for module in language_model.modules())
