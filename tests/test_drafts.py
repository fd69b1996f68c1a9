# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Drafts: the same tokens in fewer steps for every family of bases, and a file without text of a single patient."""

import json
import random

import pytest
import torch
from transformers import GenerationConfig, TextStreamer
from transformers.generation.streamers import BaseStreamer

from diffvp.cli import SHIPPED_CHECKPOINT
from diffvp.data.load import load_dataset_cases
from diffvp.drafts_diffvp import CONTEXT, START, ReportDrafts, decode
from diffvp.inference.engines import TransformersEngine
from diffvp.inference.report import greedy
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from diffvp.storage_diffvp import DRAFTS_NAME, DiffVPCheckpointError
from diffvp.tests.base_families import FAMILIES, FEW_FAMILIES, TINY_FIELDS, write_base
from diffvp.training.config import read_settings
from diffvp.training.phantom_drafts import phantom_drafts
from diffvp.training.report_stage import make_drafts

from .marks import slow_except

TOKENS = 40


class Counted:
    """Count the steps of an LLM."""

    def __init__(self, language_model):
        self.steps = 0
        language_model.register_forward_pre_hook(self._count)

    def _count(self, *_):
        self.steps += 1

    def taken(self) -> int:
        steps, self.steps = self.steps, 0
        return steps


class Heard(BaseStreamer):
    def __init__(self):
        self.puts, self.ended = [], False

    def put(self, value):
        self.puts.append(value.tolist())

    def end(self):
        self.ended = True


def drafts_of(reports: list[list[int]], errors: float = 0.2) -> ReportDrafts:
    """Build drafts of these reports and make a fraction of their entries wrong."""
    drafts = ReportDrafts.build(reports, map(str, range(len(reports))), min_patients=1)
    rng = random.Random(0)
    for context in list(drafts.following):
        if rng.random() < errors:
            drafts.following[context] = rng.randrange(3, 90)
    return drafts


@pytest.fixture
def prompts():
    """Three prompts of different lengths, as passed to the engine."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 32, generator=generator) for length in (12, 9, 15)]


def without(model, prompts, decoding) -> list[list[int]]:
    drafts, model.drafts = model.drafts, None
    try:
        return [TransformersEngine(model).generate([prompt], decoding)[0] for prompt in prompts]
    finally:
        model.drafts = drafts


@pytest.mark.parametrize("family", slow_except(FEW_FAMILIES, FAMILIES))
def test_drafts_give_the_same_tokens_in_fewer_steps(family, tmp_path, prompts):
    base = write_base(tmp_path, FAMILIES[family])
    model = DiffVPForConditionalGeneration.from_base(str(base), config=dict(TINY_FIELDS))
    decoding = greedy(model, TOKENS)
    plain = without(model, prompts, decoding)
    # An end token that two rows reach and one does not: rows leave the batch one by one.
    decoding.eos_token_id = [2, plain[0][TOKENS // 2]]
    plain = without(model, prompts, decoding)
    model.drafts = drafts_of(plain)
    counted, engine = Counted(model.language_model), TransformersEngine(model)
    assert [engine.generate([prompt], decoding)[0] for prompt in prompts] == plain
    alone = counted.taken()
    assert engine.generate(prompts, decoding) == plain
    together = counted.taken()
    windows = {"Mistral", "Gemma 2", "Gemma 3", "Mamba"}  # their caches cannot be cropped
    if family not in windows:
        assert alone < sum(map(len, plain)) * 0.8
    if family not in windows | {"MPT", "Bloom"}:  # without position ids
        assert together < max(map(len, plain)) * 0.8


def test_wrong_drafts_do_not_change_the_output(make_model, prompts):
    model = make_model(lora=True)
    decoding = greedy(model, TOKENS)
    plain = without(model, prompts, decoding)
    model.drafts = drafts_of(plain, errors=1.0)
    assert TransformersEngine(model).generate(prompts, decoding) == plain


@pytest.mark.parametrize(
    "settings", [{"min_new_tokens": 30}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2}, {}], ids=str
)
@pytest.mark.parametrize("limit", slow_except([1, 17, TOKENS], [1, 2, 17, TOKENS]))
def test_drafts_respect_limits_and_penalties(settings, limit, make_model, scans):
    model = make_model()
    settings = settings | {"min_new_tokens": min(settings.get("min_new_tokens", 0), limit)}
    ends = model.generate(*scans, max_new_tokens=TOKENS, **settings)[:, 5].tolist()
    options = {"max_new_tokens": limit, "eos_token_id": ends, "pad_token_id": 0, **settings}
    plain = model.generate(*scans, **options)
    model.drafts = drafts_of([[token for token in row if token] for row in plain.tolist()])
    counted = Counted(model.language_model)
    assert torch.equal(model.generate(*scans, **options), plain)
    drafted = counted.taken()
    assert torch.equal(model.generate(*scans, **options, num_assistant_tokens=0), plain)
    assert counted.taken() == plain.shape[1] and drafted <= plain.shape[1]


def test_sampling_beams_and_scores_are_unchanged_by_drafts(make_model, scans):
    model = make_model()
    options = [
        {"do_sample": True, "top_k": 5}, {"num_beams": 3}, {"return_dict_in_generate": True, "output_scores": True},
        {"prefix_allowed_tokens_fn": lambda batch, ids: [7 + batch, 9]},
    ]  # fmt: skip
    written = []
    for drafts in (None, drafts_of(model.generate(*scans, max_new_tokens=12).tolist())):
        model.drafts = drafts
        torch.manual_seed(0)
        results = [model.generate(*scans, max_new_tokens=12, **one) for one in options]
        written.append([getattr(result, "sequences", result).tolist() for result in results])
    assert written[0] == written[1]


def test_streamer_receives_the_same_tokens(make_model, scans, tokenizer, capsys):
    model, one = make_model(), [scan[:1] for scan in scans]
    heard = []
    plain = model.generate(*one, max_new_tokens=20)
    for drafts in (None, drafts_of(plain.tolist(), errors=0.1)):
        model.drafts, streamer = drafts, Heard()
        model.generate(*one, max_new_tokens=20, streamer=streamer)
        heard.append((streamer.puts, streamer.ended))
    assert heard[0] == heard[1] and heard[0][1] and len(heard[0][0]) == 21  # 20 tokens after the empty prompt
    model.generate(*one, max_new_tokens=20, streamer=TextStreamer(tokenizer))
    assert tokenizer.decode(plain[0], skip_special_tokens=False)[:4] in capsys.readouterr().out


def test_each_prompt_of_a_batch_can_be_followed_with_drafts(make_model, prompts):
    """A client of the server follows its report; the other reports of the batch keep their drafts."""
    model = make_model(lora=True)
    decoding = greedy(model, TOKENS)
    plain = without(model, prompts, decoding)
    model.drafts = drafts_of(plain, errors=0.2)
    counted, steps = Counted(model.language_model), []
    for drafts in (model.drafts, None):
        model.drafts, heard = drafts, [[] for _ in prompts]
        engine = TransformersEngine(model)
        assert engine.generate(prompts, decoding, lambda index, token: heard[index].append(token)) == plain  # noqa: B023
        assert [row[: len(tokens)] for row, tokens in zip(heard, plain, strict=True)] == plain
        steps.append(counted.taken())
    assert steps[0] < steps[1] / 2


def test_drafts_are_saved_and_loaded_with_the_checkpoint(make_model, scans, tmp_path):
    model = make_model(lora=True)
    plain = model.generate(*scans, max_new_tokens=20)
    model.drafts = drafts_of(plain.tolist())
    model.save_pretrained(tmp_path / "model")
    loaded = DiffVPForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.drafts.following == model.drafts.following and loaded.drafts.min_patients == 1
    counted = Counted(loaded.language_model)
    assert torch.equal(loaded.generate(*scans, max_new_tokens=20), plain) and counted.taken() < 15
    assert TransformersEngine(loaded).name.endswith("with drafts")
    loaded.drafts = None
    loaded.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / DRAFTS_NAME).exists()
    assert DiffVPForConditionalGeneration.from_pretrained(tmp_path / "model").drafts is None


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", *(json.dumps({"min_patients": 1, "following": rows}) for rows in (
        3, [3], [[]], [[96]], [[-1]], [[3, -1]], [[True]], [["a"]], [[3] * (CONTEXT + 2)]
    ))],
)  # fmt: skip
def test_damaged_drafts_file_is_named(content, make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / DRAFTS_NAME).write_text(content)
    with pytest.raises(
        DiffVPCheckpointError, match=r"drafts\.json: following: .* \(expected rows of token ids below 96"
    ):
        DiffVPForConditionalGeneration.from_pretrained(tmp_path)


def test_drafts_omit_text_of_few_patients():
    common, name = [5, 6, 7, 8], [31, 32, 33]
    reports = [(common + [2], str(patient)) for patient in range(9)]
    reports += [(common + name + [2], "9")] * 30  # many reports of one patient count once
    drafts = ReportDrafts.build(*zip(*reports, strict=True), min_patients=3)
    seen = {token for context, token in drafts.following.items() for token in (*context, token)}
    assert seen <= {START, *common, 2}
    assert drafts.continuation([], 10)[:5] == [*common, 2]
    for context, token in drafts.following.items():  # an independent count
        text = " ".join(map(str, (*context, token)))
        whose = {patient for report, patient in reports if f" {text} " in f" {' '.join(map(str, [START, *report]))} "}
        assert len(whose) >= 3, text


def test_continuation_is_the_most_frequent_token():
    """Compared with counts in the reports themselves."""
    rng = random.Random(0)
    reports = [[rng.choice([3, 4]) for _ in range(30)] + [2] for _ in range(40)]
    drafts = ReportDrafts.build(reports, map(str, range(40)), min_patients=2)
    for report in reports[:5]:
        for place in range(len(report)):
            context = [START, *report[:place]][-CONTEXT:]
            for begin in range(len(context) + 1):  # the longest suffix that two reports share
                end = context[begin:]
                counts = {}
                for token in (2, 3, 4):
                    text = f" {' '.join(map(str, [*end, token]))} "
                    counts[token] = sum(text in f" {' '.join(map(str, [START, *other]))} " for other in reports)
                if max(counts.values()) >= 2:
                    break
            most = min(token for token in counts if counts[token] == max(counts.values()))
            assert drafts.continuation(report[:place], 1) == [most]


def test_decode_leaves_the_generation_config_unchanged(make_model, prompts):
    model = make_model()
    model.drafts = drafts_of([[5, 6, 7]])
    decoding = GenerationConfig(max_new_tokens=4, pad_token_id=0)
    before = decoding.to_dict()
    decode(model.language_model, model.drafts, prompts[0][None], torch.ones(1, 12, dtype=torch.long), decoding)
    assert decoding.to_dict() == before


@pytest.mark.slow
def test_shipped_drafts_are_those_of_its_training_reports():
    """Rebuilt from the seeds of the cases on which configs/phantom_more.yaml trains the report generator last."""
    settings = read_settings(SHIPPED_CHECKPOINT.parents[1] / "configs" / "phantom_more.yaml")
    first, stop = settings["data"]["report_cases"]
    made = phantom_drafts(SHIPPED_CHECKPOINT, settings["seed"], first, stop - 1)
    shipped = ReportDrafts.load(SHIPPED_CHECKPOINT / DRAFTS_NAME, len(made.following) + 50_000)
    assert (shipped.following, shipped.min_patients) == (made.following, made.min_patients)
    assert len(shipped.following) > 500 and shipped.min_patients == 10


def test_training_builds_drafts_from_its_reports(small_cohort, tokenizer):
    cases = load_dataset_cases("phantom", small_cohort, "train")
    processor = DiffVPProcessor(DiffVPImageProcessor(), tokenizer)
    drafts = make_drafts(cases, processor, 10)
    rows = [[token for token in (*context, token) if token >= 0] for context, token in drafts.following.items()]
    ends = [tokenizer.decode(row) for row in rows]
    assert drafts.min_patients == 10 and ends
    for text in ends:
        assert sum(text.removesuffix("</s>") in case.report for case in cases) >= 10, text
    assert make_drafts(cases, processor, None) is None and make_drafts(cases, processor, 1000) is None
