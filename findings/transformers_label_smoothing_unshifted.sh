#!/usr/bin/env bash
# transformers 5.23.0: Trainer with label_smoothing_factor > 0 trains most vision-language models to copy their input.
#
# Labels of a decoder are the input ids and have to be shifted by one. Without smoothing the model shifts them. With
# smoothing the Trainer does, but only for classes in its table of causal LMs. LLaVA, Qwen-VL, PaliGemma, Idefics and
# custom classes have decoders and are not in that table (88 of the 97 image-text-to-text entries; the few true
# encoder-decoders among them are correctly not shifted).
#
# Expected: a LLaVA that is trained to count (3 4 5 6 ...) counts, with smoothing 0.1 as without.
# Seen: without smoothing it continues 3 4 5 -> 6 7 8. With 0.1 the loss falls as well, but the model continues
#   3 4 5 -> 5 5 5: at each position it has learned its input token. No error, no warning.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, Trainer, TrainingArguments

width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
text = {"model_type": "llama", "vocab_size": 16, **width}
vision = {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, **width}
rows = [(torch.arange(8) + start) % 10 for start in range(10)]
rows = [{"input_ids": row, "labels": row} for row in rows]
prompt = torch.tensor([[3, 4, 5]])
said = {}
for smoothing in (0.0, 0.1):
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=15))
    arguments = TrainingArguments(
        output_dir="out",
        max_steps=60,
        per_device_train_batch_size=10,
        learning_rate=1e-2,
        label_smoothing_factor=smoothing,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=rows).train()
    model.eval()
    said[smoothing] = model.generate(prompt, max_new_tokens=3, do_sample=False)[0, 3:].tolist()
    print(f"label_smoothing_factor={smoothing}: 3 4 5 -> {said[smoothing]}")
sys.exit(0 if said == {0.0: [6, 7, 8], 0.1: [5, 5, 5]} else "the behaviour has changed")
PY
