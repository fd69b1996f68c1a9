# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A folder or a .zip of DICOM slices in, a validated CT out: [`read_dicom`].

Headers and uncompressed pixels are read here, and GDCM (through SimpleITK) decodes the compressed ones. It is not
asked for the rest because it fills what is missing without a word: no slope becomes 1, no pixel spacing 1 mm, and
where Rows promises more pixels than the file holds, the others are whatever the memory held.

Messages carry file names, numbers and DICOM's own codes; never UIDs, names or descriptions.
"""

import contextlib
import math
import mmap
import os
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from .decoding_diffvp import MAX_COMPRESSION
from .volume_diffvp import (
    LPS_TO_RAS,
    MAX_TILT_COSINE,
    MIN_LENGTH,
    MIN_SPACING,
    CTGeometryError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    check_shape,
    make_volume,
)

# Of the slice spacing: how far a slice may lie from its place in an even stack. Headers round positions to 0.1 mm.
MAX_SLICE_OFFSET = 0.1
MAX_FILES = 20_000  # a study of several series; a folder or archive with more is not one, and would take minutes
MAX_ARCHIVE_BYTES = 4 * 2**30  # unpacked: 8,000 slices of 512 x 512, of which the temporary folder has to hold a copy
MAX_DIRECTORY_BYTES = 512 * MAX_FILES  # of an archive: an entry has 46 bytes and a path
MAX_VALUE_LENGTH = 1024  # bytes of a header field that is used here: each holds a few numbers or codes
MAX_THREADS = 8  # that decode slices: beyond, the memory's speed is the limit

UNDEFINED_LENGTH = 0xFFFFFFFF
LONG_VRS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
TRANSFER_SYNTAX, MEDIA_STORAGE, PIXEL_DATA = 0x00020010, 0x00020002, 0x7FE00010
TEXTS = {
    0x00080008: "ImageType",
    0x00080016: "SOPClassUID",
    0x00080060: "Modality",
    0x0020000E: "SeriesInstanceUID",
    0x00200032: "ImagePositionPatient",
    0x00200037: "ImageOrientationPatient",
    0x00280004: "PhotometricInterpretation",
    0x00280008: "NumberOfFrames",
    0x00280030: "PixelSpacing",
    0x00280301: "BurnedInAnnotation",
    0x00281052: "RescaleIntercept",
    0x00281053: "RescaleSlope",
    0x00281054: "RescaleType",
}
INTEGERS = {
    0x00280002: "SamplesPerPixel",
    0x00280010: "Rows",
    0x00280011: "Columns",
    0x00280100: "BitsAllocated",
    0x00280101: "BitsStored",
    0x00280102: "HighBit",
    0x00280103: "PixelRepresentation",
}
MODALITY_LUT = 0x00283000

# Transfer syntaxes: whether elements state their type, and the byte order. All that encapsulate compressed pixels are
# as the first; the rest (deflated, private) is not read.
NATIVE = {
    "1.2.840.10008.1.2.1": (True, "<"),
    "1.2.840.10008.1.2": (False, "<"),
    "1.2.840.10008.1.2.2": (True, ">"),
}
RLE = "1.2.840.10008.1.2.5"
# Those that GDCM decodes: JPEG (8 and 12 bits, lossless twice), JPEG-LS, JPEG 2000, RLE.
DECODED = {f"1.2.840.10008.1.2.{n}" for n in ("4.50", "4.51", "4.57", "4.70", "4.80", "4.81", "4.90", "4.91")} | {RLE}

ENCAPSULATED = ("1.2.840.10008.1.2.4.", RLE)

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
DICOMDIR = "1.2.840.10008.1.3.10"
OTHER_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT (multi-frame)",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT (multi-frame)",
    "1.2.840.10008.5.1.4.1.1.7": "Secondary Capture",
}
OTHER_IMAGES = ("LOCALIZER", "SCREEN SAVE")  # values of ImageType of pictures that are no slice
RESCALE_TYPES = ("HU", "", "US")  # US is "unspecified"; whether these are Hounsfield units, the voxels tell


@dataclass(frozen=True, eq=False)
class _Slice:
    """The header of one DICOM file, and where its pixels are.

    Attributes:
        name: the file's name for messages.
        values: the fields in `TEXTS` and `INTEGERS` that it has.
        syntax: transfer syntax UID.
        start, length: of the pixel data in bytes; of the compressed pixels, `length` is what they take together.
            A `length` of -1 where the file ends before they do, or has none.
    """

    path: Path
    name: str
    values: dict[str, str | int]
    syntax: str
    start: int
    length: int

    @property
    def other(self) -> tuple[str, str, str] | None:
        """Field, value and expectation of what makes this file something else than a slice; `None` for slices."""
        modality, kind = self.text("Modality"), self.text("SOPClassUID")
        if modality not in ("CT", ""):
            return "Modality", modality if modality.isalpha() and len(modality) <= 16 else "another", "CT"
        if kind not in (CT_IMAGE, ""):
            found = next((name for uid, name in OTHER_CLASSES.items() if f"{kind}.".startswith(f"{uid}.")), "another")
            return "SOPClassUID", found, "CT Image Storage, with one file per slice"
        for word in OTHER_IMAGES:
            if word in self.text("ImageType").split("\\"):
                return "ImageType", word, "a slice"
        return None

    @property
    def dtype(self) -> np.dtype:
        """Of the stored pixels, in the machine's byte order."""
        return np.dtype(f"{'i' if self.values['PixelRepresentation'] else 'u'}{self.values['BitsAllocated'] // 8}")

    def text(self, name: str) -> str:
        return self.values.get(name, "")

    def numbers(self, name: str, count: int) -> np.ndarray:
        """The numbers of a geometric field.

        Raises:
            CTGeometryError
        """
        try:
            numbers = np.array([float(number) for number in self.text(name).split("\\")])
        except ValueError as error:
            raise CTGeometryError(self.name, name, "missing or not numbers", f"{count} numbers") from error
        if numbers.size != count or not np.isfinite(numbers).all():
            raise CTGeometryError(self.name, name, f"{numbers.size} numbers", f"{count} finite numbers")
        return numbers


def read_dicom(path: Path, series: int | str | None = None, allow_non_hu: bool = False) -> CTVolume:
    """One DICOM series of a folder or a .zip of one, with their subfolders.

    Slices are sorted by position: file names and instance numbers need not follow it. Left and right come from
    position and orientation in patient coordinates, however the patient lay. Files that are no DICOM, localizers,
    reports and other modalities are passed over.

    Args:
        path: the folder or archive. An archive is unpacked to a temporary folder.
        series: which one of several: its number in the list that the refusal gives (as `int` or `str`), or its
            SeriesInstanceUID.
        allow_non_hu: accept voxels that are not Hounsfield units, and slices without a rescale to them.

    Raises:
        CTReadError: no series or several, a damaged file, pixels that cannot be decoded.
        CTGeometryError: slices that are no even stack of one grid at right angles.
        CTIntensityError: no rescale to Hounsfield units, or voxels that are none.
    """
    source = path.name or str(path)
    with _unpacked(path) as files:
        slices = _choose([one for file, name in files if (one := _read_header(file, name))], series, source)
        if len(slices) < MIN_LENGTH:
            raise CTGeometryError(source, "number of slices", len(slices), f"at least {MIN_LENGTH}")
        for one in slices:
            _check_slice(one)
        rescales = [_rescale(one, allow_non_hu) for one in slices]
        order, affine = _stack(slices, source)
        array, slope, intercept = _voxels([slices[k] for k in order], [rescales[k] for k in order], source)
    distinct = set(rescales)
    rescale = "rescale slope {:g} intercept {:g}".format(*rescales[0]) if len(distinct) == 1 else "varying rescale"
    return make_volume(
        array, LPS_TO_RAS @ affine, source, f"DICOM series, {len(slices)} slices, {rescale}",
        slope=slope, intercept=intercept, allow_non_hu=allow_non_hu,
    )  # fmt: skip


@contextlib.contextmanager
def _unpacked(path: Path) -> Iterator[list[tuple[Path, str]]]:
    """The files of a folder or an archive, in a fixed order, and what to call each in messages."""
    if path.is_dir():
        files = []
        for folder, folders, names in os.walk(path):
            folders.sort()
            files += [(Path(folder, name), name) for name in sorted(names)]
            if len(files) > MAX_FILES:
                raise CTReadError(path.name, "number of files", "too large", f"at most {MAX_FILES}: one study")
        yield files
        return
    with tempfile.TemporaryDirectory(prefix="diffvp-") as folder:
        try:
            files = _extract(path, Path(folder))
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
            raise CTReadError(path.name, "content", "a damaged archive", "a zip that passes its checksums") from error
        yield files


def _extract(path: Path, folder: Path) -> list[tuple[Path, str]]:
    """The DICOM files of an archive, written under names of our own: theirs may lead out of the folder.

    What the archive's directory promises is checked first. `zipfile` reads no more of a member than it promises, and
    checks its checksum, so that a directory that lies is an error and not a full disk.
    """
    _check_directory_size(path)
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.filename.endswith("/")]
        total = sum(member.file_size for member in members)
        limit = min(MAX_ARCHIVE_BYTES, MAX_COMPRESSION * size)
        if not all(0 <= member.header_offset < size for member in members):
            raise zipfile.BadZipFile("a member outside the archive")
        if len(members) > MAX_FILES:
            raise CTReadError(path.name, "number of files", len(members), f"at most {MAX_FILES}: one study")
        if total > limit:
            raise CTReadError(path.name, "unpacked size", f"{total} bytes", f"at most {limit} of this archive")
        if any(member.flag_bits & 0x41 for member in members):  # bit 0: encrypted, bit 6: strongly
            raise CTReadError(path.name, "archive", "encrypted", "one without a password")
        methods = {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if methods:
            raise CTReadError(path.name, "compression method", max(methods), "0 or 8: stored or deflated")
        files = []
        for number, member in enumerate(sorted(members, key=lambda member: member.filename)):
            if member.filename.startswith("__MACOSX/"):
                continue
            with archive.open(member) as stream:
                head = stream.read(132)
                if head[128:] != b"DICM":
                    continue
                target = folder / f"{number:06d}.dcm"
                with target.open("wb") as file:
                    file.write(head)
                    while chunk := stream.read(2**20):
                        file.write(chunk)
            files.append((target, Path(member.filename).name))
    return files


def _check_directory_size(path: Path) -> None:
    """Refuse an archive whose directory is longer than that of any study, before `zipfile` reads it to memory."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 100))
        tail = file.read()
    end, end64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    sizes = [struct.unpack_from("<I", tail, end + 12)[0]] if 0 <= end <= len(tail) - 22 else []
    if sizes == [0xFFFFFFFF] and 0 <= end64 <= len(tail) - 56:
        sizes = [struct.unpack_from("<Q", tail, end64 + 40)[0]]
    if sizes and sizes[0] > MAX_DIRECTORY_BYTES:
        raise CTReadError(path.name, "archive directory", f"{sizes[0]} bytes", f"at most {MAX_DIRECTORY_BYTES}")


def _read_header(path: Path, name: str) -> _Slice | None:
    """The header of a DICOM file; `None` for a file of another kind, as folders also hold notes and licences.

    Raises:
        CTReadError: it begins as DICOM does, and cannot be read.
    """
    if not path.is_file():  # a broken link, or a pipe, which would never end
        return None
    try:
        with path.open("rb") as file:
            if file.read(132)[128:] != b"DICM":
                return None
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(data, path, name)
    except CTReadError:
        raise
    except OSError as error:
        raise CTReadError(name, "file", "unreadable", "one that may be read") from error
    except (struct.error, ValueError) as error:
        raise CTReadError(name, "content", "damaged", "a readable DICOM slice") from error


def _parse(data: mmap.mmap, path: Path, name: str) -> _Slice | None:
    """The elements that are used here, from a whole file.

    Raises:
        CTReadError: written in a way that is not known here.
        ValueError, struct.error: damaged.
    """
    meta, position = {}, 132
    for tag, start, length in _elements(data, 132, True, "<", last_group=2):
        meta[tag] = data[start : start + length].decode("ascii", "replace").strip("\0 ")
        position = start + length
    syntax, kind = meta.get(TRANSFER_SYNTAX, ""), meta.get(MEDIA_STORAGE, "")
    if kind == DICOMDIR:
        return None
    if syntax not in NATIVE and not syntax.startswith(ENCAPSULATED):
        if kind not in (CT_IMAGE, ""):
            return _Slice(path, name, {"SOPClassUID": kind}, syntax, 0, -1)
        raise _unknown_syntax(syntax, name)
    explicit, order = NATIVE.get(syntax, (True, "<"))
    values, pixels = {}, (0, -1)
    for tag, start, length in _elements(data, position, explicit, order):
        position = start + length
        if tag == PIXEL_DATA:
            if length == UNDEFINED_LENGTH:
                length = _fragments(data, start)
            elif position > len(data):
                length = -1
            pixels = start, length
            break
        if tag in TEXTS or tag in INTEGERS:
            if length > MAX_VALUE_LENGTH:
                raise ValueError("a field that is too long")
            value = data[start : start + length]
            if tag in TEXTS:
                values[TEXTS[tag]] = value.decode("ascii", "replace").strip("\0 ")
            elif length:
                (values[INTEGERS[tag]],) = struct.unpack_from(order + "H", value)
        elif tag == MODALITY_LUT:
            values["ModalityLUTSequence"] = "present"
    if not values.get("SOPClassUID"):
        values["SOPClassUID"] = kind
    return _Slice(path, name, values, syntax, *pixels)


def _unknown_syntax(syntax: str, name: str) -> CTReadError:
    found = syntax if syntax.startswith("1.2.840.10008.1.2") else "a private one or missing"
    return CTReadError(name, "TransferSyntaxUID", found, "uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000")


def _elements(
    data: mmap.mmap, position: int, explicit: bool, order: str, last_group: int = 0xFFFF
) -> Iterator[tuple[int, int, int]]:
    """Tag, start and length of each element up to a group, without those inside sequences (PS3.5, section 7).

    Sequences of defined length are skipped at once. The others end with a delimiter, so that their contents have to
    be gone through; `outer` holds, of each sequence and item that is open, whether what is around it has explicit VRs.
    """
    tag_and_length, tags, short, long = (struct.Struct(order + form) for form in ("HHI", "HH", "H", "I"))
    outer: list[bool] = []
    size = len(data)
    while position < size:
        group, element, length = tag_and_length.unpack_from(data, position)
        start = position + 8
        if group > last_group:
            return
        if group == 0xFFFE:
            if element != 0xE000:  # the end of an item or a sequence
                if not outer:
                    raise ValueError("a delimiter outside any sequence")
                explicit = outer.pop()
                length = 0
            elif length == UNDEFINED_LENGTH:
                outer.append(explicit)
                length = 0
            position = start + length
            continue
        inner = explicit
        if explicit:
            vr = data[position + 4 : position + 6]
            if vr in LONG_VRS:
                (length,) = long.unpack_from(data, start)
                start += 4
            elif vr.isalpha() and vr.isupper():
                (length,) = short.unpack_from(data, position + 6)
            else:
                raise ValueError("an element without a type")
            inner = vr != b"UN"  # a sequence of unknown type is written as in the implicit syntax
        if not outer:
            yield (group << 16) | element, start, length
        if length == UNDEFINED_LENGTH:
            outer.append(explicit)
            explicit, length = inner, 0
        position = start + length
    if outer or position > size:
        raise ValueError("the file ends within an element")


def _fragments(data: mmap.mmap, position: int) -> int:
    """Bytes of the compressed pixels that begin here; -1 where the file ends before they do."""
    total = 0
    while position + 8 <= len(data):
        group, element, length = struct.unpack_from("<HHI", data, position)
        if (group, element) == (0xFFFE, 0xE0DD):
            return total
        if (group, element) != (0xFFFE, 0xE000):
            return -1
        total += length
        position += 8 + length
    return -1


def _choose(slices: list[_Slice], series: int | str | None, source: str) -> list[_Slice]:
    """The slices of the one series that was asked for, or of the only one."""
    if not slices:
        raise CTReadError(source, "content", "no DICOM file", "the slices of one CT series")
    groups: dict[str, list[_Slice]] = {}
    others: dict[str, list[_Slice]] = {}  # localizers may share the UID of the slices that were planned on them
    for one in slices:
        (others if one.other else groups).setdefault(one.text("SeriesInstanceUID"), []).append(one)
    if series in others and series not in groups:
        raise CTReadError(others[series][0].name, *others[series][0].other)
    if not groups:
        largest = max(others.values(), key=len)
        raise CTReadError(largest[0].name, *largest[0].other)
    uids = sorted(groups, key=lambda uid: (-len(groups[uid]), uid))
    if series is None and len(uids) == 1:
        return groups[uids[0]]
    if series in groups:
        return groups[series]
    number = int(series) if isinstance(series, int) or (series or "").isdecimal() else None
    if number is not None and 1 <= number <= len(uids):
        return groups[uids[number - 1]]
    listed = "; ".join(f"{n}: {_describe(groups[uid])}" for n, uid in enumerate(uids, 1))
    found = "none chosen" if series is None else "an unknown UID" if number is None else number
    raise CTReadError(source, "series", f"{found}; available: {listed}", "one of them, by series=N or --series N")


def _describe(slices: list[_Slice]) -> str:
    """A series in a list to choose from: number of slices, matrix, and the distance between slices in mm."""
    first = slices[0]
    text = f"{len(slices)} slices of {first.values.get('Columns', '?')} x {first.values.get('Rows', '?')}"
    try:
        normal = np.cross(*first.numbers("ImageOrientationPatient", 6).reshape(2, 3))
        places = sorted(float(one.numbers("ImagePositionPatient", 3) @ normal) for one in slices)
    except CTGeometryError:
        return text + " without a place"
    return text + (f", {np.median(np.diff(places)):.3g} mm apart" if len(slices) > 1 else "")


def _check_slice(one: _Slice) -> None:
    """Refuse a slice that is not one grey-scale image with all its pixels in the file."""
    values = one.values
    frames = one.text("NumberOfFrames")
    if frames not in ("", "1"):
        raise CTReadError(one.name, "NumberOfFrames", frames if frames.isdecimal() else "no number", "1 per file")
    if one.text("BurnedInAnnotation") == "YES":
        raise CTReadError(one.name, "BurnedInAnnotation", "YES", "NO: text in the pixels may name the patient")
    photometric = one.text("PhotometricInterpretation")
    if photometric != "MONOCHROME2" or values.get("SamplesPerPixel") != 1:
        known = photometric in ("MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "MONOCHROME2")
        found = photometric if known else "another or missing"
        raise CTIntensityError(one.name, "PhotometricInterpretation", found, "MONOCHROME2, with one sample per pixel")
    missing = [name for name in INTEGERS.values() if name not in values]
    if missing:
        raise CTReadError(one.name, missing[0], "missing", "a number")
    bits, stored, high = values["BitsAllocated"], values["BitsStored"], values["HighBit"]
    if bits not in (16, 32) or not 0 < stored <= high + 1 <= bits or values["PixelRepresentation"] > 1:
        raise CTIntensityError(
            one.name, "BitsAllocated, BitsStored, HighBit", f"{bits}, {stored}, {high}", "as 16, 12, 11 of a CT image"
        )
    native = one.syntax in NATIVE
    if not native and one.syntax not in DECODED:
        raise _unknown_syntax(one.syntax, one.name)
    expected = values["Rows"] * values["Columns"] * bits // 8
    if one.length < 0:
        raise CTReadError(one.name, "pixel data", "missing or truncated", f"{expected} bytes or their compression")
    if native and one.length != expected:
        raise CTReadError(
            one.name, "pixel data", f"{one.length} bytes", f"{expected} bytes, as Rows and Columns promise"
        )


def _rescale(one: _Slice, allow_non_hu: bool) -> tuple[float, float]:
    """Slope and intercept from the stored pixels of a slice to Hounsfield units."""
    if "ModalityLUTSequence" in one.values:
        raise CTIntensityError(one.name, "ModalityLUTSequence", "present", "RescaleSlope and RescaleIntercept")
    kind = one.text("RescaleType").upper()
    if kind not in RESCALE_TYPES and not allow_non_hu:
        found = kind if kind.replace("_", "").isalpha() and len(kind) <= 8 else "another"
        raise CTIntensityError(one.name, "RescaleType", found, "HU")
    numbers = []
    for name, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        text = one.text(name)
        if not text and allow_non_hu:
            numbers.append(default)
            continue
        try:
            numbers.append(float(text))
        except ValueError as error:
            raise CTIntensityError(
                one.name, name, "not a number" if text else "missing", "a number: every CT image states its way to HU"
            ) from error
    slope, intercept = numbers
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope > 0):
        found = f"{slope:g} with intercept {intercept:g}"
        raise CTIntensityError(one.name, "RescaleSlope", found, "finite and above 0")
    return slope, intercept


def _stack(slices: list[_Slice], source: str) -> tuple[list[int], np.ndarray]:
    """The order of the slices along their normal, and the 4x4 from index (column, row, slice) to LPS+ world mm.

    Raises:
        CTGeometryError: the slices are not an even stack of one grid at right angles, none missing and none twice.
    """
    sizes = np.array([(one.values["Rows"], one.values["Columns"]) for one in slices])
    spacings = np.array([one.numbers("PixelSpacing", 2) for one in slices])
    orientations = np.array([one.numbers("ImageOrientationPatient", 6) for one in slices])
    positions = np.array([one.numbers("ImagePositionPatient", 3) for one in slices])
    for name, values in (
        ("Rows and Columns", sizes),
        ("PixelSpacing", spacings),
        ("ImageOrientationPatient", orientations),
    ):
        differs = np.abs(values - values[0]).max(axis=1) > 1e-4
        if differs.any():
            pair = f"{slices[0].name} and {slices[int(differs.argmax())].name}"
            raise CTGeometryError(source, name, f"not the same in all slices ({pair} differ)", "one grid")
    if spacings.min() <= 0:
        raise CTGeometryError(source, "PixelSpacing", f"{spacings.min():g} mm", "above 0 mm")
    check_shape((int(sizes[0, 1]), int(sizes[0, 0]), len(slices)), source)
    row, column = orientations[0].reshape(2, 3)
    if max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > 1e-3:
        raise CTGeometryError(source, "ImageOrientationPatient", "no rotation", "two unit vectors at right angles")
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable").tolist()
    names, positions = [slices[k].name for k in order], positions[order]
    gaps = np.diff(positions @ normal)
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    thickness = float(step @ normal)
    if thickness < 1e-3:
        raise CTGeometryError(source, "slice positions", "all the same", "one position per slice")
    tilt = math.degrees(math.acos(min(1.0, thickness / float(np.linalg.norm(step)))))
    if math.sin(math.radians(tilt)) > MAX_TILT_COSINE:
        raise CTGeometryError(source, "gantry tilt", f"{tilt:.1f} degrees", "slices stacked at right angles")
    if gaps.min() < MIN_SPACING / 2:
        k = int(gaps.argmin())
        found = f"the same in {names[k]} and {names[k + 1]}"
        raise CTGeometryError(source, "slice positions", found, "one position per slice, none twice")
    offsets = positions - (positions[0] + np.arange(len(slices))[:, None] * step)
    if np.abs(offsets @ normal).max() > MAX_SLICE_OFFSET * thickness:
        steps = gaps / np.median(gaps)
        if np.abs(steps - np.rint(steps)).max() <= MAX_SLICE_OFFSET:
            k = int(steps.argmax())
            found = f"{gaps.max():.3g} mm between {names[k]} and {names[k + 1]}"
            raise CTGeometryError(
                source, "slice spacing", found, f"{np.median(gaps):.3g} mm: slices are missing there"
            )
        raise CTGeometryError(source, "slice spacing", f"{gaps.min():.3g} to {gaps.max():.3g} mm", "an even stack")
    aside = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if aside.max() > MAX_SLICE_OFFSET * thickness:
        found = f"{aside.max():.3g} mm aside in {names[int(aside.argmax())]}"
        raise CTGeometryError(source, "slice positions", found, "slices stacked in line")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * spacings[0, 1], column * spacings[0, 0], step], axis=1)
    affine[:3, 3] = positions[0]
    return order, affine


def _voxels(slices: list[_Slice], rescales: list[tuple[float, float]], source: str) -> tuple[np.ndarray, float, float]:
    """The voxels (column, row, slice), and the slope and intercept that are left to apply to them.

    One array is filled slice by slice. It is int16 in HU wherever the scan is that, as nearly every one; else the
    stored integers; and float32 in HU where slices differ in their rescale or type.
    """
    first, count = slices[0], len(slices)
    shape = (first.values["Rows"], first.values["Columns"])
    packed = [one for one in slices if one.syntax in DECODED]
    promised = sum(math.prod(shape) * one.dtype.itemsize for one in packed)
    if promised > MAX_COMPRESSION * sum(one.length for one in packed):
        raise CTReadError(source, "compression", f"above {MAX_COMPRESSION} to 1", "what a CT compresses to")
    slope, intercept = rescales[0]
    same = all(one.dtype == first.dtype for one in slices) and len(set(rescales)) == 1
    array = np.empty((count, *shape), first.dtype if same else np.float32)
    # Added modulo 2^16 to each slice while it is in the processor's cache; whether all fit is known at the end.
    shifted = same and array.itemsize == 2 and slope == 1 and intercept.is_integer() and abs(intercept) < 2**15
    shift = np.array(int(intercept) % 2**16 if shifted else 0, np.uint16)

    def read(k: int) -> tuple[int, int]:
        plane = array[k] if same else np.empty(shape, slices[k].dtype)
        (_decode if slices[k].syntax in DECODED else _read_native)(slices[k], *rescales[k], plane)
        if not same:
            np.multiply(plane, np.float32(rescales[k][0]), out=array[k], casting="unsafe")
            array[k] += np.float32(rescales[k][1])
        limits = int(plane.min()), int(plane.max())
        if shifted and intercept:
            bits = plane.view(np.uint16)
            np.add(bits, shift, out=bits)
        return limits

    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        limits = np.array(list(pool.map(read, range(count))))
    if not same:
        return array.T, 1.0, 0.0
    if shifted:
        if -(2**15) <= limits.min() + intercept and limits.max() + intercept < 2**15:
            return array.view(np.int16).T, 1.0, 0.0
        bits = array.view(np.uint16)
        np.subtract(bits, shift, out=bits)
    return array.T, slope, intercept


def _read_native(one: _Slice, slope: float, intercept: float, plane: np.ndarray) -> None:
    """Fill a plane with uncompressed pixels."""
    try:
        with one.path.open("rb") as file:
            file.seek(one.start)
            count = file.readinto(plane)
    except OSError as error:
        raise CTReadError(one.name, "pixel data", "unreadable", "a file that may be read") from error
    if count != plane.nbytes:
        raise CTReadError(one.name, "pixel data", f"{count} bytes", f"{plane.nbytes} bytes")
    if (NATIVE[one.syntax][1] == "<") != (sys.byteorder == "little"):
        plane.byteswap(inplace=True)
    # Bits above the stored ones may hold an overlay, or zeros where a negative number goes on with ones.
    unused, stored = one.values["BitsAllocated"] - 1 - one.values["HighBit"], one.values["BitsStored"]
    if stored < one.values["BitsAllocated"]:
        np.left_shift(plane, unused, out=plane)
        np.right_shift(plane, one.values["BitsAllocated"] - stored, out=plane)


def _decode(one: _Slice, slope: float, intercept: float, plane: np.ndarray) -> None:
    """Fill a plane with compressed pixels. GDCM applies the rescale, which is taken back: stored values are exact."""
    _check_stream(one)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(one.path))
    reader.SetImageIO("GDCMImageIO")
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise CTReadError(one.name, "pixel data", "undecodable", "a slice that GDCM can decode") from error
    if image.GetSize() != (*plane.shape[::-1], 1) or image.GetNumberOfComponentsPerPixel() != 1:
        raise CTReadError(one.name, "pixel data", "of another size", "what Rows and Columns promise")
    hu = sitk.GetArrayViewFromImage(image)[0]
    values = np.rint((hu - intercept) / slope)
    limits = np.iinfo(plane.dtype)
    if values.min() < limits.min or values.max() > limits.max:
        raise CTReadError(one.name, "pixel data", "of another type", f"{plane.dtype.name}, as the header promises")
    plane[:] = values


def _check_stream(one: _Slice) -> None:
    """Compare the head of a compressed stream with the header, for GDCM crashes on some that differ.

    Raises:
        CTReadError
    """
    try:
        with one.path.open("rb") as file:
            file.seek(one.start)
            for _ in range(2):  # the table of offsets, then the first fragment
                (length,) = struct.unpack("<4xI", file.read(8))
                content = file.read(length)
        bits, *shape = _rle_shape(content, one) if one.syntax == RLE else _stream_shape(content)
    except (IndexError, struct.error) as error:
        raise CTReadError(one.name, "pixel data", "undecodable", "a stream of its transfer syntax") from error
    allocated, expected = one.values["BitsAllocated"], [one.values["Rows"], one.values["Columns"], 1]
    if shape != expected or not 2 <= bits <= min(16, allocated):
        raise CTReadError(
            one.name,
            "pixel data",
            f"{shape} (rows, columns, samples) of {bits} bits",
            f"{expected} of {allocated} bits",
        )


def _rle_shape(stream: bytes, one: _Slice) -> tuple[int, int, int, int]:
    """As [`_stream_shape`], of a run-length encoded slice: it holds one segment for each byte of a pixel."""
    count, *starts = struct.unpack_from("<16I", stream)
    if count != one.dtype.itemsize or not all(64 <= start < len(stream) for start in starts[:count]):
        raise IndexError("segments outside the stream")
    return 8 * count, one.values["Rows"], one.values["Columns"], 1


def _stream_shape(stream: bytes) -> tuple[int, int, int, int]:
    """Bits, rows, columns and samples per pixel that a JPEG, JPEG-LS or JPEG 2000 stream states.

    Raises:
        IndexError, struct.error: no such stream.
    """
    if stream[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: SIZ comes first
        width, height, left, top = struct.unpack_from(">4I", stream, 8)
        samples, bits = struct.unpack_from(">HB", stream, 40)
        return (bits & 0x7F) + 1, height - top, width - left, samples
    position = 2
    while True:
        marker = stream[position + 1]
        if marker == 0xFF:  # markers may be padded
            position += 1
            continue
        (length,) = struct.unpack_from(">H", stream, position + 2)
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # start of frame
            return struct.unpack_from(">BHHB", stream, position + 4)
        position += 2 + length


__all__ = ["read_dicom"]
