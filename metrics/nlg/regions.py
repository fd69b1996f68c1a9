# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Scores by region, and of whole reports with their regions in canonical order.

A report with its regions in another order than the true one loses ROUGE-L and the longer n-grams of BLEU. The
difference between the scores as written and in canonical order measures this effect.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .scores import score_reports
from .texts import check_pairs

OTHER = "other"


def split_reg2rg(report: str) -> dict[str, str]:
    """Split a report in Reg2RG's form, "The region 3 is heart: ...", into {region: text}, in the order written.

    Parts of a region that is written twice are joined. Text before the first region is "other".
    """
    first, *rest = re.split(r"The region \d+ is ([^:]+):", report)
    parts: dict[str, list[str]] = {OTHER: first.split()}
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        parts.setdefault(" ".join(name.lower().split()), []).extend(text.split())
    return {region: " ".join(words) for region, words in parts.items() if words}


def canonical_report(parts: Mapping[str, str], regions: Sequence[str], headings: bool = True) -> str:
    """Join {region: text} to a report with the regions in the order of `regions`.

    Text of other regions comes first, without a heading.

    Args:
        headings: True for a line "Heart: ..." per region, as DiffVP writes; False for the texts only, as in Reg2RG.
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
    Score reports as written, with their regions in canonical order, and region by region.

    Args:
        split: maps a report to {region: text}: `split_report` or [`split_reg2rg`].
        regions: names of the regions in canonical order, such as `REGIONS`.
        clean: "reg2rg" to score without headings, `None` to score with them.
        scorer, meteor, workers: see [`score_reports`].

    Returns:
        `as_written` and `canonical_order`: summaries of [`score_reports`]. `regions`: a summary for each region over
        the n references that have it. A prediction without the region scores 0 there and is counted in `missing`.
        `extra` counts predictions with the region whose reference lacks it; they are not scored. (Reg2RG's own scores
        by region leave out missing regions, so they are higher.)

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
    """Predictions and references to score; for a region also the numbers of missing and extra predictions."""

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
    """Return the pairs that [`region_scores`] scores, by name: "as_written", "canonical_order", and each region.

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
