# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Worker processes of an experiment, which end when it is stopped."""

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, as_completed, wait


@contextlib.contextmanager
def worker_processes(count: int, **options) -> Iterator[ProcessPoolExecutor]:
    """Yield `count` processes. SIGTERM and errors end them; the next run resumes unfinished work."""
    # "spawn", because a fork of a process with torch threads can hang.
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), **options) as pool:
        # Without a handler, SIGTERM would end this process and leave the workers running.
        former = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            yield pool
        except (Exception, SystemExit):  # on Ctrl-C the terminal signals the workers itself
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise
        finally:
            signal.signal(signal.SIGTERM, former)


def completed(pool: Executor, tasks: Sequence[tuple], jobs: int) -> Iterator[Future]:
    """Yield the results of tasks (function and arguments) as they complete.

    A task is submitted only when a worker is free, because workers still start queued tasks after a request to stop.
    """
    under_way: set[Future] = set()
    for task in tasks:
        if len(under_way) == jobs:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield from done
        under_way.add(pool.submit(*task))
    yield from as_completed(under_way)
