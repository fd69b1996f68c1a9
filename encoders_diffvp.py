# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Visual encoders with one interface: `ct` (batch, 1, depth, height, width) in [-1, 1] to F, (batch, N, C).

N is in depth-major order over `config.feature_grid`, and C is `config.encoder_hidden_size`. `config.encoder_type` is
one of

- "resnet", `DiffVPVisionEncoder`: the paper's 3D ResNet-18, optionally with a feature pyramid. Accepts MedicalNet's
  weights.
- "i3resnet", `DiffVPInflatedEncoder`: MONAI's bottleneck ResNet, inflated to 3D, as in Merlin and Astra.
- "external", `DiffVPExternalEncoder`: a module of the user, or no module and precomputed features.

`diffvp encoder convert` converts published weights for the first two.
"""

import hashlib
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_diffvp import DiffVPConfig
from .resnet_diffvp import DiffVPResNet

# HU range that is scaled to [0, 1] for Merlin and Astra.
INFLATED_HU = (-1000.0, 200.0)


class DiffVPEncoderError(ValueError):
    """An encoder is missing, is not the one of the checkpoint, or returns tokens of another shape."""

    def __init__(self, source: str, field: str, found, expected: str):
        super().__init__(f"{source}: {field}: {found} (expected {expected})")


def make_encoder(config: DiffVPConfig) -> nn.Module:
    """Create the visual encoder of a configuration; its weights are loaded later."""
    kinds = {
        "resnet": DiffVPVisionEncoder,
        "i3resnet": DiffVPInflatedEncoder,
        "external": DiffVPExternalEncoder,
    }
    return kinds[config.encoder_type](config)


def check_volume(ct: torch.Tensor, size) -> None:
    """
    Check the shape of a volume.

    Raises:
        ValueError: `ct` is not (batch, 1, *size).
    """
    if ct.ndim != 5 or ct.shape[1] != 1 or tuple(ct.shape[2:]) != tuple(size):
        raise ValueError(
            f"ct must have shape (batch, 1, {', '.join(map(str, size))}), got {tuple(ct.shape)}. "
            "Let the processor of this checkpoint prepare it."
        )


def as_input(hidden: torch.Tensor, resnet: nn.Module) -> torch.Tensor:
    """
    Convert to the dtype of the ResNet's weights and to channels-last memory.

    This layout is 1.3 to 2.6 times faster on CPU, and the native one of tensor cores.
    """
    conv1: Any = resnet.conv1
    return hidden.to(conv1.weight.dtype).contiguous(memory_format=torch.channels_last_3d)


class DiffVPVisionEncoder(nn.Module):
    """
    3D ResNet-18 (section 3.2), with MONAI's parameter names, so that MedicalNet's weights fit.

    With `encoder_pyramid_channels`, its stages have 1/2, 1/4, 1/8 and 1/16 of the tensor's resolution, and a top-down
    path carries the features of the last stage back to 1/4.
    """

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.image_size = tuple(config.image_size)
        self.hu_range, self.windows = config.hu_range, config.encoder_windows
        self.coordinates = config.encoder_coordinates
        self.is_pyramid = config.encoder_pyramid_channels is not None
        channels = len(self.windows or [None])
        if self.is_pyramid:
            # 2x2x2 voxels become channels at half the resolution: a 7x7x7 convolution of few channels costs more than
            # the four stages after it, and here a 3x3x3 convolution covers as much.
            channels *= 8
        self.resnet = DiffVPResNet(
            channels + 3 * self.coordinates,
            list(config.encoder_block_channels),
            size=3 if self.is_pyramid else 7,
            stride=1 if self.is_pyramid else config.encoder_stride,
            max_pool=config.encoder_max_pool,
            shortcut_type=config.encoder_shortcut_type,
        )
        self.pyramid = DiffVPPyramid(config) if self.is_pyramid else None

    def forward(self, ct: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """
        `ct` (batch, 1, depth, height, width) in [-1, 1] → F, (batch, N, C); N is in depth-major order.

        With `start` (batch, 3), each `ct` is a crop that starts at this voxel (depth, height, width) of its volume.
        """
        check_volume(ct, self.image_size if start is None else ct.shape[2:])
        stages = self.resnet(as_input(self._channels(ct, start), self.resnet))
        hidden = stages[-1] if self.pyramid is None else self.pyramid(stages)
        return hidden.flatten(2).transpose(1, 2)

    def _channels(self, ct: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
        """Return the input of the first convolution: windows, folded for a pyramid, and coordinates in [-1, 1]."""
        if self.windows is not None and self.hu_range is not None:
            low, high = self.hu_range
            hu = low + (ct.float() + 1) * ((high - low) / 2)
            ct = torch.cat([((hu - a) / (b - a)).clamp(0, 1) * 2 - 1 for a, b in self.windows], dim=1)
        step = 1
        if self.is_pyramid:
            step = 2
            depth, height, width = (size // 2 for size in ct.shape[2:])
            ct = ct.reshape(*ct.shape[:2], depth, 2, height, 2, width, 2)
            ct = ct.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        if not self.coordinates:
            return ct
        axes = []
        for axis, whole in enumerate(self.image_size):
            first = torch.zeros(len(ct), device=ct.device) if start is None else start[:, axis].to(ct.device)
            centres = (torch.arange(ct.shape[2 + axis], device=ct.device) + 0.5) * step
            place = (first[:, None] + centres) * (2 / whole) - 1
            shape = [len(ct), 1, 1, 1, 1]
            shape[2 + axis] = -1
            axes.append(place.view(shape).expand(-1, -1, *ct.shape[2:]))
        return torch.cat([ct, *(axis.to(ct.dtype) for axis in axes)], dim=1)


class DiffVPPyramid(nn.Module):
    """Top-down path (Lin et al. 2017) from the fourth stage to the second: upsample, add the stage, convolve."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        channels, width = config.encoder_block_channels, config.resnet_hidden_size
        self.lateral = nn.ModuleList([nn.Conv3d(channels[stage], width, 1) for stage in (3, 2, 1)])
        self.smooth = nn.ModuleList(
            [
                nn.Sequential(nn.Conv3d(width, width, 3, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU())
                for _ in (2, 1)
            ]
        )

    def forward(self, stages: list[torch.Tensor]) -> torch.Tensor:
        hidden = self.lateral[0](stages[3])
        for lateral, smooth, stage in zip(self.lateral[1:], self.smooth, (stages[2], stages[1]), strict=True):
            hidden = smooth(F.interpolate(hidden, scale_factor=2, mode="nearest") + lateral(stage))
        return hidden


class DiffVPInflatedEncoder(nn.Module):
    """
    Bottleneck ResNet with 2D filters inflated to 3D: the I3ResNet-152 of Merlin and Astra.

    Their input axes point to [superior, right, anterior]; here height points to posterior and width to the left.
    Height and width are therefore swapped and flipped on input, and the tokens are converted back.
    """

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.image_size, self.hu_range = tuple(config.image_size), config.hu_range
        self.resnet = monai_resnet(
            block="bottleneck",
            layers=list(config.encoder_layers),
            block_inplanes=list(config.encoder_block_channels),
            n_input_channels=3,  # colour channels of the 2D network; each receives the scan
            conv1_t_size=(3, 7, 7),
            conv1_t_stride=(1, 2, 2),
            shortcut_type="B",
            bias_downsample=False,
            feed_forward=False,
        )

    def forward(self, ct: torch.Tensor) -> torch.Tensor:
        """`ct` (batch, 1, depth, height, width) in [-1, 1] → F, (batch, N, C)."""
        check_volume(ct, self.image_size)
        low, high = self.hu_range or INFLATED_HU
        hu = low + (ct.float() + 1) * ((high - low) / 2)
        low, high = INFLATED_HU
        hidden = ((hu - low) / (high - low)).clamp(0, 1).transpose(3, 4).flip(3, 4)
        net: Any = self.resnet
        hidden = net.maxpool(net.act(net.bn1(net.conv1(as_input(hidden.expand(-1, 3, -1, -1, -1), net)))))
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            hidden = stage(hidden)
        return hidden.flip(3, 4).transpose(3, 4).flatten(2).transpose(1, 2)


def monai_resnet(**options) -> nn.Module:
    """
    Create MONAI's `ResNet`. MONAI is imported here because its import takes seconds and other encoders do not need it.

    Raises:
        DiffVPEncoderError: MONAI is not installed.
    """
    try:
        # Not an import statement: transformers requires all packages that the files of a checkpoint import.
        module = importlib.import_module("monai.networks.nets.resnet")
    except ModuleNotFoundError as error:
        expected = "pip install 'monai>=1.5'"
        raise DiffVPEncoderError("encoder_type i3resnet", "package", f"{error.name} is missing", expected) from error
    return module.ResNet(**options)


class DiffVPExternalEncoder(nn.Module):
    """
    Placeholder for an external encoder, such as a foundation model with its own licence and package.

    `attach` sets the module that computes the tokens. The module is not part of the model's weights: it is neither
    trained nor saved. Without it, pass `ct_features` and `reference_features` instead of the volumes.
    """

    module: nn.Module | None

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.config = config
        vars(self)["module"] = None  # set directly, because nn.Module would register it

    def attach(self, module: nn.Module) -> None:
        """
        Set the module that computes the tokens.

        Args:
            module: `ct` (batch, 1, *config.image_size) → tokens (batch, N, C).

        Raises:
            DiffVPEncoderError: the checkpoint was made with another module or other weights.
        """
        name, digest = f"{type(module).__module__}.{type(module).__qualname__}", state_sha256(module)
        wanted = self.config.encoder_sha256
        if wanted is not None and digest != wanted:
            expected = f"{wanted}, of {self.config.encoder_name}"
            raise DiffVPEncoderError(name, "SHA-256 of the weights", digest, expected)
        self.config.encoder_sha256 = digest
        self.config.encoder_name = self.config.encoder_name or name
        vars(self)["module"] = module.eval().requires_grad_(False)

    def forward(self, ct: torch.Tensor) -> torch.Tensor:
        """`ct` (batch, 1, depth, height, width) in [-1, 1] → F, (batch, N, C)."""
        made_by = self.config.encoder_name or "an unnamed encoder"
        if self.module is None:
            expected = "model.attach_encoder(module), or ct_features and reference_features instead of the volumes"
            raise DiffVPEncoderError(
                "vision_encoder", "module", f"none; the checkpoint was made with {made_by}", expected
            )
        check_volume(ct, self.config.image_size)
        features = self.module(ct)
        grid, width = self.config.feature_grid, self.config.encoder_hidden_size
        shape = (len(ct), grid[0] * grid[1] * grid[2], width)
        if not isinstance(features, torch.Tensor) or tuple(features.shape) != shape:
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise DiffVPEncoderError(made_by, "tokens", found, f"{shape}: batch, tokens of {list(grid)}, channels")
        return features

    def _apply(self, fn, recurse: bool = True):
        """Move the module to another device or dtype together with the model."""
        if self.module is not None:
            self.module._apply(fn)
        return super()._apply(fn, recurse)


def encoder_sha256(encoder: nn.Module) -> str | None:
    """Return the SHA-256 of a visual encoder's weights; `None` for an external encoder without a module."""
    module = encoder.module if isinstance(encoder, DiffVPExternalEncoder) else encoder
    return None if module is None else state_sha256(module)


def state_sha256(module: nn.Module) -> str:
    """Return the hexadecimal SHA-256 of a module's parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


__all__ = ["DiffVPEncoderError", "DiffVPExternalEncoder", "DiffVPInflatedEncoder", "DiffVPVisionEncoder"]
