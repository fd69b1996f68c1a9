# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Generation config of the model, and the config of a single call."""

import copy

from transformers import GenerationConfig

from .report_diffvp import MAX_NEW_TOKENS, end_tokens

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def own_generation_config(base: GenerationConfig, tokenizer=None, max_new_tokens: int = MAX_NEW_TOKENS):
    """
    Return a config for greedy decoding up to a limit, with the special tokens of the base LLM.

    Only the special tokens are copied from the base's config: most chat models sample, and a config with a temperature
    but without sampling cannot be saved.

    Args:
        base: generation config of the base LLM.
        tokenizer: tokenizer that encodes the reports. Its end token, which the model learns, also ends a report: chat
            models stop at a different token.
        max_new_tokens: maximum length of a report in tokens.
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
    Return the config of one call, and the `kwargs` that are not fields of it.

    Lengths count the generated tokens: the LLM gets embeddings as its prompt, and transformers would subtract their
    number from `max_length`. `max_length` therefore sets `max_new_tokens`, and `min_length` sets `min_new_tokens`;
    `max_new_tokens` and `min_new_tokens` take precedence if given.

    Args:
        own: generation config of the model.
        given: generation config of the call, which replaces `own`; missing special tokens are filled from `own`.
        kwargs: arguments of the call.
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
