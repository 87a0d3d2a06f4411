"""Coconut: thoughts as last states, fed back in place of an embedding (Hao et al., arXiv 2412.06769, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from undertow.edges import Edge
from undertow.methods.base import Method, Parts
from undertow.mixers import Add
from undertow.plan import NORM
from undertow.schedules import Sequential


@dataclass(frozen=True)
class Coconut(Method):
    """One delay-1 edge, the last state after the final norm -> the input of layer 0, at marked positions only.

    A latent token has no embedding of its own: its input is `p_t + M_{t-1}`, p_t the position's (in families that learn
    them). Elsewhere nothing changes.

    Args:
        token: id of the latent token `<latent>`: positions that hold it are marked. None: those where a caller's
            `memory_mask` is 1 (without one: all); the tokens generated after those it covers are words.
    """

    kind: ClassVar[str] = "time"
    token: int | None = None

    def __post_init__(self):
        self._whole("token", 0, optional=True)

    def build(self, shape, retrofit):
        edge = Edge(NORM, 0, mixer="thought")
        modules = {"thought": Add()}
        return Parts(edges=(edge,), modules=modules, schedule=Sequential(), mark=self.token, beyond=False)
