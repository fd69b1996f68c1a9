# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The pool of normal scans that travels with a checkpoint, and the seeded choice of one of them."""

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from transformers.utils.hub import cached_file

REFERENCE_FOLDER, REFERENCE_INDEX = "references", "references.json"


Loaded = TypeVar("Loaded")


class ReferencePoolError(ValueError):
    """No pool, nothing in it to compare the scan with, or a file that is not what the index says."""


@dataclass(frozen=True)
class ReferencePool:
    """Normal scans that travel with a checkpoint: `references.json` with (id, file, sha256 of the file) of each NIfTI
    beside it. Files are fetched when they are needed and checked each time."""

    name_or_path: str
    subfolder: str
    entries: tuple[dict[str, str], ...]
    hub_kwargs: dict = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, name_or_path, subfolder: str = REFERENCE_FOLDER, **hub_kwargs) -> "ReferencePool | None":
        """The pool of a repository or folder; `None` if it has none."""
        index = cached_file(
            name_or_path,
            REFERENCE_INDEX,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            **hub_kwargs,
        )
        if index is None:
            return None
        try:
            entries = json.loads(Path(index).read_text(encoding="utf-8"))
            names = [(entry["id"], entry["file"], entry["sha256"]) for entry in entries]
        except (ValueError, TypeError, KeyError) as error:
            raise ReferencePoolError(f"{REFERENCE_INDEX} is not a list of id, file and sha256.") from error
        for _, file, _ in names:
            if Path(file).name != file:  # an index must not reach outside its folder
                raise ReferencePoolError(f"{REFERENCE_INDEX}: file is {file!r}; expected a name without folders.")
        if len({name for name, _, _ in names}) != len(names) or not names:
            raise ReferencePoolError(f"{REFERENCE_INDEX}: ids must be distinct and at least one.")
        hub_kwargs.pop("force_download", None)  # has been done, and each `fetch` would do it again
        return cls(str(name_or_path), subfolder, tuple(entries), hub_kwargs)

    def fetch(self, entry: dict[str, str]) -> Path:
        """Local path of a reference, its content checked against the index."""
        try:
            path = Path(cached_file(self.name_or_path, entry["file"], subfolder=self.subfolder, **self.hub_kwargs))
        except OSError as error:
            raise ReferencePoolError(f"Reference {entry['id']}: {entry['file']} is missing from the pool.") from error
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != entry["sha256"]:
            raise ReferencePoolError(
                f"Reference {entry['id']}: {entry['file']} has sha256 {found}; the index says {entry['sha256']}."
            )
        return path

    def choose(self, seed: int, scan: str, load: Callable[[dict[str, str]], tuple[str, Loaded]]) -> tuple[str, Loaded]:
        """
        Draw the reference of a scan. The draw depends on (seed, scan) alone, not on the order of the index.

        Args:
            scan: SHA-256 of the scan's content.
            load: reads an entry; returns the SHA-256 of its content and whatever is wanted of it.

        Returns:
            id of the reference, and what `load` returned of it.

        Raises:
            ReferencePoolError: as [`first_other`].
        """
        drawn = sorted(
            self.entries, key=lambda entry: hashlib.sha256(f"{seed}:{scan}:{entry['id']}".encode()).hexdigest()
        )
        return self.first_other(drawn, scan, load)

    def first_other(
        self, entries: Iterable[dict[str, str]], scan: str, load: Callable[[dict[str, str]], tuple[str, Loaded]]
    ) -> tuple[str, Loaded]:
        """
        The first of `entries` that is not the scan itself; arguments and result as in [`choose`].

        Raises:
            ReferencePoolError: the scan is the only one of the pool.
        """
        for entry in entries:
            content, loaded = load(entry)
            if content != scan:
                return entry["id"], loaded
        raise ReferencePoolError("The scan is the only one of the reference pool: give another reference.")

    def copy_to(self, folder: Path) -> None:
        """Write all references and their index into a folder, and take away those of an earlier save."""
        folder.mkdir(exist_ok=True)
        for entry in self.entries:
            source, target = self.fetch(entry), folder / entry["file"]
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        remove_references(folder, keep={entry["file"] for entry in self.entries})
        _write_index(folder, self.entries)


def remove_references(folder: Path, keep: Collection[str] = ()) -> None:
    """Take away a pool: its index first, then the files that the index lists, but those to `keep`."""
    index = folder / REFERENCE_INDEX
    if not index.is_file():
        return
    files = [entry["file"] for entry in json.loads(index.read_text(encoding="utf-8"))]
    index.unlink()
    for file in files:
        if Path(file).name == file and file not in keep:
            (folder / file).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _write_index(folder: Path, entries) -> Path:
    index = folder / REFERENCE_INDEX
    index.write_text(json.dumps(list(entries), indent=2) + "\n", encoding="utf-8")
    return index


def index_references(folder) -> Path:
    """Write `references.json` for the NIfTI files of a folder; the id of each is its name without the suffix."""
    folder = Path(folder)
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".nii", ".nii.gz")))
    entries = [
        {
            "id": path.name.removesuffix(".gz").removesuffix(".nii"),
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in files
    ]
    return _write_index(folder, entries)


__all__ = ["ReferencePool", "ReferencePoolError", "index_references", "remove_references"]
