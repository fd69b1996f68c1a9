# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Reports for hospital systems: DICOM, FHIR, DICOMweb. docs/clinical.md describes each object and its limits.

    source.py     the source DICOM series of a report: patient, study and slices
    codes.py      SNOMED CT, LOINC and DICOM codes of findings, places and headings
    objects.py    Comprehensive SR and Parametric Map (needs the extra `dicom`)
    fhir.py       DiagnosticReport
    dicomweb.py   retrieve series from a PACS, store objects in it (needs the extra `dicom`)
    results.py    clinical results of `diffvp report` and `diffvp batch`
"""
