#!/usr/bin/env bash
# accelerate 1.15.0: set_epoch() of a dataset is called with one process, but not with two.
#
# A prepared DataLoader has set_epoch(), which passes the epoch to samplers and to a dataset with a set_epoch() of its
# own (for example, to choose augmentations or negatives). It calls the dataset only if it finds no sampler two levels
# down. With several processes it finds one, because the batch sampler is wrapped to divide the batches.
#
# Expected: after set_epoch(2) each process's dataset knows epoch 2, for any number of processes and any sampler.
# Seen, with use_seedable_sampler=True (the default of the transformers Trainer) and shuffle=True:
#   1 process: 2.   2 processes: never called.   2 processes without the seedable sampler: 2.
#   Augmentations that vary by epoch on one device stay those of the first epoch on two. No warning.
#
# Exits 1 once that changes.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 accelerate==1.15.0
cd "$dir"
cat > epochs.py <<'PY'
import sys
from pathlib import Path

from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader, Dataset


class Numbers(Dataset):
    epoch = "never told"

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return index

    def set_epoch(self, epoch):
        self.epoch = epoch


seedable = sys.argv[1] == "seedable"
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
dataset = Numbers()
loader = accelerator.prepare(DataLoader(dataset, batch_size=2, shuffle=True))
for epoch in range(3):
    loader.set_epoch(epoch)
    list(loader)
line = f"{accelerator.num_processes} process(es), {sys.argv[1]} sampler: {dataset.epoch}"
Path(f"{accelerator.num_processes}-{sys.argv[1]}-{accelerator.process_index}.txt").write_text(line)
accelerator.end_training()
PY
for count in 1 2; do
  for sampler in seedable plain; do
    "$dir/venv/bin/torchrun" --standalone --nproc-per-node "$count" epochs.py "$sampler"
    cat "$count-$sampler-0.txt"
    echo
  done
done
if ! { grep -q ': 2$' 1-seedable-0.txt && grep -q ': 2$' 1-plain-0.txt && grep -q ': 2$' 2-plain-0.txt &&
  grep -q ': never told$' 2-seedable-0.txt && grep -q ': never told$' 2-seedable-1.txt; }; then
  echo "the behaviour has changed" >&2
  exit 1
fi
