"""Callbacks: metrics, TensorBoard and trackers, when to evaluate, how fast it goes, what the carried state weighs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.tracking import GeneralTracker
from transformers import TrainerCallback

from undertow.recipe_sections import RecurrentWeight
from undertow.training.signals import Asked
from undertow.training.statistics import Statistics

UNLOGGED = ("total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a torn last line (killed while writing) is left out."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = []
    for i, line in enumerate(lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            if i < len(lines) - 1:
                raise ValueError(f"{path}, line {i + 1}: not JSON") from None
    return found


class Clock(TrainerCallback):
    """Seconds spent in optimiser steps: evaluation and saving are left out."""

    def __init__(self):
        self.steps, self.seconds, self._began = 0, 0.0, 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        self.seconds += time.perf_counter() - self._began

    def take(self) -> float | None:
        """Steps per second since it was last asked (None: no step since)."""
        steps, seconds = self.steps, self.seconds
        self.steps, self.seconds = 0, 0.0
        return steps / seconds if steps else None


class Curve(TrainerCallback):
    """Ask for an evaluation `points` times, evenly spaced over training, the last one at its end."""

    def __init__(self, points: int):
        self.points = points

    def on_step_end(self, args, state, control, **kwargs):
        done = [state.max_steps * i // self.points for i in range(1, self.points + 1)]
        control.should_evaluate = state.global_step in done


def recurrent_weight(settings: RecurrentWeight, step: int, steps: int) -> float:
    """The weight of the carried state before step `step` (from 0) of `steps`: it depends on nothing else."""
    rise = settings.warmup * steps
    done = min(step / rise, 1.0) if rise else 1.0
    shaped = {
        "linear": done,
        "cosine": (1 - math.cos(math.pi * done)) / 2,
        "exponential": done**2,
        "step": float(done == 1.0),
    }[settings.shape]
    return settings.start + (settings.end - settings.start) * shaped


class Curriculum(TrainerCallback):
    """Set `strength`, the weight of the carried state, in every module of ours that has it, before each step.

    Raises:
        ValueError: no module has it, so the curriculum would do nothing.
    """

    def __init__(self, model, settings: RecurrentWeight):
        self.settings = settings
        self.strengths = [buffer for name, buffer in model.undertow.named_buffers() if name.endswith(".strength")]
        if not self.strengths:
            raise ValueError(
                "training.recurrent_weight: no module of this model has a strength to set "
                f"(modules: {', '.join(model.undertow) or 'none'})"
            )

    def on_step_begin(self, args, state, control, **kwargs):
        weight = recurrent_weight(self.settings, state.global_step, state.max_steps)
        for strength in self.strengths:
            strength.fill_(weight)

    on_train_end = on_step_begin


class Leave(TrainerCallback):
    """End training after the step in which a signal came, with a checkpoint; of several processes all do."""

    def __init__(self, asked: Asked):
        self.asked = asked

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # a launcher's signals arrive at different steps
            number = torch.tensor(self.asked.number or 0, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.asked.number = int(number) or None
        if self.asked.number is not None:
            control.should_save = control.should_training_stop = True


class Metrics(TrainerCallback):
    """Write every log as one JSON line, to TensorBoard, and to trackers (`trackers.started`).

    Each line has `step`, `tokens` and `flops` (training, so far) beside what was logged, and beside a loss
    `tokens_per_second` and what `statistics` found in that step. On resume, lines after the checkpoint's step are
    dropped: the file reads as if nothing had happened.
    """

    def __init__(
        self,
        folder: Path,
        tokens_per_step: int,
        flops_per_step: float,
        clock: Clock,
        tensorboard: bool,
        statistics: Statistics | None = None,
        trackers: Sequence[GeneralTracker] = (),
    ):
        self.path, self.events = folder / "metrics.jsonl", folder / "tensorboard"
        self.tokens_per_step, self.flops_per_step, self.clock = tokens_per_step, flops_per_step, clock
        self.tensorboard, self.statistics, self.writer = tensorboard, statistics, None
        self.trackers = trackers

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        part = self.path.with_suffix(".part")  # killed here, nothing of what was logged is lost
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        part.replace(self.path)
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            self.writer = SummaryWriter(str(self.events), purge_step=state.global_step + 1)

    def on_step_end(self, args, state, control, **kwargs):
        # A logged loss is the mean since the last log, which a resumed run cannot know of steps before its checkpoint.
        control.should_log |= control.should_save

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {key: value for key, value in (logs or {}).items() if key not in UNLOGGED}
        if not state.is_world_process_zero or not values.keys() - {"epoch"}:
            return
        if self.statistics is not None and "loss" in values:
            values |= self.statistics.take()
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "flops": state.global_step * self.flops_per_step,
            **values,
        }
        speed = self.clock.take() if "loss" in values else None
        if speed is not None:
            line["tokens_per_second"] = round(speed * self.tokens_per_step, 1)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                self.writer.add_scalar(event(key), value, state.global_step)
        for tracker in self.trackers:
            tracker.log({event(key): value for key, value in values.items()}, step=state.global_step)

    def close(self):
        """Flush and close TensorBoard's file, and end the trackers' runs."""
        for tracker in self.trackers:
            tracker.finish()
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def event(key: str) -> str:
    """The name of a logged value in TensorBoard and trackers, which make one section of all names that begin alike."""
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    return key if "/" in key else f"train/{key}"
