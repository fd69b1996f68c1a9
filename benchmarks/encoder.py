# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Time the shipped encoder (several windows, feature pyramid) against the same network built from MONAI's ResNet.

    python benchmarks/encoder.py --output benchmarks/results

Both have the same weights and give the same tokens. MONAI's runs in torch's ordinary memory layout, ours in
channels-last. Rounds alternate; the ratio is the median over rounds of the ratio within a round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from generation import CHECKPOINT
from monai.networks.nets import ResNet

from diffvp.inference.report import load_checkpoint
from diffvp.metrics.markdown import table_lines
from diffvp.provenance import machine

ROUNDS = 9


def plain_encoder(ours: torch.nn.Module, config) -> torch.nn.Module:
    """Return MONAI's ResNet with the weights of our encoder."""
    ordinary = ResNet(
        "basic", [2, 2, 2, 2], config.encoder_block_channels, n_input_channels=ours.resnet.conv1.in_channels,
        conv1_t_size=3, conv1_t_stride=1, no_max_pool=True, shortcut_type=config.encoder_shortcut_type,
        feed_forward=False,
    ).eval()  # fmt: skip
    ordinary.load_state_dict(ours.resnet.state_dict())
    return ordinary


@torch.inference_mode()
def encode_plainly(ours: torch.nn.Module, ordinary: torch.nn.Module, ct: torch.Tensor) -> torch.Tensor:
    hidden = ordinary.act(ordinary.bn1(ordinary.conv1(ours.channels(ct).contiguous())))
    stages = []
    for layer in (ordinary.layer1, ordinary.layer2, ordinary.layer3, ordinary.layer4):
        hidden = layer(hidden)
        stages.append(hidden)
    return ours.pyramid(stages).flatten(2).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    model, _ = load_checkpoint(CHECKPOINT, device="cpu")
    ours = next(module for module in model.modules() if type(module).__name__ == "DiffVPVisionEncoder").eval()
    ordinary = plain_encoder(ours, model.config)
    ct = torch.rand(1, 1, *model.config.image_size) * 2 - 1
    with torch.inference_mode():
        error = float((ours(ct) - encode_plainly(ours, ordinary, ct)).abs().max() / ours(ct).abs().max())
        seconds = {"diffvp": [], "MONAI": []}
        for _ in range(ROUNDS):
            for name, encode in (("diffvp", ours), ("MONAI", lambda ct: encode_plainly(ours, ordinary, ct))):
                start = time.perf_counter()
                encode(ct)
                seconds[name].append(time.perf_counter() - start)
    ratio = statistics.median(b / a for a, b in zip(seconds["diffvp"], seconds["MONAI"], strict=True))
    results = {
        "machine": machine(), "threads": torch.get_num_threads(), "size": list(model.config.image_size),
        "seconds": seconds, "ratio": ratio, "relative_error": error,
    }  # fmt: skip
    rows = [[name, f"{statistics.median(values):.3f}"] for name, values in seconds.items()]
    page = [
        "# The shipped encoder and MONAI's", "",
        f"`python benchmarks/encoder.py` on {results['machine']}, {results['threads']} thread(s), medians of {ROUNDS}",
        f"alternating rounds, one scan of {' x '.join(map(str, results['size']))} voxels.", "",
        *table_lines(["encoder", "s"], rows), "",
        f"The same network from MONAI's ResNet takes {ratio:.2f} times as long. Its tokens differ by at most "
        f"{error:.1g} of the largest.", "",
    ]  # fmt: skip
    (options.output / "encoder.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.output / "encoder.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
