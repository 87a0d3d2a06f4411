"""Loops over the whole stack or its middle, with optional input injection.

Block recurrence is ILR's baseline (arXiv 2505.01855: the pass j > 0 starts from x + e); the middle loop with prelude
and coda is Huginn's form (arXiv 2502.05171).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from undertow.edges import Edge
from undertow.methods.base import Method, Parts, span_of
from undertow.mixers import Add, Scaled
from undertow.plan import EMBED, Loop, Plan, Visit


def _looped(start: int, end: int, layers: int, times: int, inject: bool, retrofit: bool) -> Parts:
    """Layers start..end `times` over; injection adds what entered the loop to every round but the first."""
    core = tuple(Visit(i) for i in range(start, end + 1))
    plan: Plan = (*(Visit(i) for i in range(start)), Loop(core, times), *(Visit(i) for i in range(end + 1, layers)))
    if not inject or times == 1:
        return Parts(plan=plan)
    source = EMBED if start == 0 else start - 1
    edge = Edge(source, start, mixer="inject", delay=0, visits="later")
    return Parts(plan=plan, edges=(edge,), modules={"inject": Scaled() if retrofit else Add()})


@dataclass(frozen=True)
class BlockLoop(Method):
    """The whole stack, `times` times; `inject` adds the embedding before every pass but the first."""

    kind: ClassVar[str] = "depth"
    times: int
    inject: bool = False

    def __post_init__(self):
        self._whole("times", 1)

    def build(self, shape, retrofit):
        return _looped(0, shape.layers - 1, shape.layers, self.times, self.inject, retrofit)


@dataclass(frozen=True)
class MiddleLoop(Method):
    """Prelude, `times` rounds of layers start..end (inclusive, negatives from the end), coda.

    `inject` adds the prelude's output to the input of every round but the first, which starts from it.
    """

    kind: ClassVar[str] = "depth"
    start: int
    end: int
    times: int
    inject: bool = False

    def __post_init__(self):
        self._whole("start")
        self._whole("end")
        self._whole("times", 1)

    def build(self, shape, retrofit):
        start, end = span_of(self, shape)
        return _looped(start, end, shape.layers, self.times, self.inject, retrofit)
