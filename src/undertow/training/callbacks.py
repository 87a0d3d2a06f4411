"""Callbacks: the metrics file, TensorBoard, when to evaluate, how fast it goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

from transformers import TrainerCallback

UNLOGGED = ("total_flos", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a torn last line (killed while writing) is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
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


class Metrics(TrainerCallback):
    """Write every log as one JSON line, and to TensorBoard.

    Each line has `step`, `tokens` and `flops` (training, so far) beside what was logged, and beside a loss
    `tokens_per_second`. On resume, lines after the checkpoint's step are dropped: the file reads as if nothing had
    happened.
    """

    def __init__(self, folder: Path, tokens_per_step: int, flops_per_step: float, clock: Clock, tensorboard: bool):
        self.path, self.events = folder / "metrics.jsonl", folder / "tensorboard"
        self.tokens_per_step, self.flops_per_step, self.clock = tokens_per_step, flops_per_step, clock
        self.tensorboard, self.writer = tensorboard, None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import

            self.writer = SummaryWriter(str(self.events), purge_step=state.global_step + 1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {key: value for key, value in (logs or {}).items() if key not in UNLOGGED}
        if not state.is_world_process_zero or not values.keys() - {"epoch"}:
            return
        line = {
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "flops": state.global_step * self.flops_per_step,
            **values,
        }
        speed = self.clock.take() if "loss" in values else None
        if speed is not None:
            line["tokens_per_second"] = round(speed * self.tokens_per_step, 1)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            for key, value in values.items():
                name = f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"
                self.writer.add_scalar(name, value, state.global_step)

    def close(self):
        """Flush and close TensorBoard's file."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
