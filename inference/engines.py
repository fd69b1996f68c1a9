# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What decodes a report: finished prompts in, greedy token ids out.

The vision part of the model and the prompt of eq. 9 are the same for every engine: `embed_prompt` makes the *whole*
prompt, and an engine sees nothing but a stock LLM and embeddings. These come from `embed_prompt` alone. Do not let
users send any: engines load tensors, and trust them.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers import __version__ as transformers_version
from transformers.generation import BaseStreamer

from ..drafts_diffvp import decode
from ..pipeline_diffvp import end_tokens

# Of a generation config, what greedy decoding heeds, or does without: engines agree on it.
PLAIN = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length", "do_sample", "num_beams",
    "temperature", "top_k", "top_p", "use_cache", "output_attentions", "output_hidden_states", "transformers_version",
    "num_assistant_tokens",
}  # fmt: skip


class EngineError(RuntimeError):
    """An engine is not installed, or cannot decode as the checkpoint wants it."""


class Engine(Protocol):
    """`name` says what decodes, with its version, for the provenance of a report."""

    name: str

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        decoding: GenerationConfig,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[list[int]]:
        """
        Args:
            prompts: whole prompts without padding, `(length, h)` each, of `embed_prompt`.
            decoding: greedy; how many tokens at most, and which end a report.
            on_tokens: is told the next token of each prompt as they come, padding behind an end among them; what it
                raises ends the decoding. vLLM tells nothing before its end.

        Returns:
            new token ids of each, up to its end token, or without one where the limit came first.
        """


class TransformersEngine:
    """The model's own LLM with the checkpoint's drafts, all prompts in one batch."""

    def __init__(self, model):
        self.language_model, self.drafts = model.language_model, model.drafts
        self.name = f"transformers {transformers_version}" + (", with drafts" if self.drafts else "")

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        decoding: GenerationConfig,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[list[int]]:
        masks = [torch.ones(len(prompt), dtype=torch.long, device=prompt.device) for prompt in prompts]
        embeddings, mask = (pad_sequence(rows, True, padding_side="left") for rows in (list(prompts), masks))
        streamer = None if on_tokens is None else _Streamer(on_tokens)
        tokens = decode(self.language_model, self.drafts, embeddings, mask, decoding, streamer=streamer)
        ends = set(end_tokens(decoding))
        return [_until_end(row, ends) for row in tokens.tolist()]


class VLLMEngine:
    """
    vLLM in this process, on the merged LLM.

    LoRA is merged into the model first: beside prompts of embeddings, vLLM's own LoRA crashes
    (vllm-project/vllm#51122). Prefixes are not cached: a prompt begins with what differs between two scans, so that no
    other begins with it, and the cache has confused prompts with embeddings in them (vllm-project/vllm#56655).

    Args:
        model, tokenizer: of a checkpoint. Of the model's LLM only the embeddings of tokens are kept, for vLLM has the
            rest: it can still encode, diagnose, embed prompts and map differences, but neither generate nor be saved.
        options: more arguments of `vllm.LLM`, such as `tensor_parallel_size` or `gpu_memory_utilization`.

    Raises:
        EngineError: vLLM is not installed.
        DiffVPCheckpointError: the LLM is quantised, so that LoRA cannot be merged.
    """

    def __init__(self, model, tokenizer, **options):
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would tell its makers that it is in use
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise EngineError("The engine vllm is not installed in this environment; see docs/scaling.md.") from error
        self._vllm = vllm
        self.name = f"vllm {vllm.__version__}"
        model.merge_adapter()
        dtype = str(model.language_model.dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory(prefix="diffvp-") as folder:
            # Else transformers would undo, on the LLM's weights, the renaming that it did when it loaded PEFT's.
            model.language_model.save_pretrained(folder, save_original_format=False)
            tokenizer.save_pretrained(folder)
            _keep_embeddings(model)  # before vLLM asks how much memory is free
            self.llm = vllm.LLM(
                model=folder,
                dtype=dtype,
                generation_config="vllm",  # nothing but what `generate` is told
                enable_prompt_embeds=True,
                enable_prefix_caching=False,
                **options,
            )

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        decoding: GenerationConfig,
        on_tokens: Callable[[list[int]], None] | None = None,
    ) -> list[list[int]]:
        """
        Raises:
            EngineError: the checkpoint's generation config asks for more than greedy decoding, such as a penalty.
        """
        others = {key: value for key, value in decoding.to_diff_dict().items() if key not in PLAIN and key[0] != "_"}
        if others:
            raise EngineError(
                f"generation_config sets {', '.join(others)}; expected none of it: vLLM decodes plainly here."
            )
        greedy = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=end_tokens(decoding),
            ignore_eos=True,  # those of the generation config count, and no other that vLLM finds in a folder
            detokenize=False,
        )
        requests = [{"prompt_embeds": prompt.detach().cpu()} for prompt in prompts]
        written = self.llm.generate(requests, greedy, use_tqdm=False)
        ends = set(end_tokens(decoding))
        return [_until_end(list(one.outputs[0].token_ids), ends) for one in written]


def load_engine(name: str, model, tokenizer, **options) -> Engine:
    """
    The engine of a name, with LoRA merged into `model` for good.

    Args:
        name: "transformers" or "vllm".
        options: of [`VLLMEngine`].

    Raises:
        EngineError: there is no such engine, or it is not installed.
    """
    if name == "transformers":
        model.merge_adapter()
        return TransformersEngine(model)
    if name == "vllm":
        return VLLMEngine(model, tokenizer, **options)
    raise EngineError(f"engine is {name!r}; expected transformers or vllm.")


class _Streamer(BaseStreamer):
    """transformers' own take one prompt at a time."""

    def __init__(self, on_tokens: Callable[[list[int]], None]):
        self.on_tokens = on_tokens

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:  # the first has the ids of the prompts, of which there are none
            self.on_tokens(value.tolist())

    def end(self) -> None:
        pass


def _keep_embeddings(model) -> None:
    """Free the LLM's weights but the embeddings of its tokens."""
    embeddings = copy.deepcopy(model.get_input_embeddings())
    model.language_model.to("meta")
    model.set_input_embeddings(embeddings)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Tokens up to the first that ends a report, with it; what follows is padding."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]
