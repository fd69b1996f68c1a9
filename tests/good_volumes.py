# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""NIfTI, NRRD and MetaImage files as written by real tools, which must be read.

`GOOD` holds a name and a writer of each. The writer takes an empty folder and returns the path. All files hold
`make_ct()` on the grid of `bad_inputs.lps_affine()`.
"""

import gzip
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from .bad_inputs import (
    GZIP,
    RAW,
    TEXT,
    VOXELS,
    VOXELS_GZ,
    VOXELS_Z,
    ZLIB,
    file,
    lps_affine,
    meta,
    nifti,
    nrrd,
    pack,
    pixdim,
    scans,
    sform,
    sitk_image,
    slices,
)
from .ct_samples import make_ct

MNI = 4  # the form code of a template
# HU = 2000 - 0.5 x stored
FALLING = ((2000 - make_ct().astype(np.int32)) * 2).astype(np.uint16)
FALLS = {"scl_slope": -0.5, "scl_inter": 2000}


def moved(affine: np.ndarray, x: float, y: float, z: float) -> np.ndarray:
    shifted = affine.copy()
    shifted[:3, 3] += x, y, z
    return shifted


def template(affine: np.ndarray, code: int = MNI, **fields) -> bytes:
    """Return a file with the scanner's qform and an sform of another space."""
    return nifti(**sform(affine) | {"qform_code": 1, "sform_code": code} | fields)


def by_nibabel(kind: type) -> Callable[[Path], Path]:
    """Return a writer of floats that nibabel saves as integers, with a slope and intercept of its choice."""

    def make(folder: Path) -> Path:
        image = nib.Nifti1Image(make_ct().astype(np.float32), lps_affine())
        image.set_data_dtype(kind)
        nib.save(image, folder / "scan.nii.gz")
        return folder / "scan.nii.gz"

    return make


def by_simpleitk(name: str) -> Callable[[Path], Path]:
    """Return a writer of a sequence of one frame, as written by ITK."""

    def make(folder: Path) -> Path:
        sitk.WriteImage(sitk.JoinSeries([sitk_image()]), folder / name)
        return folder / name

    return make


def four(**fields) -> dict:
    """Return the fields of a MetaImage of four axes."""
    return {
        "NDims": "4", "DimSize": "26 22 18 1", "ElementSpacing": "1.5 1.25 2.5 1", "Offset": "40 -25 300 0",
        "TransformMatrix": "1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1",
    } | fields  # fmt: skip


def in_time(space: str, x: int = 1, y: int = 1) -> dict:
    """Return the fields of an NRRD of one frame in space and time; -1 is for an x or y that runs against LPS."""
    return {
        "dimension": "4", "sizes": "26 22 18 1", "space": space, "space origin": f"({40 * x},{-25 * y},300,0)",
        "space directions": f"({1.5 * x},0,0,0) (0,{1.25 * y},0,0) (0,0,2.5,0) (0,0,0,1)",
    }  # fmt: skip


def listed(header: bytes, names: list[str]) -> bytes:
    return header.rstrip(b"\n") + b"\n" + "".join(f"{name}\n" for name in names).encode()


def with_headers(header: bytes, size: int) -> Callable[[Path], Path]:
    """Return a writer of a MetaImage with one file per slice, each with its own header."""

    def make(folder: Path) -> Path:
        names = [f"s{k:02d}.raw" for k in range(18)]
        for k, name in enumerate(names):
            part = VOXELS[k * len(VOXELS) // 18 : (k + 1) * len(VOXELS) // 18]
            (folder / name).write_bytes(b"H" * size + part)
        (folder / "scan.mhd").write_bytes(listed(header, names))
        return folder / "scan.mhd"

    return make


def packed(header: bytes) -> Callable[[Path], Path]:
    """Return a writer of a MetaImage with one compressed file per slice."""

    def make(folder: Path) -> Path:
        names = [f"s{k:02d}.zraw" for k in range(18)]
        for k, name in enumerate(names):
            part = VOXELS[k * len(VOXELS) // 18 : (k + 1) * len(VOXELS) // 18]
            (folder / name).write_bytes(zlib.compress(part))
        (folder / "scan.mhd").write_bytes(listed(header, names))
        return folder / "scan.mhd"

    return make


def below(name: str, header: bytes) -> Callable[[Path], Path]:
    """Return a writer of a header whose voxels are in a subfolder."""

    def make(folder: Path) -> Path:
        (folder / "raw").mkdir()
        (folder / "raw" / "v.raw").write_bytes(VOXELS)
        (folder / name).write_bytes(header)
        return folder / name

    return make


def beside(name: str, content: bytes, **others: bytes) -> Callable[[Path], Path]:
    """Return a writer of a folder with one scan and other files."""

    def make(folder: Path) -> Path:
        (folder / "study" / "inner").mkdir(parents=True)
        file(name, content, **others)(folder / "study" / "inner")
        (folder / "study" / "notes.txt").write_text("Not a scan.\n")
        (folder / "study" / f"._{name}").write_bytes(b"attributes of macOS")
        return folder / "study"

    return make


def zipped(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "study.zip", "w") as archive:
            archive.writestr(f"study/{name}", content)
            archive.writestr("study/notes.txt", "Not a scan.\n")
            archive.writestr(f"__MACOSX/study/._{name}", b"attributes of macOS")
        return folder / "study.zip"

    return make


DIRECTIONS = "(1.5,0,0) (0,1.25,0) (0,0,2.5)"
LONG_HEADER = b"H" * 100
VOXELS_BIG = make_ct().T.astype(">i2").tobytes()
OTHER_ORDER = {"BinaryDataByteOrderMSB": None, "ElementByteOrderMSB": "T"}

GOOD: list[tuple[str, Callable[[Path], Path]]] = [
    # NIfTI
    ("NIfTI of a negative slope", file("scan.nii", nifti(FALLING, **FALLS))),
    ("NIfTI of a negative slope, gzip", file("scan.nii.gz", pack(nifti(FALLING, **FALLS)))),
    ("NIfTI of a negative slope, big-endian", file("scan.nii", nifti(FALLING, endian=">", **FALLS))),
    ("NIfTI of a negative slope, floats", file("scan.nii", nifti(FALLING.astype(np.float32), **FALLS))),
    ("NIfTI of floats as uint16", by_nibabel(np.uint16)),
    ("NIfTI of floats as int16", by_nibabel(np.int16)),
    ("NIfTI of floats as uint32", by_nibabel(np.uint32)),
    ("NIfTI of five axes", file("scan.nii.gz", pack(nifti(make_ct()[..., None, None])))),
    ("NIfTI of seven axes", file("scan.nii", nifti(make_ct()[..., None, None, None, None]))),
    ("NIfTI of four axes, as ITK writes it", by_simpleitk("scan.nii.gz")),
    ("NIfTI with zeros behind the voxels", file("scan.nii", RAW + bytes(16))),
    ("NIfTI with a block of zeros behind the voxels", file("scan.nii", RAW + bytes(2**20))),
    ("NIfTI with zeros behind the voxels, gzip", file("scan.nii.gz", pack(RAW + bytes(700)))),
    ("NIfTI with zeros behind both", file("scan.nii.gz", pack(RAW + bytes(700)) + bytes(700))),
    ("NIfTI in a template's space, moved", file("scan.nii", template(moved(lps_affine(), 12, -7, 30)))),
    ("NIfTI in a template's space, turned", file("scan.nii", template(lps_affine(15)))),
    (
        "NIfTI in a template's space, of another size",
        file("scan.nii", template(moved(np.diag([1.1, 0.9, 1.2, 1]) @ lps_affine(5), 9, 9, 9))),
    ),
    ("NIfTI in a template's space, sheared", file("scan.nii", template(lps_affine(shear=0.2)))),
    ("NIfTI aligned with another scan", file("scan.nii.gz", pack(template(lps_affine(10), code=2)))),
    (
        "NIfTI, scanner's sform beside another qform",
        file("scan.nii", template(lps_affine(), code=1, qform_code=2, qoffset_x=99)),
    ),
    ("NIfTI, two scanner forms, one of them moved", file("scan.nii", template(moved(lps_affine(), 0, 0, 50), code=1))),
    (
        "NIfTI, quaternion rounded to a length above 1",
        file("scan.nii", nifti(quatern_b=0, quatern_c=0, quatern_d=1.0000003)),
    ),
    ("NIfTI, pixdim negative beside an sform", file("scan.nii", nifti(pixdim=pixdim(1.5, -1.25, -2.5), qform_code=0))),
    ("NIfTI, pixdim negative beside both forms", file("scan.nii", nifti(pixdim=pixdim(-1.5, 1.25, 2.5)))),
    # NRRD
    ("NRRD, byte skip -1", file("scan.nrrd", nrrd({"byte skip": "-1"}))),
    ("NRRD, byte skip -1 over a header", file("scan.nrrd", nrrd({"byte skip": "-1"}, LONG_HEADER + VOXELS))),
    (
        "NRRD, byte skip -1, detached",
        file("scan.nhdr", nrrd({"byte skip": "-1", "data file": "v.raw"}, b""), v__raw=LONG_HEADER + VOXELS),
    ),
    ("NRRD, byte skip", file("scan.nrrd", nrrd({"byte skip": "100"}, LONG_HEADER + VOXELS))),
    (
        "NRRD, byte skip in gzip",
        file("scan.nrrd", nrrd(GZIP | {"byte skip": "100"}, gzip.compress(LONG_HEADER + VOXELS))),
    ),
    (
        "NRRD, line skip",
        file("scan.nhdr", nrrd({"line skip": "2", "datafile": "v.raw"}, b""), v__raw=b"one\ntwo\n" + VOXELS),
    ),
    (
        "NRRD, line skip before gzip",
        file("scan.nrrd", nrrd(GZIP | {"line skip": "2"}, b"one\ntwo\n" + VOXELS_GZ)),
    ),
    ("NRRD in ascii", file("scan.nrrd", nrrd({"encoding": "ascii", "endian": None}, TEXT))),
    ("NRRD in text, a line each", file("scan.nrrd", nrrd({"encoding": "txt"}, TEXT.replace(b" ", b"\r\n") + b"\r\n"))),
    (
        "NRRD in ascii, floats with commas, detached",
        file(
            "scan.nhdr",
            nrrd({"encoding": "text", "type": "float", "endian": None, "data file": "v.txt"}, b""),
            v__txt=TEXT.replace(b" ", b".0, "),
        ),
    ),
    (
        "NRRD of one frame, first",
        file(
            "scan.seq.nrrd",
            nrrd(
                {
                    "dimension": "4",
                    "sizes": "1 26 22 18",
                    "space directions": f"none {DIRECTIONS}",
                    "kinds": "list domain domain domain",
                }
            ),
        ),
    ),
    (
        "NRRD of one frame, last, gzip",
        file(
            "scan.nrrd",
            nrrd(
                GZIP
                | {
                    "dimension": "4",
                    "sizes": "26 22 18 1",
                    "space directions": f"{DIRECTIONS} none",
                    "kinds": "domain domain domain list",
                },
                VOXELS_GZ,
            ),
        ),
    ),
    (
        "NRRD of five axes",
        file(
            "scan.nrrd",
            nrrd({"dimension": "5", "sizes": "1 26 22 18 1", "space directions": f"none {DIRECTIONS} none"}),
        ),
    ),
    (
        "NRRD in space and time",
        file(
            "scan.nrrd",
            nrrd(
                {
                    "dimension": "4",
                    "sizes": "26 22 18 1",
                    "space": "left-posterior-superior-time",
                    "space directions": "(1.5,0,0,0) (0,1.25,0,0) (0,0,2.5,0) (0,0,0,1)",
                    "space origin": "(40,-25,300,0)",
                }
            ),
        ),
    ),
    ("NRRD in LPST", file("scan.nrrd", nrrd(in_time("LPST")))),
    ("NRRD in RAST", file("scan.nrrd", nrrd(in_time("RAST", -1, -1)))),
    ("NRRD in LAST", file("scan.nrrd", nrrd(in_time("LAST", 1, -1)))),
    ("NRRD, ./ before the data file", file("scan.nhdr", nrrd(GZIP | {"data file": "./v.gz"}, b""), v__gz=VOXELS_GZ)),
    ("NRRD, data file in a folder below", below("scan.nhdr", nrrd({"data file": "raw/v.raw"}, b""))),
    (
        "NRRD, list of data files",
        slices("scan.nhdr", lambda names: listed(nrrd({"data file": "LIST"}, b""), names)),
    ),
    (
        "NRRD, list of data files of two axes",
        slices("scan.nhdr", lambda names: listed(nrrd({"data file": "LIST 2"}, b""), [f"./{one}" for one in names])),
    ),
    (
        "NRRD, pattern of data files",
        slices("scan.nhdr", lambda names: nrrd({"data file": "./s%02d.raw 0 17 1"}, b"")),
    ),
    ("NRRD with zeros behind the voxels", file("scan.nrrd", nrrd(content=VOXELS + bytes(500)))),
    # MetaImage
    (
        "MetaImage, HeaderSize -1",
        file("scan.mhd", meta({"HeaderSize": "-1", "ElementDataFile": "v.raw"}, b""), v__raw=LONG_HEADER + VOXELS),
    ),
    (
        "MetaImage, HeaderSize",
        file("scan.mhd", meta({"HeaderSize": "100", "ElementDataFile": "v.raw"}, b""), v__raw=LONG_HEADER + VOXELS),
    ),
    (
        "MetaImage, HeaderSize before zlib",
        file(
            "scan.mhd",
            meta(
                ZLIB | {"HeaderSize": "100", "CompressedDataSize": str(len(VOXELS_Z)), "ElementDataFile": "v.z"}, b""
            ),
            v__z=LONG_HEADER + VOXELS_Z,
        ),
    ),
    ("MetaImage, HeaderSize -1, attached", file("scan.mha", meta({"HeaderSize": "-1"}, LONG_HEADER + VOXELS))),
    ("MetaImage of one frame", file("scan.mha", meta(four()))),
    ("MetaImage of one frame, as ITK writes it", by_simpleitk("scan.mhd")),
    ("MetaImage, ElementSize", file("scan.mha", meta({"ElementSpacing": None, "ElementSize": "1.5 1.25 2.5"}))),
    ("MetaImage, ElementSize beside the spacing", file("scan.mha", meta({"ElementSize": "1 1 1"}))),
    (
        "MetaImage, LIST",
        slices("scan.mhd", lambda names: listed(meta({"ElementDataFile": "LIST"}, b""), names)),
    ),
    (
        "MetaImage, LIST of two axes",
        slices("scan.mhd", lambda names: listed(meta({"ElementDataFile": "LIST 2D"}, b""), [f"./{n}" for n in names])),
    ),
    (
        "MetaImage, LIST of files with headers",
        with_headers(meta({"ElementDataFile": "LIST", "HeaderSize": "30"}, b""), 30),
    ),
    (
        "MetaImage, LIST of files with headers of any length",
        with_headers(meta({"ElementDataFile": "LIST", "HeaderSize": "-1"}, b""), 77),
    ),
    ("MetaImage, LIST, zlib", packed(meta(ZLIB | {"ElementDataFile": "LIST"}, b""))),
    ("MetaImage, pattern", slices("scan.mhd", lambda names: meta({"ElementDataFile": "s%02d.raw 0 17 1"}, b""))),
    (
        "MetaImage, pattern from a number on",
        slices("scan.mhd", lambda names: meta({"ElementDataFile": "s%02d.raw 0"}, b"")),
    ),
    ("MetaImage, pattern %02i", slices("scan.mhd", lambda names: meta({"ElementDataFile": "s%02i.raw 0 17 1"}, b""))),
    ("MetaImage, pattern %02u", slices("scan.mhd", lambda names: meta({"ElementDataFile": "s%02u.raw 0 17 1"}, b""))),
    (
        "MetaImage, pattern %2.2d",
        slices("scan.mhd", lambda names: meta({"ElementDataFile": "s%2.2d.raw 0 17 1"}, b"")),
    ),
    ("MetaImage, ./ before the file", below("scan.mhd", meta({"ElementDataFile": "./raw/v.raw"}, b""))),
    ("MetaImage in text", file("scan.mha", meta({"BinaryData": "False", "BinaryDataByteOrderMSB": None}, TEXT))),
    (
        "MetaImage of small letters",
        file("scan.mha", meta({"BinaryData": "true", "BinaryDataByteOrderMSB": "false", "CompressedData": "false"})),
    ),
    *(
        (f"MetaImage, order of bytes {word}", file("scan.mha", meta({"BinaryDataByteOrderMSB": word})))
        for word in ("0", "F", "f")
    ),
    *(
        (f"MetaImage, order of bytes {word}", file("scan.mha", meta({"BinaryDataByteOrderMSB": word}, VOXELS_BIG)))
        for word in ("1", "T", "t")
    ),
    ("MetaImage, ElementByteOrderMSB", file("scan.mha", meta(OTHER_ORDER, VOXELS_BIG))),
    ("MetaImage, one origin under two names", file("scan.mha", meta({"Position": "40 -25 300"}))),
    (
        "MetaImage, one origin under three names",
        file("scan.mha", meta({"Position": "40.0 -25 3e2", "Origin": "40 -25 300"})),
    ),
    ("MetaImage, one orientation under two names", file("scan.mha", meta({"Orientation": "1 0 0 0 1 0 0 0 1"}))),
    ("MetaImage, one rotation under two names", file("scan.mha", meta({"Rotation": "1.0 0 0 0 1.0 0 0 0 1.0"}))),
    ("MetaImage, gzip", file("scan.mha", meta(ZLIB | {"CompressedDataSize": str(len(VOXELS_GZ))}, VOXELS_GZ))),
    ("MetaImage, gzip, detached", file("scan.mhd", meta(ZLIB | {"ElementDataFile": "v.gz"}, b""), v__gz=VOXELS_GZ)),
    (
        "MetaImage of a slope of 1",
        file(
            "scan.mha",
            meta({"ElementToIntensityFunctionSlope": "1.0", "ElementToIntensityFunctionOffset": "0.0"}),
        ),
    ),
    (
        "MetaImage with zeros behind the voxels, zlib",
        file("scan.mha", meta(ZLIB | {"CompressedDataSize": str(len(VOXELS_Z))}, VOXELS_Z + bytes(100))),
    ),
    # Folders and archives with formats other than DICOM
    ("folder of a NIfTI", beside("scan.nii.gz", pack(RAW))),
    ("folder of a NRRD", beside("scan.nrrd", nrrd())),
    ("folder of a MetaImage", beside("scan.mhd", meta({"ElementDataFile": "v.raw"}, b""), v__raw=VOXELS)),
    ("zip of a NIfTI", zipped("scan.nii.gz", pack(RAW))),
    ("zip of a NIfTI, deflated", scans("scan.nii", archive="study.zip")),
]
