# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Provenance contains no paths of the machine that wrote it.

Reports are tested in test_reporting.py, results for hospitals in test_clinical.py.
"""

import json
from pathlib import Path

import pytest
import transformers
from huggingface_hub import ModelCard

from diffvp.files import write_texts
from diffvp.hub import card as card_module
from diffvp.hub.card import PHANTOM, make_card
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.pipeline_diffvp import DiffVPPipeline
from diffvp.processing_diffvp import DiffVPProcessor
from diffvp.provenance import without_place
from diffvp.storage_diffvp import DiffVPCheckpointError

from .batch_samples import write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path_factory):
    """Write a checkpoint whose base is a folder of this machine."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return write_checkpoint(folder, tiny_base_with_tokenizer, tokenizer, tiny_fields)


@pytest.fixture
def named(checkpoint, tiny_base_with_tokenizer, tmp_path):
    """Return model and processor; the base has a name on the Hub but is read from a folder of this machine."""
    model = DiffVPForConditionalGeneration.from_pretrained(checkpoint)
    model.config.base_model_name_or_path = "somebody/tiny-llama"
    model.save_pretrained(tmp_path / "named")
    base = {"base_model_name_or_path": str(tiny_base_with_tokenizer)}
    return (
        DiffVPForConditionalGeneration.from_pretrained(tmp_path / "named", **base),
        DiffVPProcessor.from_pretrained(checkpoint),
    )


@pytest.fixture
def uploads(monkeypatch, tmp_path):
    """Record what `push_to_hub` would upload: {path: content} for each push."""
    kept = []

    class Api:
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, *, operations, **_):
            kept.append({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})

    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: Api())
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: ModelCard("# A card"))
    return kept


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def naming(files: dict[str, bytes], place: Path) -> list[str]:
    """Return the names of the files that contain the path of a folder."""
    return [name for name, content in files.items() if str(place).encode() in content]


def test_self_contained_checkpoint_contains_no_local_path(checkpoint, tiny_base_with_tokenizer, tmp_path, uploads):
    model = DiffVPForConditionalGeneration.from_pretrained(checkpoint)
    model.export_merged(tmp_path / "merged")
    DiffVPProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "merged")
    assert not naming(files_of(tmp_path / "merged"), tiny_base_with_tokenizer.parent)
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["text_config"]["_name_or_path"] == tiny_base_with_tokenizer.name
    DiffVPForConditionalGeneration.from_pretrained(tmp_path / "merged").push_to_hub("somebody/tiny")
    [uploaded] = uploads
    assert {"config.json", "model.safetensors"} <= uploaded.keys()
    assert not [place for place in (tmp_path, tiny_base_with_tokenizer.parent) if naming(uploaded, place)]


def test_base_from_the_hub_is_saved_under_its_hub_name(named, tiny_base_with_tokenizer, checkpoint, tmp_path, uploads):
    model, processor = named
    model.save_pretrained(tmp_path / "saved")
    model.push_to_hub("somebody/tiny")
    processor.push_to_hub("somebody/tiny")
    DiffVPPipeline(model=model, processor=processor, device="cpu").push_to_hub("somebody/tiny")
    model.save_pretrained(tmp_path / "pushed", push_to_hub=True, repo_id="somebody/tiny")
    assert len(uploads) >= 4 and "adapter/adapter_config.json" in uploads[0]
    for files in (files_of(tmp_path / "saved"), *uploads):
        for place in (tiny_base_with_tokenizer.parent, checkpoint.parent, tmp_path):
            assert not naming(files, place)


def test_base_that_exists_only_locally_is_not_pushed(checkpoint, tiny_base_with_tokenizer, tmp_path, uploads):
    """Its path must not be published, although the checkpoint on this machine needs it."""
    model = DiffVPForConditionalGeneration.from_pretrained(checkpoint)
    pushes = [
        lambda: model.push_to_hub("somebody/tiny"),
        lambda: model.save_pretrained(tmp_path / "saved", push_to_hub=True),
    ]
    for push in pushes:
        with pytest.raises(DiffVPCheckpointError) as error:
            push()
        assert "base_model_name_or_path: a folder of this machine" in str(error.value)
        assert str(tiny_base_with_tokenizer.parent) not in str(error.value)
    assert not uploads
    assert DiffVPForConditionalGeneration.from_pretrained(tmp_path / "saved")


def test_card_contains_no_local_path(checkpoint, tiny_base_with_tokenizer, monkeypatch):
    shown = {"report": "Lung: clear.", "truth": "Lung: a nodule.", "reference": "normal_1", "complete": True}
    findings = {"hit": [], "missed": ["Lung nodule"], "false": []}
    monkeypatch.setattr(card_module, "demo_report", lambda _: shown | {"findings": findings})
    card = str(make_card(checkpoint, PHANTOM))
    assert f"read from `{tiny_base_with_tokenizer.name}`" in card
    assert str(tiny_base_with_tokenizer.parent) not in card and str(checkpoint.parent) not in card


def test_commands_in_results_contain_no_local_path(tmp_path):
    """`diffvp evaluate` records its command, which is copied to the card and evaluation.json."""
    assert without_place("experiments/results") == "experiments/results"
    assert without_place(Path("runs") / "a") == "runs/a"
    assert without_place(tmp_path / "results") == "results"


def test_files_of_a_result_are_replaced_together(tmp_path):
    write_texts(tmp_path, {"result.json": "1", "result.md": "one"})
    with pytest.raises(UnicodeEncodeError):
        write_texts(tmp_path, {"result.json": "2", "result.md": "\ud800"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"result.json": "1", "result.md": "one"}
