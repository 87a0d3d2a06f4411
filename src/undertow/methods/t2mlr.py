"""T2MLR: a middle-layer state of token t-1 enters an earlier layer of token t (arXiv 2607.15178)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from undertow.edges import Edge
from undertow.methods.base import Method, Parts, span_of
from undertow.mixers import Gated, Residual, projection
from undertow.schedules import Cyclic

MIXERS = {"gated": Gated}
CARRIES = (None, "residual")


@dataclass(frozen=True)
class T2MLR(Method):
    """One delay-1 edge: out(layer `end`) -> input of layer `start`, mixed by a gate.

    The published training schedule is `Jacobi(16, backward=4, start="unmixed")`; the default here is the adjoint
    gradient, which costs half and is closer to the true gradient (docs/schedules.md).

    Args:
        start, end: 0-based, end inclusive, negatives from the end; start == end is allowed.
        mixer: `"gated"`.
        project: a bias-free linear map of the memory before the mixer, as in every published run.
        gain: of the gate weights (published: 1.0 from scratch, 1e-2 for pretrained models).
        carry: None, or `"residual"`: `R_t = N(h_t + w R_{t-1})`.
        carry_weight, carry_norm, carry_detach: w, whether N acts, and whether R_{t-1} carries no gradient.
    """

    kind: ClassVar[str] = "time"
    start: int
    end: int
    mixer: str = "gated"
    carry: str | None = None
    project: bool = True
    gain: float = 1.0
    carry_weight: float = 1.0
    carry_norm: bool = True
    carry_detach: bool = True

    def __post_init__(self):
        self._whole("start")
        self._whole("end")
        if self.mixer not in MIXERS:
            raise ValueError(f"T2MLR mixer={self.mixer!r}: allowed are {sorted(MIXERS)}")
        if self.carry not in CARRIES:
            raise ValueError(f"T2MLR carry={self.carry!r}: allowed are {CARRIES}")
        if self.start >= 0 and self.end >= 0 and self.start > self.end:
            raise ValueError(f"T2MLR start={self.start}, end={self.end}: start must not be greater than end")

    def build(self, shape, retrofit):
        start, end = span_of(self, shape)
        modules = {"memory_mixer": MIXERS[self.mixer](shape.width, gain=self.gain)}
        if self.project:
            modules["memory_projection"] = projection(shape.width, shape.width)
        if self.carry:
            modules["memory_carry"] = Residual(self.carry_weight, self.carry_norm, self.carry_detach)
        edge = Edge(
            end,
            start,
            mixer="memory_mixer",
            project="memory_projection" if self.project else None,
            carry="memory_carry" if self.carry else None,
        )
        return Parts(edges=(edge,), modules=modules, schedule=Cyclic(8, 3, adjoint=4))
