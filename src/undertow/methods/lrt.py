"""LRT, the Latent Recurrent Transformer: a late state of token t-1 enters every layer of token t (arXiv 2605.26797)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from undertow.backbone.adapter import Shape
from undertow.edges import Edge
from undertow.methods.base import Method, Parts
from undertow.mixers import Add, HeadGate, Scaled, projection
from undertow.schedules import Interleaved


@dataclass(frozen=True)
class LRT(Method):
    """Delay-1 edges from one source to the input, keys and values of every visit of every layer.

    The memory is the weightless RMS norm of out(source), with the eps of the backbone's norms. Inputs:
    `u = x + gamma_l m`. Keys and values: `k = g_loc k_loc + g_mem P^K m`, `(g_loc, g_mem) = 2 sig(W_g a[:c])` per token
    and key/value head, one pair of gates a layer for both (section 2 of the paper). The published third gate, g_tok on
    the token's own value vector, belongs to the backbone that has such vectors. As published:

        config = UndertowNanoChatConfig.from_depth(12, value="every")
        model = from_scratch(config, time=LRT())        # schedule: Interleaved(2)

    Args:
        source: the layer whose state is carried (negatives from the end; the paper finds upper-middle layers best, the
            released code has the last one).
        shared: one pair of maps P^K, P^V for all layers (+2 D d_kv parameters, the paper's default) or one a layer
            (the released code).
        residual, key, value: which of the three injections are on (the paper finds both kinds complementary).
        gates: False leaves g_loc and g_mem at 1.
        gate_channels: c, how many channels of `a` the gates read (None: all, the release's later default; earlier 32).
        residual_scale: gamma at the start, from scratch (release: 0.1; retrofit: 0).
    """

    kind: ClassVar[str] = "time"
    source: int = -1
    shared: bool = True
    residual: bool = True
    key: bool = True
    value: bool = True
    residual_scale: float = 0.1
    gates: bool = True
    gate_channels: int | None = None

    def __post_init__(self):
        self._whole("source")
        self._whole("gate_channels", 1, optional=True)
        for name in ("shared", "residual", "key", "value", "gates"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"LRT {name}={getattr(self, name)!r}: must be True or False")
        if not (self.residual or self.key or self.value):
            raise ValueError("LRT residual=False, key=False, value=False: at least one injection must be on")
        if not self.residual and self.residual_scale != 0.1:
            raise ValueError(f"LRT residual=False, residual_scale={self.residual_scale}: no input is scaled then")
        maps = (self.shared, self.gates, self.gate_channels)
        if not (self.key or self.value) and maps != (True, True, None):
            raise ValueError(f"LRT shared, gates, gate_channels = {maps}: key=False, value=False has none of them")
        if self.gate_channels is not None and not self.gates:
            raise ValueError(
                f"LRT gates=False, gate_channels={self.gate_channels}: without gates there are no channels"
            )

    def _mixer(self, shape: Shape, retrofit: bool) -> nn.Module:
        """What merges keys and values with the memory; behind a zero scalar if it must start as the identity."""
        if self.gates:
            return HeadGate(shape.width, shape.kv_heads, retrofit, self.gate_channels)
        return Scaled() if retrofit else Add()

    def build(self, shape, retrofit):
        source = shape.layer(self.source, "LRT source")
        if (self.gate_channels or 0) > shape.width:
            raise ValueError(f"LRT gate_channels={self.gate_channels}: the model has a width of {shape.width}")
        edges, modules = [], {}
        ports = [port for port, on in (("key", self.key), ("value", self.value)) if on]
        for layer in range(shape.layers):
            if self.residual:
                modules[f"residual_{layer}"] = Scaled(0.0 if retrofit else self.residual_scale)
                edges.append(Edge(source, layer, f"residual_{layer}", visits="all", norm=shape.norm_eps))
            if ports:
                modules[f"gate_{layer}"] = self._mixer(shape, retrofit)
            for port in ports:
                name = f"memory_{port}" if self.shared else f"memory_{port}_{layer}"
                if name not in modules:
                    modules[name] = projection(shape.width, shape.kv_width, uniform=True)
                around = dict(project=name, norm=shape.norm_eps)
                edges.append(Edge(source, layer, f"gate_{layer}", port=port, visits="all", **around))
        return Parts(edges=tuple(edges), modules=modules, schedule=Interleaved(2))
