# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The figures of the paper from the runs of a table: what stands in its JSON beside the rows, and the pictures."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..configuration_diffvp import DIAGNOSIS_LABELS
from ..data.cases import Case
from ..data.pool import is_normal
from ..metrics.clinical_efficacy.reports import Labeler, label_reports
from ..metrics.markdown import table_lines, with_interval
from ..metrics.statistics import bootstrap_mean
from ..training.cohort import load_cohort
from .information import information_lines, score_information
from .judging import judge_content, judge_lines
from .lesions import score_findings
from .maps import draw_importance, draw_maps, map_example, score_importance, score_maps
from .references import choose_references
from .runs import HeldOut, Run
from .study import Condition, Table

SHOWN = 4  # cases in a picture or beside each other


def figure_content(
    table: Table,
    runs: Mapping[str, Run],
    reports: Mapping[str, dict],
    test: HeldOut,
    labeler: Labeler,
    picture: Path,
    judge=None,
) -> dict:
    """
    What a figure shows, by the kind of its table, under "figure".

    Args:
        runs: the first run of each row, by the row's name.
        reports: its reports, as `make_reports` returns them.
        labeler: reads the findings of reports, for the kinds that compare them.
        picture: the PNG to draw, for the kinds that have one.
        judge: a [`ModelJudge`] that compares reports, too, for the kind "lesions".
    """
    if table.kind == "lesions":
        return {"figure": lesion_content(reports, test), **judge_content(table.compare, reports, test, judge, picture)}
    if table.kind == "cases":
        return {"figure": case_content(reports, test)}
    if table.kind == "stability":
        return {"figure": stability([of["reports"] for of in reports.values()], labeler)}
    content = {}
    conditions = {row.name: row.condition for row in table.rows}
    for name, run in runs.items():
        model, processor = run.load()
        features = run.features(model, processor)
        chosen = test.references(conditions[name], run.seed, features)
        references = {case: of[0] for case, of in chosen.items()}
        if table.kind == "information":
            held_out = (test.cases, references)
            written = labeler.label_all([row["report"] for row in reports[name]["reports"]])
            content[name] = score_information(model, features, training_references(run), held_out, written)
            continue
        if table.kind == "importance":
            content[name] = score_importance(model, features, test.cases, references)
            continue
        parts = (model, features, features.volumes, test.root)
        content[name] = score_maps(*parts, test.cases, references)
        if name == table.rows[0].name:
            draw_maps(picture, [map_example(*parts, case, references[case.name]) for case in example_cases(test)])
    if table.kind == "information":
        return {"figure": content}
    if table.kind == "importance":
        draw_importance(picture, content[table.rows[0].name])
    return {"figure": content, "picture": picture.name}


def training_references(run: Run) -> tuple[list[Case], dict[str, Case]]:
    """The cases that a model learnt to report, and by name a reference of each from the pool it learnt with."""
    cohort = load_cohort(run.config)
    pool = {case.name: case for case in cohort.pool}
    drawn = choose_references(cohort.report, pool, Condition(), run.seed)
    return cohort.report, {case: of[0] for case, of in drawn.items()}


def example_cases(test: HeldOut) -> list[Case]:
    """The first test cases with one to three findings: chosen before anything was seen of their reports or maps."""
    few = [case for case in test.cases if not is_normal(case) and len(test.patients[case.name]) <= 3]
    return few[:SHOWN]


def lesion_content(reports: Mapping[str, dict], test: HeldOut) -> dict:
    """Findings named, by size and in detail, for each row."""
    return {
        name: score_findings(test.patients, {row["id"]: row["report"] for row in document["reports"]})
        for name, document in reports.items()
    }


def stability(draws: Sequence[Sequence[dict]], labeler: Labeler) -> dict:
    """
    How much the reports of one model depend on which reference was drawn.

    Args:
        draws: the reports of the same cases, once for each draw.

    Returns:
        of all pairs of draws, means over cases with their interval: "identical" reports; the same set of "findings";
        the "overlap" of the two sets, |both| / |either|, 1 where both are empty. "changed": pairs with another
        reference; "flips": by label, the share of cases of whose reports some name it and some do not.
    """
    texts = [[row["report"] for row in rows] for rows in draws]
    named = np.stack([label_reports(labeler, of) for of in texts]).astype(bool)  # (draws, cases, labels)
    pairs = list(itertools.combinations(range(len(draws)), 2))
    either = np.stack([(named[a] | named[b]).sum(-1) for a, b in pairs])
    both = np.stack([(named[a] & named[b]).sum(-1) for a, b in pairs])
    identical = [[one == other for one, other in zip(texts[a], texts[b], strict=True)] for a, b in pairs]
    changed = [
        [one["references"] != other["references"] for one, other in zip(draws[a], draws[b], strict=True)]
        for a, b in pairs
    ]
    measures = {
        "identical": np.array(identical),
        "findings": either == both,
        "overlap": np.where(either, both / np.maximum(either, 1), 1.0),
    }
    content = {"draws": len(draws), "cases": named.shape[1], "changed": float(np.mean(changed))}
    for name, values in measures.items():
        of_case = values.mean(axis=0)
        interval = bootstrap_mean(of_case)
        content[name] = {"mean": interval.estimate, "interval": [interval.low, interval.high]}
    flips = named.any(axis=0) & ~named.all(axis=0)
    content["flips"] = dict(zip(DIAGNOSIS_LABELS, flips.mean(axis=0).tolist(), strict=True))
    return content


def case_content(reports: Mapping[str, dict], test: HeldOut) -> list[dict]:
    """A few cases with the reports of all rows."""
    texts = {name: {row["id"]: row["report"] for row in of["reports"]} for name, of in reports.items()}
    return [
        {"id": case.name, "true": case.report, **{name: of[case.name] for name, of in texts.items()}}
        for case in example_cases(test)
    ]


def figure_lines(document: dict) -> list[str]:
    """The part of the page."""
    if document["kind"] == "cases":
        return _case_lines(document["figure"])
    if document["kind"] == "stability":
        return _stability_lines(document["figure"])
    if document["kind"] == "lesions":
        return judge_lines(document) + _lesion_lines(document["figure"])
    if document["kind"] == "information":
        return information_lines(document["figure"])
    lines = [f"![{document['title']}]({document['picture']})", ""]
    return lines + (_map_lines if document["kind"] == "maps" else _importance_lines)(document["figure"])


def _mean(of: Mapping) -> str:
    return with_interval(of["mean"], of["interval"])


def _map_lines(content: Mapping[str, dict]) -> list[str]:
    rows = []
    for name, scores in content.items():
        for kind, of in scores["maps"].items():
            columns = [of[key] for key in ("pointing_body", "auroc")] + [of["sensitivity"]["all"]]
            rows.append([name, kind, str(scores["cases"]), *map(_mean, columns)])
    first = next(iter(content.values()))
    head = ["model", "map", "cases", "pointing", "AUROC", f"findings reached by the top {first['top_percent']:g} %"]
    note = (
        f"Pointing: the map's maximum in the body lies in a lesion or within {first['tolerance_mm']:g} mm of one. "
        "AUROC: lesion against the rest of the body. Intervals over cases."
    )
    tests = [
        [name, entry["second"], *(f"{of['difference']:+.3f} (p {p_value(of['p_cases_holm'])})"
                                  for of in (entry["metrics"][key] for key in ("pointing_body", "auroc")))]
        for name, scores in content.items()
        for entry in scores["comparisons"]
    ]  # fmt: skip
    head_tests = ["model", "its map less", "pointing", "AUROC"]
    return [*table_lines(head, rows), "", note, "", *table_lines(head_tests, tests), ""]


def _importance_lines(content: Mapping[str, dict]) -> list[str]:
    rows = [
        [name, target, str(of[kind]["cases"]), kind, _mean(of[kind]["top_mass"])]
        for name, scores in content.items()
        for target, of in scores["targets"].items()
        for kind in ("difference", "norm")
    ]
    first = next(iter(content.values()))
    head = ["model", "targets", "cases", "importance by", f"mass of the top {first['top']} of {first['tokens']}"]
    note = f"Uniform weights hold {first['uniform_top_mass']:.3f}. The paper's top 8 tokens hold 45 %."
    return [*table_lines(head, rows), "", note, ""]


def _lesion_lines(content: Mapping[str, dict]) -> list[str]:
    names = list(content)
    sizes = [(label, size) for label, bins in content[names[0]]["by_size"].items() for size in bins]
    rows = []
    for label, size in sizes:
        cells = [content[name]["by_size"][label][size] for name in names]
        rows.append([label, size, str(cells[0]["cases"]), *(f"{of['found'] / of['cases']:.2f}" for of in cells)])
    details = []
    for name in names:
        of = content[name]["details"].values()
        sums = {key: sum(row[key] for row in of) for key in ("with_place", "place_right", "with_size", "size_right")}
        counts = content[name]["counts"]
        details.append([
            name, f"{counts['found']} of {counts['findings']}", f"{sums['place_right']} of {sums['with_place']}",
            f"{sums['size_right']} of {sums['with_size']}",
        ])  # fmt: skip
    head = ["", "findings named", "of these, right lobes or sides", "of these, size within a quarter"]
    by_size = table_lines(["finding", "size", "cases", *(f"found, {name}" for name in names)], rows)
    return [*table_lines(head, details), "", *by_size, ""]


def _stability_lines(content: Mapping) -> list[str]:
    rows = [
        ["the same report", _mean(content["identical"])],
        ["the same findings", _mean(content["findings"])],
        ["overlap of the findings", _mean(content["overlap"])],
    ]
    note = (
        f"Of {content['draws']} draws, all pairs; in {content['changed']:.0%} of them a case had another reference. "
        "Intervals over cases."
    )
    often = sorted(content["flips"].items(), key=lambda item: -item[1])[:5]
    flips = ", ".join(f"{label} {share:.1%}" for label, share in often if share)
    names = f"Most often named in some reports of a case and not in others: {flips or 'none'}."
    return [*table_lines(["two reports of one scan", "mean over cases"], rows), "", note, names, ""]


def _case_lines(cases: Sequence[dict]) -> list[str]:
    lines = []
    for case in cases:
        lines += [f"### {case['id']}", ""]
        for name, report in case.items():
            if name != "id":
                lines += [f"**{name}**", "", "```", report, "```", ""]
    return lines


def p_value(value: float) -> str:
    """For a table."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
