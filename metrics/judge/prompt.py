# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Prompt of the judge, and the parser of its answers.

`prompt.txt` is the prompt of the paper's appendix E with its line breaks restored. Two parts are ours: the tags around
the three texts, and the line in dimensions 4 and 5 that contradictions of the truth do not count, which the paper has
in the other dimensions only. Raise `VERSION` with each change of the prompt; its hash is part of every signature.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import json_repair

DIMENSIONS = (
    "finding_coverage",
    "clinical_actionability",
    "detail_richness",
    "anatomical_specificity",
    "quantification_detail",
)
VERSION = 1
TEMPLATE = Path(__file__).with_name("prompt.txt").read_text(encoding="utf-8")
AGAIN = (
    "\nYour last answer could not be used: {problem}. Answer with the JSON object alone, and write "
    '"Report A" or "Report B" in each winner field.\n'
)
REPORTS = {"report a": "A", "report b": "B", "a": "A", "b": "B"}

UNREADABLE = (ValueError, RecursionError)  # raised by JSON parsers; the second by deeply nested brackets

_SPANS = {"type": "array", "items": {"type": "string"}}
_EVIDENCE = ("GT_key_findings", "ReportA_supporting_spans", "ReportB_supporting_spans")


def _object(properties: dict) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


SCHEMA = _object(
    {
        **{f"{name}_winner": {"type": "string", "enum": ["Report A", "Report B"]} for name in DIMENSIONS},
        "evidence": _object(dict.fromkeys(_EVIDENCE, _SPANS)),
        "reason": {"type": "string"},
    }
)
SHA256 = hashlib.sha256(json.dumps([VERSION, TEMPLATE, AGAIN, SCHEMA]).encode()).hexdigest()[:12]

_START = re.compile(r'\{(?=\s*"\w+_winner")')  # start of an object whose first field is a winner
_THINKING = re.compile(r"\A.*</think>", re.DOTALL)
_FIELDS = re.compile(r"\{(truth|first|second)\}")


@dataclass(frozen=True)
class Answer:
    """
    Answer of a judge about two reports.

    Attributes:
        winners: "A" or "B" for each dimension; `None` if the answer names neither.
        evidence, reason: as written by the judge; empty if missing.
        problem: description of missing winners; empty if each dimension has a winner.
        repaired: True if the answer was not strict JSON.
    """

    winners: dict[str, str | None]
    evidence: dict = field(default_factory=dict)
    reason: str = ""
    problem: str = ""
    repaired: bool = False

    @property
    def decided(self) -> int:
        """Number of dimensions with a winner."""
        return sum(winner is not None for winner in self.winners.values())


def prompt_text(truth: str, first: str, second: str, problem: str = "") -> str:
    """Return the prompt for two reports; `problem` describes the fault of the last answer when asking again."""
    texts = {"truth": truth, "first": first, "second": second}
    # Substitute in one pass, because a report may contain the name of a field.
    text = _FIELDS.sub(lambda match: texts[match[1]].strip() or "(no text)", TEMPLATE)
    return text + (AGAIN.format(problem=problem) if problem else "")


def read_answer(text: str) -> Answer:
    """
    Parse the winners in an answer, with any text around them.

    Truncated or malformed JSON is repaired. "Tie", an echo of the prompt's `"Report A" or "Report B"`, and two
    different winners of one dimension count as no winner.
    """
    document, repaired = _json_object(_THINKING.sub("", text))
    if document is None:
        return Answer(dict.fromkeys(DIMENSIONS), problem="it holds no JSON object with the winners", repaired=True)
    winners, problems = {}, []
    for name in DIMENSIONS:
        value = document.get(f"{name}_winner")
        winners[name] = REPORTS.get(value.strip().lower()) if isinstance(value, str) else None
        if winners[name] is None:
            problems.append(f"{name}_winner is {_shown(value)}")
    evidence, reason = document.get("evidence"), document.get("reason")
    return Answer(
        winners,
        evidence if isinstance(evidence, dict) else {},
        reason if isinstance(reason, str) else "",
        "; ".join(problems),
        repaired,
    )


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:40] if isinstance(value, str) else type(value).__name__


def _json_object(text: str) -> tuple[dict | None, bool]:
    """Return the last object with winners, and True if the text was more than that object."""
    try:
        whole = json.loads(text, object_pairs_hook=_without_contradiction)
        return (whole, False) if _has_winners(whole) else (None, True)
    except UNREADABLE:
        pass
    found = None
    starts = [match.start() for match in _START.finditer(text)]
    for start in starts:
        try:
            found, _ = _DECODER.raw_decode(text, start)
        except UNREADABLE:
            continue
    if found is None and "_winner" in text:
        begin = starts[0] if starts else max(text.rfind("{", 0, text.index("_winner")), 0)
        try:
            values = json_repair.loads(text[begin:])
        except UNREADABLE:
            return None, True
        values = values if isinstance(values, list) else [values]
        found = next((value for value in reversed(values) if _has_winners(value)), None)
    return found, True


def _has_winners(value: object) -> bool:
    return isinstance(value, Mapping) and any(f"{name}_winner" in value for name in DIMENSIONS)


def _without_contradiction(pairs: list[tuple[str, object]]) -> dict:
    """Build an object; a field given twice with different values becomes `None`."""
    values: dict[str, object] = {}
    for key, value in pairs:
        values[key] = value if values.get(key, value) == value else None
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_contradiction)
