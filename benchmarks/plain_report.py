# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Write the first token of a report, with this package or with a plain script of MONAI, peft and transformers.
`benchmarks/generation.py` times both as processes.

    python benchmarks/plain_report.py diffvp|plain CHECKPOINT TARGET REFERENCE

The plain script does the same work: it preprocesses two scans, encodes them, encodes the target again for the
classifier, loads the LLM with its adapter, and generates one token from a prompt with the length of the checkpoint's.
"""

import json
import sys
from pathlib import Path


def diffvp(checkpoint: str, target: str, reference: str) -> None:
    from diffvp.inference.report import load_checkpoint

    model, processor = load_checkpoint(checkpoint)
    inputs = processor(ct=target, reference=reference)
    model.generate(**inputs, do_sample=False, max_new_tokens=1)


def plain(checkpoint: str, target: str, reference: str) -> None:
    import torch
    from monai.networks.nets import ResNet
    from monai.transforms import (
        Compose,
        CropForeground,
        EnsureChannelFirst,
        LoadImage,
        Orientation,
        Resize,
        ScaleIntensityRange,
        Spacing,
    )
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from diffvp.bases_diffvp import locate_base_model

    folder = Path(checkpoint)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    preprocessing = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    size = preprocessing["size"]
    chain = Compose([
        LoadImage(image_only=True), EnsureChannelFirst(), Orientation("LPS", labels=None),
        Spacing(preprocessing["target_spacing"][::-1], mode="bilinear"),
        ScaleIntensityRange(*preprocessing["hu_window"], -1, 1, clip=True),
        CropForeground(select_fn=lambda x: x > -1, allow_smaller=False),
        Resize((size["width"], size["height"], size["depth"]), mode="trilinear"),
    ])  # fmt: skip
    encoder = ResNet(
        "basic", [2, 2, 2, 2], config["encoder_block_channels"], conv1_t_stride=config["encoder_stride"],
        no_max_pool=not config["encoder_max_pool"], shortcut_type=config["encoder_shortcut_type"], n_input_channels=1,
        spatial_dims=3, num_classes=18,
    ).eval()  # fmt: skip
    base = (config[f"base_model_{key}"] for key in ("name_or_path", "revision", "gguf_file"))
    path, file = locate_base_model(*base)
    llm = AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path, gguf_file=file)
    llm = PeftModel.from_pretrained(llm, folder / "adapter").eval()
    with torch.no_grad():
        volumes = [chain(scan).as_tensor().permute(0, 3, 2, 1)[None] for scan in (target, reference)]
        for volume in (*volumes, volumes[0]):
            encoder(volume)
        text = llm.get_input_embeddings()(tokenizer(config["instruction"], return_tensors="pt").input_ids)
        prompt = torch.zeros(1, config["num_prefix_tokens"] + config["num_latents"] + 32, text.shape[-1])
        llm.generate(inputs_embeds=torch.cat([prompt, text], 1), do_sample=False, max_new_tokens=1)


if __name__ == "__main__":
    {"diffvp": diffvp, "plain": plain}[sys.argv[1]](*sys.argv[2:])
