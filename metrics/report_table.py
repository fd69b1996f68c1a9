# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Score a table of generated reports, with intervals and baselines (`diffvp score`)."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.cases import (
    DatasetError,
    Problem,
    check_kind,
    check_report,
    raise_problems,
    read_csv,
    shown,
)
from ..data.table import without_suffix
from ..labels_diffvp import DIAGNOSIS_LABELS, REGIONS
from ..report_diffvp import split_report
from .baselines import label_baselines, most_frequent_report, most_frequent_report_by_region
from .clinical_efficacy.reports import (
    ID_COLUMN,
    Labeler,
    finding_scores,
    label_reports,
    read_label_table,
    table_labels,
)
from .collapse import COLUMNS as COLLAPSE
from .collapse import collapse_panel, rare_findings
from .markdown import table_lines, with_interval
from .nlg import BLEU_NAMES, ReportScores, region_views, score_reports, split_reg2rg
from .nlg.regions import View
from .report_files import generated_report, read_report_rows, rows_by_scan
from .statistics import bootstrap_counts, bootstrap_mean, value_entry

SPLITTERS: dict[str, Callable[[str], Mapping[str, str]]] = {
    "diffvp": split_report,
    "reg2rg": split_reg2rg,
}
AVERAGED_SCORES = tuple(
    f"{average} {score}" for average in ("micro", "macro") for score in ("precision", "recall", "f1")
)


def score_table(
    source: str | os.PathLike,
    labeler: Labeler,
    *,
    id_column: str = "id",
    prediction_column: str = "prediction",
    reference_column: str = "reference",
    nearest_column: str | None = None,
    reference: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    training: str | os.PathLike | None = None,
    training_column: str = "report",
    scorer: str = "paper",
    regions: str | None = None,
    workers: int = 1,
    meteor: bool = True,
) -> dict:
    """
    Score a file of generated and true reports: CSV, JSON lines, Parquet, or the output of `diffvp batch`.

    Args:
        source: file with the generated reports and, without `reference`, the true ones.
        labeler: labels the generated reports and, without `labels`, the true ones.
        id_column: column of the ids.
        prediction_column: column of the generated reports.
        reference_column: column of the true reports.
        nearest_column: column with the report of the most similar training scan, scored as a baseline; see
            `nearest_reports`, which finds it by the scans.
        reference: file of the same kinds with the true reports by id, in the column `reference_column` or `report`.
            The generated reports are then in `prediction_column` or `report`. Its ids may be the paths of the scans.
        labels: CSV file with the true labels by id, in the format of `read_label_table` or `label_table`.
        training: CSV file of training reports, the source of the constant normal report and of the prevalences.
        training_column: column of the training reports.
        scorer: see [`score_reports`].
        regions: also score by region: "diffvp" for reports with one line per region, "Heart: ...", or "reg2rg" for
            "The region 3 is heart: ...". With "reg2rg" the scores leave out these headings, as Reg2RG's do.
        workers: number of processes for METEOR.
        meteor: False to skip METEOR, which needs WordNet and the Punkt model.

    Returns:
        - `n`: number of scored reports.
        - `without_prediction`: number of true reports in `reference` without a generated one.
        - `signatures`: how each score was computed.
        - `systems`: {name: {score: {"value", "interval"}}}.
        - `collapse`: {name: panel of [`collapse_panel`]} for each system with text and for the true reports.
        - `rare`: findings that count as rare in `collapse`.
        - `views`: with `regions`, {name: {"n", "missing", "extra", "scores"}}; see [`region_views`].

    Raises:
        DatasetError: a column or a label is missing, an id is empty or duplicated, or a true report is empty; a
            report is no text.
        LexiconError: the data of METEOR are not installed.
        ValueError: an option has an unknown value.
    """
    if regions is not None and regions not in SPLITTERS:
        raise ValueError(f"regions is {regions!r}; expected one of {', '.join(SPLITTERS)}")
    pairs = _read_sources(source, id_column, prediction_column, reference_column, nearest_column, reference)
    truth = _true_findings(pairs, labeler, labels, id_column)
    clean = "reg2rg" if regions == "reg2rg" else None
    options = {"scorer": scorer, "clean": clean, "workers": workers, "meteor": meteor}
    constant, guesses = _baselines(training, training_column, labeler, regions, len(pairs.ids))
    texts = {"predictions": pairs.predictions}
    if constant is not None:
        texts["constant normal report"] = constant
    if pairs.nearest is not None:
        texts["nearest training report"] = pairs.nearest
    document = {
        "n": len(pairs.ids),
        "without_prediction": pairs.left,
        **_score_systems(texts, guesses, pairs.references, truth, labeler, SPLITTERS.get(regions), options),
        "rare": [label for label, rare in zip(DIAGNOSIS_LABELS, rare_findings(truth.labels), strict=True) if rare],
    }
    if regions is not None:
        views = region_views(pairs.predictions, pairs.references, SPLITTERS[regions], REGIONS, headings=clean is None)
        document["views"] = {name: _score_view(view, options) for name, view in views.items()}
    return document


@dataclass(frozen=True)
class _Pairs:
    """
    Reports to score.

    Attributes:
        nearest: report of the most similar training scan of each case, if the table has a column of them.
        left: number of true reports without a generated one.
    """

    ids: list[str]
    predictions: list[str]
    references: list[str]
    nearest: list[str] | None = None
    left: int = 0


@dataclass(frozen=True)
class _Truth:
    """True findings (reports, 18), and their source: "labeler" or "csv"."""

    labels: np.ndarray
    source: str


def _read_sources(
    source: str | os.PathLike,
    id_column: str,
    prediction_column: str,
    reference_column: str,
    nearest_column: str | None,
    reference: str | os.PathLike | None,
) -> _Pairs:
    """Read the reports from one table, or from one of generated and one of true reports."""
    if reference is None:
        columns = [prediction_column, reference_column, *([nearest_column] if nearest_column else [])]
        ids, predictions, references, *nearest = _read_reports(Path(source), id_column, reference_column, columns)
        return _Pairs(ids, predictions, references, nearest[0] if nearest else None)
    if nearest_column:
        raise ValueError(
            f"nearest_column: {nearest_column!r} with a reference file (expected one table with both reports)"
        )
    ids, predictions, references, left = _read_two(
        Path(source), Path(reference), id_column, prediction_column, reference_column
    )
    return _Pairs(ids, predictions, references, left=left)


def _true_findings(pairs: _Pairs, labeler: Labeler, labels: str | os.PathLike | None, id_column: str) -> _Truth:
    """Read the true findings from a table of labels, or else from the true reports."""
    if labels is None:
        return _Truth(label_reports(labeler, pairs.references, "references"), "labeler")
    by_name = read_label_table(labels, id_column=_id_column(Path(labels), id_column))
    return _Truth(table_labels({without_suffix(name): row for name, row in by_name.items()}, pairs.ids), "csv")


def _baselines(
    training: str | os.PathLike | None, column: str, labeler: Labeler, regions: str | None, count: int
) -> tuple[list[str] | None, dict[str, np.ndarray]]:
    """
    Make the baselines for `count` reports: the constant normal report, and labels alone by name.

    Without training reports there is no constant report and no prevalence.
    """
    if training is None:
        guesses = label_baselines(count, np.zeros((1, len(DIAGNOSIS_LABELS)), np.int8))
        return None, {name: guesses[name] for name in ("all-positive", "all-negative")}
    reports = _read_training(Path(training), column)
    labels = label_reports(labeler, reports, "training reports")
    return [_constant(reports, labels, regions)] * count, label_baselines(count, labels)


def _score_systems(
    texts: dict[str, list[str]],
    guesses: dict[str, np.ndarray],
    references: list[str],
    truth: _Truth,
    labeler: Labeler,
    split: Callable[[str], Mapping[str, str]] | None,
    options: dict,
) -> dict:
    """
    Score the texts and the labels alone: "signatures", "systems" and "collapse" of [`score_table`].

    Args:
        texts: reports by system, the predictions first.
        guesses: labels (reports, 18) by baseline.
        split: splits a report by region.
        options: options of [`score_reports`].
    """
    systems, signatures, collapse = {}, [], {}
    for name, written in texts.items():
        scores = score_reports(written, references, **options)
        labeled = label_reports(labeler, written, name)
        found = finding_scores(labeled, truth.labels, truth=truth.source, labeler=labeler.signature)
        collapse[name] = collapse_panel(written, truth.labels, labeler, split=split, predicted=labeled)
        systems[name] = _language(scores) | _findings(found)
        signatures = [*scores.signature.split(), found["signature"]]
    for name, guess in guesses.items():
        found = finding_scores(guess, truth.labels, truth=truth.source, labeler=None)
        systems[f"labels alone, {name}"] = _findings(found)
    collapse["true reports"] = collapse_panel(references, truth.labels, labeler, split=split)
    return {"signatures": signatures, "systems": systems, "collapse": collapse}


def _score_view(view: View, options: dict) -> dict:
    """Score the texts of a region, if there are any; `options` are those of [`score_reports`]."""
    return {
        "n": len(view.pairs[0]),
        "missing": view.missing,
        "extra": view.extra,
        "scores": _language(score_reports(*view.pairs, **options)) if view.pairs[0] else {},
    }


def table_page(document: dict) -> str:
    """Format the result of [`score_table`] as Markdown: one row per system, each score with its interval."""
    systems = document["systems"]
    columns = list(systems["predictions"])
    lines = [f"{document['n']} reports; 95 % bootstrap intervals over reports."]
    if document["without_prediction"]:
        lines += [f"{document['without_prediction']} true reports have no generated one and are not scored."]
    lines += [""]
    lines += table_lines(["", *columns], [[name, *(_cell(of, c) for c in columns)] for name, of in systems.items()])
    if "constant normal report" not in systems:
        lines += ["", "Without training reports there is no constant normal report as a baseline."]
    lines += ["", *collapse_lines(document["collapse"], document["rare"])]
    if "views" in document:
        columns = list(document["views"]["as_written"]["scores"])
        rows = [
            [
                name,
                str(view["n"]),
                str(view["missing"]),
                str(view["extra"]),
                *(_cell(view["scores"], c) for c in columns),
            ]
            for name, view in document["views"].items()
        ]
        lines += ["", *table_lines(["predictions, by region", "n", "missing", "extra", *columns], rows)]
    return "\n".join([*lines, "", *(f"`{signature}`" for signature in document["signatures"]), ""])


def collapse_lines(collapse: dict[str, dict], rare: Sequence[str]) -> list[str]:
    """Format panels of [`collapse_panel`] as a Markdown table: one column per system, the true reports among them."""
    rows = [[title, *(_panel_cell(panel[name]) for panel in collapse.values())] for name, title in COLLAPSE.items()]
    return [
        *table_lines(["template collapse", *collapse], rows),
        "",
        f"Rare, below 10 % of the true reports: {', '.join(rare) or 'none'}.",
    ]


def read_pairs(path: Path, id_column: str, prediction_column: str, reference_column: str) -> list[list[str]]:
    """
    Read the ids, generated reports and true reports of a table.

    Raises:
        DatasetError: a column is missing, an id is empty or duplicated, or a true report is empty; a report is no
            text.
    """
    return _read_reports(path, id_column, reference_column, [prediction_column, reference_column])


def _read_reports(path: Path, id_column: str, reference_column: str, columns: Sequence[str]) -> list[list[str]]:
    """Read the ids and the texts of each column; `columns` includes `reference_column`."""
    problems: list[Problem] = []
    named, _ = rows_by_scan(path, id_column, (columns[0],), problems)
    known = {column for row in named.values() for column in row.values}
    missing = [column for column in columns if column not in known]
    if named and missing:
        problems.append(Problem(path.name, 1, "header", ", ".join(map(shown, known)), f"also {', '.join(missing)}"))
        raise_problems(problems)
    texts = []
    for column in columns:
        # An empty true report is a problem, whereas an empty prediction scores 0.
        read = check_report if column == reference_column else generated_report
        texts.append(
            [
                read(row.values.get(column), path.name, row.number, column, name, problems)
                for name, row in named.items()
            ]
        )
    raise_problems(problems)
    return [list(named), *texts]


def _read_two(
    source: Path, truth: Path, id_column: str, prediction_column: str, reference_column: str
) -> tuple[list[str], list[str], list[str], int]:
    """Read ids, generated and true reports from two files; also count the true reports without a generated one."""
    problems: list[Problem] = []
    written, predicted = rows_by_scan(source, id_column, (prediction_column, "report"), problems)
    true, column = rows_by_scan(truth, id_column, (reference_column, "report"), problems)
    for name, row in written.items() if true else ():
        if name not in true:
            expected = f"a row for this id, which row {row.number} of {source.name} has"
            problems.append(Problem(truth.name, None, "row", "missing", expected, name))
    raise_problems(problems)
    references, predictions = [], []
    for name, row in written.items():
        value, number = true[name].values.get(column), true[name].number
        references.append(check_report(value, truth.name, number, column, name, problems))
        value = row.values.get(predicted)
        predictions.append(generated_report(value, source.name, row.number, predicted, name, problems))
    raise_problems(problems)
    return list(written), predictions, references, len(true) - len(written)


def _id_column(path: Path, id_column: str) -> str:
    """Return the id column of a label table: CT-RATE's name, or `id_column` as `diffvp label` writes it."""
    rows = read_csv(path, (), []) or []
    return id_column if rows and ID_COLUMN not in rows[0].values and id_column in rows[0].values else ID_COLUMN


def _read_training(path: Path, column: str) -> list[str]:
    problems: list[Problem] = []
    rows = read_report_rows(path, problems)
    if rows and not any(column in row.values for row in rows):
        problems.append(Problem(path.name, 1, "header", f"column {column} missing", "training reports in it"))
    reports = []
    for row in rows:
        value = row.values.get(column)
        if check_kind(value, path.name, row.number, column, "", problems):
            # Empty reports are left out, and no problem here.
            reports.append(check_report(value, path.name, row.number, column, "", []))
    raise_problems(problems)
    reports = [report for report in reports if report]
    if not reports:
        raise DatasetError([Problem(path.name, None, column, "empty in all rows", "training reports")])
    return reports


def _constant(reports: Sequence[str], labels: np.ndarray, regions: str | None) -> str:
    """Return the most frequent normal training report; with `regions` "diffvp", the most frequent text per region."""
    normal = [report for report, found in zip(reports, labels, strict=True) if not found.any()]
    if not normal:
        expected = "a report without findings, for the constant normal report"
        raise DatasetError([Problem("training reports", None, "normal reports", "none", expected)])
    if regions == "diffvp":
        return most_frequent_report_by_region(normal, SPLITTERS[regions], REGIONS)
    return most_frequent_report(normal)


def _language(scores: ReportScores) -> dict[str, dict]:
    several = scores.n > 1
    values = {}
    if scores.counts is not None:
        total = scores.corpus_bleu(scores.counts.sum(axis=0))
        for order, name in enumerate(BLEU_NAMES):
            interval = (
                bootstrap_counts(scores.counts, lambda sums, n=order: scores.corpus_bleu(sums)[..., n])
                if several
                else None
            )
            values[name] = value_entry(float(total[order]), interval)
    for name, of in scores.per_report.items():
        values[name] = value_entry(float(of.mean()), bootstrap_mean(of) if several else None)
    return values


def _findings(scores: dict) -> dict[str, dict]:
    intervals = scores["intervals"]
    values = {}
    for column in AVERAGED_SCORES:
        average, score = column.split()
        values[column] = value_entry(scores[average][score], None if intervals is None else intervals[average][score])
    if scores["crg"] is not None:  # undefined if no label, or every label, is positive
        values["CRG"] = value_entry(scores["crg"], None if intervals is None else intervals["crg"])
    return values


def _panel_cell(entry: dict) -> str:
    return "-" if entry["value"] is None else with_interval(**entry)


def _cell(scores: dict[str, dict], column: str) -> str:
    return with_interval(*scores[column].values()) if column in scores else "-"
