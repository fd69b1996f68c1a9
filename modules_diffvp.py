# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The building blocks of DiffVP, from the scan to the difference prompt.

- `encoders_diffvp.py`: frozen encoder, voxel tokens F of shape (batch, N, C)
- `DiffVPResampler`: shared learnable queries, latents V of shape (batch, K, d), eq. 3
- `DiffVPAlignedDifference`: voxel tokens minus the softly aligned tokens of the reference
- `DiffVPGlobalDelta`, `DiffVPLocalDelta`: hierarchical difference extractor, eq. 4-7
- `DiffVPPromptGenerator`: difference prompt P of shape (batch, m, h), eq. 8
- `DiffVPDiagnosisClassifier`: voxel logits and Noisy-OR pooling (appendix D)
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_diffvp import DiffVPConfig
from .encoders_diffvp import DiffVPVisionEncoder


def voxel_positions(grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
    """Centres of the voxel tokens as fractions of the axes (depth, height, width), (prod(grid), 3) in float32."""
    axes = [(torch.arange(size, device=device) + 0.5) / size for size in grid]
    return torch.stack([position.flatten() for position in torch.meshgrid(*axes, indexing="ij")], dim=-1)


def sincos_position_embedding(grid: tuple[int, int, int], width: int, device: torch.device) -> torch.Tensor:
    """
    Fixed 3D sine-cosine position embedding, (prod(grid), width) in float32.

    Each axis takes a third of the width, rounded down to an even number; the rest is zero. Positions are fractions of
    the axis, so that the embedding of an anatomical level does not depend on the resolution of the grid.
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
    Log of a Gaussian of the distance from each latent's location to each voxel token, (latents, prod(grid)) in
    float32.

    The locations are points of the R3 sequence, which fills the unit cube evenly for any number of latents.

    Args:
        width: standard deviation of the Gaussian, as a fraction of the axes.
    """
    plastic = 1.2207440846057596  # the root of x⁴ = x + 1
    steps = torch.tensor([plastic**-1, plastic**-2, plastic**-3], device=device, dtype=torch.float64)
    places = (0.5 + torch.arange(1, latents + 1, device=device)[:, None] * steps) % 1
    offsets = places.float()[:, None] - voxel_positions(grid, device)
    return -offsets.square().sum(dim=-1) / (2 * width**2)


class DiffVPAttention(nn.Module):
    """Multi-head attention of latents to keys. Eager, because the difference map needs the weights."""

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
        """
        Args:
            hidden: (batch, K, d).
            keys, values: (batch, N, key_size).
            bias: (K, N), added to the scores.

        Returns:
            The output (batch, K, d) and the weights (batch, heads, K, N).
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
    """Feed-forward block of a Transformer layer, with a hidden width of four times `latent_size`."""

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
        self.feature_grid, self.grid = config.feature_grid, config.resampler_grid
        self.position_embedding = config.position_embedding
        self.locality = config.latent_locality
        self.initializer_range = config.initializer_range
        self.queries = nn.Parameter(torch.empty(config.num_latents, config.latent_size))
        self.feature_norm = nn.LayerNorm(config.encoder_hidden_size)
        self.layers = nn.ModuleList([DiffVPResamplerLayer(config) for _ in range(config.resampler_layers)])
        self.norm = nn.LayerNorm(config.latent_size)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        F (batch, N, C) → V (batch, K, d) and the last layer's attention averaged over heads (batch, K, N).

        Tokens of a feature pyramid are first averaged over 2x2x2, so the attention is over N / 8 tokens.
        """
        if features.ndim != 3 or features.shape[1] != math.prod(self.feature_grid):
            raise ValueError(
                f"Expected {math.prod(self.feature_grid)} voxel tokens (a grid of {self.feature_grid}), got features "
                f"of shape {tuple(features.shape)}."
            )
        if self.grid != self.feature_grid:
            volume = features.transpose(1, 2).unflatten(2, self.feature_grid)
            features = F.avg_pool3d(volume, 2).flatten(2).transpose(1, 2)
        values = self.feature_norm(features.to(self.queries.dtype))
        keys = values
        if self.position_embedding == "sincos":
            position = sincos_position_embedding(self.grid, features.shape[-1], features.device)
            keys = values + position.to(values.dtype)
        bias = None
        # Not in the paper: a prior that keeps each latent at one region of the scan.
        if self.locality is not None:
            bias = locality_bias(self.grid, len(self.queries), self.locality, features.device)
        first, *others = self.layers
        latents, weights = first(self.queries.expand(features.shape[0], -1, -1), keys, values, bias)
        for layer in others:
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
        # The literal eq. 4 has none; that is an ablation.
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
    Δ_l = Σ_i w_i (v_i − r_i) with w_i = ‖v_i − r_i‖² / (Σ_j ‖v_j − r_j‖² + ε), eq. 5, 6 and 7. No parameters.

    With `local_delta_weights="uniform"` Δ_l is the plain mean; w is still returned, as the token importance.
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
        # The paper weights by distance; the plain mean is the control.
        delta = difference.mean(dim=1) if self.uniform else (weights[..., None] * difference).sum(dim=1)
        return delta.to(latents.dtype), weights


class DiffVPPromptGenerator(nn.Module):
    """P = reshape(MLP([Δ_g ; Δ_l])), eq. 8."""

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.num_prefix_tokens = config.num_prefix_tokens
        hidden_size = config.get_text_config().hidden_size
        self.fc1 = nn.Linear(config.num_delta_vectors * config.latent_size, config.prompt_hidden_size)
        self.fc2 = nn.Linear(config.prompt_hidden_size, config.num_prefix_tokens * hidden_size)

    def forward(self, *deltas: torch.Tensor) -> torch.Tensor:
        """Difference vectors in use, each (batch, d) → P (batch, m, h)."""
        hidden = F.gelu(self.fc1(torch.cat(deltas, dim=-1)))
        return self.fc2(hidden).unflatten(-1, (self.num_prefix_tokens, -1))


class DiffVPAlignedDifference(nn.Module):
    """
    Residual of the voxel tokens with respect to a softly aligned reference, and the K locations where it is largest.

    Tokens are whitened by the mean and covariance of the pool, so that one unit is the variation among normal scans.
    For each token t, the tokens r_j of the reference within `difference_radius` are averaged with the weights
    softmax(−‖t − r_j‖² / `difference_temperature`), and the average is subtracted from t. The pairs (token, average)
    at the K largest local maxima of the residual's norm, projected to the width of the latents, are V and V_r of
    eq. 4-7. The projection has no bias, so that a residual of zero gives a Δ_l of zero; it holds the only parameters.

    `whitening` (C, C) and `mean` (C,) are buffers of the checkpoint, see [`fit`].
    """

    whitening: torch.Tensor
    mean: torch.Tensor

    def __init__(self, config: DiffVPConfig):
        super().__init__()
        self.grid, self.radius = config.feature_grid, config.difference_radius
        self.temperature, self.num_places = config.difference_temperature, config.num_latents
        width = config.encoder_hidden_size
        self.register_buffer("whitening", torch.eye(width))
        self.register_buffer("mean", torch.zeros(width))
        self.projection = nn.Linear(width, config.latent_size, bias=False)

    @torch.no_grad()
    def fit(self, tokens: torch.Tensor, shrinkage: float = 0.05) -> None:
        """
        Set `mean` and `whitening` from tokens of normal scans, by ZCA of their correlations.

        Args:
            tokens: (tokens, C).
            shrinkage: added to the variance of each axis, so that directions in which normal tokens hardly vary are
                not amplified.
        """
        tokens = tokens.double()
        deviation = tokens.std(dim=0) + 1e-3
        scaled = tokens / deviation
        covariance = torch.cov(scaled.T) + shrinkage * torch.eye(scaled.shape[1], dtype=scaled.dtype)
        values, vectors = torch.linalg.eigh(covariance)
        self.whitening.copy_(vectors @ torch.diag(values.rsqrt()) @ vectors.T @ torch.diag(1 / deviation))
        self.mean.copy_(tokens.mean(dim=0))

    def align(self, features: torch.Tensor, reference_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Align a reference with the target.

        Args:
            features: F of the target, (batch, N, C).
            reference_features: F of the reference, (batch, N, C), or of R references, (batch, R, N, C), which are
                searched together.

        Returns:
            The whitened target and the aligned reference, both (batch, C, *grid) in float32.
        """
        target = self._whiten(features)
        if reference_features.ndim == 3:
            reference_features = reference_features[:, None]
        r, sizes = self.radius, self.grid
        references = [F.pad(self._whiten(one), (r,) * 6) for one in reference_features.unbind(1)]
        inside = F.pad(torch.ones(sizes, device=target.device), (r,) * 6)
        shifts = [(a, b, c) for a in range(2 * r + 1) for b in range(2 * r + 1) for c in range(2 * r + 1)]

        def shifted(volume: torch.Tensor, shift: tuple[int, int, int]) -> torch.Tensor:
            return volume[(..., *(slice(start, start + size) for start, size in zip(shift, sizes, strict=True)))]

        candidates = [(reference, shift) for reference in references for shift in shifts]
        # One work array: with new ones for each candidate, the C library's heap may grow by half a gigabyte.
        distances, work = target.new_empty(len(candidates), *target[:, 0].shape), torch.empty_like(target)
        for distance, one in zip(distances, candidates, strict=True):
            torch.sum(torch.sub(target, shifted(*one), out=work).square_(), dim=1, out=distance)
        outside = torch.stack([shifted(inside, shift) for _, shift in candidates]) == 0
        weights = distances.div_(-self.temperature).masked_fill_(outside[:, None], -torch.inf).softmax(dim=0)
        aligned = torch.zeros_like(target)
        for weight, one in zip(weights, candidates, strict=True):
            aligned.addcmul_(weight[:, None], shifted(*one))
        return target, aligned

    def _whiten(self, features: torch.Tensor) -> torch.Tensor:
        white = (features.float() - self.mean.float()) @ self.whitening.float().T
        return white.transpose(1, 2).unflatten(2, self.grid)

    def forward(
        self, features: torch.Tensor, reference_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """F of target and reference, as in [`align`] → V, V_r (batch, K, d), residual norm (batch, N) in float32."""
        with torch.no_grad():
            target, aligned = self.align(features, reference_features)
            norm = (target - aligned).square().sum(dim=1).sqrt()
            width = 2 * self.radius + 1
            peaks = F.max_pool3d(norm[:, None], width, 1, self.radius)[:, 0] == norm
            # If the grid has fewer than K local maxima, the largest other tokens follow.
            order = (norm * peaks + norm * 1e-3).flatten(1).topk(min(self.num_places, norm[0].numel()), dim=1).indices
            pair = [
                volume.flatten(2).transpose(1, 2).take_along_dim(order[..., None], dim=1)
                for volume in (target, aligned)
            ]
            # The position is the same on both sides, so it cancels in the difference.
            position = sincos_position_embedding(self.grid, self.projection.out_features, norm.device)[order]
        dtype = self.projection.weight.dtype
        latents, reference_latents = (self.projection(one.to(dtype)) + position.to(dtype) for one in pair)
        return latents, reference_latents, norm.flatten(1)


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


def pad_left(embeddings: torch.Tensor, mask: torch.Tensor, text_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Move the padding inside each prompt to its left end. Masked positions after the first token of the text stay.

    Args:
        embeddings: (batch, L, h); the last `text_length` positions are the text.
        mask: (batch, L), 1 for a token and 0 for padding.

    Returns:
        Embeddings and mask in the new order. The text's tokens keep their positions, counted from the right.
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    first_of_text = mask.shape[1] - text_length + mask[:, -text_length:].argmax(dim=1)
    moves = (mask == 0) & (places < first_of_text[:, None])
    order = moves.long().neg().argsort(dim=1, stable=True)
    return embeddings.gather(1, order[..., None].expand_as(embeddings)), mask.gather(1, order)


def init_weights(module: nn.Module) -> None:
    """Initialise the modules that transformers' own `_init_weights` does not know, unless they are loaded."""
    if isinstance(module, nn.Conv3d):
        # The initialisation of ResNet; with a fixed range the signal would shrink layer by layer.
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, DiffVPResampler):
        # Unit scale: queries that start alike attend alike, and the latents would stay nearly identical.
        init.normal_(module.queries, std=1.0)
    elif isinstance(module, DiffVPGlobalDelta):
        init.normal_(module.query, std=module.initializer_range)
        if module.side_embedding is not None:
            init.normal_(module.side_embedding, std=module.initializer_range)


def auxiliary_loss(
    scores: torch.Tensor,
    diagnosis_labels: torch.Tensor,
    labels: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """
    L_cls of eq. 11: mean binary cross-entropy over labels and cases.

    Args:
        scores, diagnosis_labels: (batch, labels).
        labels: (batch, text), -100 on everything but the report. Needed with `num_items_in_batch`.
        num_items_in_batch: number of report tokens in the whole optimizer step. The result is then this batch's share
            of the loss of the step, in which each case is weighted by its number of tokens.

    Raises:
        ValueError: `num_items_in_batch` without `labels`.
    """
    losses = F.binary_cross_entropy_with_logits(scores, diagnosis_labels.to(scores), reduction="none").mean(1)
    if num_items_in_batch is None:
        return losses.mean()
    if labels is None:
        raise ValueError("`labels` is missing (expected with `num_items_in_batch`)")
    return ((labels[:, 1:] != -100).sum(dim=1).to(losses) / num_items_in_batch * losses).sum()


def check_labels(labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None) -> None:
    """
    Check that the labels whose tokens `Trainer` has counted were not removed.

    Raises:
        ValueError: `num_items_in_batch` is given without `labels`.
    """
    if num_items_in_batch is not None and labels is None:
        raise ValueError(
            "`labels` is missing: Trainer removes it for label_smoothing_factor and compute_loss_func, and would "
            "train on another loss than eq. 11. Set label_smoothing_factor=0, or override compute_loss."
        )
