# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The LLM's adapter: what it is, its files, and how it is folded into the weights."""

import copy
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from .storage_diffvp import ADAPTER_SUBFOLDER, DiffVPCheckpointError

_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_PEFT_PREFIX = "base_model.model."  # what PEFT's own loader expects
_COLUMNS = 4096


def find_adapter(language_model: nn.Module) -> tuple[str, PeftConfig] | None:
    """
    Name and config of the adapter that acts in an LLM; `None` without one.

    Raises:
        DiffVPCheckpointError: what acts is not one whole adapter that `add_adapter` or a checkpoint brought, and so
            can neither be saved nor merged as it is.
    """
    wrappers = [module for module in language_model.modules() if isinstance(module, _WRAPPERS)]
    if not wrappers:
        return None
    if not getattr(language_model, "_hf_peft_config_loaded", False):
        raise DiffVPCheckpointError(
            "PEFT layers were put into the LLM from outside: use model.language_model.add_adapter(lora_config)."
        )
    names = sorted(language_model.peft_config)
    if len(names) != 1:
        raise DiffVPCheckpointError(
            f"The LLM has {len(names)} adapters ({', '.join(names)}), a checkpoint has one: delete the others with "
            "model.language_model.delete_adapter(name)."
        )
    if any(module.disable_adapters or not module.active_adapters for module in wrappers):
        raise DiffVPCheckpointError(
            f"The adapter {names[0]} is disabled, at least in part, and the LLM speaks without it: activate it with "
            f"model.language_model.set_adapter({names[0]!r}) and enable_adapters(), or delete it."
        )
    if any(module.merged for module in wrappers if isinstance(module, BaseTunerLayer)):
        raise DiffVPCheckpointError(
            "The adapter's layers were merged one by one and would act twice: unmerge() them, and use merge_adapter()."
        )
    return names[0], language_model.peft_config[names[0]]


def base_names(language_model: nn.Module, keys) -> dict[str, str]:
    """{name in the state of an LLM with an adapter: name in the LLM without}; what is the adapter's is left out."""
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
        for name in reversed(kept):  # the innermost first, as wrappers may be nested
            if plain is not None and plain.startswith(f"{name}."):
                inside = plain.removeprefix(f"{name}.{kept[name]}.")
                plain = None if inside == plain else f"{name}.{inside}"
        if plain is not None:
            names[key] = plain
    return names


def adapter_names(language_model: nn.Module) -> set[str]:
    """Names in the state of an LLM of what is its adapter's."""
    state = language_model.state_dict()
    original = {
        f"{name}.original_module."
        for name, module in language_model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    return {key for key in state.keys() - base_names(language_model, state) if not key.startswith(tuple(original))}


def fingerprints(state: dict[str, torch.Tensor]) -> dict[str, str | None]:
    """
    Of each tensor its type, shape and a digest of its bits; `None` for one that is not in memory.

    A large tensor is summed over columns first, in one pass on the device it is on; tied weights are read once.
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


def locate_adapter(name: str, **hub_kwargs) -> str | None:
    """
    The folder of a checkpoint's LoRA weights on this machine; `None` if it has none.

    PEFT and transformers take a subfolder too, but transformers 5.19 looks for it in Hub repositories alone and would
    load a local checkpoint without its adapter.
    """
    inside = "/".join(part for part in (hub_kwargs.get("subfolder"), ADAPTER_SUBFOLDER) if part)
    hub_kwargs = hub_kwargs | {"subfolder": inside}
    config = cached_file(name, ADAPTER_CONFIG_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    if config is None:
        return None
    weights = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, **hub_kwargs)
    return str(Path(weights).parent)


def save_adapter(
    language_model: PreTrainedModel,
    adapter: tuple[str, PeftConfig],
    folder: str | os.PathLike,
    state: dict[str, torch.Tensor],
    base_model_name_or_path: str | None,
    base_model_revision: str | None,
) -> None:
    """Write the adapter as PEFT does; `state` is the LLM's, with or without the base's weights."""
    name, config = adapter
    config = copy.deepcopy(config)
    # PEFT would write the path that the base happened to be loaded from on this machine.
    config.base_model_name_or_path = base_model_name_or_path
    config.revision = base_model_revision
    config.inference_mode = True  # as PEFT's own save_pretrained: whoever loads it asks for training
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # PiSSA and its like change the base when they start, and would once more
    for field, value in vars(config).items():
        if isinstance(value, set):  # whose order is another in each process
            setattr(config, field, sorted(value))
    weights = get_peft_model_state_dict(
        language_model, state_dict=dict(state), adapter_name=name, save_embedding_layers=False
    )
    config.save_pretrained(folder)
    save_file(
        {f"{_PEFT_PREFIX}{key}": value.detach().cpu().clone().contiguous() for key, value in weights.items()},
        Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME,
        metadata={"format": "pt"},
    )


def load_adapter(language_model: PreTrainedModel, folder: str | os.PathLike, is_trainable: bool) -> None:
    """
    Put a saved adapter into an LLM by PEFT's own functions: transformers' `load_adapter` loses DoRA's magnitudes.

    Raises:
        DiffVPCheckpointError: a weight is missing, unexpected or of another shape, or part of the LLM is offloaded.
    """
    if any(parameter.device.type == "meta" for parameter in language_model.parameters()):
        raise DiffVPCheckpointError(
            "Part of the LLM is offloaded, where no adapter would reach it: load the checkpoint without offloading, "
            "export_merged() it, and load that with the device_map."
        )
    config = PeftConfig.from_pretrained(str(folder))
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True
    language_model.add_adapter(config)
    path = Path(folder) / ADAPTER_SAFE_WEIGHTS_NAME
    state = {key.removeprefix(_PEFT_PREFIX): value for key, value in load_file(path).items()}
    expected = get_peft_model_state_dict(language_model, save_embedding_layers=False)
    # PEFT saves the weights of embeddings along with an adapter of theirs; they are the base's.
    state = {key: value for key, value in state.items() if key in expected or ".base_layer." not in key}
    check_weights(path, state, expected)
    set_peft_model_state_dict(language_model, state)
    if not is_trainable:
        language_model.requires_grad_(False)


def check_weights(path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """
    Raises:
        DiffVPCheckpointError: a weight is missing, unexpected or of another shape.
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
    Fold the adapter into the weights of an LLM, in place. Returns what undoes it, bit for bit.

    Embeddings and head that were tied and no longer are the same become two weights.

    Raises:
        DiffVPCheckpointError: the LLM is quantised or offloaded, the adapter cannot be merged, or the merged LLM says
            something else. The LLM is then as it was.
    """
    if getattr(language_model, "is_quantized", False):
        raise DiffVPCheckpointError("LoRA is not merged into a quantised LLM, the sum would be rounded again.")
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
        # In half precision the sum of weight and adapter is rounded to a few bits: what is left to see is a wrong one.
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
    except Exception as error:  # whatever PEFT says of a kind of adapter: nothing may stay half merged
        undo()
        raise DiffVPCheckpointError(f"PEFT does not merge this adapter ({type(error).__name__}: {error}).") from error
    return undo


def _outermost(language_model: nn.Module) -> dict[str, nn.Module]:
    """The wrapped modules by name, each with all of its wrappers."""
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
    """Give a wrapped module weights of its own, if others share them: merging would change both."""
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
        # On the CPU: there has to be room for the adapted weights twice, and an accelerator has the least.
        (module, name, parameter, parameter.detach().to("cpu", copy=True), parameter.requires_grad)
        for wrapper in wrappers.values()
        for module in wrapper.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]
    # Some kinds merge by exchanging modules.
    children = [(module, dict(module._modules)) for wrapper in wrappers.values() for module in wrapper.modules()]
    tied, tie = language_model.all_tied_weights_keys, getattr(language_model.config, "tie_word_embeddings", False)

    def undo() -> None:
        for module, its in children:
            module._modules.clear()
            module._modules.update(its)
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
        language_model.peft_config = {adapter_name: config}
        language_model._hf_peft_config_loaded = True

    return undo


@torch.no_grad()
def _probe(language_model: PreTrainedModel, config: PeftConfig) -> torch.Tensor:
    """Logits of some tokens from all over the vocabulary, those trained by themselves among them."""
    own = getattr(config, "trainable_token_indices", None) or []
    own = [index for indices in own.values() for index in indices] if isinstance(own, dict) else own
    vocabulary = language_model.get_input_embeddings().weight.shape[0]
    ids = [*torch.linspace(0, vocabulary - 1, 16).long().tolist(), *own[:16]]
    training = language_model.training
    try:
        return language_model.eval()(input_ids=torch.tensor([ids], device=language_model.device)).logits.float()
    finally:
        language_model.train(training)
