# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Run an experiment: train the models of its table, write their reports and score them.

    diffvp experiment table4 --runs runs/new --output outputs/results
    diffvp experiment table4 --study configs/study_radgenome.yaml training.data.root=/data/RadGenome-ChestCT

Models and reports are made once and shared by all tables, see `runs.py`.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from ..files import writing_problem
from ..metrics.clinical_efficacy.reports import Labeler
from ..metrics.nlg import check_meteor_data
from ..progress import counted
from ..provenance import made_on, weights_sha256, without_place
from ..train_accelerate import build_generator
from ..training.cohort import load_cohort
from ..volume_diffvp import CTInputError
from .kinds import KINDS, Material, Needs
from .processes import completed, worker_processes
from .result_files import write_json
from .runs import HeldOut, Run, make_reports
from .study import Condition, StudyConfig, Table, TableRow, Variant, load_variants, read_table, table_file
from .system_scores import study_labeler


def run_experiment(
    name: str,
    study: StudyConfig,
    runs: Path,
    output: Path,
    *,
    seeds: list[int] | None = None,
    workers: int = 1,
    jobs: int = 1,
    judge=None,
) -> Path:
    """
    Make a table or figure and everything it needs. Writes `output/STUDY/NAME.json` and returns its path.

    Args:
        seeds: overrides the seeds of the table, for a trial.
        workers: processes for METEOR.
        jobs: models trained in parallel, each in a process with its share of the cores.
        judge: a [`ModelJudge`] for `fig4b`; without one, only rules judge.

    Raises:
        ValueError: there is no such experiment, or its result cannot be written; raised before training.
        RunError: the folder of runs holds other models under these names.
        DatasetError: lists all problems of the data.
        LexiconError: the data of METEOR are not installed; raised before training.
        RadBertError: the labeler of the study cannot be loaded; raised before training.
    """
    variants = load_variants()
    table = load_table(name, variants)
    path = output / study.name / f"{Path(name).stem}.json"
    labeler = check_before_training(table, study, path)
    test = HeldOut(study)
    needs = KINDS[table.kind].needs
    count = len(test.cases_of(table.patients)) if needs.cohort else None
    planned = runs_of_table(study, variants, table, runs, output, seeds)
    if jobs > 1:
        make_at_once(needs, planned, jobs)
    for run, conditions in planned:
        make_run(needs, run, conditions, test)
    made = {
        row.name: {run.seed: run for run in runs_of_row(study, variants, table, row, runs, output, seeds)}
        for row in table.rows
        if needs.cohort
    }
    reports = {
        row.name: {seed: make_reports(run, test, row.condition) for seed, run in made[row.name].items()}
        for row in table.rows
        if needs.reports
    }
    material = Material(
        table, study, test, rows_of_result(table, variants, seeds), made, reports, labeler, path.with_suffix(".png"),
        workers=workers, judge=judge,
    )  # fmt: skip
    result = {
        "experiment": Path(name).stem,
        "title": table.title,
        "about": table.about,
        "kind": table.kind,
        "command": command_of(name, study, runs, output),
        "study": {
            "name": study.name,
            "title": study.title,
            "true_findings": study.training["report"].get("true_findings", 0),
        },
        "cases": count,
        "rows": material.rows,
        "paper_note": table.paper_note,
        "provenance": provenance(made, reports),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result | KINDS[table.kind].content(material))
    return path


def check_before_training(table: Table, study: StudyConfig, path: Path) -> Labeler:
    """
    Check that the result can be scored and written, which would otherwise fail after hours. Return the labeler.

    Raises:
        ValueError: no file can be written at `path`.
        LexiconError: the data of METEOR are not installed.
        RadBertError: the labeler of the study cannot be loaded.
    """
    found = writing_problem(path)
    if found is not None:
        raise ValueError(f"{path}: output: {found} (expected a file that can be written)")
    if KINDS[table.kind].needs.meteor:
        check_meteor_data()
    return study_labeler(study.test.labeler)


def rows_of_result(table: Table, variants: Mapping[str, Variant], seeds: list[int] | None) -> list[dict]:
    """Return the description of each row for the JSON file."""
    return [
        {
            "name": row.name,
            "variant": row.variant,
            "about": variants[row.variant].about,
            "condition": row.condition.model_dump(exclude_defaults=True),
            "seeds": seeds or row.seeds or table.seeds,
            "paper": row.paper,
        }
        for row in table.rows
    ]


def command_of(name: str, study: StudyConfig, runs: Path, output: Path) -> str:
    """Return the command that repeats an experiment."""
    chosen = "" if study.name == "phantom" else f" --study configs/study_{study.name}.yaml"
    return f"diffvp experiment {name}{chosen} --runs {without_place(runs)} --output {without_place(output)}"


def provenance(runs: Mapping[str, Mapping[int, Run]], reports: Mapping[str, Mapping[int, dict]]) -> dict:
    """Return the digests of the weights, the devices that wrote the reports, and this machine."""
    weights, devices = {}, {}
    for name, seeds in runs.items():
        for seed, run in seeds.items():
            document = reports[name][seed] if reports else None
            weights[f"{name}, seed {seed}"] = (
                weights_sha256(run.folder / "model") if document is None else document["made_by"]["weights"]
            )
            if document is not None and "made_on" in document:  # older reports lack it
                devices.setdefault(document["made_on"]["device"], set()).add(name)
    return {
        "weights": weights,
        "devices": {device: sorted(names) for device, names in devices.items()},
        **made_on(),
    }


def load_table(name: str, variants: dict[str, Variant]) -> Table:
    """
    Read the table `name` of this folder, or the file `name` if it ends in .yaml.

    Raises:
        ValueError: there is no such table, or it names an unknown variant or kind.
    """
    path = table_file(name)
    table = read_table(path)
    unknown = sorted({row.variant for row in table.rows} - set(variants))
    if unknown:
        raise ValueError(f"{path.name}: no such variant: {', '.join(unknown)}; expected one of {', '.join(variants)}")
    if table.kind not in KINDS:
        raise ValueError(f"{path.name}: no such kind: {table.kind}; expected one of {', '.join(KINDS)}")
    if table.patients == "foreign" and not KINDS[table.kind].needs.foreign:
        raise ValueError(f"patients: foreign is for a table of scores, not for {table.kind}")
    return table


def planned_runs(
    name: str, study: StudyConfig, runs: Path, output: Path, seeds: list[int] | None
) -> list[tuple[Run, str]]:
    """List the models of an experiment with the work left for each. Check the data if they exist.

    Raises:
        DatasetError: lists all problems of the data.
    """
    variants = load_variants()
    table = load_table(name, variants)
    planned = runs_of_table(study, variants, table, runs, output, seeds)
    if planned and Path(study.training["data"]["root"]).exists():
        HeldOut(study).cases_of("own")
        # Most variants read the same data: check each split once.
        splits = {(run.seed, run.config.data.model_dump_json()): run for run, _ in planned}
        for run in splits.values():
            load_cohort(run.config)
    needs = KINDS[table.kind].needs
    return [(run, what_is_left(needs, run, conditions)) for run, conditions in planned]


def runs_of_row(
    study: StudyConfig,
    variants: dict[str, Variant],
    table: Table,
    row: TableRow,
    runs: Path,
    output: Path,
    seeds: list[int] | None,
) -> Iterator[Run]:
    """Yield the runs of a row, one for each seed."""
    for seed in seeds or row.seeds or table.seeds:
        name = Path(row.variant) / f"seed-{seed}"
        folders = runs / study.name / name, output / study.name / "reports" / name
        yield Run(study, variants[row.variant], row.variant, seed, *folders)


def runs_of_table(study, variants, table, runs, output, seeds) -> list[tuple[Run, list[Condition]]]:
    """Return each run of a table once, with all its conditions. Kinds without a cohort have none."""
    conditions: dict[Path, tuple[Run, list[Condition]]] = {}
    if not KINDS[table.kind].needs.cohort:
        return []
    for row in table.rows:
        for run in runs_of_row(study, variants, table, row, runs, output, seeds):
            conditions.setdefault(run.folder, (run, []))[1].append(row.condition)
    return list(conditions.values())


def what_is_left(needs: Needs, run: Run, conditions: list[Condition]) -> str:
    """Return the work left for a run: "to train", "to write" (its reports), or "made" (nothing)."""
    lacks_reports = needs.reports and not all(run.reports_under(of).is_file() for of in conditions)
    if run.trained:
        return "to write" if lacks_reports else "made"
    return "to train" if lacks_reports or needs.models else "made"


def make_run(needs: Needs, run: Run, conditions: list[Condition], test: HeldOut) -> None:
    """Train the model and write the reports that are missing. Stored reports must come from the same model."""
    if what_is_left(needs, run, conditions) == "made":
        return
    run.train()
    if needs.reports:
        for condition in conditions:
            make_reports(run, test, condition)


def make_at_once(needs: Needs, runs: list[tuple[Run, list[Condition]]], jobs: int) -> None:
    """Make the runs in parallel, each in a process that logs to `log.txt` in the folder of the run."""
    left = [(run, conditions) for run, conditions in runs if what_is_left(needs, run, conditions) != "made"]
    threads = max(1, torch.get_num_threads() // jobs)
    with worker_processes(jobs) as pool:
        # Fill the caches first: else all workers would start with the features of the same case. Without a given
        # classifier, each run trains its own and shares no features.
        shared = [(run, of) for run, of in left if run.config.classifier is not None]
        if shared:
            for future in [pool.submit(_fill_caches, shared, part, jobs, threads) for part in range(jobs)]:
                future.result()
        tasks = [(_make_in_worker, needs, run, conditions, threads) for run, conditions in left]
        for future in counted(completed(pool, tasks, jobs), "Models", len(tasks)):
            future.result()


def _fill_caches(runs: list[tuple[Run, list[Condition]]], part: int, parts: int, threads: int) -> None:
    """Compute a part of the frozen features of the test cases and, if a run is not trained, of the training cases."""
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
        with contextlib.suppress(CTInputError):  # training reports unreadable scans
            features.load(case)


def _make_in_worker(needs: Needs, run: Run, conditions: list[Condition], threads: int) -> None:
    torch.set_num_threads(threads)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (
        open(run.folder / "log.txt", "a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        logging.basicConfig(format="%(message)s", stream=log, force=True)
        logging.getLogger("diffvp").setLevel(logging.INFO)
        make_run(needs, run, conditions, HeldOut(run.study))
