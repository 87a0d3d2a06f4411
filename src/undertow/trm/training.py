"""The training loop: one optimiser step is one supervision step of every row (arXiv 2510.04871, section 4).

runs/NAME-N/metrics.jsonl    one line a log
            checkpoints/     where training stands: `undertow.trm.checkpoints`
            model/           the trained model: loads with `TRM.load`

Hugging Face's Trainer has no place for a state that rows carry from one step to the next, so this is a loop of its own.
It runs in one process, or in several under `torchrun`, and gives the same numbers either way, to rounding.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from undertow.agree import largest, together
from undertow.data import cache
from undertow.training import signals
from undertow.training.callbacks import read_metrics
from undertow.training.checkpoints import begin, finish, full_disk_said, newest_complete
from undertow.training.precision import autocast, device_of
from undertow.trm import checkpoints, halting, optimisers
from undertow.trm.config import TRMConfig
from undertow.trm.ema import EMA
from undertow.trm.halting import Batch, Carry
from undertow.trm.losses import Losses, losses
from undertow.trm.model import TRM
from undertow.trm.settings import TRMTraining


class Puzzles(Protocol):
    """What can be trained on."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    @property
    def num_identifiers(self) -> int: ...

    def batches(self, batch_size: int, seed: int, start: int = 0) -> Iterator[Batch]:
        """Batches without end, from number `start` on; each is a function of the seed and its number alone.

        `inputs` and `labels` (-100 where none) are int64 `(B, L)`, `puzzle_identifiers` int64 `(B,)`.
        """
        ...


def train(
    config: TRMConfig,
    settings: TRMTraining,
    data: Puzzles,
    folder: Path,
    seed: int = 0,
    resume: bool = False,
    device: str = "auto",
    measure: Callable[[TRM], dict] | None = None,
    watch: Callable[[dict], None] | None = None,
) -> TRM:
    """Train a model in `folder`; returns what is kept, the average where there is one.

    Args:
        resume: go on from the newest checkpoint; weights, average, carry and metrics become what they would have been.
        measure: of the model that would be kept; logged with `eval_` before each name.
        watch: is told every line of the metrics.

    Raises:
        ValueError: the data does not fit the model, or the checkpoint does not fit the run.
        FloatingPointError: the gradient is not finite; the step is not taken.
        Stopped: a signal came; the step it came in is saved.
        OSError: the disk is full; older checkpoints stay whole.
    """
    where = device_of(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not together():
        PartialState(cpu=where.type == "cpu")  # joins the other processes
    where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if where.type == "cuda" else where
    ranks, rank = checkpoints.world(), checkpoints.rank()
    fits(config, settings, data, ranks)
    torch.manual_seed(seed)
    model = TRM(config).to(where)
    optimiser = optimisers.build(model, settings.optimiser, settings.betas, settings.weight_decay)
    ema = None if settings.ema is None else EMA(model, settings.ema)
    step, carry, root = 0, None, folder / "checkpoints"
    sums: Mapping[str, Tensor] = {}
    newest = newest_complete(root) if resume else None
    if resume and newest is None:
        warnings.warn(f"{folder}: no complete checkpoint; training starts from the beginning", stacklevel=2)
    if newest is not None:
        step, carry, sums = checkpoints.restore(newest, model, optimiser, ema, seed)
    net = DistributedDataParallel(model, forward_sync_buffers=False) if ranks > 1 else model
    log, tally = Log(folder / "metrics.jsonl", step, watch), Tally(sums)
    read = data.batches(settings.batch_size, seed, step)
    with signals.held() as asked:
        while step < settings.steps and asked.number is None:
            batch = {name: rows.chunk(ranks)[rank].to(where) for name, rows in next(read).items()}
            step += 1
            carry = halting.first(model, batch) if carry is None else carry
            carry = supervise(net, model, optimiser, settings, carry, batch, step, seed, tally)
            if ema is not None:
                ema.update(model)
            if ranks > 1:  # a launcher's signals arrive at different steps
                asked.number = int(largest(torch.tensor(float(asked.number or 0), device=where), agree=True)) or None
            if step == 1 or step % settings.log_every == 0 or step == settings.steps:
                log(step, tally.take())
            due = settings.evaluate_every and step % settings.evaluate_every == 0
            if measure is not None and rank == 0 and (due or step == settings.steps):
                kept = model if ema is None else ema.averaged(model)
                log(step, {f"eval_{name}": value for name, value in measure(kept.eval()).items()})
                model.train()
            if step % settings.save_every == 0 or step == settings.steps or asked.number is not None:
                unlogged = tally.state()
                checkpoints.save(root, step, model, optimiser, ema, carry, unlogged, seed, settings.keep)
    if asked.number is not None and step < settings.steps:
        raise signals.Stopped(asked.number, f"step {step} is saved in {root}; --resume goes on")
    kept = (model if ema is None else ema.averaged(model)).eval()
    if rank == 0:
        with full_disk_said(root):
            kept.save(begin(folder / "model"))
            finish(folder / "model")
    checkpoints.wait()
    return kept


def supervise(
    net: nn.Module,
    model: TRM,
    optimiser: torch.optim.Optimizer,
    settings: TRMTraining,
    carry: Carry,
    batch: Batch,
    step: int,
    seed: int,
    tally: Tally,
) -> Carry:
    """One step of training: the rows of this process, their puzzles replaced where they were done, one update.

    `net` is the model, or what makes its gradient that of all processes.
    """
    admitted = carry.halted_B.sum()
    carry = halting.admit(model, carry, batch)
    identifiers, labels = carry.data["puzzle_identifiers"], carry.data["labels"]
    vectors = model.vectors(identifiers)
    with autocast(settings.precision, labels.device):
        state, logits, q = net(carry.state, carry.data["inputs"], vectors)
        worth = halting.worth_of_going_on(model, carry, state, vectors) if model.config.q_learning else None
    found = losses(logits, q, labels, settings.loss, worth)
    found.loss.backward()
    norm = gradient_norm(model, settings.clip)
    if not norm.isfinite():
        raise FloatingPointError(f"step {step}: the gradient is not finite (loss {found.loss.item():.4g})")
    factor = optimisers.rate(step, settings.steps, settings.warmup, settings.floor)
    for group in optimiser.param_groups:
        group["lr"] = settings.learning_rate * factor
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    if model.puzzles is not None and vectors is not None:
        decay = settings.weight_decay if settings.puzzle_decay is None else settings.puzzle_decay
        assert vectors.grad is not None, "the prefix is read by every block"
        model.puzzles.step(identifiers, vectors.grad, settings.puzzle_learning_rate * factor, decay)
    rows, limit = len(labels) * checkpoints.world(), model.config.max_steps
    least = halting.least_steps(seed, step, rows, settings.exploration, limit).chunk(checkpoints.world())
    halted = halting.halt(model, carry, state, q, least[checkpoints.rank()].to(labels.device))
    tally.add(found, q, halted, admitted, norm)
    return halted


def gradient_norm(model: nn.Module, clip: float) -> Tensor:
    """The norm of the gradient, which is clipped to `clip` (0: left as it is)."""
    parameters = list(model.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip:
        clip_grads_with_norm_(parameters, clip, norm)
    return norm


def fits(config: TRMConfig, settings: TRMTraining, data: Puzzles, ranks: int) -> None:
    """Raise ValueError where the data is not what the network was made for, or the batch cannot be divided."""
    for name in ("vocab_size", "seq_len", "num_identifiers"):
        if getattr(data, name) != getattr(config, name):
            raise ValueError(f"{name}: the data has {getattr(data, name)}, the network {getattr(config, name)}")
    if settings.batch_size % ranks:
        raise ValueError(f"training.batch_size: {settings.batch_size} is not divisible by {ranks} processes")


class Tally:
    """Sums since the last log. What is said of puzzles counts those that were done, at the step they were done in."""

    BATCH = ("loss", "gradient_norm")
    ROWS = ("cell_loss", "halt_loss", "continue_loss")
    DONE = ("accuracy", "exact_accuracy", "halt_accuracy", "steps")

    def __init__(self, state: Mapping[str, Tensor]):
        self.sums: Tensor | None = state.get("sums")
        self.began = time.perf_counter()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, so that a resumed run logs what an undisturbed one does."""
        return {} if self.sums is None else {"sums": self.sums}

    def add(self, found: Losses, q_B2: Tensor, halted: Carry, admitted: Tensor, norm: Tensor) -> None:
        done = halted.halted_B & found.labelled_B
        halt_right = (q_B2[:, 0] >= 0) == found.solved_B
        rows = [x.sum() for x in (found.cells_B, found.halt_B, found.go_on_B)]
        puzzles = [(x * done).sum() for x in (found.accuracy_B, found.solved_B, halt_right, halted.steps_B)]
        one, batch = torch.ones(()), torch.tensor(len(done))
        parts = [one, found.loss.detach(), norm, batch, *rows, done.sum(), *puzzles, admitted]
        sums = torch.stack([part.detach().to(q_B2.device, torch.float32) for part in parts])
        self.sums = sums if self.sums is None else self.sums + sums

    def take(self) -> dict[str, float]:
        """What was added since it was last asked, of all processes."""
        assert self.sums is not None, "something was added"
        if together():
            dist.all_reduce(self.sums)
        steps, loss, norm, rows, *rest = self.sums.tolist()
        per_row, done, per_puzzle, admitted = rest[:3], rest[3], rest[4:8], rest[8]
        values = {name: x / steps for name, x in zip(self.BATCH, (loss, norm), strict=True)}
        values |= {name: x / rows for name, x in zip(self.ROWS, per_row, strict=True)}
        if done:
            values |= {name: x / done for name, x in zip(self.DONE, per_puzzle, strict=True)}
        seconds, self.began = time.perf_counter() - self.began, time.perf_counter()
        values |= {"puzzles": admitted, "seconds_per_step": seconds * checkpoints.world() / steps}
        self.sums = None
        return values


class Log:
    """The metrics file of the first process; lines of steps after `step` are dropped, as if they had never been."""

    def __init__(self, path: Path, step: int, watch: Callable[[dict], None] | None):
        self.path, self.watch = path, watch
        if checkpoints.rank() == 0:
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            cache.write(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in kept).encode()))

    def __call__(self, step: int, values: dict) -> None:
        if checkpoints.rank() != 0:
            return
        line = {"step": step, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self.watch is not None:
            self.watch(line)
