# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Round trips of every kind of adapter and of LLMs changed from their base: loaded models have the saved logits."""

import copy
import json

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig

from diffvp.adapter_diffvp import fingerprints
from diffvp.benchmarks.round_trip import logits, move_adapter, round_trip
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.storage_diffvp import DiffVPCheckpointError
from diffvp.tests.base_families import write_base_with_own_code

from .marks import slow_except

load = DiffVPForConditionalGeneration.from_pretrained
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BASES = {
    "tied": LlamaConfig(vocab_size=96, tie_word_embeddings=True, **SIZES, **TOKENS),
    "untied": LlamaConfig(vocab_size=96, tie_word_embeddings=False, **SIZES, **TOKENS),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, **TOKENS),
    "experts": MixtralConfig(vocab_size=96, num_key_value_heads=2, num_local_experts=4, **SIZES, **TOKENS),
}
TARGETS = {"gpt2": ["c_attn"]}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    for name, config in BASES.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # large enough that a lost weight shows in the logits
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def inputs(scans):
    return {"ct": scans[0], "reference": scans[1], "input_ids": torch.tensor([[1, 40, 41, 50, 51, 2]] * 2)}


@pytest.fixture
def make(bases, tiny_fields):
    """`make(base, adapter=None)`: a tiny model whose adapter weights are moved as if trained."""

    def make(base: str, adapter=None) -> DiffVPForConditionalGeneration:
        torch.manual_seed(0)
        model = DiffVPForConditionalGeneration.from_base(
            str(bases / base), lora_config=copy.deepcopy(adapter), config=tiny_fields
        )
        move_adapter(model, seed=5)
        return model

    return make


def lora(base="tied", **options):
    return LoraConfig(**{"r": 2, "target_modules": TARGETS.get(base, ["q_proj", "v_proj"]), **options})


KINDS = {
    "head, tied": ("tied", lora(target_modules=["q_proj", "lm_head"])),
    "head and embeddings, tied": ("tied", lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embeddings trained whole, tied": ("tied", lora(modules_to_save=["embed_tokens"])),
    "head and norm trained whole": ("untied", lora(modules_to_save=["lm_head", "norm"])),
    "single tokens, tied": ("tied", lora(trainable_token_indices=[5, 40, 41])),
    "DoRA": ("untied", lora(use_dora=True, use_rslora=True)),
    "ranks of their own": ("tied", lora(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 5})),
    "PiSSA, which changes the base": ("tied", lora(init_lora_weights="pissa")),
    "biases of the base": ("gpt2", lora("gpt2", bias="lora_only", fan_in_fan_out=True)),
    "experts": ("experts", lora(target_modules="all-linear")),
    "IA3": ("tied", IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "norms": ("tied", LNTuningConfig(target_modules=["norm"])),
}


FAST = "head, tied", "single tokens, tied", "PiSSA, which changes the base", "biases of the base", "experts", "IA3"


@pytest.mark.parametrize("kind", slow_except(FAST, KINDS))
def test_adapter_survives_every_round_trip(make, inputs, tmp_path, kind):
    base, adapter = KINDS[kind]
    model = make(base, adapter)
    assert (logits(model, inputs) - logits(make(base), inputs)).abs().max() > 1e-2, "the adapter changes the logits"
    differences = round_trip(model, inputs, tmp_path, lora(base))
    assert all(isinstance(value, float) and value <= 1e-5 for value in differences.values()), differences
    # The base is saved by name only while the adapter is the sole difference from it.
    changes_base = kind.startswith(("PiSSA", "biases"))
    config = json.loads((tmp_path / "saved/config.json").read_text())
    assert (config["base_model_name_or_path"] is None) == changes_base


def test_failed_merge_leaves_the_model_unchanged(make, inputs, monkeypatch):
    from peft.tuners.lora import layer

    model = make("tied", lora(target_modules=["q_proj", "lm_head"]))
    expected, names = logits(model, inputs), set(model.state_dict())
    delta = layer.Linear.get_delta_weight
    monkeypatch.setattr(layer.Linear, "get_delta_weight", lambda self, adapter: 2 * delta(self, adapter))
    with pytest.raises(DiffVPCheckpointError, match="logits differ by"):
        model.merge_adapter()
    monkeypatch.setattr(layer.Linear, "get_delta_weight", lambda self, adapter: 1 / 0)
    with pytest.raises(DiffVPCheckpointError, match="ZeroDivisionError"):
        model.merge_adapter()
    monkeypatch.undo()
    assert torch.equal(logits(model, inputs), expected) and set(model.state_dict()) == names
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, atol=1e-5, rtol=1e-5)


def second_adapter(model):
    model.language_model.add_adapter(lora(), "other")


def merged_in_place(model):
    for module in model.language_model.modules():
        if hasattr(module, "merge") and hasattr(module, "base_layer"):
            module.merge()


def from_outside(model):
    from peft import get_peft_model

    get_peft_model(model.language_model, lora())


@pytest.mark.parametrize(
    "spoil", [lambda model: model.language_model.disable_adapters(), second_adapter, merged_in_place, from_outside]
)
def test_save_and_merge_require_exactly_one_active_adapter(make, inputs, tmp_path, spoil):
    model = make("tied", None if spoil is from_outside else lora())
    spoil(model)
    expected = logits(model, inputs)
    for act in (model.save_pretrained, model.export_merged, lambda folder: model.merge_adapter()):
        with pytest.raises(DiffVPCheckpointError):
            act(tmp_path / "model")
        assert not (tmp_path / "model").exists()
    assert torch.equal(logits(model, inputs), expected)


def test_adapter_that_repeats_layers_is_refused_before_training_and_before_saving(make, tmp_path):
    repeating = lora(layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(DiffVPCheckpointError, match="layer_replication"):
        make("untied", repeating)
    model = make("untied")
    model.language_model.add_adapter(copy.deepcopy(repeating))
    for act in (model.save_pretrained, model.export_merged):
        before = dict(vars(model.config))
        with pytest.raises(DiffVPCheckpointError, match="layer_replication"):
            act(tmp_path / "model")
        assert not (tmp_path / "model").exists() and vars(model.config) == before


def test_missing_adapter_weight_is_refused(make, tmp_path):
    from safetensors.torch import save_file

    make("untied", lora(use_dora=True)).save_pretrained(tmp_path / "model")
    path = tmp_path / "model/adapter/adapter_model.safetensors"
    state = load_file(path)
    lost = next(name for name in state if "magnitude" in name)
    save_file({name: value for name, value in state.items() if name != lost}, path)
    with pytest.raises(DiffVPCheckpointError, match="SHA-256: "):
        load(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "file_digests": None}))
    with pytest.raises(DiffVPCheckpointError, match=f"1 weight.* missing: {lost.removeprefix('base_model.model.')}"):
        load(tmp_path / "model")


def test_adapter_from_another_save_is_refused(make, tmp_path):
    import shutil

    one, other = make("tied", lora()), make("tied", lora())
    move_adapter(other, seed=9)
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(tmp_path / "other/adapter", tmp_path / "one/adapter", dirs_exist_ok=True)
    with pytest.raises(DiffVPCheckpointError, match="from different saves"):
        load(tmp_path / "one")


# LLMs that differ from their base


@torch.no_grad()
def train_one_norm(model):
    model.language_model.model.norm.weight.data[0] += 0.5  # `.data` bypasses the version counter


def rounded(model):
    for parameter in model.language_model.parameters():
        parameter.data = parameter.data.bfloat16().float()


def untie(model):
    head = torch.nn.Linear(32, 96, bias=False)
    model.language_model.lm_head = head.requires_grad_(False)
    model.language_model.config.tie_word_embeddings = False


@pytest.mark.parametrize("adapter", slow_except([None], [None, lora()]), ids=["alone", "with LoRA"])
@pytest.mark.parametrize(
    ("base", "change"),
    [
        ("tied", train_one_norm),
        ("untied", untie),
        ("tied", lambda model: model.resize_token_embeddings(104)),
        ("untied", lambda model: model.language_model.resize_token_embeddings(104)),
        ("tied", rounded),
    ],
    ids=["one number", "another head", "resized", "LLM resized", "rounded"],
)
def test_llm_that_differs_from_its_base_is_saved_whole(make, inputs, tmp_path, base, change, adapter):
    model = make(base, adapter)
    change(model)
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model/config.json").read_text())["base_model_name_or_path"] is None
    loaded = load(tmp_path / "model")
    torch.testing.assert_close(logits(loaded, inputs), expected, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in loaded.language_model.parameters()), "frozen like every loaded LLM"
    loaded.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again"), inputs), expected, atol=1e-5, rtol=1e-5)


def test_failed_save_leaves_the_configuration(make, inputs, tmp_path, monkeypatch):
    """Let writing fail after the LLM was found to differ from its base."""
    model = make("tied", lora())
    train_one_norm(model)
    before = dict(vars(model.config))
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "_write_weights", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(tmp_path / "model")
    assert vars(model.config) == before and model.config.base_model_name_or_path is not None
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model"), inputs), logits(model, inputs))


def test_cast_or_given_llm_is_compared_with_its_base_weights(make, bases, inputs, tiny_fields, tmp_path):
    model = make("tied", lora()).bfloat16()
    model.save_pretrained(tmp_path / "cast")
    assert not any(name.startswith("language_model.") for name in load_file(tmp_path / "cast/model.safetensors"))
    # Weights instead of logits: PyTorch also casts the rotary frequencies, which no checkpoint holds.
    loaded = load(tmp_path / "cast").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())
    given = AutoModelForCausalLM.from_pretrained(bases / "tied")
    config = copy.deepcopy(make("tied").config)
    for folder, whole in (("same", False), ("other", True)):
        model = DiffVPForConditionalGeneration(copy.deepcopy(config), language_model=copy.deepcopy(given)).eval()
        if whole:
            model.language_model.model.norm.weight.data += 0.5
        model.save_pretrained(tmp_path / folder)
        saved = json.loads((tmp_path / folder / "config.json").read_text())
        assert (saved["base_model_name_or_path"] is None) == whole
        assert torch.equal(logits(load(tmp_path / folder), inputs), logits(model, inputs))


def test_fingerprint_depends_on_every_value_and_on_the_shape():
    generator = torch.Generator().manual_seed(0)
    for shape, dtype in (
        ((3,), torch.bfloat16),
        ((70, 1000), torch.float32),
        ((), torch.float16),
        ((0, 4), torch.int8),
    ):
        tensor = (torch.randn(shape, generator=generator) * 9).to(dtype)
        known = fingerprints({"it": tensor})
        assert fingerprints({"it": tensor.clone()}) == known
        for index in {0, tensor.numel() // 2, tensor.numel() - 1} if tensor.numel() else ():
            other = tensor.clone()
            other.view(-1)[index] += 1
            assert fingerprints({"it": other}) != known
    swapped = torch.arange(40_000.0).view(200, 200)
    assert fingerprints({"it": swapped}) != fingerprints({"it": swapped.flip(0)})
    assert fingerprints({"it": swapped}) != fingerprints({"it": swapped.view(100, 400)})


def test_base_with_custom_code_is_refused_at_construction(bases, tiny_fields, tmp_path):
    own = write_base_with_own_code(tmp_path / "own-code")
    with pytest.raises(DiffVPCheckpointError, match="code of its own"):
        DiffVPForConditionalGeneration.from_base(str(own), config=tiny_fields, trust_remote_code=True)
    DiffVPForConditionalGeneration.from_base(str(bases / "tied"), config=tiny_fields, trust_remote_code=True)
