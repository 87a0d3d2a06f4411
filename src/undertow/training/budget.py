"""What a step costs and how many steps a budget buys. The one place that asks `analysis.flops`."""

from __future__ import annotations

import warnings

from undertow.analysis import label
from undertow.recipe import RecipeError, Training
from undertow.schedules import Converge, Cyclic, Schedule


def flops_per_row(model, seq_len: int, schedule: Schedule | None = None) -> float:
    """Training FLOPs (forward and backward) of one row of `seq_len` tokens; None is the model's training schedule.

    `Converge` costs what the data need, so where there is a memory it is counted as `ROUNDS` cyclic rounds, with a
    warning.
    """
    from undertow.analysis.flops import ROUNDS, training_flops

    schedule = model.schedule if schedule is None else schedule
    if isinstance(schedule, Converge) and model.program.memories:
        counted = Cyclic(schedule.G, ROUNDS, adjoint=schedule.adjoint)
        warnings.warn(
            f"{label(schedule)} costs what the data need; FLOPs are counted as of {label(counted)}", stacklevel=2
        )
        schedule = counted
    return float(training_flops(model, seq_len, schedule))


def steps_for(limits: Training, flops_row: float, seq_len: int, processes: int = 1) -> int:
    """Optimiser steps until the first limit of the recipe is reached, rounded to the nearest, at least 1.

    Args:
        limits: at least one of its `max_steps`, `max_tokens` and `max_flops` must be given.
        flops_row: training FLOPs of one row.
        seq_len: tokens of one row.
        processes: how many train in parallel.

    Raises:
        RecipeError: no limit.
    """
    rows = limits.batch_size * limits.accumulation * processes  # of one step
    bought = []
    if limits.max_steps is not None:
        bought.append(limits.max_steps)
    if limits.max_tokens is not None:
        bought.append(round(limits.max_tokens / (rows * seq_len)))
    if limits.max_flops is not None:
        bought.append(round(limits.max_flops / (rows * flops_row)))
    if not bought:
        raise RecipeError("training: needs one of max_steps, max_tokens, max_flops")
    return max(1, min(bought))


def evaluations_per_token(model) -> float:
    """Layer evaluations that one new token costs in generation: one a visit."""
    from undertow.analysis.flops import layer_evaluations

    return layer_evaluations(model)
