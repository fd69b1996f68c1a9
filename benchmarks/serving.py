# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Test `diffvp serve` under load: latency, gain from batching waiting requests, and lost requests.

    python benchmarks/serving.py --output benchmarks/results

Servers run in separate processes with the shipped checkpoint, clients in threads of this process. A server that writes
one report at a time and one that batches waiting requests alternate on the same requests; a ratio is the median over
rounds. In the long run, a tenth of the requests has a file that is not a scan. The exit status is 1 if a request was
lost or mixed up, memory grew, or the ratio is below the goal.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from generation import CHECKPOINT, phantoms
from rich.progress import track

from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine
from diffvp.tests.serving import Outcome, Server, ask

MAX_DRIFT_MB = 50
MIN_RATIO = 2.5


def write_broken(folder: Path, scan: Path) -> list[Path]:
    """Write files that are not scans: truncated, text, empty."""
    contents = {"half.nii.gz": scan.read_bytes()[:100_000], "text.nii.gz": b"no scan", "empty.nii": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


def compare(alone: Server, together: Server, scans: list[Path], rounds: int, clients: int) -> dict:
    """Time the same requests with both servers and compare their reports of each scan."""
    walls, reports = {"one by one": [], "together": []}, {}
    servers = {"one by one": alone, "together": together}
    for turn in track(range(rounds), "One by one and together"):
        for name in list(servers)[:: -1 if turn % 2 else 1]:
            outcome = ask(servers[name].url, scans, [], len(scans), clients)
            assert not outcome.lost, outcome.lost
            walls[name].append(outcome.wall)
            for scan, known in outcome.reports.items():
                reports.setdefault(scan, set()).add(known["report"])
    ratios = [a / b for a, b in zip(walls["one by one"], walls["together"], strict=True)]
    same = sum(len(texts) == 1 for texts in reports.values())
    return {"requests": len(scans), "walls": walls, "ratio": statistics.median(ratios), "same_reports": same}


def load(server: Server, scans: list[Path], broken: list[Path], requests: int, clients: int) -> dict:
    """Send many requests. Count results and measure the growth of the server's memory after a warm-up."""
    ask(server.url, scans, broken, 2 * clients, clients)
    before = server.metric("process_resident_memory_bytes")
    outcome: Outcome = ask(server.url, scans, broken, requests, clients)
    after = server.metric("process_resident_memory_bytes")
    return {
        "requests": requests,
        "clients": clients,
        "reports": len(outcome.seconds),
        "refused": outcome.refused,
        "lost": outcome.lost,
        "mixed_up": outcome.mixed_up,
        "p50": outcome.percentile(0.5),
        "p95": outcome.percentile(0.95),
        "reports_per_second": len(outcome.seconds) / outcome.wall,
        "memory_mb": before / 2**20,
        "drift_mb": (after - before) / 2**20,
        "batch": server.metric("diffvp_batch_size_sum") / server.metric("diffvp_batch_size_count"),
    }


def single(server: Server, scans: list[Path]) -> dict:
    """Time a single client, which sends each request after the previous answer."""
    outcome = ask(server.url, scans, [], len(scans), 1)
    return {"p50": outcome.percentile(0.5), "p95": outcome.percentile(0.95)}


def page(results: dict) -> str:
    gain, long, alone = results["gain"], results["load"], results["single"]
    speeds = [
        ("a client alone", alone["p50"], alone["p95"], 1 / alone["p50"]),
        (
            f"{long['clients']} clients, {long['requests']} requests",
            long["p50"],
            long["p95"],
            long["reports_per_second"],
        ),
    ]
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, *values in speeds]
    lines = [
        "# Reports over HTTP", "",
        f"`{results['command']}` on {results['machine']}, with the checkpoint that",
        f"ships (SmolLM2-135M, float32), phantoms, and at most {results['tokens']} new tokens a report.", "",
        *table_lines(["", "p50, s", "p95, s", "reports/s"], rows), "",
        f"- {gain['requests']} requests of {results['clients']} clients, written together over one by one: "
        f"**{gain['ratio']:.2f}** times as many reports a second (goal {MIN_RATIO}); the same report for "
        f"{gain['same_reports']} of {gain['requests']} scans.",
        f"- {long['requests']} requests of {long['clients']} clients, {long['refused']} of them with a file that is "
        f"no scan: {len(long['lost'])} lost, {len(long['mixed_up'])} mixed up, {long['refused']} refused with 422 and "
        f"the field; {long['batch']:.1f} scans in a batch.",
        f"- Memory of the server: {long['memory_mb']:.0f} MB, and {long['drift_mb']:+.0f} MB after them (goal at most "
        f"{MAX_DRIFT_MB}).",
        f"- Killed, and started again under the same port: ready after {results['restart_s']:.0f} s, nothing left of "
        "the first one's uploads.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    counts = f"--requests {arguments.requests} --clients {arguments.clients} --rounds {arguments.rounds}"
    results = {
        "command": f"python benchmarks/serving.py {counts} --tokens {arguments.tokens}",
        "machine": machine(),
        "clients": arguments.clients,
        "tokens": arguments.tokens,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scans = phantoms(folder, 2 * arguments.clients)
        broken = write_broken(folder, scans[0])
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
        options = ("--max-new-tokens", arguments.tokens, "--timeout", 3600)
        with Server(CHECKPOINT, folder / "together", *options, environment=threads) as together:
            with Server(CHECKPOINT, folder / "alone", *options, "--batch-size", 1, environment=threads) as alone:
                for server in (alone, together):
                    ask(server.url, scans[:1], [], 1, 1)
                results["gain"] = compare(alone, together, scans, arguments.rounds, arguments.clients)
            results["single"] = single(together, scans[: arguments.clients])
            results["load"] = load(together, scans, broken, arguments.requests, arguments.clients)
            together.end(signal.SIGKILL)
        start = time.perf_counter()
        with Server(CHECKPOINT, folder / "together", *options, environment=threads, port=together.port) as again:
            results["restart_s"] = time.perf_counter() - start
            left = [path for path in again.folder.rglob("*") if path.is_file()]
            answered = ask(again.url, scans, broken, 10, arguments.clients)
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "serving.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.output / "serving.md").write_text(page(results), encoding="utf-8")
    print(page(results))
    failed = results["load"]["lost"] + results["load"]["mixed_up"] + answered.lost + answered.mixed_up
    if failed or left or results["load"]["drift_mb"] > MAX_DRIFT_MB or results["gain"]["ratio"] < MIN_RATIO:
        sys.exit(f"The goals are not met. {failed} {left}")


if __name__ == "__main__":
    main()
