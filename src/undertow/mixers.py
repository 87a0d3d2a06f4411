"""The small modules that merge a carried state into a port: `mixer(x_BSK, m_BSK, a_BSD) -> x_BSK`.

`x` is what the port holds, `m` the carried state (already projected, if its edge says so) and `a` the input of the
key or value projection (ports `key` and `value`; elsewhere `a` is `x`). Carries, `U(source, memory) -> memory`, and
start vectors live here too. One with `takes_none` also takes None for a memory that is known to be zero, and says what
is left of x. Each has the published initialisation; `retrofit=True` makes it the identity at the start: x + 0 y is x.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undertow.maps import gamma, gate, of_x, perceptron, start_gate, with_m

NORMS: dict[str, Any] = {"rmsnorm": lambda width: nn.RMSNorm(width, eps=2.0**-23), "layernorm": nn.LayerNorm}


def rescaled(y: Tensor, clamp: float = 5.0, eps: float = 1e-6) -> Tensor:
    """N, T2MLR's norm, `_BSD`: to RMS 1 by a factor from a detached copy, clamped to [1/clamp, clamp]; no gain."""
    scale = (_wide(y.detach()).square().mean(-1, keepdim=True) + eps).rsqrt()
    return y * scale.clamp(1 / clamp, clamp).to(y.dtype)


def opened(x: Tensor, mixed: Tensor, scale: Tensor | None) -> Tensor:
    """`x + tanh(s) (mixed - x)`, all `_BSD`, s a scalar: x itself, bit for bit, while s is 0. None: `mixed`."""
    return mixed if scale is None else x + torch.tanh(scale) * (mixed - x)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Start(nn.Module):
    """A start vector of a register, N(0, 0.02) (GPTTRM `z_L`, `z_H`), learned if `trained`. Returns `_D`."""

    def __init__(self, width: int, trained: bool = True):
        super().__init__()
        self.value_D = nn.Parameter(0.02 * torch.randn(width), requires_grad=trained)

    def forward(self) -> Tensor:
        return self.value_D


class Add(nn.Module):
    """`x + m`: input injection (ILR block recurrence; Huginn, arXiv 2502.05171, in its additive form)."""

    takes_none = True

    def forward(self, x: Tensor, m: Tensor | None, a: Tensor) -> Tensor:
        return x if m is None else x + m


class Scaled(nn.Module):
    """`x + s m` with a learned scalar s (LRT's residual injection; input injection into a pretrained model)."""

    takes_none = True

    def __init__(self, start: float = 0.0):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), start))

    def forward(self, x: Tensor, m: Tensor | None, a: Tensor) -> Tensor:
        return x if m is None else torch.addcmul(x, self.scale, m)


class HeadGate(nn.Module):
    """LRT's key and value mixer (arXiv 2605.26797): `g_loc x + g_mem m`, gates per token and key/value head.

    `(g_loc, g_mem) = 2 sig(W_g a)`, W_g zero at the start: both gates exactly 1. One serves a layer's keys and values.
    `channels`: how many of `a`, from the first, the gates read (None: all). `retrofit`: `x + tanh(s) (mix - x)`, s = 0.
    """

    takes_none = True

    def __init__(self, width: int, kv_heads: int, retrofit: bool, channels: int | None = None):
        super().__init__()
        self.kv_heads = kv_heads
        self.gate = nn.Linear(channels or width, 2 * kv_heads, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.scale = nn.Parameter(torch.zeros(1)) if retrofit else None

    def read(self, a: Tensor, wide: int | None = None) -> tuple[Tensor, ...]:
        """g_loc and g_mem, what a layer's keys and values share, `_BSG1` each; `wide`: so many times each, `_BSK`."""
        read = self.gate.in_features
        half = torch.sigmoid(self.gate(a if a.shape[-1] == read else a[..., :read]))
        half = half.view(*a.shape[:-1], 2, self.kv_heads, 1).expand(*[-1] * (a.ndim + 1), wide or 1)
        gates = half + half  # a sum, not `2 *`: a number is made into a tensor first, which counts at one token
        return gates.unbind(-3) if wide is None else gates.flatten(-2).unbind(-2)

    def gates(self, x: Tensor, m: Tensor | None, a: Tensor) -> dict[str, Tensor]:
        """`x` and `m`: g_loc and g_mem, `_BSG` each."""
        return {name: g[..., 0] for name, g in zip("xm", self.read(a), strict=True)}

    def mix(self, x: Tensor, m: Tensor | None, g_x: Tensor, g_m: Tensor) -> Tensor:
        """`g_x x + g_m m`, of tensors that broadcast; None: m is zero."""
        return g_x * x if m is None else torch.addcmul(g_x * x, g_m, m)

    def forward(self, x: Tensor, m: Tensor | None, a: Tensor, read: tuple[Tensor, ...] | None = None) -> Tensor:
        """`read`: the gates, where they were made before."""
        by_head, gates = (*x.shape[:-1], self.kv_heads, -1), self.read(a) if read is None else read
        mixed = self.mix(x.view(by_head), None if m is None else m.view(by_head), *gates).view(x.shape)
        return opened(x, mixed, self.scale)


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
    """A carry, T2MLR's cache residual: `R_t = N(h_t + w R_{t-1})`. `detach`: R_{t-1} carries no gradient."""

    def __init__(self, weight: float = 1.0, norm: bool = True, detach: bool = True):
        super().__init__()
        self.weight, self.norm, self.detach = weight, norm, detach

    def forward(self, h: Tensor, memory: Tensor) -> Tensor:
        y = torch.add(h, memory.detach() if self.detach else memory, alpha=self.weight)
        return rescaled(y) if self.norm else y


def projection(width: int, out: int, uniform: bool = False) -> nn.Linear:
    """A bias-free map of the memory: torch's default initialisation, or uniform with std 1/sqrt(width) (LRT)."""
    linear = nn.Linear(width, out, bias=False)
    if uniform:
        nn.init.uniform_(linear.weight, -sqrt(3 / width), sqrt(3 / width))
    return linear


# ---------------------------------------------------------------------- T2MLR's mixers (arXiv 2607.15178)


class Mixer(nn.Module):
    """Base of T2MLR's mixers: `join(x, N(mix(x^, m^)))`, x^ and m^ the two streams after their pre-norm.

    The buffer `strength`, 1 unless a training schedule sets it, multiplies m^: after the pre-norm, which would undo it.

    Args:
        width: D.
        identity: whether the subclass starts as the identity for any streams (it adds to x what starts at zero).
        same: whether its `mix` starts as x^, which is x where nothing is normed.
        pre_norm: `"rmsnorm"` or `"layernorm"`, learned gains, one norm a stream (None: no pre-norm).
        post_norm: whether N (`rescaled`) acts, where the subclass is `post_normed`.
        retrofit: start as the identity, behind a zero scalar (`opened`) where the mixer does not by itself.
    """

    projected: ClassVar[bool] = True  # whether the published mixer can have a map of the memory before it
    reads_x: ClassVar[bool] = True
    post_normed: ClassVar[bool] = True  # whether the published mixer applies the post-norm, which all of them accept

    def __init__(
        self, width: int, identity: bool = False, same: bool = False, pre_norm: str | None = None,
        post_norm: bool = False, retrofit: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.norm_x = NORMS[pre_norm](width) if pre_norm and self.reads_x else None
        self.norm_m = NORMS[pre_norm](width) if pre_norm else None
        self.post_norm = post_norm and self.post_normed
        # Behind a scalar, what starts as the identity would never get a gradient, nor would the scalar.
        closed = retrofit and not identity and not (same and pre_norm is None and not self.post_norm)
        self.opening = nn.Parameter(torch.zeros(1)) if closed else None
        self.strength = nn.Buffer(torch.ones(()))

    def streams(self, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """x^ and m^."""
        x = x if self.norm_x is None else self.norm_x(x)
        return x, self.strength * (m if self.norm_m is None else self.norm_m(m))

    def forward(self, x: Tensor, m: Tensor, a: Tensor, half: Tensor | None = None) -> Tensor:
        """`half`: what `x_half` made of x."""
        streams = self.streams(x, m)
        y = self.mix(*streams, self.weigh(*streams) if half is None else self.weigh_rest(half, streams[1]))
        y = self.join(x, rescaled(y) if self.post_norm else y)
        return opened(x, y.to(x.dtype), self.opening)

    def gates(self, x: Tensor, m: Tensor, a: Tensor | None = None) -> dict[str, Tensor]:
        """Every gate's value by name, `m` and `x` being the factors of the two streams; empty where there is none."""
        return self.weigh(*self.streams(x, m))

    def maps(self) -> dict[str, tuple[nn.Module, bool]]:
        """The maps of `[x^; m^]` that gates come from, by gate, and whether each sees its input without gradient."""
        return {}

    def weights(self, logits: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gates by name, from what `maps` made."""
        return {}

    def weigh(self, x: Tensor, m: Tensor) -> dict[str, Tensor]:
        """The gates by name, from the streams."""
        maps, both = self.maps(), torch.cat([x, m], -1)
        return self.weights({name: gate(both.detach() if cut else both) for name, (gate, cut) in maps.items()})

    def x_half(self, x: Tensor) -> Tensor | None:
        """What linear maps make of x alone, which sweeps can share (None: this mixer knows no such half)."""
        maps = self.maps().values()
        linear = [gate for gate, cut in maps if type(gate) is nn.Linear and not cut]
        if not maps or len(linear) < len(maps):
            return None
        x = x if self.norm_x is None else self.norm_x(x)
        return torch.cat([of_x(gate, x) for gate in linear], -1)

    def weigh_rest(self, half: Tensor, m: Tensor) -> dict[str, Tensor]:
        """`weigh`, given x's half."""
        parts = zip(self.maps().items(), half.chunk(len(self.maps()), -1), strict=True)
        return self.weights({name: with_m(cast(nn.Linear, gate), part, m) for (name, (gate, _)), part in parts})

    def mix(self, x: Tensor, m: Tensor, gates: dict[str, Tensor]) -> Tensor:
        """The two streams by their gates."""
        return torch.addcmul(gates["x"] * x, gates["m"], m)

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """What leaves, from what entered and what was mixed."""
        return y


class ConstantWeight(Mixer):
    """`(1 - w) x^ + w m^`, w clamped to [0, 1] where it is used. `weight`: at the start; `learned`: a parameter."""

    projected = post_normed = False

    def __init__(self, width: int, *, weight: float = 0.5, learned: bool = False, **around: Any):
        if not 0 <= weight <= 1:
            raise ValueError(f"weight={weight}: must be in [0, 1]")
        super().__init__(width, same=weight == 0, **around)
        start = torch.full((1,), float(weight))
        self.weight = nn.Parameter(start) if learned else nn.Buffer(start)

    def weigh(self, x, m):
        w = self.weight.clamp(0, 1)
        return {"m": w, "x": 1 - w}


class Concat(Mixer):
    """`W [x^; m^]`, no bias, W = [I, 0] at the start."""

    post_normed = False

    def __init__(self, width: int, **around: Any):
        super().__init__(width, same=True, **around)
        self.map = nn.Linear(2 * width, width, bias=False)
        nn.init.eye_(self.map.weight)

    def mix(self, x, m, gates):
        return self.map(torch.cat([x, m], -1))


class Gated(Mixer):
    """`x + N(tanh(g_m) sig(G_m [x^; m^]) m^ + tanh(g_x) sig(G_x [x^; m^]) x^)`, g = 0 at the start (as published).

    `gain`, `init_m`, `init_x`: see `start_gate`; `layers`, `hidden`, `activation`: see `gate`. `rezero=False`: neither
    gammas nor the x added; `vector`: a gamma a channel; `normalize`: gates over their sum, which has no gradient;
    `x_branch=False`: no second term; `detach_m`, `detach_x`: that gate sees its input without gradient.
    """

    def __init__(
        self, width: int, *, gain: float = 1.0, init_m: float | None = 0.5, init_x: float | None = 0.5, layers: int = 1,
        hidden: int | None = None, activation: str | None = None, rezero: bool = True, vector: bool = False,
        normalize: bool = False, x_branch: bool = True, detach_m: bool = False, detach_x: bool = False, **around: Any,
    ):  # fmt: skip
        super().__init__(width, identity=rezero, **around)
        if not x_branch and (normalize or detach_x or init_x != 0.5):
            raise ValueError(f"{normalize=}, {detach_x=}, {init_x=}: x_branch=False has no x gate")
        self.normalize, self.detach_m, self.detach_x = normalize, detach_m, detach_x
        maps = [gate(width, layers, hidden, activation) for _ in range(1 + x_branch)]
        self.gate_x, self.gate_m = maps[0] if x_branch else None, maps[-1]
        for module, probability in zip(maps, (init_x, init_m)[-len(maps) :], strict=True):
            start_gate(module, gain, probability)
        self.scale_x, self.scale_m = gamma(width, rezero, vector) if x_branch else None, gamma(width, rezero, vector)

    def maps(self):
        m, x = (self.gate_m, self.detach_m), (self.gate_x, self.detach_x)
        return {"m": m} if self.gate_x is None else {"m": m, "x": x}

    def weights(self, logits):
        gates = {name: torch.sigmoid(value) for name, value in logits.items()}
        total = (gates["m"] + gates["x"]).clamp(min=1e-6).detach() if self.normalize else None
        return gates if total is None else {name: value / total for name, value in gates.items()}

    def mix(self, x, m, gates):
        y = gates["m"] * m if self.scale_m is None else torch.tanh(self.scale_m) * gates["m"] * m
        if self.gate_x is None:
            return y
        return torch.addcmul(y, gates["x"] if self.scale_x is None else torch.tanh(self.scale_x) * gates["x"], x)

    def join(self, x, y):
        return y if self.scale_m is None else x + y


class AlphaCoupled(Mixer):
    """`x + tanh(g) N(w m^ + (1 - w) x^)`, w = sig(G [x^; m^]) clipped to [1e-4, 1 - 1e-4]; g = 0 at the start.

    Options as in `Gated`; `init` is the probability at which its one gate starts.
    """

    default: ClassVar[float | None] = None  # what `init=None` means; None: torch's own bias

    def __init__(
        self, width: int, *, gain: float = 1.0, init: float | None = None, layers: int = 1, hidden: int | None = None,
        activation: str | None = None, rezero: bool = True, vector: bool = False, detach: bool = False, **around: Any,
    ):  # fmt: skip
        super().__init__(width, identity=rezero, **around)
        self.detach = detach
        self.gate = gate(width, layers, hidden, activation)
        start_gate(self.gate, gain, self.default if init is None else init)
        self.scale = gamma(width, rezero, vector)

    def weigh(self, x, m):
        both = torch.cat([x, m], -1)
        logits = _wide(self.gate(both.detach() if self.detach else both))  # 1 - 1e-4 is 1 in bfloat16
        w = torch.sigmoid(logits).clamp(1e-4, 1 - 1e-4)
        return {"m": w, "x": 1 - w}

    def join(self, x, y):
        return y if self.scale is None else x + torch.tanh(self.scale) * y


class VarNormGated(AlphaCoupled):
    """As `AlphaCoupled` with the roots of its weights: `x + tanh(g) N(sqrt(w) m^ + sqrt(1 - w) x^)`; `init` 0.2."""

    default = 0.2

    def weigh(self, x, m):
        return {name: weight.sqrt() for name, weight in super().weigh(x, m).items()}


class ExponentialRotationalGated(Mixer):
    """`A x^ + sqrt(1 - A^2 + 1e-8) i m^`, `A = exp(-8 softplus(L) rho)`, rho and i sigmoid gates of u (RG-LRU).

    u is x^ or, with `concat`, [x^; m^]; `detach`: without gradient. At the start weights and biases are uniform within
    1/sqrt(fan-in), torch's own, and exp(-8 softplus(L)) is uniform in [0.99, 0.999].
    """

    projected = False

    def __init__(self, width: int, *, concat: bool = False, detach: bool = False, **around: Any):
        super().__init__(width, **around)
        self.concat, self.detach = concat, detach
        self.gate_rho, self.gate_i = (nn.Linear(2 * width if concat else width, width) for _ in range(2))
        decay = torch.empty(width).uniform_(0.99, 0.999)
        self.decay_D = nn.Parameter(torch.expm1(-decay.log() / 8).log())  # L: the softplus undone

    def weigh(self, x, m):
        u = torch.cat([x, m], -1) if self.concat else x
        rho, i = (torch.sigmoid(_wide(g(u.detach() if self.detach else u))) for g in (self.gate_rho, self.gate_i))
        A = torch.exp(-8 * F.softplus(_wide(self.decay_D)) * rho)
        return {"m": torch.sqrt(1 - A.square() + 1e-8) * i, "x": A, "rho": rho, "i": i}


class Replace(Mixer):
    """`m^`: the memory replaces x (a baseline after Coconut, arXiv 2412.06769)."""

    projected = reads_x = post_normed = False

    def mix(self, x, m, gates):
        return m


class Codi(Mixer):
    """`LN(W_2 act(W_1 m^))` replaces x (a baseline after CODI, arXiv 2502.21074); `bottleneck`: the inner width."""

    projected = reads_x = post_normed = False

    def __init__(self, width: int, *, bottleneck: int, activation: str = "gelu", **around: Any):
        super().__init__(width, **around)
        self.net, self.norm = perceptron(width, bottleneck, width, 2, activation), nn.LayerNorm(width)

    def mix(self, x, m, gates):
        return self.norm(self.net(m))


class Skip(Mixer):
    """`x + N(w m)`: T2MLR's recurrent skip, x the output of layer `end`. `norm=False` leaves N out."""

    def __init__(self, width: int, *, weight: float = 1.0, norm: bool = True, detach: bool = True, **around: Any):
        super().__init__(width, **around)
        self.weight, self.norm, self.detach = weight, norm, detach

    def streams(self, x, m):
        r = self.weight * (m.detach() if self.detach else m)
        return x, self.strength * (rescaled(r) if self.norm else r)

    def mix(self, x, m, gates):
        return x + m
