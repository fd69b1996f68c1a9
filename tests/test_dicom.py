# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""DICOM reader. pydicom writes the series; pydicom, SimpleITK and the written array give the expected values."""

import struct
import tempfile
import time
import zipfile

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    BasicTextSRStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    MediaStorageDirectoryStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from diffvp import dicom_diffvp, inflate_diffvp, slices_diffvp
from diffvp.reading_diffvp import read_ct
from diffvp.volume_diffvp import CTGeometryError, CTInputError, CTIntensityError, CTReadError, CTVolume

from .ct_samples import SPACING, encoded_by_gdcm, lps_affine, make_ct, write_dicom
from .marks import slow_except

HTJ2K = "1.2.840.10008.1.2.4.201"
Z = SPACING[2]


def moved(k, one, mm, axis=2):
    position = [float(value) for value in one.ImagePositionPatient]
    position[axis] += mm
    one.ImagePositionPatient = position


def move(only, mm, axis=2):
    return lambda k, one: moved(k, one, mm, axis) if k in only else None


def set_tag(name, value, only=None):
    """Return a change that sets a field of all slices or of one; `None` removes the field."""

    def change(k, one):
        if only is None or k == only:
            if value is None:
                delattr(one, name)
            else:
                setattr(one, name, value)

    return change


def both(*changes):
    def change(k, one):
        for each in changes:
            each(k, one)

    return change


def sop_class(uid):
    def change(k, one):
        one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = uid

    return change


def syntax(uid, encode=None):
    def change(k, one):
        one.file_meta.TransferSyntaxUID = uid
        if encode is not None:
            one.PixelData = encapsulate([encode(one)])

    return change


def two_frames(k, one):
    one.NumberOfFrames, one.PixelData = 2, one.PixelData * 2


def stored(array, one, bits=16, signed=False):
    """Set the pixels of a slice to an array [x, y] of stored values."""
    one.PixelRepresentation, one.BitsStored, one.HighBit = int(signed), bits, bits - 1
    one.PixelData = np.ascontiguousarray(array.T).astype("<u2").tobytes()


REFUSED = {
    "missing slice": (
        lambda k, one: moved(k, one, Z) if k >= 10 else None,
        CTGeometryError,
        r"slice spacing: 5 mm between 009.dcm and 008.dcm \(expected 2.5 mm: .*missing",
    ),
    "duplicate position": (
        move([5], -Z),
        CTGeometryError,
        "slice positions: the same in 013.dcm and 014.dcm",
    ),
    "one position": (lambda k, one: moved(k, one, -k * Z), CTGeometryError, "slice positions: all the same"),
    "uneven": (move([5], 0.4 * Z), CTGeometryError, "slice spacing: 1.5 to 3.5 mm"),
    "gantry tilt": (lambda k, one: moved(k, one, 0.8 * k, 1), CTGeometryError, "gantry tilt: 17.7 degrees"),
    "slice out of line": (move([7], 2.0, 0), CTGeometryError, "slice positions: 1.88 mm aside in 011.dcm"),
    "mixed orientation": (
        set_tag("ImageOrientationPatient", [0, 1, 0, 1, 0, 0], 3),
        CTGeometryError,
        r"ImageOrientationPatient: not the same .*015.dcm",
    ),
    "no rotation": (
        set_tag("ImageOrientationPatient", [1, 0, 0, 0, 2, 0]),
        CTGeometryError,
        "ImageOrientationPatient: not a rotation",
    ),
    "mixed spacing": (set_tag("PixelSpacing", [1, 1], 3), CTGeometryError, "PixelSpacing: not the same"),
    "mixed size": (
        both(set_tag("Rows", 11, 3), set_tag("Columns", 52, 3)),
        CTGeometryError,
        "Rows and Columns: not the same",
    ),
    "no position": (
        set_tag("ImagePositionPatient", None, 2),
        CTGeometryError,
        "016.dcm: ImagePositionPatient: missing",
    ),
    "position of two numbers": (
        lambda k, one: one.add_new(0x00200032, "DS", ["1", "2"]),
        CTGeometryError,
        "ImagePositionPatient: 2 numbers",
    ),
    "no orientation": (
        set_tag("ImageOrientationPatient", None),
        CTGeometryError,
        "ImageOrientationPatient: missing",
    ),
    # GDCM assumes 1 mm, or the detector's ImagerPixelSpacing.
    "no pixel spacing": (set_tag("PixelSpacing", None), CTGeometryError, "PixelSpacing: missing"),
    "negative pixel spacing": (set_tag("PixelSpacing", [-1, 1]), CTGeometryError, "PixelSpacing: -1 mm"),
    # GDCM assumes 1 and 0.
    "no slope": (set_tag("RescaleSlope", None), CTIntensityError, "RescaleSlope: missing"),
    "empty slope": (set_tag("RescaleSlope", "", 4), CTIntensityError, "014.dcm: RescaleSlope: missing"),
    "slope of zero": (set_tag("RescaleSlope", 0), CTIntensityError, "RescaleSlope: 0 "),
    "negative slope": (set_tag("RescaleSlope", -1), CTIntensityError, "RescaleSlope: -1 "),
    "no intercept": (set_tag("RescaleIntercept", None), CTIntensityError, "RescaleIntercept: missing"),
    "no Hounsfield units": (set_tag("RescaleIntercept", 0), CTIntensityError, "voxel range: 24 to .*rescale"),
    "electron density": (set_tag("RescaleType", "ED"), CTIntensityError, r"RescaleType: ED \(expected HU"),
    "unspecified and no HU": (
        both(set_tag("RescaleType", "US"), set_tag("RescaleIntercept", 0)),
        CTIntensityError,
        "voxel range",
    ),
    "table of values": (
        lambda k, one: setattr(one, "ModalityLUTSequence", Sequence([Dataset()])),
        CTIntensityError,
        "ModalityLUTSequence: present",
    ),
    "not CT": (set_tag("Modality", "MR"), CTReadError, "Modality: MR"),
    "two frames": (two_frames, CTReadError, "NumberOfFrames: 2"),
    "secondary capture": (sop_class(SecondaryCaptureImageStorage), CTReadError, "SOPClassUID: Secondary Capture"),
    "secondary capture in the file's head only": (
        both(sop_class(SecondaryCaptureImageStorage), set_tag("SOPClassUID", "")),
        CTReadError,
        "SOPClassUID: Secondary Capture",
    ),
    "localizer": (set_tag("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"]), CTReadError, "ImageType: LOCALIZER"),
    "burned in": (set_tag("BurnedInAnnotation", "YES"), CTReadError, "BurnedInAnnotation: YES"),
    "MONOCHROME1": (
        set_tag("PhotometricInterpretation", "MONOCHROME1"),
        CTIntensityError,
        "PhotometricInterpretation: MONOCHROME1",
    ),
    "colour": (set_tag("SamplesPerPixel", 3), CTIntensityError, "one sample per pixel"),
    "8 bits": (
        both(set_tag("BitsAllocated", 8), set_tag("BitsStored", 8), set_tag("HighBit", 7)),
        CTIntensityError,
        "BitsAllocated, BitsStored, HighBit: 8, 8, 7",
    ),
    "no bits": (set_tag("BitsStored", None), CTReadError, "BitsStored: missing"),
    "no pixels": (set_tag("PixelData", None), CTReadError, "pixel data: missing"),
    # GDCM leaves the remaining pixels uninitialised.
    "a row too many": (set_tag("Rows", 23), CTReadError, r"pixel data: 1144 bytes \(expected 1196 bytes"),
    "a row too few": (set_tag("Rows", 21), CTReadError, r"pixel data: 1144 bytes \(expected 1092 bytes"),
    # GDCM allocates 8 GB.
    "65535 rows and columns": (
        both(set_tag("Rows", 65535), set_tag("Columns", 65535)),
        CTReadError,
        r"pixel data: 1144 bytes \(expected 8589672450 bytes",
    ),
    "garbage for high-throughput JPEG 2000": (
        syntax(HTJ2K, lambda one: b"\xff\x4f\xff\x51" * 9),
        CTReadError,
        "dcm: pixel data: undecodable",
    ),
    "private syntax": (syntax("1.2.3.4", lambda one: b"\0" * 8), CTReadError, "TransferSyntaxUID: a private one"),
    "garbage for JPEG 2000": (
        syntax(JPEG2000Lossless, lambda one: b"\xff\x4f\xff\x51" * 9),
        CTReadError,
        "dcm: pixel data: undecodable",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_field_but_not_the_patient(tmp_path, name):
    change, error, message = REFUSED[name]
    write_dicom(tmp_path / "series", make_ct(), change=change)
    started = time.monotonic()
    with pytest.raises(error, match=message) as caught:
        read_ct(tmp_path / "series")
    assert time.monotonic() - started < 2
    assert "secret" not in str(caught.value).lower()


def test_folder_without_a_full_series_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CTReadError, match="no DICOM file"):
        read_ct(tmp_path / "empty")
    write_dicom(tmp_path / "short", make_ct((20, 20, 5)))
    with pytest.raises(CTGeometryError, match="number of slices: 5"):
        read_ct(tmp_path / "short")


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (140, "001.dcm: (content: damaged|pixel data: missing or truncated)"),
        (
            -1157,
            "001.dcm: (content: damaged|pixel data: missing or truncated)",
        ),  # within the element before the pixel data
        (-1144, "001.dcm: pixel data: missing or truncated"),
        (-1, "001.dcm: pixel data: missing or truncated"),
    ],
)
def test_truncated_slice_is_named(tmp_path, cut, message):
    damaged = write_dicom(tmp_path / "series", make_ct()) / "001.dcm"
    damaged.write_bytes(damaged.read_bytes()[:cut])
    with pytest.raises(CTReadError, match=message):
        read_ct(tmp_path / "series")


def test_missing_rescale_is_accepted_with_allow_non_hu(tmp_path):
    lps = make_ct()

    def change(k, one):
        del one.RescaleSlope, one.RescaleIntercept
        one.RescaleType = "OD"

    folder = write_dicom(tmp_path / "raw", lps, change=change)
    volume = read_ct(folder, allow_non_hu=True)
    assert not volume.is_hu and volume.slope == 1 and volume.intercept == 0
    assert (volume.array == lps + 1024).all()


@pytest.mark.parametrize("kind", ["HU", "US", "", None])
def test_layout_describes_the_series(tmp_path, kind):
    change = None if kind is None else set_tag("RescaleType", kind)
    volume = read_ct(write_dicom(tmp_path / "series", make_ct(), change=change))
    assert volume.layout == "DICOM series, 18 slices, rescale slope 1 intercept -1024"
    assert volume.source == "series" and volume.is_hu and volume.spacing == SPACING
    np.testing.assert_array_equal(volume.affine[:3, :3], lps_affine()[:3, :3])


# Pixel encodings: each must give the HU that were written.


def bits12(k, one, lps):
    stored(lps[:, :, k] + 1024, one, bits=12)


def bits12_signed(k, one, lps):
    """Store signed 12-bit values, whose sign bit is bit 11."""
    stored(lps[:, :, k] & 0xFFF, one, bits=12, signed=True)
    one.RescaleIntercept = 0


def bits12_signed_extended(k, one, lps):
    stored(lps[:, :, k], one, bits=12, signed=True)
    one.RescaleIntercept = 0


def bits12_below_an_overlay(k, one, lps):
    stored((lps[:, :, k] + 1024) | 0x5000, one, bits=12)


def bits12_shifted(k, one, lps):
    stored((lps[:, :, k] + 1024) << 4, one, bits=12)
    one.HighBit = 15


def signed16(k, one, lps):
    stored(lps[:, :, k], one, signed=True)
    one.RescaleIntercept, one.PixelPaddingValue = 0, -2000


def half_slope(k, one, lps):
    stored(2 * (lps[:, :, k] + 1024), one)
    one.RescaleSlope = "0.5"


def half_intercept(k, one, lps):
    """Fractional slope with an integer intercept."""
    stored(4 * (lps[:, :, k] + 1024), one)
    one.RescaleSlope, one.RescaleIntercept = "0.25", "-1024.0"


def varying_intercepts(k, one, lps):
    stored(lps[:, :, k] + 1024 + k, one)
    one.RescaleIntercept = -1024 - k


def varying_slopes(k, one, lps):
    """Common for PET scanners. ImageSeriesReader would cast all slices to the type of the first."""
    factor = 1 if k == 0 else 4
    stored(factor * (lps[:, :, k] + 1024), one)
    one.RescaleSlope = 1 / factor


def mixed_signs(k, one, lps):
    if k % 2:
        signed16(k, one, lps)


def bits32(k, one, lps):
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 32, 32, 31, 1
    one.RescaleIntercept, one.PixelData = 0, np.ascontiguousarray(lps[:, :, k].T).astype("<i4").tobytes()


def implicit(k, one, lps):
    one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian


def rle(k, one, lps):
    one.compress(RLELossless)


def rle_signed(k, one, lps):
    bits12_signed_extended(k, one, lps)
    one.compress(RLELossless)


def rle_with_slope(k, one, lps):
    stored(10 * (lps[:, :, k] + 1024), one)
    one.RescaleSlope = "0.1"
    one.compress(RLELossless)


def some_rle(k, one, lps):
    if k % 3:
        rle(k, one, lps)


ENCODINGS = {
    change.__name__: change
    for change in (
        bits12, bits12_signed, bits12_signed_extended, bits12_below_an_overlay, bits12_shifted, signed16, half_slope,
        half_intercept, varying_intercepts, varying_slopes, mixed_signs, bits32, implicit, rle, rle_signed,
        rle_with_slope, some_rle,
    )
}  # fmt: skip
IN_FLOAT = {"half_slope", "half_intercept", "rle_with_slope", "varying_intercepts", "varying_slopes", "mixed_signs"}


@pytest.mark.parametrize("name", ENCODINGS)
def test_every_encoding_gives_the_same_hu(tmp_path, name):
    lps = make_ct()
    folder = write_dicom(tmp_path / "s", lps, change=lambda k, one: ENCODINGS[name](k, one, lps.astype(np.int32)))
    volume = read_ct(folder)
    np.testing.assert_allclose(volume.array * volume.slope + volume.intercept, lps, atol=1e-3)
    assert volume.sha256 == read_ct(lps, SPACING).sha256
    if name not in IN_FLOAT | {"bits32"}:
        assert volume.array.dtype == np.int16 and (volume.slope, volume.intercept) == (1, 0)
        assert (volume.array == lps).all()


def test_big_endian_series_is_read(tmp_path):
    folder = write_dicom(tmp_path / "s", make_ct())
    for path in folder.iterdir():
        one = pydicom.dcmread(path)
        one["PixelData"].value = np.frombuffer(one.PixelData, "<u2").astype(">u2").tobytes()
        one.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        pydicom.dcmwrite(path, one, implicit_vr=False, little_endian=False, force_encoding=True)
    assert (read_ct(folder).array == make_ct()).all()


def test_values_beyond_int16_are_kept(tmp_path):
    """Extended CT scales reach 64511 HU in metal."""
    lps = make_ct().astype(np.int32)
    lps[12, 12, 9] = 60000
    volume = read_ct(write_dicom(tmp_path / "s", lps))
    assert volume.array.dtype == np.uint16
    assert (volume.array * volume.slope + volume.intercept == lps).all()


@pytest.mark.parametrize(("uid", "compressor"), [(JPEG2000Lossless, "JPEG2000"), (JPEGLosslessSV1, "JPEG")])
def test_gdcm_compressed_series_is_read(tmp_path, uid, compressor):
    def change(k, one):
        one.PixelData = encapsulate([encoded_by_gdcm(one, compressor, tmp_path)])
        one.file_meta.TransferSyntaxUID = uid

    volume = read_ct(write_dicom(tmp_path / "series", make_ct((26, 24, 9)), change=change))
    assert (volume.array == make_ct((26, 24, 9))).all()


def test_jpeg_ls_lossless_series_is_read(tmp_path):
    """Eight slices of one real image that pydicom ships both in JPEG-LS and uncompressed."""
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False)).pixel_array
    image = pydicom.dcmread(get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False))

    def change(k, one):
        one.Rows, one.Columns, one.PixelRepresentation = image.Rows, image.Columns, image.PixelRepresentation
        one.PixelData, one.file_meta.TransferSyntaxUID = image.PixelData, image.file_meta.TransferSyntaxUID
        one["PixelData"].is_undefined_length = True

    folder = write_dicom(tmp_path / "series", make_ct((26, 22, 8)), change=change)
    volume = read_ct(folder, allow_non_hu=True)
    assert (volume.array == expected.T[:, :, None].astype(int) - 1024).all()


def test_truncated_and_overstated_compressed_pixels_are_refused(tmp_path):
    folder = write_dicom(tmp_path / "cut", make_ct(), change=lambda k, one: one.compress(RLELossless))
    path = folder / "005.dcm"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CTReadError, match="005.dcm: pixel data: missing or truncated"):
        read_ct(folder)

    def overstated(k, one):
        one.compress(RLELossless)
        one.Rows = 44

    with pytest.raises(CTReadError, match="pixel data: undecodable"):
        read_ct(write_dicom(tmp_path / "rows", make_ct(), change=overstated))

    def bomb(k, one):
        one.compress(RLELossless)
        one.Rows = one.Columns = 4096

    with pytest.raises(CTReadError, match="compression: above 200 to 1"):
        read_ct(write_dicom(tmp_path / "bomb", make_ct(), change=bomb))


@pytest.mark.parametrize(
    ("uid", "compressor", "before", "after", "message"),
    [
        (JPEGLosslessSV1, "JPEG", b"\xff\xc3\0\x0b\x10", b"\xff\xc3\0\x0b\x11", r"\[22, 26, 1\] .* of 17 bits"),
        (JPEGLosslessSV1, "JPEG", b"\0\x16\0\x1a\1", b"\0\x16\0\x1b\1", r"\[22, 27, 1\]"),
        (JPEGLosslessSV1, "JPEG", b"\xff\xc3", b"\xff\xc4", "undecodable"),
        (JPEG2000Lossless, "JPEG2000", b"\0\0\0\x1a", b"\0\xff\0\x1a", r"\[22, 16711706, 1\]"),
        (RLELossless, None, b"\2\0\0\0\x40\0", b"\0\0\0\0\x40\0", "undecodable"),
        (RLELossless, None, b"\2\0\0\0\x40\0", b"\2\0\0\0\x40\xff", "undecodable"),
    ],
)
def test_streams_that_crash_gdcm_are_refused_before_decoding(tmp_path, uid, compressor, before, after, message):
    """Found by byte mutation: 17-bit precision causes a segmentation fault, zero RLE segments a division by zero."""

    def change(k, one):
        if compressor is None:
            one.compress(RLELossless)
        else:
            one.PixelData = encapsulate([encoded_by_gdcm(one, compressor, tmp_path)])
        one.file_meta.TransferSyntaxUID = uid
        assert before in one.PixelData
        one.PixelData = one.PixelData.replace(before, after, 1)

    with pytest.raises(CTReadError, match=f"dcm: pixel data: {message}"):
        read_ct(write_dicom(tmp_path / "series", make_ct((26, 22, 8)), change=change))


# Elements before the pixel data of real files: sequences of every kind.


def nested(k, one):
    """Add nested sequences, an icon with its own pixels and size, and private elements of unknown type."""
    icon, inner, outer = Dataset(), Dataset(), Dataset()
    icon.Rows, icon.Columns, icon.BitsAllocated, icon.RescaleSlope = 7, 7, 8, 5
    icon.PixelData = b"\1" * 50
    icon["PixelData"].VR = "OB"
    inner.SOPClassUID, inner.Modality = "1.2.3", "MR"
    inner.is_undefined_length_sequence_item = k % 2 == 0
    outer.RequestAttributesSequence = Sequence([inner, Dataset(), inner])
    outer["RequestAttributesSequence"].is_undefined_length = k % 3 == 0
    outer.is_undefined_length_sequence_item = k % 2 == 1
    one.RequestAttributesSequence = Sequence([outer, outer])
    one["RequestAttributesSequence"].is_undefined_length = k % 4 < 2
    one.IconImageSequence = Sequence([icon])
    one["IconImageSequence"].is_undefined_length = True
    one.ReferencedImageSequence = Sequence([])
    one["ReferencedImageSequence"].is_undefined_length = True
    block = one.private_block(0x0029, "SOMETHING", create=True)
    block.add_new(1, "UN", b"\0" * 1000)
    block.add_new(2, "OB", b"DICM" * 30000)
    block.add_new(3, "LO", "")


@pytest.mark.parametrize("change", [nested, both(nested, lambda k, one: implicit(k, one, None))])
def test_fields_inside_sequences_are_not_taken_for_the_slice(tmp_path, change):
    assert (read_ct(write_dicom(tmp_path / "s", make_ct(), change=change)).array == make_ct()).all()


def test_sequence_of_unknown_vr_is_parsed_as_implicit_vr(tmp_path):
    """PS3.5, section 6.2.2: UN of undefined length holds items in the implicit syntax."""
    item = struct.pack("<HHI", 0x0028, 0x0010, 2) + b"\x07\x00"
    sequence = struct.pack("<HH2sHI", 0x0027, 0x1001, b"UN", 0, 0xFFFFFFFF)
    sequence += struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF) + item + struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
    sequence += struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    folder = write_dicom(tmp_path / "s", make_ct())
    for path in folder.iterdir():
        content = path.read_bytes()
        at = content.index(struct.pack("<HH2s", 0x0028, 0x0002, b"US"))
        path.write_bytes(content[:at] + sequence + content[at:])
    assert (read_ct(folder).array == make_ct()).all()


def _header(path):
    [found] = slices_diffvp.read_header(slices_diffvp.DicomFile(path, "", path.name))
    return found


@pytest.mark.parametrize("name", ["totalsegmentator/dicom_series", "dcm_qa_ct_GE", "dcmqi_ct-3slice"])
def test_headers_of_real_files_agree_with_pydicom(check_data, name):
    for path in sorted((check_data / "ct" / name).iterdir()):
        ours, theirs = _header(path), pydicom.dcmread(path)
        for field in ("Rows", "Columns", "BitsStored", "HighBit", "PixelRepresentation"):
            assert ours.values[field] == theirs[field].value
        for field, count in (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2)):
            np.testing.assert_array_equal(ours.numbers(field, count), np.array(theirs[field].value, dtype=float))
        assert ours.syntax == theirs.file_meta.TransferSyntaxUID
        pixels = theirs.PixelData
        assert ours.length <= len(pixels)
        if ours.fragments:
            assert sum(length for _, length in ours.fragments) == ours.length
        else:
            assert path.read_bytes()[ours.start :].startswith(pixels[:100])


# Patient position and orientation.


def rotated(lps, row, column, position):
    """Return a change that stores the scan with other row, column and stack directions."""
    flips = (slice(None, None, int(row)), slice(None, None, int(column)))
    origin = [
        40.0 + (0 if row > 0 else (lps.shape[0] - 1) * SPACING[0]),
        -25.0 + (0 if column > 0 else (lps.shape[1] - 1) * SPACING[1]),
    ]

    def change(k, one):
        one.PatientPosition = position
        one.ImageOrientationPatient = [row, 0, 0, 0, column, 0]
        one.ImagePositionPatient = [*origin, 300.0 + k * Z]
        one.PixelData = np.ascontiguousarray(lps[:, :, k][flips].T + 1024).astype("<u2").tobytes()

    return change


@pytest.mark.parametrize(
    ("row", "column", "position"), [(1, 1, "HFS"), (-1, 1, "FFS"), (-1, -1, "HFP"), (1, -1, "FFP"), (-1, -1, "FFDR")]
)
def test_left_stays_left_in_any_patient_position(tmp_path, row, column, position):
    lps = make_ct()
    volume = read_ct(write_dicom(tmp_path / "series", lps, change=rotated(lps, row, column, position)))
    assert (volume.array == lps).all() and volume.spacing == SPACING
    world = volume.affine @ [0, 0, 0, 1]
    assert world[0] == (-40.0 if row > 0 else -40.0 - 25 * SPACING[0])


def test_coronal_slices_are_read(tmp_path):
    """Rows point left, columns inferior, and the slices are stacked posteriorly."""
    lps = make_ct()
    coronal = lps.transpose(0, 2, 1)[:, ::-1]

    def change(k, one):
        one.ImageOrientationPatient, one.PixelSpacing = [1, 0, 0, 0, 0, -1], [Z, SPACING[0]]
        one.ImagePositionPatient = [40.0, -25.0 + k * SPACING[1], 300.0 + 17 * Z]

    volume = read_ct(write_dicom(tmp_path / "series", coronal, change=change))
    assert (volume.array == lps).all() and volume.spacing == SPACING


def test_voxel_positions_agree_with_simpleitk(tmp_path):
    lps = make_ct()
    turn = np.radians(9)
    row, column = [np.cos(turn), np.sin(turn), 0], [-np.sin(turn), np.cos(turn), 0]
    orientation = [float(f"{value:.9f}") for value in (*row, *column)]
    folder = write_dicom(tmp_path / "series", lps, change=set_tag("ImageOrientationPatient", orientation))
    volume = read_ct(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    for x, y, z in np.random.default_rng(2).integers(0, 18, (20, 3)).tolist():
        world = np.diag([-1, -1, 1, 1]) @ volume.affine @ [x, y, z, 1]
        index = image.TransformPhysicalPointToIndex(world[:3].tolist())
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), world[:3], atol=1e-3)
        assert image[index] == volume.array[x, y, z]


# Several series.


def study(folder):
    """Write a PACS export: two CT series, a localizer with the UID of one, a report, an MR, notes, a DICOMDIR."""
    write_dicom(folder / "A" / "1", make_ct((26, 22, 12), 1), change=set_tag("SeriesInstanceUID", "1.2.9"))
    write_dicom(folder / "A" / "2", make_ct(), change=set_tag("SeriesInstanceUID", "1.2.10"))
    localizer = both(
        set_tag("SeriesInstanceUID", "1.2.10"), set_tag("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )
    write_dicom(folder / "A" / "2", make_ct((40, 50, 1)), change=localizer, prefix="scout")
    write_dicom(folder / "B", make_ct((26, 22, 30)), change=both(set_tag("Modality", "MR")))
    report = both(
        sop_class(BasicTextSRStorage), set_tag("Modality", "SR"), set_tag("PixelData", None), set_tag("Rows", None)
    )
    write_dicom(folder / "C", make_ct((26, 22, 1)), change=report)
    write_dicom(folder / "D", make_ct((26, 22, 1)), change=sop_class(MediaStorageDirectoryStorage))
    (folder / "D" / "001.dcm").rename(folder / "DICOMDIR")
    (folder / "A" / "README.txt").write_text("not a slice")
    (folder / "A" / "empty").write_bytes(b"")
    return folder


def test_several_series_are_listed_for_selection(tmp_path):
    folder = study(tmp_path / "study")
    with pytest.raises(CTReadError) as caught:
        read_ct(folder)
    assert str(caught.value) == (
        "study: series: none chosen; available: 1: 18 slices of 26 x 22, 2.5 mm apart; "
        "2: 12 slices of 26 x 22, 2.5 mm apart (expected one of them, by series=N or --series N)"
    )
    for series in (1, "1", "1.2.10"):
        assert (read_ct(folder, series=series).array == make_ct()).all()
    for series in (2, "2", "1.2.9"):
        assert (read_ct(folder, series=series).array == make_ct((26, 22, 12), 1)).all()
    for series, message in (
        (3, "series: 3; available: 1: .*2: "),
        ("0", "series: 0; "),
        (-1, "series: -1; "),
        ("1.2.11", "an unknown UID; "),
    ):
        with pytest.raises(CTReadError, match=message):
            read_ct(folder, series=series)


def test_single_series_is_read_with_or_without_its_number(tmp_path):
    folder = write_dicom(tmp_path / "study" / "nested" / "deeper", make_ct()).parents[1]
    for series in (None, 1, "1"):
        assert (read_ct(folder, series=series).array == make_ct()).all()
    with pytest.raises(CTReadError, match="series: 2; available: 1: "):
        read_ct(folder, series=2)


def test_series_of_equal_size_have_a_fixed_order(tmp_path):
    for number, uid in enumerate(("1.2.5", "1.2.3", "1.2.4")):
        write_dicom(tmp_path / "s" / uid[::-1], make_ct(seed=number), change=set_tag("SeriesInstanceUID", uid))
    for number, seed in ((1, 1), (2, 2), (3, 0)):
        assert (read_ct(tmp_path / "s", series=number).array == make_ct(seed=seed)).all()


def test_damaged_series_does_not_affect_another(tmp_path):
    write_dicom(tmp_path / "s" / "good", make_ct())
    write_dicom(tmp_path / "s" / "bad", make_ct((26, 22, 9)), change=set_tag("ImagePositionPatient", None))
    with pytest.raises(CTReadError, match="2: 9 slices of 26 x 22 without a position"):
        read_ct(tmp_path / "s")
    assert (read_ct(tmp_path / "s", series=1).array == make_ct()).all()
    with pytest.raises(CTGeometryError, match="ImagePositionPatient"):
        read_ct(tmp_path / "s", series=2)


# Archives.


def zipped(path, folder, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Folder for temporary files, which must be empty after the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def test_archive_gives_the_same_volume(tmp_path, temporary):
    folder = study(tmp_path / "study")
    path = zipped(tmp_path / "study.ZIP", folder)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/study/._1.dcm", b"\0" * 128 + b"DICM damaged")
    for series in (1, 2):
        ours, expected = read_ct(path, series=series), read_ct(folder, series=series)
        assert (ours.array == expected.array).all() and (ours.affine == expected.affine).all()
        assert ours.sha256 == expected.sha256 and ours.source == "study.ZIP"
    with pytest.raises(CTReadError, match=r"study.ZIP: series: none chosen; "):
        read_ct(path)


def test_archive_cannot_write_outside_its_folder(tmp_path, temporary):
    folder = write_dicom(tmp_path / "series", make_ct())
    before = set(tmp_path.rglob("*"))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, file in enumerate(sorted(folder.iterdir())):
            archive.write(file, ("../../", "/", "C:\\", "..\\")[number % 4] + f"escaped{number}.dcm")
    assert (read_ct(tmp_path / "a.zip").array == make_ct()).all()
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "a.zip"}


def test_error_names_the_member_of_the_archive(tmp_path, temporary):
    folder = write_dicom(tmp_path / "series", make_ct(), change=set_tag("RescaleSlope", None, 4))
    with pytest.raises(CTIntensityError, match="014.dcm: RescaleSlope: missing"):
        read_ct(zipped(tmp_path / "a.zip", folder))


def patched(path, signature, offset, value):
    """Overwrite a number in each archive record that begins with a signature."""
    content, at = bytearray(path.read_bytes()), 0
    while (at := content.find(signature, at)) >= 0:
        content[at + offset : at + offset + len(value)] = value
        at += 4
    path.write_bytes(content)


CENTRAL, LOCAL, END = b"PK\1\2", b"PK\3\4", b"PK\5\6"
ARCHIVES_REFUSED = {
    "encrypted": ([(CENTRAL, 8, b"\x01\0"), (LOCAL, 6, b"\x01\0")], "archive: encrypted"),
    "unpacked size": ([(CENTRAL, 24, b"\0\0\0\xf0")], "unpacked size: "),
    "method": ([(CENTRAL, 10, b"\x09\0"), (LOCAL, 8, b"\x09\0")], "compression method: 9"),
    "directory promises less": ([(CENTRAL, 24, b"\xff\0\0\0")], "damaged"),
    "checksum": ([(CENTRAL, 16, b"abcd"), (LOCAL, 14, b"abcd")], "content: a damaged archive"),
    "directory elsewhere": ([(END, 16, b"\1\0\0\0")], "content: a damaged archive"),
    "long directory": ([(END, 12, b"\0\0\0\x70")], "archive directory: 1879048192 bytes"),
    "name not UTF-8": ([(CENTRAL, 8, b"\0\x08"), (CENTRAL, 46, b"\xff\xff")], "content: a damaged archive"),
}


@pytest.mark.parametrize("name", ARCHIVES_REFUSED)
def test_damaged_archives_are_refused(tmp_path, temporary, name):
    patches, message = ARCHIVES_REFUSED[name]
    path = zipped(tmp_path / "a.zip", write_dicom(tmp_path / "series", make_ct()))
    for patch in patches:
        patched(path, *patch)
    with pytest.raises(CTReadError, match=message):
        read_ct(path)


def test_files_that_are_not_dicom_archives_are_refused(tmp_path, temporary):
    (tmp_path / "a.zip").write_bytes(b"no archive")
    with pytest.raises(CTReadError, match="^a.zip: content: a damaged archive"):
        read_ct(tmp_path / "a.zip")
    path = zipped(tmp_path / "b.zip", write_dicom(tmp_path / "series", make_ct()))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(CTReadError, match="damaged"):
        read_ct(path)
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    with pytest.raises(CTReadError, match="no DICOM file"):
        read_ct(tmp_path / "c.zip")


def test_archive_bombs_and_too_many_files_are_refused(tmp_path, temporary, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", b"\0" * 128 + b"DICM" + b"\0" * 10**7)
    with pytest.raises(CTReadError, match="unpacked size: 10000132 bytes"):
        read_ct(tmp_path / "a.zip")
    for module in (dicom_diffvp, inflate_diffvp):
        monkeypatch.setattr(module, "MAX_FILES", 10)
    folder = write_dicom(tmp_path / "series", make_ct())
    for path in (folder, zipped(tmp_path / "b.zip", folder)):
        with pytest.raises(CTReadError, match="number of files: .*at most 10"):
            read_ct(path)


@pytest.mark.parametrize("files", slow_except([100], [100, 300]))
def test_mutated_files_are_read_or_refused(tmp_path, files):
    """Damaged header bytes raise nothing other than `CTInputError`."""
    folder = write_dicom(tmp_path / "s", make_ct((16, 16, 9)), change=nested)
    path = folder / "004.dcm"
    whole, random = path.read_bytes(), np.random.default_rng(0)
    outcomes = set()
    for _ in range(files):
        content = bytearray(whole)
        for at in random.integers(128, len(content), random.integers(1, 6)):
            content[at] = random.choice([0, 0xFF, random.integers(256)])
        path.write_bytes(content if random.random() < 0.8 else content[: random.integers(len(content))])
        try:
            outcomes.add(type(read_ct(folder)))
        except CTInputError as error:
            outcomes.add(type(error))
    assert {CTVolume, CTReadError, CTGeometryError} <= outcomes


def test_pixel_data_with_sequence_vr_is_refused(tmp_path):
    folder = write_dicom(tmp_path / "s", make_ct())
    for path in folder.iterdir():
        content = path.read_bytes()
        start = content.rindex(b"\xe0\x7f\x10\0OW") + 4
        path.write_bytes(content[:start] + b"SQ\0\0\xff\xff\xff\xff" + content[start + 8 :])
    with pytest.raises(CTReadError, match="content: damaged"):
        read_ct(folder)


def test_mutated_archives_are_read_or_refused(tmp_path, temporary):
    path = zipped(tmp_path / "a.zip", write_dicom(tmp_path / "s", make_ct((16, 16, 9))))
    whole, random = path.read_bytes(), np.random.default_rng(1)
    start = whole.index(CENTRAL)
    for number in range(200):
        content = bytearray(whole)
        for at in random.integers(start if number % 2 else 0, len(content), random.integers(1, 4)):
            content[at] = random.integers(256)
        path.write_bytes(content)
        try:
            read_ct(path)
        except CTInputError:
            pass


# Real series.


def test_real_jpeg2000_series_without_sop_class_agrees_with_simpleitk(check_data):
    """SOPClassUID, SeriesInstanceUID and others are empty. SimpleITK gives the same voxels at the same positions."""
    folder = check_data / "ct" / "totalsegmentator" / "dicom_series"
    volume = read_ct(folder)
    assert volume.array.shape == (512, 512, 20) and volume.spacing == pytest.approx((0.9765625, 0.9765625, 2.0))
    assert volume.array.dtype == np.int16 and volume.layout.startswith("DICOM series, 20 slices")
    headers = [pydicom.dcmread(path, stop_before_pixels=True, force=True) for path in folder.iterdir()]
    lowest = min(headers, key=lambda one: one.ImagePositionPatient[2])
    origin = np.diag([-1, -1, 1]) @ np.array(lowest.ImagePositionPatient, dtype=float)
    np.testing.assert_allclose(volume.affine[:3, 3], origin)
    for number, path in enumerate(sorted(folder.iterdir())[:3]):
        image = sitk.ReadImage(path)
        for x, y in np.random.default_rng(number).integers(0, 512, (20, 2)).tolist():
            world = [*image.TransformIndexToPhysicalPoint((x, y, 0)), 1]
            i, j, k = (np.linalg.inv(volume.affine) @ np.diag([-1, -1, 1, 1]) @ world)[:3].round(3)
            assert (i, j) == (x, y) and image[x, y, 0] == volume.array[x, y, int(k)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dcm_qa_ct_GE", "gantry tilt: 18.5 degrees"),
        ("dcmqi_ct-3slice", r"number of slices: 3 \(expected at least 8"),
    ],
)
def test_real_series_with_tilt_or_few_slices_are_refused(check_data, name, message):
    with pytest.raises(CTGeometryError, match=f"^{name}: {message}"):
        read_ct(check_data / "ct" / name)
