# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Building blocks of DiffVP, from the voxel tokens F (batch, N, C) of `encoders_diffvp.py` to the parts of the prompt.

- `DiffVPResampler`: shared learnable queries, latents V of shape (batch, K, d), eq. 3
- `DiffVPAlignedDifference`: voxel tokens minus the softly aligned tokens of the reference
- `DiffVPGlobalDelta`, `DiffVPLocalDelta`: hierarchical difference extractor, eq. 4-7
- `DiffVPPromptGenerator`: difference prompt P of shape (batch, m, h), eq. 8
- `read_attributes`, `diagnosis_prompts`: places and sizes of findings in words, and the diagnosis prompt D
- helpers of the models in `modeling_diffvp.py`: `pad_left` (for the whole prompt, eq. 9), `init_weights`,
  `auxiliary_loss` (eq. 11) and `check_token_labels`
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_diffvp import DiffVPConfig

SIDES = ("right", "left")


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
        # Not in eq. 4: marks target (row 0) and reference (row 1). Without it V and V_r are exchangeable, and the sign
        # of the difference is lost. None is the ablation with the literal eq. 4.
        self.side_embedding = None
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
    Δ_l = Σ_i w_i (v_i − r_i) with w_i = ‖v_i − r_i‖² / (Σ_j ‖v_j − r_j‖² + ε): eq. 5, eq. 6 and eq. 7. No parameters.

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
        if reference_features.ndim == 3:
            reference_features = reference_features[:, None]
        target = self._whiten(features)
        references = [self._whiten(one) for one in reference_features.unbind(1)]
        aligned = [self._attend(one, others) for one, *others in zip(target, *references, strict=True)]
        return target, torch.stack(aligned)

    def _attend(self, target: torch.Tensor, references: list[torch.Tensor]) -> torch.Tensor:
        """
        Average the tokens of references around each token of one target, (C, D, H, W).

        Each line of W targets is multiplied with all lines of references within the radius, because a few large
        matrix products are faster than a pass over the volume for each shift.
        """
        r, (depth, _, width) = self.radius, self.grid
        near = 2 * r + 1
        target, inside = target.permute(1, 2, 3, 0), F.pad(target.new_ones(self.grid), (r,) * 6) > 0
        references = [F.pad(one, (r,) * 6).permute(1, 2, 3, 0) for one in references]
        # −‖t − r‖² = 2 t·r − ‖r‖² − ‖t‖², and ‖t‖² cancels in the softmax.
        norms = [(-one.square().sum(dim=-1)).masked_fill(~inside, -torch.inf) for one in references]
        places = torch.arange(width + 2 * r, device=target.device) - torch.arange(width, device=target.device)[:, None]
        outside = ((places < 0) | (places >= near)).repeat(1, near * near * len(references))  # along the line
        aligned = torch.empty_like(target)

        def lines(volumes: list[torch.Tensor], slab: int) -> torch.Tensor:
            """Values around each line of a slab: (H, lines x positions, ...)."""
            slabs = torch.stack([one[slab : slab + near] for one in volumes]).unfold(2, near, 1)
            return slabs.movedim(2, 0).movedim(-1, 3).flatten(1, 4)

        for slab in range(depth):
            keys = lines(references, slab)
            scores = 2 * target[slab] @ keys.transpose(1, 2) + lines(norms, slab)[:, None]
            weights = (scores / self.temperature).masked_fill(outside, -torch.inf).softmax(dim=-1)
            aligned[slab] = weights @ keys
        return aligned.permute(3, 0, 1, 2)

    def _whiten(self, features: torch.Tensor) -> torch.Tensor:
        white = (features.float() - self.mean.float()) @ self.whitening.float().T
        return white.transpose(1, 2).unflatten(2, self.grid)

    def forward(
        self, features: torch.Tensor, reference_features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """F of target and reference, as in [`align`] → V, V_r (batch, K, d), residual norm (batch, N) in float32."""
        with torch.no_grad():
            target, aligned = self.align(features, reference_features)
            places, norm = self.peaks(target - aligned)
            target, aligned = (
                volume.flatten(2).transpose(1, 2).take_along_dim(places[..., None], dim=1)
                for volume in (target, aligned)
            )
        return *self.latents(target, aligned, places), norm

    def peaks(self, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Find the K largest local maxima of the norm of a residual (batch, C, *grid).

        Returns:
            Their places as indices of tokens, (batch, K), and the norm of all tokens, (batch, N).
        """
        norm = residual.square().sum(dim=1).sqrt()
        width = 2 * self.radius + 1
        peaks = F.max_pool3d(norm[:, None], width, 1, self.radius)[:, 0] == norm
        # If the grid has fewer than K local maxima, the largest other tokens follow.
        order = (norm * peaks + norm * 1e-3).flatten(1).topk(min(self.num_places, norm[0].numel()), dim=1)
        return order.indices, norm.flatten(1)

    def latents(
        self, target: torch.Tensor, aligned: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of target and aligned reference (batch, K, C) at places (batch, K) → V, V_r (batch, K, d)."""
        # The position is the same on both sides, so it cancels in the difference.
        position = sincos_position_embedding(self.grid, self.projection.out_features, places.device)[places]
        dtype = self.projection.weight.dtype
        latents, reference_latents = (self.projection(one.to(dtype)) + position.to(dtype) for one in (target, aligned))
        return latents, reference_latents


def named_places(config: DiffVPConfig, found: dict[str, torch.Tensor], scan: int, label: int) -> list[str]:
    """
    Return the places of a finding that the diagnosis prompt names: regions, or "right", "left" or both.

    Args:
        found: output of `DiffVPDiagnosisClassifier.locate`.
        scan, label: indices of the scan in the batch and of the label.
    """
    wanted = (config.finding_attributes or {}).get(config.diagnosis_labels[label], {})
    place, regions = wanted.get("place"), config.finding_regions or ()
    if place is None:
        return []
    if place == "region":
        return [regions[int(found["region"][scan, label])]]
    names = regions if place == "regions" else SIDES
    evidence = found["region_evidence" if place == "regions" else "side_evidence"][scan, label]
    named = evidence >= evidence.max() - wanted.get("margin", math.log(2))
    return [name for name, keep in zip(names, named.tolist(), strict=True) if keep]


def read_attributes(config: DiffVPConfig, found: dict[str, torch.Tensor]) -> list[list[dict]]:
    """
    Return the attributes of each scan's labels, from the output of `DiffVPDiagnosisClassifier.locate`.

    Returns:
        For each scan and label a dict with `places`, the names from [`named_places`]; `size_mm`, a whole number or
        `None`; and `voxel`, the centre of the peak's token in voxels (depth, height, width) of the tensor.
    """
    found = {key: value.cpu() for key, value in found.items()}
    _, height, width = config.feature_grid
    steps = [size / tokens for size, tokens in zip(config.image_size, config.feature_grid, strict=True)]
    attributes = []
    for scan, peaks in enumerate(found["peak"].tolist()):
        attributes.append([])
        for label, token in enumerate(peaks):
            place = (token // (height * width), token // width % height, token % width)
            wanted = (config.finding_attributes or {}).get(config.diagnosis_labels[label], {})
            attributes[-1].append(
                {
                    "places": named_places(config, found, scan, label),
                    "size_mm": round(float(found["size_mm"][scan, label])) if wanted.get("size") else None,
                    "voxel": [(index + 0.5) * step - 0.5 for index, step in zip(place, steps, strict=True)],
                }
            )
    return attributes


def diagnosis_prompts(
    config: DiffVPConfig, diagnosis_logits: torch.Tensor, attributes: list[list[dict]] | None = None
) -> list[list[int]]:
    """
    Return the token ids of each scan's diagnosis prompt.

    Args:
        diagnosis_logits: (batch, labels); the prompt names findings with a probability of at least
            `config.diagnosis_threshold`.
        attributes: from [`read_attributes`]; `None` names the findings without attributes.

    Raises:
        ValueError: `config.diagnosis_prompt_ids` is not set.
    """
    fragments = config.diagnosis_prompt_ids
    if fragments is None:
        raise ValueError(
            "config.diagnosis_prompt_ids is not set: make it with DiffVPProcessor.diagnosis_prompt_ids(), or set "
            "use_diagnosis=False."
        )
    probabilities = diagnosis_logits.float().sigmoid()
    positive = probabilities >= torch.tensor(config.diagnosis_threshold, device=probabilities.device)
    known = attributes or [None] * len(positive)
    return [diagnosis_prompt_ids(fragments, *of_scan) for of_scan in zip(positive.tolist(), known, strict=True)]


def diagnosis_prompt_ids(fragments: dict, positive: list[bool], attributes: list[dict] | None = None) -> list[int]:
    """
    Return the token ids of the diagnosis prompt D: the positive labels, or the words for none, in prefix and suffix.

    Args:
        fragments: `config.diagnosis_prompt_ids`.
        positive: one value per label.
        attributes: one dict per label, from [`read_attributes`]; they follow each positive label in brackets.
    """
    named = [index for index, found in enumerate(positive) if found]
    ids = list(fragments["prefix"])
    for position, index in enumerate(named):
        ids += (fragments["separator"] if position else []) + fragments["labels"][index]
        ids += [] if attributes is None else _attribute_ids(fragments["attributes"], attributes[index])
    return ids + (fragments["none"] if not named else []) + fragments["suffix"]


def _attribute_ids(fragments: dict, known: dict) -> list[int]:
    """Return text such as " (right upper lobe, 12 mm)" as token ids; empty without attributes."""
    ids = []
    for place in known["places"]:
        ids += (fragments["and"] if ids else []) + fragments["places"][place]
    if known["size_mm"] is not None:
        digits = [token for digit in str(known["size_mm"]) for token in fragments["digits"][int(digit)]]
        ids += (fragments["comma"] if ids else []) + digits + fragments["mm"]
    return fragments["open"] + ids + fragments["close"] if ids else []


def pad_left(embeddings: torch.Tensor, mask: torch.Tensor, text_length: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Move the padding inside each prompt to its left end.

    Args:
        embeddings: (batch, L, h).
        mask: (batch, L), 1 for a token and 0 for padding.
        text_length: length of the text at the right end. Padding inside it, after its first token, is not moved, so
            that its tokens keep their positions, counted from the right. 0 moves all padding.

    Returns:
        Embeddings and mask in the new order.
    """
    moves = mask == 0
    if text_length:
        places = torch.arange(mask.shape[1], device=mask.device)
        first_of_text = mask.shape[1] - text_length + mask[:, -text_length:].argmax(dim=1)
        moves &= places < first_of_text[:, None]
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


def check_token_labels(labels: torch.Tensor | None, num_items_in_batch: torch.Tensor | int | None) -> None:
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
