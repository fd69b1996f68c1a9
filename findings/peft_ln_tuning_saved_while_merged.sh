#!/usr/bin/env bash
# peft 0.21.2: an LN-tuning adapter saved while merged contains the norms of the base model, not the tuned ones.
#
# merge_adapter() merges an adapter into the base weights for fast inference and keeps the adapter. A LoRA adapter
# saved in that state is complete. The weights of LN tuning replace those of the base, so its merge swaps the tuned norm
# and the base's norm. It does not swap the names under which they are saved.
#
# Expected: merge_adapter(), save_pretrained(), PeftModel.from_pretrained() return the tuned model, as with LoRA.
# Seen: for LoRA they do (difference 0). For LN tuning the reloaded model equals the *untuned* base bit for bit. The
#   trained weights are lost without a warning.
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
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
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
from_tuned, from_base = {}, {}
for config in (LoraConfig(target_modules=["q_proj"]), LNTuningConfig(target_modules=["input_layernorm"])):
    name = type(config).__name__
    tuned = get_peft_model(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))  # stands for training
        expected = tuned(tokens).logits
        tuned.merge_adapter()
        merged = (tuned(tokens).logits - expected).abs().max().item()
        tuned.save_pretrained(name)
        reloaded = PeftModel.from_pretrained(copy.deepcopy(base), name).eval()(tokens).logits
        from_tuned[name] = (reloaded - expected).abs().max().item()
        from_base[name] = (reloaded - base(tokens).logits).abs().max().item()
    print(f"{name}: merged and tuned differ by {merged:.1e}")
    print(f"  reloaded and tuned by {from_tuned[name]:.3f}, reloaded and base by {from_base[name]:.3f}")
same = from_tuned["LoraConfig"] < 1e-4 < 1e-2 < from_base["LoraConfig"]
same = same and from_base["LNTuningConfig"] == 0 and from_tuned["LNTuningConfig"] > 1e-2
sys.exit(0 if same else "the behaviour has changed")
PY
