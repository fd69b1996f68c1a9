# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Write a training file and a table for a folder of scans (`diffvp init`)."""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..labels_diffvp import DIAGNOSIS_LABELS
from .cases import Case, DatasetError, Problem, split_by_patient
from .pool import pool_by_rule
from .scans import find_scans, listed_path
from .table import PATH_COLUMNS, TABLE_NAMES, TABLE_SUFFIXES, load_table, read_rows, without_suffix

TEMPLATE = Path(__file__).resolve().parents[1] / "configs" / "own_scans.yaml"
CONFIG, GITIGNORE = "own_scans.yaml", ".gitignore"
IGNORED = "# Patient data, and everything computed from it, stay here.\n*\n!.gitignore\n"
SHOWN = 5  # number of problems to show for a table
WORDS_TO_TOKENS, ROUND = 2.0, 256  # generous limit for the longest report; training counts exactly

# A small model and a short training that take minutes on two CPU cores, to try all steps.
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
    """A folder cannot be used for training; the message gives the reason."""


@dataclass
class Started:
    """
    Result of [`start`].

    Attributes:
        config, table: paths of training file and table. `config` is written only if the table has no problems.
        written: new files.
        ready: True if training can start.
        facts: findings about the data, as sentences.
        missing: required or recommended steps before training, as sentences.
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
    Write a training file for a folder of scans, a table if there is none, and a `.gitignore` that keeps patient data
    out of repositories. Scans and existing tables are not changed.

    Args:
        output: folder for these files and for the output of training; default: the folder of the scans.
        domain: kind of the scans, stated in every report of the model.
        base: causal LLM, as a Hub id or a folder; default: the small one of the demo.
        quick: use settings that run all steps within minutes on two cores, without producing a useful model.

    Raises:
        StartError: there are no scans, or a training file already exists.
        OSError: the files cannot be written.
    """
    folder = Path(folder)
    output = folder if output is None else Path(output)
    config = output / CONFIG
    if not folder.is_dir():
        raise StartError(f"{folder}: folder: missing (expected a folder of scans)")
    if config.exists():
        raise StartError(f"{config}: file: exists (expected none: edit it, or delete it and run init again)")
    try:
        scans = find_scans(folder)
    except OSError as error:
        raise StartError(f"{error.filename or folder}: folder: unreadable (expected one that may be read)") from error
    if not scans:
        raise StartError(f"{folder}: scans: none (expected NIfTI, NRRD, MetaImage or folders of DICOM slices)")
    # An earlier call may have written the table, for the reports to be typed in.
    table = _find_table([folder] if output.resolve() == folder.resolve() else [folder, output])
    output.mkdir(parents=True, exist_ok=True)
    started = Started(config, table or output / TABLE_NAMES[0], [])
    dicom = sum(path.is_dir() for path in scans)
    started.facts.append(f"{len(scans)} scans, {dicom} of them folders of DICOM slices.")
    if table is None:
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
        started.missing.append(f"model.intended_domain in {CONFIG}: describe the scans there.")
    if base is not None:
        changes |= {"base.name": base, "base.revision": None, "base.gguf_file": None}
        if not Path(base).is_dir():
            started.missing.append(f"base.revision in {CONFIG}: pin the commit of {base}.")
    changes |= _facts(started)
    if not (output / GITIGNORE).exists():
        (output / GITIGNORE).write_text(IGNORED, encoding="utf-8")
        started.written.append(output / GITIGNORE)
    if not started.ready:
        started.missing.append("Then run the same command again to write the training file.")
        return started
    text = TEMPLATE.read_text(encoding="utf-8")
    for dotted, value in changes.items():
        text = set_in_text(text, dotted, value)
    config.write_text(text, encoding="utf-8")
    started.written.append(config)
    return started


def set_in_text(text: str, dotted: str, value: object) -> str:
    """
    Set `key` or `section.key` in a YAML text, keeping its comments.

    Raises:
        KeyError: the text has no such key.
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


def _find_table(folders: list[Path]) -> Path | None:
    """Find the table: by its name in one of the folders, or as the only file of the first with the columns for it."""
    named = [folder / name for folder in folders for name in TABLE_NAMES if (folder / name).is_file()]
    if len(named) > 1:
        raise StartError(f"{folders[0]}: table: {' and '.join(map(str, named))} (expected one of them)")
    if named:
        return named[0]
    folder = folders[0]
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    fitting = [path for path in tables if _has_columns(path)]
    if len(fitting) > 1:
        names = ", ".join(path.name for path in fitting)
        raise StartError(f"{folder}: tables: {names} (expected one with the columns path and report, or metadata.csv)")
    return fitting[0] if fitting else None


def _has_columns(path: Path) -> bool:
    """
    True if a file has the columns of a table; other files may lie there, too.

    Raises:
        StartError: the file is not UTF-8, so that the columns are not known.
    """
    problems: list[Problem] = []
    rows = read_rows(path, problems)
    for problem in problems:
        if (problem.field, problem.found) == ("content", "not UTF-8"):
            raise StartError(f"{path}: content: not UTF-8 (expected {problem.expected})")
    columns = {column for row in rows or () for column in row.values}
    return "report" in columns and any(name in columns for name in PATH_COLUMNS)


def _report_beside(scan: Path) -> str:
    """
    Return the report in a text file with the name of a scan; empty without one.

    Raises:
        StartError: the file is not text in UTF-8.
    """
    path = scan.parent / f"{without_suffix(scan.name)}.txt"
    try:
        return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise StartError(f"{path}: content: not UTF-8 (expected text in UTF-8)") from error


def _write_table(table: Path, scans: list[Path]) -> list[str]:
    """Write a row per scan, with the report from a text file of the same name if there is one; report missing ones."""
    rows = [[listed_path(scan, table), _report_beside(scan)] for scan in scans]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["path", "report"], *rows])
    with open(table, "x", newline="", encoding="utf-8") as file:  # never over a table in which reports were typed
        file.write(text.getvalue())
    without = sum(not report for _, report in rows)
    if not without:
        return []
    return [f"{without} of {len(rows)} reports: fill the column report of {table}, or delete those rows."]


def _unlisted(table: Path, scans: list[Path]) -> list[str]:
    """Report scans of the folder that are not in the table."""
    try:
        known = {case.volume.resolve() for case in load_table(table)}
    except DatasetError:
        return []  # reported by `_facts`
    left = [scan for scan in scans if scan.resolve() not in known]
    return [f"{len(left)} scans of the folder are not in {table.name}: training does not use them."] if left else []


def _facts(started: Started) -> Mapping[str, object]:
    """Add the facts and problems of the table to `started`, and return the settings that follow from them."""
    table = started.table
    try:
        cases = load_table(table)
        if not cases:
            raise DatasetError([Problem(table.name, None, "rows", "none", "a row for each scan")])
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
        labels = f"The {len(DIAGNOSIS_LABELS)} labels: extracted from the reports by rules for English text."
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
        started.facts.append(f"Splits: by patient; {len(test)} of the rows are held out to score the model.")
    members, rule = pool_by_rule(cases) or ([], "no rule")
    started.facts.append(f"Normal references: {len(members)} rows, by {rule}.")
    if len({case.scan_id for case in members}) < 3:
        started.missing.append(
            "Normal scans, at least three for training: mark them in a column normal (1 or 0) of the table."
        )
    words = max(len(case.report.split()) for case in cases)
    if words * WORDS_TO_TOKENS > 1024:
        changes["report.max_report_tokens"] = -int(-words * WORDS_TO_TOKENS // ROUND) * ROUND
    return changes


def _of_split(cases: list[Case], table: Path, split: str) -> list[Case]:
    """Return the cases of a split by the column of the table; none without this column."""
    try:
        names = {case.name for case in load_table(table, split)}
    except DatasetError:
        return []
    return [case for case in cases if case.name in names]
