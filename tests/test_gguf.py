# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Base LLMs from GGUF files: dequantised once and cached; a damaged cache is never used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from diffvp import gguf_diffvp
from diffvp.adapter_diffvp import fingerprints
from diffvp.bases_diffvp import load_base_model

VOCABULARY, WIDTH, INNER, LAYERS = 96, 64, 96, 2


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """GGUF file of a tiny Llama in Q4_1 and float32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer, rng = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_token_list([f"t{index}" for index in range(VOCABULARY)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        values = rng.normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", VOCABULARY, WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name, *shape in (
            ("attn_norm", WIDTH), ("ffn_norm", WIDTH), ("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH // 2, WIDTH),
            ("attn_v", WIDTH // 2, WIDTH), ("attn_output", WIDTH, WIDTH), ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH), ("ffn_down", WIDTH, INNER),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_diffvp, "HF_HOME", str(tmp_path))
    return tmp_path / "diffvp"


def load(file, **options):
    return load_base_model(str(file.parent), gguf_file=file.name, **options)


def test_weights_equal_those_of_transformers(file, home):
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    for dtype in (torch.float32, torch.bfloat16):
        for _ in ("made", "read"):
            model = load(file, dtype=dtype)
            found = model.state_dict()
            assert found.keys() == expected.keys() and model.dtype == dtype and not model.training
            assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
            assert model.name_or_path == model.config.name_or_path == str(file.parent)
    assert len(list(home.iterdir())) == 2


def test_second_load_does_not_dequantise(file, home, monkeypatch):
    first = load(file)
    monkeypatch.setattr(gguf, "GGUFReader", None)
    second = load(file)
    assert fingerprints(second.state_dict()) == fingerprints(first.state_dict())
    assert getattr(second, gguf_diffvp.KNOWN_FINGERPRINTS) == fingerprints(second.state_dict())


def test_weights_are_checked_without_reading_those_of_the_model(file, home, monkeypatch):
    """Otherwise all of them stay in memory from then on."""
    load(file)
    asked = []
    monkeypatch.setattr(gguf_diffvp, "fingerprints", lambda state: asked.append(state) or fingerprints(state))
    model = load(file)
    pointers = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert sum(map(len, asked)) >= len(set(pointers))
    assert not pointers & {tensor.data_ptr() for state in asked for tensor in state.values()}


def test_folder_deleted_while_it_is_read_is_made_again(file, home, monkeypatch):
    expected = fingerprints(load(file).state_dict())
    [folder] = home.iterdir()
    read, calls = gguf_diffvp.locate_weights, []

    def locate(name):
        calls.append(name)
        if len(calls) == 1:
            shutil.rmtree(folder)
        return read(name)

    monkeypatch.setattr(gguf_diffvp, "locate_weights", locate)
    assert fingerprints(load(file).state_dict()) == expected and len(calls) == 2


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    {
        "a bit of a weight": lambda folder: flip(folder / "model.safetensors", 0.7),
        "the last byte": lambda folder: flip(folder / "model.safetensors", 1.0),
        "a bit of the header": lambda folder: flip(folder / "model.safetensors", 0.001),
        "cut off": lambda folder: os.truncate(folder / "model.safetensors", 30000),
        "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
        "no weights": lambda folder: (folder / "model.safetensors").unlink(),
        "no config": lambda folder: (folder / "config.json").unlink(),
        "another config": lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("10000.0", "10001.0")
        ),
        "another end": lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 3}'),
        "no fingerprints": lambda folder: (folder / "fingerprints.json").unlink(),
        "other fingerprints": lambda folder: (folder / "fingerprints.json").write_text('{"a": "b"}'),
    }.items(),
    ids=lambda damage: damage[0],
)
def test_damaged_cache_is_detected_and_repaired(damage, file, home, monkeypatch, caplog):
    expected = fingerprints(load(file).state_dict())
    [folder] = home.iterdir()
    damage[1](folder)
    warned = []
    monkeypatch.setattr(gguf_diffvp.logger, "warning", warned.append)
    assert fingerprints(load(file).state_dict()) == expected
    assert len(warned) == 1 and "is damaged" in warned[0]
    assert fingerprints(load(file).state_dict()) == expected and len(warned) == 1
    assert [path for path in home.iterdir() if path.name.startswith(".")] == []


def test_unwritable_cache_gives_a_warning(file, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("a file, where a folder should be")
    monkeypatch.setattr(gguf_diffvp, "HF_HOME", str(tmp_path / "home"))
    warned = []
    monkeypatch.setattr(gguf_diffvp.logger, "warning", warned.append)
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).state_dict()
    found = load(file).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected) and found.keys() == expected.keys()
    assert len(warned) == 1 and "cannot be written" in warned[0]


def test_cache_written_meanwhile_by_another_process_is_kept(file, home, monkeypatch):
    """Another process may be reading its cache."""
    load(file)
    [made] = home.iterdir()
    inode = made.stat().st_ino
    aside = made.rename(home.parent / "aside")
    read = gguf.GGUFReader

    def read_slowly(*args):
        aside.rename(made)
        return read(*args)

    monkeypatch.setattr(gguf, "GGUFReader", read_slowly)
    load(file)
    assert [folder.stat().st_ino for folder in home.iterdir()] == [inode]


@pytest.mark.slow
def test_concurrent_processes_share_the_cache(file, tmp_path):
    """Each process writes the cache or reads another's; none reads a partial one."""
    code = (
        "from diffvp.bases_diffvp import load_base_model\n"
        "from diffvp.adapter_diffvp import fingerprints\n"
        f"model = load_base_model({str(file.parent)!r}, gguf_file={file.name!r})\n"
        "print(sorted(fingerprints(model.state_dict()).items()))"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path), "TQDM_DISABLE": "1"}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], results
    assert len({out for out, _ in results}) == 1
    assert len(list((tmp_path / "diffvp").iterdir())) == 1
