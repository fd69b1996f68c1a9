# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores that see a report's regions: each on its own, and the whole with its regions in one order.

A report that names all findings but in another order than the true one loses ROUGE-L and the longer n-grams of BLEU.
How much of a score is order shows between the report as written and in canonical order.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .scores import score_reports
from .texts import check_pairs

OTHER = "other"


def split_reg2rg(report: str) -> dict[str, str]:
    """{region: text} of a report in Reg2RG's form, "The region 3 is heart: ...", in the order written.

    Parts of a region written twice are joined; what stands before the first region is "other".
    """
    first, *rest = re.split(r"The region \d+ is ([^:]+):", report)
    parts: dict[str, list[str]] = {OTHER: first.split()}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        parts.setdefault(" ".join(name.lower().split()), []).extend(text.split())
    return {region: " ".join(words) for region, words in parts.items() if words}


def canonical_report(parts: Mapping[str, str], regions: Sequence[str], headings: bool = True) -> str:
    """The report of {region: text}, its regions in the order of `regions`.

    Args:
        headings: "Heart: ..." on a line for each region, as DiffVP writes; else the texts alone, as Reg2RG scores.
            What belongs to none of the regions comes first, where no heading stands before it.
    """
    rest = [text for region, text in parts.items() if region not in regions]
    if headings:
        return "\n".join(
            [*rest, *(f"{region.capitalize()}: {parts[region]}" for region in regions if region in parts)]
        )
    return " ".join([*rest, *(parts[region] for region in regions if region in parts)])


def region_scores(
    predictions: Sequence[str],
    references: Sequence[str],
    split: Callable[[str], Mapping[str, str]],
    regions: Sequence[str],
    *,
    scorer: str = "paper",
    clean: str | None = None,
    meteor: bool = True,
    workers: int = 1,
) -> dict[str, dict]:
    """
    Score reports as they are written, with their regions in canonical order, and region by region.

    Args:
        split: a report to {region: text}: `DiffVPProcessor.post_process`, or [`split_reg2rg`].
        regions: the regions' names in canonical order: `REGIONS`.
        clean: "reg2rg" takes the headings out of the reports as written, so the ones in canonical order have none
            either; with `None` both have them.
        scorer, meteor, workers: see [`score_reports`].

    Returns:
        `as_written` and `canonical_order`: summaries of [`score_reports`]. `regions`: such a summary for each region,
        over the n references that have it. A prediction without the region counts there as empty, scores 0 and is one
        of `missing`; `extra` counts predictions with the region where the reference has none, which no score sees.
        (Reg2RG's own scores by region leave out what is missing, so they are higher.)

    Raises:
        LexiconError, TypeError, ValueError: see [`score_reports`].
    """
    options = {"scorer": scorer, "clean": clean, "meteor": meteor, "workers": workers}
    views = region_views(predictions, references, split, regions, headings=clean is None)
    result = {
        name: score_reports(*views[name].pairs, **options).summary() for name in ("as_written", "canonical_order")
    }
    result["regions"] = {}
    for region in regions:
        view = views[region]
        scores = score_reports(*view.pairs, **options).summary() if view.pairs[0] else {"n": 0}
        result["regions"][region] = {**scores, "missing": view.missing, "extra": view.extra}
    return result


class View(NamedTuple):
    """Predictions and references to score, and for a region: how many lack it, and have it beyond the reference."""

    pairs: tuple[list[str], list[str]]
    missing: int = 0
    extra: int = 0


def region_views(
    predictions: Sequence[str],
    references: Sequence[str],
    split: Callable[[str], Mapping[str, str]],
    regions: Sequence[str],
    *,
    headings: bool = True,
) -> dict[str, View]:
    """What [`region_scores`] scores, by name: "as_written", "canonical_order", and each region.

    Raises:
        TypeError, ValueError: see [`check_pairs`].
    """
    predictions, references = check_pairs(predictions, references)
    written, expected = ([split(text) for text in texts] for texts in (predictions, references))
    ordered = tuple([canonical_report(parts, regions, headings) for parts in side] for side in (written, expected))
    views = {"as_written": View((predictions, references)), "canonical_order": View(ordered)}
    for region in regions:
        pairs = [
            (ours.get(region, ""), theirs[region])
            for ours, theirs in zip(written, expected, strict=True)
            if region in theirs
        ]
        extra = sum(region in ours and region not in theirs for ours, theirs in zip(written, expected, strict=True))
        views[region] = View(
            ([ours for ours, _ in pairs], [theirs for _, theirs in pairs]),
            sum(not ours for ours, _ in pairs),
            extra,
        )
    return views
