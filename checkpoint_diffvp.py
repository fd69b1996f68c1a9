# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Load and save checkpoints: own weights in `model.safetensors`, LoRA in `adapter/`, the base LLM by name or in full.

All reading and writing of weights starts here; `storage_diffvp.py` handles files, `adapter_diffvp.py` the adapter.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .adapter_diffvp import (
    adapter_names,
    base_names,
    check_weights,
    embedding_weight,
    find_adapter,
    fingerprints,
    load_adapter,
    locate_adapter,
    merge_into_weights,
    save_adapter,
    uncompiled,
)
from .bases_diffvp import base_tokenizer, check_language_model, is_folder, load_base_model, public_name
from .configuration_diffvp import DiffVPConfig
from .drafts_diffvp import ReportDrafts
from .generation_diffvp import own_generation_config
from .gguf_diffvp import KNOWN_FINGERPRINTS
from .storage_diffvp import (
    ADAPTER_SUBFOLDER,
    DRAFTS_NAME,
    HUB_KWARGS,
    DiffVPCheckpointError,
    check_config,
    check_digest,
    digests,
    locate_weights,
    read_weights,
    replace_files,
)

logger = logging.get_logger(__name__)

# The mixins are used together with PreTrainedModel, whose attributes type checkers have to know.
_Model = PreTrainedModel if TYPE_CHECKING else object
_AnyModel = TypeVar("_AnyModel", bound="DiffVPCheckpointMixin")
_BaseModel = TypeVar("_BaseModel", bound="DiffVPBaseModelMixin")

BASE_PREFIX = "language_model."
_COMPILED_PREFIX = f"{BASE_PREFIX}_orig_mod."  # after `model.language_model = torch.compile(model.language_model)`
LLM_KWARGS = ("dtype", "device_map", "max_memory", "attn_implementation", "quantization_config", "offload_folder")
# Arguments that transformers accepts and that have no effect here: with any value, and with the listed values.
_WITHOUT_EFFECT = {
    "_commit_hash",
    "_fast_init",
    "_from_auto",
    "_from_pipeline",
    "adapter_kwargs",
    "code_revision",
    "disable_mmap",
    "low_cpu_mem_usage",
    "mirror",
    "offload_state_dict",
    "resume_download",
    "tqdm_class",
    "trust_remote_code",
    "weights_only",
}
_NEUTRAL = {
    "adapter_name": (None, "default"),
    "allow_all_kernels": (None, False),
    "device_mesh": (None,),
    "distributed_config": (None,),
    "from_flax": (None, False),
    "from_tf": (None, False),
    "fusion_config": (None,),
    "gguf_file": (None,),
    "ignore_mismatched_sizes": (None, False),
    "kernel_config": (None,),
    "key_mapping": (None, {}),
    "load_in_4bit": (None, False),
    "load_in_8bit": (None, False),
    "offload_buffers": (None, False),
    "state_dict": (None,),
    "tp_plan": (None,),
    "tp_size": (None,),
    "use_auth_token": (None,),
    "use_kernels": (None, False),
    "use_safetensors": (None, True),
    "variant": (None,),
}


def _habits(cls: type["DiffVPCheckpointMixin"], kwargs: dict) -> dict:
    """
    Drop the arguments of `from_pretrained` that have no effect here, and refuse unknown ones.

    Returns:
        The remaining arguments: options of the Hub and of the LLM, and fields of the configuration.

    Raises:
        TypeError: an argument is unknown, or has a value that DiffVP checkpoints do not support.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in _WITHOUT_EFFECT}
    torch_dtype = kwargs.pop("torch_dtype", None)
    if torch_dtype is not None:
        logger.warning_once("`torch_dtype` is deprecated! Use `dtype` instead!")  # transformers' wording
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = torch_dtype
    for key, values in _NEUTRAL.items():
        if key in kwargs and kwargs.pop(key) not in values:
            raise TypeError(f"{cls.__name__}.from_pretrained does not support {key}, except as {values[-1]!r}.")
    overridable = cls._config_fields()
    known = {*HUB_KWARGS, "subfolder", *LLM_KWARGS, "generation_config", "output_loading_info", *overridable}
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(f"from_pretrained got unexpected argument(s): {', '.join(unknown)}.")
    return {key: value for key, value in kwargs.items() if value is not None or key in overridable - {"dtype"}}


def _named_base(config: DiffVPConfig) -> tuple[str, str | None, str | None]:
    """Return name, revision and GGUF file of the base LLM that the configuration names."""
    name = config.base_model_name_or_path
    if name is None:
        raise DiffVPCheckpointError("config.json: base_model_name_or_path: None (expected the name of the base LLM)")
    return name, config.base_model_revision, config.base_model_gguf_file


def _named_uncompiled(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state dict with the names that it has if the LLM is not compiled."""
    return {key.replace(_COMPILED_PREFIX, BASE_PREFIX, 1): value for key, value in state.items()}


class DiffVPCheckpointMixin(_Model):
    """Strict loading and atomic saving for all DiffVP models."""

    # {prefix of this model's weights in the checkpoint of a larger model: prefix here}; later entries take precedence.
    _prefixes_in_whole: dict[str, str] = {}

    if TYPE_CHECKING:
        config: DiffVPConfig
        _adapter_beside: set[str]  # keys of an adapter that the file of the own weights holds, too

    @classmethod
    def _config_fields(cls) -> set[str]:
        """Names of the fields of the configuration."""
        config_class: Any = cls.config_class
        return {field.name for field in fields(config_class)}

    @classmethod
    def _is_part_of(cls, config: DiffVPConfig) -> bool:
        """True if the checkpoint holds a larger model, of which this one is a part."""
        larger = {"DiffVPModel", "DiffVPForConditionalGeneration"} & set(config.architectures or [])
        return bool(larger - {base.__name__ for base in cls.__mro__})

    @classmethod
    def _read_part(cls, files: dict[str, str], config: DiffVPConfig) -> dict[str, torch.Tensor]:
        state = read_weights(files, lambda key: not key.startswith(BASE_PREFIX))
        return {
            there + key.removeprefix(here): value
            for here, there in cls._prefixes_in_whole.items()
            if config.share_encoder or here != "vision_encoder."  # a classifier that does not share it has its own
            for key, value in state.items()
            if key.startswith(here)
        }

    @classmethod
    def _read_config(cls, name, config, kwargs: dict) -> tuple[DiffVPConfig, dict]:
        """Return the configuration and the options that locate the other files; both are removed from `kwargs`."""
        hub_kwargs = {key: kwargs.pop(key) for key in (*HUB_KWARGS, "subfolder") if key in kwargs}
        found: Any = config
        if not isinstance(config, PreTrainedConfig):
            overridable = cls._config_fields() - {"dtype"}
            overrides = {key: kwargs.pop(key) for key in overridable & kwargs.keys()}
            place = name if config is None else config
            config_class: Any = cls.config_class
            if os.path.isdir(place):
                check_config(os.path.join(place, hub_kwargs.get("subfolder", "")), config_class.model_type)
            found = config_class.from_pretrained(place, **hub_kwargs, **overrides)
        return copy.deepcopy(found), hub_kwargs

    @classmethod
    def from_pretrained(
        cls: type[_AnyModel],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        **kwargs,
    ) -> _AnyModel:
        """
        Load a checkpoint as in transformers, but strictly, and freeze the encoder and classifier of a larger model.

        The checkpoint may be that of a whole [`DiffVPForConditionalGeneration`], of which this model is a part.

        Raises:
            DiffVPCheckpointError: a weight is missing, unexpected or has a different shape, or comes from another save
                than `config.json`.
            TypeError: an argument is unknown.
        """
        if pretrained_model_name_or_path is None:  # the caller passes a `state_dict`
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        name = pretrained_model_name_or_path
        kwargs = _habits(cls, kwargs)
        if model_args:
            raise TypeError(f"from_pretrained got unexpected argument(s): {model_args}.")
        own_config, hub_kwargs = cls._read_config(name, config, kwargs)
        files = locate_weights(name, **hub_kwargs)
        expected, own_config.file_digests = own_config.file_digests, None
        loading_info = kwargs.pop("output_loading_info", False)
        options = kwargs | {"config": own_config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        # transformers annotates the model alone, without the `output_loading_info`.
        loaded: Any
        if cls._is_part_of(own_config):
            loaded = super().from_pretrained(None, state_dict=cls._read_part(files, own_config), **options)
            loaded[0].name_or_path = str(name)
        else:
            loaded = super().from_pretrained(name, **options, **hub_kwargs)
        model, info = loaded
        # `_write` may store the adapter in this file, too. The model does not have the adapter yet.
        inside = BASE_PREFIX if own_config.has_adapter else ()
        model._adapter_beside = {key for key in info["unexpected_keys"] if key.startswith(inside)}
        info["unexpected_keys"] = set(info["unexpected_keys"]) - model._adapter_beside
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if keys := sorted(map(str, info[problem])):
                words = {"mismatched_keys": "of another shape"}.get(problem, problem.removesuffix("_keys"))
                raise DiffVPCheckpointError(f"{name}: {len(keys)} weight(s) {words}: {', '.join(keys[:5])}.")
        if expected is not None and any(file in expected for file in files):
            for file, path in files.items():
                check_digest(expected, file, path)
        model._freeze()
        result: Any = (model, info) if loading_info else model
        return result

    def _freeze(self) -> None:
        """Freeze parts of the model after loading. Does nothing by default; models override it."""

    # PreTrainedModel takes more arguments by position; here they are keywords.
    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        *,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        Save as in transformers, but atomically: a save that fails or is killed never leaves a mixture of two models.
        One that fails leaves the configuration as it was.

        Raises:
            TypeError: `variant` or `distributed_checkpoint` is given: `from_pretrained` does not read such files.
            NotADirectoryError: `save_directory` is a file.
            DiffVPCheckpointError: an adapter was added to the whole model instead of the LLM, or `save_directory` is
                the folder of the base LLM, which the checkpoint needs.
        """
        for name in ("variant", "distributed_checkpoint"):
            if kwargs.pop(name, None):
                raise TypeError(f"save_pretrained does not support {name}: from_pretrained could not read the files.")
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{save_directory} is a file; expected a folder.")
        if getattr(self, "_hf_peft_config_loaded", False):
            raise DiffVPCheckpointError(
                "An adapter was added to the whole model, which a checkpoint cannot hold: add it to the LLM with "
                "model.language_model.add_adapter(lora_config)."
            )
        token = {key: kwargs[key] for key in ("token",) if kwargs.get(key) is not None}
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr", "private") if key in kwargs}
        fields_before = dict(vars(self.config))
        try:
            with replace_files(save_directory, is_main_process) as staged:
                state = self.state_dict() if state_dict is None else state_dict
                # `Trainer` resumes and loads the best model from such a folder, but reads one file, not the adapter.
                resumed = Path(save_directory).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
                self._write(staged, is_main_process, state, resumed, **kwargs)
        except BaseException:
            vars(self.config).clear()
            vars(self.config).update(fields_before)
            raise
        if push_to_hub:  # after saving: transformers would treat the adapter, which exists already, as an old file
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub, **token)

    def _write(self, folder: Path, is_main_process: bool, state: dict, resumed: bool, **kwargs) -> None:
        self.config.auto_map = {"AutoConfig": "configuration_diffvp.DiffVPConfig"}
        vars(self.config).pop("custom_pipelines", None)
        self.config.has_adapter = False
        self._write_weights(folder, is_main_process, state, **kwargs)

    def _write_weights(
        self, folder: Path, is_main_process: bool, state: dict, own_weights: bool = True, **kwargs
    ) -> None:
        """Let transformers write `config.json` and the weights, then rewrite `config.json` with their digests."""
        super().save_pretrained(folder, is_main_process, state, **kwargs)
        if is_main_process:
            try:
                self.config.file_digests = digests(folder, own_weights) or None
                self.config.to_json_file(folder / "config.json", use_diff=True)
            finally:
                self.config.file_digests = None


class DiffVPBaseModelMixin(DiffVPCheckpointMixin):
    """Loading, saving and merging of [`DiffVPForConditionalGeneration`] with its base LLM."""

    # Fingerprints of the base's weights when they were loaded, by name: they show whether the LLM is still that base.
    _base_fingerprints: dict[str, str | None] | None = None

    if TYPE_CHECKING:
        language_model: PreTrainedModel
        drafts: ReportDrafts | None

    @classmethod
    def from_base(
        cls: type[_BaseModel],
        base_model_name_or_path: str,
        *,
        base_model_revision: str | None = None,
        base_model_gguf_file: str | None = None,
        lora_config: LoraConfig | None = None,
        config: dict | None = None,
        **llm_kwargs,
    ) -> _BaseModel:
        """
        Create a model for training from a base LLM, with new weights for everything else.

        The LLM must decode from embeddings, and give the same result for a row alone and in a batch.

        Args:
            base_model_name_or_path, base_model_revision, base_model_gguf_file: see [`DiffVPConfig`].
            lora_config: PEFT's config of the adapter. `None` keeps the LLM frozen.
            config: fields of [`DiffVPConfig`] that differ from the defaults.
            llm_kwargs: loading options of the LLM (dtype, device_map, quantization_config, ...).

        Raises:
            DiffVPBaseModelError: the LLM cannot be used as a base (see [`check_language_model`]).
            DiffVPCheckpointError: the base needs code of its own (`trust_remote_code`), which checkpoints lack, or
                checkpoints cannot hold such an adapter.
        """
        base = (base_model_name_or_path, base_model_revision, base_model_gguf_file)
        language_model = load_base_model(*base, **llm_kwargs)
        if type(language_model).is_remote_code():
            raise DiffVPCheckpointError(
                f"{base_model_name_or_path} needs code of its own ({type(language_model).__name__}), which "
                "checkpoints do not include: take a base whose architecture is part of transformers."
            )
        check_language_model(language_model, base_model_name_or_path)
        model_config = DiffVPConfig(
            text_config=copy.deepcopy(language_model.config),
            base_model_name_or_path=base_model_name_or_path,
            base_model_revision=base_model_revision,
            base_model_gguf_file=base_model_gguf_file,
            **(config or {}),
        )
        tokenizer = base_tokenizer(*base, **llm_kwargs)
        decoding = own_generation_config(language_model.generation_config, tokenizer)
        model = cls(model_config, language_model=language_model)
        model._place_own_modules()
        model.generation_config = decoding
        model._remember_base()
        if lora_config is not None:
            language_model.add_adapter(lora_config)
            find_adapter(language_model)  # refuses one that could not be saved, before it is trained
        return model.eval()

    def train(self, mode: bool = True):
        if mode:
            self.generation_config.validate(strict=True)  # an invalid one could not be saved after training
        return super().train(mode)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.language_model.set_output_embeddings(new_embeddings)

    @staticmethod
    def _keep_weights(language_model: PreTrainedModel) -> None:
        """Mark loaded weights, so that `post_init` does not initialise them again."""
        tensors: list[Any] = [*language_model.parameters(), *language_model.buffers()]
        for tensor in tensors:
            tensor._is_hf_initialized = True

    def _place_own_modules(self) -> None:
        """Move own modules to the LLM's device and floating-point type, which is not the type of 4-bit weights."""
        for name, child in self.named_children():
            if name != "language_model":
                child.to(device=self.language_model.device, dtype=self.language_model.dtype)

    @classmethod
    def from_pretrained(
        cls: type[_BaseModel],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        base_model_name_or_path: str | None = None,
        is_trainable: bool = False,
        **kwargs,
    ) -> _BaseModel:
        """
        Load a checkpoint with its base LLM and adapter.

        Args:
            config: a configuration, or its path or Hub id; by default the checkpoint's.
            base_model_name_or_path: another location of the same base LLM, such as a local directory.
            is_trainable: load the adapter for training.
            kwargs: options of the Hub (`revision`, `token`, `cache_dir`, ...), loading options of the LLM (`dtype`,
                `device_map`, `max_memory`, `attn_implementation`, `quantization_config`, `offload_folder`) and fields
                of [`DiffVPConfig`] to change.

        Raises:
            DiffVPCheckpointError: a weight is missing, unexpected or has a different shape, or comes from another save
                than `config.json`, or the base LLM is not the one that the configuration describes.
            TypeError: an argument is unknown.
        """
        name = pretrained_model_name_or_path
        if name is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        kwargs = _habits(cls, kwargs)
        if model_args:
            raise TypeError(f"from_pretrained got unexpected argument(s): {model_args}.")
        loading_info = kwargs.pop("output_loading_info", False)
        own_config, hub_kwargs = cls._read_config(name, config, kwargs)
        if "DiffVPModel" in (own_config.architectures or []):
            raise DiffVPCheckpointError(
                f"{name}: architectures: DiffVPModel, which is saved without the LLM's adapter (expected "
                "DiffVPForConditionalGeneration)"
            )
        adapter = cls._locate_adapter(name, own_config, hub_kwargs)
        # Self-contained checkpoints hold the LLM's weights; all others name their base.
        if own_config.base_model_name_or_path is None:
            options = kwargs | {"config": own_config, "output_loading_info": True}
            loaded: Any = super().from_pretrained(name, **options, **hub_kwargs)
            model, info = loaded
        else:
            model = cls._from_named_base(name, own_config, base_model_name_or_path, hub_kwargs, kwargs)
            info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        if adapter is not None:
            load_adapter(model.language_model, adapter, is_trainable)
            beside = model._adapter_beside
            model._check_adapter_twice(name, read_weights(locate_weights(name, **hub_kwargs), beside.__contains__))
        drafts = cached_file(name, DRAFTS_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if drafts is not None:
            model.drafts = ReportDrafts.load(drafts, len(embedding_weight(model)))
        model.eval()
        result: Any = (model, info) if loading_info else model
        return result

    @staticmethod
    def _locate_adapter(name: str | os.PathLike, config: DiffVPConfig, hub_kwargs: dict) -> str | None:
        """Return the folder of the checkpoint's adapter, or `None` if it was saved without one."""
        if not config.has_adapter:
            return None
        adapter = locate_adapter(name, **hub_kwargs)
        if adapter is None:
            raise DiffVPCheckpointError(f"{name} was saved with an adapter, but {ADAPTER_SUBFOLDER}/ is not there.")
        for file in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
            check_digest(config.file_digests, f"{ADAPTER_SUBFOLDER}/{file}", os.path.join(adapter, file))
        return adapter

    def _check_adapter_twice(self, name: str | os.PathLike, beside: dict[str, torch.Tensor]) -> None:
        """Check that the adapter stored `beside` the own weights, for `Trainer`, equals the one in `adapter/`."""
        loaded, adapter = self.state_dict(), self.adapter_keys()
        # The keys have the adapter's name: here "default", there the one under which it was added for training.
        start, _, end = min(adapter).partition(".default")
        there = next((key for key in beside if key.startswith(f"{start}.") and key.endswith(end)), min(adapter))
        trained = there.removeprefix(start).removesuffix(end)
        here = {key.replace(".default", trained): key for key in adapter}
        for key, value in beside.items():
            if key not in here:
                raise DiffVPCheckpointError(f"{name}: 1 weight(s) unexpected: {key}.")
            own = loaded[here[key]]
            if not torch.equal(own.cpu(), value.to(own.dtype)):
                raise DiffVPCheckpointError(f"{name}: the weights and {ADAPTER_SUBFOLDER}/ are of different steps.")

    @classmethod
    def _from_named_base(cls, name, config: DiffVPConfig, elsewhere: str | None, hub_kwargs: dict, kwargs: dict):
        generation_config = kwargs.pop("generation_config", None)
        if kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = config.dtype or torch.float32
        base, revision, gguf_file = _named_base(config) if elsewhere is None else (elsewhere, None, None)
        files = locate_weights(name, **hub_kwargs)
        base_hub_kwargs = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
        language_model = load_base_model(base, revision, gguf_file, **base_hub_kwargs, **kwargs)
        for field in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers"):
            found, expected = getattr(language_model.config, field), getattr(config.text_config, field)
            if found != expected:
                raise DiffVPCheckpointError(f"{base}: {field} is {found}, the checkpoint was made for {expected}.")
        expected_digests, config.file_digests = config.file_digests, None
        model = cls(config, language_model=language_model)
        own = {key: value for key, value in model.state_dict().items() if not key.startswith(BASE_PREFIX)}
        state = read_weights(files)
        if config.has_adapter:  # `_write` may store it in this file, too; the model does not have it yet
            model._adapter_beside = {key for key in state if key.startswith(BASE_PREFIX)}
            state = {key: value for key, value in state.items() if key not in model._adapter_beside}
        check_weights(next(iter(files.values())), state, own)
        for file, path in files.items():
            check_digest(expected_digests, file, path)
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])
        model._place_own_modules()
        model._remember_base()
        if generation_config is None:
            generation_config = GenerationConfig.from_pretrained(name, **hub_kwargs)
        model.generation_config = generation_config
        model.name_or_path = str(name)
        return model

    # Comparing the LLM with the base that the configuration names

    def _remember_base(self) -> None:
        self._base_fingerprints = vars(self.language_model).pop(KNOWN_FINGERPRINTS, None)  # of a GGUF, already checked
        if self._base_fingerprints is None:
            self._base_fingerprints = fingerprints(self._base_state(self.language_model.state_dict()))

    def _base_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the LLM's weights without the adapter, under their names in an LLM without adapter."""
        names = base_names(uncompiled(self.language_model), state)
        base = {names[key]: value for key, value in state.items() if key in names}
        if getattr(self.language_model, "is_quantized", False):  # packed weights are neither trained nor merged
            base = {key: value for key, value in base.items() if value.is_floating_point()}
        return base

    def _is_named_base(self, state: dict[str, torch.Tensor]) -> bool:
        """
        True if the LLM's `state` equals the loaded base, bit for bit.

        The base is loaded again for comparison if the model was cast since, or was built around the caller's own LLM.
        """
        found, known = fingerprints(state), self._base_fingerprints
        if found == known:
            return True

        def types(prints: dict[str, str | None]) -> dict[str, str | None]:
            return {name: value and value.split()[0] for name, value in prints.items()}

        if known is not None and types(found) == types(known):
            return False
        base = _named_base(self.config)
        try:
            original = load_base_model(*base, dtype=self.language_model.dtype).state_dict()
        except (OSError, DiffVPCheckpointError) as error:
            logger.warning(f"The LLM cannot be compared with its base {base[0]}, which cannot be loaded: {error}")
            return False
        if original.keys() != state.keys():
            return False
        self._base_fingerprints = fingerprints({key: original[key].to(state[key].dtype) for key in state})
        return found == self._base_fingerprints

    # Saving

    def _write(self, folder: Path, is_main_process: bool, state: dict, resumed: bool, **kwargs) -> None:
        """
        Write the own weights and the adapter, and the LLM's weights only if they differ from the named base.

        An LLM that was merged, trained or resized is saved in full; from then on the checkpoint is self-contained.

        Args:
            state: state dict of the whole model, such as one gathered by FSDP or DeepSpeed; the LLM's weights may be
                missing.
            resumed: `Trainer` resumes from this checkpoint, so store the adapter in the file of the own weights, too.
        """
        config, language_model, state = self.config, uncompiled(self.language_model), _named_uncompiled(state)
        adapter = find_adapter(language_model)
        own = {key: value for key, value in state.items() if not key.startswith(BASE_PREFIX)}
        given = {key.removeprefix(BASE_PREFIX): value for key, value in state.items() if key.startswith(BASE_PREFIX)}
        llm = self._base_state(given) or self._base_state(language_model.state_dict())
        place = folder.parent.resolve()
        named = config.base_model_name_or_path
        if named is not None and is_main_process and not self._is_named_base(llm):
            logger.warning(
                f"The LLM is no longer {named}: its weights are saved with the checkpoint, which is now "
                "self-contained. Check that the licence of the LLM allows you to distribute them."
            )
            config.base_model_name_or_path = config.base_model_revision = config.base_model_gguf_file = None
        whole = config.base_model_name_or_path is None
        if not whole and is_main_process and config.base_model_gguf_file is None:  # a GGUF is not overwritten
            # The LLM may have been loaded from another place than the configuration names.
            for base in (config.base_model_name_or_path, language_model.name_or_path):
                if base and is_folder(base) and Path(base).resolve() == place:
                    raise DiffVPCheckpointError(
                        f"{place} is the folder of the base LLM, which the checkpoint needs and would overwrite: save "
                        "into another folder, or write a checkpoint that includes its base with export_merged()."
                    )
        if whole:
            self._check_whole(llm)
            config.text_config = language_model.config
            config.text_config.vocab_size = len(embedding_weight(language_model))
            config.tie_word_embeddings = getattr(language_model.config, "tie_word_embeddings", False)
            own |= {f"{BASE_PREFIX}{key}": value for key, value in llm.items()}
        text_config: Any = config.text_config
        text_config._name_or_path = public_name(text_config._name_or_path)
        if resumed:
            own |= {key: state[key] for key in self.adapter_keys() & state.keys()}
        # Two auto classes can load the checkpoint; transformers only writes the one registered for the class.
        entry = "modeling_diffvp.DiffVPForConditionalGeneration"
        config.auto_map = (getattr(config, "auto_map", None) or {}) | {"AutoModelForImageTextToText": entry}
        # Here, because it imports transformers.pipelines, which a report does not need. Not elsewhere: saving copies
        # the files that this file imports, so that every checkpoint has its pipeline.
        from .pipeline_diffvp import CUSTOM_PIPELINES

        config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)
        config.has_adapter = adapter is not None
        if adapter is not None and is_main_process:
            base = config.base_model_name_or_path, config.base_model_revision
            save_adapter(
                language_model, adapter, folder / ADAPTER_SUBFOLDER, given or language_model.state_dict(), *base
            )
        if self.drafts is not None and is_main_process:
            self.drafts.save(folder)
        self._write_weights(folder, is_main_process, own, own_weights=not whole, **kwargs)

    # transformers wraps its own method, so that type checkers see a variable.
    def push_to_hub(self, *args, **kwargs):  # pyright: ignore[reportIncompatibleVariableOverride]
        """
        Push to the Hub as in transformers.

        Raises:
            DiffVPCheckpointError: the base LLM is a local folder, which nobody else could load.
        """
        named = self.config.base_model_name_or_path
        if named is not None and is_folder(named):
            raise DiffVPCheckpointError(
                f"config.json: base_model_name_or_path: a folder of this machine, {public_name(named)} (expected a "
                "Hub id or pypi:NAME; export_merged() writes a checkpoint that includes its base)"
            )
        return super().push_to_hub(*args, **kwargs)

    def _check_whole(self, state: dict[str, torch.Tensor]) -> None:
        if getattr(self.language_model, "is_quantized", False):
            raise DiffVPCheckpointError(
                "The LLM is quantised and no longer the base that the configuration names: its weights cannot be "
                "saved with the checkpoint. Train only an adapter on a quantised LLM."
            )
        if any(value.device.type == "meta" for value in state.values()):
            raise DiffVPCheckpointError("Part of the LLM is offloaded: load it without offloading to save it in full.")

    # Merging

    def adapter_keys(self) -> set[str]:
        """Names of the adapter's weights in the state dict."""
        return {f"{BASE_PREFIX}{key}" for key in adapter_names(uncompiled(self.language_model))}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """
        Load a state dict as `torch.nn.Module` does, but never the own weights without the adapter trained with them.

        Raises:
            DiffVPCheckpointError: the model has an adapter and `state_dict` holds the own weights without it.
        """
        language_model, state_dict = uncompiled(self.language_model), _named_uncompiled(state_dict)
        expected, adapter = self.state_dict().keys(), self.adapter_keys()
        own = {key for key in expected if not key.startswith(BASE_PREFIX)}
        if own <= state_dict.keys() and not adapter <= state_dict.keys():
            lost = len(adapter - state_dict.keys())
            raise DiffVPCheckpointError(
                f"These are the weights of a checkpoint without its adapter: {lost} are missing. They would be mixed "
                "with the adapter of this model. Load the checkpoint with from_pretrained; "
                f"Trainer resumes only from folders {PREFIX_CHECKPOINT_DIR}-N, which it has saved itself."
            )
        # In a checkpoint that holds the LLM, the LLM's weights have their names without adapter.
        names = base_names(language_model, language_model.state_dict())
        wrapped = {f"{BASE_PREFIX}{plain}": f"{BASE_PREFIX}{name}" for name, plain in names.items()}
        state_dict = {wrapped.get(key, key): value for key, value in state_dict.items()}
        if language_model is not self.language_model:
            state_dict = {key.replace(BASE_PREFIX, _COMPILED_PREFIX, 1): value for key, value in state_dict.items()}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if self.config.base_model_name_or_path is not None:  # the base LLM is loaded by name, not missing
            missing = [key for key in result.missing_keys if not key.startswith(BASE_PREFIX)]
            result.missing_keys[:] = missing
        return result

    def merge_adapter(self) -> None:
        """
        Merge LoRA into the LLM's weights in place: same outputs and faster decoding, but no longer trainable.

        Raises:
            DiffVPCheckpointError: the adapter cannot be merged without changing the outputs. The model is left
                unchanged.
        """
        merge_into_weights(uncompiled(self.language_model))
        self._follow_ties()

    def export_merged(self, save_directory: str | os.PathLike) -> None:
        """
        Write a self-contained checkpoint, with LoRA merged into the LLM and all weights in `model.safetensors`.

        The checkpoint contains the base LLM: check that its licence allows you to distribute it.

        Raises:
            DiffVPCheckpointError: as in [`merge_adapter`].
        """
        config = self.config
        undo = merge_into_weights(uncompiled(self.language_model))
        try:
            self.config = copy.deepcopy(config)
            self.config.base_model_gguf_file = None
            self.config.base_model_name_or_path = self.config.base_model_revision = None
            self._follow_ties()
            self.save_pretrained(save_directory)
        finally:
            undo()
            self.config = config
            self._follow_ties()

    def _follow_ties(self) -> None:
        """Update the tied weights: a merge may separate head and embeddings that were one weight."""
        tied = self.language_model.all_tied_weights_keys
        self.all_tied_weights_keys = {f"{BASE_PREFIX}{one}": f"{BASE_PREFIX}{other}" for one, other in tied.items()}
        self.config.tie_word_embeddings = getattr(self.language_model.config, "tie_word_embeddings", False)
