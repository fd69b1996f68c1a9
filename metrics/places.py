# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Lobes and sides that a sentence of a report names, for the judge by rules and for the scores on phantoms."""

import re

from ..data.phantom_geometry import LOBES

_LOBE = re.compile(r"\b(right|left|both) (?:lung )?(upper|middle|lower) (?:lung )?(?:lobe|zone)s?\b")
_LOBE_OF = re.compile(r"\b(upper|middle|lower) (?:lobe|zone)s? (?:of|in) (?:the )?(right|left|both) lungs?\b")
_MIDDLE_LOBE = re.compile(r"(?<!left )(?<!both )\bmiddle lobe\b")
_LINGULA = re.compile(r"\blingula")
_BOTH_SIDES = re.compile(r"\b(?:both|bilateral(?:ly)?)\b")
_SIDE = re.compile(r"\b(right|left)\b")


def named_lobes(sentence: str) -> frozenset[str]:
    """Return the lobes that a lower-case sentence names. A left middle lobe, which nobody has, names none."""
    pairs = _LOBE.findall(sentence) + [(side, level) for level, side in _LOBE_OF.findall(sentence)]
    named = {f"{side} {level} lobe" for given, level in pairs for side in _sides(given, level)}
    named |= {"right middle lobe"} if _MIDDLE_LOBE.search(sentence) else set()
    named |= {"left upper lobe"} if _LINGULA.search(sentence) else set()
    return frozenset(named & set(LOBES))


def _sides(given: str, level: str) -> tuple[str, ...]:
    return ("right", "left") if given == "both" and level != "middle" else (given,)


def named_sides(sentence: str) -> frozenset[str]:
    """Return the sides that a lower-case sentence names: "right", "left"."""
    return frozenset(("right", "left") if _BOTH_SIDES.search(sentence) else _SIDE.findall(sentence))
