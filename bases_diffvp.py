# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Load the base LLM, and check that a causal LLM can serve as one.

Some `AutoModelForCausalLM`s do not accept embeddings as a prompt, and some process a row of a padded batch differently
than the row alone. With such a base, training and generation raise no error, but the report of a scan depends on the
other scans in its batch.
"""

import importlib.metadata
import inspect
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from .adapter_diffvp import embedding_weight, uncompiled
from .gguf_diffvp import load_dequantized
from .storage_diffvp import HUB_KWARGS, DiffVPCheckpointError

PYPI_SCHEME = "pypi:"

SHORT, LONG, NEW_TOKENS = 5, 12, 3  # tokens of the two prompts, and maximum number of decoded tokens
# Largest difference that is attributed to rounding, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_TOLERANCE = 0.05  # for half precision and quantised weights


class DiffVPBaseModelError(ValueError):
    """The causal LLM cannot be used as a base of DiffVP."""


def locate_base_model(name: str, revision: str | None = None, gguf_file: str | None = None) -> tuple[str, str | None]:
    """
    Resolve a base LLM to a Hub id or directory for `from_pretrained`, and the file name of a GGUF or `None`.

    `pypi:NAME` stands for the files of an installed distribution of exactly version `revision`. Such a base comes from
    the package index and does not need the Hub. `gguf_file` is then the file's path inside the distribution.

    Raises:
        DiffVPCheckpointError: the distribution is not installed, has another version or lacks the file, or no revision
            is given.
    """
    if not name.startswith(PYPI_SCHEME):
        return name, gguf_file
    package = name.removeprefix(PYPI_SCHEME)
    if revision is None:
        raise DiffVPCheckpointError(f"base_model_revision: none (expected the version of the package {package}).")
    wanted = f"{package}=={revision}"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise DiffVPCheckpointError(
            f"The base LLM of this checkpoint comes from the package {wanted}, which is not installed. "
            f"Run `pip install --no-deps {wanted}`."
        ) from error
    if distribution.version != revision:
        raise DiffVPCheckpointError(
            f"The base LLM of this checkpoint comes from {wanted}, but version {distribution.version} is installed. "
            f"Run `pip install --no-deps {wanted}`."
        )
    path = Path(str(distribution.locate_file(gguf_file or "")))
    if not path.is_file():
        raise DiffVPCheckpointError(f"The installed {wanted} has no file {gguf_file}.")
    return str(path.parent), path.name


def public_name(name: str) -> str:
    """Return a Hub id or package unchanged, and only the last part of a path, which may name people and projects."""
    return Path(name).resolve().name if is_folder(name) else name


def is_folder(name: str) -> bool:
    """True if `name` is an absolute path or an existing local folder."""
    return bool(name) and (Path(name).is_absolute() or Path(name).is_dir())


def load_base_model(name: str, revision: str | None = None, gguf_file: str | None = None, **kwargs) -> PreTrainedModel:
    """Load a base LLM with its own `from_pretrained`; `kwargs` are its loading options (dtype, device_map, ...)."""
    path, file = locate_base_model(name, revision, gguf_file)
    if file is None:
        return AutoModelForCausalLM.from_pretrained(path, revision=revision or "main", **kwargs)
    if "quantization_config" in kwargs:
        raise DiffVPCheckpointError(f"A GGUF base ({name}) is dequantised on load and cannot be quantised again.")
    return load_dequantized(Path(path) / file, name, **kwargs)


def base_tokenizer(name: str, revision: str | None = None, gguf_file: str | None = None, **llm_kwargs):
    """
    Load the tokenizer of a base LLM; of `llm_kwargs`, the LLM's loading options, those of the Hub apply here, too.

    Returns `None` if there is none beside the weights, and for a GGUF, whose tokenizer is slow to load.
    """
    path, gguf_file = locate_base_model(name, revision, gguf_file)
    if gguf_file is not None:
        return None
    options: dict[str, Any] = {key: llm_kwargs[key] for key in HUB_KWARGS if key in llm_kwargs}
    options["revision"] = revision or "main"
    if cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **options) is None:
        return None
    return AutoTokenizer.from_pretrained(path, trust_remote_code=llm_kwargs.get("trust_remote_code"), **options)


def accepts(language_model: PreTrainedModel, argument: str) -> bool:
    """True if the LLM's `forward` takes an argument: ALiBi and state-space models take no `position_ids`."""
    return argument in inspect.signature(uncompiled(language_model).forward).parameters


def real_positions(mask: torch.Tensor) -> torch.Tensor:
    """Return positions that count only unmasked tokens: `mask` (batch, L) → (batch, L)."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


@torch.no_grad()
def check_language_model(language_model: PreTrainedModel, name: str) -> None:
    """
    Check that an LLM decodes from embeddings, with the same result for a row alone and in a batch.

    Two made-up prompts of different lengths are run alone and in one batch padded on the left.

    Args:
        name: name of the base, for the message.

    Raises:
        DiffVPBaseModelError: the embeddings and the LLM have different widths, the LLM does not accept embeddings as a
            prompt, a prompt gives different logits in a batch than alone, or decoding with the cache differs from
            reading the whole text.
    """
    embed, weight = language_model.get_input_embeddings(), embedding_weight(language_model)
    width, hidden = weight.shape[-1], language_model.config.get_text_config().hidden_size
    if width != hidden:
        raise _refusal(name, f"input embeddings have width {width} (expected hidden_size, {hidden})")
    if weight.is_meta:  # shapes without weights
        return
    # Embeddings of real tokens have the scale, dtype and device that the LLM expects.
    ids = torch.arange(1, LONG + 1, device=weight.device) * 97 % weight.shape[0]
    long = embed(ids[None])
    short = long[:, LONG - SHORT :]
    batch = torch.cat([torch.cat([torch.zeros_like(long[:, SHORT:]), short], dim=1), long])
    mask = torch.ones(2, LONG, dtype=torch.long, device=batch.device)
    mask[0, : LONG - SHORT] = 0
    # TypeError: unknown argument. The others: a cache, mask or layer that does not support embeddings.
    try:
        alone = _read(language_model, short, mask[:1, -SHORT:])
        together = _read(language_model, batch, mask)[:1, -SHORT:]
        written = _decode(language_model, short, mask[:1, -SHORT:])
        whole = torch.cat([short, embed(written[:, :-1])], dim=1)
        decoded = _read(language_model, whole, torch.ones(whole.shape[:2], dtype=torch.long, device=whole.device))
    except torch.OutOfMemoryError:  # a RuntimeError that says nothing about the LLM
        raise
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise _refusal(name, f"it does not decode from embeddings ({error})") from error
    scale = float(alone.abs().max())
    quantised = getattr(language_model, "is_quantized", False)
    tolerance = scale * (COARSE_TOLERANCE if quantised else TOLERANCE.get(language_model.dtype, COARSE_TOLERANCE))
    apart = float((alone - together).abs().max())
    if not apart <= tolerance:
        raise _refusal(
            name,
            f"logits of a prompt differ by {apart:.2g} between a padded batch and the prompt alone (expected at most "
            f"{tolerance:.2g}): {type(language_model).__name__} ignores its attention mask",
        )
    # Greedy tokens may swap if two logits tie, so compare the logit of the chosen token with the best one.
    logits = decoded[0, SHORT - 1 :]
    behind = float((logits.max(dim=-1).values - logits.gather(-1, written[0][:, None])[:, 0]).max())
    if not behind <= 2 * tolerance:
        raise _refusal(
            name,
            f"decoding with the cache chooses tokens {behind:.2g} below the best of the whole text (expected at most "
            f"{2 * tolerance:.2g})",
        )


def _refusal(name: str, problem: str) -> DiffVPBaseModelError:
    remedy = "Choose another base; docs/bases.md lists the tested families."
    return DiffVPBaseModelError(f"{name}: {problem}. {remedy}")


def _read(language_model: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = {"position_ids": real_positions(mask)} if accepts(language_model, "position_ids") else {}
    result = language_model(inputs_embeds=embeddings, attention_mask=mask, return_dict=True, **positions)
    return result.logits.float()


def _decode(language_model: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0)
    generator: Any = language_model  # `generate` comes from GenerationMixin, not PreTrainedModel
    return generator.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=greedy)


__all__ = [
    "DiffVPBaseModelError",
    "base_tokenizer",
    "check_language_model",
    "is_folder",
    "load_base_model",
    "locate_base_model",
    "public_name",
]
