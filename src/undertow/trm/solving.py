"""A trained model at work: the answer after every supervision step, early exit, and accuracy against steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undertow.training.precision import autocast
from undertow.trm.halting import Batch
from undertow.trm.losses import IGNORED
from undertow.trm.model import TRM

SURE = (0.5, 0.9, 0.99)  # how sure the halt head must be, as probabilities


@dataclass(frozen=True)
class Answer:
    """What the model says after a step, counted from 1.

    Attributes:
        tokens_BL: the answer; `rows_B`: which of the puzzles these are.
        margin_B: by how much the halt head prefers to stop, as a logit: it stops above 0.
    """

    step: int
    tokens_BL: Tensor
    margin_B: Tensor
    rows_B: Tensor


@torch.no_grad()
def answers(
    model: TRM,
    inputs_BL: Tensor,
    identifiers_B: Tensor | None = None,
    early_exit: bool = False,
    sure: float = 0.5,
    precision: str = "float32",
) -> Iterator[Answer]:
    """The answer of every supervision step, up to the model's limit, on the model's device.

    Args:
        identifiers_B: whose vectors to use (None: nobody's, 0).
        early_exit: puzzles for which the halt head is `sure` leave the batch, and cost nothing from then on.

    Raises:
        ValueError: puzzles of another length, tokens or identifiers that the model does not know.
    """
    where = model.head.weight.device
    inputs = inputs_BL.to(where)
    ids = torch.zeros(len(inputs), dtype=torch.int64) if identifiers_B is None else identifiers_B
    check(model, inputs, ids)
    state, vectors, rows = model.start(len(inputs)), model.vectors(ids.to(where)), torch.arange(len(inputs))
    for step in range(1, model.config.max_steps + 1):
        with autocast(precision, where):
            state, logits, q = model(state, inputs, vectors)
        margin = q[:, 0] - q[:, 1] if model.config.compares else q[:, 0]
        yield Answer(step, logits.argmax(-1), margin, rows)
        if early_exit:
            stay = margin <= logit(sure)
            state = {register: x[stay] for register, x in state.items()}
            inputs, rows = inputs[stay], rows[stay.cpu()]
            vectors = None if vectors is None else vectors[stay]
            if not len(rows):
                return


def solve(
    model: TRM, inputs_BL: Tensor, identifiers_B: Tensor | None = None, early_exit: bool = True, sure: float = 0.5
) -> tuple[Tensor, Tensor]:
    """The last answers, `tokens_BL`, and how many steps each took, `_B`; arguments as of `answers`."""
    tokens = torch.zeros_like(inputs_BL, device="cpu")
    steps = torch.zeros(len(inputs_BL), dtype=torch.int64)
    for answer in answers(model, inputs_BL, identifiers_B, early_exit, sure):
        tokens[answer.rows_B], steps[answer.rows_B] = answer.tokens_BL.cpu(), answer.step
    return tokens, steps


def evaluate(model: TRM, batches: Iterable[Batch], precision: str = "float32", sures: Sequence[float] = SURE) -> dict:
    """Accuracy on labelled puzzles after all steps, after each, and where the halt head stops them.

    Returns:
        `puzzles`; `exact_accuracy` (whole puzzles) and `accuracy` (cells) after the last step; `by_step`: both after
        each step; `early_exit`: for each of `sures` both, and the mean number of `steps` that puzzles then take.

    Raises:
        ValueError: no labelled puzzle, or puzzles that are not the model's.
    """
    solved, right, margins = [], [], []  # each one `(steps, B)` a batch
    for batch in batches:
        labels = batch["labels"]
        known = labels != IGNORED
        some, count = known.any(-1), known.sum(-1).clamp(min=1)
        found = list(answers(model, batch["inputs"], batch["puzzle_identifiers"], precision=precision))
        cells = torch.stack([((a.tokens_BL.cpu() == labels) & known).sum(-1) for a in found])
        solved.append((cells == count)[:, some])
        right.append((cells / count)[:, some])
        margins.append(torch.stack([a.margin_B.float().cpu() for a in found])[:, some])
    if not solved or not sum(part.shape[1] for part in solved):
        raise ValueError("no labelled puzzle to evaluate on")
    by_step = {"exact_accuracy": torch.cat(solved, 1).double(), "accuracy": torch.cat(right, 1).double()}
    margin, limit = torch.cat(margins, 1), model.config.max_steps

    exits = []
    for sure in sures:
        stops = margin > logit(sure)
        stops[-1] = True
        at = stops.int().argmax(0, keepdim=True)  # the first step that stops
        found_there = {name: values.gather(0, at).mean().item() for name, values in by_step.items()}
        exits.append({"sure": sure, "steps": at.double().mean().item() + 1, **found_there})
    return {
        "puzzles": margin.shape[1],
        "steps": limit,
        **{name: values[-1].mean().item() for name, values in by_step.items()},
        "by_step": {name: values.mean(1).tolist() for name, values in by_step.items()},
        "early_exit": exits,
    }


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def check(model: TRM, inputs_BL: Tensor, identifiers_B: Tensor) -> None:
    """Raise ValueError where these are not puzzles of this model."""
    config = model.config
    if inputs_BL.ndim != 2 or inputs_BL.shape[1] != config.seq_len:
        raise ValueError(f"puzzles of shape {tuple(inputs_BL.shape)}: this model takes (rows, {config.seq_len})")
    for name, values, limit in (
        ("token", inputs_BL, config.vocab_size),
        ("identifier", identifiers_B, config.num_identifiers),
    ):
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < limit:
            said = f"{int(values.min())}..{int(values.max())}"
            raise ValueError(f"puzzle {name}s {said}: this model knows 0..{limit - 1}")
