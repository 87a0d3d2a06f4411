"""The gradient of the recurrence at its solution, from one live parallel pass.

A schedule with `adjoint=k` solves the recurrence without gradient. Then one pass over all positions runs live: it reads
the solved memory r (a leaf) and leaves S m, the shifted memory, which is r again. With g the cotangent of its outputs,
backpropagation through time is the ordinary backward of this one pass with g on the outputs and on S m the solution of

    v = (d out / d r)^T g + (d S m / d r)^T v

which is solved here as the recurrence itself is, only backwards: by k parallel products (`solve="jacobi"`, equal to k+1
live Jacobi sweeps; exact for k = T), or by k rounds over the strided subsets, the last first (`solve="cyclic"`; exact
for k G = T, in practice far sooner). A model that does not contract gets live sweeps instead (`Unsolved`), or as many
more products as it takes, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from undertow.agree import largest
from undertow.scan import settled
from undertow.schedules import Converge, Cyclic, Schedule, strided
from undertow.store import Written, take

if TYPE_CHECKING:
    from undertow.execute import Executor
    from undertow.frames import Frame, Sequence

UNSOLVED = 0.5  # relative change by the live pass above which its memory is no solution to differentiate at
SUBSETS = 16  # of rounds that replace products, where the schedule has none of its own
DECAYED = 1e-3  # what is left of the cotangent, relative to all of it, when rounds that have no number may stop


class Unsolved(Exception):
    """The live pass moved the memory: the rounds before it did not solve the recurrence; run live sweeps instead."""


class _Adjoint(torch.autograd.Function):
    """The identity on `(r, *outs)`; backward hands `solve(g_r, g_outs)` to the shifted memory, beside g."""

    @staticmethod
    def forward(ctx, solve: Callable | None, shifted_m: Tensor, r: Tensor, *outs: Tensor):
        ctx.solve = solve
        return (r.view_as(r), *(o.view_as(o) for o in outs))

    @staticmethod
    def backward(ctx, g_r, *g_outs):
        return (None, ctx.solve and ctx.solve(g_r, g_outs), None, *g_outs)


def live_pass(
    executor: Executor, schedule: Schedule, memory: Tensor, state: dict, seq: Sequence, written: Written
) -> tuple[Frame, Tensor, dict[str, Tensor]]:
    """Run the pass and hang the adjoint into its backward: `(its frame, the memory it leaves, its span registers)`.

    `memory` (`_BTND`) and `written` are the solution. With gradient, raises `Unsolved` if the pass moves the memory by
    more than half its size.
    """
    from undertow.execute import mixed_where, shifted
    from undertow.frames import Frame

    everywhere, grad, k = seq.everywhere, torch.is_grad_enabled(), schedule.adjoint
    r = shifted(memory, seq, everywhere).detach()
    frame = Frame(everywhere, r.requires_grad_() if grad else r, mixed_where(seq, everywhere))
    rows = executor.steps(executor.program.span, state, frame, seq, written)
    settles = schedule.settle and executor.program.carries  # then the carries' own chain is part of the pass
    left = settled(executor, rows, seq) if settles else executor.leave(rows, frame, seq)
    spanned = {register: rows[register] for register in executor.program.kept}
    if not (grad and left.requires_grad):
        return frame, left, spanned
    with torch.no_grad():
        change = largest((left - memory).norm() / memory.norm().clamp(min=1e-30), agree=True)
    if change > UNSOLVED:
        raise Unsolved("one more pass moved the memory by more than half")  # no number: a warning is shown once a text
    after, solve = shifted(left, seq, everywhere), None
    if k:
        cyclic = isinstance(schedule, Cyclic | Converge) and schedule.solve == "cyclic"
        G = schedule.G if isinstance(schedule, Cyclic | Converge) else SUBSETS
        rounds = _Cyclic(executor, k if cyclic else None, G, r.detach(), state, seq, written)
        solve = rounds if cyclic else _Parallel(k, r, after, tuple(spanned.values()), None if settles else rounds)
    r, *outs = _Adjoint.apply(solve, after, r, *spanned.values())
    return replace(frame, memory_BSND=r, carried={}), left, dict(zip(spanned, outs, strict=True))


def _grew(first: Tensor, last: Tensor, k: int) -> bool:
    """Whether k products (or rounds) made the cotangent larger, so that no fixed number of them is enough."""
    if k < 2 or not largest((last.norm() > first.norm()).float(), agree=True):
        return False
    warnings.warn(
        f"the adjoint gradient does not contract on every batch: {k} products made its cotangent larger. There it is "
        "solved until nothing is left, as live sweeps would (more costly; adjoint=None runs those)",
        stacklevel=2,
    )
    return True


@dataclass(frozen=True)
class _Parallel:
    """Products with the Jacobian of the live pass: the Neumann series of v. Where they grow, `rounds` solve it."""

    k: int
    r: Tensor
    after: Tensor
    outs: tuple[Tensor, ...]
    rounds: _Cyclic | None  # None: carries were run to the end of the text, which rounds do not know; products go on

    def __call__(self, g_r: Tensor, g_outs: tuple[Tensor, ...]) -> Tensor:
        v = torch.autograd.grad(self.outs, self.r, g_outs, retain_graph=True, allow_unused=True)[0]
        first = v = g_r if v is None else v + g_r
        total, T = v, self.r.shape[1]
        for done in range(1, T):
            if done == self.k and not _grew(first, v, done):
                break
            if done == self.k and self.rounds is not None:
                return self.rounds(g_r, g_outs)
            if done > self.k and not largest((v.norm() > DECAYED * total.norm()).float(), agree=True):
                break
            found = torch.autograd.grad(self.after, self.r, v, retain_graph=True, allow_unused=True)[0]
            if found is None:  # the memory does not depend on what was read: no recurrence, nothing further back
                break
            v = found
            total = total + v
        return total


@dataclass(frozen=True)
class _Piece:
    """The rows of one subset, run live at the solution: what its results are and what they were made of."""

    positions: range
    results: list[Tensor]  # the memory left, the registers kept, then keys and values, all at `positions`
    leaves: list[Tensor]  # the memory read at `positions`, then keys and values at every position


class _Cyclic:
    """Rounds over G strided subsets, the last first: Gauss-Seidel on the cotangents of memory, keys and values.

    Every subset's rows are run once more, live, with the solved memory and the solved keys and values of all others as
    leaves. What a subset pulls back to other positions waits there for their turn. k=None: until nothing is left.
    """

    def __init__(
        self, executor: Executor, k: int | None, G: int, r: Tensor, state: dict, seq: Sequence, solved: Written
    ):
        self.executor, self.k, self.G, self.r, self.seq = executor, k, G, r, seq
        self.state = {name: x.detach() for name, x in state.items()}
        self.slots = [s.slot for s in executor.program.span if s.slot in solved and not s.shares]
        self.solved: Written = {s: ((k.detach(), v.detach()), None) for s, ((k, v), _) in solved.items()}
        device = r.device.type
        self.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )

    def _piece(self, positions: range) -> _Piece:
        from undertow.execute import mixed_where
        from undertow.frames import Frame

        r = take(self.r, positions).detach().requires_grad_()
        kv = [x.requires_grad_() for s in self.slots for x in (y.view_as(y) for y in self.solved[s][0])]
        written = self.solved | {s: ((kv[2 * i], kv[2 * i + 1]), None) for i, s in enumerate(self.slots)}
        frame = Frame(positions, r, mixed_where(self.seq, positions))
        rows = {name: take(x, positions) for name, x in self.state.items()}
        rows = self.executor.steps(self.executor.program.span, rows, frame, self.seq, written)
        results = [self.executor.leave(rows, frame, self.seq), *(rows[n] for n in self.executor.program.kept)]
        results += [take(x.transpose(1, 2), positions).transpose(1, 2) for s in self.slots for x in written[s][0]]
        return _Piece(positions, results, [r, *kv])

    def __call__(self, g_r: Tensor, g_outs: tuple[Tensor, ...]) -> Tensor:
        with torch.enable_grad(), self.autocast:
            pieces = [self._piece(p) for p in strided(self.r.shape[1], self.G)]
        waiting = [torch.zeros_like(self.r), *(g.clone() for g in g_outs)]  # over all positions, as `results`
        waiting += [torch.zeros_like(x).transpose(1, 2) for s in self.slots for x in self.solved[s][0]]
        total = torch.zeros_like(self.r)
        self._pull(g_r, range(self.r.shape[1]), total, waiting)
        exact, first, k = len(range(0, self.r.shape[1], self.G)), None, self.k
        for done in range(1, exact + 1):
            before = total.clone()
            for piece in reversed(pieces):
                self._turn(piece, total, waiting)
            last = total - before
            first = last if first is None else first
            if k is None and not largest((last.norm() > DECAYED * total.norm()).float(), agree=True):
                break
            if done == k and not _grew(first, last, k):
                break
            k = None if done == k else k
        return total

    def _turn(self, piece: _Piece, total: Tensor, waiting: list[Tensor]):
        """Pull what waits at a subset back to what its rows were made of."""
        rows = [take(w, piece.positions).clone() for w in waiting]
        for w in waiting:
            take(w, piece.positions).zero_()
        turned = [g if i <= len(rows) - 2 * len(self.slots) - 1 else g.transpose(1, 2) for i, g in enumerate(rows)]
        live = [(x, g) for x, g in zip(piece.results, turned, strict=True) if x.requires_grad]
        found = torch.autograd.grad(
            [x for x, _ in live], piece.leaves, [g for _, g in live], retain_graph=True, allow_unused=True
        )
        if found[0] is not None:
            self._pull(found[0], piece.positions, total, waiting)
        for w, g in zip(waiting[len(waiting) - 2 * len(self.slots) :], found[1:], strict=True):
            if g is not None:
                w += g.transpose(1, 2)

    def _pull(self, v_BSND: Tensor, positions: range, total: Tensor, waiting: list[Tensor]):
        """Add a cotangent of the memory read at `positions`, and hand it to the tokens that left that memory."""
        take(total, positions).add_(v_BSND)
        inside = self.seq.inside_BT
        if inside is not None:
            v_BSND = v_BSND * take(inside, positions)[..., None, None]
        first = int(positions.start == 0)  # the first position reads what came before this call
        before = range(positions.start - 1 + first * positions.step, positions.stop - 1, positions.step)
        if len(before):
            waiting[0][:, before.start : before.stop : before.step] += v_BSND[:, first:]
