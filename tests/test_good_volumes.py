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
from diffvp.reading_diffvp import CTMetadata, read_ct
from diffvp.resampling_diffvp import resample
from diffvp.volume_diffvp import STATED, CTGeometryError, CTInputError, CTIntensityError

from .bad_inputs import lps_affine, nifti, nrrd, sform, sitk_image
from .ct_samples import SPACING, make_ct
from .good_volumes import FALLING, FALLS, GOOD, in_time, moved, template

# Not supported by ITK 5.4.
NOT_BY_ITK = ("NRRD of five axes", "MetaImage in text")
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


@pytest.mark.parametrize("make", [make for name, make in FILES if name.startswith("NIfTI, ")])
def test_affine_equals_that_of_nibabel(tmp_path, make):
    path = make(tmp_path)
    np.testing.assert_allclose(read_ct(path).affine, nib.load(path).affine, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make", [make for name, make in FILES if name.startswith(("MetaImage, one ", "MetaImage, gzip"))]
)
def test_positions_equal_those_of_simpleitk(tmp_path, make):
    image, volume = sitk.ReadImage(make(tmp_path)), read_ct(make(tmp_path))
    for index in ((0, 0, 0), (25, 3, 17), (4, 21, 9)):
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], lps * (-1, -1, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [("LPST", 1, 1), ("RAST", -1, -1), ("LAST", 1, -1), ("rast", -1, -1), ("right-anterior-superior-time", -1, -1)],
)
def test_nrrd_in_space_and_time_has_the_grid_of_space_alone(tmp_path, name, x, y):
    """SimpleITK 2.5 turns RAS into LPS in three axes only, so it reads the same grid without time."""
    fields = {
        "space": "RAS" if name[0] in "Rr" else name[:3],
        "space directions": f"({1.5 * x},0,0) (0,{1.25 * y},0) (0,0,2.5)",
        "space origin": f"({40 * x},{-25 * y},300)",
    }
    (tmp_path / "space.nrrd").write_bytes(nrrd(fields))
    (tmp_path / "time.nrrd").write_bytes(nrrd(in_time(name, x, y)))
    image, volume = sitk.ReadImage(tmp_path / "space.nrrd"), read_ct(tmp_path / "time.nrrd")
    np.testing.assert_array_equal(volume.array.T, sitk.GetArrayFromImage(image))
    for index in ((0, 0, 0), (25, 3, 17), (4, 21, 9)):
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], lps * (-1, -1, 1), atol=1e-5)


# A nibabel image whose affine differs from its header


def moved_left(image: nib.Nifti1Image) -> None:
    image.affine[0, 3] -= 7


def mirrored(image: nib.Nifti1Image) -> None:
    image.affine[0] *= -1


def stretched(image: nib.Nifti1Image) -> None:
    image.affine[:3, 2] *= 1.5


def without_codes(image: nib.Nifti1Image) -> None:
    image.header["qform_code"] = image.header["sform_code"] = 0


def other_header(image: nib.Nifti1Image) -> None:
    image.header.set_sform(image.affine @ np.diag([-1, 1, 1, 1]), 1)


@pytest.mark.parametrize("change", [moved_left, mirrored, stretched, without_codes, other_header])
@pytest.mark.parametrize("origin", ["memory", "file", "template"])
def test_affine_of_a_nibabel_image_counts_as_on_saving(tmp_path, change, origin):
    if origin == "memory":
        image = nib.Nifti1Image(make_ct(), lps_affine())
    else:
        content = nifti() if origin == "file" else template(moved(lps_affine(), 12, -7, 30))
        (tmp_path / "scan.nii").write_bytes(content)
        image = nib.load(tmp_path / "scan.nii")
    change(image)
    before = image.header.binaryblock
    volume = read_ct(image)
    assert image.header.binaryblock == before, "the caller's header is not changed"
    np.testing.assert_allclose(volume.affine, image.affine, atol=1e-4)
    nib.save(image, tmp_path / "saved.nii")
    saved = read_ct(tmp_path / "saved.nii")
    np.testing.assert_array_equal(volume.array, saved.array)
    np.testing.assert_array_equal(volume.affine, saved.affine)
    canonical = nib.as_closest_canonical(image).get_fdata()[::-1, ::-1]  # RAS to LPS
    np.testing.assert_array_equal(volume.array, canonical)


def test_affine_without_a_length_is_refused():
    image = nib.Nifti1Image(make_ct(), lps_affine())
    image.affine[:3, 1] = 0
    with pytest.raises(CTGeometryError):
        read_ct(image)


def test_header_counts_for_an_image_without_affine():
    image = nib.Nifti1Image(make_ct(), None)
    image.header.set_sform(lps_affine(), 1)
    image.header["pixdim"][1:4] = SPACING
    np.testing.assert_array_equal(read_ct(image).array, make_ct())
    np.testing.assert_allclose(read_ct(image).affine, lps_affine())


# Values out of range that have one meaning


@pytest.mark.parametrize(
    "dim", [[4, 26, 22, 18, 0, 0, 0, 0], [5, 26, 22, 18, 0, 0, 0, 0], [4, 26, 22, 18, 0, 1, 1, 1]]
)
def test_nifti_of_zero_frames_is_read_as_one(tmp_path, dim):
    (tmp_path / "scan.nii").write_bytes(nifti(dim=dim))
    expected = sitk.ReadImage(tmp_path / "scan.nii")
    for source in (tmp_path / "scan.nii", nib.load(tmp_path / "scan.nii")):
        volume = read_ct(source)
        np.testing.assert_array_equal(volume.array.T, sitk.GetArrayFromImage(expected).squeeze())
        np.testing.assert_array_equal(volume.array, make_ct())
        np.testing.assert_allclose(volume.affine, lps_affine())
    with pytest.raises(CTGeometryError):
        read_ct(nib.Nifti1Image(make_ct()[..., :0, None], lps_affine()))


@pytest.mark.parametrize("length", [1.0000001, 1.0000003, 1.0004])
@pytest.mark.parametrize("codes", [(1, 0), (1, 1), (1, 4)])
def test_rounded_quaternion_is_read(length, codes):
    """A rotation by 180 degrees about z: float32 rounds it, and some programs write fewer digits."""
    fields = {"quatern_b": 0, "quatern_c": 0, "quatern_d": length, "qform_code": codes[0], "sform_code": codes[1]}
    for kind in (nib.Nifti1Image, nib.Nifti2Image):
        volume = read_ct({"path": None, "bytes": nifti(kind=kind, **fields)})
        np.testing.assert_allclose(volume.affine, lps_affine(), atol=1e-4)
        np.testing.assert_array_equal(volume.array, make_ct())


def test_quaternion_that_nibabel_reads_is_not_changed():
    affine = lps_affine(8.25)
    image = nib.Nifti1Image(make_ct(), affine)
    image.set_qform(affine, 1)
    image.set_sform(None, 0)
    content = image.to_bytes()
    expected = nib.Nifti1Image.from_bytes(content).affine
    np.testing.assert_array_equal(read_ct({"path": None, "bytes": content}).affine, expected)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("signed char, int8, int8_t", "i1"),
        ("uchar, unsigned char, uint8, uint8_t", "u1"),
        ("short, short int, signed short, signed short int, int16, int16_t", "i2"),
        ("ushort, unsigned short, unsigned short int, uint16, uint16_t", "u2"),
        ("int, signed int, int32, int32_t", "i4"),
        ("uint, unsigned int, uint32, uint32_t", "u4"),
        ("longlong, long long, long long int, signed long long, signed long long int, int64, int64_t", "i8"),
        ("ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t", "u8"),
        ("float", "f4"),
        ("double", "f8"),
    ],
)
def test_nrrd_types_are_read_under_every_name(tmp_path, names, kind):
    """The names are those of NRRD's definition."""
    values = (make_ct() // 10 + (100 if kind[0] == "u" else 0)).astype(np.dtype(kind))
    for name in (*names.split(", "), names.split(", ")[-1].upper()):
        (tmp_path / "a.nrrd").write_bytes(nrrd({"type": name}, values.T.astype(f"<{kind}").tobytes()))
        volume = read_ct(tmp_path / "a.nrrd", allow_non_hu=True)
        assert volume.array.dtype == np.dtype(f"<{kind}"), name
        np.testing.assert_array_equal(volume.array, values)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "a.nrrd")).T, values)


# A slope below 0


def test_negative_slope_beside_metadata_is_read():
    """The lowest Hounsfield unit is that of the highest stored value."""
    matching, other = CTMetadata(1, -1024, SPACING), CTMetadata(1, -1024, (1, 1, 1))
    volume = read_ct({"path": None, "bytes": nifti(FALLING, **FALLS)}, metadata=matching)
    np.testing.assert_array_equal(hu(volume), make_ct())
    with pytest.raises(CTGeometryError, match="as the metadata says"):
        read_ct({"path": None, "bytes": nifti(FALLING, **FALLS)}, metadata=other)
    raw = {"path": None, "bytes": nifti(FALLING, scl_slope=-0.5, scl_inter=3024)}
    with pytest.raises(CTIntensityError, match="voxel minimum: 24"):
        read_ct(raw, metadata=matching)


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
