# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Forked processes for tests: they need not import torch and transformers, which takes several seconds each time."""

import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState, GradientState
from tqdm.std import tqdm


def forget_parent() -> None:
    """
    Reset what a fork inherits: accelerate's state, pytest's log handlers, the locks of progress bars.

    tqdm shares its lock with forked processes. One that is killed while it draws a bar would keep it forever.
    """
    torch.set_num_threads(1)
    lock = threading.RLock()
    for bar in (tqdm, *_subclasses(tqdm)):
        bar.set_lock(lock)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    logging.getLogger().handlers.clear()


def _subclasses(of: type) -> Iterator[type]:
    for one in of.__subclasses__():
        yield one
        yield from _subclasses(one)


def in_two_processes(function: Callable, *arguments: object) -> None:
    """Call a function in two connected processes with the environment of torchrun. An error in one is raised."""
    debug_launcher(_call_connected, (function, *arguments), num_processes=2)


def _call_connected(function: Callable, *arguments: object) -> None:
    forget_parent()
    rank = str(torch.distributed.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank)
    function(*arguments)


def fork(function: Callable, *arguments: object, output: Path | None = None) -> multiprocessing.Process:
    """Start a function in a process that writes its output to the file `output`."""
    process = multiprocessing.get_context("fork").Process(target=_call, args=(function, arguments, output))
    process.start()
    return process


def _call(function: Callable, arguments: tuple, output: Path | None) -> None:
    forget_parent()
    if output is not None:
        sys.stdout = sys.stderr = open(output, "w", buffering=1, encoding="utf-8")  # noqa: SIM115
    function(*arguments)
