# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Lobes and sides that sentences name."""

from itertools import combinations

import pytest

from diffvp.data.phantom import LOBES
from diffvp.data.phantom_report import wordings
from diffvp.metrics.places import named_lobes, named_sides

SUBSETS = [list(some) for count in range(1, 6) for some in combinations(LOBES, count)]


@pytest.mark.parametrize(
    ("sentence", "lobes"),
    [
        ("a nodule in the right upper lobe", {"right upper lobe"}),
        ("ground glass in both lower lobes", {"right lower lobe", "left lower lobe"}),
        (
            "seen in both upper lobes and the right middle lobe",
            {"right upper lobe", "left upper lobe", "right middle lobe"},
        ),
        ("in the upper lobes of both lungs", {"right upper lobe", "left upper lobe"}),
        ("upper lobe of the left lung", {"left upper lobe"}),
        ("in the middle lobe and the lingula", {"right middle lobe", "left upper lobe"}),
        ("left middle lobe", set()),
        ("in the right upper lobe and both middle lobes", {"right upper lobe"}),
        ("in both lungs", set()),
    ],
)
def test_lobes_are_read_in_usual_wordings(sentence, lobes):
    assert named_lobes(sentence) == lobes


@pytest.mark.parametrize("label", ["Atelectasis", "Lung opacity", "Bronchiectasis"])
def test_sets_of_lobes_are_read_in_every_phantom_wording(label):
    for lobes in SUBSETS:
        for sentence in wordings(label, {"lobes": lobes, "kind": "linear", "severity": "mild"}):
            assert named_lobes(sentence.lower()) == set(lobes), sentence


@pytest.mark.parametrize("label", ["Lung nodule", "Consolidation"])
def test_single_lobe_is_read_in_every_phantom_wording(label):
    for lobe in LOBES:
        for count in (1, 2, 4, 6):
            for sentence in wordings(label, {"lobe": lobe, "count": count, "size_mm": 30}):
                assert named_lobes(sentence.lower()) == {lobe}, sentence


@pytest.mark.parametrize(
    "label", ["Emphysema", "Peribronchial thickening", "Pleural effusion", "Pulmonary fibrotic sequela"]
)
def test_sides_of_every_phantom_wording_are_read(label):
    for zone in ("apex", "base"):
        for side, sides in {"right": {"right"}, "left": {"left"}, "both": {"right", "left"}}.items():
            for sentence in wordings(label, {"side": side, "severity": "mild", "thickness_mm": 20, "zone": zone}):
                assert named_sides(sentence.lower()) == sides, sentence
                assert named_lobes(sentence.lower()) == set(), sentence


def test_sides_are_whole_words():
    assert named_sides("bilateral fluid") == named_sides("seen bilaterally") == {"right", "left"}
    assert named_sides("a left sided effusion") == {"left"}
    assert named_sides("an upright scan") == frozenset()
