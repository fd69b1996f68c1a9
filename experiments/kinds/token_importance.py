# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Fig. 4a: importance of the latent tokens, w of eq. 6, compared with the share of each token in the norm."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...data.cases import Case
from ...data.pool import is_normal
from ...metrics.markdown import table_lines
from ...modeling_diffvp import DiffVPForConditionalGeneration
from ...training.features import Features
from ..runs import scan_inputs
from ..system_scores import mean_and_interval
from .material import Kind, Material, Needs, device_lines, mean_cell

TOP_TOKENS = 8  # as in the paper


def content(material: Material) -> dict:
    """Score the token importance of each row and draw that of the first."""
    figure = {
        name: score_importance(model, features, material.test.cases, references)
        for name, _, model, features, references in material.first_models()
    }
    draw_importance(material.picture, next(iter(figure.values())))
    return {"figure": figure, "picture": material.picture.name}


def lines(document: dict) -> list[str]:
    """Write the share that the most important tokens hold, by model and group of cases."""
    figure = document["figure"]
    rows = [
        [name, target, str(of[kind]["cases"]), kind, mean_cell(of[kind]["top_mass"])]
        for name, scores in figure.items()
        for target, of in scores["targets"].items()
        for kind in ("difference", "norm")
    ]
    first = next(iter(figure.values()))
    head = ["model", "targets", "cases", "importance by", f"mass of the top {first['top']} of {first['tokens']}"]
    note = f"Uniform weights give {first['uniform_top_mass']:.3f}. In the paper, the top 8 tokens hold 45 %."
    picture = f"![{document['title']}]({document['picture']})"
    return [picture, "", *table_lines(head, rows), "", note, "", *device_lines(document)]


@torch.no_grad()
def token_weights(
    model: DiffVPForConditionalGeneration, features: Features, case: Case, reference: Case
) -> tuple[NDArray, NDArray]:
    """
    Return the importance of each token, w of eq. 6, and the share of each token in the squared norm of all, both (K,).

    The norm does not depend on the reference: it is the baseline.

    Raises:
        ValueError: the model does not compare latents.
    """
    if model.config.difference_level != "latent":
        raise ValueError(f'difference_level is "{model.config.difference_level}": token importance is of "latent"')
    comparison = model.compare(**scan_inputs(model, features, [case], [[reference]]))
    weights = model.difference_prompt(comparison)[1][0]
    norms = comparison.latents[0].float().square().sum(-1)
    return weights.cpu().numpy(), (norms / norms.sum()).cpu().numpy()


def importance_statistics(weights: NDArray, top: int = TOP_TOKENS) -> dict:
    """
    Args:
        weights: (cases, K), each row a distribution.

    Returns:
        "top_mass": sum of the `top` largest weights, mean over cases with its interval; "sorted": the weights in
        descending order, mean over cases (K,).
    """
    ordered = -np.sort(-np.asarray(weights, dtype=np.float64), axis=1)
    return {
        "cases": len(ordered),
        "top_mass": mean_and_interval(ordered[:, :top].sum(axis=1)),
        "sorted": ordered.mean(axis=0).tolist(),
    }


def score_importance(
    model: DiffVPForConditionalGeneration,
    features: Features,
    cases: Sequence[Case],
    references: Mapping[str, Case],
    *,
    top: int = TOP_TOKENS,
) -> dict:
    """
    Score token importance for abnormal and for normal targets, with the norm and uniform weights as baselines.

    Raises:
        ValueError: the model does not compare latents, or there is no case.
    """
    groups = {
        "abnormal": [case for case in cases if not is_normal(case)],
        "normal": [case for case in cases if is_normal(case)],
    }
    result = {}
    for name, group in groups.items():
        if group:
            rows = [token_weights(model, features, case, references[case.name]) for case in group]
            weights, norms = (np.stack(side) for side in zip(*rows, strict=True))
            result[name] = {
                "difference": importance_statistics(weights, top),
                "norm": importance_statistics(norms, top),
            }
    if not result:
        raise ValueError("token importance of no case: expected at least 1")
    tokens = model.config.num_latents
    return {"top": top, "tokens": tokens, "uniform_top_mass": min(top, tokens) / tokens, "targets": result}


def draw_importance(path: str | Path, result: dict) -> None:
    """Draw the mean importance of tokens, in descending order, as PNG. `result` comes from [`score_importance`]."""
    figure = Figure((7, 4.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ranks = np.arange(1, result["tokens"] + 1)
    colors = {"abnormal": "tab:blue", "normal": "tab:green"}
    for name, of_group in result["targets"].items():
        for kind, style, label in (("difference", "-", "difference"), ("norm", ":", "norm alone")):
            statistics = of_group[kind]
            text = f"{label}, {name} targets: top {result['top']} hold {statistics['top_mass']['mean']:.0%}"
            axes.plot(ranks, statistics["sorted"], style, color=colors[name], marker=".", label=text)
    text = f"uniform: top {result['top']} hold {result['uniform_top_mass']:.0%}"
    axes.axhline(1 / result["tokens"], color="tab:orange", linestyle="--", label=text)
    axes.set_xlabel("token of a case, by its importance")
    axes.set_ylabel("share of the importance")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(path, format="png")


KIND = Kind(Needs(models=True, reports=False), content, lines)
