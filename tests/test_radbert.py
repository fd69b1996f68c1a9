# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The RadBERT labeler with small random weights in the published layout, against a RoBERTa written out below."""

import hashlib
import logging
import math
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from torch.nn import functional as F
from transformers import AutoTokenizer, BertConfig, RobertaConfig, RobertaForSequenceClassification, RobertaTokenizer

from diffvp.labels_diffvp import DIAGNOSIS_LABELS
from diffvp.metrics.labelers import RadBertError
from diffvp.metrics.labelers.radbert import (
    MAX_TOKENS,
    POSITION_IDS,
    RadBertClassifier,
    RadBertLabeler,
    convert_radbert,
)

HEADS, LAYERS, WIDTH = 2, 2, 16
REPORTS = [
    "Trachea and both main bronchi are open. No pleural effusion was detected.",
    "",
    "Cardiomegaly. Pericardial Effusion measuring 12 mm.",
    "A nodule of 4.6 mm in the right lung; emphysema in both lungs. " * 3,
    "Bilateral pleural effusion — plörâl efüzyon ≥ 2 cm.",
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Make a folder like zzxslp/RadBERT-RoBERTa-4m without weights: a tiny configuration and a byte-level BPE."""
    folder = tmp_path_factory.mktemp("encoder")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [*REPORTS, *DIAGNOSIS_LABELS],
        vocab_size=320,
        min_frequency=1,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        show_progress=False,
    )
    bpe.save_model(str(folder))
    tokenizer = RobertaTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=24,
        max_position_embeddings=MAX_TOKENS + 2,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def state(encoder):
    """Draw random weights with the published names, large enough that the labels differ between reports."""
    torch.manual_seed(0)
    model = RadBertClassifier(RobertaConfig.from_pretrained(encoder))

    def draw(name, value):
        if name.endswith("bias"):
            return torch.randn_like(value) * 0.1
        return 1 + torch.randn_like(value) * 0.1 if "LayerNorm" in name else torch.randn_like(value) * 0.5

    return {name: draw(name, value) for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def published(state, tmp_path_factory):
    """Save RadBertClassifier.pth as an older transformers did, with the buffer of positions."""
    path = tmp_path_factory.mktemp("published") / "RadBertClassifier.pth"
    torch.save({POSITION_IDS: torch.arange(MAX_TOKENS + 2)[None], **state}, path)
    return path


@pytest.fixture(scope="module")
def converted(published, encoder, tmp_path_factory):
    return convert_radbert(published, encoder, tmp_path_factory.mktemp("converted") / "radbert")


@pytest.fixture(scope="module")
def labeler(converted):
    return RadBertLabeler.from_pretrained(converted, batch_size=2)


def oracle_logits(state, ids, padded_to):
    """Compute the logits (18,) of one report in plain torch, padded to a length as in the published code."""
    tokens = torch.tensor(ids + [1] * (padded_to - len(ids)))
    real = tokens != 1
    positions = torch.where(real, torch.cumsum(real, 0) + 1, 1)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    root = "model.embeddings."
    x = state[root + "word_embeddings.weight"][tokens] + state[root + "position_embeddings.weight"][positions]
    x = norm(x + state[root + "token_type_embeddings.weight"][0], root + "LayerNorm")
    for layer in range(LAYERS):
        name = f"model.encoder.layer.{layer}."
        query, key, value = (
            linear(x, f"{name}attention.self.{part}").view(padded_to, HEADS, -1).transpose(0, 1)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(1, 2) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(~real, -torch.inf)
        mixed = (torch.softmax(scores, -1) @ value).transpose(0, 1).reshape(padded_to, WIDTH)
        x = norm(x + linear(mixed, name + "attention.output.dense"), name + "attention.output.LayerNorm")
        hidden = F.gelu(linear(x, name + "intermediate.dense"))
        x = norm(x + linear(hidden, name + "output.dense"), name + "output.LayerNorm")
    return linear(torch.tanh(linear(x[0], "model.pooler.dense")), "classifier")


def oracle_probabilities(state, encoder, reports):
    """Follow the published code: `do_lower_case`, every text padded to 512 tokens, sigmoid in NumPy."""
    tokenizer = AutoTokenizer.from_pretrained(encoder, do_lower_case=True)
    logits = []
    for report in reports:
        ids = tokenizer(report, truncation=True, max_length=MAX_TOKENS)["input_ids"]
        logits.append(oracle_logits(state, ids, MAX_TOKENS))
    return 1 / (1 + np.exp(-torch.stack(logits).numpy().astype(np.float64)))


def test_probabilities_and_labels_match_the_published_procedure(labeler, state, encoder):
    # Five reports in batches of two: the last batch has one.
    expected = oracle_probabilities(state, encoder, REPORTS)
    probabilities = labeler.probabilities(REPORTS)
    assert probabilities.shape == (5, 18)
    np.testing.assert_allclose(probabilities, expected, atol=2e-5)
    labels = labeler.label_all(REPORTS)
    assert labels.dtype == np.int8
    np.testing.assert_array_equal(labels, expected >= 0.5)
    assert 0 < labels.mean() < 1 and len({tuple(row) for row in labels}) > 1  # the labels differ between reports


def test_dynamic_padding_gives_the_logits_of_padding_to_512(labeler):
    together = labeler.tokenizer(REPORTS, padding="longest", return_tensors="pt")
    to_512 = labeler.tokenizer(REPORTS, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    assert together["input_ids"].shape[1] < to_512["input_ids"].shape[1] == MAX_TOKENS
    with torch.inference_mode():
        short, long = (labeler.model(batch["input_ids"], batch["attention_mask"]) for batch in (together, to_512))
    torch.testing.assert_close(short, long, atol=1e-5, rtol=1e-5)


def test_order_and_batch_size_do_not_change_probabilities(labeler, converted):
    expected = labeler.probabilities(REPORTS)
    np.testing.assert_allclose(labeler.probabilities(REPORTS[::-1])[::-1], expected, atol=1e-6)
    for batch_size in (1, 3, 64):
        other = RadBertLabeler.from_pretrained(converted, batch_size=batch_size)
        np.testing.assert_allclose(other.probabilities(REPORTS), expected, atol=1e-6)


def test_lower_case_option_of_the_published_code_does_nothing(encoder):
    text = "Pericardial EFFUSION."
    plain = AutoTokenizer.from_pretrained(encoder)
    lower = AutoTokenizer.from_pretrained(encoder, do_lower_case=True)
    assert lower(text)["input_ids"] == plain(text)["input_ids"] != plain(text.lower())["input_ids"]


def test_long_reports_are_truncated_with_a_warning(labeler, state, encoder, caplog):
    head = "nodule " * 600
    counts = labeler.token_counts([head, REPORTS[0], ""])
    assert counts[0] > MAX_TOKENS and counts[1] < MAX_TOKENS and counts[2] == 2
    with caplog.at_level(logging.WARNING):
        probabilities = labeler.probabilities([head + "effusion", REPORTS[0], head + "emphysema"])
    assert "2 of 3 reports have more than 512 tokens" in caplog.text
    np.testing.assert_allclose(probabilities[0], probabilities[2], atol=1e-6)  # they differ only after the cut
    np.testing.assert_allclose(probabilities[0], oracle_probabilities(state, encoder, [head])[0], atol=2e-5)
    caplog.clear()
    labeler.probabilities(REPORTS)
    assert not caplog.text


def test_report_of_exactly_512_tokens_is_not_truncated(labeler, caplog):
    # One token per piece, and one special token at each end.
    piece = next(token for token in labeler.tokenizer.get_vocab() if token.startswith("Ġno"))
    text = piece.replace("Ġ", " ") * (MAX_TOKENS - 2)
    assert labeler.token_counts([text, text + piece.replace("Ġ", " ")]).tolist() == [MAX_TOKENS, MAX_TOKENS + 1]
    with caplog.at_level(logging.WARNING):
        labeler.probabilities([text])
    assert not caplog.text


def test_threshold_includes_one_half(labeler, converted):
    undecided = RadBertLabeler.from_pretrained(converted)
    torch.nn.init.zeros_(undecided.model.classifier.weight)
    torch.nn.init.zeros_(undecided.model.classifier.bias)
    assert (undecided.probabilities(REPORTS[:1]) == 0.5).all()
    assert undecided.label_all(REPORTS[:1]).all()


def test_empty_list_is_accepted_and_non_text_is_refused(labeler):
    assert labeler.label_all([]).shape == (0, 18)
    assert labeler.token_counts([]).shape == (0,)
    with pytest.raises(TypeError, match=r"reports\[1\] is float: every report must be text"):
        labeler.label_all(["a", float("nan")])
    with pytest.raises(ValueError, match=r"batch_size: 0 \(expected"):
        RadBertLabeler(labeler.model, labeler.tokenizer, batch_size=0)


# Conversion and loading


def test_signature_names_the_weights(labeler, converted):
    digest = hashlib.sha256((converted / "model.safetensors").read_bytes()).hexdigest()
    assert labeler.signature == f"radbert|labels:18|threshold:0.5|cut:512|weights:{digest[:12]}"


def test_conversion_keeps_every_weight_and_drops_the_positions(converted, state):
    saved = load_file(converted / "model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    assert RobertaConfig.from_pretrained(converted).id2label == dict(enumerate(DIAGNOSIS_LABELS))
    assert not list(converted.parent.glob(".*"))  # no temporary file is left
    assert {path.suffix for path in converted.iterdir()} <= {".safetensors", ".json", ".txt"}


def test_conversion_command_writes_the_same_weights(published, encoder, converted, tmp_path, monkeypatch):
    """`python -m diffvp.metrics.labelers.radbert`."""
    target = tmp_path / "radbert"
    monkeypatch.setattr(sys, "argv", ["radbert", str(published), str(encoder), str(target)])
    monkeypatch.delitem(sys.modules, "diffvp.metrics.labelers.radbert")  # a new process has not imported it
    runpy.run_module("diffvp.metrics.labelers.radbert", run_name="__main__")
    assert (target / "model.safetensors").read_bytes() == (converted / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("classifier.bias"), r"1 weight\(s\) missing: classifier.bias"),
        (lambda s: s.update({"model.extra.weight": torch.ones(1)}), r"1 weight\(s\) unexpected: model.extra.weight"),
        (
            lambda s: s.update({"classifier.weight": torch.ones(20, WIDTH), "classifier.bias": torch.ones(20)}),
            r"2 weight\(s\) of another shape: classifier.bias \(20,\) instead of \(18,\), classifier.weight \(20",
        ),
        (lambda s: s.update({"epoch": 3}), "holds no weights by name"),
        (lambda s: [s.pop(key) for key in list(s) if "encoder" in key], r"32 weight\(s\) missing: .*, \.\.\.$"),
    ],
)
def test_weights_of_another_model_are_refused(change, message, state, encoder, tmp_path):
    changed = dict(state)
    change(changed)
    torch.save(changed, tmp_path / "other.pth")
    with pytest.raises(RadBertError, match=message):
        convert_radbert(tmp_path / "other.pth", encoder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pickle_that_would_run_code_is_refused(encoder, tmp_path):
    torch.save(RadBertClassifier(RobertaConfig.from_pretrained(encoder)), tmp_path / "module.pth")
    with pytest.raises(RadBertError, match="module.pth cannot be read as weights"):
        convert_radbert(tmp_path / "module.pth", encoder, tmp_path / "out")
    (tmp_path / "text.pth").write_text("not weights")
    for name in ("text.pth", "absent.pth"):
        with pytest.raises(RadBertError, match=f"{name} cannot be read as weights"):
            convert_radbert(tmp_path / name, encoder, tmp_path / "out")


def test_existing_target_is_not_overwritten(published, encoder, tmp_path):
    with pytest.raises(RadBertError, match="exists already"):
        convert_radbert(published, encoder, tmp_path)


def test_encoder_of_another_type_or_size_is_refused(published, encoder, tmp_path):
    def variant(name, config):
        folder = tmp_path / name
        AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
        config.save_pretrained(folder)
        return folder

    config = RobertaConfig.from_pretrained(encoder)
    fewer = RobertaConfig.from_pretrained(encoder, vocab_size=100)
    shorter = RobertaConfig.from_pretrained(encoder, max_position_embeddings=512)
    for folder, message in (
        (variant("bert", BertConfig(hidden_size=16)), "type bert, expected roberta"),
        (variant("fewer", fewer), rf"tokenizer has {config.vocab_size} tokens .* configuration says 100"),
        (variant("shorter", shorter), "at most 510 tokens"),
        (tmp_path / "absent", "no configuration and tokenizer"),
    ):
        with pytest.raises(RadBertError, match=message):
            convert_radbert(published, folder, tmp_path / "out")


def test_damaged_folders_are_refused(converted, encoder, state, tmp_path):
    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for path in converted.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return folder

    folder = copy("lacking")
    save_file(
        {name: value for name, value in state.items() if name != "classifier.weight"}, folder / "model.safetensors"
    )
    with pytest.raises(RadBertError, match=r"missing: classifier.weight"):
        RadBertLabeler.from_pretrained(folder)
    folder = copy("cut")
    (folder / "model.safetensors").write_bytes((converted / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(RadBertError, match="cannot be read"):
        RadBertLabeler.from_pretrained(folder)
    folder = copy("relabelled")
    RobertaConfig.from_pretrained(folder, id2label=dict(enumerate(DIAGNOSIS_LABELS[::-1]))).save_pretrained(folder)
    with pytest.raises(RadBertError, match="expected the 18 in order"):
        RadBertLabeler.from_pretrained(folder)
    with pytest.raises(RadBertError, match="no configuration and tokenizer"):
        RadBertLabeler.from_pretrained(tmp_path / "absent")


# The Hub's layout


@pytest.fixture(scope="module")
def hub_folder(state, encoder, tmp_path_factory):
    """Make a folder like IAMJB/RadBERT-CT: the same weights, saved by RobertaForSequenceClassification itself."""
    folder = tmp_path_factory.mktemp("hub") / "RadBERT-CT"
    config = RobertaConfig.from_pretrained(encoder, num_labels=18, problem_type="multi_label_classification")
    model = RobertaForSequenceClassification(config)
    names = {name: name.replace("model.", "roberta.", 1) for name in state if name.startswith("model.")}
    names |= {f"model.pooler.dense.{kind}": f"classifier.dense.{kind}" for kind in ("weight", "bias")}
    names |= {f"classifier.{kind}": f"classifier.out_proj.{kind}" for kind in ("weight", "bias")}
    model.load_state_dict({names[name]: tensor for name, tensor in state.items()})
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    return folder


def test_both_layouts_give_the_same_labels(labeler, hub_folder):
    hub = RadBertLabeler.from_pretrained(hub_folder, batch_size=2)
    np.testing.assert_allclose(hub.probabilities(REPORTS), labeler.probabilities(REPORTS), atol=1e-6)
    np.testing.assert_array_equal(hub.label_all(REPORTS), labeler.label_all(REPORTS))
    # The logits also equal those of transformers' own class.
    batch = hub.tokenizer(REPORTS, padding="longest", return_tensors="pt")
    theirs = RobertaForSequenceClassification.from_pretrained(hub_folder).eval()
    with torch.inference_mode():
        expected = theirs(**batch).logits
        for one in (hub, labeler):
            logits = one.model(batch["input_ids"], batch["attention_mask"])
            torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)


def test_hub_id_is_loaded_from_the_hub_cache(hub_folder, labeler, tmp_path, monkeypatch):
    cache, commit = tmp_path / "hub", "0" * 40
    repository = cache / "models--IAMJB--RadBERT-CT"
    shutil.copytree(hub_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for module in ("huggingface_hub.constants", "transformers.utils.hub"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache), raising=False)
    for revision in (None, commit):
        hub = RadBertLabeler.from_pretrained("IAMJB/RadBERT-CT", revision=revision)
        np.testing.assert_array_equal(hub.label_all(REPORTS), labeler.label_all(REPORTS))
    with pytest.raises(RadBertError):
        RadBertLabeler.from_pretrained("IAMJB/absent")


def test_hub_pickle_is_converted_but_never_loaded_directly(hub_folder, labeler, encoder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(hub_folder, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    positions = {"roberta.embeddings.position_ids": torch.arange(MAX_TOKENS + 2)[None]}
    torch.save(weights | positions, folder / "pytorch_model.bin")
    with pytest.raises(RadBertError, match="model.safetensors"):
        RadBertLabeler.from_pretrained(folder)
    converted = convert_radbert(folder / "pytorch_model.bin", encoder, tmp_path / "converted")
    labels = RadBertLabeler.from_pretrained(converted).label_all(REPORTS)
    np.testing.assert_array_equal(labels, labeler.label_all(REPORTS))


def test_hub_folder_with_other_labels_or_weights_is_refused(hub_folder, tmp_path):
    def copy(name):
        return Path(shutil.copytree(hub_folder, tmp_path / name))

    folder = copy("reordered")
    RobertaConfig.from_pretrained(folder, id2label=dict(enumerate(DIAGNOSIS_LABELS[::-1]))).save_pretrained(folder)
    with pytest.raises(RadBertError, match="expected the 18 in order"):
        RadBertLabeler.from_pretrained(folder)
    folder = copy("fewer")
    RobertaConfig.from_pretrained(folder, num_labels=2).save_pretrained(folder)
    with pytest.raises(RadBertError, match="expected the 18 in order"):
        RadBertLabeler.from_pretrained(folder)
    weights = load_file(hub_folder / "model.safetensors")
    for name, change, message in (
        ("lacking", lambda of: of.pop("classifier.out_proj.bias"), "missing: classifier.bias"),
        ("beyond", lambda of: of.update({"lm_head.bias": torch.zeros(1)}), "unexpected: lm_head.bias"),
        ("twice", lambda of: of.update({"classifier.weight": torch.zeros(18, WIDTH)}), "in both layouts"),
    ):
        folder, changed = copy(name), dict(weights)
        change(changed)
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RadBertError, match=message):
            RadBertLabeler.from_pretrained(folder)
