# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Draft the next tokens of a report, and let the LLM check many at a time: the same report in fewer steps.

Reports of one department repeat each other. [`ReportDrafts`] stores which token most often follows the last few
tokens. [`DraftedDecoding`] lets the LLM read such a continuation in one step and keeps the tokens that the LLM would
have written itself. A step of sixteen tokens costs little more than a step of one: both read the same weights.

As in a batch, sums in a longer step are rounded differently in the last digit. If two tokens tie up to that digit,
either may be written.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer

from .report_diffvp import end_tokens
from .storage_diffvp import DRAFTS_NAME, DiffVPCheckpointError, replacing
from .threads_diffvp import quickest_threads

START = -1  # placed before the first token of a report
CONTEXT = 8  # number of previous tokens that a draft depends on; more gave no improvement on phantoms
DRAFT_TOKENS = 16  # maximum length of a row's draft; on two cores, longer drafts cost more than they save
STEP_TOKENS = 64  # maximum of all rows in a step; above it, computing takes as long as reading the weights
MIN_PATIENTS = 10

# Drafts require greedy decoding with no other options than these.
CHECKABLE = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length", "min_new_tokens", "min_length",
    "do_sample", "num_beams", "temperature", "top_k", "top_p", "use_cache", "output_attentions",
    "output_hidden_states", "transformers_version", "repetition_penalty", "no_repeat_ngram_size", "max_time",
    "num_assistant_tokens", "num_return_sequences", "return_dict_in_generate",
}  # fmt: skip


class ReportDrafts:
    """
    Table of the tokens that most often follow short sequences in reports.

    Args:
        following: {tokens: the token that follows them}; the longest entry that matches the end of a text applies.
        min_patients: minimum number of patients in whose reports each entry occurs.

    ```python
    drafts = ReportDrafts.build([processor.encode_report(text) for text in reports], patients)
    model.drafts = drafts  # and model.save_pretrained(folder) writes drafts.json
    ```
    """

    def __init__(self, following: dict[tuple[int, ...], int], min_patients: int):
        self.following, self.min_patients = following, min_patients

    @classmethod
    def build(
        cls, reports: Iterable[Sequence[int]], patients: Iterable[str], min_patients: int = MIN_PATIENTS
    ) -> "ReportDrafts":
        """
        Count which tokens follow which sequences.

        Args:
            reports: token ids of each report, with the end token.
            patients: the patient of each report.
            min_patients: sequences from fewer patients, such as a name, a number or a rare finding, are left out.
        """
        owners: dict[tuple[int, ...], set[str]] = defaultdict(set)
        for report, patient in zip(reports, patients, strict=True):
            tokens = (START, *report)
            for end in range(2, len(tokens) + 1):
                for begin in range(max(end - 1 - CONTEXT, 0), end):
                    owners[tokens[begin:end]].add(patient)
        counts: dict[tuple[int, ...], Counter] = defaultdict(Counter)
        for tokens, whose in owners.items():
            if len(whose) >= min_patients:
                counts[tokens[:-1]][tokens[-1]] = len(whose)
        following: dict[tuple[int, ...], int] = {}
        for context in sorted(counts, key=lambda tokens: (len(tokens), tokens)):
            most = max(counts[context].values())
            token = min(token for token, count in counts[context].items() if count == most)
            if _longest(following, context[1:]) != token or not context:  # else the shorter context is enough
                following[context] = token
        return cls(following, min_patients)

    def continuation(self, written: Sequence[int], count: int) -> list[int]:
        """Draft at most `count` tokens after the tokens that are already `written`."""
        context, draft = (START, *written)[-CONTEXT:], []
        while len(draft) < count and (token := _longest(self.following, context)) is not None:
            draft.append(token)
            context = (*context, token)[-CONTEXT:]
        return draft

    def save(self, folder: Path) -> Path:
        """Write the drafts into the folder of a checkpoint, and return the path."""
        path = folder / DRAFTS_NAME
        entries = sorted([*context, token] for context, token in self.following.items())
        document = {"min_patients": self.min_patients, "following": entries}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str, vocab_size: int) -> "ReportDrafts":
        """
        Load the drafts of a checkpoint.

        Raises:
            DiffVPCheckpointError: the file is damaged or belongs to another tokenizer.
        """
        expected = f"rows of token ids below {vocab_size}, as save_pretrained writes them"
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            min_patients, entries = document["min_patients"], document["following"]
            wrong = [row for row in entries if not _is_entry(row, vocab_size)]
        except (ValueError, KeyError, TypeError) as error:
            raise DiffVPCheckpointError(f"{path}: following: unreadable, {error} (expected {expected}).") from error
        if wrong:
            raise DiffVPCheckpointError(f"{path}: following: {str(wrong[0])[:80]} (expected {expected}).")
        return cls({tuple(row[:-1]): row[-1] for row in entries}, min_patients)


def _is_entry(row, vocab_size: int) -> bool:
    whole = isinstance(row, list) and 1 <= len(row) <= CONTEXT + 1 and all(type(token) is int for token in row)
    return whole and all(START <= token < vocab_size for token in row) and row[-1] != START


def _longest(following: dict[tuple[int, ...], int], context: tuple[int, ...]) -> int | None:
    """Return the token that follows the longest known suffix of `context`."""
    for begin in range(len(context) + 1):
        token = following.get(context[begin:])
        if token is not None:
            return token
    return None


def decode(
    language_model: PreTrainedModel,
    drafts: ReportDrafts | None,
    embeddings: torch.Tensor,
    mask: torch.Tensor,
    decoding: GenerationConfig,
    on_token: Callable[[int, int], None] | None = None,
    **kwargs,
) -> torch.LongTensor:
    """
    Run the LLM's `generate` on a prompt of embeddings, with drafts if they only change the speed.

    Drafts are used only in greedy decoding. The config's `num_assistant_tokens`, transformers' own field, sets the
    length of a draft; 0 turns drafts off.

    Args:
        drafts: drafts of the checkpoint; `None` decodes without.
        embeddings, mask: (batch, length, h) and (batch, length), padded on the left.
        decoding: config of the call.
        on_token: called with row and token when a token is written. Unlike a `streamer`, it follows several rows with
            drafts. Without drafts, ended rows give padding until all have ended.
        kwargs: further arguments of `generate`.
    """
    generator: Any = language_model  # `generate` comes from GenerationMixin, not PreTrainedModel
    length = DRAFT_TOKENS if decoding.num_assistant_tokens is None else decoding.num_assistant_tokens
    # Streamers and stopping criteria expect all rows to advance together, but with drafts each row has its own pace.
    followed = len(embeddings) > 1 and (kwargs.get("streamer"), kwargs.get("stopping_criteria")) != (None, None)
    others = {key for key, value in kwargs.items() if value is not None} - {"streamer", "stopping_criteria"}
    asked = {key for key in decoding.to_diff_dict() if key[0] != "_"}
    plain = decoding.get_generation_mode() == GenerationMode.GREEDY_SEARCH and asked <= CHECKABLE and not others
    if drafts is not None and length and plain and not followed and not decoding.return_dict_in_generate:
        kwargs["custom_generate"] = DraftedDecoding(drafts, length, kwargs.get("streamer"), on_token)
    elif on_token is not None:
        kwargs["streamer"] = _RowStreamer(on_token)
    with quickest_threads(language_model, len(embeddings) * (DRAFT_TOKENS if "custom_generate" in kwargs else 1)):
        return generator.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=decoding, **kwargs)


class _RowStreamer(BaseStreamer):
    """Streamer for several rows; those of transformers take one at a time."""

    def __init__(self, on_token: Callable[[int, int], None]):
        self.on_token = on_token

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the first call has the ids of the prompts, which are empty here
            for row, token in enumerate(value.tolist()):
                self.on_token(row, token)

    def end(self) -> None:
        pass


class DraftedDecoding:
    """
    Greedy decoding loop for `generate(custom_generate=)`, with separate drafts for each row.

    transformers has such a loop for one row and a prompt of token ids. Here, the prompt consists of embeddings, and
    each row advances at its own pace: tokens that a row rejects stay in the key-value cache, masked, until all rows
    are past them.
    """

    def __init__(self, drafts: ReportDrafts, length: int, streamer=None, on_token=None):
        self.drafts, self.length, self.on_token = drafts, length, on_token
        # transformers 5.19 does not pass it to custom loops
        self.streamer = streamer if on_token is None else _RowStreamer(on_token)

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **kwargs,
    ) -> torch.Tensor:
        cache, mask, positions = (kwargs.get(key) for key in ("past_key_values", "attention_mask", "position_ids"))
        prompt: torch.Tensor = kwargs["inputs_embeds"]
        embeddings: torch.Tensor | None = prompt  # `None` after the first step
        keeps = "logits_to_keep" in kwargs
        # Sliding windows and recurrent states cannot be rewound. Without position ids, masked gaps would be counted.
        placed = len(prompt) == 1 if positions is None else positions.ndim == 2
        rewinds = isinstance(cache, DynamicCache) and {type(layer) for layer in cache.layers} == {DynamicLayer}
        if synced_gpus or not placed or not isinstance(cache, DynamicCache) or not rewinds:
            sampler: Any = type(model)  # `_sample` comes from GenerationMixin, not PreTrainedModel
            return sampler._sample(
                model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus,
                **kwargs | {"streamer": self.streamer},
            )  # fmt: skip
        device, embed = prompt.device, model.get_input_embeddings()
        rows, written = list(range(len(prompt))), [[] for _ in prompt]
        place = None if positions is None else positions[:, -1]  # of the last unmasked token in the cache
        if mask is None and len(rows) > 1:
            mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=device)
        while rows:
            drafts = self._draft(rows, written, generation_config.max_length)
            width = max(map(len, drafts))
            fed = torch.tensor([draft + [0] * (width - len(draft)) for draft in drafts], device=device).long()
            inputs: dict[str, Any]
            if embeddings is not None:  # the prompt, and a draft of the beginning of a report
                inputs = {"inputs_embeds": torch.cat([embeddings, embed(fed).to(embeddings)], dim=1)}
                first = width
            else:
                last = torch.tensor([[written[row][-1]] for row in rows], device=device)
                inputs, first = {"input_ids": torch.cat([last, fed], dim=1)}, width + 1
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(rows), first)], dim=1)
                inputs["attention_mask"] = mask
            if place is not None:
                own = torch.tensor([len(draft) + first - width for draft in drafts], device=device)
                ahead = torch.arange(1, first + 1, device=device)
                # Padding repeats the last position, so that no position exceeds the LLM's maximum.
                inputs["position_ids"] = place[:, None] + torch.minimum(ahead, own[:, None])
                if positions is not None and embeddings is not None:
                    inputs["position_ids"] = torch.cat([positions, inputs["position_ids"]], dim=1)
            if keeps:
                inputs["logits_to_keep"] = width + 1
            logits = model(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits
            logits = logits[:, -width - 1 :].to(torch.float32)
            accepted, going_on = [], []
            for index, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
                new, ended = self._accept(row, written[row], draft, logits[index], logits_processor, stopping_criteria)
                accepted.append(len(new) - 1)  # the last token is the LLM's own and not in the cache yet
                if not ended:
                    going_on.append(index)
            # All rows keep as many tokens of this step as the row that accepted most.
            kept = max(accepted)
            if width > kept:
                cache.crop(kept - width)
            taken = torch.tensor(accepted, device=device)
            if mask is not None:
                mask = mask[:, : mask.shape[1] - (width - kept)]
                ahead = torch.arange(kept, device=device)
                mask[:, mask.shape[1] - kept :] = (ahead < taken[:, None]).to(mask)
            if place is not None:
                place = place + taken + (first - width)
            if len(going_on) < len(rows) and going_on:
                chosen = torch.tensor(going_on, device=device)
                cache.batch_select_indices(chosen)
                mask = None if mask is None else mask[chosen]
                place = None if place is None else place[chosen]
            rows, embeddings = [rows[index] for index in going_on], None
        if self.streamer is not None:
            self.streamer.end()
        longest, paddings = max(map(len, written)), [generation_config.pad_token_id, *end_tokens(generation_config), 0]
        padding = next(token for token in paddings if token is not None)
        padded = [tokens + [padding] * (longest - len(tokens)) for tokens in written]
        return torch.cat([input_ids, torch.tensor(padded, device=device)], dim=1)

    def _draft(self, rows: list[int], written: list[list[int]], max_length: int) -> list[list[int]]:
        """Return a draft for each row, limited to the remaining length of its report."""
        length = min(self.length, max(STEP_TOKENS // len(rows) - 1, 1))
        room = [max(min(length, max_length - len(written[row]) - 1), 0) for row in rows]
        return [self.drafts.continuation(written[row], count) for row, count in zip(rows, room, strict=True)]

    def _accept(
        self,
        row: int,
        written: list[int],
        draft: list[int],
        logits: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
    ) -> tuple[list[int], bool]:
        """Append the LLM's next tokens to `written`; return them, and `True` if the last one ends the report."""
        so_far: Any  # transformers annotates a LongTensor, which no torch function is declared to return
        new = []
        choices = None if logits_processor else logits.argmax(dim=-1).tolist()
        for index in range(len(draft) + 1):
            if choices is None:
                so_far = torch.tensor([written], dtype=torch.long, device=logits.device)
                token = int(logits_processor(so_far, logits[None, index].clone()).argmax())
            else:
                token = choices[index]
            new.append(token)
            written.append(token)
            if self.on_token is not None:
                self.on_token(row, token)
            elif self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            so_far = torch.tensor([written], dtype=torch.long, device=logits.device)
            if bool(stopping_criteria(so_far, None)[0]):
                return new, True
            if index == len(draft) or token != draft[index]:
                return new, False
        raise AssertionError("unreachable")


__all__ = ["DraftedDecoding", "ReportDrafts", "decode"]
