# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Benefit of the difference prompt as its reference comes closer to the patient, measured by probes.

The references, and the controls that cost the same compute, are in `doses.py`. Logistic regressions read the findings
from the input of the LLM, as in `information.py`. There are two forms of the difference:

- "residual": without trained parameters. Mean, maximum and minimum over the tokens of the aligned residual, and Δ_l of
  eqs. 5-7 of the whitened tokens at its peaks.
- "prompt": the difference prompt of the checkpoint, P of eq. 8.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

from ...data.cases import chance
from ...data.phantom import PhantomPatient
from ...encoders_diffvp import encoder_sha256
from ...inference.report import load_checkpoint
from ...labels_diffvp import DIAGNOSIS_LABELS
from ...metrics.clinical_efficacy import label_counts
from ...metrics.markdown import p_text, table_lines, with_interval
from ...metrics.statistics import (
    TEST_RESAMPLES,
    Comparison,
    Interval,
    bootstrap_counts,
    bootstrap_macro_auroc,
    compare_counts,
    holm,
)
from ...outputs_diffvp import DiffVPComparison
from ...progress import counted
from ...provenance import weights_sha256
from ...training.config import validated
from ..doses import ARMS, CONTROLS, DRAWN, Comparer, Doses, arm_key, compare_all
from ..system_scores import micro
from .material import Kind, Material, Needs

FORMS = ("residual", "prompt")
INPUTS = {
    "difference": "the difference alone",
    "difference, scan": "the difference and the scan",
    "difference, scan, findings": "the difference, the scan and the predicted findings",
}
MAIN = ("residual", "difference, scan")
STRENGTHS = [0.1, 1.0, 10.0, 100.0]  # of the regressions; each part of the input has a variance of 1 in all
METRICS = {"auroc": "mean AUROC", "f1": "micro-F1"}
BATCH = 64


class Settings(BaseModel):
    """`settings` of the table. Patients of the test, of training and of the pool are different ones."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int  # of the phantoms
    training_cases: list[int] = Field(min_length=1)
    test_cases: int = Field(ge=2)
    pool: int = Field(ge=2)
    matrix: int = 144
    compare: list[tuple[str, str]]


def content(material: Material) -> dict:
    """Compare all patients with all references, probe the inputs, and draw the scores."""
    settings = validated(Settings, material.table.settings, "settings")
    unknown = {name for pair in settings.compare for name in pair} - {*ARMS, *CONTROLS}
    if unknown:
        raise ValueError(f"settings: compare: {sorted(unknown)} (expected references: {', '.join(ARMS + CONTROLS)})")
    checkpoint, seeds = material.study.training["classifier"], material.rows[0]["seeds"]
    cache = material.study.training["data"]["cache_dir"]
    doses = Doses(checkpoint, cache, settings.seed, settings.pool, tuple(seeds), settings.matrix)
    model, processor = load_checkpoint(checkpoint, "cpu")  # as the workers do: cached tokens are on the CPU
    for field, expected in (("difference_level", "aligned"), ("use_diagnosis", True)):
        if getattr(model.config, field) != expected:
            raise ValueError(f"{checkpoint}: {field}: {getattr(model.config, field)} (expected {expected})")
    comparer = Comparer(doses, model, processor)
    training = doses.patients("train", max(settings.training_cases))
    test = doses.patients("valid", settings.test_cases)
    patients = training + test
    entries = compare_all(doses, patients, material.workers, comparer)
    found = dict(zip(_names(patients), entries, strict=True))
    cells = probe_all(model, found, (training, test), settings, seeds)
    figure = {
        "main": {"form": MAIN[0], "input": MAIN[1], "training_cases": max(settings.training_cases)},
        "pool": settings.pool,
        "weights": {"encoder": encoder_sha256(model.vision_encoder), "checkpoint": weights_sha256(checkpoint)},
        "cells": cells,
    }
    draw(material.picture, cells)
    return {"cases": settings.test_cases, "figure": figure, "picture": material.picture.name}


def _names(patients: Sequence[PhantomPatient]) -> list[str]:
    return [patient.name for patient in patients]


# Input of the probes -------------------------------------------------------------------------------------------------


@torch.no_grad()
def difference_vectors(model, entries: Sequence[Mapping[str, torch.Tensor]], key: str) -> dict[str, NDArray]:
    """Return both forms of the difference from the reference `key`, each (cases, width)."""
    pairs, places = (torch.stack([one[f"{key}: {part}"] for one in entries]) for part in ("pair", "places"))
    delta = model.local_delta(pairs[:, 0], pairs[:, 1])[0]
    residual = torch.stack([one[f"{key}: residual"] for one in entries]).flatten(1)
    prompts = []
    for start in range(0, len(entries), BATCH):
        chosen = slice(start, start + BATCH)
        sides = [pairs[chosen, side].to(model.device) for side in (0, 1)]
        latents = model.aligned_difference.latents(*sides, places[chosen].long().to(model.device))
        seen = DiffVPComparison(*latents, *latents, None, None, None)
        prompts.append(model.difference_prompt(seen)[0].flatten(1).float().cpu())
    return {"residual": torch.cat([residual, delta], dim=1).numpy(), "prompt": torch.cat(prompts).numpy()}


def read_findings(train: Sequence[NDArray], labels: NDArray, test: Sequence[NDArray]) -> NDArray[np.float64]:
    """
    Read findings with one logistic regression per label, whose strength is chosen on the training cases.

    Args:
        train, test: parts of the input, each (cases, width). Each part is scaled to the same variance in all.
        labels: (training cases, labels).

    Returns:
        Probabilities, (test cases, labels). A label with fewer than two training cases of a kind has its frequency.
    """
    scaled = []
    for own, other in zip(train, test, strict=True):
        scaler = StandardScaler().fit(own)
        scaled.append([scaler.transform(part) / np.sqrt(part.shape[1]) for part in (own, other)])
    train, test = (np.concatenate(parts, axis=1) for parts in zip(*scaled, strict=True))
    # A rotation that loses nothing of the training cases and leaves a regression with an L2 penalty unchanged.
    rotation = PCA().fit(train)
    train, test = rotation.transform(train), rotation.transform(test)
    likely = np.empty((len(test), labels.shape[1]))
    for label, truth in enumerate(labels.T):
        likely[:, label] = truth.mean()
        if np.bincount(truth, minlength=2).min() >= 2:  # each fold needs a case of either kind
            regression = LogisticRegression(max_iter=1000)
            search = GridSearchCV(regression, {"C": STRENGTHS}, cv=2, scoring="neg_log_loss")
            likely[:, label] = search.fit(train, truth).predict_proba(test)[:, 1]
    return likely


# Scores --------------------------------------------------------------------------------------------------------------


def probe_all(
    model,
    found: Mapping[str, Mapping[str, torch.Tensor]],
    patients: tuple[Sequence[PhantomPatient], Sequence[PhantomPatient]],
    settings: Settings,
    seeds: Sequence[int],
) -> list[dict]:
    """
    Probe each form, input and number of training cases; the prompt only with all of them.

    Args:
        found: results of [`Comparer.compare`] by the name of the patient.
        patients: of training and of test.

    Returns:
        For each: "scores" by reference, "comparisons", and "labels": AUROC of each label by reference.
    """
    training, test = patients
    sides = [[found[name] for name in _names(of)] for of in patients]
    train_labels, test_labels = (
        np.array([[one.labels[label] for label in DIAGNOSIS_LABELS] for one in of]) for of in patients
    )
    scan, logits = (
        [np.stack([one[part].flatten().numpy() for one in side]) for side in sides] for part in ("scan", "logits")
    )
    keys = dict.fromkeys(arm_key(name, seed) for name in ARMS + CONTROLS for seed in seeds)
    parts = {key: [difference_vectors(model, side, key) for side in sides] for key in keys}
    read: dict[tuple, NDArray] = {}

    def likely(form: str, given: str, count: int, key: str, seed: int) -> NDArray[np.float64]:
        chosen = subset(_names(training), count, seed)
        name = (form, given, key, tuple(chosen))
        if name not in read:  # other seeds may have the same reference and the same training cases
            inputs = [[parts[key][side][form], scan[side], logits[side]] for side in (0, 1)]
            width = 1 + list(INPUTS).index(given)
            own = [part[chosen] for part in inputs[0][:width]]
            read[name] = read_findings(own, train_labels[chosen], inputs[1][:width])
        return read[name]

    cells = []
    todo = [
        (form, given, count)
        for form in FORMS
        for given in INPUTS
        for count in settings.training_cases
        if form == MAIN[0] or count == len(training)
    ]
    for form, given, count in counted(todo, "Reading the findings"):
        systems = {}
        for name in CONTROLS + ARMS:
            one = seeds if name in DRAWN or count < len(training) else seeds[:1]
            systems[name] = np.stack([likely(form, given, count, arm_key(name, seed), seed) for seed in one])
        cell = {"form": form, "input": given, "training_cases": count}
        cells.append(cell | score_systems(systems, test_labels, settings.compare))
    return cells


def subset(names: Sequence[str], count: int, seed: int) -> list[int]:
    """Draw training cases: their indices in ascending order."""
    order = sorted(range(len(names)), key=lambda index: chance(f"{seed}:training:{names[index]}"))
    return sorted(order[:count])


def score_systems(systems: Mapping[str, NDArray], truth: NDArray, pairs: Sequence[tuple[str, str]]) -> dict:
    """
    Score and compare systems.

    Args:
        systems: probabilities by name, (runs, cases, labels).
        truth: (cases, labels).
        pairs: names of first and second system. p-values are corrected over all pairs.
    """
    areas, of_pairs = bootstrap_macro_auroc(systems, truth, pairs)
    counts = {
        name: sum(label_counts((run > 0.5).astype(int), truth) for run in runs) / len(runs)
        for name, runs in systems.items()
    }
    shares = {name: bootstrap_counts(of, _f1, resamples=TEST_RESAMPLES) for name, of in counts.items()}
    tests = {"auroc": of_pairs, "f1": [compare_counts(counts[a], counts[b], _f1) for a, b in pairs]}
    corrected = {metric: holm([one.p_value for one in of]) for metric, of in tests.items()}
    comparisons = [
        {
            "first": first,
            "second": second,
            **{metric: _test_entry(tests[metric][at], corrected[metric][at]) for metric in METRICS},
        }
        for at, (first, second) in enumerate(pairs)
    ]
    scores = {name: {"auroc": _entry(areas[name]), "f1": _entry(shares[name])} for name in systems}
    one_by_one = [label for label in range(truth.shape[1]) if 0 < truth[:, label].sum() < len(truth)]
    labels = {
        name: {
            DIAGNOSIS_LABELS[label]: float(np.mean([roc_auc_score(truth[:, label], run[:, label]) for run in runs]))
            for label in one_by_one
        }
        for name, runs in systems.items()
    }
    return {"scores": scores, "comparisons": comparisons, "labels": labels}


def _f1(sums: NDArray) -> NDArray:
    return micro(sums, "f1")


def _entry(interval: Interval) -> dict:
    return {"mean": interval.estimate, "interval": [interval.low, interval.high]}


def _test_entry(test: Comparison, corrected: float) -> dict:
    interval = [test.interval.low, test.interval.high]
    return {"difference": test.difference, "interval": interval, "p": test.p_value, "p_holm": float(corrected)}


# Page and figure -----------------------------------------------------------------------------------------------------


def lines(document: dict) -> list[str]:
    """Write the main result, its tests, and the scores of all other inputs."""
    figure = document["figure"]
    main = figure["main"]
    [cell] = [one for one in figure["cells"] if all(one[key] == value for key, value in main.items())]
    picture = f"![{document['title']}]({document['picture']})"
    note = (
        f"{document['cases']} test patients, a pool of {figure['pool']} other patients, "
        f"{len(document['rows'][0]['seeds'])} draws of the random references. Controls at the same compute: the scan "
        "itself, and the abnormal scan of another patient, as reference. Zeros for the reference save one pass of the "
        "encoder. 95 % bootstrap intervals over test patients; p by Holm over the comparisons of a table."
    )
    page = [picture, "", note, ""]
    page += [f"Main test: {INPUTS[main['input']]}, {main['training_cases']} training cases, {main['form']}.", ""]
    page += table_lines(["reference", *METRICS.values()], _score_rows(cell, METRICS)) + [""]
    page += _comparison_lines(cell)
    for form in FORMS:
        for metric, title in METRICS.items():
            chosen = [one for one in figure["cells"] if one["form"] == form]
            head = [f"{title}, {form}", *(f"{one['input']}; {one['training_cases']} cases" for one in chosen)]
            rows = [
                [name, *(with_interval(**_value(one["scores"][name][metric])) for one in chosen)]
                for name in CONTROLS + ARMS
            ]
            page += [*table_lines(head, rows), ""]
    labels = cell["labels"]
    head = ["AUROC by finding (main test)", *CONTROLS, *ARMS]
    rows = [[label, *(f"{labels[name][label]:.3f}" for name in CONTROLS + ARMS)] for label in labels[CONTROLS[0]]]
    return [*page, *table_lines(head, rows), ""]


def _value(entry: Mapping) -> dict:
    return {"value": entry["mean"], "interval": entry["interval"]}


def _score_rows(cell: dict, metrics: Mapping[str, str]) -> list[list[str]]:
    scores = cell["scores"]
    return [[name, *(with_interval(**_value(scores[name][metric])) for metric in metrics)] for name in CONTROLS + ARMS]


def _comparison_lines(cell: dict) -> list[str]:
    rows = []
    for one in cell["comparisons"]:
        cells = []
        for metric in METRICS:
            low, high = one[metric]["interval"]
            cells += [f"{one[metric]['difference']:+.3f} ({low:+.3f} to {high:+.3f})", p_text(one[metric]["p_holm"])]
        rows.append([f"{one['first']} − {one['second']}", *cells])
    head = [cell for title in METRICS.values() for cell in (title, "p")]
    return [*table_lines(["difference", *head], rows), ""]


def draw(path: str | Path, cells: Sequence[dict]) -> None:
    """Draw mean AUROC and micro-F1 of the residual by reference as PNG, for each input and number of cases."""
    figure = Figure((12, 6.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(METRICS), len(INPUTS), sharex=True, sharey="row")
    names = CONTROLS + ARMS
    counts = sorted({cell["training_cases"] for cell in cells})
    for column, given in enumerate(INPUTS):
        for row, (metric, title) in enumerate(METRICS.items()):
            panel = axes[row, column]
            for number, count in enumerate(counts):
                [cell] = [
                    one
                    for one in cells
                    if (one["form"], one["input"], one["training_cases"]) == (MAIN[0], given, count)
                ]
                entries = [cell["scores"][name][metric] for name in names]
                means = np.array([entry["mean"] for entry in entries])
                reach = np.abs(np.array([entry["interval"] for entry in entries]).T - means)
                places = np.arange(len(names)) + 0.16 * (number - (len(counts) - 1) / 2)
                style = {"fmt": "o", "capsize": 3, "color": f"C{number}"}
                panel.errorbar(places, means, reach, label=f"{count} training cases", **style)
            panel.axvspan(-0.5, len(CONTROLS) - 0.5, color="0.93", zorder=0)
            panel.grid(axis="y", color="0.85")
            if not row:
                panel.set_title(INPUTS[given], fontsize=10)
            if not column:
                panel.set_ylabel(title)
            panel.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=9)
    axes[0, 0].legend(fontsize=8, loc="lower right")
    axes[1, 0].text(-0.4, axes[1, 0].get_ylim()[0], " controls", fontsize=8, va="bottom", color="0.4")
    figure.savefig(path, format="png")


KIND = Kind(Needs(reports=False, cohort=False), content, lines)
