# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Entry point of a Space: serve the page with the checkpoint named by DIFFVP_CHECKPOINT."""

import os

import spaces  # noqa: F401  before torch: on ZeroGPU it replaces CUDA until a GPU is assigned

from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.hub.space.page import serve_page

if __name__ == "__main__":
    serve_page(os.environ.get("DIFFVP_CHECKPOINT", str(SHIPPED_CHECKPOINT)), "0.0.0.0", 7860)
