# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Check a report against itself and against the classifier's findings that prompted it. No true report is needed.

- [`contradictions`]: one region gives two values for the same finding (presence, side, size, severity).
- [`label_consistency`]: labels that the rule labeler reads in the text, against the classifier's findings.
- [`report_consistency`]: both, as `consistency` in report.json and in the lines of `diffvp batch`.

Two statements contradict each other only if they cannot both be true. Two nodules of different size in one lung, an
effusion on either side, a finding denied in one place and stated in another, and "no other nodule" are ordinary
radiology. docs/metrics.md states how many true reports these rules flag.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from ..labels_diffvp import DIAGNOSIS_LABELS
from ..report_diffvp import split_report
from .labelers import RuleLabeler

# Normal statements that name no finding, so the labeler finds no negated mention in them.
_AERATION = re.compile(r"\baeration\b[^.;]*\bnormal\b|\bnormal(?:ly)? aerat\w+")
_NORMAL = {
    "Cardiomegaly": re.compile(
        r"\b(?:heart|cardiac)\b[^.;]*\b(?:size|sizes|dimensions?)\b[^.;]*\b(?:normal|natural)\b"
    ),
    "Emphysema": _AERATION,
    "Mosaic attenuation pattern": _AERATION,
    "Consolidation": _AERATION,
}

# Findings that a chest has once, or once per side: two sizes or severities at one place contradict each other.
_ONE = frozenset({"Cardiomegaly", "Pericardial effusion", "Hiatal hernia"})
_ONE_A_SIDE = frozenset({"Pleural effusion"})
# States of the lung or the vessels: two severities at one place contradict each other.
_STATES = frozenset(
    {"Arterial wall calcification", "Bronchiectasis", "Cardiomegaly", "Coronary artery wall calcification",
     "Emphysema", "Interlobular septal thickening", "Lung opacity", "Mosaic attenuation pattern",
     "Peribronchial thickening"}
)  # fmt: skip
_COUNTABLE = frozenset({"Consolidation", "Lung nodule", "Lymphadenopathy"})

_BOTH = re.compile(r"\b(?:both|bilateral(?:ly)?|each)\b")
_SIDE = re.compile(r"\b(right|left)\b")
_WALL = re.compile(r"\b(right|left) (?:anterior |upper )*(?:chest wall|pectoral|prepectoral|hemithorax)")
_LEVEL = re.compile(
    r"\b(upper|middle|lower|lingula|apical|apex|apices|\w*basal|bases?|superior|inferior|segment|anterior|posterior|"
    r"lateral|medial|axilla|hil|"
    r"(?:para|pre)tracheal|subcarinal|prevascular|paraaortic|aortopulmonary|mediastin|retroperiton|cervical|"
    r"supraclavicular|abdom)"
)
_SIZE = re.compile(r"(\d+(?:[.,]\d+)?)(?: ?(?:x|×) ?\d+(?:[.,]\d+)?)* ?(mm|cm)\b")
_PAUSE = re.compile(r"[,;.](?!\d)")
_SEVERITY = re.compile(r"\b(minimal|mild|slight|moderate|severe|marked)\b")
_SEVERITIES = {"minimal": "mild", "slight": "mild", "marked": "severe"}
# Sentences that compare with an earlier examination, or doubt.
_COMPARED = re.compile(
    r"\b(?:previous\w*|prior|old|earlier|last|increas\w*|decreas\w*|regress\w*|progress\w*|chang\w*|before|current\w*|"
    r"disappear\w*|described|january|february|march|april|may|june|july|august|september|october|november|december)\b"
    r"|\?"
)
# Sentences about a further finding, or about the rest.
_OTHER = re.compile(
    r"\b(?:other|others|another|additional\w*|further|else|elsewhere|except|apart|besides?|second|remaining|rest|new|"
    r"newly|also|more|only|same|again|free|loculated|localized|this|distal|proximal)\b"
)
# Denials of one kind only: "no suspicious nodule" does not contradict a calcified nodule.
_KIND = re.compile(
    r"\b(?:suspicio\w*|patholog\w*|malign\w*|metasta\w*|significan\w*|active|acute|specific|obvious|definite|large\w*|"
    r"great\w*|solid|mass\w*[ ,-]+(?:or )?nodul\w*|calcifi\w*|cavit\w*|prominent|occlusive|typical|evident|gross)\b"
)
_LARGEST = re.compile(r"\b(?:largest|biggest)\b")
_ONE_OF = re.compile(r"^(?:there is |there was )?(?:an?|one)\b")
_SINGLE = re.compile(r"\b(?:solitary|unilateral)\b")


@dataclass(frozen=True)
class Contradiction:
    """
    Two sentences of one region that cannot both be true.

    Attributes:
        label: the finding, one of the 18.
        kind: "presence", "side", "size" or "severity".
        region: the region that holds both, as [`split_report`] names it; "other" in a text without regions.
        values: the two values: "present" and "absent", "right" and "left", "6 mm" and "9 mm", "mild" and "severe".
        sentences: the two sentences as written in the report.
    """

    label: str
    kind: str
    region: str
    values: tuple[str, str]
    sentences: tuple[str, str]

    def to_dict(self) -> dict:
        """Return the fields as JSON types."""
        return {
            "label": self.label, "kind": self.kind, "region": self.region,
            "values": list(self.values), "sentences": list(self.sentences),
        }  # fmt: skip


@dataclass(frozen=True)
class _Statement:
    """
    A sentence about one finding.

    `part` is the part between commas that names the finding. `alone` is True if the sentence names no other finding,
    so that its values belong to this one. A denial covers all places of its sentence.
    """

    label: str
    present: bool
    rule: str
    sentence: str
    part: str
    alone: bool

    @property
    def lower(self) -> str:
        return self.sentence.lower()

    @property
    def _around(self) -> str:
        return self.lower if self.alone or not self.present else ""

    @property
    def sides(self) -> frozenset[str]:
        if self.label == "Medical material":
            return frozenset(_WALL.findall(self.lower))
        return _sides(self.part) or _sides(self._around)

    @property
    def levels(self) -> frozenset[str]:
        return frozenset(_LEVEL.findall(self.part) or _LEVEL.findall(self._around))

    @property
    def sizes(self) -> list[float]:
        """Sizes in mm; the first number of "13 x 9 mm"."""
        return [
            float(number.replace(",", ".")) * (10 if unit == "cm" else 1) for number, unit in _SIZE.findall(self.lower)
        ]

    @property
    def severities(self) -> set[str]:
        return {_SEVERITIES.get(word, word) for word in _SEVERITY.findall(self.lower)}


@lru_cache(maxsize=1)
def _labeler() -> RuleLabeler:
    return RuleLabeler()


def contradictions(text: str) -> list[Contradiction]:
    """
    Find the contradictions of a report, at most one per region, finding and kind, in the order of the regions.

    Args:
        text: whole report. "Lung: ..." opens a region, as in [`split_report`]; a report without
            such headings is one region, "other".

    Raises:
        TypeError: `text` is not a str.
    """
    if not isinstance(text, str):
        raise TypeError(f"report: {type(text).__name__} (expected a str)")
    found: dict[tuple[str, str, str], Contradiction] = {}
    for region, words in split_report(text).items():
        for first, second in combinations(_statements(words), 2):
            if first.label == second.label and first.sentence != second.sentence:
                for kind, values in _conflicts(first, second):
                    key = (region, first.label, kind)
                    sentences = (first.sentence, second.sentence)
                    found.setdefault(key, Contradiction(first.label, kind, region, values, sentences))
    return list(found.values())


def label_consistency(text: str, findings: Iterable[Mapping]) -> dict:
    """
    Compare the labels of the text with the classifier's.

    Args:
        text: whole report.
        findings: `findings` of report.json: a dict per diagnosis, with `label` and `positive`. Diagnoses other than
            the 18 labels of the rules are left out.

    Returns:
        "labels", the number of compared labels; "agree", the number of equal ones; "only_in_text" and
        "only_in_findings", the labels that are positive in one and negative in the other.

    Raises:
        TypeError: `text` is not a str.
    """
    classified = {
        finding["label"]: finding["positive"] for finding in findings if finding["label"] in DIAGNOSIS_LABELS
    }
    written = _labeler().label(text)
    only_in_text = [label for label, positive in classified.items() if written[label] and not positive]
    only_in_findings = [label for label, positive in classified.items() if positive and not written[label]]
    return {
        "labels": len(classified),
        "agree": len(classified) - len(only_in_text) - len(only_in_findings),
        "only_in_text": only_in_text,
        "only_in_findings": only_in_findings,
    }


def report_consistency(text: str, findings: Sequence[Mapping]) -> dict:
    """Return `consistency` of a report: [`label_consistency`] (`None` without findings) and [`contradictions`]."""
    return {
        "text_against_findings": label_consistency(text, findings) if findings else None,
        "contradictions": [contradiction.to_dict() for contradiction in contradictions(text)],
    }


def _statements(words: str) -> list[_Statement]:
    """Return the findings that a region states or denies, by sentence, without suspected and past ones."""
    hits = _labeler().explain(words)
    labels: dict[str, set[str]] = {}
    for hit in hits:
        labels.setdefault(hit.sentence, set()).add(hit.label)
    said = {
        (hit.label, hit.sentence): _Statement(
            hit.label, hit.polarity == "positive", hit.rule, hit.sentence, _part(words, *hit.span),
            len(labels[hit.sentence]) == 1,
        )
        for hit in reversed(hits)  # reversed, so that the first mention in a sentence counts
        if hit.polarity in ("positive", "negated")
    }  # fmt: skip
    both_ways = {
        (hit.label, hit.sentence) for hit in hits if hit.polarity != "positive"
    } & {(hit.label, hit.sentence) for hit in hits if hit.polarity == "positive"}  # fmt: skip
    statements = [statement for key, statement in said.items() if key not in both_ways]
    for label, normal in _NORMAL.items():
        for sentence in re.split(r"(?<=[.;])\s+", words):
            if normal.search(sentence.lower()) and label not in labels.get(sentence, ()):
                statements.append(_Statement(label, False, "normal", sentence, sentence.lower(), True))
    return sorted(statements, key=lambda statement: words.find(statement.sentence))


def _part(words: str, start: int, end: int) -> str:
    """Return the text between the commas, semicolons or full stops around a span, in lower case."""
    before = [match.end() for match in _PAUSE.finditer(words, 0, start)]
    after = _PAUSE.search(words, end)
    return words[before[-1] if before else 0 : after.start() if after else len(words)].lower()


def _sides(words: str) -> frozenset[str]:
    return frozenset(("right", "left") if _BOTH.search(words) else _SIDE.findall(words))


def _conflicts(first: _Statement, second: _Statement) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield (kind, values) of each contradiction between two statements about the same finding."""
    if first.present != second.present:
        stated, denied = (first, second) if first.present else (second, first)
        everywhere = _covers(denied.sides, stated.sides) and _covers(denied.levels, stated.levels)
        if everywhere and not any(pattern.search(denied.lower) for pattern in (_OTHER, _KIND, _COMPARED)):
            yield "presence", ("present", "absent") if first.present else ("absent", "present")
        return
    if not (first.present and first.alone and second.alone):
        return
    if any(pattern.search(statement.lower) for statement in (first, second) for pattern in (_COMPARED, _OTHER)):
        return
    label = first.label
    alike = _LARGEST.search(first.lower) and _LARGEST.search(second.lower)
    single = _SINGLE.search(first.lower) and _SINGLE.search(second.lower)
    unique = label in _ONE or alike or single or (label == "Medical material" and first.rule == second.rule)
    if unique and label != "Lymphadenopathy" and first.sides and second.sides and not first.sides & second.sides:
        yield "side", (_words(first.sides), _words(second.sides))
        return
    if not _same_place(first, second):
        return
    sized = (unique or label in _ONE_A_SIDE) and label != "Medical material"
    if label in _COUNTABLE and _ONE_OF.search(first.lower) and _ONE_OF.search(second.lower):
        sized |= bool(first.sides and first.levels) and first.sides == second.sides and first.levels == second.levels
    if sized and len(first.sizes) == len(second.sizes) == 1 and first.sizes != second.sizes:
        yield "size", (f"{first.sizes[0]:g} mm", f"{second.sizes[0]:g} mm")
    if label in _STATES and first.sides == second.sides and first.levels == second.levels:
        if len(first.severities) == len(second.severities) == 1 and first.severities != second.severities:
            yield "severity", (first.severities.copy().pop(), second.severities.copy().pop())


def _same_place(first: _Statement, second: _Statement) -> bool:
    """True if two statements may be about one place: their sides and their levels overlap, or one names none."""
    return all(
        not one or not other or one & other
        for one, other in ((first.sides, second.sides), (first.levels, second.levels))
    )


def _covers(denied: frozenset[str], stated: frozenset[str]) -> bool:
    """True if a denial covers the stated places. A denial without a place covers all."""
    return not denied or bool(denied & stated)


def _words(sides: frozenset[str]) -> str:
    return "both" if len(sides) == 2 else next(iter(sides))


__all__ = ["Contradiction", "contradictions", "label_consistency", "report_consistency"]
