#!/usr/bin/env bash
# transformers 5.23.0: from_pretrained() of a folder without config.json silently uses the class's default config.
#
# Expected: GPT2LMHeadModel.from_pretrained(folder) and GPT2Config.from_pretrained(folder) raise if the folder has no
#   config.json. AutoConfig does, and so does GPT2Config for a folder that does not exist.
# Seen: GPT2Config returns the defaults. If the weights have the default sizes, as in any model fine-tuned from the
#   base model, the model loads without a warning: here a GPT-2 with the activation "relu" is loaded with "gelu_new",
#   and its logits differ although every weight is correct.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'PY'
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(activation_function="relu")).eval()
model.save_pretrained("folder")
Path("folder/config.json").unlink()
raised = {}
for name, read in {
    "AutoConfig, folder without config.json": lambda: AutoConfig.from_pretrained("folder"),
    "GPT2Config, no such folder": lambda: GPT2Config.from_pretrained("./nowhere"),
    "GPT2Config, folder without config.json": lambda: GPT2Config.from_pretrained("folder"),
}.items():
    try:
        read()
        raised[name] = None
    except (OSError, ValueError) as error:
        raised[name] = type(error).__name__
    print(f"{name}: {raised[name] or 'read'}")
try:
    loaded = GPT2LMHeadModel.from_pretrained("folder").eval()
except (OSError, ValueError) as error:
    sys.exit(f"the behaviour has changed: {error}")
tokens = torch.arange(8)[None]
with torch.no_grad():
    error = (loaded(tokens).logits - model(tokens).logits).abs().max().item()
equal = all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
print(f"all weights equal: {equal}; activation {loaded.config.activation_function}; logits off by {error:.2f}")
same = list(map(bool, raised.values())) == [True, True, False] and equal and error > 0.1
sys.exit(0 if same else "the behaviour has changed")
PY
