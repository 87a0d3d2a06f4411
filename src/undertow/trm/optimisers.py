"""What moves the parameters: AdamW, or AdamATan2, which has no epsilon and no scale."""

from __future__ import annotations

import math

import torch
from torch import nn


class AdamATan2(torch.optim.Optimizer):
    """Adam with `atan2(m, sqrt v)` for `m / (sqrt v + eps)` (arXiv 2407.05872), decay decoupled from the gradient.

    `p <- p (1 - lr decay) - lr / (1 - b1^t) atan2(m, sqrt(v / (1 - b2^t)))`, as the package adam-atan2 0.0.3 that the
    published runs use: the first moment's correction multiplies the step and is no part of the angle. Scaling all
    gradients changes nothing.

    Raises:
        ValueError: a negative `lr` or `weight_decay`, or betas outside 0..1.
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1):
        if lr < 0 or weight_decay < 0:
            raise ValueError(f"AdamATan2 lr={lr}, weight_decay={weight_decay}: must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"AdamATan2 betas={betas}: must lie in 0..1, 1 not included")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "step": torch.zeros(()),
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            grads = [p.grad for p in params]
            m, v = ([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq"))
            (b1, b2), lr = group["betas"], group["lr"]
            torch._foreach_lerp_(m, grads, 1 - b1)
            torch._foreach_mul_(v, b2)
            torch._foreach_addcmul_(v, grads, grads, 1 - b2)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for p, first, second in zip(params, m, v, strict=True):
                t = self.state[p]["step"].add_(1).item()
                p.sub_(torch.atan2(first, second.sqrt() / math.sqrt(1 - b2**t)), alpha=lr / (1 - b1**t))
        return loss


def build(model: nn.Module, name: str, betas: tuple[float, float], weight_decay: float) -> torch.optim.Optimizer:
    """`adamw` or `adam_atan2` over all parameters, which all decay, as published. The loop sets the learning rate."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)
    return AdamATan2(model.parameters(), lr=0.0, betas=betas, weight_decay=weight_decay)


def rate(step: int, steps: int, warmup: int, floor: float) -> float:
    """What multiplies the learning rate in step `step` of 1..steps: a linear rise over `warmup` steps, then a cosine
    from 1 down to `floor` (1: constant)."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2
