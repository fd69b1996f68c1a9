# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
DiffVP: CT report generation conditioned on the difference between a scan and a normal reference.

- `DiffVPForDiagnosis`: 3D ResNet-18 with voxel logits and Noisy-OR pooling (appendix D)
- `DiffVPModel`: encoder, classifier, difference extractor and prompt generator, from two scans to a prompt
- `DiffVPForConditionalGeneration`: `DiffVPModel` in front of a causal LLM with LoRA, eq. 9-11

The building blocks (eq. 3-8) are in `modules_diffvp.py`; loading, saving and merging are in `checkpoint_diffvp.py`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.processing_utils import Unpack  # pyright: ignore[reportPrivateImportUsage]  # as its models do
from transformers.utils.generic import TransformersKwargs, can_return_tuple

from .bases_diffvp import accepts, real_positions
from .checkpoint_diffvp import DiffVPBaseModelMixin, DiffVPCheckpointMixin
from .configuration_diffvp import DiffVPConfig
from .drafts_diffvp import ReportDrafts, decode
from .encoders_diffvp import DiffVPDiagnosisClassifier, DiffVPEncoderError, DiffVPExternalEncoder, make_encoder
from .generation_diffvp import decoding_config
from .modules_diffvp import (
    DiffVPAlignedDifference,
    DiffVPGlobalDelta,
    DiffVPLocalDelta,
    DiffVPPromptGenerator,
    DiffVPResampler,
    auxiliary_loss,
    check_token_labels,
    diagnosis_prompts,
    init_weights,
    pad_left,
    read_attributes,
)
from .outputs_diffvp import DiffVPComparison, DiffVPComputed, DiffVPDiagnosisOutput, DiffVPOutput


# Ignored types: the mixin takes keyword arguments only where transformers also takes positional ones.
class DiffVPPreTrainedModel(DiffVPCheckpointMixin, PreTrainedModel):  # pyright: ignore[reportIncompatibleMethodOverride]
    config: DiffVPConfig
    base_model_prefix = "model"
    main_input_name = "ct"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType]  # a tuple in its own models, too
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """`set_attn_implementation` applies to the LLM; the attention here stays eager (see `DiffVPAttention`)."""
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_weights(module)


class DiffVPForDiagnosis(DiffVPPreTrainedModel):
    """The diagnosis classifier, trained first and then frozen inside [`DiffVPForConditionalGeneration`]."""

    input_modalities = ("image",)  # pyright: ignore[reportAssignmentType]  # as above
    supports_gradient_checkpointing = False  # the layers are MONAI's
    # The loss is a mean over cases, so `Trainer` has to divide it by the steps of an accumulated step.
    accepts_loss_kwargs = False
    _prefixes_in_whole = {"vision_encoder.": "classifier.vision_encoder.", "diagnosis.": "classifier."}

    def __init__(self, config: DiffVPConfig):
        super().__init__(config)
        self.classifier = DiffVPDiagnosisClassifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self, ct: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> DiffVPDiagnosisOutput:
        """
        Args:
            ct: (batch, 1, depth, height, width).
            labels: (batch, labels) in {0, 1}; needed for the loss.
        """
        logits, voxel_logits = self.classifier(ct)
        loss = None if labels is None else F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return DiffVPDiagnosisOutput(loss=loss, logits=logits, voxel_logits=voxel_logits)


class DiffVPModel(DiffVPPreTrainedModel):
    """
    DiffVP without the language model: from two scans to latents, difference prompt and difference map.

    [`DiffVPForConditionalGeneration`] inherits from this class and adds a causal LLM, so that every weight has the
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
        self.visual_projection = nn.Linear(config.visual_size, config.get_text_config().hidden_size)
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
        """Set training mode. Encoder and classifier stay in evaluation mode, which freezes BatchNorm's statistics."""
        super().train(mode)
        self.vision_encoder.eval()
        if self.diagnosis is not None:
            self.diagnosis.eval()
        return self

    # Frozen: encoder and classifier

    def attach_encoder(self, module: nn.Module) -> None:
        """
        Attach an encoder of your own and freeze it.

        Checkpoints do not contain it: attach it again, with the same weights, after loading a checkpoint.

        Args:
            module: maps `ct` (batch, 1, *config.image_size) in [-1, 1] to tokens (batch, N, C), with N depth-major
                over `config.encoder_grid` and C = `config.encoder_width`.

        Raises:
            DiffVPEncoderError: `config.encoder_type` is not "external", or the checkpoint was made with another
                encoder.
        """
        if not isinstance(self.vision_encoder, DiffVPExternalEncoder):
            found, expected = self.config.encoder_type, "external, to attach an encoder"
            raise DiffVPEncoderError("config", "encoder_type", found, expected)
        self.vision_encoder.attach(module.to(self.device))

    def extract_features(self, ct: torch.Tensor) -> torch.Tensor:
        """F of section 3.2, voxel tokens of the frozen encoder: `ct` (batch, 1, D, H, W) → (batch, N, C)."""
        with torch.no_grad():
            return self.vision_encoder(ct.to(self.device))

    def diagnose(self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None) -> torch.Tensor:
        """
        Volume log-odds of the frozen classifier, (batch, labels).

        Args:
            ct: (batch, 1, D, H, W).
            ct_features: (batch, N, C), used instead of `ct` if the classifier shares the encoder
                (`config.share_encoder`).

        Raises:
            ValueError: the model has no classifier, or the input that the classifier needs is missing.
        """
        return self.diagnose_voxels(ct, ct_features)[0]

    def diagnose_voxels(
        self, ct: torch.Tensor | None = None, ct_features: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `diagnose`, but return also the voxel logits (batch, N, labels) that are pooled to its result."""
        if self.diagnosis is None:
            raise ValueError("This model was configured with use_diagnosis=False and has no classifier.")
        with torch.no_grad():
            if self.config.share_encoder:
                return self.diagnosis.classify(self._features("ct", ct, ct_features))
            if ct is None:
                raise ValueError("The classifier has its own encoder: give `ct`, or `diagnosis_logits`.")
            return self.diagnosis(ct.to(self.device))

    @torch.no_grad()
    def encode_inputs(
        self, ct: torch.Tensor | None = None, reference: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """
        Run all frozen modules once. `compare`, `forward`, `generate`, `embed_prompt` and `difference_map` take the
        result instead of the volumes.

        Scan and reference can be encoded separately and the two dicts merged, so that one reference serves many scans.

        Args:
            ct, reference: `(batch, 1, D, H, W)`. For an aligned difference, `reference` may also hold R references
                per scan, `(batch, R, D, H, W)`.

        Returns:
            `ct_features` and, with a classifier, `diagnosis_logits` of `ct`; `reference_features` of `reference`. A
            pixel-level model subtracts volumes, so it gets the volumes `ct` and `reference` instead of
            `reference_features`.
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
        """V of eq. 3, (batch, K, d), from `ct` (batch, 1, D, H, W) or its `ct_features` (batch, N, C)."""
        return self._visual_tokens(self._features("ct", ct, ct_features))[0]

    def _features(self, name: str, volume: torch.Tensor | None, features: torch.Tensor | None) -> torch.Tensor:
        if features is not None:
            return features.to(self.device)
        if volume is None:
            raise ValueError(f"Give `{name}` or `{name}_features`.")
        return self.extract_features(volume)

    def _visual_tokens(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Voxel features (batch, N, C) → visual tokens and, with a resampler, its attention (batch, K, N)."""
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
        Compute eq. 3 for scan and reference, and the two sides of the difference at `config.difference_level`.

        Args:
            ct, reference: (batch, 1, D, H, W); for an aligned difference also (batch, R, D, H, W) references.
            ct_features, reference_features: features of the volume of the same name, which is then not encoded again.

        Raises:
            ValueError: an input that `config.difference_level` needs is missing.
        """
        features = self._features("ct", ct, ct_features)
        attributes = None
        if self.config.finding_attributes and self.diagnosis is not None:
            with torch.autocast(self.device.type, enabled=False):  # the same in training as in inference
                attributes = read_attributes(self.config, self.diagnosis.locate(features))
        latents, attention = self._visual_tokens(features)
        level, nothing, residual = self.config.difference_level, torch.zeros_like(latents), None
        reference_latents, pair = None, (latents, latents)
        if level == "target":
            pair = latents, nothing
        elif level == "pixel":
            if ct is None or reference is None:
                raise ValueError('difference_level="pixel" subtracts volumes: give `ct` and `reference`.')
            difference, attention = self._visual_tokens(self.extract_features(ct - reference.to(ct.device)))
            pair = difference, nothing
        elif self.aligned_difference is not None:
            reference_features = self._reference_features(reference, reference_features)
            with torch.autocast(self.device.type, enabled=False):  # the tokens differ little: full precision
                aligned, reference_latents, residual = self.aligned_difference(features, reference_features)
            pair = aligned, reference_latents
        elif level == "latent":
            reference_latents, _ = self._visual_tokens(self._features("reference", reference, reference_features))
            pair = latents, reference_latents
        return DiffVPComparison(latents, reference_latents, *pair, attention, residual, attributes)

    def _reference_features(self, volumes: torch.Tensor | None, features: torch.Tensor | None) -> torch.Tensor:
        """Features (batch, N, C), or (batch, R, N, C) for R references per scan."""
        if volumes is None or features is not None or volumes.ndim != 5 or volumes.shape[1] == 1:
            return self._features("reference", volumes, features)
        return self.extract_features(volumes.flatten(0, 1)[:, None]).unflatten(0, volumes.shape[:2])

    def difference_prompt(self, comparison: DiffVPComparison) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Eqs. 4-8: prompt P (batch, m, h), or `None` if the model has none, and weights w of eq. 6 (batch, K)."""
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
        Difference map of Fig. 5a, (batch, D, H, W) in float32, non-negative.

        The squared token distances of eq. 6 are spread over the voxel tokens by the resampler's attention, then
        interpolated to the volume. For an aligned difference, the map is the norm of the residual, in units of the
        variation among normal scans.

        Args:
            ct, reference, features: arguments of `compare`.
            comparison: result of `compare`, instead of its arguments.
        """
        seen = self.compare(ct, reference, **features) if comparison is None else comparison
        size, tokens, grid = tuple(self.config.image_size), seen.residual, self.config.feature_grid
        if tokens is None:
            if seen.attention is None:  # no resampler, hence no difference
                return seen.latents.new_zeros(seen.latents.shape[0], *size, dtype=torch.float32)
            distances = (seen.difference_from.float() - seen.difference_to.float()).square().sum(dim=-1)
            tokens = torch.einsum("bk,bkn->bn", distances, seen.attention.float())
            grid = self.config.resampler_grid
        return F.interpolate(tokens.unflatten(-1, grid)[:, None], size, mode="trilinear", align_corners=False)[:, 0]


# Ignored types: as above, and transformers assigns `push_to_hub` instead of defining it as a method.
class DiffVPForConditionalGeneration(DiffVPBaseModelMixin, DiffVPModel, GenerationMixin):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """
    The complete model, from two scans to a report. Build it for training with `from_base`; load it with
    `from_pretrained`.

    A checkpoint holds the DiffVP modules in `model.safetensors` and the LoRA weights in `adapter/`. The base LLM is
    loaded by name at a pinned revision. If `config.base_model_name_or_path` is `None`, the checkpoint is
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
        if language_model is not None:
            self._keep_weights(language_model)
        self.language_model: PreTrainedModel = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.drafts: ReportDrafts | None = None
        # The LLM's `generate` fills unset fields of the caller's config from its own, and most bases sample.
        self.language_model.generation_config = GenerationConfig()
        self._freeze()
        self.post_init()

    def diagnosis_prompt(
        self, diagnosis_logits: torch.Tensor, attributes: list[list[dict]] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Write the predicted findings as a prompt: token ids and attention mask, both (batch, T), padded on the left.

        Args:
            diagnosis_logits: (batch, labels).
            attributes: locations and sizes of the findings, from a [`DiffVPComparison`]; `None` writes the names of
                the findings only.
        """
        rows = diagnosis_prompts(self.config, diagnosis_logits, attributes)
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=self.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=self.device)
        return ids, mask

    def _prepare(
        self, ct, reference, input_ids, attention_mask, ct_features=None, reference_features=None,
        diagnosis_logits=None, comparison=None,
    ) -> tuple[torch.Tensor, torch.Tensor, DiffVPComputed]:  # fmt: skip
        """
        Eq. 9: embeddings and mask of [P ; W V ; D ; text], and intermediate results.

        Padding is left of the whole prompt and right of the text, never inside: sliding windows and ALiBi count
        positions, including those of padding.
        """
        encoded = {"ct_features": ct_features, "reference_features": reference_features}
        if comparison is None:
            encoded["ct_features"] = self._features("ct", ct, ct_features)  # once for both latents and classifier
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
        computed: DiffVPComputed = {
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
        **kwargs: Unpack[TransformersKwargs],  # pyright: ignore[reportGeneralTypeIssues]  # has num_items_in_batch, too
    ) -> DiffVPOutput:
        """
        Args:
            ct, reference: target and normal reference, (batch, 1, depth, height, width) in [-1, 1].
            input_ids, attention_mask: instruction, followed by the report in training, (batch, text). The default is
                the config's instruction.
            labels: like `input_ids`, with -100 on everything but the report and its end token.
            diagnosis_labels: (batch, labels) in {0, 1}, for the auxiliary loss.
            num_items_in_batch: number of report tokens in the whole optimizer step, as `transformers.Trainer` counts
                them. Both losses are then this batch's share of the loss of the step: each case is weighted by its
                number of tokens, however the step is divided into batches. By default the losses are means over the
                tokens and the cases of the batch.
            ct_features, reference_features: output of `extract_features`, instead of `ct` and `reference`.
            diagnosis_logits: output of `diagnose`, instead of running the classifier.
            kwargs: passed to the LLM and to the loss.

        Raises:
            ValueError: `num_items_in_batch` is given without `labels`, which `Trainer` removes for label smoothing.
        """
        check_token_labels(labels, num_items_in_batch)
        embeddings, mask, computed = self._prepare(
            ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits
        )
        text_length = len(self.config.instruction_ids or ()) if input_ids is None else input_ids.shape[1]
        options: dict[str, Any] = {**kwargs}
        if accepts(self.language_model, "position_ids"):
            options["position_ids"] = real_positions(mask)
        if labels is not None and accepts(self.language_model, "use_cache"):
            options.setdefault("use_cache", False)  # nothing is decoded: a cache would only cost memory
        decoded = self.language_model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            logits_to_keep=text_length,  # the vocabulary projection is the largest product; skip it for the prompt
            return_dict=True,
            **options,
        )
        loss = generation_loss = classification_loss = None
        if labels is not None:
            size = decoded.logits.shape[-1]  # not the configuration's, if only the LLM was resized
            generation_loss = loss = self.loss_function(decoded.logits, labels, size, num_items_in_batch, **options)
        if labels is not None or diagnosis_labels is not None:
            scores = self.classification_head(computed["latents"].mean(dim=1)).float()
            # DistributedDataParallel waits for a gradient of every trained parameter, so a term without labels is 0.
            if diagnosis_labels is None:
                added = 0 * scores.mean()
            else:
                classification_loss = auxiliary_loss(scores, diagnosis_labels, labels, num_items_in_batch)
                added = self.config.classification_loss_weight * classification_loss
            loss = (0 * decoded.logits.mean() if loss is None else loss) + added  # a sum could overflow to inf
        return DiffVPOutput(
            loss=loss,
            logits=decoded.logits,
            generation_loss=generation_loss,
            classification_loss=classification_loss,
            # `get`: the output of a state-space model has no keys and no attention.
            past_key_values=decoded.get("past_key_values"),
            hidden_states=decoded.get("hidden_states"),
            attentions=decoded.get("attentions"),
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
        Embed the prompt of each scan (eq. 9 up to the report), for engines that decode from embeddings.

        Args:
            ct, reference, input_ids, attention_mask, encoded: as in `generate`.

        Returns:
            For each scan its prompt `(length, h)`, without padding.
        """
        embeddings, mask, _ = self._prepare(ct, reference, input_ids, attention_mask, **encoded)
        return [row[kept] for row, kept in zip(embeddings, mask.bool(), strict=True)]

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]  # takes scans instead of token ids
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
        Write a report.

        The scans are encoded once, before decoding: the decoding loop starts from embeddings. With the checkpoint's
        `drafts`, greedy decoding takes fewer steps; `num_assistant_tokens=0` turns them off.

        Args:
            ct, reference, input_ids, attention_mask: as in `forward`.
            ct_features, reference_features, diagnosis_logits: as in `forward`.
            comparison: result of `compare`, instead of scans and features.
            generation_config: replaces the model's; special tokens that it does not set are taken from the model's.
                `max_length` and `min_length`, here or in `kwargs`, count the returned tokens only, as `max_new_tokens`
                and `min_new_tokens` do, because the prompt consists of embeddings.
            kwargs: passed to the LLM's `generate`, except the labels of a training batch, which are ignored.

        Returns:
            The new tokens only.
        """
        embeddings, mask, _ = self._prepare(
            ct, reference, input_ids, attention_mask, ct_features, reference_features, diagnosis_logits, comparison
        )
        embeddings, mask = pad_left(embeddings, mask)  # the report follows the last token of the text, not padding
        for name in ("labels", "diagnosis_labels"):  # `Seq2SeqTrainer` passes whole batches
            kwargs.pop(name, None)
        decoding, kwargs = decoding_config(self.generation_config, generation_config, kwargs)
        return decode(self.language_model, self.drafts, embeddings, mask, decoding, **kwargs)


DiffVPForDiagnosis.register_for_auto_class("AutoModel")
DiffVPModel.register_for_auto_class("AutoModel")
DiffVPForConditionalGeneration.register_for_auto_class("AutoModel")

__all__ = ["DiffVPForConditionalGeneration", "DiffVPForDiagnosis", "DiffVPModel", "DiffVPPreTrainedModel"]
