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
"""
DiffVP: CT report generation conditioned on the difference between a scan and a normal reference.

- `DiffVPForDiagnosis`: 3D ResNet-18 with voxel logits and Noisy-OR pooling (appendix D)
- `DiffVPForConditionalGeneration`: encoder, difference extractor and prompt generator in front of a causal
  LLM with LoRA, eq. 9-11

Their building blocks, with eq. 3-8, are in `modules_diffvp.py`.

Nothing here writes files except `save_pretrained` and `export_merged`, and nothing is downloaded outside `from_*`.
"""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple

from .checkpoint_diffvp import (
    ADAPTER_SUBFOLDER,
    DiffVPCheckpointError,
    load_base_model,
    load_own_weights,
    locate_adapter,
)
from .configuration_diffvp import DiffVPConfig
from .modules_diffvp import (
    DiffVPAlignedDifference,
    DiffVPDiagnosisClassifier,
    DiffVPGlobalDelta,
    DiffVPLocalDelta,
    DiffVPPromptGenerator,
    DiffVPResampler,
    DiffVPVisionEncoder,
    named_places,
    words_of,
)
from .pipeline_diffvp import CUSTOM_PIPELINES

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
LLM_KWARGS = ("dtype", "device_map", "max_memory", "attn_implementation", "quantization_config", "offload_folder")
BASE_PREFIX = "language_model."


# transformers' auto_docstring would replace these docstrings by generic text: trf-ignore: TRF057
@dataclass
class DiffVPOutput(ModelOutput):
    """
    Output of [`DiffVPForConditionalGeneration`].

    Args:
        loss: L of eq. 11, or the part of it whose labels were given; a scalar.
        logits: `(batch, text, vocabulary)`, aligned with `input_ids`.
        generation_loss: eq. 10; a scalar.
        classification_loss: L_cls of eq. 11; a scalar.
        latents, reference_latents: V and V_r of eq. 3, `(batch, K, d)`.
        difference_weights: w of eq. 6, `(batch, K)`, float32. They are also the token importance of Fig. 4a.
        diagnosis_logits: volume logits of the frozen classifier that wrote the diagnosis prompt, `(batch, labels)`.
        past_key_values, hidden_states, attentions: of the LLM.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    generation_loss: torch.FloatTensor | None = None
    classification_loss: torch.FloatTensor | None = None
    latents: torch.FloatTensor | None = None
    reference_latents: torch.FloatTensor | None = None
    difference_weights: torch.FloatTensor | None = None
    diagnosis_logits: torch.FloatTensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


# trf-ignore: TRF057: documented by hand
@dataclass
class DiffVPDiagnosisOutput(ModelOutput):
    """
    Output of [`DiffVPForDiagnosis`].

    Args:
        loss: multi-label binary cross-entropy; a scalar.
        logits: log-odds of the Noisy-OR volume probabilities, `(batch, labels)`.
        voxel_logits: `(batch, N, labels)`.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    voxel_logits: torch.FloatTensor | None = None


# trf-ignore: TRF057: documented by hand
class DiffVPPreTrainedModel(PreTrainedModel):
    config: DiffVPConfig
    base_model_prefix = "model"
    main_input_name = "ct"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """What `set_attn_implementation` sets is the LLM's; the attention here stays eager (see `DiffVPAttention`)."""
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Conv3d):
            # ResNet's own initialisation; a fixed range would shrink the signal layer by layer.
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, DiffVPResampler):
            # Unit-scale queries: rows that start alike attend alike, and the latents would stay near copies.
            init.normal_(module.queries, std=1.0)
        elif isinstance(module, DiffVPGlobalDelta):
            init.normal_(module.query, std=module.initializer_range)
            if module.side_embedding is not None:
                init.normal_(module.side_embedding, std=module.initializer_range)


# trf-ignore: TRF057: documented by hand
class DiffVPForDiagnosis(DiffVPPreTrainedModel):
    """The diagnosis classifier alone, trained first and then frozen inside [`DiffVPForConditionalGeneration`]."""

    input_modalities = ("image",)
    supports_gradient_checkpointing = False  # the layers are MONAI's

    def __init__(self, config: DiffVPConfig):
        super().__init__(config)
        self.classifier = DiffVPDiagnosisClassifier(config)
        self.post_init()

    # trf-ignore: TRF057: documented by hand
    @can_return_tuple
    def forward(
        self, ct: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> DiffVPDiagnosisOutput:
        """`ct` (batch, 1, depth, height, width); `labels` (batch, labels) in {0, 1}."""
        logits, voxel_logits = self.classifier(ct)
        loss = None
        if labels is not None:
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return DiffVPDiagnosisOutput(loss=loss, logits=logits, voxel_logits=voxel_logits)


# trf-ignore: TRF057: documented by hand
class DiffVPForConditionalGeneration(DiffVPPreTrainedModel, GenerationMixin):
    """
    The whole chain. Build one for training with `from_base`, load one with `from_pretrained`.

    A checkpoint holds the DiffVP modules in `model.safetensors` and the LoRA weights in `adapter/`; the base LLM is
    pulled by name at a pinned revision. If `config.base_model_name_or_path` is `None` the checkpoint is
    self-contained (see `export_merged`).
    """

    def __init__(self, config: DiffVPConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        self.vision_encoder = DiffVPVisionEncoder(config)
        own_encoder = not config.share_encoder
        # CODEPATH: the paper's model has a classifier; without it is an ablation.
        self.diagnosis = DiffVPDiagnosisClassifier(config, own_encoder) if config.use_diagnosis else None
        # CODEPATH: the paper's model resamples; every voxel token through one linear map is what it is compared with.
        self.resampler = DiffVPResampler(config) if config.visual_tokens == "resampler" else None
        self.visual_projection = nn.Linear(config.visual_size, config.text_config.hidden_size)
        self.classification_head = nn.Linear(config.visual_size, config.num_labels_diagnosis)
        self.local_delta = DiffVPLocalDelta(config)
        # CODEPATH: compares voxel tokens, where the paper's model compares latents.
        self.aligned_difference = DiffVPAlignedDifference(config) if config.difference_level == "aligned" else None
        self.global_delta = self.prompt_generator = None
        # CODEPATH: "none" is the baseline without a difference prompt, use_global_delta=False one of the ablations.
        if config.difference_level != "none":
            # CODEPATH: see above
            self.global_delta = DiffVPGlobalDelta(config) if config.use_global_delta else None
            self.prompt_generator = DiffVPPromptGenerator(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            # Loaded weights must survive the initialisation that post_init runs over every sub-module.
            for tensor in (*language_model.parameters(), *language_model.buffers()):
                tensor._is_hf_initialized = True
        self.language_model = language_model
        self._freeze()
        self.post_init()

    def _freeze(self) -> None:
        for module in (self.vision_encoder, self.diagnosis, self.language_model):
            if module is not None:
                module.requires_grad_(False)

    def train(self, mode: bool = True):
        """Encoder and classifier stay in evaluation mode: frozen includes the statistics of BatchNorm."""
        super().train(mode)
        self.vision_encoder.eval()
        if self.diagnosis is not None:
            self.diagnosis.eval()
        return self

    # Encoding and difference

    def extract_features(self, ct: torch.Tensor) -> torch.Tensor:
        """F of section 3.2: `ct` (batch, 1, D, H, W) → (batch, N, C). What `ct_features=` takes instead of `ct`."""
        with torch.no_grad():
            return self.vision_encoder(ct.to(self.device))

    def diagnose(self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None) -> torch.Tensor:
        """
        Volume log-odds of the frozen classifier, (batch, labels). What `diagnosis_logits=` takes.

        `ct_features` spare the encoding of `ct`, if the classifier shares the encoder (`config.share_encoder`); else
        they are not looked at.
        """
        return self.diagnose_voxels(ct, ct_features)[0]

    def diagnose_voxels(
        self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `diagnose`, with the voxel logits (batch, N, labels) from which its result is pooled."""
        if self.diagnosis is None:
            raise ValueError("This model was configured with use_diagnosis=False and has no classifier.")
        with torch.no_grad():
            # CODEPATH: the paper's classifier has an encoder of its own.
            if self.config.share_encoder:
                features = self.extract_features(ct) if ct_features is None else ct_features.to(self.device)
                return self.diagnosis.classify(features)
            if ct is None:
                raise ValueError("The classifier has an encoder of its own (share_encoder=False): give `ct`.")
            return self.diagnosis(ct.to(self.device))

    def locate(
        self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Where each finding is and how large, given that it is there; see [`DiffVPDiagnosisClassifier.locate`]. For
        models with `config.finding_attributes`.
        """
        if not self.config.finding_attributes or self.diagnosis is None:
            raise ValueError("This model was configured without finding_attributes, or without a classifier.")
        return self.diagnosis.locate(self._features("ct", ct, ct_features))

    def read_attributes(
        self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None
    ) -> list[list[dict]]:
        """As `locate`, in words, for `describe_findings`; see [`words_of`]."""
        return words_of(self.config, self.locate(None if ct_features is not None else ct, ct_features))

    def encode(self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None) -> torch.Tensor:
        """V of eq. 3: one of `ct` (batch, 1, D, H, W) and `ct_features` (batch, N, C) → (batch, K, d)."""
        return self._visual_tokens(self._features("ct", ct, ct_features))[0]

    def _features(self, name: str, volume: torch.Tensor | None, features: torch.Tensor | None) -> torch.Tensor:
        if (volume is None) == (features is None):
            raise ValueError(f"Give exactly one of `{name}` and `{name}_features`.")
        return self.extract_features(volume) if features is None else features.to(self.device)

    def _visual_tokens(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Voxel features (batch, N, C) → visual tokens, and the attention (batch, K, N) of a resampler."""
        # CODEPATH: as in __init__
        if self.resampler is None:
            return features.to(self.visual_projection.weight.dtype), None
        return self.resampler(features)

    def _latents(self, ct, reference, ct_features, reference_features):
        """Latents of the target and the pair whose difference is taken, each (batch, K, d), and the attention."""
        features = self._features("ct", ct, ct_features)
        latents, attention = self._visual_tokens(features)
        level = self.config.difference_level
        if level == "aligned":
            reference_features = self._reference_features(reference, reference_features)
            pair = self.aligned_difference(features, reference_features)[:2]
            return latents, pair[1], pair, attention
        if level == "none":
            return latents, None, (latents, latents), attention
        if level == "target":
            return latents, None, (latents, torch.zeros_like(latents)), attention
        if level == "pixel":
            if ct is None or reference is None:
                raise ValueError('difference_level="pixel" subtracts volumes: give `ct` and `reference`.')
            difference, attention = self.resampler(self.extract_features(ct - reference.to(ct.device)))
            return latents, None, (difference, torch.zeros_like(difference)), attention
        reference_latents, _ = self.resampler(self._features("reference", reference, reference_features))
        return latents, reference_latents, (latents, reference_latents), attention

    def _reference_features(self, volumes: torch.Tensor | None, features: torch.Tensor | None) -> torch.Tensor:
        """Of the aligned difference, which takes several of a scan: (batch, R, D, H, W) or (batch, R, N, C)."""
        if volumes is None or volumes.ndim != 5 or volumes.shape[1] == 1:
            return self._features("reference", volumes, features)
        encoded = self._features("reference", volumes.flatten(0, 1)[:, None], features)
        return encoded.unflatten(0, volumes.shape[:2])

    def difference_map(
        self,
        ct: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        *,
        ct_features: torch.Tensor | None = None,
        reference_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Fig. 5a: the squared token distances of eq. 6, spread over voxel tokens by the resampler's attention and
        interpolated to the volume. Of an aligned difference, the norm of its residual.

        Shape (batch, D, H, W), float32, non-negative, arbitrary units.
        """
        with torch.no_grad():
            # CODEPATH: an aligned difference has a value for each voxel token.
            if self.aligned_difference is not None:
                features = self._features("ct", ct, ct_features)
                reference_features = self._reference_features(reference, reference_features)
                target, aligned = self.aligned_difference.align(features, reference_features)
                return self._on_volume((target - aligned).square().sum(dim=1).sqrt())
            _, _, (latents, other), attention = self._latents(ct, reference, ct_features, reference_features)
            if attention is None:  # without a resampler, and so without a difference
                return latents.new_zeros(latents.shape[0], *self.config.image_size, dtype=torch.float32)
            distances = (latents.float() - other.float()).square().sum(dim=-1)
            tokens = torch.einsum("bk,bkn->bn", distances, attention.float())
            return self._on_volume(tokens.unflatten(-1, self.config.resampler_grid))

    def _on_volume(self, grid: torch.Tensor) -> torch.Tensor:
        """Values of tokens (batch, *grid) → (batch, D, H, W)."""
        size = tuple(self.config.image_size)
        return F.interpolate(grid[:, None], size=size, mode="trilinear", align_corners=False)[:, 0]

    def token_importance(
        self, ct: torch.Tensor, reference: torch.Tensor, top: int = 8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fig. 4a: normalised ‖v_i − r_i‖² (batch, K) and the mass held by the `top` tokens (batch,)."""
        with torch.no_grad():
            _, _, pair, _ = self._latents(ct, reference, None, None)
            weights = self.local_delta(*pair)[1]
            return weights, weights.topk(min(top, weights.shape[-1]), dim=-1).values.sum(dim=-1)

    # LLM input

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def diagnosis_prompt(
        self, diagnosis_logits: torch.Tensor, found: dict[str, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Predicted findings as a prompt: token ids and attention mask, (batch, T), padded on the left.

        Args:
            found: their places and sizes, from [`locate`]; `None` names the findings alone.
        """
        fragments = self.config.diagnosis_prompt_ids
        if fragments is None:
            raise ValueError(
                "config.diagnosis_prompt_ids is not set: make it with DiffVPProcessor.diagnosis_prompt_ids(), or set "
                "use_diagnosis=False."
            )
        probabilities = diagnosis_logits.float().sigmoid()
        positive = probabilities >= torch.tensor(self.config.diagnosis_threshold, device=probabilities.device)
        found = None if found is None else {key: value.cpu() for key, value in found.items()}
        rows = []
        for scan, findings in enumerate(positive.tolist()):
            ids = list(fragments["prefix"])
            named = [index for index, is_named in enumerate(findings) if is_named]
            for position, index in enumerate(named):
                ids += (fragments["separator"] if position else []) + fragments["labels"][index]
                ids += [] if found is None else self._attribute_ids(found, scan, index)
            rows.append(ids + (fragments["none"] if not named else []) + fragments["suffix"])
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _attribute_ids(self, found: dict[str, torch.Tensor], scan: int, label: int) -> list[int]:
        """ " (right upper lobe, 12 mm)" as token ids; nothing of a finding without attributes."""
        fragments = self.config.diagnosis_prompt_ids["attributes"]
        parts = []
        for place in named_places(self.config, found, scan, label):
            parts += (fragments["and"] if parts else []) + fragments["places"][place]
        wanted = self.config.finding_attributes.get(self.config.diagnosis_labels[label], {})
        if wanted.get("size"):
            size = str(round(float(found["size_mm"][scan, label])))
            digits = [token for digit in size for token in fragments["digits"][int(digit)]]
            parts += (fragments["comma"] if parts else []) + digits + fragments["mm"]
        return fragments["open"] + parts + fragments["close"] if parts else []

    def _prepare(
        self, ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:
        """Eq. 9: embeddings and mask of [P ; W V ; diagnosis ; text], and what was computed on the way."""
        # CODEPATH: as in `diagnose`; and the pixel-level difference needs the volume.
        if self.config.share_encoder and self.config.difference_level != "pixel":
            ct, ct_features = None, self._features("ct", ct, ct_features)
        latents, reference_latents, pair, _ = self._latents(ct, reference, ct_features, reference_features)
        local_delta, weights = self.local_delta(*pair)
        embed = self.get_input_embeddings()
        batch = latents.shape[0]
        if input_ids is None:
            if self.config.instruction_ids is None:
                raise ValueError("Give `input_ids`, or set config.instruction_ids for a default instruction.")
            input_ids = torch.tensor(self.config.instruction_ids, device=self.device).expand(batch, -1)
        if input_ids.shape[0] != batch:
            raise ValueError(f"input_ids has batch size {input_ids.shape[0]}, the scans have {batch}.")
        text = embed(input_ids)
        parts, masks = [], []
        if self.prompt_generator is not None:
            deltas = [] if self.global_delta is None else [self.global_delta(*pair)]
            # CODEPATH: the paper's model uses both operators, the ablations one of them.
            deltas += [local_delta] if self.config.use_local_delta else []
            parts.append(self.prompt_generator(*deltas))
        parts.append(self.visual_projection(latents))
        masks += [torch.ones(part.shape[:2], dtype=torch.long, device=text.device) for part in parts]
        # CODEPATH: as in __init__
        if self.config.use_diagnosis:
            if diagnosis_logits is None:
                if ct is None and not self.config.share_encoder:
                    raise ValueError("`ct_features` instead of `ct` needs `diagnosis_logits` too (see `diagnose`).")
                diagnosis_logits = self.diagnose(ct, ct_features)
            # CODEPATH: a model of data without places and sizes names the findings alone.
            has_attributes = self.config.finding_attributes is not None
            found = self.locate(None if ct_features is not None else ct, ct_features) if has_attributes else None
            ids, mask = self.diagnosis_prompt(diagnosis_logits, found)
            parts.append(embed(ids))
            masks.append(mask)
        parts.append(text)
        masks.append(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        embeddings = torch.cat([part.to(text) for part in parts], dim=1)
        computed = {
            "latents": latents,
            "reference_latents": reference_latents,
            # CODEPATH: as in __init__
            "difference_weights": weights if self.config.difference_level != "none" else None,
            "diagnosis_logits": diagnosis_logits,
        }
        return embeddings, torch.cat([mask.to(text.device).long() for mask in masks], dim=1), computed

    # trf-ignore: TRF057: documented by hand
    @can_return_tuple
    def forward(
        self,
        ct: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        diagnosis_labels: torch.Tensor | None = None,
        ct_features: torch.Tensor | None = None,
        reference_features: torch.Tensor | None = None,
        diagnosis_logits: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DiffVPOutput:
        """
        Args:
            ct, reference: target and normal reference, (batch, 1, depth, height, width) in [-1, 1].
            input_ids, attention_mask: instruction, and in training the report behind it, (batch, text). The default is
                the config's instruction.
            labels: like `input_ids`, with -100 on everything but the report and its end token.
            diagnosis_labels: (batch, labels) in {0, 1}, for the auxiliary loss.
            ct_features, reference_features: output of `extract_features`, instead of `ct` and `reference`.
            diagnosis_logits: output of `diagnose`, instead of running the classifier.
            kwargs: go to the LLM and to the loss.
        """
        embeddings, mask, computed = self._prepare(
            ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits
        )
        text_length = len(self.config.instruction_ids) if input_ids is None else input_ids.shape[1]
        # Padding can stand between the diagnosis and the instruction, so that positions count real tokens only.
        position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        decoded = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=position_ids,
            logits_to_keep=text_length,  # the vocabulary projection is the largest product; the prompt needs none
            return_dict=True,
            **kwargs,
        )
        loss = generation_loss = classification_loss = None
        if labels is not None:
            generation_loss = self.loss_function(
                decoded.logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            loss = generation_loss
        if diagnosis_labels is not None:
            scores = self.classification_head(computed["latents"].mean(dim=1)).float()
            classification_loss = F.binary_cross_entropy_with_logits(scores, diagnosis_labels.to(scores))
            weighted = self.config.classification_loss_weight * classification_loss
            loss = weighted if loss is None else loss + weighted
        return DiffVPOutput(
            loss=loss,
            logits=decoded.logits,
            generation_loss=generation_loss,
            classification_loss=classification_loss,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            **computed,
        )

    @torch.no_grad()
    def embed_prompt(
        self,
        ct: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        ct_features: torch.Tensor | None = None,
        reference_features: torch.Tensor | None = None,
        diagnosis_logits: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """
        Eq. 9 up to the report, for engines that decode from embeddings: of each scan its whole prompt, `(length, h)`,
        without padding. Arguments as in `forward`.
        """
        embeddings, mask, _ = self._prepare(
            ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits
        )
        return [row[kept] for row, kept in zip(embeddings, mask.bool(), strict=True)]

    @torch.no_grad()
    def generate(
        self,
        ct: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        ct_features: torch.Tensor | None = None,
        reference_features: torch.Tensor | None = None,
        diagnosis_logits: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> torch.LongTensor:
        """
        Write a report. Arguments as in `forward`; `kwargs` go to the LLM's `generate`. Returns the new tokens only.

        The scans are encoded once, before decoding: what enters the decoding loop is embeddings.
        """
        embeddings, mask, _ = self._prepare(
            ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits
        )
        generation_config = copy.deepcopy(self.generation_config if generation_config is None else generation_config)
        kwargs = generation_config.update(**kwargs)  # what is left is not a generation parameter
        return self.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask, generation_config=generation_config, **kwargs
        )

    # Loading and saving (design: own weights + adapter, base LLM by name)

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
    ) -> "DiffVPForConditionalGeneration":
        """
        Start a model for training on any causal LLM.

        Args:
            base_model_name_or_path, base_model_revision, base_model_gguf_file: see [`DiffVPConfig`].
            lora_config: PEFT's config of the adapter; without one the LLM stays frozen as it is.
            config: fields of [`DiffVPConfig`] that differ from the defaults.
            llm_kwargs: loading options of the LLM (dtype, device_map, quantization_config, ...).
        """
        base = (base_model_name_or_path, base_model_revision, base_model_gguf_file)
        language_model = load_base_model(*base, **llm_kwargs)
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
    ) -> "DiffVPForConditionalGeneration":
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
        # CODEPATH: merged exports hold the LLM's weights, every other checkpoint names its base.
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
        # CODEPATH: as in from_pretrained
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


DiffVPForDiagnosis.register_for_auto_class("AutoModel")
DiffVPForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = [
    "DiffVPAlignedDifference",
    "DiffVPDiagnosisClassifier",
    "DiffVPDiagnosisOutput",
    "DiffVPForConditionalGeneration",
    "DiffVPForDiagnosis",
    "DiffVPGlobalDelta",
    "DiffVPLocalDelta",
    "DiffVPOutput",
    "DiffVPPreTrainedModel",
    "DiffVPPromptGenerator",
    "DiffVPResampler",
    "DiffVPVisionEncoder",
]
