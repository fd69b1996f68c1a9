# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Check that a checkpoint with any base LLM and adapter is saved and loaded without loss, or refused."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel

from diffvp.configuration_diffvp import DiffVPConfig
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.storage_diffvp import DiffVPCheckpointError

TRIPS = ("saved", "saved again", "adapter alone", "merged", "exported", "exported with a new adapter")
AFTER = {"saved again": "saved", "adapter alone": "saved", "exported with a new adapter": "exported"}


@torch.no_grad()
def logits(model: DiffVPForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits of a model in float32."""
    return model.eval()(**inputs).logits.float()


def batch_against_alone(model: DiffVPForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a logit between a batch, with prompts of several lengths, and single rows."""
    together, count = logits(model, inputs), inputs["ct"].shape[0]
    alone = [logits(model, {name: value[row : row + 1] for name, value in inputs.items()}) for row in range(count)]
    return float((together - torch.cat(alone)).abs().max())


@torch.no_grad()
def move_adapter(model: DiffVPForConditionalGeneration, seed: int, scale: float = 0.1) -> None:
    """Change the trainable weights of the LLM, because a fresh adapter has no effect."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.language_model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)


def round_trip(
    model: DiffVPForConditionalGeneration, inputs: dict[str, torch.Tensor], folder: Path, new_adapter: LoraConfig
) -> dict[str, float | str]:
    """
    Save, load, save again, merge and export a model with an adapter. The model itself does not change.

    "adapter alone" loads the folder `adapter/` with PEFT onto the LLM of the checkpoint.

    Args:
        inputs: arguments of `forward`.
        folder: folder for the checkpoints, which are not deleted.
        new_adapter: adapter added to the exported model before it is saved.

    Returns:
        For each of `TRIPS` the largest difference of a logit from the original model, or the message of the refusal.
    """
    load = DiffVPForConditionalGeneration.from_pretrained
    expected = logits(model, inputs)

    def difference(other: DiffVPForConditionalGeneration, before: torch.Tensor = expected) -> float:
        return float((logits(other, inputs) - before).abs().max())

    def saved() -> float:
        model.save_pretrained(folder / "saved")
        return difference(load(folder / "saved"))

    def saved_again() -> float:
        load(folder / "saved").save_pretrained(folder / "again")
        return difference(load(folder / "again"))

    def adapter_alone() -> float:
        config = DiffVPConfig.from_pretrained(folder / "saved")
        config.has_adapter = False
        bare = load(folder / "saved", config=config)
        if difference(bare) < 1e-3:
            raise AssertionError("The adapter has no effect, so its loss would not be noticed.")
        PeftModel.from_pretrained(bare.language_model, folder / "saved" / "adapter")  # in place
        return difference(bare)

    def merged() -> float:
        other = copy.deepcopy(model)
        other.merge_adapter()
        return difference(other)

    def exported() -> float:
        model.export_merged(folder / "exported")
        return difference(load(folder / "exported"))

    def exported_with_a_new_adapter() -> float:
        other = load(folder / "exported")
        other.language_model.add_adapter(copy.deepcopy(new_adapter))
        move_adapter(other, seed=1)
        before = logits(other, inputs)
        other.save_pretrained(folder / "adapted")
        return difference(load(folder / "adapted"), before)

    trips = (saved, saved_again, adapter_alone, merged, exported, exported_with_a_new_adapter)
    result: dict[str, float | str] = {}
    for name, trip in zip(TRIPS, trips, strict=True):
        if isinstance(refusal := result.get(AFTER.get(name)), str):
            result[name] = refusal
            continue
        try:
            result[name] = trip()
        except DiffVPCheckpointError as error:
            result[name] = str(error)
    unchanged = difference(model)
    if unchanged:
        raise AssertionError(f"The logits of the model itself changed by {unchanged:.2g} (expected 0).")
    return result
