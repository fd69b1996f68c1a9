# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The LLM's adapter: find it, save it, load it, and merge it into the weights."""

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .storage_diffvp import ADAPTER_SUBFOLDER, DiffVPCheckpointError

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_PEFT_PREFIX = "base_model.model."  # the prefix of keys that PEFT's own loader expects
_COLUMNS = 4096  # 8-byte words per row when a large tensor is summed for its fingerprint


def embedding_weight(language_model: PreTrainedModel) -> torch.Tensor:
    """Return the weight (vocabulary, width) of an LLM's input embeddings."""
    embeddings: Any = language_model.get_input_embeddings()  # torch types attributes as Tensor | Module
    return embeddings.weight


def uncompiled(language_model: PreTrainedModel) -> PreTrainedModel:
    """Return the LLM inside the module that `torch.compile` returns, whose weights have other names."""
    return getattr(language_model, "_orig_mod", language_model)


def find_adapter(language_model: PreTrainedModel) -> tuple[str, PeftConfig] | None:
    """
    Return the name and config of the LLM's active adapter, or `None` if it has no adapter.

    Raises:
        DiffVPCheckpointError: the PEFT layers are not exactly one complete, active, unmerged adapter added by
            `add_adapter` or loaded from a checkpoint, or they repeat layers of the LLM. They can then be neither saved
            nor merged.
    """
    wrappers = [module for module in language_model.modules() if isinstance(module, _WRAPPERS)]
    if not wrappers:
        return None
    if not getattr(language_model, "_hf_peft_config_loaded", False):
        raise DiffVPCheckpointError(
            "PEFT layers were put into the LLM from outside: use model.language_model.add_adapter(lora_config)."
        )
    configs: dict[str, Any] = language_model.peft_config
    names = sorted(configs)
    if len(names) != 1:
        raise DiffVPCheckpointError(
            f"The LLM has {len(names)} adapters ({', '.join(names)}), but a checkpoint holds one: delete the others "
            "with model.language_model.delete_adapter(name)."
        )
    if any(module.disable_adapters or not module.active_adapters for module in wrappers):
        raise DiffVPCheckpointError(
            f"The adapter {names[0]} is disabled, at least in part, so the LLM runs without it: activate it with "
            f"model.language_model.set_adapter({names[0]!r}) and enable_adapters(), or delete it."
        )
    if any(module.merged for module in wrappers if isinstance(module, BaseTunerLayer)):
        raise DiffVPCheckpointError(
            "The adapter's layers were merged one by one, so the adapter would apply twice: unmerge() them, and call "
            "merge_adapter() instead."
        )
    if getattr(configs[names[0]], "layer_replication", None):  # only LoraConfig has it
        raise DiffVPCheckpointError(
            f"The adapter {names[0]} has layer_replication, which repeats layers of the LLM: neither a checkpoint nor "
            "a merged LLM can hold layers that share their weights. Add the adapter without layer_replication."
        )
    return names[0], configs[names[0]]


def base_names(language_model: nn.Module, keys) -> dict[str, str]:
    """Map each base weight's name in the state of an adapted LLM to its name without the adapter."""
    kept = {
        name: "base_layer"
        if isinstance(module, BaseTunerLayer)
        else ("original_module" if isinstance(module, ModulesToSaveWrapper) else "token_adapter")
        for name, module in language_model.named_modules()
        if isinstance(module, _WRAPPERS)
    }
    names = {}
    for key in keys:
        plain = key
        for name in reversed(kept):  # innermost first, because wrappers may be nested
            if plain is not None and plain.startswith(f"{name}."):
                inside = plain.removeprefix(f"{name}.{kept[name]}.")
                plain = None if inside == plain else f"{name}.{inside}"
        if plain is not None:
            names[key] = plain
    return names


def adapter_names(language_model: nn.Module) -> set[str]:
    """Names of the adapter's weights in the LLM's state dict."""
    state = language_model.state_dict()
    original = {
        f"{name}.original_module."
        for name, module in language_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return {key for key in state.keys() - base_names(language_model, state) if not key.startswith(tuple(original))}


def fingerprints(state: dict[str, torch.Tensor]) -> dict[str, str | None]:
    """
    Return each tensor's type, shape and digest of its bits as one string, or `None` for a tensor on the meta device.

    Large tensors are first reduced to column sums, in one pass on their own device. Tied weights are read once.
    """
    seen: dict[tuple, str | None] = {}
    found = {}
    for name, tensor in state.items():
        place = tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if place not in seen:
            seen[place] = _fingerprint(tensor)
        found[name] = seen[place]
    return found


@torch.no_grad()
def _fingerprint(tensor: torch.Tensor) -> str | None:
    if tensor.device.type == "meta":
        return None
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if bits.storage_offset() % 8:
        bits = bits.clone()
    rows = bits.numel() // (8 * _COLUMNS)
    head, tail = bits[: rows * 8 * _COLUMNS], bits[rows * 8 * _COLUMNS :]
    sums = head.view(torch.int64).view(rows, _COLUMNS).sum(dim=0)
    content = sums.cpu().numpy().tobytes() + tail.cpu().numpy().tobytes()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(content).hexdigest()}"


def locate_adapter(name: str | os.PathLike, **hub_kwargs) -> str | None:
    """
    Return the local folder of a checkpoint's LoRA weights, or `None` if it has none.

    PEFT and transformers accept a subfolder too, but transformers 5.19 looks for it only in Hub repositories and would
    load a local checkpoint without its adapter.
    """
    inside = "/".join(part for part in (hub_kwargs.get("subfolder"), ADAPTER_SUBFOLDER) if part)
    hub_kwargs = hub_kwargs | {"subfolder": inside}
    config = cached_file(name, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if config is None:
        return None
    weights = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, **hub_kwargs)
    return None if weights is None else str(Path(weights).parent)


def save_adapter(
    language_model: PreTrainedModel,
    adapter: tuple[str, PeftConfig],
    folder: str | os.PathLike,
    state: dict[str, torch.Tensor],
    base_model_name_or_path: str | None,
    base_model_revision: str | None,
) -> None:
    """
    Write the adapter in PEFT's format.

    Args:
        adapter: name and config, from [`find_adapter`].
        state: state dict of the LLM, with or without the base weights.
        base_model_name_or_path, base_model_revision: recorded in the adapter's config.
    """
    name, config = adapter
    config = copy.deepcopy(config)
    # PEFT would write the local path from which the base was loaded.
    config.base_model_name_or_path = base_model_name_or_path
    config.revision = base_model_revision
    config.inference_mode = True  # as in PEFT's save_pretrained: training is chosen on loading
    _initialise_plainly(config)
    for field, value in vars(config).items():
        if isinstance(value, set):  # the order of a set differs between processes
            setattr(config, field, sorted(value))
    weights = get_peft_model_state_dict(
        language_model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False
    )
    config.save_pretrained(str(folder))
    save_file(
        {f"{_PEFT_PREFIX}{key}": value.detach().cpu().clone().contiguous() for key, value in weights.items()},
        Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )


def _initialise_plainly(config: Any) -> None:
    """Reset the initialisation: PiSSA and similar methods change the base when `config`'s adapter is created."""
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True


def load_adapter(language_model: PreTrainedModel, folder: str | os.PathLike, is_trainable: bool) -> None:
    """
    Load a saved adapter into an LLM with PEFT's own functions: transformers' `load_adapter` loses DoRA's magnitudes.

    Raises:
        DiffVPCheckpointError: a weight is missing, unexpected or has a different shape, or part of the LLM is
            offloaded.
    """
    if any(parameter.device.type == "meta" for parameter in language_model.parameters()):
        raise DiffVPCheckpointError(
            "Part of the LLM is offloaded, and the adapter cannot be applied there: load the checkpoint without "
            "offloading, write it with export_merged(), and load the export with the device_map."
        )
    config = PeftConfig.from_pretrained(str(folder))
    _initialise_plainly(config)
    language_model.add_adapter(config)
    path = Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME
    state = {key.removeprefix(_PEFT_PREFIX): value for key, value in load_file(path).items()}
    expected = get_peft_model_state_dict(language_model, save_embedding_layers=False)
    # PEFT saves the embedding weights together with an adapter on the embeddings, but they belong to the base.
    state = {key: value for key, value in state.items() if key in expected or ".base_layer." not in key}
    check_weights(path, state, expected)
    set_peft_model_state_dict(language_model, state)
    if not is_trainable:
        language_model.requires_grad_(False)


def check_weights(path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """
    Compare the weights `found` in a file with those `expected` by the model.

    Args:
        path: file of the weights, for the message.

    Raises:
        DiffVPCheckpointError: a weight is missing, unexpected or has a different shape.
    """
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key}: file {tuple(found[key].shape)}, model {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & found.keys())
            if found[key].shape != expected[key].shape
        ],
    }
    for problem, keys in problems.items():
        if keys:
            raise DiffVPCheckpointError(f"{path}: {len(keys)} weight(s) {problem}: {', '.join(keys[:5])}.")


def merge_into_weights(language_model: PreTrainedModel) -> Callable[[], None]:
    """
    Merge the adapter into the weights of an LLM, in place.

    Tied embeddings and head become separate weights if the merge makes them differ.

    Returns:
        A function that undoes the merge, bit for bit.

    Raises:
        DiffVPCheckpointError: the LLM is quantised or offloaded, the adapter cannot be merged, or the merged LLM
            returns different logits. The LLM is left unchanged.
    """
    if getattr(language_model, "is_quantized", False):
        raise DiffVPCheckpointError("LoRA cannot be merged into a quantised LLM: the sum would be rounded again.")
    adapter = find_adapter(language_model)
    if adapter is None:
        return lambda: None
    if any(parameter.device.type == "meta" for parameter in language_model.parameters()):
        raise DiffVPCheckpointError("Part of the LLM is offloaded: load it without offloading to merge it.")
    name, config = adapter
    expected = _probe(language_model, config)
    undo = _remember(language_model, name, config)
    try:
        _unload(language_model)
        found = _probe(language_model, config)
        # In half precision the sum of weight and adapter is rounded to a few bits: only gross errors can be detected.
        tolerance = min(1e3 * torch.finfo(language_model.dtype).eps, 0.1) * float(expected.abs().max())
        error = float((found - expected).abs().max())
        if not error <= tolerance:
            raise DiffVPCheckpointError(
                f"The merged LLM's logits differ by {error:.2g} from those with the adapter; expected {tolerance:.2g} "
                "or less. The adapter cannot be merged: save it as it is, with save_pretrained."
            )
    except DiffVPCheckpointError:
        undo()
        raise
    except Exception as error:  # PEFT's errors depend on the adapter, and none may leave the LLM partly merged
        undo()
        raise DiffVPCheckpointError(f"PEFT cannot merge this adapter ({type(error).__name__}: {error}).") from error
    return undo


def _outermost(language_model: nn.Module) -> dict[str, Any]:
    """Return the outermost PEFT wrappers by module name; nested wrappers are inside them."""
    found = {}
    for name, module in language_model.named_modules():
        if isinstance(module, _WRAPPERS) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _unload(language_model: PreTrainedModel) -> None:
    for name, wrapper in _outermost(language_model).items():
        _untie(language_model, name)
        if hasattr(wrapper, "unload_and_optionally_merge_module"):  # PEFT's own protocol
            plain = wrapper.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
        else:
            wrapper.merge(safe_merge=True)
            plain = wrapper.get_base_layer()
        language_model.set_submodule(name, plain.requires_grad_(False))
    language_model._hf_peft_config_loaded = False
    del language_model.peft_config
    tied = language_model.all_tied_weights_keys
    still = {
        target: source
        for target, source in tied.items()
        if language_model.get_parameter(target) is language_model.get_parameter(source)
    }
    if len(still) < len(tied):
        language_model.all_tied_weights_keys = still
        language_model.config.tie_word_embeddings = False


def _untie(language_model: nn.Module, wrapped: str) -> None:
    """Copy the weights that a wrapped module shares with other modules: merging would change both."""
    shared = {
        id(parameter)
        for name, parameter in language_model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{wrapped}.")
    }
    for module in language_model.get_submodule(wrapped).modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in shared:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def _remember(language_model: PreTrainedModel, adapter_name: str, config: PeftConfig) -> Callable[[], None]:
    wrappers = _outermost(language_model)
    weights = [
        # The copies are kept on the CPU: the adapted weights are held twice, and accelerator memory is scarcest.
        (module, name, parameter, parameter.detach().to("cpu", copy=True), parameter.requires_grad)
        for wrapper in wrappers.values()
        for module in wrapper.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    # Some adapter types are merged by replacing modules.
    children = [(module, dict(module._modules)) for wrapper in wrappers.values() for module in wrapper.modules()]
    tied, tie = language_model.all_tied_weights_keys, getattr(language_model.config, "tie_word_embeddings", False)

    def undo() -> None:
        for module, submodules in children:
            module._modules.clear()
            module._modules.update(submodules)
        for module, name, parameter, value, requires_grad in weights:
            parameter.data = value.to(parameter.device)
            setattr(module, name, parameter.requires_grad_(requires_grad))
        for name, wrapper in wrappers.items():
            for layer in wrapper.modules():
                if isinstance(layer, BaseTunerLayer):
                    layer.merged_adapters = []
            language_model.set_submodule(name, wrapper)
        language_model.all_tied_weights_keys = tied
        language_model.config.tie_word_embeddings = tie
        # transformers' protocol PeftConfigLike does not accept PEFT's own PeftConfig.
        language_model.peft_config = {adapter_name: config}  # pyright: ignore[reportAttributeAccessIssue]
        language_model._hf_peft_config_loaded = True

    return undo


@torch.no_grad()
def _probe(language_model: PreTrainedModel, config: PeftConfig) -> torch.Tensor:
    """Return the logits of tokens spread over the vocabulary, including individually trained tokens."""
    own = getattr(config, "trainable_token_indices", None) or []
    own = [index for indices in own.values() for index in indices] if isinstance(own, dict) else own
    vocabulary = len(embedding_weight(language_model))
    ids = [*torch.linspace(0, vocabulary - 1, 16).long().tolist(), *own[:16]]
    training = language_model.training
    try:
        return language_model.eval()(input_ids=torch.tensor([ids], device=language_model.device)).logits.float()
    finally:
        language_model.train(training)
