# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Compare reports of faster decoding (drafts, batches, weights of fewer bits) with plain decoding, on unseen phantoms.

    python benchmarks/agreement.py --cases 200 --output benchmarks/results                  # drafts and batches
    python benchmarks/agreement.py --cases 100 --ways plain bfloat16 "bfloat16, batch" --output ...
    python benchmarks/agreement.py --cases 100 --ways drafts int8 "int8, batch" --output ...
    python benchmarks/agreement.py --ways plain drafts --scans a.nii.gz b.nii.gz --output ...

All ways decode the same prompts, embedded by the float32 model: only decoding differs. The first way is the one that
the others are compared with; `plain` is float32, one report at a time, one token per step. Each report is appended to
agreement.jsonl; the same command resumes with that file. A step is a forward pass of the LLM. Seconds are processor
time.
"""

import argparse
import json
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from diffvp.data.phantom import render_patient, sample_patient
from diffvp.data.phantom_report import labels_from_report, region_sentences, report_text
from diffvp.experiments.system_scores import micro
from diffvp.inference.engines import TransformersEngine
from diffvp.inference.report import greedy, load_checkpoint
from diffvp.metrics.clinical_efficacy import label_counts
from diffvp.metrics.markdown import table_lines, with_interval
from diffvp.metrics.statistics import bootstrap_counts
from diffvp.provenance import machine

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "diffvp-phantom"
SEED, SPLIT, BATCH = 25, "valid", 8
# Data type of the weights, drafts, and prompts per batch.
WAYS = {
    "plain": ("float32", False, 1),
    "drafts": ("float32", True, 1),
    "batch": ("float32", False, BATCH),
    "drafts, batch": ("float32", True, BATCH),
    "bfloat16": ("bfloat16", True, 1),
    "bfloat16, plain": ("bfloat16", False, 1),
    "bfloat16, batch": ("bfloat16", False, BATCH),
    "int8": ("int8", True, 1),
    "int8, batch": ("int8", False, BATCH),
}


class Decoder:
    """A loaded checkpoint that decodes in one of the ways and counts the steps of its LLM."""

    def __init__(self, checkpoint: Path, way: str):
        weights, drafted, self.batch = WAYS[way]
        self.model, self.processor = load_checkpoint(checkpoint, dtype=weights)
        if not drafted:
            self.model.drafts = None
        self.steps = 0
        self.model.language_model.register_forward_pre_hook(self._count)
        self.engine, self.decoding = TransformersEngine(self.model), greedy(self.model)

    def _count(self, *_) -> None:
        self.steps += 1

    def write(self, prompts: list[torch.Tensor]) -> list[dict]:
        self.steps, start = 0, time.process_time()
        prompts = [prompt.to(self.model.language_model.dtype) for prompt in prompts]
        written = self.engine.generate(prompts, self.decoding)
        share = (time.process_time() - start) / len(prompts), self.steps / len(prompts)
        return [{"tokens": tokens, "seconds": share[0], "steps": share[1]} for tokens in written]


def prompts_of(
    decoder: Decoder, cases: int, scans: list[Path], kept: Path
) -> dict[str, tuple[str | None, torch.Tensor]]:
    """Return true report and prompt by case name. Prompts are cached: encoding takes longer than decoding."""
    found = {}
    for name in track([path.name for path in scans] or list(map(str, range(cases))), "Prompts"):
        patient = None if scans else sample_patient(SEED, int(name), SPLIT)
        file = kept / f"{name}.safetensors"
        if not file.exists():
            if scans:
                ct = next(path for path in scans if path.name == name)
            else:
                rendered = render_patient(patient)
                ct = nib.Nifti1Image(rendered.hu, rendered.affine)
            inputs = dict(decoder.processor(ct=ct, allow_any_anatomy=True))
            text = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            encoded = decoder.model.encode_inputs(inputs["ct"], inputs["reference"])
            [prompt] = decoder.model.embed_prompt(**text, **encoded)
            save_file({"prompt": prompt.contiguous()}, file)
        truth = None if scans else report_text(region_sentences(patient))
        found[name] = truth, load_file(file)["prompt"]
    return found


def table(rows: dict[str, dict[str, dict]], truths: dict[str, str | None]) -> list[str]:
    """Return a row for each way, compared with the first on their common cases."""
    lines, base = [], next(iter(rows.values()))
    for way, written in rows.items():
        names = [name for name in written if name in base]
        same = sum(written[name]["tokens"] == base[name]["tokens"] for name in names)
        labels, plain = ([labels_from_report(of[name]["text"]) for name in names] for of in (written, base))
        score = "no true reports"
        if all(truths[name] is not None for name in names) and len(names) > 1:
            true = [labels_from_report(truths[name]) for name in names]
            counts = label_counts(*(np.array([list(one.values()) for one in of]).astype(int) for of in (labels, true)))
            interval = bootstrap_counts(counts, lambda sums: micro(sums, "f1"))
            score = with_interval(interval.estimate, (interval.low, interval.high))
        tokens, steps, seconds = (
            [measure(written[name]) for name in names]
            for measure in (lambda one: len(one["tokens"]), lambda one: one["steps"], lambda one: one["seconds"])
        )
        findings = sum(one == other for one, other in zip(labels, plain, strict=True))
        speed = [f"{sum(tokens) / sum(steps):.1f}", f"{np.median(seconds):.2f}"]
        lines.append([way, str(len(names)), str(same), str(findings), score, *speed])
    head = ["decoding", "cases", "equal reports", "equal findings", "micro-F1", "tokens a step", "CPU s a report"]
    return table_lines(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200, help="number of phantoms")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["plain", "drafts", "batch", "drafts, batch"])
    parser.add_argument("--scans", nargs="+", type=Path, default=[], help="scan files to use instead of phantoms")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    kept = options.output / "prompts"
    kept.mkdir(parents=True, exist_ok=True)
    path, rows = options.output / "agreement.jsonl", {way: {} for way in options.ways}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        one = json.loads(line)
        rows.setdefault(one["way"], {})[one["case"]] = one
    decoder = Decoder(options.checkpoint, options.ways[0])
    prompts = prompts_of(decoder, options.cases, options.scans, kept)
    # Alternate, so that an interrupted run has all ways for the same cases.
    decoders = {way: decoder if way == options.ways[0] else Decoder(options.checkpoint, way) for way in options.ways}
    for start in track(range(0, len(prompts), BATCH), "Reports"):
        names = list(prompts)[start : start + BATCH]
        for way, one in decoders.items():
            waiting = [name for name in names if name not in rows[way]]
            for first in range(0, len(waiting), one.batch):
                chosen = waiting[first : first + one.batch]
                written = one.write([prompts[name][1] for name in chosen])
                with path.open("a", encoding="utf-8") as file:
                    for name, report in zip(chosen, written, strict=True):
                        report["text"] = decoder.processor.decode(report["tokens"], skip_special_tokens=True).strip()
                        rows[way][name] = {"way": way, "case": name, **report}
                        file.write(json.dumps(rows[way][name]) + "\n")
    truths = {name: truth for name, (truth, _) in prompts.items()}
    page = [
        "# Agreement of decoding methods", "",
        f"`python benchmarks/agreement.py` on {machine()}, {torch.get_num_threads()} thread(s). Each row is compared",
        f"with {options.ways[0]}. Equal reports have the same tokens.", "",
        *table({way: {n: r for n, r in rows[way].items() if n in truths} for way in rows if rows[way]}, truths), "",
    ]  # fmt: skip
    (options.output / "agreement.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
