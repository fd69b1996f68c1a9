# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
DiffVP: CT report generation conditioned on the difference between a scan and a normal reference.

- `DiffVPForDiagnosis`: 3D ResNet-18 with voxel logits and Noisy-OR pooling (appendix D)
- `DiffVPModel`: encoder, classifier, difference extractor and prompt generator, from two scans to a prompt
- `DiffVPForConditionalGeneration`: the same in front of a causal LLM with LoRA, eq. 9-11

`modules_diffvp.py` has the building blocks (eq. 3-8), `checkpoint_diffvp.py` loads, saves and merges.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .bases_diffvp import accepts, real_positions
from .checkpoint_diffvp import DiffVPBaseModelMixin, DiffVPCheckpointMixin
from .configuration_diffvp import DiffVPConfig
from .drafts_diffvp import ReportDrafts, decode
from .encoders_diffvp import DiffVPEncoderError, DiffVPExternalEncoder, make_encoder
from .findings_diffvp import diagnosis_prompts, read_attributes
from .generation_diffvp import decoding_config
from .modules_diffvp import (
    DiffVPAlignedDifference,
    DiffVPDiagnosisClassifier,
    DiffVPGlobalDelta,
    DiffVPLocalDelta,
    DiffVPPromptGenerator,
    DiffVPResampler,
    auxiliary_loss,
    check_labels,
    init_weights,
    pad_left,
)
from .outputs_diffvp import DiffVPComparison, DiffVPDiagnosisOutput, DiffVPOutput


class DiffVPPreTrainedModel(DiffVPCheckpointMixin, PreTrainedModel):
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
        init_weights(module)


class DiffVPForDiagnosis(DiffVPPreTrainedModel):
    """The diagnosis classifier alone, trained first and then frozen inside [`DiffVPForConditionalGeneration`]."""

    input_modalities = ("image",)
    supports_gradient_checkpointing = False  # the layers are MONAI's
    _prefixes_in_whole = {"vision_encoder.": "classifier.vision_encoder.", "diagnosis.": "classifier."}

    def __init__(self, config: DiffVPConfig):
        super().__init__(config)
        self.classifier = DiffVPDiagnosisClassifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, ct: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> DiffVPDiagnosisOutput:
        """`ct` (batch, 1, depth, height, width); `labels` (batch, labels) in {0, 1}."""
        logits, voxel_logits = self.classifier(ct)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return DiffVPDiagnosisOutput(loss=loss, logits=logits, voxel_logits=voxel_logits)


class DiffVPModel(DiffVPPreTrainedModel):
    """
    DiffVP up to the language model: two scans in, latents, difference prompt and difference map out.

    [`DiffVPForConditionalGeneration`] puts a causal LLM behind it and inherits all of it, so that a weight has the
    same name in both.
    """

    _prefixes_in_whole = {"": ""}

    def __init__(self, config: DiffVPConfig):
        super().__init__(config)
        self.vision_encoder = make_encoder(config)
        own_encoder = not config.share_encoder
        self.diagnosis = DiffVPDiagnosisClassifier(config, own_encoder) if config.use_diagnosis else None
        # "linear" is the R2GenGPT-style baseline: one projection per voxel token.
        self.resampler = DiffVPResampler(config) if config.visual_tokens == "resampler" else None
        self.visual_projection = nn.Linear(config.visual_size, config.text_config.hidden_size)
        self.classification_head = nn.Linear(config.visual_size, config.num_labels_diagnosis)
        self.local_delta = DiffVPLocalDelta(config)
        self.aligned_difference = DiffVPAlignedDifference(config) if config.difference_level == "aligned" else None
        self.global_delta = self.prompt_generator = None
        # "none" is the baseline without a difference prompt.
        if config.difference_level != "none":
            self.global_delta = DiffVPGlobalDelta(config) if config.use_global_delta else None
            self.prompt_generator = DiffVPPromptGenerator(config)
        self._freeze()
        self.post_init()

    def _freeze(self) -> None:
        for name in ("vision_encoder", "diagnosis", "language_model"):
            module = getattr(self, name, None)
            if module is not None:
                module.requires_grad_(False)

    def train(self, mode: bool = True):
        """Encoder and classifier stay in evaluation mode: frozen includes the statistics of BatchNorm."""
        super().train(mode)
        self.vision_encoder.eval()
        if self.diagnosis is not None:
            self.diagnosis.eval()
        return self

    # Frozen: encoder and classifier

    def attach_encoder(self, module: nn.Module) -> None:
        """
        Put the encoder of the user's in its place, frozen: `ct` (batch, 1, *config.image_size) in [-1, 1] → tokens
        (batch, N, C), N depth-major over `config.encoder_grid`, C being `config.encoder_width`.

        It is no part of a checkpoint: whoever loads one attaches it again, and its weights have to be the same.

        Raises:
            DiffVPEncoderError: `config.encoder_type` is not "external", or the checkpoint was made with another one.
        """
        if not isinstance(self.vision_encoder, DiffVPExternalEncoder):
            found, expected = self.config.encoder_type, "external, for a module of your own"
            raise DiffVPEncoderError("config", "encoder_type", found, expected)
        self.vision_encoder.attach(module.to(self.device))

    def extract_features(self, ct: torch.Tensor) -> torch.Tensor:
        """F of section 3.2: `ct` (batch, 1, D, H, W) → (batch, N, C)."""
        with torch.no_grad():
            return self.vision_encoder(ct.to(self.device))

    def diagnose(self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None) -> torch.Tensor:
        """
        Volume log-odds of the frozen classifier, (batch, labels). `ct_features` spare the encoding of `ct` where the
        classifier shares the encoder (`config.share_encoder`).
        """
        return self.diagnose_voxels(ct, ct_features)[0]

    def diagnose_voxels(
        self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `diagnose`, with the voxel logits (batch, N, labels) from which its result is pooled."""
        if self.diagnosis is None:
            raise ValueError("This model was configured with use_diagnosis=False and has no classifier.")
        with torch.no_grad():
            if self.config.share_encoder:
                features = self.extract_features(ct) if ct_features is None else ct_features.to(self.device)
                return self.diagnosis.classify(features)
            if ct is None:
                raise ValueError("The classifier has an encoder of its own: give `ct`, or `diagnosis_logits`.")
            return self.diagnosis(ct.to(self.device))

    @torch.no_grad()
    def encode_inputs(
        self, ct: torch.Tensor | None = None, reference: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Run everything frozen once: what `compare`, `forward`, `generate`, `embed_prompt` and `difference_map` take
        instead of the volumes.

        Either side can be encoded alone and the two dicts merged, so that one reference serves many scans.

        Args:
            ct, reference: `(batch, 1, D, H, W)`. An aligned difference takes several references of each scan,
                `(batch, R, D, H, W)`.

        Returns:
            `ct_features` and, with a classifier, `diagnosis_logits` of `ct`; `reference_features` of `reference`. A
            pixel-level model subtracts volumes, so they are kept beside the scan's features.
        """
        encoded = {}
        if ct is not None:
            encoded["ct_features"] = self.extract_features(ct)
            if self.diagnosis is not None:
                encoded["diagnosis_logits"] = self.diagnose(ct, encoded["ct_features"])
        if self.config.compares_voxels:
            given = {"ct": ct, "reference": reference}
            return encoded | {name: volume.to(self.device) for name, volume in given.items() if volume is not None}
        if reference is not None:
            encoded["reference_features"] = self._reference_features(reference, None)
        return encoded

    # Comparison, eq. 3-8

    def encode(self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None) -> torch.Tensor:
        """V of eq. 3, (batch, K, d): of `ct` (batch, 1, D, H, W), or of its `ct_features` (batch, N, C)."""
        return self._visual_tokens(self._features("ct", ct, ct_features))[0]

    def _features(self, name: str, volume: torch.Tensor | None, features: torch.Tensor | None) -> torch.Tensor:
        if features is not None:
            return features.to(self.device)
        if volume is None:
            raise ValueError(f"Give `{name}` or `{name}_features`.")
        return self.extract_features(volume)

    def _visual_tokens(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Voxel features (batch, N, C) → visual tokens, and the attention (batch, K, N) of a resampler."""
        if self.resampler is None:
            return features.to(self.visual_projection.weight.dtype), None
        return self.resampler(features)

    def compare(
        self,
        ct: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        *,
        ct_features: torch.Tensor | None = None,
        reference_features: torch.Tensor | None = None,
    ) -> DiffVPComparison:
        """
        Eq. 3 for scan and reference, and the two sides whose difference `config.difference_level` takes.

        Features are those of the volume of the same name. Where they are given, the volume is not encoded again.
        """
        features = self._features("ct", ct, ct_features)
        latents, attention = self._visual_tokens(features)
        level, nothing, residual = self.config.difference_level, torch.zeros_like(latents), None
        reference_latents, pair = None, (latents, latents)
        if level == "target":
            pair = latents, nothing
        elif level == "pixel":
            if ct is None or reference is None:
                raise ValueError('difference_level="pixel" subtracts volumes: give `ct` and `reference`.')
            difference, attention = self.resampler(self.extract_features(ct - reference.to(ct.device)))
            pair = difference, nothing
        elif level == "aligned":
            reference_features = self._reference_features(reference, reference_features)
            with torch.autocast(self.device.type, enabled=False):  # distances of tokens that hardly differ
                *pair, residual = self.aligned_difference(features, reference_features)
            reference_latents = pair[1]
        elif level == "latent":
            reference_latents, _ = self.resampler(self._features("reference", reference, reference_features))
            pair = latents, reference_latents
        attributes = None
        if self.config.finding_attributes and self.diagnosis is not None:
            with torch.autocast(self.device.type, enabled=False):  # in training the same as in use
                attributes = read_attributes(self.config, self.diagnosis.locate(features))
        return DiffVPComparison(latents, reference_latents, *pair, attention, residual, attributes)

    def _reference_features(self, volumes: torch.Tensor | None, features: torch.Tensor | None) -> torch.Tensor:
        """(batch, N, C), or of several references of each scan (batch, R, N, C)."""
        if volumes is None or features is not None or volumes.ndim != 5 or volumes.shape[1] == 1:
            return self._features("reference", volumes, features)
        return self.extract_features(volumes.flatten(0, 1)[:, None]).unflatten(0, volumes.shape[:2])

    def difference_prompt(self, comparison: DiffVPComparison) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Eqs. 4-8: the prompt P (batch, m, h), `None` without one, and the weights w of eq. 6 (batch, K)."""
        pair = comparison.difference_from, comparison.difference_to
        local_delta, weights = self.local_delta(*pair)
        if self.prompt_generator is None:
            return None, weights
        deltas = [] if self.global_delta is None else [self.global_delta(*pair)]
        deltas += [local_delta] if self.config.use_local_delta else []
        return self.prompt_generator(*deltas), weights

    @torch.no_grad()
    def difference_map(
        self,
        ct: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        *,
        comparison: DiffVPComparison | None = None,
        **features: torch.Tensor,
    ) -> torch.Tensor:
        """
        Fig. 5a: the squared token distances of eq. 6, spread over voxel tokens by the resampler's attention and
        interpolated to the volume; of an aligned difference, the norm of its residual, in units of what normal scans
        differ by. Shape (batch, D, H, W), float32, non-negative.

        Takes the result of `compare`, or what `compare` takes.
        """
        seen = self.compare(ct, reference, **features) if comparison is None else comparison
        size, tokens, grid = tuple(self.config.image_size), seen.residual, self.config.feature_grid
        if tokens is None and seen.attention is None:  # without a resampler, and so without a difference
            return seen.latents.new_zeros(seen.latents.shape[0], *size, dtype=torch.float32)
        if tokens is None:
            distances = (seen.difference_from.float() - seen.difference_to.float()).square().sum(dim=-1)
            tokens = torch.einsum("bk,bkn->bn", distances, seen.attention.float())
            grid = self.config.resampler_grid
        return F.interpolate(tokens.unflatten(-1, grid)[:, None], size, mode="trilinear", align_corners=False)[:, 0]


class DiffVPForConditionalGeneration(DiffVPBaseModelMixin, DiffVPModel, GenerationMixin):
    """
    The whole chain. Build one for training with `from_base`, load one with `from_pretrained`.

    A checkpoint holds the DiffVP modules in `model.safetensors` and the LoRA weights in `adapter/`; the base LLM is
    pulled by name at a pinned revision. If `config.base_model_name_or_path` is `None` the checkpoint is
    self-contained (see `export_merged`).

    ```python
    processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
    model = AutoModel.from_pretrained(repo, trust_remote_code=True)
    inputs = processor(ct="scan.nii.gz", reference="normal.nii.gz")
    processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
    ```
    """

    def __init__(self, config: DiffVPConfig, language_model: PreTrainedModel | None = None):
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        else:
            self._keep_weights(language_model)
        self.language_model = language_model
        self.drafts: ReportDrafts | None = None
        # Its `generate` fills what a caller's config leaves open from its own, and most bases sample.
        language_model.generation_config = GenerationConfig()
        self._freeze()
        self.post_init()

    def diagnosis_prompt(
        self, diagnosis_logits: torch.Tensor, attributes: list[list[dict]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Predicted findings as a prompt: token ids and attention mask, (batch, T), padded on the left.

        Args:
            attributes: their places and sizes, from a [`DiffVPComparison`]; `None` names the findings alone.
        """
        rows = diagnosis_prompts(self.config, diagnosis_logits, attributes)
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _prepare(
        self, ct, reference, input_ids, attention_mask, ct_features=None, reference_features=None,
        diagnosis_logits=None, comparison=None,
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor | None]]:  # fmt: skip
        """
        Eq. 9: embeddings and mask of [P ; W V ; D ; text], and what was computed on the way.

        Padding stands left of the whole prompt and right of the text, never inside: a sliding window or ALiBi counts
        places, not tokens, and would count padding, too.
        """
        encoded = {"ct_features": ct_features, "reference_features": reference_features}
        if comparison is None:
            encoded["ct_features"] = self._features("ct", ct, ct_features)  # once, for latents and classifier
            comparison = self.compare(ct, reference, **encoded)
        prefix, weights = self.difference_prompt(comparison)
        embed = self.get_input_embeddings()
        batch = comparison.latents.shape[0]
        if input_ids is None:
            if self.config.instruction_ids is None:
                raise ValueError("Give `input_ids`, or set config.instruction_ids for a default instruction.")
            input_ids = torch.tensor(self.config.instruction_ids, device=self.device).expand(batch, -1)
        if input_ids.shape[0] != batch:
            raise ValueError(f"input_ids has batch size {input_ids.shape[0]}, the scans have {batch}.")
        text = embed(input_ids)
        parts = [part for part in (prefix, self.visual_projection(comparison.latents)) if part is not None]
        masks = [torch.ones(part.shape[:2], dtype=torch.long, device=text.device) for part in parts]
        if self.config.use_diagnosis:
            if diagnosis_logits is None:
                diagnosis_logits = self.diagnose(ct, encoded["ct_features"])
            ids, mask = self.diagnosis_prompt(diagnosis_logits, comparison.attributes)
            parts.append(embed(ids))
            masks.append(mask)
        parts.append(text)
        masks.append(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        embeddings = torch.cat([part.to(text) for part in parts], dim=1)
        mask = torch.cat([mask.to(text.device).long() for mask in masks], dim=1)
        computed = {
            "latents": comparison.latents,
            "reference_latents": comparison.reference_latents,
            "difference_weights": None if prefix is None else weights,
            "diagnosis_logits": diagnosis_logits,
        }
        return *pad_left(embeddings, mask, input_ids.shape[1]), computed

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
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> DiffVPOutput:
        """
        Args:
            ct, reference: target and normal reference, (batch, 1, depth, height, width) in [-1, 1].
            input_ids, attention_mask: instruction, and in training the report behind it, (batch, text). The default is
                the config's instruction.
            labels: like `input_ids`, with -100 on everything but the report and its end token.
            diagnosis_labels: (batch, labels) in {0, 1}, for the auxiliary loss.
            num_items_in_batch: report tokens of the whole optimizer step, as `transformers.Trainer` counts them. Both
                losses are then this batch's part of the step's: each case weighs with its tokens, however the step is
                divided. By default they are means over the batch's tokens and cases.
            ct_features, reference_features: output of `extract_features`, instead of `ct` and `reference`.
            diagnosis_logits: output of `diagnose`, instead of running the classifier.
            kwargs: go to the LLM and to the loss.

        Raises:
            ValueError: `num_items_in_batch` without `labels`, which `Trainer` takes away for label smoothing.
        """
        check_labels(labels, num_items_in_batch)
        embeddings, mask, computed = self._prepare(
            ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits
        )
        text_length = len(self.config.instruction_ids) if input_ids is None else input_ids.shape[1]
        if accepts(self.language_model, "position_ids"):
            kwargs["position_ids"] = real_positions(mask)
        if labels is not None and accepts(self.language_model, "use_cache"):
            kwargs.setdefault("use_cache", False)  # nothing is decoded: the keys of all layers would only cost memory
        decoded = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            logits_to_keep=text_length,  # the vocabulary projection is the largest product; the prompt needs none
            return_dict=True,
            **kwargs,
        )
        loss = generation_loss = classification_loss = None
        if labels is not None:
            size = self.config.text_config.vocab_size
            generation_loss = loss = self.loss_function(decoded.logits, labels, size, num_items_in_batch, **kwargs)
        if labels is not None or diagnosis_labels is not None:
            scores = self.classification_head(computed["latents"].mean(dim=1)).float()
        if diagnosis_labels is not None:
            classification_loss = auxiliary_loss(scores, diagnosis_labels, labels, num_items_in_batch)
            weighted = self.config.classification_loss_weight * classification_loss
            loss = weighted if loss is None else loss + weighted
        elif labels is not None:
            loss = loss + 0 * scores.sum()  # DistributedDataParallel waits for a gradient of every trained parameter
        return DiffVPOutput(
            loss=loss,
            logits=decoded.logits,
            generation_loss=generation_loss,
            classification_loss=classification_loss,
            # A state-space model has no keys and no attention.
            **{key: decoded.get(key) for key in ("past_key_values", "hidden_states", "attentions")},
            **computed,
        )

    @torch.no_grad()
    def embed_prompt(
        self,
        ct: torch.Tensor | None = None,
        reference: torch.Tensor | None = None,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **encoded: torch.Tensor | DiffVPComparison,
    ) -> list[torch.Tensor]:
        """
        Eq. 9 up to the report, for engines that decode from embeddings: of each scan its whole prompt, `(length, h)`,
        without padding. Arguments as in `generate`.
        """
        embeddings, mask, _ = self._prepare(ct, reference, input_ids, attention_mask, **encoded)
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
        comparison: DiffVPComparison | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs,
    ) -> torch.LongTensor:
        """
        Write a report. Arguments as in `forward`; `kwargs` go to the LLM's `generate`. Returns the new tokens only.

        The scans are encoded once, before decoding: what enters the decoding loop is embeddings. Greedy decoding
        takes fewer steps with the checkpoint's `drafts`; `num_assistant_tokens=0` does without them.

        Args:
            comparison: result of `compare`, instead of scans and features.
            generation_config: instead of the model's; the special tokens that it does not name are the model's.
                `max_length` and `min_length`, here or in `kwargs`, count what is returned, as `max_new_tokens` and
                `min_new_tokens` do: the prompt's embeddings are none of the caller's tokens.
        """
        embeddings, mask, _ = self._prepare(
            ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits, comparison
        )
        decoding, kwargs = decoding_config(self.generation_config, generation_config, kwargs)
        return decode(self.language_model, self.drafts, embeddings, mask, decoding, **kwargs)


DiffVPForDiagnosis.register_for_auto_class("AutoModel")
DiffVPModel.register_for_auto_class("AutoModel")
DiffVPForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["DiffVPForConditionalGeneration", "DiffVPForDiagnosis", "DiffVPModel", "DiffVPPreTrainedModel"]
