# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Reports where hospitals look for them: DICOM, FHIR, DICOMweb. docs/clinical.md says what each object is and is not.

    source.py     the DICOM series that a report is of: its patient, study and slices
    codes.py      findings, places and headings as SNOMED CT, LOINC and DICOM code them
    objects.py    Comprehensive SR and Parametric Map (needs the extra `dicom`)
    fhir.py       DiagnosticReport
    dicomweb.py   series from a PACS, objects to it (needs the extra `dicom`)
    results.py    what `diffvp report` and `diffvp batch` do with all of these
"""
