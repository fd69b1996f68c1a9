# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints that survive a kill at any moment: complete or absent, and verified before use.

A checkpoint is a folder such as `step-00000120` of safetensors and JSON, with a manifest of the size and SHA-256 of
each file. It is written under another name, flushed to disk, and renamed.
"""

import contextlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..files import FORMER, UNFINISHED, recover_folder, write_folder
from ..storage_diffvp import file_sha256

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"


class CheckpointError(ValueError):
    """A run cannot resume from the checkpoints in its folder."""


@dataclass
class Checkpoint:
    """A valid checkpoint.

    Attributes:
        step: number of completed optimizer steps.
        state: content of `state.json`.
    """

    folder: Path
    step: int
    state: dict

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Load the tensors of `NAME.safetensors`."""
        return load_file(self.folder / f"{name}.safetensors")


class Checkpoints:
    """The checkpoints of one stage of a run.

    Args:
        folder: created with the first checkpoint.
        keep: number of newest checkpoints to keep, in addition to the best one.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, best: int | None) -> Path:
        """Write the checkpoint of a step, then delete all others but the newest ones and that of step `best`."""
        target = self._path(step)

        def write(folder: Path) -> None:
            for name, values in tensors.items():
                save_file({key: value.contiguous() for key, value in values.items()}, folder / f"{name}.safetensors")
            (folder / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")
            manifest = {
                path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in sorted(folder.iterdir())
            }
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")

        write_folder(target, write)
        steps = self.steps()
        for old in steps[: -self.keep]:
            if old != best:
                self._delete(self._path(old))
        return target

    def steps(self) -> list[int]:
        """Return the steps with a checkpoint, valid or not, in ascending order."""
        if not self.folder.is_dir():
            return []
        names = (path.name.partition("-") for path in self.folder.iterdir() if path.name.startswith("step-"))
        return sorted(int(number) for _, _, number in names)

    def newest(self) -> Checkpoint | None:
        """Load the newest valid checkpoint, skipping damaged ones with a warning; `None` if there is none."""
        for step in reversed(self.steps()):
            problem = self.problem(step)
            if problem is None:
                return self.load(step)
            logger.warning("Checkpoint %s is skipped: %s.", self._path(step).name, problem)
        return None

    def load(self, step: int) -> Checkpoint:
        """Load the checkpoint of a step.

        Raises:
            CheckpointError: the checkpoint is damaged.
        """
        problem = self.problem(step)
        if problem is not None:
            raise CheckpointError(f"{self._path(step)}: {problem}")
        folder = self._path(step)
        return Checkpoint(folder, step, json.loads((folder / STATE).read_text(encoding="utf-8")))

    def problem(self, step: int) -> str | None:
        """Describe the damage of the checkpoint of a step; `None` if it is valid."""
        folder = self._path(step)
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
        except FileNotFoundError:
            return f"{MANIFEST} is missing"
        except (ValueError, TypeError, KeyError, AttributeError):
            return f"{MANIFEST} is unreadable"
        if STATE not in expected:
            return f"{MANIFEST} does not list {STATE}"
        for name, (size, sha256) in expected.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes; expected {size}"
            if file_sha256(path) != sha256:
                return f"{name} does not match its SHA-256 in {MANIFEST}"
        return None

    def clean(self) -> None:
        """Delete unfinished folders of killed runs. Call this in one process, before any process writes."""
        if self.folder.is_dir():
            for step in self.folder.glob(f"{FORMER}step-*"):
                recover_folder(self.folder / step.name.removeprefix(FORMER))
            for path in self.folder.iterdir():
                if path.name.startswith(UNFINISHED):
                    shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _delete(self, folder: Path) -> None:
        # Rename it first, so that a folder named step-N is complete at any time.
        doomed = self.folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
