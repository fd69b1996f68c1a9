# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Decoding of reports: the model's own generation config, independent of the base LLM, and the meaning of lengths."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import GenerationConfig

from diffvp.generation_diffvp import decoding_config, own_generation_config
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.report_diffvp import end_tokens

BASES = {
    "Llama 2": {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 4096},
    "Qwen 2.5": {
        "do_sample": True,
        "temperature": 0.7,
        "top_k": 20,
        "repetition_penalty": 1.05,
        "eos_token_id": [2, 7],
    },
    "Gemma 3": {"do_sample": True, "top_k": 64, "top_p": 0.95, "cache_implementation": "hybrid"},
    "min_p": {"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "max_new_tokens": 3},
    "beams": {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
}


@pytest.fixture(params=BASES)
def chatty(request, tiny_llm, tmp_path):
    """Base LLM with the generation config of a chat model."""
    folder = shutil.copytree(tiny_llm, tmp_path / "base")
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(tokens | BASES[request.param]))
    return folder


def make(base, fields, lora=False):
    torch.manual_seed(0)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]) if lora else None
    return DiffVPForConditionalGeneration.from_base(str(base), lora_config=adapter, config=dict(fields))


def test_base_generation_config_does_not_cause_sampling_or_save_errors(chatty, tiny_fields, scans, tmp_path):
    model = make(chatty, tiny_fields, lora=True)
    config = model.generation_config
    base = json.loads((chatty / "generation_config.json").read_text())
    assert end_tokens(config) == ([2, 7] if isinstance(base["eos_token_id"], list) else [2])
    kept = {"bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "max_new_tokens", "transformers_version"}
    assert set(config.to_diff_dict()) <= kept and config.do_sample is False and config.max_new_tokens == 512
    model.save_pretrained(tmp_path / "model")
    loaded = DiffVPForConditionalGeneration.from_pretrained(tmp_path / "model")
    reports = []
    for seed, one in enumerate((model, model, loaded, loaded)):
        torch.manual_seed(seed)
        reports.append(one.generate(*scans, max_new_tokens=6).tolist())
    assert all(report == reports[0] for report in reports)


def test_given_generation_config_inherits_only_special_tokens(chatty, tiny_fields, scans):
    model = make(chatty, tiny_fields)
    expected = model.generate(*scans, max_new_tokens=6).tolist()
    for seed in range(2):
        torch.manual_seed(seed)
        assert model.generate(*scans, generation_config=GenerationConfig(max_new_tokens=6)).tolist() == expected
    first = int(model.generate(*scans, max_new_tokens=1)[0])
    model.generation_config.eos_token_id = [2, first]
    written = model.generate(*scans, generation_config=GenerationConfig(max_new_tokens=6))
    assert written[0, 0] == first and not written[0, 1:].any(), "an end token, followed by padding"


def test_end_token_of_the_tokenizer_ends_reports():
    base = GenerationConfig(bos_token_id=1, eos_token_id=[200, 2], pad_token_id=None, do_sample=True, top_k=7)
    tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=9, pad_token_id=0)
    config = own_generation_config(base, tokenizer, 40)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [9, 200, 2], 0)
    assert config.max_new_tokens == 40 and config.do_sample is False and config.top_k is None
    assert (
        own_generation_config(
            GenerationConfig(eos_token_id=2), SimpleNamespace(**vars(tokenizer) | {"eos_token_id": 2})
        ).eos_token_id
        == 2
    )
    assert (
        own_generation_config(
            GenerationConfig(), SimpleNamespace(**vars(tokenizer) | {"eos_token_id": None})
        ).eos_token_id
        is None
    )


def test_from_base_uses_the_end_token_of_its_tokenizer(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path):
    folder = shutil.copytree(tiny_base_with_tokenizer, tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 77}))
    model = make(folder, tiny_fields)
    assert end_tokens(model.generation_config) == [tokenizer.eos_token_id, 77]


def test_hub_options_of_from_base_apply_to_its_tokenizer(tiny_base_with_tokenizer, tokenizer, tiny_fields, tmp_path):
    """Put the base into a cache of the Hub, which only `cache_dir` tells of."""
    repository, commit = tmp_path / "cache/models--me--llm", "0123456789" * 4
    folder = shutil.copytree(tiny_base_with_tokenizer, repository / "snapshots" / commit)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 77}))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    options = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = DiffVPForConditionalGeneration.from_base("me/llm", config=dict(tiny_fields), **options)
    assert end_tokens(model.generation_config) == [tokenizer.eos_token_id, 77]


def test_labels_of_a_training_batch_do_not_affect_the_report(make_model, scans):
    model = make_model()
    labels = {"labels": torch.ones(2, 3, dtype=torch.long), "diagnosis_labels": torch.ones(2, 18)}
    expected = model.generate(*scans, max_new_tokens=6)
    assert torch.equal(model.generate(*scans, max_new_tokens=6, **labels), expected)


@pytest.mark.parametrize(
    ("given", "kwargs", "expected"),
    [
        (None, {}, (40, None)),
        (None, {"max_length": 12}, (12, None)),
        (None, {"max_length": 12, "max_new_tokens": None}, (12, None)),
        (None, {"max_length": 12, "max_new_tokens": 5}, (5, None)),
        (None, {"max_length": 12, "min_length": 4}, (12, 4)),
        (None, {"min_length": 4, "min_new_tokens": 2}, (40, 2)),
        ({"max_length": 12}, {}, (12, None)),
        ({"max_length": 12, "min_length": 3}, {"max_new_tokens": 7}, (7, 3)),
        ({"max_new_tokens": 9}, {"max_length": 12}, (12, None)),
    ],
)
def test_lengths_count_new_tokens(given, kwargs, expected):
    own = GenerationConfig(eos_token_id=2, pad_token_id=0, max_new_tokens=40)
    before = own.to_dict()
    config, rest = decoding_config(own, None if given is None else GenerationConfig(**given), kwargs | {"streamer": 1})
    assert (config.max_new_tokens, config.min_new_tokens or None) == expected
    assert config.max_length is None and config.eos_token_id == 2 and rest == {"streamer": 1}
    assert own.to_dict() == before, "a call does not affect the next"


def test_max_length_and_min_length_bound_the_output(make_model, scans):
    model = make_model()
    assert model.generate(*scans, max_length=5).shape == (2, 5)
    ends = list(range(96))
    assert model.generate(*scans, max_length=12, eos_token_id=ends).shape == (2, 1)
    written = model.generate(*scans, max_length=12, min_length=4, eos_token_id=ends[2:])
    assert 4 <= written.shape[1] <= 12
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(*scans, max_length=0)


def test_argument_names_of_other_processors_are_refused_with_ours(tokenizer):
    from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor

    processor = DiffVPProcessor(DiffVPImageProcessor(size=(32, 32, 32)), tokenizer)
    for name, ours in (("images", "ct="), ("pixel_values", "ct="), ("prompt", "text="), ("normal", "reference=")):
        with pytest.raises(TypeError, match=f"{name} for .* Expected {ours}"):
            processor(**{name: "scan.nii.gz"})
    with pytest.raises(TypeError, match="Unknown argument.* colour for DiffVPProcessor.$"):
        processor(text="x", colour=1)
