# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Time of a report: vision and decoding, and the gains from merging, batching and cached references.

    python benchmarks/generation.py --rounds 5 --output benchmarks/results

Variants run in turns in one process, with the shipped checkpoint and phantoms. A ratio is the median over rounds of
the ratio within a round. Processes (`diffvp --help`, the first token) are timed from outside, alternating as well.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import torch
from preprocess import SHAPES, scan, write_nifti
from rich.progress import track

from diffvp.data.phantom import render_patient, sample_patient
from diffvp.inference.batch import ReportWriter
from diffvp.inference.engines import TransformersEngine
from diffvp.inference.report import greedy, load_checkpoint
from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine

CHECKPOINT = Path(__file__).parents[1] / "checkpoints" / "diffvp-phantom"
BATCH = 8
POOLS = (1, 124, 1787)  # 1,787 is the paper's pool of training references, 124 that of its test set


def phantoms(folder: Path, count: int) -> list[Path]:
    paths = []
    for index in range(count):
        rendered = render_patient(sample_patient(11, index, "valid"))
        paths.append(folder / f"{index}.nii.gz")
        nib.save(nib.Nifti1Image(rendered.hu, rendered.affine), paths[-1])
    return paths


def in_turns(kinds: dict[str, Callable], rounds: int, what: str) -> dict[str, list[float]]:
    for run in kinds.values():
        run()
    times = {name: [] for name in kinds}
    for turn in track(range(rounds), what):
        names = list(kinds)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            kinds[name]()
            times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def vision(model, ct: torch.Tensor, reference: torch.Tensor, max_new_tokens: int, rounds: int) -> dict:
    """Time the encoding of a scan, with and without cached features of the reference."""
    cached = model.extract_features(reference)

    def encode(reference_features=None) -> dict[str, torch.Tensor]:
        features = model.extract_features(ct)
        if reference_features is None:
            reference_features = model.extract_features(reference)
        logits = model.diagnose(ct_features=features)
        return {"ct_features": features, "reference_features": reference_features, "diagnosis_logits": logits}

    times = in_turns({"uncached": encode, "cached": lambda: encode(cached)}, 4 * rounds, "Vision")
    decoding = {"do_sample": False, "max_new_tokens": max_new_tokens}
    tokens = [model.generate(**encode(features), **decoding) for features in (None, cached)]
    return {
        "times": times,
        "ratio": ratio(times, "cached", "uncached"),
        "same_tokens": torch.equal(*tokens),
    }


def pools(path: Path, reference: Path, folder: Path, tokens: int, rounds: int) -> dict:
    """Time a report with pools of references. The reference that a scan gets is encoded once."""

    def with_pool(count: int) -> Callable:
        pool = folder / f"pool-{count}"
        pool.mkdir()
        for number in range(count):
            (pool / f"{number}.nii.gz").hardlink_to(reference)
        writer = ReportWriter(CHECKPOINT, reference=pool, max_new_tokens=tokens)

        def run():
            [features] = list(writer.processor.image_processor.stream([path], digest=True))
            writer.write([("scan", None, features)])

        return run

    times = in_turns({str(count): with_pool(count) for count in POOLS}, rounds, "Pools")
    return {"times": times, "ratio": {name: ratio(times, name, str(POOLS[0])) for name in times}}


def decode(model, unmerged, inputs: dict, prompts: list[torch.Tensor], tokens: int, rounds: int) -> dict:
    """Time the same number of tokens with ours, the bare LLM, without merging, and in a batch."""
    decoding = greedy(model, tokens)
    decoding.update(min_new_tokens=tokens)
    first = {name: value[:1] for name, value in inputs.items()}
    embeddings = prompts[0][None]
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    engine = TransformersEngine(model)

    def one_by_one():
        return [engine.generate([prompt], decoding)[0] for prompt in prompts]

    kinds = {
        "ours": lambda: model.generate(**first, generation_config=decoding),
        "bare LLM": lambda: model.language_model.generate(
            inputs_embeds=embeddings, attention_mask=mask, generation_config=decoding
        ),
        "ours, LoRA not merged": lambda: unmerged.generate(**first, generation_config=decoding),
        f"{BATCH} scans, one by one": one_by_one,
        f"{BATCH} scans in a batch": lambda: engine.generate(prompts, decoding),
    }
    times = in_turns(kinds, rounds, "Decoding")
    outputs = [kinds[name]() for name in ("ours", "bare LLM", "ours, LoRA not merged")]
    return {
        "times": times,
        "ours_over_bare": ratio(times, "bare LLM", "ours"),
        "merged_over_unmerged": ratio(times, "ours, LoRA not merged", "ours"),
        "batch_over_single": ratio(times, f"{BATCH} scans, one by one", f"{BATCH} scans in a batch"),
        "same_tokens_as_bare": torch.equal(outputs[0], outputs[1]),
        "same_tokens_unmerged": torch.equal(outputs[0], outputs[2]),
        "same_tokens_in_batch": one_by_one() == engine.generate(prompts, decoding),
    }


def processes(folder: Path, rounds: int) -> dict:
    """Time whole processes: the help, and from the start to the first token of a report."""
    shape, spacing, noise = SHAPES["512 x 512 x 300"]
    target, reference = folder / "target.nii.gz", folder / "reference.nii.gz"
    write_nifti(target, scan(shape, noise), spacing)
    write_nifti(reference, scan(shape, noise, seed=1), spacing)
    plain = Path(__file__).with_name("plain_report.py")
    command = [sys.executable, "-m", "diffvp.cli"]
    kinds = {
        "diffvp --help": [*command, "--help"],
        "diffvp, first token": [sys.executable, str(plain), "diffvp", str(CHECKPOINT), str(target), str(reference)],
        "plain, first token": [sys.executable, str(plain), "plain", str(CHECKPOINT), str(target), str(reference)],
    }
    runs = {
        name: lambda line=line: subprocess.run(line, check=True, capture_output=True) for name, line in kinds.items()
    }
    times = in_turns(runs, rounds, "Processes")
    return {"times": times, "ratio": ratio(times, "diffvp, first token", "plain, first token")}


def page(results: dict) -> str:
    vision, pools, decoding, processes = (results[name] for name in ("vision", "pools", "decoding", "processes"))
    lines = [
        "# Writing a report", "",
        f"`python benchmarks/generation.py --rounds {results['rounds']}` on {results['machine']}, with the",
        f"checkpoint that ships (SmolLM2-135M, float32) and {results['tokens']} new tokens. What is compared is in",
        "the script.", "",
    ]  # fmt: skip
    rows = [
        [name, f"{statistics.median(times):.3g}"]
        for part in (vision, decoding, processes)
        for name, times in part["times"].items()
    ]
    lines += [
        *table_lines(["", "median s"], rows),
        "",
        f"- Encoding for a report with the reference's features cached, over both encoded: {vision['ratio']:.2f}; "
        f"same tokens: {_yes(vision['same_tokens'])}.",
        "- Time of a report with a pool of N encoded references, over a pool of one: "
        + ", ".join(f"{int(name):,}: {value:.3f}" for name, value in pools["ratio"].items()) + ".",
        f"- Tokens per second of `model.generate` over the bare LLM's on the same embeddings: "
        f"{decoding['ours_over_bare']:.2f}; same tokens: {_yes(decoding['same_tokens_as_bare'])}.",
        f"- LoRA merged over not merged: {decoding['merged_over_unmerged']:.2f}; same tokens: "
        f"{_yes(decoding['same_tokens_unmerged'])}.",
        f"- A batch of {BATCH} over one by one: {decoding['batch_over_single']:.2f}; same tokens: "
        f"{_yes(decoding['same_tokens_in_batch'])}.",
        "- From the start of the process to the first token, of a scan and a reference of 512 x 512 x 300 voxels, "
        f"over a plain script of MONAI, peft and transformers: {processes['ratio']:.2f}.",
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    results = {
        "rounds": options.rounds, "tokens": options.tokens,
        "machine": machine(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        results["processes"] = processes(folder, options.rounds)
        paths = phantoms(folder, BATCH + 1)
        unmerged, processor = load_checkpoint(CHECKPOINT)
        model = ReportWriter(CHECKPOINT, max_new_tokens=options.tokens).model
        results["pools"] = pools(paths[0], paths[BATCH], folder, options.tokens, options.rounds)
        volumes = processor(ct=paths)["ct"]
        targets, reference = volumes[:BATCH], volumes[BATCH:]
        inputs = {
            "ct_features": model.extract_features(targets),
            "reference_features": model.extract_features(reference).expand(BATCH, -1, -1),
            "diagnosis_logits": model.diagnose(targets),
        }
        prompts = model.embed_prompt(**inputs)
        results["decoding"] = decode(model, unmerged, inputs, prompts, options.tokens, options.rounds)
        results["vision"] = vision(model, targets[:1], reference, options.tokens, options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "generation.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "generation.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
