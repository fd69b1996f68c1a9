# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""DICOM in, a validated CT out: [`read_dicom`] of a folder, a .zip, a DICOMDIR or a file of many frames.

pydicom reads the elements, by its generator: `dcmread` takes 74 ms for the headers of 300 slices, the generator 30,
and the pixels another 80. Uncompressed pixels are read here, and GDCM decodes the compressed ones. It is not asked for
the rest because it fills what is missing without a word: no slope becomes 1, no pixel spacing 1 mm, and where Rows
promises more pixels than the file holds, the others are whatever the memory held.

Messages carry file names, numbers and DICOM's own codes; never UIDs, names or descriptions.
"""

import contextlib
import io
import itertools
import math
import os
import re
import struct
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.errors import InvalidDicomError
from pydicom.filereader import data_element_generator, read_sequence

from .decoding_diffvp import DECODED, MAX_COMPRESSION, MAX_FILES, decode_frame, extract, inflate_data_set
from .volume_diffvp import (
    LPS_TO_RAS,
    MAX_TILT_COSINE,
    MIN_LENGTH,
    CTGeometryError,
    CTInputError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    check_shape,
    make_volume,
)

# How far a slice may lie from its place in an even stack: of the slice spacing, or mm, for headers round positions to
# 0.1 mm.
MAX_SLICE_OFFSET, ROUNDING = 0.1, 0.06
MAX_COSINE_DIFFERENCE = 2e-3  # between slices: 0.1 degrees
MAX_SPACING_DIFFERENCE = 5e-3  # of the pixel spacing: half a voxel at the edge of 200
MIN_INTERLEAVED = 0.75  # parts whose slices lie closer to another part's than this share of their spacing are mixed
MAX_VALUE_LENGTH = 1024  # bytes of a header field that is used here: each holds a few numbers or codes
MAX_HEADER_BYTES = 2**25  # what stands before the pixels; of a multi-frame object 1 or 2 KB a frame
MAX_ITEMS, MAX_FRAGMENTS = 100_000, 20_000  # that pydicom makes objects of, at 10 microseconds each
MAX_ICONS = 16  # pictures within a header
MAX_THREADS = 8  # that decode slices: beyond, the memory's speed is the limit
DAMAGED = (  # what pydicom raises on bytes that are no DICOM
    struct.error, ValueError, EOFError, NotImplementedError, KeyError, AttributeError, TypeError, RecursionError,
    InvalidDicomError,
)  # fmt: skip

UNDEFINED_LENGTH = 0xFFFFFFFF
TRANSFER_SYNTAX, MEDIA_STORAGE, PIXEL_DATA = 0x00020010, 0x00020002, 0x7FE00010
SHARED_GROUPS, FRAME_GROUPS, MODALITY_LUT = 0x52009229, 0x52009230, 0x00283000
PIXEL_FIELDS = (
    "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
# What tells the parts of a series apart, the rest of it after what a reader of the list knows best.
PARTS = (
    "SeriesNumber", "StudyInstanceUID", "ConvolutionKernel", "ImageType", "FrameType", "SliceThickness", "KVP",
    "ContrastBolusAgent", "FilterType", "ReconstructionDiameter", "TemporalPositionIdentifier",
    "TemporalPositionIndex", "NominalPercentageOfCardiacPhase", "TriggerTime", "StackID", "FrameAcquisitionNumber",
    "AcquisitionNumber", "AcquisitionDateTime", "AcquisitionTime",
)  # fmt: skip
TEXTS = {
    pydicom.datadict.tag_for_keyword(name): name
    for name in (
        *PARTS, "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "ImagePositionPatient",
        "ImageOrientationPatient", "PhotometricInterpretation", "NumberOfFrames", "PixelSpacing", "BurnedInAnnotation",
        "RescaleIntercept", "RescaleSlope", "RescaleType", "ImagesInAcquisition", "NumberOfSeriesRelatedInstances",
        "ConcatenationUID", "VolumeBasedCalculationTechnique",
    )
}  # fmt: skip
INTEGERS = {pydicom.datadict.tag_for_keyword(name): name for name in (*PIXEL_FIELDS, "InConcatenationTotalNumber")}
PADDING = {0x00280120: "PixelPaddingValue", 0x00280121: "PixelPaddingRangeLimit"}
TAGS = [*TEXTS, *INTEGERS, *PADDING, MODALITY_LUT, SHARED_GROUPS, FRAME_GROUPS]

BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
NATIVE = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", BIG_ENDIAN, DEFLATED)
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME = (f"{CT_IMAGE}.1", f"{CT_IMAGE}.2")  # enhanced CT, legacy converted enhanced CT
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
DICOMDIR = "1.2.840.10008.1.3.10"
DICOM_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
# Pictures that are no slice, and projections: maxima, minima or renderings over a slab are no HU of a place.
OTHER_IMAGES = re.compile(
    "LOCALIZER|SCOUT|TOPOGRAM|SCREEN.?SAVE|MIP|M(?:AX|IN)(?:IMUM|.?IP|.?INT)|PROJECTION|RENDER|(?<![A-Z])(?:VRT|SSD)"
)
RESCALE_TYPES = ("HU", "", "US")  # US is "unspecified"; whether these are Hounsfield units, the voxels tell


@dataclass(frozen=True)
class _File:
    """A file, or one that should be there: `why` says what became of it where it is no readable DICOM."""

    path: Path | None
    folder: str
    name: str
    why: str = ""

    @property
    def shapes(self) -> set[str]:
        """The name, with numbers left out: that of its neighbours in a series."""
        name = self.name.lower()
        return {re.sub(r"\d+", "#", name), "hex:" + re.sub(r"[0-9a-f]+", "#", name)}


@dataclass(frozen=True, eq=False)
class _Slice:
    """One frame of a DICOM file: its header, and where its pixels are.

    Attributes:
        name: the file's name for messages, with the number of the frame where it has several.
        values: the fields in `TEXTS`, `INTEGERS` and `PADDING` that it has.
        syntax: transfer syntax UID.
        frame, frames: which one of how many of the file it is.
        body: where the data set begins in the file, behind the meta header.
        start, length: of the pixel data of all frames in bytes, within the data set where that is deflated; a
            `length` of -1 where the file ends before they do, or has none.
        fragments: start and length of each stretch of a compressed frame.
    """

    file: _File
    name: str
    values: dict[str, str | int | bytes]
    syntax: str
    frame: int = 0
    frames: int = 1
    body: int = 0
    start: int = 0
    length: int = -1
    fragments: tuple[tuple[int, int], ...] = ()

    @property
    def other(self) -> tuple[str, str, str] | None:
        """Field, value and expectation of what makes this something else than a slice; `None` for slices."""
        modality, kind = self.text("Modality"), self.text("SOPClassUID")
        if modality not in ("CT", ""):
            return "Modality", modality if modality.isalpha() and len(modality) <= 16 else "another", "CT"
        if kind not in (CT_IMAGE, *MULTI_FRAME, ""):
            found = "Secondary Capture" if f"{kind}.".startswith(f"{SECONDARY_CAPTURE}.") else "another"
            return "SOPClassUID", found, "CT Image Storage, Enhanced CT or Legacy Converted Enhanced CT"
        for name in ("FrameType", "ImageType", "VolumeBasedCalculationTechnique"):
            if found := OTHER_IMAGES.search(self.text(name).upper()):
                return name, found[0], "slices, and no projection or localizer"
        return None

    @property
    def dtype(self) -> np.dtype:
        """Of the stored pixels, in the machine's byte order."""
        return np.dtype(f"{'i' if self.values['PixelRepresentation'] else 'u'}{self.values['BitsAllocated'] // 8}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.values["Rows"], self.values["Columns"]

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

    def place(self) -> float:
        """Where the slice lies along its own normal, in mm."""
        normal = np.cross(*self.numbers("ImageOrientationPatient", 6).reshape(2, 3))
        return float(self.numbers("ImagePositionPatient", 3) @ normal)


def read_dicom(
    path: Path, series: int | str | None = None, allow_non_hu: bool = False, allow_incomplete: bool = False
) -> CTVolume:
    """One CT series: of a folder or a .zip with their subfolders, of what a DICOMDIR lists, or of a multi-frame file.

    Slices and frames are sorted by position: file names and instance numbers need not follow it. Left and right come
    from position and orientation in patient coordinates, however the patient lay. Files that are no DICOM, localizers,
    projections, reports and other modalities are passed over, and so are exact duplicates. Where parts of a series
    (contrast phases, acquisitions, kernels) lie between each other, each is a stack of its own.

    Args:
        path: the folder, archive, DICOMDIR or file. An archive is unpacked to a temporary folder.
        series: which one of several: its number in the list that the refusal gives (as `int` or `str`), or its
            SeriesInstanceUID.
        allow_non_hu: accept voxels that are not Hounsfield units, and slices without a rescale to them.
        allow_incomplete: read what is there of a series of which files are damaged or missing at its ends. The volume
            then has a warning.

    Raises:
        CTReadError: no series or several, a damaged or missing file, pixels that cannot be decoded.
        CTGeometryError: slices that are no even stack of one grid at right angles.
        CTIntensityError: no rescale to Hounsfield units, or voxels that are none.
    """
    source = path.name or str(path)
    with _files(path) as files:
        found, lost = [], []
        for file in files:
            try:
                slices = _read_header(file)
            except CTReadError as error:
                if not allow_incomplete:
                    raise
                slices = replace(file, why=error.found)
            (lost.append if isinstance(slices, _File) else found.extend)(slices)
        slices = _choose(found, series, source)
        if allow_incomplete:
            lost += [replace(one.file, why="no pixels") for one in slices if not one.parts]
            slices = [one for one in slices if one.parts]
        warnings = _check_complete(slices, found, lost, source, allow_incomplete)
        if path.is_file() and len(files) == 1 and len(slices) == 1 and path.suffix.lower() != ".zip":
            raise CTReadError(source, "number of frames", 1, "a multi-frame CT; of single slices, give their folder")
        if len(slices) < MIN_LENGTH:
            raise CTGeometryError(source, "number of slices", len(slices), f"at least {MIN_LENGTH}")
        for one in slices:
            _check_slice(one)
        rescales = [_rescale(one, allow_non_hu) for one in slices]
        order, affine = _stack(slices, source)
        array, slope, intercept = _voxels([slices[k] for k in order], [rescales[k] for k in order], source)
    distinct = set(rescales)
    rescale = "rescale slope {:g} intercept {:g}".format(*rescales[0]) if len(distinct) == 1 else "varying rescale"
    volume = make_volume(
        array, LPS_TO_RAS @ affine, source, f"DICOM series, {len(slices)} slices, {rescale}",
        slope=slope, intercept=intercept, allow_non_hu=allow_non_hu,
    )  # fmt: skip
    return replace(volume, warnings=warnings)


# Files


def is_dicom(head: bytes) -> bool:
    """Whether a file with these first 132 bytes is DICOM.

    Without a preamble (PS3.10, 7.1) it begins with an element of the meta header or of the first group.
    """
    if head[128:132] == b"DICM" or head[:4] == b"DICM":
        return True
    return len(head) >= 8 and (head[:2], head[3:4]) in ((b"\2\0", b"\0"), (b"\10\0", b"\0")) and head[2] <= 0x60


@contextlib.contextmanager
def _files(path: Path) -> Iterator[list[_File]]:
    """The files of a folder, an archive or a DICOMDIR, in a fixed order; without those of the system, as .DS_Store."""
    if not path.is_dir() and path.suffix.lower() == ".zip":
        with tempfile.TemporaryDirectory(prefix="diffvp-") as folder:
            try:
                members = extract(path, Path(folder), is_dicom)
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
                expected = "a zip that passes its checksums"
                raise CTReadError(path.name, "content", "a damaged archive", expected) from error
            files = [_File(target, *os.path.split(name), "" if target else "no DICOM") for target, name in members]
            yield [one for one in files if not (one.name.startswith(".") or one.folder.startswith("__MACOSX"))]
        return
    root = path if path.is_dir() else path.parent
    if path.is_dir() or path.name.upper() == "DICOMDIR":
        files = []
        for folder, folders, names in os.walk(root):
            folders.sort()
            inner = os.path.relpath(folder, root)
            files += [_File(Path(folder, name), inner, name) for name in sorted(names) if not name.startswith(".")]
            if len(files) > MAX_FILES:
                raise CTReadError(path.name, "number of files", "too large", f"at most {MAX_FILES}: one study")
        yield files if path.is_dir() else _listed(path, files)
    else:
        yield [_File(path, ".", path.name)]


def _listed(path: Path, files: list[_File]) -> list[_File]:
    """Of these files those that a DICOMDIR lists, and, without a path, those that it lists and that are not there."""
    there = {os.path.normpath(os.path.join(file.folder, file.name)).casefold(): file for file in files}
    expected = "a directory of DICOM files"
    try:
        if path.stat().st_size > MAX_HEADER_BYTES:
            raise CTReadError(path.name, "size", f"above {MAX_HEADER_BYTES} bytes", expected)
        records = pydicom.dcmread(path, specific_tags=["DirectoryRecordSequence"]).get("DirectoryRecordSequence", [])
        listed = [record.get("ReferencedFileID") for record in records]
        names = [os.path.join(*([one] if isinstance(one, str) else one)) for one in listed if one]
    except (OSError, *DAMAGED) as error:
        raise CTReadError(path.name, "content", "damaged", expected) from error
    return [there.get(name.casefold()) or _File(None, *os.path.split(name), "missing") for name in names]


def _read_header(file: _File) -> list[_Slice] | _File:
    """The slices of a DICOM file; of a file that is none, which folders also hold, the file with the reason.

    Raises:
        CTReadError: it begins as DICOM does, and cannot be read.
    """
    if file.path is None or not file.path.is_file():  # a broken link, or a pipe, which would never end
        return replace(file, why=file.why or "missing")
    try:
        with file.path.open("rb") as data:
            head = data.read(132)
            if not is_dicom(head):
                return replace(file, why="no DICOM" if head.strip(b"\0") else "zeros" if head else "empty")
            start = 132 if head[128:] == b"DICM" else 4 if head[:4] == b"DICM" else 0
            try:
                return _parse(data, file, start)
            except DAMAGED as error:
                if start == 0 and not isinstance(error, CTInputError):  # it only looked like DICOM
                    return replace(file, why="no DICOM")
                raise
    except CTInputError:
        raise
    except OSError as error:
        raise CTReadError(file.name, "file", "unreadable", "one that may be read") from error
    except DAMAGED as error:
        raise CTReadError(file.name, "content", "damaged", "a readable DICOM slice") from error


def _parse(data: BinaryIO, file: _File, start: int) -> list[_Slice]:
    """The slices of a file, with those of the elements that are used here.

    Raises:
        CTReadError: written in a way that is not known here, or without its pixels.
        DAMAGED
    """
    data.seek(start)
    head = io.BytesIO(data.read(MAX_VALUE_LENGTH * 8))
    generator = data_element_generator(head, False, True, lambda tag, vr, length: tag >> 16 != 2)
    meta = {element.tag: (element.value or b"").decode("ascii", "replace").strip("\0 ") for element in generator}
    start, syntax, kind = start + head.tell(), meta.get(TRANSFER_SYNTAX, ""), meta.get(MEDIA_STORAGE, "")
    if kind == DICOMDIR:
        return []
    if syntax not in ("", *NATIVE, *DECODED):
        if kind not in (CT_IMAGE, *MULTI_FRAME, ""):
            return [_Slice(file, file.name, {"SOPClassUID": kind}, syntax)]
        found = syntax if syntax.startswith("1.2.840.10008.1.2") else "a private one or missing"
        raise CTReadError(file.name, "TransferSyntaxUID", found, "uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000")
    data.seek(body := start)
    if syntax == DEFLATED:
        data, start = inflate_data_set(data.read(), file.name), 0
    values, groups, pixels = _elements(data, syntax != BIG_ENDIAN)
    values.setdefault("SOPClassUID", kind)
    frames = [values | group for group in groups] if values["SOPClassUID"] in MULTI_FRAME and groups else [values]
    if pixels is None and values["SOPClassUID"] in (CT_IMAGE, *MULTI_FRAME, ""):
        raise CTReadError(file.name, "pixel data", "missing or truncated", "the pixels of a slice")
    position, length = pixels or (0, -1)
    position, size = start + position, data.seek(0, os.SEEK_END)
    if length == UNDEFINED_LENGTH:
        fragments = _fragments(data, position, len(frames))
        length = sum(count for parts in fragments for _, count in parts) if fragments else -1
    else:
        fragments, length = [], length if position + length <= size else -1
    return [
        _Slice(
            file, file.name if len(frames) == 1 else f"{file.name}, frame {number + 1}", one, syntax or NATIVE[0],
            number, len(frames), body, position, length, fragments[number] if fragments else (),
        )
        for number, one in enumerate(frames)
    ]  # fmt: skip


def _elements(data: BinaryIO, little: bool) -> tuple[dict, list[dict[str, str]], tuple[int, int] | None]:
    """The fields of a data set, those of each frame, and where its pixels begin and how long they are.

    Whether elements state their type is seen at the first of them: some files do otherwise than they say. pydicom is
    given what comes before the first bytes that could begin the pixels, and more where these were an icon's: so it
    makes no objects of more items than a CT has, and meets the end of a file that is cut off.

    Raises:
        DAMAGED
    """
    order, failure = "<" if little else ">", None
    for head in itertools.islice(_heads(data, struct.pack(order + "HH", 0x7FE0, 0x0010)), MAX_ICONS):
        if head.count(struct.pack(order + "HH", 0xFFFE, 0xE000)) > MAX_ITEMS:
            raise ValueError("more items than a CT has")
        implicit, stream, pixels = re.fullmatch(b"[A-Z]{2}", head[4:6]) is None, io.BytesIO(head), []

        def at_pixels(tag, vr, length, stream=stream, pixels=pixels) -> bool:
            if tag >> 16 == 0x7FE0 and int(tag) == PIXEL_DATA:
                pixels.append((stream.tell(), length))
            return bool(pixels)

        try:
            values, groups = {}, {}
            for element in data_element_generator(
                stream, implicit, little, at_pixels, MAX_VALUE_LENGTH, specific_tags=TAGS
            ):
                tag = int(element.tag)
                if tag == MODALITY_LUT:
                    values["ModalityLUTSequence"] = "present"
                elif tag in (SHARED_GROUPS, FRAME_GROUPS):
                    groups[tag] = _sequence(element, head, implicit, little)
                elif (value := element.value) is None or len(value) != element.length:
                    raise ValueError("a field that is too long, or cut off")
                elif tag in PADDING:
                    values[PADDING[tag]] = int.from_bytes(value, "little" if little else "big"), len(value)
                elif tag in INTEGERS:
                    if value:
                        (values[INTEGERS[tag]],) = struct.unpack_from(order + "H", value)
                elif text := value.decode("ascii", "replace").strip("\0 "):
                    values[TEXTS[tag]] = text
            if stream.tell() > len(head):
                raise ValueError("the data set ends within an element")
        except (OSError, *DAMAGED) as error:
            failure = error
        else:
            failure = None
            if pixels:
                break
    if failure is not None:
        raise ValueError("no readable data set") from failure
    shared = groups.get(SHARED_GROUPS, [])
    everywhere = _fields(shared[0]) if len(shared) == 1 else {}
    return values, [everywhere | _fields(group) for group in groups.get(FRAME_GROUPS, [])], (pixels or [None])[0]


def _heads(data: BinaryIO, pixels: bytes) -> Iterator[bytes]:
    """What stands before each place that could begin the pixels, with their tag and length, and at last everything."""
    content, start, more = data.read(2**16), 0, True
    while True:
        end = content.find(pixels, start)
        if more and (end < 0 or end + 12 > len(content)):
            content, more = content + data.read(MAX_HEADER_BYTES), False
        elif end < 0:
            yield content
            return
        else:
            yield content[: end + 12]
            start = end + 1


def _sequence(element, head: bytes, implicit: bool, little: bool) -> list[pydicom.Dataset]:
    """The items of a sequence. pydicom has read it already where only a delimiter says how long it is."""
    if isinstance(element, pydicom.DataElement):
        return element.value
    content = head[element.value_tell : element.value_tell + element.length]
    if len(content) != element.length:
        raise ValueError("a sequence that is cut off")
    return read_sequence(io.BytesIO(content), implicit, little, len(content), "ascii")


def _fields(group: pydicom.Dataset) -> dict[str, str]:
    """The fields of a frame, or of all, from the sequences of a functional group (PS3.3, C.7.6.16)."""
    found = {}
    # What a converter left in the sequences of unassigned attributes (0020,9170 and 9171) gives way to the rest.
    for element in sorted(group, key=lambda element: element.tag not in (0x00209170, 0x00209171)):
        if element.VR == "SQ" and len(element.value) == 1:
            for tag in element.value[0].keys() & TEXTS.keys():
                value = element.value[0][tag].value
                if value is not None:
                    numbers = [value] if isinstance(value, str) or not isinstance(value, Iterable) else value
                    found[TEXTS[tag]] = "\\".join(map(str, numbers))
    return found


def _fragments(data: BinaryIO, start: int, frames: int) -> list[tuple[tuple[int, int], ...]]:
    """Start and length of the fragments of each compressed frame; nothing where the file ends before they do.

    Raises:
        DAMAGED
    """
    data.seek(start)
    offsets, first = parse_basic_offsets(data), data.tell()
    fragments = []
    for fragment in itertools.islice(generate_fragments(data), MAX_FRAGMENTS):
        fragments.append((data.tell() - len(fragment), len(fragment)))
    data.seek(max(start, data.tell() - 4))
    if data.read(4) != b"\xfe\xff\xdd\xe0" or len(fragments) < frames:
        return []
    if frames == 1:
        return [tuple(fragments)]
    if len(offsets) == frames:
        starts = [first + offset + 8 for offset in offsets] + [math.inf]
        parts = [tuple(one for one in fragments if a <= one[0] < b) for a, b in itertools.pairwise(starts)]
        if all(part and part[0][0] == place for part, place in zip(parts, starts, strict=False)):
            return parts
    if len(fragments) != frames:
        raise ValueError("fragments of which nothing says whose they are")
    return [(fragment,) for fragment in fragments]


# Series


def _choose(found: list[_Slice], series: int | str | None, source: str) -> list[_Slice]:
    """The slices of the one stack that was asked for, or of the only one, without exact duplicates."""
    if not found:
        raise CTReadError(source, "content", "no DICOM file", "the slices of one CT series")
    groups: dict[str, list[_Slice]] = {}
    others: dict[str, list[_Slice]] = {}  # localizers may share the UID of the slices that were planned on them
    for one in found:
        (others if one.other else groups).setdefault(one.text("SeriesInstanceUID"), []).append(one)
    if series in others and series not in groups:
        raise CTReadError(others[series][0].name, *others[series][0].other)
    if not groups:
        largest = max(others.values(), key=len)
        raise CTReadError(largest[0].name, *largest[0].other)
    stacks = [(uid, stack) for uid in sorted(groups) for stack in _split(_distinct(groups[uid]))]
    stacks.sort(key=lambda one: -len(one[1]))
    matching = [stack for uid, stack in stacks if series in (None, uid)]
    if len(matching) == 1:
        return matching[0]
    number = int(series) if isinstance(series, int) or (series or "").isdecimal() else None
    if number is not None and 1 <= number <= len(stacks):
        return stacks[number - 1][1]
    listed = "; ".join(f"{n}: {_describe(stack)}" for n, (_, stack) in enumerate(stacks, 1))
    state = "none chosen" if series is None else f"{number}" if number is not None else "an unknown UID"
    found = "several under this UID" if matching and series is not None else state
    raise CTReadError(source, "series", f"{found}; available: {listed}", "one of them, by series=N or --series N")


def _distinct(slices: list[_Slice]) -> list[_Slice]:
    """The slices without those that equal another in header and pixels, as copies and second exports do."""
    kept: dict[tuple, list[_Slice]] = {}
    for one in slices:
        same = kept.setdefault(tuple(sorted((k, v) for k, v in one.values.items() if k != "SOPInstanceUID")), [])
        if not (same and one.length >= 0 and any(_equal(one, other) for other in same)):
            same.append(one)
    return [one for same in kept.values() for one in same]


def _equal(one: _Slice, other: _Slice) -> bool:
    try:
        _check_slice(one), _check_slice(other)
        return np.array_equal(_pixels(one, 1.0, 0.0), _pixels(other, 1.0, 0.0))
    except CTInputError:
        return False  # refused where it is chosen


def _split(slices: list[_Slice]) -> list[list[_Slice]]:
    """The stacks that a series consists of. Parts that lie one behind the other are one stack."""
    try:
        places = {id(one): one.place() for one in slices}
    except CTGeometryError:
        return [slices]  # refused where it is chosen

    def step(part: list[_Slice]) -> float:
        return float(np.diff(sorted(places[id(one)] for one in part)).min()) if len(part) > 1 else math.inf

    for name in PARTS:
        parts: dict[str, list[_Slice]] = {}
        for one in slices:
            parts.setdefault(str(one.values.get(name, "")), []).append(one)
        ends = sorted((min(at), max(at)) for at in ([places[id(one)] for one in part] for part in parts.values()))
        overlap = any(lower[1] >= upper[0] - 1e-3 for lower, upper in itertools.pairwise(ends))
        finest = min(step(part) for part in parts.values())
        if overlap and max(map(len, parts.values())) >= MIN_LENGTH and step(slices) < MIN_INTERLEAVED * finest:
            return [stack for _, part in sorted(parts.items()) for stack in _split(part)]
    return [slices]


def _describe(slices: list[_Slice]) -> str:
    """A stack in a list to choose from: what tells it apart, number of slices, matrix, and their distance in mm."""
    first, said = slices[0], []
    for name, word in (
        ("SeriesNumber", "series "), ("ConvolutionKernel", "kernel "), ("ImageType", ""),
        ("AcquisitionNumber", "acquisition "), ("TemporalPositionIdentifier", "phase "),
        ("NominalPercentageOfCardiacPhase", "cardiac phase "), ("SliceThickness", "thickness "),
    ):  # fmt: skip
        codes = [code for code in first.text(name).split("\\") if re.fullmatch(r"[\w .+/-]{1,16}", code, re.ASCII)]
        if codes:
            said.append(word + "/".join(codes))
    text = f"{len(slices)} slices of {first.values.get('Columns', '?')} x {first.values.get('Rows', '?')}"
    try:
        places = sorted(one.place() for one in slices)
    except CTGeometryError:
        return ", ".join([*said, text + " without a place"])
    return ", ".join([*said, text, *([f"{np.median(np.diff(places)):.3g} mm apart"] if len(slices) > 1 else [])])


def _check_complete(
    slices: list[_Slice], found: list[_Slice], lost: list[_File], source: str, allow_incomplete: bool
) -> tuple[str, ...]:
    """Warnings of what is missing of a stack, at the ends of which no gap would show it.

    Args:
        slices: the stack. `found`: all slices and other pictures.
        lost: files that are no readable DICOM.

    Raises:
        CTReadError: files are missing, and that is not allowed.
    """
    missing = []
    folders = {one.file.folder for one in slices}
    names = {one.file.name for one in slices}
    shapes = set().union(*(one.file.shapes for one in slices))
    for file in lost:
        # IM0018.dcm.part stands for IM0018.dcm, unless that is there, too.
        stem = replace(file, name=os.path.splitext(file.name)[0])
        alike = shapes & file.shapes or (shapes & stem.shapes and stem.name not in names)
        if file.folder in folders and (alike or file.name.lower().endswith(DICOM_SUFFIXES)):
            missing.append((file.name, "content", file.why, "a DICOM slice, as its neighbours are"))
    for count, name in (
        ("ImagesInAcquisition", "AcquisitionNumber"), ("NumberOfSeriesRelatedInstances", "SeriesInstanceUID"),
        ("InConcatenationTotalNumber", "ConcatenationUID"),
    ):  # fmt: skip
        for value in {one.text(name) for one in slices}:
            whole = [one for one in slices if one.text(name) == value]
            promised = [str(one.values[count]) for one in whole if count in one.values]
            # Reformatted slices may carry the number of those that they were made of.
            original = all("DERIVED" not in one.text("ImageType") for one in whole)
            there = len({(one.file.path, one.text("SOPInstanceUID")) for one in found if one.text(name) == value})
            if original and promised and promised[0].isdecimal() and there < int(promised[0]):
                missing.append((source, count, f"{promised[0]}, with {there} there", "a complete series"))
    if missing and not allow_incomplete:
        where, field, what, expected = missing[0]
        more = f"; {len(missing) - 1} more like this" if len(missing) > 1 else ""
        raise CTReadError(where, field, what + more, expected + "; allow_incomplete=True reads what is there")
    unread = sum(field == "content" for _, field, _, _ in missing)
    warnings = [f"{unread} files of the series could not be read."] if unread else []
    return (
        *warnings,
        *(f"Slices are missing: {field} is {what}." for _, field, what, _ in missing if field != "content"),
    )


# Slices


def _check_slice(one: _Slice) -> None:
    """Refuse a slice that is not one grey-scale image with all its pixels in the file."""
    values = one.values
    frames = one.text("NumberOfFrames") or "1"
    if frames != str(one.frames):
        found = frames if frames.isdecimal() else "no number"
        raise CTReadError(one.name, "NumberOfFrames", found, f"{one.frames}, as the file has groups of frames")
    if one.text("BurnedInAnnotation") == "YES":
        raise CTReadError(one.name, "BurnedInAnnotation", "YES", "NO: text in the pixels may name the patient")
    photometric = one.text("PhotometricInterpretation")
    if photometric != "MONOCHROME2" or values.get("SamplesPerPixel") != 1:
        known = photometric in ("MONOCHROME1", "RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "MONOCHROME2")
        found = photometric if known else "another or missing"
        raise CTIntensityError(one.name, "PhotometricInterpretation", found, "MONOCHROME2, with one sample per pixel")
    missing = [name for name in PIXEL_FIELDS if name not in values]
    if missing:
        raise CTReadError(one.name, missing[0], "missing", "a number")
    bits, stored, high = values["BitsAllocated"], values["BitsStored"], values["HighBit"]
    if bits not in (16, 32) or not 0 < stored <= high + 1 <= bits or values["PixelRepresentation"] > 1:
        raise CTIntensityError(
            one.name, "BitsAllocated, BitsStored, HighBit", f"{bits}, {stored}, {high}", "as 16, 12, 11 of a CT image"
        )
    for name in PADDING.values():
        if name in values and values[name][1] not in (0, 2, bits // 8):
            raise CTIntensityError(one.name, name, f"{values[name][1]} bytes", "a number of 2 bytes")
    expected = math.prod(one.shape) * bits // 8 * one.frames
    if one.length < 0:
        raise CTReadError(one.name, "pixel data", "missing or truncated", f"{expected} bytes or their compression")
    if (one.syntax in NATIVE) == bool(one.fragments):
        found = "compressed" if one.fragments else "uncompressed"
        raise CTReadError(one.name, "pixel data", found, "what TransferSyntaxUID says")
    if one.syntax not in NATIVE:
        return
    excess = one.length - expected
    if excess < 0 or (excess and one.frame == 0 and not _is_padding(one, one.start + expected, excess)):
        raise CTReadError(
            one.name, "pixel data", f"{one.length} bytes", f"{expected} bytes, as Rows and Columns promise"
        )


def _is_padding(one: _Slice, start: int, count: int) -> bool:
    """Whether bytes behind the pixels are zeros (PS3.5, 8.1.1), or too few to be a row that Rows leaves out."""
    with _open(one) as data:
        data.seek(start)
        return count < one.shape[1] * one.dtype.itemsize or not any(
            data.read(min(2**20, count - done)).strip(b"\0") for done in range(0, count, 2**20)
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

    Headers round: what differs between slices in the last digits is their median, and the grid is the even one that
    lies closest to all positions.

    Raises:
        CTGeometryError: the slices are not an even stack of one grid at right angles, none missing and none twice.
    """
    sizes = np.array([one.shape for one in slices])
    spacings = np.array([one.numbers("PixelSpacing", 2) for one in slices])
    orientations = np.array([one.numbers("ImageOrientationPatient", 6) for one in slices])
    positions = np.array([one.numbers("ImagePositionPatient", 3) for one in slices])
    spacing, orientation = np.median(spacings, axis=0), np.median(orientations, axis=0)
    for name, values, usual, tolerance in (
        ("Rows and Columns", sizes, np.median(sizes, axis=0), 0),
        ("PixelSpacing", spacings, spacing, MAX_SPACING_DIFFERENCE * abs(spacing).min()),
        ("ImageOrientationPatient", orientations, orientation, MAX_COSINE_DIFFERENCE),
    ):
        differs = np.abs(values - usual).max(axis=1) > tolerance
        if differs.any():
            pair = f"{slices[int(differs.argmin())].name} and {slices[int(differs.argmax())].name}"
            raise CTGeometryError(source, name, f"not the same in all slices ({pair} differ)", "one grid")
    if spacings.min() <= 0:
        raise CTGeometryError(source, "PixelSpacing", f"{spacings.min():g} mm", "above 0 mm")
    check_shape((*slices[0].shape[::-1], len(slices)), source)
    row, column = orientation.reshape(2, 3)
    if max(abs(row @ row - 1), abs(column @ column - 1), abs(row @ column)) > 3e-3:
        raise CTGeometryError(source, "ImageOrientationPatient", "no rotation", "two unit vectors at right angles")
    row = row / np.linalg.norm(row)
    column = column - (column @ row) * row
    column /= np.linalg.norm(column)
    normal = np.cross(row, column)
    order = np.argsort(positions @ normal, kind="stable").tolist()
    positions = positions[order]
    gaps, names = np.diff(positions @ normal), [slices[k].name for k in order]
    step, start = np.polyfit(np.arange(len(slices)), positions, 1).round(6)
    thickness = float(step @ normal)
    if thickness < 1e-3:
        raise CTGeometryError(source, "slice positions", "all the same", "one position per slice")
    tilt = math.degrees(math.acos(min(1.0, thickness / float(np.linalg.norm(step)))))
    if math.sin(math.radians(tilt)) > MAX_TILT_COSINE:
        raise CTGeometryError(source, "gantry tilt", f"{tilt:.1f} degrees", "slices stacked at right angles")
    if gaps.min() < MAX_SLICE_OFFSET * thickness:
        k = int(gaps.argmin())
        pair = [slices[order[k]].file, slices[order[k + 1]].file]
        if len({file.name for file in pair}) == 1 < len({file.folder for file in pair}):
            names[k : k + 2] = [os.path.join(file.folder, name) for file, name in zip(pair, names[k:], strict=False)]
        found = f"the same in {names[k]} and {names[k + 1]}"
        raise CTGeometryError(source, "slice positions", found, "one position per slice, none twice")
    tolerance = max(MAX_SLICE_OFFSET * thickness, min(ROUNDING, 0.3 * thickness))
    offsets = positions - (start + np.arange(len(slices))[:, None] * step)
    if np.abs(offsets @ normal).max() > tolerance:
        usual = float(np.median(gaps))
        steps = gaps / usual
        if np.abs(steps - np.rint(steps)).max() <= max(MAX_SLICE_OFFSET, 2 * ROUNDING / usual):
            k = int(steps.argmax())
            found = f"{gaps.max():.3g} mm between {names[k]} and {names[k + 1]}"
            raise CTGeometryError(source, "slice spacing", found, f"{usual:.3g} mm: slices are missing there")
        raise CTGeometryError(source, "slice spacing", f"{gaps.min():.3g} to {gaps.max():.3g} mm", "an even stack")
    aside = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if aside.max() > tolerance:
        found = f"{aside.max():.3g} mm aside in {names[int(aside.argmax())]}"
        raise CTGeometryError(source, "slice positions", found, "slices stacked in line")
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * spacing[1], column * spacing[0], step], axis=1)
    affine[:3, 3] = start
    return order, affine


# Pixels


def _voxels(slices: list[_Slice], rescales: list[tuple[float, float]], source: str) -> tuple[np.ndarray, float, float]:
    """The voxels (column, row, slice), and the slope and intercept that are left to apply to them.

    One array is filled slice by slice. It is int16 in HU wherever the scan is that, as nearly every one; else the
    stored integers; and float32 in HU where slices differ in their rescale or type.
    """
    first, count = slices[0], len(slices)
    packed = [one for one in slices if one.fragments]
    promised = sum(math.prod(one.shape) * one.dtype.itemsize for one in packed)
    if promised > MAX_COMPRESSION * sum(length for one in packed for _, length in one.fragments):
        raise CTReadError(source, "compression", f"above {MAX_COMPRESSION} to 1", "what a CT compresses to")
    slope, intercept = rescales[0]
    same = all(one.dtype == first.dtype for one in slices) and len(set(rescales)) == 1
    array = np.empty((count, *first.shape), first.dtype if same else np.float32)
    # Added modulo 2^16 to each slice while it is in the processor's cache; whether all fit is known at the end.
    shifted = same and array.itemsize == 2 and slope == 1 and intercept.is_integer() and abs(intercept) < 2**15
    shift = np.array(int(intercept) % 2**16 if shifted else 0, np.uint16)

    def read(k: int) -> tuple[int, int]:
        plane = _pixels(slices[k], *rescales[k], array[k] if same else None)
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


def _open(one: _Slice) -> BinaryIO:
    """What the positions of its pixels count in: the file, or the inflated data set."""
    if one.syntax != DEFLATED:
        return one.file.path.open("rb")
    with one.file.path.open("rb") as data:
        data.seek(one.body)
        return inflate_data_set(data.read(), one.name)


def _pixels(one: _Slice, slope: float, intercept: float, plane: np.ndarray | None = None) -> np.ndarray:
    """Fill a plane with the stored values of a slice, and with those of air where the header declares padding."""
    plane = np.empty(one.shape, one.dtype) if plane is None else plane
    allocated, stored, high = (one.values[name] for name in ("BitsAllocated", "BitsStored", "HighBit"))
    try:
        with _open(one) as data:
            if one.fragments:
                stream = []
                for start, length in one.fragments:
                    data.seek(start)
                    stream.append(data.read(length))
                decoded, bits = decode_frame(b"".join(stream), one.syntax, one.shape, allocated, one.name)
                plane.view(f"u{plane.itemsize}")[:] = decoded
                if bits <= stored:
                    stored, high = bits, bits - 1
            else:
                data.seek(one.start + one.frame * plane.nbytes)
                if (count := data.readinto(plane)) != plane.nbytes:
                    raise CTReadError(one.name, "pixel data", f"{count} bytes", f"{plane.nbytes} bytes")
                if (one.syntax == BIG_ENDIAN) == (sys.byteorder == "little"):
                    plane.byteswap(inplace=True)
    except OSError as error:
        raise CTReadError(one.name, "pixel data", "unreadable", "a file that may be read") from error
    padding = _padding(one, plane)
    if stored < allocated:
        # Bits above the stored ones may hold an overlay, or zeros where a negative number goes on with ones.
        np.left_shift(plane, allocated - 1 - high, out=plane)
        np.right_shift(plane, allocated - stored, out=plane)
        padding = padding | _padding(one, plane)
    if np.any(padding):
        limits = np.iinfo(plane.dtype)
        plane[padding] = np.clip(math.floor((-1000 - intercept) / slope), limits.min, limits.max)
    return plane


def _padding(one: _Slice, plane: np.ndarray) -> np.ndarray | bool:
    """Where stored values are the declared padding: no image (PS3.3, C.7.5.1.1.2)."""
    ends = []
    for name in PADDING.values():
        number, length = one.values.get(name, (0, 0))
        if length:
            # As the pixels are signed, whatever type the element states.
            negative = one.values["PixelRepresentation"] and number >> (8 * length - 1)
            ends.append(number - (1 << 8 * length) if negative else number)
    if not ends or "PixelPaddingValue" not in one.values:
        return False
    if len(ends) == 1:
        return plane == ends[0]
    return (plane >= min(ends)) & (plane <= max(ends))


__all__ = ["is_dicom", "read_dicom"]
