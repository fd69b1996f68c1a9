# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Input of every kind of experiment, and its part of the result."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...data.cases import Case
from ...data.pool import is_normal
from ...metrics.clinical_efficacy.reports import Labeler
from ...metrics.markdown import with_interval
from ...modeling_diffvp import DiffVPForConditionalGeneration
from ...training.features import Features
from ..runs import HeldOut, Run
from ..study import StudyConfig, Table

EXAMPLES = 4  # cases shown in a picture or next to each other


@dataclass(frozen=True)
class Needs:
    """
    Requirements of a kind of experiment.

    Attributes:
        models: the trained models; stored reports are not enough.
        reports: the reports of the models on the test cases.
        meteor: the data of METEOR.
        foreign: True if patients of another scanner can be tested.
        cohort: the cases of the study. A kind without them trains no model, reads no reports, and states its own
            number of test cases.
    """

    models: bool = False
    reports: bool = True
    meteor: bool = False
    foreign: bool = False
    cohort: bool = True


@dataclass(frozen=True)
class Material:
    """
    Models and reports from which an experiment is computed.

    Attributes:
        rows: the rows of the JSON file: name, variant, condition, seeds, the paper's scores.
        runs: trained models by row name, then seed.
        reports: reports by row name, then seed, as `make_reports` returns them; empty for a kind without reports.
        labeler: reads findings from reports.
        picture: path of the PNG, for kinds that draw one.
        workers: processes for METEOR.
        judge: a [`ModelJudge`], or `None`.
    """

    table: Table
    study: StudyConfig
    test: HeldOut
    rows: list[dict]
    runs: Mapping[str, Mapping[int, Run]]
    reports: Mapping[str, Mapping[int, dict]]
    labeler: Labeler
    picture: Path
    workers: int = 1
    judge: object = None

    def first_reports(self) -> dict[str, list[dict]]:
        """Return the reports of the first seed of each row."""
        return {name: next(iter(seeds.values()))["reports"] for name, seeds in self.reports.items()}

    def first_texts(self) -> dict[str, dict[str, str]]:
        """Return [`first_reports`] as text by case name."""
        return {name: {row["id"]: row["report"] for row in rows} for name, rows in self.first_reports().items()}

    def first_models(self) -> Iterator[tuple[str, Run, DiffVPForConditionalGeneration, Features, dict[str, Case]]]:
        """Load the first model of each row: row name, run, model, features, and the reference of each test case."""
        for row in self.table.rows:
            run = next(iter(self.runs[row.name].values()))
            model, processor = run.load()
            features = run.features(model, processor)
            chosen = self.test.references(row.condition, run.seed, features)
            yield row.name, run, model, features, {case: references[0] for case, references in chosen.items()}


@dataclass(frozen=True)
class Kind:
    """
    A kind of experiment: each other module of this folder defines one.

    Attributes:
        needs: models, reports and data that it requires.
        content: computes the entries that it adds to the JSON file of an experiment.
        lines: writes the section of the results page (Markdown) from the JSON file.
        answer: writes the answer to the main question from all JSON files of the kind, which may be none.
        observations: summarizes the first model of a JSON file in sentences for the top of the page.
    """

    needs: Needs
    content: Callable[[Material], dict]
    lines: Callable[[dict], list[str]]
    answer: Callable[[list[dict]], list[str]] = lambda documents: []
    observations: Callable[[dict], list[str]] = lambda document: []


def shown_cases(test: HeldOut) -> list[Case]:
    """Return the first test cases with one to three findings, chosen before any report or map was seen."""
    few = [case for case in test.cases if not is_normal(case) and len(test.patients[case.name]) <= 3]
    return few[:EXAMPLES]


def mean_cell(entry: Mapping) -> str:
    """Format a mean with its interval for a table."""
    return with_interval(entry["mean"], entry["interval"])


def device_lines(document: dict) -> list[str]:
    """List the rows whose reports were written on a GPU."""
    devices = document["provenance"].get("devices", {})
    return [
        line
        for device, names in devices.items()
        if device != "cpu"
        for line in (f"Reports written on a GPU ({device}): {'; '.join(names)}.", "")
    ]
