# Copyright 2026 The DiffVP Authors. Licensed under the Apache License, Version 2.0.
# SPDX-License-Identifier: Apache-2.0
"""
The training loop of both stages.

All randomness depends on seed, stage, step, case and, for dropout, the process. Interruptions and the number of
workers do not change the result of a run. The number of processes changes the rounding of sums, the batch statistics
of stage 1 and dropout.
"""

import contextlib
import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader, Dataset
from transformers import get_cosine_schedule_with_warmup

from ..progress import counting
from ..provenance import compare
from ..storage_diffvp import replacing
from .checkpoints import Checkpoint, CheckpointError, Checkpoints

logger = logging.getLogger(__name__)

CONSOLE_STEPS = 20  # steps between two lines on the console; the log file has every step

MOST_SKIPPED = 10  # consecutive steps without a finite gradient that end the run as diverged


class BatchSource:
    """Source of the batches of a stage, from its training or validation cases (interface).

    Workers load `sample(index, epoch)`, `collate(samples)` makes a batch, and `losses(model, batch, step)` computes
    the named losses of a batch, including `loss`. Each value is the batch's *part* of the mean over the cases of the
    step, so that the sum over the batches of all processes is this mean.
    """

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, epoch: int, size: int) -> list[np.ndarray]:
        """Return the case indices of each optimizer step of an epoch."""
        raise NotImplementedError

    def sample(self, index: int, epoch: int) -> dict:
        raise NotImplementedError

    def collate(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def losses(self, model: torch.nn.Module, batch: dict, step: np.ndarray) -> dict[str, torch.Tensor]:
        raise NotImplementedError


class Stage:
    """One of the two stages, as the loop sees it.

    Attributes:
        name: "diagnosis" or "report".
        section: section of the training file.
        model: first argument of `losses`.
        groups: parameter groups of AdamW.
        training, validation: the cases. The epoch with the lowest validation loss is kept.
        also_validated: further views of the validation cases by name, whose losses are logged.
    """

    name: str

    def __init__(
        self,
        section,
        model: torch.nn.Module,
        groups: list[dict],
        training: BatchSource,
        validation: BatchSource,
        also_validated: dict[str, BatchSource] | None = None,
    ):
        self.section, self.model, self.groups = section, model, groups
        self.training, self.validation, self.also_validated = training, validation, also_validated or {}

    def metrics(self, epoch: int) -> dict[str, float]:
        """Return further metrics after an epoch, for the log."""
        return {}


class _Epoch(Dataset):
    def __init__(self, source: BatchSource, epoch: int):
        self.source, self.epoch = source, epoch

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        return self.source.sample(int(index), self.epoch)


def share(step: np.ndarray, process: int, processes: int, size: int) -> list[tuple[list[int], bool]]:
    """
    Return the batches of one process in one step, each with a flag: True if it counts.

    Every process runs the same number of batches, because each one is a collective call. A process with fewer cases
    repeats one that does not count.
    """
    own = step[process::processes]
    count = math.ceil(math.ceil(len(step) / processes) / size)
    batches = [(own[start : start + size].tolist(), True) for start in range(0, len(own), size)]
    return batches + [(step[:1].tolist(), False)] * (count - len(batches))


@dataclass
class Position:
    """Progress of a stage."""

    step: int = 0  # optimizer steps
    epoch: int = 0
    step_of_epoch: int = 0
    best_loss: float = math.inf
    best_step: int | None = None
    epochs_since_best: int = 0
    finished: bool = False
    skipped: int = 0  # steps with finite losses but a gradient that is not finite
    skipped_in_a_row: int = 0

    @classmethod
    def of(cls, state: dict) -> "Position":
        return cls(**{field.name: state["position"][field.name] for field in fields(cls)})


class Interrupted(SystemExit):
    """A run ended on a signal after saving, and can be resumed. The exit code is that of the signal."""


class TrainingDivergedError(RuntimeError):
    """A loss or gradient is not finite, so that further training would be useless."""


class Signals:
    """Context that records the first Ctrl-C or SIGTERM in `received`; a second one ends the process as usual."""

    def __enter__(self) -> "Signals":
        self.received = 0
        self.former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in self.former:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def __exit__(self, *_) -> None:
        self._restore()


class Log:
    """Log of one JSON line per event, with numbers also sent to the trackers and some events to the console."""

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path, self.accelerator = path, accelerator
        self.start = time.monotonic()

    def rewind(self, step: int) -> None:
        """Delete the events after the step from which a run resumes."""
        if not self.accelerator.is_main_process or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        with replacing(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")

    def __call__(self, *, step: int, console: bool = True, **values) -> None:
        if not self.accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"step": step, "seconds": round(time.monotonic() - self.start, 1), **values})
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        if console:
            shown = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
            logger.info("step %d  %s", step, "  ".join(f"{key} {value}" for key, value in shown.items()))
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self.accelerator.log({f"{self.path.stem}/{key}": value for key, value in numbers.items()}, step=step)


class StageTrainer:
    """Train a stage, or resume its training.

    Args:
        settings: everything that the result depends on; a checkpoint of other settings is refused.
    """

    def __init__(
        self, stage: Stage, accelerator: Accelerator, checkpoints: Checkpoints, log: Log, config, settings: dict
    ):
        self.stage, self.accelerator, self.checkpoints, self.log = stage, accelerator, checkpoints, log
        self.config, self.settings = config, settings
        section, processes = stage.section, accelerator.num_processes
        self.micro_batch_size = section.micro_batch_size or math.ceil(section.batch_size / processes)
        self.accelerator.gradient_accumulation_steps = math.ceil(
            math.ceil(section.batch_size / processes) / self.micro_batch_size
        )
        self.steps_per_epoch = len(stage.training.batches(0, section.batch_size))
        total = section.epochs * self.steps_per_epoch
        optimizer = torch.optim.AdamW(stage.groups, weight_decay=section.weight_decay)
        self.model, self.optimizer = accelerator.prepare(stage.model, optimizer)
        self.scheduler = get_cosine_schedule_with_warmup(self.optimizer, int(section.warmup_ratio * total), total)
        self.position = Position()

    # State: full tensors by name on every process, for whole, replicated and sharded parameters alike.

    _options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)

    def _state(self) -> dict[str, dict[str, torch.Tensor]]:
        optimizer = get_optimizer_state_dict(self._module(), self._optimizer(), options=self._options)
        # Empty on all processes except the main process, which writes the checkpoint.
        moments = {
            f"{kind}:{name}": value
            for name, values in optimizer.get("state", {}).items()
            for kind, value in values.items()
        }
        return {"weights": get_model_state_dict(self._module(), options=self._options), "optimizer": moments}

    def _load_optimizer(self, moments: dict[str, torch.Tensor]) -> None:
        # Parameter groups come from the training file, and learning rates from the schedule.
        optimizer = get_optimizer_state_dict(self._module(), self._optimizer(), options=self._options)
        optimizer["state"] = {}
        for key, value in moments.items():
            kind, _, name = key.partition(":")
            optimizer["state"].setdefault(name, {})[kind] = value
        set_optimizer_state_dict(self._module(), self._optimizer(), optimizer, options=self._options)

    def _module(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)

    def _optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer

    def resume(self) -> bool:
        """Resume from the newest valid checkpoint, if there is one.

        Returns:
            True if a checkpoint was found.

        Raises:
            CheckpointError: the checkpoint has other settings or other data.
        """
        checkpoint = self.checkpoints.newest()
        if checkpoint is None:
            return False
        differences = compare(checkpoint.state["settings"], self.settings)
        if differences:
            raise CheckpointError(
                f"{self.checkpoints.folder} holds a run with other settings: {'; '.join(differences)}. "
                "Choose another output_dir, or delete that folder."
            )
        self.load_weights(checkpoint)
        self._load_optimizer(checkpoint.load("optimizer"))
        self.scheduler.load_state_dict(checkpoint.state["scheduler"])
        for group, rate in zip(self._optimizer().param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self.position = Position.of(checkpoint.state)
        self.log.rewind(self.position.step)
        return True

    def load_weights(self, checkpoint: Checkpoint) -> None:
        set_model_state_dict(self._module(), checkpoint.load("weights"), options=self._options)

    def save(self) -> None:
        tensors = self._state()  # a collective call
        if self.accelerator.is_main_process:
            state = {
                "position": asdict(self.position),
                "scheduler": self.scheduler.state_dict(),
                "settings": self.settings,
            }
            self.checkpoints.save(self.position.step, tensors, state, self.position.best_step)
        self.accelerator.wait_for_everyone()

    def fit(self) -> None:
        """Train to the end, and load the best weights into the model.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, once the current step is completed and saved.
            TrainingDivergedError: a loss is not finite, or the gradient of `MOST_SKIPPED` consecutive steps is not.
        """
        position, section = self.position, self.stage.section
        with self._progress() as advance, Signals() as signals:
            while not position.finished:
                self._epoch(advance, signals)
                losses = self._validate()
                self._check_finite(losses)
                position.epoch, position.step_of_epoch = position.epoch + 1, 0
                better = losses["validation_loss"] < position.best_loss
                if better:
                    position.best_loss, position.best_step = losses["validation_loss"], position.step
                position.epochs_since_best = 0 if better else position.epochs_since_best + 1
                bored = section.patience is not None and position.epochs_since_best >= section.patience
                position.finished = position.epoch == section.epochs or bored
                skipped = {"skipped_steps": position.skipped} if position.skipped else {}
                metrics = self.stage.metrics(position.epoch)
                self.log(step=position.step, epoch=position.epoch, **losses, **metrics, **skipped)
                self.save()
                self._end_if_asked(signals, saved=True)
        self.load_weights(self.checkpoints.load(position.best_step))

    def _epoch(self, advance, signals: Signals) -> None:
        position, section = self.position, self.stage.section
        steps = self.stage.training.batches(position.epoch, section.batch_size)[position.step_of_epoch :]
        loader = self._loader(self.stage.training, position.epoch, steps)
        self.model.train()
        for step, batches in zip(steps, loader, strict=True):
            seed = f"{self.config.seed}:{self.stage.name}:{position.step}:{self.accelerator.process_index}"
            set_seed(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big"))
            losses = self._step(step, batches)
            position.step += 1
            position.step_of_epoch += 1
            console = position.step % CONSOLE_STEPS == 0
            rate = self.scheduler.get_last_lr()[0]
            self.log(step=position.step, console=console, epoch=position.epoch + 1, **losses, learning_rate=rate)
            advance(len(step))
            last = position.step_of_epoch == self.steps_per_epoch
            if not last:  # the end of an epoch is saved after validation
                saved = position.step % self.config.save_every_steps == 0
                if saved:
                    self.save()
                self._end_if_asked(signals, saved)

    def _step(self, step: np.ndarray, batches: list[tuple[dict, bool]]) -> dict[str, float]:
        """Run one optimizer step and return its losses, summed over all processes."""
        sums: dict[str, float] = {}
        accelerator = self.accelerator
        # Accelerate averages gradients over processes and divides them by the number of batches, but these losses are
        # already parts of a mean.
        scale = accelerator.num_processes * accelerator.gradient_accumulation_steps
        extra = accelerator.gradient_accumulation_steps - len(batches)
        for batch, counts in batches + [(batches[0][0], False)] * extra:
            with accelerator.accumulate(self.model):
                losses = self.stage.training.losses(self.model, _to(batch, accelerator.device), step)
                accelerator.backward(losses["loss"] * (scale if counts else 0.0))
                if counts:
                    _add(sums, losses)
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self._trainable(), self.stage.section.gradient_clip))
                    # On the CPU, torch's bfloat16 gradient of a convolution over small maps is occasionally not
                    # finite. One such step would turn the weights into NaN, so it is skipped. (In float16, the scaler
                    # does that.)
                    if accelerator.scaler is not None or math.isfinite(norm):
                        self.position.skipped_in_a_row = 0
                    else:
                        self.position.skipped += 1
                        self.position.skipped_in_a_row += 1
                        # Reduced over all processes, so that all of them end here.
                        self._check_finite(self._reduced(sums))
                        if self.position.skipped_in_a_row == MOST_SKIPPED:
                            self._check_finite({"gradient norm": norm})
                        self.optimizer.zero_grad()
                self.optimizer.step()
                if accelerator.sync_gradients:
                    self.scheduler.step()
                self.optimizer.zero_grad()
        losses = self._reduced(sums)
        self._check_finite(losses)
        return losses

    def _check_finite(self, values: dict[str, float]) -> None:
        """
        Raises:
            TrainingDivergedError: a value is not finite; the message gives step, learning rates, and advice.
        """
        lost = next((f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)), None)
        if lost is None:
            return
        step, stage = self.position.step + (not any(name.startswith("validation") for name in values)), self.stage.name
        rates = ", ".join(f"{group['lr']:g}" for group in self._optimizer().param_groups)
        advice = f"Lower the learning rates of the section {stage}, or raise its warmup_ratio"
        if self.position.step == 0:
            advice = "Nothing is trained yet: check the initial weights and base.dtype"
        if self.config.mixed_precision == "fp16":
            advice += "; mixed_precision: bf16 has a larger range than fp16"
        raise TrainingDivergedError(
            f"Stage {stage}, step {step}: {lost}, not a finite number, at learning rate(s) {rates}. The run ends "
            f"without writing a model. {advice}, and start again with another output_dir."
        )

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for group in self.stage.groups for parameter in group["params"]]

    @torch.no_grad()
    def _validate(self) -> dict[str, float]:
        """Return mean losses of the validation cases as `validation_LOSS`, and of views as `validation_LOSS_VIEW`."""
        self.model.eval()
        means = {f"validation_{name}": value for name, value in self.mean_losses(self.stage.validation).items()}
        for view, source in self.stage.also_validated.items():
            means |= {f"validation_{name}_{view}": value for name, value in self.mean_losses(source).items()}
        return means

    def mean_losses(self, source: BatchSource) -> dict[str, float]:
        """Return the mean of each loss over all cases of a source."""
        steps = source.batches(0, self.stage.section.batch_size)
        everything = np.concatenate(steps)
        sums: dict[str, float] = {}
        for batches in self._loader(source, 0, steps):
            for batch, counts in batches:
                losses = source.losses(self.model, _to(batch, self.accelerator.device), everything)
                if counts:
                    _add(sums, losses)
        return self._reduced(sums)

    def _loader(self, source: BatchSource, epoch: int, steps: list[np.ndarray]) -> Iterator[list[tuple[dict, bool]]]:
        """Yield the batches of this process for each step."""
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        plan = [share(step, process, processes, self.micro_batch_size) for step in steps]
        loader = DataLoader(
            _Epoch(source, epoch),
            batch_sampler=[indices for batches in plan for indices, _ in batches],
            num_workers=self.config.num_workers,
            collate_fn=source.collate,
            pin_memory=self.accelerator.device.type == "cuda",
        )
        loaded = iter(loader)
        for batches in plan:
            yield [(next(loaded), counts) for _, counts in batches]

    def _reduced(self, sums: dict[str, float]) -> dict[str, float]:
        """Sum losses over all processes. A process without batches that count contributes zeros."""
        if self.accelerator.num_processes == 1:
            return sums
        names = sorted(set(gather_object(sorted(sums))))
        values = torch.tensor([sums.get(name, 0.0) for name in names], dtype=torch.float64)
        total = self.accelerator.reduce(values.to(self.accelerator.device), "sum")
        return dict(zip(names, total.tolist(), strict=True))

    def _end_if_asked(self, signals: Signals, saved: bool) -> None:
        received = signals.received
        if self.accelerator.num_processes > 1:  # a signal may reach one process first; all end at the same step
            flag = torch.tensor([received], device=self.accelerator.device)
            received = int(self.accelerator.gather(flag).max())
        if not received:
            return
        if not saved:
            self.save()
        logger.warning(
            "Interrupted after step %d, which is saved. Run the same command again to resume.", self.position.step
        )
        raise Interrupted(128 + received)

    @contextlib.contextmanager
    def _progress(self):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        cases = len(self.stage.training)
        this_epoch = self.stage.training.batches(self.position.epoch, self.stage.section.batch_size)
        done = self.position.epoch * cases + sum(map(len, this_epoch[: self.position.step_of_epoch]))
        total = cases * self.stage.section.epochs
        if self.accelerator.is_main_process and not Console().is_terminal:
            with counting(f"{self.stage.name.capitalize()}, cases") as count:

                def tell(more: int) -> None:
                    nonlocal done
                    done += more
                    count(done, total)

                yield tell
            return
        with Progress(*columns, disable=not self.accelerator.is_main_process) as progress:
            task = progress.add_task(self.stage.name.capitalize(), total=total, completed=done, rate="")

            def advance(count: int) -> None:
                speed = progress.tasks[task].speed
                progress.update(task, advance=count, rate=f"{speed:.1f} samples/s" if speed else "")

            yield advance


def by_length(lengths: Sequence[int], size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Make random batches of cases with similar length, to reduce padding."""
    order = np.argsort(np.asarray(lengths) + rng.uniform(0, 30, len(lengths)), kind="stable")
    batches = np.split(order, range(size, len(order), size))
    return [batches[index] for index in rng.permutation(len(batches))]


def in_order(cases: int, size: int) -> list[np.ndarray]:
    """Make batches of the case indices in ascending order."""
    order = np.arange(cases)
    return np.split(order, range(size, cases, size))


def _to(batch: dict, device: torch.device) -> dict:
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def _add(sums: dict[str, float], losses: dict[str, torch.Tensor]) -> None:
    for name, value in losses.items():
        sums[name] = sums.get(name, 0.0) + value.item()
