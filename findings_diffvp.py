# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Findings of the voxel head in words: places, sizes, and the diagnosis prompt D of eq. 9."""

import math

import torch

from .configuration_diffvp import DiffVPConfig

SIDES = ("right", "left")


def named_places(config: DiffVPConfig, found: dict[str, torch.Tensor], scan: int, label: int) -> list[str]:
    """
    Return the places of a finding that the diagnosis prompt names: regions, or "right", "left" or both.

    Args:
        found: output of `DiffVPDiagnosisClassifier.locate`.
        scan, label: indices of the scan in the batch and of the label.
    """
    wanted = (config.finding_attributes or {}).get(config.diagnosis_labels[label], {})
    place, regions = wanted.get("place"), config.finding_regions or ()
    if place is None:
        return []
    if place == "region":
        return [regions[int(found["region"][scan, label])]]
    names = regions if place == "regions" else SIDES
    evidence = found["region_evidence" if place == "regions" else "side_evidence"][scan, label]
    named = evidence >= evidence.max() - wanted.get("margin", math.log(2))
    return [name for name, keep in zip(names, named.tolist(), strict=True) if keep]


def read_attributes(config: DiffVPConfig, found: dict[str, torch.Tensor]) -> list[list[dict]]:
    """
    Return the attributes of each scan's labels, from the output of `DiffVPDiagnosisClassifier.locate`.

    Returns:
        For each scan and label a dict with `places`, the names from [`named_places`]; `size_mm`, a whole number or
        `None`; and `voxel`, the centre of the peak's token in voxels (depth, height, width) of the tensor.
    """
    found = {key: value.cpu() for key, value in found.items()}
    _, height, width = config.feature_grid
    steps = [size / tokens for size, tokens in zip(config.image_size, config.feature_grid, strict=True)]
    attributes = []
    for scan, peaks in enumerate(found["peak"].tolist()):
        attributes.append([])
        for label, token in enumerate(peaks):
            place = (token // (height * width), token // width % height, token % width)
            wanted = (config.finding_attributes or {}).get(config.diagnosis_labels[label], {})
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
    Return the token ids of each scan's diagnosis prompt.

    Args:
        diagnosis_logits: (batch, labels); the prompt names findings with a probability of at least
            `config.diagnosis_threshold`.
        attributes: from [`read_attributes`]; `None` names the findings without attributes.

    Raises:
        ValueError: `config.diagnosis_prompt_ids` is not set.
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
    Return the token ids of the diagnosis prompt D: the positive labels, or the words for none, in prefix and suffix.

    Args:
        fragments: `config.diagnosis_prompt_ids`.
        positive: one value per label.
        attributes: one dict per label, from [`read_attributes`]; they follow each positive label in brackets.
    """
    named = [index for index, found in enumerate(positive) if found]
    ids = list(fragments["prefix"])
    for position, index in enumerate(named):
        ids += (fragments["separator"] if position else []) + fragments["labels"][index]
        ids += [] if attributes is None else _attribute_ids(fragments["attributes"], attributes[index])
    return ids + (fragments["none"] if not named else []) + fragments["suffix"]


def _attribute_ids(fragments: dict, known: dict) -> list[int]:
    """Return text such as " (right upper lobe, 12 mm)" as token ids; empty without attributes."""
    ids = []
    for place in known["places"]:
        ids += (fragments["and"] if ids else []) + fragments["places"][place]
    if known["size_mm"] is not None:
        digits = [token for digit in str(known["size_mm"]) for token in fragments["digits"][int(digit)]]
        ids += (fragments["comma"] if ids else []) + digits + fragments["mm"]
    return fragments["open"] + ids + fragments["close"] if ids else []


__all__ = ["SIDES", "diagnosis_prompt_ids", "named_places", "read_attributes"]
