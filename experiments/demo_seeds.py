# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Check the reports that `diffvp demo` has written for several seeds against the phantoms' true lesions.

    for seed in 0 1 2 3 4 5 6 7 8 9; do diffvp demo --seed $seed --output outputs/demos/$seed; done
    python -m diffvp.experiments.demo_seeds outputs/demos experiments/results/demo_seeds.md
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine

from ..data.lesions import size_mm, true_place
from ..data.phantom import Finding, PhantomScan, render_patient, sample_patient
from ..files import write_texts
from ..metrics.markdown import table_lines
from .lesion_scores import place_is_right, sentences_about, size_is_right
from .map_scores import TOLERANCE_MM


def pointed_at(map_image: nib.Nifti1Image, scan: PhantomScan) -> list[str]:
    """Return the labels of the lesions within 10 mm of the maximum of a difference map, the nearest first."""
    values = np.asarray(map_image.dataobj)
    peak = apply_affine(map_image.affine, np.unravel_index(values.argmax(), values.shape))
    distances = {}
    for label, mask in scan.lesions.items():
        if mask.any():
            places = apply_affine(scan.affine, np.argwhere(mask))
            distances[label] = float(np.linalg.norm(places - peak, axis=1).min())
    return [label for label in sorted(distances, key=distances.get) if distances[label] <= TOLERANCE_MM]


def check(report: str, findings: Sequence[Finding], pointed: Sequence[str]) -> list[str]:
    """Return the pointed-at labels whose finding the report names, with the right place and size if it has one."""
    right = []
    for finding in findings:
        sentences = sentences_about(report, finding.label)
        if finding.label not in pointed or not sentences:
            continue
        if true_place(finding) and not place_is_right(finding, sentences):
            continue
        if size_mm(finding) is None or size_is_right(finding, sentences):
            right.append(finding.label)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demos", type=Path, help="folder with a demo in a folder for each seed")
    parser.add_argument("page", type=Path, help="Markdown page to write")
    options = parser.parse_args()
    rows, good = [], 0
    seeds = sorted(int(path.name) for path in options.demos.iterdir() if path.name.isdigit())
    for seed in seeds:
        patient = sample_patient(seed, 0, "demo")
        folder = options.demos / str(seed) / "report"
        pointed = pointed_at(nib.load(folder / "difference_map.nii.gz"), render_patient(patient))
        right = check((folder / "report.txt").read_text(encoding="utf-8"), patient.findings, pointed)
        good += bool(right)
        findings = ", ".join(finding.label for finding in patient.findings) or "none"
        rows.append([str(seed), findings, ", ".join(pointed) or "none", ", ".join(right) or "none"])
    lines = [
        "# Demo patients", "",
        "`python -m diffvp.experiments.demo_seeds` on the output of `diffvp demo`. In "
        f"{good} of {len(seeds)} patients, the maximum of the map lies within {TOLERANCE_MM:g} mm of a lesion that "
        "the report names with the right lobes or side and the size within a quarter, if the finding has them.", "",
        *table_lines(["seed", "findings", "maximum of the map on", "of these, right in the report"], rows), "",
    ]  # fmt: skip
    write_texts(options.page.parent, {options.page.name: "\n".join(lines)})


if __name__ == "__main__":
    main()
