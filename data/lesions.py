# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The phantom's lesion and lobe masks on the grid of the model's tensor, and the findings' true attributes.

No dataset of patients has lesion masks for all findings: RadGenome-ChestCT's masks are of regions.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from ..configuration_diffvp import DIAGNOSIS_LABELS
from .cases import DatasetError, Problem
from .phantom import Finding

CELL = 4  # voxels of the tensor along each axis of a cell: fine enough to shift masks along with an augmented volume


def lesion_mask_path(root: str | Path, name: str) -> Path:
    """Where `write_cohort(masks=True)` puts the bit-coded lesion mask of a case."""
    return Path(root) / "phantom" / "lesion_mask" / f"{name}.nii.gz"


def lobe_mask_path(root: str | Path, name: str) -> Path:
    """Where `write_cohort(masks=True)` puts the lobes of a case."""
    return Path(root) / "phantom" / "lobe_mask" / f"{name}.nii.gz"


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


def largest_lesions(path: Path, geometry) -> torch.Tensor:
    """
    As [`lesion_cells`], with the largest connected part of each finding alone: the one whose size a report states.

    Arguments and errors as of [`lesion_cells`].
    """
    codes = lps_mask(path, geometry, "lesion mask")
    largest = np.zeros(codes.shape, codes.dtype)
    for bit in np.flatnonzero([np.bitwise_or.reduce(codes, axis=None) >> np.uint32(n) & 1 for n in range(32)]):
        mask = (codes >> np.uint32(bit)) & 1
        # In the box of the finding, which is mostly a small part of the scan.
        [box] = ndimage.find_objects(mask.astype(np.int8))
        parts, count = ndimage.label(mask[box])
        part = 1 + np.bincount(parts.ravel())[1:].argmax()
        largest[box] |= np.where(parts == part, np.uint32(1 << bit), np.uint32(0))
    return torch.from_numpy(_gathered(largest, geometry, CELL))


def lobe_cells(path: Path, geometry) -> torch.Tensor:
    """
    The lobe at the centre of each cell of the tensor, uint8 (depth / CELL, height / CELL, width / CELL): 0 outside the
    lungs, else 1 + the index into `LOBES`.

    Arguments and errors as of [`lesion_cells`], with a mask of lobes.
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
    """The findings of each case of a phantom cohort, by its name.

    Raises:
        DatasetError: there is no such list, or a line of it is not of a patient.
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
            expected = "JSON with name, and findings of label and attributes"
            raise DatasetError([Problem(path.name, number, "line", type(error).__name__, expected)]) from error
    return findings


def size_mm(finding: Finding) -> float | None:
    """The length that its report states; `None` where it states none."""
    lengths = [value for key, value in finding.attributes.items() if key.endswith("_mm")]
    return float(lengths[0]) if lengths else None


def true_place(finding: Finding) -> frozenset[str]:
    """The lobes of a finding, or else its sides ("right", "left"); empty where its report names neither."""
    attributes = finding.attributes
    if finding.label == "Medical material":  # of some kinds of it the sentence names the vein, not the side
        return frozenset()
    if "lobe" in attributes:
        return frozenset([attributes["lobe"]])
    if "lobes" in attributes:
        return frozenset(attributes["lobes"])
    side = attributes.get("side")
    return frozenset(("right", "left") if side == "both" else () if side is None else (side,))


def true_sizes(findings: Sequence[Finding]) -> torch.Tensor:
    """The size in mm of each label, float (labels,); NaN where there is none."""
    sizes = torch.full((len(DIAGNOSIS_LABELS),), torch.nan)
    for finding in findings:
        size = size_mm(finding)
        if size is not None:
            sizes[DIAGNOSIS_LABELS.index(finding.label)] = size
    return sizes


def lesion_voxels(path: Path, geometry) -> torch.Tensor:
    """
    Bit-coded lesions by voxel of the tensor: int32 (depth, height, width). Bit i is set where the centre of the voxel
    lies in finding `DIAGNOSIS_LABELS[i]`, and where the centre of a voxel of the mask that does lies in the voxel: the
    first leaves no gaps where the tensor's grid is the finer one, the second loses no thin lesion where it is coarser.

    Arguments and errors as of [`lesion_cells`].
    """
    return mask_voxels(lps_mask(path, geometry, "lesion mask"), geometry)


def mask_voxels(codes: np.ndarray, geometry) -> torch.Tensor:
    """[`lesion_voxels`] of codes that are read already, on the grid and in the axis order of the volume, [x, y, z]."""
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
