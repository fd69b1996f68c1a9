# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Run an experiment: train what its table names, write the reports, score them, and make the page anew.

    diffvp experiment table4
    diffvp experiment table4 --study configs/study_radgenome.yaml training.data.root=/data/RadGenome-ChestCT

Everything that is made once (models, reports) lies below the folder of runs and is used by every table.
"""

import contextlib
import json
import logging
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, as_completed, wait
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from ..data.cases import Case
from ..data.load import load_dataset_cases
from ..metrics.baselines import label_baselines, nearest_reports
from ..metrics.clinical_efficacy.reports import Labeler
from ..metrics.nlg import check_meteor_data
from ..provenance import made_on, weights_sha256
from ..storage_diffvp import replacing
from ..train_accelerate import build_generator
from ..training.cohort import load_cohort
from ..volume_diffvp import CTInputError
from .evaluate import constant_normal_report, pooled_features
from .figures import figure_content
from .runs import HeldOut, Run, cases_sha256, frozen_sha256, make_reports, write_json
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
from .study import Condition, Study, Table, TableRow, Variant, load_table, load_variants


def run_experiment(
    name: str,
    study: Study,
    runs: Path,
    output: Path,
    *,
    seeds: list[int] | None = None,
    workers: int = 1,
    jobs: int = 1,
    judge=None,
) -> Path:
    """
    Make a table or figure with all that it needs; writes `output/STUDY/NAME.json` and returns it.

    Args:
        seeds: instead of the table's own, for a trial.
        workers: processes for METEOR.
        jobs: models that are trained at once, each in a process with its part of the cores.
        judge: a [`ModelJudge`] for `fig4b`; without it, rules judge alone.

    Raises:
        ValueError: there is no such experiment.
        RunError: the folder of runs holds others of these names.
        DatasetError: all that is wrong with the data.
        LexiconError: METEOR's data are not installed; raised before anything is trained.
        RadBertError: the study's labeler cannot be loaded; likewise.
    """
    variants = load_variants()
    table = load_table(name, variants)
    # Whatever scoring lacks must show before hours of training.
    if table.kind == "scores":
        check_meteor_data()
    labeler = study_labeler(study.test.labeler)
    test = HeldOut(study)
    planned = runs_of_table(study, variants, table, runs, output, seeds)
    if jobs > 1:
        make_at_once(table, planned, jobs)
    for run, conditions in planned:
        make_run(table, run, conditions, test)
    path = output / study.name / f"{Path(name).stem}.json"
    patients = table.rows[0].condition.patients  # those of all rows
    cases = test.cases_of(patients)
    first_runs: dict[str, Run] = {}
    first_reports: dict[str, dict] = {}
    systems: dict[str, dict[int, SystemScores]] = {}
    provenance = {}
    devices: dict[str, set[str]] = {}
    for row in table.rows:
        systems[row.name] = {}
        for run in runs_of_row(study, variants, table, row, runs, output, seeds):
            first_runs.setdefault(row.name, run)
            if not table.needs_reports:
                provenance[f"{row.name}, seed {run.seed}"] = weights_sha256(run.folder / "model")
                continue
            document = make_reports(run, test, row.condition)
            first_reports.setdefault(row.name, document)
            provenance[f"{row.name}, seed {run.seed}"] = document["made_by"]["weights"]
            if "made_on" in document:  # older reports do not say
                devices.setdefault(document["made_on"]["device"], set()).add(row.name)
            if table.kind == "scores":
                scores = cached_scores(run, document, cases, row.condition, workers)
                systems[row.name][run.seed] = scores
    result = {
        "experiment": Path(name).stem,
        "title": table.title,
        "about": table.about,
        "kind": table.kind,
        "command": f"diffvp experiment {name}",
        "study": {
            "name": study.name,
            "title": study.title,
            "true_findings": study.training["report"].get("true_findings", 0),
        },
        "cases": len(cases),
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
        "provenance": {
            "weights": provenance,
            "devices": {device: sorted(names) for device, names in devices.items()},
            **made_on(),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    if table.kind == "scores":
        for row in result["rows"]:
            row["scores"] = row_summary(systems[row["name"]], table.metrics)
        result |= {
            "metrics": table.metrics,
            "signature": next(iter(systems[table.rows[0].name].values())).signature,
            "baselines": baselines(study, test, patients, first_runs[table.rows[0].name], table.metrics, workers),
            "comparisons": [compared(table, systems, *pair) for pair in table.compare],
        }
    else:
        result |= figure_content(table, first_runs, first_reports, test, labeler, path.with_suffix(".png"), judge)
    write_json(path, result)
    return path


def compared(table: Table, systems: dict[str, dict[int, SystemScores]], first: str, second: str) -> dict:
    """Two rows of a table."""
    variants = {row.name: row.variant for row in table.rows}
    same = variants[first] == variants[second] and list(systems[first]) == list(systems[second])
    metrics = compare_rows(systems[first], systems[second], table.metrics, same_models=same)
    return {"first": first, "second": second, "same_models": same, "metrics": metrics}


def planned_runs(name: str, study: Study, runs: Path, output: Path, seeds: list[int] | None) -> list[tuple[Run, str]]:
    """The models of an experiment, each with what is left of it. Data that are there are checked.

    Raises:
        DatasetError: all that is wrong with the data.
    """
    variants = load_variants()
    table = load_table(name, variants)
    planned = runs_of_table(study, variants, table, runs, output, seeds)
    if Path(study.training["data"]["root"]).exists():
        HeldOut(study)
        # Most variants read the same data: each division of it is checked once.
        divisions = {(run.seed, run.config.data.model_dump_json()): run for run, _ in planned}
        for run in divisions.values():
            load_cohort(run.config)
    return [(run, what_is_left(table, run, conditions)) for run, conditions in planned]


def runs_of_row(
    study: Study,
    variants: dict[str, Variant],
    table: Table,
    row: TableRow,
    runs: Path,
    output: Path,
    seeds: list[int] | None,
) -> Iterator[Run]:
    """The runs of a row, one a seed."""
    for seed in seeds or row.seeds or table.seeds:
        name = Path(row.variant) / f"seed-{seed}"
        folders = runs / study.name / name, output / study.name / "reports" / name
        yield Run(study, variants[row.variant], row.variant, seed, *folders)


def runs_of_table(study, variants, table, runs, output, seeds) -> list[tuple[Run, list[Condition]]]:
    """The runs of a table, each once, with all conditions of it."""
    conditions: dict[Path, tuple[Run, list[Condition]]] = {}
    for row in table.rows:
        for run in runs_of_row(study, variants, table, row, runs, output, seeds):
            conditions.setdefault(run.folder, (run, []))[1].append(row.condition)
    return list(conditions.values())


def what_is_left(table: Table, run: Run, conditions: list[Condition]) -> str:
    """What a table has to do for a run: "to train", "to write" its reports, or nothing, if it is "made"."""
    lacks_reports = table.needs_reports and not all(run.reports_under(of).is_file() for of in conditions)
    if run.trained:
        return "to write" if lacks_reports else "made"
    return "to train" if lacks_reports or table.needs_models else "made"


def make_run(table: Table, run: Run, conditions: list[Condition], test: HeldOut) -> None:
    """Make what is left for a run. All its reports are of one model: those that are there are compared with it."""
    if what_is_left(table, run, conditions) == "made":
        return
    run.train()
    if table.needs_reports:
        for condition in conditions:
            make_reports(run, test, condition)


def make_at_once(table: Table, runs: list[tuple[Run, list[Condition]]], jobs: int) -> None:
    """Make what is left, that of a run in one process; what it says goes to `log.txt` in the folder of the run."""
    left = [(run, conditions) for run, conditions in runs if what_is_left(table, run, conditions) != "made"]
    threads = max(1, torch.get_num_threads() // jobs)
    # "spawn": a fork of a process in which torch has started threads can hang.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        former = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # else it tells no worker
        try:
            # Else all of them would begin with the features of the same case. (Without a classifier each trains its
            # own.)
            shared = [(run, of) for run, of in left if run.config.classifier is not None]
            if shared:
                for future in [pool.submit(_fill_caches, shared, part, jobs, threads) for part in range(jobs)]:
                    future.result()
            tasks = [(_make_in_worker, table, run, conditions, threads) for run, conditions in left]
            for future in track(completed(pool, tasks, jobs), "Models", total=len(tasks)):
                future.result()
        except (Exception, SystemExit):  # no Ctrl-C: of that the terminal tells the workers too, and they save and end
            for worker in multiprocessing.active_children():
                worker.terminate()  # what they train goes on from its last checkpoint
            raise
        finally:
            signal.signal(signal.SIGTERM, former)


def completed(pool: Executor, tasks: Sequence[tuple], jobs: int) -> Iterator[Future]:
    """The results of tasks (function and arguments) as they come. A task is handed to the pool when a worker is free
    for it: what a process pool has been given, its workers begin even when they have been asked to end."""
    under_way: set[Future] = set()
    for task in tasks:
        if len(under_way) == jobs:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from done
        under_way.add(pool.submit(*task))
    yield from as_completed(under_way)


def _fill_caches(runs: list[tuple[Run, list[Condition]]], part: int, parts: int, threads: int) -> None:
    """A part of the frozen features that the runs take: of their test cases, and of the training where it is left."""
    torch.set_num_threads(threads)
    run, test = runs[0][0], HeldOut(runs[0][0].study)
    cases = list(test.cases)
    if any(condition.foreign or condition.patients == "foreign" for _, of in runs for condition in of):
        cases += test.foreign
    if not all(run.trained for run, _ in runs):
        cases += load_cohort(run.config).everyone()
    model, processor = build_generator(run.config)
    features = run.features(model, processor)
    for case in cases[part::parts]:
        with contextlib.suppress(CTInputError):  # training says what becomes of it
            features.load(case)


def _make_in_worker(table: Table, run: Run, conditions: list[Condition], threads: int) -> None:
    torch.set_num_threads(threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (
        open(run.folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        logging.basicConfig(format="%(message)s", stream=log, force=True)
        logging.getLogger("diffvp").setLevel(logging.INFO)
        make_run(table, run, conditions, HeldOut(run.study))


def cached_scores(run: Run, document: dict, cases: list[Case], condition: Condition, workers: int) -> SystemScores:
    """Scores of a set of reports, kept with the run: METEOR takes seconds, and a row may stand in several tables."""
    path = run.folder / "scores" / f"{condition.name}.npz"
    reports = run.reports_under(condition)
    labeler = study_labeler(run.study.test.labeler)
    if path.is_file() and path.stat().st_mtime_ns >= reports.stat().st_mtime_ns:
        with np.load(path, allow_pickle=False) as stored:
            signature = str(stored["signature"])
            if signature.endswith(findings_signature(labeler)):
                per_report = {key: stored[key] for key in stored.files if key not in ("counts", "signature")}
                return SystemScores(per_report, stored["counts"], signature)
    scores = score_system([row["report"] for row in document["reports"]], cases, labeler, workers)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, counts=scores.counts, signature=np.array(scores.signature), **scores.per_report)
    return scores


def baselines(study: Study, test: HeldOut, patients: str, run: Run, metrics: list[str], workers: int) -> list[dict]:
    """What a model has to beat, each made from the training split alone; one file for the tables of these patients."""
    path = run.reports.parents[1] / f"baselines-{patients}.json"
    cases = test.cases_of(patients)
    labeler = study_labeler(study.test.labeler)
    made_by = {
        "settings": study.training_config(Variant(name="", about=""), seed=0, output_dir="").of_the_result("report"),
        "frozen": frozen_sha256(study.training.get("classifier")),
        "cases": cases_sha256(cases),
        "signature": findings_signature(labeler),
    }
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if stored is None or stored["made_by"] != made_by:
        stored = {"made_by": made_by, "rows": make_baselines(cases, run, labeler, workers)}
        write_json(path, stored)
    return [
        {**row, "scores": {metric: row["scores"][metric] for metric in metrics if metric in row["scores"]}}
        for row in stored["rows"]
    ]


def make_baselines(test: list[Case], run: Run, labeler: Labeler, workers: int) -> list[dict]:
    """All scores of the baselines; `run` is of any model. None is trained, if the study's classifier is given."""
    data = run.config.data
    train = load_dataset_cases(data.layout, data.root, data.split)
    model, processor = run.load() if run.config.classifier is None else build_generator(run.config)
    volumes = run.features(model, processor).volumes
    test_features, train_features = (
        pooled_features(model, volumes, cases, name) for cases, name in ((test, "test"), (train, "training"))
    )
    texts = {
        "constant normal report": [constant_normal_report(train)] * len(test),
        "nearest training report": nearest_reports(test_features, train_features, [case.report for case in train]),
    }
    everything = [*FINDINGS, *LANGUAGE]
    rows = [
        {"name": name, "scores": row_summary({0: score_system(reports, test, labeler, workers)}, everything)}
        for name, reports in texts.items()
    ]
    guesses = label_baselines(len(test), np.stack([case.labels for case in train]))
    return rows + [
        {"name": f"labels alone, {name}", "scores": row_summary({0: score_labels(guess, test)}, everything)}
        for name, guess in guesses.items()
    ]
