# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
What a study is made of: YAML files, checked field by field.

- a *study* (`configs/study_*.yaml`): the data, the training of the full model, the test set;
- `variants.yaml`: by name, what another model has instead, and how far it stands for a published system;
- a *table* (`table4.yaml`, ...): which variants, seeds and test conditions stand in it, and what is compared.
"""

import copy
import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..training.config import TrainingConfig, override, read_settings, set_value, validated

FOLDER = Path(__file__).parent
NO_TABLES = ("variants", "labeler_noise")  # other files of this folder


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeldOutSection(_Section):
    """The test cases: a split that no training uses, and its own normal references, as in the paper."""

    split: str
    labeler: str  # reads findings out of reports: "phantom", "rules", or the folder of a converted RadBERT
    cases: int | None = Field(default=None, ge=2)  # only the first so many
    batch_size: int = Field(default=16, ge=2)  # reports that are generated at once
    max_new_tokens: int = Field(ge=1)


class ForeignSection(_Section):
    """Another scanner: its normal references for tables 8 and 9, its patients for `scanner`."""

    layout: str
    root: str
    split: str


class Study(_Section):
    """Data, training and test of all experiments.

    `training` holds the settings of the full model's training file. In YAML it is that file's path, from the study's
    folder, and `settings` what is otherwise, by dotted names.
    """

    name: str
    title: str
    training: dict
    test: HeldOutSection
    foreign: ForeignSection | None = None

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: list[str] | None = None) -> "Study":
        """
        Read a study; overrides as of `diffvp train`, such as `training.data.root=/data/phantom`.

        Raises:
            ValueError: a field is missing, unknown or of another kind.
        """
        values = read_settings(path)
        if not isinstance(values.get("training"), str):
            raise ValueError(f"{Path(path).name}: training is {values.get('training')!r}; expected a training file")
        training = read_settings(Path(path).parent / values["training"])
        for dotted, value in (values.pop("settings", None) or {}).items():
            set_value(training, dotted, value)
        values["training"] = {key: value for key, value in training.items() if key not in ("output_dir", "seed")}
        override(values, overrides or [])
        study = validated(cls, values, Path(path).name)
        study.training_config(Variant(name="", about=""), seed=0, output_dir="")  # a typo shows before hours of work
        return study

    def training_config(self, variant: "Variant", seed: int, output_dir: str | os.PathLike) -> TrainingConfig:
        """The training file of one model."""
        values = copy.deepcopy(self.training)
        for dotted, value in variant.settings.items():
            set_value(values, dotted, value)
        return validated(TrainingConfig, {**values, "seed": seed, "output_dir": str(output_dir)}, "training")


class Variant(_Section):
    """A model of the study: what of the training file is otherwise than in the full model."""

    name: str
    about: str  # what it is, and of a published system how far it stands for it
    settings: dict = {}


class Condition(_Section):
    """Who is tested and how references are chosen. The defaults are the paper's: at random from all normal scans."""

    patients: Literal["own", "foreign"] = "own"  # the study's test cases, or those of another scanner
    pool_size: int | None = Field(default=None, ge=1)  # only so many of the normal scans
    abnormal: float = Field(default=0.0, ge=0, le=1)  # share of the pool that is replaced by abnormal scans
    foreign: float = Field(default=0.0, ge=0, le=1)  # share that is replaced by normal scans of another scanner
    choice: Literal["random", "nearest"] = "random"
    references: int = Field(default=1, ge=1)  # so many, whose features are averaged
    draw: int | None = None  # seed of the choice; null: that of the training
    prompt: Literal["own", "shuffled", "zeroed"] = "own"  # the difference prompt: of another patient, or none

    @property
    def name(self) -> str:
        """Of its file: what is not the default."""
        changed = self.model_dump(exclude_defaults=True)
        return "-".join(f"{key}_{value}" for key, value in changed.items()) or "random"


class TableRow(_Section):
    """A line of a table: a model under a condition, and what the paper has for it."""

    name: str
    variant: str
    condition: Condition = Condition()
    seeds: list[int] | None = None  # null: those of the table
    paper: dict[str, float] = {}  # in the paper's own units


class Table(_Section):
    """One table or figure of the paper, or one of our own."""

    title: str
    about: str
    kind: Literal["scores", "maps", "importance", "lesions", "cases", "stability", "information"] = "scores"
    seeds: list[int]
    rows: list[TableRow]
    metrics: list[str] = []
    compare: list[tuple[str, str]] = []  # names of rows whose difference is tested
    paper_note: str = ""

    @property
    def needs_models(self) -> bool:
        """Whether it looks into models: their reports, made elsewhere, are not enough."""
        return self.kind in ("maps", "importance", "information")

    @property
    def needs_reports(self) -> bool:
        return self.kind not in ("maps", "importance")

    @model_validator(mode="after")
    def _rows_compare(self) -> "Table":
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"rows must have names of their own, got {names}")
        unknown = {name for pair in self.compare for name in pair} - set(names)
        if unknown:
            raise ValueError(f"compare names {sorted(unknown)}; expected names of rows: {names}")
        patients = {row.condition.patients for row in self.rows}
        if len(patients) > 1:
            raise ValueError("rows must be of the same patients: comparisons are paired, and so are the baselines")
        if patients == {"foreign"} and self.kind != "scores":
            raise ValueError(f"patients: foreign is for a table of scores, not for {self.kind}")
        return self


def load_variants(path: str | os.PathLike = FOLDER / "variants.yaml") -> dict[str, Variant]:
    with open(path, encoding="utf-8") as file:
        return {key: Variant.model_validate(value) for key, value in yaml.safe_load(file).items()}


def load_table(name: str, variants: dict[str, Variant]) -> Table:
    """
    The table `name`, or that of the file `name` if it ends in .yaml.

    Raises:
        ValueError: there is none of that name, or it names a variant that does not exist.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if path.stem not in table_names() and not (name.endswith(".yaml") and path.is_file()):
        raise ValueError(f"There is no experiment {name!r}; expected one of {', '.join(table_names())}")
    with open(path, encoding="utf-8") as file:
        table = Table.model_validate(yaml.safe_load(file))
    unknown = sorted({row.variant for row in table.rows} - set(variants))
    if unknown:
        raise ValueError(f"{path.name}: no such variant: {', '.join(unknown)}; expected one of {', '.join(variants)}")
    return table


def table_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in NO_TABLES)
