# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The command `diffvp`. Thin: each command imports the modules that do the work, so that `--help` is quick."""

import contextlib
import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from . import __version__
from .extras import needs_libraries
from .files import writing_problem
from .progress import counting

SHIPPED_CHECKPOINT = Path(__file__).resolve().parent / "checkpoints" / "diffvp-phantom"
MOST_COLUMNS = 8  # of a table on a terminal
STATEMENT = "Research use only. Not a medical device; not for diagnosis."


class Commands(TyperGroup):
    """The commands, each of which says in a sentence what it lacks of the libraries that only some of them need."""

    def invoke(self, ctx):
        with needs_libraries():
            return super().invoke(ctx)


app = typer.Typer(
    name="diffvp",
    cls=Commands,
    help="CT report generation by comparison with a normal reference. " + STATEMENT,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # its traceback shows local variables: paths and report text
)
pool_app = typer.Typer(help="The pool of normal references.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(pool_app, name="pool")
encoder_app = typer.Typer(help="Encoders of others.", no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(encoder_app, name="encoder")
out, err = Console(), Console(stderr=True)  # results; progress, warnings, errors

Checkpoint = Annotated[str | None, typer.Option(help="Folder or Hub id (default: the checkpoint that ships).")]
Revision = Annotated[str | None, typer.Option(help="Commit of a checkpoint on the Hub; pin one.")]
Engine = Annotated[str, typer.Option(help="Engine that decodes: transformers, or vllm (docs/scaling.md).")]
AnyAnatomy = Annotated[
    bool, typer.Option("--allow-any-anatomy", help="Also write reports of scans that show no lungs.")
]
Dicom = Annotated[
    Path | None, typer.Option(help="Folder for structured report and difference map as DICOM (docs/clinical.md).")
]
Fhir = Annotated[bool, typer.Option("--fhir", help="Also write a FHIR DiagnosticReport (docs/clinical.md).")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of tables for a terminal.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="Type of the weights: float32 or bfloat16 (default: the checkpoint's; docs/scaling.md)."),
]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Show the figure when it is done.")]


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"diffvp {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the phantom and its report.")] = Path("outputs/demo"),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option(min=0, help="Which phantom patient; each seed is another.")] = 0,
    open_figure: Open = False,
) -> None:
    """Write the report of a phantom patient that no training saw, beside the true one."""
    _check_writable(output)
    with _reporting() as reporting:
        scan, truth = _phantom(output / "phantom.nii.gz", seed)
        written = reporting(checkpoint, revision, scan, output / "report", truth=truth)
    _print_comparison(written)
    _print_places(written, open_figure)
    out.print(
        "\nOn a scan of your own: [bold]diffvp report FILE[/bold]  (NIfTI, NRRD, MetaImage, DICOM folder or .zip)"
    )


@app.command()
def report(
    ct: Annotated[
        Path | None, typer.Argument(help="NIfTI, NRRD or MetaImage file, or a folder or .zip of DICOM slices.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="A normal scan (default: one of the checkpoint's own).")
    ] = None,
    output: Annotated[Path, typer.Option(help="Replaced if it holds an earlier report.")] = Path("outputs/report"),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of the reference.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest report, in tokens (default: the checkpoint's).")
    ] = None,
    series: Annotated[
        str | None, typer.Option(help="DICOM series to read if there are several (number or UID).")
    ] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Read what is there of a DICOM series that lacks files.")
    ] = False,
    spacing: Annotated[
        tuple[float, float, float] | None,
        typer.Option(help="Voxel size in mm along x, y, z, for a NIfTI file with a blank header."),
    ] = None,
    metadata: Annotated[
        Path | None, typer.Option(help="CT-RATE's metadata table, for scans of its version 1 with blank headers.")
    ] = None,
    allow_non_hu: Annotated[
        bool, typer.Option("--allow-non-hu", help="Accept voxels that are not Hounsfield units.")
    ] = False,
    hu_window: Annotated[
        tuple[float, float] | None, typer.Option(help="HU at the ends of the window (default: the checkpoint's).")
    ] = None,
    foreground_hu: Annotated[
        float | None, typer.Option(help="HU threshold separating patient from air (default: the checkpoint's).")
    ] = None,
    allow_any_anatomy: AnyAnatomy = False,
    engine: Engine = "transformers",
    dicom: Dicom = None,
    fhir: Fhir = False,
    dicomweb: Annotated[
        str | None, typer.Option(help="URL of a DICOMweb service to read --study from, instead of a file.")
    ] = None,
    study: Annotated[str | None, typer.Option(help="StudyInstanceUID, for --dicomweb.")] = None,
    store: Annotated[bool, typer.Option("--store", help="Send structured report and map to --dicomweb.")] = False,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report.json to stdout, and nothing else.")] = False,
    open_figure: Open = False,
) -> None:
    """Write the report of a scan, its difference map on the grid of the input, and a figure."""
    _check_writable(output)
    if (ct is None) == (study is None) or (study is None) != (dicomweb is None) or (store and dicomweb is None):
        raise typer.BadParameter("a scan, or --dicomweb URL and --study UID, which --store takes, too")
    with _one_line_errors(ValueError):
        if hu_window is not None and not hu_window[0] < hu_window[1]:
            raise ValueError(f"--hu-window: {hu_window[0]:g} {hu_window[1]:g} (expected two rising HU)")
    clinical = {"dicom": dicom, "fhir": fhir, "dicomweb": dicomweb, "study": study, "store": store}
    with _reporting() as reporting, _clinical_results(ct, series, allow_incomplete, **clinical) as results:
        written = reporting(
            checkpoint, revision, results.ct, output, engine, dtype,
            reference=reference, reference_seed=seed, series=series,
            allow_incomplete=allow_incomplete, spacing=spacing,
            metadata=None if metadata is None else _metadata(metadata, results.ct.name),
            max_new_tokens=max_new_tokens, allow_non_hu=allow_non_hu, hu_window=hu_window, foreground_hu=foreground_hu,
            allow_any_anatomy=allow_any_anatomy,
        )  # fmt: skip
        results.write(written)
    if as_json:
        typer.echo(json.dumps(written.document, indent=2, ensure_ascii=False))
    else:
        out.print(written.text + "\n", markup=False, highlight=False, soft_wrap=True)
        _print_places(written, open_figure)


@app.command()
def batch(
    scans: Annotated[
        Path, typer.Argument(help="Folder of scans, a list of them (text, or .csv with a column path), or one scan.")
    ],
    output: Annotated[Path, typer.Option(help="JSON lines file; a run that was interrupted goes on with it.")] = Path(
        "outputs/reports.jsonl"
    ),
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    engine: Engine = "transformers",
    dtype: Dtype = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Scans that are decoded together.")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read scans.")] = os.cpu_count() or 1,
    reference: Annotated[
        str | None,
        typer.Option(
            help="A normal scan, a folder or list of them, or nearest (default: drawn from the checkpoint's)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of references.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest report, in tokens (default: the checkpoint's).")
    ] = None,
    allow_any_anatomy: AnyAnatomy = False,
    dicom: Dicom = None,
    fhir: Fhir = False,
    allow_failures: Annotated[
        bool, typer.Option("--allow-failures", help="Exit with 0 although scans could not be read.")
    ] = False,
) -> None:
    """Write the reports of many scans, a JSON line each; go on past those that cannot be read, and list them."""
    _check_writable(output)
    _quiet()
    if dicom is not None:
        import highdicom  # noqa: F401
    from .inference.batch import BatchError, ReportWriter, list_scans, write_reports
    from .inference.report import EXPECTED_ERRORS

    with _one_line_errors(*EXPECTED_ERRORS, BatchError), _listed_problems():
        name, hub_kwargs = _checkpoint(checkpoint, revision)
        listed = list_scans(scans)
        err.print(STATEMENT, style="bold yellow")
        writer = ReportWriter(
            name, engine, reference=reference, reference_seed=seed, max_new_tokens=max_new_tokens, dtype=dtype,
            allow_any_anatomy=allow_any_anatomy, dicom=dicom, fhir=fhir, hub_kwargs=hub_kwargs,
        )  # fmt: skip
        with _goes_on_with(output), counting("Scans", err) as count:
            file = write_reports(
                listed, output, writer, batch_size=batch_size, workers=workers,
                on_progress=lambda file: count(len(file.done) + file.failed, len(listed)),
                on_replaced=lambda count: err.print(
                    f"{output.name} has reports of other scans of the same name as {count} of these: they are "
                    "read, and their reports added.", soft_wrap=True, markup=False,
                ),
            )  # fmt: skip
    out.print(f"{len(file.done)} reports: {file.path}", soft_wrap=True, markup=False)
    if file.failed:
        out.print(f"{file.failed} scans could not be read: {file.failures}", soft_wrap=True, markup=False)
        if not allow_failures:
            raise typer.Exit(1)


@app.command()
def phantom(
    folder: Annotated[Path, typer.Argument(help="Where the cohort is written, in the layout of CT-RATE.")],
    train: Annotated[int, typer.Option(min=0, help="Cases of the training split.")],
    valid: Annotated[int, typer.Option(min=0, help="Cases of the validation split.")],
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same bytes.")] = 0,
    matrix: Annotated[int, typer.Option(min=32, help="Pixels per row and column of each slice.")] = 144,
    masks: Annotated[bool, typer.Option("--masks/--no-masks", help="Region and lesion masks.")] = True,
    scanner: Annotated[str, typer.Option(help="a, or b: the same patients in another hospital.")] = "a",
    workers: Annotated[int, typer.Option(min=1, help="Processes that render.")] = os.cpu_count() or 1,
    push: Annotated[
        str | None, typer.Option(help="Also upload it, with a card, as this dataset on the Hub: NAME/DATASET.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that dataset private.")] = False,
) -> None:
    """Make the phantom cohort: synthetic chest CT with 18 findings and the reports that follow from them."""
    from .data.phantom_cohort import write_cohort

    with _one_line_errors(ValueError):
        write_cohort(
            folder, train=train, valid=valid, seed=seed, matrix=matrix, masks=masks, scanner=scanner, workers=workers
        )
    out.print(f"{train} training and {valid} validation cases are in {folder}", soft_wrap=True, markup=False)
    if push is not None:
        from .hub.dataset import push_cohort
        from .hub.push import PushError

        with _listed_problems(PushError):
            pushed = push_cohort(folder, push, private)
        out.print(f"Uploaded as commit {pushed.commit}: {pushed.url}", soft_wrap=True, markup=False)


@pool_app.command("build")
def pool_build(
    data: Annotated[Path, typer.Argument(help="Folder of the dataset; of the layout `table` also the table itself.")],
    layout: Annotated[str, typer.Option(help="phantom, radgenome, ct-rate, ctrg or table.")],
    output: Annotated[Path, typer.Option(help="Text file for the ids, one a line.")],
    split: Annotated[str | None, typer.Option(help="train, valid or test (default: all rows of a table).")] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Ids of normal scans, one a line, where the dataset does not tell them.")
    ] = None,
    read_reports: Annotated[
        bool, typer.Option("--read-reports", help="Let rules read the labels out of the reports where there are none.")
    ] = False,
    exclude: Annotated[Path | None, typer.Option(help="Ids of cases to leave out, one a line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and warnings as JSON to stdout.")] = False,
) -> None:
    """Choose the normal references of a split: all 18 labels 0, and "no findings" where disorders are listed."""
    _check_writable(output)
    with _one_line_errors(ValueError), _listed_problems():
        from .data.cases import read_ids
        from .data.load import load_dataset_cases
        from .data.pool import build_pool

        cases = load_dataset_cases(layout, data, split, exclude=read_ids(exclude) if exclude else ())
        if read_reports:
            from .metrics.labelers import RuleLabeler
            from .metrics.labelers.table import label_cases

            cases = label_cases(cases, RuleLabeler())
        pool = build_pool(cases, layout=layout, ids=read_ids(ids) if ids else None)
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text("".join(f"{case.name}\n" for case in pool.cases), encoding="utf-8")
    for warning in pool.warnings[:20]:
        err.print(warning, style="yellow", markup=False, highlight=False, soft_wrap=True)
    if len(pool.warnings) > 20:
        err.print(f"... and {len(pool.warnings) - 20} more warnings", style="yellow")
    if as_json:
        document = {"layout": layout, "split": split, "rule": pool.rule, "size": len(pool.cases)}
        typer.echo(json.dumps({**document, "counts": pool.counts, "warnings": pool.warnings}, indent=2))
        return
    table = Table("", *pool.counts)
    for name in pool.counts["scans"]:
        table.add_row(name, *("-" if of[name] is None else f"{of[name]:,}" for of in pool.counts.values()))
    out.print(table)
    out.print(f"{len(pool.cases):,} normal references by {pool.rule}: {output}", soft_wrap=True, markup=False)


@encoder_app.command("convert")
def encoder_convert(
    source: Annotated[str, typer.Argument(help="astra, MedicalNet's .pth file, or the folder of a checkpoint.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="safetensors file, for encoder_weights.")],
    sha256: Annotated[str | None, typer.Option(help="That the source must have (of astra it is known).")] = None,
) -> None:
    """Convert the weights of an encoder to safetensors, once; its header says what they are and where from."""
    from .encoders_diffvp import DiffVPEncoderError
    from .training.encoder import convert_encoder

    with _one_line_errors(DiffVPEncoderError):
        header = convert_encoder(source, target, sha256)
    for key, value in header.items():
        out.print(f"{key}: {value}", markup=False, highlight=False, soft_wrap=True)


@app.command("init")
def init_folder(
    folder: Annotated[Path, typer.Argument(help="Your scans: NIfTI, NRRD, MetaImage, folders of DICOM slices.")],
    domain: Annotated[
        str | None, typer.Option(help="Which scans these are, in words; every report of the model will say it.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Causal LLM: Hub id or folder (default: the demo's).")] = None,
    output: Annotated[
        Path | None, typer.Option(help="For the training file and what training writes (default: FOLDER).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A small model, trained in minutes: to walk the road, not for use.")
    ] = False,
) -> None:
    """Begin a training on scans and reports of your own: write its table and training file, say what is missing."""
    from .data.start import StartError, start

    with _one_line_errors(StartError, ValueError):
        started = start(folder, output, domain=domain, base=base, quick=quick)
    for path in started.written:
        out.print(f"Written: {path}", soft_wrap=True, markup=False, highlight=False)
    for fact in started.facts:
        out.print(fact, soft_wrap=True, markup=False, highlight=False)
    for one in started.missing:
        err.print(f"Missing: {one}", style="yellow", soft_wrap=True, markup=False, highlight=False)
    if not started.ready:
        raise typer.Exit(2)
    out.print(f"\nNext: diffvp train {started.config} --dry-run", soft_wrap=True, markup=False, highlight=False)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="Training file, such as configs/phantom.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="such as seed=1")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data; say what the run would take; train nothing.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Number of devices to estimate for.")] = 1,
    tflops: Annotated[float | None, typer.Option(help="Sustained TFLOP/s per device, used to estimate time.")] = None,
) -> None:
    """Train a model in both stages, or go on with a run that was interrupted: the same command again."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffvp").setLevel(logging.INFO)
    if not err.is_terminal:
        os.environ["TQDM_DISABLE"] = "1"  # bars of libraries, which would fill a log
    import yaml

    from .training.config import SettingsError, TrainingConfig

    with _one_line_errors(ValueError, KeyError, TypeError, yaml.YAMLError), _listed_problems(SettingsError):
        loaded = TrainingConfig.load(str(config), overrides)
    from .checkpoint_diffvp import DiffVPCheckpointError
    from .encoders_diffvp import DiffVPEncoderError
    from .train_accelerate import prepare, run
    from .training.checkpoints import CheckpointError
    from .training.loop import TrainingDivergedError

    told = (DiffVPCheckpointError, DiffVPEncoderError)
    with _one_line_errors(ValueError, *told), _listed_problems():
        if dry_run:
            _print_estimate(loaded, processes, tflops)
            return
        cohort = prepare(loaded)
    with _one_line_errors(CheckpointError, TrainingDivergedError, *told), _listed_problems():
        finished = run(loaded, cohort)
    _print_finished(finished, config, bool(cohort.test), [one for one in overrides or () if "=" in one])


@app.command()
def label(
    reports: Annotated[Path, typer.Argument(help="CSV file with a column of ids and one of reports.")],
    output: Annotated[Path, typer.Option(help="CSV file for the ids and the 18 labels, 0 or 1.")],
    report_column: Annotated[str, typer.Option(help="Column that holds the reports.")] = "report",
    id_column: Annotated[str, typer.Option(help="Column that holds the ids.")] = "id",
    explain: Annotated[
        Path | None, typer.Option(help="JSON lines for each place that a rule found, and why it counts or not.")
    ] = None,
    radbert: Annotated[
        str | None, typer.Option(help="RadBERT instead of the rules: a folder, or IAMJB/RadBERT-CT on the Hub.")
    ] = None,
) -> None:
    """Read the 18 findings out of chest CT reports in English."""
    _check_writable(output, explain)
    from .metrics.labelers import load_labeler
    from .metrics.labelers.radbert import RadBertError
    from .metrics.labelers.table import label_table

    with _one_line_errors(ValueError, TypeError, RadBertError), _listed_problems():
        labeler = load_labeler(radbert)
        columns = {"report_column": report_column, "id_column": id_column}
        labels = label_table(reports, output, labeler, explanations=explain, **columns)
    out.print(f"{len(labels):,} reports, {int(labels.sum()):,} findings: {output}", soft_wrap=True, markup=False)
    out.print(f"Labeler: {labeler.signature}", soft_wrap=True, markup=False)


@app.command()
def score(
    reports: Annotated[
        Path, typer.Argument(help="What diffvp batch writes; or .csv, .jsonl, .parquet with ids and both reports.")
    ],
    reference: Annotated[
        Path | None, typer.Option(help="File of the true reports by id or path (default: they stand beside).")
    ] = None,
    id_column: Annotated[str, typer.Option(help="Column that holds the ids.")] = "id",
    prediction_column: Annotated[str, typer.Option(help="Column that holds the generated reports.")] = "prediction",
    reference_column: Annotated[str, typer.Option(help="Its name in the table.")] = "reference",
    nearest_column: Annotated[
        str | None, typer.Option(help="Column with the report of the most similar training scan, for a baseline.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="CSV file of the true labels by id (default: read out of the true reports).")
    ] = None,
    training: Annotated[
        Path | None, typer.Option(help="CSV file of training reports, for the constant report and the prevalences.")
    ] = None,
    training_column: Annotated[str, typer.Option(help="Column that holds the training reports.")] = "report",
    scorer: Annotated[str, typer.Option(help="paper, corpus or coco: docs/metrics.md.")] = "paper",
    regions: Annotated[str | None, typer.Option(help="Also by region, of reports as diffvp or reg2rg write.")] = None,
    radbert: Annotated[
        str | None, typer.Option(help="RadBERT instead of the rules: a folder, or IAMJB/RadBERT-CT on the Hub.")
    ] = None,
    meteor: Annotated[bool, typer.Option("--meteor/--no-meteor", help="METEOR, which needs data of its own.")] = True,
    workers: Annotated[int, typer.Option(min=1, help="Processes for METEOR.")] = os.cpu_count() or 1,
    radmatch: Annotated[
        Path | None, typer.Option(help="Also count errors by RadMatch, a language model's; folder for what it finds.")
    ] = None,
    base_url: Annotated[str | None, typer.Option(help="Of the server of RadMatch's language model.")] = None,
    model: Annotated[str | None, typer.Option(help="As that server calls it.")] = None,
    reports_leave_machine: Annotated[
        bool, typer.Option("--reports-leave-machine", help="The server is another machine, and may see all reports.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    markdown: Markdown = False,
) -> None:
    """Score generated reports: all metrics of the paper, with intervals, signatures and baselines."""
    from .metrics.labelers import load_labeler
    from .metrics.labelers.radbert import RadBertError
    from .metrics.nlg import LexiconError
    from .metrics.report_table import read_pairs, score_table, table_page

    if radmatch is not None:
        from .metrics.judge.server import check_endpoint
        from .metrics.radmatch import radmatch_page, score_radmatch

        with _one_line_errors(ValueError):  # before scores that take minutes
            if reference is not None:
                raise ValueError("--radmatch reads both reports from one table; expected no --reference")
            if not (base_url and model):
                raise ValueError("--radmatch takes --base-url and --model: the server of its language model")
            check_endpoint(base_url, reports_leave_machine)
    with _one_line_errors(ValueError, TypeError, RadBertError, LexiconError), _listed_problems():
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
    _print_page(table_page(document), markdown)
    if radmatch is not None:
        _print_page(radmatch_page(document["radmatch"]), markdown)


@app.command()
def judge(
    first: Annotated[
        Path | None, typer.Argument(metavar="[A.csv]", help="CSV file with a column of ids and one of reports.")
    ] = None,
    second: Annotated[
        Path | None, typer.Argument(metavar="[B.csv]", help="That of the other system, with the same ids.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="CSV file of the true reports by id (default: they stand in A.csv).")
    ] = None,
    by: Annotated[str, typer.Option("--judge", help="model, a language model on a server; or rules.")] = "model",
    base_url: Annotated[str | None, typer.Option(help="Of a server that speaks OpenAI's chat protocol.")] = None,
    model: Annotated[str | None, typer.Option(help="As the server calls it.")] = None,
    reports_leave_machine: Annotated[
        bool, typer.Option("--reports-leave-machine", help="The server is another machine, and may see all reports.")
    ] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Only measure the judge; takes no tables.")] = False,
    calibration: Annotated[
        int | None,
        typer.Option(min=0, help="Phantoms to measure the judge on (default: 40 of a model, 200 of the rules)."),
    ] = None,
    orders: Annotated[int, typer.Option(min=1, max=2, help="2: each pair in both orders. 1: in a random one.")] = 2,
    answers: Annotated[
        Path, typer.Option(help="Where answers are kept; a run that was interrupted goes on with it.")
    ] = Path("outputs/judge.jsonl"),
    workers: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=64, help="Of an answer.")] = 1024,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that an answer may take.")] = 600,
    price: Annotated[
        tuple[float, float] | None, typer.Option(help="Of a million prompt and completion tokens, for the cost.")
    ] = None,
    id_column: Annotated[str, typer.Option(help="Its name in the tables.")] = "id",
    prediction_column: Annotated[str, typer.Option(help="Its name in A.csv and B.csv.")] = "prediction",
    reference_column: Annotated[str, typer.Option(help="Its name in the table of true reports.")] = "reference",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost; ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a page.")] = False,
) -> None:
    """Judge which of two systems writes the better reports, once the judge has been measured: docs/judge.md."""
    from .metrics.judge import JudgeError
    from .metrics.judge.calibration import calibrate as measure
    from .metrics.judge.calibration import calibration_items
    from .metrics.judge.rules import RuleJudge
    from .metrics.judge.table import calibration_page, is_same, judged, read_comparisons, verdict_page

    with _one_line_errors(JudgeError), _listed_problems(), contextlib.ExitStack() as stack:
        if by not in ("model", "rules"):
            raise JudgeError(f"--judge is {by!r}; expected model or rules")
        if not calibrate and (first is None or second is None):
            raise JudgeError("expected two tables of reports, A.csv and B.csv, or --calibrate")
        columns = {"id_column": id_column, "prediction_column": prediction_column}
        comparisons = [] if calibrate else read_comparisons(
            first, second, reference, reference_column=reference_column, **columns
        )  # fmt: skip
        if by == "rules":
            asked, phantoms = RuleJudge(), 200 if calibration is None else calibration
        else:
            options = {"reports_leave_machine": reports_leave_machine, "max_tokens": max_tokens, "timeout": timeout}
            asked = stack.enter_context(_model_judge(base_url, model, answers, orders, workers, **options))
            phantoms = 40 if calibration is None else calibration
            everything = [item.comparison for item in calibration_items(phantoms)]
            _print_questions(asked, [*everything, *(one for one in comparisons if not is_same(one))], price)
        if calibrate and not phantoms:
            raise JudgeError("--calibrate takes at least one phantom")
        if dry_run:
            return
        stack.enter_context(_goes_on_with(answers))
        document: dict = {"calibration": None}
        if phantoms:
            with counting("Calibration", err) as count:
                document["calibration"] = measure(asked, phantoms, count)
        if not as_json:
            typer.echo(calibration_page(document["calibration"]))
        if not calibrate:
            names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
            with counting("Comparisons", err) as count:
                document |= {"systems": names, **judged(asked, comparisons, count)}
            if not as_json:
                typer.echo(verdict_page(document, names, document["calibration"]))
        if by == "model":
            document["tokens"] = asked.tokens
            _print_tokens(asked.tokens, price)
        if as_json:
            typer.echo(json.dumps(document, indent=2))


@app.command()
def evaluate(
    data: Annotated[
        Path, typer.Argument(help="Training file, whose test cases and model are taken; or the folder of a dataset.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="as training had them")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results (default: evaluation/ beside a trained model).")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder (default: the trained model, or that which ships).")
    ] = None,
    layout: Annotated[str, typer.Option(help="Of a folder: phantom, radgenome, ct-rate, ctrg or table.")] = "phantom",
    split: Annotated[str, typer.Option(help="Of a folder, the split to score on.")] = "valid",
    training_split: Annotated[str, typer.Option(help="Of a folder, the split that the baselines know.")] = "train",
    radbert: Annotated[
        str | None, typer.Option(help="RadBERT instead of the rules: a folder, or IAMJB/RadBERT-CT on the Hub.")
    ] = None,
    cache_dir: Annotated[Path, typer.Option(help="Of a folder: preprocessed volumes, as in training.")] = Path(
        "runs/cache"
    ),
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first so many test cases.")] = None,
    volume_labels: Annotated[
        Path | None, typer.Option(help="Of phantoms: also the classifier of this checkpoint, trained without masks.")
    ] = None,
    markdown: Markdown = False,
) -> None:
    """Score a checkpoint on cases that it has not seen, beside the baselines it has to beat."""
    from .training.config import SettingsError, TrainingConfig

    config = None
    if data.suffix.lower() in (".yaml", ".yml"):
        with _one_line_errors(ValueError), _listed_problems(SettingsError):
            config = TrainingConfig.load(str(data), overrides)
            checkpoint = checkpoint or Path(config.output_dir) / "model"
            output, cache_dir = output or Path(config.output_dir) / "evaluation", Path(config.data.cache_dir)
    with _one_line_errors(ValueError):
        if config is None and not data.is_dir():
            raise ValueError(f"{data}: data: missing (expected a training file, or the folder of a dataset)")
        if output is None:
            raise ValueError("--output: missing (expected a folder for the results)")
        if checkpoint is not None and not checkpoint.is_dir():
            raise ValueError(f"{checkpoint}: checkpoint: missing (expected a folder, which `diffvp train` makes)")
    _check_writable(output)
    from .experiments import evaluate as run
    from .inference.report import EXPECTED_ERRORS
    from .metrics.labelers import load_labeler
    from .metrics.labelers.radbert import RadBertError
    from .provenance import without_place

    _quiet()
    with _one_line_errors(*EXPECTED_ERRORS, RadBertError, ValueError), _listed_problems():
        labeler, checkpoint = load_labeler(radbert), checkpoint or SHIPPED_CHECKPOINT
        of = data.name if config is None else without_place(data)
        command = " ".join(["diffvp evaluate", of, *(overrides or [])])
        if config is not None:
            tests = run.trained_set(config, labeler)
        elif layout == "phantom":
            tests = run.phantom_set(data)
        else:
            tests = run.dataset_set(layout, data, split, training_split, labeler)
            command += f" --layout {layout} --split {split} --training-split {training_split}"
        if config is None:
            command += f" --output {without_place(output)}"
        if volume_labels is not None:
            if tests.phantoms is None:
                raise ValueError("--volume-labels: given (expected only with a cohort of phantoms)")
            command += f" --volume-labels {without_place(volume_labels)}"
        page, results = run.evaluate(tests, checkpoint, output, cache_dir, limit, command, volume_labels)
        is_own = config is not None and config.card is not None and limit is None
        if is_own and checkpoint == Path(config.output_dir) / "model":
            from .hub.card import own_facts, write_card, write_licence

            base = config.init_from if config.base is None else config.base.name
            reproduce = (f"diffvp train {data}", results["command"])
            write_licence(checkpoint)
            write_card(checkpoint, own_facts(config.card, base, results, reproduce), results)
            out.print(f"Card and evaluation.json: {checkpoint}", soft_wrap=True, markup=False, highlight=False)
    _print_page(page.read_text(encoding="utf-8"), markdown)
    out.print(f"\nResults: {page}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def experiment(
    names: Annotated[
        list[str], typer.Argument(help="Tables and figures of the paper, such as table4, and KEY=VALUE.")
    ],
    study: Annotated[Path, typer.Option(help="Study file: data, training, test set.")] = Path(
        "configs/study_phantom.yaml"
    ),
    runs: Annotated[Path, typer.Option(help="Folder of the models and reports; what is there is used.")] = Path(
        "runs"
    ),
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("experiments/results"),
    seed: Annotated[list[int] | None, typer.Option(help="Override the table's seeds.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that score.")] = os.cpu_count() or 1,
    jobs: Annotated[
        int, typer.Option(min=1, help="Models that are trained at once, each on a part of the cores.")
    ] = 1,
    base_url: Annotated[
        str | None, typer.Option(help="Of a server whose language model judges reports, too (fig4b): docs/judge.md.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="The judge, as that server calls it.")] = None,
    reports_leave_machine: Annotated[
        bool, typer.Option("--reports-leave-machine", help="The server is another machine, and may see all reports.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the data, and list the models to train.")] = False,
) -> None:
    """Make tables and figures of the paper anew: train what they need, write the reports, score them."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffvp").setLevel(logging.INFO)
    import yaml

    from .experiments.results_page import write_page
    from .experiments.runner import planned_runs, run_experiment
    from .experiments.study import StudyConfig
    from .inference.report import EXPECTED_ERRORS
    from .metrics.labelers.radbert import RadBertError
    from .metrics.nlg import LexiconError
    from .training.checkpoints import CheckpointError

    overrides = [name for name in names if "=" in name]
    with _one_line_errors(ValueError, TypeError, yaml.YAMLError):
        loaded = StudyConfig.load(study, overrides)
    with (
        _one_line_errors(*EXPECTED_ERRORS, ValueError, CheckpointError, LexiconError, RadBertError),
        _listed_problems(),
        contextlib.ExitStack() as stack,
    ):
        judge = None
        if (base_url or model) and not dry_run:
            options = {"reports_leave_machine": reports_leave_machine}
            judge = stack.enter_context(_model_judge(base_url, model, runs / "judge.jsonl", 2, 4, **options))
        for name in (name for name in names if "=" not in name):
            if dry_run:
                plan = planned_runs(name, loaded, runs, output, seed)
                _print_plan(name, plan)
                _print_estimate(plan[0][0].config, processes=1, tflops=None)
                continue
            result = run_experiment(name, loaded, runs, output, seeds=seed, workers=workers, jobs=jobs, judge=judge)
            page = write_page(result.parent)
            out.print(f"{result}\n{page}", soft_wrap=True, markup=False)


@app.command("app")
def serve_page(
    checkpoint: Checkpoint = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 7860,
    mcp: Annotated[
        bool, typer.Option("--mcp", help="Also be a tool for language models (Model Context Protocol).")
    ] = False,
) -> None:
    """Serve the page: scans, difference map and a report that is written as you watch."""
    from .hub.space.page import serve
    from .inference.report import EXPECTED_ERRORS

    _quiet()
    out.print(f"{STATEMENT}\nhttp://{host}:{port}", highlight=False)
    with _one_line_errors(*EXPECTED_ERRORS):
        serve(str(SHIPPED_CHECKPOINT) if checkpoint is None else checkpoint, host, port, mcp=mcp)


@app.command()
def serve(
    checkpoint: Checkpoint = None,
    revision: Revision = None,
    engine: Engine = "transformers",
    host: Annotated[
        str, typer.Option(help="0.0.0.0 lets other machines in, which have to send the token in $DIFFVP_TOKEN.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to serve on.")] = 8000,
    batch_size: Annotated[int, typer.Option(min=1, help="Waiting scans that are decoded together.")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read scans.")] = os.cpu_count() or 1,
    max_waiting: Annotated[int, typer.Option(min=1, help="Requests without an answer; others get 429.")] = 32,
    max_upload: Annotated[int, typer.Option(min=1, help="MB of a request; larger ones get 413.")] = 512,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds from a request to its answer, or 503.")] = 300,
    grace: Annotated[float, typer.Option(min=0, help="Seconds to finish what is there when told to end.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of references.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest report, in tokens (default: the checkpoint's).")
    ] = None,
    allow_any_anatomy: AnyAnatomy = False,
    dicomweb: Annotated[
        str | None, typer.Option(help="URL of a DICOMweb service, whose studies may be asked for by their UID.")
    ] = None,
) -> None:
    """Write reports for programs over HTTP: docs/serving.md."""
    from .service.app import is_loopback
    from .service.app import serve as run
    from .service.jobs import Limits, ReportQueue

    retrieve = None
    if dicomweb is not None:
        from .clinical.dicomweb import retrieve as retrieve_from

        retrieve = functools.partial(retrieve_from, dicomweb)
    _quiet()
    from .inference.batch import ReportWriter
    from .inference.report import EXPECTED_ERRORS, ReportError

    with _one_line_errors(*EXPECTED_ERRORS):
        token = os.environ.get("DIFFVP_TOKEN") or None
        if token is None and not is_loopback(host):
            raise ReportError(f"host is {host}, which lets other machines in; expected a token in $DIFFVP_TOKEN.")
        name, hub_kwargs = _checkpoint(checkpoint, revision)
        err.print(STATEMENT, style="bold yellow")
        writer = ReportWriter(
            name, engine, reference_seed=seed, max_new_tokens=max_new_tokens, allow_any_anatomy=allow_any_anatomy,
            hub_kwargs=hub_kwargs,
        )  # fmt: skip
        limits = Limits(
            batch_size=batch_size, workers=workers, waiting=max_waiting, upload_bytes=max_upload * 2**20,
            timeout=timeout, grace=grace,
        )  # fmt: skip
        run(ReportQueue(writer, limits), host, port, token=token, retrieve=retrieve)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder with card, results and licence.")],
    repo: Annotated[str, typer.Argument(help="Id on the Hub, NAME/MODEL; made if it is not there.")],
    revision: Annotated[str | None, typer.Option(help="Branch (default: main); made if it is not there.")] = None,
    tag: Annotated[str | None, typer.Option(help="Name for the commit, such as v1.0.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    benchmark: Annotated[
        str | None, typer.Option(help="Dataset that the evaluation was of: its scores go into .eval_results/, too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list every file; upload nothing.")] = False,
) -> None:
    """Check a checkpoint, all of it, and upload it to the Hub in one commit."""
    _quiet()
    from .hub.push import PushError, check_checkpoint
    from .hub.push import push as upload

    with _listed_problems(PushError):
        files = check_checkpoint(folder)
        table = Table("file", "bytes", "what it is")
        for file in files:
            table.add_row(file.path, f"{file.size:,}", file.kind)
        out.print(table)
        out.print(f"{len(files)} files, {sum(file.size for file in files):,} bytes")
        if dry_run:
            return
        pushed = upload(folder, repo, revision=revision, tag=tag, private=private, benchmark=benchmark)
    out.print(f"Uploaded as commit {pushed.commit}. To load exactly this:\n", soft_wrap=True, markup=False)
    out.print(pushed.how_to_load(), soft_wrap=True, markup=False, highlight=False)


def main() -> None:
    app()


def _print_estimate(config, processes: int, tflops: float | None) -> None:
    """What a training run would take, once its data is found to be in order."""
    from .train_accelerate import prepare, read_volumes
    from .training.check import memory_warning
    from .training.estimate import ASSUMED_WORDS, TOKENS_PER_WORD, estimate

    cohort = None
    if config.data.layout == "hub" or Path(config.data.root).exists():
        cohort = read_volumes(config, prepare(config))
        out.print(
            f"Data: {len(cohort.diagnosis)} cases for the classifier, {len(cohort.report)} for the generator, "
            f"{len(cohort.validation)} for validation, {len(cohort.test)} kept apart for evaluation, "
            f"{len(cohort.pool)} normal references; every volume was read. No problems found.",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip
    else:
        out.print(f"No data at {config.data.root}: 1,000 reports of {ASSUMED_WORDS} words are assumed.")
    found = estimate(config, cohort, processes)
    table = Table("", "", title="Report generation")
    for name, count in found.parameters.items():
        table.add_row(f"parameters, {name}", f"{count:,}")
    for name, size in found.memory_gb.items():
        table.add_row(f"memory of one device, {name}", f"{size:.2f} GB")
    table.add_row("memory of one device, together", f"{sum(found.memory_gb.values()):.2f} GB")
    table.add_row("samples per epoch", f"{found.samples:,}")
    table.add_row(f"tokens per sample ({TOKENS_PER_WORD} a word)", f"{found.tokens_per_sample:,}")
    table.add_row("work per epoch", f"{found.tflop_per_epoch:,.0f} TFLOP")
    if tflops is not None:
        hours = found.hours_per_epoch(tflops * processes)
        table.add_row(f"time per epoch, {processes} x {tflops:g} TFLOP/s", f"{hours:.2f} h")
    out.print(table)
    warning = memory_warning(found.memory_gb)
    if warning is not None:
        err.print(warning, style="yellow", soft_wrap=True, markup=False)
    if config.base is not None:
        out.print(f"Base LLM: {config.base.name}. Its licence goes with the checkpoint.", soft_wrap=True, markup=False)
    if tflops is None:
        out.print("For a time per epoch give --tflops: about 200 for an A100, 400 for an H100 in bfloat16.")


def _print_finished(finished, config: Path, tested: bool, overrides: list[str]) -> None:
    """Where the model of a run is, which epoch it is and why, and what to do with it."""
    out.print(
        f"\nThe {'model' if finished.folder.name == 'model' else 'classifier'} is in {finished.folder}: epoch "
        f"{finished.epoch} of {finished.epochs}, which had the lowest validation loss ({finished.loss:.4f}).",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip
    if finished.folder.name != "model":
        return
    with_reference = "" if finished.references else " --reference NORMAL_SCAN"
    steps = {"Write a report": f"diffvp report SCAN --checkpoint {finished.folder}{with_reference}"}
    if tested:
        steps["Score it"] = " ".join(["diffvp evaluate", str(config), *overrides])
    steps["Share it"] = f"diffvp push {finished.folder} NAME/MODEL --dry-run"
    for what, command in steps.items():
        out.print(f"{what + ':':<16}{command}", soft_wrap=True, markup=False, highlight=False)


def _print_page(page: str, markdown: bool) -> None:
    """A page of results; its Markdown tables as tables for people, those with many columns turned."""
    if markdown:
        typer.echo(page)
        return
    for is_table, lines in itertools.groupby(page.splitlines(), lambda line: line.startswith("|")):
        lines = list(lines)
        if not is_table:
            text = "\n".join(lines).replace("`", "")
            out.print(text, soft_wrap=True, markup=False, highlight=False)
            continue
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")
        ]
        if len(rows[0]) > MOST_COLUMNS and len(rows) <= MOST_COLUMNS:
            rows = [list(column) for column in zip(*rows, strict=True)]
        table = Table()
        for head in rows[0]:
            table.add_column(head, overflow="fold")  # a number that is cut short would be another
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        out.print(table)


def _print_plan(name: str, runs) -> None:
    """The models that an experiment takes, and what is left to do for them; what the first takes follows."""
    table = Table("model", "seed", "", title=name)
    for run, left in runs:
        table.add_row(run.variant.name, str(run.seed), left)
    out.print(table)
    out.print(f"The first of them, {runs[0][0].variant.name}:", markup=False)


def _phantom(path: Path, seed: int) -> tuple[Path, str]:
    """Write the scan of a phantom patient; its path and its true report."""
    import nibabel as nib

    from .data.phantom_cohort import single_phantom

    scan, truth = single_phantom(seed, "demo")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(scan, path)
    return path, truth


def _checkpoint(name: str | None, revision: str | None) -> tuple[str, dict[str, str]]:
    """Name of the checkpoint, and how to get it from the Hub."""
    from .inference.report import ReportError

    if name is None and not SHIPPED_CHECKPOINT.is_dir():
        raise ReportError(f"The checkpoint that ships is not at {SHIPPED_CHECKPOINT}: give --checkpoint.")
    return (str(SHIPPED_CHECKPOINT) if name is None else name), ({} if revision is None else {"revision": revision})


def _metadata(table: Path, volume: str):
    """The row of a volume in CT-RATE's metadata table."""
    from .reading_diffvp import CTMetadata, load_metadata
    from .volume_diffvp import CTReadError

    rows = load_metadata(table)
    if volume not in rows:
        raise CTReadError(table.name, "VolumeName", f"no row for {volume}", "a row for the scan")
    return CTMetadata.from_ct_rate(rows[volume])


@contextlib.contextmanager
def _reporting() -> Iterator[Callable]:
    """A function that loads a checkpoint, says what it is for, and writes a report, while a line says what happens."""
    with err.status("", spinner="line") as status:

        def step(text: str) -> None:
            status.update(text)
            if not err.is_terminal:  # where no line can be rewritten
                err.print(text, soft_wrap=True, markup=False)

        def write(
            checkpoint: str | None, revision: str | None, ct: Path, output: Path, engine: str = "transformers",
            dtype: str | None = None, **options,
        ):  # fmt: skip
            step("Reading the scan")  # before the libraries, which take seconds: a bad file is refused at once
            options = _read_scans(options | {"ct": ct})
            step("Loading the libraries")
            _quiet()
            from .inference.engines import load_engine
            from .inference.report import EXPECTED_ERRORS, load_checkpoint, write_report

            with _one_line_errors(*EXPECTED_ERRORS):
                name, hub_kwargs = _checkpoint(checkpoint, revision)
                step(f"Loading {name}")
                model, processor = load_checkpoint(name, dtype=dtype, **hub_kwargs)
                # A single report by transformers is not worth merging LoRA for.
                decoder = None if engine == "transformers" else load_engine(engine, model, processor.tokenizer)
                domain = model.config.intended_domain or "not stated by the checkpoint"
                err.print(STATEMENT, style="bold yellow")
                err.print(f"This checkpoint is intended for: {domain}.", soft_wrap=True, markup=False)
                written = write_report(
                    model, processor, output_dir=output, engine=decoder, hub_kwargs=hub_kwargs, on_step=step, **options
                )
            for warning in written.document["warnings"]:
                err.print(warning, style="yellow", soft_wrap=True, markup=False)
            return written

        from .volume_diffvp import CTInputError

        with _one_line_errors(CTInputError):
            yield write


@contextlib.contextmanager
def _clinical_results(ct: Path | None, series: str | None, allow_incomplete: bool, **options) -> Iterator:
    """What `diffvp report` reads, and what it makes besides its folder."""
    if options["dicom"] is not None or options["store"]:
        import highdicom  # noqa: F401  whether it is there, before a minute of work
    if options["dicomweb"] is not None:
        import dicomweb_client  # noqa: F401
    from .clinical.results import clinical_results

    with clinical_results(ct, series=series, allow_incomplete=allow_incomplete, **options) as results:
        yield results


def _read_scans(options: dict) -> dict:
    """The options of a report with its scan, and its reference if one is given, read and checked."""
    from .anatomy_diffvp import check_chest, measure_coverage
    from .reading_diffvp import read_ct

    names = ("spacing", "metadata", "series")
    given = {name: options[name] for name in names if name in options}
    allow_non_hu = options.get("allow_non_hu", False)
    scans = {"ct": read_ct(options["ct"], allow_non_hu=allow_non_hu, **given)}
    if options.get("reference") is not None:
        scans["reference"] = read_ct(options["reference"], allow_non_hu=allow_non_hu)
    for volume in scans.values():
        if not options.get("allow_any_anatomy"):
            check_chest(measure_coverage(volume), volume.source)
    return {name: value for name, value in options.items() if name not in names} | scans


def _print_places(report, open_figure: bool) -> None:
    out.print(f"Report, difference map and provenance: {report.folder}", soft_wrap=True, markup=False)
    out.print(f"Figure: {report.figure}", soft_wrap=True, markup=False)
    if open_figure:
        typer.launch(str(report.figure))


def _print_comparison(report) -> None:
    """The generated report beside the true one, by region, and the findings that it hits and misses."""
    truth = report.document["truth"]
    table = Table("", "generated", "true", show_lines=True)
    regions = dict.fromkeys([*truth["regions"], *report.regions])
    for region in regions:
        table.add_row(region, *(Text(words.get(region, "-")) for words in (report.regions, truth["regions"])))
    out.print(table)
    for kind, color in (("hit", "green"), ("missed", "red"), ("false", "magenta")):
        out.print(f"Findings {kind}: [{color}]{', '.join(truth[kind]) or 'none'}[/{color}]")


def _quiet() -> None:
    """No progress bars and notices of libraries between the lines of a report."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def _model_judge(
    base_url: str | None, model: str | None, answers: Path, orders: int, workers: int, **server
) -> Iterator:
    """The judge that is a language model, with its file of answers open."""
    from .metrics.judge import JudgeError
    from .metrics.judge.answers import AnswerFile
    from .metrics.judge.model import ModelJudge
    from .metrics.judge.server import ChatServer

    if not (base_url and model):
        raise JudgeError(
            "a judge takes --base-url and --model, such as those of a local server; --judge rules takes none"
        )
    with ChatServer(base_url, model, **server) as chat, AnswerFile(answers) as kept:
        yield ModelJudge(chat, kept, orders=orders, workers=workers)


def _print_questions(judge, comparisons: list, price: tuple[float, float] | None) -> None:
    """What a judge is about to be asked, and what that is about to cost."""
    plan = judge.plan(comparisons)
    err.print(
        f"{plan['answers']} answers of {judge.server.model} at {judge.server.name}, {plan['kept']} of them kept from "
        f"before; the others take about {plan['prompt']:,} prompt and {plan['completion']:,} completion tokens"
        f"{_cost(plan, price)}.",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


def _print_tokens(tokens: dict, price: tuple[float, float] | None) -> None:
    uncounted = f"; of {tokens['uncounted']} requests the server counts none" if tokens["uncounted"] else ""
    err.print(
        f"{tokens['requests']} requests took {tokens['prompt']:,} prompt and {tokens['completion']:,} completion "
        f"tokens{_cost(tokens, price)}{uncounted}.",
        soft_wrap=True, markup=False, highlight=False,
    )  # fmt: skip


def _cost(tokens: dict, price: tuple[float, float] | None) -> str:
    if price is None:
        return " (no --price given)"
    return f", which cost {(tokens['prompt'] * price[0] + tokens['completion'] * price[1]) / 1e6:.2f} at that price"


def _check_writable(*outputs: Path | None) -> None:
    """End with a sentence where an output cannot be written, before anything is computed."""
    for output in outputs:
        found = None if output is None else writing_problem(output)
        if found is not None:
            err.print(
                f"{output}: output: {found} (expected a place that can be written)",
                style="red", markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
            raise typer.Exit(2)


@contextlib.contextmanager
def _goes_on_with(file: Path) -> Iterator[None]:
    """Ctrl-C ends a run without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"Interrupted. The same command goes on with {file}.", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """Turn what a user can cause into one line on stderr and exit status 2; anything else keeps its traceback."""
    try:
        yield
    except (OSError, *expected) as error:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _listed_problems(*expected: type[Exception]) -> Iterator[None]:
    """Print what is wrong with a dataset or a checkpoint, a line each, and exit with status 2."""
    from .data.cases import DatasetError

    try:
        yield
    except (DatasetError, *expected) as error:
        err.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    main()
