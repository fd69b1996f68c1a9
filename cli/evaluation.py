# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Commands that score reports and models: `label`, `score`, `judge`, `evaluate`, `experiment`."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from ..progress import counting
from .console import (
    SHIPPED_CHECKPOINT,
    check_found,
    check_kept,
    check_writable,
    err,
    listed_problems,
    one_line_errors,
    out,
    print_page,
    quiet,
    resumable,
    say,
    warn,
)
from .options import CORES, Markdown, Radbert, ReportsLeaveMachine
from .training import log_to_stderr, print_estimate

CALIBRATION = {"model": 40, "rules": 200}  # phantoms on which a judge is measured

IdColumn = Annotated[str, typer.Option(help="Column that holds the ids.")]
PredictionColumn = Annotated[str, typer.Option(help="Column that holds the generated reports.")]
ReferenceColumn = Annotated[str, typer.Option(help="Column that holds the true reports.")]


def label(
    reports: Annotated[
        Path, typer.Argument(help="Output of `diffvp batch`; or .csv, .jsonl or .parquet with ids and reports.")
    ],
    output: Annotated[Path, typer.Option(help="CSV file for the ids and the 18 labels, 0 or 1.")],
    report_column: Annotated[str, typer.Option(help="Column that holds the reports.")] = "report",
    id_column: IdColumn = "id",
    explain: Annotated[
        Path | None,
        typer.Option(help="JSON lines file for each match of a rule, with the reason why it counts or does not."),
    ] = None,
    radbert: Radbert = None,
) -> None:
    """Label the 18 findings in chest CT reports written in English."""
    check_writable(files=[output, explain])
    check_kept(output, reports)
    check_kept(explain, reports, output)
    check_found(reports)
    from ..metrics.labelers import RadBertError, load_labeler
    from ..metrics.labelers.table import label_table

    with one_line_errors(ValueError, TypeError, RadBertError), listed_problems():
        labeler = load_labeler(radbert)
        columns = {"report_column": report_column, "id_column": id_column}
        labels = label_table(reports, output, labeler, explanations=explain, **columns)
    say(f"{len(labels):,} reports, {int(labels.sum()):,} findings: {output}")
    say(f"Labeler: {labeler.signature}")


def score(
    reports: Annotated[
        Path,
        typer.Argument(help="Output of `diffvp batch`; or .csv, .jsonl or .parquet with ids and both reports."),
    ],
    reference: Annotated[
        Path | None, typer.Option(help="Table of true reports, matched by id or path (default: they are in REPORTS).")
    ] = None,
    id_column: IdColumn = "id",
    prediction_column: PredictionColumn = "prediction",
    reference_column: ReferenceColumn = "reference",
    nearest_column: Annotated[
        str | None, typer.Option(help="Column that holds the report of the most similar training scan, as a baseline.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV file of the true labels by id (default: labels of the true reports).")
    ] = None,
    training: Annotated[
        Path | None,
        typer.Option(help="CSV file of training reports, for the baselines constant report and prevalence."),
    ] = None,
    training_column: Annotated[str, typer.Option(help="Column that holds the training reports.")] = "report",
    scorer: Annotated[
        Literal["paper", "corpus", "coco"], typer.Option(help="Implementation (docs/metrics.md).")
    ] = "paper",
    regions: Annotated[
        Literal["diffvp", "reg2rg"] | None,
        typer.Option(help="Also score by region, for reports in the format of diffvp or reg2rg."),
    ] = None,
    radbert: Radbert = None,
    meteor: Annotated[
        bool, typer.Option("--meteor/--no-meteor", help="Compute METEOR, which needs NLTK data.")
    ] = True,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes for METEOR.")] = CORES,
    radmatch: Annotated[
        Path | None,
        typer.Option(help="Also count errors with RadMatch, which asks a language model; folder for its output."),
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="URL of the server of RadMatch's language model.")] = None,
    model: Annotated[str | None, typer.Option(help="Name of that language model on the server.")] = None,
    reports_leave_machine: ReportsLeaveMachine = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    markdown: Markdown = False,
) -> None:
    """Score generated reports: all metrics of the paper, with intervals, signatures and baselines."""
    check_found(reports, reference, labels, training)
    from ..metrics.labelers import RadBertError, load_labeler
    from ..metrics.nlg import LexiconError
    from ..metrics.report_table import read_pairs, score_table, table_page

    if radmatch is not None:
        from ..metrics.judge.server import check_endpoint
        from ..metrics.radmatch import radmatch_page, score_radmatch

        with one_line_errors(ValueError):  # before scores that take minutes
            if reference is not None:
                raise ValueError("--radmatch reads both reports from one table; expected no --reference")
            if not (base_url and model):
                raise ValueError("--radmatch takes --base-url and --model: the server of its language model")
            check_endpoint(base_url, reports_leave_machine)
    with one_line_errors(ValueError, TypeError, RadBertError, LexiconError), listed_problems():
        document = score_table(
            reports, load_labeler(radbert),
            id_column=id_column, prediction_column=prediction_column, reference_column=reference_column,
            nearest_column=nearest_column, reference=reference, labels=labels, training=training,
            training_column=training_column, scorer=scorer, regions=regions, workers=workers, meteor=meteor,
        )  # fmt: skip
        if radmatch is not None:
            pairs = read_pairs(reports, id_column, prediction_column, reference_column)
            options = {"base_url": base_url, "model": model, "reports_leave_machine": reports_leave_machine}
            document["radmatch"] = score_radmatch(*pairs, radmatch, **options)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    print_page(table_page(document), markdown)
    if radmatch is not None:
        print_page(radmatch_page(document["radmatch"]), markdown)


def judge(
    first: Annotated[
        Path | None,
        typer.Argument(
            metavar="[A.csv]", help="Output of `diffvp batch`; or .csv, .jsonl or .parquet with ids and reports."
        ),
    ] = None,
    second: Annotated[
        Path | None, typer.Argument(metavar="[B.csv]", help="The same of the other system, with the same ids.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Table of true reports, matched by id or path (default: they are in A.csv).")
    ] = None,
    by: Annotated[
        Literal["model", "rules"], typer.Option("--judge", help="Judge: a language model on a server, or rules.")
    ] = "model",
    base_url: Annotated[
        str | None, typer.Option(help="URL of a server with OpenAI's chat completions interface.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of the language model on the server.")] = None,
    reports_leave_machine: ReportsLeaveMachine = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Only measure the judge; no tables are needed.")
    ] = False,
    calibration: Annotated[
        int | None,
        typer.Option(
            min=0, help="Number of phantoms to measure the judge on (default: 40 for a model, 200 for rules)."
        ),
    ] = None,
    orders: Annotated[
        int, typer.Option(min=1, max=2, help="Presentation of each pair. 2: in both orders. 1: in a random order.")
    ] = 2,
    answers: Annotated[
        Path, typer.Option(help="JSON lines file of the answers. An interrupted run continues with it.")
    ] = Path("outputs/judge.jsonl"),
    workers: Annotated[int, typer.Option(min=1, help="Number of concurrent requests.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=64, help="Maximum length of an answer, in tokens.")] = 1024,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to wait for an answer.")] = 600,
    price: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Prices per million prompt tokens and per million completion tokens, to print the cost."),
    ] = None,
    id_column: IdColumn = "id",
    prediction_column: PredictionColumn = "prediction",
    reference_column: ReferenceColumn = "reference",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the expected cost; ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    markdown: Markdown = False,
) -> None:
    """Judge which of two systems writes the better reports, after measuring the judge (docs/judge.md)."""
    check_found(first, second, reference)
    with one_line_errors(ValueError):
        if calibrate != (first is None) or calibrate != (second is None):
            raise ValueError("expected two tables of reports, A.csv and B.csv, or --calibrate")
    from ..metrics.judge import JudgeError
    from ..metrics.judge.calibration import calibration_items
    from ..metrics.judge.rules import RuleJudge
    from ..metrics.judge.table import is_same, read_comparisons

    with one_line_errors(JudgeError), listed_problems(), contextlib.ExitStack() as stack:
        columns = {"id_column": id_column, "prediction_column": prediction_column}
        comparisons = [] if calibrate else read_comparisons(
            first, second, reference, reference_column=reference_column, **columns
        )  # fmt: skip
        phantoms = CALIBRATION[by] if calibration is None else calibration
        if by == "rules":
            asked = RuleJudge()
        else:
            options = {"reports_leave_machine": reports_leave_machine, "max_tokens": max_tokens, "timeout": timeout}
            asked = stack.enter_context(_model_judge(base_url, model, answers, orders, workers, **options))
            everything = [item.comparison for item in calibration_items(phantoms)]
            _print_questions(asked, [*everything, *(one for one in comparisons if not is_same(one))], price)
        if calibrate and not phantoms:
            raise JudgeError("--calibrate takes at least one phantom")
        if dry_run:
            return
        stack.enter_context(resumable(answers))
        show = functools.partial(print_page, markdown=markdown) if not as_json else lambda page: None
        document = _judge(asked, phantoms, () if calibrate else (first, second), comparisons, show)
        if by == "model":
            document["tokens"] = asked.tokens
            _print_tokens(asked.tokens, price)
        if as_json:
            typer.echo(json.dumps(document, indent=2))


def evaluate(
    data: Annotated[
        Path,
        typer.Argument(help="Training file, whose test cases and model are used; or a dataset: its folder or Hub id."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings overridden in training.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results (default: evaluation/ next to a trained model).")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint folder (default: the trained model, or the checkpoint shipped with the package)."
        ),
    ] = None,
    layout: Annotated[
        Literal["phantom", "radgenome", "ct-rate", "ctrg", "table", "hub"],
        typer.Option(help="Layout of the dataset; hub: a dataset on the Hub with a `Nifti` column."),
    ] = "phantom",
    split: Annotated[str, typer.Option(help="Split of a dataset to score on.")] = "valid",
    training_split: Annotated[
        str, typer.Option(help="Split of a dataset that the baselines are fitted on.")
    ] = "train",
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Voxel size along x, y, z in mm, for a dataset with blank headers (ctrg)."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit of a dataset on the Hub; pinning one is recommended.")
    ] = None,
    radbert: Radbert = None,
    cache_dir: Annotated[
        Path, typer.Option(help="Folder for the preprocessed volumes of a dataset, shared with training.")
    ] = Path("runs/cache"),
    limit: Annotated[int | None, typer.Option(min=2, help="Number of test cases to score (default: all).")] = None,
    volume_labels: Annotated[
        Path | None,
        typer.Option(help="For phantoms: also score the classifier of this checkpoint, trained without masks."),
    ] = None,
    markdown: Markdown = False,
) -> None:
    """Score a checkpoint on test cases that it was not trained on, next to the baselines."""
    from ..training.config import SettingsError, TrainingConfig

    config = None
    if data.suffix.lower() in (".yaml", ".yml"):
        with one_line_errors(ValueError), listed_problems(SettingsError):
            config = TrainingConfig.load(str(data), overrides)
            checkpoint = checkpoint or Path(config.output_dir) / "model"
            output, cache_dir = output or Path(config.output_dir) / "evaluation", Path(config.data.cache_dir)
    with one_line_errors(ValueError):
        if config is None and overrides:
            raise ValueError(f"{overrides[0]}: given with a folder (expected only with a training file)")
        if config is not None and (layout, split, training_split) != ("phantom", "valid", "train"):
            raise ValueError("--layout, --split, --training-split: given (expected only with the folder of a dataset)")
        _check_dataset(data, None if config is not None else layout, spacing, revision)
        if output is None:
            raise ValueError("--output: missing (expected a folder for the results)")
        if checkpoint is not None and not checkpoint.is_dir():
            raise ValueError(f"{checkpoint}: checkpoint: missing (expected a folder, which `diffvp train` makes)")
    check_writable(folders=[output])
    from ..experiments import evaluate as run
    from ..inference.report import EXPECTED_ERRORS
    from ..metrics.labelers import RadBertError, load_labeler
    from ..provenance import without_place

    quiet()
    with one_line_errors(*EXPECTED_ERRORS, RadBertError, ValueError), listed_problems():
        labeler, checkpoint = load_labeler(radbert), checkpoint or SHIPPED_CHECKPOINT
        of = data.name if config is None and layout != "hub" else without_place(data)
        command = " ".join(["diffvp evaluate", of, *(overrides or [])])
        if config is not None:
            tests = run.trained_set(config, labeler)
        elif layout == "phantom":
            tests = run.phantom_set(data)
        else:
            options = {"store": cache_dir / "hub", "revision": revision} if layout == "hub" else {}
            tests = run.dataset_set(layout, data, split, training_split, labeler, spacing, **options)
            command += f" --layout {layout} --split {split} --training-split {training_split}"
            command += "" if spacing is None else f" --spacing {' '.join(f'{mm:g}' for mm in spacing)}"
            command += "" if revision is None else f" --revision {revision}"
        if config is None:
            command += f" --output {without_place(output)}"
        if volume_labels is not None:
            if tests.phantoms is None:
                raise ValueError("--volume-labels: given (expected only with a cohort of phantoms)")
            command += f" --volume-labels {without_place(volume_labels)}"
        page, results = run.evaluate(tests, checkpoint, output, cache_dir, limit, command, volume_labels)
        if config is not None and config.card is not None and limit is None:
            _write_own_card(config, data, checkpoint, results)
    print_page(page.read_text(encoding="utf-8"), markdown)
    say(f"\nResults: {page}")


def experiment(
    names: Annotated[
        list[str],
        typer.Argument(help="Tables or figures of the paper (table4), followed by settings to override (KEY=VALUE)."),
    ],
    study: Annotated[Path, typer.Option(help="Study file, which names data, training and test set.")] = Path(
        "configs/study_phantom.yaml"
    ),
    runs: Annotated[Path, typer.Option(help="Folder for the trained models. Existing ones are reused.")] = Path(
        "runs"
    ),
    output: Annotated[
        Path, typer.Option(help="Folder for the results and the reports behind them. Existing reports are reused.")
    ] = Path("experiments/results"),
    seed: Annotated[
        list[int] | None, typer.Option(help="Seeds to use instead of the table's; repeat for several.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Number of processes that score.")] = CORES,
    jobs: Annotated[int, typer.Option(min=1, help="Number of models to train at once; they share the cores.")] = 1,
    base_url: Annotated[
        str | None,
        typer.Option(help="URL of a server whose language model also judges reports (fig4b; docs/judge.md)."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Name of that language model on the server.")] = None,
    reports_leave_machine: ReportsLeaveMachine = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the data and list the models to train.")] = False,
) -> None:
    """Reproduce tables and figures of the paper: train the models they need, write their reports, score them."""
    log_to_stderr()
    overrides = [name for name in names if "=" in name]
    with one_line_errors(ValueError):
        if len(overrides) == len(names):
            raise ValueError("names: none (expected a table or figure of the paper, such as table4)")
    from ..experiments.study import StudyConfig, table_file

    with one_line_errors(ValueError, TypeError):
        for name in names:
            if "=" not in name:
                table_file(name)
        loaded = StudyConfig.load(study, overrides)
    from ..experiments.results_page import write_page
    from ..experiments.runner import planned_runs, run_experiment
    from ..inference.report import EXPECTED_ERRORS
    from ..metrics.labelers import RadBertError
    from ..metrics.nlg import LexiconError
    from ..training.checkpoints import CheckpointError

    with (
        one_line_errors(*EXPECTED_ERRORS, ValueError, CheckpointError, LexiconError, RadBertError),
        listed_problems(),
        contextlib.ExitStack() as stack,
    ):
        judge = None
        if (base_url or model) and not dry_run:
            options = {"reports_leave_machine": reports_leave_machine}
            judge = stack.enter_context(_model_judge(base_url, model, runs / "judge.jsonl", 2, 4, **options))
        for name in (name for name in names if "=" not in name):
            if dry_run:
                plan = planned_runs(name, loaded, runs, output, seed)
                if not plan:
                    out.print(f"{name} trains no model.", markup=False)
                    continue
                _print_plan(name, plan)
                print_estimate(plan[0][0].config, processes=1, tflops=None)
                continue
            result = run_experiment(name, loaded, runs, output, seeds=seed, workers=workers, jobs=jobs, judge=judge)
            page = write_page(result.parent)
            say(f"{result}\n{page}")


def _check_dataset(data: Path, layout: str | None, spacing, revision: str | None) -> None:
    """
    Check the dataset of an evaluation and the options that only some layouts take. `layout` is `None` if `data` is a
    training file.

    Raises:
        ValueError: the folder is missing, or an option is given with another layout.
    """
    if layout not in (None, "hub") and data.is_file():
        raise ValueError(f"{data}: data: a file (expected a training file, .yaml, or the folder of a dataset)")
    if layout not in (None, "hub") and not data.is_dir():
        raise ValueError(f"{data}: data: missing (expected a training file, or the folder of a dataset)")
    if spacing is not None and layout in (None, "phantom"):
        raise ValueError(f"--spacing: {spacing} (expected only with a dataset of another --layout than phantom)")
    if revision is not None and layout != "hub":
        raise ValueError(f"--revision: {revision} (expected only with --layout hub)")


def _write_own_card(config, data: Path, checkpoint: Path, results: dict) -> None:
    """Write the card of a model trained with the training file `data`, if that is the model evaluated."""
    if checkpoint != Path(config.output_dir) / "model":
        return
    from ..hub.card import own_facts, write_card, write_licence

    base = config.init_from if config.base is None else config.base.name
    reproduce = (f"diffvp train {data}", results["command"])
    write_licence(checkpoint)
    write_card(checkpoint, own_facts(config.card, base, results, reproduce), results)
    say(f"Card and evaluation.json: {checkpoint}")


def _print_plan(name: str, runs) -> None:
    """Print the models that an experiment needs and the work left for each. The estimate for the first follows."""
    table = Table("model", "seed", "", title=name)
    for run, left in runs:
        table.add_row(run.variant.name, str(run.seed), left)
    out.print(table)
    out.print(f"Estimate for the first of them, {runs[0][0].variant.name}:", markup=False)


@contextlib.contextmanager
def _model_judge(
    base_url: str | None, model: str | None, answers: Path, orders: int, workers: int, **server
) -> Iterator:
    """Yield the language model judge, with its file of answers open."""
    from ..metrics.judge import JudgeError
    from ..metrics.judge.answers import AnswerFile
    from ..metrics.judge.model import ModelJudge
    from ..metrics.judge.server import ChatServer

    if not (base_url and model):
        raise JudgeError("a judge needs --base-url and --model, such as a local server's; --judge rules needs neither")
    with ChatServer(base_url, model, **server) as chat, AnswerFile(answers) as kept:
        yield ModelJudge(chat, kept, orders=orders, workers=workers)


def _judge(judge, phantoms: int, tables: tuple[Path, ...], comparisons: list, show: Callable[[str], None]) -> dict:
    """Measure a judge on phantoms and let it compare two tables of reports. `show` prints the pages in Markdown."""
    from ..metrics.judge.calibration import calibrate
    from ..metrics.judge.table import calibration_page, judged, verdict_page

    document: dict = {"calibration": None}
    if phantoms:
        with counting("Calibration", err) as count:
            document["calibration"] = calibrate(judge, phantoms, count)
    show(calibration_page(document["calibration"]))
    if tables:
        different = len({table.name for table in tables}) == len(tables)
        names = tuple(table.name if different else str(table) for table in tables)
        with counting("Comparisons", err) as count:
            document |= {"systems": names, **judged(judge, comparisons, count)}
        show(verdict_page(document, names, document["calibration"]))
    return document


def _print_questions(judge, comparisons: list, price: tuple[float, float] | None) -> None:
    """Print the number of questions to a judge and their expected cost."""
    plan = judge.plan(comparisons)
    warn(
        f"{plan['answers']} answers of {judge.server.model} at {judge.server.name}, {plan['kept']} of them kept from "
        f"before; the others take about {plan['prompt']:,} prompt and {plan['completion']:,} completion tokens"
        f"{_cost(plan, price)}.",
        style=None,
    )


def _print_tokens(tokens: dict, price: tuple[float, float] | None) -> None:
    uncounted = f"; the server counted no tokens for {tokens['uncounted']} requests" if tokens["uncounted"] else ""
    warn(
        f"{tokens['requests']} requests took {tokens['prompt']:,} prompt and {tokens['completion']:,} completion "
        f"tokens{_cost(tokens, price)}{uncounted}.",
        style=None,
    )


def _cost(tokens: dict, price: tuple[float, float] | None) -> str:
    if price is None:
        return " (no --price given)"
    return f", which cost {(tokens['prompt'] * price[0] + tokens['completion'] * price[1]) / 1e6:.2f} at that price"
