# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
A report with its consistency and its provenance: report.json. docs/reports.md describes every field.

The document names neither the patient nor the place of a file: scans appear as digests of their content.
"""

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers import GenerationConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from ..bases_diffvp import locate_base_model, public_name
from ..data.cache import preprocessing
from ..document_diffvp import written_report
from ..metrics.consistency import report_consistency
from ..provenance import library_versions
from ..report_diffvp import RESEARCH_USE, describe_findings, end_tokens, stated_domain
from ..resampling_diffvp import CTGeometry
from ..storage_diffvp import ADAPTER_SUBFOLDER, WEIGHTS_NAME, digest
from .folder import ReportError
from .int8 import is_int8

WEIGHTS_INDEX = f"{WEIGHTS_NAME}.index.json"
ADAPTER_FILES = (f"{ADAPTER_SUBFOLDER}/adapter_config.json", f"{ADAPTER_SUBFOLDER}/adapter_model.safetensors")
CHECKPOINT_FILES = ("config.json", WEIGHTS_NAME, WEIGHTS_INDEX, *ADAPTER_FILES)


def checked_report(model, processor, tokens: Sequence[int], *, decoding: GenerationConfig, **known) -> dict:
    """
    Return [`written_report`] with its `consistency`.

    Args:
        tokens: generated token ids.
        decoding: generation config with which they were generated.
        known: `findings`, `geometry` and `is_hu` of [`written_report`].
    """
    written = written_report(model.config, processor, tokens, ends=end_tokens(decoding), **known)
    return {**written, "consistency": report_consistency(written["report"], written["findings"])}


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
    Return the content of report.json: [`checked_report`] and its provenance.

    Args:
        tokens: generated token ids.
        decoding: generation config with which they were generated.
        engine: name of the engine that generated them.
        logits: log-odds of the classifier, (1, labels).
        attributes: finding attributes of the model's comparison.
        geometries: geometry of the scan and of the reference.
        reference: id of the reference, and the seed with which it was sampled; `None` if it was chosen.
        made_by: from [`identify_model`].
        options: preprocessing options that differ from the checkpoint's.
        truth: true report of a phantom.
    """
    geometry, reference_geometry = geometries
    name, seed = reference
    findings = [] if logits is None else describe_findings(model.config, logits, attributes, (geometry,))[0]
    is_hu = geometry.is_hu and reference_geometry.is_hu
    written = checked_report(
        model, processor, tokens, decoding=decoding, findings=findings, geometry=geometry, is_hu=is_hu
    )
    document = {
        **written,
        "provenance": {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **made_by,
            "scan": _scan(geometry),
            "reference": {"id": name, "sampled": seed is not None, "seed": seed, **_scan(reference_geometry)},
            "preprocessing": preprocessing(processor.image_processor) | (options or {}),
            "decoding": {**describe_decoding(model, processor, decoding, engine), "new_tokens": len(tokens)},
            "versions": library_versions(),
        },
    }
    if truth is not None:
        true = {"report": truth, "regions": processor.post_process(truth)}
        document["truth"] = true | compare_findings(written["report"], truth)
    return json.loads(json.dumps(document))  # tuples become lists, as in the file


def describe_decoding(model, processor, decoding: GenerationConfig, engine: str) -> dict:
    """Return the settings of decoding: engine, data type, instruction and generation config."""
    return {
        "engine": engine,
        "dtype": "int8" if is_int8(model.language_model) else str(model.dtype).removeprefix("torch."),
        "instruction": processor.instruction,
        "generation_config": generation_settings(decoding.to_diff_dict()),
    }


def compare_findings(report: str, truth: str) -> dict[str, list[str]]:
    """Compare the findings of a generated phantom report with the true one: {"hit", "missed", "false": labels}."""
    from ..data.phantom_report import labels_from_report  # imports SciPy, which other reports do not need

    written, true = labels_from_report(report), labels_from_report(truth)
    return {
        "hit": [label for label in true if true[label] and written[label]],
        "missed": [label for label in true if true[label] and not written[label]],
        "false": [label for label in true if written[label] and not true[label]],
    }


def report_page(document: dict) -> str:
    """Return the text of report.txt. The statements come first, so that every excerpt starts with them."""
    domain = f"Intended for: {stated_domain(document['intended_domain'])}."
    lines = [RESEARCH_USE, domain, *document["warnings"], f"{reference_line(document)}."]
    return "\n".join([*lines, "", document["report"], ""])


def reference_line(document: dict) -> str:
    """Return id and choice of the reference."""
    reference = document["provenance"]["reference"]
    sampled = f", sampled from the pool (seed {reference['seed']})" if reference["sampled"] else ""
    return f"Reference: {reference['id']}{sampled}"


def identify_model(model, hub_kwargs: dict) -> dict:
    """
    Return "checkpoint" and "base_model" of a loaded model: names, revisions and digests.

    Raises:
        ReportError: the model was not loaded from a checkpoint, or the checkpoint is no longer there.
    """
    return {"checkpoint": _checkpoint(model, hub_kwargs), "base_model": _base_model(model, hub_kwargs)}


def generation_settings(values: dict) -> dict:
    """Return the settings of a generation config without its book-keeping."""
    return {key: value for key, value in values.items() if key != "transformers_version" and not key.startswith("_")}


def _scan(geometry: CTGeometry) -> dict:
    """Return digest and grid of a scan, without its source, which may name the patient."""
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


def _checkpoint(model, hub_kwargs: dict) -> dict:
    """Return name, commit and digests of the files from which the model was loaded."""
    name = model.name_or_path
    if not name:
        raise ReportError(
            "The model was not loaded from a checkpoint, so its report could not state its origin: "
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
    """Return name, revision and weight digests of the base LLM; for one on the Hub, its commit instead of digests."""
    config = model.config
    if config.base_model_name_or_path is None:
        return {"name": None, "note": "inside the checkpoint's weights"}
    name, revision, gguf_file = model.language_model.name_or_path, None, None
    if name == config.base_model_name_or_path:  # otherwise another place was given on loading
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
    """Return a local file of a loaded checkpoint, or `None` if it has no such file."""
    found = cached_file(
        name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, **hub_kwargs,
    )  # fmt: skip
    return None if found is None else Path(found)
