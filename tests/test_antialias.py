# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Antialiased resampling compared with PyTorch's along each axis, and the use of every voxel."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from diffvp.reading_diffvp import read_ct
from diffvp.resampling_diffvp import resample


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 200, shape).astype(np.int16)


def torch_antialiased(values: torch.Tensor, size) -> torch.Tensor:
    """Antialias along each axis in turn: the filter is separable, and PyTorch supports only two dimensions."""
    for axis, count in enumerate(size):
        lines = values.movedim(axis, -1)
        shape = lines.shape[:-1]
        lines = lines.reshape(1, 1, -1, lines.shape[-1])
        lines = interpolate(lines, (lines.shape[2], count), mode="bilinear", antialias=True)
        values = lines.reshape(*shape, count).movedim(-1, axis)
    return values


@pytest.mark.parametrize("size", [(9, 11, 13), (60, 50, 40), (33, 44, 8), (7, 100, 19)])
def test_antialiased_resampling_equals_pytorch(size):
    hu = noise((61, 47, 33))
    windowed = torch.from_numpy(np.ascontiguousarray(hu.T)).double().add(1000).div(600).sub(1)
    tensor, _ = resample(read_ct(hu, (1.0, 1.0, 1.0)), size, crop_foreground=False, antialias=True)
    assert torch.allclose(
        tensor[0].double(), torch_antialiased(windowed, size), atol=5e-6
    )  # positions are in float32, as in PyTorch's own float32 path


def test_antialiasing_uses_every_voxel():
    """Linear interpolation from 40 to 8 slices ignores four of five slices; the triangle filter uses all of them."""
    quiet = np.full((16, 16, 40), -1000, np.int16)
    quiet[:4] = 100  # tissue for the Hounsfield unit check, outside the compared region
    missed = {False: 0, True: 0}
    for z in range(40):
        marked = quiet.copy()
        marked[8, 8, z] = 200
        for antialias in missed:
            tensors = [
                resample(read_ct(scan, (1.0, 1.0, 1.0)), (8, 16, 16), crop_foreground=False, antialias=antialias)[0]
                for scan in (quiet, marked)
            ]
            missed[antialias] += int(torch.equal(*tensors))
    assert missed == {False: 32, True: 0}


def test_constant_stays_constant_up_to_the_border():
    flat = np.full((30, 30, 30), -400, np.int16)
    flat[15, 15, 15], flat[15, 15, 16] = -1000, 200  # a constant volume is refused
    volume = read_ct(flat, (1.0, 1.0, 1.0), allow_non_hu=True)
    tensor, _ = resample(volume, (6, 6, 6), crop_foreground=False, antialias=True)
    assert torch.allclose(tensor[0, 0], torch.zeros(6, 6), atol=1e-6)


def test_outside_the_scan_is_air_in_either_mode():
    hu = noise((20, 20, 20))
    volume = read_ct(hu, (1.0, 1.0, 1.0))
    for antialias in (False, True):
        tensor, _ = resample(volume, (30, 30, 30), spacing=(2.0, 2.0, 2.0), antialias=antialias)
        inside = tensor[0, 10:20, 10:20, 10:20]
        assert (inside > -1).all() and tensor[0].ne(-1).sum() == inside.numel()
