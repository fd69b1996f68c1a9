# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A map on the grid of the model's tensor, brought back to the voxels of the input file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
from isal import igzip

from .resampling_diffvp import CTGeometry, taps
from .volume_diffvp import is_tensor

if TYPE_CHECKING:
    import torch


def to_input_grid(map: torch.Tensor | np.ndarray, geometry: CTGeometry | Mapping) -> np.ndarray:
    """Resample a map from the tensor's grid to the voxels of the input file, trilinearly.

    Args:
        map: (depth, height, width), of shape `geometry.size`.
        geometry: the tensor's geometry, or its dict as stored by `datasets` or JSON.

    Returns:
        float32 array in the file's own shape and axis order; 0 outside the tensor.

    Raises:
        ValueError: the map's shape differs from `geometry.size`.
    """
    geometry = CTGeometry.from_dict(geometry)
    values = np.asarray(map.detach().cpu().float() if is_tensor(map) else map, dtype=np.float32)
    if values.shape != geometry.size:
        raise ValueError(f"The map has shape {values.shape}, but the geometry has size {geometry.size}.")
    for lps, axis in ((0, 2), (1, 1), (2, 0)):  # of [z, y, x]
        length = geometry.shape[geometry.axes[lps]]
        positions = (np.arange(length) - geometry.offset[lps]) / geometry.scale[lps]
        values = taps(positions, 0, geometry.size[axis]).interpolate(values, axis)
    array = values.T[tuple(slice(None, None, -1 if flip else 1) for flip in geometry.flips)]
    # NIfTI's order of voxels, which most maps have at this point.
    return np.asfortranarray(array.transpose(np.argsort(geometry.axes))).reshape(geometry.shape, order="F")


def save_map(path: str | os.PathLike, map: torch.Tensor | np.ndarray, geometry: CTGeometry | Mapping) -> Path:
    """Write a map on the tensor's grid as NIfTI (.nii or .nii.gz) with the shape and affine of the input file.

    If the file states no grid, the map has the grid under which the file was read. The map is written atomically.

    Raises:
        ValueError: the suffix is not .nii or .nii.gz, or the map's shape differs from `geometry.size`.
    """
    from .storage_diffvp import replacing  # imports huggingface_hub, which takes longer than reading a scan

    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    if suffix not in (".nii", ".nii.gz"):
        raise ValueError(f"{path.name}: suffix: {suffix!r} (expected .nii or .nii.gz)")
    geometry = CTGeometry.from_dict(geometry)
    affine = np.asarray(geometry.affine)
    image = nib.Nifti1Image(to_input_grid(map, geometry), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    with replacing(path) as temporary:
        # Floats hardly compress at any level, and isal takes a tenth of the time of zlib.
        with igzip.open(temporary, "wb", compresslevel=1) if suffix == ".nii.gz" else open(temporary, "wb") as file:
            image.to_stream(file)
    return path


__all__ = ["save_map", "to_input_grid"]
