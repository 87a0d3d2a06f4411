"""LRT, the Latent Recurrent Transformer: a late state of token t-1 enters every layer of token t (arXiv 2605.26797)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from undertow.edges import Edge
from undertow.methods.base import Method, Parts
from undertow.mixers import HeadGate, Scaled, projection
from undertow.schedules import Interleaved


@dataclass(frozen=True)
class LRT(Method):
    """Delay-1 edges from one source to the input, keys and values of every visit of every layer.

    The memory is the weightless RMS norm of out(source). Inputs: `u = x + gamma_l m`. Keys and values:
    `k = g_loc k_loc + g_mem P^K m`, `(g_loc, g_mem) = 2 sig(W_g a)` per token and key/value head, one pair of gates a
    layer for both (section 2 of the paper).

    Args:
        source: the layer whose state is carried (negatives from the end; the paper finds upper-middle layers best).
        shared: one pair of maps P^K, P^V for all layers (+2 D d_kv parameters, the paper's default) or one a layer.
        residual, key, value: which of the three injections are on (the paper finds both kinds complementary).
        residual_scale: gamma at the start, from scratch (retrofit: 0).
    """

    kind: ClassVar[str] = "time"
    source: int = -1
    shared: bool = True
    residual: bool = True
    key: bool = True
    value: bool = True
    residual_scale: float = 0.1

    def __post_init__(self):
        self._whole("source")
        if not (self.residual or self.key or self.value):
            raise ValueError("LRT residual=False, key=False, value=False: at least one injection must be on")

    def build(self, shape, retrofit):
        source = shape.layer(self.source, "LRT source")
        edges, modules = [], {}
        ports = [port for port, on in (("key", self.key), ("value", self.value)) if on]
        for layer in range(shape.layers):
            if self.residual:
                modules[f"residual_{layer}"] = Scaled(0.0 if retrofit else self.residual_scale)
                edges.append(Edge(source, layer, f"residual_{layer}", visits="all", norm=True))
            if ports:
                modules[f"gate_{layer}"] = HeadGate(shape.width, shape.kv_heads, retrofit)
            for port in ports:
                name = f"memory_{port}" if self.shared else f"memory_{port}_{layer}"
                if name not in modules:
                    modules[name] = projection(shape.width, shape.kv_width, uniform=True)
                edges.append(Edge(source, layer, f"gate_{layer}", port=port, visits="all", project=name, norm=True))
        return Parts(edges=tuple(edges), modules=modules, schedule=Interleaved(2))
