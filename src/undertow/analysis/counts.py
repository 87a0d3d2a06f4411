"""What a call does, counted and not timed: operators it launches, bytes it keeps for its backward, its largest moment.

Operators are those that aten executes, views excluded: on a GPU each is one kernel or a few, on the CPU one call. The
same counts come out on any machine, however busy, so that tests can hold them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["launches", "peak_bytes", "saved_bytes"]

VIEWS = {"_unsafe_view", "detach", "alias", "lift_fresh"}  # no kernel, though their schema does not call them views


class _Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in VIEWS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> Counter[str]:
    """Operators that `call()` executes by their aten names, its backward included if it runs one."""
    with _Launches() as mode:
        call()
    return mode.found


def saved_bytes(call: Callable[[], object], model: nn.Module) -> int:
    """Bytes that autograd keeps for a backward through what `call()` returns, parameters of `model` left out.

    A storage counts once, and whole, however many tensors share it.
    """
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no storage is freed and its number used again

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        held = call()
    total = sum(x.untyped_storage().nbytes() for number, x in kept.items() if number not in owned)
    del held
    return total


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that `call()` holds at once beyond what was held before it, as torch's CPU allocator sees it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()  # type: ignore[union-attr]  # there is one: it has just run
    now = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        most = max(most, now)
    return most
