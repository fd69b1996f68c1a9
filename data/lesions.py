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
    return torch.from_numpy(_gathered(lps_mask(path, geometry, "lesion mask"), geometry, CELL))


def lesion_voxels(path: Path, geometry) -> torch.Tensor:
    """
    Bit-coded lesions by voxel of the tensor: int32 (depth, height, width). Bit i is set where the centre of the voxel
    lies in finding `DIAGNOSIS_LABELS[i]`, and where the centre of a voxel of the mask that does lies in the voxel: the
    first leaves no gaps where the tensor's grid is the finer one, the second loses no thin lesion where it is coarser.

    Arguments and errors as of [`lesion_cells`].
    """
    codes = lps_mask(path, geometry, "lesion mask")
    voxels = _gathered(codes, geometry, 1)
    outputs, inputs = [], []
    for axis in range(3):
        centres = geometry.offset[axis] + geometry.scale[axis] * np.arange(geometry.size[2 - axis])
        nearest = np.floor(centres + 0.5).astype(int)
        inside = (nearest >= 0) & (nearest < codes.shape[axis])
        outputs.append(np.flatnonzero(inside))
        inputs.append(nearest[inside])
    voxels[np.ix_(*outputs[::-1])] |= codes[np.ix_(*inputs)].T.astype(np.int32)
    return torch.from_numpy(voxels)


def token_targets(cells: torch.Tensor, grid: tuple[int, int, int], labels: int) -> torch.Tensor:
    """Bit-coded cells (batch, d, h, w) → whether each finding lies in each voxel token, float (batch, N, labels)."""
    bits = torch.stack([(cells >> bit) & 1 for bit in range(labels)], dim=1).float()
    return torch.nn.functional.adaptive_max_pool3d(bits, grid).flatten(2).transpose(1, 2)


def lps_mask(path: Path, geometry, what: str) -> np.ndarray:
    """
    A mask on the grid of the file, in the axis order of the volume, [x, y, z].

    Args:
        what: its name in the error.

    Raises:
        DatasetError: there is no such mask, or its shape is not that of the volume.
    """
    if not path.is_file():
        raise DatasetError([Problem(path.name, None, what, "missing", "a cohort with masks")])
    codes = np.asarray(nib.load(path).dataobj)
    if codes.shape != tuple(geometry.shape):
        expected = f"{tuple(geometry.shape)}, as the volume has"
        raise DatasetError([Problem(path.name, None, "shape", f"{codes.shape}", expected)])
    codes = codes.transpose(geometry.axes)
    return np.flip(codes, [axis for axis, flip in enumerate(geometry.flips) if flip])


def _gathered(codes: np.ndarray, geometry, cell: int) -> np.ndarray:
    """What lies in each cell of so many voxels of the tensor, int32 [z, y, x]."""
    voxels, values = voxel_indices(codes, geometry)
    grid = np.zeros([size // cell for size in geometry.size], np.int32)
    np.bitwise_or.at(grid, tuple(index // cell for index in voxels), values.astype(np.int32))
    return grid


def voxel_indices(mask: np.ndarray, geometry) -> tuple[list[np.ndarray], np.ndarray]:
    """Of a mask [x, y, z], the voxels that are set and lie in the tensor: indices z, y, x there, and their values."""
    found = np.nonzero(mask)
    voxels, inside = [], np.ones(len(found[0]), dtype=bool)
    for axis in range(3):  # x, y, z are width, height, depth of the tensor
        voxel = np.floor((found[axis] - geometry.offset[axis]) / geometry.scale[axis] + 0.5).astype(int)
        inside &= (voxel >= 0) & (voxel < geometry.size[2 - axis])
        voxels.append(voxel)
    return [index[inside] for index in reversed(voxels)], mask[found][inside]
