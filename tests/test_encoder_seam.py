# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Third-party encoders behind the interface `ct` → tokens: converted, attached, precomputed, or refused."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from diffvp import cli
from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.data.cache import encoder_recipe
from diffvp.data.cases import DatasetError
from diffvp.encoders_diffvp import DiffVPEncoderError, DiffVPInflatedEncoder, make_encoder
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis, DiffVPModel
from diffvp.train_accelerate import run
from diffvp.training import encoder as encoder_module
from diffvp.training.cohort import load_cohort
from diffvp.training.config import TrainingConfig
from diffvp.training.encoder import Published, convert_encoder, import_encoder, load_encoder, read_features

from .encoder_samples import CHANNELS, INFLATED, I3ResNet, medicalnet, with_statistics

EXTERNAL = {"encoder_type": "external", "encoder_grid": [2, 2, 3], "encoder_width": 5}


@pytest.fixture(scope="module")
def astra():
    torch.manual_seed(0)
    return with_statistics(I3ResNet(INFLATED["encoder_layers"], INFLATED["encoder_block_channels"]))


@pytest.fixture(scope="module")
def medicalnet_state():
    """State with MedicalNet's names: DataParallel prefix, a segmentation head, no batch counters."""
    state = medicalnet().state_dict()
    state = {f"module.{name}": value for name, value in state.items() if "num_batches" not in name}
    return {**state, "module.conv_seg.0.weight": torch.zeros(2, 2)}


def header_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def model_of(**fields):
    """Return a tiny untrained model without a base LLM."""
    sizes = {"num_latents": 4, "latent_size": 24, "resampler_heads": 2, "global_delta_heads": 3}
    torch.manual_seed(5)
    return DiffVPModel(DiffVPConfig(**{"image_size": [32, 32, 32], "use_diagnosis": False, **sizes, **fields})).eval()


# Conversion ----------------------------------------------------------------------------------------------------------


def test_medicalnet_weights_are_converted(medicalnet_state, tmp_path):
    source, target = tmp_path / "resnet_18.pth", tmp_path / "encoder.safetensors"
    torch.save({"state_dict": medicalnet_state}, source)
    header = convert_encoder(source, target)
    assert header == header_of(target) and header["source"] == "resnet_18.pth"
    fields = {"encoder_type": "resnet", "encoder_block_channels": CHANNELS, "encoder_shortcut_type": "A"}
    assert json.loads(header["encoder"]) == fields
    model = model_of(**fields)
    load_encoder(model, target)
    resnet = model.vision_encoder.resnet
    assert torch.equal(resnet.layer4[1].conv2.weight, medicalnet_state["module.layer4.1.conv2.weight"])
    assert torch.equal(resnet.bn1.running_var, medicalnet_state["module.bn1.running_var"])
    assert model.config.encoder_name == "resnet_18.pth" and model.config.encoder_sha256 == header["source_sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.safetensors", "resnet_18.pth"]


def ras(ct):
    """Convert [superior, posterior, left] to the input of Merlin and Astra: [right, anterior, superior], 0 to 1."""
    return (ct.flip(3, 4).permute(0, 1, 4, 3, 2) + 1) / 2


@pytest.mark.parametrize("prefix", ["", "encode_image.i3_resnet.", "visual_encoder.model.encode_image.i3_resnet."])
def test_inflated_resnet_gives_the_tokens_of_the_original_code(astra, prefix, tmp_path):
    state = {prefix + name: value.bfloat16() if value.is_floating_point() else value
             for name, value in astra.state_dict().items()}  # fmt: skip
    state |= {"text.weight": torch.zeros(1)} if prefix else {"classifier.weight": torch.zeros(1)}
    torch.save({"state_dict": state, "meta": {"licence": "MIT"}}, tmp_path / "astra.pt")
    convert_encoder(tmp_path / "astra.pt", tmp_path / "encoder.safetensors")
    assert load_file(tmp_path / "encoder.safetensors")["resnet.conv1.weight"].dtype == torch.bfloat16
    model = model_of(**INFLATED, image_size=[32, 64, 96])
    load_encoder(model, tmp_path / "encoder.safetensors")
    theirs = I3ResNet(INFLATED["encoder_layers"], INFLATED["encoder_block_channels"]).eval()
    theirs.load_state_dict({name: value.bfloat16().float() if value.is_floating_point() else value
                            for name, value in astra.state_dict().items()})  # fmt: skip
    torch.manual_seed(2)
    ct = torch.rand(1, 1, 32, 64, 96) * 2 - 1
    with torch.no_grad():
        tokens, expected = model.extract_features(ct), theirs(ras(ct))  # (1, C, superior, right, anterior)
    assert model.config.feature_grid == (2, 2, 3) and model.config.encoder_hidden_size == 16
    expected = expected.flip(3, 4).permute(0, 2, 4, 3, 1).flatten(1, 3)
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=1e-4)
    assert expected.std() > 0.1


def test_inflated_resnet_receives_its_training_hu_range(astra):
    narrow, wide = (
        DiffVPInflatedEncoder(DiffVPConfig(**INFLATED, image_size=[32, 32, 32], hu_range=of))
        for of in (None, [-1000, 1200])
    )
    for encoder in (narrow, wide):
        encoder.resnet.load_state_dict(astra.state_dict())
        encoder.eval()
    hu = torch.linspace(-1000, 1200, 32**3).view(1, 1, 32, 32, 32)
    with torch.no_grad():
        seen = narrow(((hu + 1000) / 600 - 1).clamp(-1, 1)), wide((hu + 1000) / 1100 - 1)
    torch.testing.assert_close(*seen, atol=1e-4, rtol=1e-4)


def test_encoder_of_a_checkpoint_can_be_reused(make_model, tmp_path):
    fields = {
        "encoder_stride": 2, "encoder_pyramid_channels": 6, "encoder_coordinates": True,
        "encoder_windows": [[-1000, -200], [-160, 240]], "hu_range": [-1000, 1200],
    }  # fmt: skip
    trained = make_model(**fields)
    trained.save_pretrained(tmp_path / "trained")
    header = convert_encoder(tmp_path / "trained", tmp_path / "encoder.safetensors")
    assert header["source"] == "trained" and header["intended_domain"] == ""
    other = model_of(**fields, encoder_block_channels=CHANNELS, encoder_max_pool=False, encoder_shortcut_type="B")
    ct = torch.rand(1, 1, 32, 32, 32)
    assert not torch.equal(other.extract_features(ct), trained.extract_features(ct))
    load_encoder(other, tmp_path / "encoder.safetensors")
    assert torch.equal(other.extract_features(ct), trained.extract_features(ct))
    DiffVPForDiagnosis(trained.config).save_pretrained(tmp_path / "diagnosis")
    convert_encoder(tmp_path / "diagnosis", tmp_path / "encoder.safetensors")
    load_encoder(other, tmp_path / "encoder.safetensors")


def test_published_weights_are_joined_from_packages_and_verified(astra, tmp_path, monkeypatch):
    torch.save({"state_dict": astra.state_dict()}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    modules = ("tiny_astra_p1", "tiny_astra_p2")
    for part, module in enumerate(modules):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise RuntimeError('nobody has to run this')")
        (tmp_path / module / "part.bin").write_bytes(content[part * 1000 : 1000 if part == 0 else None])
    whole = convert_encoder(tmp_path / "whole.pt", tmp_path / "whole.safetensors")
    published = Published('"tiny-astra==1"', modules, "part.bin", whole["source_sha256"])
    monkeypatch.setitem(encoder_module.PUBLISHED, "astra", published)
    with pytest.raises(
        DiffVPEncoderError, match=r'tiny_astra_p1: package: not installed .*pip install "tiny-astra==1"'
    ):
        convert_encoder("astra", tmp_path / "encoder.safetensors")
    monkeypatch.syspath_prepend(tmp_path)
    header = convert_encoder("astra", tmp_path / "encoder.safetensors")
    assert header == whole | {"source": "astra"}
    (tmp_path / modules[1] / "part.bin").write_bytes(content[1000:-1] + b"?")
    with pytest.raises(DiffVPEncoderError, match="astra: SHA-256: [0-9a-f]{64} .expected " + whole["source_sha256"]):
        convert_encoder("astra", tmp_path / "again.safetensors")
    assert not (tmp_path / "again.safetensors").exists()


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_files_without_an_encoder_are_refused(medicalnet_state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smaller = {name: value for name, value in medicalnet_state.items() if "layer4.1" not in name}
    torch.save(smaller, "resnet_10.pth")
    torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "flat.pth")
    torch.save({"weights": [1, 2]}, "list.pth")
    with open("code.pth", "wb") as file:
        pickle.dump(Payload(), file)
    (tmp_path / "text.pth").write_text("no weights")
    for source, message in {
        "resnet_10.pth": r"resnet_10.pth: weights: \d+ missing, such as resnet.layer4.1",
        "flat.pth": r"flat.pth: weights: 1 weights, conv1 \(64, 3, 7, 7\), 0 stages \(expected MedicalNet",
        "list.pth": "list.pth: file: dict .expected a PyTorch file that holds only tensors",
        "code.pth": "code.pth: file: UnpicklingError",
        "text.pth": "text.pth: file: ",
        "absent.pth": "absent.pth: file: missing .expected astra, a PyTorch file",
    }.items():
        with pytest.raises(DiffVPEncoderError, match=message):
            convert_encoder(source, "encoder.safetensors")
    assert not (tmp_path / "encoder.safetensors").exists() and not (tmp_path / "executed").exists()
    with pytest.raises(DiffVPEncoderError, match="resnet_10.pth: SHA-256: .*expected 00ff"):
        convert_encoder("resnet_10.pth", "encoder.safetensors", sha256="00FF")


def test_command_converts_and_prints_the_digest(medicalnet_state, tmp_path):
    source, target = tmp_path / "resnet_18.pth", tmp_path / "encoder.safetensors"
    torch.save(medicalnet_state, source)
    result = CliRunner().invoke(cli.app, ["encoder", "convert", str(source), str(target)])
    assert result.exit_code == 0, result.output
    assert header_of(target)["source_sha256"] in result.output and '"encoder_type": "resnet"' in result.output
    result = CliRunner().invoke(cli.app, ["encoder", "convert", str(source), str(target), "--sha256", "0" * 64])
    assert result.exit_code == 2 and "SHA-256" in result.output


@pytest.mark.slow
def test_weights_of_another_architecture_are_refused(medicalnet_state, tmp_path):
    torch.save(medicalnet_state, tmp_path / "resnet_18.pth")
    path = tmp_path / "encoder.safetensors"
    convert_encoder(tmp_path / "resnet_18.pth", path)
    with pytest.raises(DiffVPEncoderError, match="model: encoder_type: i3resnet .expected resnet, as in encoder"):
        load_encoder(model_of(**INFLATED), path)
    with pytest.raises(DiffVPEncoderError, match=r"model: encoder_shortcut_type: B .expected A"):
        load_encoder(model_of(encoder_block_channels=CHANNELS, encoder_shortcut_type="B"), path)
    with pytest.raises(DiffVPEncoderError, match="encoder_type: external"):
        load_encoder(model_of(**EXTERNAL), path)
    with pytest.raises(DiffVPEncoderError, match="resnet_18.pth: file: .*expected safetensors, from `diffvp encoder"):
        load_encoder(model_of(encoder_block_channels=CHANNELS), tmp_path / "resnet_18.pth")
    # A file without our metadata is accepted by its names and shapes.
    save_file(load_file(path), path)
    model = model_of(encoder_block_channels=CHANNELS)
    load_encoder(model, path)
    assert model.config.encoder_name == "encoder.safetensors" and len(model.config.encoder_sha256) == 64
    with pytest.raises(DiffVPEncoderError, match="weights: 2 unexpected, such as one"):
        save_file({**load_file(path), "one": torch.zeros(1), "other": torch.zeros(1)}, path)
        load_encoder(model, path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"encoder_type": "external"}, "encoder_grid None and encoder_width None: both are required"),
        ({"encoder_grid": [1, 2, 3], "encoder_width": 4}, 'encoder_type is "resnet"'),
        ({**EXTERNAL, "encoder_width": 0}, r"\[2, 2, 3\], 0 \(expected"),
        ({**EXTERNAL, "encoder_grid": [2, 2]}, r"\[2, 2\], 5 \(expected"),
        ({**EXTERNAL, "share_encoder": True}, "share_encoder=False"),
        ({**INFLATED, "encoder_layers": [1, 2, 3]}, "encoder_layers"),
    ],
)
def test_contradictory_encoder_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DiffVPConfig(**changes)


# User encoders -------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """(batch, 1, 32, 32, 32) → 2 x 2 x 3 tokens of 5 channels."""

    def __init__(self, seed=0):
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, 1, 5)  # leaves the random state of the run unchanged
        for weight in self.linear.parameters():
            nn.init.normal_(weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, ct):
        return self.linear(F.adaptive_avg_pool3d(ct, (2, 2, 3)).flatten(2).transpose(1, 2))


def test_attached_module_is_used_but_not_saved(make_model, scans, tmp_path):
    model = make_model(**EXTERNAL, use_diagnosis=False)
    with pytest.raises(DiffVPEncoderError, match="vision_encoder: module: none; .*attach_encoder.*ct_features"):
        model.generate(*scans)
    weights, module = set(model.state_dict()), Pooled()
    model.attach_encoder(module)
    assert set(model.state_dict()) == weights and not list(model.vision_encoder.parameters())
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(model.extract_features(scans[0]), module(scans[0]))
    model.double()
    assert module.linear.weight.dtype == torch.float64
    model.float().train()
    assert not module.training
    assert (
        model.config.encoder_name.endswith("Pooled")
        and encoder_recipe(model)["encoder"] == model.config.encoder_sha256
    )
    features = dict(zip(("ct_features", "reference_features"), map(module, scans), strict=True))
    written = model.eval().generate(*scans, max_new_tokens=6)
    assert torch.equal(model.generate(**features, max_new_tokens=6), written)
    assert model.difference_map(*scans).shape == (2, 32, 32, 32)
    model.save_pretrained(tmp_path)
    again = DiffVPForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(DiffVPEncoderError, match="SHA-256 of the weights: .* of .*Pooled"):
        again.attach_encoder(Pooled(seed=1))
    again.attach_encoder(Pooled())
    assert torch.equal(again.generate(*scans, max_new_tokens=6), written)


def test_module_with_wrong_token_shape_is_refused(make_model, scans):
    model = make_model(**EXTERNAL | {"encoder_width": 6}, use_diagnosis=False)
    model.attach_encoder(Pooled())
    with pytest.raises(DiffVPEncoderError, match=r"Pooled: tokens: \(2, 12, 5\) .expected \(2, 12, 6\)"):
        model.extract_features(scans[0])
    with pytest.raises(DiffVPEncoderError, match="config: encoder_type: resnet .expected external"):
        make_model().attach_encoder(Pooled())


def test_classifier_of_an_external_encoder_is_the_resnet_18(make_model, scans, tmp_path):
    model = make_model(**EXTERNAL)
    model.attach_encoder(Pooled())
    logits = model.diagnose(scans[0])
    assert logits.shape == (2, 18)
    model.save_pretrained(tmp_path)
    alone = DiffVPForDiagnosis.from_pretrained(tmp_path)
    torch.testing.assert_close(alone(ct=scans[0]).logits, logits)
    inflated = make_model(encoder_type="i3resnet", encoder_layers=[1, 1, 1, 1])
    inflated.save_pretrained(tmp_path / "inflated")
    alone = DiffVPForDiagnosis.from_pretrained(tmp_path / "inflated")
    torch.testing.assert_close(alone(ct=scans[0]).logits, inflated.diagnose(scans[0]))


STRANGER = """
    import sys, torch
    from transformers import AutoModel

    inflated = AutoModel.from_pretrained({inflated!r}, trust_remote_code=True)
    ct = torch.load({ct!r}, weights_only=True)
    torch.save(inflated.extract_features(ct), {tokens!r})
    model = AutoModel.from_pretrained({external!r}, trust_remote_code=True)
    features = dict.fromkeys(("ct_features", "reference_features"), torch.ones(2, 12, 5))
    torch.save(model.generate(**features, max_new_tokens=6), {written!r})
    try:
        model.generate(ct=ct, reference=ct)
    except ValueError as error:
        print(error)
    print("diffvp" in sys.modules)
"""


@pytest.mark.slow
def test_checkpoint_without_the_package_loads_or_names_the_missing_encoder(make_model, scans, tmp_path):
    """A separate process loads them with the code in the checkpoint."""
    inflated = make_model(encoder_type="i3resnet", encoder_layers=[1, 1, 1, 1], use_diagnosis=False)
    external = make_model(**EXTERNAL, use_diagnosis=False)
    external.attach_encoder(Pooled())
    inflated.save_pretrained(tmp_path / "inflated")
    external.save_pretrained(tmp_path / "external")
    torch.save(scans[0], tmp_path / "ct.pt")
    places = {name: str(tmp_path / name) for name in ("inflated", "external")}
    places |= {name: str(tmp_path / f"{name}.pt") for name in ("ct", "tokens", "written")}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", textwrap.dedent(STRANGER.format(**places))]
    result = subprocess.run(
        command, env=environment | {"HF_MODULES_CACHE": str(tmp_path)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    told, ours = result.stdout.strip().splitlines()[-2:]
    assert "the checkpoint was made with" in told and "Pooled" in told and "attach_encoder(module)" in told
    assert ours == "False"
    tokens = torch.load(tmp_path / "tokens.pt", weights_only=True)
    torch.testing.assert_close(tokens, inflated.extract_features(scans[0]))
    features = dict.fromkeys(("ct_features", "reference_features"), torch.ones(2, 12, 5))
    written = torch.load(tmp_path / "written.pt", weights_only=True)
    assert torch.equal(written, external.generate(**features, max_new_tokens=6))


# Training ------------------------------------------------------------------------------------------------------------


def test_encoders_are_imported_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_encoders.py").write_text("from torch import nn\nBackbone = nn.Identity\nnumber = lambda: 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(import_encoder("my_encoders:Backbone"), nn.Identity)
    for name in ("my_encoders", "my_encoders:Missing", "absent_encoders:Backbone", "my_encoders:number", ""):
        with pytest.raises(DiffVPEncoderError, match=f"encoder: {name}: .*expected MODULE:NAME"):
            import_encoder(name)


def test_precomputed_features_are_checked(tmp_path):
    features = torch.rand(12, 5)
    save_file({"features": features}, tmp_path / "case.safetensors")
    assert torch.equal(read_features(tmp_path, "case", (12, 5)), features)
    save_file({"features": features / 0}, tmp_path / "endless.safetensors")
    save_file({"tokens": features}, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for name, shape, message in (
        ("absent", (12, 5), "absent.safetensors .'absent'.: file: missing"),
        ("case", (12, 6), r"features: \(12, 5\) .expected \(12, 6\)"),
        ("endless", (12, 5), "features: not finite"),
        ("other", (12, 5), "features: unreadable"),
        ("broken", (12, 5), "features: unreadable"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_features(tmp_path, name, shape)


def external_run(stage_one, *overrides):
    fields = [f"model.{key}={value}" for key, value in (EXTERNAL | {"share_encoder": False}).items()]
    config = TrainingConfig.load(stage_one, ["stage=report", "report.epochs=1", *fields, *overrides])
    run(config)
    return DiffVPForConditionalGeneration.from_pretrained(f"{config.output_dir}/model"), config


@pytest.mark.slow
def test_training_on_features_equals_training_with_the_module(stage_one, tmp_path, monkeypatch):
    """Features on disk and the module that computed them give the same weights in the second stage."""
    monkeypatch.setitem(sys.modules, "my_pooled", sys.modules[__name__])
    of_module, config = external_run(stage_one, "encoder=my_pooled:Pooled")
    assert of_module.config.encoder_name.endswith("Pooled") and of_module.config.encoder_sha256
    cohort, stored = load_cohort(config), tmp_path / "features"
    stored.mkdir()
    from diffvp.processing_diffvp import DiffVPImageProcessor
    from diffvp.train_accelerate import make_volumes

    volumes = make_volumes(config, DiffVPImageProcessor(**config.image_processor))
    for case in cohort.everyone():
        features = Pooled()(volumes.load(case)[None].float())[0].detach()
        save_file({"features": features.contiguous()}, stored / f"{case.name}.safetensors")
    monkeypatch.setattr(DiffVPForConditionalGeneration, "extract_features", None)  # encoding a scan would fail
    (tmp_path / "run" / "model").rename(tmp_path / "of_module")
    for name in ("checkpoints/report", "report.jsonl"):
        (tmp_path / "run" / name).rename(tmp_path / name.replace("/", "-"))
    of_features, _ = external_run(stage_one, f"data.features={stored}")
    theirs = of_features.state_dict()
    for name, value in of_module.state_dict().items():
        np.testing.assert_array_equal(theirs[name].numpy(), value.numpy(), err_msg=name)


def test_features_on_disk_require_an_external_encoder(stage_one):
    with pytest.raises(ValueError, match="data.features is anywhere and model.encoder_type resnet; expected external"):
        run(TrainingConfig.load(stage_one, ["stage=report", "data.features=anywhere"]))


def test_every_encoder_type_survives_its_config(tmp_path):
    for fields in ({"encoder_block_channels": CHANNELS}, INFLATED, EXTERNAL):
        config = DiffVPConfig(**fields, image_size=[32, 32, 32])
        config.save_pretrained(tmp_path)
        again = DiffVPConfig.from_pretrained(tmp_path)
        assert again.feature_grid == config.feature_grid and again.encoder_hidden_size == config.encoder_hidden_size
        assert set(make_encoder(again).state_dict()) == set(make_encoder(config).state_dict())
