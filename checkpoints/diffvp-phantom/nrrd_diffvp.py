# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""NRRD and MetaImage files: a header of text, then voxels.

Decoded here, not by ITK, which fills in what their headers leave out, returns zeros for voxels that a damaged stream
lacks, allocates what a header asks for, and opens whatever file it points to.
"""

import math
import os
import re
from pathlib import Path

import numpy as np

from .decoding_diffvp import decode, read_bytes
from .volume_diffvp import (
    STATED,
    CTGeometryError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    check_shape,
    lps_grid,
    make_volume,
)

# World axes of NRRD, as signs that turn them into LPS, under their full and short names.
NRRD_SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
}
NRRD_SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in NRRD_SPACES.items()}
# NRRD names a type of C, with or without "signed" and "int", or one of stdint.h.
NRRD_TYPES = {
    "char": "i1", "uchar": "u1", "unsigned char": "u1", "short": "i2", "ushort": "u2", "unsigned short": "u2",
    "int": "i4", "uint": "u4", "unsigned int": "u4", "longlong": "i8", "long long": "i8", "ulonglong": "u8",
    "unsigned long long": "u8", "float": "f4", "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2",
    "uint16": "u2", "int32": "i4", "uint32": "u4", "int64": "i8", "uint64": "u8",
}  # fmt: skip
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
# What else stands in headers.
WORDS = {word.lower() for word in (*NRRD_SPACES, *NRRD_TYPES, *META_TYPES)} | {
    "missing", "block", "met_other", "raw", "txt", "text", "ascii", "hex", "gz", "gzip", "bz2", "bzip2", "true",
    "false", "little", "big", "local", "list", "mm", "cm", "m", "um", "scanner-xyz", "3d-right-handed",
    "3d-left-handed",
    "right-anterior-superior-time", "left-anterior-superior-time", "scanner-xyz-time", "image", "type", "dimension",
    "space", "sizes", "space directions", "kinds", "endian", "encoding", "space origin", "ndims", "dimsize",
    "elementtype", "elementspacing", "transformmatrix", "offset", "binarydata", "compresseddata",
}  # fmt: skip
MAX_TEXT_HEADER = 2**16  # bytes; Slicer's longest headers hold a few thousand of DICOM tags
MAX_UNIT_DEVIATION = 0.01  # of the length of a direction, as headers round them


def read_nrrd(path: Path, source: str, allow_non_hu: bool) -> CTVolume:
    head = read_bytes(path, MAX_TEXT_HEADER, source)
    end = re.search(rb"\r?\n\r?\n", head)
    if not re.match(rb"NRRD000[1-5]\r?\n", head) or (end is None and len(head) == MAX_TEXT_HEADER):
        raise CTReadError(source, "content", "unreadable", "a NRRD header, from NRRD0001 to NRRD0005")
    lines = head[: end.start() if end else None].decode("latin-1").splitlines()[1:]
    # Lines with := are notes of the writer, in which Slicer keeps DICOM tags.
    fields = _fields([line for line in lines if line[:1] != "#" and ":=" not in line], ":", source)
    fields = {name.lower(): value for name, value in fields.items()}
    _expect(fields, {"dimension": "3", "line skip": "0", "byte skip": "0"}, source, required=("dimension",))
    kind = re.sub(r"^signed |(?<=[a-z]) int$|_t$", "", fields.get("type", "missing").lower())
    dtype = _dtype(NRRD_TYPES, kind, "type", fields.get("endian", "missing"), "endian", source)
    shape = _numbers(fields, "sizes", 3, source, CTGeometryError)
    space = fields.get("space", "missing")
    if space.lower() not in NRRD_SPACES:
        raise CTGeometryError(source, "space", _shown(space), f"one of {', '.join(NRRD_SPACES)}")
    if set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"mm", ""}:
        raise CTGeometryError(source, "space units", _shown(fields["space units"]), "mm")
    directions = _numbers(fields, "space directions", 9, source, CTGeometryError).reshape(3, 3).T
    origin = _numbers({"space origin": "(0,0,0)"} | fields, "space origin", 3, source, CTGeometryError)
    encoding = fields.get("encoding", "missing").lower()
    if encoding not in ("raw", "gzip", "gz"):
        raise CTReadError(source, "encoding", _shown(encoding), "raw or gzip")
    detached = fields.get("data file", fields.get("datafile"))
    if detached is None and end is None:
        raise CTReadError(source, "data file", "missing", "a file name, or voxels after the header's blank line")
    start = 0 if detached is not None else end.end()
    codec = None if encoding == "raw" else "gzip"
    array = _read_voxels(path, detached, "data file", start, dtype, shape, codec, source)
    affine = lps_grid(np.array(NRRD_SPACES[space.lower()])[:, None] * directions, origin * NRRD_SPACES[space.lower()])
    return make_volume(array, affine, source, STATED, allow_non_hu=allow_non_hu)


def read_metaimage(path: Path, source: str, allow_non_hu: bool) -> CTVolume:
    head = read_bytes(path, MAX_TEXT_HEADER, source)
    end = re.search(rb"^ElementDataFile[ \t]*=[^\r\n]*\r?(\n|\Z)", head, re.MULTILINE)
    if end is None:
        raise CTReadError(source, "content", "unreadable", "a MetaImage header, up to its ElementDataFile")
    fields = _fields(head[: end.end()].decode("latin-1").splitlines(), "=", source)
    expected = {"ObjectType": "Image", "NDims": "3", "BinaryData": "True", "ElementNumberOfChannels": "1"}
    expected |= {"HeaderSize": "0", "DistanceUnits": "mm"}
    expected |= {"ElementToIntensityFunctionSlope": "1", "ElementToIntensityFunctionOffset": "0"}
    _expect(fields, expected, source, required=("NDims", "BinaryData"))
    big = fields.get("BinaryDataByteOrderMSB", fields.get("ElementByteOrderMSB", "missing"))
    endian = {"True": "big", "False": "little"}.get(big, big)
    dtype = _dtype(
        META_TYPES, fields.get("ElementType", "missing"), "ElementType", endian, "BinaryDataByteOrderMSB", source
    )
    shape = _numbers(fields, "DimSize", 3, source, CTGeometryError)
    synonyms = {"Orientation": "TransformMatrix", "Rotation": "TransformMatrix"}
    synonyms |= {"Position": "Offset", "Origin": "Offset"}
    grid = _fields([f"{synonyms.get(name, name)}={value}" for name, value in fields.items()], "=", source)
    # The matrix lists the direction of one axis after another.
    directions = _numbers(grid, "TransformMatrix", 9, source, CTGeometryError).reshape(3, 3).T
    if np.abs(np.linalg.norm(directions, axis=0) - 1).max() > MAX_UNIT_DEVIATION:
        raise CTGeometryError(source, "TransformMatrix", "not of unit vectors", "the directions of the axes")
    spacing = _numbers(grid, "ElementSpacing", 3, source, CTGeometryError)
    if spacing.min() <= 0:
        raise CTGeometryError(source, "ElementSpacing", _shown(fields["ElementSpacing"]), "mm above 0")
    origin = _numbers({"Offset": "0 0 0"} | grid, "Offset", 3, source, CTGeometryError)
    compressed = fields.get("CompressedData", "False")
    if compressed not in ("True", "False"):
        raise CTReadError(source, "CompressedData", _shown(compressed), "True or False")
    detached = fields["ElementDataFile"] if fields["ElementDataFile"] not in ("LOCAL", "Local", "local") else None
    start = 0 if detached is not None else end.end()
    size = fields.get("CompressedDataSize") if compressed == "True" else None
    codec = "zlib" if compressed == "True" else None
    array = _read_voxels(path, detached, "ElementDataFile", start, dtype, shape, codec, source, size)
    return make_volume(array, lps_grid(directions * spacing, origin), source, STATED, allow_non_hu=allow_non_hu)


def _shown(text: str) -> str:
    """What a message may repeat of a header: numbers and the words of the format, but not a patient's name."""
    words = re.sub(r"[-+0-9.,()\s]|[eE][-+][0-9]", "", text).lower()
    return text if len(text) <= 40 and (not words or text.lower() in WORDS) else "another"


def _fields(lines: list[str], separator: str, source: str) -> dict[str, str]:
    """Names and values of a text header. What is stated twice is refused, for readers differ in which one counts."""
    fields = {}
    for line in lines:
        name, found, value = (part.strip() for part in line.partition(separator))
        if not found and line.strip():
            raise CTReadError(source, "content", f"unreadable without a {separator} in a line", "a text header")
        if name in fields:
            raise CTReadError(source, _shown(name), "stated twice", "one value")
        if name:
            fields[name] = value
    return fields


def _expect(fields: dict[str, str], expected: dict[str, str], source: str, required: tuple[str, ...]) -> None:
    """Refuse values that change what the voxels mean and that no CT needs; the required ones also where missing."""
    for name, value in expected.items():
        found = fields.get(name, "missing")
        if found != value and (name in fields or name in required):
            error = CTGeometryError if name in ("dimension", "NDims", "DistanceUnits") else CTReadError
            raise error(source, name, _shown(found), value)


def _dtype(types: dict[str, str], kind: str, field: str, endian: str, endian_field: str, source: str) -> np.dtype:
    if kind not in types:
        raise CTIntensityError(source, field, _shown(kind), "one real number per voxel")
    dtype = np.dtype(types[kind])
    if dtype.itemsize > 1 and endian.lower() not in ("little", "big"):
        raise CTReadError(source, endian_field, _shown(endian), "the order of bytes")
    return dtype.newbyteorder("<" if endian.lower() == "little" else ">")


def _numbers(fields: dict[str, str], name: str, count: int, source: str, error: type) -> np.ndarray:
    """Finite numbers, in parentheses and with commas or without."""
    if name not in fields:
        raise error(source, name, "missing", f"{count} numbers")
    try:
        numbers = np.array([float(word) for word in re.sub(r"[(),]", " ", fields[name]).split()])
    except ValueError as cause:
        raise error(source, name, "not numbers", f"{count} numbers") from cause
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise error(source, name, f"{len(numbers)} numbers, {np.isfinite(numbers).sum()} finite", f"{count} numbers")
    return numbers


def _read_voxels(
    path: Path,
    detached: str | None,
    field: str,
    start: int,
    dtype: np.dtype,
    shape: np.ndarray,
    codec: str | None,
    source: str,
    size: str | None = None,
) -> np.ndarray:
    """The voxels from `start` on in the file itself, or in one beside it that its header names in `field`."""
    if not (shape == shape.round()).all():
        raise CTGeometryError(source, "shape", "not of whole numbers", "three whole numbers")
    shape = tuple(int(n) for n in shape)
    check_shape(shape, source)
    if detached is not None:
        # A file from elsewhere must not make this reader open just any file of this machine.
        plain = detached and Path(detached).name == detached and "\\" not in detached
        if not plain or not os.path.isfile(path.with_name(detached)):
            raise CTReadError(source, field, "not the name of a file in the header's folder", "one beside the header")
        path = path.with_name(detached)
    found = path.stat().st_size - start
    if size is not None and size != str(found):
        raise CTReadError(source, "CompressedDataSize", _shown(size), f"{found}, as there are bytes")
    raw = decode(path, start, math.prod(shape) * dtype.itemsize, codec, source)
    return np.frombuffer(raw, dtype).reshape(shape, order="F")


__all__ = ["read_metaimage", "read_nrrd"]
