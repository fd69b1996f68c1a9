# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
Collate cases into training batches of [`DiffVPForConditionalGeneration`], and draw their references.

Works with `transformers.Trainer`, the project's own training loop, or any other.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .references_diffvp import ReferencePool

# Keeps the number of batch lengths small: tensor cores need multiples of 8, and oneDNN keeps a compiled product for
# each shape it has seen (without padding to multiples, a process grew by gigabytes an hour).
PAD_MULTIPLE = 16
FROZEN = ("ct_features", "reference_features", "diagnosis_logits")  # outputs of `model.encode_inputs`


def rank_references(case: str, pool: Sequence[str], seed: int, epoch: int) -> list[str]:
    """
    Rank the names of a pool in a random order for a case in an epoch.

    The order depends only on the seed, the epoch, the case and the names. It is independent of the order of the data
    and the pool, of the batch, and of the number of workers and processes. A case is never its own reference.

    Raises:
        ValueError: the pool holds no case other than `case`.
    """
    candidates = [name for name in pool if name != case]
    if not candidates:
        raise ValueError(f"No reference for {case}: the pool holds {len(pool)} case(s), but no other case.")
    # Not `ReferencePool.choose`, which ranks by the digest of the scan: features from a cache have none, each epoch
    # draws anew, and a training that is repeated must draw the same.
    return sorted(candidates, key=lambda name: hashlib.sha256(f"{seed}:{epoch}:{case}:{name}".encode()).digest())


def pair_reference(case: str, pool: Sequence[str], seed: int, epoch: int) -> str:
    """Return the reference of a case in an epoch: the first of [`rank_references`], uniform over the pool."""
    return rank_references(case, pool, seed, epoch)[0]


class DiffVPDataset(Dataset):
    """
    Dataset that adds the epoch to each case, so that the reference changes from epoch to epoch.

    `Trainer` sets the epoch through `set_epoch`.

    Args:
        cases: cases as [`DiffVPDataCollator`] takes them: a list of dicts, or a dataset of `datasets`.
    """

    def __init__(self, cases: Sequence[Mapping]):
        self.cases, self.told = cases, False
        self.epoch = torch.tensor(0).share_memory_()  # seen by workers that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch from which references are drawn, also in running workers."""
        self.told = True
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict:
        """
        Return a case with its `epoch`.

        Raises:
            RuntimeError: several processes run and `set_epoch` was never called, so that all epochs would have the
                same references.
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1 and not self.told:
            raise RuntimeError(
                "With several processes, accelerate sets the epoch of its sampler instead of the dataset, so that all "
                "epochs would have the same references. Set "
                "TrainingArguments(accelerator_config={'use_seedable_sampler': False}), or call set_epoch yourself."
            )
        return {**self.cases[index], "epoch": int(self.epoch)}


class DiffVPDataCollator:
    """
    Collate cases into a batch.

    Scans and references are read, and reports are encoded with their end token. Padding is on the right, and the
    labels are -100 everywhere except on the report.

    A case is a dict with

    - `report`: text, or token ids with the end token;
    - `ct`: any input of the processor, or a tensor (1, depth, height, width) made by it. Instead of both scans, a case
      may have the outputs of `model.encode_inputs` (`ct_features`, `reference_features`, `diagnosis_logits`) without
      their batch axis;
    - `reference` (*optional*): of the same types as `ct`; by default drawn from `references`;
    - `diagnosis_labels` (*optional*): 0 or 1 for each finding, for the auxiliary loss;
    - `text` (*optional*): an instruction other than the processor's;
    - `id` (*optional*): determines the drawn reference, together with the seed and the `epoch` that [`DiffVPDataset`]
      adds; by default the file name of the scan.

    Other entries are ignored. `Trainer` needs `remove_unused_columns=False`: otherwise it removes entries that are no
    arguments of `forward` before they reach the collator.

    Args:
        processor ([`DiffVPProcessor`]): processor of the model.
        references: normal scans by id, of the same types as `ct`; by default the pool of the processor.
        seed: seed for drawing references.
        max_report_tokens: maximum length of a report with its end token; `None` for no limit.
        truncate_reports: truncate longer reports instead of raising an error. Truncated reports teach the model to
            stop early.
    """

    def __init__(
        self,
        processor,
        references: Mapping[str, object] | None = None,
        *,
        seed: int = 0,
        max_report_tokens: int | None = None,
        truncate_reports: bool = False,
    ):
        self.processor, self.references, self.seed = processor, references, seed
        self.max_report_tokens, self.truncate_reports = max_report_tokens, truncate_reports
        self._prompts: dict[str, list[int]] = {}

    def __call__(self, cases: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """
        Collate cases into a batch.

        Returns:
            `ct` and `reference` (batch, 1, depth, height, width), or the outputs of `model.encode_inputs` instead;
            `input_ids`, `attention_mask` and `labels` (batch, length), with a length that is a multiple of 16;
            `diagnosis_labels` (batch, labels), float.

        Raises:
            ValueError: a case has no report or no scan, or only some cases have an optional entry.
            CTInputError: a scan cannot be read.
        """
        cases = [dict(case) for case in cases]
        tensors = [self._tensors(case) for case in cases]
        names = {name for one in tensors for name in one}
        lacking = sorted(name for name in names if not all(name in one for one in tensors))
        if lacking:
            raise ValueError(
                f"Some cases of a batch have {', '.join(lacking)} and others do not; expected all or none."
            )
        batch = {name: torch.stack([one[name] for one in tensors]) for name in tensors[0]}
        return batch | self._text(cases)

    def _tensors(self, case: dict) -> dict[str, torch.Tensor]:
        """Return all inputs of a case except its text."""
        tensors = {name: torch.as_tensor(case[name]) for name in FROZEN if case.get(name) is not None}
        if case.get("ct") is not None:
            tensors["ct"], content = self._volume(case["ct"])
            reference = self._reference(case, content)
            if reference is not None:
                tensors["reference"] = reference
        elif "ct_features" not in tensors:
            raise ValueError(f"A case has no `ct` and no `ct_features`, but {', '.join(sorted(case)) or 'nothing'}.")
        if case.get("diagnosis_labels") is not None:
            tensors["diagnosis_labels"] = torch.as_tensor(case["diagnosis_labels"]).float()
        return tensors

    def _volume(self, scan) -> tuple[torch.Tensor, str | None]:
        """Return a scan as a tensor, and the digest of its content if it is read here."""
        if isinstance(scan, torch.Tensor) and scan.ndim == 4:
            return scan, None
        features = self.processor.image_processor(scan, digest=True, return_tensors="pt")
        return features["ct"][0], features["geometry"][0].sha256

    def _reference(self, case: dict, content: str | None) -> torch.Tensor | None:
        """Return the case's reference or draw one. `None` without a pool, for models without a reference."""
        if case.get("reference") is not None:
            return self._volume(case["reference"])[0]
        pool, references = self.processor.reference_pool, self.references
        if references is None:
            references = {} if pool is None else {entry["id"]: entry for entry in pool.entries}
        if not references:
            return None
        name = case.get("id")
        if name is None and isinstance(case["ct"], (str, Path)):
            name = Path(case["ct"]).name
        if name is None:
            raise ValueError("A case has no `id`, which is needed to draw its reference.")
        ranked = rank_references(str(name), list(references), self.seed, int(case.get("epoch", 0)))

        def load(entry: dict[str, str]) -> tuple[str | None, torch.Tensor]:
            scan = references[entry["id"]]
            if self.references is None and pool is not None:
                scan = pool.fetch(scan)
            volume, digest = self._volume(scan)
            return digest, volume

        return ReferencePool.first_other(({"id": drawn} for drawn in ranked), content, load, f"Case {name}")[1]

    def _text(self, cases: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [self._prompt(case.get("text")) for case in cases]
        reports = [self._report(case) for case in cases]
        longest = max(len(prompt) + len(report) for prompt, report in zip(prompts, reports, strict=True))
        length = math.ceil(longest / PAD_MULTIPLE) * PAD_MULTIPLE
        input_ids = torch.full((len(cases), length), self.processor.tokenizer.pad_token_id)
        attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
        for row, (prompt, report) in enumerate(zip(prompts, reports, strict=True)):
            end = len(prompt) + len(report)
            input_ids[row, :end] = torch.tensor(prompt + report)
            attention_mask[row, :end] = 1
            labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def _prompt(self, text: str | None) -> list[int]:
        text = self.processor.instruction if text is None else text
        if text not in self._prompts:
            self._prompts[text] = self.processor(text=text)["input_ids"][0].tolist()
        return self._prompts[text]

    def _report(self, case: dict) -> list[int]:
        report = case.get("report")
        if report is None:
            raise ValueError(
                f"A case has no `report`, but {', '.join(sorted(case)) or 'nothing'}. Trainer removes it "
                "unless remove_unused_columns=False."
            )
        if isinstance(report, str):
            return self.processor.encode_report(report, self.max_report_tokens, self.truncate_reports)
        return list(report)


__all__ = ["DiffVPDataCollator", "DiffVPDataset", "pair_reference", "rank_references"]
