# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Readers of NRRD and MetaImage: a text header, and voxels in the same file, in another, or in one file per slice.

They do not use ITK, because ITK fills in missing header fields, returns zeros for the voxels that a damaged stream
lacks, allocates whatever size a header states, and opens any file that a header names.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .inflate_diffvp import CHUNK, MAX_BYTES, MAX_PADDING, read_bytes, voxel_bytes
from .volume_diffvp import (
    MAX_LENGTH,
    STATED,
    CTGeometryError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    check_shape,
    lps_grid,
    make_volume,
)

# NRRD's world spaces by full and short name: signs that turn their axes into LPS.
NRRD_SPACES = {
    "left-posterior-superior": (1, 1, 1),
    "right-anterior-superior": (-1, -1, 1),
    "left-anterior-superior": (1, -1, 1),
}
NRRD_SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in NRRD_SPACES.items()}
# All spellings of a type in NRRD's definition, and "char".
NRRD_TYPES = {
    spelling: kind
    for kind, spellings in {
        "i1": "char, signed char, int8, int8_t",
        "u1": "uchar, unsigned char, uint8, uint8_t",
        "i2": "short, short int, signed short, signed short int, int16, int16_t",
        "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
        "i4": "int, signed int, int32, int32_t",
        "u4": "uint, unsigned int, uint32, uint32_t",
        "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
        "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
        "f4": "float",
        "f8": "double",
    }.items()
    for spelling in spellings.split(", ")
}
NRRD_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip", "ascii": "ascii", "text": "ascii", "txt": "ascii"}
META_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
META_SYNONYMS = {
    "Orientation": "TransformMatrix", "Rotation": "TransformMatrix", "Position": "Offset", "Origin": "Offset",
}  # fmt: skip
# Words of the two formats, which error messages may repeat (see `_shown`).
WORDS = {word.lower() for word in (*NRRD_SPACES, *NRRD_TYPES, *META_TYPES)} | {
    "missing", "block", "met_other", "raw", "txt", "text", "ascii", "hex", "gz", "gzip", "bz2", "bzip2", "true",
    "false", "little", "big", "local", "list", "mm", "cm", "m", "um", "scanner-xyz", "3d-right-handed",
    "3d-left-handed",
    "right-anterior-superior-time", "left-anterior-superior-time", "scanner-xyz-time", "image", "type", "dimension",
    "space", "sizes", "space directions", "kinds", "endian", "encoding", "space origin", "ndims", "dimsize",
    "elementtype", "elementspacing", "transformmatrix", "offset", "binarydata", "compresseddata",
}  # fmt: skip
MAX_TEXT_HEADER = 2**20  # bytes; the longest headers hold thousands of DICOM tags, or one file name per slice
MAX_AXES = 16  # the limit of Teem, NRRD's reference library
MAX_SKIP = 2**24  # bytes of another header before the voxels
MAX_WORD = 32  # bytes of a number in voxels stored as text, including the following space, on average
LONGEST_WORD = 1024  # bytes of one number; all numbers of a chunk are parsed at the width of the longest
MAX_UNIT_DEVIATION = 0.01  # of a direction's length from 1, because headers round


@dataclass(frozen=True)
class _Storage:
    """Location and encoding of the voxels.

    Attributes:
        field: header field that names the data files, for messages.
        names: names of the data files, in the order of their slices; `None` if the voxels follow the header.
        dtype, shape: of the whole array (x, y, z).
        encoding: "raw", "gzip", "zlib" (or gzip, by the first bytes) or "ascii".
        start: bytes to skip at the start of the file.
        lines: lines to skip after these bytes.
        skip: bytes to skip before the voxels after decompression; -1 if the voxels are the file's last bytes.
    """

    field: str
    names: list[str] | None
    dtype: np.dtype
    shape: tuple[int, int, int]
    encoding: str
    start: int = 0
    lines: int = 0
    skip: int = 0


def read_nrrd(path: Path, source: str, allow_non_hu: bool) -> CTVolume:
    """Read an NRRD file, or the header of one with detached data files.

    Raises:
        CTReadError, CTGeometryError, CTIntensityError: the file, its grid or its voxels are unusable.
    """
    head = read_bytes(path, MAX_TEXT_HEADER, source)
    end = re.search(rb"\r?\n\r?\n", head)
    if not re.match(rb"NRRD000[1-5]\r?\n", head) or (end is None and len(head) == MAX_TEXT_HEADER):
        raise CTReadError(source, "content", "unreadable", "an NRRD header, from NRRD0001 to NRRD0005")
    lines = head[: end.start() if end else None].decode("latin-1").splitlines()[1:]
    # A LIST of data files ends the header, one name per line.
    last = next((k for k, line in enumerate(lines, 1) if re.match(r"data ?file:\s*LIST", line, re.IGNORECASE)), None)
    listed = [line for line in lines[last:] if line.strip()] if last else []
    # Lines with := are key/value pairs of the writer, such as Slicer's DICOM tags.
    lines = [line for line in lines[:last] if line[:1] != "#" and ":=" not in line]
    fields = {name.lower(): value for name, value in _fields(lines, ":", source).items()}
    encoding = NRRD_ENCODINGS.get(fields.get("encoding", "missing").lower())
    if encoding is None:
        raise CTReadError(source, "encoding", _shown(fields.get("encoding", "missing")), "raw, gzip or ascii")
    endian = "little" if encoding == "ascii" else fields.get("endian", "missing")
    dtype = _dtype(NRRD_TYPES, fields.get("type", "missing").lower(), "type", endian, "endian", source)
    # "LPST" is short for "left-posterior-superior-time".
    stated = re.sub(r"^(ras|las|lps)t$", r"\1-time", fields.get("space", "missing").lower())
    space, time, _ = stated.partition("-time")
    if space not in NRRD_SPACES:
        raise CTGeometryError(
            source, "space", _shown(fields.get("space", "missing")), f"one of {', '.join(NRRD_SPACES)}"
        )
    if set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"mm", ""}:
        raise CTGeometryError(source, "space units", _shown(fields["space units"]), "mm")
    sizes, shape, directions, origin = _nrrd_grid(fields, 4 if time else 3, source)
    detached, start = fields.get("data file", fields.get("datafile")), 0
    if detached is None:
        if end is None:
            raise CTReadError(source, "data file", "missing", "a file name, or voxels after the header's blank line")
        start = end.end()
    voxels = _Storage(
        "data file", _file_names(detached, listed, "data file", sizes, source), dtype, shape, encoding,
        start=start, lines=_count(fields, "line skip", source),
        skip=_count(fields, "byte skip", source, least=-1 if encoding == "raw" else 0),
    )  # fmt: skip
    signs = np.array(NRRD_SPACES[space])
    affine = lps_grid(signs[:, None] * directions, origin * signs)
    return make_volume(_read_voxels(path, voxels, source), affine, source, STATED, allow_non_hu=allow_non_hu)


def _nrrd_grid(fields: dict[str, str], axes: int, source: str) -> tuple[tuple, tuple, np.ndarray, np.ndarray]:
    """Return the sizes of all axes, and shape, directions (as columns, mm) and origin of the three spatial axes.

    Args:
        axes: dimension of the world space: 3, or 4 with time.

    Raises:
        CTGeometryError: a field is missing or malformed, or a non-spatial axis is longer than 1.
    """
    dimension = _count(fields, "dimension", source, CTGeometryError, default="missing", least=3, most=MAX_AXES)
    sizes = _shape(fields, "sizes", dimension, source)
    if sum(n != 1 for n in sizes) > 3:
        raise CTGeometryError(source, "dimension", f"{dimension} with sizes {sizes}", "three axes longer than 1")
    text = fields.get("space directions", "missing")
    vectors = re.findall(r"none|\([^()]*\)", text)
    # A non-spatial axis has the direction "none". If the space includes time, the time axis is the last.
    spatial = [k for k, vector in enumerate(vectors) if vector != "none"][: 3 if axes == 4 else None]
    if re.sub(r"none|\([^()]*\)|\s", "", text) or len(vectors) != dimension or len(spatial) != 3:
        raise CTGeometryError(
            source,
            "space directions",
            f"{len(vectors)}, {len(spatial)} of them spatial",
            f"{dimension}, three of them spatial",
        )
    if any(n != 1 for k, n in enumerate(sizes) if k not in spatial):
        raise CTGeometryError(source, "sizes", sizes, "1 along each axis that is not spatial")
    directions = " ".join(vectors[k] for k in spatial)
    directions = _numbers({"space directions": directions}, "space directions", 3 * axes, source).reshape(3, axes)
    if directions[:, 3:].any():
        raise CTGeometryError(source, "space directions", "a step in time", "spatial directions")
    origin = _numbers({"space origin": "0 " * axes} | fields, "space origin", axes, source)
    shape = tuple(sizes[k] for k in spatial)
    check_shape(shape, source)
    return sizes, shape, directions[:, :3].T, origin[:3]


def read_metaimage(path: Path, source: str, allow_non_hu: bool) -> CTVolume:
    """Read a MetaImage file (.mha), or the header of one with detached data files (.mhd).

    Raises:
        CTReadError, CTGeometryError, CTIntensityError: the file, its grid or its voxels are unusable.
    """
    head = read_bytes(path, MAX_TEXT_HEADER, source)
    end = re.search(rb"^ElementDataFile[ \t]*=[^\r\n]*\r?(\n|\Z)", head, re.MULTILINE)
    if end is None:
        raise CTReadError(source, "content", "unreadable", "a MetaImage header with ElementDataFile")
    fields = _fields(head[: end.end()].decode("latin-1").splitlines(), "=", source)
    expected = {"ObjectType": "Image", "ElementNumberOfChannels": "1", "DistanceUnits": "mm"}
    expected |= {"ElementToIntensityFunctionSlope": "1", "ElementToIntensityFunctionOffset": "0"}
    _expect(fields, expected, source)
    binary, compressed = _truth(fields, "BinaryData", source), _truth(fields, "CompressedData", source, "False")
    order = "ElementByteOrderMSB" if "BinaryDataByteOrderMSB" not in fields else "BinaryDataByteOrderMSB"
    endian = "missing" if binary else "little"
    if binary and order in fields:
        endian = "big" if _truth(fields, order, source) else "little"
    dtype = _dtype(
        META_TYPES, fields.get("ElementType", "missing"), "ElementType", endian, "BinaryDataByteOrderMSB", source
    )
    grid = {"ElementSpacing": fields["ElementSize"]} | fields if "ElementSize" in fields else dict(fields)
    for name, meaning in META_SYNONYMS.items():
        if name in fields:
            _expect_same(fields[name], grid.setdefault(meaning, fields[name]), meaning, source)
    sizes, directions, origin = _meta_grid(grid, source)
    shape = sizes[:3]
    detached = fields["ElementDataFile"] if fields["ElementDataFile"].lower() != "local" else None
    listed = [line for line in head[end.end() :].decode("latin-1").splitlines() if line.strip()] if detached else []
    start = 0 if detached is not None else end.end()
    encoding = "ascii" if not binary else "zlib" if compressed else "raw"
    skip = _count(fields, "HeaderSize", source, least=-1 if encoding == "raw" else 0)
    if 0 < skip < start:  # counted from the start of the file, also if the voxels follow this header
        raise CTReadError(source, "HeaderSize", skip, f"{start} or more, because this header ends at {start}")
    voxels = _Storage(
        "ElementDataFile", _file_names(detached, listed, "ElementDataFile", sizes, source), dtype, shape, encoding,
        start=max(start, skip), skip=min(skip, 0),
    )  # fmt: skip
    array = _read_voxels(path, voxels, source, fields.get("CompressedDataSize") if compressed else None)
    return make_volume(array, lps_grid(directions, origin), source, STATED, allow_non_hu=allow_non_hu)


def _meta_grid(fields: dict[str, str], source: str) -> tuple[tuple, np.ndarray, np.ndarray]:
    """Return the sizes of all axes, and directions (as columns, mm) and origin of the first three.

    Raises:
        CTGeometryError: a field is missing or malformed, or a further axis is longer than 1.
    """
    axes = _count(fields, "NDims", source, CTGeometryError, default="missing", least=3, most=MAX_AXES)
    sizes = _shape(fields, "DimSize", axes, source)
    if any(n != 1 for n in sizes[3:]):
        raise CTGeometryError(source, "NDims", f"{axes} with sizes {sizes}", "three axes, and others of length 1")
    check_shape(sizes[:3], source)
    # The matrix lists one axis direction after the other.
    directions = _numbers(fields, "TransformMatrix", axes**2, source).reshape(axes, axes).T
    if np.abs(np.linalg.norm(directions[:3, :3], axis=0) - 1).max() > MAX_UNIT_DEVIATION:
        raise CTGeometryError(source, "TransformMatrix", "not unit vectors", "unit vectors along the axes")
    spacing = _numbers(fields, "ElementSpacing", axes, source)[:3]
    if spacing.min() <= 0:
        raise CTGeometryError(source, "ElementSpacing", _shown(fields["ElementSpacing"]), "mm above 0")
    origin = _numbers({"Offset": "0 " * axes} | fields, "Offset", axes, source)
    return sizes, directions[:3, :3] * spacing, origin[:3]


def _shown(text: str) -> str:
    """Return a header value for a message if it consists of numbers or words of the format, else "another".

    Other values may name the patient.
    """
    words = re.sub(r"[-+0-9.,()\s]|[eE][-+][0-9]", "", text).lower()
    return text if len(text) <= 40 and (not words or text.lower() in WORDS) else "another"


def _fields(lines: list[str], separator: str, source: str) -> dict[str, str]:
    """Parse the fields of a text header into names and values.

    A field that appears twice is refused, because readers differ in which value they use.

    Raises:
        CTReadError: a line without the separator, or a field that appears twice.
    """
    fields = {}
    for line in lines:
        name, found, value = (part.strip() for part in line.partition(separator))
        if not found and line.strip():
            raise CTReadError(source, "content", f"unreadable: a line without {separator}", "a text header")
        if name in fields:
            raise CTReadError(source, _shown(name), "stated twice", "one value")
        if name:
            fields[name] = value
    return fields


def _expect(fields: dict[str, str], expected: dict[str, str], source: str) -> None:
    """Refuse field values that change the meaning of the voxels and that no CT needs."""
    for name, value in expected.items():
        found = fields.get(name, value)
        if found != value and not (value.isdecimal() and _is_number(found, float(value))):
            error = CTGeometryError if name == "DistanceUnits" else CTReadError
            raise error(source, name, _shown(found), value)


def _expect_same(one: str, other: str, name: str, source: str) -> None:
    """Refuse a field that is stated under two names with different numbers, because readers differ in which they use.

    Raises:
        CTReadError: the numbers differ.
        CTGeometryError: the values differ and are not numbers, or not the same number of them.
    """
    if one != other:
        count = len(one.split())
        numbers = _numbers({name: one}, name, count, source)
        if not np.array_equal(numbers, _numbers({name: other}, name, count, source)):
            raise CTReadError(source, name, "stated twice", "one value")


def _is_number(text: str, number: float) -> bool:
    try:
        return float(text) == number
    except ValueError:
        return False


def _truth(fields: dict[str, str], name: str, source: str, default: str = "missing") -> bool:
    """Parse a truth value: True or False, their first letters in either case, or a digit, as toolkits write them."""
    found = fields.get(name, default)
    if found.lower() not in ("true", "false", "t", "f", "1", "0"):
        raise CTReadError(source, name, _shown(found), "True or False")
    return found.lower() in ("true", "t", "1")


def _count(
    fields: dict[str, str],
    name: str,
    source: str,
    error: type = CTReadError,
    *,
    default: str = "0",
    least: int = 0,
    most: int = MAX_SKIP,
) -> int:
    """Parse a whole number from `least` to `most`; raise `error` for anything else."""
    found = fields.get(name, default)
    if not re.fullmatch(r"[-+]?\d{1,12}", found) or not least <= int(found) <= most:
        raise error(source, name, _shown(found), f"a whole number from {least} to {most}")
    return int(found)


def _dtype(types: dict[str, str], kind: str, field: str, endian: str, endian_field: str, source: str) -> np.dtype:
    if kind not in types:
        raise CTIntensityError(source, field, _shown(kind), "one real number per voxel")
    dtype = np.dtype(types[kind])
    if dtype.itemsize > 1 and endian.lower() not in ("little", "big"):
        raise CTReadError(source, endian_field, _shown(endian), "the byte order")
    return dtype.newbyteorder("<" if endian.lower() == "little" else ">")


def _shape(fields: dict[str, str], name: str, count: int, source: str) -> tuple[int, ...]:
    numbers = _numbers(fields, name, count, source)
    if not (numbers == numbers.round()).all():
        raise CTGeometryError(source, "shape", "not whole numbers", f"{count} whole numbers")
    return tuple(int(n) for n in numbers)


def _numbers(fields: dict[str, str], name: str, count: int, source: str) -> np.ndarray:
    """Parse finite numbers, with or without parentheses and commas.

    Raises:
        CTGeometryError: the field is missing, or does not hold `count` finite numbers.
    """
    if name not in fields:
        raise CTGeometryError(source, name, "missing", f"{count} numbers")
    try:
        numbers = np.array([float(word) for word in re.sub(r"[(),]", " ", fields[name]).split()])
    except ValueError as cause:
        raise CTGeometryError(source, name, "not numbers", f"{count} numbers") from cause
    if len(numbers) != count or not np.isfinite(numbers).all():
        finite = np.isfinite(numbers).sum()
        raise CTGeometryError(source, name, f"{len(numbers)} numbers, {finite} finite", f"{count} numbers")
    return numbers


def _file_names(
    detached: str | None, listed: list[str], field: str, sizes: tuple[int, ...], source: str
) -> list[str] | None:
    """Return the names of the data files: one name, a LIST on the lines below, or a pattern and its range of numbers.

    Each file has to lie in the header's folder or below, so that a header cannot make this reader open other files of
    the machine.

    Args:
        detached: value of the field; `None` if the voxels follow the header. LIST, or a pattern's range, may be
            followed by the number of axes of each file.
        listed: the lines below the field, for LIST.
        sizes: sizes of all axes, the slowest last.

    Raises:
        CTReadError: the number of files does not fit `sizes`, or a name leads out of the header's folder.
    """
    if detached is None:
        return None
    words = re.fullmatch(r"LIST(?:\s+(\d)D?)?", detached)
    # "%02d" of C, also as "%02i", "%02u" or "%2.2d". With both a zero and a precision, Python differs from C.
    pattern = re.fullmatch(r"([^%]*%(?:0?\d?|\d?\.\d)[diu][^%\s]*)((?:\s+-?\d{1,9}){0,3})(?:\s+(\d))?", detached)
    axes = words[1] if words else pattern[3] if pattern else None
    expected = math.prod(sizes[int(axes or len(sizes) - 1) :]) if words or pattern else 1
    if words:
        names = [name.strip() for name in listed]
    elif pattern:
        first, last, step = ([int(n) for n in pattern[2].split()] + [None] * 3)[:3]
        first, step = 1 if first is None else first, step or 1
        last = first + (expected - 1) * step if last is None else last
        numbers = range(first, last + (1 if step > 0 else -1), step)
        names = [pattern[1] % number for number in numbers[: MAX_LENGTH + 1]]
    else:
        names = [detached]
    if len(names) != expected:
        raise CTReadError(source, field, f"{len(names)} files", f"{expected}, for sizes {sizes}")
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in name or "\0" in name:
            raise CTReadError(source, field, "a path outside the header's folder", "a file in that folder")
    return names


def _read_voxels(path: Path, voxels: _Storage, source: str, size: str | None = None) -> np.ndarray:
    """Read the voxels from the header's own file, or from the data files that it names.

    Args:
        size: number of compressed bytes as the header states it, if it does.

    Returns:
        The array (x, y, z).

    Raises:
        CTReadError: a data file is missing or damaged, or holds more or fewer voxels.
    """
    count = math.prod(voxels.shape) * voxels.dtype.itemsize
    if voxels.names is None:
        files = [path]
    else:
        files = [path.parent / name for name in voxels.names]
        missing = next((k for k, file in enumerate(files, 1) if not os.path.isfile(file)), None)
        if missing is not None:
            found = "missing" if len(files) == 1 else f"file {missing} of {len(files)} missing"
            raise CTReadError(source, voxels.field, found, "the data file next to the header")
    if len(files) == 1:
        if size is not None:
            _check_size(files[0], voxels.start, size, source)
        return np.frombuffer(_read_bytes(files[0], voxels, count, source), voxels.dtype).reshape(
            voxels.shape, order="F"
        )
    if count > MAX_BYTES:
        raise CTReadError(source, "voxel data", f"{count} bytes", f"at most {MAX_BYTES}")
    array = np.empty((len(files), count // len(files)), np.uint8)
    for part, file in zip(array, files, strict=True):
        part[:] = _read_bytes(file, voxels, part.size, source)
    return array.reshape(-1).view(voxels.dtype).reshape(voxels.shape, order="F")


def _read_bytes(path: Path, voxels: _Storage, count: int, source: str) -> np.ndarray:
    """Read `count` bytes of voxels from one file."""
    start = voxels.start
    if voxels.lines:
        ends = [found.end() for found in re.finditer(b"\n", read_bytes(path, start + MAX_SKIP, source)[start:])]
        if len(ends) < voxels.lines:
            raise CTReadError(source, "line skip", voxels.lines, f"at most {len(ends)}, the number of lines")
        start += ends[voxels.lines - 1]
    if voxels.encoding == "ascii":
        return _read_text(path, start, count, voxels.dtype, source)
    if voxels.encoding == "raw":
        last = path.stat().st_size - count
        if voxels.skip < 0 and last < start:
            raise CTReadError(source, "file size", f"{last + count} bytes", f"{start + count} bytes or more")
        return voxel_bytes(path, last if voxels.skip < 0 else start + voxels.skip, count, None, source)
    # MetaIO reads either stream. No zlib stream begins like gzip.
    gzipped = voxels.encoding == "zlib" and read_bytes(path, start + 2, source)[start:] == b"\x1f\x8b"
    codec = "gzip" if gzipped else voxels.encoding
    return voxel_bytes(path, start, voxels.skip + count, codec, source)[voxels.skip :]


def _read_text(path: Path, start: int, count: int, dtype: np.dtype, source: str) -> np.ndarray:
    """Read voxels that are stored as text, and return them as bytes.

    Raises:
        CTReadError: more or fewer numbers than expected, or numbers that `dtype` cannot hold.
    """
    number = count // dtype.itemsize
    size = os.stat(path).st_size - start
    if count > MAX_BYTES or not 2 * number - 1 <= size <= MAX_WORD * number + CHUNK:
        raise CTReadError(source, "file size", f"{start + size} bytes", f"a text of {number} numbers")
    values, filled, rest = np.empty(number, dtype), 0, b""
    with open(path, "rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            text = (rest + chunk).replace(b",", b" ")
            words = text.split()
            rest = b"" if text[-1:].isspace() else words.pop()  # the next chunk may continue the last number
            filled = _parse(words, values, filled, source)
    filled = _parse(rest.split(), values, filled, source)
    if filled != number:
        raise CTReadError(source, "voxel data", f"{filled} numbers", f"{number} numbers, as the header promises")
    return values.view(np.uint8)


def _parse(words: list[bytes], values: np.ndarray, filled: int, source: str) -> int:
    """Write the numbers in `words` to `values` from index `filled` on, and return the new number of filled values."""
    if filled + len(words) > len(values):
        raise CTReadError(source, "voxel data", "longer than promised", f"{len(values)} numbers")
    if max(map(len, words), default=0) > LONGEST_WORD:
        raise CTReadError(source, "voxel data", "not numbers", f"a text of {len(values)} numbers")
    try:
        numbers = np.array(words, dtype="S").astype(np.float64) if words else np.empty(0)
    except ValueError as error:
        raise CTReadError(source, "voxel data", "not numbers", f"a text of {len(values)} numbers") from error
    part = values[filled : filled + len(words)]
    with np.errstate(invalid="ignore"):
        part[:] = numbers
    if values.dtype.kind in "iu" and not np.array_equal(part, numbers):
        raise CTReadError(source, "voxel data", "other numbers", f"{values.dtype.name}, as the header promises")
    return filled + len(words)


def _check_size(path: Path, start: int, size: str, source: str) -> None:
    """Check CompressedDataSize: the file has to hold as many bytes, followed by nothing but zeros.

    Raises:
        CTReadError: the file is shorter, or holds other bytes after them.
    """
    found = path.stat().st_size - start
    stated = int(size) if re.fullmatch(r"\d{1,12}", size) else -1
    if stated < 0 or not stated <= found <= stated + MAX_PADDING:
        raise CTReadError(source, "CompressedDataSize", _shown(size), f"{found}, the number of bytes")
    with open(path, "rb") as file:
        file.seek(start + stated)
        if file.read().strip(b"\0"):
            raise CTReadError(source, "CompressedDataSize", _shown(size), f"{found}, the number of bytes")


__all__ = ["read_metaimage", "read_nrrd"]
