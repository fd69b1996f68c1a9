# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Tell in one sentence which optional library to install, instead of a traceback."""

import contextlib
import importlib.metadata
import re
import shlex
import sys
from collections.abc import Iterator

PACKAGE = __package__
IMPORTED_AS = {"sklearn": "scikit-learn"}  # packages whose name differs from their import name
NAME = re.compile(r"[A-Za-z0-9._-]+")


def missing_library(error: ModuleNotFoundError) -> str | None:
    """
    Return a sentence with the command that installs a missing library and the rest of its extra, or `None` if the
    missing module is our own, which is a defect.
    """
    module = (error.name or PACKAGE).partition(".")[0]
    if module == PACKAGE:
        return None
    library = IMPORTED_AS.get(module, module.replace("_", "-"))
    packages = next((of for of in _extras().values() if library in map(_library, of)), [library])
    return f"This takes {module}, which is not installed: pip install {shlex.join(packages)}"


@contextlib.contextmanager
def needs_libraries() -> Iterator[None]:
    """End the program with that sentence and status 2 if a library is missing in this context."""
    try:
        yield
    except ModuleNotFoundError as error:
        sentence = missing_library(error)
        if sentence is None:
            raise
        sys.stderr.write(f"{sentence}\n")
        raise SystemExit(2) from error


def _extras() -> dict[str, list[str]]:
    """Return the requirements of each extra in the order of pyproject.toml, with those for tests last."""
    try:
        lines = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # not installed
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
