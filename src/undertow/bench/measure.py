"""Two pieces of work against each other: rounds that interleave them, and the median of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

Call = Callable[[], object]
Steps = Callable[[], Iterable[Call]]  # a piece of work in pieces; what it takes to prepare them is not counted


@dataclass(frozen=True)
class Ratio:
    """What every round found, ours over theirs: the median and the range."""

    median: float
    low: float
    high: float
    rounds: int


def ratio_of(found: list[float]) -> Ratio:
    return Ratio(statistics.median(found), min(found), max(found), len(found))


def seconds(call: Call) -> float:
    """Processor seconds of this process in `call()`: what other processes do at the same time counts little."""
    began = time.process_time()
    call()
    return time.process_time() - began


def times(ours: Call, theirs: Call, rounds: int, warm: int = 1) -> Ratio:
    """Time of `ours` over that of `theirs`, run in turn; the first `warm` rounds do not count."""
    found = []
    for i in range(warm + rounds):
        ratio = seconds(ours) / max(seconds(theirs), 1e-9)
        if i >= warm:
            found.append(ratio)
    return ratio_of(found)


def steps(ours: Steps, theirs: Steps, rounds: int, warm: int = 1) -> Ratio:
    """As `times`, in turn at every step: of milliseconds, between which a shared machine changes its speed little."""
    found = []
    for i in range(warm + rounds):
        pairs = [(seconds(one), seconds(other)) for one, other in zip(ours(), theirs(), strict=True)]
        if i >= warm:
            found.append(sum(one for one, _ in pairs) / max(sum(other for _, other in pairs), 1e-9))
    return ratio_of(found)


def whole(steps: Steps) -> Call:
    """All the steps as one piece of work."""
    return lambda: [call() for call in steps()]


def speed(ours: Call, theirs: Call, rounds: int, warm: int = 1) -> Ratio:
    """As `times`, the other way round: above 1 ours is faster."""
    return times(theirs, ours, rounds, warm)


def memory(ours: Call, theirs: Call, rounds: int, warm: int = 1) -> Ratio:
    """Peak of allocated bytes of `ours` over that of `theirs`. Counted, so one round says all."""
    from undertow.analysis.counts import peak_bytes

    for _ in range(warm):
        ours(), theirs()
    return ratio_of([peak_bytes(ours) / peak_bytes(theirs)])
