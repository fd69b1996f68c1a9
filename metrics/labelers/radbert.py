# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
RadBERT, the text classifier of CT-CLIP, which is widely used to label chest CT reports.

It is a RoBERTa encoder with a linear layer of 18 outputs on the pooled first token. The weights are not part of this
project. They exist in two layouts, which give the same labels:

- On the Hub, `IAMJB/RadBERT-CT`, in the layout of transformers' RobertaForSequenceClassification (`roberta.*`,
  `classifier.dense.*`, `classifier.out_proj.*`). Load it with `RadBertLabeler.from_pretrained("IAMJB/RadBERT-CT")`, or
  from a folder with its files. Its `classifier.dense` is the encoder's pooler under another name.
- `RadBertClassifier.pth` of CT-CLIP's authors (`model.*`, `classifier.*`), a pickle. Convert it once to a folder of
  safetensors, configuration and tokenizer. It is read with `weights_only=True`:

      python -m diffvp.metrics.labelers.radbert RadBertClassifier.pth ENCODER radbert

  `ENCODER` is zzxslp/RadBERT-RoBERTa-4m: a folder with its config.json and tokenizer files, or its name on the Hub.

The label order, the sigmoid, the threshold (at least 0.5) and the truncation after 512 tokens are as published. The
end of a long report is therefore ignored; the number of truncated reports is logged, see also
[`RadBertLabeler.token_counts`]. Batches are padded to their longest report instead of 512 tokens, which gives the same
result because of the attention mask. The published code also passes `do_lower_case` to the tokenizer, an option that
RoBERTa's tokenizer does not have, so case is kept in both.
"""

import argparse
import logging
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, RobertaConfig, RobertaModel
from transformers.utils import cached_file

from ...files import write_folder
from ...labels_diffvp import DIAGNOSIS_LABELS
from ...storage_diffvp import file_sha256
from . import RadBertError

MAX_TOKENS = 512
THRESHOLD = 0.5
WEIGHTS_NAME = "model.safetensors"
# Buffer of older transformers versions with the numbers 0, 1, 2, ...; current versions do not store it.
POSITION_IDS = "model.embeddings.position_ids"
# Prefixes of RobertaForSequenceClassification, mapped to those of the published checkpoint.
HUB_NAMES = {"roberta.": "model.", "classifier.dense.": "model.pooler.dense.", "classifier.out_proj.": "classifier."}
SHOWN_NAMES = 5

logger = logging.getLogger(__name__)


class RadBertClassifier(nn.Module):
    """Network of RadBERT, with the weight names of the published checkpoint."""

    def __init__(self, config: RobertaConfig):
        super().__init__()
        self.model = RobertaModel(config)
        self.classifier = nn.Linear(config.hidden_size, len(DIAGNOSIS_LABELS))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, 18) in the order of `DIAGNOSIS_LABELS`; both arguments are (batch, tokens)."""
        return self.classifier(self.model(input_ids=input_ids, attention_mask=attention_mask).pooler_output)


class RadBertLabeler:
    """
    Labeler that finds the 18 labels in reports with RadBERT.

    Args:
        weights: digest of the weights for the signature.

    Attributes:
        signature: all that the labels depend on, including the digest of the weights.
    """

    def __init__(
        self,
        model: RadBertClassifier,
        tokenizer: PreTrainedTokenizerBase,
        device: str = "cpu",
        batch_size: int = 32,
        weights: str = "unnamed",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} (expected at least 1)")
        self.model = model.to(device).eval()
        self.tokenizer = tokenizer
        self.device = device
        self.batch_size = batch_size
        self.signature = (
            f"radbert|labels:{len(DIAGNOSIS_LABELS)}|threshold:{THRESHOLD:g}|cut:{MAX_TOKENS}|weights:{weights}"
        )

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, device: str = "cpu", batch_size: int = 32, revision: str | None = None
    ) -> "RadBertLabeler":
        """
        Load the classifier in either layout. Only safetensors are read.

        Args:
            source: id on the Hub, such as "IAMJB/RadBERT-CT", or a folder: a copy of such a repository, or the output
                of [`convert_radbert`].
            device: device of the model.
            batch_size: number of reports per batch.
            revision: commit of a repository on the Hub.

        Raises:
            RadBertError: a file is missing or damaged; a weight is missing, unexpected or of another shape; or the
                labels of the configuration are not the 18 in order. Unnamed labels ("LABEL_0", ...) are assumed to
                be in the published order.
        """
        config, tokenizer = _read_encoder(source, revision)
        names = [config.id2label[index] for index in sorted(config.id2label)]
        unnamed = [f"LABEL_{index}" for index in range(len(DIAGNOSIS_LABELS))]
        if names not in (list(DIAGNOSIS_LABELS), unnamed):
            raise RadBertError(f"{source}: its labels are {names}, expected the 18 in order")
        try:
            path = cached_file(str(source), WEIGHTS_NAME, revision=revision)
            state = _published_names(load_file(path))
        except (OSError, SafetensorError) as error:
            raise RadBertError(f"{WEIGHTS_NAME} of {source} cannot be read: {error}") from error
        model = RadBertClassifier(config)
        _check_state(state, model, WEIGHTS_NAME)
        model.load_state_dict(state)
        return cls(model, tokenizer, device, batch_size, weights=file_sha256(path)[:12])

    def token_counts(self, reports: Sequence[str]) -> NDArray[np.int64]:
        """Count the tokens of reports before truncation, with both special tokens: (reports,)."""
        _check_texts(reports)
        if not reports:
            return np.zeros(0, np.int64)
        ids = self.tokenizer(list(reports), truncation=False, return_attention_mask=False, verbose=False)["input_ids"]
        return np.array([len(one) for one in ids])

    @torch.inference_mode()
    def probabilities(self, reports: Sequence[str]) -> NDArray[np.float32]:
        """
        Return the sigmoid of the logits, (reports, 18). Log the number of truncated reports.

        Raises:
            TypeError: a report is not text.
        """
        counts = self.token_counts(reports)
        cut = int((counts > MAX_TOKENS).sum())
        if cut:
            logger.warning(
                "%d of %d reports have more than %d tokens: the rest of these reports is ignored.",
                cut,
                len(reports),
                MAX_TOKENS,
            )
        result = np.empty((len(reports), len(DIAGNOSIS_LABELS)), np.float32)
        # Batch reports of similar length, to reduce padding.
        order = np.argsort(counts, kind="stable")
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = self.tokenizer(
                [reports[index] for index in chosen],
                truncation=True,
                max_length=MAX_TOKENS,
                padding="longest",
                return_tensors="pt",
            ).to(self.device)
            logits = self.model(batch["input_ids"], batch["attention_mask"])
            result[chosen] = logits.float().sigmoid().cpu().numpy()
        return result

    def label_all(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """Return (reports, 18) of 0 and 1 in the order of `DIAGNOSIS_LABELS`; errors as in [`probabilities`]."""
        return (self.probabilities(reports) >= THRESHOLD).astype(np.int8)


def convert_radbert(source: str | os.PathLike, encoder: str | os.PathLike, target: str | os.PathLike) -> Path:
    """
    Write RadBERT's classifier as a folder of safetensors, configuration and tokenizer.

    Args:
        source: `RadBertClassifier.pth`, or a `pytorch_model.bin` in the Hub's layout.
        encoder: folder or Hub name with the encoder's config.json and tokenizer; its weights are not read.
        target: folder to write; it must not exist.

    Raises:
        RadBertError: `source` contains other objects than tensors, or other tensors than this network's; `encoder`
            does not match it; or `target` exists.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise RadBertError(f"{target} exists already: name a new folder")
    config, tokenizer = _read_encoder(encoder)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise RadBertError(f"{source.name} cannot be read as weights: {error}") from error
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise RadBertError(f"{source.name} holds no weights by name: expected model.* and classifier.*")
    state = {name: tensor.contiguous().clone() for name, tensor in _published_names(loaded).items()}
    with torch.device("meta"):
        _check_state(state, RadBertClassifier(config), source.name)
    config.architectures = [RadBertClassifier.__name__]
    config.id2label = dict(enumerate(DIAGNOSIS_LABELS))
    config.label2id = {label: index for index, label in enumerate(DIAGNOSIS_LABELS)}

    def write(folder: Path) -> None:
        save_file(state, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(target, write)
    return target


def _published_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename weights in the Hub's layout to the names of `RadBertClassifier.pth`."""
    if any(name.startswith("roberta.") for name in state):
        renamed = {}
        for name, tensor in state.items():
            prefix = next((prefix for prefix in HUB_NAMES if name.startswith(prefix)), "")
            # A weight of neither layout keeps its name, so that the error message shows it.
            new = HUB_NAMES.get(prefix, "") + name.removeprefix(prefix)
            if new in renamed:
                raise RadBertError(f"the weights have {new} in both layouts, expected one")
            renamed[new] = tensor
        state = renamed
    return {name: tensor for name, tensor in state.items() if name != POSITION_IDS}


def _read_encoder(
    source: str | os.PathLike, revision: str | None = None
) -> tuple[RobertaConfig, PreTrainedTokenizerBase]:
    """Load configuration and tokenizer, and check that they match."""
    try:
        config = AutoConfig.from_pretrained(str(source), revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision)
    except (OSError, ValueError) as error:
        raise RadBertError(f"{source} has no configuration and tokenizer of RadBERT's encoder: {error}") from error
    if not isinstance(config, RobertaConfig):
        raise RadBertError(f"{source} is of the type {config.model_type}, expected roberta")
    longest = config.max_position_embeddings - config.pad_token_id - 1  # RoBERTa counts positions from there
    if longest < MAX_TOKENS:
        raise RadBertError(f"{source}: supports at most {longest} tokens (expected {MAX_TOKENS})")
    if len(tokenizer) > config.vocab_size or tokenizer.pad_token_id != config.pad_token_id:
        raise RadBertError(
            f"{source}: the tokenizer has {len(tokenizer)} tokens and pads with {tokenizer.pad_token_id}, the "
            f"configuration says {config.vocab_size} and {config.pad_token_id}"
        )
    return config, tokenizer


def _check_state(state: Mapping[str, torch.Tensor], model: nn.Module, name: str) -> None:
    expected = model.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in sorted(state.keys() & expected.keys())
        if state[key].shape != expected[key].shape
    ]
    for problem, keys in (
        ("missing", sorted(expected.keys() - state.keys())),
        ("unexpected", sorted(state.keys() - expected.keys())),
        ("of another shape", shapes),
    ):
        if keys:
            more = ", ..." if len(keys) > SHOWN_NAMES else ""
            raise RadBertError(
                f"{name} is not RadBERT's classifier: {len(keys)} weight(s) {problem}: "
                f"{', '.join(keys[:SHOWN_NAMES])}{more}"
            )


def _check_texts(reports: Sequence[str]) -> None:
    for index, report in enumerate(reports):
        if not isinstance(report, str):
            raise TypeError(f"reports[{index}] is {type(report).__name__}: every report must be text")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="RadBertClassifier.pth")
    parser.add_argument("encoder", help="folder or Hub name of zzxslp/RadBERT-RoBERTa-4m")
    parser.add_argument("target", help="folder to write")
    arguments = parser.parse_args()
    convert_radbert(arguments.source, arguments.encoder, arguments.target)
