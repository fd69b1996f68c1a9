# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Time of reading and preprocessing a CT, in this build and in an earlier one.

    git worktree add ../before/diffvp COMMIT
    python benchmarks/reading_before.py ../before/diffvp --output benchmarks/results

Each build has a process of its own, which waits for the name of a file. The two take turns at the same files; a ratio
is the median over rounds of (time of this build / time of the earlier one in the same round).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from preprocess import SHAPES, scan, write_compressed, write_dicom, write_nifti
from rich.progress import track

from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine

HERE = Path(__file__).resolve().parents[1]
# A process reads "WAY<tab>PATH" lines from stdin and answers each with the seconds that it took.
WORKER = """
import sys, time
sys.path.insert(0, sys.argv[1])
import diffvp, torch
from diffvp.reading_diffvp import read_ct
from diffvp.volume_diffvp import resample  # its place in earlier builds
assert diffvp.__path__[0].startswith(sys.argv[1])
for line in sys.stdin:
    way, path = line.rstrip().split("\\t")
    start = time.perf_counter()
    volume = read_ct(path)
    if way != "read":
        resample(volume, (64, 256, 256), digest=way == "to tensor, with digest")
    print(time.perf_counter() - start, flush=True)
"""


class Build:
    """One build in a process of its own."""

    def __init__(self, tree: Path):
        command = [sys.executable, "-c", WORKER, str(tree.resolve().parent)]
        self.process = subprocess.Popen(command, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self, way: str, path: Path) -> float:
        self.process.stdin.write(f"{way}\t{path}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def files(folder: Path) -> dict[tuple[str, str], Path]:
    """Write the scans; {(way, name): path}."""
    found = {}
    for name, (shape, spacing, noise) in SHAPES.items():
        path = folder / f"{len(found)}.nii.gz"
        write_nifti(path, scan(shape, noise), spacing)
        found |= {("to tensor", name): path, ("to tensor, with digest", name): path}
    array = scan((512, 512, 300), 12)
    for slices in (120, 300):
        write_dicom(folder / f"{slices}", array[:, :, :slices], (0.7, 0.7, 1.0))
        found["to tensor", f"DICOM, {slices} slices"] = folder / f"{slices}"
        found["read", f"DICOM, {slices} slices"] = folder / f"{slices}"
    for kind in ("JPEG 2000", "JPEG-LS"):
        write_compressed(folder / kind, folder / "120", kind)
        found["read", f"DICOM, {kind}, 120 slices"] = folder / kind
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="working tree of the earlier build, in a folder named diffvp")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        paths = files(Path(temporary))
        builds = {"before": Build(options.before), "this": Build(HERE)}
        for (way, name), path in track(paths.items(), "Files"):
            times = {build: [] for build in builds}
            for turn in range(options.rounds + 1):
                for build in list(builds)[:: -1 if turn % 2 else 1]:
                    times[build].append(builds[build].seconds(way, path))
            times = {build: seconds[1:] for build, seconds in times.items()}  # the first fills caches
            ratio = statistics.median(b / a for a, b in zip(times["before"], times["this"], strict=True))
            medians = {build: statistics.median(seconds) for build, seconds in times.items()}
            rows.append({"file": name, "way": way, "median_s": medians, "ratio": ratio})
    commit = subprocess.run(
        ["git", "-C", options.before, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()
    results = {"machine": machine(), "rounds": options.rounds, "before": commit, "rows": rows}
    table = [
        [row["file"], row["way"], f"{row['median_s']['before']:.3f}", f"{row['median_s']['this']:.3f}",
         f"{row['ratio']:.2f}"]
        for row in rows
    ]  # fmt: skip
    page = [
        "# Reading and preprocessing, against an earlier build", "",
        f"`python benchmarks/reading_before.py` on {results['machine']}; commit {commit} before, {options.rounds} "
        "interleaved rounds.", "",
        *table_lines(["file", "way", "before, s", "this build, s", "ratio"], table), "",
    ]  # fmt: skip
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "reading_before.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "reading_before.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
