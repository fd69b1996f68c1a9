# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Load a base LLM from a GGUF file: dequantise the weights once, and keep them as safetensors in the user's cache.

    HF_HOME/diffvp/SHA256-DTYPE-transformers-VERSION/    config.json, model.safetensors, fingerprints.json

Dequantising takes longer than the rest of a start. The safetensors are memory-mapped and shared by all processes that
use them. The folder may be deleted at any time.
"""

import contextlib
import functools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights
from transformers.utils import logging

from .adapter_diffvp import fingerprints
from .storage_diffvp import DiffVPCheckpointError, digest, flush, locate_weights

logger = logging.get_logger(__name__)

FINGERPRINTS = "fingerprints.json"
KNOWN_FINGERPRINTS = "_diffvp_fingerprints"  # attribute of a loaded LLM that holds its verified fingerprints


def load_dequantized(path: Path, name: str, dtype: torch.dtype | str | None = None, **kwargs) -> PreTrainedModel:
    """
    Load the LLM in a GGUF file as an ordinary model with dequantised weights.

    Args:
        path: the GGUF file.
        name: name of the base, for the config.
        dtype: type of the weights; `None` and "auto" mean float32.
        kwargs: further arguments of `from_pretrained`.

    Raises:
        OSError: the cached files differ from what was just written.
    """
    if dtype is None or dtype == "auto":
        dtype = torch.float32
    wanted: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    kept = f"{digest(path)}-{str(wanted).removeprefix('torch.')}-transformers-{transformers_version}"
    folder = Path(HF_HOME) / "diffvp" / kept
    found = _identity(folder)
    model = None if found is None else _read(folder, wanted, kwargs)
    if model is None:
        made = _dequantize(path, wanted)
        try:
            _keep(made, folder, damaged=found)
        except OSError as error:
            logger.warning(f"{folder} cannot be written ({error.strerror}): the base LLM is dequantised every time.")
            options = kwargs | {"config": made.config, "state_dict": made.state_dict(), "dtype": wanted}
            return _named(type(made).from_pretrained(None, **options), name)
        del made
        model = _read(folder, wanted, kwargs)
        if model is None:
            raise OSError(f"{folder} differs from what was written: the disk or another program changes it.")
    return _named(model, name)


def _named(model: PreTrainedModel, name: str) -> PreTrainedModel:
    model.config._name_or_path = model.name_or_path = name
    return model.eval()


def _read(folder: Path, dtype: torch.dtype, kwargs: dict) -> PreTrainedModel | None:
    """Load the LLM from the cache; `None` if the files are damaged or missing."""
    try:
        document = json.loads((folder / FINGERPRINTS).read_text(encoding="utf-8"))
        files, expected = document["files"], document["weights"]
        if changed := [file for file in files if digest(folder / file) != files[file]]:
            raise ValueError(f"{changed[0]} has changed")
        options = kwargs | {"dtype": dtype, "local_files_only": True}
        with ThreadPoolExecutor(1) as thread:  # sums beside the building of the model, most of which is Python
            kept = thread.submit(_kept_fingerprints, folder)
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
            found = _fingerprints(model, kept.result())
    except (OSError, ValueError, TypeError, KeyError, SafetensorError, DiffVPCheckpointError) as error:
        logger.warning(f"{folder} is damaged ({error}): it is created again.")
        return None
    wrong = [key for key in found.keys() | expected if found.get(key, "") not in (expected.get(key), None)]
    if wrong:
        logger.warning(f"{folder} is damaged ({len(wrong)} weights): it is created again.")
        return None
    if None not in found.values():  # offloaded weights have no fingerprint
        setattr(model, KNOWN_FINGERPRINTS, found)
    return model


def _kept_fingerprints(folder: Path) -> dict[str, str | None]:
    """
    Return the fingerprints of the weights in the files.

    The model maps the files into memory. Read through that mapping, all weights would stay in memory from now on, also
    while scans are encoded; the mapping used here ends with this function.
    """
    kept = {}
    for path in map(Path, locate_weights(folder).values()):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                kept |= fingerprints({key: file.get_tensor(key) for key in file.keys()})
    return kept


def _fingerprints(model: PreTrainedModel, kept: dict[str, str | None]) -> dict[str, str | None]:
    """Return the fingerprints of the model's weights: those `kept` in the files, or of the weights themselves."""
    state = model.state_dict()
    known = {key: kept[key] for key in state.keys() & kept.keys() if not state[key].is_meta}
    tied = {state[key].data_ptr(): of for key, of in known.items()}
    known |= {
        key: tied[tensor.data_ptr()]
        for key, tensor in state.items()
        if key not in known and not tensor.is_meta and tensor.data_ptr() in tied
    }
    return known | fingerprints({key: tensor for key, tensor in state.items() if key not in known})


def _dequantize(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    with _gguf_read_once():
        loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    # transformers marks a model loaded from GGUF as quantised although its weights are plain tensors, and then refuses
    # to save it. Therefore move the weights into an ordinary model of the same config.
    config: Any = loaded.config
    del config.quantization_config
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return inode and change time, which differ if another folder has replaced this one; `None` if there is none."""
    try:
        status = folder.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_ctime_ns


def _keep(model: PreTrainedModel, folder: Path, damaged: tuple[int, int] | None) -> None:
    """
    Write the files under a temporary name, then rename the folder, so that no process reads partial files.

    Only the folder that was found `damaged` is replaced. If another process has written the folder meanwhile, its
    files are used: they are equivalent, and may already be in use.
    """
    stage = folder.with_name(f".{uuid.uuid4().hex}")
    try:
        model.save_pretrained(stage)
        # Weights are checked by fingerprints, which loading needs anyway: a SHA-256 would take as long as loading.
        files = {path.name: digest(path) for path in stage.glob("*.json")}
        document = {"files": files, "weights": fingerprints(model.state_dict())}
        (stage / FINGERPRINTS).write_text(json.dumps(document), encoding="utf-8")
        for path in (*stage.iterdir(), stage):
            flush(path)
        if damaged is not None and _identity(folder) == damaged:
            aside = folder.with_name(f".{uuid.uuid4().hex}")
            with contextlib.suppress(FileNotFoundError):  # another process has moved it already
                os.rename(folder, aside)
            shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process was faster; other failures show on reading
            os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def _gguf_read_once() -> Iterator[None]:
    """
    Parse a GGUF file and build its table of names only once.

    transformers parses the file twice and builds the table again for each module of the LLM: 8 s of 14 for an LLM with
    135 M parameters.
    """
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
