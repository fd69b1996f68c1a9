# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Reports over HTTP (`diffvp serve`): `app.py` has the routes, `jobs.py` has the queue, which is independent of HTTP.
docs/serving.md describes its use.
"""
