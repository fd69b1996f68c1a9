# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""Interrupted training and training in two processes, compared with one uninterrupted run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel

from diffvp.files import write_folder
from diffvp.provenance import compare
from diffvp.train_accelerate import build_generator, main, run, save_model
from diffvp.training.checkpoints import CheckpointError, Checkpoints
from diffvp.training.config import TrainingConfig

from .processes import fork, in_two_processes


def trace(folder, stage="report"):
    """Return all logged numbers except the times."""
    lines = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def weights(folder):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    return {name: value.clone() for name, value in model.state_dict().items()}


TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
    *("--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"),
)


def call_command(*arguments):
    """Train by the command line, as a process does."""
    sys.argv = ["train", *map(str, arguments)]
    main()


FAST = ["report.epochs=3", "report.batch_size=2", "save_every_steps=1", "stage=report"]


def test_interrupted_run_resumes_bit_for_bit(stage_one, tmp_path):
    os.rename(tmp_path / "run", tmp_path / "interrupted")
    subprocess.run(["cp", "-r", tmp_path / "interrupted", tmp_path / "whole"], check=True)
    run(TrainingConfig.load(stage_one, [*FAST, f"output_dir={tmp_path / 'whole'}"]))
    overrides = [*FAST, f"output_dir={tmp_path / 'interrupted'}"]
    log = tmp_path / "interrupted/report.jsonl"
    for number, after in ((signal.SIGTERM, 2), (signal.SIGINT, 6), (signal.SIGKILL, 9)):
        output = tmp_path / f"output-{number}.txt"
        process = fork(call_command, stage_one, *overrides, f"num_workers={after % 3}", output=output)
        while process.is_alive() and not (log.exists() and len(log.read_text().splitlines()) >= after):
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(120)
        assert process.exitcode == (-9 if number == signal.SIGKILL else 128 + number), output.read_text()
        if number != signal.SIGKILL:
            assert "Run the same command again to resume" in output.read_text()
    run(TrainingConfig.load(stage_one, overrides))
    assert trace(tmp_path / "interrupted") == trace(tmp_path / "whole")
    one, other = weights(tmp_path / "whole/model"), weights(tmp_path / "interrupted/model")
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_diagnosis_stage_resumes_bit_for_bit(settings, tmp_path):
    overrides = ["stage=diagnosis", "diagnosis.epochs=3", "diagnosis.batch_size=4", "save_every_steps=1"]
    run(TrainingConfig.load(settings, [*overrides, f"output_dir={tmp_path / 'whole'}"]))
    checkpoints = Checkpoints(tmp_path / "whole/checkpoints/diagnosis", keep=9)
    # Imitate a run that was stopped after its fifth of nine steps.
    run(TrainingConfig.load(settings, [*overrides, "keep_checkpoints=9"]))
    ours = tmp_path / "run/checkpoints/diagnosis"
    for step in Checkpoints(ours, 9).steps():
        if step > 5:
            subprocess.run(["rm", "-r", ours / f"step-{step:08d}"], check=True)
    run(TrainingConfig.load(settings, overrides))
    assert checkpoints.steps() and trace(tmp_path / "run", "diagnosis") == trace(tmp_path / "whole", "diagnosis")
    one, other = weights(tmp_path / "whole/diagnosis"), weights(tmp_path / "run/diagnosis")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_resume_with_other_settings_or_data_is_refused(stage_one, tmp_path):
    run(TrainingConfig.load(stage_one, FAST))
    before = weights(tmp_path / "run/model")
    for override, message in (
        ("report.learning_rate=0.5", "report.learning_rate was 0.001, is 0.5"),
        ("seed=1", "seed was 0, is 1"),
        ("data.report_cases=[18,25]", r"data.report_cases was \[18, 26\], is \[18, 25\]"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(TrainingConfig.load(stage_one, [*FAST, override]))
    # These settings do not change the result.
    run(TrainingConfig.load(stage_one, [*FAST, "save_every_steps=7", "num_workers=1"]))
    assert all(torch.equal(value, before[name]) for name, value in weights(tmp_path / "run/model").items())


def test_differences_are_named_by_their_path():
    assert compare({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": None}) == [
        "a.c was 2, is 5",
        "d was 3, is None",
    ]


def test_damaged_checkpoint_is_skipped(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"weights": {"x": torch.full((9,), float(step))}}, {"step": step}, best=None)
    damages = {
        "weights.safetensors does not match its SHA-256": lambda f: f.write_bytes(f.read_bytes()[:-1] + b"?"),
        "bytes; expected": lambda f: f.write_bytes(f.read_bytes()[:-1]),
        "weights.safetensors is missing": lambda f: f.unlink(),
    }
    file = tmp_path / "c/step-00000003/weights.safetensors"
    content = file.read_bytes()
    for message, damage in damages.items():
        file.write_bytes(content)
        assert checkpoints.newest().step == 3
        damage(file)
        assert checkpoints.newest().step == 2
        assert message in caplog.text
        with pytest.raises(CheckpointError, match="step-00000003"):
            checkpoints.load(3)
    (tmp_path / "c/step-00000002/manifest.json").write_text("[]")
    assert checkpoints.newest().step == 1
    # Saving the step again replaces the damaged checkpoint.
    checkpoints.save(3, {"weights": {"x": torch.zeros(2)}}, {}, best=None)
    assert checkpoints.newest().step == 3


def test_newest_and_best_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 8):
        checkpoints.save(step, {"weights": {"x": torch.zeros(1)}}, {}, best=3 if step >= 3 else None)
    assert checkpoints.steps() == [3, 6, 7]
    (tmp_path / ".unfinished-abc").mkdir()
    os.rename(tmp_path / "step-00000006", tmp_path / ".former-step-00000006")
    checkpoints.clean()
    assert checkpoints.steps() == [3, 6, 7] and not list(tmp_path.glob(".*"))


def test_folder_is_written_completely_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    write_folder(target, lambda folder: (folder / "a").write_text("1"))

    def fails(folder):
        (folder / "a").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, fails)
    assert (target / "a").read_text() == "1" and os.listdir(tmp_path) == ["model"]
    write_folder(target, lambda folder: (folder / "b").write_text("3"))
    assert os.listdir(target) == ["b"] and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("was_replaced", [False, True])
def test_folder_is_written_after_a_kill_during_its_replacement(tmp_path, was_replaced):
    """`kill -9` between the two renames, or after the second one."""
    target, aside = tmp_path / "model", tmp_path / ".former-model"
    write_folder(target, lambda folder: (folder / "a").write_text("1"))
    os.rename(target, aside)
    if was_replaced:
        target.mkdir()
        (target / "b").write_text("2")

    def fails(folder):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(target, fails)
    assert os.listdir(target) == ["b" if was_replaced else "a"] and os.listdir(tmp_path) == ["model"]
    write_folder(target, lambda folder: (folder / "c").write_text("3"))
    assert os.listdir(target) == ["c"] and os.listdir(tmp_path) == ["model"]


def test_folder_that_cannot_be_replaced_keeps_its_content(tmp_path, monkeypatch):
    target, rename = tmp_path / "model", os.rename
    write_folder(target, lambda folder: (folder / "a").write_text("1"))

    def fails_once(source, destination):
        if destination == target and ".unfinished-" in str(source):
            raise PermissionError("denied")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fails_once)
    with pytest.raises(PermissionError):
        write_folder(target, lambda folder: (folder / "b").write_text("2"))
    assert os.listdir(target) == ["a"] and os.listdir(tmp_path) == ["model"]


KILLS = int(os.environ.get("DIFFVP_KILLS", "4"))  # `make test-kills` sets 50


@pytest.mark.slow  # `kill -9` after a step: test_interrupted_run_resumes_bit_for_bit
def test_kill_at_any_moment_loses_no_checkpoint(stage_one, tmp_path):
    """
    Send `kill -9` at random moments, also during writing, renaming and deleting: every step is saved, few are kept.

    A fork has already imported everything, so that kills fall into the training.
    """
    for name in ("whole", "killed"):
        subprocess.run(["cp", "-r", tmp_path / "run", tmp_path / name], check=True)
    epochs = 4 * KILLS  # of 4 steps each
    overrides = [f"report.epochs={epochs}", "report.batch_size=2", "stage=report"]
    whole = TrainingConfig.load(stage_one, [*overrides, f"output_dir={tmp_path / 'whole'}"])
    killed = TrainingConfig.load(stage_one, [*overrides, "save_every_steps=1", f"output_dir={tmp_path / 'killed'}"])
    checkpoints = Checkpoints(tmp_path / "killed/checkpoints/report", keep=2)
    begun = time.monotonic()
    process = fork(run, whole)
    process.join()
    assert process.exitcode == 0
    rng, newest, seconds, landed = random.Random(0), 0, time.monotonic() - begun, 0
    for _ in range(KILLS):
        process = fork(run, killed)
        process.join(rng.uniform(0.0, seconds))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), "the run failed with its own error"
        assert all(checkpoints.problem(step) is None for step in checkpoints.steps())
        found = max(checkpoints.steps(), default=0)
        assert found >= newest, "a checkpoint was lost"
        landed += found > newest
        # Adapt the time so that most kills let a few steps through on any machine, and the last ones still find some.
        seconds *= 1.2 if found == newest else 0.9 if found - newest < 4 * epochs / KILLS else 0.6
        newest = found
    assert landed >= max(KILLS // 4, 1), "too few kills fell into the training"
    process = fork(run, killed)
    process.join()
    assert process.exitcode == 0
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
    one, other = weights(tmp_path / "whole/model"), weights(tmp_path / "killed/model")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not list((tmp_path / "killed").rglob(".unfinished*"))


# Two processes ------------------------------------------------------------------------------------------------------


def torchrun(settings, *overrides):
    """Train in two processes of PyTorch's launcher."""
    script = Path(settings).with_name("script.py")
    script.write_text("from diffvp.train_accelerate import main\n\nmain()\n")
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*TORCHRUN, script, settings, *overrides], env=environment, check=True)


def fork_two(settings, *overrides):
    """Train in two forked processes."""
    in_two_processes(call_command, settings, *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [fork_two, torchrun])
def test_two_processes_give_the_trace_of_one(stage_one, tmp_path, launch):
    """With five cases per step, one process has three and the other two; each runs one sample at a time."""
    overrides = ["report.epochs=2", "report.batch_size=5", "stage=report"]
    for name in ("one", "two"):
        subprocess.run(["cp", "-r", tmp_path / "run", tmp_path / name], check=True)
    run(TrainingConfig.load(stage_one, [*overrides, f"output_dir={tmp_path / 'one'}"]))
    launch(stage_one, *overrides, f"output_dir={tmp_path / 'two'}", "report.micro_batch_size=1")
    one, two = trace(tmp_path / "one"), trace(tmp_path / "two")
    assert len(one) == len(two) > 4
    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, abs=1e-5)
    left, right = weights(tmp_path / "one/model"), weights(tmp_path / "two/model")
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-4, rtol=1e-3, msg=name)


def train_three_steps(settings, folder, shard):
    """Train on random features, and save the model; shard it over the processes."""
    torch.manual_seed(0)
    model, _ = build_generator(TrainingConfig.load(settings))
    model.train()
    if shard:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        for layer in model.language_model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    tokens, channels = torch.tensor(model.config.feature_grid).prod(), model.config.encoder_hidden_size
    for _ in range(3):
        ids = torch.randint(5, 300, (2, 12), generator=generator)
        features = torch.randn(2, 2, tokens, channels, generator=generator)
        result = model(
            ct_features=features[0],
            reference_features=features[1],
            diagnosis_logits=torch.randn(2, 18, generator=generator),
            diagnosis_labels=torch.ones(2, 18),
            input_ids=ids,
            labels=ids,
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if shard else model.state_dict()
    if not shard or torch.distributed.get_rank() == 0:
        save_model(model, folder, state)
    if shard:
        torch.distributed.barrier()


@pytest.mark.slow
def test_sharded_model_saves_the_checkpoint_of_a_whole_one(stage_one, tmp_path):
    """Use FSDP2 over two processes."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    train_three_steps(stage_one, whole, shard=False)
    in_two_processes(train_three_steps, stage_one, sharded, True)
    assert sorted(map(str, whole.rglob("*.safetensors"))) and {
        path.relative_to(whole) for path in whole.rglob("*")
    } == {path.relative_to(sharded) for path in sharded.rglob("*")}
    left, right = weights(whole), weights(sharded)
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=1e-6, rtol=1e-5, msg=name)
