# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Checks of `diffvp train` and its `--dry-run`: find everything that would stop a run before it starts."""

import importlib.util
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from ..bases_diffvp import locate_base_model
from ..configuration_diffvp import DiffVPConfig
from ..data.cases import Problem, raise_problems
from ..data.lesions import lesion_mask_path, lobe_mask_path, read_patients
from ..data.regions import region_mask_path
from ..encoders_diffvp import make_encoder
from ..files import nearest_folder, writing_problem
from ..labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from ..modules_diffvp import SIDES
from ..processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from ..report_diffvp import stated_domain
from ..storage_diffvp import check_checkpoint_name
from .cohort import Cohort
from .config import TrainingConfig
from .encoder import misfit, read_header
from .report_stage import check_base, check_reports

logger = logging.getLogger(__name__)

SPARE = 1.1  # factor on the computed disk space


def make_processor(config: TrainingConfig) -> DiffVPProcessor:
    """Make the processor of a new model from its base LLM."""
    path, options = _locate_base(config)
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # LLaMA has none; padding is masked everywhere
    return DiffVPProcessor(DiffVPImageProcessor(**config.image_processor), tokenizer)


def model_fields(config: TrainingConfig, processor: DiffVPProcessor) -> dict:
    """Return the fields of the model configuration, including the token ids of prompt and instruction."""
    labels, places = DiffVPConfig(**config.model).diagnosis_labels, None
    if config.model.get("finding_attributes"):
        places = [*(config.model.get("finding_regions") or ()), *SIDES]
    fields = {
        **config.model,
        "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(processor.tokenizer, labels, places=places),
        "instruction": processor.instruction,
        "instruction_ids": processor(text=processor.instruction)["input_ids"][0].tolist(),
    }
    # If encoder and classifier both come from the first stage, they share the encoder.
    fields.setdefault("share_encoder", has_own_encoder(config))
    return fields


def has_own_encoder(config: TrainingConfig) -> bool:
    """True if the visual encoder comes from the first stage of the run."""
    return config.encoder_weights is None and config.model.get("encoder_type") != "external"


def base_config(config: TrainingConfig) -> AutoConfig:
    """Load the configuration of the base LLM and check it against `base.expected_config`.

    Raises:
        BaseModelError: a field differs.
    """
    path, options = _locate_base(config)
    found = AutoConfig.from_pretrained(path, **options)
    check_base(found, config.base.expected_config)
    return found


def _locate_base(config: TrainingConfig) -> tuple[str, dict[str, str]]:
    """Return the name or folder of the base LLM and the `from_pretrained` arguments that locate its files."""
    base = config.base
    path, gguf_file = locate_base_model(base.name, base.revision, base.gguf_file)
    if gguf_file is not None:
        return path, {"gguf_file": gguf_file}
    revision = {"revision": base.revision or "main"}
    check_checkpoint_name(path, **revision)
    return path, revision


def check_run(config: TrainingConfig, cohort: Cohort) -> None:
    """
    Check a run before it starts.

    Raises:
        DatasetError: lists everything that would stop the run, except unreadable volumes, which are found by reading.
        DiffVPCheckpointError, BaseModelError, OSError: a base or a checkpoint is unavailable or does not match.
    """
    problems = _folders(config) + _libraries(config) + _masks(config, cohort)
    if config.init_from is None:
        image_processor, model = DiffVPImageProcessor(**config.image_processor), DiffVPConfig(**config.model)
        problems += _encoder(config, model) + _classifier(config, model)
    else:
        check_checkpoint_name(config.init_from)
        options = config.init_options
        model = DiffVPConfig.from_pretrained(config.init_from, **options)
        image_processor = DiffVPImageProcessor.from_pretrained(config.init_from, **options)
        problems += _labels(config, cohort)
    check_hu_range(model, image_processor)
    problems += _disk(config, cohort, model)
    if config.stage != "diagnosis":
        if config.init_from is None:
            processor = make_processor(config)
            fields = model_fields(config, processor)
            text = {"vocab_size": len(processor.tokenizer), **config.base.from_scratch} if _scratch(config) else None
            model = DiffVPConfig(text_config=text or base_config(config), **fields)
        else:
            processor = DiffVPProcessor.from_pretrained(config.init_from, trust_remote_code=False, **options)
        problems += check_reports(cohort, processor, config.report, model)
    raise_problems(problems)
    if config.stage != "diagnosis":
        warn_of_frozen_parts(config, model)


def warn_of_frozen_parts(config: TrainingConfig, model: DiffVPConfig) -> None:
    """Warn of parts of another DiffVP checkpoint, which are not trained, and state its intended domain."""
    parts = []
    classifier = ["classifier"] if model.use_diagnosis else []
    encoder = ["visual encoder"] if config.encoder_weights is None and model.encoder_type != "external" else []
    if config.init_from is not None:
        parts.append((encoder + classifier, config.init_from, model.intended_domain))
    elif config.classifier is not None:
        domain = DiffVPConfig.from_pretrained(config.classifier).intended_domain
        parts.append((encoder + classifier, config.classifier, domain))
    if config.encoder_weights is not None:
        header = read_header(config.encoder_weights)
        if "intended_domain" in header:  # the header of a published encoder has none
            parts.append((["visual encoder"], config.encoder_weights, header["intended_domain"]))
    for names, source, domain in parts:
        if names:
            logger.warning(
                "Not trained: %s of %s (intended domain: %s). Reports cannot mention what these do not recognize.",
                " and ".join(names),
                source,
                stated_domain(domain),
            )


def base_name(config: TrainingConfig) -> str | None:
    """Return the name of the base LLM: that of the training file, or of `init_from`; `None` if this names none."""
    if config.base is not None:
        return config.base.name
    model = DiffVPConfig.from_pretrained(config.init_from, **config.init_options)
    return model.base_model_name_or_path or model.get_text_config().name_or_path or None


def check_hu_range(config: DiffVPConfig, image_processor: DiffVPImageProcessor) -> None:
    """
    Check that encoder and processor scale Hounsfield units in the same way.

    Raises:
        ValueError: the encoder expects another HU range in the tensor than the processor writes.
    """
    if config.hu_range is not None and tuple(config.hu_range) != tuple(image_processor.hu_window):
        raise ValueError(
            f"model.hu_range is {list(config.hu_range)} and image_processor.hu_window "
            f"{list(image_processor.hu_window)}; expected the same HU"
        )


def _labels(config: TrainingConfig, cohort: Cohort) -> list[Problem]:
    if not config.report.new_thresholds or any(case.labels is not None for case in cohort.report + cohort.validation):
        return []
    field, expected = "report.new_thresholds", "labels, or data.labeler: rules"
    return [Problem("training file", None, field, "true, but no case has labels", expected)]


def memory_warning(needed_gb: dict[str, float]) -> str | None:
    """Return a warning if the estimated memory of a run exceeds that of this machine, else `None`."""
    needed, place = sum(needed_gb.values()), "this machine"
    if torch.cuda.is_available():
        available, place = torch.cuda.get_device_properties(0).total_memory / 1e9, "its GPU"
    else:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed <= available:
        return None
    return (
        f"The run is estimated to take {needed:.1f} GB, and {place} has {available:.1f} GB: lower "
        "report.micro_batch_size, set report.gradient_checkpointing, or use a smaller base."
    )


def _scratch(config: TrainingConfig) -> bool:
    return config.base.from_scratch is not None


def _folders(config: TrainingConfig) -> list[Problem]:
    """Report folders that cannot be written."""
    problems = []
    for field, folder in (("output_dir", config.output_dir), ("data.cache_dir", config.data.cache_dir)):
        # Check a file inside the folder, since the folder itself may already exist.
        found = writing_problem(Path(folder) / "file")
        if found is not None:
            problems.append(Problem("training file", None, field, found, "a writable folder"))
    return problems


def _libraries(config: TrainingConfig) -> list[Problem]:
    """Report packages that the settings need and that are not installed."""
    needed = {f"log_with: {name}": name for name in config.log_with}
    if config.base is not None and config.base.quantization is not None:
        needed[f"base.quantization: {config.base.quantization}"] = "bitsandbytes"
    return [
        Problem("training file", None, field, f"{package} is not installed", f"`pip install {package}`")
        for field, package in needed.items()
        if importlib.util.find_spec(package) is None
    ]


def _masks(config: TrainingConfig, cohort: Cohort) -> list[Problem]:
    """Report missing masks: of the lesions and lobes that stage 1 learns from, and of the regions."""
    root, problems = config.data.root, []
    wanted = {}
    if config.diagnosis is not None and config.diagnosis.needs_masks and config.stage != "report":
        if tuple(config.model.get("diagnosis_labels", DIAGNOSIS_LABELS)) != DIAGNOSIS_LABELS:
            expected = "null, as the masks are those of the 18 labels"
            problems.append(Problem("training file", None, "diagnosis.crops", "with labels of your own", expected))
        patients = read_patients(root)
        for case in cohort.diagnosis + cohort.validation:
            wanted[case.name] = [lesion_mask_path(root, case.name), lobe_mask_path(root, case.name)]
            if case.name not in patients:
                problems.append(Problem("patients.jsonl", None, "line", "missing", "one for this case", case.name))
    if config.data.region_tokens:
        for case in cohort.everyone():
            wanted.setdefault(case.name, []).extend(region_mask_path(root, case.name, region) for region in REGIONS)
    problems += [
        Problem(path.parent.name, None, "mask", "missing", f"the file {path.name} for this case", name)
        for name, paths in wanted.items()
        for path in paths
        if not path.is_file()
    ]
    return problems


def _encoder(config: TrainingConfig, model: DiffVPConfig) -> list[Problem]:
    """Report encoder weights that are missing or do not fit the configured encoder."""
    if config.encoder_weights is None:
        return []
    path, problem = Path(config.encoder_weights), ("training file", None, "encoder_weights")
    if not path.is_file():
        return [Problem(*problem, "missing", "a .safetensors file from `diffvp encoder convert`")]
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in make_encoder(model).state_dict().items()}
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    found = misfit(shapes, expected)
    if found is None:
        return []
    return [Problem(*problem, found, f"the {len(expected)} weights of the encoder in the section model")]


def _classifier(config: TrainingConfig, model: DiffVPConfig) -> list[Problem]:
    """Report a classifier that is missing or that predicts other findings."""
    if config.stage == "report" and config.classifier is None and (model.use_diagnosis or not config.encoder_weights):
        if not (Path(config.output_dir) / "diagnosis" / "config.json").is_file():
            expected = "stage: all, or a finished first stage in output_dir, or `classifier`"
            return [Problem("training file", None, "stage", "report, without a classifier", expected)]
    if config.classifier is None or not model.use_diagnosis:
        return []
    check_checkpoint_name(config.classifier)
    known = list(DiffVPConfig.from_pretrained(config.classifier).diagnosis_labels)
    if known == list(model.diagnosis_labels):
        return []
    expected = f"{len(model.diagnosis_labels)}, those of model.diagnosis_labels"
    return [Problem("training file", None, "classifier", f"one of {len(known)} other findings", expected)]


def _disk(config: TrainingConfig, cohort: Cohort, model: DiffVPConfig) -> list[Problem]:
    """Report a disk without enough space for the caches."""
    cases = len({case.name for case in cohort.everyone() + cohort.pool})
    voxels, tokens = 1, 1
    for size, token in zip(model.image_size, model.feature_grid, strict=True):
        voxels, tokens = voxels * size, tokens * token
    needed = cases * (voxels * 2 + tokens * model.encoder_hidden_size * 4) * SPARE
    folder = Path(config.data.cache_dir)
    cached = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) if folder.is_dir() else 0
    free = shutil.disk_usage(nearest_folder(folder)).free
    if needed <= free + cached:
        return []
    expected = f"at least {(needed - cached) / 1e9:.1f} GB for {cases} cases, or another folder"
    return [Problem("training file", None, "data.cache_dir", f"{free / 1e9:.1f} GB free", expected)]
