# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""BLEU and ROUGE-L of generated reports."""

from .scores import bleu, bleu_signature, rouge_l, rouge_signature, sentence_bleu

__all__ = ["bleu", "bleu_signature", "rouge_l", "rouge_signature", "sentence_bleu"]
