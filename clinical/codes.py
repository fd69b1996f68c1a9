# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Codes of findings, places and headings. Findings without an exact code are written as text.

Coding schemes: SCT is SNOMED CT, LN is LOINC, DCM is DICOM (PS3.16), UCUM holds units.
"""

from typing import NamedTuple


class Code(NamedTuple):
    """A code in DICOM's triplet form: value, coding scheme designator, meaning."""

    value: str
    scheme: str
    meaning: str


# Codes of CT-RATE's 18 labels. Three have no code: medical material ("device" would be less specific), arterial wall
# calcification, and peribronchial thickening. "Fibrosis" is the morphology; pulmonary fibrosis is a different disease.
FINDINGS = {
    "Cardiomegaly": Code("8186001", "SCT", "Cardiomegaly"),
    "Pericardial effusion": Code("373945007", "SCT", "Pericardial effusion"),
    "Coronary artery wall calcification": Code("445512009", "SCT", "Calcification of coronary artery"),
    "Hiatal hernia": Code("84089009", "SCT", "Hiatal hernia"),
    "Lymphadenopathy": Code("30746006", "SCT", "Lymphadenopathy"),
    "Emphysema": Code("87433001", "SCT", "Pulmonary emphysema"),
    "Atelectasis": Code("46621007", "SCT", "Atelectasis"),
    "Lung nodule": Code("786838002", "SCT", "Nodule of lung"),
    "Lung opacity": Code("112001", "DCM", "Opacity"),
    "Pulmonary fibrotic sequela": Code("112674009", "SCT", "Fibrosis"),
    "Pleural effusion": Code("60046008", "SCT", "Pleural effusion"),
    "Mosaic attenuation pattern": Code("112130", "DCM", "Mosaic pattern"),
    "Consolidation": Code("95436008", "SCT", "Lung consolidation"),
    "Bronchiectasis": Code("12295008", "SCT", "Bronchiectasis"),
    "Interlobular septal thickening": Code("112114", "DCM", "Septal line(s)"),
}

# Regions of RadGenome-ChestCT, under its names.
REGIONS = {
    "abdomen": Code("818981001", "SCT", "Abdomen"),
    "bone": Code("272710004", "SCT", "Bone of thorax"),
    "breast": Code("76752008", "SCT", "Breast"),
    "esophagus": Code("32849002", "SCT", "Esophagus"),
    "heart": Code("80891009", "SCT", "Heart"),
    "lung": Code("39607008", "SCT", "Lung"),
    "mediastinum": Code("72410000", "SCT", "Mediastinum"),
    "pleura": Code("3120008", "SCT", "Pleura"),
    "thyroid": Code("69748006", "SCT", "Thyroid"),
    "trachea and bronchie": Code("110726009", "SCT", "Trachea and bronchus"),
}

FINDING_SITE = Code("363698007", "SCT", "Finding Site")
LATERALITY = Code("272741003", "SCT", "Laterality")
# Places named in findings: concept and value.
PLACES = {
    "right upper lobe": (FINDING_SITE, Code("42400003", "SCT", "Upper lobe of right lung")),
    "right middle lobe": (FINDING_SITE, Code("72481006", "SCT", "Middle lobe of right lung")),
    "right lower lobe": (FINDING_SITE, Code("266005", "SCT", "Lower lobe of right lung")),
    "left upper lobe": (FINDING_SITE, Code("44714003", "SCT", "Upper lobe of left lung")),
    "left lower lobe": (FINDING_SITE, Code("41224006", "SCT", "Lower lobe of left lung")),
    "right": (LATERALITY, Code("24028007", "SCT", "Right")),
    "left": (LATERALITY, Code("7771000", "SCT", "Left")),
}

REPORT = Code("18748-4", "LN", "Diagnostic Imaging Report")
CT = Code("77477000", "SCT", "Computed tomography")
ENGLISH = Code("en", "RFC5646", "English")
SUMMARY = Code("121111", "DCM", "Summary")
PROCEDURE_REPORTED = Code("121058", "DCM", "Procedure reported")
COMMENT = Code("121106", "DCM", "Comment")
FINDINGS_HEADING = Code("121070", "DCM", "Findings")
FINDING = Code("121071", "DCM", "Finding")
PROCEDURES = Code("121064", "DCM", "Current Procedure Descriptions")
PROCEDURE = Code("121065", "DCM", "Procedure Description")
ILLUSTRATION = Code("121080", "DCM", "Best illustration of finding")
CERTAINTY = Code("111012", "DCM", "Certainty of Finding")
THRESHOLD = Code("122411", "DCM", "Threshold Value")
LENGTH = Code("410668003", "SCT", "Length")
PERCENT = Code("%", "UCUM", "Percent")
MILLIMETRE = Code("mm", "UCUM", "mm")
NO_UNITS = Code("1", "UCUM", "no units")

# DICOM has no concept for a finding below its threshold. Under "Finding", a viewer that does not show probabilities
# would list it as present.
OWN_SCHEME, OWN_SCHEME_NAME = "99DIFFVP", "DiffVP"
NOT_FOUND = Code("not-found", OWN_SCHEME, "Not found: below the threshold")

# Names of the coding systems in FHIR.
SYSTEMS = {
    "SCT": "http://snomed.info/sct",
    "LN": "http://loinc.org",
    "DCM": "http://dicom.nema.org/resources/ontology/DCM",
    "UCUM": "http://unitsofmeasure.org",
}


def places_of(location: str | None) -> list[tuple[Code, Code]]:
    """Return concept and value of each place in a location that has a code."""
    return [PLACES[place] for place in (location or "").split(" and ") if place in PLACES]
