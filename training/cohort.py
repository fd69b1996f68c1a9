# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Cases of a run: stages, validation, test and the pool of normal references."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ..configuration_diffvp import DiffVPConfig
from ..data.cases import (
    Case,
    Problem,
    check_no_leak,
    first_reconstructions,
    raise_problems,
    read_ids,
    split_by_patient,
)
from ..data.load import load_dataset_cases
from ..data.pool import load_pool, pool_by_rule
from ..labels_diffvp import DIAGNOSIS_LABELS
from ..storage_diffvp import check_checkpoint_name
from .config import DataSection, TrainingConfig

logger = logging.getLogger(__name__)


@dataclass
class Cohort:
    """The cases of a run.

    Attributes:
        diagnosis, report: training cases of the two stages.
        validation: cases of patients that neither stage trains on.
        pool: normal references from the training cases. Validation uses them too, as a user's scans will.
        test: cases of further patients, held out for `diffvp evaluate`.
    """

    diagnosis: list[Case]
    validation: list[Case]
    report: list[Case]
    pool: list[Case]
    test: list[Case] = field(default_factory=list)

    def everyone(self) -> list[Case]:
        """Return the distinct cases of training and validation."""
        return list({case.name: case for case in self.diagnosis + self.validation + self.report}.values())

    def without(self, names: set[str]) -> "Cohort":
        """Return the cohort without the named cases."""

        def rest(cases: list[Case]) -> list[Case]:
            return [case for case in cases if case.name not in names]

        return self._each(rest)

    def with_labels(self, labels: Sequence[str]) -> "Cohort":
        """Reduce cases with all `DIAGNOSIS_LABELS` to these labels, in this order. All 18 define the normal cases."""
        if tuple(labels) == DIAGNOSIS_LABELS or not set(labels) <= set(DIAGNOSIS_LABELS):
            return self
        columns = [DIAGNOSIS_LABELS.index(label) for label in labels]

        def these(cases: list[Case]) -> list[Case]:
            return [
                replace(case, labels=case.labels[columns])
                if case.labels is not None and len(case.labels) == len(DIAGNOSIS_LABELS)
                else case
                for case in cases
            ]

        return self._each(these)

    def _each(self, change: Callable[[list[Case]], list[Case]]) -> "Cohort":
        return Cohort(**{one.name: change(getattr(self, one.name)) for one in fields(self)})

    def sha256(self, stage: str) -> str:
        """Hash names, reports and labels: everything that the weights of a stage depend on besides the settings."""
        digest = hashlib.sha256()
        of_stage = {"diagnosis": (self.diagnosis,), "report": (self.report, self.pool)}[stage]
        for cases in (self.validation, *of_stage):
            for case in cases:
                digest.update(case.identity)
            digest.update(b"\1")
        return digest.hexdigest()


def load_cohort(config: TrainingConfig) -> Cohort:
    """Load the cases of a training file.

    Raises:
        DatasetError: lists all problems with the dataset, its division, or its pool.
        ValueError: a span lies outside the split.
    """
    data = config.data
    labels = tuple(_diagnosis_labels(config))
    if not set(labels) <= set(DIAGNOSIS_LABELS) and (data.layout != "table" or data.labeler is not None):
        raise ValueError(
            f"model.diagnosis_labels has {sorted(set(labels) - set(DIAGNOSIS_LABELS))}: only a table of your own can "
            "provide these labels; expected data.layout: table, and no data.labeler."
        )
    exclude = read_ids(data.exclude) if data.exclude else ()

    def load(split: str | None) -> list[Case]:
        own = {"table": {"labels": labels}, "hub": {"store": Path(data.cache_dir, "hub"), **data.load_options}}
        cases = load_dataset_cases(data.layout, data.root, split, exclude=exclude, **own.get(data.layout, {}))
        if data.labeler == "rules":
            # From the extra `metrics`, which training does not need otherwise.
            from ..metrics.labelers import RuleLabeler
            from ..metrics.labelers.table import label_cases

            cases = label_cases(cases, RuleLabeler())
        return first_reconstructions(cases) if data.reconstructions == "first" else cases

    everything = load(data.split)
    cases, test = everything, load(data.test_split) if data.test_split is not None else []
    if data.test_fraction is not None:
        # Independent of the seed, so that models of different seeds are scored on the same patients.
        cases, test = split_by_patient(cases, data.test_fraction, "test")
    if data.validation_fraction is not None:
        report, validation = split_by_patient(cases, data.validation_fraction, config.seed)
        diagnosis = report
    elif data.validation_split is not None:
        diagnosis, validation, report = cases, load(data.validation_split), cases
    else:
        spans = ("diagnosis_cases", "validation_cases", "report_cases")
        diagnosis, validation, report = (_span(cases, getattr(data, name), name) for name in spans)
    check_no_leak(diagnosis + report, validation)
    check_no_leak(diagnosis + report + validation, test, "test")
    cohort = Cohort(diagnosis, validation, report, _pool(data, everything, report), test).with_labels(labels)
    if config.init_from is None and config.classifier is None:  # otherwise, the first stage belongs to another run
        if data.report_cases is not None:
            check_stages_apart(cohort)
        elif config.stage == "all":
            logger.info(
                "Both stages train on the same %d patients, as in the paper. The findings in the training prompts are "
                "therefore nearly true, more often than those in the validation prompts.",
                len({case.patient_id for case in cohort.report}),
            )
    problems = []
    if config.stage != "diagnosis":
        problems += _pool_problems(cohort)
    if config.stage != "report" and config.init_from is None:
        unlabelled = [case for case in cohort.diagnosis + cohort.validation if case.labels is None]
        if unlabelled:
            expected = f"all {len(labels)}, or data.labeler: rules, or a checkpoint to start from (init_from)"
            problems.append(Problem("dataset", unlabelled[0].row, "labels", "missing", expected, unlabelled[0].name))
    raise_problems(problems)
    return cohort


def _diagnosis_labels(config: TrainingConfig) -> Sequence[str]:
    """Return the labels of the trained model, in its order."""
    if config.init_from is None:
        return (config.model or {}).get("diagnosis_labels", DIAGNOSIS_LABELS)
    check_checkpoint_name(config.init_from)
    return DiffVPConfig.from_pretrained(config.init_from, **config.init_options).diagnosis_labels


def check_stages_apart(cohort: Cohort) -> None:
    """
    Check that the two stages train on different patients. For a patient of both, the classifier would predict nearly
    true findings, unlike for new patients.

    Raises:
        DatasetError: a patient is in both stages.
    """
    known = {case.patient_id for case in cohort.diagnosis}
    both = {case.patient_id: case for case in cohort.report if case.patient_id in known}
    found, expected = "in diagnosis_cases and in report_cases", "in only one: move the borders of the spans"
    raise_problems([Problem("splits", case.row, "patient_id", found, expected, case.name) for case in both.values()])


def _span(cases: list[Case], span: tuple[int, int], name: str) -> list[Case]:
    """Return the cases at positions [start, stop) of the split."""
    start, stop = span
    if not 0 <= start < stop <= len(cases):
        raise ValueError(f"data.{name} is [{start}, {stop}], but the split has {len(cases)} cases.")
    return cases[start:stop]


def _pool(data: DataSection, cases: list[Case], training: list[Case]) -> list[Case]:
    """Return the normal references that are training cases."""
    if data.pool is None:
        members, _ = pool_by_rule(cases) or ([], "")
    else:
        members = load_pool(data.pool, cases)
    ours = {case.name for case in training}
    return [case for case in members if case.name in ours]


def _pool_problems(cohort: Cohort) -> list[Problem]:
    if not cohort.pool:
        expected = "at least one normal scan among the training cases; see `diffvp pool build` and data.pool"
        return [Problem("dataset", None, "pool of references", "empty", expected)]
    scans = {case.scan_id for case in cohort.pool}
    if len(scans) == 1 and any(case.scan_id in scans for case in cohort.report):
        expected = "a second normal scan, as this one would be its own reference"
        return [Problem("dataset", None, "pool of references", "one scan", expected, cohort.pool[0].name)]
    return []
