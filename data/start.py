# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""From a folder of scans to a training file and a table (`diffvp init`)."""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..configuration_diffvp import DIAGNOSIS_LABELS
from .cases import Case, DatasetError, Problem, Row, read_csv, split_by_patient
from .pool import pool_by_rule
from .scans import find_scans
from .table import PATH_COLUMNS, TABLE_NAMES, TABLE_SUFFIXES, load_table, without_suffix

TEMPLATE = Path(__file__).resolve().parents[1] / "configs" / "own_scans.yaml"
CONFIG, GITIGNORE = "own_scans.yaml", ".gitignore"
IGNORED = "# Patient data, and what is computed from it, stay here.\n*\n!.gitignore\n"
SHOWN = 5  # problems of a table
WORDS_TO_TOKENS, ROUND = 2.0, 256  # of a report's longest, with room; training counts them exactly

# A model and a training that two CPU cores walk through in minutes, to see the whole road.
QUICK = {
    "image_processor.size": {"depth": 48, "height": 64, "width": 64},
    "image_processor.target_spacing": [6.0, 5.5, 5.5],
    "model.image_size": [48, 64, 64],
    "model.encoder_block_channels": [8, 16, 24, 32],
    "model.encoder_pyramid_channels": 24,
    "diagnosis.epochs": 6,
    "report.epochs": 2,
}


class StartError(ValueError):
    """A folder that no training can be begun with; the message says why."""


@dataclass
class Started:
    """
    What `start` has written and found.

    Attributes:
        config, table: their paths; `config` is written only for a table that is in order.
        written: files that are new.
        ready: whether training can begin.
        facts: what was found, in sentences.
        missing: what has to be done before training, or should be.
    """

    config: Path
    table: Path
    written: list[Path]
    facts: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    ready: bool = True


def start(
    folder: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    domain: str | None = None,
    base: str | None = None,
    quick: bool = False,
) -> Started:
    """
    Write a training file for a folder of scans, a table where it has none, and a `.gitignore` that keeps patient data
    out of a repository. Neither scans nor a table that is there are changed.

    Args:
        output: folder for what is written, and for what training writes; by default that of the scans.
        domain: what kind of scans these are, which every report of the model will say.
        base: causal LLM, a Hub id or a folder; by default the small one of the demo.
        quick: settings with which two cores walk the whole road in minutes, and no model of use comes out.

    Raises:
        StartError: there are no scans, or a training file is there already.
        OSError: it cannot be written there.
    """
    folder = Path(folder)
    output = folder if output is None else Path(output)
    config = output / CONFIG
    if not folder.is_dir():
        raise StartError(f"{folder}: folder: missing (expected a folder of scans)")
    if config.exists():
        raise StartError(f"{config}: file: there already (expected none: edit it, or delete it and run init again)")
    scans = find_scans(folder)
    if not scans:
        raise StartError(f"{folder}: scans: none (expected NIfTI, NRRD, MetaImage or folders of DICOM slices)")
    output.mkdir(parents=True, exist_ok=True)
    started = Started(config, _find_table(folder), [])
    dicom = sum(path.is_dir() for path in scans)
    started.facts.append(f"{len(scans)} scans, {dicom} of them folders of DICOM slices.")
    if started.table is None:
        started.table = output / TABLE_NAMES[0]
        started.missing += _write_table(started.table, scans)
        started.written.append(started.table)
    else:
        started.missing += _unlisted(started.table, scans)
    changes = {
        "output_dir": str(output / "runs"),
        "data.root": str(started.table),
        "data.cache_dir": str(output / "cache"),
        **(QUICK if quick else {}),
    }
    if domain is not None:
        changes["model.intended_domain"] = domain
    else:
        started.missing.append(f"model.intended_domain in {CONFIG}: say there which scans these are.")
    if base is not None:
        changes |= {"base.name": base, "base.revision": None, "base.gguf_file": None}
        if not Path(base).is_dir():
            started.missing.append(f"base.revision in {CONFIG}: pin the commit of {base}.")
    changes |= _facts(started)
    if not (output / GITIGNORE).exists():
        (output / GITIGNORE).write_text(IGNORED, encoding="utf-8")
        started.written.append(output / GITIGNORE)
    if not started.ready:
        started.missing.append("Then run the same command again: it writes the training file.")
        return started
    text = TEMPLATE.read_text(encoding="utf-8")
    for dotted, value in changes.items():
        text = set_in_text(text, dotted, value)
    config.write_text(text, encoding="utf-8")
    started.written.append(config)
    return started


def set_in_text(text: str, dotted: str, value: object) -> str:
    """
    Set `key` or `section.key` of a YAML text, whose comments stay.

    Raises:
        KeyError: there is no such line.
    """
    section, _, key = dotted.rpartition(".")
    lines, here = text.splitlines(keepends=True), ""
    for number, line in enumerate(lines):
        if line[:1].isalpha():
            here = line.partition(":")[0]
        start = f"  {key}:" if section else f"{key}:"
        if line.startswith(start) and here == (section or key):
            _, mark, comment = line.partition("  #")
            lines[number] = f"{start} {json.dumps(value, ensure_ascii=False)}" + (mark + comment if mark else "\n")
            return "".join(lines)
    raise KeyError(dotted)


def _find_table(folder: Path) -> Path | None:
    """The table of a folder: by its name, or the only one that has the columns of one."""
    named = [folder / name for name in TABLE_NAMES if (folder / name).is_file()]
    if len(named) > 1:
        raise StartError(f"{folder}: table: {' and '.join(TABLE_NAMES)} (expected one of the two)")
    if named:
        return named[0]
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    fitting = [path for path in tables if _has_columns(path)]
    if len(fitting) > 1:
        names = ", ".join(path.name for path in fitting)
        raise StartError(f"{folder}: tables: {names} (expected one with the columns path and report, or metadata.csv)")
    return fitting[0] if fitting else None


def _has_columns(path: Path) -> bool:
    if path.suffix.lower() == ".jsonl":
        with path.open(encoding="utf-8-sig") as file:
            columns = json.loads(next((line for line in file if line.strip()), "{}"))
    else:
        problems: list[Problem] = []
        rows: list[Row] | None = read_csv(path, (), problems)
        columns = rows[0].values if rows else ()
    return "report" in columns and any(name in columns for name in PATH_COLUMNS)


def _write_table(table: Path, scans: list[Path]) -> list[str]:
    """A row a scan, with the report from a text file of its name where there is one; says how many have none."""
    rows, without = [], 0
    for scan in scans:
        beside = scan.parent / f"{without_suffix(scan.name)}.txt"
        report = beside.read_text(encoding="utf-8").strip() if beside.is_file() else ""
        without += not report
        inside = scan.is_relative_to(table.parent)
        rows.append([scan.relative_to(table.parent).as_posix() if inside else str(scan.absolute()), report])
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["path", "report"], *rows])
    if not without:
        return []
    return [f"{without} of {len(rows)} reports: fill the column report of {table}, or delete those rows."]


def _unlisted(table: Path, scans: list[Path]) -> list[str]:
    """Scans of the folder that the table does not name."""
    try:
        known = {case.volume.resolve() for case in load_table(table)}
    except DatasetError:
        return []  # said with the rest
    left = [scan for scan in scans if scan.resolve() not in known]
    return [f"{len(left)} scans of the folder are not in {table.name}: training passes them over."] if left else []


def _facts(started: Started) -> Mapping[str, object]:
    """What the table says, into `facts` and `missing`; the settings that follow from it."""
    table = started.table
    try:
        cases = load_table(table)
    except DatasetError as error:
        started.missing += [f"{problem}." for problem in error.problems[:SHOWN]]
        left = len(error.problems) - SHOWN
        started.missing += [f"... and {left} more in {table.name}."] if left > 0 else []
        started.ready = False
        return {}
    changes: dict[str, object] = {}
    if any(case.labels is None for case in cases):
        from ..metrics.labelers import RuleLabeler
        from ..metrics.labelers.table import label_cases

        cases = label_cases(cases, RuleLabeler())
        changes["data.labeler"] = "rules"
        labels = f"The {len(DIAGNOSIS_LABELS)} labels: read out of the reports by rules, which know English."
    else:
        labels = f"The {len(DIAGNOSIS_LABELS)} labels: columns of the table."
    patients = len({case.patient_id for case in cases})
    started.facts += [f"{len(cases)} rows of {patients} patients in {table.name}.", labels]
    by_split = {name: _of_split(cases, table, name) for name in ("train", "valid", "test")}
    if by_split["train"] and (by_split["test"] or by_split["valid"]):
        changes["data.split"] = "train"
        if by_split["test"]:
            changes |= {"data.test_fraction": None, "data.test_split": "test"}
        if by_split["valid"]:
            changes |= {"data.validation_fraction": None, "data.validation_split": "valid"}
        counts = ", ".join(f"{len(of)} {name}" for name, of in by_split.items())
        started.facts.append(f"Splits: by the column split of the table ({counts}).")
        cases = by_split["train"]
    elif patients > 2:
        cases, test = split_by_patient(cases, 0.2, "test")
        started.facts.append(f"Splits: by patient; {len(test)} of the rows are kept apart to score the model on.")
    members, rule = pool_by_rule(cases) or ([], "no rule")
    started.facts.append(f"Normal references: {len(members)} rows, by {rule}.")
    if len({case.scan_id for case in members}) < 3:
        started.missing.append(
            "Normal scans, at least three to train on: name them in a column normal (1 or 0) of the table."
        )
    words = max(len(case.report.split()) for case in cases)
    if words * WORDS_TO_TOKENS > 1024:
        changes["report.max_report_tokens"] = -int(-words * WORDS_TO_TOKENS // ROUND) * ROUND
    return changes


def _of_split(cases: list[Case], table: Path, split: str) -> list[Case]:
    """The cases that the table says are of a split; none where it has no such column."""
    try:
        names = {case.name for case in load_table(table, split)}
    except DatasetError:
        return []
    return [case for case in cases if case.name in names]
