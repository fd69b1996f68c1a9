# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Compare reports of this build and of an earlier one, alternating: wall time, processor time, memory, text.

    git worktree add ../before/diffvp 63a5407
    python benchmarks/before.py ../before/diffvp --minutes 10 --output benchmarks/results

Whole processes are timed from outside. Decoding is timed in this process, on the same prompts: with `generate` of the
LLM, as in the earlier build, and with the drafts of this build. Rounds repeat until the minutes are spent. A ratio is
the median over rounds of the ratio within a round. A warm-up round, which fills caches, does not count.

`--llama FOLDER` adds the tokens per second of llama.cpp, on the same GGUF file with the same number of threads:
`pip install --no-deps --target FOLDER xllamacpp` (its CPU wheel runs on any CPU, without AVX-512).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from generation import BATCH, CHECKPOINT, phantoms
from torch.nn.utils.rnn import pad_sequence

from diffvp.bases_diffvp import locate_base_model
from diffvp.inference.engines import TransformersEngine
from diffvp.inference.report import greedy, load_checkpoint
from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine
from diffvp.report_diffvp import end_tokens

HERE = Path(__file__).resolve().parents[1]
SHARE = {"processes": 0.6, "decoding": 0.25}  # of the minutes; the rest is for the busy machine
BUSY = "while True: pass"


def run(tree: Path, command: list[str]) -> dict[str, float]:
    """Return seconds and memory (MB) of a process that uses the package in `tree`."""
    environment = os.environ | {"PYTHONPATH": str(tree.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *command], cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    with process.stderr as stream:
        said = stream.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said.decode()[-2000:]}")
    return {"s": seconds, "CPU s": usage.ru_utime + usage.ru_stime, "MB": usage.ru_maxrss / 1024}


def processes(trees: dict[str, Path], scans: list[Path], folder: Path) -> dict[str, Callable[[], dict]]:
    kinds = {}
    for name, tree in trees.items():
        report = ["report", str(scans[0]), "--output", str(folder / name)]
        commands = {
            "report": ["-m", "diffvp.cli", *report],
            "first token": [str(HERE / "benchmarks/first_token.py"), *report],
            "demo": ["-m", "diffvp.cli", "demo", "--output", str(folder / f"demo-{name}")],
        }
        for what, command in commands.items():
            kinds[f"{what}, {name}"] = lambda tree=tree, command=command: run(tree, command)
    return kinds


def in_turns(kinds: dict[str, Callable[[], dict]], deadline: float, rounds: int) -> dict[str, list[dict]]:
    """Measure all kinds in rounds until the deadline, at least one round."""
    for measure in kinds.values():
        measure()
    found = {name: [] for name in kinds}
    names = list(kinds)
    for turn in range(rounds):
        if turn and time.monotonic() > deadline:
            break
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(kinds[name]())
    return found


def same_report(before: Path, scan: Path, folder: Path) -> bool:
    """
    Write the report of a scan with the checkpoint of the build before, and compare it with that build's own report.

    Each build is timed with the checkpoint that it ships. They were trained differently, and write different words.
    """
    shipped = str(before / CHECKPOINT.relative_to(HERE))
    run(HERE, ["-m", "diffvp.cli", "report", str(scan), "--checkpoint", shipped, "--output", str(folder / "same")])
    texts = [json.loads((folder / name / "report.json").read_text(encoding="utf-8")) for name in ("before", "same")]
    return texts[0]["report"] == texts[1]["report"]


def decoding(scans: list[Path]) -> tuple[dict[str, Callable[[], dict]], Callable[[], list[bool]]]:
    """Return ways to decode the same prompts, and a check that they write the same tokens."""
    model, processor = load_checkpoint(CHECKPOINT)
    model.merge_adapter()
    prompts = []
    for scan in scans[:BATCH]:
        inputs = dict(processor(ct=scan))
        encoded = model.encode_inputs(inputs["ct"], inputs["reference"])
        prompts += model.embed_prompt(input_ids=inputs["input_ids"], **encoded)
    config, engine, written = greedy(model), TransformersEngine(model), {}
    ends = set(end_tokens(config))

    def plain(chosen: list[torch.Tensor]) -> list[list[int]]:
        masks = [torch.ones(len(prompt), dtype=torch.long) for prompt in chosen]
        embeddings, mask = (pad_sequence(rows, True, padding_side="left") for rows in (chosen, masks))
        rows = model.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, generation_config=config)
        return [
            row[: next((n for n, token in enumerate(row) if token in ends), len(row)) + 1] for row in rows.tolist()
        ]

    def way(name: str, write: Callable, chosen: list[torch.Tensor]) -> Callable[[], dict]:
        def measure() -> dict:
            start, used = time.perf_counter(), time.process_time()
            written[name] = write(chosen)
            seconds, used = time.perf_counter() - start, time.process_time() - used
            tokens = sum(map(len, written[name]))
            return {"s": seconds / tokens, "CPU s": used / tokens}

        return measure

    kinds = {
        "a token, one report, plain": way("one, plain", plain, prompts[:1]),
        "a token, one report, drafts": way("one", lambda chosen: engine.generate(chosen, config), prompts[:1]),
        f"a token, {BATCH} reports, plain": way("batch, plain", plain, prompts),
        f"a token, {BATCH} reports, drafts": way("batch", lambda chosen: engine.generate(chosen, config), prompts),
    }
    return kinds, lambda: [written["one"] == written["one, plain"], written["batch"] == written["batch, plain"]]


def beside_two(measure: Callable[[], dict]) -> dict:
    """Measure while two other processes keep both cores busy."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(2)]
    try:
        return measure()
    finally:
        for other in others:
            other.kill()
            other.wait()


LLAMA = """
import json, sys, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, threads = sys.argv[1], int(sys.argv[2])
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
parameters.n_ctx, parameters.n_parallel = 1024, 1
server = xllamacpp.Server(parameters)
request = {"prompt": "Write the report.", "n_predict": 128, "ignore_eos": True, "temperature": 0}
print(json.dumps([server.handle_completions(request)["timings"]["predicted_per_second"] for _ in range(5)]))
"""


def llama(folder: str) -> float:
    """Return the median tokens per second of llama.cpp on the file of the base LLM, with the threads of torch."""
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    place, file = locate_base_model(
        *(config[f"base_model_{key}"] for key in ("name_or_path", "revision", "gguf_file"))
    )
    line = [sys.executable, "-c", LLAMA, f"{place}/{file}", str(torch.get_num_threads())]
    environment = os.environ | {"PYTHONPATH": folder}
    said = subprocess.run(line, env=environment, check=True, capture_output=True, text=True).stdout
    return statistics.median(json.loads(said.strip().splitlines()[-1]))


def median(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def ratio(found: dict[str, list[dict]], one: str, other: str, key: str) -> float:
    return statistics.median(a[key] / b[key] for a, b in zip(found[one], found[other], strict=True))


def page(results: dict) -> str:
    found, lines = results["found"], ["# A report, and the build before", ""]
    lines += [
        f"`python benchmarks/before.py` on {results['machine']}, {results['threads']} thread(s) of torch, load "
        f"{results['load']:.1f}. Medians; ratios are medians over the rounds. The CPU's seconds do not depend on what "
        "else the machine does, the clock's do.",
        "",
    ]  # fmt: skip
    table = []
    for name, rows in found.items():
        memory = f"{median(rows, 'MB'):.0f}" if "MB" in rows[0] else ""
        table.append([name, str(len(rows)), f"{median(rows, 's'):.3g}", f"{median(rows, 'CPU s'):.3g}", memory])
    lines += [*table_lines(["", "rounds", "s", "CPU s", "MB"], table), ""]
    table = []
    for what in ("report", "first token", "demo"):
        values = [f"{ratio(found, f'{what}, this', f'{what}, before', key):.2f}" for key in ("s", "CPU s", "MB")]
        table.append([what, *values])
    for what in ("a token, one report", f"a token, {BATCH} reports"):
        values = [f"{ratio(found, f'{what}, drafts', f'{what}, plain', key):.2f}" for key in ("s", "CPU s")]
        table.append([what, *values, ""])
    lines += [
        *table_lines(["this build over the one before", "s", "CPU s", "MB"], table),
        "",
        f"- The same words from the same checkpoint: `diffvp report` {results['same_report']}; one report and a batch "
        f"in this process {', '.join(map(str, results['same_tokens']))}.",
        f"- Beside two busy processes a report takes {results['busy']['s'] / median(found['report, this'], 's'):.1f} "
        f"times as long ({results['busy']['s']:.1f} s).",
    ]
    if results["llama"] is not None:
        ours = 1 / median(found["a token, one report, drafts"], "s")
        lines.append(
            f"- llama.cpp decodes {results['llama']:.0f} tokens/s of the same file, in 4 bits and without a scan; "
            f"this build {ours:.0f} in float32: {ours / results['llama']:.2f}."
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="working tree of the earlier build, in a folder named diffvp")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=9, help="largest number of rounds")
    parser.add_argument("--llama", metavar="FOLDER", help="folder with xllamacpp, a build of llama.cpp")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    results = {
        "machine": machine(),
        "threads": torch.get_num_threads(), "load": os.getloadavg()[0],
    }  # fmt: skip
    start, seconds = time.monotonic(), 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scans = phantoms(folder, BATCH)
        trees = {"before": options.before.resolve(), "this": HERE}
        kinds = processes(trees, scans, folder)
        found = in_turns(kinds, start + SHARE["processes"] * seconds, options.rounds)
        results["same_report"] = same_report(trees["before"], scans[0], folder)
        ways, same = decoding(scans)
        found |= in_turns(ways, start + sum(SHARE.values()) * seconds, options.rounds)
        results |= {"found": found, "same_tokens": same(), "busy": beside_two(kinds["report, this"])}
    results["llama"] = None if options.llama is None else llama(options.llama)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "before.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "before.md").write_text(page(results), encoding="utf-8")
    print(page(results))


if __name__ == "__main__":
    main()
