# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Read the pixels of DICOM slices as one array, with the rescale to Hounsfield units: [`read_voxels`].

Uncompressed pixels are read here; GDCM decodes compressed ones. GDCM does not read the headers, because it silently
fills in missing values: a missing slope becomes 1, a missing pixel spacing 1 mm, and if Rows promises more pixels than
the file holds, the rest is uninitialised memory.
"""

import io
import math
import os
import struct
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, SecondaryCaptureImageStorage

from .inflate_diffvp import MAX_COMPRESSION, inflate_data_set
from .slices_diffvp import BIG_ENDIAN, DEFLATED, NATIVE, PADDING, PIXEL_FIELDS, RLE, Slice
from .volume_diffvp import CTInputError, CTIntensityError, CTReadError

MAX_THREADS = 8  # for decoding slices; with more, memory bandwidth is the limit
RESCALE_TYPES = ("HU", "", "US")  # US is "unspecified"; `make_volume` checks the voxels themselves


def check_slice(one: Slice) -> None:
    """Check that a slice is one greyscale image with all its pixels in the file.

    Raises:
        CTReadError: pixels or fields are missing or contradict each other, or text is burned into the pixels.
        CTIntensityError: the pixels are not greyscale numbers of 16 or 32 bits.
    """
    values = one.values
    frames = one.text("NumberOfFrames") or "1"
    if not frames.isdecimal() or (int(frames) or 1) != one.frames:  # an IS may have leading zeros; 0 is no number
        found = frames if frames.isdecimal() else "not a number"
        raise CTReadError(one.name, "NumberOfFrames", found, f"{one.frames}, as many as the header describes")
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
            one.name, "BitsAllocated, BitsStored, HighBit", f"{bits}, {stored}, {high}", "such as 16, 12, 11 of a CT"
        )
    for name in PADDING.values():
        if name in values and values[name][1] not in (2, bits // 8):
            raise CTIntensityError(one.name, name, f"{values[name][1]} bytes", "a number of 2 bytes")
    expected = math.prod(one.shape) * bits // 8 * one.frames
    if one.length < 0:
        raise CTReadError(one.name, "pixel data", "missing or truncated", f"{expected} bytes, or these compressed")
    if (one.syntax in NATIVE) == bool(one.fragments):
        found = "compressed" if one.fragments else "uncompressed"
        raise CTReadError(one.name, "pixel data", found, "as TransferSyntaxUID says")
    if one.syntax not in NATIVE:
        return
    excess = one.length - expected
    if excess < 0 or (excess and one.frame == 0 and not _is_padding(one, one.start + expected, excess)):
        raise CTReadError(
            one.name, "pixel data", f"{one.length} bytes", f"{expected} bytes, as Rows and Columns promise"
        )


def _is_padding(one: Slice, start: int, count: int) -> bool:
    """
    True if the bytes after the pixels cannot be pixels: not whole rows, or one byte repeated.

    PS3.5, 8.1.1, allows padding, without a value for it.
    """
    if count % (one.shape[1] * one.dtype.itemsize):
        return True
    with _open(one) as data:
        data.seek(start)
        first = data.read(1)
        data.seek(start)
        return not any(data.read(min(2**20, count - done)).strip(first) for done in range(0, count, 2**20))


def rescale_of(one: Slice, allow_non_hu: bool) -> tuple[float, float]:
    """Return slope and intercept from the stored pixels of a slice to Hounsfield units.

    Args:
        allow_non_hu: accept other rescale types, and 1 and 0 for a missing slope and intercept.

    Raises:
        CTIntensityError: the rescale is missing, malformed, or not to Hounsfield units.
    """
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
                one.name, name, "not a number" if text else "missing", "a number: every CT image states its rescale"
            ) from error
    slope, intercept = numbers
    if not (math.isfinite(slope) and math.isfinite(intercept) and slope > 0):
        found = f"{slope:g} with intercept {intercept:g}"
        raise CTIntensityError(one.name, "RescaleSlope", found, "finite and above 0")
    return slope, intercept


def read_voxels(
    slices: list[Slice], rescales: list[tuple[float, float]], source: str
) -> tuple[np.ndarray, float, float]:
    """Return the voxels (column, row, slice), and the slope and intercept that remain to be applied to them.

    One array is filled slice by slice. It is int16 in HU if all values fit, as in nearly every scan, and holds the
    stored integers otherwise. If slices differ in rescale or type, it is float32 in HU.

    Args:
        rescales: slope and intercept of each slice.

    Raises:
        CTReadError: pixels cannot be read or decoded, or are compressed too strongly to be a CT.
    """
    first, count = slices[0], len(slices)
    packed = [one for one in slices if one.fragments]
    promised = sum(math.prod(one.shape) * one.dtype.itemsize for one in packed)
    if promised > MAX_COMPRESSION * sum(length for one in packed for _, length in one.fragments):
        raise CTReadError(source, "compression", f"above {MAX_COMPRESSION} to 1", "a ratio that a CT reaches")
    slope, intercept = rescales[0]
    same = all(one.dtype == first.dtype for one in slices) and len(set(rescales)) == 1
    array = np.empty((count, *first.shape), first.dtype if same else np.float32)
    # The intercept is added modulo 2^16 to each slice while that is in the CPU cache, and subtracted again if in the
    # end not all values fit in int16.
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


def equal_pixels(one: Slice, other: Slice) -> bool:
    """True if two slices hold the same stored values; False if these cannot be read."""
    try:
        for each in (one, other):
            check_slice(each)
        return np.array_equal(_pixels(one, 1.0, 0.0), _pixels(other, 1.0, 0.0))
    except CTInputError:
        return False  # the error is raised if the series is chosen


def _open(one: Slice) -> io.BufferedIOBase:
    """Open the stream to which a slice's offsets refer: the file, or the inflated data set."""
    path = one.file.path
    if path is None:
        raise CTReadError(one.name, "file", "missing", "a file that may be read")
    if one.syntax != DEFLATED:
        return path.open("rb")
    with path.open("rb") as data:
        data.seek(one.body)
        return inflate_data_set(data.read(), one.name)


def _pixels(one: Slice, slope: float, intercept: float, plane: np.ndarray | None = None) -> np.ndarray:
    """Return the stored values of a slice (rows, columns), with declared padding replaced by the value of air.

    Args:
        slope, intercept: rescale of the slice, for the value of air.
        plane: array to write to; a new one if `None`.

    Raises:
        CTReadError: the pixels cannot be read or decoded.
    """
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
                if (count := data.readinto(plane.data)) != plane.nbytes:
                    raise CTReadError(one.name, "pixel data", f"{count} bytes", f"{plane.nbytes} bytes")
                if (one.syntax == BIG_ENDIAN) == (sys.byteorder == "little"):
                    plane.byteswap(inplace=True)
    except OSError as error:
        raise CTReadError(one.name, "pixel data", "unreadable", "a file that may be read") from error
    padding = _padding(one, plane)
    if stored < allocated:
        # The bits above the stored ones may hold an overlay, or lack the sign extension of a negative number.
        np.left_shift(plane, allocated - 1 - high, out=plane)
        np.right_shift(plane, allocated - stored, out=plane)
        padding = padding | _padding(one, plane)
    if np.any(padding):
        limits = np.iinfo(plane.dtype)
        plane[padding] = np.clip(math.floor((-1000 - intercept) / slope), limits.min, limits.max)
    return plane


def _padding(one: Slice, plane: np.ndarray) -> np.ndarray | bool:
    """Return a mask of the stored values that are declared padding (PS3.3, C.7.5.1.1.2); False if none is declared."""
    ends = []
    for name in PADDING.values():
        if name in one.values:
            number, length = one.values[name]
            # The sign follows the pixels, whatever VR the element states.
            negative = one.values["PixelRepresentation"] and number >> (8 * length - 1)
            ends.append(number - (1 << 8 * length) if negative else number)
    if not ends or "PixelPaddingValue" not in one.values:
        return False
    if len(ends) == 1:
        return plane == ends[0]
    return (plane >= min(ends)) & (plane <= max(ends))


def decode_frame(
    stream: bytes, syntax: str, shape: tuple[int, int], allocated: int, source: str
) -> tuple[np.ndarray, int]:
    """Decode the pixels of one compressed DICOM frame with GDCM, through SimpleITK.

    GDCM receives a temporary file with only the stream and a header written here: it crashes on some streams that
    differ from their header, and applies the rescale of the first frame to all frames. GDCM comes with SimpleITK and
    is about as fast as other decoders: 41 ms of CPU time for a JPEG 2000 slice of 512 x 512 (openjpeg in pylibjpeg 40,
    imagecodecs 39), 8 for JPEG-LS (pyjpegls 6). pydicom's own RLE decoder is in Python.

    Args:
        syntax: transfer syntax UID.
        shape: rows and columns that the header states.
        allocated: bits per pixel that the header states.

    Returns:
        Unsigned integers (rows, columns), and the number of bits per pixel that the stream states.

    Raises:
        CTReadError: the stream is undecodable, or its size differs from the header's.
    """
    try:
        bits, *found = _rle_shape(stream, shape, allocated) if syntax == RLE else _stream_shape(stream)
    except (IndexError, struct.error) as error:
        raise CTReadError(source, "pixel data", "undecodable", "a stream of its transfer syntax") from error
    if found != [*shape, 1] or not 2 <= bits <= min(16, allocated):
        raise CTReadError(
            source,
            "pixel data",
            f"{found} (rows, columns, samples) of {bits} bits",
            f"{[*shape, 1]} of {allocated} bits",
        )
    with tempfile.NamedTemporaryFile(prefix="diffvp-", suffix=".dcm") as file:
        file.write(_frame_header(syntax, shape, bits))
        for fragment in (b"", stream):  # an empty offset table comes first
            file.write(struct.pack("<HHI", 0xFFFE, 0xE000, len(fragment) + len(fragment) % 2))
            file.write(fragment + b"\0" * (len(fragment) % 2))
        file.write(struct.pack("<HHI", 0xFFFE, 0xE0DD, 0))
        file.flush()
        reader = sitk.ImageFileReader()
        reader.SetFileName(file.name)
        reader.SetImageIO("GDCMImageIO")
        try:
            image = reader.Execute()
        except RuntimeError as error:
            raise CTReadError(source, "pixel data", "undecodable", "a slice that GDCM can decode") from error
    if image.GetSize() != (*shape[::-1], 1) or image.GetNumberOfComponentsPerPixel() != 1:
        raise CTReadError(source, "pixel data", "of another size", "as Rows and Columns promise")
    pixels = sitk.GetArrayFromImage(image)[0]
    if pixels.dtype not in (np.uint8, np.uint16):
        raise CTReadError(source, "pixel data", "of another type", "unsigned integers")
    return pixels, bits


@lru_cache
def _frame_header(syntax: str, shape: tuple[int, int], bits: int) -> bytes:
    """Return a DICOM file up to the fragments of its only frame: an image of unsigned integers without a rescale."""
    one, one_file = Dataset(), io.BytesIO()
    one.file_meta = FileMetaDataset()
    one.file_meta.TransferSyntaxUID = UID(syntax)
    one.SOPClassUID, one.SOPInstanceUID = SecondaryCaptureImageStorage, "2.25.1"
    one.Rows, one.Columns = shape
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PixelRepresentation = 1, "MONOCHROME2", 0
    one.BitsAllocated, one.BitsStored, one.HighBit = 8 if bits <= 8 else 16, bits, bits - 1
    one.save_as(one_file, enforce_file_format=True)
    return one_file.getvalue() + struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFFFFFF)


def _rle_shape(stream: bytes, shape: tuple[int, int], allocated: int) -> tuple[int, int, int, int]:
    """Return what [`_stream_shape`] does, for a run-length encoded slice, which has one segment per byte of a pixel.

    Raises:
        IndexError, struct.error: the stream is malformed.
    """
    count, *starts = struct.unpack_from("<16I", stream)
    if 8 * count != allocated or not all(64 <= start < len(stream) for start in starts[:count]):
        raise IndexError("segments outside the stream")
    return allocated, *shape, 1


def _stream_shape(stream: bytes) -> tuple[int, int, int, int]:
    """Return bits, rows, columns and samples per pixel that a JPEG, JPEG-LS or JPEG 2000 stream states.

    pydicom's functions for this are private (JPEG), or leave out the size (JPEG 2000).

    Raises:
        IndexError, struct.error: the stream is malformed.
    """
    if stream[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: the SIZ marker comes first
        width, height, left, top = struct.unpack_from(">4I", stream, 8)
        samples, bits = struct.unpack_from(">HB", stream, 40)
        return (bits & 0x7F) + 1, height - top, width - left, samples
    position = 2
    while True:
        marker = stream[position + 1]
        if marker == 0xFF:  # padding before a marker
            position += 1
            continue
        (length,) = struct.unpack_from(">H", stream, position + 2)
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # start of frame
            return struct.unpack_from(">BHHB", stream, position + 4)
        position += 2 + length


__all__ = ["check_slice", "equal_pixels", "read_voxels", "rescale_of"]
