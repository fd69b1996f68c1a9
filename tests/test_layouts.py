# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""One scan in the layout of each dataset: layouts are detected from the data; no double rescale, no mirroring."""

import csv

import nibabel as nib
import numpy as np
import pytest
import torch

from diffvp.nifti_diffvp import CT_RATE_V1, RADGENOME
from diffvp.reading_diffvp import CTMetadata, load_metadata, read_ct
from diffvp.resampling_diffvp import resample
from diffvp.volume_diffvp import GIVEN, STATED, CTGeometryError, CTInputError, CTIntensityError, CTReadError

SPACING = (1.0, 1.0, 3.0)  # the spacing of RadGenome, so that one array can represent a scan of every dataset
SIZE = (20, 48, 48)
ROW = {
    "VolumeName": "valid_1_a_1.nii.gz",
    "RescaleSlope": "1.0",
    "RescaleIntercept": "-1024.0",
    "XYSpacing": "[1.0, 1.0]",
    "ZSpacing": "3.0",
    "ImageOrientationPatient": "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]",
    "PatientPosition": "HFS",
}


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    """HU [x, y, z] in LPS order: a body with a bright mark on the left, posterior and superior side."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (160, 152, 40)], indexing="ij")
    body = (x / 0.8) ** 2 + (y / 0.7) ** 2 < 1
    array = np.where(body, np.random.default_rng(0).integers(-900, 150, x.shape), -1000)
    array[(x > 0.2) & (x < 0.5) & (y > 0.2) & (y < 0.5) & (z > 0.6)] = 1000
    return array.astype(np.int16)


def metadata(intercept: float, spacing=SPACING) -> CTMetadata:
    return CTMetadata(slope=1.0, intercept=intercept, spacing=spacing)


def v2(hu: np.ndarray) -> nib.Nifti1Image:
    """Return an image of int16 HU with its grid."""
    affine = np.diag([-1.0, -1.0, 3.0, 1.0])
    affine[:3, 3] = (80.0, 76.0, -120.0)
    image = nib.Nifti1Image(hu, affine)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    return image


def v1(hu: np.ndarray, intercept: float) -> nib.Nifti1Image:
    """Return an image of float32 raw values with a blank header."""
    image = nib.Nifti1Image(hu.astype(np.float32) - np.float32(intercept), None)
    image.header["pixdim"][1:4] = 1
    assert not image.header["qform_code"] and not image.header["sform_code"]
    return image


def radgenome(hu: np.ndarray) -> nib.Nifti1Image:
    """Return an image of float HU with the affine `np.eye(4)`, as RadGenome's `preprocess_ctrate_*.py` saves it."""
    return nib.Nifti1Image(hu.astype(np.float32), np.eye(4))


def ctrg(hu: np.ndarray) -> nib.Nifti1Image:
    """Return an image of 8-bit windowed grey values without a grid."""
    grey = (np.clip(hu, -1000, 200) + 1000) / 1200 * 255
    image = nib.Nifti1Image(np.rint(grey).astype(np.uint8), None)
    image.header["pixdim"][1:4] = 1
    return image


@pytest.fixture(scope="module")
def expected(hu) -> tuple[torch.Tensor, str]:
    volume = read_ct(v2(hu))
    assert volume.layout == STATED
    return resample(volume, SIZE)[0], volume.sha256


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", None])
@pytest.mark.parametrize("intercept", [-1024.0, -8192.0])
def test_both_versions_of_ct_rate_give_the_same_tensor(tmp_path, hu, expected, intercept, suffix):
    scan = v1(hu, intercept)
    if suffix:
        nib.save(scan, tmp_path / f"scan{suffix}")
        scan = tmp_path / f"scan{suffix}"
    volume = read_ct(scan, metadata=metadata(intercept))
    assert volume.layout.startswith(CT_RATE_V1) and f"{intercept:g}" in volume.layout
    assert volume.is_hu and volume.spacing == SPACING
    tensor, geometry = resample(volume, SIZE)
    assert torch.equal(tensor, expected[0])
    assert geometry.sha256 == expected[1] and geometry.layout == volume.layout


def test_radgenome_gives_the_same_tensor(hu, expected):
    volume = read_ct(radgenome(hu))
    assert volume.layout == RADGENOME and volume.spacing == SPACING
    assert torch.equal(resample(volume, SIZE)[0], expected[0])
    assert volume.sha256 == expected[1]


def test_ctrg_is_refused_unless_allowed_and_matches_to_8_bits(hu, expected):
    with pytest.raises(CTInputError):
        read_ct(ctrg(hu))
    with pytest.raises(CTIntensityError, match="8-bit export"):
        read_ct(ctrg(hu), spacing=SPACING)
    volume = read_ct(ctrg(hu), spacing=SPACING, allow_non_hu=True)
    assert not volume.is_hu and volume.layout == GIVEN
    tensor, geometry = resample(volume, SIZE, foreground_hu=0, hu_window=(0, 255))
    assert not geometry.is_hu
    assert (tensor - expected[0]).abs().max() < 1.01 / 255  # half a grey level in the range [-1, 1]


def test_metadata_table_is_not_applied_to_rescaled_voxels(hu):
    """For version 2, the metadata table is compared with the header, not applied."""
    volume = read_ct(v2(hu), metadata=metadata(-1024.0))
    assert volume.layout == STATED and (volume.slope, volume.intercept) == (1.0, 0.0)
    assert volume.sha256 == read_ct(v2(hu)).sha256


def test_wrong_intercept_is_refused(hu):
    with pytest.raises(CTIntensityError, match="voxel range"):
        read_ct(v1(hu, -8192.0), metadata=metadata(-1024.0))
    with pytest.raises(CTIntensityError, match="voxel range"):
        read_ct(v1(hu, -1024.0), metadata=metadata(-8192.0))


def test_contradictory_header_and_metadata_are_refused(hu):
    blank = nib.Nifti1Image(hu.astype(np.float32), None)
    with pytest.raises(CTIntensityError, match="rescaled already"):
        read_ct(blank, metadata=metadata(-1024.0))
    raw = v2((hu.astype(np.int32) + 1024).astype(np.int16))
    with pytest.raises(CTIntensityError, match="voxel minimum"):
        read_ct(raw, metadata=metadata(-1024.0))
    with pytest.raises(CTIntensityError, match="rescale to HU is missing"):
        read_ct(raw)
    with pytest.raises(CTGeometryError, match="as the metadata says"):
        read_ct(v2(hu), metadata=metadata(-1024.0, spacing=(0.7, 0.7, 3.0)))


def test_blank_header_without_metadata_is_refused(hu):
    for image in (v1(hu, -1024.0), nib.Nifti1Image(hu, None), nib.Nifti1Image(hu, np.eye(4))):
        with pytest.raises(CTGeometryError, match="grid: not stated"):
            read_ct(image)


def test_given_spacing_is_used_only_for_a_blank_header(hu, expected):
    volume = read_ct(nib.Nifti1Image(hu, None), spacing=SPACING)
    assert volume.layout == GIVEN
    assert torch.equal(resample(volume, SIZE)[0], expected[0])
    with pytest.raises(CTGeometryError, match="the header states one"):
        read_ct(v2(hu), spacing=SPACING)


def test_tall_identity_scan_is_not_taken_for_radgenome(hu):
    """A chest of 1 mm slices with an identity affine would be three times too tall."""
    tall = np.repeat(hu, 6, axis=2).astype(np.float32)
    with pytest.raises(CTGeometryError, match="grid: not stated"):
        read_ct(nib.Nifti1Image(tall, np.eye(4)))


def test_metadata_table_is_read(tmp_path):
    path = tmp_path / "validation_metadata.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROW)
        writer.writeheader()
        writer.writerow(ROW)
    row = load_metadata(path)["valid_1_a_1.nii.gz"]
    assert CTMetadata.from_ct_rate(row) == CTMetadata(1.0, -1024.0, SPACING)


@pytest.mark.parametrize(
    ("column", "value", "error"),
    [
        ("RescaleSlope", "", CTReadError),
        ("RescaleIntercept", None, CTReadError),
        ("XYSpacing", "__import__('os').getpid()", CTReadError),
        ("XYSpacing", "[1.0]", CTReadError),
        ("ZSpacing", "[1.0, 2.0]", CTReadError),
        ("ImageOrientationPatient", "[1, 0, 0, 0, 0, -1]", CTGeometryError),
        ("PatientPosition", "FFS", CTGeometryError),
    ],
)
def test_invalid_metadata_rows_are_refused(column, value, error):
    with pytest.raises(error, match=f"valid_1_a_1.nii.gz: {column}"):
        CTMetadata.from_ct_rate(ROW | {column: value})


def test_real_metadata_table_is_read_except_feet_first_scans(check_data):
    """All 3,039 rows of CT-RATE's validation table are read, except those of the two feet-first scans."""
    rows = load_metadata(check_data / "reports" / "ctrate_validation_metadata.csv")
    read, refused = {}, []
    for name, row in rows.items():
        try:
            read[name] = CTMetadata.from_ct_rate(row)
        except CTGeometryError as error:
            refused.append(error.field)
    assert (len(read), refused) == (3037, ["PatientPosition"] * 2)
    assert {one.intercept for one in read.values()} == {-1024.0, -8192.0}


def test_spacing_or_header_slope_beside_metadata_is_refused(hu):
    with pytest.raises(CTGeometryError, match="spacing: .*metadata= .--metadata. states one"):
        read_ct(v1(hu, -1024.0), spacing=SPACING, metadata=metadata(-1024.0))
    content = bytearray(v1(hu, -1024.0).to_bytes())
    content[112:116] = np.float32(0.5).tobytes()  # scl_slope; nibabel would apply it on writing
    with pytest.raises(CTIntensityError, match="scl_slope"):
        read_ct({"path": None, "bytes": bytes(content)}, metadata=metadata(-1024.0))


def test_scanner_matrix_with_identity_is_not_taken_for_radgenome():
    """A common careless export: any float array with `np.eye(4)`."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in (256, 256, 60)], indexing="ij")
    array = np.where((x / 0.8) ** 2 + (y / 0.7) ** 2 < 1, 40.0, -1000.0).astype(np.float32)
    with pytest.raises(CTGeometryError, match="grid: not stated"):
        read_ct(nib.Nifti1Image(array, np.eye(4)))


def test_unreadable_metadata_table_is_refused(tmp_path):
    (tmp_path / "table.xlsx").write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(CTReadError, match="table.xlsx"):
        load_metadata(tmp_path / "table.xlsx")
