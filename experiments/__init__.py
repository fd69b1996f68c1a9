# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Experiments: the tables and figures of the paper, and the evaluation of a checkpoint against baselines."""
