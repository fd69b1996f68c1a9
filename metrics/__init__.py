# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores of generated reports: one folder a metric, each loadable with `evaluate.load("metrics/<name>")`."""
