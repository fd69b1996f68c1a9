# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What a visitor's run is: a scan and a reference in; slices, map, findings and a report that comes word by word out.

There is no page in it: `viewer.py` shows it, and tests run it alone. A [`Desk`] is what all visitors share, a
[`PageStudy`] is what one of them looks at. Of an uploaded file nothing stays but what is shown: the file itself is deleted
as soon as it has been read, and a study's own files when it is closed.

On a Space with ZeroGPU, what computes runs in another process while it has a GPU. Nothing but its arguments and what
it returns goes over; so these functions are the desk's own, change nothing, and take and give tensors of the CPU.
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
from ...inference.report import DIFFERENCE_MAP, display_grid, greedy, load_checkpoint, write_texts
from ...pipeline_diffvp import GIVEN_REFERENCE, describe_findings
from ...reading_diffvp import read_ct
from ...references_diffvp import ReferencePoolError
from ...volume_diffvp import CTGeometry, CTReadError

# A chest CT of 512 x 512 x 600 has 300 MB before compression.
MAX_FILE_BYTES = 512 * 2**20
# Of all uploads that nobody has had read yet, and how long they wait for it.
MAX_UPLOADED_BYTES, MAX_UPLOADED_FILES, UPLOAD_SECONDS = 8 * MAX_FILE_BYTES, 32, 900.0
SUFFIXES = (".nii", ".nii.gz", ".zip")

# Phantoms of a stream of their own: in no split and in no pool.
SAMPLE_SPLIT = "space"
SAMPLE_SEEDS = (3, 12, 1, 10)  # effusion, heart and vessels, emphysema, nothing

# What is shown is sampled from the scan itself over the box that the model saw, in a window wider than the model's.
DISPLAY_HU = (-1024.0, 1600.0)

LARGEST = "Largest difference"  # where the slices go when no finding is chosen


@dataclass(frozen=True, eq=False)
class PageScan:
    """
    A scan as the model takes it and as the page shows it. The file that it came from may be gone.

    Attributes:
        tensor: (1, 1, depth, height, width) in [-1, 1].
        features: of the frozen encoder, (1, N, C).
        geometry: the way back to the file's grid, with the digest of the content.
        hu: HU of the same box on a finer grid, int16 (depth, height, width).
        spacing: mm of that grid, (depth, height, width).
    """

    tensor: torch.Tensor
    features: torch.Tensor
    geometry: CTGeometry
    hu: np.ndarray
    spacing: tuple[float, float, float]


@dataclass(frozen=True)
class Sample:
    """A phantom on disk: its name on the page and its true report."""

    name: str
    path: Path
    truth: str


def on_gpu(function: Callable) -> Callable:
    """A function that computes, as ZeroGPU wants it where a Space has that; elsewhere as it is."""
    try:
        import spaces
    except ModuleNotFoundError:  # Spaces have it
        return function
    return spaces.GPU(function)


class Desk:
    """
    A loaded checkpoint, its references and the sample phantoms.

    Args:
        checkpoint: folder or Hub id.
        folder: where uploads, samples and the files of studies lie, apart from each other; whoever made it deletes it.

    Attributes:
        uploads: the only folder that strangers write to, and of which they may name a file.
        studies: the only folder that they read from.

    Raises:
        DiffVPCheckpointError: there is no such checkpoint, or its files do not fit each other.
    """

    def __init__(self, checkpoint: str, folder: Path):
        self.model, self.processor = load_checkpoint(checkpoint)
        self.uploads, self.studies, self._samples, self._claimed = (
            Path(folder) / name for name in ("uploads", "studies", "samples", "claimed")
        )
        for part in (self.uploads, self.studies, self._samples, self._claimed):
            part.mkdir(parents=True, exist_ok=True)
        self.sample_names = {f"Phantom {number}": seed for number, seed in enumerate(SAMPLE_SEEDS, 1)}
        self.sample = lru_cache(maxsize=None)(self._render)
        # As many as a pool that travels with a checkpoint has; of a larger one, those that were used last.
        self.reference = lru_cache(maxsize=8)(self._read_reference)
        self._signatures: dict[str, torch.Tensor] = {}
        model, processor = self.model, self.processor

        def encode(tensor: torch.Tensor) -> torch.Tensor:
            return model.extract_features(tensor.to(model.device)).cpu()

        @torch.no_grad()
        def compare(scan: PageScan, reference: PageScan) -> dict:
            """What a study is made of: the comparison's attributes, the map, the classifier's view, the prompt."""
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
            """All tokens of a report so far, after each of them."""
            coming, tokens = queue.SimpleQueue(), []
            stopped = threading.Event()

            def put(token: list[int]) -> None:
                if stopped.is_set():
                    raise _Stopped
                coming.put(token)

            with ThreadPoolExecutor(1) as thread:
                engine = TransformersEngine(model)
                done = thread.submit(engine.generate, [prompt.to(model.device)], greedy(model), put)
                done.add_done_callback(lambda _: coming.put(None))
                try:
                    while (token := coming.get()) is not None:
                        tokens += token
                        yield list(tokens)
                    done.result()  # raises what was raised there
                finally:  # also where nobody reads on
                    stopped.set()

        self.encode, self.compare, self.write = on_gpu(encode), on_gpu(compare), on_gpu(write)

    def _render(self, name: str) -> Sample:
        scan, truth = single_phantom(self.sample_names[name], SAMPLE_SPLIT)
        path = self._samples / f"{name.lower().replace(' ', '_')}.nii.gz"
        nib.save(scan, path)
        return Sample(name, path, truth)

    def receive(self, path: str | Path | None) -> PageScan:
        """Read an uploaded file and delete it, whether or not it could be read.

        It is claimed before that, by another name: two visitors with the same file have one path, and nobody else's
        file is deleted in its place.

        Raises:
            CTInputError: it is no upload, too large, of another kind, or not a usable chest CT.
        """
        if not path:
            raise CTReadError("upload", "file", "none", "a file")
        path, folder = Path(os.path.realpath(path)), self._claimed / secrets.token_hex(16)
        if not path.is_relative_to(os.path.realpath(self.uploads)):
            raise CTReadError(path.name, "upload", "not an uploaded file", "a file that you have sent")
        claimed = folder / path.name
        folder.mkdir()
        try:
            try:
                os.rename(path, claimed)
            except OSError as error:
                expected = "the file once more: it is deleted when it has been read, also for who sent the same one"
                raise CTReadError(path.name, "upload", "no longer there", expected) from error
            size = claimed.stat().st_size
            if size > MAX_FILE_BYTES:
                found, expected = f"{size / 2**20:,.0f} MB", f"at most {MAX_FILE_BYTES / 2**20:,.0f} MB"
                raise CTReadError(path.name, "file size", found, expected)
            if not path.name.lower().endswith(SUFFIXES):
                raise CTReadError(path.name, "suffix", repr(path.suffix), ".nii, .nii.gz or a .zip of DICOM slices")
            return self.read(claimed, allow_any_anatomy=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def has_room(self, size: int) -> bool:
        """Whether so many more bytes may be uploaded; uploads that nobody had read in time make room.

        Half of one that was broken off lies there as well.
        """
        files, long_ago = {}, time.time() - UPLOAD_SECONDS
        for path in sorted(self.uploads.rglob("*"), reverse=True):  # what is inside a folder first
            with contextlib.suppress(OSError):  # it was claimed meanwhile, or the folder holds more
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
        """Read and encode a scan; a visitor's has to be of a chest."""
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
        """Id of the reference that the processor, too, would draw for this scan and seed."""
        return self._pool().choose(seed, scan.geometry.sha256, self._identify)[0]

    def _identify(self, entry: dict[str, str]) -> tuple[str, None]:
        return self.reference(entry["id"]).geometry.sha256, None

    def nearest_reference(self, scan: PageScan) -> str:
        """Id of the reference whose mean features are closest to the scan's."""
        pool, own = self._pool(), scan.features.mean(dim=1)
        for entry in pool.entries:
            if entry["id"] not in self._signatures:
                self.reference(entry["id"])
        nearest = sorted(pool.entries, key=lambda entry: float(torch.dist(self._signatures[entry["id"]], own)))
        return pool.first_other(nearest, scan.geometry.sha256, self._identify)[0]


class PageStudy:
    """
    A scan beside a reference: what can be shown at once, and the report, which [`stream`] writes.

    Args:
        reference_name: id in the pool; `None` for a file of the visitor's, whose name may name a patient.
        seed: with which the reference was drawn; `None` if it was chosen.
        truth: the true report of a phantom.

    Attributes:
        difference: the map on the grid that is shown; 0 is its smallest and 1 its largest value inside the body.
        body: the inside of the body, on the same grid.
        findings: each diagnosis with its probability, threshold, and whether it is positive.
        places: slices (depth, height, width) of the map's peak: of the whole map, and for each finding of the map
            weighted with where the classifier sees it.
        text: the report as far as it is written.
        document: what report.json holds; `None` until the report is complete.
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
        self._folder = desk.studies / secrets.token_hex(16)  # which nobody guesses
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
        """The findings that the report is prompted with, the most probable first."""
        return sorted((one for one in self.findings if one["positive"]), key=lambda one: -one["probability"])

    def _find_places(self, evidence: torch.Tensor | None) -> dict[str, tuple[int, int, int]]:
        coarse = self._map.shape
        body = torch.from_numpy(self.body).float()[None, None]
        body = F.adaptive_max_pool3d(body, coarse)[0, 0].numpy() > 0  # so that a small one does not fall through
        maps = {LARGEST: self._map.numpy()}
        for one in self.positive:
            index = [finding["label"] for finding in self.findings].index(one["label"])
            maps[one["label"]] = maps[LARGEST] * _interpolate(evidence[index], coarse)
        return {name: self._shown_voxel(peak(values, body), coarse) for name, values in maps.items()}

    def _shown_voxel(self, place: tuple[int, int, int], coarse: tuple[int, int, int]) -> tuple[int, int, int]:
        """A voxel of the body on the grid that is shown, in the middle of those that a coarser one holds."""
        axes = list(zip(place, coarse, self.body.shape, strict=True))
        cell = tuple(slice(index * n // size, -(-(index + 1) * n // size)) for index, size, n in axes)
        inside = np.argwhere(self.body[cell])
        middle = inside[len(inside) // 2]
        return tuple(int(part.start + offset) for part, offset in zip(cell, middle, strict=True))

    def stop(self) -> None:
        """Let [`stream`] end after the word that it is at."""
        self._stopped.set()

    def close(self) -> None:
        """Stop, and delete the study's files."""
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def stream(self) -> Iterator[str]:
        """Write the report, greedily; yields it as far as it is written.

        It ends without a `document` where [`stop`] was called.
        """
        model, processor, tokens = self.desk.model, self.desk.processor, []
        with contextlib.closing(self.desk.write(self._prompt)) as steps:
            for tokens in steps:
                if self._stopped.is_set():
                    return
                text = processor.decode(tokens, skip_special_tokens=True).strip()
                if not text.endswith("\ufffd"):  # half of a letter
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
        """report.txt, report.json and the map on the grid of the visitor's file; they go when the study is closed."""
        image = self.desk.processor.save_map(self._folder / DIFFERENCE_MAP, self._map, self.scan.geometry)
        return [*write_texts(self._folder, self.document), image]


class _Stopped(Exception):
    """Nobody reads on."""


def _interpolate(values: torch.Tensor, size: tuple[int, int, int]) -> np.ndarray:
    return F.interpolate(values[None, None], size=size, mode="trilinear", align_corners=False)[0, 0].numpy()
