# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Run an experiment: train what its table names, write the reports, score them, and make the page anew.

    diffvp experiment table4
    diffvp experiment table4 --study configs/study_radgenome.yaml training.data.root=/data/RadGenome-ChestCT

Everything that is made once (models, reports) lies below the folder of runs and is used by every table.
"""

import datetime
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from ..data.cases import Case
from ..data.load import load_dataset_cases
from ..metrics.baselines import label_baselines, nearest_reports
from ..metrics.clinical_efficacy.reports import Labeler
from ..training.cohort import load_cohort
from .evaluate import constant_normal_report, pooled_features
from .figures import figure_content
from .runs import HeldOut, Run, make_reports, write_json
from .scores import (
    FINDINGS,
    LANGUAGE,
    SystemScores,
    compare_rows,
    findings_signature,
    row_summary,
    score_labels,
    score_system,
    study_labeler,
)
from .study import Study, Table, TableRow, Variant, load_table, load_variants


def run_experiment(
    name: str, study: Study, runs: Path, output: Path, *, seeds: list[int] | None = None, workers: int = 1
) -> Path:
    """
    Make a table or figure with all that it needs; writes `output/STUDY/NAME.json` and returns it.

    Args:
        seeds: instead of the table's own, for a trial.
        workers: processes for METEOR.

    Raises:
        ValueError: there is no such experiment.
        RunError: the folder of runs holds others of these names.
        DatasetError: all that is wrong with the data.
    """
    variants = load_variants()
    table = load_table(name, variants)
    test = HeldOut(study)
    path = output / study.name / f"{Path(name).stem}.json"
    first_runs: dict[str, Run] = {}
    first_reports: dict[str, dict] = {}
    systems: dict[str, dict[int, SystemScores]] = {}
    provenance = {}
    for row in table.rows:
        systems[row.name] = {}
        for run in runs_of_row(study, variants, table, row, runs, seeds):
            run.train()
            document = make_reports(run, test, row.condition)
            first_runs.setdefault(row.name, run)
            first_reports.setdefault(row.name, document)
            provenance[f"{row.name}, seed {run.seed}"] = document["made_by"]["weights"]
            if table.kind == "scores":
                scores = cached_scores(run, document, test.cases, row.condition.name, workers)
                systems[row.name][run.seed] = scores
    result = {
        "experiment": Path(name).stem,
        "title": table.title,
        "about": table.about,
        "kind": table.kind,
        "command": f"diffvp experiment {name}",
        "study": {"name": study.name, "title": study.title},
        "cases": len(test.cases),
        "rows": [
            {
                "name": row.name,
                "variant": row.variant,
                "about": variants[row.variant].about,
                "condition": row.condition.model_dump(exclude_defaults=True),
                "seeds": seeds or row.seeds or table.seeds,
                "paper": row.paper,
            }
            for row in table.rows
        ],
        "paper_note": table.paper_note,
        "provenance": {"weights": provenance, **machine()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if table.kind == "scores":
        for row in result["rows"]:
            row["scores"] = row_summary(systems[row["name"]], table.metrics)
        result |= {
            "metrics": table.metrics,
            "signature": next(iter(systems[table.rows[0].name].values())).signature,
            "baselines": baselines(study, test, first_runs[table.rows[0].name], table.metrics, workers),
            "comparisons": [
                {"first": a, "second": b, "metrics": compare_rows(systems[a], systems[b], table.metrics)}
                for a, b in table.compare
            ],
        }
    else:
        result |= figure_content(table, first_runs, first_reports, test, path.with_suffix(".png"))
    write_json(path, result)
    return path


def planned_runs(name: str, study: Study, runs: Path, seeds: list[int] | None) -> list[tuple[Run, bool]]:
    """The models that an experiment takes, each with whether it is trained already. Data that are there are checked.

    Raises:
        DatasetError: all that is wrong with the data.
    """
    variants = load_variants()
    table = load_table(name, variants)
    planned = {run.folder: run for row in table.rows for run in runs_of_row(study, variants, table, row, runs, seeds)}
    if Path(study.training["data"]["root"]).exists():
        HeldOut(study)
        # Most variants read the same data: each division of it is checked once.
        divisions = {(run.seed, run.config.data.model_dump_json()): run for run in planned.values()}
        for run in divisions.values():
            load_cohort(run.config)
    return [(run, (run.folder / "model").is_dir()) for run in planned.values()]


def runs_of_row(
    study: Study, variants: dict[str, Variant], table: Table, row: TableRow, runs: Path, seeds: list[int] | None
):
    """The runs of a row, one a seed."""
    for seed in seeds or row.seeds or table.seeds:
        folder = runs / study.name / row.variant / f"seed-{seed}"
        yield Run(study, variants[row.variant], row.variant, seed, folder)


def cached_scores(run: Run, document: dict, cases: list[Case], name: str, workers: int) -> SystemScores:
    """Scores of a set of reports, kept beside it: METEOR takes seconds, and a row may stand in several tables."""
    path = run.folder / "reports" / f"{name}.npz"
    reports = run.folder / "reports" / f"{name}.json"
    labeler = study_labeler(run.study.test.labeler)
    if path.is_file() and path.stat().st_mtime_ns >= reports.stat().st_mtime_ns:
        with np.load(path, allow_pickle=False) as stored:
            signature = str(stored["signature"])
            if signature.endswith(findings_signature(labeler)):
                per_report = {key: stored[key] for key in stored.files if key not in ("counts", "signature")}
                return SystemScores(per_report, stored["counts"], signature)
    scores = score_system([row["report"] for row in document["reports"]], cases, labeler, workers)
    temporary = path.with_name(f".{path.name}")
    with open(temporary, "wb") as file:
        np.savez(file, counts=scores.counts, signature=np.array(scores.signature), **scores.per_report)
    os.replace(temporary, path)
    return scores


def baselines(study: Study, test: HeldOut, run: Run, metrics: list[str], workers: int) -> list[dict]:
    """What a model has to beat, each made from the training split alone; the same for every table of a study."""
    path = run.folder.parents[1] / "baselines.json"
    labeler = study_labeler(study.test.labeler)
    made_by = {
        "cases": [case.name for case in test.cases],
        "training": study.training,
        "signature": findings_signature(labeler),
    }
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if stored is None or stored["made_by"] != made_by:
        stored = {"made_by": made_by, "rows": make_baselines(test, run, labeler, workers)}
        write_json(path, stored)
    return [
        {**row, "scores": {metric: row["scores"][metric] for metric in metrics if metric in row["scores"]}}
        for row in stored["rows"]
    ]


def make_baselines(test: HeldOut, run: Run, labeler: Labeler, workers: int) -> list[dict]:
    """All scores of the baselines; `run` is of any model, for they share the encoder."""
    data = run.config.data
    train = load_dataset_cases(data.layout, data.root, data.split)
    model, processor = run.load()
    volumes = run.features(model, processor).volumes
    test_features, train_features = (
        pooled_features(model, volumes, cases, name) for cases, name in ((test.cases, "test"), (train, "training"))
    )
    texts = {
        "constant normal report": [constant_normal_report(train)] * len(test.cases),
        "nearest training report": nearest_reports(test_features, train_features, [case.report for case in train]),
    }
    everything = [*FINDINGS, *LANGUAGE]
    rows = [
        {"name": name, "scores": row_summary({0: score_system(reports, test.cases, labeler, workers)}, everything)}
        for name, reports in texts.items()
    ]
    guesses = label_baselines(len(test.cases), np.stack([case.labels for case in train]))
    return rows + [
        {"name": f"labels alone, {name}", "scores": row_summary({0: score_labels(guess, test.cases)}, everything)}
        for name, guess in guesses.items()
    ]


def machine() -> dict:
    """Where and when a result was made."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "monai")},
    }
