# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The command `diffvp`. Each command imports the modules it needs when it runs, so that `--help` is quick.

    reports.py      demo, report, batch, app, serve
    training.py     phantom, init, train, pool build, encoder convert
    evaluation.py   label, score, judge, evaluate, experiment
    publishing.py   push
    ray.py          python -m diffvp.cli.ray: batch on many machines
    options.py      options that several commands share
    console.py      output, errors, tables
"""

from typing import Annotated

import typer
from typer.core import TyperGroup

from .. import __version__
from ..extras import needs_libraries
from ..report_diffvp import RESEARCH_USE
from . import evaluation, publishing, reports, training
from .console import SHIPPED_CHECKPOINT, out

__all__ = ["SHIPPED_CHECKPOINT", "app", "main"]


class Commands(TyperGroup):
    """The group of all commands. A missing optional library ends it with one sentence that says what to install."""

    def invoke(self, ctx):
        with needs_libraries():
            return super().invoke(ctx)


def _group(name: str | None, help: str, **options) -> typer.Typer:
    # Typer's own traceback shows local variables: paths and report text.
    return typer.Typer(name=name, help=help, no_args_is_help=True, pretty_exceptions_enable=False, **options)


app = _group("diffvp", "CT report generation by comparison with a normal reference. " + RESEARCH_USE, cls=Commands)
pool = _group("pool", "Pools of normal references.")
encoder = _group("encoder", "Pretrained encoders of other projects or checkpoints.")

# In the order of `diffvp --help`.
for name, command in {
    "demo": reports.demo,
    "report": reports.report,
    "batch": reports.batch,
    "phantom": training.phantom,
    "init": training.init_folder,
    "train": training.train,
    "label": evaluation.label,
    "score": evaluation.score,
    "judge": evaluation.judge,
    "evaluate": evaluation.evaluate,
    "experiment": evaluation.experiment,
    "app": reports.serve_page,
    "serve": reports.serve,
    "push": publishing.push,
}.items():
    app.command(name)(command)
pool.command("build")(training.pool_build)
encoder.command("convert")(training.encoder_convert)
app.add_typer(pool)
app.add_typer(encoder)


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"diffvp {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    app()
