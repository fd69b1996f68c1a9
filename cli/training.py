# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Commands around training: `phantom`, `init`, `train`, `pool build`, `encoder convert`."""

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from .console import (
    SETTINGS,
    check_found,
    check_kept,
    check_writable,
    err,
    listed_problems,
    one_line_errors,
    out,
    say,
    warn,
)
from .options import CORES

SHOWN_WARNINGS = 20


def phantom(
    folder: Annotated[Path, typer.Argument(help="Folder for the cohort (layout `phantom`).")],
    train: Annotated[int, typer.Option(min=0, help="Number of cases in the training split.")],
    valid: Annotated[int, typer.Option(min=0, help="Number of cases in the validation split.")],
    seed: Annotated[int, typer.Option(min=0, help="Random seed; the same seed gives the same bytes.")] = 0,
    matrix: Annotated[int, typer.Option(min=32, help="Pixels per row and column of each slice.")] = 144,
    masks: Annotated[bool, typer.Option("--masks/--no-masks", help="Write region and lesion masks.")] = True,
    scanner: Annotated[
        Literal["a", "b"], typer.Option(help="Simulated scanner. Both render the same patients.")
    ] = "a",
    workers: Annotated[int, typer.Option(min=1, help="Number of processes that render.")] = CORES,
    push: Annotated[
        str | None, typer.Option(help="Also upload the cohort, with a card, as this dataset on the Hub: NAME/DATASET.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that dataset private.")] = False,
) -> None:
    """Make the phantom cohort: synthetic chest CT with 18 findings, and reports derived from them."""
    check_writable(folders=[folder])
    from ..data.phantom_cohort import write_cohort

    with one_line_errors(ValueError):
        if push is not None:  # before minutes of rendering
            from huggingface_hub.utils import validate_repo_id

            validate_repo_id(push)
        write_cohort(
            folder, train=train, valid=valid, seed=seed, matrix=matrix, masks=masks, scanner=scanner, workers=workers
        )
    say(f"{train} training and {valid} validation cases are in {folder}")
    if push is not None:
        from ..hub.dataset import push_cohort
        from ..hub.push import PushError

        with listed_problems(PushError):
            pushed = push_cohort(folder, push, private)
        say(f"Uploaded as commit {pushed.commit}: {pushed.url}")


def init_folder(
    folder: Annotated[
        Path, typer.Argument(help="Folder of your scans: NIfTI, NRRD, MetaImage, or folders of DICOM slices.")
    ],
    domain: Annotated[
        str | None, typer.Option(help="Description of these scans in words. Every report of the model will state it.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Causal LLM: Hub id or folder (default: the base LLM of the demo).")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the training file and the results of training (default: FOLDER).")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Configure a small model that trains in minutes, to try out the steps.")
    ] = False,
) -> None:
    """Prepare training on your own scans and reports: write a table and a training file, and list missing data."""
    check_found(folder, what="folder", expected="a folder of scans")
    from ..data.start import StartError, start

    with one_line_errors(StartError, ValueError):
        started = start(folder, output, domain=domain, base=base, quick=quick)
    for path in started.written:
        say(f"Written: {path}")
    for fact in started.facts:
        say(fact)
    for one in started.missing:
        warn(f"Missing: {one}")
    if not started.ready:
        raise typer.Exit(2)
    say(f"\nNext: diffvp train {started.config} --dry-run")


def train(
    config: Annotated[Path, typer.Argument(help="Training file, such as configs/phantom.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to override, such as seed=1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the data and estimate memory and time; train nothing.")
    ] = False,
    processes: Annotated[int, typer.Option(min=1, help="Number of devices to estimate for.")] = 1,
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="Sustained TFLOP/s per device, used to estimate the training time."),
    ] = None,
) -> None:
    """Train a model in both stages. The same command continues an interrupted run."""
    check_found(config, expected=SETTINGS)
    log_to_stderr()
    if not err.is_terminal:
        os.environ["TQDM_DISABLE"] = "1"  # progress bars of libraries would fill a log
    from ..training.config import SettingsError, TrainingConfig

    with one_line_errors(ValueError, KeyError, TypeError), listed_problems(SettingsError):
        loaded = TrainingConfig.load(str(config), overrides)
    from ..encoders_diffvp import DiffVPEncoderError
    from ..storage_diffvp import DiffVPCheckpointError
    from ..train_accelerate import prepare, run
    from ..training.checkpoints import CheckpointError
    from ..training.loop import TrainingDivergedError

    of_models = (DiffVPCheckpointError, DiffVPEncoderError)
    with one_line_errors(ValueError, *of_models), listed_problems():
        if dry_run:
            print_estimate(loaded, processes, tflops)
            return
        cohort = prepare(loaded)
    with one_line_errors(CheckpointError, TrainingDivergedError, *of_models), listed_problems():
        finished = run(loaded, cohort)
    say("\n" + "\n".join(finished.lines(config, overrides or [])))


def pool_build(
    data: Annotated[Path, typer.Argument(help="Folder of the dataset; for the layout `table` also the table itself.")],
    layout: Annotated[
        Literal["phantom", "radgenome", "ct-rate", "ctrg", "table"], typer.Option(help="Layout of the folder.")
    ],
    output: Annotated[
        Path, typer.Option(help="Text file for ids and paths, which data.pool and `diffvp batch --reference` read.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Split: train, valid or test (default: all rows of a table).")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Ids of normal scans, one per line, if the dataset does not label them.")
    ] = None,
    read_reports: Annotated[
        bool, typer.Option("--read-reports", help="Label cases without labels by applying the rules to their reports.")
    ] = False,
    exclude: Annotated[Path | None, typer.Option(help="Ids of cases to leave out, one per line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts and warnings as JSON to stdout.")] = False,
) -> None:
    """
    Choose the normal references of a split: by --ids, by the column `normal`, or else the scans with all labels 0 (and
    "no findings", if the dataset lists disorders).
    """
    check_writable(files=[output])
    check_kept(output, data, ids, exclude)
    check_found(data, what="data", expected="the folder of a dataset; for the layout `table`, also the table itself")
    check_found(ids, exclude, expected="ids, one per line")
    with one_line_errors(ValueError), listed_problems():
        from ..data.cases import read_ids
        from ..data.load import load_dataset_cases
        from ..data.pool import build_pool, write_pool

        cases = load_dataset_cases(layout, data, split, exclude=read_ids(exclude) if exclude else ())
        if read_reports:
            from ..metrics.labelers import RuleLabeler
            from ..metrics.labelers.table import label_cases

            cases = label_cases(cases, RuleLabeler())
        pool = build_pool(cases, layout=layout, ids=read_ids(ids) if ids else None)
        write_pool(output, pool.cases)
    for warning in pool.warnings[:SHOWN_WARNINGS]:
        warn(warning)
    if len(pool.warnings) > SHOWN_WARNINGS:
        warn(f"... and {len(pool.warnings) - SHOWN_WARNINGS} more warnings")
    if as_json:
        document = {"layout": layout, "split": split, "rule": pool.rule, "size": len(pool.cases)}
        typer.echo(json.dumps({**document, "counts": pool.counts, "warnings": pool.warnings}, indent=2))
        return
    table = Table("", *pool.counts)
    for name in pool.counts["scans"]:
        table.add_row(name, *("-" if of[name] is None else f"{of[name]:,}" for of in pool.counts.values()))
    out.print(table)
    say(f"{len(pool.cases):,} normal references by {pool.rule}: {output}")


def encoder_convert(
    source: Annotated[
        str,
        typer.Argument(help="astra; a PyTorch file of MedicalNet, Merlin or Astra; or the folder of a checkpoint."),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="safetensors file to write, for the setting encoder_weights.")
    ],
    sha256: Annotated[
        str | None, typer.Option(help="Expected SHA-256 of the source (default for astra: the known digest).")
    ] = None,
) -> None:
    """Convert encoder weights to safetensors. The header of the file states the encoder and its origin."""
    check_writable(files=[target])
    check_kept(target, Path(source))
    from ..encoders_diffvp import DiffVPEncoderError
    from ..training.encoder import convert_encoder

    with one_line_errors(DiffVPEncoderError):
        header = convert_encoder(source, target, sha256)
    for key, value in header.items():
        say(f"{key}: {value}")


def log_to_stderr() -> None:
    """Print the log of this package, from INFO on, to stderr."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffvp").setLevel(logging.INFO)


def print_estimate(config, processes: int, tflops: float | None) -> None:
    """Check the data of a training run, and print the memory and time it would take."""
    from ..train_accelerate import prepare, read_volumes
    from ..training.check import base_name, memory_warning
    from ..training.estimate import ASSUMED_WORDS, TOKENS_PER_WORD, estimate

    cohort = None
    if config.data.layout == "hub" or Path(config.data.root).exists():
        cohort = read_volumes(config, prepare(config))
        say(
            f"Data: {len(cohort.diagnosis)} cases for the classifier, {len(cohort.report)} for the generator, "
            f"{len(cohort.validation)} for validation, {len(cohort.test)} held out for evaluation, "
            f"{len(cohort.pool)} normal references. Every volume was read. No problems found."
        )
    else:
        out.print(f"No data at {config.data.root}: the estimate assumes 1,000 reports of {ASSUMED_WORDS} words.")
    found = estimate(config, cohort, processes)
    table = Table("", "", title="Report generation")
    for name, count in found.parameters.items():
        table.add_row(f"parameters, {name}", f"{count:,}")
    for name, size in found.memory_gb.items():
        table.add_row(f"memory of one device, {name}", f"{size:.2f} GB")
    table.add_row("memory of one device, total", f"{sum(found.memory_gb.values()):.2f} GB")
    table.add_row("samples per epoch", f"{found.samples:,}")
    table.add_row(f"tokens per sample ({TOKENS_PER_WORD} a word)", f"{found.tokens_per_sample:,}")
    table.add_row("work per epoch", f"{found.tflop_per_epoch:,.0f} TFLOP")
    if tflops is not None:
        hours = found.hours_per_epoch(tflops * processes)
        table.add_row(f"time per epoch, {processes} x {tflops:g} TFLOP/s", f"{hours:.2f} h")
    out.print(table)
    warning = memory_warning(found.memory_gb)
    if warning is not None:
        warn(warning)
    say(_base_and_licence(base_name(config)))
    if tflops is None:
        out.print("To estimate the time per epoch, give --tflops: about 200 for an A100, 400 for an H100 in bfloat16.")


def _base_and_licence(base: str | None) -> str:
    """State the base LLM of a run and its licence, which the checkpoint is subject to."""
    from ..hub.card import KNOWN_BASES

    _, licence = KNOWN_BASES.get(base or "", (None, "not known here, check it"))
    return f"Base LLM: {base or 'not named by the checkpoint'}. Its licence ({licence}) applies to the checkpoint."
