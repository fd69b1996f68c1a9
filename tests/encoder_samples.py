# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Tiny third-party networks with random weights, reimplemented from their papers and files."""

import torch
import torch.nn.functional as F
from monai.networks.nets.resnet import ResNet
from torch import nn

CHANNELS = [4, 8, 8, 16]
INFLATED = {"encoder_type": "i3resnet", "encoder_layers": [1, 2, 1, 1], "encoder_block_channels": [2, 4, 4, 4]}


class Bottleneck(nn.Module):
    """Inflated form of torchvision's bottleneck, with the stride in the 3x3x3 convolution."""

    def __init__(self, inside, planes, stride, projects):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv3d(inside, planes, 1, bias=False), nn.BatchNorm3d(planes)
        self.conv2, self.bn2 = nn.Conv3d(planes, planes, 3, stride, 1, bias=False), nn.BatchNorm3d(planes)
        self.conv3, self.bn3 = nn.Conv3d(planes, 4 * planes, 1, bias=False), nn.BatchNorm3d(4 * planes)
        if projects:
            shortcut = nn.Conv3d(inside, 4 * planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm3d(4 * planes))

    def forward(self, x):
        kept = self.downsample(x) if hasattr(self, "downsample") else x
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return F.relu(self.bn3(self.conv3(x)) + kept)


class I3ResNet(nn.Module):
    """Merlin and Astra: [batch, 1, right, anterior, superior], 0 to 1 → [batch, C, superior, right, anterior]."""

    def __init__(self, layers, channels):
        super().__init__()
        self.conv1 = nn.Conv3d(3, channels[0], (3, 7, 7), (1, 2, 2), (1, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(channels[0])
        inside = channels[0]
        for stage, (blocks, planes) in enumerate(zip(layers, channels, strict=True), start=1):
            made = []
            for block in range(blocks):
                made.append(Bottleneck(inside, planes, 2 if stage > 1 and block == 0 else 1, block == 0))
                inside = 4 * planes
            setattr(self, f"layer{stage}", nn.Sequential(*made))

    def forward(self, x):
        x = x.permute(0, 1, 4, 2, 3).repeat(1, 3, 1, 1, 1)
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def with_statistics(network):
    """Set random BatchNorm statistics, so that misplaced ones change the output."""
    torch.manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


def medicalnet():
    """Return a ResNet-18 like MedicalNet's."""
    torch.manual_seed(0)
    return ResNet("basic", [2, 2, 2, 2], CHANNELS, n_input_channels=1, feed_forward=False, shortcut_type="A")
