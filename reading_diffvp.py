# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Read a CT from a file or an object, and validate it: [`read_ct`]. Unusable input raises a [`CTInputError`].

Sizes are checked before memory is allocated: a file that promises more voxels than it holds, or a small one that
would inflate to gigabytes, is refused at once. Each format has its own module: `nifti_diffvp.py`, `nrrd_diffvp.py`
(also MetaImage), `dicom_diffvp.py`.
"""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
from nibabel.spatialimages import SpatialImage

from .folders_diffvp import HEAD, is_dicom, walk_files
from .inflate_diffvp import MAX_BYTES, read_bytes
from .nifti_diffvp import CTMetadata, from_nibabel, load_metadata, read_nifti
from .nrrd_diffvp import read_metaimage, read_nrrd
from .volume_diffvp import (
    GIVEN,
    STATED,
    CTGeometryError,
    CTIntensityError,
    CTReadError,
    CTVolume,
    check_shape,
    is_tensor,
    lps_affine,
    lps_grid,
    make_volume,
)

NIFTI_SUFFIXES = (".nii", ".nii.gz")
FORMATS = dict.fromkeys(NIFTI_SUFFIXES, "NIfTI") | dict.fromkeys((".nrrd", ".nhdr"), "NRRD")
FORMATS |= dict.fromkeys((".mha", ".mhd"), "MetaImage")
SHOWN_FILES = 5  # file names in a message that lists several scans


def read_ct(
    ct,
    spacing: tuple[float, float, float] | None = None,
    allow_non_hu: bool = False,
    metadata: CTMetadata | None = None,
    series: int | str | None = None,
    allow_incomplete: bool = False,
) -> CTVolume:
    """Read and validate one CT.

    Args:
        ct: one of:
            a path to a NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr) or MetaImage (.mha, .mhd) file;
            a path to a folder or .zip of DICOM slices, a DICOMDIR or a multi-frame DICOM file (a folder may instead
            hold one scan in the formats above, a .zip one NIfTI file);
            a nibabel NIfTI image, a SimpleITK image, or a `datasets.Nifti` value, decoded or not;
            a NumPy array or torch tensor of HU, **indexed [x, y, z] with x growing to the patient's left, y to
            posterior, z to superior (LPS)**, together with `spacing`.
        spacing: mm per voxel along x, y, z of an array, or of a NIfTI file with a blank header whose array is known to
            be in LPS order. Other files state their own.
        allow_non_hu: accept voxels that are not Hounsfield units (an 8-bit export, a missing rescale). They are used
            unchanged, so set a `hu_window` that fits them. The result is marked `is_hu=False`.
        metadata: rescale and spacing of a NIfTI file from the dataset's table. Used if the header is blank and the
            voxels are raw. If the header states a grid, the two are compared, and a disagreement is an error.
        series: selects one of several DICOM series, by its number in the list that the error message gives, or by its
            UID.
        allow_incomplete: read a DICOM series although files are damaged, or missing at its ends. The volume then has a
            warning.

    Raises:
        CTReadError, CTGeometryError, CTIntensityError: the input is unusable. All three are a `CTInputError`, which is
            a `ValueError`.
    """
    given = {"spacing": spacing, "metadata": metadata, "series": series}
    if isinstance(ct, CTVolume):
        _refuse(ct.source, **given)
        return ct
    if is_tensor(ct):
        try:
            ct = ct.detach().cpu()
            ct = (ct.float() if str(ct.dtype) == "torch.bfloat16" else ct).numpy()
        except (TypeError, RuntimeError) as error:  # sparse, quantised, without storage, or 8-bit floats
            raise CTReadError("tensor", "type", f"{ct.dtype}, {ct.layout}", "a dense tensor of numbers") from error
    ct = unwrapped(ct)
    if isinstance(ct, np.ndarray):
        _refuse("array", metadata=metadata, series=series)
        if np.ma.is_masked(ct):
            raise CTReadError("array", "mask", "some voxels masked", "a value in every voxel")
        if spacing is None:
            raise CTGeometryError("array", "spacing", "missing", "spacing=(x, y, z) in mm")
        ct = np.asarray(ct)
        return make_volume(ct, lps_affine(spacing, "array"), "array", GIVEN, allow_non_hu=allow_non_hu)
    source = _source(ct)
    options = {"spacing": spacing, "allow_non_hu": allow_non_hu, "metadata": metadata}
    if isinstance(ct, dict) and set(ct) == {"path", "bytes"}:  # an undecoded `datasets.Nifti` value
        path, content = ct["path"], ct["bytes"]
        if not isinstance(path, (str, os.PathLike, type(None))) or not isinstance(content, (bytes, type(None))):
            found = f"{type(path).__name__} and {type(content).__name__}"
            raise CTReadError("datasets.Nifti value", "path and bytes", found, "str and bytes, or None for one")
        if content is None and isinstance(path, str) and "://" in path:
            content = read_remote(path)
        if content is not None:
            _refuse(source, series=series)
            return read_nifti(content, Path(path).name if path else "NIfTI bytes", **options)
        if path is None:
            raise CTReadError("datasets.Nifti value", "path and bytes", "None", "one of the two")
        return read_ct(path, spacing, allow_non_hu, metadata, series, allow_incomplete)
    if isinstance(ct, SpatialImage):
        _refuse(source, series=series)
        return from_nibabel(ct, source, **options)
    if is_simpleitk(ct):
        _refuse(source, **given)
        return _from_simpleitk(ct, source, allow_non_hu)
    if not isinstance(ct, (str, os.PathLike)):
        expected = "a path, a nibabel or SimpleITK image, a datasets.Nifti value or an array"
        raise CTReadError("input", "type", type(ct).__name__, expected)
    path = Path(ct)
    # os.path treats a path that the system refuses (too long, with a zero byte) as missing; pathlib raises.
    folder = os.path.isdir(path)
    if ct == "" or not (folder or os.path.isfile(path)):
        found = "not a regular file" if ct != "" and os.path.lexists(path) else "missing"
        raise CTReadError(source, "path", found, "an existing file or a DICOM folder")
    suffix = path.suffix.lower()
    if folder or suffix == ".zip" or _is_dicom(path, source):
        _refuse(source, spacing=spacing, metadata=metadata)
        from .dicom_diffvp import read_dicom  # imports SimpleITK: 100 MB that other formats do not need

        try:
            return read_dicom(path, series, allow_non_hu, allow_incomplete)
        except CTReadError as error:
            if (error.source, error.field) != (source, "content") or not (folder or suffix == ".zip"):
                raise
            return _read_other(path, error, allow_non_hu, series)
    _refuse(source, series=series)
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return read_nifti(path, source, **options)
    _refuse(source, spacing=spacing, metadata=metadata)
    if suffix in (".nrrd", ".nhdr"):
        return read_nrrd(path, source, allow_non_hu)
    if suffix in (".mha", ".mhd"):
        return read_metaimage(path, source, allow_non_hu)
    expected = ".nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd, or a folder or .zip of DICOM slices, or .dcm"
    raise CTReadError(source, "suffix", repr(path.suffix), expected)


def read_remote(url: str) -> bytes:
    """
    Return the bytes of a scan on the Hub: in a stream, `datasets` names the file (`hf://...`) and leaves it there.

    Raises:
        CTReadError: it cannot be read.
    """
    import fsspec  # a requirement of huggingface_hub, which adds hf:// to it

    if url.startswith("gzip://"):  # "gzip://scan.nii::hf://.../scan.nii.gz" is the content of the compressed file
        url = url.split("::")[-1]
    try:
        with fsspec.open(url, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError) as error:  # ValueError: an unknown protocol
        raise CTReadError(Path(url).name, "path", "unreadable", "a file on the Hub that may be read") from error


def _is_dicom(path: Path, source: str) -> bool:
    """True if a file is DICOM: by its name, or by its content if the name fits no other format."""
    suffix, name = path.suffix.lower(), path.name.upper()
    if suffix == ".dcm" or name == "DICOMDIR":
        return True
    return not name.lower().endswith((*FORMATS, ".gz")) and is_dicom(read_bytes(path, HEAD, source))


def unwrapped(value):
    """Return the item of a 0-dimensional array of objects or strings, and any other value as it is.

    `datasets` returns a scan in such an array if the dataset has NumPy's format.
    """
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "OUT":
        return value.item()
    return value


def _read_other(path: Path, error: CTReadError, allow_non_hu: bool, series: int | str | None) -> CTVolume:
    """Read the only scan of another format in a folder or an archive without DICOM files.

    Args:
        error: the error that there is no DICOM file; raised if there is no other scan, either.
    """
    content, archived = None, not path.is_dir()
    if not archived:
        found = [Path(folder, name) for folder, names in walk_files(path) for name in names]
    else:
        try:
            with zipfile.ZipFile(path) as archive:  # `read_dicom` has checked its limits
                members = {Path(one.filename): one for one in archive.infolist() if _is_scan(one.filename)}
                found = list(members)
                if len(found) == 1 and _format(found[0]) == "NIfTI" and members[found[0]].file_size <= MAX_BYTES:
                    content = archive.read(members[found[0]])
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as damage:
            raise CTReadError(path.name, "content", "a damaged archive", "a zip with valid checksums") from damage
    found = sorted(file for file in found if _is_scan(str(file)))
    if not found:
        raise error
    if len(found) == 1 and not archived:
        return read_ct(found[0], allow_non_hu=allow_non_hu, series=series)
    if content is not None:
        _refuse(path.name, series=series)
        return read_nifti(content, found[0].name, allow_non_hu=allow_non_hu)
    formats = " and ".join(sorted({_format(file) for file in found}))
    names = ", ".join(file.name for file in found[:SHOWN_FILES]) + (", ..." if len(found) > SHOWN_FILES else "")
    expected = f"one scan: {'unpack it and ' if archived else ''}give the path of the file"
    raise CTReadError(path.name, "content", f"no DICOM file, but {formats} ({names})", expected) from error


def _is_scan(name: str) -> bool:
    """True if a name is a file in one of `FORMATS`; False for an archive's folders and macOS's "._" files."""
    return name.lower().endswith(tuple(FORMATS)) and not Path(name).name.startswith("._")


def _format(path: Path) -> str:
    """Name of a file's format, by its suffix."""
    return next(name for suffix, name in FORMATS.items() if path.name.lower().endswith(suffix))


def _source(ct) -> str:
    """Return a name for messages: the file's name without its folders, or the kind of object."""
    if isinstance(ct, (str, os.PathLike)):
        return Path(ct).name or str(ct)
    if isinstance(ct, SpatialImage):
        name = ct.get_filename()
        return Path(name).name if name else "nibabel image"
    return "SimpleITK image" if is_simpleitk(ct) else type(ct).__name__


def is_simpleitk(ct) -> bool:
    """True if a value is a SimpleITK image, without importing SimpleITK."""
    return type(ct).__module__.split(".")[0] == "SimpleITK" and type(ct).__name__ == "Image"


def _refuse(source: str, **arguments) -> None:
    """Refuse arguments that this kind of source cannot use, instead of ignoring them."""
    for name, value in arguments.items():
        if value is not None:
            use = {
                "spacing": "arrays and NIfTI files with a blank header",
                "metadata": "NIfTI files",
                "series": "DICOM",
            }
            raise CTReadError(source, name, repr(value), f"none: {name}= (--{name}) is for {use[name]}")


def _from_simpleitk(image, source: str, allow_non_hu: bool) -> CTVolume:
    import SimpleITK

    kind = image.GetPixelIDTypeAsString()
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in kind or "label" in kind:
        raise CTIntensityError(source, "pixel type", kind, "one real number per voxel")
    check_shape(image.GetSize(), source)
    while image.GetDimension() > 3:
        image = image[(slice(None),) * (image.GetDimension() - 1) + (0,)]
    affine = lps_grid(np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing(), np.array(image.GetOrigin()))
    array = SimpleITK.GetArrayFromImage(image).T
    return make_volume(array, affine, source, STATED, allow_non_hu=allow_non_hu)


__all__ = ["CTMetadata", "is_simpleitk", "load_metadata", "read_ct", "unwrapped"]
