# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""What `train_accelerate.py` is built of: its settings, batches, loop and checkpoints."""
