# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Publishing on the Hugging Face Hub: checkpoints, phantom datasets, the page, an endpoint and a job."""
