# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Progress of a long command on stderr: a bar on a terminal, otherwise a line every ten seconds."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

EVERY = 10.0  # seconds between two lines

Item = TypeVar("Item")


@contextlib.contextmanager
def counting(title: str, console: Console | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yield a function `(done, total)` that shows the progress."""
    console = Console(stderr=True) if console is None else console
    if console.is_terminal:
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
            task = progress.add_task(title)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def count(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY:
            last = time.monotonic()
            console.print(f"{title}: {done} of {total}", markup=False, highlight=False)

    yield count


def counted(items: Iterable[Item], title: str, total: int | None = None, shown: bool = True) -> Iterator[Item]:
    """Yield each item and show the progress.

    Args:
        total: number of items, if they have no length.
        shown: `False` in all processes except the main one.
    """
    if not shown:
        yield from items
        return
    total = len(items) if total is None else total
    with counting(title) as count:
        for done, item in enumerate(items):
            count(done, total)
            yield item
        count(total, total)
