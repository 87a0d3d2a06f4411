"""What runs for one token, and in which order.

A plan is a tree of `Visit` and `Loop`; `unroll` turns it into the flat list of steps that is executed. Blocks are the
backbone's layers (0-based integers), its final norm (`NORM`) or extra blocks named by the method that brings them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Block = int | str
NORM = "norm"  # the backbone's final norm as a block: a plan that visits it is read out without a second norm
EMBED = "embed"  # the token embedding: no block, but a valid source of an edge


@dataclass(frozen=True)
class Visit:
    """One run of one block: it reads the sum of the registers `reads` and writes its output to `writes`.

    `slot` names where the visit keeps its keys and values (default: a slot of its own). Visits may share a slot: the
    first writes it, the others attend to what it wrote and discard their own keys and values. `read_only=True` says
    that this visit must find its slot written (a `ValueError` if it does not), and `slot=""` that it keeps none.

    For extra blocks: `inject` names registers whose sum the block gets beside its input; `prefix=True` lets it attend
    in both directions within the prefix that a caller marks (and only there: nothing is bidirectional by itself).
    """

    block: Block
    reads: tuple[str, ...] = ("h",)
    writes: str = "h"
    slot: str | None = None
    read_only: bool = False
    inject: tuple[str, ...] = ()
    prefix: bool = False


@dataclass(frozen=True)
class Loop:
    """`body`, `times` times over. Only the last `grad_last` rounds carry gradient (None: all of them)."""

    body: tuple[Visit | Loop, ...]
    times: int
    grad_last: int | None = None

    def __post_init__(self):
        if self.times < 0:
            raise ValueError(f"Loop times={self.times}: must be 0 or more")
        if self.grad_last is not None and self.grad_last < 0:
            raise ValueError(f"Loop grad_last={self.grad_last}: must be None or 0 or more")


Plan = tuple[Visit | Loop, ...]


@dataclass(frozen=True)
class Step:
    """A visit of the unrolled plan. `shares`: its slot was written by an earlier step and is only read here.

    `repeat` counts the visits of the same block before this one.
    """

    index: int
    block: Block
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    slot: str
    shares: bool
    grad: bool
    repeat: int
    inject: tuple[str, ...] = ()
    prefix: bool = False
    edges: Mapping[str, tuple] = field(default_factory=dict)  # port -> the edges that enter this step there


def each_layer_once(layers: int) -> Plan:
    """The plan of an ordinary transformer: layers 0..L-1, one visit each."""
    return tuple(Visit(i) for i in range(layers))


def _flatten(plan: Plan, grad: bool) -> Iterator[tuple[Visit, bool]]:
    for node in plan:
        if isinstance(node, Visit):
            yield node, grad
            continue
        live_from = 0 if node.grad_last is None else node.times - node.grad_last
        for i in range(node.times):
            yield from _flatten(node.body, grad and i >= live_from)


def unroll(plan: Plan, layers: int, blocks: tuple[str, ...] = (), registers: tuple[str, ...] = ()) -> list[Step]:
    """The flat list of steps of a plan.

    Args:
        plan: the tree.
        layers: number of backbone layers; integer blocks must lie in 0..layers-1.
        blocks: names of the extra blocks that exist.
        registers: registers, beside `h`, that have a start value.

    Raises:
        ValueError: an unknown block, a register read before it is written, a slot read before it is written, or a
            slot shared by blocks of which one keeps no keys and values.
    """
    steps: list[Step] = []
    written, slots = {"h", *registers}, set[str]()
    for visit, grad in _flatten(plan, True):
        where = f"visit {len(steps)} (block {visit.block!r})"
        known = 0 <= visit.block < layers if isinstance(visit.block, int) else visit.block in (NORM, *blocks)
        if not known:
            raise ValueError(f"{where}: no such block; layers are 0..{layers - 1}, extra blocks {sorted(blocks)}")
        early = [register for register in (*visit.reads, *visit.inject) if register not in written]
        if early:
            raise ValueError(f"{where} reads register {early[0]!r} before it is written; written: {sorted(written)}")
        slot = f"visit{len(steps)}" if visit.slot is None else visit.slot
        if visit.read_only and slot not in slots:
            raise ValueError(f"{where} reads slot {slot!r} before it is written; written: {sorted(slots)}")
        shares, repeat = slot in slots, sum(step.block == visit.block for step in steps)
        own = (len(steps), visit.block, visit.reads, (visit.writes,), slot, shares, grad, repeat)
        steps.append(Step(*own, visit.inject, visit.prefix))
        written.add(visit.writes)
        slots |= {slot} - {""}
    if not steps:
        raise ValueError("the plan is empty: it must visit at least one block")
    return steps
