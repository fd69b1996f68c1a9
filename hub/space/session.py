# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What a visitor's run is: a scan and a reference in; slices, map, findings and a report that comes word by word out.

There is no page in it: `viewer.py` shows it, and tests run it alone. A [`Desk`] is what all visitors share, a
[`Study`] is what one of them looks at. Of an uploaded file nothing stays but what is shown: the file itself is deleted
as soon as it has been read, and a study's own files when it is closed.
"""

import contextlib
import json
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from ...data.phantom_cohort import single_phantom
from ...engines import TransformersEngine
from ...figures import body_mask, peak
from ...pipeline_diffvp import GIVEN_REFERENCE, describe_findings
from ...reading_diffvp import read_ct
from ...references_diffvp import ReferencePoolError
from ...reporting import (
    DIFFERENCE_MAP,
    REPORT_JSON,
    REPORT_TEXT,
    describe_report,
    display_grid,
    greedy,
    identify_model,
    load_checkpoint,
    report_page,
)
from ...volume_diffvp import CTGeometry, CTReadError

# A chest CT of 512 x 512 x 600 has 300 MB before compression.
MAX_FILE_BYTES = 512 * 2**20
SUFFIXES = (".nii", ".nii.gz", ".zip")

# Phantoms of a stream of their own: in no split and in no pool.
SAMPLE_SPLIT = "space"
SAMPLE_SEEDS = (3, 12, 1, 10)  # effusion, heart and vessels, emphysema, nothing

# What is shown is sampled from the scan itself over the box that the model saw, in a window wider than the model's.
DISPLAY_HU = (-1024.0, 1600.0)
TISSUE_HU = -520.0  # a voxel above it is tissue

LARGEST = "Largest difference"  # where the slices go when no finding is chosen


@dataclass(frozen=True, eq=False)
class Scan:
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


class Desk:
    """
    A loaded checkpoint, its references and the sample phantoms.

    Args:
        checkpoint: folder or Hub id.
        folder: where samples and the files of studies lie; whoever made it deletes it.

    Raises:
        DiffVPCheckpointError: there is no such checkpoint, or its files do not fit each other.
    """

    def __init__(self, checkpoint: str, folder: Path):
        self.model, self.processor = load_checkpoint(checkpoint)
        self.folder = Path(folder)
        self.sample_names = {f"Phantom {number}": seed for number, seed in enumerate(SAMPLE_SEEDS, 1)}
        self.sample = lru_cache(maxsize=None)(self._render)
        # As many as a pool that travels with a checkpoint has; of a larger one, those that were used last.
        self.reference = lru_cache(maxsize=8)(self._read_reference)
        self._signatures: dict[str, torch.Tensor] = {}

    def _render(self, name: str) -> Sample:
        scan, truth = single_phantom(self.sample_names[name], SAMPLE_SPLIT)
        path = self.folder / f"{name.lower().replace(' ', '_')}.nii.gz"
        nib.save(scan, path)
        return Sample(name, path, truth)

    def receive(self, path: str | Path) -> Scan:
        """Read an uploaded file and delete it, whether or not it could be read.

        Raises:
            CTInputError: it is too large, of another kind, or not a usable chest CT.
        """
        path = Path(path)
        try:
            size = path.stat().st_size
            if size > MAX_FILE_BYTES:
                found, expected = f"{size / 2**20:,.0f} MB", f"at most {MAX_FILE_BYTES / 2**20:,.0f} MB"
                raise CTReadError(path.name, "file size", found, expected)
            if not path.name.lower().endswith(SUFFIXES):
                raise CTReadError(path.name, "suffix", repr(path.suffix), ".nii, .nii.gz or a .zip of DICOM slices")
            return self.read(path, allow_any_anatomy=False)
        finally:
            path.unlink()
            with contextlib.suppress(OSError):  # the folder that was made for it, unless it holds more
                path.parent.rmdir()

    def read(self, path: Path, allow_any_anatomy: bool = True) -> Scan:
        """Read and encode a scan; a visitor's has to be of a chest."""
        volume = read_ct(path)
        processor = self.processor.image_processor
        inputs = processor(volume, digest=True, allow_any_anatomy=allow_any_anatomy)
        geometry = inputs["geometry"][0]
        shown = processor(volume, hu_window=DISPLAY_HU, **display_grid(processor, geometry))
        low, high = DISPLAY_HU
        hu = (shown["ct"][0, 0] + 1) * ((high - low) / 2) + low
        features = self.model.extract_features(inputs["ct"])
        return Scan(inputs["ct"], features, geometry, hu.round().short().numpy(), shown["geometry"][0].tensor_spacing)

    def _read_reference(self, name: str) -> Scan:
        pool = self._pool()
        scan = self.read(pool.fetch(next(entry for entry in pool.entries if entry["id"] == name)))
        self._signatures[name] = scan.features.mean(dim=1)
        return scan

    def _pool(self):
        if self.processor.reference_pool is None:
            raise ReferencePoolError("This checkpoint has no normal references: give one of your own.")
        return self.processor.reference_pool

    def random_reference(self, scan: Scan, seed: int) -> str:
        """Id of the reference that the processor, too, would draw for this scan and seed."""
        return self._pool().choose(seed, scan.geometry.sha256, self._identify)[0]

    def _identify(self, entry: dict[str, str]) -> tuple[str, None]:
        return self.reference(entry["id"]).geometry.sha256, None

    def nearest_reference(self, scan: Scan) -> str:
        """Id of the reference whose mean features are closest to the scan's."""
        pool, own = self._pool(), scan.features.mean(dim=1)
        for entry in pool.entries:
            if entry["id"] not in self._signatures:
                self.reference(entry["id"])
        nearest = sorted(pool.entries, key=lambda entry: float(torch.dist(self._signatures[entry["id"]], own)))
        return pool.first_other(nearest, scan.geometry.sha256, self._identify)[0]


class Study:
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
        scan: Scan,
        reference: Scan,
        *,
        reference_name: str | None = None,
        seed: int | None = None,
        truth: str | None = None,
    ):
        self.desk, self.scan, self.reference = desk, scan, reference
        self.reference_name, self.seed, self.truth = reference_name or GIVEN_REFERENCE, seed, truth
        self.text, self.document = "", None
        self._stopped = threading.Event()
        self._folder = tempfile.TemporaryDirectory(prefix="study-", dir=desk.folder)
        model = desk.model
        with torch.no_grad():
            self._comparison = model.compare(
                scan.tensor, reference.tensor, ct_features=scan.features, reference_features=reference.features
            )
        self._map = model.difference_map(comparison=self._comparison)[0].float().cpu()
        self._logits, evidence = None, None
        if model.diagnosis is not None:
            self._logits, voxel_logits = model.diagnose_voxels(scan.tensor, scan.features)
            evidence = voxel_logits[0].float().sigmoid().T.unflatten(-1, model.config.resnet_grid).cpu()
        self.findings = []
        if self._logits is not None:
            known = self._comparison.attributes
            [self.findings] = describe_findings(model.config, self._logits, known, (scan.geometry,))
        self.body = body_mask(scan.hu, TISSUE_HU)
        shown = _interpolate(self._map, scan.hu.shape)
        low, high = shown[self.body].min(), shown[self.body].max()
        self.difference = ((shown - low) / ((high - low) or 1.0)).clip(0, 1)
        self.places = self._find_places(evidence)

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
        self._folder.cleanup()

    def stream(self) -> Iterator[str]:
        """Write the report, greedily; yields it as far as it is written.

        It ends without a `document` where [`stop`] was called.
        """
        model, processor = self.desk.model, self.desk.processor
        streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        decoding = greedy(model)
        prompt = processor(text=processor.instruction).to(model.device)

        def write() -> torch.Tensor:
            try:
                return model.generate(
                    **prompt,
                    comparison=self._comparison,
                    diagnosis_logits=self._logits,
                    generation_config=decoding,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([_Stopped(self._stopped)]),
                )[0]
            except BaseException:
                streamer.end()  # else the reader would wait for ever
                raise

        written = ""
        with ThreadPoolExecutor(1) as thread:
            tokens = thread.submit(write)
            try:
                for piece in streamer:
                    written += piece
                    self.text = written.strip()
                    yield self.text
            except GeneratorExit:  # the visitor has left
                self.stop()
                raise
        if self._stopped.is_set():
            tokens.result()  # raises what was raised there
            return
        self.document = describe_report(
            model,
            processor,
            tokens.result(),
            decoding=decoding,
            engine=TransformersEngine(model).name,
            logits=self._logits,
            attributes=self._comparison.attributes,
            geometries=(self.scan.geometry, self.reference.geometry),
            reference=(self.reference_name, self.seed),
            made_by=identify_model(model, {}),
            truth=self.truth,
        )

    def write_files(self) -> list[Path]:
        """report.txt, report.json and the map on the grid of the visitor's file; they go when the study is closed."""
        folder = Path(self._folder.name)
        text, document = folder / REPORT_TEXT, folder / REPORT_JSON
        text.write_text(report_page(self.document), encoding="utf-8")
        document.write_text(json.dumps(self.document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return [
            text, document, self.desk.processor.save_map(folder / DIFFERENCE_MAP, self._map, self.scan.geometry)
        ]  # fmt: skip


class _Stopped(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


def _interpolate(values: torch.Tensor, size: tuple[int, int, int]) -> np.ndarray:
    return F.interpolate(values[None, None], size=size, mode="trilinear", align_corners=False)[0, 0].numpy()
