# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Number of threads for decoding: one, or all that torch may use, whichever is faster at the moment.

A decoding step consists of hundreds of small matrix products, and the threads synchronize after each of them. On an
idle machine a second thread helps a little. If another process occupies its core, each synchronization lasts until
that process is preempted, and a report takes many times longer than with one thread.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

ROUNDS = 4
MATRICES = 15  # those of about two Transformer blocks: 5 ms for a model with 135 M parameters
GAIN = 0.9  # all threads are used only if their time is below this fraction: they take cores from other processes


@contextlib.contextmanager
def quickest_threads(language_model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """
    Context in which torch computes with one thread or with its present number; the number is restored at the end.

    Args:
        tokens: number of tokens per decoding step.
    """
    before = torch.get_num_threads()
    if before == 1 or language_model.device.type != "cpu":
        yield
        return
    try:
        torch.set_num_threads(_quickest(language_model, tokens, before))
        yield
    finally:
        torch.set_num_threads(before)


def _quickest(language_model: PreTrainedModel, tokens: int, most: int) -> int:
    """Time products with the LLM's own matrices; return the faster of 1 and `most` threads."""
    embeddings = language_model.get_input_embeddings().weight
    matrices = [
        weight.detach()
        for weight in language_model.parameters()
        if weight.ndim == 2 and weight.is_floating_point() and weight.shape != embeddings.shape
    ][:MATRICES]
    if not matrices:  # a quantised LLM
        return 1
    spent = {1: 0.0, most: 0.0}
    for round_ in range(ROUNDS + 1):
        for threads in spent:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            for matrix in matrices:
                F.linear(matrix.new_zeros(tokens, matrix.shape[1]), matrix)
            if round_:  # the first round only wakes the threads up
                spent[threads] += time.perf_counter() - start
        if spent[most] > 3 * spent[1]:  # stop early: on a busy machine the measurement itself takes long
            break
    return most if spent[most] < GAIN * spent[1] else 1


__all__ = ["quickest_threads"]
