# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Compare two reports of a scan by a language model or by rules; see docs/judge.md."""


class JudgeError(ValueError):
    """The judge is unavailable, or its options or files are invalid."""
