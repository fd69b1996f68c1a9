# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Answers of a judge on disk: each is paid for once, whatever ends the run."""

import hashlib
import json
import os
from pathlib import Path

from . import JudgeError
from .prompt import DIMENSIONS, SHA256

ORDERS = ("AB", "BA")  # which system is Report A
FIELDS = {"key", "server", "winners", "problem", "refusal", "repaired"}  # of a record, that are read again


def answer_key(model: str, order: str, truth: str, first: str, second: str) -> str:
    """SHA-256 of what an answer depends on; `first` and `second` are the systems' reports, not as they are shown."""
    return hashlib.sha256(json.dumps([SHA256, model, order, truth, first, second]).encode()).hexdigest()


class AnswerFile:
    """
    A JSON lines file, a line for each answer: its key, the winners by position, the evidence, the tokens.

    A line that was being written when a run was killed is dropped. The file quotes reports.

    Attributes:
        answers: by their keys.

    Raises:
        JudgeError: a line is none of an answer, or another run has the file open.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, dict] = {}
        # Held open as long as it is used, so that two runs do not pay for the same answers.
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
            expected = "an answer of diffvp judge. Delete the line, or choose another file"
            raise JudgeError(f"{self.path.name}: line {number} is unknown; expected {expected}.") from error

    def add(self, record: dict) -> None:
        """Keep an answer; it is on the disk when this returns."""
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
    """For this process alone, until it closes the file or ends."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise JudgeError(f"{name} is in use by another run; wait for it, or choose another file.") from error
