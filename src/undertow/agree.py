"""What all ranks of a data-parallel run must agree on: numbers drawn per step, and when an iteration stops."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

MOVED_EPS = 1e-8  # keeps the relative change of an all-zero memory finite


def together() -> bool:
    """Whether several processes train one model."""
    return dist.is_available() and dist.is_initialized()


def largest(x: Tensor, agree: bool) -> float:
    """`x` as a number; `agree`: the largest over all ranks."""
    if agree and together():
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return float(x)


def pick(choices: tuple[int, ...]) -> int:
    """One of them, evenly, from torch's generator."""
    return choices[drawn(torch.randint(len(choices), (), device="cpu"))]


def drawn(draw: Tensor) -> int:
    """A number just drawn from torch's generator, as the first rank drew it."""
    if together():
        draw = draw.to(torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu")
        dist.broadcast(draw, src=0)
    return int(draw)


def moved(new_BSND: Tensor, old_BSND: Tensor, agree: bool) -> float:
    """max over positions of |new - old| / (|old| + eps): how far a sweep moved the memory.

    `agree`: the largest over all ranks (in training, where every rank must stop after the same round).
    """
    new, old = new_BSND.detach(), old_BSND.detach()
    change = ((new - old).norm(dim=-1) / (old.norm(dim=-1) + MOVED_EPS)).max()
    return largest(change, agree)
