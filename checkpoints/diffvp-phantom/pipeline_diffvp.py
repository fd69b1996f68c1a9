# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The task `ct-report-generation` of `transformers.pipeline`: a scan in; report, findings and difference map out.

It imports no other file of the checkpoint, so that `modeling_diffvp.py` can import it: the saver copies what is
imported, and every saved checkpoint has its pipeline.
"""

from types import GeneratorType

import torch
from torch.utils.data import Dataset
from transformers import Pipeline

TASK = "ct-report-generation"
CUSTOM_PIPELINES = {TASK: {"impl": "pipeline_diffvp.DiffVPPipeline", "pt": ["AutoModel"]}}  # for config.json

RESEARCH_USE = "Research use only. Not a medical device; not for diagnosis."
GIVEN_REFERENCE = "given by the user"  # the name of its file may name a patient

# The longest phantom report has 400 tokens. Used where neither caller nor checkpoint sets a limit: transformers' own
# default would stop after 20.
MAX_NEW_TOKENS = 512


class DiffVPPipeline(Pipeline):
    """
    ```python
    pipe = pipeline("ct-report-generation", model=repo, revision=commit, trust_remote_code=True)
    pipe("scan.nii.gz")["report"]
    pipe(["a.nii.gz", "b.nii.gz"], reference="normal.nii.gz", batch_size=2)
    pipe("scan.nii.gz", streamer=TextStreamer(pipe.tokenizer))
    ```
    """

    _load_processor = True
    _load_tokenizer = _load_image_processor = _load_feature_extractor = _load_video_processor = False

    def __call__(self, ct, reference=None, **kwargs):
        """
        Write the report of a scan, or of each of a list. With `batch_size`, so many are decoded at a time.

        Args:
            ct: whatever the processor takes: a path, an image, a `datasets.Nifti` value, an array; or a list of these,
                or of dicts `{"ct": ..., "reference": ...}`, or a generator or torch dataset of them. A column of
                `datasets` or pandas is a list, too.
            reference: a normal scan to compare with: one for all, or a list of one each. `None` samples from the
                checkpoint's own.
            reference_seed (`int`): seed of that sampling; 0 if not given.
            spacing (`tuple`): mm along x, y, z of bare arrays.
            allow_any_anatomy (`bool`): also write reports of scans without lungs, which are refused by default.
            max_new_tokens (`int`): where to stop; the default is the checkpoint's.
            streamer: is told the tokens as they come, such as transformers' `TextIteratorStreamer`; theirs take one
                scan at a time.
            generate_kwargs (`dict`): more arguments for `generate`. With `num_return_sequences`, each scan has a list
                of so many results.

        Returns:
            A dict, or a list of them, one a scan: `report`; `regions`, {region: text}; `findings`, a label,
            probability, threshold and `positive` each, of some checkpoints also `location`, `size_mm` and `peak` (see
            `describe_findings`); `complete`, whether the report came to its end; `reference`, the id of the sampled
            one; `difference_map`, float32 (depth, height, width), and `geometry`, with which
            `pipe.processor.save_map(path, difference_map, geometry)` writes it on the grid of the file; `statement`
            and `intended_domain`, which belong beside the report wherever it goes.
        """
        is_many, each = self.processor.is_many, self.processor.each
        if is_many(reference):
            scans, normals = list(each(ct)), list(each(reference))
            if not is_many(ct) or len(scans) != len(normals):
                raise ValueError(
                    f"{len(normals)} references for {len(scans)} scan(s); expected one each, or one for all."
                )
            ct = [{"ct": scan, "reference": normal} for scan, normal in zip(scans, normals, strict=True)]
            reference = None
        elif is_many(ct) and not isinstance(ct, (GeneratorType, Dataset)):  # which transformers goes through itself
            ct = list(each(ct))
        if isinstance(ct, list) and not ct:  # transformers would look at the first
            return []
        if reference is not None:
            kwargs["reference"] = reference
        return super().__call__(ct, **kwargs)

    def _sanitize_parameters(
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
            raise ValueError("return_dict_in_generate is True (expected False): a report is made of token ids alone.")
        return reading, writing, {}

    def preprocess(
        self, scan, reference=None, reference_seed: int = 0, spacing=None, allow_any_anatomy: bool = False
    ) -> dict:
        if isinstance(scan, dict) and "ct" in scan:  # and not the {"path", "bytes"} of a datasets.Nifti
            scan, reference = scan["ct"], scan.get("reference", reference)
        inputs = self.processor(
            ct=scan,
            reference=reference,
            reference_seed=reference_seed,
            spacing=spacing,
            allow_any_anatomy=allow_any_anatomy,
        )
        # Without a list around them they are one a scan, as what transformers batches and takes apart again has to be.
        return {
            **inputs,
            "geometry": inputs.geometry[0],
            "reference_id": inputs.reference_ids[0] if reference is None else GIVEN_REFERENCE,
        }

    def _forward(self, inputs: dict, **generate_kwargs) -> dict:
        encoded = self.model.encode_inputs(inputs["ct"], inputs["reference"])
        logits = encoded.pop("diagnosis_logits", None)
        with torch.no_grad():
            comparison = self.model.compare(**encoded)
        if self.model.generation_config.max_new_tokens is None:
            generate_kwargs = {"max_new_tokens": MAX_NEW_TOKENS} | generate_kwargs
        tokens = self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            diagnosis_logits=logits,
            comparison=comparison,
            **generate_kwargs,
        )
        attributes, batched = comparison.attributes, isinstance(inputs["geometry"], list)
        return {
            # A row a scan, as transformers takes a batch apart again: of several sequences, all of the scan.
            "tokens": tokens.unflatten(0, (len(inputs["ct"]), -1)),
            "logits": logits,
            # transformers takes a batch apart again, but not what is one scan.
            "attributes": attributes if attributes is None or batched else attributes[0],
            "difference_map": self.model.difference_map(comparison=comparison),
            "geometry": inputs["geometry"],
            "reference_id": inputs["reference_id"],
        }

    def postprocess(self, outputs: dict) -> dict | list[dict]:
        of_scan = {
            "reference": outputs["reference_id"],
            "difference_map": outputs["difference_map"][0].float(),
            "geometry": outputs["geometry"],
            "statement": RESEARCH_USE,
            "intended_domain": self.model.config.intended_domain,
        }
        ends, findings = end_tokens(self.model.generation_config), []
        if outputs["logits"] is not None:
            attributes = None if outputs["attributes"] is None else [outputs["attributes"]]
            [findings] = describe_findings(self.model.config, outputs["logits"], attributes, [outputs["geometry"]])
        reports = [
            describe_text(self.processor, tokens, findings, ends) | of_scan for tokens in outputs["tokens"][0].tolist()
        ]
        return reports if len(reports) > 1 else reports[0]

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """The checkpoint with its processor and references; transformers would leave out both."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def end_tokens(generation_config) -> list[int]:
    """The tokens that end a report; an LLM may have several, or none."""
    ends = generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


def describe_text(processor, tokens: list[int], findings: list[dict], ends: list[int]) -> dict:
    """
    A written report, in the one form that the pipeline, report.json and `diffvp batch` share.

    Args:
        tokens: new token ids of one report; padding may follow its end.
        findings: of the scan, from [`describe_findings`]; empty without a classifier.
        ends: see [`end_tokens`].

    Returns:
        `report`, the text; `regions`, {region: text}; `findings`; `complete`, whether the
        report came to its end.
    """
    text = processor.decode(tokens, skip_special_tokens=True).strip()
    return {
        "report": text,
        "regions": processor.post_process(text),
        "findings": findings,
        "complete": any(token in ends for token in tokens),
    }


def describe_findings(config, logits: torch.Tensor, attributes=None, geometries=()) -> list[list[dict]]:
    """
    The classifier's log-odds (batch, labels) in words: for each scan, all labels in their order.

    Args:
        attributes: of a model with `finding_attributes`, those of its `compare`. Each finding then also has
            `location`, in words, and `size_mm`, both `None` where the model reads none, and `peak`, where it shows
            most, (x, y, z) in RAS+ mm of the scan's own frame.
        geometries: then the [`CTGeometry`] of each scan.
    """
    thresholds = config.diagnosis_threshold
    if not isinstance(thresholds, list):
        thresholds = [thresholds] * len(config.diagnosis_labels)
    described = [
        [
            {"label": label, "probability": round(value, 4), "threshold": threshold, "positive": value >= threshold}
            for label, value, threshold in zip(config.diagnosis_labels, row, thresholds, strict=True)
        ]
        for row in logits.float().sigmoid().tolist()
    ]
    if attributes is None:
        return described
    for findings, of_scan, geometry in zip(described, attributes, geometries, strict=True):
        for finding, known in zip(findings, of_scan, strict=True):
            peak = geometry.tensor_affine @ (*known["voxel"], 1.0)
            finding["location"] = " and ".join(known["places"]) or None
            finding["size_mm"] = known["size_mm"]
            finding["peak"] = [round(float(value), 1) for value in peak[:3]]
    return described


__all__ = ["CUSTOM_PIPELINES", "TASK", "DiffVPPipeline", "describe_findings", "describe_text", "end_tokens"]
