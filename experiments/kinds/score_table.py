# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Tables of scores: language scores and findings of each row, baselines, and tests between rows."""

import io
import json

import numpy as np

from ...data.cases import Case
from ...data.load import load_dataset_cases
from ...metrics.baselines import label_baselines, nearest_reports
from ...metrics.clinical_efficacy.reports import Labeler
from ...metrics.markdown import p_text, table_lines
from ...metrics.statistics import POWER, detectable_difference
from ...train_accelerate import build_generator
from ..evaluate import constant_normal_report, pooled_features
from ..result_files import write_bytes, write_json
from ..runs import Run, cases_sha256, frozen_sha256
from ..study import Condition, Table, Variant
from ..system_scores import (
    FINDING_SCORES,
    LANGUAGE,
    SystemScores,
    compare_rows,
    findings_signature,
    row_summary,
    score_labels,
    score_system,
)
from .material import Kind, Material, Needs, device_lines

MODEL, CONTROL = "DiffVP", "equal compute"  # rows that answer the main question
NEAREST = "nearest training report"
SHORT = {  # names in the page; another score keeps its own
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "meteor": "METEOR",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "precision": "precision",
    "recall": "recall",
    "f1": "micro-F1",
}


def content(material: Material) -> dict:
    """Score each row, the baselines and the differences between rows."""
    table = material.table
    cases = material.test.cases_of(table.patients)
    systems = {
        row.name: {
            seed: cached_scores(
                run, material.reports[row.name][seed], cases, row.condition, material.labeler, material.workers
            )
            for seed, run in material.runs[row.name].items()
        }
        for row in table.rows
    }
    first = table.rows[0].name
    return {
        "rows": [row | {"scores": row_summary(systems[row["name"]], table.metrics)} for row in material.rows],
        "metrics": table.metrics,
        "signature": next(iter(systems[first].values())).signature,
        "baselines": baselines(material, cases, next(iter(material.runs[first].values()))),
        "comparisons": [compared(table, systems, *pair) for pair in table.compare],
    }


def lines(document: dict) -> list[str]:
    """Write the scores, the paper's scores, the comparisons and the signature."""
    metrics = document["metrics"]
    names = {metric: SHORT.get(metric, metric) for metric in metrics}
    head = ["", "seeds", *names.values()]
    page = table_lines(head, [_row(row, metrics) for row in document["rows"] + document["baselines"]])
    paper = [row for row in document["rows"] if row["paper"]]
    if paper:
        shown = [metric for metric in metrics if any(metric in row["paper"] for row in paper)]
        head = ["scores of the paper, on RadGenome-ChestCT", *(names[metric] for metric in shown)]
        rows = [[row["name"], *(_paper(row["paper"], metric) for metric in shown)] for row in paper]
        page += ["", *table_lines(head, rows)]
    if document["paper_note"]:
        page += ["", f"Note on the paper: {document['paper_note']}"]
    if document["comparisons"]:
        head = ["difference", *names.values()]
        page += ["", *table_lines(head, [_comparison(entry, metrics) for entry in document["comparisons"]])]
        page += [
            "",
            "p: t-test over seeds, if there are several: Welch's, or paired if both rows have the same models.",
            "pc: paired bootstrap over cases (permutation test for fewer than 30). Both are two-sided and corrected "
            "over the metrics of the row (Holm).",
            "",
            *_powers(document),
        ]
    page += ["", *device_lines(document)]
    abouts = {row["variant"]: row["about"] for row in document["rows"]}
    page += [*(f"- `{variant}`: {about}." for variant, about in abouts.items()), ""]
    page += [f"{document['cases']} cases. " + " ".join(f"`{word}`" for word in document["signature"].split()), ""]
    return page


def _row(row: dict, metrics: list[str]) -> list[str]:
    seeds = row.get("seeds")
    return [row["name"], "-" if seeds is None else str(len(seeds)), *(_score(row["scores"], m) for m in metrics)]


def _score(scores: dict, metric: str) -> str:
    if metric not in scores:
        return "no text"
    score = scores[metric]
    spread = "" if score["std"] is None else f" ± {score['std']:.3f}"
    low, high = score["interval"]
    return f"{score['mean']:.3f}{spread} ({low:.3f}–{high:.3f})"


def _paper(values: dict, metric: str) -> str:
    if metric not in values:
        return "-"
    return f"{values[metric]:.3f}" if metric in FINDING_SCORES else f"{values[metric]:.2f}"


def _comparison(entry: dict, metrics: list[str]) -> list[str]:
    cells = []
    for metric in metrics:
        of = entry["metrics"][metric]
        p = f"p {p_text(of['p_seeds_holm'])}, " if "p_seeds_holm" in of else ""
        cells.append(f"{of['difference']:+.3f} ({of['interval'][0]:+.3f} to {of['interval'][1]:+.3f}; "
                     f"{p}pc {p_text(of['p_cases_holm'])})")  # fmt: skip
    return [f"{entry['first']} minus {entry['second']}", *cells]


def detectable(document: dict, first: str, second: str) -> float | None:
    """Return the difference in micro-F1 between two rows that their seeds detect with a power of 80 %.

    `None` if it is unknown: a row without micro-F1, a single seed, or no variation over seeds.
    """
    scores = {row["name"]: row["scores"].get("f1") for row in document["rows"]}
    sides = [list(scores[name]["by_seed"].values()) for name in (first, second) if scores[name] is not None]
    if len(sides) < 2 or min(map(len, sides)) < 2 or all(len(set(side)) == 1 for side in sides):
        return None
    return detectable_difference(*sides)


def _powers(document: dict) -> list[str]:
    """List the detectable difference of each comparison without a significant difference in micro-F1 over seeds."""
    found = []
    for entry in document["comparisons"]:
        f1 = entry["metrics"].get("f1", {})
        if entry.get("same_models") or f1.get("p_seeds", 0) < 0.05:
            continue
        least = detectable(document, entry["first"], entry["second"])
        if least is not None:
            found.append(f"{entry['first']} minus {entry['second']} {least:.3f}")
    if not found:
        return []
    return [
        f"For comparisons without a significant difference in micro-F1 over seeds the test has a power of {POWER:.0%} "
        f"(before correction) for: {'; '.join(found)}.",
        "",
    ]


def compared(table: Table, systems: dict[str, dict[int, SystemScores]], first: str, second: str) -> dict:
    """Compare two rows of a table."""
    variants = {row.name: row.variant for row in table.rows}
    same = variants[first] == variants[second] and list(systems[first]) == list(systems[second])
    metrics = compare_rows(systems[first], systems[second], table.metrics, same_models=same)
    return {"first": first, "second": second, "same_models": same, "metrics": metrics}


def cached_scores(
    run: Run, document: dict, cases: list[Case], condition: Condition, labeler: Labeler, workers: int
) -> SystemScores:
    """Score a set of reports, or read its scores from the run: METEOR takes seconds, and tables share rows."""
    path = run.folder / "scores" / f"{condition.name}.npz"
    if path.is_file() and path.stat().st_mtime_ns >= run.reports_under(condition).stat().st_mtime_ns:
        with np.load(path, allow_pickle=False) as stored:
            signature = str(stored["signature"])
            if signature.endswith(findings_signature(labeler)):
                per_report = {key: stored[key] for key in stored.files if key not in ("counts", "signature")}
                return SystemScores(per_report, stored["counts"], signature)
    scores = score_system([row["report"] for row in document["reports"]], cases, labeler, workers)
    archive = io.BytesIO()
    np.savez(archive, counts=scores.counts, signature=np.array(scores.signature), **scores.per_report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, archive.getvalue())
    return scores


def baselines(material: Material, cases: list[Case], run: Run) -> list[dict]:
    """
    Return the scores of the baselines, made from the training split alone.

    They are stored once for all tables with the same patients. `run` can be of any model of the study.
    """
    study, table = material.study, material.table
    path = run.reports.parents[1] / f"baselines-{table.patients}.json"
    made_by = {
        "settings": study.training_config(Variant(name="", about=""), seed=0, output_dir="").of_the_result("report"),
        "frozen": frozen_sha256(study.training.get("classifier")),
        "cases": cases_sha256(cases),
        "signature": findings_signature(material.labeler),
    }
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if stored is None or stored["made_by"] != made_by:
        stored = {"made_by": made_by, "rows": make_baselines(cases, run, material.labeler, material.workers)}
        write_json(path, stored)
    return [
        row | {"scores": {metric: row["scores"][metric] for metric in table.metrics if metric in row["scores"]}}
        for row in stored["rows"]
    ]


def make_baselines(test: list[Case], run: Run, labeler: Labeler, workers: int) -> list[dict]:
    """Score the baselines. No model is trained if the study has a classifier."""
    data = run.config.data
    train = load_dataset_cases(data.layout, data.root, data.split)
    model, processor = run.load() if run.config.classifier is None else build_generator(run.config)
    volumes = run.features(model, processor).volumes
    test_features, train_features = (
        pooled_features(model, volumes, cases, name) for cases, name in ((test, "test"), (train, "training"))
    )
    texts = {
        "constant normal report": [constant_normal_report(train)] * len(test),
        NEAREST: nearest_reports(test_features, train_features, [case.report for case in train]),
    }
    everything = [*FINDING_SCORES, *LANGUAGE]
    rows = [
        {"name": name, "scores": row_summary({0: score_system(reports, test, labeler, workers)}, everything)}
        for name, reports in texts.items()
    ]
    guesses = label_baselines(len(test), np.stack([case.labels for case in train]))
    return rows + [
        {"name": f"labels alone, {name}", "scores": row_summary({0: score_labels(guess, test)}, everything)}
        for name, guess in guesses.items()
    ]


# Answer at the top of the results page -------------------------------------------------------------------------------


def answer(documents: list[dict]) -> list[str]:
    """Answer the main question: is the full model better than its equal-compute control?"""
    for document in documents:
        f1 = _f1_at_equal_compute(document)
        if f1 is None:
            continue
        seeds = len(next(row["seeds"] for row in document["rows"] if row["name"] == MODEL))
        low, high = f1["interval"]
        better = f1["difference"] > 0 and f1["p_seeds"] < 0.05
        verdict = "Yes" if better else "Not shown"
        return [
            f"**Does the difference prompt help, at equal parameters and equal compute? {verdict}.** "
            f"Over {seeds} seeds and {document['cases']} unseen cases, micro-F1 of the full model minus that of the"
            f" same model without a reference is {f1['difference']:+.3f} (95 % interval over cases "
            f"{low:+.3f} to {high:+.3f}; Welch's t-test over seeds p = {p_text(f1['p_seeds'])})."
            + ("" if better else _power(document)),
            "",
            *_replication(documents),
            *_order_of_rows(document["rows"]),
            *_beside_the_nearest_report(document),
        ]
    return [
        "The comparison at equal compute (`diffvp experiment table4`) has not been run yet with several seeds.",
        "",
    ]


def _power(document: dict) -> str:
    """State the difference in micro-F1 that these seeds could detect; empty if the seeds do not vary."""
    least = detectable(document, MODEL, CONTROL)
    if least is None:
        return ""
    return f" With these seeds, the test has a power of {POWER:.0%} for a difference of {least:.3f}."


def _f1_at_equal_compute(document: dict) -> dict | None:
    """Return the comparison of micro-F1 over several seeds, or `None` if the experiment lacks it."""
    for comparison in document.get("comparisons", ()):
        if (comparison["first"], comparison["second"]) == (MODEL, CONTROL):
            f1 = comparison["metrics"]["f1"]
            return f1 if "p_seeds" in f1 else None
    return None


def _replication(documents: list[dict]) -> list[str]:
    """Answer the main question on new seeds."""
    for document in documents:
        f1 = _f1_at_equal_compute(document)
        if document["experiment"] == "replication" and f1 is not None:
            low, high = f1["interval"]
            return [
                f"On {len(document['rows'][0]['seeds'])} new seeds (`replication`), chosen before any of them was "
                f"trained, it is {f1['difference']:+.3f} ({low:+.3f} to {high:+.3f}; p = {p_text(f1['p_seeds'])})."
                + ("" if f1["p_seeds"] < 0.05 else _power(document)),
                "",
            ]
    return []


def _order_of_rows(rows: list[dict]) -> list[str]:
    """Compare the order of the rows with the paper's; empty for fewer than three common rows."""
    rows = [row for row in rows if "f1" in row["paper"]]
    if len(rows) < 3:
        return []
    ours = sorted(rows, key=lambda row: row["scores"]["f1"]["mean"])
    paper = sorted(rows, key=lambda row: row["paper"]["f1"])
    same = "is the paper's" if ours == paper else f"is not the paper's ({' < '.join(row['name'] for row in paper)})"
    order = " < ".join(f"{row['name']} {row['scores']['f1']['mean']:.3f}" for row in ours)
    return [f"The order of the components by micro-F1 {same}: {order}.", ""]


def _beside_the_nearest_report(document: dict) -> list[str]:
    """List the rows above the nearest training report, a baseline without a report model."""
    nearest = next(row for row in document["baselines"] if row["name"] == NEAREST)
    least = nearest["scores"]["f1"]["mean"]
    above = [row["name"] for row in document["rows"] if row["scores"]["f1"]["mean"] > least]
    return [
        f"Copying the report of the most similar training scan gives a micro-F1 of {least:.3f}. "
        f"Rows of `{document['experiment']}` above it: {', '.join(above) or 'none'}.",
        "",
    ]


KIND = Kind(Needs(meteor=True, foreign=True), content, lines, answer=answer)
