# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Lesion and lobe masks of the phantom on the grid of the model's tensor, and the true attributes of findings.

No dataset of patients has lesion masks for all findings; RadGenome-ChestCT has masks of regions.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from ..labels_diffvp import DIAGNOSIS_LABELS
from .cases import DatasetError, Problem
from .phantom import Finding

CELL = 4  # tensor voxels along each axis of a cell, fine enough to shift masks with an augmented volume


def lesion_mask_path(root: str | Path, name: str) -> Path:
    """Return the path of the bit-coded lesion mask of a case, as written by `write_cohort(masks=True)`."""
    return Path(root) / "phantom" / "lesion_mask" / f"{name}.nii.gz"


def lobe_mask_path(root: str | Path, name: str) -> Path:
    """Return the path of the lobe mask of a case, as written by `write_cohort(masks=True)`."""
    return Path(root) / "phantom" / "lobe_mask" / f"{name}.nii.gz"


def lesion_cells(path: Path, geometry) -> torch.Tensor:
    """
    Read bit-coded lesions per cell of the tensor, int32 (depth / CELL, height / CELL, width / CELL). Bit i is set if
    the cell contains a voxel of finding `DIAGNOSIS_LABELS[i]`.

    Args:
        path: bit-coded lesion mask on the grid of the volume.
        geometry: [`CTGeometry`] of the preprocessed volume.

    Raises:
        DatasetError: the mask is missing, or its shape differs from that of the volume.
    """
    return torch.from_numpy(_gathered(lps_mask(path, geometry, "lesion mask"), geometry, CELL))


def largest_lesions(path: Path, geometry) -> torch.Tensor:
    """
    Read [`lesion_cells`] of only the largest connected part of each finding, whose size the report states.

    Arguments and errors are those of [`lesion_cells`].
    """
    codes = lps_mask(path, geometry, "lesion mask")
    largest = np.zeros(codes.shape, codes.dtype)
    for bit in np.flatnonzero([np.bitwise_or.reduce(codes, axis=None) >> np.uint32(n) & 1 for n in range(32)]):
        mask = (codes >> np.uint32(bit)) & 1
        # Crop to the bounding box of the finding, usually a small part of the scan.
        [box] = ndimage.find_objects(mask.astype(np.int8))
        parts, count = ndimage.label(mask[box])
        part = 1 + np.bincount(parts.ravel())[1:].argmax()
        largest[box] |= np.where(parts == part, np.uint32(1 << bit), np.uint32(0))
    return torch.from_numpy(_gathered(largest, geometry, CELL))


def lobe_cells(path: Path, geometry) -> torch.Tensor:
    """
    Read the lobe at the centre of each cell of the tensor, uint8 (depth / CELL, height / CELL, width / CELL): 0
    outside the lungs, else 1 + the index into `LOBES`.

    Arguments and errors are those of [`lesion_cells`], with a mask of lobes.
    """
    lobes = lps_mask(path, geometry, "lobe mask")
    outputs, inputs = [], []
    for axis in range(3):
        middles = CELL * np.arange(geometry.size[2 - axis] // CELL) + (CELL - 1) / 2
        nearest = np.floor(geometry.offset[axis] + geometry.scale[axis] * middles + 0.5).astype(int)
        inside = (nearest >= 0) & (nearest < lobes.shape[axis])
        outputs.append(np.flatnonzero(inside))
        inputs.append(nearest[inside])
    cells = np.zeros([size // CELL for size in geometry.size], np.uint8)
    cells[np.ix_(*outputs[::-1])] = lobes[np.ix_(*inputs)].T
    return torch.from_numpy(cells)


def read_patients(root: str | Path) -> dict[str, list[Finding]]:
    """Read the findings of each case of a phantom cohort, by case name.

    Raises:
        DatasetError: the list of patients is missing, or a line is invalid.
    """
    path = Path(root) / "phantom" / "patients.jsonl"
    if not path.is_file():
        raise DatasetError([Problem(path.name, None, "file", "missing", "the list of a phantom cohort, in phantom/")])
    findings = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            patient = json.loads(line)
            findings[patient["name"]] = [Finding(**finding) for finding in patient["findings"]]
        except (ValueError, KeyError, TypeError) as error:
            expected = "JSON with name and findings, each with label and attributes"
            raise DatasetError([Problem(path.name, number, "line", type(error).__name__, expected)]) from error
    return findings


def size_mm(finding: Finding) -> float | None:
    """Return the length of a finding that its report states, in mm; `None` if there is none."""
    lengths = [value for key, value in finding.attributes.items() if key.endswith("_mm")]
    return float(lengths[0]) if lengths else None


def true_place(finding: Finding) -> frozenset[str]:
    """Return the lobes of a finding, or else its sides ("right", "left"); empty if its report names neither."""
    attributes = finding.attributes
    if finding.label == "Medical material":  # for some kinds, the sentence names the vein, not the side
        return frozenset()
    if "lobe" in attributes:
        return frozenset([attributes["lobe"]])
    if "lobes" in attributes:
        return frozenset(attributes["lobes"])
    side = attributes.get("side")
    return frozenset(("right", "left") if side == "both" else () if side is None else (side,))


def true_sizes(findings: Sequence[Finding]) -> torch.Tensor:
    """Return the size of each label in mm, float (labels,); NaN if there is none."""
    sizes = torch.full((len(DIAGNOSIS_LABELS),), torch.nan)
    for finding in findings:
        size = size_mm(finding)
        if size is not None:
            sizes[DIAGNOSIS_LABELS.index(finding.label)] = size
    return sizes


def lesion_voxels(path: Path, geometry) -> torch.Tensor:
    """
    Read bit-coded lesions per voxel of the tensor, int32 (depth, height, width). Bit i is set in a voxel if its centre
    lies in finding `DIAGNOSIS_LABELS[i]`, or if the voxel contains the centre of a mask voxel of the finding. The
    first rule prevents gaps if the tensor has the finer grid, the second keeps thin lesions if it has the coarser one.

    Arguments and errors are those of [`lesion_cells`].
    """
    return mask_voxels(lps_mask(path, geometry, "lesion mask"), geometry)


def mask_voxels(codes: np.ndarray, geometry) -> torch.Tensor:
    """Compute [`lesion_voxels`] from loaded codes on the grid and in the axis order of the volume, [x, y, z]."""
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
    """Convert bit-coded cells (batch, d, h, w) to 0/1 targets per token and finding, float (batch, N, labels)."""
    bits = torch.stack([(cells >> bit) & 1 for bit in range(labels)], dim=1).float()
    return torch.nn.functional.adaptive_max_pool3d(bits, grid).flatten(2).transpose(1, 2)


def lps_mask(path: Path, geometry, what: str) -> np.ndarray:
    """
    Read a mask on the grid of the file, in the axis order of the volume, [x, y, z].

    Args:
        what: name of the mask in errors.

    Raises:
        DatasetError: the mask is missing, or its shape differs from that of the volume.
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
    """Combine the codes within each cell of `cell` tensor voxels per axis, int32 [z, y, x]."""
    voxels, values = voxel_indices(codes, geometry)
    grid = np.zeros([size // cell for size in geometry.size], np.int32)
    np.bitwise_or.at(grid, tuple(index // cell for index in voxels), values.astype(np.int32))
    return grid


def voxel_indices(mask: np.ndarray, geometry) -> tuple[list[np.ndarray], np.ndarray]:
    """Return the tensor indices z, y, x and the values of the set voxels of a mask [x, y, z] inside the tensor."""
    found = np.nonzero(mask)
    voxels, inside = [], np.ones(len(found[0]), dtype=bool)
    for axis in range(3):  # x, y, z are width, height, depth of the tensor
        voxel = np.floor((found[axis] - geometry.offset[axis]) / geometry.scale[axis] + 0.5).astype(int)
        inside &= (voxel >= 0) & (voxel < geometry.size[2 - axis])
        voxels.append(voxel)
    return [index[inside] for index in reversed(voxels)], mask[found][inside]
