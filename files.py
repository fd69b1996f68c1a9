# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Check whether an output can be written, before anything is computed."""

import os
from pathlib import Path


def nearest_folder(path: str | os.PathLike) -> Path:
    """Return the path itself, or its nearest existing parent."""
    path = Path(path).absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def writing_problem(path: str | os.PathLike) -> str | None:
    """Return in words why neither a file nor a folder can be created at `path`; `None` if it can."""
    there = nearest_folder(Path(path).absolute().parent)
    if not there.is_dir():
        return f"below the file {there.name}"
    if not os.access(there, os.W_OK | os.X_OK):
        return "in a folder that is not writable"
    return None
