# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Reading, resampling and the way back, against MONAI's transforms and coordinates of nibabel and SimpleITK."""

import gzip
import itertools
import json
import pickle
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from diffvp.map_diffvp import save_map, to_input_grid
from diffvp.reading_diffvp import CTMetadata, read_ct
from diffvp.resampling_diffvp import CTGeometry, foreground_box, resample
from diffvp.volume_diffvp import CTGeometryError, CTInputError, CTIntensityError, CTReadError

from .ct_samples import SPACING, lps_affine, make_ct, write_dicom

ORIENTATIONS = [
    tuple(codes[axis] for axis in order)
    for order in itertools.permutations(range(3))
    for codes in itertools.product("LR", "PA", "SI")
]


def as_nifti(lps: np.ndarray, codes=("L", "P", "S"), affine=None) -> nib.Nifti1Image:
    """Store the same scan in another orientation, with nibabel's own functions."""
    affine = lps_affine() if affine is None else affine
    change = ornt_transform(axcodes2ornt("LPS"), axcodes2ornt(codes))
    return nib.Nifti1Image(apply_orientation(lps, change), affine @ inv_ornt_aff(change, lps.shape))


def as_simpleitk(lps: np.ndarray, affine=None) -> sitk.Image:
    affine = np.diag([-1, -1, 1, 1]) @ (lps_affine() if affine is None else affine)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(lps.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((affine[:3, :3] / spacing).flatten().tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    return image


def monai_tensor(path, size, crop=True) -> torch.Tensor:
    from monai.transforms import (
        Compose,
        CropForeground,
        EnsureChannelFirst,
        LoadImage,
        Orientation,
        Resize,
        ScaleIntensityRange,
    )

    steps = [LoadImage(image_only=True), EnsureChannelFirst(), Orientation("LPS", labels=None)]
    steps += [ScaleIntensityRange(-1000, 200, -1, 1, clip=True)]
    steps += [CropForeground(select_fn=lambda x: x > -1, allow_smaller=False)] if crop else []
    steps += [Resize(size[::-1], mode="trilinear")]
    return Compose(steps)(path).as_tensor().permute(0, 3, 2, 1)


@pytest.mark.parametrize(
    "codes", [("L", "P", "S"), ("R", "A", "S"), ("L", "A", "I"), ("S", "R", "P"), ("A", "I", "R")]
)
@pytest.mark.parametrize("crop", [True, False])
def test_tensor_equals_monai_with_one_interpolation(tmp_path, codes, crop):
    path = tmp_path / "scan.nii.gz"
    nib.save(as_nifti(make_ct((61, 47, 33)), codes), path)
    size = (20, 32, 70)  # shrinks two axes and stretches one
    tensor, _ = resample(read_ct(path), size, crop_foreground=crop)
    assert tensor.dtype == torch.float32 and tensor.shape == (1, *size)
    assert (tensor - monai_tensor(path, size, crop)).abs().max() <= 1e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([(1.0, 0.0), (2.0, -24.0)]))
def test_foreground_box_equals_the_box_of_the_mask(seed, count, rescale):
    """Place a few voxels of the patient anywhere, also in planes between those that are checked completely."""
    rng, shape, (slope, intercept) = np.random.default_rng(seed), (11, 9, 40), rescale
    array = np.full(shape, -1000, np.int16)
    for _ in range(count):
        array[tuple(rng.integers(shape))] = 40
    volume = SimpleNamespace(array=array, slope=slope, intercept=intercept, source="array")
    inside = np.argwhere(array * slope + intercept > -900)
    expected = tuple(zip(inside.min(0).tolist(), (inside.max(0) + 1).tolist(), strict=True))
    assert foreground_box(volume, -900.0) == expected


@pytest.mark.parametrize("dtype", ["smallest", "compat"])
def test_nibabel_image_with_a_dtype_chosen_at_saving_is_read(dtype):
    hu = make_ct()
    image = nib.Nifti1Image(hu.astype(np.int64), lps_affine(), dtype=dtype)
    assert read_ct(image).sha256 == read_ct(hu, SPACING).sha256


def test_tensor_equals_monai_far_from_the_origin(tmp_path):
    """At voxel 500 the rounding of positions becomes visible; ours must round as torch does."""
    path = tmp_path / "scan.nii"
    nib.save(as_nifti(make_ct((512, 300, 12))), path)
    tensor, _ = resample(read_ct(path), (8, 128, 200))
    assert (tensor - monai_tensor(path, (8, 128, 200))).abs().max() <= 1e-5


def test_scaled_nifti_equals_monai(tmp_path):
    image = nib.Nifti1Image(make_ct(), lps_affine())
    image.header.set_slope_inter(1.0, -24.0)
    nib.save(image, tmp_path / "scan.nii.gz")
    tensor, _ = resample(read_ct(tmp_path / "scan.nii.gz"), (9, 10, 11))
    assert (tensor - monai_tensor(tmp_path / "scan.nii.gz", (9, 10, 11))).abs().max() <= 1e-5


def test_fixed_spacing_equals_simpleitk_and_pads_with_air():
    lps, size, spacing = make_ct(), (24, 20, 30), (2.2, 1.9, 1.1)
    tensor, geometry = resample(read_ct(as_nifti(lps)), size, spacing)
    assert geometry.tensor_spacing == pytest.approx(spacing)
    # The grid is centred on the foreground's box, in world coordinates.
    inside = np.argwhere(lps > -1000)
    centre = lps_affine() @ [*((inside.min(0) + inside.max(0)) / 2), 1]
    middle = geometry.tensor_affine @ [*((np.array(size) - 1) / 2), 1]
    np.testing.assert_allclose(middle, centre, atol=1e-4)

    grid = sitk.Image(*[int(n) for n in size[::-1]], sitk.sitkFloat32)
    grid.SetSpacing(spacing[::-1])
    grid.SetOrigin((np.diag([-1, -1, 1, 1]) @ geometry.tensor_affine @ [0, 0, 0, 1])[:3].tolist())
    clipped = as_simpleitk(lps.clip(-1000, 200).astype(np.float32))
    expected = sitk.GetArrayFromImage(sitk.Resample(clipped, grid, sitk.Transform(), sitk.sitkLinear, -1000.0))
    expected = torch.from_numpy((expected + 1000) / 600 - 1)
    assert (tensor[0] - expected).abs().max() < 1e-4
    assert (tensor[0, 0] == -1).all(), "the grid is deeper than the volume, and padded with air"


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_marked_voxel_returns_in_every_orientation(codes):
    lps = make_ct((20, 18, 14))
    x, y, z = 14, 6, 9  # left, anterior and superior of the middle
    lps[x - 1 : x + 2, y - 1 : y + 2, z - 1 : z + 2] = -900
    lps[x, y, z] = 3000
    image = as_nifti(lps, codes)
    volume = read_ct(image)
    assert (volume.array == lps).all()
    assert volume.spacing == pytest.approx(SPACING)
    marked = tuple(np.argwhere(np.asanyarray(image.dataobj) == 3000)[0])
    for size, spacing in (((28, 36, 40), None), ((40, 44, 48), (1.0, 1.0, 1.0))):
        tensor, geometry = resample(volume, size, spacing, hu_window=(-1000, 3000))
        peak = np.unravel_index(int(tensor[0].argmax()), size)
        depth, height, width = np.array(peak) / size
        assert depth > 0.5 and height < 0.5 and width > 0.5, "superior, anterior, and the patient's left"
        world = geometry.tensor_affine @ [*peak, 1]
        assert np.abs(world - image.affine @ [*marked, 1])[:3].max() <= max(geometry.tensor_spacing)
        back = to_input_grid(tensor[0], geometry)
        assert back.shape == image.shape and back.dtype == np.float32
        assert np.unravel_index(back.argmax(), back.shape) == marked


def test_map_returns_exactly_if_the_grids_coincide():
    volume = read_ct(as_nifti(make_ct(), ("A", "S", "R")))
    size = volume.array.shape[::-1]
    tensor, geometry = resample(volume, size, crop_foreground=False)
    expected = (np.asanyarray(as_nifti(make_ct(), ("A", "S", "R")).dataobj).clip(-1000, 200) + 1000) / 600 - 1
    np.testing.assert_allclose(to_input_grid(tensor[0], geometry), expected, atol=1e-6)


def test_map_is_zero_outside_the_field_of_the_tensor():
    lps = make_ct()
    tensor, geometry = resample(read_ct(as_nifti(lps)), (8, 8, 8))
    back = to_input_grid(torch.ones(8, 8, 8), geometry)
    inside = np.argwhere(lps > -1000)
    low, high = inside.min(0), inside.max(0) + 1
    expected = np.zeros(lps.shape, dtype=np.float32)
    expected[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = 1
    np.testing.assert_allclose(back, expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(8, 8, 9\).*\(8, 8, 8\)"):
        to_input_grid(torch.ones(8, 8, 9), geometry)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_saved_map_has_shape_and_affine_of_the_input(tmp_path, suffix):
    image = as_nifti(make_ct(), ("S", "L", "A"))
    nib.save(image, tmp_path / "scan.nii.gz")
    tensor, geometry = resample(read_ct(tmp_path / "scan.nii.gz"), (10, 12, 14))
    path = save_map(tmp_path / f"map{suffix}", tensor[0], geometry)
    saved = nib.load(path)
    assert saved.shape == image.shape and saved.get_data_dtype() == np.float32
    np.testing.assert_array_equal(saved.affine, nib.load(tmp_path / "scan.nii.gz").affine)
    np.testing.assert_array_equal(saved.get_fdata(), to_input_grid(tensor[0], geometry))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"map{suffix}", "scan.nii.gz"], "no temporary file is left"
    with pytest.raises(ValueError, match="map.png"):
        save_map(tmp_path / "map.png", tensor[0], geometry)


def test_geometry_survives_json_and_pickle():
    _, geometry = resample(read_ct(as_nifti(make_ct(), ("P", "S", "L"))), (8, 9, 10), (2.0, 2.0, 2.0))
    assert CTGeometry.from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
    assert pickle.loads(pickle.dumps(geometry)) == geometry


def rotated_affine(degrees: float) -> np.ndarray:
    turn = np.radians(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = lps_affine()
    affine[:3, :3] = rotation @ affine[:3, :3]
    return affine


@pytest.mark.parametrize("degrees", [0, 12])
def test_world_coordinates_agree_with_simpleitk(tmp_path, degrees):
    """Voxel (i, j, k) of our array must lie at the world coordinates that SimpleITK gives for it."""
    path = tmp_path / "scan.nrrd"
    sitk.WriteImage(as_simpleitk(make_ct(), rotated_affine(degrees)), path)
    image, volume = sitk.ReadImage(path), read_ct(path)
    size = volume.array.shape[::-1]
    _, geometry = resample(volume, size, crop_foreground=False)
    for x, y, z in np.random.default_rng(1).integers(0, 18, (20, 3)).tolist():
        ours = np.diag([-1, -1, 1, 1]) @ geometry.tensor_affine @ [z, y, x, 1]
        index = image.TransformPhysicalPointToIndex(ours[:3].tolist())
        np.testing.assert_allclose(ours[:3], image.TransformIndexToPhysicalPoint(index), atol=1e-3)
        assert image[index] == volume.array[x, y, z]


def test_every_format_gives_the_same_tensor(tmp_path):
    lps = make_ct()
    image = as_nifti(lps, ("R", "A", "S"))
    nib.save(image, tmp_path / "scan.nii")
    nib.save(as_nifti(lps.astype(np.float32), ("P", "S", "L")), tmp_path / "scan.nii.gz")
    for name in ("scan.nrrd", "scan.nhdr", "scan.mha", "scan.mhd"):
        sitk.WriteImage(as_simpleitk(lps), tmp_path / name)
    write_dicom(tmp_path / "series", lps)
    (tmp_path / "series" / "LICENSE.txt").write_text("not a slice")
    inputs = {name: tmp_path / name for name in ("scan.nii", "scan.nii.gz", "scan.nrrd", "scan.nhdr", "scan.mha")}
    inputs |= {
        "mhd": str(tmp_path / "scan.mhd"),
        "dicom": tmp_path / "series",
        "nibabel": image,
        "simpleitk": as_simpleitk(lps),
        "bytes": {"path": None, "bytes": (tmp_path / "scan.nii").read_bytes()},
        "gzipped bytes": {"path": "x.nii.gz", "bytes": (tmp_path / "scan.nii.gz").read_bytes()},
        "value with a path": {"path": str(tmp_path / "scan.nii.gz"), "bytes": None},
        "4-D": nib.Nifti1Image(np.asanyarray(image.dataobj)[..., None], image.affine),
        "array": lps,
        "C-ordered array": np.ascontiguousarray(lps),
        "big-endian array": lps.astype(">i2"),
        "tensor": torch.from_numpy(lps),
        "bfloat16 tensor": torch.from_numpy(lps.astype(np.float32)),
    }
    expected, geometry = resample(read_ct(lps, SPACING), (12, 16, 14))
    for name, ct in inputs.items():
        spacing = SPACING if isinstance(ct, (np.ndarray, torch.Tensor)) else None
        volume = read_ct(ct, spacing)
        tensor, found = resample(volume, (12, 16, 14))
        assert torch.equal(tensor, expected), name
        assert volume.sha256 == geometry.sha256, name
        if spacing is None:
            first = lps_affine() @ [*geometry.offset, 1]
            np.testing.assert_allclose(found.tensor_affine[:3, 3], first[:3], atol=1e-3, err_msg=name)
            assert to_input_grid(tensor[0], found).shape == volume.shape, name
    assert read_ct(make_ct(seed=1), SPACING).sha256 != geometry.sha256


def test_nifti_feature_of_datasets_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    nib.save(as_nifti(make_ct()), tmp_path / "scan.nii.gz")
    rows = datasets.Dataset.from_dict({"ct": [str(tmp_path / "scan.nii.gz")]})
    for decode in (True, False):
        value = rows.cast_column("ct", datasets.Nifti(decode=decode))[0]["ct"]
        assert (read_ct(value).array == make_ct()).all()


def test_input_array_is_not_changed():
    lps = make_ct().astype(np.float32)
    before = lps.copy()
    resample(read_ct(lps, SPACING), (8, 8, 8))
    assert (lps == before).all()


def with_voxel(value) -> np.ndarray:
    lps = make_ct().astype(np.float32)
    lps[3, 4, 5] = value
    return lps


def nifti_without_codes() -> nib.Nifti1Image:
    image = as_nifti(make_ct())
    image.set_qform(None, 0)  # also drops the image's affine; changed in the header alone, the affine would count
    image.set_sform(None, 0)
    return image


def nifti_with_conflicting_forms() -> nib.Nifti1Image:
    image = as_nifti(make_ct())
    image.set_qform(image.affine @ np.diag([-1, 1, 1, 1]), code=1)
    return image


def sheared(degrees: float) -> nib.Nifti1Image:
    affine = lps_affine()
    affine[1, 2] = SPACING[2] * np.tan(np.radians(degrees))
    return as_nifti(make_ct(), affine=affine)


def nifti(array, affine=None) -> nib.Nifti1Image:
    return nib.Nifti1Image(array, lps_affine() if affine is None else affine)


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
NAN_AFFINE = lps_affine()
NAN_AFFINE[0, 3] = np.nan
REFUSED = {
    "2-D": (lambda: nifti(make_ct()[:, :, 0]), CTGeometryError, r"shape: \(26, 22\)"),
    "4-D": (lambda: nifti(np.stack([make_ct()] * 2, -1)), CTGeometryError, "three axes"),
    "complex": (lambda: nifti(make_ct().astype(np.complex64)), CTIntensityError, "complex64"),
    "RGB": (lambda: nifti(np.zeros((20, 20, 20), RGB)), CTIntensityError, "one real number per voxel"),
    "boolean array": (lambda: (make_ct() > 0, SPACING), CTIntensityError, "bool"),
    "vector image": (
        lambda: sitk.Image([20, 20, 20], sitk.sitkVectorFloat32, 3),
        CTIntensityError,
        "pixel type: vector",
    ),
    "NaN": (lambda: (with_voxel(np.nan), SPACING), CTIntensityError, "NaN or infinite"),
    "infinite": (lambda: nifti(with_voxel(-np.inf)), CTIntensityError, "NaN or infinite"),
    "constant": (lambda: nifti(np.full((20, 20, 20), -1000, np.int16)), CTIntensityError, "-1000 everywhere"),
    "un-rescaled": (lambda: nifti(make_ct() + np.int16(1024)), CTIntensityError, "24 to .*rescale"),
    "8-bit": (
        lambda: nifti(((make_ct().clip(-1000, 200) + 1000) / 1200 * 255).astype(np.uint8)),
        CTIntensityError,
        "0 to 255.*8-bit",
    ),
    "affine not finite": (lambda: (as_nifti(make_ct()), NAN_AFFINE), CTGeometryError, "affine: .*not finite"),
    "zero axis": (lambda: (as_nifti(make_ct()), np.diag([1.0, 0, 1, 1])), CTGeometryError, "singular"),
    "dependent axes": (
        lambda: (as_nifti(make_ct()), np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])),
        CTGeometryError,
        "singular",
    ),
    "metres": (
        lambda: as_nifti(make_ct(), affine=lps_affine((7e-4, 7e-4, 1e-3))),
        CTGeometryError,
        "spacing: 0.0007",
    ),
    "centimetre slices": (lambda: (make_ct(), (1, 1, 25)), CTGeometryError, "spacing: 1 x 1 x 25 mm"),
    "few slices": (lambda: (make_ct((20, 20, 7)), SPACING), CTGeometryError, r"\(20, 20, 7\).*8 to 4096"),
    "gantry tilt": (lambda: sheared(18.5), CTGeometryError, "gantry tilt: 18.5 degrees"),
    "slight tilt": (lambda: sheared(1), CTGeometryError, "gantry tilt: 1.0 degrees"),
    "oblique": (lambda: as_nifti(make_ct(), affine=rotated_affine(40)), CTGeometryError, "40 degrees"),
    "no form code": (nifti_without_codes, CTGeometryError, "left and right are unknown"),
    "forms disagree": (nifti_with_conflicting_forms, CTGeometryError, "qform and sform"),
    "array without spacing": (make_ct, CTGeometryError, "spacing: missing"),
    "array with two spacings": (lambda: (make_ct(), (1, 1)), CTGeometryError, "three numbers"),
    "image with spacing": (lambda: (as_nifti(make_ct()), SPACING), CTGeometryError, "the header states one"),
    "not NIfTI": (lambda: nib.MGHImage(make_ct().astype(np.int32), lps_affine()), CTReadError, "MGHImage"),
    "empty value": (lambda: {"path": None, "bytes": None}, CTReadError, "path and bytes"),
    "garbage bytes": (lambda: {"path": None, "bytes": b"x" * 500}, CTReadError, "sizeof_hdr: .*348"),
    "truncated bytes": (
        lambda: {"path": None, "bytes": as_nifti(make_ct()).to_bytes()[:-99]},
        CTReadError,
        "file size: .* as the header promises",
    ),
    "a number": (lambda: 3, CTReadError, "type: int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_field_value_and_expectation(name):
    make, error, message = REFUSED[name]
    made = make()
    ct, extra = made if isinstance(made, tuple) else (made, None)
    if isinstance(ct, nib.Nifti1Image) and extra is not None and np.shape(extra) == (4, 4):
        ct, extra = nib.Nifti1Image(np.asanyarray(ct.dataobj), np.eye(4)), None
        ct.header.set_sform(made[1], code=1)
        ct.affine[:] = made[1]  # nibabel would refuse some of these only when it writes them
    with pytest.raises(error, match=message) as caught:
        read_ct(ct, extra)
    assert isinstance(caught.value, CTInputError) and isinstance(caught.value, ValueError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.nii.gz", None, "path: missing"),
        ("scan.dcm", b"x", "content: no DICOM file"),
        ("scan.nii", b"x" * 400, "sizeof_hdr: "),
        ("scan.nii.gz", b"x" * 400, "sizeof_hdr: "),
        ("scan.nrrd", b"x" * 400, "content: unreadable"),
        ("scan.mha", b"x" * 400, "content: unreadable"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CTReadError, match=f"^{name}: {message}"):
        read_ct(tmp_path / name)


def test_truncated_gzip_is_refused(tmp_path):
    whole = gzip.compress(as_nifti(make_ct((40, 40, 40))).to_bytes())
    (tmp_path / "scan.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CTReadError, match="truncated"):
        read_ct(tmp_path / "scan.nii.gz")


def test_requested_file_is_read_and_not_its_neighbour(tmp_path):
    """SimpleITK reads x.nii instead of x.nii.gz if both exist."""
    nib.save(as_nifti(make_ct(seed=5)), tmp_path / "x.nii")
    nib.save(as_nifti(make_ct(seed=6)), tmp_path / "x.nii.gz")
    assert (read_ct(tmp_path / "x.nii.gz").array == make_ct(seed=6)).all()


def test_files_without_orientation_are_refused(tmp_path):
    voxels = np.ascontiguousarray(make_ct((10, 10, 10)).T).astype("<i2").tobytes()
    (tmp_path / "a.nrrd").write_bytes(
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 10 10 10\nspacings: 1 1 2\nendian: little\nencoding: raw\n\n"
        + voxels
    )
    (tmp_path / "a.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nDimSize = 10 10 10\n"
        b"ElementSpacing = 1 1 2\nElementType = MET_SHORT\nElementDataFile = LOCAL\n" + voxels
    )
    with pytest.raises(CTGeometryError, match="space: missing"):
        read_ct(tmp_path / "a.nrrd")
    with pytest.raises(CTGeometryError, match="TransformMatrix: missing"):
        read_ct(tmp_path / "a.mha")


def test_non_hu_is_accepted_on_request_and_marked():
    shifted = make_ct() + np.int16(1000)
    tensor, geometry = resample(
        read_ct(shifted, SPACING, allow_non_hu=True), (8, 8, 8), foreground_hu=0, hu_window=(0, 1200)
    )
    expected, hu = resample(read_ct(make_ct(), SPACING), (8, 8, 8))
    assert hu.is_hu and not geometry.is_hu
    assert torch.equal(tensor, expected)


def test_volume_without_foreground_is_refused():
    lps = np.where(make_ct() > -1000, np.int16(-1010), np.int16(-1020))
    with pytest.raises(CTIntensityError, match="no voxel above -1000 HU"):
        resample(read_ct(lps, SPACING, allow_non_hu=True), (8, 8, 8))


@pytest.mark.parametrize(
    "name", ["cip/ct-64.nrrd", "pyradiomics/lung1_image.nrrd", "totalsegmentator/example_ct.nii.gz"]
)
def test_real_files_agree_with_simpleitk(check_data, name):
    path = check_data / "ct" / name
    volume, image = read_ct(path), sitk.ReadImage(path)
    _, geometry = resample(volume, volume.array.shape[::-1], crop_foreground=False)
    for _ in range(50):
        index = [int(np.random.default_rng(_ + k).integers(0, n)) for k, n in enumerate(volume.array.shape)]
        point = np.diag([-1, -1, 1, 1]) @ geometry.tensor_affine @ [*index[::-1], 1]
        assert image[image.TransformPhysicalPointToIndex(point[:3].tolist())] == volume.array[tuple(index)]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("vtkjs/LIDC2.mha", CTIntensityError, "0 to 255.*8-bit"),
    ],
)
def test_real_files_not_in_hu_are_refused(check_data, name, error, message):
    with pytest.raises(error, match=message):
        read_ct(check_data / "ct" / name)


@pytest.mark.parametrize("argument", [{"spacing": SPACING}, {"series": 1}, {"metadata": CTMetadata(1, 0, SPACING)}])
def test_argument_that_does_not_apply_is_refused(argument):
    name = next(iter(argument))
    sources = [read_ct(make_ct(), SPACING), as_simpleitk(make_ct())]
    sources += [] if name == "metadata" else [as_nifti(make_ct())]
    for source in sources:
        with pytest.raises(CTInputError, match=name):
            read_ct(source, **argument)
    if name != "spacing":
        with pytest.raises(CTReadError, match=f"array: {name}"):
            read_ct(make_ct(), **({"spacing": SPACING} | argument))
