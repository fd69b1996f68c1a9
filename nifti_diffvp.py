# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Readers of NIfTI files and images, including datasets whose headers are blank and whose tables hold the grid."""

import ast
import codecs
import csv
import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.nifti1 import Nifti1Pair
from nibabel.spatialimages import HeaderDataError, SpatialImage

from .inflate_diffvp import MAX_BYTES, MAX_PADDING, read_bytes, voxel_bytes
from .volume_diffvp import (
    GIVEN,
    MAX_HU_MINIMUM,
    QFORM,
    STATED,
    CTGeometryError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    check_shape,
    lps_affine,
    make_volume,
)

MAX_HEADER = 2**24  # bytes before the voxels, extensions included
MAX_METADATA_DEVIATION = 0.01  # relative, between two statements of the same spacing
# Minimum cosine between the directions that qform and sform give an axis of the array. In two spaces, both have to
# name the same side (a head may be turned by 45 degrees against a template); in one space, the same direction (to 1
# degree).
MIN_SIDE_COSINE, MIN_SAME_COSINE = 0.7, 0.9998
MAX_QUATERNION = 1.001  # squared length of a quaternion that was rounded; it is 1 without rounding
QUATERNION = ("quatern_b", "quatern_c", "quatern_d")
SCANNER = 1  # form code of the scanner's own space; other codes mean another scan, an atlas or a template

CT_RATE_V1 = "CT-RATE version 1: blank header, grid and rescale from the dataset's metadata"
RADGENOME = "RadGenome-ChestCT preprocessed: identity affine, read as 1 x 1 x 3 mm in LPS order"


@dataclass(frozen=True)
class CTMetadata:
    """Rescale and spacing of a volume with a blank header, from the dataset's table (CT-RATE version 1).

    Attributes:
        slope, intercept: rescale from stored values to Hounsfield units.
        spacing: mm along x, y, z.
    """

    slope: float
    intercept: float
    spacing: tuple[float, float, float]

    @classmethod
    def from_ct_rate(cls, row: Mapping[str, str]) -> "CTMetadata":
        """Build the metadata from a row of CT-RATE's `{train,validation}_metadata.csv`.

        Raises:
            CTReadError: a column is missing or not a number.
            CTGeometryError: patient position or slice orientation differ from those that CT-RATE's array order implies
                (head first, axes of a supine patient).
        """
        source = row.get("VolumeName") or "metadata"
        values = {}
        for column in ("RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing", "ImageOrientationPatient"):
            try:
                values[column] = np.array(ast.literal_eval(row[column]), dtype=float)
            except (KeyError, TypeError, ValueError, SyntaxError) as error:
                raise CTReadError(source, column, repr(row.get(column)), "numbers, as in CT-RATE's table") from error
        # A blank header leaves the order of the array's axes unknown; it follows from these two columns.
        if not np.array_equal(values["ImageOrientationPatient"], [1, 0, 0, 0, 1, 0]):
            raise CTGeometryError(source, "ImageOrientationPatient", row["ImageOrientationPatient"], "[1,0,0,0,1,0]")
        if row.get("PatientPosition") != "HFS":
            raise CTGeometryError(source, "PatientPosition", repr(row.get("PatientPosition")), "HFS")
        lengths = {"XYSpacing": (2,), "ImageOrientationPatient": (6,)}
        for column, numbers in values.items():
            if numbers.shape != lengths.get(column, ()):
                expected = f"{lengths[column][0]} numbers" if column in lengths else "one number"
                raise CTReadError(source, column, repr(row[column]), expected)
        x, y = values["XYSpacing"]
        return cls(float(values["RescaleSlope"]), float(values["RescaleIntercept"]), (x, y, float(values["ZSpacing"])))


def read_table(path: str | os.PathLike) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the fields of each row of a table. The header is row 1.

    Accepts the forms that spreadsheets save: UTF-8 with or without a byte order mark, or UTF-16 with one; commas,
    semicolons or tabs between the fields, whichever splits the header into most columns; a first line `sep=;`. Every
    table of this package is opened by this function.

    Raises:
        CTReadError: the file does not exist or is not a table.
    """
    source, expected = Path(path).name, "a table of commas, semicolons or tabs, in UTF-8"
    try:
        with open(path, "rb") as file:
            wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with open(path, newline="", encoding="utf-16" if wide else "utf-8-sig") as file:
            stated = re.match(r"\ufeff*sep=(.)\r?\n?$", file.readline(80))
            widths = {stated[1]: 1} if stated else {}
            for delimiter in "" if stated else ",;\t":
                file.seek(0)
                try:
                    widths[delimiter] = len(next(csv.reader(file, delimiter=delimiter, strict=True), []))
                except csv.Error:
                    widths[delimiter] = 0
            if not stated:
                file.seek(0)
            for number, fields in enumerate(
                csv.reader(file, delimiter=max(widths, key=widths.__getitem__), strict=True), start=1
            ):
                if number == 1 and fields:
                    fields[0] = fields[0].lstrip("\ufeff")  # a second byte order mark, written by a second program
                yield number, fields
    except UnicodeError as error:
        raise CTReadError(source, "content", "not UTF-8", expected) from error
    except csv.Error as error:
        raise CTReadError(source, "content", f"unreadable ({error})", expected) from error
    except OSError as error:
        raise CTReadError(source, "file", "unreadable", "a readable table") from error


def load_metadata(path: str | os.PathLike) -> dict[str, dict[str, str]]:
    """Load the rows of CT-RATE's metadata table, keyed by `VolumeName`, for [`CTMetadata.from_ct_rate`].

    Raises:
        CTReadError: the file does not exist or is not CT-RATE's metadata table.
    """
    columns, *rows = [fields for _, fields in read_table(path) if fields] or [[]]
    if "VolumeName" not in columns:
        raise CTReadError(Path(path).name, "columns", "without VolumeName", "CT-RATE's metadata table")
    table = [dict(zip(columns, fields, strict=False)) for fields in rows]
    return {row.get("VolumeName", ""): row for row in table}


def read_nifti(
    content: Path | bytes,
    source: str,
    spacing: tuple[float, float, float] | None = None,
    allow_non_hu: bool = False,
    metadata: CTMetadata | None = None,
) -> CTVolume:
    """Read a NIfTI file or its bytes. nibabel parses the header; the voxels have to match the header's count exactly.

    Raises:
        CTReadError, CTGeometryError, CTIntensityError: the file, its grid or its voxels are unusable.
    """
    head = read_bytes(content, 4096 + 1024, source)
    codec = "gzip" if head[:2] == b"\x1f\x8b" else None
    if codec:
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(head)) as stream:
                head = stream.read(540)
        except (OSError, EOFError, zlib.error) as error:
            raise CTReadError(source, "content", "a damaged gzip stream", "a NIfTI file") from error
    header = _nifti_header(head, source)
    _repair(header)
    dtype, shape = header.get_data_dtype(), header.get_data_shape()
    check_shape(shape, source)
    offset = float(header["vox_offset"])
    if not (header.sizeof_hdr + 4 <= offset <= MAX_HEADER and offset.is_integer()):
        raise CTReadError(source, "vox_offset", f"{offset:g}", f"{header.sizeof_hdr + 4} to {MAX_HEADER} bytes")
    offset = int(offset)
    raw = voxel_bytes(content, 0, offset + math.prod(shape) * dtype.itemsize, codec, source)
    array = np.frombuffer(raw, dtype, math.prod(shape), offset).reshape(shape, order="F")
    return _from_header(header, array, source, spacing, allow_non_hu, metadata)


def _nifti_header(head: bytes, source: str) -> nib.Nifti1Header:
    """Parse and check the header in the first bytes of a file, NIfTI-1 or -2, in either byte order."""
    orders = {struct.unpack(order + "i", head[:4])[0]: order for order in "<>"} if len(head) >= 4 else {}
    if 540 in orders:
        kind, length, magic, expected = nib.Nifti2Header, 540, head[4:8], b"n+2\0"
    else:
        kind, length, magic, expected = nib.Nifti1Header, 348, head[344:348], b"n+1\0"
    if length not in orders or len(head) < length:
        found = "cut off" if length in orders else sorted(orders) or "missing"
        raise CTReadError(source, "sizeof_hdr", found, "348 or 540, as in a NIfTI header")
    if magic != expected:
        raise CTReadError(source, "magic", repr(magic), "n+1 or n+2: one NIfTI file with header and voxels")
    # Leaves out the extensions, which may be long, and nibabel's own check, which repairs by guessing and prints.
    header = kind(head[:length], orders[length], check=False)
    if not 1 <= header["dim"][0] <= 7:
        raise CTGeometryError(source, "shape", f"{header['dim'][0]} axes", "three axes")
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise CTIntensityError(source, "datatype", "unknown", "a NIfTI data type that nibabel reads") from error
    if dtype.kind not in "iuf":
        raise CTIntensityError(source, "datatype", dtype.name, "one real number per voxel")
    if int(header["bitpix"]) != dtype.itemsize * 8:
        raise CTReadError(source, "bitpix", int(header["bitpix"]), f"{dtype.itemsize * 8}, for {dtype.name}")
    return header


def _repair(header: nib.Nifti1Header) -> None:
    """Replace values that are out of range but have one meaning only: zero frames, a qfac of 0, and rounded or signed
    lengths. Signs are dropped only beside an sform, which states the directions.
    """
    frames = header["dim"][4 : int(header["dim"][0]) + 1]
    frames[frames == 0] = 1
    pixdim = header["pixdim"]
    if pixdim[0] == 0:
        pixdim[0] = 1  # the standard's meaning of 0
    if int(header["sform_code"]) > 0:
        pixdim[1:4] = np.abs(pixdim[1:4])
    # nibabel refuses a quaternion beyond its threshold, also one that was rounded. Within it, nothing is changed, so
    # that affines equal those of nibabel, which computes in this type.
    quaternion = np.array([header[name] for name in QUATERNION], dtype=np.longdouble)
    with np.errstate(over="ignore", invalid="ignore"):
        square = quaternion @ quaternion
        if abs(header.quaternion_threshold) <= square - 1 <= MAX_QUATERNION - 1:
            for name, value in zip(QUATERNION, quaternion / np.sqrt(square), strict=True):
                header[name] = value


def from_nibabel(
    image: SpatialImage,
    source: str,
    spacing: tuple[float, float, float] | None = None,
    allow_non_hu: bool = False,
    metadata: CTMetadata | None = None,
) -> CTVolume:
    """Read a nibabel image that is in memory or loads lazily from a file. This module reads the voxels of the file.

    If the image's affine differs from its header's, the affine counts: nibabel writes it to the header on saving.

    Raises:
        CTReadError, CTGeometryError, CTIntensityError: the image, its grid or its voxels are unusable.
    """
    if not isinstance(image, Nifti1Pair):
        raise CTReadError(source, "type", type(image).__name__, "a NIfTI image, whose header states left and right")
    header = image.header.copy()
    if header.get_data_dtype().kind not in "iuf":
        raise CTIntensityError(source, "datatype", header.get_data_dtype().name, "one real number per voxel")
    shape = image.shape
    if isinstance(image.dataobj, ArrayProxy):
        shape = (*shape[:3], *(n or 1 for n in shape[3:]))  # zero frames of a file mean one, as in `_repair`
    check_shape(shape, source)
    _repair(header)
    _update_affine(header, image.affine, source)
    if isinstance(image.dataobj, ArrayProxy):
        array = _from_proxy(image.dataobj, shape, source)
        header.set_slope_inter(image.dataobj.slope, image.dataobj.inter)
    else:
        array = np.asanyarray(image.dataobj)
        header.set_slope_inter(1, 0)  # an array in memory is scaled already
    return _from_header(header, array, source, spacing, allow_non_hu, metadata)


def _update_affine(header: nib.Nifti1Header, affine: np.ndarray | None, source: str) -> None:
    """Write an image's affine to a copy of its header if they differ, as nibabel does on saving."""
    with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are refused with the whole affine
        try:
            if affine is None or np.allclose(affine, np.asarray(header.get_best_affine())):
                return
        except (HeaderDataError, ValueError) as error:
            raise CTGeometryError(source, "qform", "invalid", "a rotation") from error
        # nibabel's `set_qform` would fail on an affine that is not finite or singular, so only its results are set.
        header.set_sform(affine, 2)
        header["qform_code"] = 0
        header["pixdim"][1:4] = np.linalg.norm(affine[:3, :3], axis=0)


def _from_proxy(proxy: ArrayProxy, shape: tuple[int, ...], source: str) -> np.ndarray:
    """Read the stored voxels of an image that nibabel has not loaded yet."""
    count = math.prod(shape)
    expected = proxy.offset + count * proxy.dtype.itemsize
    if isinstance(proxy.file_like, (str, os.PathLike)):
        content = Path(proxy.file_like)
    else:
        try:
            proxy.file_like.seek(0)
            content = proxy.file_like.read(min(expected, MAX_BYTES) + MAX_PADDING + 1)
        except (OSError, EOFError, ValueError, zlib.error) as error:  # ValueError: closed
            raise CTReadError(source, "content", "unreadable", "an open, undamaged file") from error
    codec = "gzip" if read_bytes(content, 2, source) == b"\x1f\x8b" else None
    raw = voxel_bytes(content, 0, expected, codec, source)
    return np.frombuffer(raw, proxy.dtype, count, proxy.offset).reshape(shape, order="F")


def _from_header(
    header: nib.Nifti1Header,
    array: np.ndarray,
    source: str,
    spacing: tuple[float, float, float] | None,
    allow_non_hu: bool,
    metadata: CTMetadata | None,
) -> CTVolume:
    """Determine rescale and grid from the header, the voxels and the caller's arguments, and make the volume."""
    try:
        # None for a slope of 0, and for NaN, which nibabel writes in place of 0.
        scl_slope, scl_inter = header.get_slope_inter()
        if np.isinf(header["scl_slope"]):
            raise CTIntensityError(source, "scl_slope", "infinite", "a finite number")
    except HeaderDataError as error:
        raise CTIntensityError(source, "scl_slope and scl_inter", "not finite", "finite numbers") from error
    slope, intercept = (1.0, 0.0) if scl_slope is None or scl_inter is None else (float(scl_slope), float(scl_inter))
    affine, layout = _stated_affine(header, source)
    if affine is not None:
        if spacing is not None:
            raise CTGeometryError(
                source,
                "spacing",
                tuple(spacing),
                "none, because the header states one: leave out spacing= (--spacing)",
            )
        if metadata is not None:
            _compare(header, array, slope, intercept, metadata, source)
        volume = make_volume(
            array, affine, source, layout, slope=slope, intercept=intercept, allow_non_hu=allow_non_hu
        )
        stated, zooms = np.linalg.norm(affine[:3, :3], axis=0), header["pixdim"][1:4]
        if not np.allclose(stated, zooms, rtol=MAX_METADATA_DEVIATION):
            found, expected = (" x ".join(f"{mm:.4g}" for mm in lengths) for lengths in (zooms, stated))
            raise CTGeometryError(source, "pixdim", f"{found} mm", f"{expected} mm, as the sform says")
        return volume
    low = _lowest(array, slope, intercept)
    if metadata is not None:
        if spacing is not None:
            raise CTGeometryError(source, "spacing", tuple(spacing), "none, because metadata= (--metadata) states one")
        if (slope, intercept) != (1, 0):
            found = f"{slope:g} and {intercept:g}"
            raise CTIntensityError(
                source, "scl_slope and scl_inter", found, "1 and 0, because the metadata state a rescale"
            )
        if low < 0:
            raise CTIntensityError(
                source, "voxel minimum", f"{low:g} below a blank header",
                "0 or above: raw values, to which the metadata's rescale applies; these seem to be rescaled already",
            )  # fmt: skip
        return make_volume(
            array, lps_affine(metadata.spacing, source), source,
            f"{CT_RATE_V1} (slope {metadata.slope:g}, intercept {metadata.intercept:g})",
            slope=metadata.slope, intercept=metadata.intercept, allow_non_hu=allow_non_hu,
        )  # fmt: skip
    if spacing is not None:
        return make_volume(
            array, lps_affine(spacing, source), source, GIVEN, slope=slope, intercept=intercept,
            allow_non_hu=allow_non_hu,
        )  # fmt: skip
    if _is_radgenome(header, array, low):
        return make_volume(
            array, lps_affine((1, 1, 3), source), source, RADGENOME, slope=slope, intercept=intercept,
            allow_non_hu=allow_non_hu,
        )  # fmt: skip
    raise CTGeometryError(
        source, "grid", "not stated, as qform and sform are unset or an identity",
        "a stated grid, because left and right are unknown without one; for version 1 of CT-RATE pass metadata= "
        "(--metadata); for an array that is known to be in LPS order pass spacing= (--spacing)"
    )  # fmt: skip


def _stated_affine(header: nib.Nifti1Header, source: str) -> tuple[np.ndarray | None, str]:
    """Return the affine that the header states, or `None` if it is unset, and how it was found (`CTVolume.layout`).

    qform and sform may describe two spaces (NIfTI-1, methods 2 and 3): the scanner's, with true millimetres, and a
    template's, to which the sform may also scale and shear. In that case the scanner's space is used, provided that
    both agree on left, front and up.
    """
    codes = {name: int(header[name]) for name in ("qform_code", "sform_code")}
    for name, code in codes.items():
        if not 0 <= code <= 5:
            raise CTGeometryError(source, name, code, "0 to 5")
    if not any(codes.values()):
        return None, STATED
    unit = int(header["xyzt_units"]) % 8
    if unit not in (0, 2):
        raise CTGeometryError(source, "xyzt_units", {1: "metres", 3: "microns"}.get(unit, unit), "mm, or unknown")
    zooms = np.array(header["pixdim"][1:4], dtype=float)
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        found = " x ".join(f"{mm:g}" for mm in zooms)
        raise CTGeometryError(source, "pixdim", found, "three finite numbers above 0")
    try:
        with np.errstate(invalid="ignore"):  # a NaN is refused with the whole affine
            qform, qform_code = header.get_qform(coded=True)  # None and 0 if unset
            sform, sform_code = header.get_sform(coded=True)
    except (HeaderDataError, ValueError) as error:
        raise CTGeometryError(source, "qform", "invalid", "a rotation") from error
    affine, layout = (qform if sform is None else sform), STATED
    if qform is not None and sform is not None:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in header.get_data_shape()[:3]], [1], indexing="ij"))
        apart = float(np.abs((qform - sform) @ corners.reshape(4, -1)).max())
        if not apart <= max(header.get_zooms()[:3]):
            one_space = qform_code == sform_code
            _check_sides(qform, sform, MIN_SAME_COSINE if one_space else MIN_SIDE_COSINE, apart, source)
            if not one_space and sform_code != SCANNER:
                affine, layout = qform, QFORM
    # An identity, up to signs, is what an unset header holds: 1 mm, the patient's axes, and the origin at exactly 0.
    unset = affine is None or np.array_equal(np.abs(affine), np.eye(4))
    return (None if unset else affine), layout


def _check_sides(qform: np.ndarray, sform: np.ndarray, cosine: float, apart: float, source: str) -> None:
    """Check that qform and sform give each axis of the array the same side; left and right may not be exchanged."""
    lengths = [np.linalg.norm(form[:3, :3], axis=0) for form in (qform, sform)]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (qform[:3, :3] * sform[:3, :3]).sum(axis=0) / (lengths[0] * lengths[1])
    if not (math.isfinite(apart) and (cosines > cosine).all()):
        raise CTGeometryError(
            source, "qform and sform", f"up to {apart:.1f} mm apart",
            "one grid, or two spaces that agree on left, front and up",
        )  # fmt: skip


def _compare(header, array: np.ndarray, slope: float, intercept: float, metadata: CTMetadata, source: str) -> None:
    """Check a header that states a grid against the dataset's table: equal spacing, and voxels already in HU."""
    low = _lowest(array, slope, intercept)
    if low > MAX_HU_MINIMUM:
        raise CTIntensityError(
            source, "voxel minimum", f"{low:g} below a header that states a grid",
            "Hounsfield units with such a header, or raw values with a blank one",
        )  # fmt: skip
    spacing = np.array(header.get_zooms()[:3], dtype=float)
    if not np.allclose(sorted(spacing), sorted(metadata.spacing), rtol=MAX_METADATA_DEVIATION):
        found = " x ".join(f"{mm:.4g}" for mm in spacing)
        expected = " x ".join(f"{mm:.4g}" for mm in metadata.spacing)
        raise CTGeometryError(source, "spacing", f"{found} mm", f"{expected} mm, as the metadata says")


def _lowest(array: np.ndarray, slope: float, intercept: float) -> float:
    """Return the lowest rescaled value: with a negative slope, that of the highest voxel."""
    return float(array.min() if slope > 0 else array.max()) * slope + intercept


def _is_radgenome(header: nib.Nifti1Header, array: np.ndarray, low: float) -> bool:
    """True if a file looks like RadGenome-ChestCT's preprocessing: floats in HU, identity affine, 3 mm slices.

    A chest in 1 mm slices has about as many slices as columns; in 3 mm slices, a third as many.
    """
    sform, _ = header.get_sform(coded=True)  # None if unset
    x, y, z = array.shape[:3]
    return bool(
        sform is not None
        and np.array_equal(sform, np.eye(4))
        and array.dtype.kind == "f"
        and low <= MAX_HU_MINIMUM
        and 150 <= min(x, y)
        and not (x == y and x % 128 == 0)  # a scanner's matrix; RadGenome's volumes are cropped to the patient
        and 3 * z <= 1.5 * max(x, y) + 150
        and z <= 0.6 * min(x, y)
    )


__all__ = ["CT_RATE_V1", "RADGENOME", "CTMetadata", "from_nibabel", "load_metadata", "read_nifti", "read_table"]
