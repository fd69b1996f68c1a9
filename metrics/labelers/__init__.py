# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Labelers: what reads the 18 findings out of the text of a report."""

from .rules import Hit, RuleLabeler

__all__ = ["Hit", "RuleLabeler"]
