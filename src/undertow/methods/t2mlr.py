"""T2MLR: a middle-layer state of token t-1 enters an earlier layer of token t (arXiv 2607.15178)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from undertow import mixers
from undertow.edges import Edge
from undertow.maps import perceptron
from undertow.methods.base import Method, Parts, span_of
from undertow.mixers import Mixer, Residual, Skip, projection
from undertow.registry import check_options
from undertow.schedules import Cyclic


class LowRank(nn.Module):
    """A map of the memory close to the identity: `m + a U_n act(.. U_1 m)`, all U bias-free and orthogonal.

    `layers` is n, `bottleneck` the inner width; a is a learned scalar, 1e-4 at the start.
    """

    def __init__(self, width: int, *, bottleneck: int, layers: int = 2, activation: str = "gelu"):
        super().__init__()
        if layers < 2:
            raise ValueError(f"layers={layers}: must be at least 2")
        self.net = perceptron(width, bottleneck, width, layers, activation, bias=False)
        for weight in self.net.parameters():
            start = torch.empty_like(weight, dtype=torch.float32)  # the factorisation knows no half precision
            weight.data.copy_(nn.init.orthogonal_(start))
        self.scale = nn.Parameter(torch.full((1,), 1e-4))

    def forward(self, m: Tensor) -> Tensor:
        return m + self.scale * self.net(m)


class Detached(nn.Module):
    """A map of the memory (None: the memory itself) that carries no gradient back in time."""

    def __init__(self, project: nn.Module | None):
        super().__init__()
        self.project = project

    def forward(self, m: Tensor) -> Tensor:
        return m.detach() if self.project is None else self.project(m.detach())


MIXERS: dict[str, type[Mixer]] = {
    "gated": mixers.Gated,
    "alpha_coupled": mixers.AlphaCoupled,
    "var_norm_gated": mixers.VarNormGated,
    "exponential_rotational_gated": mixers.ExponentialRotationalGated,
    "constant_weight": mixers.ConstantWeight,
    "concat": mixers.Concat,
    "baseline_coconut": mixers.Replace,
    "baseline_codi": mixers.Codi,
}
PROJECTIONS: dict[str | None, Callable[..., nn.Module | None]] = {
    None: lambda width: None,
    "linear": lambda width: projection(width, width),
    "mlp": LowRank,
}


@dataclass(frozen=True)
class T2MLR(Method):
    """One delay-1 edge: out(layer `end`) -> input of layer `start`, merged by a mixer.

    Published under `Jacobi(16, backward=4, start="unmixed")`; the default here costs half and has a truer gradient.

    Args:
        start, end: 0-based, end inclusive, negatives from the end; start == end is allowed.
        mixer: one of `MIXERS`; `mixer_options`: its own keyword arguments (docs/methods/t2mlr.md has the table).
        carry: None; `"residual"`: `R_t = N(h_t + w R_{t-1})`; `"skip"`: layer `end` puts out `h_t + N(w R_{t-1})`.
        carry_weight, carry_norm, carry_detach: w, whether N acts, and whether R_{t-1} carries no gradient there.
        project: map of the memory before the mixer: `"linear"` (as in every published run), `"mlp"` (`LowRank`), None,
            or `"auto"`: linear unless the published mixer has none. `project_options`: its keyword arguments.
        pre_norm: of both streams before the mixer, `"rmsnorm"` or `"layernorm"`.
        post_norm: whether N acts on what the mixer makes; the mixers without gates take it and do not apply it.
        detach: no gradient flows through time at all.

    Raises:
        ValueError: a value that is not allowed, an option that nothing reads, or `start` after `end`.
    """

    kind: ClassVar[str] = "time"
    start: int
    end: int
    mixer: str = "gated"
    carry: str | None = None
    project: str | None = "auto"
    pre_norm: str | None = None
    post_norm: bool = False
    detach: bool = False
    carry_weight: float = 1.0
    carry_norm: bool = True
    carry_detach: bool = True
    mixer_options: dict[str, Any] = field(default_factory=dict, hash=False)
    project_options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self):
        self._whole("start")
        self._whole("end")
        if self.start >= 0 and self.end >= 0 and self.start > self.end:
            raise ValueError(f"T2MLR start={self.start}, end={self.end}: start must not be greater than end")
        for name, allowed in (
            ("mixer", tuple(MIXERS)),
            ("carry", (None, "residual", "skip")),
            ("project", ("auto", *PROJECTIONS)),
            ("pre_norm", (None, *mixers.NORMS)),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"T2MLR {name}={getattr(self, name)!r}: allowed are {allowed}")
        carried = (self.carry_weight, self.carry_norm, self.carry_detach)
        if self.carry is None and carried != (1.0, True, True):
            raise ValueError(f"T2MLR carry_weight, carry_norm, carry_detach = {carried}: carry=None has none of them")
        if self.post_norm and not MIXERS[self.mixer].post_normed:
            warnings.warn(f"T2MLR post_norm=True: mixer={self.mixer!r} does not apply it, as published", stacklevel=3)
        if self.carry and self.detach and not self.carry_detach:
            raise ValueError("T2MLR carry_detach=False: with detach=True no gradient flows through time at all")
        for name in ("mixer_options", "project_options"):
            object.__setattr__(self, name, dict(getattr(self, name)))  # the caller's dict may change
        check_options(MIXERS[self.mixer], self.mixer_options, f"T2MLR mixer={self.mixer!r}: option")
        check_options(PROJECTIONS[self._map()], self.project_options, f"T2MLR project={self.project!r}: option")

    def _map(self) -> str | None:
        return self.project if self.project != "auto" else "linear" if MIXERS[self.mixer].projected else None

    def build(self, shape, retrofit):
        (start, end), width = span_of(self, shape), shape.width
        around = dict(pre_norm=self.pre_norm, post_norm=self.post_norm, retrofit=retrofit)
        modules = {"memory_mixer": MIXERS[self.mixer](width, **self.mixer_options, **around)}
        project, carry = PROJECTIONS[self._map()](width, **self.project_options), None
        if self.detach or project is not None:
            modules["memory_projection"] = Detached(project) if self.detach else project
        if self.carry == "residual":
            carry = "memory_carry"
            modules[carry] = Residual(self.carry_weight, self.carry_norm, self.carry_detach)
        through = "memory_projection" if "memory_projection" in modules else None
        edges = [Edge(end, start, "memory_mixer", project=through, carry=carry)]
        if self.carry == "skip":
            own = dict(weight=self.carry_weight, norm=self.carry_norm, detach=self.carry_detach)
            modules["memory_skip"] = Skip(width, **own, retrofit=retrofit)
            edges.append(Edge(end, end, "memory_skip", port="output", visits="last"))
        return Parts(edges=tuple(edges), modules=modules, schedule=Cyclic(8, 3, adjoint=0 if self.detach else 4))
