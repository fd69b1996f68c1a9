# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
YAML files that describe experiments, checked field by field.

- study (`configs/study_*.yaml`): data, training of the full model, test set;
- variants (`variants.yaml`): the models, as changes to the settings of the full model;
- table (`table4.yaml`, ...): rows (variant, seeds, test condition) and the pairs of rows to compare.
"""

import copy
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..training.config import TrainingConfig, override, read_settings, set_value, validated

FOLDER = Path(__file__).parent
NO_TABLES = ("variants", "labeler_noise")  # other YAML files of the folder


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeldOutSection(_Section):
    """Test cases: a split that is never trained on. It has its own normal references, as in the paper."""

    split: str
    labeler: str  # reads findings from reports: "phantom", "rules", or the folder of a converted RadBERT
    cases: int | None = Field(default=None, ge=2)  # use only the first N cases
    batch_size: int = Field(default=16, ge=2)  # reports generated at once
    max_new_tokens: int = Field(ge=1)


class ForeignSection(_Section):
    """Data of another scanner: normal references for tables 8 and 9, patients for `scanner`."""

    layout: str
    root: str
    split: str


class StudyConfig(_Section):
    """Data, training and test set shared by all experiments.

    `training` holds the training settings of the full model. In the YAML file it is the path of a training file,
    relative to the study file, and `settings` overrides its fields by dotted name.
    """

    name: str
    title: str
    training: dict
    test: HeldOutSection
    foreign: ForeignSection | None = None

    @classmethod
    def load(cls, path: str | os.PathLike, overrides: list[str] | None = None) -> "StudyConfig":
        """
        Read a study file. Overrides have the form of `diffvp train`, such as `training.data.root=/data/phantom`.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
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
        study.training_config(Variant(name="", about=""), seed=0, output_dir="")  # fail on a typo before hours of work
        return study

    def training_config(self, variant: "Variant", seed: int, output_dir: str | os.PathLike) -> TrainingConfig:
        """Return the training settings of one model."""
        values = copy.deepcopy(self.training)
        for dotted, value in variant.settings.items():
            set_value(values, dotted, value)
        return validated(TrainingConfig, {**values, "seed": seed, "output_dir": str(output_dir)}, "training")


class Variant(_Section):
    """A model of the study, as changes to the training settings of the full model."""

    name: str
    about: str  # description; for a published system, also the differences from it
    settings: dict = {}


class Condition(_Section):
    """Test condition: patients and choice of references. Defaults are the paper's: random, from all normal scans."""

    patients: Literal["own", "foreign"] = "own"  # the study's test cases, or patients of another scanner
    pool_size: int | None = Field(default=None, ge=1)  # number of normal scans in the pool; null: all
    abnormal: float = Field(default=0.0, ge=0, le=1)  # share of the pool replaced by abnormal scans
    foreign: float = Field(default=0.0, ge=0, le=1)  # share replaced by normal scans of another scanner
    choice: Literal["random", "nearest"] = "random"
    references: int = Field(default=1, ge=1)  # number of references whose features are averaged
    draw: int | None = None  # seed of the choice; null: seed of the training
    prompt: Literal["own", "shuffled", "zeroed"] = "own"  # difference prompt: own, another patient's, or zeros

    @property
    def name(self) -> str:
        """Stem of the reports file: the fields that differ from the defaults."""
        changed = self.model_dump(exclude_defaults=True)
        return "-".join(f"{key}_{value}" for key, value in changed.items()) or "random"


class TableRow(_Section):
    """Row of a table: a model, a test condition, and the paper's scores."""

    name: str
    variant: str
    condition: Condition = Condition()
    seeds: list[int] | None = None  # null: seeds of the table
    paper: dict[str, float] = {}  # in the paper's units


class Table(_Section):
    """A table or figure of the paper, or one of our own."""

    title: str
    about: str
    kind: str = "scores"  # a key of `kinds.KINDS`
    seeds: list[int]
    rows: list[TableRow] = Field(min_length=1)
    metrics: list[str] = []
    compare: list[tuple[str, str]] = []  # pairs of row names whose difference is tested
    paper_note: str = ""
    settings: dict = {}  # of the kind, which checks them

    @property
    def patients(self) -> str:
        """Tested patients, the same in all rows: "own" or "foreign"."""
        return self.rows[0].condition.patients

    @model_validator(mode="after")
    def _rows_compare(self) -> "Table":
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(f"rows: {names} (expected distinct names)")
        unknown = {name for pair in self.compare for name in pair} - set(names)
        if unknown:
            raise ValueError(f"compare names {sorted(unknown)}; expected names of rows: {names}")
        if len({row.condition.patients for row in self.rows}) > 1:
            raise ValueError("all rows must test the same patients: comparisons are paired and share their baselines")
        return self


def load_variants(path: str | os.PathLike = FOLDER / "variants.yaml") -> dict[str, Variant]:
    """Read the models, by key."""
    return {key: validated(Variant, value, f"{Path(path).name}: {key}") for key, value in read_settings(path).items()}


def read_table(path: Path) -> Table:
    """
    Read a table.

    Raises:
        SettingsError: a field is missing, unknown or of the wrong type.
    """
    values = read_settings(path)
    if isinstance(values.get("rows"), list):  # each by itself, to suggest the fields of a row for an unknown one
        values["rows"] = [
            validated(TableRow, row, f"{path.name}: rows.{number}") for number, row in enumerate(values["rows"])
        ]
    return validated(Table, values, path.name)


def table_names() -> list[str]:
    """Return the names of the tables and figures of this folder."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in NO_TABLES)


def table_file(name: str) -> Path:
    """
    Return the file of the table `name` of this folder, or the file `name` if it ends in .yaml.

    Raises:
        ValueError: there is no such table.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if path.stem not in table_names() and not (name.endswith(".yaml") and path.is_file()):
        raise ValueError(f"There is no experiment {name!r}; expected one of {', '.join(table_names())}")
    return path
