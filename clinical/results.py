# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""What `diffvp report` and `diffvp batch` do besides: read from a PACS, write DICOM and FHIR, send them back."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..inference.report import Report  # takes seconds to import, in which a scan would be refused already


class ClinicalResults:
    """
    Args:
        ct: path of the scan.
        dicom: folder for SR and map, or `None`.
        fhir: whether the report's folder gets a DiagnosticReport.
        store_at: URL of the DICOMweb service that gets SR and map, or `None`.
        series, allow_incomplete: see [`read_ct`].

    Raises:
        CTReadError: DICOM objects are wanted of a scan that is none, or that lacks what they have to say of it.
    """

    def __init__(
        self,
        ct: Path,
        *,
        dicom: Path | None = None,
        fhir: bool = False,
        store_at: str | None = None,
        series: str | None = None,
        allow_incomplete: bool = False,
    ):
        self.ct, self.series = ct, series
        self._dicom, self._fhir, self._store_at = dicom, fhir, store_at
        self._reading = {"series": series, "allow_incomplete": allow_incomplete}
        self._source = None
        if dicom is not None or store_at is not None:
            from .source import read_source

            self._source = read_source(ct, **self._reading)

    def write(self, report: "Report") -> None:
        """Everything that was asked for, of a report of `ct`."""
        report_uid, source = None, self._source
        if source is not None:
            import nibabel as nib
            import numpy as np

            from ..inference.report import DIFFERENCE_MAP
            from .objects import dicom_objects, write_objects

            image = nib.load(report.folder / DIFFERENCE_MAP)
            source.check_grid(image.shape, image.affine)
            made = dicom_objects(report.document, np.asarray(image.dataobj), source)
            report_uid = made[0].SOPInstanceUID
            if self._dicom is not None:
                write_objects(self._dicom, *made)
            if self._store_at is not None:
                from .dicomweb import store

                store(self._store_at, made)
        if self._fhir:
            from ..inference.report import DIAGNOSTIC_REPORT
            from .fhir import diagnostic_report
            from .source import read_source

            if source is None and is_dicom(report.document):
                source = read_source(self.ct, **self._reading)
            write_json(report.folder / DIAGNOSTIC_REPORT, diagnostic_report(report.document, source, report_uid))


@contextlib.contextmanager
def clinical_results(
    ct: Path | None, *, dicomweb: str | None = None, study: str | None = None, store: bool = False, **options
) -> Iterator[ClinicalResults]:
    """
    The scan, of a file or of a PACS, and what to do with its report.

    Args:
        ct: path of the scan, or `None` for `study` at the service `dicomweb`.
        store: send SR and map to that service.
        options: of [`ClinicalResults`].

    Raises:
        CTInputError: see [`ClinicalResults`] and [`retrieve`].
    """
    if dicomweb is None:
        yield ClinicalResults(ct, **options)
        return
    from .dicomweb import retrieve

    with retrieve(dicomweb, study, options.get("series"), options.get("allow_incomplete", False)) as folder:
        yield ClinicalResults(folder, store_at=dicomweb if store else None, **options)


class BatchResults:
    """
    Args:
        dicom: folder for SR and map of each scan, in a folder of their own whose name says nothing; or `None`.
        fhir: whether each record gets a DiagnosticReport.
    """

    def __init__(self, dicom: str | os.PathLike | None, fhir: bool):
        self.dicom, self._fhir = None if dicom is None else Path(dicom), fhir

    def with_source(self, features, path: Path):
        """The features of a scan with the series that they are of as `source`, or the error that there is none."""
        from ..volume_diffvp import CTInputError
        from .source import read_source

        [geometry] = features["geometry"]
        if self.dicom is None and not geometry.layout.startswith("DICOM"):
            return features
        try:
            source = read_source(path)
            source.check_grid(geometry.shape, geometry.affine)
        except CTInputError as error:
            return error
        features["source"] = source
        return features

    def write(self, record: dict, header: dict, source) -> None:
        """
        Make what was asked for of a record, and note it there: `dicom`, the folder of its objects, and `fhir`.

        Args:
            header: of the file of records.
            source: of the scan, or `None` where it is no DICOM.
        """
        from ..volume_diffvp import to_input_grid

        report_uid, document = None, _document(record, header)
        difference = record.pop("difference", None)
        if self.dicom is not None:
            from .objects import dicom_objects, write_objects

            made = dicom_objects(document, to_input_grid(*difference), source)
            report_uid = made[0].SOPInstanceUID
            record["dicom"] = hashlib.sha256(record["id"].encode(errors="surrogateescape")).hexdigest()[:16]
            write_objects(self.dicom / record["dicom"], *made)
        if self._fhir:
            from .fhir import diagnostic_report

            record["fhir"] = diagnostic_report(document, source, report_uid)


def _document(record: dict, header: dict) -> dict:
    """A record as report.json would have it, as far as the objects say it."""
    settings = header["settings"]
    return {
        **record,
        "provenance": {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{name: settings[name] for name in ("checkpoint", "base_model")},
            "scan": {"sha256": record["sha256"]},
            "reference": {"id": record["reference"], "sampled": True, "seed": settings["reference_seed"]},
            "versions": header["versions"],
        },
    }


def is_dicom(document: dict) -> bool:
    """Whether a report is of a DICOM series."""
    return document["provenance"]["scan"]["layout"].startswith("DICOM")


def write_json(path: Path, resource: dict) -> None:
    """Write a file, complete or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(resource, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
