# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The command that publishes a checkpoint: `push`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .console import check_found, listed_problems, out, quiet, say


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint folder with card, results and licence.")],
    repo: Annotated[str, typer.Argument(help="Repository id on the Hub, NAME/MODEL. It is created if missing.")],
    revision: Annotated[
        str | None, typer.Option(help="Branch to push to (default: main). It is created if missing.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="Tag for the commit, such as v1.0.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    benchmark: Annotated[
        str | None, typer.Option(help="Dataset of the evaluation. Its scores are also added to .eval_results/.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list every file; upload nothing.")] = False,
) -> None:
    """Check every file of a checkpoint and upload it to the Hub in one commit."""
    check_found(folder, what="folder", expected="the folder of a checkpoint")
    quiet()
    from ..hub.push import PushError, check_checkpoint
    from ..hub.push import push as upload

    with listed_problems(PushError):
        files = check_checkpoint(folder)
        table = Table("file", "bytes", "kind")
        for file in files:
            table.add_row(file.path, f"{file.size:,}", file.kind)
        out.print(table)
        out.print(f"{len(files)} files, {sum(file.size for file in files):,} bytes")
        if dry_run:
            return
        pushed = upload(folder, repo, revision=revision, tag=tag, private=private, benchmark=benchmark)
    say(f"Uploaded as commit {pushed.commit}. To load exactly this commit:\n")
    say(pushed.how_to_load())
