"""The small modules that merge a carried state into a port: `mixer(x_BSK, m_BSK, a_BSD) -> x_BSK`.

`x` is what the port holds, `m` the carried state (already projected, if its edge says so) and `a` the input of the
key or value projection (ports `key` and `value`; elsewhere `a` is `x`). Carries, `U(source, memory) -> memory`, and
the start vectors of registers live here too. Each has the published initialisation; `retrofit=True` makes it the
identity at the start, bit for bit, so that a pretrained model's logits do not move until it is trained.
"""

from __future__ import annotations

from math import log, sqrt

import torch
from torch import Tensor, nn


class Start(nn.Module):
    """A learned start vector of a register, N(0, 0.02) (GPTTRM `z_L`, `z_H`). Returns `_D`."""

    def __init__(self, width: int):
        super().__init__()
        self.value_D = nn.Parameter(0.02 * torch.randn(width))

    def forward(self) -> Tensor:
        return self.value_D


class Add(nn.Module):
    """`x + m`: input injection (ILR block recurrence; Huginn, arXiv 2502.05171, in its additive form)."""

    def forward(self, x: Tensor, m: Tensor, a: Tensor) -> Tensor:
        return x + m


class Scaled(nn.Module):
    """`x + s m` with a learned scalar s (LRT's residual injection; input injection into a pretrained model)."""

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), start))

    def forward(self, x: Tensor, m: Tensor, a: Tensor) -> Tensor:
        return x + self.scale * m


class Gated(nn.Module):
    """T2MLR's `gated` mixer (arXiv 2607.15178): `x + tanh(g_m) sig(G_m [x; m]) m + tanh(g_x) sig(G_x [x; m]) x`.

    The outer scalars start at 0, so it is the identity at the start and only they have gradient in the first step.

    Args:
        width: D.
        gain: of the gate weights' Xavier-normal initialisation (0: zeros).
        bias: probability at which both gates start; their bias is its logit.
    """

    def __init__(self, width: int, gain: float = 1.0, bias: float = 0.5):
        super().__init__()
        self.gate_x, self.gate_m = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        p = min(max(bias, 1e-4), 1 - 1e-4)
        for gate in (self.gate_x, self.gate_m):
            nn.init.xavier_normal_(gate.weight, gain=gain) if gain else nn.init.zeros_(gate.weight)
            nn.init.constant_(gate.bias, log(p / (1 - p)))
        self.scale_x, self.scale_m = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, m: Tensor, a: Tensor) -> Tensor:
        both = torch.cat([x, m], -1)
        y = torch.tanh(self.scale_m) * torch.sigmoid(self.gate_m(both)) * m
        return x + y + torch.tanh(self.scale_x) * torch.sigmoid(self.gate_x(both)) * x


class HeadGate(nn.Module):
    """LRT's key and value mixer (arXiv 2605.26797): `g_loc x + g_mem m`, gates per token and key/value head.

    `(g_loc, g_mem) = 2 sig(W_g a)`, W_g zero at the start: both gates exactly 1. One module serves a layer's keys and
    values, as published. `channels`: how many channels of `a`, from the first, the gates read (None: all). `retrofit`
    wraps it in `x + tanh(s) (mix - x)` with s = 0.
    """

    def __init__(self, width: int, kv_heads: int, retrofit: bool, channels: int | None = None):
        super().__init__()
        self.kv_heads = kv_heads
        self.gate = nn.Linear(channels or width, 2 * kv_heads, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.scale = nn.Parameter(torch.zeros(1)) if retrofit else None

    def forward(self, x: Tensor, m: Tensor, a: Tensor) -> Tensor:
        g_loc, g_mem = (2 * torch.sigmoid(self.gate(a[..., : self.gate.in_features]))).chunk(2, -1)
        heads = (self.kv_heads, -1)
        mixed = g_loc[..., None] * x.unflatten(-1, heads) + g_mem[..., None] * m.unflatten(-1, heads)
        mixed = mixed.flatten(-2)
        return mixed if self.scale is None else x + torch.tanh(self.scale) * (mixed - x)


class Blend(nn.Module):
    """`s x + (1 - s) m`: a gated exit of a block, x its result and m what entered it (GPTTRM).

    s = sigmoid(g) with g = -5 at the start; `retrofit`: s = tanh(g) with g = 0, closed exactly.
    """

    def __init__(self, retrofit: bool, start: float = -5.0):
        super().__init__()
        self.retrofit = retrofit
        self.gate = nn.Parameter(torch.full((1,), 0.0 if retrofit else start))

    def forward(self, x: Tensor, m: Tensor, a: Tensor) -> Tensor:
        s = torch.tanh(self.gate) if self.retrofit else torch.sigmoid(self.gate)
        return s * x + (1 - s) * m


class Residual(nn.Module):
    """A carry, T2MLR's cache residual: `R_t = N(h_t + w R_{t-1})`.

    N scales to RMS 1, by a factor taken from a detached copy and clamped to [1/clamp, clamp]; `norm=False` leaves it
    out. `detach`: the old memory carries no gradient.
    """

    def __init__(
        self, weight: float = 1.0, norm: bool = True, detach: bool = True, clamp: float = 5.0, eps: float = 1e-6
    ):
        super().__init__()
        self.weight, self.norm, self.detach, self.clamp, self.eps = weight, norm, detach, clamp, eps

    def forward(self, h: Tensor, memory: Tensor) -> Tensor:
        y = h + self.weight * (memory.detach() if self.detach else memory)
        if not self.norm:
            return y
        scale = (y.detach().square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return y * scale.clamp(1 / self.clamp, self.clamp)


def projection(width: int, out: int, uniform: bool = False) -> nn.Linear:
    """A bias-free map of the memory: torch's default initialisation, or uniform with std 1/sqrt(width) (LRT)."""
    linear = nn.Linear(width, out, bias=False)
    if uniform:
        nn.init.uniform_(linear.weight, -sqrt(3 / width), sqrt(3 / width))
    return linear
