# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Temporary folder of a server for uploads. It is removed with the server, also after the server was killed."""

import os
import shutil
import tempfile
from pathlib import Path


def make_folder(prefix: str) -> Path:
    """
    Make a temporary folder that only this user can read and whose name contains the process id. Folders of ended
    processes are removed, because a killed process cannot remove its own.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).split("-")[0]
        # In a container, each server may have the same process id.
        if owner.isdecimal() and (int(owner) == os.getpid() or not _is_running(int(owner))):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return True
