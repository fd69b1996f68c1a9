# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Weights of an LLM in 8-bit integers, for CPUs.

Each output channel of a linear layer has a scale. Only the weights are rounded: torch multiplies them with activations
in bfloat16. Rounding the activations too, as torch's `quantize_dynamic` does, gives other findings (docs/scaling.md).
"""

import torch
from torch import nn

from ..storage_diffvp import DiffVPCheckpointError

LEVELS = 127  # integers from -127 to 127
WIDTH = 16  # torch 2.13 takes only inputs whose number of features is a multiple of this


class Int8Linear(nn.Module):
    """Linear layer with int8 weights (out, in) and one scale per output channel."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        # Rounded first, so that weights and activations see the same scale.
        scale = (weight.abs().amax(dim=1) / LEVELS).clamp(min=1e-12).to(torch.bfloat16)
        rounded = (weight / scale.float()[:, None]).round_().clamp_(-LEVELS, LEVELS)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = hidden.reshape(-1, self.in_features).to(torch.bfloat16).contiguous()
        # Only with bfloat16: torch 2.13 has no fast code for float32 here.
        result = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        result = result.to(hidden.dtype).view(*hidden.shape[:-1], self.out_features)
        return result if self.bias is None else result + self.bias


def round_weights(model) -> None:
    """
    Merge the adapter of a model on the CPU into its LLM, and replace the LLM's linear layers with [`Int8Linear`].

    The head stays as it is, because it decides between words that are almost equally likely.

    Raises:
        DiffVPCheckpointError: the adapter cannot be merged, or the LLM has no linear layer that can be rounded.
    """
    model.merge_adapter()
    language_model = model.language_model
    head, found = language_model.get_output_embeddings(), False
    for parent in list(language_model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not head and child.in_features % WIDTH == 0:
                setattr(parent, name, Int8Linear(child))
                found = True
    if not found:
        kind = type(language_model).__name__
        raise DiffVPCheckpointError(f"dtype: int8: {kind} has no linear layers of {WIDTH} n inputs (expected some)")
    language_model.is_quantized = True  # as in transformers: not saved


def is_int8(language_model: nn.Module) -> bool:
    """True if [`round_weights`] has changed the LLM."""
    return any(isinstance(module, Int8Linear) for module in language_model.modules())
