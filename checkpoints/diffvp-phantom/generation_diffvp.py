# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""How a report is decoded: a generation config of the model's own, and what a call makes of it."""

import copy

from transformers import GenerationConfig

from .pipeline_diffvp import MAX_NEW_TOKENS, end_tokens

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def own_generation_config(base: GenerationConfig, tokenizer=None, max_new_tokens: int = MAX_NEW_TOKENS):
    """
    Greedy decoding up to a limit, with the special tokens of the base LLM.

    Nothing else of the base's config is taken over: most chat models sample, and a temperature without sampling cannot
    be saved.

    Args:
        tokenizer: with which reports are encoded. Its end token, which training teaches, ends a report too: chat
            models stop at another one than their tokenizer ends texts with.
    """
    tokens = {name: getattr(base, name) for name in SPECIAL_TOKENS}
    if tokenizer is not None:
        learned = {name: getattr(tokenizer, name) for name in SPECIAL_TOKENS if getattr(tokenizer, name) is not None}
        tokens |= learned
        ends = list(dict.fromkeys([learned.get("eos_token_id"), *end_tokens(base)]))
        tokens["eos_token_id"] = [end for end in ends if end is not None] or None
    if isinstance(tokens["eos_token_id"], list) and len(tokens["eos_token_id"]) == 1:
        [tokens["eos_token_id"]] = tokens["eos_token_id"]
    config = GenerationConfig(**tokens, do_sample=False, max_new_tokens=max_new_tokens)
    config.validate(strict=True)
    return config


def decoding_config(
    own: GenerationConfig, given: GenerationConfig | None, kwargs: dict
) -> tuple[GenerationConfig, dict]:
    """
    The config of one call, and those of its `kwargs` that are no fields of it.

    The LLM is given embeddings, and transformers would take their number from `max_length`. Lengths count the tokens
    that a call returns: `max_length` is `max_new_tokens`, `min_length` is `min_new_tokens`, the latter of each first.
    """
    config, kwargs = copy.deepcopy(own if given is None else given), dict(kwargs)
    for name in SPECIAL_TOKENS:
        if getattr(config, name) is None:
            setattr(config, name, getattr(own, name))
    for bound in ("max", "min"):
        length, new_tokens = f"{bound}_length", f"{bound}_new_tokens"
        of_call = kwargs.pop(length, None)
        if of_call is not None and kwargs.get(new_tokens) is None:
            kwargs[new_tokens] = of_call
        if getattr(config, new_tokens) is None:
            setattr(config, new_tokens, getattr(config, length))
        setattr(config, length, None)
    return config, config.update(**kwargs)


__all__ = ["decoding_config", "own_generation_config"]
