# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The paper's equations against an independent NumPy implementation, and properties that hold for any weights."""

import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from scipy.special import erf

from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.encoders_diffvp import DiffVPDiagnosisClassifier, DiffVPVisionEncoder
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis
from diffvp.modules_diffvp import (
    DiffVPGlobalDelta,
    DiffVPLocalDelta,
    DiffVPPromptGenerator,
    DiffVPResampler,
    pad_left,
    sincos_position_embedding,
)
from diffvp.outputs_diffvp import DiffVPComparison

# NumPy implementations, written from the formulas and the textbook definition of a Transformer layer


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def linear(x, layer):
    return x @ array(layer.weight).T + array(layer.bias)


def layer_norm(x, layer):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps) * array(layer.weight) + array(
        layer.bias
    )


def gelu(x):
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(query, key, value, heads):
    """Attend head by head: (Q, d), (N, d), (N, d) → (Q, d) and head-averaged weights (Q, N)."""
    width = query.shape[-1] // heads
    out, weights = [], []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        w = softmax(query[:, part] @ key[:, part].T / math.sqrt(width))
        out.append(w @ value[:, part])
        weights.append(w)
    return np.concatenate(out, -1), np.mean(weights, 0)


def resample(features, module, position, heads):
    values = layer_norm(features, module.feature_norm)
    keys = values + position
    latents = array(module.queries)
    for layer in module.layers:
        x = layer_norm(latents, layer.self_attention_norm)
        a = layer.self_attention
        latents = latents + linear(
            attend(linear(x, a.q_proj), linear(x, a.k_proj), linear(x, a.v_proj), heads)[0], a.o_proj
        )
        x = layer_norm(latents, layer.cross_attention_norm)
        a = layer.cross_attention
        out, weights = attend(linear(x, a.q_proj), linear(keys, a.k_proj), linear(values, a.v_proj), heads)
        latents = latents + linear(out, a.o_proj)
        x = layer_norm(latents, layer.mlp_norm)
        latents = latents + linear(gelu(linear(x, layer.mlp.fc1)), layer.mlp.fc2)
    return layer_norm(latents, module.norm), weights


def local_delta(v, r, epsilon):
    difference = v - r
    squared = (difference**2).sum(-1)
    w = squared / (squared.sum() + epsilon)
    return sum(w_i * d_i for w_i, d_i in zip(w, difference, strict=True)), w


def global_delta(v, r, module, heads):
    side = array(module.side_embedding)
    tokens = np.concatenate([array(module.query), v + side[0], r + side[1]])
    for layer in module.layers:
        x = layer_norm(tokens, layer.norm1)
        projected = x @ array(layer.self_attn.in_proj_weight).T + array(layer.self_attn.in_proj_bias)
        q, k, value = np.split(projected, 3, axis=-1)
        tokens = tokens + linear(attend(q, k, value, heads)[0], layer.self_attn.out_proj)
        x = layer_norm(tokens, layer.norm2)
        tokens = tokens + linear(gelu(linear(x, layer.linear1)), layer.linear2)
    return tokens[0]


@pytest.fixture
def module_config(tiny_config):
    torch.manual_seed(0)
    return tiny_config


@pytest.fixture
def pair(module_config):
    generator = torch.Generator().manual_seed(1)
    shape = (3, module_config.num_latents, module_config.latent_size)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def randomise(module):
    """Move biases and norms away from 0 and 1, so that an implementation that forgets one of them fails."""
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module


def test_resampler_matches_equation_3(module_config):
    module = randomise(DiffVPResampler(module_config))
    tokens = math.prod(module_config.feature_grid)
    features = torch.randn(2, tokens, module_config.encoder_hidden_size)
    latents, weights = module(features)
    position = array(sincos_position_embedding(module_config.feature_grid, module_config.encoder_hidden_size, "cpu"))
    for row in range(2):
        expected, expected_weights = resample(array(features[row]), module, position, module_config.resampler_heads)
        np.testing.assert_allclose(array(latents[row]), expected, atol=1e-5)
        np.testing.assert_allclose(array(weights[row]), expected_weights, atol=1e-5)


def test_global_delta_matches_equation_4(module_config, pair):
    module = randomise(DiffVPGlobalDelta(module_config))
    delta = module(*pair)
    for row in range(3):
        expected = global_delta(array(pair[0][row]), array(pair[1][row]), module, module_config.global_delta_heads)
        np.testing.assert_allclose(array(delta[row]), expected, atol=1e-5)


def test_local_delta_matches_equations_5_to_7(module_config, pair):
    delta, weights = DiffVPLocalDelta(module_config)(*pair)
    for row in range(3):
        expected, expected_weights = local_delta(
            array(pair[0][row]), array(pair[1][row]), module_config.difference_epsilon
        )
        np.testing.assert_allclose(array(delta[row]), expected, atol=1e-5)
        np.testing.assert_allclose(array(weights[row]), expected_weights, atol=1e-5)


def test_prompt_generator_matches_equation_8(module_config):
    module = randomise(DiffVPPromptGenerator(module_config))
    deltas = torch.randn(2, 3, module_config.latent_size)
    prompt = module(*deltas)
    hidden = gelu(linear(np.concatenate(array(deltas), axis=-1), module.fc1))
    expected = linear(hidden, module.fc2).reshape(3, module_config.num_prefix_tokens, -1)
    np.testing.assert_allclose(array(prompt), expected, atol=1e-5)


def test_noisy_or_is_the_product_over_voxels(module_config):
    module = DiffVPDiagnosisClassifier(module_config).eval()
    module.head.bias.data.fill_(-3.0)
    logits, voxel_logits = module(torch.randn(2, 1, *module_config.image_size))
    voxel_probabilities = 1 / (1 + np.exp(-array(voxel_logits)))
    np.testing.assert_allclose(array(logits.sigmoid()), 1 - np.prod(1 - voxel_probabilities, axis=1), atol=1e-5)


@pytest.mark.parametrize("bias", [-1000.0, 1000.0])
def test_noisy_or_stays_finite_when_every_voxel_is_certain(module_config, bias):
    model = DiffVPForDiagnosis(module_config).eval()
    model.classifier.head.bias.data.fill_(bias)
    labels = torch.zeros(1, module_config.num_labels_diagnosis)
    output = model(torch.randn(1, 1, *module_config.image_size), labels=labels)
    output.loss.backward()
    assert torch.isfinite(output.logits).all() and torch.isfinite(output.loss)
    assert torch.isfinite(model.classifier.head.bias.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_scans_have_no_local_difference(module_config, pair, dtype):
    latents = pair[0].to(dtype)
    delta, weights = DiffVPLocalDelta(module_config)(latents, latents)
    assert delta.dtype == dtype and weights.dtype == torch.float32
    assert torch.equal(delta, torch.zeros_like(delta)) and torch.equal(weights, torch.zeros_like(weights))
    assert torch.isfinite(randomise(DiffVPGlobalDelta(module_config)).to(dtype)(latents, latents)).all()


def test_local_delta_changes_sign_when_target_and_reference_are_swapped(module_config, pair):
    module = DiffVPLocalDelta(module_config)
    forward, weights = module(*pair)
    backward, weights_of_swapped = module(*reversed(pair))
    assert torch.equal(forward, -backward) and torch.equal(weights, weights_of_swapped)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3), atol=1e-5, rtol=0)


def test_only_the_side_embedding_tells_target_from_reference(module_config, pair):
    module = randomise(DiffVPGlobalDelta(module_config))
    assert (module(*pair) - module(*reversed(pair))).abs().max() > 1e-3
    config = DiffVPConfig(**{**module_config.to_dict(), "use_side_embedding": False})
    module = randomise(DiffVPGlobalDelta(config))
    torch.testing.assert_close(module(*pair), module(*reversed(pair)), atol=1e-5, rtol=1e-5)


def test_latent_locality_focuses_each_latent_on_its_own_place(module_config):
    """With constant features, attention depends on the place alone."""
    module_config.position_embedding, module_config.latent_locality = "none", 0.2
    module = randomise(DiffVPResampler(module_config))
    grid, count = module_config.feature_grid, module_config.num_latents
    _, weights = module(torch.ones(1, math.prod(grid), module_config.encoder_hidden_size))
    voxels = np.stack(np.meshgrid(*((np.arange(n) + 0.5) / n for n in grid), indexing="ij"), -1).reshape(-1, 3)
    g = 1.2207440846057596
    assert g**4 == pytest.approx(g + 1)
    for k in range(count):
        place = np.array([(0.5 + (k + 1) / g**axis) % 1 for axis in (1, 2, 3)])
        expected = np.exp(-((voxels - place) ** 2).sum(-1) / (2 * 0.2**2))
        np.testing.assert_allclose(array(weights)[0, k], expected / expected.sum(), rtol=1e-4, atol=1e-7)


def test_position_embedding_tells_left_from_right(module_config):
    grid = module_config.feature_grid
    code = sincos_position_embedding(grid, 48, "cpu").reshape(*grid, 48)
    assert not torch.allclose(code, code.flip(2))
    assert len({tuple(row.tolist()) for row in code.reshape(-1, 48)}) == math.prod(grid)


@pytest.mark.parametrize(("stride", "tokens"), [(2, 128), (1, 1024)])
def test_paper_config_gives_the_expected_number_of_voxel_tokens(stride, tokens):
    config = DiffVPConfig(encoder_stride=stride)
    assert math.prod(config.feature_grid) == tokens
    with torch.device("meta"):
        features = DiffVPVisionEncoder(config)(torch.empty(1, 1, 64, 256, 256))
    assert features.shape == (1, tokens, 512)


def test_paper_encoder_has_the_weight_names_of_monai_resnet18():
    from monai.networks.nets import resnet18

    with torch.device("meta"):
        encoder = DiffVPVisionEncoder(DiffVPConfig())
        monai = resnet18(n_input_channels=1, feed_forward=False, shortcut_type="A", conv1_t_stride=2)
    ours = {name: value.shape for name, value in encoder.resnet.state_dict().items()}
    assert ours == {name: value.shape for name, value in monai.state_dict().items()}


@pytest.mark.parametrize("shortcut_type", ["A", "B"])
def test_encoder_equals_the_monai_resnet(shortcut_type, module_config):
    from monai.networks.nets.resnet import ResNet

    arguments = {
        "block": "basic",
        "layers": [2, 2, 2, 2],
        "block_inplanes": list(module_config.encoder_block_channels),
        "n_input_channels": 1,
        "conv1_t_stride": 2,
        "shortcut_type": shortcut_type,
        "feed_forward": False,
    }
    fields = {"encoder_shortcut_type": shortcut_type, "encoder_max_pool": True}
    config = DiffVPConfig(**{**module_config.to_dict(), **fields})
    ours, theirs = DiffVPVisionEncoder(config).eval(), ResNet(**arguments).eval()
    theirs.load_state_dict(ours.resnet.state_dict())
    theirs.avgpool = torch.nn.Identity()
    volume = torch.randn(1, 1, *config.image_size)
    expected = theirs(volume).reshape(1, config.encoder_hidden_size, -1).transpose(1, 2)
    torch.testing.assert_close(ours(volume), expected, atol=1e-4, rtol=1e-4)


# The whole model


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({}, 4),
        ({"use_global_delta": False}, 4),
        ({"use_local_delta": False}, 4),
        ({"local_delta_weights": "uniform"}, 4),
        ({"difference_level": "pixel"}, 4),
        ({"difference_level": "target"}, 4),
        ({"difference_level": "none"}, 0),
        ({"difference_level": "none", "visual_tokens": "linear"}, 0),
        ({"use_diagnosis": False}, 4),
        ({"num_prefix_tokens": 32}, 32),
        ({"position_embedding": "none"}, 4),
        ({"latent_locality": 0.2}, 4),
    ],
)
def test_every_ablation_runs_from_a_config_value(make_model, scans, changes, prefix):
    model = make_model(**changes)
    lengths = []
    hook = model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    output = model(*scans, diagnosis_labels=torch.zeros(2, 18))
    hook.remove()
    config = model.config
    diagnosis = model.diagnosis_prompt(output.diagnosis_logits)[0].shape[1] if config.use_diagnosis else 0
    visual = math.prod(config.feature_grid) if config.visual_tokens == "linear" else config.num_latents
    assert lengths == [prefix + visual + diagnosis + len(config.instruction_ids)]
    output.loss.backward()
    without_gradient = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not [n for n in without_gradient if "classification_head" in n or "resampler" in n], without_gradient
    assert model.generate(*scans, max_new_tokens=3).shape == (2, 3)


def test_target_only_prompt_keeps_all_parameters_and_ignores_reference(make_model, scans):
    """Check the control of equal compute."""
    ours, control = make_model(), make_model(difference_level="target")
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in control.named_parameters()}
    target, reference = scans
    expected = control(target, reference)
    assert torch.equal(control(target, -reference).logits, expected.logits)
    assert not torch.equal(ours(target, -reference).logits, ours(target, reference).logits)
    v = array(expected.latents)
    delta, w = zip(*(local_delta(tokens, 0 * tokens, control.config.difference_epsilon) for tokens in v), strict=True)
    np.testing.assert_allclose(array(expected.difference_weights), w, rtol=1e-4)
    got = control.local_delta(expected.latents, torch.zeros_like(expected.latents))[0]
    np.testing.assert_allclose(array(got), delta, rtol=1e-3, atol=1e-5)


def test_uniform_weights_average_the_plain_difference(module_config, pair):
    module_config.local_delta_weights = "uniform"
    delta, weights = DiffVPLocalDelta(module_config)(*pair)
    v, r = (array(tokens) for tokens in pair)
    np.testing.assert_allclose(array(delta), (v - r).mean(1), rtol=1e-4, atol=1e-6)
    expected = np.stack([local_delta(a, b, module_config.difference_epsilon)[1] for a, b in zip(v, r, strict=True)])
    np.testing.assert_allclose(array(weights), expected, rtol=1e-4)


def test_linear_visual_tokens_are_the_voxel_tokens(make_model, scans):
    model = make_model(visual_tokens="linear", difference_level="none")
    features = model.extract_features(scans[0])
    assert torch.equal(model.encode(scans[0]), features)
    cached = model(ct_features=features, diagnosis_logits=model.diagnose(scans[0]))
    assert torch.equal(cached.logits, model(*scans).logits)
    assert not model.difference_map(*scans).any() and model.difference_map(*scans).shape == scans[0][:, 0].shape
    with pytest.raises(StrictDataclassClassValidationError, match='visual_tokens is "linear", but difference'):
        make_model(visual_tokens="linear")


def test_cached_features_give_the_same_outputs_as_volumes(make_model, scans):
    model = make_model()
    features, reference_features = (model.extract_features(scan) for scan in scans)
    cached = {
        "ct_features": features,
        "reference_features": reference_features,
        "diagnosis_logits": model.diagnose(scans[0]),
    }
    expected, got = model(*scans), model(**cached)
    assert torch.equal(expected.logits, got.logits)
    assert torch.equal(model.generate(*scans, max_new_tokens=6), model.generate(**cached, max_new_tokens=6))
    assert torch.equal(
        model.difference_map(*scans), model.difference_map(ct_features=features, reference_features=reference_features)
    )
    assert torch.equal(model.encode(scans[0]), expected.latents)


@pytest.mark.parametrize("level", ["latent", "pixel"])
def test_shared_encoder_encodes_a_scan_once_and_changes_nothing(make_model, scans, level, tmp_path):
    own, shared = make_model(difference_level=level), make_model(difference_level=level, share_encoder=True)
    own.diagnosis.vision_encoder.load_state_dict(own.vision_encoder.state_dict())
    missing = shared.load_state_dict(own.state_dict(), strict=False)
    assert not missing.missing_keys and all(key.startswith("diagnosis.vision") for key in missing.unexpected_keys)
    expected = own(*scans)
    encoded = []
    shared.vision_encoder.register_forward_hook(lambda module, inputs, output: encoded.append(len(output)))
    got = shared(*scans)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.diagnosis_logits, expected.diagnosis_logits)
    assert len(encoded) == 2  # the scan once, and the reference or the difference
    features = shared.extract_features(scans[0])
    assert torch.equal(shared.diagnose(ct_features=features), expected.diagnosis_logits)
    assert torch.equal(own.diagnose(scans[0], features), expected.diagnosis_logits)
    if level == "latent":
        cached = shared(ct_features=features, reference_features=shared.extract_features(scans[1]))
        assert torch.equal(cached.logits, expected.logits)
    shared.save_pretrained(tmp_path)
    loaded = DiffVPForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.diagnosis.vision_encoder is None and torch.equal(loaded(*scans).logits, expected.logits)


def test_wrong_inputs_are_refused(make_model, scans):
    model = make_model()
    with pytest.raises(ValueError, match="Give `ct` or `ct_features`"):
        model(reference=scans[1])
    with pytest.raises(ValueError, match="Give `reference` or `reference_features`"):
        model(ct=scans[0])
    with pytest.raises(ValueError, match=r"ct: shape \(2, 1, 16, 32, 32\) \(expected \(batch, 1, 32, 32, 32\)"):
        model(scans[0][:, :, :16], scans[1])
    with pytest.raises(ValueError, match="diagnosis_logits"):
        model(ct_features=model.extract_features(scans[0]), reference=scans[1])
    with pytest.raises(ValueError, match="batch size 1, the scans have 2"):
        model(*scans, input_ids=torch.tensor([[1]]))
    with pytest.raises(ValueError, match="Expected 8 voxel tokens"):
        model.encode(ct_features=torch.zeros(1, 5, 16))


def test_greedy_generate_is_the_argmax_of_forward(make_model, scans):
    model = make_model()
    generated = model.generate(*scans, max_new_tokens=8, do_sample=False, eos_token_id=None)
    ids = torch.tensor(model.config.instruction_ids).expand(2, -1)
    by_hand = []
    for _ in range(8):
        token = model(*scans, input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        by_hand.append(token)
        ids = torch.cat([ids, token], dim=1)
    assert torch.equal(generated, torch.cat(by_hand, dim=1))


def test_left_padded_batch_equals_single_scans(make_model, scans):
    """Diagnosis prompts and instructions of different lengths in one batch must not change a report."""
    model = make_model(diagnosis_threshold=0.5)
    short, long = [1, 40], [1, 50, 60, 70, 80]
    logits = torch.full((2, 18), -9.0)
    logits[1, :6] = 9.0
    input_ids = torch.tensor([[0, 0, 0, *short], long])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1] * 5])
    arguments = {"max_new_tokens": 8, "do_sample": False}
    both = model.generate(*scans, input_ids, mask, diagnosis_logits=logits, **arguments)
    for row, ids in enumerate((short, long)):
        one = [scan[row : row + 1] for scan in scans]
        alone = model.generate(*one, torch.tensor([ids]), diagnosis_logits=logits[row : row + 1], **arguments)
        assert torch.equal(both[row : row + 1, : alone.shape[1]], alone)
        logits_alone = model(*one, torch.tensor([ids]), diagnosis_logits=logits[row : row + 1]).logits[0, -1]
        logits_both = model(*scans, input_ids, mask, diagnosis_logits=logits).logits[row, -1]
        torch.testing.assert_close(logits_both, logits_alone, atol=1e-4, rtol=1e-4)


def test_padding_anywhere_in_a_batch_does_not_change_a_report(make_model, scans):
    """A report follows the last token of its text: padding on the right or within the text moves to the left."""
    model = make_model(diagnosis_threshold=0.5)
    short, long = [1, 40, 41], [1, 50, 60, 70, 80, 90]
    logits = torch.full((2, 18), -9.0)
    logits[0, :6] = 9.0
    arguments = {"diagnosis_logits": logits, "max_new_tokens": 8, "eos_token_id": None}

    def write(row: list[int], masks: list[int]) -> torch.Tensor:
        return model.generate(*scans, torch.tensor([row, long]), torch.tensor([masks, [1] * 6]), **arguments)

    expected = write([0, 0, 0, *short], [0, 0, 0, 1, 1, 1])
    one = [scan[:1] for scan in scans]
    alone = model.generate(*one, torch.tensor([short]), **arguments | {"diagnosis_logits": logits[:1]})
    assert torch.equal(expected[:1], alone)
    assert torch.equal(write([*short, 0, 0, 0], [1, 1, 1, 0, 0, 0]), expected)
    assert torch.equal(write([0, 1, 40, 0, 0, 41], [0, 1, 1, 0, 0, 1]), expected)


def test_all_padding_moves_to_the_left_or_only_that_before_the_text():
    mask = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1]])
    embeddings = torch.arange(12.0).view(2, 6, 1)
    moved, new = pad_left(embeddings, mask)
    assert moved[0, :, 0].tolist() == [1, 3, 5, 0, 2, 4] and new[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(moved[1], embeddings[1]) and torch.equal(new[1], mask[1])
    moved, new = pad_left(embeddings, mask, 3)
    assert moved[0, :, 0].tolist() == [1, 3, 0, 2, 4, 5] and new[0].tolist() == [0, 0, 1, 1, 1, 0]


def test_diagnosis_prompt_names_the_predicted_findings(make_model):
    model = make_model(diagnosis_threshold=[0.5] * 17 + [0.9])
    fragments = model.config.diagnosis_prompt_ids
    logits = torch.full((3, 18), -9.0)
    logits[1, [0, 3]] = 9.0
    logits[2, 17] = 1.0  # p = 0.73, below the threshold of its label
    ids, mask = model.diagnosis_prompt(logits)
    none = fragments["prefix"] + fragments["none"] + fragments["suffix"]
    two = fragments["prefix"] + fragments["labels"][0] + fragments["separator"] + fragments["labels"][3]
    assert [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)] == [
        none,
        two + fragments["suffix"],
        none,
    ]
    assert mask[0].tolist() == sorted(mask[0].tolist()), "expected padding on the left"


def test_losses_match_equations_10_and_11(make_model, scans):
    model = make_model(classification_loss_weight=0.25)
    ids = torch.tensor([[1, 20, 30, 40, 2], [1, 20, 35, 2, 0]])
    labels = torch.tensor([[-100, -100, 30, 40, 2], [-100, -100, 35, 2, -100]])
    truth = torch.zeros(2, 18)
    truth[:, 3] = 1
    output = model(*scans, ids, (ids != 0).long(), labels, truth)
    log_probabilities = output.logits.log_softmax(-1)
    picked = [log_probabilities[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, 5) if labels[b, t] >= 0]
    torch.testing.assert_close(output.generation_loss, -torch.stack(picked).mean())
    p = model.classification_head(output.latents.mean(1)).sigmoid()
    torch.testing.assert_close(output.classification_loss, -(truth * p.log() + (1 - truth) * (1 - p).log()).mean())
    torch.testing.assert_close(output.loss, output.generation_loss + 0.25 * output.classification_loss)


def test_loss_of_a_resized_llm_is_that_of_its_own_logits(make_model, scans):
    model = make_model()
    model.language_model.resize_token_embeddings(120)
    ids = torch.tensor([[1, 20, 30, 40, 2]] * 2)
    output = model(*scans, ids, labels=ids)
    assert output.logits.shape == (2, 5, 120)
    picked = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
    torch.testing.assert_close(output.generation_loss, -picked.mean())


def test_training_updates_exactly_the_trainable_parameters(make_model, scans):
    model = make_model(lora=True)
    own = ("resampler.", "global_delta.", "prompt_generator.", "visual_projection.", "classification_head.")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {n for n, _ in model.named_parameters() if n.startswith(own) or ".lora_" in n}
    assert trainable == expected and any(".lora_" in name for name in trainable)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([[1, 20, 30, 40, 2]] * 2)
    model.train()
    assert not any(m.training for m in (*model.vision_encoder.modules(), *model.diagnosis.modules()))
    for _ in range(2):  # lora_A has no gradient while lora_B is still zero
        model(*scans, ids, labels=ids, diagnosis_labels=torch.ones(2, 18)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trainable), name


def test_lora_starts_as_a_no_op(make_model, scans):
    base, adapted = make_model(), make_model(lora=True)
    state = {
        name.replace(".base_layer", ""): value for name, value in adapted.state_dict().items() if "lora_" not in name
    }
    base.load_state_dict(state)
    assert torch.equal(base(*scans).logits, adapted(*scans).logits)


def test_difference_map_is_large_where_the_changed_token_attends(make_model):
    """Check the upsampled, attention-weighted sum of token distances on a hand-made attention."""
    model = make_model()
    grid = model.config.feature_grid
    latents, other = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    latents[0, 1] = 2.0  # token 1 differs, by ‖·‖² = 16
    attention = torch.zeros(1, 2, math.prod(grid))
    attention[0, 1, -1] = 1.0  # and attends to the last voxel token only
    heat = model.difference_map(comparison=DiffVPComparison(latents, None, latents, other, attention))
    assert heat.shape == (1, *model.config.image_size)
    assert heat.max() == heat[0, -1, -1, -1] == 16.0 and heat[0, 0, 0, 0] == 0


def test_gradient_checkpointing_gives_the_same_gradients(make_model, scans):
    ids = torch.tensor([[1, 20, 30, 40, 2]] * 2)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model(lora=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.language_model.is_gradient_checkpointing
        model(*scans, ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], atol=1e-6, rtol=1e-4)


def test_bfloat16_forward_is_finite_and_close(make_model, scans):
    model = make_model()
    expected = model(*scans).logits
    got = model.to(torch.bfloat16)(*scans)
    assert got.logits.dtype == torch.bfloat16 and got.difference_weights.dtype == torch.float32
    assert (got.logits.float() - expected).abs().max() < 0.1 * expected.abs().max()
