# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Malformed and hostile inputs with the expected error of each, and good inputs that must be read.

`test_bad_inputs.py` tests them with our reader, `benchmarks/bad_inputs.py` compares other readers, and
`fuzz_reading.py` starts from the good ones. All inputs hold the same small scan, intact or damaged.

    python -m diffvp.tests.bad_inputs results.json   # one process for all; time, memory and output of each
"""

import dataclasses
import gzip
import io
import json
import os
import resource
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pydicom.fileset
import SimpleITK as sitk
import torch
from isal import isal_zlib
from pydicom.uid import SecondaryCaptureImageStorage
from typer import testing

from diffvp import cli
from diffvp.reading_diffvp import CTMetadata, read_ct
from diffvp.resampling_diffvp import resample
from diffvp.volume_diffvp import CTGeometryError, CTInputError, CTIntensityError, CTReadError

from .bad_dicom import LOST
from .commands import keep_command_tree
from .ct_samples import SPACING, make_ct, write_dicom

SIZE = (16, 24, 24)  # tensor size
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        make: writes the input to an empty folder, and returns the path or object to read.
        error: expected error; `None` for a good input.
        field: field that the message must name.
        options: further arguments of the reader.
    """

    name: str
    format: str
    make: Callable[[Path], object]
    error: type[CTInputError] | None = None
    field: str = ""
    options: dict = dataclasses.field(default_factory=dict)


def with_voxel(value: float) -> np.ndarray:
    lps = make_ct().astype(np.float32)
    lps[3, 4, 5] = value
    return lps


def with_metal() -> np.ndarray:
    lps = make_ct()
    lps[12:14, 10:12, 8:10] = 3071
    return lps


def lps_affine(degrees: float = 0, shear: float = 0, spacing=SPACING) -> np.ndarray:
    """Return the RAS affine of an LPS array, rotated about z and sheared like a gantry tilt."""
    turn = np.radians(degrees)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([-spacing[0], -spacing[1], spacing[2]])
    affine[1, 2] += shear * spacing[2]
    affine[:3, 3] = (-40, 25, 300)
    return affine


# NIfTI


def nifti(voxels=None, affine=None, kind=nib.Nifti1Image, endian="<", **fields) -> bytes:
    """Return a NIfTI file with header fields overwritten without nibabel's checks."""
    voxels = make_ct() if voxels is None else voxels
    header = kind.header_class(endianness=endian)
    header.set_data_dtype(voxels.dtype)
    image = kind(voxels, lps_affine() if affine is None else affine, header)
    if isinstance(image, nib.Nifti1Image):
        image.set_qform(image.affine, 1)
        image.set_sform(image.affine, 1)
        image.header.set_xyzt_units("mm")
    raw = image.to_bytes()
    header = kind.header_class.from_fileobj(io.BytesIO(raw), check=False)
    for name, value in fields.items():
        header[name] = value
    block = header.binaryblock
    return block + raw[len(block) :]


def dims(*numbers: int) -> list[int]:
    """Return the field `dim`, which begins with the number of axes."""
    return [len(numbers), *numbers, *[1] * (7 - len(numbers))]


def pixdim(*mm: float, qfac: float = 1) -> list[float]:
    return [qfac, *mm, 0, 0, 0, 0]


def sform(matrix) -> dict:
    """Return the fields of a grid stated by the sform only."""
    matrix = np.asarray(matrix, float)
    return {"qform_code": 0, "sform_code": 1, "srow_x": matrix[0], "srow_y": matrix[1], "srow_z": matrix[2]}


def with_element(row: int, column: int, value: float) -> np.ndarray:
    affine = lps_affine()
    affine[row, column] = value
    return affine


def pack(raw: bytes) -> bytes:
    return gzip.compress(raw, mtime=0)


def zeros(size: int, head: bytes = b"") -> bytes:
    """Return a raw deflate stream of `head` and then zeros, `size` bytes in all; repeated blocks make this fast."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [deflate.compress(head + bytes((size - len(head)) % 2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)]
    block = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    parts += [block] * ((size - len(head)) // 2**20)
    return b"".join([*parts, deflate.flush()])


def checksum(size: int, head: bytes = b"") -> int:
    crc = isal_zlib.crc32(head + bytes((size - len(head)) % 2**20))
    for _ in range((size - len(head)) // 2**20):
        crc = isal_zlib.crc32(bytes(2**20), crc)
    return crc


def bomb(size: int, head: bytes = b"") -> bytes:
    """Return a gzip file of `zeros`."""
    start = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    return start + zeros(size, head) + struct.pack("<II", checksum(size, head), size % 2**32)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :]


def file(name: str, content: bytes | Callable[[], bytes], **others: bytes):
    """Return a writer of one file, and of others in the same folder, whose names have __ for a dot."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content() if callable(content) else content)
        for other, bytes_ in others.items():
            (folder / other.replace("__", ".")).write_bytes(bytes_)
        return folder / name

    return make


def link(name: str, target: str):
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "scan.nii")
    return folder / "scan.nii"


def sparse(folder: Path) -> Path:
    """Write a sparse file of 17 GB that occupies no disk space."""
    path = folder / "scan.nii"
    path.write_bytes(nifti(dim=dims(2048, 2048, 2048))[:352])
    os.truncate(path, 352 + 2 * 2048**3)
    return path


def make_folder(folder: Path) -> Path:
    (folder / "scan.nii.gz").mkdir()
    return folder / "scan.nii.gz"


def pair(folder: Path, kind=nib.Nifti1Pair) -> Path:
    kind(make_ct(), lps_affine()).to_filename(folder / "scan.img")
    return folder / "scan.img"


def scans(*names: str, content: bytes | None = None, archive: str | None = None):
    """Return a writer of non-DICOM files in a folder or a zip."""

    def make(folder: Path) -> Path:
        place = folder / "study"
        place.mkdir()
        for name in names:
            (place / name).write_bytes(RAW if content is None else content)
        if archive is None:
            return place
        with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name in names:
                zipped.write(place / name, f"study/{name}")
        return folder / archive

    return make


def damaged(path: Path) -> Path:
    path.write_bytes(flipped(path.read_bytes(), path.stat().st_size // 2))
    return path


def members(raw: bytes, length: int) -> bytes:
    """Return the same bytes in gzip members of a fixed length, as bgzip writes them."""
    return b"".join(pack(raw[start : start + length]) for start in range(0, len(raw), length))


def without_codes(**fields) -> bytes:
    return nifti(qform_code=0, sform_code=0, **fields)


def raw_scan() -> np.ndarray:
    return (make_ct() + 1024).astype(np.uint16)


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
CUBE = dims(1024, 1024, 1024)
RAW = nifti()
GZ = pack(RAW)
MORE = {"dim": dims(26, 22, 36)}
FEWER = {"dim": dims(26, 22, 9)}
METADATA = CTMetadata(slope=1, intercept=-1024, spacing=SPACING)
READ, GRID, VALUES = CTReadError, CTGeometryError, CTIntensityError

# name: (writer or content of a scan.nii, error, field)
NIFTI = {
    # The file
    "empty .nii": (b"", READ, "sizeof_hdr"),
    "empty .nii.gz": (file("scan.nii.gz", b""), READ, "sizeof_hdr"),
    "text": (b"Findings: the lungs are clear.\n" * 20, READ, "sizeof_hdr"),
    "header cut off": (RAW[:200], READ, "sizeof_hdr"),
    "header alone": (RAW[:352], READ, "file size"),
    "last 99 bytes missing": (RAW[:-99], READ, "file size"),
    "second half missing": (RAW[: len(RAW) // 2], READ, "file size"),
    "bytes after the voxels": (RAW + b"more", READ, "file size"),
    "bytes after zeros after the voxels": (RAW + bytes(16) + b"more", READ, "file size"),
    "17 MB of zeros after the voxels": (file("scan.nii", lambda: RAW + bytes(17 * 2**20)), READ, "file size"),
    "two scans in a folder": (scans("a.nii", "b.nii"), READ, "content"),
    "two scans in a zip": (scans("a.nii", "b.nii", archive="scans.zip"), READ, "content"),
    "a scan cut off, in a folder": (scans("a.nii", content=RAW[:-99]), READ, "file size"),
    "a scan cut off, in a zip": (scans("a.nii", content=RAW[:-99], archive="scans.zip"), READ, "file size"),
    "a scan with a flipped byte, in a zip": (
        lambda folder: damaged(scans("a.nii.gz", content=GZ, archive="scans.zip")(folder)), READ, "content",
    ),
    "a MetaImage in a zip": (scans("a.mha", content=b"", archive="scans.zip"), READ, "content"),
    "wrong magic": (nifti(magic=b"n+7"), READ, "magic"),
    "magic of a pair": (nifti(magic=b"ni1"), READ, "magic"),
    "ANALYZE 7.5 header": (file("scan.nii", lambda: RAW[:344] + bytes(8) + RAW[352:]), READ, "magic"),
    "ANALYZE 7.5 pair": (lambda folder: pair(folder, nib.AnalyzeImage), READ, "suffix"),
    "NIfTI pair": (pair, READ, "suffix"),
    "missing": (lambda folder: folder / "scan.nii.gz", READ, "path"),
    "empty path": (lambda folder: "", READ, "path"),
    "path with a zero byte": (lambda folder: f"{folder}/a\0b.nii", READ, "path"),
    "path too long": (lambda folder: folder / ("x" * 5000 + ".nii"), READ, "path"),
    "folder named .nii.gz": (make_folder, READ, "content"),
    "symlink loop": (link("scan.nii.gz", "scan.nii.gz"), READ, "path"),
    "symlink to /dev/zero": (link("scan.nii", "/dev/zero"), READ, "path"),
    "named pipe": (pipe, READ, "path"),
    "unknown suffix": (file("scan.nii.zst", RAW), READ, "suffix"),
    # Compression
    "gzip header cut off": (file("scan.nii.gz", GZ[:5]), READ, "content"),
    "gzip cut off in the NIfTI header": (file("scan.nii.gz", GZ[:60]), READ, "content"),
    "gzip cut off in the voxels": (file("scan.nii.gz", GZ[: len(GZ) // 2]), READ, "voxel data"),
    "gzip without checksum": (file("scan.nii.gz", GZ[:-8]), READ, "voxel data"),
    "gzip without its last byte": (file("scan.nii.gz", GZ[:-1]), READ, "voxel data"),
    "gzip with a wrong checksum": (file("scan.nii.gz", flipped(GZ, -8)), READ, "voxel data"),
    "gzip with a wrong length": (file("scan.nii.gz", flipped(GZ, -4)), READ, "voxel data"),
    "gzip with a flipped byte": (file("scan.nii.gz", flipped(GZ, len(GZ) // 2)), READ, "voxel data"),
    "garbage after gzip": (file("scan.nii.gz", GZ + b"garbage" * 20), READ, "voxel data"),
    "bytes after zeros after the voxels, gzip": (
        file("scan.nii.gz", pack(RAW + bytes(16) + b"more")), READ, "voxel data",
    ),
    "voxels in a second gzip member too many": (file("scan.nii.gz", GZ + pack(b"more")), READ, "voxel data"),
    "gzip twice": (file("scan.nii.gz", pack(GZ)), READ, "sizeof_hdr"),
    "zip named .nii.gz": (file("scan.nii.gz", b"PK\3\4" + bytes(600)), READ, "sizeof_hdr"),
    "bomb of 1024^3 that says so": (
        file("scan.nii.gz", lambda: bomb(352 + 2 * GIB, nifti(dim=CUBE)[:352])), READ, "compression",
    ),
    "bomb of 1024^3 that claims to be small": (
        file("scan.nii.gz", lambda: bomb(352 + 2 * GIB, RAW[:352])), READ, "voxel data",
    ),
    "small, but claims 1024^3": (file("scan.nii.gz", pack(nifti(dim=CUBE))), READ, "compression"),
    "small and raw, but claims 1024^3": (nifti(dim=CUBE), READ, "file size"),
    "17 GB of nothing (sparse file)": (sparse, READ, "voxel data"),
    # Shape
    "more voxels promised": (nifti(**MORE), READ, "file size"),
    "fewer voxels promised": (nifti(**FEWER), READ, "file size"),
    "more voxels promised, gzip": (file("scan.nii.gz", pack(nifti(**MORE))), READ, "voxel data"),
    "fewer voxels promised, gzip": (file("scan.nii.gz", pack(nifti(**FEWER))), READ, "voxel data"),
    "an axis of 0": (nifti(dim=dims(26, 22, 0)), GRID, "shape"),
    "an axis of -18": (nifti(dim=dims(26, 22, -18)), GRID, "shape"),
    "2-D": (nifti(make_ct()[:, :, 9]), GRID, "shape"),
    "a third axis of 0, and a fourth": (nifti(dim=[4, 26, 22, 0, 0, 1, 1, 1]), GRID, "shape"),
    "4-D over time": (nifti(np.stack([make_ct()] * 3, -1)), GRID, "shape"),
    "5-D": (nifti(make_ct()[..., None, None].repeat(2, 4)), GRID, "shape"),
    "two of a fifth axis": (nifti(make_ct()[..., None, None].repeat(2, 4)), GRID, "shape"),
    "a first axis of 1": (nifti(make_ct()[None]), GRID, "shape"),
    "three slices": (nifti(make_ct()[:, :, 8:11]), GRID, "shape"),
    "32767^3": (nifti(dim=dims(32767, 32767, 32767)), GRID, "shape"),
    "NIfTI-2 of 2^62": (nifti(kind=nib.Nifti2Image, dim=dims(2**62, 2**62, 2**62)), GRID, "shape"),
    "nine axes": (nifti(dim=[9, 26, 22, 18, 1, 1, 1, 1]), GRID, "shape"),
    "-3 axes": (nifti(dim=[-3, 26, 22, 18, 1, 1, 1, 1]), GRID, "shape"),
    "vox_offset 0": (nifti(vox_offset=0), READ, "vox_offset"),
    "vox_offset -352": (nifti(vox_offset=-352), READ, "vox_offset"),
    "vox_offset NaN": (nifti(vox_offset=np.nan), READ, "vox_offset"),
    "vox_offset infinite": (nifti(vox_offset=np.inf), READ, "vox_offset"),
    "vox_offset 352.5": (nifti(vox_offset=352.5), READ, "vox_offset"),
    "vox_offset in the header": (nifti(vox_offset=100), READ, "vox_offset"),
    "vox_offset beyond the end": (nifti(vox_offset=60000), READ, "file size"),
    # Data type
    "RGB": (nifti(np.zeros((26, 22, 18), RGB)), VALUES, "datatype"),
    "complex": (nifti(make_ct().astype(np.complex64)), VALUES, "datatype"),
    "unknown datatype": (nifti(datatype=777), VALUES, "datatype"),
    "bits": (nifti(datatype=1, bitpix=1), VALUES, "datatype"),
    "bitpix of another datatype": (nifti(bitpix=32), READ, "bitpix"),
    # Grid
    "sform NaN": (nifti(**sform(with_element(0, 3, np.nan))), GRID, "affine"),
    "sform infinite": (nifti(**sform(with_element(1, 1, np.inf))), GRID, "affine"),
    "sform zero": (nifti(**sform(np.zeros((4, 4)))), GRID, "affine"),
    "sform singular": (nifti(**sform([[-1.5, -1.25, 0, 0], [0, 0, 0, 0], [0, 0, 2.5, 0]])), GRID, "affine"),
    "sform sheared by 15 degrees": (
        nifti(**sform(lps_affine(shear=0.27)), pixdim=pixdim(1.5, 1.25, 2.59)), GRID, "gantry tilt",
    ),
    "sform mirrors no axis twice": (nifti(**sform(lps_affine()[[1, 1, 2, 3]])), GRID, "affine"),
    "no form codes": (without_codes(), GRID, "grid"),
    "identity alone": (nifti(affine=np.eye(4)), GRID, "grid"),
    "qform and sform conflict (left for right)": (nifti(srow_x=-lps_affine()[0]), GRID, "qform and sform"),
    "template mirrors left and right": (nifti(sform_code=4, srow_x=-lps_affine()[0]), GRID, "qform and sform"),
    "template exchanges two axes": (
        nifti(sform_code=4, srow_x=lps_affine()[1], srow_y=lps_affine()[0]), GRID, "qform and sform",
    ),
    "template of zeros": (nifti(sform_code=4, srow_x=0, srow_y=0, srow_z=0), GRID, "qform and sform"),
    "template NaN": (nifti(sform_code=4, srow_x=np.nan), GRID, "qform and sform"),
    "two scanner forms, turned by 10 degrees": (
        nifti(**sform(lps_affine(10)) | {"qform_code": 1}), GRID, "qform and sform",
    ),
    "template of another size alone": (
        nifti(**sform(1.1 * lps_affine()) | {"sform_code": 4}), GRID, "pixdim",
    ),
    "qform no rotation": (nifti(sform_code=0, quatern_b=2), GRID, "qform"),
    "quaternion of length 1.002": (nifti(quatern_b=0, quatern_c=0, quatern_d=1.002), GRID, "qform"),
    "qform NaN": (nifti(sform_code=0, quatern_c=np.nan), GRID, "affine"),
    "qform_code 77": (nifti(qform_code=77), GRID, "qform_code"),
    "sform_code -1": (nifti(sform_code=-1), GRID, "sform_code"),
    "qfac 5": (nifti(sform_code=0, pixdim=pixdim(*SPACING, qfac=5)), GRID, "qform"),
    "pixdim 0": (nifti(sform_code=0, pixdim=pixdim(1.5, 1.25, 0)), GRID, "pixdim"),
    "pixdim negative": (nifti(sform_code=0, pixdim=pixdim(1.5, -1.25, 2.5)), GRID, "pixdim"),
    "pixdim negative beside an sform, of another length": (
        nifti(**sform(lps_affine()), pixdim=pixdim(1.5, -1, 2.5)), GRID, "pixdim",
    ),
    "pixdim NaN": (nifti(pixdim=pixdim(1.5, 1.25, np.nan)), GRID, "pixdim"),
    "pixdim infinite": (nifti(pixdim=pixdim(1.5, 1.25, np.inf)), GRID, "pixdim"),
    "pixdim and sform conflict": (nifti(**sform(lps_affine()), pixdim=pixdim(1.5, 1.25, 5)), GRID, "pixdim"),
    "spacing of 100 mm": (nifti(affine=lps_affine(spacing=(100, 100, 100))), GRID, "spacing"),
    "spacing of 1 micron": (nifti(affine=lps_affine(spacing=(1e-3, 1e-3, 1e-3))), GRID, "spacing"),
    "in metres": (nifti(affine=lps_affine(spacing=(7e-4, 7e-4, 1e-3)), xyzt_units=1), GRID, "xyzt_units"),
    "in microns": (nifti(xyzt_units=3), GRID, "xyzt_units"),
    "in a unit that NIfTI has not": (nifti(xyzt_units=4), GRID, "xyzt_units"),
    "oblique by 45 degrees": (nifti(affine=lps_affine(45)), GRID, "rotation"),
    # Voxels
    "a NaN": (nifti(with_voxel(np.nan)), VALUES, "voxels"),
    "an infinity": (nifti(with_voxel(np.inf)), VALUES, "voxels"),
    "all NaN": (nifti(np.full((26, 22, 18), np.nan, np.float32)), VALUES, "voxels"),
    "constant": (nifti(np.full((26, 22, 18), -1000, np.int16)), VALUES, "voxels"),
    "1e300": (nifti(with_voxel(0).astype(np.float64) * 1e300), VALUES, "voxel range"),
    "not rescaled, 1024 too high": (nifti(make_ct() + 1024), VALUES, "voxel range"),
    "not rescaled, 8192 too high": (nifti(make_ct() + 8192), VALUES, "voxel range"),
    "8-bit": (nifti(((make_ct() + 1000.0) / 2200 * 255).astype(np.uint8)), VALUES, "voxel range"),
    "normalised to 0..1": (nifti(((make_ct() + 1000) / 2200).astype(np.float32)), VALUES, "voxel range"),
    "rescaled twice": (nifti(make_ct() - 1024), VALUES, "voxel range"),
    "rescaled twice, with metal": (nifti(with_metal() - 1024), VALUES, "soft tissue"),
    "bytes in the other order": (nifti(make_ct().byteswap()), VALUES, "soft tissue"),
    "scl_slope 1e30": (nifti(scl_slope=1e30, scl_inter=0), VALUES, "voxel range"),
    "scl_slope -1": (nifti(scl_slope=-1, scl_inter=0), VALUES, "voxels"),
    "scl_slope -1 and air of 0": (nifti(raw_scan(), scl_slope=-1, scl_inter=1000), VALUES, "voxels"),
    "scl_slope infinite": (nifti(scl_slope=np.inf, scl_inter=0), VALUES, "scl_slope"),
    "scl_inter NaN": (nifti(scl_slope=1, scl_inter=np.nan), VALUES, "scl_slope and scl_inter"),
    "scl_inter 1e30": (nifti(scl_slope=1, scl_inter=1e30), VALUES, "voxel range"),
}  # fmt: skip


# NRRD and MetaImage

NRRD_FIELDS = {
    "type": "short", "dimension": "3", "space": "left-posterior-superior", "sizes": "26 22 18",
    "space directions": "(1.5,0,0) (0,1.25,0) (0,0,2.5)", "space origin": "(40,-25,300)", "endian": "little",
    "encoding": "raw",
}  # fmt: skip
META_FIELDS = {
    "ObjectType": "Image", "NDims": "3", "BinaryData": "True", "BinaryDataByteOrderMSB": "False",
    "CompressedData": "False", "TransformMatrix": "1 0 0 0 1 0 0 0 1", "Offset": "40 -25 300",
    "ElementSpacing": "1.5 1.25 2.5", "DimSize": "26 22 18", "ElementType": "MET_SHORT", "ElementDataFile": "LOCAL",
}  # fmt: skip
VOXELS = make_ct().T.astype("<i2").tobytes()
VOXELS_GZ, VOXELS_Z = pack(VOXELS), zlib.compress(VOXELS)


def nrrd(fields: dict | None = None, content: bytes = VOXELS) -> bytes:
    """Return an NRRD file with some fields changed, or omitted if `None`."""
    merged = {name: value for name, value in (NRRD_FIELDS | (fields or {})).items() if value is not None}
    header = "NRRD0004\n" + "".join(f"{name}: {value}\n" for name, value in merged.items()) + "\n"
    return header.encode() + content


def meta(fields: dict | None = None, content: bytes = VOXELS) -> bytes:
    """Return a MetaImage file with some fields changed, or omitted if `None`; ElementDataFile comes last."""
    merged = META_FIELDS | (fields or {})
    merged["ElementDataFile"] = merged.pop("ElementDataFile")
    header = "".join(f"{name} = {value}\n" for name, value in merged.items() if value is not None)
    return header.encode() + content


TEXT = " ".join(map(str, make_ct().ravel(order="F"))).encode()
FRAMES = "none (1.5,0,0) (0,1.25,0) (0,0,2.5)"
GZIP = {"encoding": "gzip"}
ZLIB = {"CompressedData": "True"}
FLOATS = with_voxel(np.nan).T.astype("<f4").tobytes()


def outside(name: str, header: Callable[[str], bytes], target: str | None = None):
    """Return a writer of a header that points to voxels in its parent folder."""

    def make(folder: Path) -> Path:
        (folder / "inner").mkdir()
        (folder / "voxels.raw").write_bytes(VOXELS)
        (folder / "inner" / name).write_bytes(header(target or str(folder / "voxels.raw")))
        return folder / "inner" / name

    return make


def slices(name: str, header: Callable[[list[str]], bytes], count: int = 18, cut: bool = False):
    """Return a writer of a header and one file per slice, or for the first `count`; `cut` shortens the last file."""

    def make(folder: Path) -> Path:
        names = [f"s{k:02d}.raw" for k in range(18)]
        for k, file_name in enumerate(names[:count]):
            voxels = VOXELS[k * len(VOXELS) // 18 : (k + 1) * len(VOXELS) // 18]
            (folder / file_name).write_bytes(voxels[:-2] if cut and k == count - 1 else voxels)
        (folder / name).write_bytes(header(names))
        return folder / name

    return make


# name: (writer or content of a scan.nrrd, error, field)
NRRD = {
    "empty": (b"", READ, "content"),
    "text": (b"Findings: the lungs are clear.\n" * 20, READ, "content"),
    "no end of the header": (nrrd(content=b"")[:-1], READ, "data file"),
    "no space": (nrrd({"space": None, "space directions": None, "spacings": "1.5 1.25 2.5"}), GRID, "space"),
    "space of a scanner": (nrrd({"space": "scanner-xyz"}), GRID, "space"),
    "no directions": (nrrd({"space directions": None}), GRID, "space directions"),
    "two directions": (nrrd({"space directions": "(1.5,0,0) (0,1.25,0)"}), GRID, "space directions"),
    "direction none": (nrrd({"space directions": "none (0,1.25,0) (0,0,2.5)"}), GRID, "space directions"),
    "direction NaN": (nrrd({"space directions": "(nan,0,0) (0,1.25,0) (0,0,2.5)"}), GRID, "space directions"),
    "directions dependent": (nrrd({"space directions": "(1.5,0,0) (1.5,0,0) (0,0,2.5)"}), GRID, "affine"),
    "directions zero": (nrrd({"space directions": "(0,0,0) (0,0,0) (0,0,0)"}), GRID, "affine"),
    "origin NaN": (nrrd({"space origin": "(nan,0,0)"}), GRID, "space origin"),
    "in metres": (nrrd({"space units": '"m" "m" "m"'}), GRID, "space units"),
    "voxels cut off": (nrrd(content=VOXELS[:-99]), READ, "file size"),
    "no voxels": (nrrd(content=b""), READ, "file size"),
    "voxels too many": (nrrd(content=VOXELS + b"more"), READ, "file size"),
    "gzip cut off": (nrrd(GZIP, VOXELS_GZ[: len(VOXELS_GZ) // 2]), READ, "voxel data"),
    "gzip with a flipped byte": (nrrd(GZIP, flipped(VOXELS_GZ, len(VOXELS_GZ) // 2)), READ, "voxel data"),
    "gzip too short": (nrrd(GZIP, pack(VOXELS[:-2])), READ, "voxel data"),
    "not gzip": (nrrd(GZIP, VOXELS), READ, "voxel data"),
    "bomb of 1024^3 that says so": (
        file("scan.nrrd", lambda: nrrd(GZIP | {"sizes": "1024 1024 1024"}, bomb(2 * GIB))), READ, "compression",
    ),
    "bomb of 1024^3 that claims to be small": (file("scan.nrrd", lambda: nrrd(GZIP, bomb(2 * GIB))), READ, "voxel"),
    "claims 4000^3": (nrrd({"sizes": "4000 4000 4000"}), READ, "voxel data"),
    "claims 10^18 along an axis": (nrrd({"sizes": "26 22 1000000000000000000"}), GRID, "shape"),
    "sizes negative": (nrrd({"sizes": "26 22 -18"}), GRID, "shape"),
    "sizes not whole": (nrrd({"sizes": "26 22 18.5"}), GRID, "shape"),
    "sizes missing": (nrrd({"sizes": None}), GRID, "sizes"),
    "4-D": (nrrd({"dimension": "4", "sizes": "26 22 9 2"}), GRID, "dimension"),
    "2-D": (nrrd({"dimension": "2", "sizes": "26 396"}), GRID, "dimension"),
    "type block": (nrrd({"type": "block", "block size": "2"}), VALUES, "type"),
    "type no spelling of C": (nrrd({"type": "unsigned short long"}), VALUES, "type"),
    "type of another size": (nrrd({"type": "float"}), READ, "file size"),
    "endian missing": (nrrd({"endian": None}), READ, "endian"),
    "endian wrong": (nrrd({"endian": "big"}), VALUES, "soft tissue"),
    "encoding unknown": (nrrd({"encoding": "lzma"}), READ, "encoding"),
    "stated twice": (nrrd().replace(b"sizes: ", b"sizes: 22 26 18\nsizes: ", 1), READ, "sizes"),
    "a NaN": (nrrd({"type": "float"}, FLOATS), VALUES, "voxels"),
    "not rescaled": (nrrd({"type": "ushort"}, raw_scan().T.tobytes()), VALUES, "voxel range"),
    "byte skip of more than there is": (nrrd({"byte skip": "100"}), READ, "file size"),
    "byte skip -1 of fewer bytes": (nrrd({"byte skip": "-1"}, VOXELS[:-99]), READ, "file size"),
    "byte skip -1 of the header's bytes": (nrrd({"byte skip": "-1"}, VOXELS[:-2]), READ, "file size"),
    "byte skip -2": (nrrd({"byte skip": "-2"}), READ, "byte skip"),
    "byte skip -1 of gzip": (nrrd(GZIP | {"byte skip": "-1"}, VOXELS_GZ), READ, "byte skip"),
    "byte skip of 10^9": (nrrd({"byte skip": "1000000000"}), READ, "byte skip"),
    "line skip of more lines than there are": (
        file("scan.nhdr", nrrd({"line skip": "9", "data file": "v.raw"}, b""), v__raw=b"one\n" * 8), READ, "line skip",
    ),
    "ascii, a number missing": (nrrd({"encoding": "ascii"}, TEXT.rpartition(b" ")[0]), READ, "voxel data"),
    "ascii, a number too many": (nrrd({"encoding": "ascii"}, TEXT + b" 7"), READ, "voxel data"),
    "ascii, a word": (nrrd({"encoding": "ascii"}, TEXT.replace(b"-1000", b"air", 1)), READ, "voxel data"),
    "ascii, a number that is none of the type": (
        nrrd({"encoding": "ascii"}, TEXT.replace(b"-1000", b"70000", 1)), READ, "voxel data",
    ),
    "ascii, a fraction": (nrrd({"encoding": "ascii"}, TEXT.replace(b"-1000", b"-0.5", 1)), READ, "voxel data"),
    "ascii NaN": (nrrd({"encoding": "ascii", "type": "float"}, TEXT.replace(b"-1000", b"nan", 1)), VALUES, "voxels"),
    "ascii of nothing": (nrrd({"encoding": "ascii"}, b""), READ, "file size"),
    "ascii, a number of 60 KB": (
        nrrd({"encoding": "ascii"}, TEXT.replace(b"-1000", b"-" + b"0" * 60_000 + b"1000", 1)), READ, "voxel data",
    ),
    "ascii of one long word": (nrrd({"encoding": "ascii"}, b"1" * 300_000), READ, "voxel data"),
    "ascii that claims 1000^3": (nrrd({"encoding": "ascii", "sizes": "1000 1000 1000"}, TEXT), READ, "file size"),
    "encoding bzip2": (nrrd({"encoding": "bzip2"}), READ, "encoding"),
    "two frames": (
        nrrd({"dimension": "4", "sizes": "2 26 22 18", "space directions": FRAMES}, VOXELS * 2), GRID, "dimension",
    ),
    "two frames where one slice is": (
        nrrd({"dimension": "4", "sizes": "18 26 22 1", "space directions": FRAMES}), GRID, "sizes",
    ),
    "time in a direction of space": (
        nrrd({"dimension": "4", "space": "LPS-time", "sizes": "26 22 18 1",
              "space directions": "(1.5,0,0,1) (0,1.25,0,0) (0,0,2.5,0) (0,0,0,1)", "space origin": None}),
        GRID, "space",
    ),
    "two frames of space and time": (
        nrrd({"dimension": "4", "space": "LPST", "sizes": "26 22 9 2",
              "space directions": "(1.5,0,0,0) (0,1.25,0,0) (0,0,2.5,0) (0,0,0,1)", "space origin": None}),
        GRID, "dimension",
    ),
    "17 axes": (nrrd({"dimension": "17"}), GRID, "dimension"),
    "data file missing": (file("scan.nhdr", nrrd({"data file": "voxels.raw"}, b"")), READ, "data file"),
    "data file in the folder above": (
        outside("scan.nhdr", lambda path: nrrd({"data file": "../voxels.raw"}, b"")), READ, "data file",
    ),
    "data file with an absolute path": (
        outside("scan.nhdr", lambda path: nrrd({"data file": path}, b"")), READ, "data file",
    ),
    "data file /etc/passwd": (
        file("scan.nhdr", nrrd({"data file": "../../../../../etc/passwd", "type": "uchar"}, b"")), READ, "data file",
    ),
    "data file list without its last file": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "LIST"}, b"")[:-1] + "\n".join(names).encode(), 17),
        READ, "data file",
    ),
    "data file list that leads out": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "LIST"}, b"")[:-1]
               + "\n".join(["../" + names[0], *names[1:]]).encode()),
        READ, "data file",
    ),
    "data file pattern without its last file": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "s%02d.raw 0 17 1"}, b""), 17), READ, "data file",
    ),
    "data file pattern of too few": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "s%02d.raw 0 16 1"}, b"")), READ, "data file",
    ),
    "data file pattern of 10^9": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "s%02d.raw 0 999999999 1"}, b"")), READ, "data file",
    ),
    "data file pattern of text": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "s%s.raw 0 17 1"}, b"")), READ, "data file",
    ),
    "data file pattern that leads out": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "../s%02d.raw 0 17 1"}, b"")), READ, "data file",
    ),
    "one of the data files cut off": (
        slices("scan.nhdr", lambda names: nrrd({"data file": "s%02d.raw 0 17 1"}, b""), cut=True), READ, "file size",
    ),
    "data file list": (file("scan.nhdr", nrrd({"data file": "LIST"}, b"a.raw\nb.raw\n")), READ, "data file"),
}  # fmt: skip

# name: (writer or content of a scan.mha, error, field)
META = {
    "empty": (b"", READ, "content"),
    "text": (b"Findings: the lungs are clear.\n" * 20, READ, "content"),
    "no TransformMatrix": (meta({"TransformMatrix": None}), GRID, "TransformMatrix"),
    "TransformMatrix NaN": (meta({"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}), GRID, "TransformMatrix"),
    "TransformMatrix of six": (meta({"TransformMatrix": "1 0 0 0 1 0"}), GRID, "TransformMatrix"),
    "TransformMatrix zero": (meta({"TransformMatrix": "0 0 0 0 0 0 0 0 0"}), GRID, "TransformMatrix"),
    "TransformMatrix singular": (meta({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}), GRID, "affine"),
    "TransformMatrix scaled": (meta({"TransformMatrix": "2 0 0 0 2 0 0 0 2"}), GRID, "TransformMatrix"),
    "no ElementSpacing": (meta({"ElementSpacing": None}), GRID, "ElementSpacing"),
    "ElementSpacing 0": (meta({"ElementSpacing": "1.5 1.25 0"}), GRID, "ElementSpacing"),
    "ElementSpacing negative": (meta({"ElementSpacing": "1.5 -1.25 2.5"}), GRID, "ElementSpacing"),
    "in centimetres": (meta({"DistanceUnits": "cm"}), GRID, "DistanceUnits"),
    "voxels cut off": (meta(content=VOXELS[:-99]), READ, "file size"),
    "no voxels": (meta(content=b""), READ, "file size"),
    "zlib cut off": (meta(ZLIB, VOXELS_Z[: len(VOXELS_Z) // 2]), READ, "voxel data"),
    "zlib with a flipped byte": (meta(ZLIB, flipped(VOXELS_Z, len(VOXELS_Z) // 2)), READ, "voxel data"),
    "gzip cut off": (meta(ZLIB, VOXELS_GZ[: len(VOXELS_GZ) // 2]), READ, "voxel data"),
    "CompressedDataSize wrong": (
        meta(ZLIB | {"CompressedDataSize": "7"}, VOXELS_Z), READ, "CompressedDataSize",
    ),
    "bomb of 1024^3": (
        file("scan.mha", lambda: meta(ZLIB | {"DimSize": "1024 1024 1024"}, b"\x78\xda" + zeros(2 * GIB) + bytes(4))),
        READ, "compression",
    ),
    "DimSize of 4000^3": (meta({"DimSize": "4000 4000 4000"}), READ, "voxel data"),
    "DimSize of 10^12 along an axis": (meta({"DimSize": "1000000000000 1 1"}), GRID, "shape"),
    "DimSize negative": (meta({"DimSize": "26 22 -18"}), GRID, "shape"),
    "2-D": (meta({"NDims": "2", "DimSize": "26 396"}), GRID, "NDims"),
    "4-D": (meta({"NDims": "4", "DimSize": "26 22 9 2"}), GRID, "NDims"),
    "three channels": (meta({"ElementNumberOfChannels": "3", "DimSize": "26 22 6"}), READ, "ElementNumberOfChannels"),
    "no numbers in a text": (meta({"BinaryData": "False"}), READ, "voxel data"),
    "BinaryData missing": (meta({"BinaryData": None}), READ, "BinaryData"),
    "two frames": (
        meta({"NDims": "4", "DimSize": "26 22 18 2", "ElementSpacing": "1.5 1.25 2.5 1", "Offset": "40 -25 300 0",
              "TransformMatrix": "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1"}, VOXELS * 2),
        GRID, "NDims",
    ),
    "ElementSize 0": (meta({"ElementSpacing": None, "ElementSize": "1.5 1.25 0"}), GRID, "ElementSpacing"),
    "HeaderSize -1 of fewer bytes": (meta({"HeaderSize": "-1"}, VOXELS[:-2]), READ, "file size"),
    "HeaderSize -1 of zlib": (meta(ZLIB | {"HeaderSize": "-1"}, VOXELS_Z), READ, "HeaderSize"),
    "HeaderSize -2": (meta({"HeaderSize": "-2"}), READ, "HeaderSize"),
    "HeaderSize within this header": (meta({"HeaderSize": "20"}), READ, "HeaderSize"),
    "HeaderSize beyond the end": (
        file("scan.mhd", meta({"HeaderSize": "100", "ElementDataFile": "v.raw"}, b""), v__raw=VOXELS),
        READ, "file size",
    ),
    "bytes behind CompressedDataSize": (
        meta(ZLIB | {"CompressedDataSize": str(len(VOXELS_Z))}, VOXELS_Z + b"more"), READ, "CompressedDataSize",
    ),
    "LIST without its last file": (
        slices("scan.mhd", lambda names: meta({"ElementDataFile": "LIST"}, "\n".join(names).encode()), 17),
        READ, "ElementDataFile",
    ),
    "LIST of too few": (
        slices("scan.mhd", lambda names: meta({"ElementDataFile": "LIST"}, "\n".join(names[1:]).encode())),
        READ, "ElementDataFile",
    ),
    "LIST that leads out": (
        slices("scan.mhd", lambda names: meta({"ElementDataFile": "LIST"}, b"/etc/passwd\n"
               + "\n".join(names[1:]).encode())),
        READ, "ElementDataFile",
    ),
    "pattern without its last file": (
        slices("scan.mhd", lambda names: meta({"ElementDataFile": "s%02d.raw 0 17 1"}, b""), 17),
        READ, "ElementDataFile",
    ),
    "order of bytes missing": (meta({"BinaryDataByteOrderMSB": None}), READ, "BinaryDataByteOrderMSB"),
    "order of bytes neither true nor false": (
        meta({"BinaryDataByteOrderMSB": "perhaps"}), READ, "BinaryDataByteOrderMSB",
    ),
    "ElementType unknown": (meta({"ElementType": "MET_STRING"}), VALUES, "ElementType"),
    "rescale in the header": (
        meta({"ElementToIntensityFunctionSlope": "2"}), READ, "ElementToIntensityFunctionSlope",
    ),
    "not rescaled": (meta({"ElementType": "MET_USHORT"}, raw_scan().T.tobytes()), VALUES, "voxel range"),
    "a NaN": (meta({"ElementType": "MET_FLOAT"}, FLOATS), VALUES, "voxels"),
    "stated twice": (b"DimSize = 22 26 18\n" + meta(), READ, "DimSize"),
    "two origins": (meta({"Position": "-40 -25 300"}), READ, "Offset"),
    "two origins, one of two numbers": (meta({"Position": "40 -25"}), GRID, "Offset"),
    "two orientations": (meta({"Orientation": "-1 0 0 0 1 0 0 0 1"}), READ, "TransformMatrix"),
    "ElementDataFile missing": (file("scan.mhd", meta({"ElementDataFile": "v.raw"}, b"")), READ, "ElementDataFile"),
    "ElementDataFile in the folder above": (
        outside("scan.mhd", lambda path: meta({"ElementDataFile": "../voxels.raw"}, b"")), READ, "ElementDataFile",
    ),
    "ElementDataFile with an absolute path": (
        outside("scan.mhd", lambda path: meta({"ElementDataFile": path}, b"")), READ, "ElementDataFile",
    ),
    "ElementDataFile LIST": (
        file("scan.mhd", meta({"ElementDataFile": "LIST"}, b"a.raw\n"), a__raw=VOXELS), READ, "ElementDataFile",
    ),
}  # fmt: skip


# DICOM


def series(change: Callable | None = None):
    return lambda folder: write_dicom(folder / "series", make_ct(), change=change)


def tags(only: int | None = None, **values):
    """Return a change that sets tags in one slice or in all; `None` deletes a tag."""

    def change(k: int, one) -> None:
        for name, value in values.items() if only in (None, k) else ():
            if value is None:
                delattr(one, name)
            else:
                one.add_new(name, pydicom.datadict.dictionary_VR(name), value)

    return change


def moved(place: Callable[[int], tuple]):
    """Return a change that moves slice k to `place(k)`, in mm."""

    def change(k: int, one) -> None:
        one.ImagePositionPatient = [float(mm) for mm in place(k)]

    return change


def rgb(k: int, one) -> None:
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
    one.BitsAllocated, one.BitsStored, one.HighBit = 8, 8, 7
    one.PixelData = bytes(one.Rows * one.Columns * 3)


def multi_frame(k: int, one) -> None:
    one.NumberOfFrames = 2
    one.PixelData = one.PixelData * 2


def half_pixels(k: int, one) -> None:
    if k == 5:
        one.PixelData = one.PixelData[: len(one.PixelData) // 4 * 2]


def capture(k: int, one) -> None:
    one.SOPClassUID = one.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    one.Modality, one.ImageType = "OT", ["DERIVED", "SECONDARY"]
    for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(one, name)


def other_series(k: int, one) -> None:
    if k >= 9:
        one.SeriesInstanceUID = "1.2.3"


def without_slice(folder: Path) -> Path:
    (write_dicom(folder / "series", make_ct()) / "010.dcm").unlink()
    return folder / "series"


def copied_slice(folder: Path) -> Path:
    """Write two different slices at one position, as in a faulty export."""
    content = pydicom.dcmread(write_dicom(folder / "series", make_ct()) / "010.dcm")
    content.PixelData = content.PixelData[::-1]
    content.SOPInstanceUID = content.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    content.save_as(folder / "series" / "copy.dcm")
    return folder / "series"


def cut_slice(folder: Path) -> Path:
    """Write a series with one file truncated in its pixel data, as after a full disk."""
    path = write_dicom(folder / "series", make_ct()) / "010.dcm"
    path.write_bytes(path.read_bytes()[:-500])
    return folder / "series"


def only_dicomdir(folder: Path) -> Path:
    directory = pydicom.fileset.FileSet()
    (folder / "series").mkdir()
    directory.write(folder / "series")
    return folder / "series"


def empty_folder(folder: Path) -> Path:
    (folder / "series").mkdir()
    return folder / "series"


def zipped(change: Callable[[bytes], bytes] = bytes, prefix: str = "series/"):
    """Return a writer of a zip of the series, with its bytes altered by `change`."""

    def make(folder: Path) -> Path:
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(write_dicom(folder / "series", make_ct()).iterdir()):
                archive.write(path, prefix + path.name)
                path.unlink()
        (folder / "series").rmdir()
        (folder / "scan.zip").write_bytes(change(packed.getvalue()))
        return folder / "scan.zip"

    return make


def encrypted(content: bytes) -> bytes:
    """Set the flag that marks the files of a zip as encrypted."""
    content = bytearray(content)
    for signature, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + place] |= 1
            start = content.find(signature, start + 4)
    return bytes(content)


def zip_bomb(folder: Path) -> Path:
    """Write a zip of 2 MB with one file of 2 GiB, built by hand because zipfile would compress for seconds."""
    data, name, size = zeros(2 * GIB), b"001.dcm", 2 * GIB
    fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 33, checksum(size), len(data), size, len(name), 0)
    local = b"PK\3\4" + fields + name + data
    central = b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    end = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    (folder / "scan.zip").write_bytes(local + central + end)
    return folder / "scan.zip"


# name: (writer, error, field)
DICOM = {
    "empty folder": (empty_folder, READ, "content"),
    "DICOMDIR alone": (only_dicomdir, READ, "content"),
    "missing slice": (without_slice, GRID, "slice spacing"),
    "same slice twice": (copied_slice, GRID, "slice positions"),
    "uneven slices": (series(moved(lambda k: (40, -25, 300 + 2.5 * k + (k % 3) * 0.6))), GRID, "slice spacing"),
    "all slices at one place": (series(moved(lambda k: (40, -25, 300))), GRID, "slice positions"),
    "slices out of line": (series(moved(lambda k: (40 + (k == 7) * 4, -25, 300 + 2.5 * k))), GRID, "slice positions"),
    "gantry tilt": (series(moved(lambda k: (40, -25 + 0.8 * k, 300 + 2.5 * k))), GRID, "gantry tilt"),
    "two series": (series(other_series), READ, "series"),
    "one slice of another size": (
        series(lambda k, one: tags(4, Rows=11, PixelData=one.PixelData[:572])(k, one)), GRID, "Rows and Columns",
    ),
    "one slice of another spacing": (series(tags(4, PixelSpacing=[1, 1])), GRID, "PixelSpacing"),
    "one slice of another orientation": (
        series(tags(4, ImageOrientationPatient=[0, 1, 0, 1, 0, 0])), GRID, "ImageOrientationPatient",
    ),
    "no position": (series(tags(ImagePositionPatient=None)), GRID, "ImagePositionPatient"),
    "no position in one slice": (series(tags(4, ImagePositionPatient=None)), GRID, "ImagePositionPatient"),
    "no orientation": (series(tags(ImageOrientationPatient=None)), GRID, "ImageOrientationPatient"),
    "orientation not orthogonal": (
        series(tags(ImageOrientationPatient=[1, 0, 0, 0.6, 0.8, 0])), GRID, "ImageOrientationPatient",
    ),
    "orientation not of unit length": (
        series(tags(ImageOrientationPatient=[2, 0, 0, 0, 2, 0])), GRID, "ImageOrientationPatient",
    ),
    "orientation zero": (series(tags(ImageOrientationPatient=[0] * 6)), GRID, "ImageOrientationPatient"),
    "orientation of five numbers": (
        series(tags(ImageOrientationPatient=[1, 0, 0, 0, 1])), GRID, "ImageOrientationPatient",
    ),
    "no PixelSpacing": (series(tags(PixelSpacing=None)), GRID, "PixelSpacing"),
    "PixelSpacing 0": (series(tags(PixelSpacing=[0, 0])), GRID, "PixelSpacing"),
    "no rescale": (series(tags(RescaleSlope=None, RescaleIntercept=None)), VALUES, "Rescale"),
    "RescaleSlope 0": (series(tags(RescaleSlope=0)), VALUES, "Rescale"),
    "rescale applied already": (series(tags(RescaleIntercept=0)), VALUES, "voxel range"),
    "MR": (series(tags(Modality="MR")), READ, "Modality"),
    "MONOCHROME1": (series(tags(PhotometricInterpretation="MONOCHROME1")), VALUES, "PhotometricInterpretation"),
    "RGB": (series(rgb), VALUES, "PhotometricInterpretation"),
    "several frames a file": (series(multi_frame), READ, "NumberOfFrames"),
    "secondary capture": (series(capture), READ, "Modality"),
    "half of the pixels in one slice": (series(half_pixels), READ, "pixel data"),
    "one file cut off": (cut_slice, READ, "pixel data"),
    "Rows and Columns 65535": (series(tags(Rows=65535, Columns=65535)), READ, "pixel data"),
    "Rows 0": (series(tags(Rows=0)), READ, "pixel data"),
    "zip bomb": (zip_bomb, READ, "unpacked size"),
    "encrypted zip": (zipped(encrypted), READ, "archive"),
    "zip cut off": (zipped(lambda content: content[: len(content) // 2]), READ, "content"),
    "zip with a flipped byte": (zipped(lambda content: flipped(content, 300)), READ, "content"),
    "zip that is text": (file("scan.zip", b"not a zip" * 50), READ, "content"),
    "empty zip": (file("scan.zip", b"PK\5\6" + bytes(18)), READ, "content"),
}  # fmt: skip


# Arrays and objects


def sitk_image(lps: np.ndarray | None = None) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray((make_ct() if lps is None else lps).T))
    image.SetSpacing(SPACING)
    image.SetOrigin((40, -25, 300))
    return image


def lazy(content: bytes, name: str = "scan.nii.gz"):
    """Return a writer of a nibabel image whose voxels are not yet loaded."""
    return lambda folder: nib.load(file(name, content)(folder))


def replaced(folder: Path) -> nib.Nifti1Image:
    """Return a nibabel image whose file was replaced by a shorter one."""
    image = nib.load(file("scan.nii", RAW)(folder))
    (folder / "scan.nii").write_bytes(RAW[:5000])
    return image


def value(**fields):
    return lambda folder: fields


def closed(folder: Path) -> nib.Nifti1Image:
    """Return a nibabel image of a closed stream."""
    stream = io.BytesIO(RAW)
    image = nib.Nifti1Image.from_stream(stream)
    stream.close()
    return image


GIVEN = {"spacing": SPACING}
# name: (writer, error, field[, options])
OBJECTS = {
    "None": (lambda folder: None, READ, "type"),
    "list": (lambda folder: make_ct().tolist(), READ, "type"),
    "open file": (lambda folder: io.BytesIO(RAW), READ, "type"),
    "bytes": (lambda folder: RAW, READ, "type"),
    "array without spacing": (lambda folder: make_ct(), GRID, "spacing"),
    "spacing of two": (lambda folder: make_ct(), GRID, "spacing", {"spacing": (1, 1)}),
    "spacing a number": (lambda folder: make_ct(), GRID, "spacing", {"spacing": 1.5}),
    "spacing text": (lambda folder: make_ct(), GRID, "spacing", {"spacing": "abc"}),
    "spacing negative": (lambda folder: make_ct(), GRID, "spacing", {"spacing": (-1.5, 1.25, 2.5)}),
    "spacing zero": (lambda folder: make_ct(), GRID, "spacing", {"spacing": (0, 1, 1)}),
    "spacing NaN": (lambda folder: make_ct(), GRID, "spacing", {"spacing": (np.nan, 1, 1)}),
    "array of no axis": (lambda folder: np.array(3.0), GRID, "shape", GIVEN),
    "array of two axes": (lambda folder: make_ct()[0], GRID, "shape", GIVEN),
    "array of five axes": (lambda folder: make_ct()[None, None], GRID, "shape", GIVEN),
    "array with channels first": (lambda folder: make_ct()[None], GRID, "shape", GIVEN),
    "empty array": (lambda folder: np.zeros((0, 22, 18), np.int16), GRID, "shape", GIVEN),
    "objects": (lambda folder: make_ct().astype(object), VALUES, "data type", GIVEN),
    "text in an array": (lambda folder: make_ct().astype(str), VALUES, "data type", GIVEN),
    "truth values": (lambda folder: make_ct() > 0, VALUES, "data type", GIVEN),
    "complex": (lambda folder: make_ct().astype(complex), VALUES, "data type", GIVEN),
    "records": (lambda folder: np.zeros((26, 22, 18), RGB), VALUES, "data type", GIVEN),
    "a NaN": (lambda folder: with_voxel(np.nan), VALUES, "voxels", GIVEN),
    "masked": (lambda folder: np.ma.masked_less(make_ct(), -990), READ, "mask", GIVEN),
    "4 TB by repetition": (
        lambda folder: np.broadcast_to(np.int16(0), (20000, 10000, 10000)), GRID, "shape", GIVEN,
    ),
    "tensor of truth values": (lambda folder: torch.from_numpy(make_ct() > 0), VALUES, "data type", GIVEN),
    "complex tensor": (lambda folder: torch.zeros(9, 9, 9, dtype=torch.complex64), VALUES, "data type", GIVEN),
    "sparse tensor": (lambda folder: torch.from_numpy(make_ct()).to_sparse(), READ, "type", GIVEN),
    "tensor without storage": (lambda folder: torch.empty(9, 9, 9, device="meta"), READ, "type", GIVEN),
    "tensor of 8-bit floats": (lambda folder: torch.zeros(9, 9, 9).to(torch.float8_e4m3fn), READ, "type", GIVEN),
    "vector image": (lambda folder: sitk.Image([20, 20, 20], sitk.sitkVectorInt16, 3), VALUES, "pixel type"),
    "complex image": (lambda folder: sitk.Image([20, 20, 20], sitk.sitkComplexFloat32), VALUES, "pixel type"),
    "label map": (lambda folder: sitk.Image([20, 20, 20], sitk.sitkLabelUInt8), VALUES, "pixel type"),
    "2-D SimpleITK image": (lambda folder: sitk_image()[:, :, 9], GRID, "shape"),
    "SimpleITK image of zeros": (lambda folder: sitk.Image([20, 20, 20], sitk.sitkInt16), VALUES, "voxels"),
    "SimpleITK image with spacing": (lambda folder: sitk_image(), READ, "spacing", GIVEN),
    "MGH": (lambda folder: nib.MGHImage(make_ct().astype(np.int32), lps_affine()), READ, "type"),
    "ANALYZE image": (lambda folder: nib.AnalyzeImage(make_ct(), lps_affine()), READ, "type"),
    "nibabel image without affine": (lambda folder: nib.Nifti1Image(make_ct(), None), GRID, "grid"),
    "lazy image, cut off": (lazy(GZ[: len(GZ) // 2]), READ, "voxel data"),
    "lazy image, cut off, raw": (lazy(RAW[:-99], "scan.nii"), READ, "file size"),
    "lazy image, wrong checksum": (lazy(flipped(GZ, -8)), READ, "voxel data"),
    "lazy image, bomb of 1024^3": (
        lambda folder: lazy(bomb(352 + 2 * GIB, nifti(dim=CUBE)[:352]))(folder), READ, "compression",
    ),
    "lazy image, file exchanged": (replaced, READ, "file size"),
    "lazy image, stream closed": (closed, READ, "content"),
    "value without path and bytes": (value(path=None, bytes=None), READ, "path and bytes"),
    "value with text for bytes": (value(path=None, bytes="NIfTI"), READ, "path and bytes"),
    "value with a number for a path": (value(path=3, bytes=None), READ, "path and bytes"),
    "value with an empty path": (value(path="", bytes=None), READ, "path"),
    "value with garbage": (value(path="scan.nii.gz", bytes=b"\x1f\x8b" + bytes(range(256)) * 4), READ, "content"),
    "value with no bytes": (value(path=None, bytes=b""), READ, "sizeof_hdr"),
    "value cut off": (value(path="scan.nii.gz", bytes=GZ[: len(GZ) // 2]), READ, "voxel data"),
    "other mapping": (value(image="scan.nii.gz"), READ, "type"),
    "spacing where the header states one": (file("scan.nii", RAW), GRID, "spacing", GIVEN),
    "metadata below rescaled voxels": (
        file("scan.nii", without_codes()), VALUES, "voxel minimum", {"metadata": METADATA},
    ),
    "metadata with NaN": (
        file("scan.nii", nifti(raw_scan(), qform_code=0, sform_code=0)), VALUES, "rescale slope",
        {"metadata": CTMetadata(np.nan, -1024, SPACING)},
    ),
    "metadata of another scan": (file("scan.nii", RAW), GRID, "spacing", {"metadata": CTMetadata(1, 0, (1, 1, 1))}),
    "series of a NIfTI": (file("scan.nii", RAW), READ, "series", {"series": 1}),
    "no patient in the window": (
        lambda folder: np.where(make_ct() > -1000, np.int16(-1010), np.int16(-1020)), VALUES, "foreground",
        GIVEN | {"allow_non_hu": True},
    ),
}  # fmt: skip


# Good inputs: each holds `make_ct()`.


def beside_another(folder: Path) -> Path:
    """Write x.nii.gz next to an x.nii with other voxels, which some readers open instead."""
    (folder / "x.nii").write_bytes(nifti(make_ct(seed=5) // 2))
    (folder / "x.nii.gz").write_bytes(GZ)
    return folder / "x.nii.gz"


def with_extension() -> bytes:
    image = nib.Nifti1Image(make_ct(), lps_affine())
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"nothing of importance" * 300))
    return image.to_bytes()


def reoriented(codes: str) -> bytes:
    change = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("LPS"), nib.orientations.axcodes2ornt(codes)
    )
    affine = lps_affine() @ nib.orientations.inv_ornt_aff(change, make_ct().shape)
    return nifti(nib.orientations.apply_orientation(make_ct(), change), affine)


GOOD = {
    ".nii": ("NIfTI", file("scan.nii", RAW)),
    ".nii.gz": ("NIfTI", file("scan.nii.gz", GZ)),
    ".nii.gz beside a .nii": ("NIfTI", beside_another),
    "gzip named .nii": ("NIfTI", file("scan.nii", GZ)),
    "in 41 gzip members": ("NIfTI", file("scan.nii.gz", members(RAW, 512))),
    "zeros after gzip": ("NIfTI", file("scan.nii.gz", GZ + bytes(1000))),
    "NIfTI-2": ("NIfTI", file("scan.nii.gz", pack(nifti(kind=nib.Nifti2Image)))),
    "big-endian": ("NIfTI", file("scan.nii", nifti(endian=">"))),
    "float32": ("NIfTI", file("scan.nii.gz", pack(nifti(make_ct().astype(np.float32))))),
    "float64, stored otherwise": ("NIfTI", file("scan.nii", reoriented("AIR"))),
    "rescaled by the header": ("NIfTI", file("scan.nii", nifti(raw_scan(), scl_slope=1, scl_inter=-1024))),
    "scl_slope 0": ("NIfTI", file("scan.nii", nifti(scl_slope=0, scl_inter=5))),
    "fourth axis of 1": ("NIfTI", file("scan.nii", nifti(make_ct()[..., None]))),
    "header extension of 6 KB": ("NIfTI", file("scan.nii", with_extension())),
    "oblique by 10 degrees": ("NIfTI", file("scan.nii", nifti(affine=lps_affine(10)))),
    "header extension that is none": (
        "NIfTI",
        file("scan.nii", nifti(vox_offset=416)[:348] + b"\1\0\0\0" + b"x" * 64 + RAW[352:]),
    ),
    "qform alone": ("NIfTI", file("scan.nii", nifti(sform_code=0))),
    "sform alone": ("NIfTI", file("scan.nii", nifti(qform_code=0))),
    "NRRD": ("NRRD", file("scan.nrrd", nrrd())),
    "NRRD, gzip": ("NRRD", file("scan.nrrd", nrrd(GZIP, VOXELS_GZ))),
    "NRRD, detached": ("NRRD", file("scan.nhdr", nrrd({"data file": "v.raw"}, b""), v__raw=VOXELS)),
    "MetaImage": ("MetaImage", file("scan.mha", meta())),
    "MetaImage, zlib": (
        "MetaImage",
        file("scan.mha", meta(ZLIB | {"CompressedDataSize": str(len(VOXELS_Z))}, VOXELS_Z)),
    ),
    "MetaImage, detached": ("MetaImage", file("scan.mhd", meta({"ElementDataFile": "v.raw"}, b""), v__raw=VOXELS)),
    "DICOM": ("DICOM", series()),
    "DICOM, zip": ("DICOM", zipped()),
    "array": ("object", lambda folder: make_ct(), GIVEN),
    "array, mask without effect": ("object", lambda folder: np.ma.MaskedArray(make_ct()), GIVEN),
    "tensor with a gradient": ("object", lambda folder: torch.tensor(make_ct()).float().requires_grad_(), GIVEN),
    "SimpleITK image": ("object", lambda folder: sitk_image()),
    "lazy nibabel image": ("object", lazy(GZ)),
    "nibabel image of a stream": ("object", lambda folder: nib.Nifti1Image.from_stream(io.BytesIO(RAW))),
    "value with bytes": ("object", value(path=None, bytes=GZ)),
    "CT-RATE, version 1": (
        "object",
        file("scan.nii", nifti(raw_scan(), qform_code=0, sform_code=0)),
        {"metadata": METADATA},
    ),
}


def _cases() -> list[Case]:
    cases = []
    for kind, table, name in (
        ("NIfTI", NIFTI, "scan.nii"),
        ("NRRD", NRRD, "scan.nrrd"),
        ("MetaImage", META, "scan.mha"),
        ("DICOM", DICOM | LOST, ""),
        ("object", OBJECTS, ""),
    ):
        for title, (content, error, names, *options) in table.items():
            make = file(name, content) if isinstance(content, bytes) else content
            cases.append(Case(f"{kind}: {title}", kind, make, error, names, *options))
    good = [Case(f"good: {title}", kind, make, None, "", *options) for title, (kind, make, *options) in GOOD.items()]
    return cases + good


CASES = _cases()


def command(case: Case, ct: object) -> list[str]:
    """Return the arguments of `diffvp` that report on a case; empty if its input or its options cannot be given so."""
    possible = isinstance(ct, (str, Path)) and ct != "" and "\0" not in str(ct)
    if not possible or not set(case.options) <= {"series", "spacing", "allow_non_hu"}:
        return []
    arguments = ["report", str(ct)]
    if "series" in case.options:
        arguments += ["--series", str(case.options["series"])]
    if "spacing" in case.options:
        arguments += ["--spacing", *map(str, case.options["spacing"])]
    return arguments + ["--allow-non-hu"] * bool(case.options.get("allow_non_hu"))


def peak_mb() -> float:
    """Return the peak memory of this process since the last `reset_peak`, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main(output: str) -> None:
    """Read all cases in this process, one after another, also with `diffvp report`, and write the results."""
    expected = read_ct(make_ct(), SPACING).sha256
    results = {}
    streams = tempfile.TemporaryFile()
    before, runner = (os.dup(1), os.dup(2)), testing.CliRunner()
    keep_command_tree()
    lines = Path("/proc/self/status").read_text().splitlines()
    size = next(int(line.split()[1]) for line in lines if line.startswith("VmSize")) * 1024
    resource.setrlimit(
        resource.RLIMIT_AS, (size + 3 * GIB, -1)
    )  # beyond this limit: a MemoryError instead of a machine out of memory
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            ct = case.make(Path(folder))
            streams.seek(0)
            streams.truncate()
            # Redirect the file descriptors, not sys.stderr, because C libraries write to these.
            os.dup2(streams.fileno(), 1)
            os.dup2(streams.fileno(), 2)
            reset_peak()
            idle = peak_mb()  # with the imports, which depend on the build of torch
            start = time.perf_counter()
            try:
                tensor, geometry = resample(read_ct(ct, **case.options), SIZE)
                found = "the scan" if geometry.sha256 == expected and tensor.isfinite().all() else "another scan"
                names = message = ""
            except Exception as error:  # noqa: BLE001 - any exception is a result
                found, message = type(error).__name__, str(error)
                names = error.field if isinstance(error, CTInputError) else ""
            seconds, peak = time.perf_counter() - start, peak_mb() - idle
            for stream, descriptor in zip((sys.stdout, sys.stderr), (1, 2), strict=True):
                stream.flush()
                os.dup2(before[descriptor - 1], descriptor)
            streams.seek(0)
            results[case.name] = {
                "found": found, "field": names, "message": message, "seconds": seconds, "peak_mb": peak,
                "printed": streams.read().decode(errors="replace"),
            }  # fmt: skip
            if case.error is not None and (arguments := command(case, ct)):
                said = runner.invoke(cli.app, arguments)
                results[case.name]["command"] = [said.exit_code, said.stdout, said.stderr]
            del ct
    assert "diffvp.modeling_diffvp" not in sys.modules, "`diffvp report` has loaded the model"
    Path(output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
