# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The pool of normal reference scans of a checkpoint, and the seeded choice of a reference.

A pool that may be redistributed travels with the checkpoint, in `references/`. Scans of patients do not: the
checkpoint's folder only records their paths on this machine and their digests, in `references.local.json`.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils.hub import cached_file

from .storage_diffvp import digest, replacing

REFERENCE_FOLDER, REFERENCE_INDEX = "references", "references.json"
LOCAL_REFERENCES = "references.local.json"  # written by training; never saved again, never pushed

Entry = TypeVar("Entry", bound=Mapping[str, Any])
Loaded = TypeVar("Loaded")


class ReferencePoolError(ValueError):
    """There is no pool, the pool has no reference for the scan, or a file does not match the index."""


class NoOtherReferenceError(ReferencePoolError):
    """The pool holds no scan other than the one to compare."""


def path_sha256(path: str | os.PathLike, of_file: Callable[[Path], str] = digest) -> str:
    """SHA-256 in hexadecimal of a file, or of the names and contents of the files in a folder."""
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
    Normal scans to compare with. Each is fetched when it is needed, and checked against its digest each time.

    A pool that travels with a checkpoint has a `references.json` with one entry per NIfTI file beside it: id, file and
    sha256. The entries of a local pool have a path (a file, or a folder of DICOM slices) instead of a file.
    """

    name_or_path: str
    subfolder: str
    entries: tuple[dict[str, str], ...]
    hub_kwargs: dict = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, name_or_path, subfolder: str = REFERENCE_FOLDER, **hub_kwargs) -> "ReferencePool | None":
        """
        Load the pool of a repository or folder; return `None` if it has none.

        `references.local.json` is read from folders only, never from the Hub.

        Raises:
            ReferencePoolError: the index is malformed, or names a file outside its folder.
        """
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
                    f"{REFERENCE_INDEX}: file: {entry['file']!r} (expected a name without folders)"
                )
        hub_kwargs.pop("force_download", None)  # done above; otherwise each `fetch` would download again
        return cls(str(name_or_path), subfolder, entries, hub_kwargs)

    @classmethod
    def of_paths(cls, paths: Mapping[str, str | os.PathLike], digests: Mapping[str, str] | None = None):
        """
        Make a pool of scans on this machine.

        Args:
            paths: path of each scan by its id.
            digests: [`path_sha256`] of each scan by its id. Needed for a pool that is saved; optional for a pool that
                is used at once, whose files are then not checked.

        Raises:
            ReferencePoolError: there are no paths.
        """
        if not paths:
            raise ReferencePoolError("The pool of references is empty; expected at least one scan.")
        entries = ({"id": name, "path": str(Path(path).absolute())} for name, path in paths.items())
        digests = digests or {}
        return cls("", "", tuple({**one, "sha256": digests.get(one["id"])} for one in entries))

    @property
    def is_local(self) -> bool:
        """True if the entries are paths, which must not leave this machine."""
        return any("path" in entry for entry in self.entries)

    def fetch(self, entry: dict[str, str]) -> Path:
        """
        Return the local path of a reference after checking its content against the index.

        Raises:
            ReferencePoolError: the file is missing, or its digest differs from the index.
        """
        if "path" in entry:
            path = Path(entry["path"])
            if not path.exists():
                raise ReferencePoolError(
                    f"Reference {entry['id']}: path: missing (expected the scan at its original path; otherwise pass "
                    "another reference)"
                )
            return self._checked(entry, path)
        try:
            path = cached_file(self.name_or_path, entry["file"], subfolder=self.subfolder, **self.hub_kwargs)
        except OSError as error:
            raise ReferencePoolError(f"Reference {entry['id']}: {entry['file']} is missing from the pool.") from error
        return self._checked(entry, Path(path))  # pyright: ignore[reportArgumentType]  # never `None`: it would raise

    @staticmethod
    def _checked(entry: dict[str, str], path: Path) -> Path:
        found = None if entry["sha256"] is None else path_sha256(path)
        if found != entry["sha256"]:
            file = entry.get("file", "the scan")
            raise ReferencePoolError(
                f"Reference {entry['id']}: sha256 of {file}: {found} (expected {entry['sha256']}, as in the index)"
            )
        return path

    def choose(self, seed: int, scan: str, load: Callable[[dict[str, str]], tuple[str, Loaded]]) -> tuple[str, Loaded]:
        """
        Draw a reference for a scan: the entries are ranked by the seed, and a scan is never its own reference.

        The draw depends only on (seed, scan), not on the order of the index.

        Args:
            scan: SHA-256 of the scan's content.
            load: read an entry; return the SHA-256 of its content, and anything the caller needs from it.

        Returns:
            The id of the reference, and the second value that `load` returned for it.

        Raises:
            NoOtherReferenceError: the pool holds no other scan.
        """
        drawn = sorted(
            self.entries, key=lambda entry: hashlib.sha256(f"{seed}:{scan}:{entry['id']}".encode()).hexdigest()
        )
        return self.first_other(drawn, scan, load)

    def choose_nearest(
        self,
        distance: Callable[[dict[str, str]], float],
        scan: str | None,
        load: Callable[[dict[str, str]], tuple[str | None, Loaded]],
    ) -> tuple[str, Loaded]:
        """Choose the reference with the smallest `distance` to a scan. The rest is as in [`first_other`]."""
        return self.first_other(sorted(self.entries, key=distance), scan, load)

    @staticmethod
    def first_other(
        entries: Iterable[Entry],
        scan: str | None,
        load: Callable[[Entry], tuple[str | None, Loaded]],
        name: str = "The scan",
    ) -> tuple[str, Loaded]:
        """
        Return the first of `entries` that is not the scan itself. Arguments and result as in [`choose`].

        Args:
            entries: ranked entries of a pool, each with an `id`.
            scan: SHA-256 of the scan's content; `None` if unknown, which accepts the first entry.
            name: name of the scan for the error message.

        Raises:
            NoOtherReferenceError: `entries` holds no other scan.
        """
        for entry in entries:
            content, loaded = load(entry)
            if scan is None or content != scan:
                return entry["id"], loaded
        raise NoOtherReferenceError(f"{name} is the only scan in the reference pool: give another reference.")

    def write_paths(self, folder: str | os.PathLike) -> Path:
        """Record the local paths of the references in a checkpoint's folder; return the path of the record."""
        target = Path(folder) / LOCAL_REFERENCES
        _write_entries(target, self.entries)
        return target

    def copy_to(self, folder: Path) -> None:
        """Copy all references and their index into a folder, and remove those of an earlier save."""
        folder.mkdir(exist_ok=True)
        for entry in self.entries:
            source, target = self.fetch(entry), folder / entry["file"]
            if not (target.exists() and target.samefile(source)):
                shutil.copyfile(source, target)
        remove_references(folder, keep={entry["file"] for entry in self.entries})
        _write_index(folder, self.entries)


def _read_index(path: Path, place: str) -> tuple[dict[str, str], ...]:
    """
    Read the entries of an index.

    Args:
        place: key that holds the location of a scan, "file" or "path".

    Raises:
        ReferencePoolError: an entry lacks its id, location or digest, ids repeat, or there are no entries.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        names = [(entry["id"], entry[place], entry["sha256"])[0] for entry in entries]
    except (ValueError, TypeError, KeyError) as error:
        raise ReferencePoolError(f"{path.name} is not a list of id, {place} and sha256.") from error
    if len(set(names)) != len(names) or not names:
        raise ReferencePoolError(f"{path.name}: ids must be distinct and at least one.")
    return tuple(entries)


def remove_references(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove a pool from a folder: first the index, then the files it lists, except those to `keep`."""
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
    _write_entries(index, entries)
    return index


def _write_entries(path: Path, entries) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(list(entries), indent=2) + "\n", encoding="utf-8")


def index_references(folder) -> Path:
    """Write `references.json` for the NIfTI files in a folder. The id of a scan is its file name without suffix."""
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
