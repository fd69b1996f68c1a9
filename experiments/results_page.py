# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The page of results: numbers from the JSON files of the experiments, descriptions from their YAML files."""

import json
from pathlib import Path

from ..metrics.markdown import p_text
from ..metrics.statistics import POWER
from .kinds import KINDS, difference_maps, information
from .kinds.score_table import detectable
from .result_files import write_bytes
from .runner import load_table
from .study import load_variants, table_names


def write_page(results: Path) -> Path:
    """Write `RESULTS.md` from the JSON files of the folder `results`."""
    paths = sorted(results.glob("*.json"))
    documents = [_described(json.loads(path.read_text(encoding="utf-8"))) for path in paths]
    documents.sort(key=_order)
    study = documents[0]["study"]
    lines = [f"# Results: {study['name']}", "", study["title"], ""]
    if study.get("true_findings"):
        share = f"{100 * study['true_findings']:.0f} %"
        told = "named the true findings. In the test they name those predicted by the classifier"
        lines += [f"In training, {share} of the diagnosis prompts {told}.", ""]
    trained = [document for document in documents if KINDS[document["kind"]].NEEDS.cohort]
    if trained:
        lines += _about_trained(trained)
    for document in documents:
        lines += _section(document)
    page = results / "RESULTS.md"
    write_bytes(page, ("\n".join(lines).rstrip() + "\n").encode())
    return page


def _about_trained(documents: list[dict]) -> list[str]:
    """Introduce the experiments that compare trained models."""
    return [
        *_answer(documents),
        *_observations(documents),
        "Scores are between 0 and 1: the mean over seeds, ± the standard deviation if there are several seeds, and "
        "the 95 % bootstrap interval over cases in brackets. **The paper's scores are in separate tables. They were "
        "measured on patients and are not comparable.**",
        "",
        "Each command belongs to the code that made its result; later code may refuse to add to this folder "
        "(docs/experiments.md).",
        "",
    ]


def _described(document: dict) -> dict:
    """Take titles and descriptions from the YAML files, whose wording may be newer than the result."""
    if document["experiment"] not in table_names():
        return document
    variants = load_variants()
    table = load_table(document["experiment"], variants)
    abouts = {key: {"about": variant.about} for key, variant in variants.items()}
    rows = [row | abouts.get(row["variant"], {}) for row in document["rows"]]  # a variant may have been removed
    return document | {"title": table.title, "about": table.about, "paper_note": table.paper_note, "rows": rows}


def _order(document: dict) -> tuple:
    """Sort key: tables by number, figures by number, then our own experiments."""
    name = document["experiment"]
    digits = "".join(character for character in name if character.isdigit())
    kind = 0 if name.startswith("table") else 1 if name.startswith("fig") else 2
    return kind, int(digits or 0), name


def _answer(documents: list[dict]) -> list[str]:
    """Answer the main question: is the full model better than its equal-compute control?"""
    for document in documents:
        f1 = _f1_at_equal_compute(document)
        if f1 is None:
            continue
        seeds = len(next(row["seeds"] for row in document["rows"] if row["name"] == "DiffVP"))
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
    least = detectable(document, "DiffVP", "equal compute")
    if least is None:
        return ""
    return f" With these seeds, the test has a power of {POWER:.0%} for a difference of {least:.3f}."


def _f1_at_equal_compute(document: dict) -> dict | None:
    """Return the comparison of micro-F1 over several seeds, or `None` if the experiment lacks it."""
    for comparison in document.get("comparisons", ()):
        if (comparison["first"], comparison["second"]) == ("DiffVP", "equal compute"):
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


def _observations(documents: list[dict]) -> list[str]:
    """Summarize the first model of the experiments that look into models."""
    modules = (information, difference_maps)
    documents = [document for document in documents if KINDS[document["kind"]] in modules]
    last = {document["kind"]: document for document in documents}
    sentences = [
        sentence
        for module in modules
        for kind, document in last.items()
        if KINDS[kind] is module
        for sentence in module.observations(document)
    ]
    if not sentences:
        return []
    first = documents[0]["rows"][0]
    return [f"One model, {first['name']} of seed {first['seeds'][0]}: {' '.join(sentences)}", ""]


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
    nearest = next(row for row in document["baselines"] if row["name"] == "nearest training report")
    least = nearest["scores"]["f1"]["mean"]
    above = [row["name"] for row in document["rows"] if row["scores"]["f1"]["mean"] > least]
    return [
        f"Copying the report of the most similar training scan gives a micro-F1 of {least:.3f}. "
        f"Rows of `{document['experiment']}` above it: {', '.join(above) or 'none'}.",
        "",
    ]


def _section(document: dict) -> list[str]:
    head = [f"## {document['title']}", "", document["about"], "", f"`{document['command']}`", ""]
    return head + KINDS[document["kind"]].lines(document)
