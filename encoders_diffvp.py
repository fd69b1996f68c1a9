# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The parts of DiffVP that report generation keeps frozen: visual encoders, and the classifier of their tokens.

The encoders have one interface: `ct` (batch, 1, depth, height, width) in [-1, 1] to F, (batch, N, C). N is in
depth-major order over `config.feature_grid`, and C is `config.encoder_hidden_size`. `config.encoder_type` is one of

- "resnet", `DiffVPVisionEncoder`: the paper's 3D ResNet-18, optionally with a feature pyramid. Accepts MedicalNet's
  weights.
- "i3resnet", `DiffVPInflatedEncoder`: MONAI's bottleneck ResNet, inflated to 3D, as in Merlin and Astra.
- "external", `DiffVPExternalEncoder`: a module of the user, or no module and precomputed features.

`diffvp encoder convert` converts published weights for the first two.

`DiffVPDiagnosisClassifier` adds voxel logits, Noisy-OR pooling, and the places and sizes of findings (appendix D).
"""

import hashlib
import importlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_diffvp import DiffVPConfig

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
            f"ct: shape {tuple(ct.shape)} (expected (batch, 1, {', '.join(map(str, size))}), as this checkpoint's "
            "processor returns it)"
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
        stages = self.resnet(as_input(self.channels(ct, start), self.resnet))
        hidden = stages[-1] if self.pyramid is None else self.pyramid(stages)
        return hidden.flatten(2).transpose(1, 2)

    def channels(self, ct: torch.Tensor, start: torch.Tensor | None = None) -> torch.Tensor:
        """
        Return the input of the first convolution: windows, folded for a pyramid, and coordinates in [-1, 1].

        Each channel is written to its place in the layout of [`as_input`], because copies of the whole input would
        take more memory than the network.
        """
        step = 2 if self.is_pyramid else 1
        shape = [size // step for size in ct.shape[2:]]
        conv1: Any = self.resnet.conv1
        channels = torch.empty(
            (len(ct), conv1.in_channels, *shape), dtype=conv1.weight.dtype, device=ct.device,
            memory_format=torch.channels_last_3d,
        )  # fmt: skip
        # One strided copy per channel: one copy of a whole window has an inner loop of two voxels.
        offsets = list(itertools.product(range(step), repeat=3))
        for number, windowed in enumerate(self._windowed(ct)):
            for channel, (z, y, x) in enumerate(offsets, start=number * len(offsets)):
                channels[:, channel] = windowed[:, 0, z::step, y::step, x::step]
        if self.coordinates:
            for axis, whole in enumerate(self.image_size):
                first = torch.zeros(len(ct), device=ct.device) if start is None else start[:, axis].to(ct.device)
                centres = (torch.arange(shape[axis], device=ct.device) + 0.5) * step
                of_axis = [len(ct), 1, 1, 1]
                of_axis[1 + axis] = -1
                channels[:, axis - 3] = ((first[:, None] + centres) * (2 / whole) - 1).view(of_axis)
        return channels

    def _windowed(self, ct: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the scan in each HU window, mapped to [-1, 1]."""
        if self.windows is None or self.hu_range is None:
            yield ct
            return
        low, high = self.hu_range
        for lowest, highest in self.windows:
            hu = low + (ct.float() + 1) * ((high - low) / 2)
            yield hu.sub_(lowest).div_(highest - lowest).clamp_(0, 1).mul_(2).sub_(1)


class DiffVPConv3d(nn.Conv3d):
    """
    `nn.Conv3d` that computes a single volume as it computes several.

    On the CPU, torch 2.13 takes its slow implementation if batch × channels × depth × height ≤ 20,480, whatever the
    width. For the deep stages of one scan, it takes three to five times as long as oneDNN, which computes larger
    batches.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        is_single = (
            len(input) == 1 and input.device.type == "cpu" and input.dtype == self.weight.dtype == torch.float32
        )
        has_onednn = torch.backends.mkldnn.is_available()
        if not (is_single and has_onednn) or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(input)
        is_last = input.is_contiguous(memory_format=torch.channels_last_3d)
        weight = self.weight.contiguous(
            memory_format=torch.channels_last_3d if is_last else torch.contiguous_format
        )  # as torch does; otherwise oneDNN chooses another kernel
        padding: Any = self.padding
        return torch.mkldnn_convolution(input, weight, self.bias, padding, self.stride, self.dilation, self.groups)


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
        self.conv1 = DiffVPConv3d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm3d(outputs)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = DiffVPConv3d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(outputs)
        self.stride, self.added, self.downsample = stride, outputs - inputs, None
        if shortcut_type == "B" and (stride != 1 or self.added):
            self.downsample = nn.Sequential(DiffVPConv3d(inputs, outputs, 1, stride), nn.BatchNorm3d(outputs))

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
    The 3D ResNet-18: four stages of two blocks each. The second to fourth stages halve the resolution.

    Parameter names and results are those of MONAI's ResNet, so that MedicalNet's weights fit. MONAI itself is not
    used, because importing it takes more time and memory than reading and encoding a scan.

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
        self.conv1 = DiffVPConv3d(inputs, channels[0], size, stride, padding=size // 2, bias=False)
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


class DiffVPPyramid(nn.Module):
    """Top-down path (Lin et al. 2017) from the fourth stage to the second: upsample, add the stage, convolve."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        channels, width = config.encoder_block_channels, config.resnet_hidden_size
        self.lateral = nn.ModuleList([DiffVPConv3d(channels[stage], width, 1) for stage in (3, 2, 1)])
        self.smooth = nn.ModuleList(
            [
                nn.Sequential(DiffVPConv3d(width, width, 3, padding=1, bias=False), nn.BatchNorm3d(width), nn.ReLU())
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


class DiffVPDiagnosisClassifier(nn.Module):
    """
    3D ResNet-18 with voxel logits and Noisy-OR pooling, p = 1 − Π(1 − p_voxel), in log space (appendix D).

    With `finding_regions`, a second head classifies the anatomical region of each token. With `finding_attributes`, a
    third head predicts the size of the finding at each token. [`locate`] reads locations and sizes from both.

    Args:
        own_encoder: if `False`, only `classify` works, on features of another module's encoder.
    """

    def __init__(self, config: DiffVPConfig, own_encoder: bool = True):
        super().__init__()
        self.vision_encoder = DiffVPVisionEncoder(config) if own_encoder else None
        self.grid, self.attributes = config.resnet_grid, config.finding_attributes
        self.labels = tuple(config.diagnosis_labels)
        width, labels = config.resnet_hidden_size, config.num_labels_diagnosis
        self.head = nn.Linear(width, labels)
        # Background, then the regions.
        self.region_head = nn.Linear(width, 1 + len(config.finding_regions)) if config.finding_regions else None
        self.size_head = nn.Linear(width, labels) if config.finding_attributes else None

    def forward(self, ct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `ct` (batch, 1, D, H, W) → volume log-odds (batch, labels) in float32, voxel logits (batch, N, labels).

        Raises:
            ValueError: the classifier has no encoder.
        """
        if self.vision_encoder is None:
            raise ValueError("The classifier has no encoder of its own: call `classify` with features.")
        return self.classify(self.vision_encoder(ct))

    def classify(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxel features (batch, N, C) → the same as `forward`."""
        voxel_logits = self.head(features)
        return noisy_or(voxel_logits), voxel_logits

    def sizes(self, features: torch.Tensor) -> torch.Tensor:
        """
        Voxel features (batch, N, C) → natural logarithm of each finding's size in mm, (batch, N, labels).

        Raises:
            ValueError: the classifier has no size head (`config.finding_attributes` is not set).
        """
        if self.size_head is None:
            raise ValueError("The classifier has no size head: set config.finding_attributes.")
        return self.size_head(features).float() + SIZE_LOG_MM

    @torch.no_grad()
    def locate(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Locate and measure each finding, assuming that it is present.

        Args:
            features: voxel features (batch, N, C).

        Returns:
            - `peak` (batch, labels): index of the token with the highest probability. For findings with a size, the
              probability is multiplied by the size, so that the largest of several is chosen.
            - `size_mm` (batch, labels).
            - `region` (batch, labels): region at the peak; -1 without a region head.
            - `region_evidence` (batch, labels, regions), only with a region head: log of the highest probability of
              the finding at a token of the region. The maximum, because a finding that extends across a fissure has
              much probability mass in the other region, but not its peak.
            - `side_evidence` (batch, labels, 2), right and left: log of the probability mass, over the tokens whose
              probability is at least half the maximum.
        """
        probability = self.head(features).float().sigmoid().transpose(1, 2)  # (batch, labels, N)
        log_size = self.sizes(features).transpose(1, 2)
        sized = [bool((self.attributes or {}).get(label, {}).get("size")) for label in self.labels]
        scale = torch.where(torch.tensor(sized, device=features.device)[:, None], log_size.exp(), 1.0)
        peak = (probability * scale).argmax(dim=2)
        evidence = probability * (probability >= 0.5 * probability.amax(dim=2, keepdim=True))
        around = self._smoothed(evidence, 3).clamp(min=1e-12)
        size = (self._smoothed(evidence * log_size, 3) / around).take_along_dim(peak[..., None], dim=2)[..., 0].exp()
        # Width runs from the patient's right to left.
        volume = evidence.unflatten(2, self.grid)
        half = (self.grid[2] + 1) // 2
        sides = torch.stack([volume[..., :half].sum(dim=(2, 3, 4)), volume[..., -half:].sum(dim=(2, 3, 4))], dim=-1)
        found = {"peak": peak, "size_mm": size, "side_evidence": (sides + EVIDENCE_FLOOR).log()}
        found["region"] = torch.full_like(peak, -1)
        if self.region_head is None:
            return found
        regions = self.region_head(features).float().softmax(dim=-1)[..., 1:].transpose(1, 2)
        # A finding hides the region it lies in, so its tokens take the region of the tokens around them.
        regions = self._smoothed(regions, 5)
        regions = regions / regions.sum(dim=1, keepdim=True).clamp(min=1e-6)
        peaks = [(probability * of_region[:, None]).amax(dim=2) for of_region in regions.unbind(1)]
        index = peak[:, None].expand(-1, regions.shape[1], -1)
        found["region"] = regions.take_along_dim(index, dim=2).argmax(dim=1)
        found["region_evidence"] = (torch.stack(peaks, dim=2) + EVIDENCE_FLOOR).log()
        return found

    def _smoothed(self, values: torch.Tensor, width: int) -> torch.Tensor:
        """Average of values (batch, channels, N) over `width` tokens along each axis."""
        return F.avg_pool3d(values.unflatten(2, self.grid), width, 1, width // 2).flatten(2)


# Initial value of the size head: about the geometric mean of the sizes (mm) that reports state.
SIZE_LOG_MM = math.log(20.0)
EVIDENCE_FLOOR = 0.02  # probability of a token that counts as no evidence


def noisy_or(voxel_logits: torch.Tensor) -> torch.Tensor:
    """Voxel logits (batch, N, labels) → log-odds of 1 − Π(1 − p_voxel), (batch, labels) in float32."""
    log_negative = F.logsigmoid(-voxel_logits.float()).sum(dim=1)  # log Π(1 − p_voxel)
    # Keep it below 0: if every voxel is certainly negative, log p would be −∞.
    log_negative = log_negative.clamp(max=-1e-12)
    log_positive = torch.log(-torch.expm1(log_negative))
    return log_positive - log_negative


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


__all__ = [
    "DiffVPDiagnosisClassifier",
    "DiffVPEncoderError",
    "DiffVPExternalEncoder",
    "DiffVPInflatedEncoder",
    "DiffVPVisionEncoder",
    "noisy_or",
]
