# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Run a command of `diffvp` until the LLM has read the prompt, which gives the first token, and end the process there.

    python benchmarks/first_token.py report scan.nii.gz --output report
"""

import importlib.abc
import importlib.machinery
import os
import runpy
import sys
from types import ModuleType

MODULE, CLASS = "transformers.models.llama.modeling_llama", "LlamaForCausalLM"
SHORTEST = 64  # tokens of a prompt; tests of the LLM while it loads are shorter


class AfterImport(importlib.abc.MetaPathFinder):
    """Finds `MODULE` as usual, and makes its LLM end the process."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            forward = getattr(module, CLASS).forward

            def until_first_token(self, *args, inputs_embeds=None, **kwargs):
                result = forward(self, *args, inputs_embeds=inputs_embeds, **kwargs)
                if inputs_embeds is not None and inputs_embeds.shape[1] >= SHORTEST:
                    os._exit(0)
                return result

            getattr(module, CLASS).forward = until_first_token

        spec.loader.exec_module = exec_module
        return spec


if __name__ == "__main__":
    sys.meta_path.insert(0, AfterImport())
    try:
        runpy.run_module("diffvp.cli", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    sys.exit("the LLM has read no prompt")
