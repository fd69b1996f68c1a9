# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""DICOM with lost or mixed slices, or with false headers: a part of the corpus in `bad_inputs.py`."""

import io
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid

from diffvp.volume_diffvp import CTGeometryError, CTIntensityError, CTReadError

from .ct_samples import make_ct, write_dicom, write_enhanced
from .good_inputs import dicomdir

READ, GRID, VALUES = CTReadError, CTGeometryError, CTIntensityError


def lost(become: Callable[[bytes], bytes | None], only=(1, 2, 3), name: str = "IM{:04d}.dcm", packed: bool = False):
    """Return a writer of a series whose highest slices are changed by `become`; `None` removes a file."""

    def make(folder: Path) -> Path:
        write_dicom(folder / "series", make_ct())
        for path in sorted((folder / "series").iterdir()):
            number = int(path.stem)
            content = path.read_bytes()
            path.unlink()
            content = become(content) if number in only else content
            if content is not None:
                path.with_name(name.format(number)).write_bytes(content)
        if packed:
            shutil.make_archive(str(folder / "scan"), "zip", folder / "series")
            shutil.rmtree(folder / "series")
        return folder / ("scan.zip" if packed else "series")

    return make


def promised(**fields):
    """Return a writer of a series without its highest slices, whose headers state the original number."""

    def change(k: int, one) -> None:
        for name, value in fields.items():
            setattr(one, name, value)

    def make(folder: Path) -> Path:
        for number in (1, 2, 3):
            (write_dicom(folder / "series", make_ct(), change=change) / f"{number:03d}.dcm").unlink()
        return folder / "series"

    return make


def two_stacks(shift: float = 0.0, first: dict | None = None, second: dict | None = None):
    """Return a writer of two stacks under one SeriesInstanceUID."""

    def make(folder: Path) -> Path:
        uid = generate_uid()
        for number, fields in enumerate((first or {}, second or {})):

            def change(k: int, one, number=number, fields=fields) -> None:
                one.SeriesInstanceUID = one.StudyInstanceUID = one.FrameOfReferenceUID = uid
                one.ImagePositionPatient = [40, -25, 300 + 2.5 * k + shift * number]
                for name, value in fields.items():
                    setattr(one, name, value)

            write_dicom(folder / "series", make_ct(seed=number), change=change, prefix="ab"[number])
        return folder / "series"

    return make


def kind(*values: str):
    return lambda folder: write_dicom(
        folder / "series", make_ct(), change=lambda k, one: setattr(one, "ImageType", list(values))
    )


def changed(change: Callable):
    return lambda folder: write_dicom(folder / "series", make_ct(), change=change)


def frames(change: Callable | None = None, which=None):
    return lambda folder: write_enhanced(folder / "scan.dcm", make_ct(), which, change=change)


def lost_of_dicomdir(folder: Path) -> Path:
    path, _ = dicomdir(folder)
    sorted(file for file in path.parent.rglob("*") if file.is_file())[-1].unlink()
    return path


def cut_dicomdir(folder: Path) -> Path:
    path, _ = dicomdir(folder)
    path.write_bytes(path.read_bytes()[:-900])
    return path


def spliced(element: bytes, syntax: str = ExplicitVRLittleEndian, rest: Callable[[bytes], bytes] = bytes):
    """Return a writer that inserts bytes before the field Rows of one slice; `rest` alters its data set."""

    def make(folder: Path) -> Path:
        path = write_dicom(folder / "series", make_ct()) / "010.dcm"
        content, head = path.read_bytes(), io.BytesIO()
        data, at = 144 + struct.unpack_from("<I", content, 140)[0], content.index(b"\x28\0\x10\0US")
        meta = pydicom.dcmread(path).file_meta
        meta.TransferSyntaxUID = syntax
        pydicom.filewriter.write_file_meta_info(head, meta)
        path.write_bytes(content[:132] + head.getvalue() + rest(content[data:at] + element + content[at:]))
        return folder / "series"

    return make


def deflated(content: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


SEQUENCE = struct.pack("<HH2sHI", 0x27, 0x1001, b"SQ", 0, 0xFFFFFFFF)
ITEM, END_OF_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF), struct.pack("<HHI", 0xFFFE, 0xE00D, 0)
END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)

PADDING = struct.pack("<HH2sHI", 0xFFFC, 0xFFFC, b"OB", 0, 2**27)  # after the pixel data (PS3.10, 7.2)

# name: (writer, error, field)
LOST = {
    "empty files at the top": (lost(lambda content: b""), READ, "content"),
    "empty files at the bottom": (lost(lambda content: b"", (16, 17, 18)), READ, "content"),
    "empty files without a suffix": (lost(lambda content: b"", name="IM_{:04d}"), READ, "content"),
    "empty files in a zip": (lost(lambda content: b"", packed=True), READ, "content"),
    "zeros at the top": (lost(lambda content: bytes(len(content))), READ, "content"),
    "a web page in place of the top slice": (
        lost(lambda content: b"<html>Session expired</html>", [1]), READ, "content",
    ),
    "a text in place of the top slice, in a zip": (lost(lambda content: b"404", [1], packed=True), READ, "content"),
    "top slice cut within its preamble": (lost(lambda content: content[:99], [1]), READ, "content"),
    "top slice cut within its header": (lost(lambda content: content[:500], [1]), READ, ""),
    "top slice cut within its pixels": (lost(lambda content: content[:-9], [1]), READ, "pixel data"),
    "top slice zeros from the middle on": (lost(lambda content: content[:300] + bytes(1000), [1]), READ, ""),
    "fewer slices than ImagesInAcquisition": (promised(ImagesInAcquisition=18), READ, "ImagesInAcquisition"),
    "fewer slices than NumberOfSeriesRelatedInstances": (
        promised(NumberOfSeriesRelatedInstances=18), READ, "NumberOfSeriesRelatedInstances",
    ),
    "fewer files than the DICOMDIR lists": (lost_of_dicomdir, READ, "content"),
    "DICOMDIR cut off": (cut_dicomdir, READ, "content"),
    "two acquisitions at the same places": (
        two_stacks(0, {"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}), READ, "series",
    ),
    "two phases at the same places": (
        two_stacks(0, {"TemporalPositionIdentifier": 1}, {"TemporalPositionIdentifier": 2}), READ, "series",
    ),
    "two kernels at the same places": (
        two_stacks(0, {"ConvolutionKernel": "B31f"}, {"ConvolutionKernel": "B70f"}), READ, "series",
    ),
    "two acquisitions that interleave": (
        two_stacks(1.25, {"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}), READ, "series",
    ),
    "two kernels that interleave": (
        two_stacks(1.25, {"ConvolutionKernel": "B31f"}, {"ConvolutionKernel": "B70f"}), READ, "series",
    ),
    "two stacks that nothing tells apart": (two_stacks(), GRID, "slice positions"),
    "MIP alone": (kind("DERIVED", "SECONDARY", "AXIAL", "MIP"), READ, "ImageType"),
    "MinIP alone": (kind("DERIVED", "PRIMARY", "AXIAL", "MIN_IP"), READ, "ImageType"),
    "localizer alone": (kind("ORIGINAL", "PRIMARY", "LOCALIZER"), READ, "ImageType"),
    "padding of three bytes": (changed(lambda k, one: one.add_new(0x00280120, "OB", b"123\0")), VALUES, "Padding"),
    "a row behind the pixels": (
        changed(lambda k, one: setattr(one, "Rows", one.Rows - 1)), READ, "pixel data",
    ),
    "uncompressed pixels under JPEG 2000": (
        spliced(b"", JPEG2000Lossless), READ, "pixel data",
    ),
    "enhanced: half of the pixels": (
        frames(lambda one: setattr(one, "PixelData", one.PixelData[: len(one.PixelData) // 2])), READ, "pixel data",
    ),
    "enhanced: a frame without a place": (
        frames(lambda one: delattr(one.PerFrameFunctionalGroupsSequence[4], "PlanePositionSequence")), GRID,
        "ImagePositionPatient",
    ),
    "enhanced: a frame is missing": (frames(which=[*range(8), *range(9, 18)]), GRID, "slice spacing"),
    "enhanced: fewer groups than frames": (
        frames(lambda one: one.PerFrameFunctionalGroupsSequence.pop()), READ, "NumberOfFrames",
    ),
    "enhanced: no rescale": (
        frames(lambda one: delattr(one.SharedFunctionalGroupsSequence[0], "PixelValueTransformationSequence")),
        VALUES, "Rescale",
    ),
    "enhanced: two billion frames": (
        frames(lambda one: setattr(one, "NumberOfFrames", 2**31)), READ, "NumberOfFrames",
    ),
    "deflated to a thousandth": (
        spliced(b"", DeflatedExplicitVRLittleEndian, lambda data: deflated(data + PADDING + bytes(2**27))), READ,
        "deflated size",
    ),
    "deflated and cut off": (
        spliced(b"", DeflatedExplicitVRLittleEndian, lambda data: deflated(data)[:-20]), READ, "deflated size",
    ),
    "a header of 120,000 items": (spliced(SEQUENCE + (ITEM + END_OF_ITEM) * 120_000 + END), READ, "content"),
    "ten thousand sequences in each other": (
        spliced((SEQUENCE + ITEM) * 10_000 + (END_OF_ITEM + END) * 10_000), READ, "content",
    ),
    "a sequence without an end": (spliced(SEQUENCE + ITEM), READ, "content"),
}  # fmt: skip
