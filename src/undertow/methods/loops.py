"""Loops over the whole stack or its middle, with optional input injection.

Block recurrence is ILR's baseline (arXiv 2505.01855: the pass j > 0 starts from x + e); the middle loop with prelude
and coda is Huginn's form (arXiv 2502.05171).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import log
from typing import ClassVar

import torch
from torch import Tensor, nn

from undertow.agree import drawn
from undertow.edges import Edge
from undertow.methods.base import Method, Parts, span_of
from undertow.mixers import Add, Scaled
from undertow.plan import EMBED, Loop, Plan, Visit

INJECTS = (False, True, "concat")
MOST = 8  # a drawn count is at most this many times its mean: the tail of a log-normal could fill any memory


class Concat(nn.Module):
    """`W [x; m]`, bias-free (Huginn's adapter, arXiv 2502.05171 section 3), W = [I, 0] at the start: the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.map = nn.Linear(2 * width, width, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(torch.cat([torch.eye(width), torch.zeros(width, width)], 1))

    def forward(self, x: Tensor, m: Tensor, a: Tensor) -> Tensor:
        return self.map(torch.cat([x, m], -1))


def _looped(
    start: int, end: int, shape, times: int, inject: bool | str, retrofit: bool, grad_last: int | None = None
) -> Parts:
    """Layers start..end `times` over. What entered it is injected into every round (concat), or all but the first.

    The mixer exists whatever the count, so that a model can be run with another one.
    """
    core = tuple(Visit(i) for i in range(start, end + 1))
    coda = tuple(Visit(i) for i in range(end + 1, shape.layers))
    plan: Plan = (*(Visit(i) for i in range(start)), Loop(core, times, grad_last), *coda)
    if not inject:
        return Parts(plan=plan)
    concat = inject == "concat"
    mixer = Concat(shape.width) if concat else Scaled() if retrofit else Add()
    source = EMBED if start == 0 else start - 1
    edge = Edge(source, start, mixer="inject", delay=0, visits="all" if concat else "later")
    return Parts(plan=plan, edges=(edge,), modules={"inject": mixer})


@dataclass(frozen=True)
class BlockLoop(Method):
    """The whole stack, `times` times; `inject` adds the embedding before every pass but the first."""

    kind: ClassVar[str] = "depth"
    times: int
    inject: bool = False

    def __post_init__(self):
        self._whole("times", 1)
        if not isinstance(self.inject, bool):
            raise ValueError(f"BlockLoop inject={self.inject!r}: allowed are (False, True)")

    def looped(self, loops):
        return replace(self, times=loops)

    def build(self, shape, retrofit):
        return _looped(0, shape.layers - 1, shape, self.times, self.inject, retrofit)


@dataclass(frozen=True)
class MiddleLoop(Method):
    """Prelude, `times` rounds of layers start..end (inclusive, negatives from the end), coda (arXiv 2502.05171).

    Args:
        inject: how the prelude's output e enters the rounds: not at all; True: added to the state before every round
            but the first, which starts from e; `"concat"`: `W [s; e]` before every round (the published form).
        sample: in training every forward draws its rounds, `r = Poisson(exp(tau)) + 1` with
            `tau ~ N(log(times - 1) - sample^2 / 2, sample)`: `times` on average (published: 0.5).
        grad_last: only this many last rounds carry gradient (published: 8; None: all).
    """

    kind: ClassVar[str] = "depth"
    start: int
    end: int
    times: int
    inject: bool | str = False
    sample: float | None = None
    grad_last: int | None = None

    def __post_init__(self):
        self._whole("start")
        self._whole("end")
        self._whole("times", 1)
        self._whole("grad_last", 1, optional=True)
        if not any(self.inject is allowed or self.inject == allowed == "concat" for allowed in INJECTS):
            raise ValueError(f"MiddleLoop inject={self.inject!r}: allowed are {INJECTS}")
        if self.sample is not None and (type(self.sample) not in (int, float) or self.sample <= 0 or self.times < 2):
            raise ValueError(
                f"MiddleLoop sample={self.sample!r}, times={self.times}: sample must be None or a number above 0, "
                "with times of at least 2"
            )
        cut = self.grad_last is not None and (self.sample is not None or self.grad_last < self.times)
        if cut and not self.inject:
            raise ValueError(
                f"MiddleLoop grad_last={self.grad_last} without inject: rounds without gradient would cut the prelude "
                "off from the loss, so it would never be trained; inject=True or 'concat' leads around them"
            )

    def draw(self):
        if self.sample is None:
            return None
        mean = torch.tensor(log(self.times - 1) - self.sample**2 / 2, device="cpu")
        rounds = torch.poisson(torch.normal(mean, torch.tensor(float(self.sample), device="cpu")).exp()) + 1
        return drawn(rounds.clamp(max=MOST * self.times).long())

    def looped(self, loops):
        return replace(self, times=loops, sample=None, grad_last=self.grad_last if self.inject else None)

    def build(self, shape, retrofit):
        start, end = span_of(self, shape)
        return _looped(start, end, shape, self.times, self.inject, retrofit, self.grad_last)
