# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What the judge is asked, and how its answer is read.

`prompt.txt` is the prompt of the paper's appendix E with its lines restored. Ours are the frame around the three
texts, and in dimensions 4 and 5 the line that what contradicts the truth does not count: the paper says so of the
other dimensions only. A change of the prompt raises `VERSION`; the hash stands in every signature.
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

UNREADABLE = (ValueError, RecursionError)  # of a parser; the second of a thousand brackets

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

_START = re.compile(r'\{(?=\s*"\w+_winner")')  # of an object whose first field is a winner
_THINKING = re.compile(r"\A.*</think>", re.DOTALL)
_FIELDS = re.compile(r"\{(truth|first|second)\}")


@dataclass(frozen=True)
class Answer:
    """
    What a judge said of two reports.

    Attributes:
        winners: "A" or "B" for each dimension, `None` where the answer has neither.
        evidence, reason: as the judge wrote them; empty where it did not.
        problem: what is wrong with the answer; empty if each dimension has its winner.
        repaired: the answer was no strict JSON.
    """

    winners: dict[str, str | None]
    evidence: dict = field(default_factory=dict)
    reason: str = ""
    problem: str = ""
    repaired: bool = False

    @property
    def decided(self) -> int:
        """In how many dimensions."""
        return sum(winner is not None for winner in self.winners.values())


def prompt_text(truth: str, first: str, second: str, problem: str = "") -> str:
    """The prompt for two reports; `problem` is what was wrong with the last answer, if it is asked again."""
    texts = {"truth": truth, "first": first, "second": second}
    # In one pass: a report may hold the words of a field.
    text = _FIELDS.sub(lambda match: texts[match[1]].strip() or "(no text)", TEMPLATE)
    return text + (AGAIN.format(problem=problem) if problem else "")


def read_answer(text: str) -> Answer:
    """
    The winners in an answer, whatever stands around them.

    JSON that is cut off or malformed is repaired. What is no choice stays none: "Tie", an echo of the prompt's
    `"Report A" or "Report B"`, and two different winners of one dimension.
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
    """The last object with winners, and whether it was not all of the text."""
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
    """An object whose fields that are there twice, with two values, are none."""
    values: dict[str, object] = {}
    for key, value in pairs:
        values[key] = value if values.get(key, value) == value else None
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_without_contradiction)
