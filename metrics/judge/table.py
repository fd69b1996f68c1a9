# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Judge two tables of generated reports and format the results (`diffvp judge`)."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...data.cases import Problem, check_kind, check_report, raise_problems, shown
from ..markdown import table_lines, with_interval
from ..report_files import generated_report, rows_by_scan
from .calibration import KINDS
from .verdicts import Comparison, Verdicts, position_bias, win_rates

SHORT = {
    "finding_coverage": "coverage",
    "clinical_actionability": "actionability",
    "detail_richness": "detail",
    "anatomical_specificity": "specificity",
    "quantification_detail": "quantification",
}


def read_comparisons(
    first: str | os.PathLike,
    second: str | os.PathLike,
    reference: str | os.PathLike | None = None,
    *,
    id_column: str = "id",
    prediction_column: str = "prediction",
    reference_column: str = "reference",
) -> list[Comparison]:
    """
    Read the reports of two systems on the same scans, and the true reports, in the order of the first table.

    Args:
        first, second: files of the two systems' reports, of the kinds that [`score_table`] reads.
        reference: file of the true reports by id; by default they are in the first table. With it, reports may also
            be in the column `report`, as in the output of `diffvp batch`.
        id_column, prediction_column, reference_column: columns of the ids, generated reports and true reports.

    Raises:
        DatasetError: a column is missing; an id is empty, duplicated or in only one of the tables; a scan has no true
            report, or the second table has a different one; a report is no text.
    """
    first, second = Path(first), Path(second)
    problems: list[Problem] = []
    columns = (prediction_column,) if reference is None else (prediction_column, "report")
    one, first_column = rows_by_scan(first, id_column, columns, problems)
    other, second_column = rows_by_scan(second, id_column, columns, problems)
    truths, truth_column, truth_name = one, reference_column, first.name
    if reference is not None:
        truth_name = Path(reference).name
        truths, truth_column = rows_by_scan(Path(reference), id_column, (reference_column, "report"), problems)
    known = dict.fromkeys(column for row in truths.values() for column in row.values)
    if truths and truth_column not in known:
        found = ", ".join(map(shown, known))
        problems.append(Problem(truth_name, 1, "header", found, f"also {truth_column}, with the true reports"))
    raise_problems(problems)
    comparisons = []
    for name, row in one.items():
        if name not in other:
            problems.append(Problem(second.name, None, id_column, "missing", f"the row of {first.name}", name))
            continue
        if name not in truths:
            problems.append(Problem(truth_name, None, truth_column, "missing", "the true report", name))
            continue
        of, number = truths[name], other[name].number
        truth = check_report(of.values.get(truth_column), truth_name, of.number, truth_column, name, problems)
        again = other[name].values.get(reference_column) if reference is None else None
        if check_kind(again, second.name, number, reference_column, name, problems):
            again = check_report(again, second.name, number, reference_column, name, [])  # it may be missing
            if truth and again and again.strip() != truth.strip():
                problems.append(
                    Problem(second.name, number, reference_column, "another", f"that of {first.name}", name)
                )
        texts = (
            generated_report(of.values.get(column), path.name, of.number, column, name, problems)
            for path, of, column in ((first, row, first_column), (second, other[name], second_column))
        )
        comparisons.append(Comparison(truth, *texts))
    for name in other.keys() - one.keys():
        problems.append(Problem(first.name, None, id_column, "missing", f"the row of {second.name}", name))
    raise_problems(problems)
    return comparisons


def is_same(comparison: Comparison) -> bool:
    """True if both reports have the same words; they then count half a win each and are not judged."""
    return comparison.first.split() == comparison.second.split()


def judged(
    judge, comparisons: Sequence[Comparison], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> dict:
    """
    Compute the win rates of the first system against the second.

    Returns:
        "n", the number of cases; "same", the number with equal reports; "dimensions", see [`win_rates`]; "position",
        see [`position_bias`], over the judged cases; "refused"; "repaired"; "signature".
    """
    asked = [row for row, comparison in enumerate(comparisons) if not is_same(comparison)]
    verdicts = judge.judge([comparisons[row] for row in asked], on_progress)
    scores = np.full((len(comparisons), len(judge.dimensions)), 0.5)
    scores[asked] = verdicts.scores
    return {
        "signature": judge.signature,
        "n": len(comparisons),
        "same": len(comparisons) - len(asked),
        "dimensions": win_rates(Verdicts(judge.dimensions, scores)),
        "position": position_bias(verdicts),
        "refused": verdicts.refused,
        "repaired": verdicts.repaired,
    }


# The page -----------------------------------------------------------------------------------------------------------


def calibration_page(calibration: dict | None) -> str:
    """Format a calibration as Markdown."""
    if calibration is None:
        return "This judge has not been calibrated: the reliability of the win rates below is unknown.\n"
    names = list(calibration["unanswered"])
    agreement = calibration["agreement"]
    rows = [["agrees with the known winner", *(measured(agreement.get(name)) for name in names)]]
    for kind, about in KINDS.items():
        of = calibration["corruptions"][kind]
        rows.append([f"truth wins against {about}", *(measured(of[name]) for name in names)])
    rows.append(["report against itself: first wins (0.5)", *(measured(calibration["self"][name]) for name in names)])
    rows += _position_rows(calibration["position"], names)
    rows.append(["comparisons without an answer", *(str(calibration["unanswered"][name]) for name in names)])
    lines = [
        f"Calibration of this judge: {calibration['comparisons']} comparisons of reports of {calibration['patients']} "
        "phantoms, for which the better report is known. Mean over comparisons, with the 95 % interval.",
        "",
        *table_lines(["", *(SHORT[name] for name in names)], rows),
        "",
        *near_chance(agreement),
        *_refused(calibration),
    ]
    return "\n".join([*lines, f"`{calibration['signature']}`", ""])


def near_chance(agreement: dict) -> list[str]:
    """Return warnings for dimensions in which the judge may be no better than chance."""
    unknown = [SHORT[name] for name, of in agreement.items() if of["interval"] is None]
    chance = [SHORT[name] for name, of in agreement.items() if of["interval"] and of["interval"][0] <= 0.5]
    lines = []
    if chance:
        lines += [f"NEAR CHANCE in {', '.join(chance)}: its win rates there do not compare the reports.", ""]
    if unknown:
        lines += [
            f"NOT MEASURED in {', '.join(unknown)}: too few answers to know if its win rates there are reliable.",
            "",
        ]
    return lines


def verdict_page(document: dict, names: tuple[str, str], calibration: dict | None) -> str:
    """Format the win rates of the first system, each next to the judge's agreement on phantoms."""
    agreement = {} if calibration is None else calibration["agreement"]
    rows = [
        [SHORT[name], measured(agreement.get(name)), measured(of), str(of["wins"]), str(of["split"]),
         str(of["losses"]), str(of["unanswered"]), f"{of['p']:.3g}", f"{of['p_holm']:.3g}"]
        for name, of in document["dimensions"].items()
    ]  # fmt: skip
    head = ["", "agreement on phantoms", "win rate", "wins", "split", "losses", "no answer", "p", "p (Holm)"]
    dimensions = list(document["dimensions"])
    lines = [
        f"{names[0]} against {names[1]}: {document['n']} cases, {document['same']} of them with equal reports, which "
        "count half a win each and are not judged.",
        "Split cases, half a win each: the two orders disagree, or a rule finds no difference. p: two-sided sign test "
        "over the other cases.",
        "",
        *table_lines(head, rows),
        "",
    ]
    positions = _position_rows(document["position"], dimensions)
    if positions:
        lines += [*table_lines(["position bias", *(SHORT[name] for name in dimensions)], positions), ""]
    return "\n".join([*lines, *near_chance(agreement), *_refused(document), f"`{document['signature']}`", ""])


def measured(of: dict | None) -> str:
    """Format a mean with its interval; "-" if there is no mean."""
    if of is None or of["value"] is None:
        return "-"
    return with_interval(of["value"], of["interval"])


def _position_rows(position: dict | None, names: Sequence[str]) -> list[list[str]]:
    if position is None:
        return []
    disagree = [position[name]["disagree"] for name in names]
    return [
        ["answers for the report shown first (0.5)", *(measured(position[name]["first"]) for name in names)],
        ["the two orders disagree", *("-" if share is None else f"{share:.3f}" for share in disagree)],
    ]


def _refused(document: dict) -> list[str]:
    lines = []
    if document["refused"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in document["refused"].items())
        lines += [f"Answers without all winners: {reasons}.", ""]
    if document["repaired"]:
        lines += [f"Answers that were not strict JSON: {document['repaired']}.", ""]
    return lines
