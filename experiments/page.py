# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""The page of results, made from the JSON files of the experiments and from nothing else."""

import json
from pathlib import Path

from ..metrics.markdown import table_lines
from ..metrics.statistics import POWER, detectable_difference
from .figures import figure_lines, p_value
from .runs import write_bytes
from .scores import FINDINGS

SHORT = {
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


def write_page(results: Path) -> Path:
    """`results/STUDY/*.json` → `results/STUDY/RESULTS.md`."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))]
    documents.sort(key=_order)
    study = documents[0]["study"]
    lines = [f"# Results: {study['name']}", "", study["title"], ""]
    lines += _answer(documents) + _observations(documents)
    lines += [
        "Scores are between 0 and 1. A score is the mean over its seeds (behind ± their standard deviation, where "
        "there are several), with the 95 % bootstrap interval over cases in brackets. **The paper's numbers stand in "
        "tables of their own; its authors measured them on patients, and the two do not compare.**",
        "",
    ]
    for document in documents:
        lines += _section(document)
    page = results / "RESULTS.md"
    write_bytes(page, ("\n".join(lines).rstrip() + "\n").encode())
    return page


def _order(document: dict) -> tuple:
    """Tables by number, then figures, then our own."""
    name = document["experiment"]
    digits = "".join(character for character in name if character.isdigit())
    kind = 0 if name.startswith("table") else 1 if name.startswith("fig") else 2
    return kind, int(digits or 0), name


def _answer(documents: list[dict]) -> list[str]:
    """Whether the full model is better than its equal-compute control: what the paper stands or falls by."""
    for document in documents:
        f1 = _f1_at_equal_compute(document)
        if f1 is None:
            continue
        seeds = len(next(row["seeds"] for row in document["rows"] if row["name"] == "DiffVP"))
        low, high = f1["interval"]
        better = f1["difference"] > 0 and f1["p_seeds"] < 0.05
        verdict = "Yes" if better else "Not shown"
        return [
            f"**Is the benefit of the difference prompt real, at equal parameters and equal compute? {verdict}.** "
            f"Over {seeds} seeds and {document['cases']} unseen cases, micro-F1 of the full model less that of the"
            f" same model whose prompt knows no reference is {f1['difference']:+.3f} (95 % interval over cases "
            f"{low:+.3f} to {high:+.3f}; Welch's t-test over seeds p = {p_value(f1['p_seeds'])})."
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
    """How large a difference in micro-F1 would have shown over these seeds; nothing where they do not vary."""
    least = _detectable(document, "DiffVP", "equal compute")
    if least is None:
        return ""
    return f" With so many seeds that vary like these, a difference of {least:.3f} shows with a power of {POWER:.0%}."


def _detectable(document: dict, first: str, second: str) -> float | None:
    """The difference in micro-F1 of two rows of different models that shows with a power of 80 % over their seeds."""
    scores = {row["name"]: row["scores"].get("f1") for row in document["rows"]}
    sides = [list(scores[name]["by_seed"].values()) for name in (first, second) if scores[name] is not None]
    if len(sides) < 2 or min(map(len, sides)) < 2 or all(len(set(side)) == 1 for side in sides):
        return None
    return detectable_difference(*sides)


def _powers(document: dict) -> list[str]:
    """What the comparisons that show no difference in micro-F1 over seeds could have shown."""
    found = []
    for entry in document["comparisons"]:
        f1 = entry["metrics"].get("f1", {})
        if entry.get("same_models") or f1.get("p_seeds", 0) < 0.05:
            continue
        least = _detectable(document, entry["first"], entry["second"])
        if least is not None:
            found.append(f"{entry['first']} less {entry['second']} {least:.3f}")
    if not found:
        return []
    return [
        f"Where the seeds show no difference in micro-F1, one of this size shows with a power of {POWER:.0%} "
        f"(before correction): {'; '.join(found)}.",
        "",
    ]


def _f1_at_equal_compute(document: dict) -> dict | None:
    """The comparison of micro-F1, where an experiment makes it over several seeds."""
    for comparison in document.get("comparisons", ()):
        if (comparison["first"], comparison["second"]) == ("DiffVP", "equal compute"):
            f1 = comparison["metrics"]["f1"]
            return f1 if "p_seeds" in f1 else None
    return None


def _replication(documents: list[dict]) -> list[str]:
    """The same on new seeds."""
    for document in documents:
        f1 = _f1_at_equal_compute(document)
        if document["experiment"] == "replication" and f1 is not None:
            low, high = f1["interval"]
            return [
                f"On {len(document['rows'][0]['seeds'])} new seeds (`replication`), named before any of them was "
                f"trained, it is {f1['difference']:+.3f} ({low:+.3f} to {high:+.3f}; p = {p_value(f1['p_seeds'])})."
                + ("" if f1["p_seeds"] < 0.05 else _power(document)),
                "",
            ]
    return []


def _observations(documents: list[dict]) -> list[str]:
    """Of the first model of an experiment, what bears on the answer."""
    documents = [document for document in documents if document["kind"] in ("information", "maps")]
    figures = {document["kind"]: next(iter(document["figure"].values())) for document in documents}
    sentences = []
    if "variance" in figures.get("information", ()):
        shares = figures["information"]["variance"]
        sentences.append(
            f"Of the variance of its difference prompt {shares['patient']:.1%} hangs on the patient alone, "
            f"{shares['reference']:.1%} on the reference alone, and {shares['interaction']:.1%} on both together."
        )
    if "prompt" in figures.get("information", ()):
        share = {name: of["written"] for name, of in figures["information"]["prompt"]["shares"].items()}
        if None not in share.values():
            sentences.append(
                f"Of the findings that its diagnosis prompt names, its report has {share['told, true']:.0%} of the "
                f"true and {share['told, false']:.0%} of the false ones; of the others {share['not told, true']:.0%} "
                f"of the true and {share['not told, false']:.0%} of the false."
            )
    if "maps" in figures:
        words = {
            "latent": "",
            "latent, another patient": " of another patient's map",
            "pixel": " of subtracted voxels",
            "chance": " by chance",
        }
        hit = {name: figures["maps"]["maps"][name]["pointing_body"]["mean"] for name in words}
        shares = ", ".join(f"{hit[name]:.0%}{said}" for name, said in words.items())
        sentences.append(f"The maximum of a difference map lies on a lesion in {shares}.")
    if not sentences:
        return []
    first = documents[0]["rows"][0]
    return [f"One model, {first['name']} of seed {first['seeds'][0]}: {' '.join(sentences)}", ""]


def _order_of_rows(rows: list[dict]) -> list[str]:
    """Whether the rows that the paper has too stand in its order; nothing of fewer than three."""
    rows = [row for row in rows if "f1" in row["paper"]]
    if len(rows) < 3:
        return []
    ours = sorted(rows, key=lambda row: row["scores"]["f1"]["mean"])
    paper = sorted(rows, key=lambda row: row["paper"]["f1"])
    same = "is the paper's" if ours == paper else f"is not the paper's ({' < '.join(row['name'] for row in paper)})"
    order = " < ".join(f"{row['name']} {row['scores']['f1']['mean']:.3f}" for row in ours)
    return [f"The order of the components' micro-F1 {same}: {order}.", ""]


def _beside_the_nearest_report(document: dict) -> list[str]:
    """Which rows are above what no model is needed for."""
    nearest = next(row for row in document["baselines"] if row["name"] == "nearest training report")
    least = nearest["scores"]["f1"]["mean"]
    above = [row["name"] for row in document["rows"] if row["scores"]["f1"]["mean"] > least]
    return [
        f"Copying the report of the most similar training scan gives a micro-F1 of {least:.3f}; of the rows of "
        f"`{document['experiment']}`, above it {'are: ' + ', '.join(above) if above else 'is none'}.",
        "",
    ]


def _section(document: dict) -> list[str]:
    lines = [f"## {document['title']}", "", document["about"], "", f"`{document['command']}`", ""]
    if document["kind"] != "scores":
        return [*lines, *figure_lines(document), *_device_lines(document)]
    metrics = document["metrics"]
    head = ["", "seeds", *(SHORT[metric] for metric in metrics)]
    lines += table_lines(head, [_row(row, metrics) for row in document["rows"] + document["baselines"]])
    paper = [row for row in document["rows"] if row["paper"]]
    if paper:
        shown = [metric for metric in metrics if any(metric in row["paper"] for row in paper)]
        head = ["The paper's, on RadGenome-ChestCT", *(SHORT[metric] for metric in shown)]
        rows = [[row["name"], *(_paper(row["paper"], metric) for metric in shown)] for row in paper]
        lines += ["", *table_lines(head, rows)]
    if document["paper_note"]:
        lines += ["", f"Of the paper: {document['paper_note']}"]
    if document["comparisons"]:
        head = ["difference", *(SHORT[metric] for metric in metrics)]
        lines += ["", *table_lines(head, [_comparison(entry, metrics) for entry in document["comparisons"]])]
        lines += [
            "",
            "p: t-test over seeds, where there are several: Welch's, or paired if both rows are of the same models;",
            "pc: paired bootstrap over cases (a permutation test of fewer than 30); both two-sided and corrected over "
            "the metrics of the line (Holm).",
            "",
            *_powers(document),
        ]
    lines += ["", *_device_lines(document)]
    abouts = {row["variant"]: row["about"] for row in document["rows"]}
    lines += [*(f"- `{variant}`: {about}." for variant, about in abouts.items()), ""]
    lines += [f"{document['cases']} cases. " + " ".join(f"`{word}`" for word in document["signature"].split()), ""]
    return lines


def _device_lines(document: dict) -> list[str]:
    """Whose reports no CPU wrote."""
    devices = document["provenance"].get("devices", {})
    return [line for device, names in devices.items() if device != "cpu"
            for line in (f"Written on a GPU ({device}): {'; '.join(names)}.", "")]  # fmt: skip


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
    return f"{values[metric]:.3f}" if metric in FINDINGS else f"{values[metric]:.2f}"


def _comparison(entry: dict, metrics: list[str]) -> list[str]:
    cells = []
    for metric in metrics:
        of = entry["metrics"][metric]
        p = f"p {p_value(of['p_seeds_holm'])}, " if "p_seeds_holm" in of else ""
        cells.append(f"{of['difference']:+.3f} ({of['interval'][0]:+.3f} to {of['interval'][1]:+.3f}; "
                     f"{p}pc {p_value(of['p_cases_holm'])})")  # fmt: skip
    return [f"{entry['first']} less {entry['second']}", *cells]
