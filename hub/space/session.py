# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Session of a visitor: a scan and a reference become slices, a map, findings, and a report written word by word.

This module is independent of Gradio: `viewer.py` makes the HTML. All visitors share one [`Desk`]; each visitor has a
[`PageStudy`]. An uploaded file is deleted as soon as it is read, and the files of a study when it is closed.

On a Space with ZeroGPU, computing functions run in another process while it has a GPU. Only arguments and results
cross over, so these functions are attributes of the desk, have no side effects, and take and return CPU tensors.
"""

import contextlib
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from ...data.phantom_cohort import single_phantom
from ...inference.document import describe_report, identify_model
from ...inference.engines import TransformersEngine
from ...inference.figure import body_mask, peak
from ...inference.folder import DIFFERENCE_MAP
from ...inference.report import display_grid, greedy, load_checkpoint, write_report_texts
from ...reading_diffvp import read_ct
from ...references_diffvp import ReferencePoolError
from ...report_diffvp import GIVEN_REFERENCE, describe_findings
from ...resampling_diffvp import CTGeometry
from ...volume_diffvp import CTReadError

# A chest CT of 512 x 512 x 600 has 300 MB before compression.
MAX_FILE_BYTES = 512 * 2**20
# Limits of uploads that have not been read yet, and seconds for which they are kept.
MAX_UPLOADED_BYTES, MAX_UPLOADED_FILES, UPLOAD_SECONDS = 8 * MAX_FILE_BYTES, 32, 900.0
SUFFIXES = (".nii", ".nii.gz", ".zip")

# A separate stream of phantoms, in no split and in no pool.
SAMPLE_SPLIT = "space"
SAMPLE_SEEDS = (3, 12, 1, 10)  # effusion, heart and vessels, emphysema, nothing

# Display volumes are sampled from the scan itself, over the box that the model saw, in a wider window.
DISPLAY_HU = (-1024.0, 1600.0)

LARGEST = "Largest difference"  # place of the slices if no finding is chosen


@dataclass(frozen=True, eq=False)
class PageScan:
    """
    A scan as the model takes it and as the page shows it. Its file may be deleted already.

    Attributes:
        tensor: (1, 1, depth, height, width) in [-1, 1].
        features: features of the frozen encoder, (1, N, C).
        geometry: transform to the grid of the file, with the digest of the content.
        hu: HU of the same box on a finer grid, int16 (depth, height, width).
        spacing: voxel size of that grid in mm, (depth, height, width).
    """

    tensor: torch.Tensor
    features: torch.Tensor
    geometry: CTGeometry
    hu: np.ndarray
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Sample:
    """A phantom on disk, with its name on the page and its true report."""

    name: str
    path: Path
    truth: str


def on_gpu(function: Callable) -> Callable:
    """Wrap a computing function for ZeroGPU on a Space; elsewhere, return it unchanged."""
    try:
        import spaces
    except ModuleNotFoundError:  # only Spaces have it
        return function
    return spaces.GPU(function)


class Desk:
    """
    A loaded checkpoint with its references and the sample phantoms.

    Args:
        checkpoint: folder or Hub id.
        folder: parent of the folders for uploads, samples and studies. The caller deletes it.

    Attributes:
        uploads: the only folder that visitors write to and whose files they may name.
        studies: the only folder that visitors read from.
        claimed: folder of uploads while they are read.

    Raises:
        DiffVPCheckpointError: there is no such checkpoint, or its files do not fit together.
    """

    def __init__(self, checkpoint: str, folder: Path):
        self.model, self.processor = load_checkpoint(checkpoint)
        self.uploads, self.studies, self._samples, self.claimed = (
            Path(folder) / name for name in ("uploads", "studies", "samples", "claimed")
        )
        for part in (self.uploads, self.studies, self._samples, self.claimed):
            part.mkdir(parents=True, exist_ok=True)
        self.sample_names = {f"Phantom {number}": seed for number, seed in enumerate(SAMPLE_SEEDS, 1)}
        self.sample = lru_cache(maxsize=None)(self._render)
        # Enough for the pool shipped with a checkpoint; of a larger pool, the most recently used are kept.
        self.reference = lru_cache(maxsize=8)(self._read_reference)
        self._signatures: dict[str, torch.Tensor] = {}
        model, processor = self.model, self.processor

        def encode(tensor: torch.Tensor) -> torch.Tensor:
            return model.extract_features(tensor.to(model.device)).cpu()

        @torch.no_grad()
        def compare(scan: PageScan, reference: PageScan) -> dict:
            """Compute the contents of a study: finding attributes, map, classifier output, prompt."""
            tensors = (scan.tensor, reference.tensor, scan.features, reference.features)
            ct, other, ct_features, reference_features = (tensor.to(model.device) for tensor in tensors)
            comparison = model.compare(ct, other, ct_features=ct_features, reference_features=reference_features)
            logits, evidence = None, None
            if model.diagnosis is not None:
                logits, voxel_logits = model.diagnose_voxels(ct, ct_features)
                evidence = voxel_logits[0].float().sigmoid().T.unflatten(-1, model.config.feature_grid).cpu()
            instruction = processor(text=processor.instruction).to(model.device)
            [prompt] = model.embed_prompt(**instruction, diagnosis_logits=logits, comparison=comparison)
            return {
                "attributes": comparison.attributes,
                "map": model.difference_map(comparison=comparison)[0].float().cpu(),
                "logits": None if logits is None else logits.cpu(),
                "evidence": evidence,
                "prompt": prompt.cpu(),
            }

        def write(prompt: torch.Tensor) -> Iterator[list[int]]:
            """Yield all tokens generated so far, after each token."""
            coming, tokens = queue.SimpleQueue(), []
            stopped = threading.Event()

            def put(_: int, token: int) -> None:
                if stopped.is_set():
                    raise _Stopped
                coming.put(token)

            with ThreadPoolExecutor(1) as thread:
                engine = TransformersEngine(model)
                done = thread.submit(engine.generate, [prompt.to(model.device)], greedy(model), put)
                done.add_done_callback(lambda _: coming.put(None))
                try:
                    while (token := coming.get()) is not None:
                        tokens.append(token)
                        yield list(tokens)
                    done.result()  # raises an error of the thread
                finally:  # also if the reader stops
                    stopped.set()

        self.encode, self.compare, self.write = on_gpu(encode), on_gpu(compare), on_gpu(write)

    def _render(self, name: str) -> Sample:
        scan, truth = single_phantom(self.sample_names[name], SAMPLE_SPLIT)
        path = self._samples / f"{name.lower().replace(' ', '_')}.nii.gz"
        nib.save(scan, path)
        return Sample(name, path, truth)

    def receive(self, path: str | Path | None) -> PageScan:
        """Read an uploaded file and delete it, even if it cannot be read.

        Raises:
            CTInputError: it is not an upload, too large, of another format, or not a usable chest CT.
        """
        with self._claim(path) as claimed:
            size = claimed.stat().st_size
            if size > MAX_FILE_BYTES:
                found, expected = f"{size / 2**20:,.0f} MB", f"at most {MAX_FILE_BYTES / 2**20:,.0f} MB"
                raise CTReadError(claimed.name, "file size", found, expected)
            if not claimed.name.lower().endswith(SUFFIXES):
                expected = ".nii, .nii.gz or a .zip of DICOM slices"
                raise CTReadError(claimed.name, "suffix", repr(claimed.suffix), expected)
            return self.read(claimed, allow_any_anatomy=False)

    def receive_reference(self, path: str | Path | None, scan: PageScan | None) -> PageScan:
        """Read an uploaded reference for a scan and delete it, as [`receive`] does.

        Raises:
            CTInputError: as for [`receive`]; there is no scan yet, or the reference is that scan itself.
        """
        if scan is None:
            with self._claim(path) as claimed:
                raise CTReadError(claimed.name, "reference", "without a scan", "a scan first, then its reference")
        reference = self.receive(path)
        if reference.geometry.sha256 == scan.geometry.sha256:
            expected = "another scan, a normal one"
            raise CTReadError(reference.geometry.source, "reference", "the scan itself", expected)
        return reference

    @contextlib.contextmanager
    def _claim(self, path: str | Path | None) -> Iterator[Path]:
        """Yield an uploaded file at a private path, and delete it afterwards.

        Two visitors who upload the same file share one path, and neither must delete the file of the other.

        Raises:
            CTReadError: it is not an upload, or no longer there.
        """
        if not path:
            raise CTReadError("upload", "file", "none", "a file")
        path, folder = Path(os.path.realpath(path)), self.claimed / secrets.token_hex(16)
        inside = path.is_relative_to(os.path.realpath(self.uploads))
        # A folder, such as that of the uploads, holds files of other visitors.
        if not inside or (os.path.exists(path) and not os.path.isfile(path)):
            raise CTReadError(path.name, "upload", "not an uploaded file", "a file that you have sent")
        claimed = folder / path.name
        folder.mkdir()
        try:
            try:
                os.rename(path, claimed)
            except OSError as error:
                expected = "the file again: it was deleted after another visitor's identical upload was read"
                raise CTReadError(path.name, "upload", "no longer there", expected) from error
            yield claimed
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def has_room(self, size: int) -> bool:
        """True if `size` more bytes may be uploaded. Expired uploads, including partial ones, are deleted."""
        files, long_ago = {}, time.time() - UPLOAD_SECONDS
        for path in sorted(self.uploads.rglob("*"), reverse=True):  # contents before their folder
            with contextlib.suppress(OSError):  # it was claimed in the meantime, or the folder is not empty
                status = path.stat()
                if path.is_dir():
                    if status.st_mtime < long_ago:
                        path.rmdir()
                elif status.st_mtime < long_ago:
                    path.unlink()
                else:
                    files[path] = status.st_size
        return len(files) < MAX_UPLOADED_FILES and sum(files.values()) + size <= MAX_UPLOADED_BYTES

    def read(self, path: Path, allow_any_anatomy: bool = True) -> PageScan:
        """Read and encode a scan. A scan of a visitor must show a chest."""
        volume = read_ct(path)
        processor = self.processor.image_processor
        inputs = processor(volume, digest=True, allow_any_anatomy=allow_any_anatomy)
        geometry = inputs["geometry"][0]
        shown = processor(volume, hu_window=DISPLAY_HU, **display_grid(processor, geometry))
        low, high = DISPLAY_HU
        hu = (shown["ct"][0, 0] + 1) * ((high - low) / 2) + low
        features, spacing = self.encode(inputs["ct"]), shown["geometry"][0].tensor_spacing
        return PageScan(inputs["ct"], features, geometry, hu.round().short().numpy(), spacing)

    def _read_reference(self, name: str) -> PageScan:
        pool = self._pool()
        scan = self.read(pool.fetch(next(entry for entry in pool.entries if entry["id"] == name)))
        self._signatures[name] = scan.features.mean(dim=1)
        return scan

    def _pool(self):
        if self.processor.reference_pool is None:
            raise ReferencePoolError("This checkpoint has no normal references: give one of your own.")
        return self.processor.reference_pool

    def random_reference(self, scan: PageScan, seed: int) -> str:
        """Return the id of the reference that the processor would draw for this scan and seed."""
        return self._pool().choose(seed, scan.geometry.sha256, self._identify)[0]

    def _identify(self, entry: dict[str, str]) -> tuple[str, None]:
        return self.reference(entry["id"]).geometry.sha256, None

    def nearest_reference(self, scan: PageScan) -> str:
        """Return the id of the reference whose mean features are closest to those of the scan."""
        pool, own = self._pool(), scan.features.mean(dim=1)
        for entry in pool.entries:
            if entry["id"] not in self._signatures:
                self.reference(entry["id"])
        return pool.choose_nearest(
            lambda entry: float(torch.dist(self._signatures[entry["id"]], own)), scan.geometry.sha256, self._identify
        )[0]


class PageStudy:
    """
    A scan compared with a reference. Map and findings are available at once; [`stream`] writes the report.

    Args:
        reference_name: id in the pool; `None` for an uploaded file, whose name may name a patient.
        seed: seed with which the reference was drawn; `None` if it was chosen.
        truth: true report of a phantom.

    Attributes:
        difference: map on the display grid, scaled so that 0 and 1 are its extreme values inside the body.
        body: mask of the inside of the body on the same grid.
        findings: label, probability, threshold and `positive` of each finding.
        places: index (depth, height, width) of the peak of the map, and for each positive finding that of the map
            weighted with the evidence of the classifier.
        text: report text written so far.
        document: content of report.json; `None` until the report is complete.
    """

    def __init__(
        self,
        desk: Desk,
        scan: PageScan,
        reference: PageScan,
        *,
        reference_name: str | None = None,
        seed: int | None = None,
        truth: str | None = None,
    ):
        self.desk, self.scan, self.reference = desk, scan, reference
        self.reference_name, self.seed, self.truth = reference_name or GIVEN_REFERENCE, seed, truth
        self.text, self.document = "", None
        self._stopped = threading.Event()
        self._folder = desk.studies / secrets.token_hex(16)  # cannot be guessed
        self._folder.mkdir()
        compared = desk.compare(scan, reference)
        self._map, self._logits, self._prompt = compared["map"], compared["logits"], compared["prompt"]
        self._attributes, self.findings = compared["attributes"], []
        if self._logits is not None:
            [self.findings] = describe_findings(desk.model.config, self._logits, self._attributes, (scan.geometry,))
        self.body = body_mask(scan.hu)
        shown = _interpolate(self._map, scan.hu.shape)
        low, high = shown[self.body].min(), shown[self.body].max()
        self.difference = ((shown - low) / ((high - low) or 1.0)).clip(0, 1)
        self.places = self._find_places(compared["evidence"])

    @property
    def positive(self) -> list[dict]:
        """Positive findings, with which the report is prompted, most probable first."""
        return sorted((one for one in self.findings if one["positive"]), key=lambda one: -one["probability"])

    def _find_places(self, evidence: torch.Tensor | None) -> dict[str, tuple[int, int, int]]:
        coarse = self._map.shape
        body = torch.from_numpy(self.body).float()[None, None]
        body = F.adaptive_max_pool3d(body, coarse)[0, 0].numpy() > 0  # keeps small bodies
        maps = {LARGEST: self._map.numpy()}
        for one in self.positive:
            index = [finding["label"] for finding in self.findings].index(one["label"])
            maps[one["label"]] = maps[LARGEST] * _interpolate(evidence[index], coarse)
        return {name: self._shown_voxel(peak(values, body), coarse) for name, values in maps.items()}

    def _shown_voxel(self, place: tuple[int, int, int], coarse: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return the middle one of the voxels of the body, on the display grid, that lie in a coarse voxel."""
        axes = list(zip(place, coarse, self.body.shape, strict=True))
        cell = tuple(slice(index * n // size, -(-(index + 1) * n // size)) for index, size, n in axes)
        inside = np.argwhere(self.body[cell])
        middle = inside[len(inside) // 2]
        return tuple(int(part.start + offset) for part, offset in zip(cell, middle, strict=True))

    def stop(self) -> None:
        """Make [`stream`] end after the current token."""
        self._stopped.set()

    def close(self) -> None:
        """Stop writing and delete the files of the study."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def stream(self) -> Iterator[str]:
        """Write the report greedily and yield the text written so far.

        After [`stop`] it ends without a `document`.
        """
        model, processor, tokens = self.desk.model, self.desk.processor, []
        with contextlib.closing(self.desk.write(self._prompt)) as steps:
            for tokens in steps:
                if self._stopped.is_set():
                    return
                text = processor.decode(tokens, skip_special_tokens=True).strip()
                if not text.endswith("\ufffd"):  # an incomplete character
                    self.text = text
                    yield text
        self.text = processor.decode(tokens, skip_special_tokens=True).strip()
        yield self.text
        self.document = describe_report(
            model,
            processor,
            tokens,
            decoding=greedy(model),
            engine=TransformersEngine(model).name,
            logits=self._logits,
            attributes=self._attributes,
            geometries=(self.scan.geometry, self.reference.geometry),
            reference=(self.reference_name, self.seed),
            made_by=identify_model(model, {}),
            truth=self.truth,
        )

    def write_files(self) -> list[Path]:
        """Write report.txt, report.json and the map on the grid of the scan. They are deleted with the study."""
        image = self.desk.processor.save_map(self._folder / DIFFERENCE_MAP, self._map, self.scan.geometry)
        return [*write_report_texts(self._folder, self.document), image]


class _Stopped(Exception):
    """The reader has stopped."""


def _interpolate(values: torch.Tensor, size: tuple[int, int, int]) -> np.ndarray:
    return F.interpolate(values[None, None], size=size, mode="trilinear", align_corners=False)[0, 0].numpy()
