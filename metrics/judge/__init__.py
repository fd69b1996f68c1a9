# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Which of two reports of a scan is better, by a language model or by rules: docs/judge.md."""


class JudgeError(ValueError):
    """The judge cannot be asked, or not as it was asked to be."""
