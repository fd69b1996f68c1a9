# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write the report of one scan to a folder, with its difference map, a figure and the provenance.

    report.txt               the report, below the research-use statement
    report.json              the report by region, findings with probabilities, provenance (docs/reports.md)
    difference_map.nii.gz    on the grid of the input
    figure.png               target, reference and difference map in three planes, the findings and the text
"""

import copy
import ctypes
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import GenerationConfig

from ..anatomy_diffvp import MIN_VOLUME
from ..encoders_diffvp import DiffVPEncoderError
from ..files import write_folder
from ..map_diffvp import save_map
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..processing_diffvp import DiffVPProcessor
from ..reading_diffvp import read_ct
from ..references_diffvp import ReferencePoolError
from ..report_diffvp import GIVEN_REFERENCE, MAX_NEW_TOKENS, RESEARCH_USE, stated_domain
from ..resampling_diffvp import CTGeometry
from ..storage_diffvp import DiffVPCheckpointError, check_checkpoint_name
from ..volume_diffvp import CTInputError, CTVolume
from .document import describe_report, identify_model, reference_line, report_page
from .engines import Engine, EngineError, TransformersEngine
from .figure import draw_figure, to_hu
from .folder import DIFFERENCE_MAP, FIGURE, REPORT_JSON, REPORT_TEXT, TRUE_REPORT, ReportError, check_output
from .int8 import round_weights

DTYPES = ("float32", "bfloat16", "int8")  # float16 takes minutes per report on CPUs

# The figure is sampled from the scan itself, which is finer than the model's tensor.
FIGURE_SPACING = 1.5  # mm

# Errors that the caller can cause and repair. Their messages say how.
EXPECTED_ERRORS = (
    CTInputError,
    ReferencePoolError,
    DiffVPCheckpointError,
    DiffVPEncoderError,
    EngineError,
    ReportError,
)


@dataclass(frozen=True)
class Report:
    """
    Output of [`write_report`] and [`save_report`].

    Attributes:
        folder: folder that holds the files.
        document: content of report.json.
    """

    folder: Path
    document: dict

    @property
    def text(self) -> str:
        """Generated text, unchanged."""
        return self.document["report"]

    @property
    def regions(self) -> dict[str, str]:
        """{region: text} in canonical order; text outside all regions is under "other"."""
        return self.document["regions"]

    @property
    def findings(self) -> list[dict]:
        """Findings of the classifier, see [`describe_findings`]; empty for a model without one."""
        return self.document["findings"]

    @property
    def figure(self) -> Path:
        return self.folder / FIGURE


def load_checkpoint(name: str | os.PathLike, device: str | None = None, dtype: str | None = None, **hub_kwargs):
    """
    Load model and processor of a checkpoint from a folder or the Hub, with the code of this package.

    Args:
        device: device to compute on; `None` takes a GPU if there is one.
        dtype: "float32" or "bfloat16" for all weights; "int8" for the LLM (see [`round_weights`]) and float32 for
            the rest, on the CPU only; `None` keeps the checkpoint's.
        hub_kwargs: options of the Hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        DiffVPCheckpointError: there is no such checkpoint, or its files do not fit together.
    """
    check_checkpoint_name(name, **hub_kwargs)
    if dtype not in (None, *DTYPES):
        raise DiffVPCheckpointError(f"{name}: dtype: {dtype} (expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}).")
    if device is None:
        device = "cuda" if torch.cuda.is_available() and dtype != "int8" else "cpu"
    if dtype == "int8" and torch.device(device).type != "cpu":
        raise DiffVPCheckpointError(f"{name}: dtype: int8 on {device} (expected device cpu).")
    weights = {} if dtype is None else {"dtype": torch.float32 if dtype == "int8" else getattr(torch, dtype)}
    model = DiffVPForConditionalGeneration.from_pretrained(name, **weights, **hub_kwargs).to(device)
    if dtype == "int8":
        round_weights(model)
    # Otherwise transformers would ask at the console whether to run the checkpoint's copy of the code.
    processor = DiffVPProcessor.from_pretrained(name, trust_remote_code=False, **hub_kwargs)
    return model, processor


@dataclass(frozen=True)
class ComposedReport:
    """
    Report that is not written to files yet; the model is no longer needed.

    Attributes:
        document: content of report.json.
        difference: difference map on the processor's grid, (depth, height, width).
        scans: scan and reference, each with its options of preprocessing.
        geometry: grid of the scan.
        truth: true report of a phantom.
    """

    document: dict
    difference: torch.Tensor
    scans: tuple[tuple[CTVolume, dict], tuple[CTVolume, dict]]
    geometry: CTGeometry
    truth: str | None


def write_report(
    model,
    processor,
    ct,
    output_dir: str | os.PathLike,
    *,
    on_step: Callable[[str], None] = lambda step: None,
    **options,
) -> Report:
    """
    Write the report of one scan with difference map, figure and provenance.

    Args:
        output_dir: folder for the files. It appears complete or not at all, and replaces only an earlier report.
        options: options of [`compose_report`].

    Raises:
        ReportError: `output_dir` holds other files; and whatever [`compose_report`] raises.
    """
    check_output(Path(output_dir))
    composed = compose_report(model, processor, ct, on_step=on_step, **options)
    return save_report(composed, processor, output_dir, on_step=on_step)


def compose_report(
    model,
    processor,
    ct,
    *,
    reference=None,
    reference_seed: int = 0,
    allow_non_hu: bool = False,
    allow_any_anatomy: bool = False,
    hu_window: tuple[float, float] | None = None,
    foreground_hu: float | None = None,
    max_new_tokens: int | None = None,
    truth: str | None = None,
    engine: Engine | None = None,
    hub_kwargs: dict | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> ComposedReport:
    """
    Compare one scan with a reference, and generate its report. Decoding is greedy.

    Args:
        model, processor: a loaded checkpoint ([`DiffVPForConditionalGeneration`], [`DiffVPProcessor`]).
        ct: scan: a [`CTVolume`], or whatever [`read_ct`] reads without further options.
        reference: normal scan to compare with, as `ct`; `None` samples from the checkpoint's pool by `reference_seed`.
        allow_non_hu, hu_window, foreground_hu: see [`DiffVPImageProcessorKwargs`]; the defaults are the checkpoint's.
        allow_any_anatomy: also accept scans without lungs, on which the model was not trained.
        max_new_tokens: maximum length in tokens; `None` keeps the checkpoint's.
        truth: true report of a phantom, to be written next to the generated one and compared with it.
        engine: decoding engine, see [`merged_engine`]; `None` is the model's own `generate`.
        hub_kwargs: `revision`, `cache_dir` or `token` with which the checkpoint was loaded from the Hub.
        on_step: called with the name of each step as it begins.

    Raises:
        ReportError: the model was not loaded from a checkpoint.
        CTInputError: a scan is not a usable chest CT. For another body region, this is a `CTAnatomyError`.
        ReferencePoolError: no reference is given and the checkpoint has no pool, or its files differ from its index.
    """
    on_step("Hashing the weights")
    made_by = identify_model(model, hub_kwargs or {})

    on_step("Reading the scan and its reference")
    options = {"allow_non_hu": allow_non_hu, "hu_window": hu_window, "foreground_hu": foreground_hu}
    options = {key: value for key, value in options.items() if value is not None}
    scan = _read(ct, allow_non_hu)
    if reference is None:
        reference_name, reference = processor.choose_reference(scan.sha256, reference_seed)
        named = reference_name, reference_seed
    else:
        reference, named = _read(reference, allow_non_hu), (GIVEN_REFERENCE, None)
    inputs = processor(ct=scan, reference=reference, allow_any_anatomy=allow_any_anatomy, **options)
    geometries = inputs.geometry[0], inputs.reference_geometry[0]

    on_step("Encoding")
    inputs = inputs.to(model.device)
    encoded = model.encode_inputs(inputs.pop("ct"), inputs.pop("reference"))
    logits = encoded.pop("diagnosis_logits", None)
    with torch.no_grad():
        comparison = model.compare(**encoded)
    difference = model.difference_map(comparison=comparison)[0].float().cpu()
    prompt = model.embed_prompt(**inputs, diagnosis_logits=logits, comparison=comparison)
    attributes = comparison.attributes

    del encoded, comparison
    _return_freed_memory()
    on_step("Writing the report")
    decoding = greedy(model, max_new_tokens)
    engine = engine or TransformersEngine(model)
    [tokens] = engine.generate(prompt, decoding)
    document = describe_report(
        model, processor, tokens, decoding=decoding, engine=engine.name, logits=logits,
        attributes=attributes, geometries=geometries, reference=named, made_by=made_by, options=options,
        truth=truth,
    )  # fmt: skip

    # HU options given for a scan that is not in HU do not apply to a reference that is.
    own = {"allow_non_hu": allow_non_hu} if geometries[1].is_hu and not geometries[0].is_hu else options
    return ComposedReport(document, difference, ((scan, options), (reference, own)), geometries[0], truth)


def _return_freed_memory() -> None:
    """Return to the system what encoding has freed, 60 MB or more, before the LLM's weights come into memory."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc; other C libraries keep less
        if trim is not None:
            trim(0)


def save_report(
    composed: ComposedReport,
    processor,
    output_dir: str | os.PathLike,
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """
    Draw the figure of a report, and write all its files.

    Args:
        output_dir: folder for the files. It appears complete or not at all, and replaces only an earlier report.

    Raises:
        ReportError: `output_dir` holds other files.
    """
    output = Path(output_dir).absolute()
    check_output(output)
    on_step("Drawing the figure")

    def write(folder: Path) -> None:
        write_report_texts(folder, composed.document)
        if composed.truth is not None:
            (folder / TRUE_REPORT).write_text(composed.truth + "\n", encoding="utf-8")
        save_map(folder / DIFFERENCE_MAP, composed.difference, composed.geometry)
        drawing = _sample_for_figure(processor.image_processor, composed)
        draw_figure(folder / FIGURE, *drawing.pop("volumes"), **drawing, **_captions(composed.document))
        check_output(output)  # it may have changed in the meantime

    write_folder(output, write)
    return Report(output, composed.document)


def _read(ct, allow_non_hu: bool) -> CTVolume:
    """Read a scan once, for both the tensor and the figure."""
    if isinstance(ct, (list, tuple)):
        raise ReportError(f"ct: {len(ct)} scans (expected one)")
    return ct if isinstance(ct, CTVolume) else read_ct(ct, allow_non_hu=allow_non_hu)


def write_report_texts(folder: Path, document: dict) -> tuple[Path, Path]:
    """Write report.txt and report.json to a folder."""
    text, fields = folder / REPORT_TEXT, folder / REPORT_JSON
    text.write_text(report_page(document), encoding="utf-8")
    fields.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return text, fields


def greedy(model, max_new_tokens: int | None = None) -> GenerationConfig:
    """Return the generation config for greedy decoding. The limit is the caller's, the checkpoint's, or ours."""
    decoding = copy.deepcopy(model.generation_config)
    limits = (max_new_tokens, decoding.max_new_tokens, MAX_NEW_TOKENS)
    decoding.update(do_sample=False, num_beams=1, max_new_tokens=next(n for n in limits if n is not None))
    return decoding


def _captions(document: dict) -> dict:
    """Return the texts of the figure."""
    named = [finding for finding in document["findings"] if finding["positive"]]
    return {
        "title": reference_line(document),
        "footer": f"{RESEARCH_USE}\nIntended for: {stated_domain(document['intended_domain'])}.",
        "report": document["report"],
        "findings": sorted(named, key=lambda finding: -finding["probability"]),
    }


def display_grid(image_processor, geometry: CTGeometry) -> dict:
    """Return `size` and `target_spacing` of a finer grid over the box that the model saw, for display."""
    box = [size * mm for size, mm in zip(geometry.size, geometry.tensor_spacing, strict=True)]
    size = [max(round(mm / FIGURE_SPACING), 16) for mm in box]
    fixed = image_processor.target_spacing is not None
    return {"size": size, "target_spacing": [mm / n for mm, n in zip(box, size, strict=True)] if fixed else None}


def _sample_for_figure(image_processor, composed: ComposedReport) -> dict:
    """Sample both scans and the map on a fine grid over the box that the model saw."""
    scans, geometry, difference = composed.scans, composed.geometry, composed.difference
    grid = display_grid(image_processor, geometry)
    # A scan that is not in HU is shown in its own window: scan and reference compare as grey values, not as HU.
    hu_window = scans[0][1].get("hu_window", image_processor.hu_window)
    volumes, places = [], []
    for volume, options in scans:
        tensor, place = image_processor.resample(volume, **options | grid)
        volumes.append(to_hu(tensor[0].numpy(), hu_window))
        places.append(place)
        del tensor  # 40 MB, before the next one
    place, reference_place = places
    values = F.interpolate(difference[None, None], size=grid["size"], mode="trilinear", align_corners=False)
    return {
        "volumes": [*volumes, values[0, 0].numpy()],
        "hu_window": hu_window,
        "is_hu": place.is_hu and reference_place.is_hu,
        "has_lungs": geometry.coverage is not None and geometry.coverage["lung_share"] >= MIN_VOLUME,
        "target_affine": place.tensor_affine,
        "reference_affine": reference_place.tensor_affine,
    }
