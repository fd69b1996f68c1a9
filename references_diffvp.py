# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The pool of normal scans of a checkpoint, and the seeded choice of one of them.

A pool that may be passed on travels with the checkpoint, in `references/`. Patients' scans do not: of these the
checkpoint's folder holds where they lie on this machine and their digests, in `references.local.json`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from transformers.utils.hub import cached_file

from .storage_diffvp import digest

REFERENCE_FOLDER, REFERENCE_INDEX = "references", "references.json"
LOCAL_REFERENCES = "references.local.json"  # written by training; neither saved again nor pushed

Loaded = TypeVar("Loaded")


class ReferencePoolError(ValueError):
    """No pool, nothing in it to compare the scan with, or a file that is not what the index says."""


class NoOtherReferenceError(ReferencePoolError):
    """The scan is the only one of the pool."""


def path_sha256(path: str | os.PathLike, of_file: Callable[[Path], str] = digest) -> str:
    """Hex SHA-256 of a file, or of the names and files of a folder."""
    path = Path(path)
    if not path.is_dir():
        return of_file(path)
    found = hashlib.sha256()
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        found.update(f"{file.relative_to(path).as_posix()}\0{of_file(file)}\0".encode())
    return found.hexdigest()


@dataclass(frozen=True)
class ReferencePool:
    """
    Normal scans to compare with, each fetched when it is needed and checked each time.

    Those that travel with a checkpoint are entries of `references.json`: id, file and its sha256, of each NIfTI beside
    it. Those of this machine have a path, of a file or a folder of DICOM slices, instead of the file.
    """

    name_or_path: str
    subfolder: str
    entries: tuple[dict[str, str], ...]
    hub_kwargs: dict = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, name_or_path, subfolder: str = REFERENCE_FOLDER, **hub_kwargs) -> "ReferencePool | None":
        """The pool of a repository or folder; `None` if it has none. Paths count in a folder alone, not on the Hub."""
        index = cached_file(
            name_or_path,
            REFERENCE_INDEX,
            subfolder=subfolder,
            _raise_exceptions_for_missing_entries=False,
            **hub_kwargs,
        )
        if index is None:
            local = Path(name_or_path, subfolder).parent / LOCAL_REFERENCES
            if not (subfolder and local.is_file()):
                return None
            return cls(str(name_or_path), subfolder, _read_index(local, "path"))
        entries = _read_index(Path(index), "file")
        for entry in entries:
            if Path(entry["file"]).name != entry["file"]:  # an index must not reach outside its folder
                raise ReferencePoolError(
                    f"{REFERENCE_INDEX}: file is {entry['file']!r}; expected a name without folders."
                )
        hub_kwargs.pop("force_download", None)  # has been done, and each `fetch` would do it again
        return cls(str(name_or_path), subfolder, entries, hub_kwargs)

    @classmethod
    def of_paths(cls, paths: Mapping[str, str | os.PathLike], digests: Mapping[str, str] | None = None):
        """
        Scans of this machine by their ids.

        Args:
            digests: of each, see [`path_sha256`], for a pool that is kept; one that is used at once can do without.
        """
        if not paths:
            raise ReferencePoolError("The pool of references is empty; expected at least one scan.")
        entries = ({"id": name, "path": str(Path(path).absolute())} for name, path in paths.items())
        digests = digests or {}
        return cls("", "", tuple({**one, "sha256": digests.get(one["id"])} for one in entries))

    @property
    def is_local(self) -> bool:
        """Whether it is of paths, which must not leave this machine."""
        return any("path" in entry for entry in self.entries)

    def fetch(self, entry: dict[str, str]) -> Path:
        """Local path of a reference, its content checked against the index."""
        if "path" in entry:
            path = Path(entry["path"])
            if not path.exists():
                raise ReferencePoolError(
                    f"Reference {entry['id']}: missing from where it lay when the pool was made (expected there, or "
                    "another reference given)."
                )
            return self._checked(entry, path)
        try:
            path = Path(cached_file(self.name_or_path, entry["file"], subfolder=self.subfolder, **self.hub_kwargs))
        except OSError as error:
            raise ReferencePoolError(f"Reference {entry['id']}: {entry['file']} is missing from the pool.") from error
        return self._checked(entry, path)

    @staticmethod
    def _checked(entry: dict[str, str], path: Path) -> Path:
        found = None if entry["sha256"] is None else path_sha256(path)
        if found != entry["sha256"]:
            file = entry.get("file", "the scan")
            raise ReferencePoolError(
                f"Reference {entry['id']}: {file} has sha256 {found}; the index says {entry['sha256']}."
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
            NoOtherReferenceError: as [`first_other`].
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
            NoOtherReferenceError: the scan is the only one of the pool.
        """
        for entry in entries:
            content, loaded = load(entry)
            if content != scan:
                return entry["id"], loaded
        raise NoOtherReferenceError("The scan is the only one of the reference pool: give another reference.")

    def write_paths(self, folder: str | os.PathLike) -> Path:
        """Note in the folder of a checkpoint where the references lie on this machine."""
        target = Path(folder) / LOCAL_REFERENCES
        target.write_text(json.dumps(list(self.entries), indent=2) + "\n", encoding="utf-8")
        return target

    def copy_to(self, folder: Path) -> None:
        """Write all references and their index into a folder, and take away those of an earlier save."""
        folder.mkdir(exist_ok=True)
        for entry in self.entries:
            source, target = self.fetch(entry), folder / entry["file"]
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        remove_references(folder, keep={entry["file"] for entry in self.entries})
        _write_index(folder, self.entries)


def _read_index(path: Path, place: str) -> tuple[dict[str, str], ...]:
    """The entries of an index, each with an id, a `place` and a digest."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        names = [(entry["id"], entry[place], entry["sha256"])[0] for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ReferencePoolError(f"{path.name} is not a list of id, {place} and sha256.") from error
    if len(set(names)) != len(names) or not names:
        raise ReferencePoolError(f"{path.name}: ids must be distinct and at least one.")
    return tuple(entries)


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
            "sha256": digest(path),
        }
        for path in files
    ]
    return _write_index(folder, entries)


__all__ = [
    "LOCAL_REFERENCES",
    "NoOtherReferenceError",
    "ReferencePool",
    "ReferencePoolError",
    "index_references",
    "remove_references",
]
