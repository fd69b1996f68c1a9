# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The task `ct-report-generation` of `transformers.pipeline`: from a scan to report, findings and difference map."""

from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import GenerationConfig, Pipeline

from .document_diffvp import written_report
from .generation_diffvp import decoding_config
from .report_diffvp import GIVEN_REFERENCE, MAX_NEW_TOKENS, describe_findings, end_tokens
from .report_diffvp import RESEARCH_USE as RESEARCH_USE  # programs import it from here

TASK = "ct-report-generation"
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_diffvp.DiffVPPipeline", "pt": ["AutoModel"]}}  # for config.json


class DiffVPPipeline(Pipeline):
    """
    Write the report of a CT scan.

    ```python
    pipe = pipeline("ct-report-generation", model=repo, revision=commit, trust_remote_code=True)
    pipe("scan.nii.gz")["report"]
    pipe(["a.nii.gz", "b.nii.gz"], reference="normal.nii.gz", batch_size=2)
    pipe("scan.nii.gz", streamer=TextStreamer(pipe.tokenizer))
    ```
    """

    model: Any  # a `DiffVPForConditionalGeneration`
    processor: Any  # a `DiffVPProcessor`

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False

    def __call__(self, ct, reference=None, **kwargs):
        """
        Write the report of a scan, or of each scan in a list. `batch_size` is the number of scans decoded at a time.

        Args:
            ct: any input of the processor (a path, an image, a `datasets.Nifti` value, an array), or a list, generator
                or torch dataset of these or of dicts `{"ct": ..., "reference": ...}`. A column of `datasets` or pandas
                counts as a list.
            reference: normal scan to compare with: one for all scans, or a list with one for each. `None` samples
                from the checkpoint's own references.
            reference_seed (`int`): seed for sampling the reference; 0 if not given.
            spacing (`tuple`): mm along x, y, z; for bare arrays only.
            allow_any_anatomy (`bool`): also write reports of scans without lungs, which are refused by default.
            max_new_tokens (`int`): maximum length of a report; the default is the checkpoint's.
            streamer: receives the tokens as they are generated, for example transformers' `TextIteratorStreamer`.
                The streamers of transformers take one scan at a time.
            generate_kwargs (`dict`): further arguments for `generate`. With `num_return_sequences`, the result for
                each scan is a list of that length.

        Returns:
            A dict per scan (a list of dicts for several scans):

            - fields of [`written_report`], such as `report`, `regions`, `findings`, `complete` and `warnings`. Keep
              `statement` and `intended_domain` with the report wherever it goes.
            - `reference`: id of the sampled reference.
            - `difference_map`: float32 (depth, height, width).
            - `geometry`: use `pipe.processor.save_map(path, difference_map, geometry)` to write the map on the grid of
              the input file.

        Raises:
            ValueError: the numbers of references and scans differ.
            CTInputError: an input is not a usable chest CT.
        """
        is_many, each = self.processor.is_many, self.processor.each
        if is_many(reference):
            scans, normals = list(each(ct)), list(each(reference))
            if not is_many(ct) or len(scans) != len(normals):
                raise ValueError(
                    f"reference: {len(normals)} for {len(scans)} scan(s) (expected one each, or one for all)"
                )
            ct = [{"ct": scan, "reference": normal} for scan, normal in zip(scans, normals, strict=True)]
            reference = None
        elif is_many(ct) and not isinstance(ct, (GeneratorType, Dataset)):  # transformers iterates over these itself
            ct = list(each(ct))
        if isinstance(ct, list) and not ct:  # transformers would access the first item
            return []
        if reference is not None:
            kwargs["reference"] = reference
        return super().__call__(ct, **kwargs)

    def _sanitize_parameters(  # pyright: ignore[reportIncompatibleMethodOverride]  # names its arguments
        self,
        reference=None,
        reference_seed: int | None = None,
        spacing=None,
        allow_any_anatomy: bool | None = None,
        max_new_tokens: int | None = None,
        streamer=None,
        generate_kwargs: dict | None = None,
    ) -> tuple[dict, dict, dict]:
        reading = {
            "reference": reference,
            "reference_seed": reference_seed,
            "spacing": spacing,
            "allow_any_anatomy": allow_any_anatomy,
        }
        writing = {"max_new_tokens": max_new_tokens, "streamer": streamer, **(generate_kwargs or {})}
        reading, writing = (
            {key: value for key, value in given.items() if value is not None} for given in (reading, writing)
        )
        if writing.get("return_dict_in_generate"):
            raise ValueError("return_dict_in_generate: True (expected False, a report is made of token ids only)")
        return reading, writing, {}

    def preprocess(  # pyright: ignore[reportIncompatibleMethodOverride]  # names its arguments
        self, scan, reference=None, reference_seed: int = 0, spacing=None, allow_any_anatomy: bool = False
    ) -> dict:
        if isinstance(scan, dict) and "ct" in scan:  # not the dict {"path", "bytes"} of a `datasets.Nifti`
            scan, reference = scan["ct"], scan.get("reference", reference)
        inputs = self.processor(
            ct=scan,
            reference=reference,
            reference_seed=reference_seed,
            spacing=spacing,
            allow_any_anatomy=allow_any_anatomy,
        )
        # transformers batches these values and splits the batch again, so they are given per scan, without a list.
        return {
            **inputs,
            "geometry": inputs.geometry[0],
            "is_hu": inputs.geometry[0].is_hu and inputs.reference_geometry[0].is_hu,
            "reference_id": inputs.reference_ids[0] if reference is None else GIVEN_REFERENCE,
        }

    def _forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # names its arguments
        self, inputs: dict, generation_config: GenerationConfig | None = None, **generate_kwargs
    ) -> dict:
        decoding, options = decoding_config(self.model.generation_config, generation_config, generate_kwargs)
        if decoding.max_new_tokens is None:  # neither the call nor the checkpoint limits the length
            decoding.max_new_tokens = MAX_NEW_TOKENS
        encoded = self.model.encode_inputs(inputs["ct"], inputs["reference"])
        logits = encoded.pop("diagnosis_logits", None)
        with torch.no_grad():
            comparison = self.model.compare(**encoded)
        tokens = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            diagnosis_logits=logits,
            comparison=comparison,
            generation_config=decoding,
            **options,
        )
        if decoding.return_dict_in_generate:
            tokens = tokens.sequences
        attributes, batched = comparison.attributes, isinstance(inputs["geometry"], list)
        ends = end_tokens(decoding)
        return {
            # transformers splits a batch by rows: one row per scan, with all its sequences.
            "tokens": tokens.unflatten(0, (len(inputs["ct"]), -1)),
            "logits": logits,
            # transformers splits batches, but not the output for a single scan.
            "attributes": attributes if attributes is None or batched else attributes[0],
            "ends": [ends] * len(inputs["ct"]) if batched else ends,
            "difference_map": self.model.difference_map(comparison=comparison),
            "geometry": inputs["geometry"],
            "is_hu": inputs["is_hu"],
            "reference_id": inputs["reference_id"],
        }

    def postprocess(self, outputs: dict) -> dict | list[dict]:  # pyright: ignore[reportIncompatibleMethodOverride]
        of_scan = {
            "reference": outputs["reference_id"],
            "difference_map": outputs["difference_map"][0].float(),
            "geometry": outputs["geometry"],
        }
        findings = []
        if outputs["logits"] is not None:
            attributes = None if outputs["attributes"] is None else [outputs["attributes"]]
            [findings] = describe_findings(self.model.config, outputs["logits"], attributes, [outputs["geometry"]])
        known = {"findings": findings, "geometry": outputs["geometry"], "is_hu": outputs["is_hu"]}
        reports = [
            written_report(self.model.config, self.processor, tokens, ends=outputs["ends"], **known) | of_scan
            for tokens in outputs["tokens"][0].tolist()
        ]
        return reports if len(reports) > 1 else reports[0]

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Save the checkpoint with its processor and references, which transformers would leave out."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


__all__ = ["CUSTOM_PIPELINES", "TASK", "DiffVPPipeline"]
