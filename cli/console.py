# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Output of the commands: what goes to stdout and stderr, how errors are shown, and how tables are printed."""

import contextlib
import functools
import ipaddress
import itertools
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import writing_problem

SHIPPED_CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "diffvp-phantom"
TABLE, SETTINGS = "a table in .csv, .tsv, .jsonl or .parquet", "a YAML file, such as `diffvp init` writes"
MAX_COLUMNS = 8  # of a table on a terminal
out, err = Console(), Console(stderr=True)  # results; progress, warnings, errors


def say(text: str) -> None:
    """Print a line of results as it is: without markup, highlighting or line breaks inside paths."""
    out.print(text, soft_wrap=True, markup=False, highlight=False)


def warn(text: str, style: str | None = "yellow") -> None:
    """Print a line to stderr as it is."""
    err.print(text, style=style, soft_wrap=True, markup=False, highlight=False)


def quiet() -> None:
    """Silence progress bars and notices of libraries."""
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _import_less_of_transformers()


@functools.cache
def _import_less_of_transformers() -> None:
    """
    Save the commands half a second and 40 MB of transformers' imports.

    - transformers lists the files of its 400 model folders twice, once for `transformers` and once for
      `transformers.models`: its cache holds only 128 folders, and the second call asks with a `str`, not a `Path`.
    - SciPy is imported for the losses of object detection, which no command computes.
    """
    from transformers import utils

    listed = utils.import_utils.create_import_structure_from_path

    def once(path: str | Path) -> dict:
        return listed(Path(path).parent if os.path.isfile(path) else path)

    utils.import_utils.create_import_structure_from_path = once
    utils.is_scipy_available = lambda: False


def print_page(page: str, markdown: bool) -> None:
    """Print a page of results. Its Markdown tables become terminal tables; wide ones are transposed."""
    if markdown:
        typer.echo(page)
        return
    for is_table, lines in itertools.groupby(page.splitlines(), lambda line: line.startswith("|")):
        lines = list(lines)
        if not is_table:
            say("\n".join(lines).replace("`", ""))
            continue
        rows = [
            [cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")
        ]
        if len(rows[0]) > MAX_COLUMNS and len(rows) <= MAX_COLUMNS:
            rows = [list(column) for column in zip(*rows, strict=True)]
        table = Table()
        for head in rows[0]:
            table.add_column(head, overflow="fold")  # a truncated number would be another number
        for row in rows[1:]:
            table.add_row(*map(Text, row))
        out.print(table)


def check_writable(*, files: Sequence[Path | None] = (), folders: Sequence[Path | None] = ()) -> None:
    """Exit with status 2 if an output cannot be written, before anything is computed."""
    kinds = [(path, False) for path in files] + [(path, True) for path in folders]
    for output, is_folder in kinds:
        found = None if output is None else writing_problem(output, folder=is_folder)
        if found is not None:
            kind = "folder" if is_folder else "file"
            warn(f"{output}: output: {found} (expected a {kind} that can be written)", style="red")
            raise typer.Exit(2)


def check_found(*inputs: Path | None, what: str = "file", expected: str = TABLE) -> None:
    """Exit with status 2 if an input is missing, before the libraries load, which takes seconds."""
    for path in inputs:
        if path is not None and not path.exists():
            warn(f"{path}: {what}: missing (expected {expected})", style="red")
            raise typer.Exit(2)


def find_checkpoint(name: str | None, revision: str | None) -> tuple[str, dict[str, str]]:
    """
    Return the name of the checkpoint, and the options with which to get it from the Hub.

    Exit with status 2 if there is none of this name, before the libraries load.
    """
    from ..storage_diffvp import DiffVPCheckpointError, check_checkpoint_name, check_config

    with one_line_errors(DiffVPCheckpointError):
        if name is None and not SHIPPED_CHECKPOINT.is_dir():
            raise DiffVPCheckpointError(f"The shipped checkpoint is not at {SHIPPED_CHECKPOINT}: give --checkpoint.")
        if revision is not None and (name is None or Path(name).is_dir()):
            expected = "with --checkpoint NAME/MODEL on the Hub"
            raise DiffVPCheckpointError(f"--revision: {revision}, of a folder (expected {expected})")
        name = str(SHIPPED_CHECKPOINT if name is None else name)
        hub_kwargs = {} if revision is None else {"revision": revision}
        check_checkpoint_name(name, **hub_kwargs)
        if Path(name).is_dir():
            check_config(name)
    return name, hub_kwargs


def check_kept(output: Path | None, *sources: Path | None) -> None:
    """Exit with status 2 if an output would replace a file that is read, or another output."""
    for source in sources:
        if output is not None and source is not None and output.resolve() == source.resolve():
            warn(f"{output}: output: a file that is read or written (expected another file)", style="red")
            raise typer.Exit(2)


def check_free(host: str, port: int) -> None:
    """
    Check that a server can listen, before a checkpoint is loaded.

    Raises:
        OSError: the port is in use, or the address is not one of this machine.
    """
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no obstacle
            tried.bind((host, port))
    except OSError as error:
        expected = "a free --port, and a --host of this machine"
        raise OSError(f"{host}:{port}: address: {error.strerror} (expected {expected})") from error


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextlib.contextmanager
def resumable(file: Path) -> Iterator[None]:
    """End a run without a traceback on Ctrl-C, and say how to continue it."""
    try:
        yield
    except KeyboardInterrupt:
        warn(f"Interrupted. Run the same command again to continue with {file}.", style=None)
        raise typer.Exit(130) from None


@contextlib.contextmanager
def one_line_errors(*expected: type[Exception]) -> Iterator[None]:
    """Print an expected error on one line and exit with status 2. Other errors keep their traceback."""
    try:
        yield
    except (OSError, *expected) as error:
        warn(f"{type(error).__name__}: {' '.join(str(error).split())}", style="red")
        raise typer.Exit(2) from error


@contextlib.contextmanager
def listed_problems(*expected: type[Exception]) -> Iterator[None]:
    """Print the problems of a dataset or a checkpoint, one per line, and exit with status 2."""
    from ..data.cases import DatasetError

    try:
        yield
    except (DatasetError, *expected) as error:
        warn(str(error), style="red")
        raise typer.Exit(2) from error
