# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Labelers, which find the 18 findings in the text of a report."""

import os

from .rules import Hit, RuleLabeler


class RadBertError(RuntimeError):
    """The weights, configuration or tokenizer are not RadBERT's."""


def load_labeler(radbert: str | os.PathLike | None = None):
    """
    Load a labeler.

    Args:
        radbert: id of RadBERT on the Hub ("IAMJB/RadBERT-CT") or a folder in either layout; `None` for the rules.

    Raises:
        RadBertError: RadBERT cannot be loaded.
    """
    if radbert is None:
        return RuleLabeler()
    from .radbert import RadBertLabeler  # imported here, because it needs transformers and the rules do not

    return RadBertLabeler.from_pretrained(radbert)


__all__ = ["Hit", "RuleLabeler", "load_labeler"]
