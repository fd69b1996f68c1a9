#!/usr/bin/env bash
# transformers 5.23.0 with peft 0.21.2: model.load_adapter() reads a DoRA adapter without its magnitudes.
#
# DoRA learns a magnitude per output row in addition to the LoRA factors. PEFT saves it as `...lora_magnitude_vector`
# and restores the missing `.default.weight` on loading. load_adapter() of a transformers model renames the saved keys
# itself, to `...lora_magnitude_vector.default`, and finds no parameter of that name.
#
# Expected: load_adapter(folder) gives the logits of PeftModel.from_pretrained(base, folder), as it does for LoRA.
# Seen: equal for LoRA. For DoRA the saved magnitudes are replaced by others and the logits differ. The call returns
#   normally; the log lists the saved magnitudes as unexpected and those of the model as missing.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import copy
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
base = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
tokens = torch.randint(0, 64, (1, 9))
error = {}
for dora in (False, True):
    tuned = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, use_dora=dora, init_lora_weights=False)).eval()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))  # stands for training
        tuned.save_pretrained(f"dora-{dora}")
        expected = tuned(tokens).logits
        by_peft = PeftModel.from_pretrained(copy.deepcopy(base), f"dora-{dora}").eval()(tokens).logits
        loaded = copy.deepcopy(base)
        loaded.load_adapter(f"dora-{dora}")
        by_transformers = loaded.eval()(tokens).logits
    error[dora] = [(logits - expected).abs().max().item() for logits in (by_peft, by_transformers)]
    print(
        f"use_dora={dora}: logits off by {error[dora][0]:.3g} through PEFT, {error[dora][1]:.3g} through load_adapter"
    )
same = max(error[False] + error[True][:1]) < 1e-5 and error[True][1] > 0.01
sys.exit(0 if same else "the behaviour has changed")
PY
