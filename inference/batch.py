# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Reports of many scans (`diffvp batch`), on one machine here and on many in `ray.py`.

    reports.jsonl           line 1: what writes the reports; then a line for each scan
    reports.failed.jsonl    scans that could not be read in the last run, and why

A run that was interrupted goes on where it was, by either of the two. A scan is done if its name *and* the SHA-256 of
its file have a report: another `scan.nii.gz` is read, and so is a file that was replaced. The last report of a
scan counts. Scans appear in these files by the names that the caller gave them, and nowhere else.
"""

import hashlib
import json
import os
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from transformers import BatchFeature

from ..clinical.results import BatchResults
from ..data.cache import ContentHashes, compare, preprocessing
from ..data.cases import SCAN_SUFFIXES, DatasetError, Problem, raise_problems, read_csv, shown
from ..data.scans import find_scans
from ..data.table import PATH_COLUMNS
from ..pipeline_diffvp import RESEARCH_USE, describe_findings
from ..references_diffvp import NoOtherReferenceError, ReferencePool, ReferencePoolError, path_sha256
from ..volume_diffvp import CTInputError
from .document import SCHEMA_VERSION, describe_decoding, identify_model, library_versions, written_report
from .engines import load_engine
from .report import greedy, load_checkpoint

# Encoded references that are kept: those of a pool of this size all, of a larger one those that were used last. Of
# 1,024 voxel tokens each takes 2 MB.
KEPT_REFERENCES = 2048
NEAREST = "nearest"


class BatchError(ValueError):
    """The output is no file of reports, or was begun with other settings."""


@dataclass(frozen=True)
class ListedScan:
    """A scan by its name in the output."""

    id: str
    path: Path


def list_scans(source: str | os.PathLike) -> list[ListedScan]:
    """
    The scans of a folder, at any depth; or of a list: a text file with a path in each line, or a .csv file with a
    column `path` (or `file_name`) and, if the paths are not to be the names, one `id`; or the one scan that is named.

    Paths are relative to the list. A folder that holds DICOM slices is a scan, wherever it lies.

    Raises:
        DatasetError: all that is wrong with the list. Whether its files can be read, only reading them tells.
    """
    source, problems = Path(source).absolute(), []
    if source.is_dir():
        found = find_scans(source)
        if not found:
            expected = f"one of {', '.join(SCAN_SUFFIXES)}, or folders of DICOM slices"
            raise DatasetError([Problem(source.name, None, "scans", "none in the folder", expected)])
        names = [source.name if path == source else path.relative_to(source).as_posix() for path in found]
        return list(map(ListedScan, names, found))
    if source.name.lower().endswith(SCAN_SUFFIXES) and source.is_file():
        return [ListedScan(source.name, source)]
    scans, rows = [], {}
    for number, name, path in _listed(source, problems):
        if not path:
            problems.append(Problem(source.name, number, "path", "empty", "the path of a scan"))
        elif name in rows:
            found = f"{shown(name)}, as in row {rows[name]}"
            problems.append(Problem(source.name, number, "id", found, "one row per id"))
        rows.setdefault(name, number)
        scans.append(ListedScan(name, source.parent / path))
    if not (scans or problems):
        problems.append(Problem(source.name, None, "list", "empty", "paths of scans"))
    raise_problems(problems)
    return scans


def _listed(source: Path, problems: list[Problem]) -> Iterator[tuple[int, str, str]]:
    """Row, name and path of each scan of a list."""
    if source.suffix.lower() not in (".csv", ".tsv"):
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            found = "missing" if isinstance(error, FileNotFoundError) else "no text"
            expected = "a folder of scans, or a list of them: text in UTF-8, or a table with a column path"
            problems.append(Problem(source.name, None, "list", found, expected))
            return
        for number, line in enumerate(lines, start=1):
            if path := line.strip():
                yield number, path, path
        return
    rows = read_csv(source, (), problems) or []
    column = next((column for column in PATH_COLUMNS if rows and column in rows[0].values), None)
    if rows and column is None:
        problems.append(
            Problem(source.name, 1, "header", "column path missing", "path or file_name, with the paths of the scans")
        )
        return
    for number, values in rows:
        path = values[column].strip()
        yield number, (values.get("id") or path).strip(), path


def _given_pool(source: str | os.PathLike) -> tuple[ReferencePool, str]:
    """The references that a user names, and a digest of their ids and contents.

    Raises:
        DatasetError: there are none, or one is missing.
    """
    scans = list_scans(source)
    raise_problems(
        [
            Problem(Path(source).name, None, "reference", "missing", "an existing file or folder", scan.id)
            for scan in scans
            if not scan.path.exists()
        ]
    )
    digests = {scan.id: path_sha256(scan.path) for scan in scans}
    digest = hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()
    return ReferencePool.of_paths({scan.id: scan.path for scan in scans}, digests), digest


# Name, SHA-256 of the file (`None` where there is none), and features or the error that refused the scan.
ReadScan = tuple[str, str | None, BatchFeature | CTInputError]


class ReportWriter:
    """
    A checkpoint that writes reports of batches of scans: encoder, references and engine.

    A reference is encoded once, however many scans are compared with it. A scan is encoded by itself, so that its
    prompt does not depend on the batch.

    Args:
        checkpoint: folder or Hub id.
        engine: see [`load_engine`].
        reference: a normal scan, or a folder or list of them (see [`list_scans`]), instead of the checkpoint's pool;
            or "nearest": of the checkpoint's pool the scan whose mean features are closest.
        reference_seed: of the choice of references.
        max_new_tokens: where to stop; the default is the checkpoint's.
        allow_any_anatomy: also write reports of scans without lungs, which fail otherwise.
        dicom: folder that gets structured report and difference map of each scan; what is no DICOM then fails.
        fhir: whether each record has a FHIR DiagnosticReport.
        dtype: see [`load_checkpoint`].
        hub_kwargs: of the Hub, such as `revision`.
        engine_options: see [`VLLMEngine`].

    Attributes:
        header: what writes the reports; the first line of their file.

    Raises:
        DiffVPCheckpointError, EngineError: it cannot be loaded.
        ReferencePoolError: it has no references.
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
        self.model, self.processor = load_checkpoint(checkpoint, dtype=dtype, **hub_kwargs)
        self.nearest = reference == NEAREST
        given = {}
        if reference is not None and not self.nearest:
            self.processor.reference_pool, digest = _given_pool(reference)
            given = {"references": {"scans": len(self.processor.reference_pool.entries), "sha256": digest}}
        elif self.nearest:
            given = {"references": NEAREST}
            if self.model.config.compares_voxels:
                raise ReferencePoolError(
                    "This checkpoint compares voxels, not features, by which the nearest is told."
                )
        if self.processor.reference_pool is None:
            raise ReferencePoolError(
                "This checkpoint has no normal references: give --reference, a normal scan or a folder of them."
            )
        made_by = identify_model(self.model, hub_kwargs)
        self.engine = load_engine(engine, self.model, self.processor.tokenizer, **(engine_options or {}))
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
            "settings": json.loads(json.dumps(settings)),  # as it will be read: tuples are lists
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
        """Name, file digest and features of each scan, or the error that refused it, in their order."""
        digests = deque()

        def paths() -> Iterator[Path]:
            for scan in scans:
                # Before it is read: a file that is replaced in between counts as another one in the next run.
                digests.append(digest(scan.path) if scan.path.exists() else None)
                yield scan.path

        features = self.processor.image_processor.stream(
            paths(), workers, digest=True, allow_any_anatomy=self.allow_any_anatomy
        )
        for scan, of in zip(scans, features, strict=True):
            if self.clinical is not None and not isinstance(of, CTInputError):
                of = self.clinical.with_source(of, scan.path)
            yield scan.id, digests.popleft(), of

    def write(
        self, batch: Iterable[ReadScan], on_tokens: Callable[[list[int]], None] | None = None
    ) -> tuple[list[dict], list[dict]]:
        """The records of a batch of what [`read`] yields, and those of its failures.

        Args:
            on_tokens: see [`Engine.generate`].
        """
        prompts, drafts, failures, sources = [], [], [], []
        for name, file_sha256, features in batch:
            if isinstance(features, CTInputError):
                failures.append({"id": name, "error": type(features).__name__, "message": str(features)})
                continue
            try:
                prompt, draft, known = self._prompt(features)
            except NoOtherReferenceError as error:
                failures.append({"id": name, "error": type(error).__name__, "message": str(error)})
                continue
            sources.append(features.get("source"))
            prompts.append(prompt)
            drafts.append(({"id": name, "file_sha256": file_sha256, **draft}, known))
        written = self.engine.generate(prompts, self.decoding, on_tokens) if prompts else []
        records = [
            draft | written_report(self.model, self.processor, tokens, decoding=self.decoding, **known) | self._stamp
            for (draft, known), tokens in zip(drafts, written, strict=True)
        ]
        if self.clinical is not None:
            for record, source in zip(records, sources, strict=True):
                self.clinical.write(record, self.header, source)
        return records, failures

    def _prompt(self, features: BatchFeature) -> tuple[torch.Tensor, dict, dict]:
        """Return the prompt of a scan, (length, h), first fields of its record, arguments of [`written_report`]."""
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
        draft = {"sha256": geometry.sha256, "reference": name}
        if self.clinical is not None and self.clinical.dicom is not None:
            draft["difference"] = self.model.difference_map(comparison=comparison)[0].float().cpu(), geometry
        return prompt, draft, {"findings": findings, "geometry": geometry, "is_hu": geometry.is_hu and is_hu}

    def _choose(self, scan: str, encoded: dict) -> tuple[str, tuple[dict[str, torch.Tensor], bool]]:
        """
        Choose the reference of a scan.

        Args:
            scan: SHA-256 of the content of the scan.
            encoded: encoding of the scan.

        Returns:
            id of the reference, its encoding, and whether its voxels are Hounsfield units.
        """
        pool = self.processor.reference_pool

        def load(entry: dict[str, str]) -> tuple[str, tuple[dict[str, torch.Tensor], bool]]:
            return self._reference(entry["id"])

        if not self.nearest:
            return pool.choose(self.reference_seed, scan, load)
        own = encoded["ct_features"].mean(dim=1)
        return pool.first_other(
            sorted(pool.entries, key=lambda entry: float(torch.dist(self._signature(entry["id"]), own))), scan, load
        )

    def _mean_features(self, name: str) -> torch.Tensor:
        encoded, _ = self._reference(name)[1]
        return encoded["reference_features"].mean(dim=1)

    def _encode_reference(self, name: str) -> tuple[str, tuple[dict[str, torch.Tensor], bool]]:
        """Return digest and encoding of a reference, and whether its voxels are Hounsfield units."""
        path = self.processor.reference_pool.fetch(self._pool[name])
        features = self.processor.image_processor(path, digest=True)
        geometry = features["geometry"][0]
        return geometry.sha256, (self.model.encode_inputs(reference=features["ct"]), geometry.is_hu)


class ReportFile:
    """
    A file of reports, and beside it one of failures, to which one run at a time adds.

    Attributes:
        done: the scans whose reports it holds: name and SHA-256 of the file.
        failed: how many scans failed in this run.
        digest: the SHA-256 of a file, or of the files of a folder; remembered beside the reports.

    Raises:
        BatchError: there is a file that is none of reports.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.failures = self.path.with_name(f"{self.path.stem}.failed.jsonl")
        self.done: dict[str, str | None] = {}
        self.failed = 0
        self.digest = ContentHashes(self.path.parent / f".{self.path.stem}.hashes")
        self._header, self._whole, self._files = None, 0, ()
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n") and self._header is not None:
                    break  # half a record: the run that wrote it was killed
                try:
                    entry = json.loads(line)
                    if number == 1:
                        self._header = {"settings": entry["settings"]}
                    else:
                        name = entry["id"]
                        self.done[name] = entry.get("file_sha256")  # earlier versions wrote none: read again
                except (ValueError, KeyError, TypeError) as error:
                    expected = "what diffvp batch writes; choose another output"
                    raise BatchError(f"{self.path.name}: line {number} is unknown; expected {expected}.") from error
                self._whole += len(line)
        if self._header is None:
            raise BatchError(f"{self.path.name} is empty; expected what diffvp batch writes, or no file.")

    def begin(self, header: dict) -> None:
        """Go on with the file, or begin it.

        Raises:
            BatchError: it was begun with other settings.
        """
        if self._header is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stage = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}")
            stage.write_text(_line(header), encoding="utf-8")
            self._whole = stage.stat().st_size
            os.replace(stage, self.path)  # so that no file has half a header
            self._header = header
        others = compare(self._header["settings"], header["settings"])
        if others:
            raise BatchError(
                f"{self.path.name} was begun with other settings: {'; '.join(others)}. Choose another output."
            )
        if not self._files:
            with self.path.open("r+b") as file:
                file.truncate(self._whole)
            self._files = (self.path.open("a", encoding="utf-8"), self.failures.open("w", encoding="utf-8"))

    def add(self, records: Sequence[dict], failures: Sequence[dict]) -> None:
        """Write records and failures of a batch; they are on the disk when this returns."""
        for file, lines in zip(self._files, (records, failures), strict=True):
            file.writelines(map(_line, lines))
            file.flush()
            os.fsync(file.fileno())
        self.done |= {record["id"]: record["file_sha256"] for record in records}
        self.failed += len(failures)

    def waiting(self, scans: Sequence[ListedScan]) -> tuple[list[ListedScan], int]:
        """The scans without a report, no longer `done`, and how many have the name of another that has one."""
        named = [scan for scan in scans if scan.id in self.done]
        same = {scan.id for scan in named if scan.path.exists() and self.digest(scan.path) == self.done[scan.id]}
        waiting = [scan for scan in scans if scan.id not in same]
        for scan in waiting:
            self.done.pop(scan.id, None)
        return waiting, len(named) - len(same)

    def __enter__(self) -> "ReportFile":
        return self

    def __exit__(self, *error) -> None:
        for file in self._files:
            file.close()


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
    Write the reports of all scans that `output` does not hold yet. While a batch is decoded, the next is read.

    Args:
        batch_size: scans that are decoded together.
        workers: threads that read.
        on_progress: is told after each batch.
        on_replaced: is told how many scans have the name, but not the content, of one that has a report.

    Raises:
        BatchError: `output` is no file of reports, or was begun with other settings.
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
    """Each item, while a thread makes the next."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def _line(entry: dict) -> str:
    return json.dumps(entry) + "\n"  # in ASCII, so that a name that is not UTF-8 can be written, too
