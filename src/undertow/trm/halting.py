"""Deep supervision with a state carried per row: each row halts on its own, and then gets a new puzzle.

A step of training is `admit` (halted rows take the puzzles offered, the others keep theirs, and what was offered to
them is dropped), one supervision step of the model, and `halt`. Nothing here is random: `least_steps` is a function of
the seed and the step, so a resumed run draws what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from undertow.trm.model import TRM, Registers

Batch = Mapping[str, Tensor]  # inputs and labels `_BL`, puzzle_identifiers `_B`
DRAWS = 0x7E2  # sets these draws apart from others of the same seed


@dataclass(frozen=True)
class Carry:
    """What the rows of a batch take from one step to the next.

    Attributes:
        state: registers `_BSD`.
        steps_B: supervision steps the row's puzzle has had; `halted_B`: whether it is done.
        data: the row's puzzle.
    """

    state: Registers
    steps_B: Tensor
    halted_B: Tensor
    data: dict[str, Tensor]


def first(model: TRM, batch: Batch) -> Carry:
    """The carry before training: every row is done, so the first `admit` gives each a puzzle."""
    rows = batch["inputs"]
    done = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    return Carry(model.start(len(rows)), torch.zeros_like(done, dtype=torch.int64), done, dict(batch))


def admit(model: TRM, carry: Carry, batch: Batch) -> Carry:
    """Halted rows start on the puzzles of `batch`; the others go on with theirs."""
    halted = carry.halted_B

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(halted.view(-1, *[1] * (old.ndim - 1)), new, old)

    state = {r: choose(new, carry.state[r]) for r, new in model.start(len(halted)).items()}
    data = {name: choose(batch[name], old) for name, old in carry.data.items()}
    return Carry(state, carry.steps_B.masked_fill(halted, 0), torch.zeros_like(halted), data)


def halt(model: TRM, carry: Carry, state: Registers, q_B2: Tensor, least_B: Tensor | None = None) -> Carry:
    """The carry after a step: a row is done at the step limit, or where the halt head says so.

    Args:
        state, q_B2: what the step gave.
        least_B: steps before which the halt head is not heard (None: it always is).
    """
    steps, limit = carry.steps_B + 1, model.config.max_steps
    wants = model.wants_to_halt(q_B2.detach())
    if least_B is not None:
        wants = wants & (steps >= least_B)
    return Carry(state, steps, (steps >= limit) | wants, carry.data)


def least_steps(seed: int, step: int, rows: int, probability: float, max_steps: int) -> Tensor:
    """`_B`: with this probability a number of 2..max_steps, else 0; drawn anew in each step, as published.

    `rows`: of all ranks together, so that a batch draws the same however it is divided.
    """
    draw = np.random.default_rng((DRAWS, seed, step))
    explores = draw.random(rows) < probability
    return torch.from_numpy(explores * draw.integers(2, max(max_steps, 2) + 1, rows))


@torch.no_grad()
def worth_of_going_on(model: TRM, carry: Carry, state: Registers, vectors_BW: Tensor | None) -> Tensor:
    """The target of q_continue, `_B`: what the better choice of the next step is worth; at the limit, halting.

    It takes one more forward, from `state`, which the step just gave.
    """
    q_B2 = model(state, carry.data["inputs"], vectors_BW)[2]
    best = torch.where(carry.steps_B + 1 >= model.config.max_steps, q_B2[:, 0], q_B2.max(-1).values)
    return best.sigmoid()
