# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""CTRG-Chest-548K in the form that published code reads.

    annotation.json                       {"train": [{"id", "finding"}, ...], "val": [...], "test": [...]}
    CTRG-Chest-548K_volume/{id}.nii.gz

The volumes were made from 8-bit images and have neither Hounsfield units nor spacing. Reading them requires
`allow_non_hu`, an assumed `spacing`, and a window of grey values. Results on them do not transfer to CT in HU. There
are no labels, so that a pool of normal scans must be named (`pool.py`).
"""

import json
import os
from collections.abc import Collection
from pathlib import Path

from .cases import (
    SPLITS,
    Case,
    Problem,
    canonical_split,
    check_included,
    check_kind,
    check_report,
    is_missing,
    raise_problems,
    selection,
    shown,
    shown_path,
    volume_name,
)

REPORT_KEYS = ("finding", "findings")  # in Dia-LLaMA, in MvKeTR


def load_ctrg(
    root: str | Path, split: str, *, include: Collection[str] | None = None, exclude: Collection[str] = ()
) -> list[Case]:
    """Load the studies of a split ("train", "valid" or "test") in the order of `annotation.json`.

    `row` is the position. Arguments and errors are those of [`load_ct_rate`].
    """
    split = canonical_split(split)
    root, problems, keep = Path(root), [], selection(include, exclude)
    cases = []
    first: dict[str, str] = {}
    for key, items in _read_annotation(root / "annotation.json", split, problems).items():
        table, this = f"annotation.json[{key}]", key in SPLITS[split]
        for position, item in enumerate(items, start=1):
            if not isinstance(item, dict) or is_missing(item.get("id")):
                problems.append(Problem(table, position, "id", "missing", "an object with an id and a finding"))
                continue
            if not check_kind(item["id"], table, position, "id", "", problems, number=True):
                continue
            name = volume_name(item["id"])
            if not keep(name):
                continue
            if name in first:
                # Also checked across splits, where it would be a leak.
                problems.append(
                    Problem(table, position, "id", f"the same as in {first[name]}", "one entry per id", name)
                )
            first.setdefault(name, f"{table}, row {position}")
            if this:
                cases.append(_case(root, table, position, name, item, problems))
    check_included(include, {case.name for case in cases}, "annotation.json", problems)
    raise_problems(problems)
    return cases


def _read_annotation(path: Path, split: str, problems: list[Problem]) -> dict[str, list]:
    """Read the lists of `annotation.json` by split; if it has another form, add a problem and return no lists."""
    if not path.is_file():
        problems.append(Problem(path.name, None, "file", "missing", "a file next to CTRG-Chest-548K_volume/"))
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        line = f"in line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "as UTF-8"
        problems.append(Problem(path.name, None, "content", f"unreadable {line}", "JSON"))
        return {}
    if not isinstance(content, dict) or not all(isinstance(items, list) for items in content.values()):
        problems.append(
            Problem(path.name, None, "content", f"a {type(content).__name__}", "an object with a list per split")
        )
        return {}
    if not any(key in SPLITS[split] for key in content):
        found = ", ".join(shown(key) for key in content) or "none"
        problems.append(Problem(path.name, None, "splits", found, f"one of {', '.join(SPLITS[split])}"))
    return content


def _case(root: Path, table: str, position: int, name: str, item: dict, problems: list[Problem]) -> Case:
    key = next((key for key in REPORT_KEYS if key in item), REPORT_KEYS[0])
    report = check_report(item.get(key), table, position, key, name, problems)
    volume = root / "CTRG-Chest-548K_volume" / f"{name}.nii.gz"
    if not os.path.isfile(volume):  # Path raises an error for an id that is too long for a path
        problems.append(Problem(table, position, "volume", "missing", shown_path(volume, root), name))
    return Case(name, name, name, volume, report, row=position)
