# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The check that a causal LLM can be a base of DiffVP.

Not every `AutoModelForCausalLM` takes prompts of embeddings, and some read a row otherwise in a batch than alone. On
such a base, training and writing raise no error, and the report of a scan depends on its neighbour.
"""

import inspect

import torch
from transformers import GenerationConfig, PreTrainedModel

SHORT, LONG, NEW_TOKENS = 5, 12, 3  # tokens of the two prompts, and at most of what is decoded
# Largest difference that is still rounding, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_TOLERANCE = 0.05  # of half precision and of quantised weights


class DiffVPBaseModelError(ValueError):
    """A causal LLM cannot be a base of DiffVP."""


def accepts(language_model: PreTrainedModel, argument: str) -> bool:
    """Whether the LLM's forward names an argument. ALiBi and state-space models take no `position_ids`."""
    return argument in inspect.signature(language_model.forward).parameters


def real_positions(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens alone: `mask` (batch, L) → (batch, L)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


@torch.no_grad()
def check_language_model(language_model: PreTrainedModel, name: str) -> None:
    """
    Decode two made-up prompts of different lengths, alone and in one batch padded on the left.

    Args:
        name: the base's, for the message.

    Raises:
        DiffVPBaseModelError: the embeddings have another width than the LLM, a prompt of embeddings is not taken, a
            prompt is read otherwise in a batch than alone, or decoding with the cache differs from reading the whole
            text.
    """
    embed = language_model.get_input_embeddings()
    width, hidden = embed.weight.shape[-1], language_model.config.get_text_config().hidden_size
    if width != hidden:
        raise DiffVPBaseModelError(f"{name}: input embeddings have width {width} (expected hidden_size, {hidden})")
    if embed.weight.is_meta:  # shapes without weights
        return
    # Embeddings of real tokens: of the scale, the type and the place that the LLM knows.
    ids = torch.arange(1, LONG + 1, device=embed.weight.device) * 97 % embed.weight.shape[0]
    long = embed(ids[None])
    short = long[:, LONG - SHORT :]
    batch = torch.cat([torch.cat([torch.zeros_like(long[:, SHORT:]), short], dim=1), long])
    mask = torch.ones(2, LONG, dtype=torch.long, device=batch.device)
    mask[0, : LONG - SHORT] = 0
    # TypeError: an argument is unknown; the others: a kind of cache or mask that does not go with embeddings.
    try:
        alone = _read(language_model, short, mask[:1, -SHORT:])
        together = _read(language_model, batch, mask)[:1, -SHORT:]
        written = _decode(language_model, short, mask[:1, -SHORT:])
        whole = torch.cat([short, embed(written[:, :-1])], dim=1)
        decoded = _read(language_model, whole, torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device))
    except (TypeError, ValueError, NotImplementedError) as error:
        raise DiffVPBaseModelError(f"{name}: it does not decode from embeddings ({error})") from error
    scale = float(alone.abs().max())
    quantised = getattr(language_model, "is_quantized", False)
    tolerance = scale * (COARSE_TOLERANCE if quantised else TOLERANCE.get(language_model.dtype, COARSE_TOLERANCE))
    apart = float((alone - together).abs().max())
    if not apart <= tolerance:
        raise DiffVPBaseModelError(
            f"{name}: logits of a prompt differ by {apart:.2g} between a padded batch and the prompt alone (expected "
            f"at most {tolerance:.2g}): {type(language_model).__name__} does not heed its attention mask"
        )
    # Greedy tokens may swap where two logits tie: the chosen one has to be as good as the best.
    logits = decoded[0, SHORT - 1 :]
    behind = float((logits.max(dim=-1).values - logits.gather(-1, written[0][:, None])[:, 0]).max())
    if not behind <= 2 * tolerance:
        raise DiffVPBaseModelError(
            f"{name}: decoding with the cache chooses tokens {behind:.2g} below the best of the whole text (expected "
            f"at most {2 * tolerance:.2g})"
        )


def _read(language_model: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = {"position_ids": real_positions(mask)} if accepts(language_model, "position_ids") else {}
    result = language_model(inputs_embeds=embeddings, attention_mask=mask, return_dict=True, **positions)
    return result.logits.float()


def _decode(language_model: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0)
    return language_model.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=greedy)


__all__ = ["DiffVPBaseModelError", "check_language_model"]
