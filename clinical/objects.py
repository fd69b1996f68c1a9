# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write a report as DICOM objects in the study of its source: Comprehensive SR, and Parametric Map of the difference map.

Both copy the patient and study modules of the source unchanged. Both are unverified and are marked so.
"""

import hashlib
import json
import os
import re
from datetime import datetime
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
from highdicom import sr
from highdicom.coding_schemes import CodingSchemeIdentificationItem
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from ..report_diffvp import RESEARCH_USE, stated_domain
from ..storage_diffvp import replacing
from . import codes
from .codes import Code
from .source import SourceSeries, values_as_they_are

SR_FILE, MAP_FILE = "structured_report.dcm", "difference_map.dcm"
MANUFACTURER, DEVICE = "The DiffVP Authors", "DiffVP"
REPORT_SERIES, MAP_SERIES = 9001, 9002  # SeriesNumber: above those of the scanner
PATIENT_AND_STUDY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID", "StudyDate",
    "StudyTime", "ReferringPhysicianName",
)  # fmt: skip
LOSSY = ("LossyImageCompression", "LossyImageCompressionRatio", "LossyImageCompressionMethod")
UTF_8 = "ISO_IR 192"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f]")  # control characters that DICOM forbids in text


def dicom_objects(
    document: dict, difference: np.ndarray, source: SourceSeries
) -> tuple[sr.ComprehensiveSR, hd.pm.ParametricMap]:
    """
    Make the structured report and the parametric map, each in its own series.

    Args:
        document: content of report.json.
        difference: (columns, rows, slices), on the grid of `source`, as in difference_map.nii.gz.

    Raises:
        ValueError: the map is on another grid.
    """
    if difference.shape[:3] != source.shape:
        raise ValueError(f"The map has shape {difference.shape}, the source {source.shape}.")
    with values_as_they_are():
        image = _parametric_map(document, difference.reshape(source.shape), source)
        report = _structured_report(document, source, image)
        for made in (report, image):
            made.copy_patient_and_study_information(source.header)
            made.SpecificCharacterSet = UTF_8  # for all text, because the copied elements are decoded
    return report, image


def write_objects(folder: str | os.PathLike, report: pydicom.Dataset, image: pydicom.Dataset) -> None:
    """Write both to a folder and keep its other files. A report exists only together with the map it refers to."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SR_FILE).unlink(missing_ok=True)
    for name, made in ((MAP_FILE, image), (SR_FILE, report)):
        with replacing(folder / name) as part, values_as_they_are():
            made.save_as(part, enforce_file_format=True)


def checkpoint_digest(document: dict) -> str:
    """Return the SHA-256 of the digests of a checkpoint's files: 64 hexadecimal digits."""
    files = document["provenance"]["checkpoint"]["sha256"]
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _equipment(document: dict) -> dict:
    provenance = document["provenance"]
    created = datetime.fromisoformat(provenance["created"]).astimezone()
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": f"{DEVICE} {provenance['checkpoint']['name']}".replace("\\", "/")[:64],
        "software_versions": provenance["versions"]["diffvp"],
        "device_serial_number": checkpoint_digest(document),
        "content_date": created.date(),
        "content_time": created.time(),
        "instance_number": 1,
        "sop_instance_uid": hd.UID(),
        "series_instance_uid": hd.UID(),
    }


def _image(source: SourceSeries, **fields) -> pydicom.Dataset:
    """Return the elements that highdicom needs of a referenced image. Patient and study are copied later."""
    image = pydicom.Dataset()
    for name in PATIENT_AND_STUDY:
        setattr(image, name, None)
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        setattr(image, name, source.header.get(name))
    for name, value in fields.items():
        setattr(image, name, value)
    return image


# Parametric Map


def _parametric_map(document: dict, difference: np.ndarray, source: SourceSeries) -> hd.pm.ParametricMap:
    frames = np.ascontiguousarray(difference.T, dtype=np.float32)  # (slices, rows, columns)
    low, high = float(frames.min()), float(frames.max())
    width = max(high - low, 1e-6)
    columns, rows, _ = source.shape
    # Each slice becomes an image of its own, also for multi-frame files: highdicom takes all frames of a file or none.
    planes = {f"{frame.sop_instance}.{k}": frame for k, frame in enumerate(source.frames)}
    # Lossy compression is permanent, and derived images must state it.
    lossy = {name: source.header[name].value for name in LOSSY if name in source.header}
    images = [
        _image(
            source, SOPClassUID=CTImageStorage, SOPInstanceUID=uid, Rows=rows, Columns=columns,
            ImagePositionPatient=list(frame.position), ImageOrientationPatient=list(source.orientation),
            PixelSpacing=list(source.pixel_spacing), SliceThickness=source.thickness,
            SpacingBetweenSlices=source.slice_spacing, **lossy,
        )
        for uid, frame in planes.items()
    ]  # fmt: skip
    made = hd.pm.ParametricMap(
        images,
        frames,
        **_equipment(document),
        series_number=MAP_SERIES,
        series_description=f"RESEARCH USE ONLY: {DEVICE} difference map",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[
            hd.pm.RealWorldValueMapping(
                lut_label="DIFFERENCE",
                lut_explanation="Difference from the normal reference",
                unit=_concept(codes.NO_UNITS),
                value_range=(low, high),
                slope=1.0,
                intercept=0.0,
            )
        ],
        voi_lut_transformations=[
            # LINEAR, the default, does not allow a window width below 1.
            hd.VOILUTTransformation(low + width / 2, width, voi_lut_function="LINEAR_EXACT")
        ],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label="DIFFERENCE",
        content_description="Difference from a normal reference. Research use only.",
        specific_character_set=UTF_8,
    )
    for name in ("BodyPartExamined", "Laterality"):
        if source.header.get(name):
            made[name] = source.header[name]
    if "BodyPartExamined" not in made and "Laterality" not in made:
        made.Laterality = None  # required if the body part may be paired (PS3.3, C.7.3.1)
    made.DerivationDescription = _derivation(document)
    _refer_to(made, planes)
    return made


def _refer_to(image: pydicom.Dataset, planes: dict) -> None:
    """Make the map refer to the files and frames of the source."""
    files = {frame.sop_instance: frame.sop_class for frame in planes.values()}
    image.SourceImageSequence = [_reference(sop_class, uid) for uid, sop_class in files.items()]
    [series] = image.ReferencedSeriesSequence
    series.ReferencedInstanceSequence = [_reference(sop_class, uid) for uid, sop_class in files.items()]
    for group in image.PerFrameFunctionalGroupsSequence:
        [item] = group.DerivationImageSequence[0].SourceImageSequence
        frame = planes[item.ReferencedSOPInstanceUID]
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = frame.sop_class, frame.sop_instance
        if frame.number is not None:
            item.ReferencedFrameNumber = frame.number


def _reference(sop_class: str, sop_instance: str) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, sop_instance
    return item


# Structured report: TID 2000, Basic Diagnostic Imaging Report


def _structured_report(document: dict, source: SourceSeries, image: pydicom.Dataset) -> sr.ComprehensiveSR:
    root = sr.ContainerContentItem(_concept(codes.REPORT), is_content_continuous=False, template_id="2000")
    root.ContentSequence = [
        _code(codes.PROCEDURE_REPORTED, codes.CT, "HAS CONCEPT MOD"),
        *sr.LanguageOfContentItemAndDescendants(_concept(codes.ENGLISH)),
        *sr.ObserverContext(_concept(Code("121007", "DCM", "Device")), _observer(document)),
        _container(codes.SUMMARY, [_text(codes.COMMENT, line) for line in summary(document)]),
        _container(codes.FINDINGS_HEADING, _findings(document, source, image), _algorithm(document)),
        *_not_found(document),
        _container(codes.PROCEDURES, [_text(codes.PROCEDURE, line) for line in procedure(document)]),
    ]
    evidence = [_image(source, SOPClassUID=sop_class, SOPInstanceUID=uid) for sop_class, uid in source.instances]
    made = sr.ComprehensiveSR(
        [*evidence, image],
        root,
        **_equipment(document),
        series_number=REPORT_SERIES,
        series_description=f"RESEARCH USE ONLY: {DEVICE} report",
        is_complete=False,
        is_final=False,
        is_verified=False,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        specific_character_set=UTF_8,
        coding_schemes=[CodingSchemeIdentificationItem(codes.OWN_SCHEME, codes.OWN_SCHEME_NAME)],
    )
    return made


def summary(document: dict) -> list[str]:
    """Return the statements that must be read before the report."""
    domain = stated_domain(document["intended_domain"])
    unverified = "Written by a program. Not verified by a person."
    return [RESEARCH_USE, unverified, f"Intended for: {domain}.", *document["warnings"]]


def procedure(document: dict) -> list[str]:
    """Return the inputs of a report in words."""
    provenance = document["provenance"]
    return [
        f"Compared with the normal reference {provenance['reference']['id']}.",
        f"SHA-256 of the scan: {provenance['scan']['sha256']}.",
    ]


def _derivation(document: dict) -> str:
    return f"Difference from the normal reference {document['provenance']['reference']['id']}. {RESEARCH_USE}"


def _observer(document: dict) -> sr.DeviceObserverIdentifyingAttributes:
    digest = checkpoint_digest(document)
    return sr.DeviceObserverIdentifyingAttributes(
        uid=f"2.25.{int(digest[:32], 16)}",  # the same weights give the same device
        name=DEVICE,
        manufacturer_name=MANUFACTURER,
        model_name=document["provenance"]["checkpoint"]["name"],
        serial_number=digest,
    )


def _algorithm(document: dict) -> sr.AlgorithmIdentification:
    checkpoint, base = document["provenance"]["checkpoint"], document["provenance"]["base_model"]
    files = [f"SHA-256 of {file}: {digest}" for file, digest in sorted(checkpoint["sha256"].items())]
    commit = [] if checkpoint["commit"] is None else [f"Commit: {checkpoint['commit']}"]
    named = [] if base["name"] is None else [f"Base language model: {base['name']} {base['revision'] or ''}".strip()]
    return sr.AlgorithmIdentification(
        f"{DEVICE}, checkpoint {checkpoint['name']}",
        document["provenance"]["versions"]["diffvp"],
        [*commit, *files, *named],
        manufacturer=MANUFACTURER,
    )


def _findings(document: dict, source: SourceSeries, image: pydicom.Dataset) -> list[sr.ContentItem]:
    """Return the report by region, the positive findings of the classifier, and the map."""
    items = []
    for region, text in document["regions"].items():
        if not text:
            continue
        written = _text(codes.FINDING, text)
        if region in codes.REGIONS:
            written.ContentSequence = [_code(codes.FINDING_SITE, codes.REGIONS[region], "HAS CONCEPT MOD")]
        items.append(written)
    items += [_finding(one, codes.FINDING, source) for one in document["findings"] if one["positive"]]
    shown = sr.ImageContentItem(
        _concept(codes.ILLUSTRATION), image.SOPClassUID, image.SOPInstanceUID, relationship_type="CONTAINS"
    )
    return [*items, shown]


def _not_found(document: dict) -> list[sr.ContentItem]:
    below = [_finding(one, codes.NOT_FOUND) for one in document["findings"] if not one["positive"]]
    return [_container(codes.NOT_FOUND, below)] if below else []


def _finding(found: dict, concept: Code, source: SourceSeries | None = None) -> sr.ContentItem:
    """Return a finding with probability and threshold; with `source` also place, size and the slice that shows it."""
    label, properties = found["label"], "HAS PROPERTIES"
    item = _code(concept, codes.FINDINGS[label]) if label in codes.FINDINGS else _text(concept, label)
    described = [
        _number(codes.CERTAINTY, 100 * found["probability"], codes.PERCENT),
        _number(codes.THRESHOLD, 100 * found["threshold"], codes.PERCENT),
    ]
    if source is not None:
        described += [_code(*place, properties) for place in codes.places_of(found.get("location"))]
        if found.get("size_mm") is not None:
            described.append(_number(codes.LENGTH, found["size_mm"], codes.MILLIMETRE))
        if found.get("peak") is not None:
            described += _point(found["peak"], source)
    item.ContentSequence = described
    return item


def _point(peak: list[float], source: SourceSeries) -> list[sr.ContentItem]:
    """Return the point of a finding on its slice; nothing if it lies outside the scan."""
    column, row, k = np.linalg.solve(source.affine, [*peak, 1.0])[:3]
    columns, rows, slices = source.shape
    if not (-0.5 <= column < columns - 0.5 and -0.5 <= row < rows - 0.5 and -0.5 <= k < slices - 0.5):
        return []
    frame = source.frames[round(k)]
    at = sr.ScoordContentItem(
        _concept(codes.ILLUSTRATION),
        "POINT",
        np.array([[column + 0.5, row + 0.5]]),  # the centre of the first pixel is (0.5, 0.5)
        relationship_type="INFERRED FROM",
    )
    at.ContentSequence = [
        sr.ImageContentItem(
            _concept(codes.ILLUSTRATION), frame.sop_class, frame.sop_instance, frame.number,
            relationship_type="SELECTED FROM",
        )
    ]  # fmt: skip
    return [at]


def _concept(code: Code) -> sr.CodedConcept:
    return sr.CodedConcept(code.value, code.scheme, code.meaning)


def _code(name: Code, value: Code, relationship: str = "CONTAINS") -> sr.CodeContentItem:
    return sr.CodeContentItem(_concept(name), _concept(value), relationship)


def _text(name: Code, value: str, relationship: str = "CONTAINS") -> sr.TextContentItem:
    return sr.TextContentItem(_concept(name), CONTROL.sub(" ", value), relationship)


def _number(name: Code, value: float, unit: Code) -> sr.NumContentItem:
    return sr.NumContentItem(_concept(name), round(value, 4), _concept(unit), relationship_type="HAS PROPERTIES")


def _container(name: Code, items: list[sr.ContentItem], context=()) -> sr.ContainerContentItem:
    container = sr.ContainerContentItem(_concept(name), is_content_continuous=False, relationship_type="CONTAINS")
    container.ContentSequence = [*context, *items]
    return container
