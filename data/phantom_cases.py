# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Load a phantom cohort that `diffvp phantom` has written. Unlike writing one, this imports no renderer."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from .cases import Case, Problem, canonical_split, raise_problems, selection
from .ct_rate import read_cases
from .radgenome import read_disorders, read_regions, region_table_path


def load_phantom(
    root: str | Path, split: str, *, include: Collection[str] | None = None, exclude: Collection[str] = ()
) -> list[Case]:
    """Load all cases of a split of a phantom cohort: CT-RATE's version 2 with the tables of RadGenome-ChestCT.

    Arguments and errors are those of [`load_ct_rate`].
    """
    split = canonical_split(split, ("train", "valid"))
    problems: list[Problem] = []
    cases = read_cases(Path(root), split, include, exclude, problems)
    dataset, keep = Path(root) / "dataset", selection(include, exclude)
    *_, regions = read_regions(region_table_path(dataset, split), keep, problems)
    listed, lists = {case.name: case.row for case in cases}, f"{split}_predicted_labels.csv"
    disorders = read_disorders(dataset, split, listed, lists, keep, problems)
    raise_problems(problems)
    return [
        replace(case, region_sentences=regions.get(case.name, {}), disorders=disorders[case.name]) for case in cases
    ]
