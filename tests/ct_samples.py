# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A synthetic scan, and the same scan as a DICOM series, shared by the tests of the readers."""

import functools
import io

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

SPACING = (1.5, 1.25, 2.5)  # mm along x, y, z


def make_ct(shape=(26, 22, 18), seed=0) -> np.ndarray:
    """Return integer HU in LPS order [x, y, z]: an off-centre textured body in air."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    body = ((x - 0.1) / 0.75) ** 2 + ((y + 0.15) / 0.65) ** 2 + ((z - 0.05) / 0.8) ** 2 < 1
    texture = np.random.default_rng(seed).normal(-200, 300, shape)
    return np.where(body, np.clip(texture, -990, 1200), -1000).astype(np.int16)


def lps_affine(spacing=SPACING, origin=(-40.0, 25.0, 300.0)) -> np.ndarray:
    """Return the RAS affine of an LPS array."""
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    affine[:3, 3] = origin
    return affine


# Placeholders of UIDs, which `write_dicom` replaces. All have 64 characters, the most that a UID may have.
SERIES, STUDY, INSTANCE = (f"1.2.826.0.1.3680043.8.498.{digit * 38}" for digit in "123")


def new_uid() -> str:
    uid = generate_uid()
    return uid if len(uid) == len(SERIES) else new_uid()


def make_slice(pixels: np.ndarray, k: int, position: tuple[float, ...]) -> FileDataset:
    """Return slice k of a CT series, with HU [x, y] and its LPS position in mm."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, INSTANCE
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID = CTImageStorage, INSTANCE
    one.PatientName, one.PatientID, one.Modality = "Secret^Name", "SECRET-ID", "CT"
    one.StudyDescription = one.SeriesDescription = one.ProtocolName = one.InstitutionName = "Secret Place"
    one.SeriesInstanceUID, one.FrameOfReferenceUID, one.StudyInstanceUID = SERIES, STUDY, STUDY
    one.InstanceNumber = k + 1
    one.ImagePositionPatient = [f"{value:.6g}" for value in position]
    one.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    one.PixelSpacing = [SPACING[1], SPACING[0]]  # between rows, then between columns
    one.Rows, one.Columns = pixels.shape[1], pixels.shape[0]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
    one.RescaleSlope, one.RescaleIntercept = 1, -1024
    one.PixelData = np.ascontiguousarray(pixels.T.astype(np.int32) + 1024).astype("<u2").tobytes()
    return one


@functools.lru_cache(maxsize=2000)
def _content(pixels: bytes, kind: str, shape: tuple[int, int], k: int, position: tuple[float, ...]) -> bytes:
    """Return the file of a slice with placeholders, once: most tests begin with the same series."""
    content = io.BytesIO()
    make_slice(np.frombuffer(pixels, kind).reshape(shape), k, position).save_as(content, enforce_file_format=True)
    return content.getvalue()


def write_dicom(folder, lps: np.ndarray, step=(0.0, 0.0, SPACING[2]), change=None, prefix=""):
    """Write a CT series with pydicom; file names are in reverse order of the positions.

    `change(k, dataset)` may alter slice k before it is written.
    """
    folder.mkdir(exist_ok=True, parents=True)
    series, study = new_uid(), new_uid()
    origin = np.array([40.0, -25.0, 300.0])  # the LPS world position of lps_affine()
    for k in range(lps.shape[2]):
        path, pixels = folder / f"{prefix}{lps.shape[2] - k:03d}.dcm", lps[:, :, k]
        instance, position = new_uid(), tuple((origin + k * np.asarray(step)).tolist())
        if change is None and pixels.size < 10_000:
            content = _content(pixels.tobytes(), pixels.dtype.str, pixels.shape, k, position)
            for placeholder, uid in ((SERIES, series), (STUDY, study), (INSTANCE, instance)):
                content = content.replace(placeholder.encode(), uid.encode())
            path.write_bytes(content)
            continue
        one = make_slice(pixels, k, position)
        one.SeriesInstanceUID, one.FrameOfReferenceUID, one.StudyInstanceUID = series, study, study
        one.SOPInstanceUID = one.file_meta.MediaStorageSOPInstanceUID = instance
        if change is not None:
            change(k, one)
        one.save_as(path, enforce_file_format=True)
    return folder


def group(**fields) -> Sequence:
    """Return a sequence of one item with these fields."""
    item = Dataset()
    for name, value in fields.items():
        setattr(item, name, value)
    return Sequence([item])


def write_enhanced(path, lps: np.ndarray, frames=None, rescales=None, change=None, kind=EnhancedCTImageStorage):
    """Write a multi-frame CT with pydicom.

    Args:
        frames: slice index of each frame; all slices by default.
        rescales: slope and intercept of each slice; by default, the shared group states one pair for all.
        change: `change(dataset)` may alter the data set before it is written.
    """
    path.parent.mkdir(exist_ok=True, parents=True)
    frames = list(range(lps.shape[2]) if frames is None else frames)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    one = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    one.SOPClassUID, one.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    one.PatientName, one.PatientID, one.Modality = "Secret^Name", "SECRET-ID", "CT"
    one.StudyInstanceUID, one.SeriesInstanceUID, one.FrameOfReferenceUID = "1.2.3.1", "1.2.3.2", "1.2.3.3"
    one.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    one.SeriesNumber, one.InstanceNumber, one.NumberOfFrames = 1, frames[0] + 1, len(frames)
    one.Rows, one.Columns = lps.shape[1], lps.shape[0]
    one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
    one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
    shared = Dataset()
    shared.PixelMeasuresSequence = group(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness=SPACING[2])
    shared.PlaneOrientationSequence = group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    if rescales is None:
        shared.PixelValueTransformationSequence = group(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
    one.SharedFunctionalGroupsSequence = Sequence([shared])
    items, planes = [], []
    for k in frames:
        slope, intercept = (1, -1024) if rescales is None else rescales[k]
        item = Dataset()
        item.FrameContentSequence = group(StackID="1", InStackPositionNumber=k + 1, FrameAcquisitionNumber=1)
        item.PlanePositionSequence = group(ImagePositionPatient=[40, -25, 300 + k * SPACING[2]])
        if rescales is not None:
            item.PixelValueTransformationSequence = group(
                RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU"
            )
        items.append(item)
        planes.append(np.rint((lps[:, :, k].T.astype(float) - intercept) / slope).astype("<u2"))
    one.PerFrameFunctionalGroupsSequence = Sequence(items)
    one.PixelData = b"".join(plane.tobytes() for plane in planes)
    if change is not None:
        change(one)
    one.save_as(path, enforce_file_format=True)
    return path


def encoded_by_gdcm(one, compressor, folder) -> bytes:
    """Return the pixels of a slice as one compressed fragment, encoded by SimpleITK's writer."""
    pixels = np.frombuffer(one.PixelData, "<u2").reshape(1, one.Rows, one.Columns)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetFileName(str(folder / "encoded.dcm"))
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    writer.Execute(sitk.GetImageFromArray(pixels))
    written = pydicom.dcmread(folder / "encoded.dcm")
    fragment = next(pydicom.encaps.generate_fragments(written.PixelData[8:]))
    assert written.PixelRepresentation == 0 and written.BitsStored == 16
    return fragment
