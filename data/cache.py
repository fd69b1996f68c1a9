# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Preprocessed volumes and frozen features on disk, keyed by content, so that training computes each of them once."""

import hashlib
import json
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import torch
from isal import isal_zlib
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import BatchFeature

from ..encoders_diffvp import encoder_sha256, raw_bytes
from ..reading_diffvp import read_ct
from ..references_diffvp import path_sha256
from ..storage_diffvp import file_sha256, replacing
from ..volume_diffvp import PREPROCESSING_VERSION
from .cases import Case

logger = logging.getLogger(__name__)

CHECKSUM = "crc32"  # of an entry's tensors, in the metadata of its safetensors header


class ContentHashes:
    """
    The SHA-256 of volumes, remembered between runs: to read a cohort of terabytes again, only to learn that nothing
    has changed, would cost more than the features.

    A file counts as unchanged while its size, inode and times of modification *and* of status change are: the kernel
    sets the last on every write, and no program can set it back.
    """

    def __init__(self, root: str | os.PathLike):
        Path(root).mkdir(parents=True, exist_ok=True)
        self.database = Path(root) / "hashes.sqlite"
        with self._connect() as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS files "
                "(path TEXT PRIMARY KEY, size INT, inode INT, mtime INT, ctime INT, sha256 TEXT)"
            )
        connection.close()

    def _connect(self) -> sqlite3.Connection:
        # Several processes write; each waits for the others. A connection does not survive a fork, so each use opens
        # its own.
        return sqlite3.connect(self.database, timeout=60)

    def __call__(self, volume: str | os.PathLike | dict) -> str:
        """The hash of a file, of the names and files of a folder, or of a `datasets` value {"path", "bytes"}.

        Raises:
            OSError: there is no such file.
        """
        if isinstance(volume, dict):
            if volume.get("bytes") is not None:
                return hashlib.sha256(volume["bytes"]).hexdigest()
            volume = volume["path"]
        return path_sha256(volume, self._file)

    def _file(self, path: Path) -> str:
        path = path.resolve()
        status = path.stat()
        state = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        connection = self._connect()
        try:
            row = connection.execute(
                "SELECT size, inode, mtime, ctime, sha256 FROM files WHERE path = ?", (str(path),)
            ).fetchone()
            if row is not None and row[:4] == state:
                return row[4]
            sha256 = file_sha256(path)
            with connection:
                connection.execute(
                    "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", (str(path), *state, sha256)
                )
            return sha256
        finally:
            connection.close()


class TensorCache:
    """
    A folder of small safetensors files, one per key.

    A write goes to a file of its own name and is then renamed, so that a killed run leaves no half entry and several
    processes can write the same one. Each entry carries a checksum of its tensors; one that does not match is thrown
    away and computed anew.

    Args:
        root: the folder; made if absent.
        recipe: what the entries depend on besides the volume (preprocessing settings, weights' hash): part of the key.

    Attributes:
        hits, misses, damaged: what `get` has found so far.
    """

    def __init__(self, root: str | os.PathLike, recipe: dict):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.hits = self.misses = self.damaged = 0

    def path(self, digest: str) -> Path:
        """Where the entry of the volume with this hash lies."""
        return self.root / f"{hashlib.sha256(f'{digest}{self.recipe}'.encode()).hexdigest()}.safetensors"

    def get(self, digest: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The tensors of the volume with this hash, from the cache or from `compute()`."""
        path = self.path(digest)
        entry = self._read(path)
        if entry is not None:
            self.hits += 1
            return entry
        self.misses += 1
        entry = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
        with replacing(path) as temporary:
            save_file(entry, temporary, metadata={CHECKSUM: _checksum(entry)})
        return entry

    def _read(self, path: Path) -> dict[str, torch.Tensor] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                checksum = (file.metadata() or {}).get(CHECKSUM)
                entry = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, UnicodeDecodeError):
            entry = checksum = None
        if entry is not None and checksum == _checksum(entry):
            return entry
        self.damaged += 1
        logger.warning("The cache entry %s is damaged; it is computed anew.", path.name)
        return None

    @property
    def bytes(self) -> int:
        """Size of the folder's entries on disk."""
        return sum(entry.stat().st_size for entry in os.scandir(self.root) if entry.name.endswith(".safetensors"))

    def summary(self) -> dict[str, float | int]:
        """Hits, misses, damaged entries, the share of hits, and the size in MB."""
        total = max(self.hits + self.misses, 1)
        return {
            "hits": self.hits,
            "misses": self.misses,
            "damaged": self.damaged,
            "hit_rate": self.hits / total,
            "size_mb": self.bytes / 1e6,
        }


def _checksum(entry: dict[str, torch.Tensor]) -> str:
    """CRC-32 of names, shapes, types and values: a flipped bit anywhere in an entry that still parses changes it."""
    crc = 0
    for name, tensor in sorted(entry.items()):
        crc = isal_zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), crc)
        crc = isal_zlib.crc32(raw_bytes(tensor), crc)
    return f"{crc:08x}"


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


# What of a model's configuration decides the encoder's output, besides its weights.
ENCODER = (
    "encoder_block_channels",
    "encoder_stride",
    "encoder_max_pool",
    "encoder_shortcut_type",
    "encoder_windows",
    "hu_range",
    "encoder_coordinates",
    "encoder_pyramid_channels",
    "image_size",
)


def encoder_recipe(model) -> dict:
    """What the frozen encoder's output depends on, of any model that has a `vision_encoder`."""
    recipe = {
        "encoder": encoder_sha256(model.vision_encoder),
        "dtype": next((str(weight.dtype) for weight in model.vision_encoder.parameters()), None),
        **{key: getattr(model.config, key) for key in ENCODER},
    }
    if model.config.encoder_type != "resnet":  # entries from before there was another have no such key
        recipe |= {"encoder_type": model.config.encoder_type, "encoder_layers": list(model.config.encoder_layers)}
    return recipe


class VolumeCache:
    """Preprocessed volumes, each computed once: `load(case)` gives (1, D, H, W) in float16, half a HU of resolution.

    Args:
        root: folder of all caches; the volumes are in `volumes/`.
        image_processor: the [`DiffVPImageProcessor`] whose settings are part of the key.
        spacing: mm along x, y, z of NIfTI files whose headers are blank and that no table describes (CTRG).
    """

    def __init__(self, root: str | os.PathLike, image_processor, spacing: tuple[float, float, float] | None = None):
        self.image_processor, self.spacing = image_processor, spacing
        self.hashes = ContentHashes(root)
        self.recipe = preprocessing(image_processor) | ({} if spacing is None else {"spacing": list(spacing)})
        self.cache = TensorCache(Path(root) / "volumes", self.recipe)

    def digest(self, case: Case) -> str:
        """The hash of all that the tensor of a case comes from: its volume, and what its own header lacks."""
        digest = self.hashes(case.volume)
        return digest if case.metadata is None else hashlib.sha256(f"{digest}{case.metadata}".encode()).hexdigest()

    def load(self, case: Case) -> torch.Tensor:
        """The preprocessed volume of a case; errors as of [`read_ct`]."""
        return self.cache.get(self.digest(case), lambda: {"ct": self.preprocess(case)["ct"][0].half()})["ct"]

    def preprocess(self, case: Case) -> BatchFeature:
        """What the image processor makes of a case, with what the header of its volume lacks."""
        processor = self.image_processor
        volume = read_ct(case.volume, self.spacing, processor.allow_non_hu, case.metadata)
        return processor(volume)
