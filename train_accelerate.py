# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Train DiffVP in the paper's two stages (appendix D): the diagnosis classifier, then report generation.

    diffvp train configs/phantom.yaml                      # both stages
    diffvp train configs/phantom.yaml stage=report seed=1  # one stage, with an override
    accelerate launch -m diffvp.train_accelerate CONFIG    # on several devices

Stage 1 trains a 3D ResNet-18 on the 18 labels. Its backbone also becomes the frozen visual encoder unless
`encoder_weights` names another. Stage 2 computes its frozen inputs (voxel features, predicted findings) once per
volume and trains resampler, deltas, prompt generator, projection, auxiliary head and LoRA.

Running the same command again resumes an interrupted run from its newest valid checkpoint.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, set_seed
from peft import LoraConfig
from torch.distributed.fsdp import FSDPModule
from transformers import GenerationConfig

from .configuration_diffvp import DiffVPConfig
from .data.cache import VolumeCache
from .data.cases import Case
from .encoders_diffvp import encoder_sha256, state_sha256
from .files import write_folder, write_texts
from .generation_diffvp import own_generation_config
from .inference.figure import TISSUE_HU, to_hu
from .modeling_diffvp import DiffVPForConditionalGeneration, DiffVPForDiagnosis
from .processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
from .references_diffvp import ReferencePool
from .storage_diffvp import check_checkpoint_name
from .training.check import check_run, has_own_encoder, make_processor, model_fields
from .training.checkpoints import Checkpoints
from .training.cohort import Cohort, load_cohort
from .training.config import TrainingConfig
from .training.diagnosis_stage import (
    DiagnosisStage,
    Truth,
    best_thresholds,
    calibrate,
    crossfitted_f1,
    fit_margins,
    predict,
)
from .training.encoder import import_encoder, load_encoder
from .training.features import Features, compute_all, make_features
from .training.loop import Log, Stage, StageTrainer
from .training.report_stage import ReportStage, check_base, make_drafts, quantization

logger = logging.getLogger(__name__)

WHITENING_SCANS = 100  # of the pool; more would not change the covariance of a few dozen channels


@dataclass(frozen=True)
class Finished:
    """
    Result of a run.

    Attributes:
        folder: folder of the model, or of the classifier for a run of only the first stage.
        epoch: the kept epoch, with the lowest validation loss.
        epochs: number of epochs trained.
        loss: validation loss of the kept epoch.
        references: number of normal scans in `references.local.json`, which later commands use.
        tested: True if the run has test cases, which `diffvp evaluate` scores the model on.
    """

    folder: Path
    epoch: int
    epochs: int
    loss: float
    references: int = 0
    tested: bool = False

    def lines(self, config: str | os.PathLike, overrides: Sequence[str] = ()) -> list[str]:
        """
        Return the folder and the kept epoch in words, and the commands for the next steps.

        Args:
            config, overrides: training file of the run, and its settings KEY=VALUE.
        """
        is_model = self.folder.name == "model"
        lines = [
            f"The {'model' if is_model else 'classifier'} is in {self.folder}: epoch {self.epoch} of {self.epochs}, "
            f"which had the lowest validation loss ({self.loss:.4f})."
        ]
        if not is_model:
            return lines
        with_reference = "" if self.references else " --reference NORMAL_SCAN"
        steps = {"Write a report": f"diffvp report SCAN --checkpoint {self.folder}{with_reference}"}
        if self.tested:
            steps["Score it"] = " ".join(["diffvp evaluate", str(config), *overrides])
        steps["Share it"] = f"diffvp push {self.folder} NAME/MODEL --dry-run"
        return lines + [f"{what + ':':<16}{command}" for what, command in steps.items()]


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """
    Make the Accelerator of a run.

    Raises:
        RuntimeError: the launched processes are not connected and would write the same files, or DeepSpeed is used.
    """
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=list(config.log_with) or None,
        project_dir=config.output_dir,
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise RuntimeError(
            "DeepSpeed keeps the optimizer state in its own files, which the checkpoints here do not cover. "
            "configs/accelerate/fsdp2_zero2.yaml and fsdp2_zero3.yaml shard in the same way."
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"{launched} processes were launched, but accelerate sees {accelerator.num_processes}: each would train "
            "alone. Check the launcher's configuration; on CPU, set ACCELERATE_USE_CPU=true and use torchrun."
        )
    return accelerator


def train(
    stage: Stage, config: TrainingConfig, accelerator: Accelerator, cohort: Cohort, depends_on: dict[str, str]
) -> dict:
    """
    Train a stage to its end, or resume it, and load its best weights. Return the matching fields of [`Finished`].

    Args:
        depends_on: further values that the result depends on, by name.
    """
    output = Path(config.output_dir)
    checkpoints = Checkpoints(output / "checkpoints" / stage.name, config.keep_checkpoints)
    log = Log(output / f"{stage.name}.jsonl", accelerator)
    settings = config.of_the_result(stage.name) | {"data_sha256": cohort.sha256(stage.name)} | depends_on
    if accelerator.is_main_process:
        checkpoints.clean()
    accelerator.wait_for_everyone()
    trainer = StageTrainer(stage, accelerator, checkpoints, log, config, settings)
    if trainer.resume():
        logger.info("Resuming the stage %s after step %d.", stage.name, trainer.position.step)
    trainer.fit()
    position = trainer.position
    return {
        "epoch": position.best_step // trainer.steps_per_epoch,
        "epochs": position.epoch,
        "loss": position.best_loss,
    }


def train_diagnosis(config: TrainingConfig, accelerator: Accelerator, cohort: Cohort) -> Finished:
    """Run stage 1 and write the epoch with the lowest validation loss to `<output_dir>/diagnosis`."""
    output = Path(config.output_dir) / "diagnosis"
    set_seed(config.seed)
    image_processor = DiffVPImageProcessor(**config.image_processor)
    model = DiffVPForDiagnosis(DiffVPConfig(**config.model))
    volumes = make_volumes(config, image_processor)
    cohort = without_unreadable(
        cohort, cohort.diagnosis + cohort.validation, volumes.load, config, accelerator, "Volumes", config.num_workers
    )
    truth = None
    if config.diagnosis.needs_masks:
        truth = Truth(config.data.root, config.data.cache_dir, volumes)
        cases = cohort.diagnosis + cohort.validation
        compute_all(cases, truth.load, accelerator, "Lesions", skip=False, workers=config.num_workers)
    parts = (model, cohort.diagnosis, cohort.validation, volumes, truth, config.seed, accelerator)
    stage = DiagnosisStage(config.diagnosis, *parts)
    kept = train(stage, config, accelerator, cohort, {})
    if stage.on_crops:
        calibrate(model, stage.whole, torch.from_numpy(stage.labels))
        logger.info("Classifier: calibrated on %d validation cases, which cannot score it then.", len(stage.labels))
    if truth is not None and model.config.finding_attributes:
        model.config.finding_attributes = fit_margins(model, stage.whole, truth)
    # For a classifier that is used without a second stage, which chooses its own.
    model.config.diagnosis_threshold = best_thresholds(predict(model, stage.whole), stage.labels)
    if accelerator.is_main_process:
        write_folder(output, model.save_pretrained)
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return Finished(output, **kept, tested=bool(cohort.test))


def train_report(config: TrainingConfig, accelerator: Accelerator, cohort: Cohort) -> Finished:
    """Run stage 2 and write the epoch with the lowest validation loss to `<output_dir>/model`."""
    output = Path(config.output_dir) / "model"
    set_seed(config.seed)
    model, processor = load_start(config) if config.init_from else build_generator(config)
    if config.encoder is not None:
        model.attach_encoder(import_encoder(config.encoder))
    # Before training, since the reports of each epoch need it, and so that an invalid configuration fails now.
    model.generation_config = own_generation_config(
        model.generation_config, processor.tokenizer, config.report.max_report_tokens
    )
    model.config.true_findings = config.report.true_findings if model.config.use_diagnosis else None
    model.to(accelerator.device)  # before it computes the caches
    volumes = make_volumes(config, processor.image_processor)
    features = make_features(config.data, volumes, model)
    needed = list({case.name: case for case in cohort.report + cohort.validation + cohort.pool}.values())
    cohort = without_unreadable(cohort, needed, volumes.load, config, accelerator, "Volumes", config.num_workers)
    needed = list({case.name: case for case in cohort.report + cohort.validation + cohort.pool}.values())
    compute_all(needed, features.load, accelerator, "Features", skip=False)
    logger.info("Features: %s", json.dumps(features.cache.summary()))
    if model.config.use_diagnosis and (config.init_from is None or config.report.new_thresholds):
        # With `init_from`, the classifier was trained in another run.
        seen = cohort.diagnosis if config.init_from is None else []
        choose_thresholds(model, cohort.report + cohort.validation, seen, features)
    if model.config.difference_level == "aligned" and config.init_from is None:
        fit_whitening(model, cohort, features)
    frozen = {"encoder_sha256": encoder_sha256(model.vision_encoder)}
    if model.config.use_diagnosis:
        frozen["classifier_sha256"] = state_sha256(model.diagnosis)
    samples = Path(config.output_dir) / "samples"
    stage = ReportStage(config.report, model, processor, cohort, features, config.seed, samples)
    kept = train(stage, config, accelerator, cohort, frozen)
    model.drafts = make_drafts(cohort.report, processor, config.report.draft_patients)
    references = local_references(cohort.pool, volumes)
    state = accelerator.get_state_dict(stage.model) if accelerator.num_processes > 1 else model.state_dict()

    def write(folder: Path) -> None:
        save_model(model, folder, state)
        processor.save_pretrained(folder)
        if references is not None:
            references.write_paths(folder)

    if accelerator.is_main_process:
        write_folder(output, write)
    accelerator.wait_for_everyone()
    count = 0 if references is None else len(references.entries)
    return Finished(output, **kept, references=count, tested=bool(cohort.test))


def local_references(pool: list[Case], volumes: VolumeCache) -> ReferencePool | None:
    """Return the pool as paths and digests; `None` if files need metadata or a spacing from elsewhere."""
    paths = {case.name: case.volume for case in pool if isinstance(case.volume, Path) and case.metadata is None}
    if not paths or volumes.spacing is not None:
        return None
    return ReferencePool.of_paths(paths, {name: volumes.hashes(path) for name, path in paths.items()})


def save_model(model: DiffVPForConditionalGeneration, folder: Path, state: dict[str, torch.Tensor]) -> None:
    """Call `save_pretrained` with the full state of a model that may be sharded.

    FSDP2 replaces the class of the model by its own, from whose module transformers would take the code files.
    """
    sharded = type(model)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.__class__ = sharded


def make_volumes(config: TrainingConfig, image_processor: DiffVPImageProcessor) -> VolumeCache:
    """Make the cache of preprocessed volumes."""
    return VolumeCache(config.data.cache_dir, image_processor, config.data.spacing)


def without_unreadable(
    cohort: Cohort, cases, load, config: TrainingConfig, accelerator, description: str, workers: int = 0
) -> Cohort:
    """
    Cache every case with `load`, and return the cohort without unreadable volumes. With `data.skip_unreadable`, these
    are listed in `<output_dir>/skipped.jsonl`.

    Raises:
        DatasetError: volumes are unreadable, and `data.skip_unreadable` is false.
    """
    problems = compute_all(cases, load, accelerator, description, config.data.skip_unreadable, workers)
    if not problems:
        return cohort
    if accelerator.is_main_process:
        lines = [json.dumps({"id": problem.name, "row": problem.row, "problem": str(problem)}) for problem in problems]
        path = Path(config.output_dir) / "skipped.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_texts(path.parent, {path.name: "\n".join(lines) + "\n"})
        logger.warning("%d unreadable volumes are skipped; they are listed in %s.", len(problems), path)
    return cohort.without({problem.name for problem in problems})


def build_generator(config: TrainingConfig) -> tuple[DiffVPForConditionalGeneration, DiffVPProcessor]:
    """Build the model of stage 2, including the classifier of stage 1, and its processor."""
    base = config.base
    processor = make_processor(config)
    tokenizer, fields = processor.tokenizer, model_fields(config, processor)
    own = has_own_encoder(config)
    needs_classifier = fields.get("use_diagnosis", True) or own
    if needs_classifier:
        folder = config.classifier or Path(config.output_dir) / "diagnosis"
        labels = DiffVPConfig(**config.model).diagnosis_labels if fields.get("use_diagnosis", True) else None
        encoder, classifier = load_classifier(folder, labels)
        fields["finding_attributes"] = classifier.attributes  # with the margins fitted in the first stage
    if base.from_scratch is not None:
        model = build_from_scratch(base.from_scratch, tokenizer, fields)
    else:
        model = DiffVPForConditionalGeneration.from_base(
            base.name,
            base_model_revision=base.revision,
            base_model_gguf_file=base.gguf_file,
            lora_config=LoraConfig(task_type="CAUSAL_LM", **config.lora) if config.lora else None,
            config=fields,
            dtype=getattr(torch, base.dtype),
            **quantization(base),
        )
        check_base(model.language_model.config, base.expected_config)
    if model.config.use_diagnosis:
        if model.config.share_encoder:
            classifier.vision_encoder = None
        model.diagnosis.load_state_dict(classifier.state_dict())
    if config.encoder_weights is not None:
        load_encoder(model, config.encoder_weights)
    elif own:
        model.vision_encoder.load_state_dict(encoder.state_dict())
    return model, processor


def build_from_scratch(decoder: dict, tokenizer, fields: dict) -> DiffVPForConditionalGeneration:
    """Build a model around a randomly initialized decoder, which is trained completely and saved in checkpoints."""
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_config = {"model_type": "llama", "vocab_size": len(tokenizer), **tokens, **decoder}
    model = DiffVPForConditionalGeneration(DiffVPConfig(text_config=text_config, **fields))
    model.language_model.requires_grad_(True)
    model.generation_config = own_generation_config(GenerationConfig(**tokens))
    return model.eval()


def load_classifier(
    folder: str | Path, labels: Sequence[str] | None = None
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """
    Load the visual encoder and the classifier of a checkpoint, either of stage 1 or of a whole model.

    Raises:
        ValueError: there is no classifier, or it predicts other labels than `labels` or in another order.
    """
    check_checkpoint_name(folder)
    config = DiffVPConfig.from_pretrained(folder)
    if labels is not None and list(config.diagnosis_labels) != list(labels):
        known = list(config.diagnosis_labels)
        raise ValueError(f"the classifier of {folder} knows {known}; model.diagnosis_labels is {list(labels)}")
    if config.architectures == ["DiffVPForDiagnosis"]:
        classifier = DiffVPForDiagnosis.from_pretrained(folder).classifier
        return classifier.vision_encoder, classifier
    model = DiffVPForConditionalGeneration.from_pretrained(folder)
    if model.diagnosis is None:
        raise ValueError(f"{folder} has no classifier (use_diagnosis is false)")
    if model.config.share_encoder:
        model.diagnosis.vision_encoder = model.vision_encoder
    return model.vision_encoder, model.diagnosis


def load_start(config: TrainingConfig) -> tuple[DiffVPForConditionalGeneration, DiffVPProcessor]:
    """Load the checkpoint to start from, without its references, which belong to another domain than the new data."""
    check_checkpoint_name(config.init_from)
    options = config.init_options
    model = DiffVPForConditionalGeneration.from_pretrained(config.init_from, is_trainable=True, **options)
    processor = DiffVPProcessor.from_pretrained(config.init_from, trust_remote_code=False, **options)
    processor.reference_pool = None
    if config.model is not None:
        model.config.intended_domain = config.model["intended_domain"]
    return model, processor


def choose_thresholds(
    model: DiffVPForConditionalGeneration, cases: Sequence[Case], seen: Sequence[Case], features: Features
) -> None:
    """Set the thresholds of the model from the labelled cases among `cases` that its classifier has not `seen`."""
    names = {case.name for case in seen}
    unseen = [case for case in cases if case.name not in names and case.labels is not None]
    if not unseen:
        return
    logits = torch.stack([features.load(case)["diagnosis_logits"] for case in unseen])
    probabilities, labels = logits.sigmoid().numpy(), np.stack([case.labels for case in unseen])
    model.config.diagnosis_threshold = best_thresholds(probabilities, labels)
    score = crossfitted_f1(probabilities, labels, [case.patient_id for case in unseen])
    told = "too few to score the classifier" if score is None else f"cross-fitted micro-F1 {score:.3f}"
    logger.info("Thresholds: chosen on %d cases that the classifier has not trained on; %s.", len(unseen), told)


def fit_whitening(model: DiffVPForConditionalGeneration, cohort: Cohort, features: Features) -> None:
    """Fit the whitening of the aligned difference to every seventh token inside the body in scans of the pool."""
    tokens, window = [], features.volumes.image_processor.hu_window
    for case in cohort.pool[:WHITENING_SCANS]:
        volume = features.volumes.load(case).float()
        densest = torch.nn.functional.adaptive_max_pool3d(volume, model.config.feature_grid)[0].flatten()
        body = to_hu(densest, window) > TISSUE_HU
        tokens.append(features.load(case)["features"][body][::7].float())
    model.aligned_difference.fit(torch.cat(tokens))


def prepare(config: TrainingConfig) -> Cohort:
    """
    Load the cases of a run and check everything that would stop it.

    Raises:
        ValueError: the configuration contradicts itself or the data.
        DatasetError: lists all problems with the data or the run.
    """
    cohort = load_cohort(config)
    check_run(config, cohort)
    return cohort


def read_volumes(config: TrainingConfig, cohort: Cohort) -> Cohort:
    """
    Read every volume into the cache of the run, and return the cohort without unreadable volumes.

    Raises:
        DatasetError: volumes are unreadable, and `data.skip_unreadable` is false.
    """
    if config.init_from is None:
        image_processor = DiffVPImageProcessor(**config.image_processor)
    else:
        image_processor = DiffVPImageProcessor.from_pretrained(config.init_from, **config.init_options)
    cases = list({case.name: case for case in cohort.everyone() + cohort.pool}.values())
    volumes, options = make_volumes(config, image_processor), (config.data.skip_unreadable, config.num_workers)
    problems = compute_all(cases, volumes.load, make_accelerator(config), "Volumes", *options)
    return cohort.without({problem.name for problem in problems})


def run(config: TrainingConfig, cohort: Cohort | None = None) -> Finished:
    """Run or resume the stages that the configuration selects.

    Args:
        cohort: result of [`prepare`], if it was called before.

    Raises:
        ValueError, DatasetError: see [`prepare`].
        Interrupted: after Ctrl-C or SIGTERM, once the current step is completed and saved.
    """
    accelerator = make_accelerator(config)
    cohort = prepare(config) if cohort is None else cohort
    if config.log_with:
        accelerator.init_trackers("diffvp", config={"seed": config.seed, "output_dir": config.output_dir})
    if config.stage in ("all", "diagnosis") and config.init_from is None:  # `classifier` requires stage: report
        finished = train_diagnosis(config, accelerator, cohort)
    if config.stage in ("all", "report"):
        finished = train_report(config, accelerator, cohort)
    accelerator.end_training()
    return finished


def main() -> None:
    """Entry point for launchers, which start one process per device; `diffvp train` uses one device."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffvp").setLevel(logging.INFO)
    path, *overrides = sys.argv[1:]
    finished = run(TrainingConfig.load(path, overrides))
    if PartialState().is_main_process:
        sys.stdout.writelines(f"{line}\n" for line in ["", *finished.lines(path, overrides)])


if __name__ == "__main__":
    main()
