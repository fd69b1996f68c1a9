# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Load any dataset by the name of its layout."""

import hashlib
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from ..reading_diffvp import read_remote
from ..storage_diffvp import replacing
from .cases import Case, DatasetError, Problem, check_included, raise_problems, selection
from .ct_rate import load_ct_rate
from .ctrg import load_ctrg
from .phantom_cases import load_phantom
from .radgenome import load_radgenome
from .table import load_hub, load_table


def store_hub(
    name: str | Path,
    split: str,
    *,
    store: str | Path,
    include: Collection[str] | None = None,
    exclude: Collection[str] = (),
    **options,
) -> list[Case]:
    """Stream the cases of a Hub dataset, and store each volume under the digest of its content.

    Args:
        name, split, options: see [`load_hub`].
        store: folder for the volumes.
        include, exclude: see [`load_ct_rate`].

    Raises:
        DatasetError: the first problem of a row, or all names of `include` that do not exist.
    """
    keep, cases, problems = selection(include, exclude), [], []
    Path(store).mkdir(parents=True, exist_ok=True)
    for case in load_hub(str(name), split, **options):
        if keep(case.name):
            cases.append(replace(case, volume=_stored(case.volume, Path(store))))
    check_included(include, {case.name for case in cases}, str(name), problems)
    raise_problems(problems)
    return cases


def _stored(volume: dict, store: Path) -> Path:
    """Return the path of a volume after storing its bytes; that of a file of a local dataset, which is not copied."""
    content, path = volume["bytes"], volume["path"]
    if content is None and "://" not in path:
        return Path(path)
    content = read_remote(path) if content is None else content
    suffix = ".nii.gz" if content[:2] == b"\x1f\x8b" else ".nii"
    path = store / f"{hashlib.sha256(content).hexdigest()}{suffix}"
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    return path


LOADERS = {
    "phantom": load_phantom,
    "radgenome": load_radgenome,
    "ct-rate": load_ct_rate,
    "ctrg": load_ctrg,
    "table": load_table,
    "hub": store_hub,
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
        layout: "phantom", "radgenome", "ct-rate", "ctrg", "table" or "hub".
        root: folder of the dataset; for "table", alternatively the table itself; for "hub", its name on the Hub.
        split: "train", "valid" or, if available, "test"; `None` for all rows of a table.
        include: names of the cases to load; `None` for all.
        exclude: names of cases to leave out, with all their problems.
        options: further options of the layout's loader: the `labels` of a table, the `store` of [`store_hub`].

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
