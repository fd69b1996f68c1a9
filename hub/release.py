# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Turn the result of phantom training into the shipped checkpoint: small files, a pool of normal references, card,
licence and notice.

    python -m diffvp.hub.release runs/phantom/model checkpoints/diffvp-phantom
"""

import argparse
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ..checkpoint_diffvp import BASE_PREFIX
from ..data.phantom import render_patient, sample_patient
from ..files import write_folder
from ..inference.report import load_checkpoint
from ..references_diffvp import index_references
from .card import write_card, write_endpoint, write_licence

POOL_SEED = 0
POOL_SPLIT = "reference"  # a stream of patients that is separate from train and valid
POOL_SIZE = 4
POOL_THICKNESS = 4.0  # mm: thin slices would make the pool larger than the model


def write_pool(folder: Path) -> None:
    """Write normal phantoms as NIfTI files, with their index."""
    folder.mkdir(parents=True)
    index = kept = 0
    while kept < POOL_SIZE:
        patient = sample_patient(POOL_SEED, index, POOL_SPLIT)
        index += 1
        if patient.findings or patient.slice_mm < POOL_THICKNESS:
            continue
        scan = render_patient(patient)
        # The encoder clips values below -1000 and above 1200 HU anyway, and constant regions compress well.
        image = nib.Nifti1Image(np.clip(scan.hu, -1000, 1200), scan.affine)
        image.header.set_xyzt_units("mm")
        image.to_filename(folder / f"normal_{kept + 1}.nii.gz")
        kept += 1
    index_references(folder)


def release(source: str | os.PathLike, target: str | os.PathLike) -> Path:
    """Write the release form of the checkpoint `source` to `target`. An earlier release there is replaced.

    Raises:
        ValueError: `target` exists and is not a checkpoint.
    """
    target = Path(target)
    if target.exists() and not (target / "config.json").is_file():
        raise ValueError(f"{target} is not a checkpoint folder: it would be lost.")
    model, processor = load_checkpoint(str(source))
    # Matrices in bfloat16 halve the download. Norms, biases and buffers (variances, whitening) stay in float32: they
    # are small, and buffers suffer most from rounding.
    trained = dict(model.named_parameters())
    state = {
        name: value.bfloat16() if name in trained and value.is_floating_point() and value.ndim > 1 else value
        for name, value in model.state_dict().items()
        if not name.startswith(BASE_PREFIX) or "lora_" in name
    }

    def write(folder: Path) -> None:
        write_pool(folder / "references")
        model.save_pretrained(folder, state_dict=state)
        processor.load_references(folder / "references")
        processor.save_pretrained(folder)
        write_licence(folder)
        write_endpoint(folder)
        write_card(folder)  # without numbers; `hub.card` adds them when these weights are evaluated

    write_folder(target, write)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder written by training")
    parser.add_argument("target", help="folder of the released checkpoint")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    release(arguments.source, arguments.target)
