# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Labelers: what reads the 18 findings out of the text of a report."""

import os

from .rules import Hit, RuleLabeler


def load_labeler(radbert: str | os.PathLike | None = None):
    """The rules, or RadBERT: its id on the Hub ("IAMJB/RadBERT-CT"), or a folder in either layout.

    Raises:
        RadBertError: there is no such classifier.
    """
    if radbert is None:
        return RuleLabeler()
    from .radbert import RadBertLabeler  # imports transformers, which the rules do without

    return RadBertLabeler.from_pretrained(radbert)


__all__ = ["Hit", "RuleLabeler", "load_labeler"]
