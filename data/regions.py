# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Masks of the ten regions of RadGenome-ChestCT and the phantom, on the grid of the voxel tokens."""

from pathlib import Path

import numpy as np
import torch

from ..labels_diffvp import REGIONS
from .cache import TensorCache, VolumeCache
from .cases import Case
from .lesions import lps_mask, voxel_indices


def region_mask_path(root: str | Path, name: str, region: str) -> Path:
    """Return RadGenome's path of a mask: train_1_a_1 -> dataset/train_region_mask/seg_train_1_a_1/lung.nii.gz."""
    split = name.partition("_")[0]
    return Path(root) / "dataset" / f"{split}_region_mask" / f"seg_{name}" / f"{region}.nii.gz"


class RegionMasks:
    """
    Cached shares of the voxel tokens in each region of a case.

    Args:
        dataset: root of the cohort.
        grid: grid of the voxel tokens, (d, h, w).
    """

    def __init__(self, dataset: str | Path, cache_dir: str | Path, volumes: VolumeCache, grid: tuple[int, int, int]):
        self.dataset, self.volumes, self.grid = dataset, volumes, tuple(grid)
        self.cache = TensorCache(Path(cache_dir) / "regions", {**volumes.recipe, "grid": list(grid)})

    def load(self, case: Case) -> torch.Tensor:
        """
        Return shares (10, N), float32. Each row sums to 1, or is 0 if the tensor does not cover the region.

        Raises:
            DatasetError: a mask is missing, or its shape differs from that of the volume.
        """
        paths = [region_mask_path(self.dataset, case.name, region) for region in REGIONS]

        def compute() -> dict[str, torch.Tensor]:
            geometry = self.volumes.preprocess(case)["geometry"][0]
            counts = torch.stack(
                [_count(lps_mask(path, geometry, "region mask"), geometry, self.grid) for path in paths]
            )
            return {"shares": counts / counts.sum(dim=1, keepdim=True).clamp(min=1)}

        # All masks of a case are made together, so that the first one represents all.
        digest = self.volumes.hashes(paths[0]) if paths[0].is_file() else ""
        return self.cache.get(f"{self.volumes.digest(case)}{digest}", compute)["shares"]

    def pool(self, case: Case, features: torch.Tensor) -> torch.Tensor:
        """Average voxel features (N, C) within each region and over the whole volume: (11, C)."""
        return torch.cat([self.load(case) @ features.float(), features.float().mean(dim=0, keepdim=True)])


def _count(mask: np.ndarray, geometry, grid: tuple[int, int, int]) -> torch.Tensor:
    """Count the voxels of a mask in each voxel token, (N,)."""
    voxels, _ = voxel_indices(mask, geometry)
    z, y, x = (index * cells // size for index, cells, size in zip(voxels, grid, geometry.size, strict=True))
    return torch.from_numpy(np.bincount((z * grid[1] + y) * grid[2] + x, minlength=int(np.prod(grid)))).float()
