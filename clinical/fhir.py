# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write a report as a FHIR R4 DiagnosticReport (4.0.1; valid in R4B), with a contained Observation per finding.

It names the study by its UID, but not the patient: the receiving server knows the patient of the study.
"""

import base64

from ..inference.document import report_page
from ..report_diffvp import RESEARCH_USE, stated_domain
from . import codes
from .codes import Code
from .source import SourceSeries

CATEGORY = "http://terminology.hl7.org/CodeSystem/v2-0074"
INTERPRETATION = "http://terminology.hl7.org/CodeSystem/v3-ObservationInterpretation"
DEVICE_ID = "diffvp"


def diagnostic_report(document: dict, source: SourceSeries | None = None, report_uid: str | None = None) -> dict:
    """
    Return the resource as a dict for JSON.

    Args:
        document: content of report.json.
        source: source series of a DICOM input; other inputs have no study to name.
        report_uid: SOPInstanceUID of the structured report, if there is one.
    """
    page = report_page(document)
    observations = [
        _observation(f"finding-{number}", found) for number, found in enumerate(document["findings"], start=1)
    ]
    resource = {
        "resourceType": "DiagnosticReport",
        "contained": [_device(document), *observations]
        if observations
        else [],  # FHIR forbids contained resources without a reference
        "status": "preliminary",
        "category": [{"coding": [{"system": CATEGORY, "code": "RAD", "display": "Radiology"}]}],
        "code": _concept(codes.REPORT, "CT report by a program. " + RESEARCH_USE),
        "issued": document["provenance"]["created"],
        "conclusion": f"{RESEARCH_USE} Not verified.\n{document['report']}".strip(),
        "conclusionCode": [_finding(found["label"]) for found in document["findings"] if found["positive"]],
        "result": [{"reference": f"#{one['id']}"} for one in observations],
        "presentedForm": [
            {
                "contentType": "text/plain; charset=utf-8",
                "language": "en",
                "data": base64.b64encode(page.encode()).decode("ascii"),
                "title": "Report by region, with its provenance",
            }
        ],
    }
    if source is not None:
        study = {"system": "urn:dicom:uid", "value": f"urn:oid:{source.header.StudyInstanceUID}"}
        resource["imagingStudy"] = [{"type": "ImagingStudy", "identifier": study}]
    if report_uid is not None:
        resource["identifier"] = [{"system": "urn:dicom:uid", "value": f"urn:oid:{report_uid}"}]
    return {name: value for name, value in resource.items() if value}  # FHIR forbids empty lists


def _device(document: dict) -> dict:
    checkpoint, versions = document["provenance"]["checkpoint"], document["provenance"]["versions"]
    files = [f"{file}: SHA-256 {digest}" for file, digest in sorted(checkpoint["sha256"].items())]
    domain = stated_domain(document["intended_domain"])
    return {
        "resourceType": "Device",
        "id": DEVICE_ID,
        "manufacturer": "The DiffVP Authors",
        "deviceName": [{"name": f"DiffVP, checkpoint {checkpoint['name']}", "type": "model-name"}],
        "version": [{"value": versions["diffvp"]}],
        "note": [{"text": text} for text in (RESEARCH_USE, f"Intended for: {domain}.", *files)],
    }


def _observation(name: str, found: dict) -> dict:
    code = "POS" if found["positive"] else "NEG"
    components = [
        _quantity(codes.CERTAINTY, 100 * found["probability"], codes.PERCENT),
        _quantity(codes.THRESHOLD, 100 * found["threshold"], codes.PERCENT),
    ]
    if found["positive"]:
        components += [
            {"code": _concept(concept), "valueCodeableConcept": _concept(value)}
            for concept, value in codes.places_of(found.get("location"))
        ]
        if found.get("size_mm") is not None:
            components.append(_quantity(codes.LENGTH, found["size_mm"], codes.MILLIMETRE))
    return {
        "resourceType": "Observation",
        "id": name,
        "status": "preliminary",
        "code": _finding(found["label"]),
        "device": {"reference": f"#{DEVICE_ID}"},
        "interpretation": [
            {
                "coding": [
                    {"system": INTERPRETATION, "code": code, "display": {"POS": "Positive", "NEG": "Negative"}[code]}
                ],
                "text": "at or above the threshold" if found["positive"] else "below the threshold",
            }
        ],
        "component": components,
    }


def _finding(label: str) -> dict:
    return _concept(codes.FINDINGS[label], label) if label in codes.FINDINGS else {"text": label}


def _concept(code: Code, text: str | None = None) -> dict:
    coding = {"system": codes.SYSTEMS[code.scheme], "code": code.value, "display": code.meaning}
    return {"coding": [coding], "text": code.meaning if text is None else text}


def _quantity(code: Code, value: float, unit: Code) -> dict:
    quantity = {
        "value": round(value, 4), "unit": unit.value, "system": codes.SYSTEMS[unit.scheme], "code": unit.value,
    }  # fmt: skip
    return {"code": _concept(code), "valueQuantity": quantity}
