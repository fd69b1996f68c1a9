# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
How many threads decode: one, or all that torch may use, whichever is quicker at the moment.

A step of decoding is hundreds of small products, after each of which threads wait for each other. On a quiet machine a
second thread helps a little. Where another process has its core, each wait lasts until that one is interrupted, and a
report takes many times longer than with one thread.
"""

import contextlib
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

ROUNDS = 4
MATRICES = 15  # of about two blocks: 5 ms of a model of 135 M parameters
GAIN = 0.9  # more threads have to be so much quicker: they take the cores of others


@contextlib.contextmanager
def quickest_threads(language_model: PreTrainedModel, tokens: int) -> Iterator[None]:
    """
    While it lasts, torch computes with one thread or with as many as it was set to; afterwards with those again.

    Args:
        tokens: of a step.
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
    embeddings = language_model.get_input_embeddings().weight
    matrices = [
        weight.detach()
        for weight in language_model.parameters()
        if weight.ndim == 2 and weight.is_floating_point() and weight.shape != embeddings.shape
    ][:MATRICES]
    spent = {1: 0.0, most: 0.0}
    for round_ in range(ROUNDS + 1):
        for threads in spent:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            for matrix in matrices:
                F.linear(matrix.new_zeros(tokens, matrix.shape[1]), matrix)
            if round_:  # the first one wakes them up
                spent[threads] += time.perf_counter() - start
        if spent[most] > 3 * spent[1]:  # on a busy machine measuring takes long, too
            break
    return most if spent[most] < GAIN * spent[1] else 1


__all__ = ["quickest_threads"]
