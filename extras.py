# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""What to install where a library of an extra is not there: in one sentence, and not as a traceback."""

import contextlib
import importlib.metadata
import re
import shlex
import sys
from collections.abc import Iterator

PACKAGE = __package__
IMPORTED_AS = {"sklearn": "scikit-learn"}  # packages that are called otherwise than they are imported
NAME = re.compile(r"[A-Za-z0-9._-]+")


def missing_library(error: ModuleNotFoundError) -> str | None:
    """
    A sentence with the command that installs what an import lacks, with all of its extra; `None` where it is a module
    of our own, which is a defect.
    """
    module = (error.name or PACKAGE).partition(".")[0]
    if module == PACKAGE:
        return None
    library = IMPORTED_AS.get(module, module.replace("_", "-"))
    packages = next((of for of in _extras().values() if library in map(_library, of)), [library])
    return f"This takes {module}, which is not installed: pip install {shlex.join(packages)}"


@contextlib.contextmanager
def needs_libraries() -> Iterator[None]:
    """Within it, a library that is not installed ends the program with that sentence and status 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        sentence = missing_library(error)
        if sentence is None:
            raise
        sys.stderr.write(f"{sentence}\n")
        raise SystemExit(2) from error


def _extras() -> dict[str, list[str]]:
    """The requirements of each extra, in the order in which pyproject.toml has them; those for our own tests last."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder of files
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", marker)
        if extra and _library(requirement) != PACKAGE:
            found.setdefault(extra[1], []).append(requirement.strip())
    return {name: of for name, of in found.items() if name != "test"} | {"test": found.get("test", [])}


def _library(requirement: str) -> str:
    return NAME.match(requirement.strip())[0].lower().replace("_", "-")
