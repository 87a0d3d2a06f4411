"""Scores of parts of what is predicted: of the positions that one sweep wrote, of a bucket of positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from undertow.schedules import Interleaved, Schedule, Sweep


@dataclass(frozen=True)
class Part:
    """The score of some of the predicted tokens.

    Attributes:
        name: `full`, `interleaved1`, `refine2`, .. of sweeps, `0-255`, `256-511`, .. of buckets.
        nats_per_token: the mean over these tokens.
        bits_per_byte: nats of the tokens that have bytes / (ln 2 * bytes); None where none has (special tokens alone).
        tokens, bytes: how many there are.
    """

    name: str
    nats_per_token: float
    bits_per_byte: float | None
    tokens: int
    bytes: int

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


class Tally:
    """Sums by name, in the order in which the names first came."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, name: str, nats: float, tokens: int, text_nats: float, size: int) -> None:
        """Add the loss of some tokens: in nats, how many they are; of those that have bytes the nats, and the bytes."""
        old = self.sums.get(name, [0.0, 0, 0.0, 0])
        self.sums[name] = [a + b for a, b in zip(old, (nats, tokens, text_nats, size), strict=True)]

    def parts(self) -> tuple[Part, ...]:
        """One part a name that holds a token at all."""
        return tuple(
            Part(name, nats / tokens, text_nats / (math.log(2) * size) if size else None, int(tokens), int(size))
            for name, (nats, tokens, text_nats, size) in self.sums.items()
            if tokens
        )


def add_buckets(tally: Tally, bucket: int, position_S: Tensor, nats_S: Tensor, size_S: Tensor) -> None:
    """Put the nats and bytes of predicted tokens into buckets of so many positions.

    Args:
        position_S: where each prediction is made, counted from the start of its document.
    """
    for number in (position_S // bucket).unique().tolist():
        here_S = position_S // bucket == number
        name = f"{number * bucket}-{(number + 1) * bucket - 1}"
        text_S = here_S & (size_S > 0)
        tally.add(
            name, nats_S[here_S].sum().item(), int(here_S.sum()), nats_S[text_S].sum().item(), int(size_S[text_S].sum())
        )


def named_sweeps(schedule: Schedule, T: int) -> list[tuple[str, Sweep]]:
    """The sweeps that a schedule reads out and scores, by LRT's names (arXiv 2605.26797).

    `full, interleaved1..S`, or `refine0..K`; none where there is one read-out at the end.
    """
    if schedule.readout != "each":
        return []
    sweeps = list(schedule.sweeps(T))
    if isinstance(schedule, Interleaved):
        return [("full" if i == 0 else f"interleaved{i}", sweep) for i, sweep in enumerate(sweeps)]
    return [(f"refine{k}", sweep) for k, sweep in enumerate(sweeps)]


def in_order(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Buckets from the first position on."""
    return tuple(sorted(parts, key=lambda part: int(part.name.split("-")[0])))
