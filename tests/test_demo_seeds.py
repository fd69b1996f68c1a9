# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Reports of the demo patients against their true lesions."""

import nibabel as nib
import numpy as np
import pytest

from diffvp.data.phantom import Finding, PhantomScan
from diffvp.experiments.demo_seeds import check, pointed_at

NODULE = Finding("Lung nodule", {"lobe": "right lower lobe", "size_mm": 20, "count": 1})


@pytest.mark.parametrize(("distance", "expected"), [(0, ["Lung nodule"]), (9, ["Lung nodule"]), (12, [])])
def test_maximum_counts_up_to_ten_millimetres_from_a_lesion(distance, expected):
    lesion = np.zeros((10, 10, 10), bool)
    lesion[2, 5, 5] = True
    scan = PhantomScan(np.zeros(lesion.shape, np.int16), (3, 3, 3), np.diag([-3.0, -3, 3, 1]), {}, {}, lesion * 0)
    scan.lesions["Lung nodule"] = lesion
    values = np.zeros((60, 10, 10), np.float32)  # the map may have another grid than the scan
    values[30 - 6 - distance, 5, 5] = 1
    affine = np.diag([1.0, -3, 3, 1])
    affine[0, 3] = -30
    assert pointed_at(nib.Nifti1Image(values, affine), scan) == expected


@pytest.mark.parametrize(
    ("sentence", "right"),
    [
        ("A nodule measuring 23 mm is observed in the right lower lobe.", True),
        ("A nodule measuring 26 mm is observed in the right lower lobe.", False),
        ("A nodule measuring 20 mm is observed in the right upper lobe.", False),
        ("Aeration of both lungs is normal.", False),
    ],
)
def test_report_is_right_with_lobe_and_size(sentence, right):
    assert check(f"Lung: {sentence}", [NODULE], ["Lung nodule"]) == ["Lung nodule"] * right
    assert check(f"Lung: {sentence}", [NODULE], ["Hiatal hernia"]) == []
