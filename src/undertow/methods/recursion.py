"""The recursion of Tiny Recursive Models as a plan: n times z, then y, and that T times over (arXiv 2510.04871)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from undertow.mixers import Blend
from undertow.plan import Loop, Plan, Visit

# form -> what enters an update of z, and one of y, beside the register itself. In the dual form `y` holds y - x.
FORMS = {
    "post": (("y", "h"), ("z",)),
    "branch": (("y", "h"), ("z",)),
    "dual": (("y", "h", "h"), ("z", "h")),
}


def cycles(
    z: Plan,
    y: Plan,
    inner: int,
    outer: int,
    grad_cycles: int = 1,
    grad_inner: int | None = None,
    last: Plan | None = None,
) -> Plan:
    """`inner` times the visits `z`, then the visits `y`, and that `outer` times; gradient in the last cycles alone.

    The one place that says so: language models with a tiny block and puzzle models build their plans here, and the
    executor runs them all.

    Args:
        grad_cycles: how many of the last cycles carry gradient.
        grad_inner: how many of the last runs of `z` in the last cycle do (None: all of them).
        last: stands for `y` at the end of the last cycle (None: `y`).
    """
    before = Loop((Loop(z, inner), *y), outer - 1, grad_last=grad_cycles - 1)
    return (before, Loop(z, inner, grad_last=grad_inner), *(y if last is None else last))


def recursion(
    blocks: tuple[str, ...],
    inner: int,
    outer: int,
    last_writes: str = "y",
    form: str = "post",
    grad_cycles: int = 1,
    prefix: bool = False,
) -> Plan:
    """`inner` times z <- R(z, y, x), then y <- R(y, z), `outer` such cycles; R is `blocks` in turn, x the register h.

    How R takes what enters: `"post"` in the sum it starts from, `"branch"` injected into every block beside its own
    register, `"dual"` in the sum and injected into the last block, which takes it away again.

    Args:
        last_writes: the register that the very last visit writes instead of y.
        grad_cycles: how many of the last cycles carry gradient.
        prefix: whether the visits may attend in both directions within a prefix that a caller marks.
    """

    def apply(own: str, others: tuple[str, ...], writes: str) -> Plan:
        visits = []
        for i, block in enumerate(blocks):
            last = i == len(blocks) - 1
            reads = (own, *others) if i == 0 and form != "branch" else (own,)
            inject = others if form == "branch" or (form == "dual" and last) else ()
            visits.append(Visit(block, reads, writes if last else own, inject=inject, prefix=prefix))
        return tuple(visits)

    into_z, into_y = FORMS[form]
    y, last = apply("y", into_y, "y"), apply("y", into_y, last_writes)
    return cycles(apply("z", into_z, "z"), y, inner, outer, grad_cycles, last=last)


class DualBlend(Blend):
    """The gated exit of the dual form, `s y + (1 - s) m`, where the register x holds y less the stream m."""

    def forward(self, x: Tensor, m: Tensor, a: Tensor) -> Tensor:
        return super().forward(x + m, m, a)


class Zero(nn.Module):
    """A start of zeros that no training moves (saved like a parameter: loading fills in nothing else)."""

    value: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("value", torch.zeros(1))

    def forward(self) -> Tensor:
        return self.value
