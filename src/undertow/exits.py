"""Early exit from a loop over depth: each token runs as many rounds as a rule finds it needs.

Decoding goes token by token, every position in turn, in a prompt too. A token that leaves the loop after round r has
run the plan with r rounds. The keys and values of the rounds it did not run are those of its last one, so that later
tokens, which may run more, find something to attend to. Rows of a batch leave one by one; the loop ends with the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from undertow.edges import Program, output_of
from undertow.execute import Executor
from undertow.frames import Frame, Readout, Sequence, Trace
from undertow.plan import EMBED, NORM, Step
from undertow.schedules import Sweep
from undertow.store import KV, Written, write

__all__ = ["Exit"]

RULES = ("fixed", "change", "entropy", "kl")
EPS = 1e-8  # keeps the relative change of an all-zero state finite
Steps = tuple[Step, ...]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Loops:
    """A program as its rounds see it: the steps before the loop, each round's, and those after."""

    before: Steps
    rounds: tuple[Steps, ...]
    after: Steps


def loops_of(program: Program) -> Loops:
    """The one loop of a program: the visits of the blocks that are visited more than once, cut at their period.

    Raises:
        ValueError: nothing loops, or more than one loop (rounds would not be the same for all layers).
    """
    steps = program.steps
    visits = [step.block for step in steps if step.block != NORM]
    looped = [i for i, step in enumerate(steps) if visits.count(step.block) > 1]
    if not looped:
        raise ValueError("exit_rule: nothing in this model loops, so there is nothing to leave early")
    begin, end = looped[0], looped[-1] + 1
    what, n = [(step.block, step.reads) for step in steps[begin:end]], end - begin
    if len(looped) == n:
        for period in range(1, n // 2 + 1):
            if n % period == 0 and all(what[i] == what[i % period] for i in range(n)):
                rounds = tuple(steps[i : i + period] for i in range(begin, end, period))
                return Loops(steps[:begin], rounds, steps[end:])
    raise ValueError(
        "exit_rule: needs a plan with one loop of at least two rounds, one and the same for all it repeats"
    )


@dataclass(frozen=True)
class Exit:
    """When a token has had enough rounds of the loop.

    Args:
        rule: `"change"`: `|h_r - h_{r-1}| / |h_{r-1}|` is below `threshold`, h the state that the rounds hand on (h_0
            what entered the loop); `"entropy"`: that of the read-out, in nats, is; `"kl"`: `KL(p_r || p_{r-1})` of two
            read-outs is, from round 2 on; `"fixed"`: after `threshold` rounds. `entropy` and `kl` run what follows
            the loop, the final norm and the LM head after every round.
        threshold: see above; with 0, no rule but `fixed` ever ends the loop.
        least, most: rounds that every token runs, and that none goes beyond (None: those of the plan).

    Raises:
        ValueError: an unknown rule, or numbers that make no sense.
    """

    rule: str
    threshold: float
    least: int = 1
    most: int | None = None

    def __post_init__(self):
        if self.rule not in RULES:
            raise ValueError(f"Exit rule={self.rule!r}: allowed are {RULES}")
        low, whole = (1, True) if self.rule == "fixed" else (0, False)
        kinds = (int,) if whole else (int, float)
        if type(self.threshold) not in kinds or not low <= self.threshold < math.inf:
            what = f"a {'whole ' if whole else ''}number of at least {low}"
            raise ValueError(f"Exit rule={self.rule!r}, threshold={self.threshold!r}: must be {what}")
        for name, value in (("least", self.least), ("most", self.most)):
            if not (value is None and name == "most") and (type(value) is not int or value < 1):
                raise ValueError(f"Exit {name}={value!r}: must be a whole number of at least 1")
        if self.most is not None and self.most < self.least:
            raise ValueError(f"Exit least={self.least}, most={self.most}: least must not be greater than most")

    @staticmethod
    def parse(text: str) -> Exit:
        """`"kl:5e-4"` or `"fixed:4"`: a rule and its threshold. Raises ValueError as the class does."""
        rule, _, threshold = text.partition(":")
        try:
            return Exit(rule, int(threshold) if rule == "fixed" else float(threshold))
        except ValueError as error:
            if str(error).startswith("Exit"):
                raise
            raise ValueError(f"exit rule {text!r}: must be RULE:THRESHOLD, such as kl:5e-4 or fixed:4") from None

    def __str__(self) -> str:
        return f"{self.rule}:{self.threshold:g}"

    @property
    def reads_out(self) -> bool:
        """Whether the rule looks at what the model would say after every round."""
        return self.rule in ("entropy", "kl")

    def evaluations(self, program: Program, rounds_BT: Tensor) -> Tensor:
        """Layer evaluations of tokens that ran so many rounds, each decoded alone; `_BT`."""
        loops = loops_of(program)
        before, body, after = (
            sum(s.block != NORM for s in part) for part in (loops.before, loops.rounds[0], loops.after)
        )
        return before + rounds_BT * body + (rounds_BT if self.reads_out else 1) * after

    # ------------------------------------------------------------------ running it

    def run(self, executor: Executor, seq: Sequence) -> Trace:
        """Compute the sequence token by token; `rounds_BT` of the result says how many rounds each took.

        Raises:
            ValueError: with gradient, with a bidirectional prefix, or on a plan without one loop.
        """
        if torch.is_grad_enabled():
            raise ValueError(
                "exit_rule: tokens leave the loop in evaluation only; call the model under torch.no_grad()"
            )
        if seq.masks.prefix is not None:
            raise ValueError("exit_rule: goes token by token, but a prefix is read in both directions at once")
        program, loops = executor.program, loops_of(executor.program)
        state = {"h": seq.x_BTD, output_of(EMBED): seq.x_BTD}
        state |= {register: executor.modules[name]().expand_as(seq.x_BTD) for register, name in program.starts}
        memory, written, T = None, Written(), len(seq.everywhere)
        normed, watched, rounds = [], [], []
        for t in range(T):
            frame = executor._frame(memory, Sweep(range(t, t + 1)), seq)
            rows = {r: x[:, t : t + 1] for r, x in state.items()}
            token = _Token(self, executor, loops, frame, seq, written)
            rows, count_B = token.run(rows)
            if program.memories:
                memory = write(memory, executor.leave(rows, frame, seq), frame.positions, 1)
            normed.append(token.normed(rows))
            watched += [] if program.watch is None else [rows[output_of(program.watch)]]
            rounds.append(count_B)
        watch = torch.cat(watched, 1) if watched else None
        readout = Readout(torch.cat(normed, 1), seq.everywhere, 1.0, watch)
        return Trace((readout,), memory, written, 1.0, None, torch.stack(rounds, 1))


class _Token:
    """One position of every row on its way through the loop."""

    def __init__(self, rule: Exit, executor: Executor, loops: Loops, frame: Frame, seq: Sequence, written: Written):
        self.rule, self.executor, self.loops, self.frame = rule, executor, loops, frame
        self.seq, self.written = seq, written
        self.last: dict[object, KV] = {}  # place in the round, or slot after it -> keys and values of each row's exit

    def run(self, state: State) -> tuple[State, Tensor]:
        """The states with which rows leave the model's last step, and how many rounds each ran, `_B`."""
        rule, loops = self.rule, self.loops
        state = self.steps(loops.before, state)
        active_B = torch.ones(len(self.seq.x_BTD), dtype=torch.bool, device=self.seq.x_BTD.device)
        count_B, left = active_B.long() * 0, State()
        handed, before_p = loops.rounds[0][-1].writes[0], None
        most = min(rule.most or len(loops.rounds), len(loops.rounds))
        most = min(most, int(rule.threshold)) if rule.rule == "fixed" else most
        most = max(most, min(rule.least, len(loops.rounds)))
        for r, steps in enumerate(loops.rounds, 1):
            h = state[handed]
            state = self.steps(steps, state)
            self.keep(steps, active_B, range(len(steps)))
            out, p = self.landed(state, steps[-1]), None
            if rule.reads_out:
                out = self.steps(loops.after, out)
                self.keep(loops.after, active_B, [s.slot for s in loops.after])
                p = self.executor.backbone.head(self.normed(out))[:, 0]
                p = (p if p.dtype == torch.float64 else p.float()).log_softmax(-1)
            left = {name: _where(active_B, x, left.get(name)) for name, x in out.items()}
            count_B = count_B + active_B
            if r == most:
                break
            if r >= rule.least:
                active_B = active_B & ~self.enough(state[handed], h, p, before_p)
                if not bool(active_B.any()):
                    break
            before_p = p
        for skipped in loops.rounds[r:]:
            self.fill(skipped)
        return (left if rule.reads_out else self.steps(loops.after, left)), count_B

    def steps(self, steps: Steps, state: Mapping[str, Tensor]) -> State:
        return self.executor.steps(steps, state, self.frame, self.seq, self.written)

    def normed(self, state: State) -> Tensor:
        h_B1D = state["h"]
        return h_B1D if self.executor.program.normed else self.executor.backbone.final_norm(h_B1D)

    def landed(self, state: State, ended: Step) -> State:
        """The state as it is if this round was the last: what the plan's last round does with its result."""
        last = self.loops.rounds[-1][-1]
        if ended is last or (ended.writes, ended.edges.get("output")) == (last.writes, last.edges.get("output")):
            return state
        executor = self.executor
        carried = {edge: executor._carried(edge, state, self.frame) for edge in last.edges.get("output", ())}
        y = executor._around(last, "output", state[ended.writes[0]], carried, self.frame)
        return {**state, **dict.fromkeys(last.writes, y)}

    def enough(self, h: Tensor, before: Tensor, p_BV: Tensor | None, before_BV: Tensor | None) -> Tensor:
        """Which rows the rule lets go, `_B`. Pads always: nothing ever reads what they hold."""
        rule = self.rule
        if rule.rule == "change":
            measured_B = ((h - before).norm(dim=-1) / (before.norm(dim=-1) + EPS))[:, 0]
        elif p_BV is not None and rule.rule == "entropy":
            measured_B = -(p_BV.exp() * p_BV).sum(-1)
        elif p_BV is not None and before_BV is not None:
            measured_B = (p_BV.exp() * (p_BV - before_BV)).sum(-1).clamp(min=0)  # rounding must not go below zero
        else:
            measured_B = torch.full_like(h[:, 0, 0], math.inf)
        done_B = measured_B < rule.threshold if rule.rule != "fixed" else torch.zeros_like(measured_B).bool()
        real_BT = self.seq.real_BT
        return done_B if real_BT is None else done_B | ~real_BT[:, self.frame.positions.start]

    def keep(self, steps: Steps, active_B: Tensor, places):
        """Rows that have left keep the keys and values they left with."""
        for place, step in zip(places, steps, strict=True):
            if step.shares or step.slot not in self.written:
                continue
            t = self.frame.positions.start
            (k, v), old = self.written[step.slot][0], self.last.get(place, (None, None))
            new = _where(active_B, k[:, :, t : t + 1], old[0]), _where(active_B, v[:, :, t : t + 1], old[1])
            self.last[place] = new
            if old[0] is not None:
                self._write(step.slot, k, v, new)

    def fill(self, steps: Steps):
        """A round that nobody ran: its keys and values are those of each row's last one."""
        for place, step in enumerate(steps):
            if not step.shares and place in self.last:
                k, v = self.written[step.slot][0] if step.slot in self.written else (None, None)
                self._write(step.slot, k, v, self.last[place])

    def _write(self, slot: str, k: Tensor | None, v: Tensor | None, new: KV):
        positions = self.frame.positions
        self.written[slot] = ((write(k, new[0], positions, 2), write(v, new[1], positions, 2)), None)


def _where(active_B: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """`new` in active rows, `old` in the others."""
    if old is None or old is new:
        return new
    return torch.where(active_B.view(-1, *[1] * (new.dim() - 1)), new, old)
