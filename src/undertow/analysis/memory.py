"""What training keeps between a forward pass and its backward, without computing either.

A schedule's live sweeps each leave their activations to the backward, dead ones nothing, an adjoint those of one sweep.
The forward runs on tensors that have shapes but no values: nothing is allocated, however large the model.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from undertow.analysis.counts import saved_bytes
from undertow.model import UndertowForCausalLM
from undertow.schedules import Jacobi, Schedule, Sequential

__all__ = ["kept_bytes"]

_SHORT = (4, 8, 12)  # lengths that a quadratic is drawn through


def kept_bytes(model: UndertowForCausalLM, T: int, schedule: Schedule) -> int:
    """Bytes that one row of T tokens and its loss keep for the backward, in float32 on a CPU, without checkpointing.

    Weights, their gradients and the optimiser's state are not in it. Exact where every sweep takes all positions,
    within 2 % elsewhere: attention may take another kernel for tensors without values; and `Sequential`, which copies
    the keys and values so far at each token, is a quadratic in T, drawn through three short rows instead of run.

    Args:
        model: on any device, meta too.

    Raises:
        ValueError: `Converge` without an adjoint: how many rounds it keeps depends on the values.
    """
    if schedule.adjoint is not None:
        schedule = Jacobi(1, backward=0)
    if isinstance(schedule, Sequential) and max(_SHORT) < T:
        return _through({t: kept_bytes(model, t, schedule) for t in _SHORT}, T)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        shapes = AutoModelForCausalLM.from_config(model.config).train()
        x_BT = torch.zeros(1, T, dtype=torch.long)
        return saved_bytes(lambda: shapes(x_BT, labels=x_BT, schedule=schedule, use_cache=False), shapes)


def _through(known: dict[int, int], T: int) -> int:
    """The value at T of the polynomial through `known` (Lagrange)."""
    total = Fraction(0)
    for t, value in known.items():
        term = Fraction(value)
        for other in known.keys() - {t}:
            term *= Fraction(T - other, t - other)
        total += term
    return int(total)
