#!/usr/bin/env bash
# transformers 5.23.0: generate(streamer=..., custom_generate=FUNCTION) neither streams nor ends the stream.
#
# `custom_generate` takes a function that replaces the decoding loop. generate() collects the streamer, the tokenizer and
# `synced_gpus` for the loop. When it then looks for arguments that only the given function has, it replaces that
# collection instead of adding to it. The documentation of these arguments names no such limit.
#
# Expected: a function that calls transformers' own greedy loop with all that it is given streams as that loop does.
# Seen: the tokens are equal. The streamer gets the prompt, which generate() itself puts, and nothing else; its end() is
#   never called. `synced_gpus`, which keeps the ranks of a sharded model in step, does not arrive either.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$dir"
HF_HUB_OFFLINE=1 "$dir/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer


class Recorder(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def same_loop(model, *arguments, **options):
    arrived.update(options)
    return model._sample(*arguments, **options)


torch.manual_seed(0)
sizes = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
prompt = torch.randint(3, 64, (1, 5))
written, streamed, arrived = [], [], {}
for loop in (None, same_loop):
    recorder = Recorder()
    options = {"max_new_tokens": 4, "do_sample": False, "streamer": recorder, "synced_gpus": False}
    written.append(model.generate(prompt, custom_generate=loop, **options))
    streamed.append((len(recorder.tokens), recorder.ended))
    print(f"custom_generate={loop and loop.__name__}: {written[-1].shape[1]} tokens returned, "
          f"{len(recorder.tokens)} streamed, end() called: {recorder.ended}")
missing = sorted({"streamer", "synced_gpus"} - set(arrived))
print("asked for, and not among the function's arguments:", *missing)
same = torch.equal(*written) and streamed == [(9, True), (5, False)] and len(missing) == 2
sys.exit(0 if same else "the behaviour has changed")
PY
