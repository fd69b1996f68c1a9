# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill at any moment: complete or not there, and checked before they are used.

A checkpoint is a folder `step-00000120` of safetensors and JSON, with a manifest of the size and SHA-256 of each file.
It is written under another name, flushed to the disk, and then renamed.
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
    """A run cannot go on from what its folder holds."""


@dataclass
class Checkpoint:
    """A valid checkpoint.

    Attributes:
        step: optimizer steps that it has behind it.
        state: the content of `state.json`.
    """

    folder: Path
    step: int
    state: dict

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of `NAME.safetensors`."""
        return load_file(self.folder / f"{name}.safetensors")


class Checkpoints:
    """The checkpoints of one stage of a run.

    Args:
        folder: made when the first is written.
        keep: how many of the newest to keep, besides the best.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict, best: int | None) -> Path:
        """Write the checkpoint of a step, then delete those that are neither among the newest nor the step `best`."""
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
        """Steps with a checkpoint, valid or not, ascending."""
        if not self.folder.is_dir():
            return []
        names = (path.name.partition("-") for path in self.folder.iterdir() if path.name.startswith("step-"))
        return sorted(int(number) for _, _, number in names)

    def newest(self) -> Checkpoint | None:
        """The newest valid checkpoint; a damaged one is reported and passed over."""
        for step in reversed(self.steps()):
            problem = self.problem(step)
            if problem is None:
                return self.load(step)
            logger.warning("Checkpoint %s is passed over: %s.", self._path(step).name, problem)
        return None

    def load(self, step: int) -> Checkpoint:
        """The checkpoint of a step.

        Raises:
            CheckpointError: it is damaged.
        """
        problem = self.problem(step)
        if problem is not None:
            raise CheckpointError(f"{self._path(step)}: {problem}")
        folder = self._path(step)
        return Checkpoint(folder, step, json.loads((folder / STATE).read_text(encoding="utf-8")))

    def problem(self, step: int) -> str | None:
        """What is wrong with the checkpoint of a step, or `None`."""
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
                return f"{name} has another SHA-256 than {MANIFEST} says"
        return None

    def clean(self) -> None:
        """Delete what killed runs left unfinished. For one process, before any writes."""
        if self.folder.is_dir():
            for step in self.folder.glob(f"{FORMER}step-*"):
                recover_folder(self.folder / step.name.removeprefix(FORMER))
            for path in self.folder.iterdir():
                if path.name.startswith((UNFINISHED, FORMER)):
                    shutil.rmtree(path, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _delete(self, folder: Path) -> None:
        # Under another name first: a folder of the name step-N is whole at any time.
        doomed = self.folder / f"{UNFINISHED}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
