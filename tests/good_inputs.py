# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Valid scans, as written by scanners, archives and other software, that some readers refuse or read wrongly.

Each entry of `GOOD` is a name and a writer. The writer takes an empty folder, and returns the path to read and the
expected Hounsfield units: [x, y, z] in LPS order.
"""

import base64
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.fileset import FileSet
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    LegacyConvertedEnhancedCTImageStorage,
    RLELossless,
)

from .ct_samples import SPACING, make_ct, write_dicom, write_enhanced

COMPRESSED = json.loads(Path(__file__).with_name("compressed_slices.json").read_text())
HTJ2K, JPEG_LS, JPEG_2000_PART_2 = "1.2.840.10008.1.2.4.201", "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.92"

Writer = Callable[[Path], tuple[Path, np.ndarray]]


def series(change=None, lps: np.ndarray | None = None) -> Writer:
    """Return a writer of a series; `change(k, dataset)` alters slice k before it is written."""

    def write(folder: Path) -> tuple[Path, np.ndarray]:
        hu = make_ct() if lps is None else lps
        return write_dicom(folder / "series", hu, change=change), hu

    return write


def tags(**values):
    def change(k: int, one) -> None:
        for name, value in values.items():
            setattr(one, name, value(k) if callable(value) else value)

    return change


def rewritten(change: Callable[[Path], None], only: slice = slice(None)) -> Writer:
    """Return a writer of a series; `change(path)` alters the files in `only` after they are written."""

    def write(folder: Path) -> tuple[Path, np.ndarray]:
        for path in sorted(write_dicom(folder / "series", make_ct()).iterdir())[only]:
            change(path)
        return folder / "series", make_ct()

    return write


def bare(path: Path) -> None:
    """Reduce a file to its data set, without preamble, prefix and meta header."""
    one = pydicom.dcmread(path)
    data = pydicom.Dataset({element.tag: element for element in one})
    data.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)


def big_endian(path: Path) -> None:
    one = pydicom.dcmread(path)
    one["PixelData"].value = np.frombuffer(one.PixelData, "<u2").astype(">u2").tobytes()
    one.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    pydicom.dcmwrite(path, one, implicit_vr=False, little_endian=False, force_encoding=True)


def implicit_that_says_explicit(path: Path) -> None:
    one = pydicom.dcmread(path)
    pydicom.dcmwrite(path, one, implicit_vr=True, little_endian=True, force_encoding=True)


def explicit_that_says_implicit(path: Path) -> None:
    one = pydicom.dcmread(path)
    one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(path, one, implicit_vr=False, little_endian=True, force_encoding=True)


def compressed(kind: str, syntax: str) -> Writer:
    """Return a writer of three repeated slices, compressed by imagecodecs because few libraries write these."""
    lps = np.tile(make_ct((26, 22, 9))[:, :, 3:6], (1, 1, 3))

    def change(k: int, one) -> None:
        one.PixelData = encapsulate([base64.b64decode(COMPRESSED[kind][k % 3])])
        one["PixelData"].VR, one["PixelData"].is_undefined_length = "OB", True
        one.file_meta.TransferSyntaxUID = syntax

    return series(change, lps)


def excess(count: int):
    def change(k: int, one) -> None:
        one.PixelData = one.PixelData + bytes(count)

    return change


def padded(value: int, stored: int, limit: int | None = None, signed: bool = False):
    """Return a change that fills the corners, which are air, with declared padding."""

    def change(k: int, one) -> None:
        kind = "<i2" if signed else "<u2"
        pixels = np.frombuffer(one.PixelData, "<u2").reshape(one.Rows, one.Columns).astype(kind)
        pixels[:3, :3] = pixels[-3:, -3:] = stored
        one.PixelRepresentation, one.PixelData = int(signed), pixels.tobytes()
        one.add_new("PixelPaddingValue", "SS" if signed else "US", value)
        if limit is not None:
            one.add_new("PixelPaddingRangeLimit", "SS" if signed else "US", limit)

    return change


def twelve_bits(k: int, one) -> None:
    """Store 12 bits in the low bits of two bytes, with an overlay in the high bits."""
    pixels = np.frombuffer(one.PixelData, "<u2") | np.uint16(0x5000)
    one.BitsStored, one.HighBit, one.PixelData = 12, 11, pixels.tobytes()


def varying_rescale(k: int, one) -> None:
    pixels = np.frombuffer(one.PixelData, "<u2") + np.uint16(k)
    one.RescaleIntercept, one.PixelData = -1024 - k, pixels.tobytes()


def rounded_positions(step: float):
    """Return a change to evenly spaced slices whose positions are rounded to 0.1 mm."""
    return tags(ImagePositionPatient=lambda k: [40, -25, f"{300 + step * k:.1f}"], SliceThickness=step)


def infant(folder: Path) -> tuple[Path, np.ndarray]:
    """Write a newborn in a field of view of 500 mm, which is mostly air."""
    hu = np.full((128, 128, 16), -1000, np.int16)
    hu[52:78, 53:75] = make_ct((26, 22, 16))
    return write_dicom(folder / "series", hu), hu


def feet_first(folder: Path) -> tuple[Path, np.ndarray]:
    """Write a feet-first, prone scan, whose columns point anteriorly."""
    hu = make_ct()

    def change(k: int, one) -> None:
        one.PatientPosition, one.ImageOrientationPatient = "FFP", [1, 0, 0, 0, -1, 0]
        one.ImagePositionPatient = [40, -25 + 21 * SPACING[1], 300 + SPACING[2] * k]
        one.PixelData = np.ascontiguousarray(hu[:, ::-1, k].T.astype(int) + 1024).astype("<u2").tobytes()

    return write_dicom(folder / "series", hu, change=change), hu


def coronal(folder: Path) -> tuple[Path, np.ndarray]:
    hu = make_ct()

    def change(k: int, one) -> None:
        one.ImageOrientationPatient, one.PixelSpacing = [1, 0, 0, 0, 0, -1], [SPACING[2], SPACING[0]]
        one.ImagePositionPatient = [40, -25 + k * SPACING[1], 300 + 17 * SPACING[2]]

    return write_dicom(folder / "series", hu.transpose(0, 2, 1)[:, ::-1], change=change), hu


def copies(folder: Path) -> tuple[Path, np.ndarray]:
    """Write a series with copies of some slices."""
    write_dicom(folder / "series", make_ct())
    for path in sorted((folder / "series").iterdir())[3:7]:
        shutil.copy(path, path.with_stem(f"{path.stem} (2)"))
    return folder / "series", make_ct()


def disc(folder: Path) -> tuple[Path, np.ndarray]:
    """Write a disc with other files: a viewer, notes, files of the operating system, and an empty file."""
    write_dicom(folder / "disc" / "DICOM", make_ct())
    (folder / "disc" / "VIEWER").mkdir()
    (folder / "disc" / "VIEWER" / "viewer.exe").write_bytes(b"MZ" + bytes(2000))
    (folder / "disc" / "AUTORUN.INF").write_text("[autorun]\nopen=viewer.exe\n")
    (folder / "disc" / "DICOM" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (folder / "disc" / "DICOM" / "._001.dcm").write_bytes(b"\0\5\x16\7" + bytes(500))
    (folder / "disc" / "README.txt").write_text("Research use.")
    (folder / "disc" / "empty").write_bytes(b"")
    return folder / "disc", make_ct()


def beside(kind: list[str], shape=(26, 22, 18)) -> Writer:
    """Return a writer of a study with a second series of another image type."""

    def write(folder: Path) -> tuple[Path, np.ndarray]:
        write_dicom(folder / "study" / "CT", make_ct())
        write_dicom(folder / "study" / "other", make_ct(shape, 1), change=tags(ImageType=kind))
        return folder / "study", make_ct()

    return write


def enhanced(**options) -> Writer:
    def write(folder: Path) -> tuple[Path, np.ndarray]:
        hu = make_ct() // 2 * 2  # even values, which all rescales can store
        return write_enhanced(folder / "scan.dcm", hu, **options), hu

    return write


def concatenation(folder: Path) -> tuple[Path, np.ndarray]:
    """Write the frames of one series to three files."""
    hu = make_ct()
    for number, start in enumerate(range(0, 18, 6)):
        write_enhanced(folder / "series" / f"{number}.dcm", hu, range(start, start + 6))
    return folder / "series", hu


def dicomdir(folder: Path) -> tuple[Path, np.ndarray]:
    write_dicom(folder / "files", make_ct(), change=tags(StudyID="1", StudyDate="20200101", StudyTime="120000",
                PatientName="Secret^Name", SeriesNumber=1, StudyInstanceUID="1.2.3.9"))  # fmt: skip
    disc = FileSet()
    for path in sorted((folder / "files").iterdir()):
        disc.add(path)
    disc.write(folder / "disc")
    shutil.rmtree(folder / "files")
    return folder / "disc" / "DICOMDIR", make_ct()


def zipped(folder: Path) -> tuple[Path, np.ndarray]:
    with zipfile.ZipFile(folder / "scan.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(write_dicom(folder / "series", make_ct()).iterdir()):
            archive.write(path, f"series/{path.name}")
    shutil.rmtree(folder / "series")
    return folder / "scan.zip", make_ct()


GOOD: list[tuple[str, Writer]] = [
    ("DICOM: uncompressed", series()),
    ("DICOM: a zip", zipped),
    ("DICOM: a DICOMDIR", dicomdir),
    ("DICOM: a disc with viewer and notes", disc),
    ("DICOM: localizer in the same folder", beside(["ORIGINAL", "PRIMARY", "LOCALIZER"], (40, 50, 1))),
    ("DICOM: MIP in the same folder", beside(["DERIVED", "SECONDARY", "AXIAL", "MIP"])),
    ("DICOM: some slices twice", copies),
    ("DICOM: implicit VR", series(lambda k, one: setattr(
        one.file_meta, "TransferSyntaxUID", ImplicitVRLittleEndian))),
    ("DICOM: big endian", rewritten(big_endian)),
    ("DICOM: deflated", series(lambda k, one: setattr(
        one.file_meta, "TransferSyntaxUID", DeflatedExplicitVRLittleEndian))),
    ("DICOM: without preamble and meta header", rewritten(bare)),
    # Only one slice, because GDCM takes seconds per slice.
    ("DICOM: implicit VR under an explicit syntax", rewritten(implicit_that_says_explicit, slice(4, 5))),
    ("DICOM: explicit VR under the implicit syntax", rewritten(explicit_that_says_implicit)),
    ("DICOM: RLE", series(lambda k, one: one.compress(RLELossless))),
    ("DICOM: JPEG-LS", compressed("JPEG-LS", JPEG_LS)),
    ("DICOM: JPEG 2000, part 2", compressed("JPEG 2000", JPEG_2000_PART_2)),
    ("DICOM: High-Throughput JPEG 2000", compressed("HTJ2K", HTJ2K)),
    ("DICOM: two bytes behind the pixels", series(excess(2))),
    ("DICOM: 512 bytes behind the pixels", series(excess(512))),
    ("DICOM: padding 63536, unsigned", series(padded(63536, 63536))),
    ("DICOM: padding -32768, signed", series(padded(-32768, -32768, signed=True))),
    ("DICOM: padding 32767, signed", series(padded(32767, 32767, signed=True))),
    ("DICOM: a range of padding", series(padded(60000, 62000, 63536))),
    ("DICOM: 12 bits below an overlay", series(twelve_bits)),
    ("DICOM: a rescale for each slice", series(varying_rescale)),
    ("DICOM: 0.2 mm slices", series(tags(
        ImagePositionPatient=lambda k: [40, -25, f"{-899.8 + 0.2 * k:.10g}"], PixelSpacing=[0.4, 0.4]))),
    ("DICOM: 10 mm slices", series(tags(ImagePositionPatient=lambda k: [40, -25, f"{-741.7 + 10 * k:.10g}"]))),
    ("DICOM: 180 mm on a matrix of 1024", series(tags(PixelSpacing=[180 / 1024, 180 / 1024]))),
    ("DICOM: 0.625 mm at positions of 0.1 mm", series(rounded_positions(0.625))),
    ("DICOM: 0.75 mm at positions of 0.1 mm", series(rounded_positions(0.75))),
    ("DICOM: cosines rounded in one slice", series(tags(
        ImageOrientationPatient=lambda k: [1, "0.0002", 0, "-0.0002", 1, 0] if k == 7 else [1, 0, 0, 0, 1, 0]))),
    ("DICOM: pixel spacing rounded in one slice", series(tags(
        PixelSpacing=lambda k: ["0.703", "0.703"] if k == 5 else ["0.703125", "0.703125"]))),
    ("DICOM: an infant in a large field", infant),
    ("DICOM: feet first, prone", feet_first),
    ("DICOM: coronal slices", coronal),
    ("DICOM: acquisitions that abut", series(tags(AcquisitionNumber=lambda k: 1 + k // 9))),
    ("DICOM: without instance and acquisition numbers", series(tags(InstanceNumber=None))),
    ("DICOM: no class and no series", series(tags(SOPClassUID="", SeriesInstanceUID=""))),
    ("DICOM: enhanced CT", enhanced()),
    ("DICOM: enhanced CT, a rescale for each frame", enhanced(
        rescales=[(1 + k % 2, -1024 - 2 * k) for k in range(18)])),
    ("DICOM: enhanced CT, frames out of order", enhanced(frames=np.random.default_rng(0).permutation(18).tolist())),
    ("DICOM: enhanced CT over three files", concatenation),
    ("DICOM: legacy converted enhanced CT", enhanced(kind=LegacyConvertedEnhancedCTImageStorage)),
]  # fmt: skip


def check(volume, hu: np.ndarray) -> None:
    """Check that every voxel of `volume`, a `CTVolume`, equals the written value.

    Raises:
        AssertionError
    """
    found = volume.array.astype(float) * volume.slope + volume.intercept
    assert found.shape == hu.shape
    np.testing.assert_allclose(found, hu, atol=1e-3)
