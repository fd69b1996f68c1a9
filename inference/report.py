# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
A scan in, a folder out: the generated report, the difference map, the figure, and where all of it came from.

    report.txt               the report, below the research-use statement
    report.json              the report by region, findings with probabilities, provenance
    difference_map.nii.gz    on the input's own grid
    figure.png               target, reference and difference map in three planes, the findings and the text

Nothing that is written names the patient or the place of a file: scans appear as digests of their content.
"""

import copy
import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import GenerationConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from ..anatomy_diffvp import MIN_VOLUME, anatomy_warnings
from ..bases_diffvp import locate_base_model, public_name
from ..checkpoint_diffvp import ADAPTER_SUBFOLDER, DiffVPCheckpointError, check_checkpoint_name
from ..data.cache import preprocessing
from ..data.phantom_report import labels_from_report
from ..encoders_diffvp import DiffVPEncoderError
from ..metrics.consistency import report_consistency
from ..modeling_diffvp import DiffVPForConditionalGeneration
from ..pipeline_diffvp import (
    GIVEN_REFERENCE,
    MAX_NEW_TOKENS,
    RESEARCH_USE,
    describe_findings,
    describe_text,
    end_tokens,
)
from ..processing_diffvp import DiffVPProcessor
from ..provenance import library_versions
from ..reading_diffvp import CTMetadata, read_ct
from ..references_diffvp import ReferencePoolError
from ..storage_diffvp import WEIGHTS_NAME, digest
from ..volume_diffvp import GIVEN, STATED, CTGeometry, CTInputError, CTVolume
from .engines import Engine, EngineError, TransformersEngine
from .figure import draw_figure, to_hu

REPORT_TEXT, REPORT_JSON, TRUE_REPORT = "report.txt", "report.json", "true_report.txt"
DIFFERENCE_MAP, FIGURE = "difference_map.nii.gz", "figure.png"
DIAGNOSTIC_REPORT = "diagnostic_report.json"  # of `diffvp report --fhir`
REPORT_FILES = {REPORT_TEXT, REPORT_JSON, TRUE_REPORT, DIFFERENCE_MAP, FIGURE, DIAGNOSTIC_REPORT}

WEIGHTS_INDEX = f"{WEIGHTS_NAME}.index.json"
ADAPTER_FILES = (f"{ADAPTER_SUBFOLDER}/adapter_config.json", f"{ADAPTER_SUBFOLDER}/adapter_model.safetensors")
CHECKPOINT_FILES = ("config.json", WEIGHTS_NAME, WEIGHTS_INDEX, *ADAPTER_FILES)

DTYPES = ("float32", "bfloat16")  # float16 takes minutes a report on CPUs

# The figure is sampled from the scan itself, not from the model's coarser tensor.
FIGURE_SPACING = 1.5  # mm


class ReportError(ValueError):
    """A report cannot be written as asked; the message says what to change."""


# What the caller can cause and repair, with messages that say how.
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
    What [`write_report`] wrote.

    Attributes:
        folder: holds the files.
        document: the content of report.json.
    """

    folder: Path
    document: dict

    @property
    def text(self) -> str:
        """The generated text as it is."""
        return self.document["report"]

    @property
    def regions(self) -> dict[str, str]:
        """{region: text} in canonical order; "other" for text that belongs to none."""
        return self.document["regions"]

    @property
    def findings(self) -> list[dict]:
        """The classifier's findings, see [`describe_findings`]; empty for a model without one."""
        return self.document["findings"]

    @property
    def figure(self) -> Path:
        return self.folder / FIGURE


def load_checkpoint(name: str | os.PathLike, device: str | None = None, dtype: str | None = None, **hub_kwargs):
    """
    Model and processor of a checkpoint in a folder or on the Hub, run by this package's own code.

    Args:
        device: where the model computes; `None` takes a GPU if there is one.
        dtype: "float32" or "bfloat16", of all weights; `None` is the checkpoint's.
        hub_kwargs: the Hub's: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        DiffVPCheckpointError: there is no such checkpoint, or its files do not fit each other.
    """
    check_checkpoint_name(name, **hub_kwargs)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype not in (None, *DTYPES):
        raise DiffVPCheckpointError(f"{name}: dtype: {dtype} (expected {' or '.join(DTYPES)}).")
    weights = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = DiffVPForConditionalGeneration.from_pretrained(name, **weights, **hub_kwargs).to(device)
    # Else transformers would ask at the console whether to run the checkpoint's copy of the code.
    processor = DiffVPProcessor.from_pretrained(name, trust_remote_code=False, **hub_kwargs)
    return model, processor


def write_report(
    model,
    processor,
    ct,
    output_dir: str | os.PathLike,
    *,
    reference=None,
    reference_seed: int = 0,
    spacing: tuple[float, float, float] | None = None,
    metadata: CTMetadata | None = None,
    series: int | str | None = None,
    allow_incomplete: bool = False,
    allow_non_hu: bool = False,
    allow_any_anatomy: bool = False,
    hu_window: tuple[float, float] | None = None,
    foreground_hu: float | None = None,
    max_new_tokens: int | None = None,
    truth: str | None = None,
    engine: Engine | None = None,
    hub_kwargs: dict | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> Report:
    """
    Write the report of one scan with difference map, figure and provenance. Decoding is greedy.

    Args:
        model, processor: a loaded checkpoint ([`DiffVPForConditionalGeneration`], [`DiffVPProcessor`]).
        ct: whatever [`read_ct`] takes.
        output_dir: appears complete or not at all; replaces an earlier report, and nothing else.
        reference: a normal scan of the caller's; `None` samples from the checkpoint's pool by `reference_seed`.
        spacing, metadata, series, allow_incomplete: what `ct` needs to be understood, see [`read_ct`]; `spacing` also
            holds for a reference given as an array.
        allow_non_hu, hu_window, foreground_hu: see [`DiffVPImageProcessorKwargs`]; the defaults are the checkpoint's.
        allow_any_anatomy: also of scans without lungs, for which the model has no words.
        max_new_tokens: where to stop; the default is the checkpoint's.
        truth: the true report of a phantom, to be written beside the generated one and compared with it.
        engine: what decodes; `None` is the model's own `generate`, see [`load_engine`].
        hub_kwargs: `revision`, `cache_dir` or `token` with which the checkpoint was loaded from the Hub.
        on_step: is told what begins.

    Raises:
        ReportError: the model was not loaded from a checkpoint, or `output_dir` holds other files.
        CTInputError: a scan is not a usable chest CT; of another region, a `CTAnatomyError`.
        ReferencePoolError: no reference is given and the checkpoint has no pool, or its files are not as indexed.
    """
    output = Path(output_dir).absolute()
    _check_output(output)
    on_step("Hashing the weights")
    made_by = identify_model(model, hub_kwargs or {})

    on_step("Reading the scan and its reference")
    options = {"allow_non_hu": allow_non_hu, "hu_window": hu_window, "foreground_hu": foreground_hu}
    options = {key: value for key, value in options.items() if value is not None}
    if isinstance(ct, (list, tuple)):
        raise ReportError(f"write_report takes one scan, got a list of {len(ct)}.")
    # Both are read once, for the tensor and for the figure.
    scan = ct if isinstance(ct, CTVolume) else read_ct(ct, spacing, allow_non_hu, metadata, series, allow_incomplete)
    sampled, reference_name = reference is None, GIVEN_REFERENCE
    if sampled:
        reference_name, reference = processor.choose_reference(scan.sha256, reference_seed)
    elif not isinstance(reference, CTVolume):
        is_array = isinstance(reference, (np.ndarray, torch.Tensor))
        reference = read_ct(reference, spacing if is_array else None, allow_non_hu)
    inputs = processor(ct=scan, reference=reference, allow_any_anatomy=allow_any_anatomy, **options)
    geometry = inputs.geometry[0]

    on_step("Encoding")
    inputs = inputs.to(model.device)
    encoded = model.encode_inputs(inputs.pop("ct"), inputs.pop("reference"))
    logits = encoded.pop("diagnosis_logits", None)
    with torch.no_grad():
        comparison = model.compare(**encoded)
    difference = model.difference_map(comparison=comparison)[0].float().cpu()

    on_step("Writing the report")
    decoding = greedy(model, max_new_tokens)
    engine = TransformersEngine(model) if engine is None else engine
    [tokens] = engine.generate(model.embed_prompt(**inputs, diagnosis_logits=logits, comparison=comparison), decoding)
    document = describe_report(
        model,
        processor,
        tokens,
        decoding=decoding,
        engine=engine.name,
        logits=logits,
        attributes=comparison.attributes,
        geometries=(geometry, inputs.reference_geometry[0]),
        reference=(reference_name, reference_seed if sampled else None),
        made_by=made_by,
        options=options,
        truth=truth,
    )

    on_step("Drawing the figure")
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.parent / f".{output.name}.{uuid.uuid4().hex[:8]}.part"
    stage.mkdir()
    try:
        processor.save_map(stage / DIFFERENCE_MAP, difference, geometry)
        own = {"allow_non_hu": allow_non_hu} if inputs.reference_geometry[0].is_hu and not geometry.is_hu else options
        volumes = (scan, options), (reference, own)
        drawing = _sample_for_figure(processor.image_processor, volumes, geometry, difference)
        draw_figure(stage / FIGURE, *drawing.pop("volumes"), **drawing, **_captions(document))
        (stage / REPORT_TEXT).write_text(report_page(document), encoding="utf-8")
        (stage / REPORT_JSON).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if truth is not None:
            (stage / TRUE_REPORT).write_text(truth + "\n", encoding="utf-8")
        _publish(stage, output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # after `_publish` it is gone
    return Report(output, document)


def greedy(model, max_new_tokens: int | None = None) -> GenerationConfig:
    """The model's generation config for greedy decoding, with the limit of the caller, of the checkpoint, or ours."""
    decoding = copy.deepcopy(model.generation_config)
    limits = (max_new_tokens, decoding.max_new_tokens, MAX_NEW_TOKENS)
    decoding.update(do_sample=False, num_beams=1, max_new_tokens=next(n for n in limits if n is not None))
    return decoding


def describe_report(
    model,
    processor,
    tokens: Sequence[int],
    *,
    decoding: GenerationConfig,
    engine: str,
    logits: torch.Tensor | None,
    attributes: list[list[dict]] | None = None,
    geometries: tuple[CTGeometry, CTGeometry],
    reference: tuple[str, int | None],
    made_by: dict,
    options: dict | None = None,
    truth: str | None = None,
) -> dict:
    """
    What report.json holds, as it will be read.

    Args:
        tokens: what was generated, with `decoding`, by `engine`.
        logits: of the classifier, (1, labels).
        attributes: of the model's comparison.
        geometries: of the scan and of the reference.
        reference: its name, and the seed with which it was sampled; `None` if it was chosen.
        made_by: from [`identify_model`].
        options: of the preprocessing, that were not the checkpoint's.
        truth: the true report of a phantom.
    """
    geometry, reference_geometry = geometries
    name, seed = reference
    tokens = [int(token) for token in tokens]
    findings = [] if logits is None else describe_findings(model.config, logits, attributes, (geometry,))[0]
    written = describe_text(processor, tokens, findings, end_tokens(decoding))
    warnings = {
        "The voxels are not Hounsfield units; this was overridden (allow_non_hu).": not (
            geometry.is_hu and reference_geometry.is_hu
        ),
        f"The report is cut off after {len(tokens)} tokens.": not written["complete"],
        "This model takes no difference: the map is empty.": model.config.difference_level == "none",
        f"The file states no grid. Read as: {geometry.layout}.": geometry.layout not in (STATED, GIVEN)
        and not geometry.layout.startswith("DICOM"),
        **dict.fromkeys(geometry.warnings, True),
    }
    applying = [warning for warning, applies in warnings.items() if applies]
    document = {
        "statement": RESEARCH_USE,
        "intended_domain": model.config.intended_domain,
        "warnings": [*applying, *anatomy_warnings(geometry.coverage)],
        **written,
        "consistency": report_consistency(written["report"], written["findings"]),
        "coverage": geometry.coverage,
        "provenance": {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **made_by,
            "scan": _scan(geometry),
            "reference": {"id": name, "sampled": seed is not None, "seed": seed, **_scan(reference_geometry)},
            "preprocessing": preprocessing(processor.image_processor) | (options or {}),
            "decoding": {
                "engine": engine,
                "dtype": str(model.dtype).removeprefix("torch."),
                "instruction": processor.instruction,
                "generation_config": public_fields(decoding.to_diff_dict()),
                "new_tokens": len(tokens),
            },
            "versions": library_versions(),
        },
    }
    if truth is not None:
        true = {"report": truth, "regions": processor.post_process(truth)}
        document["truth"] = true | compare_findings(written["report"], truth)
    return json.loads(json.dumps(document))  # tuples are lists


def compare_findings(report: str, truth: str) -> dict[str, list[str]]:
    """Findings of a generated phantom report against the true one: {"hit", "missed", "false": labels}."""
    written, true = labels_from_report(report), labels_from_report(truth)
    return {
        "hit": [label for label in true if true[label] and written[label]],
        "missed": [label for label in true if true[label] and not written[label]],
        "false": [label for label in true if written[label] and not true[label]],
    }


def _scan(geometry) -> dict:
    """A scan by its digest and grid, without the source, which may name the patient."""
    return {
        "sha256": geometry.sha256,
        "layout": geometry.layout,
        "is_hu": geometry.is_hu,
        "shape": list(geometry.shape),
        "spacing_xyz_mm": list(geometry.spacing),
        "tensor_size": list(geometry.size),
        "tensor_spacing_mm": list(geometry.tensor_spacing),
        "tensor_affine": geometry.tensor_affine.tolist(),
    }


def identify_model(model, hub_kwargs: dict) -> dict:
    """
    "checkpoint" and "base_model": what a report was written by.

    Raises:
        ReportError: the model was not loaded from a checkpoint, or it is no longer there.
    """
    return {"checkpoint": _checkpoint(model, hub_kwargs), "base_model": _base_model(model, hub_kwargs)}


def _checkpoint(model, hub_kwargs: dict) -> dict:
    """Name, commit and digests of the files that the model was loaded from."""
    name = model.name_or_path
    if not name:
        raise ReportError(
            "The model was not loaded from a checkpoint, so that its report could not say what wrote it: "
            "save_pretrained() it and load it from there."
        )
    files = {file: _local_file(name, file, hub_kwargs) for file in CHECKPOINT_FILES}
    index = files[WEIGHTS_INDEX]
    if index is not None:  # a large self-contained checkpoint is saved in shards
        for shard in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())):
            files[shard] = _local_file(name, shard, hub_kwargs)
    found = {file: path for file, path in files.items() if path is not None}
    if "config.json" not in found:
        raise ReportError(f"The checkpoint {public_name(name)} is no longer where the model was loaded from.")
    return {
        "name": public_name(name),
        "commit": extract_commit_hash(str(found["config.json"]), None),
        "sha256": {file: digest(path) for file, path in found.items()},
    }


def _base_model(model, hub_kwargs: dict) -> dict:
    """Name, revision and digests of the base LLM's weights; a checkpoint on the Hub is identified by its commit."""
    config = model.config
    if config.base_model_name_or_path is None:
        return {"name": None, "note": "inside the checkpoint's weights"}
    name, revision, gguf_file = model.language_model.name_or_path, None, None
    if name == config.base_model_name_or_path:  # else another place was given on loading
        revision, gguf_file = config.base_model_revision, config.base_model_gguf_file
    entry = {"name": public_name(name), "revision": revision}
    path, file = locate_base_model(name, revision, gguf_file)
    if not Path(path).is_dir():
        access = {key: value for key, value in hub_kwargs.items() if key != "revision"}
        place = _local_file(path, file or "config.json", access | {"revision": revision or "main"})
        return entry | {"commit": extract_commit_hash(str(place), None)}
    weights = [Path(path) / file] if file else sorted(Path(path).glob("*.safetensors"))
    return entry | {"sha256": {weight.name: digest(weight) for weight in weights}}


def _local_file(name: str, file: str, hub_kwargs: dict) -> Path | None:
    """A file of a checkpoint that has been loaded, and so lies on this machine; `None` if it has no such file."""
    found = cached_file(
        name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, **hub_kwargs,
    )  # fmt: skip
    return None if found is None else Path(found)


def public_fields(values: dict) -> dict:
    """The settings of a generation config, without its book-keeping."""
    return {key: value for key, value in values.items() if key != "transformers_version" and not key.startswith("_")}


def report_page(document: dict) -> str:
    """report.txt: statements first, so that no excerpt of the file starts without them."""
    reference = document["provenance"]["reference"]
    sampled = f" (sampled, seed {reference['seed']})" if reference["sampled"] else ""
    lines = [RESEARCH_USE, _domain(document), *document["warnings"], f"Reference: {reference['id']}{sampled}."]
    return "\n".join([*lines, "", document["report"], ""])


def _domain(document: dict) -> str:
    return f"Intended for: {document['intended_domain'] or 'not stated by the checkpoint'}."


def _captions(document: dict) -> dict:
    """What the figure says beside its pictures."""
    entry = document["provenance"]["reference"]
    sampled = f", sampled from the pool (seed {entry['seed']})" if entry["sampled"] else ""
    named = [finding for finding in document["findings"] if finding["positive"]]
    return {
        "title": f"Reference: {entry['id']}{sampled}",
        "footer": f"{RESEARCH_USE}\n{_domain(document)}",
        "report": document["report"],
        "findings": sorted(named, key=lambda finding: -finding["probability"]),
    }


def display_grid(image_processor, geometry: CTGeometry) -> dict:
    """`size` and `target_spacing` of a finer grid over the box that the model saw, to look at."""
    box = [size * mm for size, mm in zip(geometry.size, geometry.tensor_spacing, strict=True)]
    size = [max(round(mm / FIGURE_SPACING), 16) for mm in box]
    fixed = image_processor.target_spacing is not None
    return {"size": size, "target_spacing": [mm / n for mm, n in zip(box, size, strict=True)] if fixed else None}


def _sample_for_figure(image_processor, scans, geometry, difference: torch.Tensor) -> dict:
    """Both scans and the map, sampled finely over the box that the model saw."""
    grid = display_grid(image_processor, geometry)
    sampled = [image_processor.resample(volume, **options | grid) for volume, options in scans]
    values = F.interpolate(difference[None, None], size=grid["size"], mode="trilinear", align_corners=False)
    # Voxels without Hounsfield units have the window of their own, and grey values are all that both scans share.
    hu_window = scans[0][1].get("hu_window", image_processor.hu_window)
    (target, place), (reference, reference_place) = sampled
    return {
        "volumes": [*(to_hu(tensor[0].numpy(), hu_window) for tensor in (target, reference)), values[0, 0].numpy()],
        "hu_window": hu_window,
        "is_hu": place.is_hu and reference_place.is_hu,
        "has_lungs": geometry.coverage is not None and geometry.coverage["lung_share"] >= MIN_VOLUME,
        "target_affine": place.tensor_affine,
        "reference_affine": reference_place.tensor_affine,
    }


def _check_output(output: Path) -> None:
    if output.is_dir():
        others = sorted({path.name for path in output.iterdir()} - REPORT_FILES)
        if others:
            raise ReportError(f"{output} holds other files ({', '.join(others[:3])}): choose another output folder.")
    elif output.exists():
        raise ReportError(f"{output} is a file: choose another output folder.")


def _publish(stage: Path, output: Path) -> None:
    """Put a complete folder in its place, and an earlier report out of it, by renaming."""
    if not output.exists():
        os.rename(stage, output)
        return
    _check_output(output)  # it may have changed since
    previous = stage.with_suffix(".old")
    os.rename(output, previous)
    try:
        os.rename(stage, output)
    except BaseException:
        os.rename(previous, output)
        raise
    shutil.rmtree(previous)
