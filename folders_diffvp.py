# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""List the files of a folder: [`walk_files`]. Tell DICOM files from others: [`is_dicom`]."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

DICOM_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")  # usual ones; a DICOM file may have any name
HEAD = 132  # bytes that identify a DICOM file


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


def is_dicom(head: bytes) -> bool:
    """True if a file with these first 132 bytes is DICOM.

    A file without a preamble (PS3.10, 7.1) begins with an element of the meta header or of the first group.
    """
    if head[128:132] == b"DICM" or head[:4] == b"DICM":
        return True
    return len(head) >= 8 and (head[:2], head[3:4]) in ((b"\2\0", b"\0"), (b"\10\0", b"\0")) and head[2] <= 0x60
