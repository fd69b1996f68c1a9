# Copyright 2026 The DiffVP Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
#
# SPDX-License-Identifier: Apache-2.0
"""
The building blocks of DiffVP, from the scan to the difference prompt.

- `DiffVPVisionEncoder`: frozen 3D ResNet-18 (MONAI), voxel tokens F of shape (batch, N, C)
- `DiffVPResampler`: shared learnable queries, latents V of shape (batch, K, d), eq. 3
- `DiffVPGlobalDelta`, `DiffVPLocalDelta`: the hierarchical difference extractor, eq. 4-7
- `DiffVPPromptGenerator`: difference prompt P of shape (batch, m, h), eq. 8
- `DiffVPDiagnosisClassifier`: voxel logits and Noisy-OR pooling (appendix D)
"""

import math

import torch
import torch.nn.functional as F
from monai.networks.nets.resnet import ResNet
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_diffvp import DiffVPConfig


class DiffVPResNet(ResNet):
    """MONAI's ResNet with a type-A shortcut that lets gradients through and runs in bfloat16 on CPU."""

    def _downsample_basic_block(self, x: torch.Tensor, planes: int, stride: int, spatial_dims: int = 3):
        # The same values as MONAI's average pooling with kernel 1 on detached data.
        return F.pad(x[:, :, ::stride, ::stride, ::stride], (0, 0, 0, 0, 0, 0, 0, planes - x.shape[1]))


class DiffVPVisionEncoder(nn.Module):
    """3D ResNet-18 (section 3.2). MONAI's network, so that MedicalNet's weights fit by name."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.image_size = tuple(config.image_size)
        self.resnet = DiffVPResNet(
            block="basic",
            layers=[2, 2, 2, 2],
            block_inplanes=list(config.encoder_block_channels),
            n_input_channels=1,
            conv1_t_stride=config.encoder_stride,
            no_max_pool=not config.encoder_max_pool,
            shortcut_type=config.encoder_shortcut_type,
            feed_forward=False,
        )

    def forward(self, ct: torch.Tensor) -> torch.Tensor:
        """`ct` (batch, 1, depth, height, width) in [-1, 1] → F, (batch, N, C); N runs depth-major."""
        if ct.ndim != 5 or tuple(ct.shape[1:]) != (1, *self.image_size):
            raise ValueError(
                f"ct must have shape (batch, 1, {', '.join(map(str, self.image_size))}), got {tuple(ct.shape)}. "
                "Let the processor of this checkpoint prepare it."
            )
        net = self.resnet
        # Channels last is 1.3 to 2.6 times faster for 3D convolutions on CPU and the layout of tensor cores on GPU.
        hidden = ct.to(net.conv1.weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        hidden = net.act(net.bn1(net.conv1(hidden)))
        if not net.no_max_pool:
            hidden = net.maxpool(hidden)
        hidden = net.layer4(net.layer3(net.layer2(net.layer1(hidden))))
        return hidden.flatten(2).transpose(1, 2)


def voxel_positions(grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Centres of the voxel tokens as fractions of the axes (depth, height, width), (prod(grid), 3) in float32."""
    axes = [(torch.arange(size, device=device) + 0.5) / size for size in grid]
    return torch.stack([position.flatten() for position in torch.meshgrid(*axes, indexing="ij")], dim=-1)


def sincos_position_embedding(grid: tuple[int, int, int], width: int, device: torch.device) -> torch.Tensor:
    """
    Fixed 3D sine-cosine position embedding, (prod(grid), width) in float32.

    A third of the width (rounded down to even) belongs to each axis, the rest is zero. Positions are fractions of the
    axis, so that the code of an anatomical level does not depend on the resolution of the grid.
    """
    per_axis = width // 6 * 2
    frequencies = math.pi * 2.0 ** torch.linspace(0, math.log2(max(grid)), per_axis // 2, device=device)
    codes = []
    for position in voxel_positions(grid, device).unbind(dim=-1):
        angle = position[:, None] * frequencies
        codes += [angle.sin(), angle.cos()]
    code = torch.cat(codes, dim=-1)
    return F.pad(code, (0, width - code.shape[-1]))


def locality_bias(grid: tuple[int, int, int], latents: int, width: float, device: torch.device) -> torch.Tensor:
    """
    Log of a Gaussian of each voxel token's distance to each latent's own place, (latents, prod(grid)) in float32.

    The places are those of the R3 sequence, which fills the unit cube evenly for any number of latents.
    """
    plastic = 1.2207440846057596  # the root of x⁴ = x + 1
    steps = torch.tensor([plastic**-1, plastic**-2, plastic**-3], device=device, dtype=torch.float64)
    places = (0.5 + torch.arange(1, latents + 1, device=device)[:, None] * steps) % 1
    offsets = places.float()[:, None] - voxel_positions(grid, device)
    return -offsets.square().sum(dim=-1) / (2 * width**2)


class DiffVPAttention(nn.Module):
    """Multi-head attention of latents to keys; eager, because the difference map needs the weights."""

    def __init__(self, config: DiffVPConfig, key_size: int):
        super().__init__()
        self.num_heads = config.resampler_heads
        self.q_proj = nn.Linear(config.latent_size, config.latent_size)
        self.k_proj = nn.Linear(key_size, config.latent_size)
        self.v_proj = nn.Linear(key_size, config.latent_size)
        self.o_proj = nn.Linear(config.latent_size, config.latent_size)

    def forward(
        self, hidden: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, K, d), (batch, N, key), (batch, N, key) → output (batch, K, d), weights (batch, heads, K, N).

        `bias` (K, N) is added to the scores.
        """
        batch, queries, width = hidden.shape
        query = self.q_proj(hidden).view(batch, queries, self.num_heads, -1).transpose(1, 2)
        key = self.k_proj(keys).view(batch, keys.shape[1], self.num_heads, -1).transpose(1, 2)
        value = self.v_proj(values).view(batch, values.shape[1], self.num_heads, -1).transpose(1, 2)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores.float() if bias is None else scores.float() + bias
        weights = scores.softmax(dim=-1).to(value.dtype)
        output = (weights @ value).transpose(1, 2).reshape(batch, queries, width)
        return self.o_proj(output), weights


class DiffVPMLP(nn.Module):
    """Feed-forward block of a Transformer layer, four times as wide inside."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.latent_size, 4 * config.latent_size)
        self.fc2 = nn.Linear(4 * config.latent_size, config.latent_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(hidden)))


class DiffVPResamplerLayer(GradientCheckpointingLayer):
    """A Q-Former layer: self-attention among the latents, cross-attention to the voxel tokens, feed-forward."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(config.latent_size)
        self.self_attention = DiffVPAttention(config, config.latent_size)
        self.cross_attention_norm = nn.LayerNorm(config.latent_size)
        self.cross_attention = DiffVPAttention(config, config.encoder_hidden_size)
        self.mlp_norm = nn.LayerNorm(config.latent_size)
        self.mlp = DiffVPMLP(config)

    def forward(
        self, latents: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.self_attention_norm(latents)
        latents = latents + self.self_attention(normed, normed, normed)[0]
        attended, weights = self.cross_attention(self.cross_attention_norm(latents), keys, values, bias)
        latents = latents + attended
        return latents + self.mlp(self.mlp_norm(latents)), weights


class DiffVPResampler(nn.Module):
    """V = CrossAttn(Q, F), eq. 3: one set of learnable queries shared by target and reference."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.grid = config.feature_grid
        self.position_embedding = config.position_embedding
        self.locality = config.latent_locality
        self.initializer_range = config.initializer_range
        self.queries = nn.Parameter(torch.empty(config.num_latents, config.latent_size))
        self.feature_norm = nn.LayerNorm(config.encoder_hidden_size)
        self.layers = nn.ModuleList([DiffVPResamplerLayer(config) for _ in range(config.resampler_layers)])
        self.norm = nn.LayerNorm(config.latent_size)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """F (batch, N, C) → V (batch, K, d) and the last layer's attention averaged over heads (batch, K, N)."""
        if features.ndim != 3 or features.shape[1] != math.prod(self.grid):
            raise ValueError(
                f"Expected {math.prod(self.grid)} voxel tokens (a grid of {self.grid}), got features of shape "
                f"{tuple(features.shape)}."
            )
        values = self.feature_norm(features.to(self.queries.dtype))
        keys = values
        if self.position_embedding == "sincos":
            position = sincos_position_embedding(self.grid, features.shape[-1], features.device)
            keys = values + position.to(values.dtype)
        bias = None
        # The paper names no such prior; with it a latent stays with a region.
        if self.locality is not None:
            bias = locality_bias(self.grid, len(self.queries), self.locality, features.device)
        latents = self.queries.expand(features.shape[0], -1, -1)
        for layer in self.layers:
            latents, weights = layer(latents, keys, values, bias)
        return self.norm(latents), weights.mean(dim=1)


class DiffVPGlobalDelta(nn.Module):
    """Δ_g = TransformerLayer([q_g ; V ; V_r]) read out at q_g, eq. 4."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.initializer_range = config.initializer_range
        self.query = nn.Parameter(torch.empty(1, config.latent_size))
        # Rows: target, reference. Without it V and V_r are exchangeable and the sign of the difference is lost.
        self.side_embedding = None
        # Every checkpoint has it; False is the literal eq. 4, an ablation.
        if config.use_side_embedding:
            self.side_embedding = nn.Parameter(torch.empty(2, config.latent_size))
        self.layers = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    d_model=config.latent_size,
                    nhead=config.global_delta_heads,
                    dim_feedforward=4 * config.latent_size,
                    dropout=0.0,
                    activation="gelu",
                    batch_first=True,
                    norm_first=True,
                )
                for _ in range(config.global_delta_layers)
            ]
        )

    def forward(self, latents: torch.Tensor, reference_latents: torch.Tensor) -> torch.Tensor:
        """V, V_r (batch, K, d) → Δ_g (batch, d)."""
        if self.side_embedding is not None:
            latents = latents + self.side_embedding[0]
            reference_latents = reference_latents + self.side_embedding[1]
        query = self.query.expand(latents.shape[0], -1, -1)
        hidden = torch.cat([query, latents, reference_latents], dim=1)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden[:, 0]


class DiffVPLocalDelta(nn.Module):
    """
    Δ_l = Σ_i w_i (v_i − r_i) with w_i = ‖v_i − r_i‖² / (Σ_j ‖v_j − r_j‖² + ε), eq. 5-7. No parameters.

    With `local_delta_weights="uniform"` the difference is a plain mean; w is still given, as the token importance.
    """

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.epsilon = config.difference_epsilon
        self.uniform = config.local_delta_weights == "uniform"

    def forward(self, latents: torch.Tensor, reference_latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """V, V_r (batch, K, d) → Δ_l (batch, d) in the latents' dtype, w (batch, K) in float32."""
        difference = latents.float() - reference_latents.float()
        distances = difference.square().sum(dim=-1)
        weights = distances / (distances.sum(dim=-1, keepdim=True) + self.epsilon)
        # The paper weighs by distance; the plain mean is the control.
        delta = difference.mean(dim=1) if self.uniform else (weights[..., None] * difference).sum(dim=1)
        return delta.to(latents.dtype), weights


class DiffVPPromptGenerator(nn.Module):
    """P = reshape(MLP([Δ_g ; Δ_l])), eq. 8."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.num_prefix_tokens = config.num_prefix_tokens
        hidden_size = config.text_config.hidden_size
        self.fc1 = nn.Linear(config.num_delta_vectors * config.latent_size, config.prompt_hidden_size)
        self.fc2 = nn.Linear(config.prompt_hidden_size, config.num_prefix_tokens * hidden_size)

    def forward(self, *deltas: torch.Tensor) -> torch.Tensor:
        """The difference vectors in use, each (batch, d) → P (batch, m, h)."""
        hidden = F.gelu(self.fc1(torch.cat(deltas, dim=-1)))
        return self.fc2(hidden).unflatten(-1, (self.num_prefix_tokens, -1))


class DiffVPDiagnosisClassifier(nn.Module):
    """
    3D ResNet-18 with voxel logits and Noisy-OR pooling, p = 1 − Π(1 − p_voxel), in log space (appendix D).

    Args:
        own_encoder: without one it has `classify` alone, on the features of another module's encoder.
    """

    def __init__(self, config: DiffVPConfig, own_encoder: bool = True):
        super().__init__()
        self.vision_encoder = DiffVPVisionEncoder(config) if own_encoder else None
        self.head = nn.Linear(config.encoder_hidden_size, config.num_labels_diagnosis)

    def forward(self, ct: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`ct` (batch, 1, D, H, W) → volume log-odds (batch, labels) in float32, voxel logits (batch, N, labels)."""
        return self.classify(self.vision_encoder(ct))

    def classify(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxel features (batch, N, C) → what `forward` returns."""
        voxel_logits = self.head(features)
        log_negative = F.logsigmoid(-voxel_logits.float()).sum(dim=1)  # log Π(1 − p_voxel)
        # Bounded away from 0, where every voxel is certainly negative and log p would be −∞.
        log_negative = log_negative.clamp(max=-1e-12)
        log_positive = torch.log(-torch.expm1(log_negative))
        return log_positive - log_negative, voxel_logits


def pad_left(embeddings: torch.Tensor, mask: torch.Tensor, text_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Move the padding inside each prompt to its left end; what is masked behind the text's first token stays there.

    Args:
        embeddings: (batch, L, h), the last `text_length` places of which are the text.
        mask: (batch, L), 1 for a token and 0 for padding.

    Returns:
        embeddings and mask in the new order. The text's tokens keep their places, counted from the right.
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    first_of_text = mask.shape[1] - text_length + mask[:, -text_length:].argmax(dim=1)
    moves = (mask == 0) & (places < first_of_text[:, None])
    order = moves.long().neg().argsort(dim=1, stable=True)
    return embeddings.gather(1, order[..., None].expand_as(embeddings)), mask.gather(1, order)


def diagnosis_prompt_ids(fragments: dict, positive: list[bool]) -> list[int]:
    """Token ids of the diagnosis prompt D: the positive labels between prefix and suffix, or the words for none."""
    named = [label for label, found in zip(fragments["labels"], positive, strict=True) if found]
    ids = list(fragments["prefix"])
    for position, label in enumerate(named):
        ids += (fragments["separator"] if position else []) + label
    return ids + (fragments["none"] if not named else []) + fragments["suffix"]
