# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Output files and folders: a check, before anything is computed, that they can be written; writing them completely or
not at all. A single file is written with `replacing` of `storage_diffvp.py`, which the model repository needs too.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

UNFINISHED = ".unfinished-"  # prefix of folders that are being written or deleted
FORMER = ".former-"  # prefix of folders that are being replaced


def nearest_folder(path: str | os.PathLike) -> Path:
    """Return the path itself if it exists, else its nearest existing parent."""
    path = Path(path).absolute()
    return next(one for one in (path, *path.parents) if os.path.exists(one))  # unlike Path.exists, it never raises


def writing_problem(path: str | os.PathLike, *, folder: bool = False) -> str | None:
    """Return the reason why no file, or no folder, can be written at `path`, or `None` if one can."""
    path = Path(path).absolute()
    if os.path.exists(path) and os.path.isdir(path) != folder:
        return "a file" if folder else "a folder"
    if os.path.exists(path) and not (folder or os.path.isfile(path)):
        return "not a regular file"
    if os.path.exists(path) and not os.access(path, os.W_OK):
        return "read-only"
    there = nearest_folder(path.parent)
    if not there.is_dir():
        return f"below the file {there.name}"
    if not os.access(there, os.W_OK | os.X_OK):
        return "in a folder that is not writable"
    return None


def write_texts(folder: str | os.PathLike, texts: dict[str, str]) -> None:
    """Write text files by name into a folder; none is replaced before all are written."""
    from .storage_diffvp import replacing  # imports huggingface_hub, which `diffvp --help` does without

    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            stack.enter_context(replacing(Path(folder) / name)).write_text(text, encoding="utf-8")


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """
    Create or replace the folder `target` with what `write(folder)` puts into an empty one: completely or not at all.

    A kill between the two renames leaves the former content aside; the next call restores it first.
    """
    from .storage_diffvp import flush

    target.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(target)
    former = _former(target)
    staging = target.parent / f"{UNFINISHED}{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        write(staging)
        for path in [*sorted(staging.rglob("*")), staging]:
            flush(path)
        if target.exists():
            os.rename(target, former)
        os.rename(staging, target)
        flush(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        recover_folder(target)


def recover_folder(target: Path) -> None:
    """Restore the content that an interrupted [`write_folder`] had moved aside, or delete it if it was replaced."""
    former = _former(target)
    if former.exists() and not target.exists():
        os.rename(former, target)
    shutil.rmtree(former, ignore_errors=True)


def _former(target: Path) -> Path:
    return target.parent / f"{FORMER}{target.name}"
