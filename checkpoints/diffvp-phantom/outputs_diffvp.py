# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class DiffVPComparison(ModelOutput):
    """
    A scan beside its reference, as [`DiffVPModel.compare`] makes it.

    Args:
        latents, reference_latents: V and V_r of eq. 3, `(batch, K, d)`; V_r is `None` where no reference is encoded.
        difference_from, difference_to: the two sides v_i and r_i of eqs. 4-7, `(batch, K, d)`.
        attention: the resampler's attention to the voxel tokens of v_i, `(batch, K, N)`; `None` without a resampler.
        residual: of an aligned difference, the norm of each voxel token's residual, `(batch, N)`.
        attributes: with `config.finding_attributes`, the places and sizes of the scan's findings, as
            `read_attributes` gives them: for each scan a list, in the order of the labels.
    """

    latents: torch.FloatTensor | None = None
    reference_latents: torch.FloatTensor | None = None
    difference_from: torch.FloatTensor | None = None
    difference_to: torch.FloatTensor | None = None
    attention: torch.FloatTensor | None = None
    residual: torch.FloatTensor | None = None
    attributes: list | None = None


@dataclass
class DiffVPOutput(ModelOutput):
    """
    Output of [`DiffVPForConditionalGeneration`].

    Args:
        loss: L of eq. 11, or the part of it whose labels were given; a scalar.
        logits: `(batch, text, vocabulary)`, aligned with `input_ids`.
        generation_loss: eq. 10; a scalar.
        classification_loss: L_cls of eq. 11; a scalar.
        latents, reference_latents: V and V_r of eq. 3, `(batch, K, d)`.
        difference_weights: w of eq. 6, `(batch, K)`, float32. They are also the token importance of Fig. 4a.
        diagnosis_logits: volume logits of the frozen classifier that wrote the diagnosis prompt, `(batch, labels)`.
        past_key_values, hidden_states, attentions: of the LLM.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    generation_loss: torch.FloatTensor | None = None
    classification_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    reference_latents: torch.FloatTensor | None = None
    difference_weights: torch.FloatTensor | None = None
    diagnosis_logits: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class DiffVPDiagnosisOutput(ModelOutput):
    """
    Output of [`DiffVPForDiagnosis`].

    Args:
        loss: multi-label binary cross-entropy; a scalar.
        logits: log-odds of the Noisy-OR volume probabilities, `(batch, labels)`.
        voxel_logits: `(batch, N, labels)`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    voxel_logits: torch.FloatTensor | None = None


__all__ = ["DiffVPComparison", "DiffVPDiagnosisOutput", "DiffVPOutput"]
