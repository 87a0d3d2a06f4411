"""Two pieces of work against each other: rounds that interleave them, and the median of their ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Call = Callable[[], object]


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


def speed(ours: Call, theirs: Call, rounds: int, warm: int = 1) -> Ratio:
    """As `times`, the other way round: above 1 ours is faster."""
    return times(theirs, ours, rounds, warm)


def memory(ours: Call, theirs: Call, rounds: int, warm: int = 1) -> Ratio:
    """Peak of allocated bytes of `ours` over that of `theirs`. Counted, so one round says all."""
    from undertow.analysis.counts import peak_bytes

    for _ in range(warm):
        ours(), theirs()
    return ratio_of([peak_bytes(ours) / peak_bytes(theirs)])
