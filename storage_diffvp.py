# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The files of a checkpoint: written atomically, with digests in `config.json`.

A checkpoint consists of several files, and its folder may hold files of an earlier save. A save removes `config.json`
first and writes it last, so that a folder with a `config.json` is complete at any moment.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from huggingface_hub.errors import HFValidationError, HTTPError  # pyright: ignore[reportPrivateImportUsage]
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
WEIGHTS_NAME = SAFETENSORS_SINGLE_FILE
ADAPTER_SUBFOLDER = "adapter"
DRAFTS_NAME = "drafts.json"
STAGING_PREFIX = ".saving-"
# Only a save writes these files, so that a later save may delete them.
_WEIGHTS = re.compile(rf"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|{ADAPTER_SUBFOLDER}/[^/]+")
_OWNED = re.compile(rf"{_WEIGHTS.pattern}|{re.escape(DRAFTS_NAME)}")


class DiffVPCheckpointError(RuntimeError):
    """A checkpoint, or the base LLM that it names, does not match the configuration."""


def check_checkpoint_name(name: str | os.PathLike, token: str | bool | None = None, **hub_kwargs) -> None:
    """
    Check that a checkpoint is a local folder, in the Hub's cache, or a repository on the Hub.

    The Hub is asked once: transformers would retry for a minute.

    Args:
        token: access token of the Hub.
        hub_kwargs: options of the Hub; `revision` and `cache_dir` are used.

    Raises:
        DiffVPCheckpointError: `name` is neither a folder nor a repository on the Hub, such as a mistyped path.
    """
    if Path(name).is_dir():
        return
    expected = "a folder with a checkpoint, or the id of a Hub repository"
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise DiffVPCheckpointError(f"{name}: there is no such folder; expected {expected}.") from error
    access = {key: hub_kwargs[key] for key in ("revision", "cache_dir") if hub_kwargs.get(key) is not None}
    if isinstance(try_to_load_from_cache(str(name), CONFIG_NAME, **access), str):
        return
    try:
        there = HfApi(token=token).repo_exists(str(name))
    except (HTTPError, OSError) as error:  # OSError: HF_HUB_OFFLINE is set
        raise DiffVPCheckpointError(
            f"{name}: there is no such folder, and the Hub cannot be reached; expected {expected}."
        ) from error
    if not there:
        raise DiffVPCheckpointError(
            f"{name}: there is no such folder, and no such repository on the Hub that you may read; expected "
            f"{expected}."
        )


def check_config(folder: str | os.PathLike, model_type: str = "diffvp") -> None:
    """
    Check that a folder holds the configuration of a model of this type.

    transformers 5.23 uses the default configuration if it does not.

    Raises:
        DiffVPCheckpointError: the folder has no configuration, or that of another model.
    """
    folder = Path(folder)
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise DiffVPCheckpointError(f"{folder} has no {CONFIG_NAME}: not a checkpoint, or an incomplete one.")
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise DiffVPCheckpointError(f"{file}: content: no JSON object (expected a configuration)") from error
    if kind != model_type:
        expected = f"{model_type}, as in a checkpoint of DiffVP"
        raise DiffVPCheckpointError(f"{folder}: model_type: {kind} (expected {expected})")


@contextlib.contextmanager
def replace_files(folder: str | os.PathLike, is_main_process: bool = True) -> Iterator[Path]:
    """
    Yield an empty folder whose files become the checkpoint in `folder` at the end: all of them or none.

    Files that are not part of a checkpoint, such as the processor's, stay as they are. A kill leaves the earlier
    checkpoint, the new one, or a folder without `config.json`, which cannot be loaded.

    Args:
        is_main_process: if `False`, discard the files at the end.
    """
    folder = Path(folder)
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{STAGING_PREFIX}*") if is_main_process else ():
        shutil.rmtree(left, ignore_errors=True)  # left by a save that was killed
    # Inside `folder`, which may be a mount point: only there the file system is certainly the same.
    staged = folder / f"{STAGING_PREFIX}{uuid.uuid4().hex}"
    staged.mkdir()
    complete = False
    try:
        yield staged
        if is_main_process:
            _commit(staged, folder)
        complete = True
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if made and not complete:
            with contextlib.suppress(OSError):  # not empty: another process has written into it
                folder.rmdir()


def _commit(staged: Path, folder: Path) -> None:
    """Move the staged files into `folder`, `config.json` last, and delete stale files of an earlier save."""
    new = _files(staged)
    for name in new:
        flush(staged / name)
    stale = [name for name in _files(folder) if _OWNED.fullmatch(name) and name not in new]
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / CONFIG_NAME)
    flush(folder)
    for name in sorted(new, key=lambda name: name == CONFIG_NAME):
        if name == CONFIG_NAME:
            for old in stale:
                os.unlink(folder / old)
            with contextlib.suppress(OSError):  # not empty, or missing
                (folder / ADAPTER_SUBFOLDER).rmdir()
            for changed in {(folder / other).parent for other in new}:
                flush(changed)
        (folder / name).parent.mkdir(exist_ok=True)
        os.replace(staged / name, folder / name)
    flush(folder)


def _files(folder: Path) -> list[str]:
    """Return the relative names of the files in a folder and in its adapter subfolder."""
    found = [*folder.iterdir()]
    if (folder / ADAPTER_SUBFOLDER).is_dir():
        found += (folder / ADAPTER_SUBFOLDER).iterdir()
    return sorted(path.relative_to(folder).as_posix() for path in found if path.is_file())


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield the path of a temporary file that becomes `path` at the end: the file appears complete or not at all.

    The temporary file lies in the same folder, so that the rename is atomic. Its name is unique, so that several
    processes can write the same file, and short, so that long names stay legal.
    """
    path = Path(path)
    # `tempfile` would make it readable by its owner alone.
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def file_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes, read anew."""
    found = hashlib.sha256()
    with open(path, "rb") as file:  # hashlib.file_digest needs Python 3.11
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def digest(path: str | os.PathLike) -> str:
    """Return [`file_sha256`], cached until the file changes."""
    status = os.stat(path)
    return _digest(os.fspath(path), status.st_ino, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2**16)
def _digest(path: str, inode: int, modified: int, size: int) -> str:
    return file_sha256(path)


def digests(folder: Path, own_weights: bool) -> dict[str, str]:
    """
    Compute the digests of the adapter and, with `own_weights`, of the weights in `folder`: {relative name: SHA-256}.

    `own_weights` is off if the weights include the whole LLM: reading them twice would double the loading time.
    """
    names = [name for name in _files(folder) if _WEIGHTS.fullmatch(name)]  # not the drafts, which change no output
    return {name: digest(folder / name) for name in names if own_weights or name.startswith(ADAPTER_SUBFOLDER)}


def check_digest(expected: dict[str, str] | None, name: str, path: str) -> None:
    """
    Check a file of a checkpoint against the digests in its `config.json`.

    Args:
        expected: `config.file_digests`; `None` checks nothing.
        name: relative name in the checkpoint.
        path: local path of the file.

    Raises:
        DiffVPCheckpointError: the file is from another save than `config.json`.
    """
    if expected is None:
        return
    if name not in expected:
        raise DiffVPCheckpointError(
            f"{path}: file_digests of config.json: not listed (expected the file to be from the same save)"
        )
    found = digest(path)
    if found != expected[name]:
        raise DiffVPCheckpointError(
            f"{path}: SHA-256: {found} (expected {expected[name]}, as in config.json): the files are from different "
            "saves. Save or download the checkpoint again. If the file was changed on purpose, delete file_digests "
            "from config.json."
        )


def locate_weights(name: str | os.PathLike, **hub_kwargs) -> dict[str, str]:
    """
    Find the weights of a checkpoint, in one file or in shards with an index: {relative name: local path}.

    Raises:
        OSError: there are no weights, or they cannot be downloaded.
        DiffVPCheckpointError: the index names a file outside the checkpoint.
    """
    from transformers.utils.hub import cached_file  # here, because a command checks its checkpoint without it

    def locate(file: str) -> str:
        return cached_file(name, file, **hub_kwargs)  # pyright: ignore[reportReturnType]  # raises; never `None` here

    try:
        return {SAFETENSORS_SINGLE_FILE: locate(SAFETENSORS_SINGLE_FILE)}
    except OSError:  # missing, or the Hub failed
        index = cached_file(name, SAFETENSORS_INDEX_FILE, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
        if index is None:
            raise
    shards = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    if wrong := [shard for shard in shards if not _WEIGHTS.fullmatch(shard)]:
        raise DiffVPCheckpointError(
            f"{index}: weight_map: {wrong} (expected names such as model-00001-of-00002.safetensors)"
        )
    return {SAFETENSORS_INDEX_FILE: index} | {shard: locate(shard) for shard in shards}


def read_weights(files: dict[str, str], keep=lambda key: True) -> dict:
    """Read the tensors whose key satisfies `keep` from the files that [`locate_weights`] found, to the CPU."""
    state = {}
    for name, path in files.items():
        if name.endswith(".safetensors"):
            with safe_open(path, framework="pt") as file:
                state |= {key: file.get_tensor(key) for key in file.keys() if keep(key)}
    return state
