# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""CT series with patient and study data as in a hospital, shared by the tests of DICOM and FHIR output."""

from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, generate_uid

from diffvp.clinical.objects import MAP_FILE
from diffvp.labels_diffvp import DIAGNOSIS_LABELS

from .ct_samples import encoded_by_gdcm, write_dicom, write_enhanced
from .hub_samples import make_chest

# These values must not appear in any other object or file.
PATIENT = {
    "PatientName": "Müller^Jörg",
    "PatientID": "MRN-4711",
    "PatientBirthDate": "19500102",
    "PatientSex": "M",
    "PatientComments": "neighbour of the registrar",
    "OtherPatientNames": "Schmidt^Jörg",
}
STUDY = {
    "StudyDate": "20260102",
    "StudyTime": "101112",
    "StudyID": "S-815",
    "AccessionNumber": "ACC-0042",
    "ReferringPhysicianName": "Gröbner^Ada",
    "StudyDescription": "Thorax nativ für Müller",
}
SECRETS = [value for value in (*PATIENT.values(), *STUDY.values()) if len(value) > 1]


def of_a_hospital(k: int, one: pydicom.Dataset) -> None:
    """Add to slice k the fields that write_dicom leaves out, in Latin-1 as in many archives."""
    one.SpecificCharacterSet = "ISO_IR 100"
    for name, value in (PATIENT | STUDY).items():
        setattr(one, name, value)
    one.StudyInstanceUID = generate_uid(entropy_srcs=[one.SeriesInstanceUID, "study"])
    one.FrameOfReferenceUID = generate_uid(entropy_srcs=[one.SeriesInstanceUID, "frame"])
    one.PositionReferenceIndicator = ""
    one.SeriesNumber, one.AcquisitionNumber, one.SliceThickness, one.KVP = 3, 1, 2.5, 120
    one.BodyPartExamined, one.PatientPosition, one.Manufacturer = "CHEST", "HFS", "Scanner"
    one.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]


def single_frame(folder: Path) -> Path:
    return write_dicom(folder / "single", make_chest(1), change=of_a_hospital)


def jpeg_2000(folder: Path) -> Path:
    def change(k, one):
        of_a_hospital(k, one)
        one.PixelData = encapsulate([encoded_by_gdcm(one, "JPEG2000", folder)])
        one.file_meta.TransferSyntaxUID = JPEG2000Lossless

    return write_dicom(folder / "jpeg2000", make_chest(2), change=change)


def enhanced(folder: Path) -> Path:
    """Write all slices to one file, from the top down: frame 1 is the last slice of the volume."""
    lps = make_chest(3)

    def change(one):
        of_a_hospital(0, one)
        one.SeriesInstanceUID = generate_uid()
        one.StudyInstanceUID, one.FrameOfReferenceUID = generate_uid(), generate_uid()
        one.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]

    return write_enhanced(folder / "enhanced.dcm", lps, frames=range(lps.shape[2] - 1, -1, -1), change=change)


SOURCES = {"single-frame": single_frame, "JPEG 2000": jpeg_2000, "Enhanced CT": enhanced}


def files_of(source: Path) -> list[pydicom.Dataset]:
    paths = sorted(source.glob("*.dcm")) if source.is_dir() else [source]
    return [pydicom.dcmread(path) for path in paths]


def make_document(**changes) -> dict:
    """Return the content of a report.json with every kind of finding."""
    findings = [
        {"label": label, "probability": round(0.05 * number, 4), "threshold": 0.5, "positive": 0.05 * number >= 0.5}
        for number, label in enumerate(DIAGNOSIS_LABELS)
    ]
    more = {"location": None, "size_mm": None, "peak": [-50.0, 10.0, 320.0]}
    findings = [found | more for found in findings]
    findings[12] |= {"location": "right and left", "size_mm": 21}  # pleural effusion
    findings[15] |= {"location": "left lower lobe", "size_mm": 30, "peak": [9999.0, 0.0, 0.0]}  # consolidation
    document = {
        "statement": "Research use only. Not a medical device; not for diagnosis.",
        "intended_domain": "boxes of noise",
        "warnings": ["The report is cut off after 9 tokens."],
        "report": "Lung: Clear.\nHeart: Small.",
        "regions": {"heart": "Small.", "lung": "Clear.", "other": "A word\x03of its own."},
        "findings": findings,
        "provenance": {
            "created": "2026-03-04T05:06:07+00:00",
            "checkpoint": {"name": "tiny", "commit": "c" * 40, "sha256": {"model.safetensors": "ab" * 32}},
            "base_model": {"name": "tiny-llama", "revision": None},
            "scan": {"sha256": "cd" * 32, "layout": "DICOM series, 18 slices"},
            "reference": {"id": "normal_1", "sampled": True, "seed": 0},
            "versions": {"diffvp": "0.1.0"},
        },
    }
    return document | changes


def read_map(folder) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels (columns, rows, slices) and affine to RAS+ mm of a parametric map, read by highdicom."""
    volume = highdicom.pm.ParametricMap.from_dataset(pydicom.dcmread(folder / MAP_FILE)).get_volume(dtype=np.float32)
    return volume.array.T, np.diag([-1, -1, 1, 1]) @ volume.affine[:, [2, 1, 0, 3]]


def in_the_order_of(array: np.ndarray, affine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorient a volume and its affine to the axis order and directions of another affine."""
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(other))
    moved = affine @ nib.orientations.inv_ornt_aff(turn, array.shape)
    return nib.orientations.apply_orientation(array, turn), moved
