# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Converting an encoder and releasing a checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor

from diffvp.checkpoint_diffvp import DiffVPCheckpointError
from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.hub import release as release_module
from diffvp.hub.convert_encoder import convert_medicalnet
from diffvp.modules_diffvp import DiffVPVisionEncoder
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor


@pytest.fixture(scope="module")
def medicalnet_state():
    """A state dict under the names MedicalNet uses: DataParallel, a segmentation head, no batch counters."""
    from monai.networks.nets import resnet18

    torch.manual_seed(0)
    network = resnet18(n_input_channels=1, feed_forward=False, shortcut_type="A", bias_downsample=True)
    state = {f"module.{name}": value for name, value in network.state_dict().items() if "num_batches" not in name}
    return {**state, "module.conv_seg.0.weight": torch.zeros(2, 2)}


def test_medicalnet_weights_become_an_encoder(medicalnet_state, tmp_path):
    torch.save({"state_dict": medicalnet_state}, tmp_path / "resnet_18.pth")
    state = load_file(convert_medicalnet(tmp_path / "resnet_18.pth", tmp_path / "encoder.safetensors"))
    encoder = DiffVPVisionEncoder(DiffVPConfig())
    encoder.load_state_dict(state)
    assert torch.equal(encoder.resnet.layer4[1].conv2.weight, medicalnet_state["module.layer4.1.conv2.weight"])
    assert torch.equal(encoder.resnet.bn1.running_var, medicalnet_state["module.bn1.running_var"])
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_another_network_is_refused(medicalnet_state, tmp_path):
    smaller = {name: value for name, value in medicalnet_state.items() if "layer4" not in name}
    torch.save(smaller, tmp_path / "resnet_10.pth")
    with pytest.raises(DiffVPCheckpointError, match=r"resnet_10.pth is not .* missing, such as resnet.layer4"):
        convert_medicalnet(tmp_path / "resnet_10.pth", tmp_path / "encoder.safetensors")
    assert not (tmp_path / "encoder.safetensors").exists()


def test_release_is_small_safe_and_loads_alone(
    make_model, tiny_base_with_tokenizer, tiny_fields, tokenizer, tmp_path, monkeypatch
):
    from peft import LoraConfig

    from diffvp.modeling_diffvp import DiffVPForConditionalGeneration

    size = dict(zip(("depth", "height", "width"), tiny_fields["image_size"], strict=True))
    processor = DiffVPProcessor(DiffVPImageProcessor(size=size), tokenizer)
    model = DiffVPForConditionalGeneration.from_base(
        str(tiny_base_with_tokenizer),
        lora_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]),
        config={**tiny_fields, "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(tokenizer)},
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "trained")
    processor.save_pretrained(tmp_path / "trained")
    monkeypatch.setattr(release_module, "POOL_SIZE", 2)
    released = release_module.release(tmp_path / "trained", tmp_path / "released")

    files = {str(path.relative_to(released)) for path in released.rglob("*") if path.is_file()}
    assert {file.rsplit(".", 1)[-1] for file in files} <= {"safetensors", "json", "py", "md", "gz", "jinja"}
    assert len(json.loads((released / "references/references.json").read_text())) == 2
    stored = load_file(released / "model.safetensors")
    assert stored["resampler.queries"].dtype == torch.bfloat16
    assert stored["vision_encoder.resnet.bn1.running_var"].dtype == torch.float32

    loaded = AutoModel.from_pretrained(released, trust_remote_code=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], atol=1e-6, rtol=2**-8)
    reference = released / "references/normal_1.nii.gz"
    inputs = AutoProcessor.from_pretrained(released, trust_remote_code=True)(ct=str(reference))
    assert inputs.reference_ids == ["normal_2"], "a scan is never its own reference"
    assert loaded.generate(**inputs, max_new_tokens=3).shape == (1, 3)
