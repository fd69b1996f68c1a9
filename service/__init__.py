# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Reports over HTTP (`diffvp serve`): `app.py` has the routes and speaks HTTP, `jobs.py` has the queue and knows none of
it. docs/serving.md says how to use it.
"""
