# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Information in prompts: probes, analysis of variance and overlap of latents, on values with a known answer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from diffvp.data.phantom_cases import load_phantom
from diffvp.data.pool import is_normal
from diffvp.experiments.kinds.information import (
    latent_overlap,
    probe,
    prompt_following,
    prompt_parts,
    score_information,
    variance_shares,
)


class Kept(dict):
    """Features by case name."""

    def load(self, case):
        return self[case.name]

    def inputs(self, case, references):
        [reference] = references
        return {"ct_features": self[case.name]["features"], "reference_features": self[reference.name]["features"]}


@pytest.fixture
def cases(small_cohort):
    return load_phantom(small_cohort, "train")


def test_probe_finds_encoded_labels_and_nothing_in_noise(cases):
    rng = np.random.default_rng(0)
    labels = (rng.random((220, 18)) < 0.4).astype(int)
    labelled = [replace(cases[0], labels=row.astype(np.int8)) for row in labels]
    train, test = labelled[:150], labelled[150:]
    told = labels @ rng.normal(size=(18, 40)) + rng.normal(0, 0.1, (220, 40))
    found = probe(told[:150], train, told[150:], test)
    assert found["auroc"] > 0.99 and found["labels"] == 18
    nothing = probe(rng.normal(size=(150, 40)), train, rng.normal(size=(70, 40)), test)
    assert 0.44 < nothing["auroc"] < 0.56


@given(seed=st.integers(0, 2**16), scales=st.tuples(*[st.floats(0.1, 10)] * 3))
@settings(max_examples=30, deadline=None)
def test_variance_shares_equal_their_construction(seed, scales):
    rng = np.random.default_rng(seed)
    patient, reference = rng.normal(size=(5, 1, 4)), rng.normal(size=(1, 3, 4))
    both = rng.normal(size=(5, 3, 4))
    # Centre the main effects and remove them from the interaction, so that the three parts are orthogonal.
    patient -= patient.mean(axis=0)
    reference -= reference.mean(axis=1)
    both = both - both.mean(axis=0, keepdims=True) - both.mean(axis=1, keepdims=True) + both.mean(axis=(0, 1))
    parts = [
        scale * np.broadcast_to(part, (5, 3, 4))
        for scale, part in zip(scales, (patient, reference, both), strict=True)
    ]
    squares = [np.square(part).sum() for part in parts]
    shares = variance_shares(7.0 + sum(parts))
    assert list(shares) == ["patient", "reference", "interaction"]
    np.testing.assert_allclose(list(shares.values()), np.array(squares) / sum(squares), rtol=1e-9, atol=1e-12)


def test_identical_prompts_have_no_variance_shares():
    with pytest.raises(ValueError, match="the same"):
        variance_shares(np.ones((3, 2, 4)))


@pytest.mark.parametrize("use_diagnosis", [True, False])
def test_prompt_parts_equal_the_input_of_the_llm(make_model, cases, use_diagnosis):
    model = make_model(use_diagnosis=use_diagnosis).eval()
    grid = int(np.prod(model.config.feature_grid))
    generator = torch.Generator().manual_seed(0)
    kept = Kept(
        {
            case.name: {
                "features": torch.randn(grid, model.config.encoder_hidden_size, generator=generator),
                **({"diagnosis_logits": torch.randn(18, generator=generator)} if use_diagnosis else {}),
            }
            for case in cases[:3]
        }
    )
    first, second, third = cases[:3]
    parts, others = (prompt_parts(model, kept, [first, first], pair) for pair in ([second, third], [third, third]))
    own, other = (kept.load(case)["features"][None] for case in (first, second))
    with torch.no_grad():
        pair = model.encode(ct_features=own), model.encode(ct_features=other)
        prompt = model.prompt_generator(model.global_delta(*pair), model.local_delta(*pair)[0])
        visual = model.visual_projection(pair[0])
    np.testing.assert_allclose(parts["difference prompt"][0], prompt.flatten(), atol=1e-6)
    np.testing.assert_allclose(parts["visual tokens"][0], visual.flatten(), atol=1e-6)
    assert ("predicted findings" in parts) == use_diagnosis
    # Another reference changes only the parts computed from it.
    changed = {name for name in parts if not np.array_equal(parts[name][0], others[name][0])}
    assert changed == {"difference prompt", "reference's encoder output, mean"}


@pytest.mark.parametrize("locality", [None, 0.05])
def test_latents_with_locality_share_less_attention(make_model, cases, locality):
    model = make_model(latent_locality=locality).eval()
    grid = int(np.prod(model.config.feature_grid))
    generator = torch.Generator().manual_seed(0)
    shape = grid, model.config.encoder_hidden_size
    kept = Kept({case.name: {"features": torch.randn(shape, generator=generator)} for case in cases[:2]})
    overlap = latent_overlap(model, kept, cases[:1], {cases[0].name: cases[1]})
    # Queries with random weights prefer no position and attend everywhere.
    assert (overlap["attention"] > 0.9) == (locality is None)
    own, other = (model.encode(ct_features=kept.load(case)["features"][None])[0] for case in cases[:2])
    unit = torch.nn.functional.normalize((own - other).detach(), dim=-1)
    cosines = (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)]
    assert overlap["difference"] == pytest.approx(float(cosines.mean()), abs=1e-5)


def test_copying_the_prompt_writes_true_and_false_findings_equally():
    rng = np.random.default_rng(0)
    truth, told = rng.random((500, 18)) < 0.2, rng.random((500, 18)) < 0.3
    copied = prompt_following(told, truth, told & (rng.random(told.shape) < 0.6))
    shares = {name: of["written"] for name, of in copied["shares"].items()}
    assert shares["told, true"] == pytest.approx(0.6, abs=0.05)
    assert shares["told, false"] == pytest.approx(0.6, abs=0.05)
    assert shares["not told, true"] == shares["not told, false"] == 0
    assert copied["f1"] == pytest.approx(f1_score(truth, told, average="micro"))
    seen = prompt_following(told, truth, truth)["shares"]
    assert [of["written"] for of in seen.values()] == [1, 0, 1, 0]
    assert sum(of["count"] for of in seen.values()) == truth.size
    assert prompt_following(~truth & False, truth, truth)["shares"]["told, true"] == {"count": 0, "written": None}


def test_unanswerable_information_scores_are_refused(make_model, cases):
    references, labels = {case.name: cases[0] for case in cases}, np.stack([case.labels for case in cases])
    with pytest.raises(ValueError, match="difference_level is 'pixel'"):
        score_information(make_model(difference_level="pixel"), Kept(), *[(cases, references)] * 2, labels)
    normal = [case for case in cases if is_normal(case)]
    with pytest.raises(ValueError, match="None of the 7 test cases is abnormal"):
        score_information(make_model(), Kept(), (cases, references), (normal, references), labels)
