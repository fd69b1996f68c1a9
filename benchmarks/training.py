# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Time of a training step of report generation, against the usual loop of the field.

    python benchmarks/training.py --rounds 5 --output benchmarks/results

The other loop follows the public code of Reg2RG: each step preprocesses scan and reference with MONAI, encodes both
again with the frozen encoder, pads the text to 2,048 tokens and computes logits for all of them. Ours reads the frozen
features of both scans from the cache and pads to the longest report of the batch. Both train the same model (the
default encoder with random weights; a Llama of 8 layers and 512 channels, small enough for two cores) with LoRA on the
same samples, alternating in one process. A ratio is the median over rounds of the ratio within a round.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig
from preprocess import SHAPES, monai_standard, scan, write_nifti
from rich.progress import track
from transformers import LlamaConfig, LlamaForCausalLM

from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.data.cache import VolumeCache
from diffvp.data.cases import Case
from diffvp.metrics.markdown import table_lines
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.processing_diffvp import DiffVPImageProcessor
from diffvp.provenance import machine
from diffvp.training.features import Features

PADDED = 2048
INSTRUCTION, REPORT = 24, 300  # tokens; about 200 words, as in CT-RATE
VOCABULARY = 32000


def make_model() -> DiffVPForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=4096,
    )
    llm = LlamaForCausalLM(text)
    prompt = {"prefix": [1], "labels": [[2, 3]] * 18, "separator": [4], "none": [5], "suffix": [6]}
    config = DiffVPConfig(
        text_config=text,
        base_model_name_or_path="none",
        diagnosis_prompt_ids=prompt,
        instruction_ids=[1] * INSTRUCTION,
    )
    model = DiffVPForConditionalGeneration(config, language_model=llm)
    llm.add_adapter(LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))
    return model.train()


def text(length: int) -> dict[str, torch.Tensor]:
    """Make an instruction followed by a report, right-padded to `length` tokens."""
    ids = torch.randint(10, VOCABULARY, (1, INSTRUCTION + REPORT), generator=torch.Generator().manual_seed(1))
    padding = length - ids.shape[1]
    labels = ids.clone()
    labels[:, :INSTRUCTION] = -100
    return {
        "input_ids": torch.nn.functional.pad(ids, (0, padding)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (0, padding)),
        "labels": torch.nn.functional.pad(labels, (0, padding), value=-100),
    }


class Loops:
    """Both training loops, on a scan and a reference."""

    def __init__(self, files: list[Path], cache_dir: Path):
        self.files, self.model = files, make_model()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.cases = [Case(path.stem, path.stem, path.stem, path, "-") for path in files]
        self.features = Features(cache_dir, VolumeCache(cache_dir, DiffVPImageProcessor()), self.model)
        self.padded, self.short = text(PADDED), text(INSTRUCTION + REPORT)

    def step(self, **inputs) -> float:
        loss = self.model(**inputs).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def other(self) -> None:
        ct, reference = (monai_standard(path)[None].float() for path in self.files)
        self.step(ct=ct, reference=reference, **self.padded)

    def ours(self) -> None:
        self.step(**self.cached(), **self.short)

    def other_llm(self) -> None:
        self.step(**self.cached(), **self.padded)

    def cached(self) -> dict[str, torch.Tensor]:
        ct, reference = (self.features.load(case) for case in self.cases)
        return {
            "ct_features": ct["features"][None],
            "reference_features": reference["features"][None],
            "diagnosis_logits": ct["diagnosis_logits"][None],
        }

    def hit(self) -> None:
        self.features.load(self.cases[0])

    @torch.no_grad()
    def decode_and_encode(self) -> None:
        """Compute what a cache hit replaces, with our reader: the fastest way without a cache."""
        processor = self.features.volumes.image_processor
        ct = processor(self.files[0])["ct"]
        self.model.extract_features(ct)
        self.model.diagnose(ct)


def seconds(run: Callable[[], None], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shape, spacing, noise = SHAPES["512 x 512 x 300"]
        files = [folder / "scan.nii.gz", folder / "reference.nii.gz"]
        for seed, path in enumerate(files):
            write_nifti(path, scan(shape, noise, seed), spacing)
        loops = Loops(files, folder / "cache")
        kinds = {
            "other loop": (loops.other, 1),
            "ours": (loops.ours, 3),
            "LLM step, padded to 2,048": (loops.other_llm, 1),
            "decode and encode a scan": (loops.decode_and_encode, 1),
            "cache hit": (loops.hit, 200),
        }
        for run, _ in kinds.values():
            run()
        times = {name: [] for name in kinds}
        for turn in track(range(options.rounds), "Rounds"):
            names = list(kinds)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name].append(seconds(*kinds[name]))

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    results = {
        "rounds": options.rounds,
        "machine": machine(),
        "median_s": {name: statistics.median(values) for name, values in times.items()},
        "samples_per_s_ratio": ratio("other loop", "ours"),
        "llm_step_ratio": ratio("LLM step, padded to 2,048", "ours"),
        "cache_hit_ratio": ratio("decode and encode a scan", "cache hit"),
    }
    rows = [[name, f"{value:.4g}"] for name, value in results["median_s"].items()]
    page = "\n".join([
        "# A training step of report generation", "",
        f"`python benchmarks/training.py --rounds {options.rounds}` on {results['machine']}; what is compared is in",
        "the script. Scans of 512 x 512 x 300 voxels, reports of 300 tokens, batches of 1.", "",
        *table_lines(["", "median s"], rows), "",
        f"- Samples per second, ours over the other loop: {results['samples_per_s_ratio']:.1f}.",
        f"- The step of the LLM alone, padded to the report against 2,048: {results['llm_step_ratio']:.1f}.",
        f"- A cache hit against decoding (our reader) and encoding: {results['cache_hit_ratio']:.0f}.", "",
    ])  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "training.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "training.md").write_text(page, encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
