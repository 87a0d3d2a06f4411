"""Intra-Layer Recurrence: every layer has its own number of repetitions (ILR, arXiv 2505.01855)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from undertow.methods.base import Method, Parts
from undertow.plan import Loop, Visit


@dataclass(frozen=True)
class ReuseMap(Method):
    """`x <- e; for l: repeat r_l times: x <- f_l(x)`, the same weights each time, each visit its own keys and values.

    Args:
        counts: r_1..r_L, one a layer. All ones is the backbone itself.
    """

    kind: ClassVar[str] = "depth"
    counts: tuple[int, ...]

    def __post_init__(self):
        counts = self.counts
        whole = isinstance(counts, list | tuple) and all(isinstance(r, int) and not isinstance(r, bool) for r in counts)
        if not whole or not counts or min(counts) < 1:
            raise ValueError(f"ReuseMap counts={counts!r}: must be whole numbers of at least 1, one a layer")
        object.__setattr__(self, "counts", tuple(counts))

    def build(self, shape, retrofit):
        if len(self.counts) != shape.layers:
            n = len(self.counts)
            raise ValueError(
                f"ReuseMap counts={list(self.counts)} has {n} entries: the model has {shape.layers} layers"
            )
        return Parts(plan=tuple(Loop((Visit(i),), r) for i, r in enumerate(self.counts)))
