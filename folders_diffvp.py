# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""List the files of a folder: [`walk_files`]."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


def walk_files(folder: str | os.PathLike, hidden: bool = True) -> Iterator[tuple[str, list[str]]]:
    """
    Yield each folder below `folder`, itself included, with the sorted names of its files.

    Links to folders are followed after all other folders, and each folder is visited once: a link to a folder of the
    same tree adds nothing, and a loop of links ends.

    Args:
        hidden: also visit folders whose names begin with a dot.

    Raises:
        OSError: a folder cannot be read. Leaving it out would change a scan, or the list of scans, without notice.
    """
    seen, roots = set(), [os.fspath(folder)]
    for root in roots:  # grows while links are found
        for at, folders, names in os.walk(root, onerror=_refuse):
            status = os.stat(at)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
            roots += [path for name in folders if Path(path := os.path.join(at, name)).is_symlink()]
            yield at, sorted(names)


def _refuse(error: OSError) -> NoReturn:
    raise error
