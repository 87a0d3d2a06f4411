"""Intra-Layer Recurrence: every layer has its own number of repetitions (ILR, arXiv 2505.01855)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from undertow.edges import Edge
from undertow.methods.base import Method, Parts
from undertow.mixers import Add, Scaled
from undertow.plan import EMBED, Loop, Visit


@dataclass(frozen=True)
class ReuseMap(Method):
    """`x <- e; for l: repeat r_l times: x <- f_l(x)`, the same weights each time, each visit its own keys and values.

    Args:
        counts: r_1..r_L, one a layer. All ones is the backbone itself.
        recurrent: the input of every repetition but the first is x + p, p the state that entered the layer (the
            published code's `use_recurrent_embeds`). Retrofitted: x + s p with one trained s, 0 at the start.
    """

    kind: ClassVar[str] = "depth"
    counts: tuple[int, ...]
    recurrent: bool = False

    def __post_init__(self):
        counts = self.counts
        whole = isinstance(counts, list | tuple) and all(isinstance(r, int) and not isinstance(r, bool) for r in counts)
        if not whole or not counts or min(counts) < 1:
            raise ValueError(f"ReuseMap counts={counts!r}: must be whole numbers of at least 1, one a layer")
        if not isinstance(self.recurrent, bool):
            raise ValueError(f"ReuseMap recurrent={self.recurrent!r}: must be True or False")
        object.__setattr__(self, "counts", tuple(counts))

    def build(self, shape, retrofit):
        if len(self.counts) != shape.layers:
            n = len(self.counts)
            raise ValueError(
                f"ReuseMap counts={list(self.counts)} has {n} entries: the model has {shape.layers} layers"
            )
        plan = tuple(Loop((Visit(i),), r) for i, r in enumerate(self.counts))
        if not self.recurrent:
            return Parts(plan=plan)
        # The latest output of the layer before is what entered this one, whichever repetition reads it.
        edges = tuple(
            Edge(i - 1 if i else EMBED, i, mixer="recur", delay=0, visits="later")
            for i, r in enumerate(self.counts)
            if r > 1
        )
        return Parts(plan=plan, edges=edges, modules={"recur": Scaled() if retrofit else Add()})

    def looped(self, loops: int | tuple[int, ...]) -> ReuseMap:
        """With these counts; a whole number gives every layer that count."""
        return replace(self, counts=loops if isinstance(loops, list | tuple) else (loops,) * len(self.counts))
