"""Models compared seed by seed, and which of them no other beats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

# 97.5 % quantiles of Student's t with 1, 2, .. degrees of freedom; beyond, the last (wider than need be).
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


def metric(done: Mapping[str, Sequence[Mapping]]) -> tuple[str, str, int]:
    """What models are judged by, `(key of a result, words, 1 if more is better, else -1)`: a task's share of problems
    solved where there is one, else bits per byte under true decoding."""
    if any("solved" in one for found in done.values() for one in found):
        return "solved", "Share of problems solved", 1
    return "bits_true", "Bits per byte, decoded truly", -1


def interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of paired differences, by Student's t (None: fewer than two)."""
    n = len(differences)
    if n < 2:
        return None
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    return statistics.mean(differences) - half, statistics.mean(differences) + half


def differences(done: Mapping[str, Sequence[Mapping]]) -> dict[str, Any] | None:
    """Every model less the first one, over the seeds that both have; None where there is nothing to compare."""
    key, words, better = metric(done)
    by_seed = {
        name: {one["seed"]: one[key] for one in found if one.get(key) is not None and "seed" in one}
        for name, found in done.items()
    }
    if not by_seed:
        return None
    reference, base = next(iter(by_seed.items()))
    rows, several = [], False
    for name, own in by_seed.items():
        off = [own[seed] - base[seed] for seed in own if seed in base]
        if name == reference or not off:
            continue
        within = interval(off)
        several = several or within is not None
        rows.append(
            {
                "name": name,
                "seeds": len(off),
                "mean": f"{statistics.mean(off):+.4f}",
                "interval": "" if within is None else f"{within[0]:+.4f} to {within[1]:+.4f}",
                "better": f"{sum(better * d > 0 for d in off)} of {len(off)}",
            }
        )
    said = "More" if better > 0 else "Less"
    made = {"metric": words, "reference": reference, "several": several, "rows": rows, "better": said}
    return made if rows else None


def frontier(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """Of points `(cost, quality)` those that no other beats: none costs no more and is at least as good, save itself.

    In order of cost. `better`: 1 if more quality is better, -1 if less.
    """
    kept: list[tuple[float, float]] = []
    for cost, quality in sorted(set(points), key=lambda point: (point[0], -better * point[1])):
        if not kept or better * quality > better * kept[-1][1]:
            kept.append((cost, quality))
    return kept
