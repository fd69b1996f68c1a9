# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The checkpoint: own weights in `model.safetensors`, LoRA in `adapter/`, the base LLM by name.

Nothing else reads or writes weights.
"""

import contextlib
import copy
import functools
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, cached_file

from .bases_diffvp import check_language_model
from .configuration_diffvp import DiffVPConfig
from .pipeline_diffvp import CUSTOM_PIPELINES

WEIGHTS_NAME = "model.safetensors"
ADAPTER_SUBFOLDER = "adapter"
PYPI_SCHEME = "pypi:"
BASE_PREFIX = "language_model."
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
LLM_KWARGS = ("dtype", "device_map", "max_memory", "attn_implementation", "quantization_config", "offload_folder")


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


class DiffVPCheckpointMixin:
    """Loading, saving and merging of [`DiffVPForConditionalGeneration`]."""

    @classmethod
    def from_base(
        cls,
        base_model_name_or_path: str,
        *,
        base_model_revision: str | None = None,
        base_model_gguf_file: str | None = None,
        lora_config: LoraConfig | None = None,
        config: dict | None = None,
        **llm_kwargs,
    ) -> "DiffVPCheckpointMixin":
        """
        Start a model for training on a causal LLM that decodes from embeddings, and a batch like its rows alone.

        Args:
            base_model_name_or_path, base_model_revision, base_model_gguf_file: see [`DiffVPConfig`].
            lora_config: PEFT's config of the adapter; without one the LLM stays frozen as it is.
            config: fields of [`DiffVPConfig`] that differ from the defaults.
            llm_kwargs: loading options of the LLM (dtype, device_map, quantization_config, ...).

        Raises:
            DiffVPBaseModelError: the LLM cannot be a base (see [`check_language_model`]).
        """
        base = (base_model_name_or_path, base_model_revision, base_model_gguf_file)
        language_model = load_base_model(*base, **llm_kwargs)
        check_language_model(language_model, base_model_name_or_path)
        model_config = DiffVPConfig(
            text_config=copy.deepcopy(language_model.config),
            base_model_name_or_path=base_model_name_or_path,
            base_model_revision=base_model_revision,
            base_model_gguf_file=base_model_gguf_file,
            **(config or {}),
        )
        model = cls(model_config, language_model=language_model)
        model._place_own_modules()
        model.generation_config = copy.deepcopy(language_model.generation_config)
        if lora_config is not None:
            language_model.add_adapter(lora_config)
        return model.eval()

    def _place_own_modules(self) -> None:
        """Own modules follow the LLM's device and floating-point type, which is not that of its 4-bit weights."""
        for name, child in self.named_children():
            if name != "language_model":
                child.to(device=self.language_model.device, dtype=self.language_model.dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *model_args,
        config: DiffVPConfig | None = None,
        base_model_name_or_path: str | None = None,
        is_trainable: bool = False,
        **kwargs,
    ) -> "DiffVPCheckpointMixin":
        """
        Load a checkpoint with its base LLM and adapter.

        Args:
            base_model_name_or_path: another place of the same base LLM, such as a local directory.
            is_trainable: load the adapter for training.
            kwargs: the Hub's (`revision`, `token`, `cache_dir`, ...) and the LLM's loading options (`dtype`,
                `device_map`, `max_memory`, `attn_implementation`, `quantization_config`, `offload_folder`).

        Raises:
            DiffVPCheckpointError: a weight is missing, unexpected or of another shape, or the base LLM is not the one
                that the configuration describes.
        """
        hub_kwargs = {key: kwargs[key] for key in HUB_KWARGS if kwargs.get(key) is not None}
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        # Merged exports hold the LLM's weights, every other checkpoint names its base.
        if config.base_model_name_or_path is None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)

        service = ("_commit_hash", "_from_auto", "adapter_kwargs", "trust_remote_code", "use_safetensors")
        for key in (*HUB_KWARGS, *service):
            kwargs.pop(key, None)
        loading_info = kwargs.pop("output_loading_info", False)
        unknown = sorted(set(kwargs) - set(LLM_KWARGS))
        if unknown or model_args:
            raise TypeError(f"from_pretrained got unexpected argument(s): {', '.join(unknown) or model_args}.")
        if kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = config.dtype or torch.float32
        if base_model_name_or_path is None:
            base = (config.base_model_name_or_path, config.base_model_revision, config.base_model_gguf_file)
        else:
            base = (base_model_name_or_path,)
        base_hub_kwargs = {key: value for key, value in hub_kwargs.items() if key != "revision"}
        language_model = load_base_model(*base, **base_hub_kwargs, **kwargs)
        for field in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers"):
            found, expected = getattr(language_model.config, field), getattr(config.text_config, field)
            if found != expected:
                raise DiffVPCheckpointError(f"{base[0]}: {field} is {found}, the checkpoint was made for {expected}.")
        model = cls(config, language_model=language_model)
        load_own_weights(model, pretrained_model_name_or_path, BASE_PREFIX, **hub_kwargs)
        model._place_own_modules()
        adapter = locate_adapter(pretrained_model_name_or_path, **hub_kwargs)
        if config.has_adapter and adapter is None:
            raise DiffVPCheckpointError(
                f"{pretrained_model_name_or_path} was saved with an adapter, but {ADAPTER_SUBFOLDER}/ is not there."
            )
        if adapter is not None:
            language_model.load_adapter(adapter, is_trainable=is_trainable)
        model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub_kwargs)
        model.name_or_path = str(pretrained_model_name_or_path)
        model.eval()
        info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        return (model, info) if loading_info else model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        **kwargs,
    ) -> None:
        """
        Save own weights and adapter, without the base LLM unless the checkpoint is self-contained.

        `state_dict` may be the gathered state of the whole model (FSDP, DeepSpeed).
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        # Loadable through two auto classes; the saver only knows the one the class is registered for.
        auto_map = dict(getattr(self.config, "auto_map", None) or {})
        auto_map["AutoModelForImageTextToText"] = "modeling_diffvp.DiffVPForConditionalGeneration"
        self.config.auto_map = auto_map
        self.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        self.config.has_adapter = self.language_model._hf_peft_config_loaded
        if self.config.base_model_name_or_path is None:
            return super().save_pretrained(
                save_directory, is_main_process, state_dict, push_to_hub=push_to_hub, **kwargs
            )

        state = self.state_dict() if state_dict is None else state_dict
        own = {key: value for key, value in state.items() if not key.startswith(BASE_PREFIX)}
        if self.language_model._hf_peft_config_loaded:
            adapter_config = next(iter(self.language_model.peft_config.values()))
            # PEFT would write the path that the base happened to be loaded from on this machine.
            adapter_config.base_model_name_or_path = self.config.base_model_name_or_path
            adapter_config.revision = self.config.base_model_revision
            adapter_config.inference_mode = True  # as PEFT's own save_pretrained: whoever loads it asks for training
            self.language_model.save_pretrained(
                Path(save_directory) / ADAPTER_SUBFOLDER,
                is_main_process=is_main_process,
                state_dict={
                    key.removeprefix(BASE_PREFIX): value for key, value in state.items() if key.startswith(BASE_PREFIX)
                },
            )
        super().save_pretrained(save_directory, is_main_process, own, **kwargs)
        if push_to_hub:  # only now: transformers would take the adapter, which is there already, for an old file
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def merge_adapter(self) -> None:
        """Fold LoRA into the LLM's weights in place: the same outputs, decoded faster, no longer trainable."""
        language_model = self.language_model
        if getattr(language_model, "is_quantized", False):
            raise DiffVPCheckpointError("LoRA is not merged into a quantised LLM, the sum would be rounded again.")
        for name, module in list(language_model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                module.merge(safe_merge=True)
                language_model.set_submodule(name, module.get_base_layer())
        language_model._hf_peft_config_loaded = False

    def export_merged(self, save_directory: str | os.PathLike) -> None:
        """
        Write a self-contained checkpoint: LoRA merged into the LLM, all weights in `model.safetensors`.

        It contains the base LLM: mind the licence under which that may be passed on.
        """
        merged = copy.deepcopy(self)
        merged.merge_adapter()
        merged.config.base_model_name_or_path = None
        merged.config.base_model_revision = None
        merged.config.base_model_gguf_file = None
        merged.save_pretrained(save_directory)
