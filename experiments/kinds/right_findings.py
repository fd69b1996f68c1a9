# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Fig. 4b: which reports have more of the findings right.

The paper asks a language model. The findings of a phantom are known, so rules compare them, too; a language model
judges in addition if one is given.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...metrics.judge.calibration import calibrate
from ...metrics.judge.rules import DIMENSIONS as COUNTED
from ...metrics.judge.table import SHORT, calibration_page, judged, measured
from ...metrics.judge.verdicts import Comparison, Verdicts, win_rates
from ...metrics.markdown import table_lines
from ..lesion_scores import score_findings
from ..runs import HeldOut
from .material import Kind, Material, Needs, device_lines

PHANTOMS = 40  # cases that calibrate a language model
KNOWN_TRUTH = f"judge|pairwise|dims:{len(COUNTED)}|rules|truth:findings of the phantom"
ABOUT_RULES = (
    "Judged by rules that know the findings of each phantom. Coverage counts the findings that are named, specificity "
    "those with the right lobes or sides, quantification those with a length within a quarter of the true one. If "
    "both reports have the same count, the case is split: half a win each. p: sign test over the other cases."
)


def content(material: Material) -> dict:
    """
    Count the findings that each row has right and compare the pairs of rows case by case.

    Returns:
        "figure", findings named, by size and in detail, for each row; "wins", an entry for each judge and pair, of
        the form of [`judged`] with "judge", "first" and "second"; "calibration" of the language model, or `None`;
        "picture".
    """
    texts, test, pairs, judge = material.first_texts(), material.test, material.table.compare, material.judge
    entries = [
        {"judge": "rules", "first": first, "second": second, **known_winners(texts[first], texts[second], test)}
        for first, second in pairs
    ]
    calibration = None
    if judge is not None:
        calibration = calibrate(judge, PHANTOMS)
        for first, second in pairs:
            asked = [Comparison(case.report, texts[first][case.name], texts[second][case.name]) for case in test.cases]
            entries.append({"judge": "model", "first": first, "second": second, **judged(judge, asked)})
    if entries:
        draw_radar(material.picture, entries)
    return {
        "figure": {name: score_findings(test.patients, of) for name, of in texts.items()},
        "wins": entries,
        "calibration": calibration,
        "picture": material.picture.name if entries else None,
    }


def known_winners(first: Mapping[str, str], second: Mapping[str, str], test: HeldOut) -> dict:
    """Compute win rates of the first system: the report with more of the case's findings right wins."""
    cases = [name for name in first if test.patients[name]]
    sides = [np.array([_right({name: of[name]}, test) for name in cases]) for of in (first, second)]
    scores = (np.sign(sides[0] - sides[1]) + 1) / 2
    same = sum(first[name].split() == second[name].split() for name in cases)
    return {
        "signature": KNOWN_TRUTH,
        "n": len(cases),
        "same": same,
        "dimensions": win_rates(Verdicts(COUNTED, scores)),
        "position": None,
        "refused": {},
        "repaired": 0,
    }


def _right(report: Mapping[str, str], test: HeldOut) -> tuple[int, int, int]:
    """Count the findings of one case that are named, rightly placed and rightly measured."""
    scores = score_findings(test.patients, report)
    placed, measured = (sum(of[key] for of in scores["details"].values()) for key in ("place_right", "size_right"))
    return scores["counts"]["found"], placed, measured


def lines(document: dict) -> list[str]:
    """Write the win rates by judge, and the findings of each row."""
    return _win_lines(document) + _finding_lines(document["figure"]) + device_lines(document)


def _win_lines(document: dict) -> list[str]:
    if not document["wins"]:
        return []
    page = [f"![{document['title']}]({document['picture']})", ""]
    for judge in ("rules", "model"):
        entries = [entry for entry in document["wins"] if entry["judge"] == judge]
        if not entries:
            continue
        rows = [
            [f"{entry['first']} against {entry['second']}", SHORT[name], measured(of), str(of["wins"]),
             str(of["split"]), str(of["losses"]), str(of["unanswered"]), f"{of['p_holm']:.3g}"]
            for entry in entries
            for name, of in entry["dimensions"].items()
        ]  # fmt: skip
        head = ["", "", "win rate", "wins", "split", "losses", "no answer", "p (Holm)"]
        about = ABOUT_RULES if judge == "rules" else calibration_page(document["calibration"])
        page += [about, "", *table_lines(head, rows), "", f"{entries[0]['n']} cases. `{entries[0]['signature']}`", ""]
    return page


def _finding_lines(figure: Mapping[str, dict]) -> list[str]:
    names = list(figure)
    sizes = [(label, size) for label, bins in figure[names[0]]["by_size"].items() for size in bins]
    rows = []
    for label, size in sizes:
        cells = [figure[name]["by_size"][label][size] for name in names]
        rows.append([label, size, str(cells[0]["cases"]), *(f"{of['found'] / of['cases']:.2f}" for of in cells)])
    details = []
    for name in names:
        of = figure[name]["details"].values()
        sums = {key: sum(row[key] for row in of) for key in ("with_place", "place_right", "with_size", "size_right")}
        counts = figure[name]["counts"]
        details.append([
            name, f"{counts['found']} of {counts['findings']}", f"{sums['place_right']} of {sums['with_place']}",
            f"{sums['size_right']} of {sums['with_size']}",
        ])  # fmt: skip
    head = ["", "findings named", "of these, with right lobes or sides", "of these, with size within a quarter"]
    by_size = table_lines(["finding", "size", "cases", *(f"found, {name}" for name in names)], rows)
    return [*table_lines(head, details), "", *by_size, ""]


def draw_radar(path: Path, entries: Sequence[dict]) -> None:
    """Draw win rates with intervals: a panel for each judge, an axis for each dimension, a line for each pair."""
    judges = list(dict.fromkeys(entry["judge"] for entry in entries))
    figure = Figure((5.2 * len(judges), 5.6), dpi=130)
    FigureCanvasAgg(figure)
    for column, name in enumerate(judges, start=1):
        of_judge = [entry for entry in entries if entry["judge"] == name]
        panel = figure.add_subplot(1, len(judges), column, projection="polar")
        _draw_panel(panel, of_judge)
        title = (
            "rules, findings known" if name == "rules" else of_judge[0]["signature"].split("|model:")[1].split("|")[0]
        )
        panel.set_title(title, pad=24, fontsize=11)
    figure.text(0.5, 0.01, "Win rate with its 95 % interval; dashed: one half.", ha="center", va="bottom", fontsize=9)
    figure.subplots_adjust(left=0.16, right=0.84, top=0.82, bottom=0.2, wspace=0.5)
    figure.savefig(path, format="png", bbox_inches="tight", pad_inches=0.15)


def _draw_panel(panel, entries: Sequence[dict]) -> None:
    dimensions = list(entries[0]["dimensions"])
    angles = [2 * math.pi * number / len(dimensions) for number in range(len(dimensions))]
    panel.set_theta_offset(math.pi / 2)
    panel.set_theta_direction(-1)
    panel.set_ylim(0, 1)
    panel.set_yticks([0.25, 0.5, 0.75, 1.0], ["", "0.5", "", "1"], fontsize=8, color="dimgray")
    panel.set_xticks(angles, [SHORT[name] for name in dimensions], fontsize=10)
    panel.tick_params(axis="x", pad=8)
    for label, angle in zip(panel.get_xticklabels(), angles, strict=True):
        across = math.sin(angle)
        label.set_horizontalalignment("center" if abs(across) < 0.1 else "left" if across > 0 else "right")
    around = np.linspace(0, 2 * math.pi, 200)
    panel.plot(around, np.full_like(around, 0.5), color="black", linewidth=1, linestyle=(0, (4, 4)))
    for number, entry in enumerate(entries):
        of = [entry["dimensions"][name] for name in dimensions]
        values = [math.nan if one["value"] is None else one["value"] for one in of]
        # Shift the points of each pair, so that no interval hides another.
        beside = [angle + 0.09 * (number - (len(entries) - 1) / 2) for angle in angles]
        label = f"{entry['first']} against {entry['second']}"
        [line] = panel.plot([*beside, beside[0]], [*values, values[0]], marker="o", markersize=5, label=label)
        for angle, one in zip(beside, of, strict=True):
            if one["interval"] is not None:
                panel.plot([angle] * 2, one["interval"], color=line.get_color(), linewidth=4, alpha=0.4)
    panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), fontsize=8, frameon=False)


KIND = Kind(Needs(), content, lines)
