#!/usr/bin/env bash
# transformers 5.23.0: RwkvForCausalLM accepts an attention_mask and ignores it.
#
# Tokenizers return attention_mask, generate() requires it for batches of unequal length, and RWKV's forward has a
# parameter of that name. A recurrent model needs it: without attention to skip padding, every padding token in front
# of a prompt changes the state.
#
# Expected: the last logits of a left-padded row equal those of the same row alone (as in Mamba, whose layers use the
#   mask), or an error or a warning that masks are not supported.
# Seen: the logits equal those without a mask bit for bit. Their error is larger than the logits' own standard
#   deviation, so batched generation answers another prompt. No warning.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

torch.manual_seed(0)
tokens = torch.randint(3, 64, (1, 6))
padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), tokens], dim=1)
mask = torch.tensor([[0] * 4 + [1] * 6])
models = {
    "rwkv": RwkvForCausalLM(
        RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, context_length=64)
    ),
    "mamba": MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=2)),
}
error, use = {}, {}
for name, model in models.items():
    model.eval()
    with torch.no_grad():
        alone = model(tokens).logits[0, -1]
        masked = model(padded, attention_mask=mask).logits[0, -1]
        unmasked = model(padded).logits[0, -1]
    error[name] = ((alone - masked).abs().max() / alone.std()).item()
    use[name] = (masked - unmasked).abs().max().item()
    print(
        f"{name}: padded and alone differ by {error[name]:.2g} standard deviations; the mask changes {use[name]:.2g}"
    )
same = error["rwkv"] > 0.5 and use["rwkv"] == 0 and error["mamba"] < 1e-3 and use["mamba"] > 0
sys.exit(0 if same else "the behaviour has changed")
PY
