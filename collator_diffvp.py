# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
From cases to training batches of [`DiffVPForConditionalGeneration`]: for `transformers.Trainer`, for the project's own
loop, and for any other.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import Dataset

from .references_diffvp import ReferencePool

# Few lengths of batches: tensor cores want multiples of 8, and oneDNN keeps a compiled product for each shape it has
# seen (with every length its own, a process grew by gigabytes an hour).
PAD_MULTIPLE = 16
FROZEN = ("ct_features", "reference_features", "diagnosis_logits")  # what `model.encode_inputs` gives


def rank_references(case: str, pool: Sequence[str], seed: int, epoch: int) -> list[str]:
    """
    The pool's names in the random order of a case in an epoch: a function of (seed, epoch, case) alone, so that it
    depends neither on the order of the data or the pool, nor on the batch, nor on the number of workers or processes.
    A case is never its own reference.

    Raises:
        ValueError: the pool holds nothing but the case itself.
    """
    candidates = [name for name in pool if name != case]
    if not candidates:
        raise ValueError(f"No reference for {case}: the pool holds {len(pool)} case(s), none of them another.")
    return sorted(candidates, key=lambda name: hashlib.sha256(f"{seed}:{epoch}:{case}:{name}".encode()).digest())


def pair_reference(case: str, pool: Sequence[str], seed: int, epoch: int) -> str:
    """The reference of a case in an epoch, the first of [`rank_references`]: uniform over the pool."""
    return rank_references(case, pool, seed, epoch)[0]


class DiffVPDataset(Dataset):
    """
    Cases that know the epoch, in which each gets another reference.

    `Trainer` tells it through `set_epoch`.

    Args:
        cases: what [`DiffVPDataCollator`] takes: a list of dicts, or a dataset of `datasets`.
    """

    def __init__(self, cases: Sequence[Mapping]):
        self.cases, self.told = cases, False
        self.epoch = torch.tensor(0).share_memory_()  # seen by workers that outlive an epoch

    def set_epoch(self, epoch: int) -> None:
        self.told = True
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict:
        """
        Raises:
            RuntimeError: nobody tells the epoch: all epochs would have the same references.
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1 and not self.told:
            raise RuntimeError(
                "With several processes accelerate tells the epoch to its sampler instead of the dataset: all epochs "
                "would have the same references. Set "
                "TrainingArguments(accelerator_config={'use_seedable_sampler': False}), or call set_epoch yourself."
            )
        return {**self.cases[index], "epoch": int(self.epoch)}


class DiffVPDataCollator:
    """
    Cases to a batch: scans and references read, reports encoded with their end token, padding on the right, labels of
    -100 on everything but the report.

    A case is a dict of

    - `report`: text, or token ids with the end token;
    - `ct`: whatever the processor reads, or a tensor (1, depth, height, width) that it has made; or instead of both
      scans what `model.encode_inputs` gives of them (`ct_features`, `reference_features`, `diagnosis_logits`), without
      the batch's axis;
    - `reference`, of the same kinds: by default one of `references`;
    - `diagnosis_labels` (*optional*): 0 or 1 of each finding, for the auxiliary loss;
    - `text` (*optional*): another instruction than the processor's;
    - `id` (*optional*): on which, with the seed and the `epoch` that [`DiffVPDataset`] adds, the drawn reference
      depends; by default the name of the scan's file.

    Other entries are passed over. `Trainer` needs `remove_unused_columns=False`, or it takes away what `forward` does
    not name before the collator has seen it.

    Args:
        processor ([`DiffVPProcessor`]): of the model.
        references: normal scans by their ids, of whatever kinds `ct` may be; by default the pool of the processor.
        seed: of the drawing of references.
        max_report_tokens: longest report with its end token; `None` has no limit.
        truncate_reports: cut longer ones, instead of raising an error: a cut report teaches to stop early.
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
        Returns:
            `ct` and `reference` (batch, 1, depth, height, width), or the frozen tensors instead; `input_ids`,
            `attention_mask` and `labels` (batch, length), the length a multiple of 16; `diagnosis_labels`
            (batch, labels), float.

        Raises:
            ValueError: a case lacks its report or its scan, or some cases have labels and others do not.
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
        """All of a case but its text."""
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
        """A scan as the model takes it, and the digest of its content where it is read here."""
        if isinstance(scan, torch.Tensor) and scan.ndim == 4:
            return scan, None
        features = self.processor.image_processor(scan, digest=True, return_tensors="pt")
        return features["ct"][0], features["geometry"][0].sha256

    def _reference(self, case: dict, content: str | None) -> torch.Tensor | None:
        """The case's own reference or a drawn one; `None` without a pool, for models that compare with nothing."""
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
            raise ValueError("A case has no `id`, by which its reference is drawn.")
        ranked = rank_references(str(name), list(references), self.seed, int(case.get("epoch", 0)))

        def load(entry: dict[str, str]) -> tuple[str | None, torch.Tensor]:
            scan = references[entry["id"]]
            volume, digest = self._volume(scan if self.references is not None else pool.fetch(scan))
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
                f"A case has no `report`, but {', '.join(sorted(case)) or 'nothing'}. Trainer takes it away "
                "unless remove_unused_columns=False."
            )
        if isinstance(report, str):
            return self.processor.encode_report(report, self.max_report_tokens, self.truncate_reports)
        return list(report)


__all__ = ["DiffVPDataCollator", "DiffVPDataset", "pair_reference", "rank_references"]
