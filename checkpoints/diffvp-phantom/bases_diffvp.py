# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The base LLM: where it comes from, and the check that a causal LLM can be one.

Not every `AutoModelForCausalLM` takes prompts of embeddings, and some read a row otherwise in a batch than alone. On
such a base, training and writing raise no error, and the report of a scan depends on its neighbour.
"""

import importlib.metadata
import inspect
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file

from .gguf_diffvp import load_dequantized
from .storage_diffvp import DiffVPCheckpointError

PYPI_SCHEME = "pypi:"

SHORT, LONG, NEW_TOKENS = 5, 12, 3  # tokens of the two prompts, and at most of what is decoded
# Largest difference that is still rounding, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
COARSE_TOLERANCE = 0.05  # of half precision and of quantised weights


class DiffVPBaseModelError(ValueError):
    """A causal LLM cannot be a base of DiffVP."""


def locate_base_model(name: str, revision: str | None = None, gguf_file: str | None = None) -> tuple[str, str | None]:
    """
    Resolve a base LLM to what `from_pretrained` takes: a Hub id or directory, and the file name of a GGUF or `None`.

    `pypi:NAME` stands for the files of an installed distribution of exactly version `revision`: a base that comes
    from the package index and needs no Hub. `gguf_file` is then the file's path inside the distribution.

    Raises:
        DiffVPCheckpointError: the distribution is not installed, has another version or lacks the file.
    """
    if not name.startswith(PYPI_SCHEME):
        return name, gguf_file
    package = name.removeprefix(PYPI_SCHEME)
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
    path = Path(str(distribution.locate_file(gguf_file)))
    if not path.is_file():
        raise DiffVPCheckpointError(f"The installed {wanted} has no file {gguf_file}.")
    return str(path.parent), path.name


def public_name(name: str) -> str:
    """A Hub id or package as it is; of a folder the last part, for its path may name people and projects."""
    return Path(name).resolve().name if is_folder(name) else name


def is_folder(name: str) -> bool:
    """Whether a base or checkpoint is a folder of this machine, or was."""
    return bool(name) and (Path(name).is_absolute() or Path(name).is_dir())


def load_base_model(name: str, revision: str | None = None, gguf_file: str | None = None, **kwargs) -> PreTrainedModel:
    """Load a base LLM by its own `from_pretrained`; `kwargs` are its loading options (dtype, device_map, ...)."""
    path, file = locate_base_model(name, revision, gguf_file)
    if file is None:
        return AutoModelForCausalLM.from_pretrained(path, revision=revision or "main", **kwargs)
    if "quantization_config" in kwargs:
        raise DiffVPCheckpointError(f"A GGUF base ({name}) is dequantised on load and cannot be quantised again.")
    return load_dequantized(Path(path) / file, name, **kwargs)


def base_tokenizer(name: str, revision: str | None = None, gguf_file: str | None = None):
    """The tokenizer of a base LLM; `None` where none lies beside its weights, or in a GGUF, of which it is slow."""
    path, gguf_file = locate_base_model(name, revision, gguf_file)
    if gguf_file is not None:
        return None
    options = {"revision": revision or "main"}
    if cached_file(path, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **options) is None:
        return None
    return AutoTokenizer.from_pretrained(path, **options)


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
        raise _refusal(name, f"input embeddings have width {width} (expected hidden_size, {hidden})")
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
        raise _refusal(name, f"it does not decode from embeddings ({error})") from error
    scale = float(alone.abs().max())
    quantised = getattr(language_model, "is_quantized", False)
    tolerance = scale * (COARSE_TOLERANCE if quantised else TOLERANCE.get(language_model.dtype, COARSE_TOLERANCE))
    apart = float((alone - together).abs().max())
    if not apart <= tolerance:
        raise _refusal(
            name,
            f"logits of a prompt differ by {apart:.2g} between a padded batch and the prompt alone (expected at most "
            f"{tolerance:.2g}): {type(language_model).__name__} does not heed its attention mask",
        )
    # Greedy tokens may swap where two logits tie: the chosen one has to be as good as the best.
    logits = decoded[0, SHORT - 1 :]
    behind = float((logits.max(dim=-1).values - logits.gather(-1, written[0][:, None])[:, 0]).max())
    if not behind <= 2 * tolerance:
        raise _refusal(
            name,
            f"decoding with the cache chooses tokens {behind:.2g} below the best of the whole text (expected at most "
            f"{2 * tolerance:.2g})",
        )


def _refusal(name: str, problem: str) -> DiffVPBaseModelError:
    remedy = "take another base: docs/bases.md of DiffVP has the families that were tried"
    return DiffVPBaseModelError(f"{name}: {problem}; {remedy}.")


def _read(language_model: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = {"position_ids": real_positions(mask)} if accepts(language_model, "position_ids") else {}
    result = language_model(inputs_embeds=embeddings, attention_mask=mask, return_dict=True, **positions)
    return result.logits.float()


def _decode(language_model: PreTrainedModel, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    greedy = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, pad_token_id=0)
    return language_model.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=greedy)


__all__ = [
    "DiffVPBaseModelError",
    "base_tokenizer",
    "check_language_model",
    "is_folder",
    "load_base_model",
    "locate_base_model",
    "public_name",
]
