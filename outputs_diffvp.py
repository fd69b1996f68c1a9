# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The outputs of the models."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from transformers.utils.generic import ModelOutput


@dataclass
class DiffVPComparison(ModelOutput):
    """
    Output of [`DiffVPModel.compare`]: a scan and its reference.

    Args:
        latents, reference_latents: V and V_r of eq. 3, `(batch, K, d)`; V_r is `None` if no reference is encoded.
        difference_from, difference_to: v_i and r_i of eqs. 4-7, `(batch, K, d)`.
        attention: attention of the resampler to the voxel tokens of v_i, `(batch, K, N)`; `None` without a resampler.
        residual: norm of each voxel token's residual, `(batch, N)`; only for an aligned difference.
        attributes: locations and sizes of the findings, from `read_attributes`: one list per scan, in the order of
            the labels. Only with `config.finding_attributes`.
    """

    # `compare` always gives the three fields without `| None`; `ModelOutput` requires `None` as their default.
    latents: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    reference_latents: torch.Tensor | None = None
    difference_from: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    difference_to: torch.Tensor = None  # pyright: ignore[reportAssignmentType]
    attention: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    attributes: list | None = None


class DiffVPComputed(TypedDict):
    """Intermediate results on the way to the prompt; fields of [`DiffVPOutput`]."""

    latents: torch.Tensor
    reference_latents: torch.Tensor | None
    difference_weights: torch.Tensor | None
    diagnosis_logits: torch.Tensor | None


@dataclass
class DiffVPOutput(ModelOutput):
    """
    Output of [`DiffVPForConditionalGeneration`].

    Args:
        loss: L of eq. 11, a scalar; only the terms whose labels were given.
        logits: `(batch, text, vocabulary)`, aligned with `input_ids`.
        generation_loss: eq. 10; a scalar.
        classification_loss: L_cls of eq. 11; a scalar.
        latents, reference_latents: V and V_r of eq. 3, `(batch, K, d)`.
        difference_weights: w of eq. 6, `(batch, K)`, float32; also the token importance of Fig. 4a.
        diagnosis_logits: volume logits of the frozen classifier, from which the diagnosis prompt was written,
            `(batch, labels)`.
        past_key_values, hidden_states, attentions: outputs of the LLM.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    generation_loss: torch.Tensor | None = None
    classification_loss: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    reference_latents: torch.Tensor | None = None
    difference_weights: torch.Tensor | None = None
    diagnosis_logits: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class DiffVPDiagnosisOutput(ModelOutput):
    """
    Output of [`DiffVPForDiagnosis`].

    Args:
        loss: multi-label binary cross-entropy; a scalar.
        logits: log-odds of the Noisy-OR volume probabilities, `(batch, labels)`.
        voxel_logits: log-odds per voxel token, `(batch, N, labels)`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    voxel_logits: torch.Tensor | None = None


__all__ = ["DiffVPComparison", "DiffVPComputed", "DiffVPDiagnosisOutput", "DiffVPOutput"]
