# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The parts of `train_accelerate.py`: settings, cases, batches, loop and checkpoints."""
