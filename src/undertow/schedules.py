"""The list of sweeps by which a whole sequence is computed.

A schedule yields sweeps; the executor answers each with the relative change of the memory it caused, so that a
schedule may decide when to stop. Schedules are a run-time choice: they hold no parameters and are never part of a
checkpoint. `T` is the number of positions; every set of positions is a `range`.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, replace
from math import ceil

from undertow.agree import pick
from undertow.registry import from_mapping

__all__ = ["Schedule", "Sequential", "Jacobi", "Interleaved", "Cyclic", "Chunked", "Converge", "SCHEDULES"]


@dataclass(frozen=True)
class Sweep:
    """One run of the span over a set of positions, reading and writing one buffer of states and of keys and values."""

    positions: range
    loss_weight: float = 0.0  # of this sweep's loss, where the schedule reads every sweep out
    grad: bool = True
    mixed: bool = True  # False leaves every delay-1 target unmixed (the published T2MLR start)
    border: bool = False  # memory enters only at the first of the positions, zero elsewhere (chunked)
    measure: bool = False  # the schedule wants the change of the memory as the answer
    refresh: bool = False  # no sweep: only what the memory adds to the keys and values at `positions` is renewed
    settle: bool = False  # no sweep: only the carries run, over all positions with the newest sources
    only: bool = False  # no other follows, so that in training every parameter takes part in this one


Sweeps = Generator[Sweep, float | None, float | None]
Unmeasured = Generator[Sweep, float | None, None]  # sweeps that never ask for the change of the memory


@dataclass(frozen=True)
class Schedule:
    """Base of all schedules.

    `readout` says how logits are read: `"each"` (every sweep runs the tail on its positions; the loss is a weighted
    mean over sweeps), `"newest"` (once, at the end, all positions, with the newest memory) or `"read"` (once, at the
    end, each position with the memory it last read). `adjoint=k`: all sweeps run without gradient, one live parallel
    pass follows, and its backward applies k vector-Jacobian products to the memory.
    """

    @property
    def readout(self) -> str:
        """How logits are read: see the class."""
        return "newest"

    @property
    def adjoint(self) -> int | None:
        """None; schedules that know the adjoint gradient declare a field of this name."""
        return None

    @property
    def refresh(self) -> bool:
        """False; likewise."""
        return False

    @property
    def settle(self) -> bool:
        """False; likewise."""
        return False

    def sweeps(self, T: int) -> Sweeps:
        """Yield the sweeps over T positions; may return the last measured change of the memory."""
        raise NotImplementedError

    def resolved(self, double: bool, training: bool = False) -> Schedule:
        """This schedule for one forward: what depends on the precision (`double`: float64) or is drawn is filled in."""
        return self

    def to_dict(self) -> dict:
        """`{"kind": name, **fields}`, the form of recipes."""
        return {"kind": type(self).__name__, **asdict(self)}

    @staticmethod
    def from_dict(values: dict) -> Schedule:
        """The inverse of `to_dict`. Raises ValueError for an unknown kind or field."""
        return from_mapping(values, "kind", SCHEDULES, "schedule kind")

    def _need(self, **least: int):
        """Check that each named field is a whole number of at least so much, or None where that is its default."""
        for name, low in least.items():
            value, optional = getattr(self, name), self.__dataclass_fields__[name].default is None
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not ((optional and value is None) or (whole and value >= low)):
                what = f"a whole number of at least {low}" + (" or None" if optional else "")
                raise ValueError(f"{type(self).__name__} {name}={value!r}: must be {what}")


def strided(T: int, S: int) -> Iterator[range]:
    """The S strided subsets `t mod S = i` in turn; empty ones (S > T) are left out."""
    return (range(i, T, S) for i in range(min(S, T)))


def _weights(loss: str | tuple[float, ...], count: int, who: str) -> list[float]:
    """Weights of `count` sweeps, normalised to sum 1."""
    if isinstance(loss, str):  # "mean"
        return [1 / count] * count
    if len(loss) != count:
        raise ValueError(f"{who} loss has {len(loss)} weights: it needs {count}, one a sweep")
    return [w / sum(loss) for w in loss]


def _check_loss(schedule: Jacobi | Interleaved | Cyclic, words: tuple[str, ...], weights: bool):
    loss = schedule.loss
    if loss in words:
        return
    listed = loss if isinstance(loss, list | tuple) else ()
    if weights and all(isinstance(w, int | float) and w >= 0 for w in listed) and sum(listed) > 0:
        object.__setattr__(schedule, "loss", tuple(listed))
        return
    also = " or non-negative weights, one a sweep" if weights else ""
    raise ValueError(f"{type(schedule).__name__} loss={loss!r}: allowed are {words}{also}")


def _check_adjoint(schedule: Jacobi | Cyclic | Converge):
    if isinstance(schedule, Cyclic | Converge) and schedule.solve not in ("jacobi", "cyclic"):
        raise ValueError(f"{type(schedule).__name__} solve={schedule.solve!r}: allowed are ('jacobi', 'cyclic')")
    if isinstance(schedule, Cyclic | Converge) and schedule.adjoint is None and schedule.solve != "jacobi":
        raise ValueError(f"{type(schedule).__name__} solve={schedule.solve!r}: only with adjoint, which it is about")
    if isinstance(schedule, Converge):
        return
    who, adjoint, loss, backward = type(schedule).__name__, schedule.adjoint, schedule.loss, schedule.backward
    if adjoint is not None and loss != "last":
        raise ValueError(f"{who} adjoint={adjoint} needs loss='last', not {loss!r}")
    if adjoint is not None and backward is not None:
        raise ValueError(f"{who}: adjoint={adjoint} and backward={backward} exclude each other")


@dataclass(frozen=True)
class Sequential(Schedule):
    """One position after the other: the definition. Exact always; T sequential steps."""

    @property
    def readout(self) -> str:
        return "read"

    def sweeps(self, T: int) -> Unmeasured:
        for t in range(T):
            yield Sweep(range(t, t + 1))


@dataclass(frozen=True)
class Jacobi(Schedule):
    """All positions, K+1 times, each sweep reading the memory the sweep before it left.

    T2MLR's "batch approximate" forward (arXiv 2607.15178; `start="unmixed"`, `loss="last"`) and LRT's "multi-refine"
    (arXiv 2605.26797; `loss="mean"` or weights). Positions 0..k are exact after sweep k (unmixed start: 0..k-1).

    Args:
        K: sweeps after the first.
        loss: `"last"`, `"mean"`, or K+1 weights.
        backward: the last sweep and this many before it carry gradient (None: all).
        adjoint: instead, only the last sweep is live and its backward applies this many vector-Jacobian products.
        start: the first sweep reads a memory of zeros (`"zero"`) or does not mix at all (`"unmixed"`, as published).
        settle: after every sweep, run the carries along the whole text (not as published; exact carries in one sweep).
        sample: with gradient, every forward draws its K from these (T2MLR's random depth), on all ranks the same.
    """

    K: int
    loss: str | tuple[float, ...] = "last"
    backward: int | None = None
    adjoint: int | None = None
    start: str = "zero"
    sample: tuple[int, ...] | None = None
    settle: bool = False

    def __post_init__(self):
        self._need(K=0, backward=0, adjoint=0)
        _check_loss(self, ("last", "mean"), weights=True)
        if self.start not in ("zero", "unmixed"):
            raise ValueError(f"Jacobi start={self.start!r}: allowed are ('zero', 'unmixed')")
        if isinstance(self.loss, tuple):
            _weights(self.loss, self.K + 1, "Jacobi")
        if self.sample is not None:
            least, drawn = self.adjoint is not None, self.sample if isinstance(self.sample, list | tuple) else ()
            if not drawn or isinstance(self.loss, tuple) or not all(isinstance(k, int) and k >= least for k in drawn):
                raise ValueError(f"Jacobi sample={self.sample!r}: must be numbers of sweeps, and loss 'last' or 'mean'")
            object.__setattr__(self, "sample", tuple(drawn))
        _check_adjoint(self)
        if self.adjoint is not None and self.K == 0:
            raise ValueError(
                f"Jacobi K=0, adjoint={self.adjoint}: the live pass is the last of K+1; K must be at least 1"
            )

    @property
    def readout(self) -> str:
        return "read" if self.loss == "last" else "each"

    def resolved(self, double: bool, training: bool = False) -> Jacobi:
        if self.sample is None or not training:
            return self
        return replace(self, K=pick(self.sample), sample=None)

    def sweeps(self, T: int) -> Unmeasured:
        weights = [0.0] * self.K + [1.0] if self.loss == "last" else _weights(self.loss, self.K + 1, "Jacobi")
        for k in range(self.K + 1 if self.adjoint is None else self.K):
            live = self.adjoint is None and (self.backward is None or self.K - k <= self.backward)
            yield Sweep(range(T), weights[k], live, mixed=k > 0 or self.start == "zero", only=self.K == 0)
            if self.settle:
                yield Sweep(range(T), grad=live, settle=True)


@dataclass(frozen=True)
class Interleaved(Schedule):
    """All positions with zero memory, then the S strided subsets in turn, once (LRT, arXiv 2605.26797).

    The loss is the mean over the S+1 sweeps. Exact for S = T; S = 1 equals `Jacobi(1, loss="mean")`. `refresh=True`
    renews, before every subset, what the memory adds to the keys and values that no subset has written yet (the
    published kv-refresh).
    """

    S: int = 2
    loss: str | tuple[float, ...] = "mean"
    refresh: bool = False

    def __post_init__(self):
        self._need(S=1)
        _check_loss(self, ("mean",), weights=True)

    @property
    def readout(self) -> str:
        return "each"

    def sweeps(self, T: int) -> Unmeasured:
        subsets = list(strided(T, self.S))
        weights = _weights(self.loss, 1 + len(subsets), "Interleaved")
        yield Sweep(range(T), weights[0])
        for i, (positions, weight) in enumerate(zip(subsets, weights[1:], strict=True)):
            for stale in subsets[i + 1 :] if self.refresh else ():  # its own, this one overwrites
                yield Sweep(stale, refresh=True)
            yield Sweep(positions, weight)


@dataclass(frozen=True)
class Cyclic(Schedule):
    """All positions with zero memory, then n rounds over the G strided subsets (Gauss-Seidel).

    Positions 0..nG-1 are exact; all are when nG >= T; in practice far sooner. Costs n+1 passes of the span, one more
    with `adjoint`: the recommended way to train, the true recurrence with its true gradient.

    Args:
        G, n: number of subsets and of rounds.
        loss: `"last"` (one read-out at the end).
        backward: the last this many rounds carry gradient (None: all, and the first sweep).
        adjoint: no round does; one live parallel pass follows, with this many vector-Jacobian products in backward.
        solve: `"cyclic"`: not products over all positions, but rounds over the G subsets, the last first (exact when
            adjoint * G >= T).
    """

    G: int = 8
    n: int = 3
    loss: str = "last"
    backward: int | None = None
    adjoint: int | None = None
    solve: str = "jacobi"

    def __post_init__(self):
        self._need(G=1, n=0, backward=0, adjoint=0)
        _check_loss(self, ("last",), weights=False)
        _check_adjoint(self)

    def sweeps(self, T: int) -> Unmeasured:
        live = self.adjoint is None
        for i in range(self.n + 1):
            grad = live and (self.backward is None or self.n - i < self.backward)
            for positions in strided(T, self.G) if i else (range(T),):
                yield Sweep(positions, grad=grad)

    @property
    def readout(self) -> str:
        return "newest" if self.adjoint is None else "read"


@dataclass(frozen=True)
class Chunked(Schedule):
    """Consecutive blocks of C; memory enters only at positions `t mod C = 0`, zero elsewhere (LRT's baseline)."""

    C: int

    def __post_init__(self):
        self._need(C=1)

    @property
    def readout(self) -> str:
        return "read"

    def sweeps(self, T: int) -> Unmeasured:
        for t in range(0, T, self.C):
            yield Sweep(range(t, min(t + self.C, T)), border=True)


@dataclass(frozen=True)
class Converge(Schedule):
    """Cyclic rounds over G subsets until the memory stops moving: the exact recurrence, in parallel.

    Stops after the round in which no position's memory moved by more than `tol` (relative, 2-norm over the width), at
    the latest after ceil(T/G) rounds, when every position is exact. `out.residual` and `out.passes` report both.

    Args:
        tol: None takes 1e-6, or 1e-10 where the memory is float64.
        max_sweeps: at most this many rounds (each one pass over all positions); a warning if that cuts it short.
        adjoint, solve: as in `Cyclic`.
    """

    tol: float | None = None
    G: int = 16
    max_sweeps: int | None = None
    adjoint: int | None = None
    solve: str = "jacobi"

    def __post_init__(self):
        _check_adjoint(self)
        self._need(G=1, max_sweeps=1, adjoint=0)
        if self.tol is not None and not (isinstance(self.tol, int | float) and self.tol >= 0):
            raise ValueError(f"Converge tol={self.tol!r}: must be None or a number of at least 0")

    def sweeps(self, T: int) -> Sweeps:
        live = self.adjoint is None
        yield Sweep(range(T), grad=live)
        exact, moved = ceil(T / self.G), 0.0
        rounds = min(exact, self.max_sweeps or exact)
        for _ in range(rounds):
            moved = 0.0
            for positions in strided(T, self.G):
                change = yield Sweep(positions, grad=live, measure=True)
                assert change is not None, "it was asked for"
                moved = max(moved, change)
            assert self.tol is not None, "resolved() filled it in"
            if moved <= self.tol:
                return moved
        if rounds == exact:
            return 0.0  # however far the last round moved: every position has now read an exact memory
        warnings.warn(
            f"Converge stopped after max_sweeps={rounds} rounds with the memory still moving by {moved:.1e} "
            f"(tol={self.tol:.1e}); {exact} rounds are always exact",
            stacklevel=2,
        )
        return moved

    def resolved(self, double: bool, training: bool = False) -> Converge:
        return self if self.tol is not None else replace(self, tol=1e-10 if double else 1e-6)

    @property
    def readout(self) -> str:
        return "newest" if self.adjoint is None else "read"


SCHEDULES = {c.__name__: c for c in (Sequential, Jacobi, Interleaved, Cyclic, Chunked, Converge)}
