# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Kinds of experiments, by the `kind` of a table.

To add one, write a module with a `KIND`, see [`Kind`], and add it to `KINDS`.
"""

from . import (
    difference_maps,
    dose_response,
    example_cases,
    information,
    right_findings,
    score_table,
    stability,
    token_importance,
)
from .material import Kind, Material, Needs

# At the top of the results page, kinds are in this order.
KINDS: dict[str, Kind] = {
    "scores": score_table.KIND,
    "information": information.KIND,
    "maps": difference_maps.KIND,
    "importance": token_importance.KIND,
    "lesions": right_findings.KIND,
    "cases": example_cases.KIND,
    "stability": stability.KIND,
    "dose_response": dose_response.KIND,
}

__all__ = ["KINDS", "Kind", "Material", "Needs"]
