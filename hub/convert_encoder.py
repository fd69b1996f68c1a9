# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Convert MedicalNet's ResNet-18 (`resnet_18.pth`, `resnet_18_23dataset.pth`) to safetensors, once.

    python -m diffvp.hub.convert_encoder resnet_18_23dataset.pth encoder.safetensors

The result is what `encoder_weights` of a training file takes. The pickle is read with `weights_only=True`.
"""

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..checkpoint_diffvp import DiffVPCheckpointError
from ..configuration_diffvp import DiffVPConfig
from ..modules_diffvp import DiffVPVisionEncoder

PARALLEL_PREFIX = "module."  # MedicalNet saved its models inside DataParallel
SEGMENTATION_HEAD = "conv_seg."  # the decoder it was pretrained with
COUNTER = "num_batches_tracked"  # PyTorch 0.4 did not write it, and evaluation does not read it


def convert_medicalnet(source: str | os.PathLike, target: str | os.PathLike) -> Path:
    """
    Write the encoder weights of a MedicalNet ResNet-18 as safetensors, under the names of `DiffVPVisionEncoder`.

    Raises:
        DiffVPCheckpointError: the file is not MedicalNet's ResNet-18: weights are missing, left over or misshapen.
    """
    source, target = Path(source), Path(target)
    loaded = torch.load(source, map_location="cpu", weights_only=True)
    state = {
        f"resnet.{name.removeprefix(PARALLEL_PREFIX)}": tensor
        for name, tensor in loaded.get("state_dict", loaded).items()
        if not name.removeprefix(PARALLEL_PREFIX).startswith(SEGMENTATION_HEAD)
    }
    with torch.device("meta"):
        expected = DiffVPVisionEncoder(DiffVPConfig(encoder_shortcut_type="A")).state_dict()
    for name, tensor in expected.items():
        if name.endswith(COUNTER):
            state.setdefault(name, torch.zeros(tensor.shape, dtype=tensor.dtype))
    for problem, names in (
        ("missing", expected.keys() - state.keys()),
        ("unexpected", state.keys() - expected.keys()),
        ("of another shape", {n for n in state.keys() & expected.keys() if state[n].shape != expected[n].shape}),
    ):
        if names:
            raise DiffVPCheckpointError(
                f"{source.name} is not MedicalNet's ResNet-18: {len(names)} weight(s) {problem}, "
                f"such as {sorted(names)[0]}."
            )
    temporary = target.with_name(f".{target.name}.tmp")
    save_file(state, temporary)
    os.replace(temporary, target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="MedicalNet's .pth file")
    parser.add_argument("target", help="safetensors file to write")
    arguments = parser.parse_args()
    convert_medicalnet(arguments.source, arguments.target)
