# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""From a CT in any usual form to the tensor that the model reads, and back to the voxels of the input file.

Two functions are the seam to the rest of the project: [`read_ct`] (file or object -> validated `CTVolume`) and
[`resample`] (`CTVolume` -> tensor and `CTGeometry`). [`to_input_grid`] and [`save_map`] go the other way.

Axes. A `CTVolume` is indexed [x, y, z] with x growing to the patient's Left, y to Posterior, z to Superior (LPS). The
tensor is indexed [depth, height, width] = [z, y, x]. World coordinates are RAS+ millimetres, as in NIfTI.
"""

import gzip
import hashlib
import math
import os
import tempfile
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch

# Limits of what counts as a chest CT that the model may read; everything else is refused with the reason.
MIN_SPACING, MAX_SPACING = 0.2, 10.0  # mm
MIN_LENGTH = 8  # voxels along each axis
MAX_TILT_COSINE = 0.01  # |cosine| between two grid axes: 0.6 degrees of shear moves a voxel by 3 mm over 300 mm
MAX_ROTATION = 30.0  # degrees between a grid axis and the patient axis that it is taken for
MAX_SLICE_OFFSET = 0.1  # of the slice spacing: how far a DICOM slice may lie from its place in an even stack
MAX_HU_MINIMUM = -500.0  # HU: air is -1000 and every chest CT holds some

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
NRRD_SPACES = ("left-posterior-superior", "right-anterior-superior", "left-anterior-superior")


class CTInputError(ValueError):
    """An input that is not a usable chest CT: what was found in which field of which source, and what was expected.

    Messages carry no header strings, for these may name the patient.
    """

    def __init__(self, source: str, field: str, found, expected: str):
        super().__init__(f"{source}: {field} is {found}; expected {expected}.")
        self.source, self.field, self.found, self.expected = source, field, found, expected

    def __reduce__(self):
        return type(self), (self.source, self.field, self.found, self.expected)


class CTReadError(CTInputError):
    """The source is missing, of an unknown kind, or cannot be decoded."""


class CTGeometryError(CTInputError):
    """The grid is unusable: wrong number of axes, spacing, orientation, tilt, uneven or missing slices."""


class CTIntensityError(CTInputError):
    """The voxels are unusable: not Hounsfield units, not finite, constant."""


@dataclass(frozen=True, eq=False)
class CTVolume:
    """A validated CT.

    Attributes:
        array: voxels [x, y, z] in LPS order, Hounsfield units where `is_hu`; z is the slowest axis
            in memory.
        affine: 4x4, voxel index of the *file's* grid -> RAS+ world mm.
        shape: shape of the file's grid, with a trailing 1 where the file has one.
        axes: which axis of the file each LPS axis (x, y, z) comes from.
        flips: whether each LPS axis runs against that axis of the file.
        spacing: mm along x, y, z.
        source: name of the file or kind of the object.
        is_hu: False where the caller overrode the test for Hounsfield units.
    """

    array: np.ndarray
    affine: np.ndarray
    shape: tuple[int, ...]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing: tuple[float, float, float]
    source: str
    is_hu: bool = True

    @cached_property
    def sha256(self) -> str:
        """Digest of the content: LPS voxels rounded to whole HU, and the shape.

        One scan has one digest in every file format, orientation of storage and number type.
        """
        digest = hashlib.sha256(repr(self.array.shape).encode())
        for index in range(self.array.shape[2]):
            rounded = np.clip(np.rint(self.array[:, :, index].T), -32768, 32767)
            digest.update(np.ascontiguousarray(rounded, dtype="<i2"))
        return digest.hexdigest()


@dataclass(frozen=True)
class CTGeometry:
    """What maps the tensor's grid back to the input file's grid. Serialises to JSON through `to_dict`.

    `size` is the tensor's (depth, height, width). Tensor index o along an axis lies at `offset + scale * o` on the LPS
    grid; `offset` and `scale` are in voxels, in the order x, y, z. The other fields are those of [`CTVolume`].
    """

    source: str
    sha256: str
    is_hu: bool
    shape: tuple[int, ...]
    affine: tuple[tuple[float, ...], ...]
    axes: tuple[int, int, int]
    flips: tuple[bool, bool, bool]
    spacing: tuple[float, float, float]
    size: tuple[int, int, int]
    offset: tuple[float, float, float]
    scale: tuple[float, float, float]

    @property
    def tensor_spacing(self) -> tuple[float, float, float]:
        """Spacing (depth, height, width) of the tensor's grid in mm."""
        return tuple(scale * spacing for scale, spacing in zip(self.scale, self.spacing, strict=True))[::-1]

    @property
    def tensor_affine(self) -> np.ndarray:
        """4x4: tensor index (depth, height, width) -> RAS+ world mm."""
        to_file = np.zeros((4, 4))
        to_file[3, 3] = 1
        for lps, (axis, flip) in enumerate(zip(self.axes, self.flips, strict=True)):
            sign, start = (-1, self.shape[axis] - 1) if flip else (1, 0)
            to_file[axis, 2 - lps] = sign * self.scale[lps]
            to_file[axis, 3] = start + sign * self.offset[lps]
        return np.asarray(self.affine) @ to_file

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "CTGeometry":
        """The inverse of `to_dict`, also after a way through JSON, which turns tuples into lists."""
        frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        frozen["affine"] = tuple(tuple(row) for row in values["affine"])
        return cls(**frozen)


def read_ct(ct, spacing: tuple[float, float, float] | None = None, allow_non_hu: bool = False) -> CTVolume:
    """Read and validate one CT.

    Args:
        ct: a path to NIfTI (.nii, .nii.gz), NRRD (.nrrd, .nhdr), MetaImage (.mha, .mhd) or to a folder that holds
            one DICOM series; a nibabel NIfTI image; a SimpleITK image; a `datasets.Nifti` value, decoded or not; or
            a NumPy array or torch tensor of HU, **indexed [x, y, z] with x growing to the patient's left, y to
            posterior, z to superior (LPS)**, together with `spacing`.
        spacing: mm per voxel along x, y, z of an array. Files carry their own.
        allow_non_hu: accept voxels that are not Hounsfield units (an 8-bit export, a missing rescale). They are used
            as they are, so set a `hu_window` that fits them. The result is marked `is_hu=False`.

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
        return _volume(ct, _array_affine(spacing), "array", allow_non_hu)
    if spacing is not None:
        raise CTGeometryError(
            _source(ct), "spacing", tuple(spacing), "no spacing= here: only bare arrays need one, files have theirs"
        )
    if isinstance(ct, dict) and set(ct) == {"path", "bytes"}:
        return _from_nifti_value(ct, allow_non_hu)
    if isinstance(ct, nib.spatialimages.SpatialImage):
        return _from_nibabel(ct, _source(ct), allow_non_hu)
    if isinstance(ct, sitk.Image):
        return _from_simpleitk(ct, _source(ct), allow_non_hu)
    if isinstance(ct, (str, os.PathLike)):
        return _from_path(Path(ct), allow_non_hu)
    raise CTReadError(
        "input", "type", type(ct).__name__, "a path, a nibabel or SimpleITK image, a datasets.Nifti value or an array"
    )


def _source(ct) -> str:
    """A name for messages: the file's name without its folders, or the kind of object."""
    if isinstance(ct, (str, os.PathLike)):
        return Path(ct).name or str(ct)
    if isinstance(ct, nib.spatialimages.SpatialImage):
        return Path(ct.get_filename()).name if ct.get_filename() else "nibabel image"
    return "SimpleITK image" if isinstance(ct, sitk.Image) else type(ct).__name__


def _from_path(path: Path, allow_non_hu: bool) -> CTVolume:
    source, suffix = _source(path), path.suffix.lower()
    if path.is_dir():
        return _from_dicom_folder(path, allow_non_hu)
    if not path.exists():
        raise CTReadError(source, "path", "missing", "an existing file or a DICOM folder")
    # nibabel, because SimpleITK asked for x.nii.gz reads the data of an x.nii beside it (ITK issue 2243).
    if suffix == ".nii" or path.name.lower().endswith(".nii.gz"):
        try:
            image = nib.load(path)
        except (OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError) as error:
            raise CTReadError(source, "header", "unreadable", "a NIfTI header") from error
        return _from_nibabel(image, source, allow_non_hu)
    if suffix in (".nrrd", ".nhdr", ".mha", ".mhd"):
        return _from_itk_file(path, "NrrdImageIO" if suffix in (".nrrd", ".nhdr") else "MetaImageIO", allow_non_hu)
    raise CTReadError(
        source, "suffix", repr(path.suffix), ".nii, .nii.gz, .nrrd, .nhdr, .mha, .mhd or a folder of DICOM slices"
    )


def _from_nifti_value(value: dict, allow_non_hu: bool) -> CTVolume:
    """An undecoded `datasets.Nifti` value: {"path", "bytes"}."""
    content = value["bytes"]
    if content is None:
        if value["path"] is None:
            raise CTReadError("datasets.Nifti value", "path and bytes", "None", "one of the two")
        return _from_path(Path(value["path"]), allow_non_hu)
    source = Path(value["path"]).name if value["path"] else "NIfTI bytes"
    try:
        image = nib.Nifti1Image.from_bytes(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except (OSError, EOFError, ValueError, zlib.error, nib.spatialimages.HeaderDataError) as error:
        raise CTReadError(source, "bytes", "unreadable", "a NIfTI file") from error
    return _from_nibabel(image, source, allow_non_hu)


def _from_nibabel(image: nib.spatialimages.SpatialImage, source: str, allow_non_hu: bool) -> CTVolume:
    if not isinstance(image, nib.nifti1.Nifti1Pair):
        raise CTReadError(source, "type", type(image).__name__, "a NIfTI image, whose header states left and right")
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise CTIntensityError(source, "data type", dtype.name, "one real number per voxel")
    qform, qform_code = image.get_qform(coded=True)
    sform, sform_code = image.get_sform(coded=True)
    if not qform_code and not sform_code:
        raise CTGeometryError(
            source, "qform_code and sform_code", "0", "one that is set: left and right are unknown without it. If you "
            "know the orientation, pass the array in LPS order with spacing="
        )  # fmt: skip
    if qform_code and sform_code:
        corners = np.array(np.meshgrid(*[(0, n - 1) for n in image.shape[:3]], [1], indexing="ij")).reshape(4, -1)
        apart = float(np.abs((qform - sform) @ corners).max())
        if not apart <= max(image.header.get_zooms()[:3]):
            raise CTGeometryError(source, "qform and sform", f"up to {apart:.1f} mm apart", "one and the same grid")
    _check_shape(image.shape, source)
    try:
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise CTReadError(source, "voxel data", "truncated or damaged", f"{image.shape} voxels") from error
    return _volume(array, image.affine, source, allow_non_hu)


def _from_itk_file(path: Path, image_io: str, allow_non_hu: bool) -> CTVolume:
    source = _source(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(image_io)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise CTReadError(source, "content", "unreadable", f"a file that {image_io} can decode") from error
    # ITK replaces a missing orientation with the identity without a word.
    if image_io == "NrrdImageIO":
        space = reader.GetMetaData("NRRD_space") if reader.HasMetaDataKey("NRRD_space") else "missing"
        if space not in NRRD_SPACES:
            raise CTGeometryError(source, "space", space, f"one of {', '.join(NRRD_SPACES)}")
    else:
        header = path.read_bytes()[:8192].split(b"ElementDataFile")[0]
        if not any(key in header for key in (b"TransformMatrix", b"Orientation", b"Rotation")):
            raise CTGeometryError(source, "TransformMatrix", "missing", "the orientation of the axes")
    return _from_simpleitk(image, source, allow_non_hu)


def _from_simpleitk(image: sitk.Image, source: str, allow_non_hu: bool) -> CTVolume:
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in image.GetPixelIDTypeAsString():
        raise CTIntensityError(source, "pixel type", image.GetPixelIDTypeAsString(), "one real number per voxel")
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    _check_shape(image.GetSize(), source)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return _volume(sitk.GetArrayFromImage(image).T, LPS_TO_RAS @ affine, source, allow_non_hu)


@dataclass(frozen=True)
class _Slice:
    """The tags of one DICOM slice that decide whether and where it belongs to the stack."""

    path: str
    series: str
    position: np.ndarray
    orientation: np.ndarray
    size: tuple[int, ...]
    spacing: tuple[float, ...]


def _from_dicom_folder(folder: Path, allow_non_hu: bool) -> CTVolume:
    """One DICOM series. Slices are sorted by position here, for file names and instance numbers need not follow it."""
    source = _source(folder)
    slices = [found for path in sorted(folder.iterdir()) if path.is_file() for found in [_dicom_slice(path)] if found]
    if not slices:
        raise CTReadError(source, "content", "no DICOM file", "the slices of one CT series")
    counts = {}
    for one in slices:
        counts[one.series] = counts.get(one.series, 0) + 1
    if len(counts) > 1:
        sizes = ", ".join(str(count) for count in sorted(counts.values(), reverse=True))
        raise CTReadError(
            source, "series", f"{len(counts)} (of {sizes} slices)", "one: give the folder of the series that you mean"
        )
    if len(slices) < MIN_LENGTH:
        raise CTGeometryError(source, "number of slices", len(slices), f"at least {MIN_LENGTH}")
    first = slices[0]
    for one in slices:
        for name in ("size", "spacing", "orientation"):
            if not np.allclose(getattr(one, name), getattr(first, name), atol=1e-4):
                raise CTGeometryError(source, f"slice {name}", "not the same in all slices", "one grid")
    row, column = first.orientation.reshape(2, 3)
    normal = np.cross(row, column)
    slices.sort(key=lambda one: float(one.position @ normal))
    positions = np.array([one.position for one in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    thickness = float(step @ normal)
    if thickness < 1e-3:
        raise CTGeometryError(source, "slice positions", "all the same", "one position per slice")
    tilt = math.degrees(math.acos(min(1.0, thickness / float(np.linalg.norm(step)))))
    if math.sin(math.radians(tilt)) > MAX_TILT_COSINE:
        raise CTGeometryError(source, "gantry tilt", f"{tilt:.1f} degrees", "slices stacked at right angles")
    even = positions[0] + np.arange(len(slices))[:, None] * step
    if np.abs((positions - even) @ normal).max() > MAX_SLICE_OFFSET * thickness:
        gaps = np.diff(positions @ normal)
        raise CTGeometryError(
            source,
            "slice spacing",
            f"{gaps.min():.3g} to {gaps.max():.3g} mm",
            "even: no slice missing, duplicate or out of step",
        )
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([one.path for one in slices])
    try:
        array = sitk.GetArrayFromImage(reader.Execute()).T
    except RuntimeError as error:
        raise CTReadError(source, "pixel data", "unreadable", "slices that GDCM can decode") from error
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * first.spacing[0], column * first.spacing[1], step], axis=1)
    affine[:3, 3] = positions[0]
    return _volume(array, LPS_TO_RAS @ affine, source, allow_non_hu)


def _dicom_slice(path: Path) -> _Slice | None:
    """The slice in a file; `None` for a file of another kind, as folders also hold notes and licences."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        with path.open("rb") as file:
            is_dicom = file.read(132)[128:] == b"DICM"
        if is_dicom and path.name != "DICOMDIR":
            raise CTReadError(path.name, "content", "damaged", "a readable DICOM slice") from error
        return None
    tag = {key: reader.GetMetaData(key).strip("\0 ") for key in reader.GetMetaDataKeys()}
    if tag.get("0008|0060", "CT") not in ("CT", ""):
        raise CTReadError(path.name, "Modality", tag["0008|0060"], "CT")
    if tag.get("0028|0004") != "MONOCHROME2" or reader.GetNumberOfComponents() != 1:
        raise CTIntensityError(path.name, "PhotometricInterpretation", tag.get("0028|0004", "missing"), "MONOCHROME2")
    numbers = {}
    for key, name, length in (("0020|0032", "ImagePositionPatient", 3), ("0020|0037", "ImageOrientationPatient", 6)):
        try:
            numbers[name] = np.array([float(number) for number in tag.get(key, "").split("\\")])
        except ValueError as error:
            raise CTGeometryError(path.name, name, "missing or not numbers", f"{length} numbers") from error
        if numbers[name].size != length or not np.isfinite(numbers[name]).all():
            raise CTGeometryError(path.name, name, f"{numbers[name].size} numbers", f"{length} finite numbers")
    size = reader.GetSize()
    if len(size) > 2 and size[2] != 1:
        raise CTReadError(path.name, "number of frames", size[2], "1: one file per slice")
    return _Slice(
        path=str(path),
        series=tag.get("0020|000e", ""),
        position=numbers["ImagePositionPatient"],
        orientation=numbers["ImageOrientationPatient"],
        size=size[:2],
        spacing=reader.GetSpacing()[:2],
    )


def _array_affine(spacing) -> np.ndarray:
    """RAS affine of an array in LPS order, with the origin at its first voxel."""
    if len(spacing) != 3:
        raise CTGeometryError("array", "spacing", tuple(spacing), "three numbers (x, y, z) in mm")
    return LPS_TO_RAS @ np.diag([*(float(mm) for mm in spacing), 1.0])


def _check_shape(shape: tuple[int, ...], source: str):
    if len(shape) != 3 and not (len(shape) == 4 and shape[3] == 1):
        raise CTGeometryError(source, "shape", tuple(shape), "three axes")
    if min(shape[:3]) < MIN_LENGTH:
        raise CTGeometryError(source, "shape", tuple(shape), f"at least {MIN_LENGTH} voxels along each axis")


def _volume(array: np.ndarray, affine: np.ndarray, source: str, allow_non_hu: bool) -> CTVolume:
    """Check geometry and intensities, and view the array in LPS order."""
    shape = array.shape
    _check_shape(shape, source)
    affine = np.asarray(affine, dtype=np.float64)
    _check_affine(affine, source)
    if array.dtype.kind not in "iuf":
        raise CTIntensityError(source, "data type", array.dtype.name, "one real number per voxel")
    array = array.reshape(shape[:3]) if array.ndim == 4 else array
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CTIntensityError(source, "voxels", "NaN or infinite in places", "finite numbers")
    if low == high:
        raise CTIntensityError(source, "voxels", f"{low:g} everywhere", "an image")
    is_hu = low <= MAX_HU_MINIMUM
    if not is_hu and not allow_non_hu:
        raise CTIntensityError(
            source,
            "voxel range",
            f"{low:g} to {high:g}",
            f"Hounsfield units with air below {MAX_HU_MINIMUM:g}: the rescale to HU is missing, or this is an 8-bit "
            "export. allow_non_hu=True accepts it with your own hu_window",
        )
    orientation = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(affine), nib.orientations.axcodes2ornt(("L", "P", "S"))
    )
    axes = tuple(int(axis) for axis in np.argsort(orientation[:, 0]))
    flips = tuple(bool(orientation[axis, 1] < 0) for axis in axes)
    lps = array.transpose(axes)[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
    if abs(lps.strides[2]) < max(map(abs, lps.strides)):
        # Everything below goes through the volume plane by plane along z: make these contiguous in memory. A fixed
        # order also makes the tensor of one scan the same bit for bit in whatever order a file stores it.
        lps = np.asfortranarray(lps)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return CTVolume(
        array=lps,
        affine=affine,
        shape=tuple(int(n) for n in shape),
        axes=axes,
        flips=flips,
        spacing=tuple(float(spacing[axis]) for axis in axes),
        source=source,
        is_hu=is_hu,
    )


def _check_affine(affine: np.ndarray, source: str):
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise CTGeometryError(source, "affine", "not finite", "a 4x4 matrix of finite numbers")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not spacing.all() or abs(np.linalg.det(affine[:3, :3] / np.where(spacing, spacing, 1))) < 1e-3:
        raise CTGeometryError(source, "affine", "singular", "three independent axes")
    if spacing.min() < MIN_SPACING or spacing.max() > MAX_SPACING:
        found = " x ".join(f"{mm:.4g}" for mm in spacing)
        raise CTGeometryError(source, "spacing", f"{found} mm", f"{MIN_SPACING} to {MAX_SPACING} mm along each axis")
    units = affine[:3, :3] / spacing
    tilt = np.abs(units.T @ units - np.eye(3)).max()
    if tilt > MAX_TILT_COSINE:
        found = f"{90 - math.degrees(math.acos(min(1.0, tilt))):.1f} degrees"
        raise CTGeometryError(source, "tilt between the axes (gantry tilt)", found, "axes at right angles")
    rotation = math.degrees(math.acos(min(1.0, np.abs(units).max(axis=0).min())))
    if rotation > MAX_ROTATION:
        raise CTGeometryError(
            source,
            "rotation against the patient's axes",
            f"{rotation:.0f} degrees",
            f"at most {MAX_ROTATION:.0f}: resample the scan to its closest axial grid first",
        )


def resample(
    volume: CTVolume,
    size: tuple[int, int, int],
    spacing: tuple[float, float, float] | None = None,
    crop_foreground: bool = True,
    foreground_hu: float = -1000.0,
    hu_window: tuple[float, float] = (-1000.0, 200.0),
) -> tuple[torch.Tensor, CTGeometry]:
    """Clip to the window, map it to [-1, 1], and interpolate once, trilinearly, to a fixed grid.

    Without `spacing` the (cropped) volume is stretched to `size`: this equals MONAI's Orientation("LPS"),
    ScaleIntensityRange(clip=True), CropForeground, Resize(mode="trilinear"), without its copies of the full grid.
    With `spacing` the grid has that spacing and is centred on the centre of the foreground box, so that a millimetre
    is the same number of voxels in every patient; what lies outside the volume is air.

    Args:
        size: voxels (depth, height, width).
        spacing: mm (depth, height, width), or `None` to stretch.
        crop_foreground: use the bounding box of the voxels above `foreground_hu` instead of the whole volume.

    Returns:
        float32 tensor (1, depth, height, width), and the geometry that leads back.

    Raises:
        CTIntensityError: no voxel lies above `foreground_hu`.
    """
    lengths = volume.array.shape
    box = _foreground_box(volume, foreground_hu) if crop_foreground else tuple((0, n) for n in lengths)
    counts = size[::-1]
    if spacing is None:
        limits = box
        scale = [(stop - start) / count for (start, stop), count in zip(box, counts, strict=True)]
        # align_corners=False: the borders of the first and last voxel stay in place, not their centres.
        offset = [start + 0.5 * step - 0.5 for (start, _), step in zip(box, scale, strict=True)]
    else:
        limits = tuple((0, n) for n in lengths)
        scale = [mm / voxel for mm, voxel in zip(spacing[::-1], volume.spacing, strict=True)]
        offset = [
            (start + stop - 1) / 2 - step * (count - 1) / 2
            for (start, stop), step, count in zip(box, scale, counts, strict=True)
        ]
    weights = [
        _linear_weights(_positions(offset[axis], scale[axis], counts[axis], *limits[axis]), *limits[axis])
        for axis in range(3)
    ]
    (x, along_x), (y, along_y), (z, along_z) = weights
    planes = volume.array[x : x + along_x.shape[1], y : y + along_y.shape[1]].T  # [z, y, x]
    low, high = hu_window
    result = torch.zeros(tuple(size))
    for depth, row in enumerate(along_z):
        touched = row.nonzero().flatten().tolist()
        if touched:
            # In window units with air at 0, so that zero weights outside the volume mean air.
            mixed = sum(_window(planes[z + k], low, high).mul_(row[k]) for k in touched)
            result[depth] = along_y @ mixed @ along_x.T
    tensor = result[None].mul_(2).sub_(1).clamp_(-1, 1)
    geometry = CTGeometry(
        source=volume.source,
        sha256=volume.sha256,
        is_hu=volume.is_hu,
        shape=volume.shape,
        affine=tuple(tuple(float(value) for value in row) for row in volume.affine),
        axes=volume.axes,
        flips=volume.flips,
        spacing=volume.spacing,
        size=tuple(int(n) for n in size),
        offset=tuple(float(value) for value in offset),
        scale=tuple(float(value) for value in scale),
    )
    return tensor, geometry


def _window(plane: np.ndarray, low: float, high: float) -> torch.Tensor:
    """A float32 copy of a plane, clipped to the window and mapped to [0, 1]."""
    values = torch.from_numpy(np.array(plane, dtype=np.float32, order="C"))
    return values.clamp_(low, high).sub_(low).div_(high - low)


def _foreground_box(volume: CTVolume, threshold: float) -> tuple[tuple[int, int], ...]:
    """Half-open bounding box per axis of the voxels above the threshold."""
    planes = volume.array.T
    present = [np.zeros(n, dtype=bool) for n in volume.array.shape]
    for z, plane in enumerate(planes):  # plane by plane: a mask of the whole grid would be another copy of it
        above = plane > threshold
        rows = above.any(axis=1)
        present[2][z] = rows.any()
        present[1] |= rows
        present[0] |= above.any(axis=0)
    if not present[2].any():
        raise CTIntensityError(volume.source, "foreground", f"no voxel above {threshold:g} HU", "a patient")
    spans = [np.flatnonzero(flags) for flags in present]
    return tuple((int(span[0]), int(span[-1]) + 1) for span in spans)


def _positions(offset: float, scale: float, count: int, start: int, stop: int) -> np.ndarray:
    """Where the tensor's indices lie on the LPS grid.

    In float32 from the first voxel on, as `torch.nn.functional.interpolate` computes them: at voxel 400 its rounding
    is 1e-5 of a voxel, which shows in the result, and the point is to equal it.
    """
    half = np.float32(offset - start + 0.5 - 0.5 * scale)
    steps = np.arange(count, dtype=np.float32) + np.float32(0.5)
    return (np.float32(scale) * steps - np.float32(0.5) + half).astype(np.float64) + start


def _linear_weights(positions: np.ndarray, start: int, stop: int) -> tuple[int, torch.Tensor]:
    """Weights of linear interpolation at `positions` on the voxels start..stop-1.

    Beyond the centre of a border voxel its value holds up to its edge; outside the edge all weights are 0.

    Returns:
        First voxel touched, and weights (positions, touched voxels) in float32.
    """
    inside = (positions > start - 0.5 - 1e-6) & (positions < stop - 0.5 + 1e-6)
    clamped = positions.clip(start, stop - 1)
    left = np.minimum(np.floor(clamped).astype(int), stop - 1)
    right = np.minimum(left + 1, stop - 1)
    first = int(left[inside].min()) if inside.any() else start
    last = int(right[inside].max()) if inside.any() else start
    weights = np.zeros((len(positions), last - first + 1), dtype=np.float32)
    rows, fraction = np.flatnonzero(inside), clamped - left
    np.add.at(weights, (rows, left[inside] - first), 1 - fraction[inside])
    np.add.at(weights, (rows, right[inside] - first), fraction[inside])
    return first, torch.from_numpy(weights)


def to_input_grid(map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> np.ndarray:
    """Carry a map on the tensor's grid back to the voxels of the input file, trilinearly.

    Args:
        map: (depth, height, width), of `geometry.size`.

    Returns:
        float32 array of the file's own shape and axis order; 0 where the tensor does not reach.
    """
    values = torch.as_tensor(map).detach().cpu().float()
    if tuple(values.shape) != geometry.size:
        raise ValueError(f"The map has shape {tuple(values.shape)}, the geometry is of a tensor {geometry.size}.")
    for lps in range(3):  # x, y, z; the last axis of `values` each time
        length = geometry.shape[geometry.axes[lps]]
        positions = (np.arange(length) - geometry.offset[lps]) / geometry.scale[lps]
        first, weights = _linear_weights(positions, 0, geometry.size[2 - lps])
        values = values[..., first : first + weights.shape[1]] @ weights.T
        values = values.movedim(-1, 0)
    array = values.permute(2, 1, 0).numpy()  # the three moves leave (z, y, x)
    array = array[tuple(slice(None, None, -1 if flip else 1) for flip in geometry.flips)]
    return np.ascontiguousarray(array.transpose(np.argsort(geometry.axes))).reshape(geometry.shape)


def save_map(path: str | os.PathLike, map: torch.Tensor | np.ndarray, geometry: CTGeometry) -> Path:
    """Write a map on the tensor's grid as NIfTI (.nii or .nii.gz) with the shape and affine of the input file.

    The file appears complete or not at all.
    """
    path = Path(path)
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else path.suffix
    if suffix not in (".nii", ".nii.gz"):
        raise ValueError(f"A map is written as .nii or .nii.gz, got {path.name}.")
    affine = np.asarray(geometry.affine)
    image = nib.Nifti1Image(to_input_grid(map, geometry), affine)
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".map-", suffix=suffix, delete=False) as file:
        temporary = Path(file.name)
    try:
        nib.save(image, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


__all__ = [
    "CTGeometry",
    "CTGeometryError",
    "CTInputError",
    "CTIntensityError",
    "CTReadError",
    "CTVolume",
    "read_ct",
    "resample",
    "save_map",
    "to_input_grid",
]
