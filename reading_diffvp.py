# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A file or an object in, a validated CT out: [`read_ct`]. Everything else is refused by a [`CTInputError`].

Sizes are checked before anything is allocated: a file that promises more voxels than it holds, or a small one that
would inflate to gigabytes, is refused at once. DICOM has a file of its own, `dicom_diffvp.py`.
"""

import ast
import csv
import gzip
import io
import math
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
from isal import isal_zlib

from .dicom_diffvp import read_dicom
from .volume_diffvp import (
    LPS_TO_RAS,
    MAX_HU_MINIMUM,
    CTGeometryError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    check_shape,
    make_volume,
)

NRRD_SPACES = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior")
MAX_COMPRESSION = 200  # a chest CT deflates to a half or, with much padding, to a tenth; bombs to a thousandth
MAX_METADATA_DEVIATION = 0.01  # relative, between the spacing of a header and that of the dataset's table

STATED = "grid and Hounsfield units as the file states them"
GIVEN = "spacing and LPS order as the caller states them"
CT_RATE_V1 = "CT-RATE version 1: blank header, grid and rescale from the dataset's metadata"
RADGENOME = "RadGenome-ChestCT preprocessed: identity affine, read as 1 x 1 x 3 mm in LPS order"


@dataclass(frozen=True)
class CTMetadata:
    """What a dataset's table says of a volume whose own header is blank (CT-RATE version 1).

    Attributes:
        slope, intercept: stored values to Hounsfield units.
        spacing: mm along x, y, z.
    """

    slope: float
    intercept: float
    spacing: tuple[float, float, float]

    @classmethod
    def from_ct_rate(cls, row: Mapping[str, str]) -> "CTMetadata":
        """From a row of CT-RATE's `{train,validation}_metadata.csv`.

        Raises:
            CTReadError: a column is missing or no number.
            CTGeometryError: the scan lies otherwise than the array order of CT-RATE says (head first, supine axes).
        """
        source = row.get("VolumeName") or "metadata"
        values = {}
        for column in ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing", "ImageOrientationPatient"):
            try:
                values[column] = np.array(ast.literal_eval(row[column]), dtype=float)
            except (KeyError, TypeError, ValueError, SyntaxError) as error:
                raise CTReadError(source, column, repr(row.get(column)), "numbers, as in CT-RATE's table") from error
        # Blank headers keep the array alone, whose order follows from these two columns.
        if not np.array_equal(values["ImageOrientationPatient"], [1, 0, 0, 0, 1, 0]):
            raise CTGeometryError(source, "ImageOrientationPatient", row["ImageOrientationPatient"], "[1,0,0,0,1,0]")
        if row.get("PatientPosition") != "HFS":
            raise CTGeometryError(source, "PatientPosition", repr(row.get("PatientPosition")), "HFS")
        x, y = values["XYSpacing"]
        return cls(float(values["RescaleSlope"]), float(values["RescaleIntercept"]), (x, y, float(values["ZSpacing"])))


def load_metadata(path: str | os.PathLike) -> dict[str, dict[str, str]]:
    """The rows of CT-RATE's metadata table by `VolumeName`, for [`CTMetadata.from_ct_rate`]."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "VolumeName" not in (reader.fieldnames or ()):
            raise CTReadError(Path(path).name, "columns", "without VolumeName", "CT-RATE's metadata table")
        return {row["VolumeName"]: row for row in reader}


def read_ct(
    ct,
    spacing: tuple[float, float, float] | None = None,
    allow_non_hu: bool = False,
    metadata: CTMetadata | None = None,
    series: int | str | None = None,
) -> CTVolume:
    """Read and validate one CT.

    Args:
        ct: a path to NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd), or to a folder or .zip of
            DICOM slices; a nibabel NIfTI image; a SimpleITK image; a `datasets.Nifti` value, decoded or not; or a
            NumPy array or torch tensor of HU, **indexed [x, y, z] with x growing to the patient's left, y to
            posterior, z to superior (LPS)**, together with `spacing`.
        spacing: mm per voxel along x, y, z of an array, or of a NIfTI file whose header is blank and whose array is
            known to be in LPS order. Other files carry their own.
        allow_non_hu: accept voxels that are not Hounsfield units (an 8-bit export, a missing rescale). They are used
            as they are, so set a `hu_window` that fits them. The result is marked `is_hu=False`.
        metadata: what the dataset's table says of a NIfTI file; used where the header is blank and the voxels are
            raw, compared where the header states a grid, and refused where the two disagree.
        series: which DICOM series of several: its number in the list that the refusal gives, or its UID.

    Raises:
        CTReadError, CTGeometryError, CTIntensityError: all three are `CTInputError`, which is a `ValueError`.
    """
    if isinstance(ct, CTVolume):
        return ct
    if isinstance(ct, torch.Tensor):
        ct = ct.detach().cpu()
        ct = (ct.float() if ct.dtype == torch.bfloat16 else ct).numpy()
    if isinstance(ct, np.ndarray):
        if spacing is None:
            raise CTGeometryError("array", "spacing", "missing", "spacing=(x, y, z) in mm")
        return make_volume(ct, _lps_affine(spacing, "array"), "array", GIVEN, allow_non_hu=allow_non_hu)
    source = _source(ct)
    options = {"spacing": spacing, "allow_non_hu": allow_non_hu, "metadata": metadata}
    if isinstance(ct, dict) and set(ct) == {"path", "bytes"}:  # an undecoded `datasets.Nifti` value
        if ct["bytes"] is None:
            if ct["path"] is None:
                raise CTReadError("datasets.Nifti value", "path and bytes", "None", "one of the two")
            return read_ct(Path(ct["path"]), spacing, allow_non_hu, metadata)
        return _read_nifti(ct["bytes"], Path(ct["path"]).name if ct["path"] else "NIfTI bytes", **options)
    if isinstance(ct, nib.spatialimages.SpatialImage):
        return _from_nibabel(ct, source, **options)
    if not isinstance(ct, (sitk.Image, str, os.PathLike)):
        expected = "a path, a nibabel or SimpleITK image, a datasets.Nifti value or an array"
        raise CTReadError("input", "type", type(ct).__name__, expected)
    if isinstance(ct, sitk.Image):
        _refuse(source, spacing=spacing, metadata=metadata, series=series)
        return _from_simpleitk(ct, source, allow_non_hu)
    path = Path(ct)
    if not path.exists():
        raise CTReadError(source, "path", "missing", "an existing file or a DICOM folder")
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".zip":
        _refuse(source, spacing=spacing, metadata=metadata)
        return read_dicom(path, series=series, allow_non_hu=allow_non_hu)
    _refuse(source, series=series)
    if suffix == ".nii" or path.name.lower().endswith(".nii.gz"):
        return _read_nifti(path, source, **options)
    _refuse(source, spacing=spacing, metadata=metadata)
    if suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        return _from_itk_file(path, source, allow_non_hu)
    expected = ".nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or a folder or .zip of DICOM slices"
    raise CTReadError(source, "suffix", repr(path.suffix), expected)


def _source(ct) -> str:
    """A name for messages: the file's name without its folders, or the kind of object."""
    if isinstance(ct, (str, os.PathLike)):
        return Path(ct).name or str(ct)
    if isinstance(ct, nib.spatialimages.SpatialImage):
        return Path(ct.get_filename()).name if ct.get_filename() else "nibabel image"
    return "SimpleITK image" if isinstance(ct, sitk.Image) else type(ct).__name__


def _refuse(source: str, **arguments) -> None:
    """Refuse an argument that this kind of source cannot use, so that it does not go unheeded."""
    for name, value in arguments.items():
        if value is not None:
            use = {
                "spacing": "arrays and NIfTI files with a blank header",
                "metadata": "NIfTI files",
                "series": "DICOM",
            }
            raise CTReadError(source, name, repr(value), f"no {name}= here: it is for {use[name]}")


def _lps_affine(spacing, source: str) -> np.ndarray:
    """RAS affine of an array in LPS order, with the origin at its first voxel."""
    if len(spacing) != 3:
        raise CTGeometryError(source, "spacing", tuple(spacing), "three numbers (x, y, z) in mm")
    return LPS_TO_RAS @ np.diag([*(float(mm) for mm in spacing), 1.0])


def _read_nifti(content: Path | bytes, source: str, **options) -> CTVolume:
    """A NIfTI file or its bytes: the header through nibabel, the voxels with the exact count that it promises."""
    try:
        with open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as file:
            head = file.read(1024)
            if head[:2] == b"\x1f\x8b":
                with gzip.GzipFile(fileobj=io.BytesIO(head + file.read(4096))) as stream:
                    head = stream.read(540)
    except (OSError, EOFError, zlib.error) as error:
        raise CTReadError(source, "content", "unreadable or a damaged gzip stream", "a NIfTI file") from error
    header = _nifti_header(head, source)
    dtype, shape = header.get_data_dtype(), header.get_data_shape()
    if dtype.kind not in "iuf":
        raise CTIntensityError(source, "datatype", dtype.name, "one real number per voxel")
    check_shape(shape, source)
    offset = header.get_data_offset()
    if not header.sizeof_hdr + 4 <= offset <= 2**24:
        raise CTReadError(source, "vox_offset", offset, f"{header.sizeof_hdr + 4} to {2**24} bytes")
    count = math.prod(shape) * dtype.itemsize
    raw = _voxel_bytes(content, offset, count, source)
    array = np.frombuffer(raw, dtype, math.prod(shape), offset).reshape(shape, order="F")
    return _from_header(header, array, source, **options)


def _nifti_header(head: bytes, source: str) -> nib.Nifti1Header:
    """The header in the first bytes of a file, NIfTI-1 or -2 in either byte order."""
    sizes = {struct.unpack(order + "i", head[:4])[0] for order in "<>"} if len(head) >= 4 else set()
    if 540 in sizes:
        kind, length, magic = nib.Nifti2Header, 540, head[4:8] == b"n+2\0"
    else:
        kind, length, magic = nib.Nifti1Header, 348, head[344:348] == b"n+1\0"
    if length not in sizes or len(head) < length:
        raise CTReadError(source, "sizeof_hdr", sorted(sizes) if sizes else "missing", "348 or 540: a NIfTI header")
    if not magic:
        raise CTReadError(source, "magic", "another", "n+1 or n+2: one NIfTI file with header and voxels")
    try:
        header = kind.from_fileobj(io.BytesIO(head), check=False)
        header.check_fix(error_level=35)  # 35 and above, such as a negative spacing, nibabel would repair by a guess
        header.get_data_shape(), header.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, ValueError, KeyError) as error:
        raise CTReadError(source, "header", f"invalid ({error})", "a valid NIfTI header") from error
    return header


def _voxel_bytes(content: Path | bytes, offset: int, count: int, source: str):
    """Header and voxels of a NIfTI file, inflated where it is compressed: exactly `offset + count` bytes."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            compressed = file.read(2) == b"\x1f\x8b"
        data = np.memmap(content, np.uint8, "r")
    else:
        compressed, data = content[:2] == b"\x1f\x8b", np.frombuffer(content, np.uint8)
    expected = offset + count
    if not compressed:
        if len(data) != expected:
            raise CTReadError(source, "file size", f"{len(data)} bytes", f"{expected} bytes, as the header promises")
        return data
    if expected > MAX_COMPRESSION * len(data):
        raise CTReadError(
            source, "compression", f"{expected // len(data)} to 1", f"at most {MAX_COMPRESSION} to 1, as of any CT"
        )
    return inflate(data, expected, source)


def inflate(data, expected: int, source: str) -> bytes:
    """A gzip stream of one or more members that holds exactly `expected` bytes, checksums verified.

    Raises:
        CTReadError: truncated, damaged, shorter or longer.
    """
    parts, missing = [], expected
    try:
        while len(data):
            if not np.any(np.frombuffer(data, np.uint8)[:512]) and not np.any(np.frombuffer(data, np.uint8)):
                break  # gzip allows zeros after the last member
            stream = isal_zlib.decompressobj(wbits=31)
            parts.append(stream.decompress(data, max_length=missing + 1))
            missing -= len(parts[-1])
            if missing < 0:
                raise CTReadError(source, "voxel data", "longer than promised", f"{expected} bytes with the header")
            if not stream.eof:
                raise CTReadError(source, "voxel data", "truncated", f"{expected} bytes with the header")
            data = stream.unused_data
    except isal_zlib.error as error:
        raise CTReadError(source, "voxel data", "a damaged gzip stream", "one that passes its checksum") from error
    if missing:
        raise CTReadError(
            source, "voxel data", f"{expected - missing} bytes", f"{expected} bytes, as the header promises"
        )
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _from_nibabel(image: nib.spatialimages.SpatialImage, source: str, **options) -> CTVolume:
    """An image in memory or a lazy one of a file. Of a file, the voxels are read by this module."""
    if not isinstance(image, nib.nifti1.Nifti1Pair):
        raise CTReadError(source, "type", type(image).__name__, "a NIfTI image, whose header states left and right")
    if image.get_data_dtype().kind not in "iuf":
        raise CTIntensityError(source, "datatype", image.get_data_dtype().name, "one real number per voxel")
    check_shape(image.shape, source)
    header = image.header.copy()
    if nib.is_proxy(image.dataobj):
        array = image.dataobj.get_unscaled()
        header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)
    else:
        array = np.asanyarray(image.dataobj)
        header.set_slope_inter(1, 0)  # such an array is scaled already
    return _from_header(header, array, source, **options)


def _from_header(
    header: nib.Nifti1Header,
    array: np.ndarray,
    source: str,
    spacing: tuple[float, float, float] | None,
    allow_non_hu: bool,
    metadata: CTMetadata | None,
) -> CTVolume:
    """Decide what the stored values and the grid are, from the header, the voxels and what the caller adds."""
    try:
        slope, intercept = header.get_slope_inter()
    except nib.spatialimages.HeaderDataError as error:
        raise CTIntensityError(source, "scl_slope and scl_inter", "not finite", "finite numbers") from error
    slope, intercept = (1.0, 0.0) if slope is None else (float(slope), float(intercept))
    affine = _stated_affine(header, source)
    if affine is not None:
        if spacing is not None:
            raise CTGeometryError(source, "spacing", tuple(spacing), "no spacing= here: the header states one")
        if metadata is not None:
            _compare(header, array, slope, intercept, metadata, source)
        return make_volume(array, affine, source, STATED, slope=slope, intercept=intercept, allow_non_hu=allow_non_hu)
    low = float(array.min()) * slope + intercept
    if metadata is not None and spacing is None:
        if low < 0:
            raise CTIntensityError(
                source, "voxel minimum", f"{low:g} below a blank header",
                "0 or above: raw values that the metadata's rescale applies to. These seem rescaled already",
            )  # fmt: skip
        return make_volume(
            array, _lps_affine(metadata.spacing, source), source,
            f"{CT_RATE_V1} (slope {metadata.slope:g}, intercept {metadata.intercept:g})",
            slope=metadata.slope, intercept=metadata.intercept, allow_non_hu=allow_non_hu,
        )  # fmt: skip
    if spacing is not None:
        return make_volume(
            array, _lps_affine(spacing, source), source, GIVEN, slope=slope, intercept=intercept,
            allow_non_hu=allow_non_hu,
        )  # fmt: skip
    if _is_radgenome(header, array, low):
        return make_volume(array, _lps_affine((1, 1, 3), source), source, RADGENOME, allow_non_hu=allow_non_hu)
    raise CTGeometryError(
        source, "grid", "not stated (qform and sform unset or an identity)",
        "one that is: left and right are unknown without it. For version 1 of CT-RATE pass metadata=; if you know "
        "that the array is in LPS order, pass spacing="
    )  # fmt: skip


def _stated_affine(header: nib.Nifti1Header, source: str) -> np.ndarray | None:
    """The grid that the header states; `None` where it holds nothing but what an unset header holds."""
    try:
        qform, qform_code = header.get_qform(coded=True)
        sform, sform_code = header.get_sform(coded=True)
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        raise CTGeometryError(source, "qform", "invalid", "a rotation") from error
    if not qform_code and not sform_code:
        return None
    if header.get_xyzt_units()[0] not in ("mm", "unknown"):
        raise CTGeometryError(source, "xyzt_units", header.get_xyzt_units()[0], "mm")
    affine = sform if sform_code else qform
    if qform_code and sform_code:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in header.get_data_shape()[:3]], [1], indexing="ij"))
        apart = float(np.abs((qform - sform) @ corners.reshape(4, -1)).max())
        if not apart <= max(header.get_zooms()[:3]):
            raise CTGeometryError(source, "qform and sform", f"up to {apart:.1f} mm apart", "one and the same grid")
    unset = np.array_equal(np.abs(affine), np.eye(4))  # 1 mm, axes along the patient's, and the origin at exactly 0
    return None if unset else affine


def _compare(header, array: np.ndarray, slope: float, intercept: float, metadata: CTMetadata, source: str) -> None:
    """A header that states a grid against the dataset's table: the same spacing, and voxels that are HU already."""
    low = float(array.min()) * slope + intercept
    if low > MAX_HU_MINIMUM:
        raise CTIntensityError(
            source, "voxel minimum", f"{low:g} below a header that states a grid",
            "Hounsfield units below such a header, or a blank header above raw values: the two disagree",
        )  # fmt: skip
    spacing = np.array(header.get_zooms()[:3], dtype=float)
    if not np.allclose(sorted(spacing), sorted(metadata.spacing), rtol=MAX_METADATA_DEVIATION):
        found = " x ".join(f"{mm:.4g}" for mm in spacing)
        expected = " x ".join(f"{mm:.4g}" for mm in metadata.spacing)
        raise CTGeometryError(source, "spacing", f"{found} mm", f"{expected} mm, as the metadata says")


def _is_radgenome(header: nib.Nifti1Header, array: np.ndarray, low: float) -> bool:
    """Whether this is RadGenome-ChestCT's preprocessing: floats in HU below `np.eye(4)`, flat as slices of 3 mm are.

    A chest of 1 mm slices is about as high as it is wide; one of 3 mm slices has a third as many.
    """
    sform, code = header.get_sform(coded=True)
    x, y, z = array.shape[:3]
    return bool(
        code
        and np.array_equal(sform, np.eye(4))
        and array.dtype.kind == "f"
        and low <= MAX_HU_MINIMUM
        and 150 <= min(x, y)
        and 3 * z <= 1.5 * max(x, y) + 150
        and z <= 0.6 * min(x, y)
    )


def _from_itk_file(path: Path, source: str, allow_non_hu: bool) -> CTVolume:
    """NRRD and MetaImage. The header is checked here, for ITK fills what is missing without a word."""
    nrrd = path.suffix.lower() in (".nrrd", ".nhdr")
    with path.open("rb") as file:
        head = file.read(65536)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if nrrd else "MetaImageIO")
    try:
        reader.ReadImageInformation()
        check_shape(reader.GetSize(), source)
        image = reader.Execute()
    except RuntimeError as error:
        raise CTReadError(source, "content", "unreadable", f"a file that {reader.GetImageIO()} can decode") from error
    if nrrd:
        space = reader.GetMetaData("NRRD_space") if reader.HasMetaDataKey("NRRD_space") else "missing"
        if space not in NRRD_SPACES:
            raise CTGeometryError(source, "space", space, f"one of {', '.join(NRRD_SPACES)}")
    elif not any(
        key in head.split(b"ElementDataFile")[0] for key in (b"TransformMatrix", b"Orientation", b"Rotation")
    ):
        raise CTGeometryError(source, "TransformMatrix", "missing", "the orientation of the axes")
    return _from_simpleitk(image, source, allow_non_hu)


def _from_simpleitk(image: sitk.Image, source: str, allow_non_hu: bool) -> CTVolume:
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
        raise CTIntensityError(source, "pixel type", image.GetPixelIDTypeAsString(), "one real number per voxel")
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    check_shape(image.GetSize(), source)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    array = sitk.GetArrayFromImage(image).T
    return make_volume(array, LPS_TO_RAS @ affine, source, STATED, allow_non_hu=allow_non_hu)


__all__ = ["CTMetadata", "load_metadata", "read_ct"]
