# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Threads for decoding are chosen by measurement, and the caller's setting is restored."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from diffvp import threads_diffvp
from diffvp.threads_diffvp import quickest_threads


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("slow", "chosen"), [(1, 3), (3, 1), (None, 1)])
def test_faster_number_of_threads_is_chosen(slow, chosen, make_model, three_threads, monkeypatch):
    """Fake a clock on which `slow` threads take twice as long; if neither is slower, one thread is enough."""
    model, clock = make_model(lora=True), itertools.count()
    now = [0.0]
    monkeypatch.setattr(threads_diffvp.time, "perf_counter", lambda: now[0])
    real = F.linear

    def linear(*arguments):
        now[0] += 2.0 if torch.get_num_threads() == slow else 1.0
        next(clock)
        return real(*arguments)

    monkeypatch.setattr(threads_diffvp.F, "linear", linear)
    with quickest_threads(model.language_model, 16):
        assert torch.get_num_threads() == chosen
    assert torch.get_num_threads() == 3 and next(clock) > 0


def test_callers_thread_setting_is_restored(make_model, scans, three_threads):
    model, seen = make_model(), []
    model.language_model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    model.generate(*scans, max_new_tokens=3)
    assert set(seen) <= {1, 3} and torch.get_num_threads() == 3
    with pytest.raises(ValueError):
        model.generate(*scans, max_new_tokens=0)
    assert torch.get_num_threads() == 3


def test_single_thread_is_used_without_measuring(make_model, monkeypatch):
    language_model = make_model().language_model
    monkeypatch.setattr(threads_diffvp.F, "linear", None)
    assert torch.get_num_threads() == 1, "conftest.py sets one thread"
    with quickest_threads(language_model, 16):
        assert torch.get_num_threads() == 1
