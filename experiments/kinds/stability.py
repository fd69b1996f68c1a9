# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Stability of the reports of one model when another reference is drawn. Each row is a draw."""

import itertools
from collections.abc import Sequence

import numpy as np

from ...labels_diffvp import DIAGNOSIS_LABELS
from ...metrics.clinical_efficacy.reports import Labeler, label_reports
from ...metrics.markdown import table_lines
from ..system_scores import mean_and_interval
from .material import Kind, Material, Needs, device_lines, mean_cell


def content(material: Material) -> dict:
    """Compare the reports of the draws."""
    return {"figure": stability(list(material.first_reports().values()), material.labeler)}


def stability(draws: Sequence[Sequence[dict]], labeler: Labeler) -> dict:
    """
    Measure how much the reports of one model depend on the reference.

    Args:
        draws: the reports of the same cases, once for each draw.

    Returns:
        Over all pairs of draws, the mean over cases with its interval: "identical" reports; the same set of
        "findings"; the "overlap" of the two sets, |both| / |either|, 1 if both are empty. "changed": the share of
        pairs with different references. "flips": by label, the share of cases in which some reports name the label
        and others do not.
    """
    texts = [[row["report"] for row in rows] for rows in draws]
    named = np.stack([label_reports(labeler, reports) for reports in texts]).astype(bool)  # (draws, cases, labels)
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
    flips = (named.any(axis=0) & ~named.all(axis=0)).mean(axis=0)
    return {
        "draws": len(draws),
        "cases": named.shape[1],
        "changed": float(np.mean(changed)),
        **{name: mean_and_interval(values.mean(axis=0)) for name, values in measures.items()},
        "flips": dict(zip(DIAGNOSIS_LABELS, flips.tolist(), strict=True)),
    }


def lines(document: dict) -> list[str]:
    """Write the agreement of pairs of reports and the labels that change most often."""
    figure = document["figure"]
    rows = [
        [name, mean_cell(figure[key])]
        for name, key in (
            ("the same report", "identical"),
            ("the same findings", "findings"),
            ("overlap of the findings", "overlap"),
        )
    ]
    note = (
        f"All pairs of {figure['draws']} draws; in {figure['changed']:.0%} of them the case had different references. "
        "Intervals over cases."
    )
    often = sorted(figure["flips"].items(), key=lambda item: -item[1])[:5]
    flips = ", ".join(f"{label} {share:.1%}" for label, share in often if share)
    names = f"Labels most often named in only some reports of a case: {flips or 'none'}."
    table = table_lines(["two reports of one scan", "mean over cases"], rows)
    return [*table, "", note, names, "", *device_lines(document)]


KIND = Kind(Needs(), content, lines)
