# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The text of a report by region, and the findings of the scan in words.

Without PyTorch, because tables of reports are read and scored without it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .labels_diffvp import REGIONS

if TYPE_CHECKING:
    import torch

RESEARCH_USE = "Research use only. Not a medical device; not for diagnosis."
GIVEN_REFERENCE = "given by the user"  # instead of its file name, which may identify a patient

# Used if neither the caller nor the checkpoint sets a limit; transformers' own default is 20. The longest phantom
# report has 400 tokens.
MAX_NEW_TOKENS = 512

OTHER = "other"  # key in [`split_report`] for text that belongs to no region
# Headings of the regions and sections of a report, with their names. Some departments use plurals or other spellings.
REGION_HEADINGS = {region: region for region in REGIONS} | {
    "lungs": "lung",
    "bones": "bone",
    "breasts": "breast",
    "oesophagus": "esophagus",
    "trachea and bronchi": "trachea and bronchie",
    "trachea and bronchus": "trachea and bronchie",
}
SECTION_HEADINGS = {
    "findings": "findings",
    "finding": "findings",
    "impression": "impression",
    "impressions": "impression",
    "conclusion": "impression",
    "conclusions": "impression",
}

_NAMES = sorted([*REGION_HEADINGS, *SECTION_HEADINGS], key=len, reverse=True)
_AT_START = "|".join(re.escape(name) for name in _NAMES)  # of a line: in upper or lower case
_WITHIN = "|".join(re.escape(form) for name in _NAMES for form in (name.capitalize(), name.upper()))
_HEADING = re.compile(rf"(?:^[ \t]*(?i:{_AT_START})|(?<=\s)(?:{_WITHIN}))[ \t]*:|^[ \t]*[A-Z][A-Za-z ]{{2,40}}:", re.M)


def split_report(text: str, sections: bool = False) -> dict[str, str]:
    """
    Split a report into {region: text}, in canonical order.

    A heading such as "Heart:" starts a region, at the start of a line or within it; so do "Lungs:" and "LUNGS:".
    Regions that the report does not name are absent. If a region occurs twice, its parts are joined. Text before
    the first region, and text under any other heading ("Impression: ..."), go to "other", including the heading.

    Args:
        sections: also return "findings", the text under "Findings:" that belongs to no region, and "impression",
            all text under "Impression:" or "Conclusion:" up to the next section.
    """
    parts: dict[str, list[str]] = {}
    current, start = OTHER, 0
    for found in _HEADING.finditer(text):
        name = found.group().strip(" \t:").lower()
        section = SECTION_HEADINGS.get(name) if sections else None
        if current == "impression" and section is None:
            continue  # "Lungs: ..." in an impression is a part of the impression
        parts.setdefault(current, []).append(text[start : found.start()])
        known = section or REGION_HEADINGS.get(name)
        current, start = (known, found.end()) if known else (OTHER, found.start())
    parts.setdefault(current, []).append(text[start:])
    order = (*REGIONS, "findings", "impression", OTHER)
    joined = {region: " ".join(" ".join(parts.get(region, [])).split()) for region in order}
    return {region: words for region, words in joined.items() if words}


def stated_domain(intended_domain: str | None) -> str:
    """Return the scans that a checkpoint is intended for, in words."""
    return intended_domain or "not stated by the checkpoint"


def end_tokens(generation_config) -> list[int]:
    """Return the ids of the tokens that end a report. An LLM may have several, or none."""
    ends = generation_config.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [int(ends)]


def describe_findings(config, logits: torch.Tensor, attributes=None, geometries=()) -> list[list[dict]]:
    """
    Describe the findings of each scan: all labels, in their order.

    Args:
        logits: log-odds of the classifier, (batch, labels).
        attributes: attributes of `compare`, from a model with `finding_attributes`. They add to each finding its
            `location` in words and `size_mm`, both `None` if the model reads none, and `peak`, the centre of the token
            that shows it most, (x, y, z) in RAS+ mm in the frame of the scan.
        geometries: [`CTGeometry`] of each scan; needed with `attributes`.

    Returns:
        For each scan a list of dicts with `label`, `probability`, `threshold` and `positive`.
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


__all__ = [
    "GIVEN_REFERENCE",
    "MAX_NEW_TOKENS",
    "RESEARCH_USE",
    "describe_findings",
    "end_tokens",
    "split_report",
]
