# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Causal LLMs as a base: each family is correct in a batch, or refused when the model is constructed."""

import json

import pytest
import torch

from diffvp.bases_diffvp import DiffVPBaseModelError, check_language_model, load_base_model
from diffvp.benchmarks.bases import BATCH, LIMIT, NAMES, TRIPS, measure, table
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.tests.base_families import FAMILIES, FEW_FAMILIES, REFUSED, TOKENS, write_base

from .marks import slow_except


@pytest.fixture
def make_on(tiny_fields, tmp_path):
    def make(family: tuple[str, dict]) -> DiffVPForConditionalGeneration:
        base = write_base(tmp_path / "base", family)
        torch.manual_seed(0)
        return DiffVPForConditionalGeneration.from_base(str(base), config=tiny_fields)

    return make


@pytest.mark.parametrize("family", slow_except(FEW_FAMILIES, FAMILIES))
def test_batch_gives_the_same_logits_tokens_and_loss_as_single_scans(make_on, scans, family):
    """One scan has all findings and the other none, so that the shorter prompt is padded."""
    model = make_on(FAMILIES[family])
    findings = torch.full((2, 18), -9.0)
    findings[1] = 9.0
    text = torch.randint(40, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    labels = text.clone()
    labels[:, :4] = -100
    batch, *alone = (
        [*(scan[rows] for scan in scans), text[rows], None, labels[rows], None, None, None, findings[rows]]
        for rows in (slice(0, 2), slice(0, 1), slice(1, 2))
    )
    with torch.no_grad():
        whole, first, second = (model(*inputs) for inputs in (batch, *alone))
    torch.testing.assert_close(whole.logits[:1], first.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.logits[1:], second.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(whole.loss, (first.loss + second.loss) / 2, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 10, "do_sample": False}
    written = model.generate(*batch[:3], diagnosis_logits=findings, **options)[0].tolist()
    [expected] = model.generate(*alone[0][:3], diagnosis_logits=findings[:1], **options).tolist()
    assert written[: len(expected)] == expected and not any(written[len(expected) :])


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_base_is_refused_at_construction(make_on, family):
    with pytest.raises(DiffVPBaseModelError):
        make_on(REFUSED[family])


def test_decoder_of_an_encoder_decoder_is_refused_at_construction(make_on):
    """BART takes its decoder's inputs under other names, which ends in an IndexError."""
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 1}
    sizes |= {"d_model": 32, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    with pytest.raises(DiffVPBaseModelError):
        make_on(("BartConfig", {**TOKENS, "vocab_size": 96, **sizes}))


@pytest.mark.parametrize("error", [IndexError, KeyError, AttributeError, RuntimeError, torch.OutOfMemoryError])
def test_failure_of_an_llm_in_the_check_is_a_refusal_unless_memory_is_short(tiny_llm, monkeypatch, error):
    language_model = load_base_model(str(tiny_llm))

    def fail(**inputs):
        raise error("made up")

    monkeypatch.setattr(language_model, "forward", fail)
    with pytest.raises(error if error is torch.OutOfMemoryError else DiffVPBaseModelError):
        check_language_model(language_model, "made-up")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounding_is_accepted(tiny_fields, tmp_path, dtype):
    base = write_base(tmp_path / "base", FAMILIES["Llama"])
    assert DiffVPForConditionalGeneration.from_base(str(base), config=tiny_fields, dtype=dtype).dtype == dtype


def test_padding_of_shorter_instructions_precedes_the_whole_prompt(make_model, scans):
    model = make_model()
    ids = torch.tensor([[0, 0, 40, 41], [40, 41, 42, 43]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    short, _ = model.embed_prompt(*scans, ids, mask)
    [alone] = model.embed_prompt(*(scan[:1] for scan in scans), ids[:1, 2:])
    torch.testing.assert_close(short, alone)
    with torch.no_grad():
        padded = model(*scans, ids, mask).logits[0, 2:]
        torch.testing.assert_close(
            padded, model(*(scan[:1] for scan in scans), ids[:1, 2:]).logits[0], atol=1e-5, rtol=0
        )


# `python -m diffvp.benchmarks.bases` measures the other families in the same way; that is too slow for a test.
@pytest.mark.parametrize("name", slow_except(["Mamba"], ["Llama, tied", "Mamba"]))
def test_model_on_each_base_survives_every_round_trip(tmp_path, name):
    found = measure(name, tmp_path)
    assert [found[trip] <= LIMIT for trip in (BATCH, *TRIPS)] == [True] * 7, found


def test_table_in_docs_is_the_measured_one_with_every_family(repository_root):
    families = json.loads((repository_root / "benchmarks/results/bases.json").read_text())["families"]
    assert list(families) == NAMES
    assert table(families) in (repository_root / "docs/bases.md").read_text()
    assert table(families) in (repository_root / "benchmarks/results/bases.md").read_text()
