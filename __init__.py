# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""DiffVP: CT report generation by differential visual prompting."""

__version__ = "0.1.0"
