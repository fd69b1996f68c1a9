# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A server's folder for what strangers send: it goes with the server, also with one that was killed."""

import os
import shutil
import tempfile
from pathlib import Path


def make_folder(prefix: str) -> Path:
    """
    A new temporary folder, readable by this user alone, whose name says which process it is of. Those of processes
    that are gone are removed: a killed one could not.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        owner = folder.name.removeprefix(prefix).split("-")[0]
        # In a container, each server may have the same number.
        if owner.isdecimal() and (int(owner) == os.getpid() or not _is_running(int(owner))):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-"))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
