# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
A base LLM out of a GGUF file: its weights are dequantised once, and kept as safetensors in the user's cache.

    HF_HOME/diffvp/SHA256-DTYPE-transformers-VERSION/    config.json, model.safetensors, fingerprints.json

Dequantising takes longer than everything else of a start; the safetensors are mapped into memory, and shared by all
processes that use them. The folder may be deleted at any time.
"""

import contextlib
import functools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .adapter_diffvp import fingerprints
from .storage_diffvp import digest, flush

logger = logging.get_logger(__name__)

FINGERPRINTS = "fingerprints.json"
KNOWN_FINGERPRINTS = "_diffvp_fingerprints"  # where a loaded LLM has those that it was checked by


def load_dequantized(path: Path, name: str, dtype: torch.dtype | str | None = None, **kwargs) -> PreTrainedModel:
    """
    The LLM in a GGUF file as an ordinary one.

    Args:
        name: the base's, for its config.
        dtype: float32 unless it is said.
        kwargs: more of `from_pretrained`.
    """
    dtype = torch.float32 if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    kept = f"{digest(path)}-{str(dtype).removeprefix('torch.')}-transformers-{transformers_version}"
    folder = Path(HF_HOME) / "diffvp" / kept
    found = _identity(folder)
    model = None if found is None else _read(folder, dtype, kwargs)
    if model is None:
        made = _dequantize(path, dtype)
        try:
            _keep(made, folder, damaged=found)
        except OSError as error:
            logger.warning(f"{folder} is not written ({error.strerror}): the base LLM is dequantised at each start.")
            options = kwargs | {"config": made.config, "state_dict": made.state_dict(), "dtype": dtype}
            return _named(type(made).from_pretrained(None, **options), name)
        del made
        model = _read(folder, dtype, kwargs)
        if model is None:
            raise OSError(f"{folder} is not read as it was written: the disk, or another program, changes it.")
    return _named(model, name)


def _named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    model.config._name_or_path = model.name_or_path = name
    return model.eval()


def _read(folder: Path, dtype: torch.dtype, kwargs: dict) -> PreTrainedModel | None:
    """`None` if the files are damaged or gone."""
    try:
        document = json.loads((folder / FINGERPRINTS).read_text(encoding="utf-8"))
        files, expected = document["files"], document["weights"]
        if changed := [file for file in files if digest(folder / file) != files[file]]:
            raise ValueError(f"{changed[0]} has changed")
        options = kwargs | {"dtype": dtype, "local_files_only": True}
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        logger.warning(f"{folder} is damaged ({error}): it is made anew.")
        return None
    found = fingerprints(model.state_dict())
    wrong = [key for key in found.keys() | expected if found.get(key, "") not in (expected.get(key), None)]
    if wrong:
        logger.warning(f"{folder} is damaged ({len(wrong)} weights): it is made anew.")
        return None
    if None not in found.values():  # a part that is offloaded has none
        setattr(model, KNOWN_FINGERPRINTS, found)
    return model


def _dequantize(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    with _gguf_read_once():
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # transformers marks a model read from GGUF as quantised although its weights are plain tensors, and then refuses
    # to save it: move the weights into an ordinary model of the same config.
    config = loaded.config
    del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another that has taken its place; `None` if there is none."""
    try:
        status = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_ctime_ns


def _keep(model: PreTrainedModel, folder: Path, damaged: tuple[int, int] | None) -> None:
    """
    Write the files under another name first, so that no process reads a half. One that was faster is as good: only the
    folder that was found `damaged` is replaced, for another process may read what has taken its place.
    """
    stage = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        model.save_pretrained(stage)
        # Weights by a sum that is made anyway when a model is loaded: a digest of them would take as long as loading.
        files = {path.name: digest(path) for path in stage.glob("*.json")}
        document = {"files": files, "weights": fingerprints(model.state_dict())}
        (stage / FINGERPRINTS).write_text(json.dumps(document), encoding="utf-8")
        for path in (*stage.iterdir(), stage):
            flush(path)
        if damaged is not None and _identity(folder) == damaged:
            aside = folder.with_name(f".{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):  # another process was as quick
                os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was quicker; if it was not, nothing can be read
            os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """transformers parses a GGUF file twice, and makes the table of its names anew for each module of the LLM: 8 s of
    14 for one of 135 M parameters."""
    import gguf

    originals = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    try:
        for name, original in originals.items():
            setattr(gguf, name, functools.cache(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)


__all__ = ["load_dequantized"]
