# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Cache of preprocessed volumes and frozen features on disk, keyed by content, so that each is computed once."""

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

CHECKSUM = "crc32"  # key in the safetensors header for the checksum of the tensors


class ContentHashes:
    """
    SHA-256 digests of volumes, stored between runs, since reading terabytes again to detect changes would cost more
    than computing the features.

    A file counts as unchanged if its size, inode, modification time *and* status change time are unchanged. The kernel
    sets the latter on every write, and programs cannot reset it.
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
        # Several processes write, and each waits for the others. Connections do not survive a fork, so each use opens
        # a new one.
        return sqlite3.connect(self.database, timeout=60)

    def __call__(self, volume: str | os.PathLike | dict) -> str:
        """Hash a file, the names and files of a folder, or a `datasets` value {"path", "bytes"}.

        Raises:
            OSError: the file does not exist.
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

    Entries are written atomically, so that a killed run leaves no incomplete entry and several processes can write the
    same one. Each entry has a checksum of its tensors; an entry that does not match is discarded and computed again.

    Args:
        root: folder, created if absent.
        recipe: everything that entries depend on besides the volume (preprocessing settings, hash of weights). It is
            part of the key.

    Attributes:
        hits, misses, damaged: counts of the results of `get`.
    """

    def __init__(self, root: str | os.PathLike, recipe: dict):
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self.recipe = json.dumps(recipe, sort_keys=True)
        self.hits = self.misses = self.damaged = 0

    def path(self, digest: str) -> Path:
        """Return the path of the entry for the volume with this hash."""
        return self.root / f"{hashlib.sha256(f'{digest}{self.recipe}'.encode()).hexdigest()}.safetensors"

    def get(self, digest: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Return the tensors for the volume with this hash, from the cache or from `compute()`."""
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
        logger.warning("The cache entry %s is damaged; it is computed again.", path.name)
        return None

    @property
    def bytes(self) -> int:
        """Size of all entries on disk."""
        return sum(entry.stat().st_size for entry in os.scandir(self.root) if entry.name.endswith(".safetensors"))

    def summary(self) -> dict[str, float | int]:
        """Return hits, misses, damaged entries, hit rate, and size in MB."""
        total = max(self.hits + self.misses, 1)
        return {
            "hits": self.hits,
            "misses": self.misses,
            "damaged": self.damaged,
            "hit_rate": self.hits / total,
            "size_mb": self.bytes / 1e6,
        }


def _checksum(entry: dict[str, torch.Tensor]) -> str:
    """Compute the CRC-32 of names, shapes, types and values, which detects flipped bits in entries that parse."""
    crc = 0
    for name, tensor in sorted(entry.items()):
        crc = isal_zlib.crc32(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode(), crc)
        crc = isal_zlib.crc32(raw_bytes(tensor), crc)
    return f"{crc:08x}"


# Settings of the image processor that determine the tensor of a volume.
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
    """Return the settings of a [`DiffVPImageProcessor`] that determine a preprocessed volume, and the code version."""
    return {"version": PREPROCESSING_VERSION} | {key: getattr(image_processor, key) for key in PREPROCESSING}


# Fields of the model configuration that determine the encoder output, besides the weights.
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
    """Return everything that the output of a model's frozen `vision_encoder` depends on."""
    recipe = {
        "encoder": encoder_sha256(model.vision_encoder),
        "dtype": next((str(weight.dtype) for weight in model.vision_encoder.parameters()), None),
        **{key: getattr(model.config, key) for key in ENCODER},
    }
    if model.config.encoder_type != "resnet":  # keys of older entries, all of this type, lack these fields
        recipe |= {"encoder_type": model.config.encoder_type, "encoder_layers": list(model.config.encoder_layers)}
    return recipe


class VolumeCache:
    """Preprocessed volumes, computed once: `load(case)` returns (1, D, H, W) in float16, with half a HU precision.

    Args:
        root: folder of all caches; volumes are in `volumes/`.
        image_processor: [`DiffVPImageProcessor`] whose settings are part of the key.
        spacing: mm along x, y, z for NIfTI files with blank headers and without a table of metadata (CTRG).
    """

    def __init__(self, root: str | os.PathLike, image_processor, spacing: tuple[float, float, float] | None = None):
        self.image_processor, self.spacing = image_processor, spacing
        self.hashes = ContentHashes(root)
        self.recipe = preprocessing(image_processor) | ({} if spacing is None else {"spacing": list(spacing)})
        self.cache = TensorCache(Path(root) / "volumes", self.recipe)

    def digest(self, case: Case) -> str:
        """Hash the inputs of the tensor of a case: the volume, and the metadata that its header lacks."""
        digest = self.hashes(case.volume)
        return digest if case.metadata is None else hashlib.sha256(f"{digest}{case.metadata}".encode()).hexdigest()

    def load(self, case: Case) -> torch.Tensor:
        """Return the preprocessed volume of a case. Raises the errors of [`read_ct`]."""
        return self.cache.get(self.digest(case), lambda: {"ct": self.preprocess(case)["ct"][0].half()})["ct"]

    def preprocess(self, case: Case) -> BatchFeature:
        """Read and preprocess a case, with the metadata that the header of its volume lacks."""
        processor = self.image_processor
        volume = read_ct(case.volume, self.spacing, processor.allow_non_hu, case.metadata)
        return processor(volume)
