# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Bounded decompression: exactly the bytes that a header promises are allocated and returned, never more.

Reads gzip and zlib streams ([`voxel_bytes`], [`inflate`]), zip archives ([`extract`]) and deflated DICOM data sets
([`inflate_data_set`]).

Trailing zero bytes are allowed: files that were copied in blocks, or from a tape, end with some.
"""

import io
import os
import struct
import sys
import threading
import zipfile
from collections.abc import Callable
from functools import partial
from gzip import BadGzipFile
from pathlib import Path
from typing import BinaryIO

import numpy as np
from isal import isal_zlib

from .volume_diffvp import CTReadError

MAX_BYTES = 2**32  # voxel data: 16-bit slices of 1024 x 1024 over two metres at 1 mm
MAX_COMPRESSION = 200  # a chest CT deflates to a half or, with much padding, to a tenth; bombs to a thousandth
MAX_PADDING = 2**24  # zero bytes after the voxels: blocks have kilobytes, at most a few megabytes
CHUNK = 2**17  # bytes of a compressed file in memory at a time
MAX_KEPT = 2**29  # bytes that a thread keeps for its next scan
MAX_FILES = 20_000  # a study of several series; a larger folder or archive is no study and would take minutes
MAX_ARCHIVE_BYTES = 4 * 2**30  # unpacked: 8,000 slices of 512 x 512; the temporary folder has to hold a copy
MAX_DIRECTORY_BYTES = 512 * MAX_FILES  # central directory of an archive: an entry has 46 bytes and a path
# Deflated DICOM data sets: a slice of air alone deflates to a thousandth, a whole scan to more than a tenth.
MAX_DEFLATED_BYTES, MAX_DEFLATION = 2**26, 20

# The stub of isal declares the exception class as an instance.
_StreamError: type[Exception] = isal_zlib.error  # pyright: ignore[reportAssignmentType]


def read_bytes(content: Path | bytes, count: int, source: str) -> bytes:
    """Read the first `count` bytes of a file or of its content; fewer if it is shorter.

    Raises:
        CTReadError: the file cannot be opened.
    """
    if isinstance(content, bytes):
        return content[:count]
    try:
        with open(content, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise CTReadError(source, "content", "unreadable", "a file that may be read") from error


def voxel_bytes(content: Path | bytes, start: int, expected: int, codec: str | None, source: str) -> np.ndarray:
    """Read the voxels of a file from byte `start` on. They must have `expected` bytes, apart from trailing zeros.

    Args:
        content: path of the file, or its bytes.
        codec: "gzip", "zlib", or `None` for uncompressed bytes, which are memory-mapped.
        source: name of the file for error messages.

    Raises:
        CTReadError: the data are truncated, too long, damaged, or compressed more than a CT can be.
    """
    if expected > MAX_BYTES:
        raise CTReadError(source, "voxel data", f"{expected} bytes", f"at most {MAX_BYTES}")
    try:
        size = len(content) if isinstance(content, bytes) else os.stat(content).st_size
        if codec is None:
            end = start + expected
            if end <= size <= end + MAX_PADDING:
                data = (
                    np.frombuffer(content, np.uint8)
                    if isinstance(content, bytes)
                    else np.memmap(content, np.uint8, "r")
                )
                if not data[end:].any():
                    return data[start:end]
            raise CTReadError(source, "file size", f"{size} bytes", f"{end} bytes, as the header promises")
        length = max(0, size - start)
        if expected > MAX_COMPRESSION * length:
            found = f"{expected // max(1, length)} to 1"
            raise CTReadError(source, "compression", found, f"at most {MAX_COMPRESSION} to 1, as for any CT")
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
            file.seek(start)
            return inflate(file, expected, codec, source)
    except OSError as error:
        raise CTReadError(source, "content", "unreadable", "a file that may be read") from error


def inflate(file: BinaryIO, expected: int, codec: str, source: str) -> np.ndarray:
    """Decompress a stream of `expected` bytes and verify its checksums. Only zero bytes may follow them.

    Args:
        codec: "gzip", with one or more members (and only zeros between them), or "zlib".
        source: name of the file for error messages.

    Raises:
        CTReadError: the stream is truncated, damaged, too short or too long.
    """
    result = _memory(expected)
    try:
        filled = (_inflate_gzip if codec == "gzip" else _inflate_zlib)(file, result)
    except EOFError as error:
        raise CTReadError(source, "voxel data", "truncated", f"{expected} bytes with the header") from error
    except (_StreamError, BadGzipFile, OverflowError) as error:  # OverflowError: a header longer than CHUNK
        raise CTReadError(
            source, "voxel data", "a damaged compressed stream", "a stream with a valid checksum, and nothing after it"
        ) from error
    if filled > expected:
        raise CTReadError(source, "voxel data", "longer than promised", f"{expected} bytes with the header")
    if filled < expected:
        raise CTReadError(source, "voxel data", f"{filled} bytes", f"{expected} bytes, as the header promises")
    return result


def _inflate_gzip(file: BinaryIO, result: np.ndarray) -> int:
    """Fill `result` and return the number of bytes read, plus one if more than zeros follows.

    The reader behind `igzip.open` decompresses directly into `result` and lets other threads run meanwhile.
    `igzip.open` itself would return copies.
    """
    reader, filled = isal_zlib._GzipReader(file, CHUNK), 0
    while filled < len(result) and (count := reader.readinto(result[filled:])):
        filled += count
    for _ in range(0, MAX_PADDING, CHUNK):
        rest = reader.read(CHUNK)
        if not rest:  # the end: the last checksum, and the bytes after it, have been verified
            return filled
        if rest.strip(b"\0"):
            break
    return filled + 1


def _inflate_zlib(file: BinaryIO, result: np.ndarray) -> int:
    """Fill `result` and return the number of bytes, as [`_inflate_gzip`] does."""
    stream, filled, padding = isal_zlib.decompressobj(), 0, 0
    while not stream.eof:
        chunk = stream.unconsumed_tail or file.read(CHUNK)
        # In pieces, since a chunk may inflate to a thousand times its size. The last piece may need no further input.
        inflated = stream.decompress(chunk, max_length=min(CHUNK, len(result) - filled) or CHUNK)
        if not (chunk or inflated or stream.eof):
            raise EOFError
        if filled == len(result):
            padding += len(inflated)
            if padding > MAX_PADDING or inflated.strip(b"\0"):
                return filled + 1
            continue
        result[filled : filled + len(inflated)] = np.frombuffer(inflated, np.uint8)
        filled += len(inflated)
    if any(rest.strip(b"\0") for rest in (stream.unused_data, *iter(partial(file.read, CHUNK), b""))):
        raise _StreamError("Other bytes after the stream")
    return filled


class _Kept(threading.local):
    """Memory that a thread keeps for its next scan."""

    memory = np.empty(0, np.uint8)
    holders = 0  # reference count of the unused memory

    def count_holders(self) -> int:
        return sys.getrefcount(self.memory)  # each view of the array adds a reference


_kept = _Kept()


def _memory(count: int) -> np.ndarray:
    """Return memory for `count` bytes, reusing that of this thread's last scan if it is large enough and unused.

    New memory costs a page fault for each 4 KB, which is a fifth of the time of a scan.
    """
    if _kept.memory.size < count or _kept.count_holders() > _kept.holders:
        _kept.memory = np.empty(0, np.uint8)  # free the old memory before allocating
        if count > MAX_KEPT:
            return np.empty(count, np.uint8)
        _kept.memory = np.empty(count, np.uint8)
        _kept.holders = _kept.count_holders()
    return _kept.memory[:count]


def extract(path: Path, folder: Path, wanted: Callable[[bytes], bool]) -> list[tuple[Path | None, str]]:
    """Extract the wanted members of a zip archive into a folder.

    The files get names of our own, because the names of members may lead out of the folder. The sizes in the archive's
    directory are checked first: `zipfile` reads no more of a member than its directory entry states and verifies the
    checksum, so that a false entry causes an error and not a full disk.

    Args:
        wanted: takes the first 132 bytes of a member; returns `True` if the member is to be extracted.

    Returns:
        For each member its new path (`None` if it was not wanted) and its path in the archive.

    Raises:
        CTReadError: the archive is too large, encrypted, or of an unknown compression method.
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError: the archive is damaged.
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
            raise CTReadError(path.name, "unpacked size", f"{total} bytes", f"at most {limit} for this archive")
        if any(member.flag_bits & 0x41 for member in members):  # bit 0: encryption, bit 6: strong encryption
            raise CTReadError(path.name, "archive", "encrypted", "an archive without a password")
        methods = {member.compress_type for member in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if methods:
            raise CTReadError(path.name, "compression method", max(methods), "0 or 8: stored or deflated")
        files = []
        for number, member in enumerate(sorted(members, key=lambda member: member.filename)):
            target = None
            with archive.open(member) as stream:
                head = stream.read(132)
                if wanted(head):
                    target = folder / f"{number:06d}"
                    with target.open("wb") as file:
                        file.write(head)
                        while chunk := stream.read(2**20):
                            file.write(chunk)
            files.append((target, member.filename))
    return files


def _check_directory_size(path: Path) -> None:
    """Refuse an archive whose directory is too long for a study, before `zipfile` reads it into memory."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16 - 100))
        tail = file.read()
    end, end64 = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    sizes = [struct.unpack_from("<I", tail, end + 12)[0]] if 0 <= end <= len(tail) - 22 else []
    if sizes == [0xFFFFFFFF] and 0 <= end64 <= len(tail) - 56:
        sizes = [struct.unpack_from("<Q", tail, end64 + 40)[0]]
    if sizes and sizes[0] > MAX_DIRECTORY_BYTES:
        raise CTReadError(path.name, "archive directory", f"{sizes[0]} bytes", f"at most {MAX_DIRECTORY_BYTES}")


def inflate_data_set(content, source: str) -> io.BytesIO:
    """Inflate a deflated DICOM data set (PS3.5, A.5) up to a limit, which pydicom would not have.

    Args:
        content: the bytes after the file meta information.
        source: name of the file for error messages.

    Raises:
        CTReadError: the stream is damaged, or inflates to more than a CT can.
    """
    limit = min(MAX_BYTES, max(MAX_DEFLATED_BYTES, MAX_DEFLATION * len(content)))
    stream = isal_zlib.decompressobj(wbits=-15)
    try:
        result = stream.decompress(content, max_length=limit)
    except _StreamError as error:
        raise CTReadError(source, "content", "a damaged deflated stream", "a valid stream") from error
    if not stream.eof:
        found = f"above {limit} bytes" if len(result) >= limit else "truncated"
        raise CTReadError(source, "deflated size", found, f"a complete stream of at most {limit} bytes")
    return io.BytesIO(result)


__all__ = [
    "MAX_BYTES",
    "MAX_COMPRESSION",
    "MAX_FILES",
    "extract",
    "inflate",
    "inflate_data_set",
    "read_bytes",
    "voxel_bytes",
]
