# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Fig. 5a: difference maps of the models against the true lesions of the phantoms."""

from ...metrics.markdown import p_text, table_lines
from ..map_figure import draw_maps, map_example
from ..map_scores import score_maps
from .material import Kind, Material, Needs, device_lines, mean_cell, shown_cases


def content(material: Material) -> dict:
    """Score the maps of each row and draw a few of the first."""
    test, figure = material.test, {}
    for name, _, model, features, references in material.first_models():
        parts = (model, features, features.volumes, test.root)
        figure[name] = score_maps(*parts, test.cases, references)
        if len(figure) == 1:
            examples = [map_example(*parts, case, references[case.name]) for case in shown_cases(test)]
            draw_maps(material.picture, examples)
    return {"figure": figure, "picture": material.picture.name}


def lines(document: dict) -> list[str]:
    """Write the scores of each map and the comparisons with the other maps."""
    figure = document["figure"]
    rows = []
    for name, scores in figure.items():
        for kind, of in scores["maps"].items():
            columns = (of["pointing_body"], of["auroc"], of["sensitivity"]["all"])
            rows.append([name, kind, str(scores["cases"]), *map(mean_cell, columns)])
    first = next(iter(figure.values()))
    head = ["model", "map", "cases", "pointing", "AUROC", f"findings reached by the top {first['top_percent']:g} %"]
    note = (
        f"Pointing: the map's maximum in the body lies in a lesion or within {first['tolerance_mm']:g} mm of one. "
        "AUROC: lesion against the rest of the body. Intervals over cases."
    )
    tests = [
        [name, entry["second"], *(_difference(entry["metrics"][key]) for key in ("pointing_body", "auroc"))]
        for name, scores in figure.items()
        for entry in scores["comparisons"]
    ]
    head_tests = ["model", "its map minus", "pointing", "AUROC"]
    picture = f"![{document['title']}]({document['picture']})"
    return [
        *(picture, "", *table_lines(head, rows), "", note, "", *table_lines(head_tests, tests), ""),
        *device_lines(document),
    ]


def _difference(of: dict) -> str:
    return f"{of['difference']:+.3f} (p {p_text(of['p_cases_holm'])})"


def observations(document: dict) -> list[str]:
    """Summarize the maps of the first model in a sentence for the top of the page."""
    maps = next(iter(document["figure"].values()))["maps"]
    names = ("latent", "latent, another patient", "pixel", "chance")
    own, another, pixel, chance = (f"{maps[name]['pointing_body']['mean']:.0%}" for name in names)
    return [
        f"The maximum of its difference map lies on a lesion in {own} of cases; for another patient's map in "
        f"{another}, for subtracted voxels in {pixel}, by chance in {chance}."
    ]


KIND = Kind(Needs(models=True, reports=False), content, lines, observations=observations)
