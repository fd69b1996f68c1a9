# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Loading with the usual arguments of transformers, loading of parts of a checkpoint, and its configuration."""

import json
import shutil

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, GenerationConfig

from diffvp.benchmarks.round_trip import move_adapter
from diffvp.configuration_diffvp import FORMAT_VERSION, DiffVPConfig
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis, DiffVPModel
from diffvp.storage_diffvp import DiffVPCheckpointError, check_config

load = DiffVPForConditionalGeneration.from_pretrained


@pytest.fixture
def model(make_model):
    model = make_model(lora=True)
    move_adapter(model, seed=5)
    return model


@pytest.fixture(params=["by name", "whole"])
def checkpoint(model, tmp_path, request):
    """Checkpoint that names its base, or a self-contained one."""
    folder = tmp_path / "checkpoint"
    (model.save_pretrained if request.param == "by name" else model.export_merged)(folder)
    return folder


def rewrite(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


# Arguments of from_pretrained


def test_neutral_loading_arguments_are_ignored(checkpoint, scans):
    expected = load(checkpoint)(*scans).logits
    habits = {
        **{"low_cpu_mem_usage": True, "variant": None, "subfolder": "", "weights_only": True, "state_dict": None},
        **{"key_mapping": None, "ignore_mismatched_sizes": False, "use_safetensors": True, "torch_dtype": "auto"},
        **{"revision": "main", "token": None, "trust_remote_code": True, "device_map": None, "max_memory": None},
        **{"attn_implementation": None, "quantization_config": None, "generation_config": None, "tp_plan": None},
        **{"offload_folder": None, "offload_state_dict": False, "_fast_init": True, "local_files_only": True},
        **{"cache_dir": None, "proxies": None, "force_download": False, "dtype": None, "load_in_8bit": False},
    }
    assert torch.equal(load(checkpoint, **habits)(*scans).logits, expected)
    habits = {key: value for key, value in habits.items() if key != "state_dict"}
    assert torch.equal(AutoModel.from_pretrained(checkpoint, **habits)(*scans).logits, expected)


@pytest.mark.parametrize(
    "option",
    [
        {"dytpe": "float32"},
        {"variant": "fp16"},
        {"state_dict": {"a": torch.zeros(1)}},
        {"key_mapping": {"a": "b"}},
        {"ignore_mismatched_sizes": True},
        {"use_safetensors": False},
        {"load_in_8bit": True},
        {"from_tf": True},
        {"gguf_file": "model.gguf"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_unsupported_loading_arguments_are_refused_by_name(checkpoint, option):
    with pytest.raises(TypeError, match=next(iter(option))):
        load(checkpoint, **option)


def test_supported_loading_arguments_take_effect(checkpoint, scans, tmp_path):
    expected = load(checkpoint)(*scans).logits
    assert {p.dtype for p in load(checkpoint, torch_dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    assert load(checkpoint, torch_dtype="bfloat16", dtype="float32").dtype == torch.float32
    for implementation, returns_weights in (("eager", True), ("sdpa", False)):
        language_model = load(checkpoint, attn_implementation=implementation).language_model
        weights = language_model(torch.tensor([[1, 2]]), output_attentions=True).attentions
        assert any(one is not None for one in weights) is returns_weights
    given = load(checkpoint, generation_config=GenerationConfig(max_new_tokens=3, eos_token_id=2))
    assert given.generation_config.max_new_tokens == 3
    assert load(checkpoint, diagnosis_threshold=0.25).config.diagnosis_threshold == 0.25
    loaded, info = load(checkpoint, output_loading_info=True)
    assert not info["missing_keys"] and torch.equal(loaded(*scans).logits, expected)
    for config in (str(checkpoint), checkpoint, checkpoint / "config.json", DiffVPConfig.from_pretrained(checkpoint)):
        assert torch.equal(load(checkpoint, config=config)(*scans).logits, expected)
    shutil.copytree(checkpoint, tmp_path / "runs/best")
    assert torch.equal(load(tmp_path / "runs", subfolder="best")(*scans).logits, expected)


def test_folder_without_a_configuration_is_refused(checkpoint):
    (checkpoint / "config.json").unlink()
    for cls in (DiffVPForConditionalGeneration, DiffVPModel, DiffVPForDiagnosis):
        with pytest.raises(DiffVPCheckpointError, match="has no config.json"):
            cls.from_pretrained(checkpoint)


def test_configuration_of_another_model_is_refused(checkpoint):
    rewrite(checkpoint, model_type="bert")
    for cls in (DiffVPForConditionalGeneration, DiffVPModel, DiffVPForDiagnosis):
        with pytest.raises(DiffVPCheckpointError, match="model_type: bert .expected diffvp"):
            cls.from_pretrained(checkpoint)


# Files


def test_shards_are_read_and_replaced_by_the_next_save(model, tmp_path, scans):
    expected = model(*scans).logits
    for _ in range(2):
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
        assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
        assert torch.equal(load(tmp_path / "model")(*scans).logits, expected)
        model.save_pretrained(tmp_path / "model")
        assert [path.name for path in (tmp_path / "model").glob("model*.s*")] == ["model.safetensors"]
        assert torch.equal(load(tmp_path / "model")(*scans).logits, expected)
    for option in ({"variant": "fp16"}, {"distributed_checkpoint": True}):
        with pytest.raises(TypeError, match=next(iter(option))):
            model.save_pretrained(tmp_path / "other", **option)
        assert not (tmp_path / "other").exists()


def test_next_save_removes_an_earlier_adapter(make_model, model, tmp_path, scans):
    model.save_pretrained(tmp_path / "model")
    plain = make_model()
    plain.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model/adapter").exists()
    assert torch.equal(load(tmp_path / "model")(*scans).logits, plain(*scans).logits)


def test_weights_of_another_save_are_refused(make_model, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    state = load_file(tmp_path / "model/model.safetensors")
    state["resampler.queries"] += 1
    save_file(state, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(DiffVPCheckpointError, match="from different saves"):
        load(tmp_path / "model")
    with pytest.raises(DiffVPCheckpointError, match="from different saves"):
        DiffVPModel.from_pretrained(tmp_path / "model")


def test_checkpoint_of_the_first_format_loads(model, tmp_path, scans):
    """In the first format, in which diffvp-phantom was published, there is no version and no digest."""
    model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for key in ("format_version", "file_digests"):
        del config[key]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded(*scans).logits, model(*scans).logits)
    assert loaded.config.format_version == FORMAT_VERSION


# Parts


@pytest.mark.parametrize("share_encoder", [False, True], ids=["own encoder", "shared encoder"])
@pytest.mark.parametrize("save", ["save_pretrained", "export_merged"])
def test_parts_are_loaded_from_a_whole_checkpoint(make_model, tmp_path, scans, share_encoder, save):
    whole = make_model(lora=True, share_encoder=share_encoder)
    getattr(whole, save)(tmp_path / "whole")
    classifier = DiffVPForDiagnosis.from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(classifier(scans[0]).logits, whole.diagnose(scans[0]), atol=1e-6, rtol=1e-6)
    comparison = DiffVPModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(comparison.difference_map(*scans), whole.difference_map(*scans))
    assert not any(p.requires_grad for p in comparison.vision_encoder.parameters())
    # Each part is saved as its own class.
    classifier.save_pretrained(tmp_path / "classifier")
    comparison.save_pretrained(tmp_path / "comparison")
    for folder, kind in (("classifier", "DiffVPForDiagnosis"), ("comparison", "DiffVPModel")):
        loaded = AutoModel.from_pretrained(tmp_path / folder, trust_remote_code=True)
        assert type(loaded).__name__ == kind
        with pytest.raises(DiffVPCheckpointError):
            load(tmp_path / folder)


def test_missing_classifier_is_refused(make_model, tmp_path):
    make_model(use_diagnosis=False).save_pretrained(tmp_path / "whole")
    with pytest.raises(DiffVPCheckpointError, match="missing: classifier"):
        DiffVPForDiagnosis.from_pretrained(tmp_path / "whole")


# Configuration

IMPOSSIBLE = {
    "num_latents": [0, -1],
    "resampler_heads": [0, 7],
    "latent_size": [0, 25],
    "prompt_hidden_size": [0],
    "encoder_stride": [3],
    "image_size": [[32, 32], [8, 32, 32]],
    "diagnosis_threshold": [1.5, float("nan"), [0.5, 0.5]],
    "diagnosis_labels": [[], ["Emphysema", "Emphysema"], [" "]],
    "classification_loss_weight": [-0.1, float("nan"), float("inf")],
    "difference_epsilon": [0.0, float("inf")],
    "difference_level": ["voxel"],
    "format_version": [FORMAT_VERSION + 1, 0],
    "instruction_ids": [[-1], [10**6]],
    "use_global_delta": ["yes"],
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_config_values_are_refused_at_any_time(tiny_config, tiny_fields, name):
    former = getattr(tiny_config, name)
    for value in IMPOSSIBLE[name]:
        with pytest.raises((ValueError, StrictDataclassError), match=name):
            DiffVPConfig(text_config=tiny_config.text_config, **tiny_fields | {name: value})
        with pytest.raises((ValueError, StrictDataclassError), match=name):
            setattr(tiny_config, name, value)
        assert getattr(tiny_config, name) == former
    setattr(tiny_config, name, former)


def test_newer_format_is_refused_with_both_versions(checkpoint):
    rewrite(checkpoint, format_version=FORMAT_VERSION + 1, a_field_of_the_future=1)
    for cls in (DiffVPConfig, AutoConfig):
        with pytest.raises(ValueError, match=f"format_version {FORMAT_VERSION + 1}.*1 to {FORMAT_VERSION}"):
            cls.from_pretrained(checkpoint, trust_remote_code=True)


def test_config_fields_of_other_libraries_are_kept(model, tmp_path, scans):
    others = {
        **{"use_cache": False, "pad_token_id": 0, "is_decoder": True, "keys_to_ignore_at_inference": ["logits"]},
        **{"hidden_size": 32, "vocab_size": 96, "quant_library": "0.1", "axolotl": {"version": 1}, "mlp_only": [1]},
    }
    for name, value in others.items():
        setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(loaded(*scans).logits, model(*scans).logits)
    del others["use_cache"]  # a generation parameter, which transformers keeps in the generation config
    assert {name: getattr(loaded.config, name) for name in others} == others


def test_misspelt_config_field_is_refused_in_code_and_file(checkpoint):
    with pytest.raises(ValueError, match="num_latent_tokens"):
        DiffVPConfig(num_latent_tokens=4)
    rewrite(checkpoint, num_latent_tokens=4)
    with pytest.raises(ValueError, match="num_latent_tokens"):
        DiffVPConfig.from_pretrained(checkpoint)


@pytest.mark.parametrize("content", ["{", "[]", '"diffvp"'])
def test_folder_with_a_broken_configuration_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DiffVPCheckpointError, match="content: no JSON object"):
        check_config(tmp_path)
