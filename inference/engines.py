# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Decoding engines: they take complete prompts and return greedy token ids.

The vision part of the model and the prompt of eq. 9 are the same for every engine: `embed_prompt` makes the *whole*
prompt, and an engine sees only a stock LLM and embeddings. Do not accept embeddings from users: engines load these
tensors without checking them.
"""

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Protocol

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from transformers import __version__ as transformers_version

from ..drafts_diffvp import decode
from ..report_diffvp import end_tokens

# Settings of a generation config that greedy decoding uses or may ignore. All engines treat them alike.
PLAIN = {
    "bos_token_id", "eos_token_id", "pad_token_id", "max_new_tokens", "max_length", "do_sample", "num_beams",
    "temperature", "top_k", "top_p", "use_cache", "output_attentions", "output_hidden_states", "transformers_version",
    "num_assistant_tokens",
}  # fmt: skip


class EngineError(RuntimeError):
    """An engine is not installed, or does not support the generation config of the checkpoint."""


class Engine(Protocol):
    """`name` is the name and version of the engine, for the provenance of a report."""

    name: str

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        decoding: GenerationConfig,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """
        Decode prompts greedily.

        Args:
            prompts: complete prompts without padding, `(length, h)` each, from `embed_prompt`.
            decoding: greedy generation config with the maximum number of tokens and the end tokens.
            on_token: called with the index of a prompt and its next token, see [`decode`]. An exception that it raises
                ends the decoding. vLLM does not call it.

        Returns:
            new token ids of each prompt, including the end token, or without it if the limit was reached first.
        """


class TransformersEngine:
    """Engine that runs the model's own LLM with the drafts of the checkpoint, all prompts in one batch."""

    def __init__(self, model):
        self.language_model, self.drafts = model.language_model, model.drafts
        self.name = f"transformers {transformers_version}" + (", with drafts" if self.drafts else "")

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        decoding: GenerationConfig,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        masks = [torch.ones(len(prompt), dtype=torch.long, device=prompt.device) for prompt in prompts]
        embeddings, mask = (pad_sequence(rows, True, padding_side="left") for rows in (list(prompts), masks))
        tokens = decode(self.language_model, self.drafts, embeddings, mask, decoding, on_token)
        ends = set(end_tokens(decoding))
        return [_until_end(row, ends) for row in tokens.tolist()]


class VLLMEngine:
    """
    Engine that runs vLLM in this process, on the merged LLM.

    LoRA is merged into the model first, because vLLM's own LoRA crashes with prompts of embeddings
    (vllm-project/vllm#51122). Prefix caching is off: each prompt starts with the difference of its own two scans, so
    prompts share no prefix, and the cache has confused prompts that contain embeddings (vllm-project/vllm#56655).

    Args:
        model, tokenizer: model and tokenizer of a checkpoint. Only the token embeddings of the model's LLM are kept,
            because vLLM holds the rest. The model can still encode, diagnose, embed prompts and map differences, but
            it cannot generate or be saved.
        options: further arguments of `vllm.LLM`, such as `tensor_parallel_size` or `gpu_memory_utilization`.

    Raises:
        ModuleNotFoundError: vLLM is not installed; [`merged_engine`] checks this first.
        DiffVPCheckpointError: the LLM is quantised, so LoRA cannot be merged.
    """

    def __init__(self, model, tokenizer, **options):
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # disables telemetry
        import vllm

        self._vllm = vllm
        self.name = f"vllm {vllm.__version__}"
        model.merge_adapter()
        dtype = str(model.language_model.dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory(prefix="diffvp-") as folder:
            # Otherwise transformers would revert, in the LLM's weights, the renaming it did when it loaded PEFT's.
            model.language_model.save_pretrained(folder, save_original_format=False)
            tokenizer.save_pretrained(folder)
            _keep_embeddings(model)  # before vLLM measures the free memory
            self.llm = vllm.LLM(
                model=folder,
                dtype=dtype,
                generation_config="vllm",  # only the sampling parameters of `generate` apply
                enable_prompt_embeds=True,
                enable_prefix_caching=False,
                **options,
            )

    def generate(
        self,
        prompts: Sequence[torch.Tensor],
        decoding: GenerationConfig,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """
        Decode prompts greedily, see [`Engine.generate`].

        Raises:
            EngineError: the checkpoint's generation config asks for more than greedy decoding, such as a penalty.
        """
        others = {key: value for key, value in decoding.to_diff_dict().items() if key not in PLAIN and key[0] != "_"}
        if others:
            raise EngineError(
                f"generation_config sets {', '.join(others)}; expected none of them: the engine vllm supports plain "
                "greedy decoding only."
            )
        greedy = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=end_tokens(decoding),
            ignore_eos=True,  # only the end tokens of the generation config count, not those of the folder
            detokenize=False,
        )
        requests = [{"prompt_embeds": prompt.detach().cpu()} for prompt in prompts]
        written = self.llm.generate(requests, greedy, use_tqdm=False)
        ends = set(end_tokens(decoding))
        return [_until_end(list(one.outputs[0].token_ids), ends) for one in written]


def check_engine(name: str) -> None:
    """
    Check the name of an engine, before a checkpoint is loaded.

    Raises:
        EngineError: there is no such engine, or it is not installed.
    """
    if name not in ("transformers", "vllm"):
        raise EngineError(f"engine is {name!r}; expected transformers or vllm.")
    if name == "vllm" and find_spec("vllm") is None:
        raise EngineError("The engine vllm is not installed in this environment; see docs/scaling.md.")


def merged_engine(name: str, model, tokenizer, **options) -> Engine:
    """
    Merge LoRA into `model`, permanently, and return the engine of a name. A quantised LLM keeps its LoRA.

    Args:
        name: "transformers" or "vllm".
        options: options of [`VLLMEngine`].

    Raises:
        EngineError: there is no such engine, or it is not installed.
    """
    check_engine(name)
    if name == "vllm":
        return VLLMEngine(model, tokenizer, **options)
    if not getattr(model.language_model, "is_quantized", False):
        model.merge_adapter()
    return TransformersEngine(model)


def _keep_embeddings(model) -> None:
    """Free all weights of the LLM except its token embeddings."""
    embeddings = copy.deepcopy(model.get_input_embeddings())
    model.language_model.to("meta")
    model.set_input_embeddings(embeddings)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _until_end(tokens: list[int], ends: set[int]) -> list[int]:
    """Return the tokens up to and including the first end token; the rest is padding."""
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: end + 1]
