# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Exactly the bytes that a header promises, from a file that may be compressed: no more are allocated or given out."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from isal import isal_zlib

from .volume_diffvp import CTReadError

MAX_BYTES = 2**32  # of voxels: 16-bit slices of 1024 x 1024 over two metres at 1 mm
MAX_COMPRESSION = 200  # a chest CT deflates to a half or, with much padding, to a tenth; bombs to a thousandth
CHUNK = 2**15  # bytes of a compressed file in memory at a time; what comes out still fits into the cache
# After the first member, mostly the only one: each member's end copies the rest of its piece, and block gzip (bgzip)
# has thousands of members, of up to this size.
SMALL_CHUNK = 2**14
MAX_KEPT = 2**29  # bytes that a thread keeps for its next scan


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
    """The bytes from `start` on, which have to be as many as expected once they are decoded.

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
            if size - start != expected:
                promised = f"{start + expected} bytes, as the header promises"
                raise CTReadError(source, "file size", f"{size} bytes", promised)
            data = (
                np.frombuffer(content, np.uint8) if isinstance(content, bytes) else np.memmap(content, np.uint8, "r")
            )
            return data[start:]
        length = max(0, size - start)
        if expected > MAX_COMPRESSION * length:
            found = f"{expected // max(1, length)} to 1"
            raise CTReadError(source, "compression", found, f"at most {MAX_COMPRESSION} to 1, as of any CT")
        return inflate(_chunks(content, start), expected, source, wbits=31 if codec == "gzip" else 15)
    except OSError as error:
        raise CTReadError(source, "content", "unreadable", "a file that may be read") from error


def _chunks(content: Path | bytes, start: int) -> Iterator[bytes]:
    if isinstance(content, bytes):
        for at in range(start, len(content), CHUNK):
            yield content[at : at + CHUNK]
        return
    with open(content, "rb") as file:
        file.seek(start)
        while chunk := file.read(CHUNK):
            yield chunk


def inflate(chunks: Iterator[bytes], expected: int, source: str, wbits: int = 31) -> np.ndarray:
    """A gzip stream of one or more members that holds exactly `expected` bytes, checksums verified.

    gzip allows zeros after the last member.

    Args:
        wbits: 31 for gzip, 15 for zlib.

    Raises:
        CTReadError: truncated, damaged, shorter or longer.
    """
    result, filled = _memory(expected), 0
    stream, padding, step = None, False, CHUNK
    try:
        for chunk in chunks:
            taken = 0
            while taken < len(chunk):
                piece = memoryview(chunk)[taken : taken + step]
                padding = padding or (stream is None and step == SMALL_CHUNK and not piece[0])
                if padding:
                    if any(piece):
                        raise CTReadError(source, "voxel data", "followed by other bytes", "nothing after its stream")
                    taken += len(piece)
                    continue
                if stream is None:
                    stream = isal_zlib.decompressobj(wbits=wbits)
                inflated = stream.decompress(piece, max_length=expected - filled + 1)
                if filled + len(inflated) > expected:
                    found = "longer than promised"
                    raise CTReadError(source, "voxel data", found, f"{expected} bytes with the header")
                result[filled : filled + len(inflated)] = np.frombuffer(inflated, np.uint8)
                filled += len(inflated)
                taken += len(piece) - len(stream.unused_data)
                if stream.eof:
                    stream, step = None, SMALL_CHUNK
    except isal_zlib.error as error:
        raise CTReadError(
            source, "voxel data", "a damaged compressed stream", "one that passes its checksum"
        ) from error
    if stream is not None:
        raise CTReadError(source, "voxel data", "truncated", f"{expected} bytes with the header")
    if filled < expected:
        raise CTReadError(source, "voxel data", f"{filled} bytes", f"{expected} bytes, as the header promises")
    return result


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


__all__ = ["MAX_BYTES", "MAX_COMPRESSION", "decode", "inflate", "read_bytes"]
