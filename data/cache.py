# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Preprocessed volumes and frozen features on disk, keyed by content, so that training computes each of them once."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..volume_diffvp import PREPROCESSING_VERSION


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # hashlib.file_digest needs Python 3.11
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def state_sha256(module: torch.nn.Module) -> str:
    """Hex SHA-256 of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TensorCache:
    """
    A folder of small safetensors files, one per key. A write is atomic, so that a killed run leaves no half entry.

    Args:
        root: the folder; made if absent.
        recipe: what the entries depend on besides the file (preprocessing settings, weights' hash): part of the key.
    """

    def __init__(self, root: str | os.PathLike, recipe: dict):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.recipe = json.dumps(recipe, sort_keys=True)

    def get(self, file: str | os.PathLike, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of `file`, from the cache or from `compute()`."""
        key = hashlib.sha256(f"{file_sha256(file)}{self.recipe}".encode()).hexdigest()
        path = self.root / f"{key}.safetensors"
        if not path.exists():
            temporary = self.root / f"{key}.{os.getpid()}.tmp"
            save_file({name: tensor.contiguous() for name, tensor in compute().items()}, temporary)
            os.replace(temporary, path)
        with safe_open(path, "pt") as entry:
            return {name: entry.get_tensor(name) for name in entry.keys()}  # noqa: SIM118 (not a mapping)


# What of an image processor decides the tensor of a volume.
PREPROCESSING = (
    "size",
    "target_spacing",
    "hu_window",
    "crop_foreground",
    "foreground_hu",
    "antialias",
    "allow_non_hu",
)


def preprocessing(image_processor) -> dict:
    """The settings of a [`DiffVPImageProcessor`] that a preprocessed volume depends on, and its code's version."""
    return {"version": PREPROCESSING_VERSION} | {key: getattr(image_processor, key) for key in PREPROCESSING}


class VolumeCache:
    """Preprocessed volumes, each computed once: `load(path)` gives (1, D, H, W) in float16, half a HU of resolution.

    Args:
        root: folder of all caches; the volumes are in `volumes/`.
        image_processor: the [`DiffVPImageProcessor`] whose settings are part of the key.
    """

    def __init__(self, root: str | os.PathLike, image_processor):
        self.image_processor = image_processor
        self.cache = TensorCache(Path(root) / "volumes", preprocessing(image_processor))

    def load(self, volume: str | os.PathLike) -> torch.Tensor:
        return self.cache.get(volume, lambda: {"ct": self.image_processor(volume)["ct"][0].half()})["ct"]
