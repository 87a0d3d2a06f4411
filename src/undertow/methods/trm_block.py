"""A Tiny Recursive Model's block inside a language model (GPTTRM options A and B; TRM: arXiv 2510.04871), causal.

The published block attends in both directions, so every position sees the future; this one is causal always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from undertow.edges import Edge
from undertow.methods.base import Method, Parts
from undertow.methods.recursion import FORMS, DualBlend, Zero, recursion
from undertow.mixers import Add, Blend, Start
from undertow.plan import EMBED, NORM, Visit
from undertow.store import View

GATES = {"post": -5.0, "branch": -2.0, "dual": None}  # where the gate starts as published (None: there is none)


class TRMLayer(nn.Module):
    """Post-norm: `h <- n(h + attn(h)); h <- n(h + down(silu(gate h) * up h))`, LayerNorm, no position encoding.

    The inner width is int(4/3 D) rounded up to a multiple of 64 (expansion 2 times 2/3). Weights and biases begin
    uniform in +-1/sqrt(fan in), torch's own start of a linear map, as published.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        inner = -(-int(width * 4 / 3) // 64) * 64
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)

    def attend(self, h_BSD: Tensor, view: View, mask: Tensor | None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.qkv(h_BSD).chunk(3, -1))
        k, v = view.update(k, v)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
        return self.out(a.transpose(1, 2).flatten(-2))

    def mlp(self, h_BSD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(h_BSD)) * self.up(h_BSD))

    def forward(self, h_BSD: Tensor, view: View, mask: Tensor | None) -> Tensor:
        h_BSD = self.norm_attention(h_BSD + self.attend(h_BSD, view, mask))
        return self.norm_mlp(h_BSD + self.mlp(h_BSD))


class BranchLayer(TRMLayer):
    """Pre-norm, what is injected enters the branches alone: `h <- h + attn(n(h + i)); h <- h + mlp(n(h + i))`."""

    def forward(self, h_BSD: Tensor, view: View, mask: Tensor | None, injected: Tensor) -> Tensor:  # type: ignore[override]
        h_BSD = h_BSD + self.attend(self.norm_attention(h_BSD + injected), view, mask)
        return h_BSD + self.mlp(self.norm_mlp(h_BSD + injected))


class DualLayer(TRMLayer):
    """Pre-norm; the last layer takes what was added to its register away again, so that `z <- z + (R(u) - u)`."""

    def forward(self, h_BSD: Tensor, view: View, mask: Tensor | None, injected: Tensor | None = None) -> Tensor:
        h_BSD = h_BSD + self.attend(self.norm_attention(h_BSD), view, mask)
        h_BSD = h_BSD + self.mlp(self.norm_mlp(h_BSD))
        return h_BSD if injected is None else h_BSD - injected


LAYERS = {"post": TRMLayer, "branch": BranchLayer, "dual": DualLayer}


@dataclass(frozen=True)
class TRMBlock(Method):
    """An extra tiny block, recursed on two latent registers z and y, gated back into the stream x.

    `outer - grad_cycles` cycles run without gradient, the others with. The start vectors of z and y are learned where
    every cycle carries gradient; else they stay as they were drawn, as published. The result is `s y + (1 - s) x`.

    Args:
        insert: the layer before which the block stands (None: the middle, L//2, option B; 0..L-1), or -1: after the
            stack and its final norm (option A).
        layers: layers of the block R.
        inner, outer: n and T: n times `z <- R(z + y + x)`, then `y <- R(y + z)`, T times.
        heads: of the block (None: the backbone's).
        form: `"post"` (published), `"branch"` (pre-norm, y + x enters the branches alone) or `"dual"` (pre-norm, from
            y = x and z = 0, `z <- z + (R(u) - u)` with u = x + y + z, and the same for y with u = y + z).
        gate: s = sigmoid(gate) at the start, learned; None: no gate, s = 1; `"published"`: -5, -2 and None in the three
            forms. A wrapped model always has one, closed: s = tanh(0).
        grad_cycles: how many of the last cycles carry gradient (of `outer` or more: all).
        prefix: the block attends in both directions within a prompt that `prefix_mask` marks, and only there.
    """

    kind: ClassVar[str] = "depth"
    insert: int | None = None
    layers: int = 2
    inner: int = 4
    outer: int = 2
    heads: int | None = None
    form: str = "post"
    gate: float | str | None = "published"
    grad_cycles: int = 1
    prefix: bool = False

    def __post_init__(self):
        self._whole("insert", -1, optional=True)
        for name in ("layers", "inner", "outer", "grad_cycles"):
            self._whole(name, 1)
        self._whole("heads", 1, optional=True)
        if self.form not in FORMS:
            raise ValueError(f"TRMBlock form={self.form!r}: allowed are {tuple(FORMS)}")
        if not (self.gate is None or self.gate == "published" or type(self.gate) in (int, float)):
            raise ValueError(f"TRMBlock gate={self.gate!r}: must be a number, None or 'published'")

    def looped(self, loops):
        return replace(self, outer=loops)

    def build(self, shape, retrofit):
        L, heads = shape.layers, self.heads or shape.heads
        at = L // 2 if self.insert is None else self.insert
        if at >= L:
            raise ValueError(f"TRMBlock insert={at}: the model has {L} layers, 0..{L - 1}; -1 means after the stack")
        if shape.width % heads:
            raise ValueError(f"TRMBlock heads={heads} does not divide the width {shape.width}")
        after = at == -1
        below, above = (L, ()) if after else (at, range(at, L))
        source = NORM if after else EMBED if at == 0 else at - 1
        blocks = tuple(f"trm_{i}" for i in range(self.layers))
        plan = (
            *(Visit(i) for i in range(below)),
            *((Visit(NORM),) if after else ()),
            *recursion(blocks, self.inner, self.outer, "h", self.form, self.grad_cycles, self.prefix),
            *(Visit(i) for i in above),
        )
        modules = {name: LAYERS[self.form](shape.width, heads) for name in blocks}
        starts = {"z": "trm_start_z", "y": "trm_start_y"}
        dual = self.form == "dual"
        learned = self.grad_cycles >= self.outer  # else only cycles without gradient read them
        modules |= {name: Zero() if dual else Start(shape.width, learned) for name in starts.values()}
        gate = GATES[self.form] if self.gate == "published" else self.gate
        if retrofit or gate is not None:
            modules["trm_gate"] = (DualBlend if dual else Blend)(retrofit, 0.0 if gate is None else gate)
        elif dual:
            modules["trm_gate"] = Add()
        gated = Edge(source, blocks[-1], mixer="trm_gate", port="output", delay=0, visits="last")
        edges = (gated,) if "trm_gate" in modules else ()
        return Parts(plan=plan, edges=edges, modules=modules, blocks=blocks, starts=starts)
