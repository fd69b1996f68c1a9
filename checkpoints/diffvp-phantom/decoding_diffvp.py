# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Exactly the bytes that a header promises, from a file that may be compressed: no more are allocated or given out.

Of gzip and zlib streams ([`decode`], [`inflate`]), of zip archives ([`extract`]), and of deflated DICOM data sets
([`inflate_data_set`]).

Zero bytes behind them are no error: files that are copied in blocks, or from a tape, end with some.
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

MAX_BYTES = 2**32  # of voxels: 16-bit slices of 1024 x 1024 over two metres at 1 mm
MAX_COMPRESSION = 200  # a chest CT deflates to a half or, with much padding, to a tenth; bombs to a thousandth
MAX_PADDING = 2**24  # zero bytes behind the voxels: blocks have kilobytes, at most a few megabytes
CHUNK = 2**17  # bytes of a compressed file in memory at a time
MAX_KEPT = 2**29  # bytes that a thread keeps for its next scan
MAX_FILES = 20_000  # a study of several series; a folder or archive with more is not one, and would take minutes
MAX_ARCHIVE_BYTES = 4 * 2**30  # unpacked: 8,000 slices of 512 x 512, of which the temporary folder has to hold a copy
MAX_DIRECTORY_BYTES = 512 * MAX_FILES  # of an archive: an entry has 46 bytes and a path
# Of a deflated DICOM data set: a slice of nothing but air deflates to a thousandth, a whole scan to no tenth.
MAX_DEFLATED_BYTES, MAX_DEFLATION = 2**26, 20


def read_bytes(content: Path | bytes, count: int, source: str) -> bytes:
    """The first bytes of a file, or of what was in one; fewer where it ends before.

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


def decode(content: Path | bytes, start: int, expected: int, codec: str | None, source: str) -> np.ndarray:
    """The bytes from `start` on, which have to be as many as expected once they are decoded, but for zeros behind.

    Args:
        codec: "gzip", "zlib", or `None` for bytes that are mapped as they are.

    Raises:
        CTReadError: truncated, longer, damaged, or compressed beyond what a CT can be.
    """
    if expected > MAX_BYTES:
        raise CTReadError(source, "voxel data", f"{expected} bytes", f"at most {MAX_BYTES}")
    try:
        size = len(content) if isinstance(content, bytes) else os.stat(content).st_size
        if codec is None:
            end = start + expected
            fits = end <= size <= end + MAX_PADDING
            if fits:
                data = (
                    np.frombuffer(content, np.uint8)
                    if isinstance(content, bytes)
                    else np.memmap(content, np.uint8, "r")
                )
            if not fits or data[end:].any():
                raise CTReadError(source, "file size", f"{size} bytes", f"{end} bytes, as the header promises")
            return data[start:end]
        length = max(0, size - start)
        if expected > MAX_COMPRESSION * length:
            found = f"{expected // max(1, length)} to 1"
            raise CTReadError(source, "compression", found, f"at most {MAX_COMPRESSION} to 1, as of any CT")
        with io.BytesIO(content) if isinstance(content, bytes) else open(content, "rb") as file:
            file.seek(start)
            return inflate(file, expected, codec, source)
    except OSError as error:
        raise CTReadError(source, "content", "unreadable", "a file that may be read") from error


def inflate(file: BinaryIO, expected: int, codec: str, source: str) -> np.ndarray:
    """A compressed stream that holds `expected` bytes, checksums verified, with nothing but zeros in and behind it.

    Args:
        codec: "gzip", of one or more members (with nothing but zeros between them), or "zlib".

    Raises:
        CTReadError: truncated, damaged, shorter or longer.
    """
    result = _memory(expected)
    try:
        filled = (_inflate_gzip if codec == "gzip" else _inflate_zlib)(file, result)
    except EOFError as error:
        raise CTReadError(source, "voxel data", "truncated", f"{expected} bytes with the header") from error
    except (isal_zlib.error, BadGzipFile, OverflowError) as error:  # the last: a header longer than CHUNK
        raise CTReadError(
            source, "voxel data", "a damaged compressed stream", "one that passes its checksum, and nothing after it"
        ) from error
    if filled > expected:
        raise CTReadError(source, "voxel data", "longer than promised", f"{expected} bytes with the header")
    if filled < expected:
        raise CTReadError(source, "voxel data", f"{filled} bytes", f"{expected} bytes, as the header promises")
    return result


def _inflate_gzip(file: BinaryIO, result: np.ndarray) -> int:
    """Fill `result`; how many bytes there were, one too many where there were more than zeros.

    The reader behind `igzip.open` inflates right into `result` and lets other threads run meanwhile. `igzip.open`
    itself would hand out copies.
    """
    reader, filled = isal_zlib._GzipReader(file, CHUNK), 0
    while filled < len(result) and (count := reader.readinto(result[filled:])):
        filled += count
    for _ in range(0, MAX_PADDING, CHUNK):
        rest = reader.read(CHUNK)
        if not rest:  # the end, which verifies the last checksum and what lies behind it
            return filled
        if rest.strip(b"\0"):
            break
    return filled + 1


def _inflate_zlib(file: BinaryIO, result: np.ndarray) -> int:
    """As `_inflate_gzip`."""
    stream, filled, padding = isal_zlib.decompressobj(), 0, 0
    while not stream.eof:
        chunk = stream.unconsumed_tail or file.read(CHUNK)
        # In pieces: what comes out of a chunk may be a thousand times as large. The last may come of no further input.
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
        raise isal_zlib.error("Other bytes after the stream")
    return filled


class _Kept(threading.local):
    """Memory that a thread keeps for its next scan."""

    memory = np.empty(0, np.uint8)
    holders = 0  # references to it while nobody looks at it

    def count_holders(self) -> int:
        return sys.getrefcount(self.memory)  # each view of an array that owns its memory is one more


_kept = _Kept()


def _memory(count: int) -> np.ndarray:
    """Room for `count` bytes: that of this thread's last scan, if it is large enough and nobody holds any of it.

    Fresh memory costs a page fault for each 4 KB, which is a fifth of the time of a scan.
    """
    if _kept.memory.size < count or _kept.count_holders() > _kept.holders:
        _kept.memory = np.empty(0, np.uint8)  # the old goes before the new comes
        if count > MAX_KEPT:
            return np.empty(count, np.uint8)
        _kept.memory = np.empty(count, np.uint8)
        _kept.holders = _kept.count_holders()
    return _kept.memory[:count]


def extract(path: Path, folder: Path, wanted: Callable[[bytes], bool]) -> list[tuple[Path | None, str]]:
    """The members of a zip archive, of which the wanted ones are written under names of our own.

    Their own may lead out of the folder. What the archive's directory promises is checked first: `zipfile` reads no
    more of a member than it promises, and checks its checksum, so that a directory that lies is an error and not a
    full disk.

    Args:
        wanted: whether a member is written, by its first 132 bytes.

    Returns:
        Where each member was written (`None` where it was not), and its path in the archive.

    Raises:
        CTReadError: too large, encrypted, of an unknown method.
        zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError: damaged.
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


def inflate_data_set(content, source: str) -> io.BytesIO:
    """A deflated DICOM data set (PS3.5, A.5): pydicom would inflate it without a limit.

    Args:
        content: the bytes behind the meta header.

    Raises:
        CTReadError: damaged, or longer than what a CT deflates to.
    """
    limit = min(MAX_BYTES, max(MAX_DEFLATED_BYTES, MAX_DEFLATION * len(content)))
    stream = isal_zlib.decompressobj(wbits=-15)
    try:
        result = stream.decompress(content, max_length=limit)
    except isal_zlib.error as error:
        raise CTReadError(source, "content", "a damaged deflated stream", "one that inflates") from error
    if not stream.eof:
        found = f"above {limit} bytes" if len(result) >= limit else "truncated"
        raise CTReadError(source, "deflated size", found, "a stream that ends within what a CT deflates to")
    return io.BytesIO(result)


__all__ = [
    "MAX_BYTES",
    "MAX_COMPRESSION",
    "MAX_FILES",
    "decode",
    "extract",
    "inflate",
    "inflate_data_set",
    "read_bytes",
]
