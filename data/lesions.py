# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The phantom's lesion masks on the grid of the model's tensor. No dataset of patients has them for all findings."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from .cases import DatasetError, Problem

CELL = 4  # voxels of the tensor along each axis of a cell: fine enough to shift masks along with an augmented volume


def lesion_mask_path(root: str | Path, name: str) -> Path:
    """Where `write_cohort(masks=True)` puts the bit-coded lesion mask of a case."""
    return Path(root) / "phantom" / "lesion_mask" / f"{name}.nii.gz"


def lesion_cells(path: Path, geometry) -> torch.Tensor:
    """
    Bit-coded lesions by cell of the tensor: int32 (depth / CELL, height / CELL, width / CELL); bit i is set where a
    voxel of finding `DIAGNOSIS_LABELS[i]` lies in the cell.

    Args:
        path: a bit-coded lesion mask on the grid of the volume.
        geometry: the [`CTGeometry`] with which the volume was preprocessed.

    Raises:
        DatasetError: there is no such mask, or its shape is not that of the volume.
    """
    if not path.is_file():
        raise DatasetError([Problem(path.name, None, "lesion mask", "missing", "a cohort made with masks")])
    codes = np.asarray(nib.load(path).dataobj)
    if codes.shape != tuple(geometry.shape):
        expected = f"{tuple(geometry.shape)}, as the volume has"
        raise DatasetError([Problem(path.name, None, "shape", f"{codes.shape}", expected)])
    codes = codes.transpose(geometry.axes)
    codes = np.flip(codes, [axis for axis, flip in enumerate(geometry.flips) if flip])
    found = np.nonzero(codes)
    cells, inside = [], np.ones(len(found[0]), dtype=bool)
    for axis in range(3):  # x, y, z are width, height, depth of the tensor
        voxel = np.floor((found[axis] - geometry.offset[axis]) / geometry.scale[axis] + 0.5).astype(int)
        inside &= (voxel >= 0) & (voxel < geometry.size[2 - axis])
        cells.append(voxel // CELL)
    grid = np.zeros([size // CELL for size in geometry.size], np.int32)
    x, y, z = (cell[inside] for cell in cells)
    np.bitwise_or.at(grid, (z, y, x), codes[found][inside].astype(np.int32))
    return torch.from_numpy(grid)


def token_targets(cells: torch.Tensor, grid: tuple[int, int, int], labels: int) -> torch.Tensor:
    """Bit-coded cells (batch, d, h, w) → whether each finding lies in each voxel token, float (batch, N, labels)."""
    bits = torch.stack([(cells >> bit) & 1 for bit in range(labels)], dim=1).float()
    return torch.nn.functional.adaptive_max_pool3d(bits, grid).flatten(2).transpose(1, 2)
