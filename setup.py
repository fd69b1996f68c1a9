# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Build the package; its settings are in pyproject.toml.

A checkpoint carries the code that loads it. Here that code has one source, the files `*_diffvp.py` at the
root: building or installing the package copies them into the checkpoint that ships, and so does a run of the tests.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CHECKPOINT = ROOT / "checkpoints" / "diffvp-phantom"


def copy_code() -> None:
    """Copy the code and the endpoint's files into the shipped checkpoint; remove code that has no source any more."""
    sources = {path.name: path for path in ROOT.glob("*_diffvp.py")}
    sources |= {"handler.py": ROOT / "hub/handler.py", "requirements.txt": ROOT / "hub/handler_requirements.txt"}
    for path in CHECKPOINT.glob("*_diffvp.py"):
        if path.name not in sources:
            path.unlink()
    for name, source in sources.items():
        target, temporary = CHECKPOINT / name, CHECKPOINT / f".{name}.{os.getpid()}"
        if not target.exists() or target.read_bytes() != source.read_bytes():
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)  # another process may be reading it


class BuildWithCheckpoint(build_py):
    """`pip install`, editable or not, and `pip wheel`."""

    def run(self) -> None:
        copy_code()
        super().run()

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        """Leave out this file, which lies in the root of the package."""
        return [module for module in super().find_package_modules(package, package_dir) if module[1] != "setup"]


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithCheckpoint})
