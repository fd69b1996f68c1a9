# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Store the answers of a judge on disk, so that an interrupted run does not pay for an answer twice."""

import hashlib
import json
import os
from pathlib import Path

from . import JudgeError
from .prompt import DIMENSIONS, SHA256

ORDERS = ("AB", "BA")  # "AB" shows the first system's report as Report A
FIELDS = {"key", "server", "winners", "problem", "refusal", "repaired"}  # fields of a record that later runs read


def answer_key(model: str, order: str, truth: str, first: str, second: str) -> str:
    """SHA-256 of all that an answer depends on. `first` and `second` are in the order of the systems."""
    return hashlib.sha256(json.dumps([SHA256, model, order, truth, first, second]).encode()).hexdigest()


class AnswerFile:
    """
    JSON lines file of answers. Each line holds the key, the winners by position, the evidence and the problems.

    An incomplete last line, left by a killed run, is dropped. The file contains quotations from reports.

    Attributes:
        answers: records by key.

    Raises:
        JudgeError: a line is not an answer, or another run uses the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, dict] = {}
        # The file stays open and locked, so that two runs do not pay for the same answers.
        self._file = self.path.open("a+b")
        try:
            _lock(self._file, self.path.name)
            self._file.seek(0)
            whole = 0
            for number, line in enumerate(self._file, start=1):
                if not line.endswith(b"\n"):
                    break
                self._read(line, number)
                whole += len(line)
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def _read(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            winners = record["winners"]
            chosen = set(winners) == set(DIMENSIONS) and set(winners.values()) <= {"A", "B", None}
            if not (chosen and set(record) >= FIELDS):
                raise KeyError("fields")
            self.answers[record["key"]] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            expected = "an answer of diffvp judge; delete the line or choose another file"
            raise JudgeError(f"{self.path.name}: line {number}: unknown (expected {expected})") from error

    def add(self, record: dict) -> None:
        """Store an answer. It is on disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.answers[record["key"]] = record

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(self, *error) -> None:
        self.close()


def _lock(file, name: str) -> None:
    """Lock the file for this process until it closes the file or ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise JudgeError(f"{name}: in use by another run (expected a free file; wait or choose another)") from error
