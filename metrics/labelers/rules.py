# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Label chest CT reports by rules, without weights and with a reason for every label.

- rules.yaml holds the rules: words that name a finding, its required place, and the expressions of negation.
- Each sentence is read on its own, so the order and repetition of sentences change nothing.
- A negation covers its clause only: "no effusion was seen, and a nodule is seen" has a nodule.
- A suspected finding counts as found, as it did for the annotators of CT-RATE; `Hit.polarity` marks it as "uncertain".
"""

import hashlib
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from ...labels_diffvp import DIAGNOSIS_LABELS
from .markup import without_markup

RULES_FILE = Path(__file__).with_name("rules.yaml")
COUNTED = ("positive", "uncertain")  # polarities that set a label

# Each character is replaced by one character, so that positions in the text do not change. "İ" is the only letter with
# a longer lower case.
_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_FOLD = dict(zip("İ“”„«»‘’‐‑‒–—―−－＋（）：，", 'I"""""\'\'--------+():,', strict=True)) | dict.fromkeys(_SPACES, " ")
_FOLDED = re.compile(f"[{''.join(_FOLD)}]")  # several times as fast as str.translate, because a report has few of them

_SENTENCE_END = re.compile(
    r"""(?=[.!?;"•·。\n])(?:              # a fast check: most characters are none of these
      (?<!\d\d\.\d\d)[.!]+(?=\s|$|["•·])  # a point at the end of a word: not in "9.5 mm" or "16.03. 2020"
      | (?<=[a-z)\]])\.(?=[A-Z])            # "... was observed.The liver ..."
      # Not in "(cyst?, abscess?)", and not before an answer: "Effusion? No.", "effusion; none"
      | (?:\?(?=\s+[A-Z])|;)(?!\s*(?i:no|none|nil|absent|negative|not\s\w+)\s*(?:[.,;\n]|$))
      | ["•·。]                             # quotation marks and bullets surround the items of an impression
      # Not at a wrapped line, and not between a heading and its text
      | (?<!:)(?<!:\ )\n(?=\s*(?:\n|[-*]\s|\d+[.)]\s|[A-Z]))
    )""",
    re.VERBOSE,
)
# The verb of a main clause, not of a relative clause such as ", the largest of which is 5 mm,".
_VERB = re.compile(r"\b(?<!\bwhich )(?<!\bthat )(?:is|are|was|were|has|have|had)\b")
# Commas, but not before a relative clause or a verb: "a nodule in the left lung, which was seen before, was not seen".
_COMMA = re.compile(r"(?:,|(?<=\s)-)(?=\s)(?!\s+(?:which|that|who|whose|is|are|was|were|has|have|had|not)\b)")
_ANSWER_HINT = re.compile(r"[-+]|\b(?:no|none|nil|absent|neg|negative)\b[\w ]*(?:[)\].,;!\"]|$)")
_CONNECTOR = re.compile(r",? (?:and|but|while|whereas|however|although) |, ")
_QUESTION = re.compile(r"[^()?]{0,40}\?")
_TERM = re.compile(r"<([a-z]+)>")
_LIST_WORD = re.compile(r"\b(?:or|nor|no|not|without|neither)\b|n't\b")
_SIGN_FIRST = re.compile(r"\W*?[(\[]\s*[+-]+\s*[)\]]\s*\w")


@dataclass(frozen=True)
class Hit:
    """One mention of a finding in a report.

    Args:
        label: the finding, one of the 18.
        rule: name of the rule in rules.yaml.
        sentence: sentence of the mention, as written in the report.
        span: position of the words: `report[span[0] : span[1]]`.
        polarity: "positive", "uncertain", "negated" or "past"; the first two set the label.
        cue: words that make it uncertain, negated or past; empty for a positive one.
    """

    label: str
    rule: str
    sentence: str
    span: tuple[int, int]
    polarity: str
    cue: str = ""

    @property
    def counts(self) -> bool:
        return self.polarity in COUNTED


@dataclass(frozen=True)
class Rule:
    """One compiled rule of rules.yaml. The head of that file describes the fields."""

    label: str
    name: str
    find: re.Pattern
    sites: frozenset[str] | None
    unless: re.Pattern | None
    examples: tuple[str, ...]
    counterexamples: tuple[str, ...]


def _any_of(patterns: str | Sequence[str]) -> str:
    return "|".join(f"(?:{pattern})" for pattern in ([patterns] if isinstance(patterns, str) else patterns))


class _Language:
    """Expressions of negation, doubt and history, and words for places: the first two sections of rules.yaml."""

    def __init__(self, language: Mapping[str, list[str]], sites: Mapping[str, list[str]]):
        patterns = {name: re.compile(_any_of(cues)) for name, cues in language.items()}
        self.before = patterns["negation before"]
        self.after = patterns["negation after"]
        self.scope_end = patterns["negation ends at"]
        self.answers = re.compile(
            f"(?P<no>{_any_of(language['answer no'])})|(?P<yes>{_any_of(language['answer yes'])})"
        )
        self.statement = patterns["statement"]
        self.no_denial = patterns["no negation"]
        self.doubt = patterns["doubt"]
        self.past = patterns["past"]
        self.present = patterns["present"]
        self.history = patterns["history before"]
        places = "|".join(f"(?P<{name}>{_any_of(words)})" for name, words in sites.items())
        self.sites = re.compile(rf"\b(?:{places})")


class _Sentence:
    """A sentence in lower case, with its clauses, places and denials, computed on demand."""

    def __init__(self, text: str, start: int, language: _Language):
        self.text, self.start, self.language = text, start, language

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """Ends of clauses, as (first, strongest) of the commas and "and"s between two verbs.

        In "No nodule was seen in the right, the left or the middle lobe, effusion and atelectasis were seen" the end
        of the first clause is ambiguous. A denial ends at the first candidate, because at best a list of places
        follows. A statement extends to the strongest, so that it keeps its places: ", and" is stronger than a comma,
        a comma is stronger than "and", and of equal ones the last counts.
        """
        verbs = [match.span() for match in _VERB.finditer(self.text)]
        bounds = []
        for (_, end), (following, _) in zip(verbs, verbs[1:], strict=False):
            if gap := list(_CONNECTOR.finditer(self.text, end, following)):
                strongest = max(gap, key=lambda match: (match[0][0] == ",", match[0] not in ", ", match.start()))
                bounds.append((gap[0].start(), strongest.start()))
        return bounds

    @cached_property
    def clauses(self) -> list[tuple[int, int]]:
        """Clauses for statements, as (start, end)."""
        inner = [strongest for _, strongest in self._bounds]
        return list(zip([0, *inner], [*inner, len(self.text)], strict=True))

    @cached_property
    def _denial_bounds(self) -> list[int]:
        """Positions where a negation ends: the first bound between two verbs, and the commas around a statement."""
        bounds = [first for first, _ in self._bounds]
        commas = [match.start() for match in _COMMA.finditer(self.text)]
        if commas:
            for start, end in zip([0, *commas], [*commas, len(self.text)], strict=True):
                part = self.text[start:end].lstrip(",- ")
                if self.language.statement.match(part) and not _LIST_WORD.search(part):
                    bounds += [start, end]
        return sorted(bounds)

    def _denial_clause(self, position: int) -> tuple[int, int]:
        start = max((bound for bound in self._denial_bounds if bound <= position), default=0)
        return start, min((bound for bound in self._denial_bounds if bound > position), default=len(self.text))

    @cached_property
    def _answers(self) -> list[tuple[tuple[int, int], tuple[int, int], bool]]:
        """Answers such as "no" or "(+)": the span that each is about, its own span, and True if it denies."""
        found = list(self.language.answers.finditer(self.text)) if _ANSWER_HINT.search(self.text) else []
        own = [match.span() for match in found]
        if found and _SIGN_FIRST.match(self.text):
            next_starts = [*(start for start, _ in own[1:]), len(self.text)]
            about = [(end, following) for (_, end), following in zip(own, next_starts, strict=True)]
        else:
            last_ends = [0, *(end for _, end in own[:-1])]
            about = [
                (max(before, self._denial_clause(start)[0]), start)
                for before, (start, _) in zip(last_ends, own, strict=False)
            ]
        return list(zip(about, own, (match["no"] is not None for match in found), strict=True))

    @cached_property
    def _sites(self) -> list[tuple[int, int, str]]:
        return [(match.start(), match.end(), match.lastgroup) for match in self.language.sites.finditer(self.text)]

    def site(self, start: int, end: int, clause: tuple[int, int]) -> str:
        """Place of the finding at `start:end`: named in or right before its words, or else next after, or before."""
        inside = [site for site in self._sites if site[0] >= clause[0] and site[1] <= clause[1]]
        for first, last, name in inside:
            if first < end and last >= start - 1:
                return name
        after = [name for first, _, name in inside if first >= end]
        before = [name for _, last, name in inside if last < start]
        return after[0] if after else before[-1] if before else "unnamed"

    @cached_property
    def _denials(self) -> list[tuple[int, int, str, str]]:
        """Denied and past parts of the sentence, as (start, end, polarity, cue)."""
        language, text = self.language, self.text
        harmless = [match.span() for match in language.no_denial.finditer(text)]
        found = [(*about, "negated", text[slice(*own)]) for about, own, denies in self._answers if denies]
        answered = [own for _, own, _ in self._answers]
        for match in language.before.finditer(text):
            if any(first <= match.start() < last for first, last in answered):
                continue
            _, end = self._denial_clause(match.start())
            stop = language.scope_end.search(text, match.end(), end)
            # "No increase in effusion" does not deny the effusion, but "no increase in thickness" denies thickening:
            # such a denial covers its own words only.
            ends = [last for first, last in harmless if first <= match.start() < last]
            found.append((match.end(), min([stop.start() if stop else end, *ends]), "negated", match[0]))
        for match in language.after.finditer(text):
            if not any(first <= match.start() < last for first, last in harmless + answered):
                found.append((self._denial_clause(match.start())[0], match.start(), "negated", match[0]))
        for match in language.history.finditer(text):
            comma = text.find(",", match.end())
            found.append((match.end(), comma if comma >= 0 else len(text), "past", match[0]))
        past = language.past.search(text)
        if past and not language.present.search(text):
            found.append((past.start(), len(text), "past", past[0]))
        return found

    def polarity(self, start: int, end: int, clause: tuple[int, int]) -> tuple[str, str]:
        """(polarity, cue) of the finding at `start:end`."""
        for first, last, polarity, cue in self._denials:
            # Compare the end, too: "calcified plaques in the aorta, no calcification of the coronary arteries".
            if first <= start < last or first <= end - 1 < last:
                return polarity, cue.strip()
        doubt = self.language.doubt.search(self.text, *clause) or _QUESTION.match(self.text, end)
        return ("uncertain", doubt[0].strip()) if doubt else ("positive", "")


def _checked_text(report: str) -> tuple[str, list[int] | None]:
    if not isinstance(report, str):
        raise TypeError(f"report: {type(report).__name__} (expected a str)")
    return without_markup(report)


class RuleLabeler:
    """
    Labeler that finds the 18 findings in chest CT reports by rules.

    ```python
    >>> labeler = RuleLabeler()
    >>> [label for label, value in labeler.label("No effusion. A 4 mm nodule in the right lung.").items() if value]
    ['Lung nodule']
    ```

    `signature` identifies the rules by a hash of rules.yaml, this file and markup.py.

    Args:
        path: rules file in the format of rules.yaml.

    Raises:
        ValueError: the file's labels are not the 18.
    """

    def __init__(self, path: str | PathLike = RULES_FILE):
        content = Path(path).read_bytes()
        document = yaml.safe_load(content)
        if difference := set(document["labels"]) ^ set(DIAGNOSIS_LABELS):
            raise ValueError(f"{path} must have rules for exactly the 18 labels; these differ: {sorted(difference)}")
        terms = {name: f"(?:{_any_of(patterns)})" for name, patterns in document["terms"].items()}
        self._language = _Language(document["language"], document["sites"])
        self._words = {label: document["labels"][label]["words"] for label in DIAGNOSIS_LABELS}
        self._rules = {
            label: [self._rule(label, entry, terms) for entry in document["labels"][label]["rules"]]
            for label in DIAGNOSIS_LABELS
        }
        self.rules = tuple(rule for rules in self._rules.values() for rule in rules)
        code = b"".join(Path(__file__).with_name(name).read_bytes() for name in ("rules.py", "markup.py"))
        digest = hashlib.sha256(content + code).hexdigest()
        self.signature = f"rule-labeler|labels:{len(DIAGNOSIS_LABELS)}|uncertain:positive|rules:{digest[:12]}"

    @staticmethod
    def _rule(label: str, entry: Mapping, terms: Mapping[str, str]) -> Rule:
        def compiled(patterns: str | Sequence[str]) -> re.Pattern:
            return re.compile(_TERM.sub(lambda match: terms[match[1]], _any_of(patterns)))

        return Rule(
            label=label,
            name=entry["name"],
            find=compiled(entry["find"]),
            sites=frozenset(entry["sites"]) if "sites" in entry else None,
            unless=compiled(entry["unless"]) if "unless" in entry else None,
            examples=tuple(entry["examples"]),
            counterexamples=tuple(entry.get("not", ())),
        )

    def _mentions(self, report: str) -> Iterator[tuple[_Sentence, str]]:
        """Yield each sentence of a [`without_markup`] that contains one of a label's words, with that label."""
        text = report if report.isascii() else _FOLDED.sub(lambda match: _FOLD[match[0]], report)
        lower = text.lower()
        ends = [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
        mentioned: dict[int, dict[str, None]] = {}
        for label, words in self._words.items():
            for word in words:
                at = lower.find(word)
                while at >= 0:
                    row = bisect_right(ends, at)
                    mentioned.setdefault(row, {})[label] = None
                    at = lower.find(word, ends[row])
        for row in sorted(mentioned):
            start = ends[row - 1] if row else 0
            # Join wrapped lines: a line may break between two words of a rule.
            sentence = _Sentence(lower[start : ends[row]].replace("\n", " "), start, self._language)
            for label in mentioned[row]:
                yield sentence, label

    def _hits(self, sentence: _Sentence, label: str) -> Iterator[tuple[Rule, int, int, str, str]]:
        """Yield (rule, start, end, polarity, cue) of each mention of `label`, relative to the sentence's start."""
        for rule in self._rules[label]:
            for clause in sentence.clauses:
                for match in rule.find.finditer(sentence.text, *clause):
                    start, end = match.span()
                    if rule.unless and rule.unless.search(sentence.text, *clause):
                        continue
                    if rule.sites is None or sentence.site(start, end, clause) in rule.sites:
                        yield rule, start, end, *sentence.polarity(start, end, clause)

    def label(self, report: str) -> dict[str, int]:
        """Return the 18 labels by name in the order of `DIAGNOSIS_LABELS`.

        A label is 1 if the report states or suspects the finding. An empty report has no finding.

        Raises:
            TypeError: `report` is not a str (for example, NaN from an empty cell of a table).
        """
        found = dict.fromkeys(DIAGNOSIS_LABELS, 0)
        text, _ = _checked_text(report)
        for sentence, label in self._mentions(text):
            if not found[label]:
                found[label] = int(any(polarity in COUNTED for *_, polarity, _ in self._hits(sentence, label)))
        return found

    def explain(self, report: str) -> list[Hit]:
        """Return every mention of a finding in the order of the text, including those that do not count.

        Raises:
            TypeError: `report` is not a str.
        """
        hits = []
        text, places = _checked_text(report)
        for sentence, label in self._mentions(text):
            # Quote the report itself, including the markup removed from `text`.
            first, last = sentence.start, sentence.start + len(sentence.text)
            whole = report[slice(first, last) if places is None else slice(places[first], places[last])].strip()
            for rule, start, end, polarity, cue in self._hits(sentence, label):
                span = (sentence.start + start, sentence.start + end)
                if places is not None:
                    span = places[span[0]], places[span[1] - 1] + 1
                hits.append(Hit(label, rule.name, whole, span, polarity, cue))
        return sorted(hits, key=lambda hit: hit.span)

    def label_all(self, reports: Iterable[str]) -> NDArray[np.int8]:
        """Label reports: (reports, 18) of 0 and 1, in the order of `DIAGNOSIS_LABELS`.

        Raises:
            TypeError: a report is not a str; the message names its index.
        """
        rows = []
        for row, report in enumerate(reports):
            try:
                rows.append(list(self.label(report).values()))
            except TypeError as error:
                raise TypeError(f"reports[{row}]: {error}") from error
        return np.array(rows, dtype=np.int8).reshape(-1, len(DIAGNOSIS_LABELS))
