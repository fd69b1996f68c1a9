# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Kinds of experiments, by the `kind` of a table. Each module has three names:

- `NEEDS`: models, reports and data that it requires;
- `content`: computes its entries of the JSON file;
- `lines`: writes its section of the results page.

To add a kind, write such a module and add it to `KINDS`.
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

KINDS: dict[str, Kind] = {
    "scores": score_table,
    "maps": difference_maps,
    "importance": token_importance,
    "lesions": right_findings,
    "cases": example_cases,
    "stability": stability,
    "information": information,
    "dose_response": dose_response,
}

__all__ = ["KINDS", "Kind", "Material", "Needs"]
