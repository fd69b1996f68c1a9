# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a tiny model and scans for it, shared by the tests of batches."""

import copy

import nibabel as nib
import numpy as np
import torch


def write_box(path, seed: int) -> None:
    """Write a box of noisy tissue with two lungs, in air."""
    voxels = np.full((24, 24, 20), -1000, np.int16)
    voxels[4:-4, 4:-4, 2:-2] = np.random.default_rng(seed).integers(-100, 100, (16, 16, 16))
    voxels[6:11, 7:17, 4:16] = voxels[13:18, 7:17, 4:16] = -850
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([-9.0, -9.0, 9.0, 1.0])), path)


def write_cohort(folder, count: int) -> list[str]:
    """Write `count` boxes and two broken files, and return all names."""
    names = [f"ward {seed % 3}/scan_{seed}.nii.gz" for seed in range(count)]
    for seed, name in enumerate(names):
        write_box(folder / name, seed)
    (folder / "ward 0" / "broken.nii.gz").write_bytes(b"no scan")
    whole = (folder / names[0]).read_bytes()
    (folder / "ward 1" / "half.nii.gz").write_bytes(whole[: len(whole) // 2])
    return [*names, "ward 0/broken.nii.gz", "ward 1/half.nii.gz"]


def write_checkpoint(folder, base, tokenizer, tiny_fields: dict, **changes):
    """Save a tiny model with LoRA and a pool of three boxes."""
    from peft import LoraConfig

    from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
    from diffvp.processing_diffvp import DiffVPImageProcessor, DiffVPProcessor
    from diffvp.references_diffvp import index_references

    image_processor = DiffVPImageProcessor(size=(32, 32, 32), target_spacing=(9.0, 11.0, 11.0), foreground_hu=-500.0)
    processor = DiffVPProcessor(image_processor, copy.deepcopy(tokenizer))
    torch.manual_seed(0)
    fields = {
        "diagnosis_prompt_ids": processor.diagnosis_prompt_ids(processor.tokenizer),
        "instruction_ids": processor(text=processor.instruction)["input_ids"][0].tolist(),
        "initializer_range": 0.2,
    }
    model = DiffVPForConditionalGeneration.from_base(
        str(base),
        lora_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False),
        config={**tiny_fields, **fields, **changes},
    )
    model.generation_config.update(max_new_tokens=9)
    for seed in (101, 102, 103):
        write_box(folder.parent / "pool" / f"normal_{seed}.nii.gz", seed)
    index_references(folder.parent / "pool")
    processor.load_references(folder.parent / "pool")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def read_lines(path) -> list[dict]:
    import json

    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
