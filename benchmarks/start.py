# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
List what `diffvp report`, `diffvp demo` and the first token of a report import, and how long each import takes.

    python benchmarks/start.py --output benchmarks/results

Each command runs once under `python -X importtime`, with the shipped checkpoint and a phantom. `benchmarks/before.py`
times whole commands.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from generation import CHECKPOINT, phantoms

from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine

HERE = Path(__file__).resolve().parents[1]
LEAST = 0.02  # share of all imports, for a row in a table
HEAVY = 0.04  # share of all imports, for a module with the modules that it imports


def import_times(lines: Iterable[str]) -> list[tuple[str, float, float]]:
    """Read the output of `-X importtime`: name, seconds of each module alone, and with the modules that it imports."""
    found = []
    for line in lines:
        head, _, rest = line.partition("import time:")
        fields = rest.split("|")
        if not head and len(fields) == 3 and fields[0].strip().isdigit():
            found.append((fields[2].strip(), int(fields[0]) / 1e6, int(fields[1]) / 1e6))
    return found


def run(command: list[str]) -> list[tuple[str, float, float]]:
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    line = [sys.executable, "-X", "importtime", *command]
    said = subprocess.run(line, cwd=HERE, env=environment, check=True, capture_output=True, text=True).stderr
    return import_times(said.splitlines())


def by_package(found: list[tuple[str, float, float]]) -> Counter:
    """Seconds by top-level package."""
    seconds = Counter()
    for name, alone, _ in found:
        seconds[name.partition(".")[0]] += alone
    return seconds


def page(results: dict) -> str:
    imports = results["imports"]
    total = {what: sum(alone for _, alone, _ in found) for what, found in imports.items()}
    lines = ["# Imports of a report", ""]
    lines += [
        f"`python benchmarks/start.py` on {results['machine']}, load {results['load']:.1f}, one run of each command "
        "under `python -X importtime`, which makes imports slower. A busy machine stretches all times: compare the "
        "shares.",
        "",
    ]  # fmt: skip
    rows = [[what, str(len(found)), f"{total[what]:.2f}"] for what, found in imports.items()]
    lines += [*table_lines(["", "modules", "s"], rows), "", "Share of each package in these seconds:", ""]
    shares = {what: by_package(found) for what, found in imports.items()}
    packages = sum(shares.values(), Counter()).most_common()
    rows = [[name, *(f"{shares[what][name] / total[what]:.0%}" for what in imports)] for name, _ in packages]
    shown = [max(shares[what][name] / total[what] for what in imports) >= LEAST for name, _ in packages]
    lines += table_lines(["package", *imports], [row for row, is_shown in zip(rows, shown, strict=True) if is_shown])
    what, found = next(iter(imports.items()))
    heavy = sorted((row for row in found if row[2] >= HEAVY * total[what]), key=lambda row: -row[2])
    rows = [[f"`{name}`", f"{whole:.2f}", f"{whole / total[what]:.0%}"] for name, _, whole in heavy]
    lines += ["", f"Modules that take most with all that they import first, in {what}:", ""]
    lines += table_lines(["module", "s", "share"], rows)
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    results = {"machine": machine(), "load": os.getloadavg()[0], "imports": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        scans = [str(path) for path in phantoms(folder, 2)]
        commands = {
            "`diffvp report`": ["-m", "diffvp.cli", "report", scans[0], "--output", str(folder / "report")],
            "`diffvp demo`": ["-m", "diffvp.cli", "demo", "--output", str(folder / "demo")],
            "first token": [str(HERE / "benchmarks/plain_report.py"), "diffvp", str(CHECKPOINT), *scans],
        }
        for what, command in commands.items():
            results["imports"][what] = run(command)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "start.md").write_text(page(results), encoding="utf-8")
    results["imports"] = {
        what: {"modules": len(found), "seconds": dict(by_package(found).most_common())}
        for what, found in results["imports"].items()
    }
    (options.output / "start.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print((options.output / "start.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
