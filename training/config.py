# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Settings of a training run: one YAML file, validated field by field."""

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

# Settings that change where and how fast a run computes, but not its result: a resumed run may change them. The number
# of samples that a device processes at once changes only the last digit of sums.
NOT_OF_THE_RESULT = {
    **dict.fromkeys(("output_dir", "stage", "num_workers", "save_every_steps", "keep_checkpoints", "log_with"), True),
    "card": True,
    "classifier": True,  # its weights count instead, by their digest
    "data": {"root", "cache_dir", "features"},
    "diagnosis": {"micro_batch_size"},
    "report": {"micro_batch_size", "samples", "draft_patients"},
}

Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # 0 keeps these weights as they are


class SettingsError(ValueError):
    """All problems with the fields of a settings file, one per line."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid")


class DataSection(_Section):
    """Location of the cases, and their division into training, validation and test.

    There are three ways to divide them. `validation_fraction` divides the split by patient, and `validation_split`
    names another split; in both, the two stages train on the rest, as in the paper. Alternatively, the three spans of
    positions give each stage its own cases. No stage sees the test cases (`test_fraction` or `test_split`), on which
    `diffvp evaluate` scores the model.
    """

    layout: Literal["phantom", "radgenome", "ct-rate", "ctrg", "table", "hub"]
    root: str  # folder; for "hub", the name of a dataset with a `Nifti` column
    load_options: dict = {}  # for "hub": arguments of `datasets.load_dataset`, such as revision (pin it) or data_dir
    cache_dir: str
    split: str | None = "train"  # null: all rows of a table
    exclude: str | None = None  # file of ids to leave out, one per line
    pool: str | None = None  # file of ids from `diffvp pool build`; null: cases with normal labels
    labeler: Literal["rules"] | None = None  # extracts labels from the reports of cases without labels
    reconstructions: Literal["first", "all"] = "first"  # reconstructions of one scan share its report
    spacing: tuple[float, float, float] | None = None  # mm along x, y, z, if neither header nor table states it
    # Average the encoder output within the dataset's region masks instead of using voxel tokens, as Reg2RG does. The
    # model then reads only `ct_features`. (Null instead of false, since the settings of older runs lack this field.)
    region_tokens: Literal[True] | None = None
    # Folder of precomputed encoder output for model.encoder_type: external. Each case has a file NAME.safetensors with
    # a tensor `features` (N, C).
    features: str | None = None
    skip_unreadable: bool = False  # skip and list unreadable volumes instead of stopping
    test_fraction: float | None = Field(default=None, gt=0, lt=1)  # of the patients; does not depend on the seed
    test_split: str | None = None  # alternatively, a split of the dataset
    validation_fraction: float | None = Field(default=None, gt=0, lt=1)
    validation_split: str | None = None
    diagnosis_cases: tuple[int, int] | None = None
    validation_cases: tuple[int, int] | None = None
    report_cases: tuple[int, int] | None = None

    @model_validator(mode="after")
    def _one_division(self) -> "DataSection":
        spans = (self.diagnosis_cases, self.validation_cases, self.report_cases)
        ways = [self.validation_fraction is not None, self.validation_split is not None, any(spans)]
        if sum(ways) != 1 or (any(spans) and not all(spans)):
            raise ValueError(
                "expected either validation_fraction, or validation_split, or diagnosis_cases, validation_cases and "
                "report_cases"
            )
        if self.test_fraction is not None and self.test_split is not None:
            raise ValueError("test_fraction and test_split are both set; expected one of them")
        if self.test_fraction is not None and any(spans):
            raise ValueError("test_fraction moves the positions of cases; expected test_split with spans of cases")
        for name in ("validation_split", "test_split"):
            if getattr(self, name) is not None and getattr(self, name) == self.split:
                raise ValueError(f"{name} is {self.split!r}, the training split; expected another")
        if any(spans):
            ordered = sorted(spans)
            for (_, stop), (start, _) in zip(ordered, ordered[1:], strict=False):
                if start < stop:
                    # The classifier must not have trained on the cases that validate it or that it writes prompts for.
                    raise ValueError(f"diagnosis_cases, validation_cases and report_cases overlap at case {start}")
        return self


class BaseSection(_Section):
    """Base LLM: any `AutoModelForCausalLM`."""

    name: str
    revision: str | None = None
    gguf_file: str | None = None
    quantization: Literal["4bit", "8bit"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Fields of a LlamaConfig: train all weights of a randomly initialized decoder, with the tokenizer of `name`.
    from_scratch: dict | None = None
    # Fields of its config.json, for `--dry-run` without a download; checked against the real ones on loading.
    expected_config: dict | None = None


class CropSection(_Section):
    """Training on crops; see `training/diagnosis_stage.py`."""

    per_epoch: int = Field(ge=1)
    validation: int = Field(ge=1)  # crops of the validation cases, the same in every epoch
    size: tuple[int, int, int]  # voxels (depth, height, width)
    # Fraction of crops centred near a lesion of a uniformly drawn label, which needs lesion masks (phantoms). Null: no
    # masks; a crop has the labels of its volume.
    near_lesions: float | None = Field(default=None, ge=0, le=1)


class DiagnosisSection(_Section):
    """Stage 1: the classifier."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # per optimizer step, over all processes
    micro_batch_size: int | None = Field(default=None, ge=1)  # at once on a device; null: its share of the batch
    learning_rate: Rate
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    warmup_ratio: float = Field(ge=0, le=1, allow_inf_nan=False)  # of the steps
    head_learning_rate: Rate
    gradient_clip: float = Field(default=1.0, gt=0)  # maximum gradient norm
    crops: CropSection | None = None  # null: train on whole scans and their labels
    patience: int | None = Field(default=None, ge=1)  # stop after this many epochs without a better validation loss

    @property
    def needs_masks(self) -> bool:
        """True if the voxel head learns from lesion masks."""
        return self.crops is not None and self.crops.near_lesions is not None


class ReportSection(_Section):
    """Stage 2: report generation."""

    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    learning_rate: Rate
    weight_decay: float = Field(ge=0, allow_inf_nan=False)
    warmup_ratio: float = Field(ge=0, le=1, allow_inf_nan=False)  # of the steps
    lora_learning_rate: Rate
    max_report_tokens: int = Field(ge=8)
    truncate_reports: bool = False  # cut longer reports; false: refuse them before the run
    true_findings: float = Field(default=0.0, ge=0, le=1)  # fraction of prompts with true findings, not predicted ones
    # With `init_from`: choose the thresholds of its classifier anew, on the labelled cases of this run, which the
    # classifier must not have trained on. A new model always chooses them.
    new_thresholds: bool = False
    gradient_checkpointing: bool = False
    gradient_clip: float = Field(default=1.0, gt=0)
    patience: int | None = Field(default=None, ge=1)
    # Drafts for faster decoding: word sequences from the reports of at least this many patients; null: no drafts.
    draft_patients: int | None = Field(default=10, ge=2)
    samples: int = Field(default=0, ge=0)  # number of validation reports to generate after each epoch, into `samples/`


class CardSection(_Section):
    """Statements of the model card that weights and scores do not provide; see `hub/card.py`."""

    title: str
    license: str  # of the checkpoint, by its identifier on the Hub; "other" if the Hub has none
    data: str  # training data, with source and licence


class TrainingConfig(_Section):
    """A training run. The YAML files in `configs/` explain the fields."""

    output_dir: str
    seed: int = Field(ge=0, lt=2**32)  # the range of NumPy
    stage: Literal["all", "diagnosis", "report"] = "all"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    num_workers: int = Field(default=0, ge=0)  # data loading processes per device
    save_every_steps: int = Field(default=100, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)  # in addition to the best one
    log_with: list[Literal["tensorboard", "trackio"]] = []
    data: DataSection
    # Start from a checkpoint (`init_from`), or from the parts of a new model (the other fields).
    init_from: str | None = None
    init_from_revision: str | None = None
    image_processor: dict | None = None
    base: BaseSection | None = None
    model: dict | None = None
    encoder_weights: str | None = None  # from `diffvp encoder convert`; null: the encoder of the first stage
    encoder: str | None = None  # for model.encoder_type: external, MODULE:NAME of a class or function
    # Checkpoint that provides classifier and encoder, in place of a first stage of this run.
    classifier: str | None = None
    lora: dict | None = None
    diagnosis: DiagnosisSection | None = None
    report: ReportSection
    card: CardSection | None = None

    @model_validator(mode="after")
    def _one_start(self) -> "TrainingConfig":
        made_of = {name: getattr(self, name) for name in ("image_processor", "base", "model")}
        if self.classifier is None:
            made_of["diagnosis"] = self.diagnosis
        elif self.stage != "report":
            raise ValueError(f"stage: {self.stage}; expected report, as `classifier` replaces the first stage")
        rank = (self.lora or {}).get("r", 1)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"lora.r: {rank!r:.80} (expected a whole number of at least 1)")
        if self.base is not None and self.base.from_scratch is not None and (self.lora or self.base.quantization):
            raise ValueError("base.from_scratch trains all weights; expected no lora and no base.quantization")
        if self.diagnosis is not None and self.diagnosis.needs_masks and self.data.layout != "phantom":
            raise ValueError(
                f"diagnosis.crops.near_lesions with data.layout: {self.data.layout}; expected crops: null or "
                "near_lesions: null, as only the phantom cohort has lesion masks"
            )
        untrained = [name for name in ("finding_attributes", "finding_regions") if (self.model or {}).get(name)]
        if self.diagnosis is not None and not self.diagnosis.needs_masks and untrained:
            raise ValueError(
                f"model.{untrained[0]} without lesion masks (diagnosis.crops.near_lesions); expected null, as only "
                "masks teach places and sizes"
            )
        if self.data.region_tokens and (self.model or {}).get("visual_tokens") != "linear":
            raise ValueError(
                "data.region_tokens are projected to the LLM directly; expected model.visual_tokens: linear"
            )
        if self.init_from is None:
            missing = [name for name, value in made_of.items() if value is None]
            if missing:
                raise ValueError(f"expected init_from, or also: {', '.join(missing)}")
        else:
            made_of |= {name: getattr(self, name) for name in ("lora", "encoder_weights", "classifier", "diagnosis")}
            if self.model is not None and list(self.model) == ["intended_domain"]:
                del made_of["model"]  # the intended use follows from the new training data
            extra = [name for name, value in made_of.items() if value is not None]
            if extra:
                raise ValueError(f"init_from has its own; leave out: {', '.join(extra)}")
            if self.stage == "diagnosis":
                raise ValueError("stage: diagnosis; expected report, as init_from has a classifier")
        return self

    @classmethod
    def load(cls, path: str, overrides: list[str] | None = None) -> "TrainingConfig":
        """Read a YAML file; see [`read_settings`].

        Raises:
            SettingsError: lists all problems with the fields.
        """
        return validated(cls, read_settings(path, overrides), os.path.basename(path))

    @property
    def init_options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` for `init_from`: its revision, if one is pinned."""
        return {} if self.init_from_revision is None else {"revision": self.init_from_revision}

    def of_the_result(self, stage: str) -> dict:
        """Return the settings that determine the weights of a stage, as JSON values."""
        values = self.model_dump(mode="json", exclude=NOT_OF_THE_RESULT)
        for other in (
            ("lora", "encoder_weights", "encoder", "base", "report") if stage == "diagnosis" else ("diagnosis",)
        ):
            del values[other]
        return values


Settings = TypeVar("Settings", bound=BaseModel)


def validated(model: type[Settings], values: dict, source: str) -> Settings:
    """
    Validate the settings of a file.

    Raises:
        SettingsError: lists all problems, in this project's form of messages instead of pydantic's.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_reworded(one, model, source) for one in error.errors())) from error


def _reworded(error: dict, model: type[BaseModel], source: str) -> str:
    place, kind = ".".join(map(str, error["loc"])), error["type"]
    if kind == "value_error":  # raised by a validator of this module
        return ": ".join([source, *([place] if place else []), str(error["ctx"]["error"])])
    if kind == "extra_forbidden":
        close = difflib.get_close_matches(str(error["loc"][-1]), _fields_at(model, error["loc"][:-1]), n=1)
        return f"{source}: {place}: unknown (expected {close[0] if close else 'one of the known fields'})"
    if kind == "missing":
        return f"{source}: {place}: missing (expected a value)"
    expected = error["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    expected = "a section of fields" if kind == "model_type" else expected
    return f"{source}: {place or 'content'}: {error['input']!r:.80} (expected {expected})"


def _fields_at(model: type[BaseModel], place: tuple) -> list[str]:
    """Return the field names of the section at `place`."""
    for name in place:
        kinds = get_args(model.model_fields[name].annotation) or (model.model_fields[name].annotation,)
        model = next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel))
    return list(model.model_fields)


def read_settings(path: str | os.PathLike, overrides: list[str] | None = None) -> dict:
    """
    Read the values of a YAML file and apply the overrides; see [`override`].

    Raises:
        SettingsError: the file is missing, or is not YAML with fields.
    """
    path = Path(path)
    if not path.is_file():
        found, expected = "a folder" if path.is_dir() else "missing", "a YAML file, such as `diffvp init` writes"
        raise SettingsError(f"{path}: file: {found} (expected {expected})")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path.name}: content: {_not_yaml(error)} (expected fields and their values)") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path.name}: content: {values!r:.80} (expected fields and their values)")
    override(values, overrides or [])
    return values


def _not_yaml(error: Exception) -> str:
    """Return why a text is not YAML, with the line if it is known."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"no YAML, {error.problem} in line {error.problem_mark.line + 1}"
    return "no YAML"


def override(values: dict, overrides: list[str]) -> None:
    """
    Set nested settings in place. Each override is `key=value` or `section.key=value`, with the value in YAML.

    Raises:
        ValueError: an override has another form, or names a section that is a plain value.
    """
    for one in overrides:
        dotted, separator, value = one.partition("=")
        if not separator:
            raise ValueError(f"Override {one!r} is not of the form key=value.")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"{dotted}: {value!r}: {_not_yaml(error)} (expected a value in YAML)") from error
        set_value(values, dotted, read)


def set_value(values: dict, dotted: str, value: object) -> None:
    """Set `section.key` of nested settings in place, creating missing sections."""
    *sections, key = dotted.split(".")
    for section in sections:
        if not isinstance(values.setdefault(section, {}), dict):
            raise ValueError(f"{dotted}: {section} is {values[section]!r}; expected a section")
        values = values[section]
    values[key] = value
