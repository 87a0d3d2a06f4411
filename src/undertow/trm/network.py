"""The block of a Tiny Recursive Model: post-norm without a gain, attention in both directions or an MLP over positions.

`h <- n(h + mix(h)); h <- n(h + down(silu(gate h) * up h))`, n(x) = x / sqrt(mean(x^2) + 1e-5) in float32
(arXiv 2510.04871; the block is that of HRM, arXiv 2506.21734).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undertow.store import View
from undertow.trm.config import TRMConfig

NORM_EPS = 1e-5
ROPE_BASE = 10_000.0
TRUNCATED = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2)))  # std of N(0, 1) in +-2


def normal_(tensor: Tensor, std: float) -> Tensor:
    """Fill with a normal distribution cut at two of its sigmas, so scaled that the result's deviation is `std`."""
    sigma = std / TRUNCATED
    return nn.init.trunc_normal_(tensor, std=sigma, a=-2 * sigma, b=2 * sigma)


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A matrix without bias, std 1/sqrt(fan in)."""
    made = nn.Linear(fan_in, fan_out, bias=False)
    normal_(made.weight, fan_in**-0.5)
    return made


def normed(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a gain, in float32 at least."""
    return F.rms_norm(wide(x), x.shape[-1:], eps=NORM_EPS).to(x.dtype)


def wide(x: Tensor) -> Tensor:
    """In float32, or as it is where it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`, inner width 2/3 expansion times the width, rounded up to multiples of `round_to`."""

    def __init__(self, width: int, expansion: float, round_to: int):
        super().__init__()
        inner = -(-round(expansion * width * 2 / 3) // round_to) * round_to
        self.gate_up, self.down = linear(width, 2 * inner), linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Attention in both directions, no bias, rotary positions where given. Heads are `width // heads` wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, inner = heads, width // heads * heads
        self.qkv, self.out = linear(width, 3 * inner), linear(inner, width)

    def forward(self, h_BSD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.qkv(h_BSD).chunk(3, -1))
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(-2))


def attend(q_BHSE: Tensor, k_BHSE: Tensor, v_BHSE: Tensor) -> Tensor:
    """Every position attends to every other. On CPUs in float32: the backward in bfloat16 takes three times as long."""
    if q_BHSE.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BHSE, k_BHSE, v_BHSE)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(wide(q_BHSE), wide(k_BHSE), wide(v_BHSE))


def rotated(x_BHSE: Tensor, cos_SE: Tensor, sin_SE: Tensor) -> Tensor:
    """Rotary positions, halves rotated against each other."""
    first, second = x_BHSE.chunk(2, -1)
    return (x_BHSE * cos_SE + torch.cat([-second, first], -1) * sin_SE).to(x_BHSE.dtype)


class Rotary(nn.Module):
    """The rotation of every position, cosines and sines `_SE`; computed, not saved."""

    cos: Tensor
    sin: Tensor

    def __init__(self, positions: int, head_width: int):
        super().__init__()
        frequency = ROPE_BASE ** (-torch.arange(0, head_width, 2).double() / head_width)
        angle_SE = torch.outer(torch.arange(positions).double(), frequency).repeat(1, 2)
        self.register_buffer("cos", angle_SE.cos().float(), persistent=False)
        self.register_buffer("sin", angle_SE.sin().float(), persistent=False)

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.cos, self.sin


class Block(nn.Module):
    """One block. It keeps no keys and values, so it ignores the `view` and the causal `mask` it is called with."""

    def __init__(self, config: TRMConfig, rotary: Rotary | None):
        super().__init__()
        self.over_positions = config.mixing == "mlp"
        self.rotary = rotary
        if self.over_positions:
            self.mix: nn.Module = SwiGLU(config.tokens, config.expansion, config.round_to)
        else:
            self.mix = Attention(config.width, config.heads)
        self.mlp = SwiGLU(config.width, config.expansion, config.round_to)

    def forward(self, h_BSD: Tensor, view: View | None = None, mask: Tensor | None = None) -> Tensor:
        if self.over_positions:  # the norm, too, is over positions
            h_BDS = h_BSD.transpose(1, 2)
            h_BSD = normed(h_BDS + self.mix(h_BDS)).transpose(1, 2)
        else:
            h_BSD = normed(h_BSD + self.mix(h_BSD, None if self.rotary is None else self.rotary()))
        return normed(h_BSD + self.mlp(h_BSD))
