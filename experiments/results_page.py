# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Page of results: numbers from the JSON files of the experiments, descriptions from their YAML files."""

import json
from pathlib import Path

from .kinds import KINDS
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
    trained = [document for document in documents if KINDS[document["kind"]].needs.cohort]
    if trained:
        lines += _about_trained(trained)
    for document in documents:
        lines += _section(document)
    page = results / "RESULTS.md"
    write_bytes(page, ("\n".join(lines).rstrip() + "\n").encode())
    return page


def _about_trained(documents: list[dict]) -> list[str]:
    """Introduce the experiments that compare trained models."""
    answers = [kind.answer([of for of in documents if of["kind"] == name]) for name, kind in KINDS.items()]
    return [
        *(line for answer in answers for line in answer),
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


def _observations(documents: list[dict]) -> list[str]:
    """Summarize the first model of the experiments that look into models."""
    last = {document["kind"]: document for document in documents}
    found = {name: kind.observations(last[name]) for name, kind in KINDS.items() if name in last}
    sentences = [sentence for of_kind in found.values() for sentence in of_kind]
    if not sentences:
        return []
    first = next(document for document in documents if found[document["kind"]])["rows"][0]
    return [f"One model, {first['name']} of seed {first['seeds'][0]}: {' '.join(sentences)}", ""]


def _section(document: dict) -> list[str]:
    head = [f"## {document['title']}", "", document["about"], "", f"`{document['command']}`", ""]
    return head + KINDS[document["kind"]].lines(document)
