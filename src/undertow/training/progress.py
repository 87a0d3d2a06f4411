"""Progress bars of training, one a model; without a terminal, one line at each evaluation."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback
from transformers.utils.logging import disable_progress_bar

QUALITY = {"eval_bits_per_byte": "bits/byte {:.3f}", "eval_exact_accuracy": "exact accuracy {:.1%}"}


def quiet() -> None:
    """Keep Hugging Face's own bars and remarks about saving out of ours; warnings are one line."""
    warnings.formatwarning = lambda message, *where, **more: f"warning: {' '.join(str(message).split())}\n"
    disable_progress_bar()
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)  # "mtime may not be reliable"
    for name in ("distributed", "integrations"):  # layers that are not spread over devices: none are
        logging.getLogger(f"transformers.{name}.tensor_parallel").setLevel(logging.ERROR)
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # a table of keys: `run.load` says it


class Bars:
    """A set of bars on one console."""

    def __init__(self, console: Console, bars: Progress):
        self.console, self.bars = console, bars
        self.shown: dict[str, _Bar] = {}

    def callback(self, name: str) -> TrainerCallback:
        """A callback that shows one model's training as one bar."""
        self.shown[name] = _Bar(self, name)
        return self.shown[name]

    def measured(self, name: str, result: Mapping) -> None:
        """The last word on a model: what `training.run.train` returned."""
        if "failed" in result:
            self.say(f"{name}: {result['failed']}")
            return
        if "exact_accuracy" in result:  # puzzles
            right = result["exact_accuracy"]
            said = "not measured" if right is None else f"exact accuracy {right:.1%}"
        else:
            said = f"bits/byte {result['bits_training']:.3f} trained, {result['bits_true']:.3f} decoded"
        task = self.shown[name].task if name in self.shown else None
        if task is not None:
            self.bars.update(task, said=said)
        if not self.console.is_terminal:
            self.say(f"{name}: {said}")

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, highlight=False)


@contextmanager
def progress(console: Console) -> Iterator[Bars]:
    """Bars that live as long as the context."""
    columns = (
        TextColumn("{task.description:12}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield Bars(console, bars)


class _Bar(TrainerCallback):
    def __init__(self, owner: Bars, name: str):
        self.owner, self.name, self.began = owner, name, 0.0
        self.task: TaskID | None = None
        self.loss, self.quality = float("nan"), ""

    def on_train_begin(self, args, state, control, **kwargs):
        self.task = self.owner.bars.add_task(self.name, total=state.max_steps, completed=state.global_step, said="")
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.owner.bars.update(self.task, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        self.owner.bars.update(self.task, said=f"loss {self.loss:.3f}  measuring")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.loss = logs.get("loss", self.loss)
        found = [said.format(logs[key]) for key, said in QUALITY.items() if key in logs]
        self.quality = found[0] if found else self.quality
        self.owner.bars.update(self.task, said=f"loss {self.loss:.3f}  {self.quality}")
        if found and not self.owner.console.is_terminal:
            seconds = time.perf_counter() - self.began
            self.owner.say(
                f"{self.name}: step {state.global_step}/{state.max_steps}, loss {self.loss:.3f}, "
                f"{self.quality}, {seconds:.0f} s"
            )
