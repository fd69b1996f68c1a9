# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores of generated reports, labelers, judges and statistics.

`nlg` and `clinical_efficacy` also load with `evaluate.load("metrics/<name>")`.
"""
