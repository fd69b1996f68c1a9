# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The JSON lines file that `diffvp batch` writes, and continues after an interruption."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.scans import ListedScan
from ..provenance import compare
from ..storage_diffvp import replacing

if TYPE_CHECKING:
    from ..data.cache import ContentHashes


class BatchError(ValueError):
    """The output is not a file of reports, or was started with other settings."""


def failures_path(reports: Path) -> Path:
    """Return the path of the file of failures next to a file of reports."""
    return reports.with_name(f"{reports.stem}.failed.jsonl")


class ReportFile:
    """
    A file of reports with its file of failures. One run at a time may add to them.

    Attributes:
        done: {name: SHA-256 of the file} of the scans that have a report.
        failed: number of scans that failed in this run.
        digest: function that returns the SHA-256 of a file, or of the files of a folder; results are cached on disk.

    Raises:
        BatchError: the file exists and is not a file of reports.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.failures = failures_path(self.path)
        self.done: dict[str, str | None] = {}
        self.failed = 0
        self._header, self._whole, self._files = None, 0, ()
        if self.path.exists():
            self._read()

    @cached_property
    def digest(self) -> "ContentHashes":
        from ..data.cache import ContentHashes  # imports torch, without which another file can be refused

        return ContentHashes(self.path.parent / f".{self.path.stem}.hashes")

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n") and self._header is not None:
                    break  # half a record, left by a killed run
                try:
                    entry = json.loads(line)
                    if number == 1:
                        self._header = {"settings": entry["settings"]}
                    else:
                        name = entry["id"]
                        # Files of earlier versions have no digest: their scans are read again.
                        self.done[name] = entry.get("file_sha256")
                except (ValueError, KeyError, TypeError) as error:
                    expected = "a file that `diffvp batch` wrote; choose another output"
                    raise BatchError(f"{self.path.name}: line {number} is unknown; expected {expected}.") from error
                self._whole += len(line)
        if self._header is None:
            raise BatchError(f"{self.path.name} is empty; expected a file that `diffvp batch` wrote, or no file.")

    def begin(self, header: dict) -> None:
        """Start the file, or continue it.

        Raises:
            BatchError: it was started with other settings.
        """
        if self._header is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as stage:  # so that no file has half a header
                stage.write_text(_line(header), encoding="utf-8")
                self._whole = stage.stat().st_size
            self._header = header
        others = compare(self._header["settings"], header["settings"])
        if others:
            raise BatchError(
                f"{self.path.name} was started with other settings: {'; '.join(others)}. Choose another output."
            )
        if not self._files:
            with self.path.open("r+b") as file:
                file.truncate(self._whole)
            self._files = (self.path.open("a", encoding="utf-8"), self.failures.open("w", encoding="utf-8"))

    def add(self, records: Sequence[dict], failures: Sequence[dict]) -> None:
        """Write the records and failures of a batch. They are on the disk when this returns."""
        for file, lines in zip(self._files, (records, failures), strict=True):
            file.writelines(map(_line, lines))
            file.flush()
            os.fsync(file.fileno())
        self.done |= {record["id"]: record["file_sha256"] for record in records}
        self.failed += len(failures)

    def waiting(self, scans: Sequence[ListedScan]) -> tuple[list[ListedScan], int]:
        """Return the scans without a report, and the number of these that share the name of a scan with a report.

        The returned scans are removed from `done`.
        """
        named = [scan for scan in scans if scan.id in self.done]
        same = {scan.id for scan in named if scan.path.exists() and self.digest(scan.path) == self.done[scan.id]}
        waiting = [scan for scan in scans if scan.id not in same]
        for scan in waiting:
            self.done.pop(scan.id, None)
        return waiting, len(named) - len(same)

    def __enter__(self) -> "ReportFile":
        return self

    def __exit__(self, *error) -> None:
        for file in self._files:
            file.close()


def _line(entry: dict) -> str:
    return json.dumps(entry) + "\n"  # ASCII, so that names that are not valid UTF-8 can be written
