"""A Tiny Recursive Model's block inside a language model (GPTTRM options A and B; TRM: arXiv 2510.04871), causal.

The published block attends in both directions, so every position sees the future; this one is causal always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from undertow.edges import Edge
from undertow.methods.base import Method, Parts
from undertow.mixers import Blend, Start
from undertow.plan import EMBED, NORM, Loop, Plan, Visit
from undertow.store import View


class TRMLayer(nn.Module):
    """Post-norm: `h <- n(h + attn(h)); h <- n(h + down(silu(gate h) * up h))`, LayerNorm, no position encoding.

    The inner width is int(4/3 D) rounded up to a multiple of 64 (expansion 2 times 2/3).
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        inner = -(-int(width * 4 / 3) // 64) * 64
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        for linear in (self.qkv, self.out, self.gate, self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(self, h_BSD: Tensor, view: View, mask: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.qkv(h_BSD).chunk(3, -1))
        k, v = view.update(k, v)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        h_BSD = self.norm_attention(h_BSD + self.out(a.transpose(1, 2).flatten(-2)))
        return self.norm_mlp(h_BSD + self.down(F.silu(self.gate(h_BSD)) * self.up(h_BSD)))


def recursion(blocks: tuple[str, ...], inner: int, outer: int, last_writes: str) -> Plan:
    """`n times z <- R(z + y + x), then y <- R(z + y)`, T times, only the last cycle with gradient; R is `blocks`.

    The very last visit writes `last_writes` instead of y.
    """

    def apply(reads: tuple[str, ...], writes: str, last: str) -> Plan:
        names = [writes] * (len(blocks) - 1) + [last]
        return tuple(Visit(b, reads if i == 0 else (writes,), names[i]) for i, b in enumerate(blocks))

    def cycle(last: str) -> Plan:
        return (Loop(apply(("z", "y", "h"), "z", "z"), inner), *apply(("y", "z"), "y", last))

    return (Loop(cycle("y"), outer - 1, grad_last=0), *cycle(last_writes))


@dataclass(frozen=True)
class TRMBlock(Method):
    """An extra tiny block, recursed on two latent registers z and y, gated back into the stream.

    `outer - 1` cycles run without gradient, then one with; the start vectors of z and y are learned, and their gradient
    passes straight through the cycles that carry none. The result is `s y + (1 - s) x`, s = sigmoid(-5) at the start.

    Args:
        insert: the layer before which the block stands (None: the middle, L//2, option B; 0..L-1), or -1: after the
            stack and its final norm (option A).
        layers: layers of the block.
        inner, outer: n and T above (`--trm-l-cycles`, `--trm-h-cycles`).
        heads: of the block (None: the backbone's).
    """

    kind: ClassVar[str] = "depth"
    insert: int | None = None
    layers: int = 2
    inner: int = 4
    outer: int = 2
    heads: int | None = None

    def __post_init__(self):
        self._whole("insert", -1, optional=True)
        for name in ("layers", "inner", "outer"):
            self._whole(name, 1)
        self._whole("heads", 1, optional=True)

    def build(self, shape, retrofit):
        L, heads = shape.layers, self.heads or shape.heads
        at = L // 2 if self.insert is None else self.insert
        if at >= L:
            raise ValueError(f"TRMBlock insert={at}: the model has {L} layers, 0..{L - 1}; -1 means after the stack")
        if shape.width % heads:
            raise ValueError(f"TRMBlock heads={heads} does not divide the width {shape.width}")
        after = at == -1
        below, above = (L, ()) if after else (at, range(at, L))
        blocks = tuple(f"trm_{i}" for i in range(self.layers))
        norm = (Visit(NORM),) if after else ()
        source = NORM if after else EMBED if at == 0 else at - 1
        plan = (
            *(Visit(i) for i in range(below)),
            *norm,
            *recursion(blocks, self.inner, self.outer, last_writes="h"),
            *(Visit(i) for i in above),
        )
        exit_gate = Edge(source, blocks[-1], mixer="trm_gate", port="output", delay=0, visits="last")
        modules = {name: TRMLayer(shape.width, heads) for name in blocks}
        modules |= {"trm_gate": Blend(retrofit), "trm_start_z": Start(shape.width), "trm_start_y": Start(shape.width)}
        starts = {"z": "trm_start_z", "y": "trm_start_y"}
        return Parts(plan=plan, edges=(exit_gate,), modules=modules, blocks=blocks, starts=starts)
