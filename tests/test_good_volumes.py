# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Valid NIfTI, NRRD and MetaImage files are read voxel by voxel. nibabel and SimpleITK give the expected values."""

import io

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

from diffvp import nrrd_diffvp
from diffvp.map_diffvp import save_map, to_input_grid
from diffvp.nifti_diffvp import QFORM
from diffvp.reading_diffvp import read_ct
from diffvp.resampling_diffvp import resample
from diffvp.volume_diffvp import STATED, CTGeometryError, CTInputError

from .bad_inputs import lps_affine, nifti, nrrd, sform, sitk_image
from .ct_samples import SPACING, make_ct
from .good_volumes import FALLING, FALLS, GOOD, moved, template

NOT_BY_ITK = ("NRRD of five axes", "MetaImage in text")  # not supported by ITK 5.4
FILES = [
    (name, make) for name, make in GOOD if name.startswith(("NIfTI", "NRRD", "MetaImage")) and name not in NOT_BY_ITK
]


def hu(volume) -> np.ndarray:
    return volume.array.astype(np.float64) * volume.slope + volume.intercept


@pytest.mark.parametrize(("name", "make"), GOOD, ids=[name for name, _ in GOOD])
def test_valid_file_is_read(tmp_path, name, make):
    """Voxels, spacing and digest are correct, and a map has the shape of the file."""
    volume = read_ct(make(tmp_path))
    np.testing.assert_allclose(hu(volume), make_ct(), rtol=0, atol=0.02)
    np.testing.assert_allclose(volume.spacing, SPACING, rtol=1e-5)
    assert volume.sha256 == read_ct(make_ct(), SPACING).sha256
    tensor, geometry = resample(volume, (8, 9, 10))
    expected, _ = resample(read_ct(make_ct(), SPACING), (8, 9, 10))
    assert (tensor - expected).abs().max() < 1e-4
    assert to_input_grid(tensor[0], geometry).shape == volume.shape


@pytest.mark.parametrize(("name", "make"), FILES, ids=[name for name, _ in FILES])
def test_simpleitk_reads_the_same_voxels(tmp_path, name, make):
    path = make(tmp_path)
    array = sitk.GetArrayFromImage(sitk.ReadImage(path))
    np.testing.assert_allclose(array.squeeze(), hu(read_ct(path)).T, rtol=0, atol=1e-3)


NIFTI_FILES = [(name, make) for name, make in FILES if name.startswith("NIfTI")]


@pytest.mark.parametrize("form", ["image", "bytes", "undecoded", "stream"])
@pytest.mark.parametrize(("name", "make"), NIFTI_FILES, ids=[name for name, _ in NIFTI_FILES])
def test_image_and_bytes_are_read_like_the_file(tmp_path, name, make, form):
    path = make(tmp_path)
    content = path.read_bytes()
    raw = nib.load(path).to_bytes() if form == "stream" else content
    given = {
        "image": lambda: nib.load(path),
        "bytes": lambda: {"path": None, "bytes": content},
        "undecoded": lambda: {"path": str(path), "bytes": None},
        "stream": lambda: nib.Nifti1Image.from_stream(io.BytesIO(raw)),
    }[form]()
    volume, expected = read_ct(given), read_ct(path)
    np.testing.assert_allclose(hu(volume), hu(expected), rtol=0, atol=0.02)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.layout == expected.layout and volume.shape == expected.shape


# A slope below 0


def test_negative_slope_gives_the_tensor_of_the_hounsfield_units():
    """Foreground, window and borders must be in HU: the lowest stored value is the densest voxel."""
    falling = read_ct({"path": None, "bytes": nifti(FALLING, **FALLS)})
    assert falling.slope == -0.5 and falling.array.dtype == np.uint16
    for options in ({}, {"foreground_hu": -300.0}, {"crop_foreground": False}, {"spacing": (2.0, 2.0, 2.0)}):
        tensor, geometry = resample(falling, (12, 14, 16), **options)
        expected, rising = resample(read_ct(make_ct(), SPACING), (12, 14, 16), **options)
        assert torch.equal(tensor, expected) and geometry.offset == rising.offset


def test_rescale_of_the_wrong_sign_is_refused_unless_allowed(tmp_path):
    """Air appears as dense as bone; the range -1200 to 1000 alone would be plausible for a scan."""
    inverted = {"path": None, "bytes": nifti(scl_slope=-1, scl_inter=0)}
    with pytest.raises(CTInputError) as caught:
        read_ct(inverted)
    assert caught.value.field == "voxels" and "sign" in caught.value.expected
    assert not read_ct(inverted, allow_non_hu=True).is_hu


# qform and sform


@pytest.mark.parametrize(
    ("affine", "code", "expected", "layout"),
    [
        (moved(lps_affine(), 12, -7, 30), 4, lps_affine(), QFORM),
        (np.diag([1.1, 1.1, 1.1, 1]) @ lps_affine(5), 4, lps_affine(), QFORM),
        (lps_affine(10), 2, lps_affine(), QFORM),
        (moved(lps_affine(), 0, 0, 50), 1, moved(lps_affine(), 0, 0, 50), STATED),
        (
            moved(lps_affine(), 0.3, 0, 0),
            4,
            moved(lps_affine(), 0.3, 0, 0),
            STATED,
        ),  # within a voxel: the same choice as nibabel
    ],
)
def test_scanner_grid_is_preferred_over_a_template_grid(tmp_path, affine, code, expected, layout):
    volume = read_ct({"path": None, "bytes": template(affine, code)})
    np.testing.assert_allclose(volume.affine, expected, atol=1e-4)
    assert volume.layout == layout
    tensor, geometry = resample(volume, (8, 8, 8))
    saved = nib.load(save_map(tmp_path / "map.nii", tensor[0], geometry))
    np.testing.assert_allclose(saved.get_sform(), expected, atol=1e-4)
    np.testing.assert_allclose(saved.get_qform(), expected, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("codes", [(1, 4), (1, 1), (2, 3), (4, 1)])
def test_mirrored_qform_and_sform_are_refused(axis, codes):
    """Both forms cover the same space: the first voxel of one is the last of the other."""
    mirrored = lps_affine()
    mirrored[:3, 3] += mirrored[:3, axis] * (make_ct().shape[axis] - 1)
    mirrored[:3, axis] *= -1
    content = nifti(**sform(mirrored) | {"qform_code": codes[0], "sform_code": codes[1]})
    with pytest.raises(CTGeometryError) as caught:
        read_ct({"path": None, "bytes": content})
    assert caught.value.field == "qform and sform"


# Axes of length 1, and directions


def test_axes_of_length_one_are_dropped():
    for image in (sitk.JoinSeries([sitk_image()]), sitk.JoinSeries([sitk.JoinSeries([sitk_image()])])):
        np.testing.assert_array_equal(read_ct(image).array, make_ct())
    for axes in (1, 2, 3):
        array = make_ct()[(..., *[None] * axes)]
        volume = read_ct(array, SPACING)
        np.testing.assert_array_equal(volume.array, make_ct())
        assert volume.shape == array.shape
    with pytest.raises(CTGeometryError):
        read_ct(make_ct()[..., None, None].repeat(2, 4), SPACING)


def test_nrrd_axes_may_be_in_any_order(tmp_path):
    """z is stored first, followed by a frame axis of length 1."""
    stored = np.ascontiguousarray(make_ct().transpose(1, 0, 2)).astype("<i2").tobytes()  # C order: z fastest
    fields = {"dimension": "4", "sizes": "18 1 26 22", "space directions": "(0,0,2.5) none (1.5,0,0) (0,1.25,0)"}
    (tmp_path / "a.nrrd").write_bytes(nrrd(fields, stored))
    volume = read_ct(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(volume.array, make_ct())
    assert volume.shape == (18, 26, 22)


def test_text_encoding_is_parsed_with_any_chunk_size(tmp_path, monkeypatch):
    text = " ".join(map(str, make_ct().ravel(order="F"))).encode()
    (tmp_path / "a.nrrd").write_bytes(nrrd({"encoding": "ascii"}, text))
    for chunk in (1, 7, 64, 1000):
        monkeypatch.setattr(nrrd_diffvp, "CHUNK", chunk)
        np.testing.assert_array_equal(read_ct(tmp_path / "a.nrrd").array, make_ct())
