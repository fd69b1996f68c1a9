#!/usr/bin/env bash
# torch 2.13.0: on a CPU, a convolution of one small volume takes longer than that of two.
#
# conv3d computes a volume with oneDNN or with torch's own implementation ("slow_conv3d"). In float32, a kernel of
# 3 x 3 x 3 and a batch of one goes to oneDNN only if channels x depth x height > 20,480; the width does not count.
# The deep stages of a 3D ResNet have fewer: 64 x 12 x 14 = 10,752.
#
# Expected: one volume takes about half of the time of two, and has the same values.
# Seen (x86-64 with AVX-512, one thread; the ratios depend on the processor): one volume of 64 x 12 x 14 x 16 takes 10 ms,
#   two take 7 ms, and the values differ in the last bits. torch.mkldnn_convolution computes one in 3.3 ms.
#
# Exits 1 once that changes: if one volume is computed with oneDNN, or takes less time than two.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'PY'
import statistics
import sys
import time

import torch
from torch.nn.functional import conv3d

torch.set_num_threads(1)
torch.manual_seed(0)
pair, weight = torch.rand(2, 64, 12, 14, 16), torch.randn(64, 64, 3, 3, 3)
one = pair[:1].contiguous()


def operators(volumes):
    with torch.profiler.profile() as profile:
        conv3d(volumes, weight, padding=1)
    return {event.name for event in profile.events()}


calls = {
    "one": lambda: conv3d(one, weight, padding=1),
    "two": lambda: conv3d(pair, weight, padding=1),
    "one, oneDNN": lambda: torch.mkldnn_convolution(one, weight, None, [1] * 3, [1] * 3, [1] * 3, 1),
}
seconds = {name: [] for name in calls}
with torch.inference_mode():
    for _ in range(15):
        for name, call in calls.items():
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    difference = (calls["one"]() - calls["two"]()[:1]).abs().max().item()
medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
print(", ".join(f"{name}: {1e3 * value:.1f} ms" for name, value in medians.items()), f"difference: {difference:.1g}")
is_slow = "aten::slow_conv3d_forward" in operators(one) and "aten::mkldnn_convolution" in operators(pair)
sys.exit(0 if is_slow and medians["one"] > medians["two"] else "the behaviour has changed")
PY
