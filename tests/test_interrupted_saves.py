# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Failed or killed saves leave the old model, the new one, or none that loads, but never a mixture."""

import copy
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from diffvp import storage_diffvp
from diffvp.files import recover_folder, write_folder
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.storage_diffvp import DiffVPCheckpointError

from .marks import slow_except
from .processes import fork

KILLS = int(os.environ.get("DIFFVP_KILLS", "3"))  # per way to save; `make test-kills` sets 50


def content(folder) -> dict[str, bytes] | None:
    """Return the bytes of every weight of the loaded model and its decoding limit; `None` if loading is refused."""
    try:
        model = DiffVPForConditionalGeneration.from_pretrained(folder)
    except (DiffVPCheckpointError, OSError):
        return None
    weights = {name: value.numpy().tobytes() for name, value in model.state_dict().items()}
    return weights | {"limit": str(model.generation_config.max_new_tokens).encode()}


@torch.no_grad()
def changed(model, seed: int):
    """Return the model with changed own modules, adapter and generation config, as after training."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.generation_config.max_new_tokens = seed
    return model


@pytest.fixture
def pair(make_model, tmp_path):
    """Two models on one base, and the contents of their checkpoints."""
    base = make_model(lora=True)
    models = changed(base, 1), changed(base, 2)
    contents = []
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / f"whole-{index}")
        contents.append(content(tmp_path / f"whole-{index}"))
    assert contents[0] != contents[1] and None not in contents
    return models, contents


class Killed(BaseException):
    """Not an Exception: like a kill, it must not be caught."""


@pytest.mark.slow
def test_save_stopped_at_any_file_leaves_no_mixture(pair, tmp_path, monkeypatch):
    """Stop before each single change to the folder in turn, without any clean-up."""
    (old, new), contents = pair
    old.save_pretrained(tmp_path / "old")
    seen, position = [], 0
    finished = False
    while not finished:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "old", folder)
        count = 0

        def stop(change, at=position):
            def changing(*args, **kwargs):
                nonlocal count
                if count == at:
                    raise Killed
                count += 1
                return change(*args, **kwargs)

            return changing

        with monkeypatch.context() as patched:
            for name in ("replace", "unlink"):
                patched.setattr(storage_diffvp.os, name, stop(getattr(os, name)))
            patched.setattr(storage_diffvp.shutil, "rmtree", lambda *args, **kwargs: None)
            try:
                new.save_pretrained(folder)
                finished = True
            except Killed:
                pass
        found = content(folder)
        assert found is None or found in contents, f"a mixture, when killed before change {position}"
        seen.append(None if found is None else contents.index(found))
        position += 1
    assert seen[0] == 0 and seen[-1] == 1 and position > 5


def test_files_are_flushed_before_they_are_renamed(pair, tmp_path, monkeypatch):
    """After a power failure, a renamed file must have its content."""
    folder, events, flushed = tmp_path / "model", [], []
    flush, replace = storage_diffvp.flush, os.replace

    def note_flush(path):
        events.append(("flush", Path(path).name))
        flush(path)

    def note_replace(source, target):
        if Path(target).parent in (folder, folder / "adapter"):
            events.append(("replace", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(storage_diffvp, "flush", note_flush)
    monkeypatch.setattr(storage_diffvp.os, "fsync", flushed.append)
    monkeypatch.setattr(storage_diffvp.os, "replace", note_replace)
    pair[0][0].save_pretrained(folder)
    renamed = [name for kind, name in events if kind == "replace"]
    assert {"model.safetensors", "adapter_model.safetensors"} < set(renamed) and renamed[-1] == "config.json"
    assert all(events.index(("flush", name)) < events.index(("replace", name)) for name in renamed)
    assert events[-1] == ("flush", "model") and len(flushed) == len(events) - len(renamed)


def test_next_save_removes_files_of_a_killed_one(pair, tmp_path):
    (old, new), contents = pair
    old.save_pretrained(tmp_path / "model")
    left = tmp_path / "model" / f"{storage_diffvp.STAGING_PREFIX}0123"
    left.mkdir()
    (left / "config.json").write_text("{}")
    (tmp_path / "model/README.md").write_text("A card.")
    new.save_pretrained(tmp_path / "model")
    assert content(tmp_path / "model") == contents[1]
    assert not left.exists() and (tmp_path / "model/README.md").read_text() == "A card."


def save_in_place(models, folder, ready):
    ready.set()
    while True:
        for model in models:
            model.save_pretrained(folder)


def save_as_the_loop_does(models, folder, ready):
    ready.set()
    while True:
        for model in models:
            write_folder(folder, model.save_pretrained)


def save_as_trainer_does(models, folder, ready):
    arguments = TrainingArguments(output_dir=str(folder.parent / "trainer"), report_to=[], save_strategy="no")
    trainers = [Trainer(model=model, args=arguments) for model in models]
    ready.set()
    while True:
        for trainer in trainers:
            trainer.save_model(str(folder))


def draw_bars(ready):
    with tqdm.get_lock():
        ready.set()
        time.sleep(60)


def test_killed_process_keeps_no_lock_of_progress_bars():
    """Kills hit saves that draw progress bars: this process must still be able to draw its own."""
    locks = tqdm.get_lock().locks
    ready = multiprocessing.get_context("fork").Event()
    process = fork(draw_bars, ready)
    assert ready.wait(60)
    process.kill()
    process.join()
    for lock in locks:
        assert lock.acquire(timeout=5)
        lock.release()


@pytest.mark.parametrize(
    "save", slow_except([save_in_place], [save_in_place, save_as_the_loop_does, save_as_trainer_does])
)
@pytest.mark.timeout(1800)
def test_killed_saves_leave_no_mixture(pair, tmp_path, save):
    """`kill -9` at random moments during back-to-back saves."""
    models, contents = pair
    folder = tmp_path / "model"
    models[0].save_pretrained(folder)
    began = time.monotonic()
    models[1].save_pretrained(folder)
    duration = time.monotonic() - began
    chance, killed, loaded = random.Random(0), 0, 0
    while killed < KILLS or (loaded == 0 and killed < KILLS + 20):  # every kill may hit a moment without a model
        # Forked processes have everything imported, so that kills hit the saves.
        ready = multiprocessing.get_context("fork").Event()
        process = fork(save, models, folder, ready)
        assert ready.wait(120)
        time.sleep(duration * (1 + 3 * chance.random()))
        process.kill()
        process.join()
        killed += 1
        recover_folder(folder)
        found = content(folder)
        assert found is None or found in contents
        loaded += found is not None
    assert loaded > 0, "some of the saves were complete"
    models[1].save_pretrained(folder)
    assert content(folder) == contents[1], "saving to the folder works again"
