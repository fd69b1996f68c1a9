# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Losses of a run: they are summed, choose the epoch, and end the run if they are not finite."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffvp.data.cases import Case, DatasetError
from diffvp.modeling_diffvp import DiffVPForConditionalGeneration
from diffvp.train_accelerate import run
from diffvp.training.checkpoints import Checkpoints
from diffvp.training.cohort import Cohort, check_stages_apart
from diffvp.training.config import TrainingConfig
from diffvp.training.loop import StageTrainer, TrainingDivergedError
from diffvp.training.report_stage import ReportBatches

from .processes import in_two_processes

REPORT = ["stage=report", "report.batch_size=4"]


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def test_too_high_learning_rate_ends_the_run_with_the_reason(stage_one, tmp_path):
    rates = ["report.learning_rate=1e30", "report.lora_learning_rate=1e29", "report.epochs=3"]
    with pytest.raises(TrainingDivergedError, match=r"Stage report, step 2: loss is nan.*9.33013e\+29, .*Lower the"):
        run(TrainingConfig.load(stage_one, [*REPORT, *rates]))
    losses = [line["loss"] for line in read_log(tmp_path / "run")]
    assert len(losses) == 1 and math.isfinite(losses[0])
    assert not (tmp_path / "run/model").exists()


def diverge(config):
    with pytest.raises(TrainingDivergedError, match="Stage report, step 2"):
        run(config)


def test_diverged_run_ends_in_both_processes(stage_one, tmp_path):
    """Neither process may wait for the other."""
    rates = ["report.learning_rate=1e30", "report.lora_learning_rate=1e29", "report.epochs=3"]
    in_two_processes(diverge, TrainingConfig.load(stage_one, [*REPORT, *rates]))
    assert len(read_log(tmp_path / "run")) == 1 and not (tmp_path / "run/model").exists()


@pytest.mark.parametrize(("call", "message"), [(1, "step 1: .*Nothing is trained yet.*base.dtype"), (3, "step 3: ")])
def test_weights_stay_as_before_a_step_with_nan_loss(stage_one, tmp_path, monkeypatch, call, message):
    calls, losses = [], ReportBatches.losses

    def lose_one(self, model, batch, step):
        calls.append(model)
        values = losses(self, model, batch, step)
        return values | {"loss": values["loss"] * math.nan} if len(calls) == call else values

    monkeypatch.setattr(ReportBatches, "losses", lose_one)
    with pytest.raises(TrainingDivergedError, match=message):
        run(TrainingConfig.load(stage_one, ["stage=report", "report.batch_size=2", "save_every_steps=1"]))
    assert len(calls) == call
    if call > 1:
        assert len(read_log(tmp_path / "run")) == call - 1
        saved = Checkpoints(tmp_path / "run/checkpoints/report", 2).newest().load("weights")
        now = calls[-1].state_dict()
        assert saved and all(torch.equal(value, now[name]) for name, value in saved.items())


def test_infinite_validation_loss_ends_the_run(stage_one, tmp_path, monkeypatch):
    monkeypatch.setattr(StageTrainer, "mean_losses", lambda self, split: {"loss": math.inf})
    with pytest.raises(TrainingDivergedError, match="step 2: validation_loss is inf"):
        run(TrainingConfig.load(stage_one, REPORT))
    assert not (tmp_path / "run/model").exists()


def test_predicted_findings_choose_the_epoch_and_both_losses_are_logged(stage_one, tmp_path, monkeypatch):
    """Make the first epoch better with predicted findings, the second with true ones."""
    given = {0.0: iter([1.0, 2.0]), 1.0: iter([0.2, 0.1])}
    monkeypatch.setattr(StageTrainer, "mean_losses", lambda self, split: {"loss": next(given[split.true_findings])})
    run(TrainingConfig.load(stage_one, [*REPORT, "report.true_findings=1.0"]))
    log = [line for line in read_log(tmp_path / "run") if "validation_loss" in line]
    assert [(line["validation_loss"], line["validation_loss_true_findings"]) for line in log] == [(1, 0.2), (2, 0.1)]
    checkpoints = Checkpoints(tmp_path / "run/checkpoints/report", 2)
    kept, best = load_file(tmp_path / "run/model/model.safetensors"), checkpoints.load(2).load("weights")
    last = checkpoints.load(4).load("weights")
    assert all(torch.equal(kept[name], value) for name, value in best.items() if name in kept)
    assert not torch.equal(kept["visual_projection.weight"], last["visual_projection.weight"])
    assert json.loads((tmp_path / "run/model/config.json").read_text())["true_findings"] == 1.0


def test_loss_with_true_findings_uses_other_prompts(stage_one, tmp_path):
    run(TrainingConfig.load(stage_one, [*REPORT, "report.epochs=1"]))
    [line] = [line for line in read_log(tmp_path / "run") if "validation_loss" in line]
    assert line["validation_generation_loss"] != line["validation_generation_loss_true_findings"]
    assert line["validation_classification_loss"] == line["validation_classification_loss_true_findings"]


def test_sample_reports_have_the_length_limit_of_the_checkpoint(stage_one, tmp_path, monkeypatch):
    """Without a limit, transformers would stop at 20 tokens."""
    lengths, generate = [], DiffVPForConditionalGeneration.generate

    def remember(self, *args, **kwargs):
        written = generate(self, *args, **kwargs)
        lengths.append(written.shape[1])
        return written

    monkeypatch.setattr(DiffVPForConditionalGeneration, "generate", remember)
    limit = ["report.max_report_tokens=33", "report.truncate_reports=true", "report.samples=2", "report.epochs=1"]
    run(TrainingConfig.load(stage_one, [*REPORT, *limit]))
    saved = json.loads((tmp_path / "run/model/generation_config.json").read_text())
    assert lengths == [33] and saved["max_new_tokens"] == 33 and saved["do_sample"] is False
    assert len((tmp_path / "run/samples/epoch-1.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_micro_batches_give_the_losses_of_the_whole_batch(stage_one, tmp_path):
    traces = []
    for size in (8, 3):
        folder = f"output_dir={tmp_path / str(size)}"
        overrides = ["stage=report", f"report.micro_batch_size={size}", folder, f"classifier={tmp_path}/run/diagnosis"]
        run(TrainingConfig.load(stage_one, overrides))
        traces.append([line["loss"] for line in read_log(tmp_path / str(size)) if "loss" in line])
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def test_patient_in_both_stages_is_refused(tmp_path):
    def case(name, patient):
        return Case(name, patient, name, tmp_path / name, "Lung: clear.")

    diagnosis, report = [case("a_1", "a"), case("b_1", "b")], [case("b_2", "b"), case("b_3", "b"), case("c_1", "c")]
    with pytest.raises(DatasetError, match="diagnosis_cases and in report_cases") as error:
        check_stages_apart(Cohort(diagnosis, [], report, []))
    assert len(error.value.problems) == 1
    check_stages_apart(Cohort(diagnosis, [], report[2:], []))
