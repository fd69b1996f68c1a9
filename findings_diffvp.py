# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""What the voxel head has found, in words: places, sizes, and the diagnosis prompt D of eq. 9."""

import math

import torch

from .configuration_diffvp import DiffVPConfig

SIDES = ("right", "left")


def named_places(config: DiffVPConfig, found: dict[str, torch.Tensor], scan: int, label: int) -> list[str]:
    """
    The places that the diagnosis prompt names of a finding: regions, or "right", "left", or both of these.

    Args:
        found: what `DiffVPDiagnosisClassifier.locate` has found.
        scan, label: which scan of the batch, which label.
    """
    wanted = (config.finding_attributes or {}).get(config.diagnosis_labels[label], {})
    place = wanted.get("place")
    if place is None:
        return []
    if place == "region":
        return [config.finding_regions[int(found["region"][scan, label])]]
    names = config.finding_regions if place == "regions" else SIDES
    evidence = found["region_evidence" if place == "regions" else "side_evidence"][scan, label]
    named = evidence >= evidence.max() - wanted.get("margin", math.log(2))
    return [name for name, keep in zip(names, named.tolist(), strict=True) if keep]


def read_attributes(config: DiffVPConfig, found: dict[str, torch.Tensor]) -> list[list[dict]]:
    """
    What `locate` has found, for each scan and label: `places`, the names of [`named_places`]; `size_mm`, a whole
    number, or `None`; `voxel`, the middle of the peak's token in voxels (depth, height, width) of the tensor.
    """
    found = {key: value.cpu() for key, value in found.items()}
    _, height, width = config.feature_grid
    steps = [size / tokens for size, tokens in zip(config.image_size, config.feature_grid, strict=True)]
    attributes = []
    for scan, peaks in enumerate(found["peak"].tolist()):
        attributes.append([])
        for label, token in enumerate(peaks):
            place = (token // (height * width), token // width % height, token % width)
            wanted = config.finding_attributes.get(config.diagnosis_labels[label], {})
            attributes[-1].append(
                {
                    "places": named_places(config, found, scan, label),
                    "size_mm": round(float(found["size_mm"][scan, label])) if wanted.get("size") else None,
                    "voxel": [(index + 0.5) * step - 0.5 for index, step in zip(place, steps, strict=True)],
                }
            )
    return attributes


def diagnosis_prompts(
    config: DiffVPConfig, diagnosis_logits: torch.Tensor, attributes: list[list[dict]] | None = None
) -> list[list[int]]:
    """
    Token ids of each scan's diagnosis prompt.

    Args:
        diagnosis_logits: (batch, labels); a finding is named from `config.diagnosis_threshold` on.
        attributes: from [`read_attributes`]; `None` names the findings alone.

    Raises:
        ValueError: the configuration has no fragments of the prompt.
    """
    fragments = config.diagnosis_prompt_ids
    if fragments is None:
        raise ValueError(
            "config.diagnosis_prompt_ids is not set: make it with DiffVPProcessor.diagnosis_prompt_ids(), or set "
            "use_diagnosis=False."
        )
    probabilities = diagnosis_logits.float().sigmoid()
    positive = probabilities >= torch.tensor(config.diagnosis_threshold, device=probabilities.device)
    known = attributes or [None] * len(positive)
    return [diagnosis_prompt_ids(fragments, *of_scan) for of_scan in zip(positive.tolist(), known, strict=True)]


def diagnosis_prompt_ids(fragments: dict, positive: list[bool], attributes: list[dict] | None = None) -> list[int]:
    """
    Token ids of the diagnosis prompt D: the positive labels between prefix and suffix, or the words for none.

    Args:
        attributes: of each label, from [`read_attributes`]; they follow the positive ones in brackets.
    """
    named = [index for index, found in enumerate(positive) if found]
    ids = list(fragments["prefix"])
    for position, index in enumerate(named):
        ids += (fragments["separator"] if position else []) + fragments["labels"][index]
        ids += [] if attributes is None else _attribute_ids(fragments["attributes"], attributes[index])
    return ids + (fragments["none"] if not named else []) + fragments["suffix"]


def _attribute_ids(fragments: dict, known: dict) -> list[int]:
    """ " (right upper lobe, 12 mm)" as token ids; nothing of a finding without attributes."""
    ids = []
    for place in known["places"]:
        ids += (fragments["and"] if ids else []) + fragments["places"][place]
    if known["size_mm"] is not None:
        digits = [token for digit in str(known["size_mm"]) for token in fragments["digits"][int(digit)]]
        ids += (fragments["comma"] if ids else []) + digits + fragments["mm"]
    return fragments["open"] + ids + fragments["close"] if ids else []


__all__ = ["SIDES", "diagnosis_prompt_ids", "named_places", "read_attributes"]
