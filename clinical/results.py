# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Clinical results of `diffvp report` and `diffvp batch`: read from a PACS, write DICOM and FHIR, store them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.scans import NEAREST
from ..files import write_texts

if TYPE_CHECKING:
    from ..inference.report import Report  # importing it takes seconds, and a bad scan is refused before that


class ClinicalResults:
    """
    Clinical results of one report.

    Args:
        ct: path of the scan.
        dicom: folder for SR and map, or `None`.
        fhir: add a DiagnosticReport to the folder of the report.
        store_at: URL of the DICOMweb service that receives SR and map, or `None`.
        series, allow_incomplete: see [`read_ct`].

    Raises:
        CTReadError: DICOM objects are requested, but the scan is not DICOM or lacks elements that they need.
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
        """Write all requested results of a report of `ct`."""
        report_uid, source = None, self._source
        if source is not None:
            import nibabel as nib
            import numpy as np

            from ..inference.folder import DIFFERENCE_MAP
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
            from ..inference.folder import DIAGNOSTIC_REPORT
            from .fhir import diagnostic_report
            from .source import read_source

            if source is None and is_dicom(report.document):
                source = read_source(self.ct, **self._reading)
            resource = diagnostic_report(report.document, source, report_uid)
            write_texts(report.folder, {DIAGNOSTIC_REPORT: json.dumps(resource, indent=2, ensure_ascii=False) + "\n"})


@contextlib.contextmanager
def clinical_results(
    ct: Path | None, *, dicomweb: str | None = None, study: str | None = None, store: bool = False, **options
) -> Iterator[ClinicalResults]:
    """
    Yield the clinical results for a scan from a file or a PACS.

    Args:
        ct: path of the scan, or `None` for `study` at the service `dicomweb`.
        store: store SR and map in that service.
        options: options of [`ClinicalResults`].

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
    Clinical results of a batch.

    Args:
        dicom: folder for SR and map, which get a subfolder per scan with an anonymous name; or `None`.
        fhir: add a DiagnosticReport to each record.
    """

    def __init__(self, dicom: str | os.PathLike | None, fhir: bool):
        self.dicom, self._fhir = None if dicom is None else Path(dicom), fhir

    def with_source(self, features, path: Path):
        """Add the source series of a scan to its features as `source`. Return the features, or an error."""
        from ..volume_diffvp import CTInputError, is_series
        from .source import read_source

        [geometry] = features["geometry"]
        if self.dicom is None and not is_series(geometry.layout):
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
        Make the requested results of a record, and add them to it: `dicom`, the folder of its objects, and `fhir`.

        Args:
            header: first line of the file of records.
            source: source series of the scan, or `None` if the scan is not DICOM.
        """
        from ..map_diffvp import to_input_grid

        difference = record.pop("difference", None)
        report_uid, document = None, _document(record, header)
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
    """Return a record in the form of report.json, with the provenance that the objects state."""
    settings = header["settings"]
    seed = None if settings.get("references") == NEAREST else settings["reference_seed"]
    return {
        **record,
        "provenance": {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **{name: settings[name] for name in ("checkpoint", "base_model")},
            "scan": {"sha256": record["sha256"]},
            "reference": {"id": record["reference"], "sampled": seed is not None, "seed": seed},
            "versions": header["versions"],
        },
    }


def is_dicom(document: dict) -> bool:
    """True if a report describes a DICOM series."""
    from ..volume_diffvp import is_series

    return is_series(document["provenance"]["scan"]["layout"])
