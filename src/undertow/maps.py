"""The maps that mixers are made of: perceptrons, gates of `[x; m]` and their published starts, outer factors."""

from __future__ import annotations

from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


def perceptron(start: int, inner: int, end: int, layers: int, activation: str = "gelu", bias: bool = True) -> nn.Module:
    """`layers` linear maps, `start` -> `inner` .. -> `end`, `activation` between. Raises ValueError: a bad value."""
    if inner < 1 or layers < 1:
        raise ValueError(f"inner width {inner}, layers={layers}: both must be at least 1")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}: allowed are {sorted(ACTIVATIONS)}")
    widths, parts = (start, *(inner,) * (layers - 1), end), list[nn.Module]()
    for a, b in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(a, b, bias=bias), ACTIVATIONS[activation]()]
    return nn.Sequential(*parts[:-1]) if layers > 1 else parts[0]


def gate(width: int, layers: int, hidden: int | None, activation: str | None) -> nn.Module:
    """The map `[x; m] -> logits`: a linear one, or (`layers` > 1) a perceptron of inner width `hidden` (None: D).

    Raises ValueError: options of a perceptron with one layer.
    """
    if layers == 1 and (hidden is not None or activation is not None):
        raise ValueError(f"hidden={hidden}, activation={activation!r}: a gate of layers=1 has none; use layers=2")
    return perceptron(2 * width, width if hidden is None else hidden, width, layers, activation or "gelu")


def of_x(gate: nn.Linear, x: Tensor) -> Tensor:
    """What a linear gate of `[x; m]` makes of x."""
    return F.linear(x, gate.weight[:, : x.shape[-1]], gate.bias)


def with_m(gate: nn.Linear, half: Tensor, m: Tensor) -> Tensor:
    """And the rest of it: `gate([x; m])`."""
    return half + F.linear(m, gate.weight[:, -m.shape[-1] :])


def start_gate(gate: nn.Module, gain: float, probability: float | None):
    """Xavier-normal weights (gain 0: zeros); the last bias is the logit of `probability` (None: torch's own)."""
    linears = [module for module in gate.modules() if isinstance(module, nn.Linear)]
    for linear in linears:
        nn.init.xavier_normal_(linear.weight, gain=gain) if gain else nn.init.zeros_(linear.weight)
    if probability is not None:
        p = min(max(probability, 1e-4), 1 - 1e-4)
        nn.init.constant_(linears[-1].bias, log(p / (1 - p)))


def gamma(width: int, rezero: bool, vector: bool) -> nn.Parameter | None:
    """An outer factor tanh(g), g = 0 at the start: one in all, or one a channel. Raises ValueError: `vector` alone."""
    if vector and not rezero:
        raise ValueError("vector=True: the gammas are there with rezero=True only")
    return nn.Parameter(torch.zeros(width if vector else 1)) if rezero else None


def silent(mixer: nn.Module, project: nn.Module | None) -> bool:
    """Whether a memory of zeros adds nothing through a map and a mixer, so that the mixer may be given None instead."""
    unbiased = project is None or (isinstance(project, nn.Linear) and project.bias is None)
    return unbiased and getattr(mixer, "takes_none", False)
