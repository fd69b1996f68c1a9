# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Reports from scans with a trained checkpoint: one scan, many scans, the engines that decode, and the figure."""
