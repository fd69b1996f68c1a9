# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The one form of a report, which all outputs share. docs/reports.md describes every field."""

from collections.abc import Sequence

from .anatomy_diffvp import anatomy_warnings
from .report_diffvp import RESEARCH_USE
from .volume_diffvp import is_assumed

# Version of the fields of [`written_report`]. It rises when a field is removed, renamed or changes its meaning.
SCHEMA_VERSION = 1


def written_report(
    config,
    processor,
    tokens: Sequence[int],
    *,
    ends: Sequence[int],
    findings: list[dict],
    geometry,
    is_hu: bool = True,
) -> dict:
    """
    Return a report in the form that all outputs share.

    Args:
        config: configuration of the model.
        tokens: new token ids; padding may follow the end.
        ends: ids of the end tokens, from [`end_tokens`].
        findings: findings of the scan, from [`describe_findings`]; empty without a classifier.
        geometry: [`CTGeometry`] of the scan.
        is_hu: `False` if the voxels of the scan or of the reference are not Hounsfield units.

    Returns:
        `schema_version`, `statement`, `intended_domain`, `warnings`, `report`, `regions`, `findings`, `complete`,
        `consistency`, `coverage`. `consistency` is `None`: the package computes it, whose rules a checkpoint lacks.
    """
    tokens = [int(token) for token in tokens]
    text = processor.decode(tokens, skip_special_tokens=True).strip()
    complete = any(token in ends for token in tokens)
    warnings = {
        "The voxels are not Hounsfield units; this was overridden (allow_non_hu).": not is_hu,
        f"The report is cut off after {len(tokens)} tokens.": not complete,
        "This model takes no difference: the map is empty.": config.difference_level == "none",
        f"The file states no grid. Read as: {geometry.layout}.": is_assumed(geometry.layout),
        **dict.fromkeys(geometry.warnings, True),
    }
    applying = [warning for warning, applies in warnings.items() if applies]
    return {
        "schema_version": SCHEMA_VERSION,
        "statement": RESEARCH_USE,
        "intended_domain": config.intended_domain,
        "warnings": [*applying, *anatomy_warnings(geometry.coverage)],
        "report": text,
        "regions": processor.post_process(text),
        "findings": findings,
        "complete": complete,
        "consistency": None,
        "coverage": geometry.coverage,
    }


__all__ = ["SCHEMA_VERSION", "written_report"]
