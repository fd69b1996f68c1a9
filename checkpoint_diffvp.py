# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Where the base LLM comes from, and strict loading of a checkpoint's own weights."""

import contextlib
import functools
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, cached_file

WEIGHTS_NAME = "model.safetensors"
ADAPTER_SUBFOLDER = "adapter"
PYPI_SCHEME = "pypi:"


class DiffVPCheckpointError(RuntimeError):
    """A checkpoint, or the base LLM it names, does not fit the configuration."""


def check_checkpoint_name(name: str | os.PathLike) -> None:
    """
    Raises:
        DiffVPCheckpointError: `name` is no folder, and cannot be the id of a Hub repository either: a path mistyped.
    """
    if Path(name).is_dir():
        return
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        expected = "a folder with a checkpoint, or the id of a Hub repository"
        raise DiffVPCheckpointError(f"{name}: there is no such folder; expected {expected}.") from error


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


def load_base_model(name: str, revision: str | None = None, gguf_file: str | None = None, **kwargs) -> PreTrainedModel:
    """Load a base LLM by its own `from_pretrained`; `kwargs` are its loading options (dtype, device_map, ...)."""
    path, file = locate_base_model(name, revision, gguf_file)
    if file is None:
        return AutoModelForCausalLM.from_pretrained(path, revision=revision or "main", **kwargs)
    if "quantization_config" in kwargs:
        raise DiffVPCheckpointError(f"A GGUF base ({name}) is dequantised on load and cannot be quantised again.")
    with _gguf_read_once():
        loaded = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, **kwargs)
    # transformers marks a model read from GGUF as quantised although its weights are plain tensors, and then refuses
    # to save it: move the weights into an ordinary model of the same config.
    config = loaded.config
    del config.quantization_config
    config._name_or_path = name
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model.to(loaded.device).eval()


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers parses a GGUF file twice, and makes the table of its names anew for each module of the LLM: 8 s of
    14 for one of 135 M parameters."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


def locate_adapter(name: str, **hub_kwargs) -> str | None:
    """
    The folder of a checkpoint's LoRA weights on this machine; `None` if it has none.

    PEFT and transformers take a subfolder too, but transformers 5.19 looks for it in Hub repositories alone and would
    load a local checkpoint without its adapter.
    """
    config = cached_file(
        name,
        ADAPTER_CONFIG_NAME,
        subfolder=ADAPTER_SUBFOLDER,
        _raise_exceptions_for_missing_entries=False,
        **hub_kwargs,
    )
    if config is None:
        return None
    weights = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, subfolder=ADAPTER_SUBFOLDER, **hub_kwargs)
    return str(Path(weights).parent)


def load_own_weights(model: nn.Module, name: str, prefix_of_base: str, **hub_kwargs) -> None:
    """
    Strictly load a checkpoint's `model.safetensors` into everything of `model` but the base LLM.

    Raises:
        DiffVPCheckpointError: a weight is missing, unexpected or of another shape.
    """
    path = cached_file(name, WEIGHTS_NAME, **hub_kwargs)
    state = load_file(path)
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(prefix_of_base)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    mismatched = [
        f"{key}: file {tuple(state[key].shape)}, model {tuple(own[key].shape)}"
        for key in sorted(own.keys() & state.keys())
        if state[key].shape != own[key].shape
    ]
    for problem, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)):
        if keys:
            raise DiffVPCheckpointError(f"{path}: {len(keys)} weight(s) {problem}: {', '.join(keys[:5])}.")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])
