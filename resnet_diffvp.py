# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The 3D ResNet-18 of the vision encoder.

Parameter names and results are those of MONAI's ResNet, so that MedicalNet's weights fit. MONAI itself is not used,
because importing it takes more time and memory than reading and encoding a scan.
"""

import torch
import torch.nn.functional as F
from torch import nn


class DiffVPResNetBlock(nn.Module):
    """
    Two convolutions and a shortcut.

    Args:
        inputs, outputs: number of channels.
        stride: stride of the first convolution.
        shortcut_type: if the size changes, the shortcut is a convolution ("B"), or is subsampled and padded with
            zeros ("A").
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut_type: str):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(outputs)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(outputs)
        self.stride, self.added, self.downsample = stride, outputs - inputs, None
        if shortcut_type == "B" and (stride != 1 or self.added):
            self.downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride), nn.BatchNorm3d(outputs))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        shortcut = hidden
        hidden = self.bn2(self.conv2(self.act(self.bn1(self.conv1(hidden)))))
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        elif self.stride != 1 or self.added:
            shortcut = shortcut[:, :, :: self.stride, :: self.stride, :: self.stride]
            shortcut = F.pad(shortcut, (0,) * 7 + (self.added,))
        hidden += shortcut
        return self.act(hidden)


class DiffVPResNet(nn.Module):
    """
    Four stages of two blocks each. The second to fourth stages halve the resolution.

    Args:
        inputs: number of channels of the input.
        channels: number of channels of each stage.
        size, stride: kernel size and stride of the first convolution.
        max_pool: halve the resolution once more, before the first stage.
        shortcut_type: "A" or "B", see [`DiffVPResNetBlock`].
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self, inputs: int, channels: list[int], *, size: int, stride: int, max_pool: bool, shortcut_type: str
    ):
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, channels[0], size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm3d(channels[0])
        self.act = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d(3, 2, padding=1) if max_pool else nn.Identity()
        before = channels[0]
        for stage, after in enumerate(channels, start=1):
            first = DiffVPResNetBlock(before, after, 1 if stage == 1 else 2, shortcut_type)
            setattr(self, f"layer{stage}", nn.Sequential(first, DiffVPResNetBlock(after, after, 1, shortcut_type)))
            before = after

    def forward(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            hidden: (batch, inputs, depth, height, width).

        Returns:
            The output of each stage, (batch, channels, ...).
        """
        hidden = self.maxpool(self.act(self.bn1(self.conv1(hidden))))
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            hidden = layer(hidden)
            stages.append(hidden)
        return stages
