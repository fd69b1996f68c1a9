# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Read the headers of the slices in a DICOM file: [`read_header`].

The elements are read by pydicom's element generator, on which `dcmread` is built. For the headers of 300 slices,
`dcmread` takes 74 ms and the generator 30 ms; reading the pixels takes another 80 ms.
"""

import io
import itertools
import os
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pydicom
from pydicom.datadict import tag_for_keyword
from pydicom.encaps import generate_fragments, parse_basic_offsets
from pydicom.errors import InvalidDicomError
from pydicom.filereader import data_element_generator, read_sequence

from .folders_diffvp import HEAD, is_dicom
from .inflate_diffvp import inflate_data_set
from .volume_diffvp import CTGeometryError, CTInputError, CTReadError

MAX_VALUE_LENGTH = 1024  # bytes of a field that is read here: a few numbers or codes
MAX_HEADER_BYTES = 2**25  # before the pixels; a multi-frame object has 1 or 2 KB per frame
MAX_ITEMS, MAX_FRAGMENTS = 100_000, 20_000  # pydicom makes an object of each, in 10 microseconds
MAX_ICONS = 16  # images within a header
MAX_NUMBER = 1e6  # mm: one kilometre
# Errors that pydicom raises on bytes that are not DICOM.
DAMAGED = (struct.error, ValueError, EOFError, NotImplementedError, RecursionError, InvalidDicomError)

UNDEFINED_LENGTH = 0xFFFFFFFF
TRANSFER_SYNTAX, MEDIA_STORAGE, PIXEL_DATA = 0x00020010, 0x00020002, 0x7FE00010
META = [TRANSFER_SYNTAX, MEDIA_STORAGE]
SHARED_GROUPS, FRAME_GROUPS, MODALITY_LUT = 0x52009229, 0x52009230, 0x00283000
# Sequences of a functional group. The first two hold unassigned attributes of a converted object, so later ones take
# precedence: frame content, temporal position, type, exposure, cardiac phase, reconstruction; position, orientation,
# pixel spacing, rescale.
GROUPS = (
    0x00209170, 0x00209171, 0x00209111, 0x00209310, 0x00189329, 0x00189325, 0x00189118, 0x00189314, 0x00209113,
    0x00209116, 0x00289110, 0x00289145,
)  # fmt: skip
PIXEL_FIELDS = (
    "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
# Fields that distinguish the parts of a series, the most familiar first.
PARTS = (
    "SeriesNumber", "ConvolutionKernel", "ImageType", "FrameType", "SliceThickness", "KVP",
    "ContrastBolusAgent", "FilterType", "ReconstructionDiameter", "TemporalPositionIdentifier",
    "TemporalPositionIndex", "NominalPercentageOfCardiacPhase", "TriggerTime", "StackID", "FrameAcquisitionNumber",
    "AcquisitionNumber", "IrradiationEventUID", "SeriesDescription", "AcquisitionDateTime", "FrameOfReferenceUID",
    "AcquisitionDate", "AcquisitionTime", "FrameAcquisitionDateTime", "FrameReferenceDateTime", "FrameReferenceTime",
    "TemporalPositionTimeOffset", "ReconstructionAlgorithm", "ScanOptions", "ProtocolName", "PatientPosition",
    "SeriesDate", "SeriesTime", "ContentTime", "StudyInstanceUID",
)  # fmt: skip
TEXTS = {
    tag_for_keyword(name): name
    for name in (
        *PARTS, "SOPClassUID", "SOPInstanceUID", "Modality", "SeriesInstanceUID", "ImagePositionPatient",
        "ImageOrientationPatient", "PhotometricInterpretation", "NumberOfFrames", "PixelSpacing", "BurnedInAnnotation",
        "RescaleIntercept", "RescaleSlope", "RescaleType", "ImagesInAcquisition", "NumberOfSeriesRelatedInstances",
        "ConcatenationUID", "VolumeBasedCalculationTechnique",
    )
}  # fmt: skip
INTEGERS = {tag_for_keyword(name): name for name in (*PIXEL_FIELDS, "InConcatenationTotalNumber")}
PADDING = {0x00280120: "PixelPaddingValue", 0x00280121: "PixelPaddingRangeLimit"}
FIELDS = {**TEXTS, **INTEGERS, **PADDING}
TAGS = [*FIELDS, MODALITY_LUT, SHARED_GROUPS, FRAME_GROUPS, PIXEL_DATA]

BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
NATIVE = ("1.2.840.10008.1.2.1", "1.2.840.10008.1.2", BIG_ENDIAN, DEFLATED)
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
MULTI_FRAME = (f"{CT_IMAGE}.1", f"{CT_IMAGE}.2")  # enhanced CT, legacy converted enhanced CT
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
RLE = "1.2.840.10008.1.2.5"
# Transfer syntaxes that GDCM decodes: JPEG (8 and 12 bits, two lossless), JPEG-LS, JPEG 2000 (parts 1 and 2,
# high-throughput), RLE.
DECODED = {*(f"1.2.840.10008.1.2.4.{n}" for n in (50, 51, 57, 70, 80, 81, 90, 91, 92, 93, 201, 202, 203)), RLE}
DICOMDIR = "1.2.840.10008.1.3.10"
DIRECTORY_RECORDS, FILE_ID = 0x00041220, 0x00041500
# Images that are not slices, and images whose values are not the HU of one position: a maximum, minimum or rendering
# over a slab, a curved reformat, a difference.
OTHER_IMAGES = re.compile(
    "LOCALIZER|SCOUT|TOPOGRAM|SCREEN.?SAVE|MIP|M(?:AX|IN)(?:IMUM|.?IP|.?INT)|PROJECTION|RAYSUM|VOL.?REND|RENDER|CURVED"
    "|SUBTRACTION|STD_DEVIATION|(?<![A-Z])(?:VRT|SSD|CPR)"
)


@dataclass(frozen=True)
class DicomFile:
    """A file that is present or expected.

    Attributes:
        path: location on disk; `None` for a member of an archive that was not unpacked.
        folder, name: of the file within the input, for messages and comparisons.
        why: reason why the file is not readable DICOM; empty otherwise.
    """

    path: Path | None
    folder: str
    name: str
    why: str = ""

    @property
    def shapes(self) -> set[str]:
        """Name with its numbers replaced, as decimals and as hexadecimals: equal for the files of a series."""
        name = self.name.lower()
        return {re.sub(r"\d+", "#", name), "hex:" + re.sub(r"[0-9a-f]+", "#", name)}

    @property
    def path_shape(self) -> str:
        """Path within the input with its numbers replaced: equal for the files of a series in numbered folders."""
        return re.sub(r"\d+", "#", os.path.join(self.folder, self.name).lower())


@dataclass(frozen=True, eq=False)
class Slice:
    """One frame of a DICOM file: its header, and the location of its pixels.

    Attributes:
        name: the file's name for messages, with the frame number if the file has several frames.
        values: fields that the header has: `str` for those in `TEXTS`, `int` for `INTEGERS`, and for `PADDING` the
            unsigned number and its length in bytes.
        syntax: transfer syntax UID.
        frame, frames: index of the frame, and number of frames in the file.
        body: offset of the data set in the file, after the meta header.
        start, length: offset and length in bytes of the pixel data of all frames, within the inflated data set if that
            is deflated. `length` is -1 if the file has no pixel data or ends within them.
        fragments: start and length of each fragment of a compressed frame.
    """

    file: DicomFile
    name: str
    values: dict[str, Any]
    syntax: str
    frame: int = 0
    frames: int = 1
    body: int = 0
    start: int = 0
    length: int = -1
    fragments: tuple[tuple[int, int], ...] = ()

    @property
    def other(self) -> tuple[str, str, str] | None:
        """Field, value and expected value that show that the image is not a slice; `None` for slices."""
        modality, kind = self.text("Modality"), self.text("SOPClassUID")
        if modality not in ("CT", ""):
            return "Modality", modality if modality.isalpha() and len(modality) <= 16 else "another", "CT"
        if kind not in (CT_IMAGE, *MULTI_FRAME, ""):
            found = "Secondary Capture" if f"{kind}.".startswith(f"{SECONDARY_CAPTURE}.") else "another"
            return "SOPClassUID", found, "CT Image Storage, Enhanced CT or Legacy Converted Enhanced CT"
        for name in ("FrameType", "ImageType", "VolumeBasedCalculationTechnique"):
            if found := OTHER_IMAGES.search(self.text(name).upper()):
                return name, found[0], "slices, not a projection or localizer"
        return None

    @property
    def is_placed(self) -> bool:
        """True if the header states something of where the image lies, as that of every slice does."""
        return any(self.text(name) for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))

    @property
    def dtype(self) -> np.dtype:
        """Type of the stored pixels, in the machine's byte order."""
        return np.dtype(f"{'i' if self.values['PixelRepresentation'] else 'u'}{self.values['BitsAllocated'] // 8}")

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.values["Rows"], self.values["Columns"]

    def text(self, name: str) -> str:
        """Return a field in `TEXTS`; empty if the header lacks it."""
        return self.values.get(name, "")

    def numbers(self, name: str, count: int) -> list[float]:
        """Return the numbers of a geometric field.

        Raises:
            CTGeometryError: the field is missing, or does not hold `count` numbers below `MAX_NUMBER`.
        """
        try:
            numbers = list(map(float, self.text(name).split("\\")))
        except ValueError as error:
            raise CTGeometryError(self.name, name, "missing or not numbers", f"{count} numbers") from error
        if len(numbers) != count or not all(abs(number) < MAX_NUMBER for number in numbers):  # NaN is not below it
            raise CTGeometryError(self.name, name, f"{len(numbers)} numbers", f"{count} numbers below {MAX_NUMBER:g}")
        return numbers

    def place(self) -> float:
        """Return the position of the slice along its own normal, in mm.

        Raises:
            CTGeometryError: position or orientation are missing or malformed.
        """
        a, b, c, d, e, f = self.numbers("ImageOrientationPatient", 6)
        x, y, z = self.numbers("ImagePositionPatient", 3)
        # Not with NumPy, which takes ten times as long.
        return (b * f - c * e) * x + (c * d - a * f) * y + (a * e - b * d) * z


def read_header(file: DicomFile) -> list[Slice] | DicomFile:
    """Return the slices of a DICOM file. For a file that is not DICOM, return the file with the reason in `why`.

    Raises:
        CTReadError: the file begins like DICOM but cannot be read.
    """
    if file.path is None or not file.path.is_file():  # includes broken links, and pipes, which never end
        return replace(file, why=file.why or "missing")
    try:
        with file.path.open("rb") as data:
            head = data.read(HEAD)
            if not is_dicom(head):
                return replace(file, why="not DICOM" if head.strip(b"\0") else "zeros" if head else "empty")
            start = 132 if head[128:] == b"DICM" else 4 if head[:4] == b"DICM" else 0
            try:
                return _parse(data, file, start)
            except DAMAGED as error:
                if start == 0 and not isinstance(error, CTInputError):  # its first bytes only look like DICOM
                    return replace(file, why="not DICOM")
                raise
    except CTInputError:
        raise
    except OSError as error:
        raise CTReadError(file.name, "file", "unreadable", "a file that may be read") from error
    except DAMAGED as error:
        raise CTReadError(file.name, "content", "damaged", "a readable DICOM slice") from error


def _parse(data: BinaryIO, file: DicomFile, start: int) -> list[Slice]:
    """Return the slices of a file, with the header fields that are read here.

    Args:
        start: offset of the meta header.

    Raises:
        CTReadError: the transfer syntax is unknown, or a CT image has no pixel data.
        DAMAGED: the file cannot be parsed.
    """
    data.seek(start)
    head = io.BytesIO(data.read(2**14))
    generator = data_element_generator(head, False, True, lambda tag, vr, length: tag >> 16 != 2, specific_tags=META)
    meta = {int(element.tag): (element.value or b"").decode("ascii", "replace").strip("\0 ") for element in generator}
    start, syntax, kind = start + head.tell(), meta.get(TRANSFER_SYNTAX, ""), meta.get(MEDIA_STORAGE, "")
    if kind == DICOMDIR:
        return []
    if syntax not in ("", *NATIVE, *DECODED):
        if kind not in (CT_IMAGE, *MULTI_FRAME, ""):
            return [Slice(file, file.name, {"SOPClassUID": kind}, syntax)]
        found = syntax if syntax.startswith("1.2.840.10008.1.2") else "a private one or missing"
        raise CTReadError(file.name, "TransferSyntaxUID", found, "uncompressed, RLE, JPEG, JPEG-LS or JPEG 2000")
    data.seek(body := start)
    if syntax == DEFLATED:
        data, start = inflate_data_set(data.read(), file.name), 0
    try:
        values, groups, pixels = _elements(data, syntax != BIG_ENDIAN)
    except DAMAGED:
        if kind in (CT_IMAGE, *MULTI_FRAME, ""):
            raise
        # Too large or damaged, but by its class no CT, such as a segmentation of 100,000 items.
        return [Slice(file, file.name, {"SOPClassUID": kind}, syntax)]
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
        Slice(
            file, file.name if len(frames) == 1 else f"{file.name}, frame {number + 1}", one, syntax or NATIVE[0],
            number, len(frames), body, position, length, fragments[number] if fragments else (),
        )
        for number, one in enumerate(frames)
    ]  # fmt: skip


def read_directory(path: Path, name: str) -> list[list[str]]:
    """Return the files that a DICOMDIR lists, each as the parts of its path.

    Raises:
        CTReadError: the file is not a readable DICOMDIR.
    """
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_HEADER_BYTES else b""
        data, ids = io.BytesIO(content), []
        data.seek(132)
        for element in data_element_generator(data, False, True, specific_tags=[DIRECTORY_RECORDS]):
            if int(element.tag) == DIRECTORY_RECORDS:
                ids = [one.get_item(FILE_ID) for one in _sequence(element, content, False, True) if FILE_ID in one]
        if content[128:132] != b"DICM" or data.tell() > len(content):
            raise ValueError("cut off, or no DICOM")
        return [one.value.decode("ascii").strip("\0 ").split("\\") for one in ids if one.value]
    except (OSError, *DAMAGED) as error:
        raise CTReadError(name, "content", "damaged", "a directory of DICOM files") from error


def _elements(data: BinaryIO, little: bool) -> tuple[dict[str, Any], list[dict[str, str]], tuple[int, int] | None]:
    """Return the fields of a data set, those of each frame, and offset and length of the pixel data, if there are any.

    The first element shows whether the VRs are explicit, because some files differ from their transfer syntax. pydicom
    parses the bytes up to the first place that could begin the pixel data, and more if that was an icon's. This limits
    the number of items that pydicom makes objects of, and detects truncated files.

    Raises:
        DAMAGED: the data set cannot be parsed.
    """
    order, failure = "<" if little else ">", None
    item = struct.pack(order + "HH", 0xFFFE, 0xE000)
    values: dict[str, Any] = {}
    groups: dict[int, Sequence[pydicom.Dataset]] = {}
    pixels = None
    for head in itertools.islice(_heads(data, order), MAX_ICONS):
        if head.count(item) > MAX_ITEMS:
            raise ValueError("more items than a CT has")
        implicit, stream, pixels = re.fullmatch(b"[A-Z]{2}", head[4:6]) is None, io.BytesIO(head), None
        try:
            values, groups = {}, {}
            for element in data_element_generator(
                stream, implicit, little, None, MAX_VALUE_LENGTH, specific_tags=TAGS
            ):
                tag = int(element.tag)
                if tag in FIELDS:
                    if isinstance(element, pydicom.DataElement):
                        raise ValueError("a sequence in place of a field")
                    if not element.length:
                        continue
                    if (value := element.value) is None or len(value) != element.length:
                        raise ValueError("a field that is too long, or cut off")
                    if tag in TEXTS:
                        if text := value.decode("ascii", "replace").strip("\0 "):
                            values[TEXTS[tag]] = text
                    elif tag in INTEGERS:
                        (values[INTEGERS[tag]],) = struct.unpack_from(order + "H", value)
                    else:
                        values[PADDING[tag]] = int.from_bytes(value, "little" if little else "big"), len(value)
                elif tag == MODALITY_LUT:
                    # pydicom has read the items of a sequence of undefined length.
                    if element.value if isinstance(element, pydicom.DataElement) else element.length:
                        values["ModalityLUTSequence"] = "present"
                elif tag in (SHARED_GROUPS, FRAME_GROUPS):
                    groups[tag] = _sequence(element, head, implicit, little)
                elif tag == PIXEL_DATA:
                    if isinstance(element, pydicom.DataElement):
                        raise ValueError("a sequence in place of pixels")
                    pixels = element.value_tell, element.length
            if pixels is None and stream.tell() > len(head):
                raise ValueError("the data set ends within an element")
        except (OSError, *DAMAGED) as error:
            failure = error
        else:
            failure = None
            if pixels is not None:
                break
    if failure is not None:
        raise ValueError("no readable data set") from failure
    shared = groups.get(SHARED_GROUPS, [])
    everywhere = _fields(shared[0]) if len(shared) == 1 else {}
    return values, [everywhere | _fields(group) for group in groups.get(FRAME_GROUPS, [])], pixels


def _heads(data: BinaryIO, order: str) -> Iterator[bytes]:
    """Yield the bytes up to each place that could begin the pixel data, including the element's head; last, all bytes.

    A delimiter is appended, because pydicom looks for one after compressed pixels.
    """
    tag, delimiter = (struct.pack(order + "HH", *group) for group in ((0x7FE0, 0x0010), (0xFFFE, 0xE0DD)))
    content, start, more = data.read(2**14), 0, True
    while True:
        end = content.find(tag, start)
        if more and (end < 0 or end + 12 > len(content)):
            content, more = content + data.read(MAX_HEADER_BYTES), False
        elif end < 0:
            yield content
            return
        else:
            yield content[: end + 12] + delimiter + bytes(4)
            start = end + 1


def _sequence(element, head: bytes, implicit: bool, little: bool) -> Sequence[pydicom.Dataset]:
    """Return the items of a sequence. pydicom has already read a sequence of undefined length."""
    if isinstance(element, pydicom.DataElement):
        return element.value
    content = head[element.value_tell : element.value_tell + element.length]
    if len(content) != element.length:
        raise ValueError("a sequence that is cut off")
    return read_sequence(io.BytesIO(content), implicit, little, len(content), "ascii")


def _fields(group: pydicom.Dataset) -> dict[str, str]:
    """Return the fields in the sequences of a functional group (PS3.3, C.7.6.16), of one frame or shared by all."""
    found = {}
    for tag in GROUPS:
        if tag in group and group.get_item(tag).VR in ("SQ", "UN", None) and len(group[tag].value or ()) == 1:
            item = group[tag].value[0]
            for field in item.keys() & TEXTS.keys():
                value = item.get_item(field).value  # as bytes: pydicom warns of values that it converts
                if isinstance(value, bytes):
                    found[TEXTS[field]] = value.decode("ascii", "replace").strip("\0 ")
    return found


def _fragments(data: BinaryIO, start: int, frames: int) -> list[tuple[tuple[int, int], ...]]:
    """Return start and length of the fragments of each compressed frame; an empty list if the file is truncated.

    Raises:
        DAMAGED: the fragments cannot be parsed or assigned to frames.
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
        places = {start: number for number, (start, _) in enumerate(fragments)}
        firsts = [places.get(first + offset + 8, -1) for offset in offsets] + [len(fragments)]
        if firsts[0] == 0 and all(a < b for a, b in itertools.pairwise(firsts)):
            return [tuple(fragments[a:b]) for a, b in itertools.pairwise(firsts)]
    if len(fragments) != frames:
        raise ValueError("no offset table assigns the fragments to frames")
    return [(fragment,) for fragment in fragments]


__all__ = [
    "BIG_ENDIAN",
    "DAMAGED",
    "DEFLATED",
    "MAX_HEADER_BYTES",
    "NATIVE",
    "PADDING",
    "PARTS",
    "PIXEL_FIELDS",
    "RLE",
    "DicomFile",
    "Slice",
    "read_directory",
    "read_header",
]
