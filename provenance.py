# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Origin of a result: machine, library versions, and digests of the weights.

The digest of a file itself is `file_sha256` of `storage_diffvp.py`, which the model repository needs too.
"""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

from . import __version__

LIBRARIES = ("torch", "transformers", "peft")


def machine() -> str:
    """Cores, architecture and Python version."""
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"


def versions() -> dict[str, str]:
    """Installed versions of the libraries that run the model."""
    return {name: version(name) for name in LIBRARIES}


def library_versions() -> dict[str, str]:
    """Versions of DiffVP, Python, and all libraries that a report depends on, including the readers of scans."""
    readers = {name: version(name) for name in ("nibabel", "pydicom", "SimpleITK", "isal", "numpy")}
    return {"diffvp": __version__, "python": platform.python_version()} | versions() | readers


def made_on() -> dict:
    """Date, machine, device and library versions of a result."""
    import torch

    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": versions(),
    }


def weights_sha256(folder: str | os.PathLike) -> dict[str, str]:
    """{relative name: SHA-256} of the weights of a checkpoint."""
    # Imports huggingface_hub, and benchmarks that take `machine` measure the memory of a process without it.
    from .storage_diffvp import file_sha256

    root = Path(folder)
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in sorted(root.rglob("*.safetensors"))}


def without_place(path: str | os.PathLike) -> str:
    """Return a path for the record of a command: a relative path unchanged, an absolute one cut to its last part."""
    path = Path(path)
    return path.name if path.is_absolute() else path.as_posix()


def compare(before: dict, now: dict, path: str = "") -> list[str]:
    """Differences between two nested dictionaries of JSON values, each as "a.b was 1, is 2"."""
    differences = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += compare(old, new, f"{path}{key}.")
        elif old != new:
            differences.append(f"{path}{key} was {old}, is {new}")
    return differences
