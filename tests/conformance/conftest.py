# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch

# The markers that transformers' suites use; its own conftest.py, which registers them, is not distributed.
MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "generate",
    "is_agent_test",
    "is_expert_parallel_test",
    "is_fsdp_test",
    "is_pipeline_test",
    "is_staging_test",
    "is_tensor_parallel_test",
    "is_training_test",
    "order",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config):
    # For each comparison, even one that holds, the suites format messages with whole weights in them. This takes most
    # of the time of test_bc_torch_dtype.
    torch.set_printoptions(threshold=0, edgeitems=1)
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: a marker of transformers' suites")


def pytest_sessionstart(session):
    """Refuse to run one release's suites on another: the result would carry the wrong name."""
    try:
        import transformers_tests
    except ImportError:
        raise pytest.UsageError("transformers' suites are not on the path: run `make test-conformance`") from None
    import transformers

    release = Path(transformers_tests.__file__).parents[1].name
    if transformers.__version__ != release:
        raise pytest.UsageError(f"the suites are of transformers {release}, installed is {transformers.__version__}")
