# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
import os

# Before any import that reads them: the hub and evaluate fix these at import time. The tests never need the network,
# and a test that would reach for it has to fail here too, not only on a machine without one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_EVALUATE_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import pytest

CHECK_DATA_VARIABLE = "DIFFVP_CHECK_DATA"


@pytest.fixture(scope="session")
def check_data() -> Path:
    """The folder of real scans and published scores that some tests check against; it is not part of the project."""
    value = os.environ.get(CHECK_DATA_VARIABLE)
    if value is None:
        pytest.skip(
            f"{CHECK_DATA_VARIABLE} is not set: the real scans and published scores are not part of the project"
        )
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{CHECK_DATA_VARIABLE}={value} is not a folder")
    return folder


@pytest.fixture(scope="session")
def repository_root() -> Path:
    return Path(__file__).resolve().parents[1]
