# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write the reports of many scans (`diffvp batch`), on one machine here and on many in `ray.py`.

    reports.jsonl           line 1: checkpoint and settings; then one line per scan (docs/reports.md)
    reports.failed.jsonl    scans that could not be read in the last run, and why

Both continue an interrupted run. A scan is done if its name *and* the SHA-256 of its file have a report: a different
file of the same name is read, and so is a file that was replaced. If a scan has several reports, the last one counts.
Scans appear in these files under the names given by the caller, and in no other file.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from transformers import BatchFeature

from ..clinical.results import BatchResults
from ..data.cache import preprocessing
from ..data.scans import NEAREST, ListedScan, list_references
from ..document_diffvp import SCHEMA_VERSION
from ..provenance import library_versions
from ..references_diffvp import NoOtherReferenceError, ReferencePool, ReferencePoolError, path_sha256
from ..report_diffvp import RESEARCH_USE, describe_findings
from ..volume_diffvp import CTInputError
from .document import checked_report, describe_decoding, identify_model
from .engines import check_engine, merged_engine
from .report import greedy, load_checkpoint
from .report_file import ReportFile

# Number of encoded references in memory; the least recently used is dropped. One of 1,024 voxel tokens takes 2 MB, so
# that they take at most 4 GB.
KEPT_REFERENCES = 2048


def _given_pool(source: str | os.PathLike) -> tuple[ReferencePool, str]:
    """Return the pool of the references that a user names, and a digest of their ids and contents.

    Raises:
        DatasetError: there are none, or one is missing.
    """
    scans = list_references(source)
    digests = {scan.id: path_sha256(scan.path) for scan in scans}
    digest = hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()
    return ReferencePool.of_paths({scan.id: scan.path for scan in scans}, digests), digest


# Name, SHA-256 of the file (`None` if it is missing), and the features or the error that refused the scan.
ReadScan = tuple[str, str | None, BatchFeature | CTInputError]


class ReportWriter:
    """
    Writer of reports for batches of scans: a checkpoint with its references and an engine.

    Each reference is encoded once. Each scan is encoded separately, so its prompt does not depend on the batch.

    Args:
        checkpoint: folder or Hub id.
        engine: see [`merged_engine`].
        reference: normal scan, or folder or list of normal scans (see [`list_scans`]), used instead of the
            checkpoint's pool; or "nearest" for the scan of that pool whose mean features are closest.
        reference_seed: random seed for the choice of references.
        max_new_tokens: maximum length in tokens; `None` keeps the checkpoint's.
        allow_any_anatomy: also write reports of scans without lungs, which fail otherwise.
        dicom: folder for structured report and difference map of each scan. Scans that are not DICOM then fail.
        fhir: add a FHIR DiagnosticReport to each record.
        dtype: see [`load_checkpoint`].
        hub_kwargs: options of the Hub, such as `revision`.
        engine_options: see [`VLLMEngine`].

    Attributes:
        header: checkpoint, settings and versions; the first line of a file of reports.

    Raises:
        DiffVPCheckpointError, EngineError: checkpoint or engine cannot be loaded.
        ReferencePoolError: the checkpoint has no references.
    """

    def __init__(
        self,
        checkpoint: str | os.PathLike,
        engine: str = "transformers",
        *,
        reference: str | os.PathLike | None = None,
        reference_seed: int = 0,
        max_new_tokens: int | None = None,
        allow_any_anatomy: bool = False,
        dicom: str | os.PathLike | None = None,
        fhir: bool = False,
        dtype: str | None = None,
        hub_kwargs: dict | None = None,
        engine_options: dict | None = None,
    ):
        hub_kwargs = hub_kwargs or {}
        self.clinical = BatchResults(dicom, fhir) if dicom is not None or fhir else None
        check_engine(engine)
        self.nearest = reference == NEAREST
        pool = None if reference is None or self.nearest else _given_pool(reference)
        self.model, self.processor = load_checkpoint(checkpoint, dtype=dtype, **hub_kwargs)
        given = {}
        if pool is not None:
            self.processor.reference_pool, digest = pool
            given = {"references": {"scans": len(self.processor.reference_pool.entries), "sha256": digest}}
        elif self.nearest:
            given = {"references": NEAREST}
            if self.model.config.compares_voxels:
                raise ReferencePoolError(
                    "This checkpoint compares voxels: it has no features by which to find the nearest reference."
                )
        if self.processor.reference_pool is None:
            raise ReferencePoolError(
                "This checkpoint has no normal references: give --reference, a normal scan or a folder of them."
            )
        made_by = identify_model(self.model, hub_kwargs)
        self.engine = merged_engine(engine, self.model, self.processor.tokenizer, **(engine_options or {}))
        self.decoding = greedy(self.model, max_new_tokens)
        self.reference_seed = reference_seed
        self.allow_any_anatomy = allow_any_anatomy
        settings = {
            **made_by,
            **given,
            "reference_seed": reference_seed,
            "preprocessing": preprocessing(self.processor.image_processor),
            "decoding": describe_decoding(self.model, self.processor, self.decoding, self.engine.name),
        }
        if self.clinical is not None:
            settings["results"] = {"dicom": dicom is not None, "fhir": fhir}
        self.header = {
            "schema_version": SCHEMA_VERSION,
            "statement": RESEARCH_USE,
            "intended_domain": self.model.config.intended_domain,
            "settings": json.loads(json.dumps(settings)),  # tuples become lists, as in the file
            "versions": library_versions(),
        }
        self._stamp = {
            "checkpoint": {key: made_by["checkpoint"][key] for key in ("name", "commit")},
            "settings_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        }
        self._instruction = dict(self.processor(text=self.processor.instruction).to(self.model.device))
        self._pool = {entry["id"]: entry for entry in self.processor.reference_pool.entries}
        self._reference = lru_cache(KEPT_REFERENCES)(self._encode_reference)
        self._signature = lru_cache(None)(self._mean_features)  # a few hundred numbers each

    def read(self, scans: Sequence[ListedScan], workers: int, digest: Callable[[Path], str]) -> Iterator[ReadScan]:
        """Yield name, file digest and features of each scan, or the error that refused it, in order."""
        digests = deque()

        def paths() -> Iterator[Path]:
            for scan in scans:
                # Hashed before reading: if the file is replaced in between, the next run reads it again.
                digests.append(digest(scan.path) if scan.path.exists() else None)
                yield scan.path

        features = self.processor.image_processor.stream(
            paths(), workers, digest=True, allow_any_anatomy=self.allow_any_anatomy
        )
        for scan, found in zip(scans, features, strict=True):
            if self.clinical is not None and not isinstance(found, CTInputError):
                found = self.clinical.with_source(found, scan.path)
            yield scan.id, digests.popleft(), found

    def write(
        self, batch: Iterable[ReadScan], on_token: Callable[[int, int], None] | None = None
    ) -> tuple[list[dict], list[dict]]:
        """Write the reports of a batch.

        Args:
            batch: items of [`read`].
            on_token: see [`Engine.generate`].

        Returns:
            the records of the reports, and those of the failures.
        """
        prompts, begun, failures, sources = [], [], [], []
        for name, file_sha256, features in batch:
            if isinstance(features, CTInputError):
                failures.append({"id": name, "error": type(features).__name__, "message": str(features)})
                continue
            try:
                prompt, fields, known = self._prompt(features)
            except NoOtherReferenceError as error:
                failures.append({"id": name, "error": type(error).__name__, "message": str(error)})
                continue
            sources.append(features.get("source"))
            prompts.append(prompt)
            begun.append(({"id": name, "file_sha256": file_sha256, **fields}, known))
        written = self.engine.generate(prompts, self.decoding, on_token) if prompts else []
        records = [
            fields | checked_report(self.model, self.processor, tokens, decoding=self.decoding, **known) | self._stamp
            for (fields, known), tokens in zip(begun, written, strict=True)
        ]
        if self.clinical is not None:
            for record, source in zip(records, sources, strict=True):
                self.clinical.write(record, self.header, source)
        return records, failures

    def _prompt(self, features: BatchFeature) -> tuple[torch.Tensor, dict, dict]:
        """Return the prompt of a scan, (length, h), first fields of its record, arguments of [`checked_report`]."""
        [geometry] = features["geometry"]
        scan = self.model.encode_inputs(ct=features["ct"])
        logits = scan.pop("diagnosis_logits", None)
        name, (compared, is_hu) = self._choose(geometry.sha256, scan)
        with torch.no_grad():
            comparison = self.model.compare(**scan, **compared)
        [prompt] = self.model.embed_prompt(**self._instruction, diagnosis_logits=logits, comparison=comparison)
        findings = []
        if logits is not None:
            [findings] = describe_findings(self.model.config, logits, comparison.attributes, (geometry,))
        fields = {"sha256": geometry.sha256, "reference": name}
        if self.clinical is not None and self.clinical.dicom is not None:
            fields["difference"] = self.model.difference_map(comparison=comparison)[0].float().cpu(), geometry
        return prompt, fields, {"findings": findings, "geometry": geometry, "is_hu": geometry.is_hu and is_hu}

    def _choose(self, scan: str, encoded: dict) -> tuple[str, tuple[dict[str, torch.Tensor], bool]]:
        """
        Choose the reference of a scan.

        Args:
            scan: SHA-256 of the content of the scan.
            encoded: encoding of the scan.

        Returns:
            id of the reference, its encoding, and `True` if its voxels are Hounsfield units.
        """
        pool = self.processor.reference_pool

        def load(entry: dict[str, str]) -> tuple[str, tuple[dict[str, torch.Tensor], bool]]:
            return self._reference(entry["id"])

        if not self.nearest:
            return pool.choose(self.reference_seed, scan, load)
        own = encoded["ct_features"].mean(dim=1)
        return pool.choose_nearest(lambda entry: float(torch.dist(self._signature(entry["id"]), own)), scan, load)

    def _mean_features(self, name: str) -> torch.Tensor:
        encoded, _ = self._reference(name)[1]
        return encoded["reference_features"].mean(dim=1)

    def _encode_reference(self, name: str) -> tuple[str, tuple[dict[str, torch.Tensor], bool]]:
        """Return digest and encoding of a reference, and `True` if its voxels are Hounsfield units."""
        path = self.processor.reference_pool.fetch(self._pool[name])
        try:
            features = self.processor.image_processor(path, digest=True)
        except CTInputError as error:
            raise ReferencePoolError(f"Reference {name} cannot be used: {error}") from error
        geometry = features["geometry"][0]
        return geometry.sha256, (self.model.encode_inputs(reference=features["ct"]), geometry.is_hu)


def write_reports(
    scans: Sequence[ListedScan],
    output: str | os.PathLike,
    writer: ReportWriter,
    *,
    batch_size: int,
    workers: int,
    on_progress: Callable[[ReportFile], None] = lambda file: None,
    on_replaced: Callable[[int], None] = lambda count: None,
) -> ReportFile:
    """
    Write the reports of all scans that `output` does not hold yet. The next batch is read while one is decoded.

    Args:
        batch_size: number of scans to decode together.
        workers: number of threads that read.
        on_progress: called after each batch.
        on_replaced: called with the number of scans that share their name, but not their content, with a scan that has
            a report.

    Raises:
        BatchError: `output` is not a file of reports, or was started with other settings.
    """
    with ReportFile(output) as file:
        file.begin(writer.header)
        waiting, replaced = file.waiting(scans)
        if replaced:
            on_replaced(replaced)
        on_progress(file)
        for batch in _ahead(_batches(writer.read(waiting, workers, file.digest), batch_size)):
            file.add(*writer.write(batch))
            on_progress(file)
    return file


def _batches(items: Iterator, size: int) -> Iterator[list]:
    while batch := list(islice(items, size)):
        yield batch


def _ahead(items: Iterator) -> Iterator:
    """Yield each item while a thread prepares the next."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
