# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Load any dataset by the name of its layout."""

from collections.abc import Collection
from pathlib import Path

from .cases import Case, DatasetError, Problem
from .ct_rate import load_ct_rate
from .ctrg import load_ctrg
from .phantom_cases import load_phantom
from .radgenome import load_radgenome
from .table import load_table

LOADERS = {
    "phantom": load_phantom,
    "radgenome": load_radgenome,
    "ct-rate": load_ct_rate,
    "ctrg": load_ctrg,
    "table": load_table,
}


def load_dataset_cases(
    layout: str,
    root: str | Path,
    split: str | None,
    *,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    **options,
) -> list[Case]:
    """Load the cases of a split.

    Args:
        layout: "phantom", "radgenome", "ct-rate", "ctrg" or "table".
        root: folder of the dataset; for "table", alternatively the table itself.
        split: "train", "valid" or, if available, "test"; `None` for all rows of a table.
        include: names of the cases to load; `None` for all.
        exclude: names of cases to leave out, with all their problems.
        options: further options of the layout's loader, such as the `labels` of a table.

    Raises:
        ValueError: layout or split is unknown.
        DatasetError: lists all problems with tables and volumes.
    """
    if layout not in LOADERS:
        raise ValueError(f"layout: {layout!r} (expected one of {', '.join(LOADERS)})")
    if split is None and layout != "table":
        raise ValueError(f"layout {layout}: split: None (expected the name of a split)")
    cases = LOADERS[layout](root, split, include=include, exclude=exclude, **options)
    if not cases:
        raise DatasetError(
            [Problem(Path(root).name or ".", None, "cases", "none", f"at least one of {split or 'all'}")]
        )
    return cases
