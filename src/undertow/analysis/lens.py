"""What a model would say early: after each visit, after each sweep, and without its memory.

The logit lens (nostalgebraist, 2020): final norm and LM head read a state in the middle of the network as if it were
the last. Here the middle has two directions, the visits along depth and the sweeps of a schedule. The memory's part is
what the true next token loses when the memory is never mixed in. Nothing is stored on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from undertow.analysis import label
from undertow.execute import Executor
from undertow.inputs import memory_mask_for, sequence
from undertow.model import UndertowForCausalLM
from undertow.plan import NORM, Step
from undertow.schedules import Converge, Schedule, Sweep, Sweeps
from undertow.store import write

__all__ = ["Lens", "View", "memory_effect", "read", "sweeps", "visits"]


@dataclass(frozen=True)
class View:
    """What is predicted at one place, for every position, in nats.

    Attributes:
        name: `layer 3`, `layer 3, visit 2 of 4`, or of a sweep how many passes over all positions came before.
        logp_BT: log-probability of the token that follows; NaN where none does (the end of a text, pads).
        best_BT: the likeliest next token; `best_logp_BT` its log-probability.
    """

    name: str
    logp_BT: Tensor
    best_BT: Tensor
    best_logp_BT: Tensor


@dataclass(frozen=True)
class Lens:
    """All views of a text.

    Attributes:
        visits: one a visit, in the order they run; the last one is the model's own prediction.
        sweeps: one for each time that the schedule has been over all positions; the last one is the whole schedule.
        memory_BT: what the memory adds to the log-probability of the token that follows (None: there is no memory).
    """

    visits: tuple[View, ...]
    sweeps: tuple[View, ...]
    memory_BT: Tensor | None


class _Recorder(Executor):
    """An executor that also keeps what every visit left behind, over all positions, from their last run."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.left: dict[int, Tensor] = {}

    def _visit(self, step: Step, state, frame, seq, written) -> Tensor:
        y = super()._visit(step, state, frame, seq, written)
        self.left[step.index] = write(self.left.get(step.index), y, frame.positions, 1)
        return y


@dataclass(frozen=True)
class _First(Schedule):
    """The first `count` sweeps of another schedule, read out as that is; what they were is noted in `seen`."""

    of: Schedule
    count: int | None = None
    seen: list[Sweep] | None = None

    readout = property(lambda self: self.of.readout)
    refresh = property(lambda self: self.of.refresh)
    settle = property(lambda self: self.of.settle)

    def sweeps(self, T: int) -> Sweeps:
        inner, done = self.of.sweeps(T), 0
        try:
            sweep = next(inner)
            while self.count is None or done < self.count:
                if self.seen is not None:
                    self.seen.append(sweep)
                done += 1
                sweep = inner.send((yield sweep))
        except StopIteration as stop:
            return stop.value
        return None


@torch.no_grad()
def visits(
    model: UndertowForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    schedule: Schedule | None = None,
    memory_mask: Tensor | None = None,
) -> Iterator[tuple[Step, Tensor]]:
    """`(step, logits_BTV)` of every visit: final norm and LM head applied to the state it leaves.

    States that the plan itself has normed already (from its visit of the final norm on) are read without a second norm.

    Args:
        input_ids: `_BT`; attention_mask: `_BT`, 0 at pads; memory_mask: `_BT`, as of a forward.
        schedule: None is evaluation's, `Converge()`; where a position ran several times, its last run counts.
    """
    program, norm = model.program, model.view.final_norm
    mask = marked(model, input_ids, memory_mask)
    recorder = _Recorder(program, model.view, model.undertow)
    seq, _ = sequence(model.view, program, input_ids, attention_mask=attention_mask, memory_mask=mask)
    recorder.run(seq, schedule or Converge())
    normed = False
    for step in program.steps:
        normed = normed or step.block == NORM
        h_BTD = recorder.left.pop(step.index)
        yield step, model.view.head(h_BTD if normed else norm(h_BTD))


@torch.no_grad()
def sweeps(
    model: UndertowForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    schedule: Schedule | None = None,
    **more: Tensor,
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """`(name, logits_BTV, memory)` of the schedule cut off each time it has been over all positions.

    The memory is as in `UndertowOutput`. A schedule is read out after its last sweep; here it is as if it ended
    earlier. Arguments as `visits`, and `more` of a forward; costs one forward for every pass. The last one is the whole
    schedule, its live pass (`adjoint`) included.
    """
    schedule, T = schedule or Converge(), input_ids.shape[1]
    schedule = schedule.resolved(double=model.dtype == torch.float64)

    def run(chosen: Schedule):
        return model(input_ids, attention_mask=attention_mask, schedule=chosen, use_cache=False, **more)

    done: list[Sweep] = []
    if model.program.memories:
        run(_First(schedule, seen=done))
    for n in _passes(done, T)[: None if schedule.adjoint is not None else -1]:
        out = run(_First(schedule, n))
        yield f"{out.passes:.3g} pass{'es' if out.passes > 1 else ''}", out.logits, out.memory
    out = run(schedule)
    yield label(schedule) if model.program.memories else "one sweep", out.logits, out.memory


def _passes(done: list[Sweep], T: int) -> list[int]:
    """After how many sweeps all positions have been run one time more."""
    times, least, found = [0] * T, 0, []
    for number, sweep in enumerate(done, 1):
        moves = not (sweep.settle or sweep.refresh)
        for t in sweep.positions if moves else ():
            times[t] += 1
        if moves and min(times) > least:
            least = min(times)
            found.append(number)
        elif found and not moves and found[-1] == number - 1:
            found[-1] = number  # a refresh or a settling belongs to the sweep before it
    return found


@torch.no_grad()
def memory_effect(
    model: UndertowForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    memory_mask: Tensor | None = None,
) -> Tensor | None:
    """`_BT`: log-probability of the token that follows, true decoding less the same model with no memory mixed in.

    Without its memory (`memory_mask` 0 everywhere) every delay-1 target stays as it is; nothing else changes. NaN where
    no token follows; None for a model without a memory.
    """
    if not model.program.memories:
        return None
    off = torch.zeros_like(input_ids)
    given = {"attention_mask": attention_mask, "schedule": Converge(), "use_cache": False}
    true, ablated = (model(input_ids, memory_mask=mask, **given).logits for mask in (memory_mask, off))
    after_BT = following(input_ids, attention_mask)
    return _logp(true, after_BT) - _logp(ablated, after_BT)


def read(
    model: UndertowForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    schedule: Schedule | None = None,
) -> Lens:
    """All three at once. The model should be in `eval()`; `input_ids` and `attention_mask`: `_BT`, as of `visits`."""
    after_BT = following(input_ids, attention_mask)
    seen = visits(model, input_ids, attention_mask, schedule)
    along = tuple(view_of(visit_name(model, step), logits, after_BT) for step, logits in seen)
    over = tuple(view_of(name, x, after_BT) for name, x, _ in sweeps(model, input_ids, attention_mask, schedule))
    return Lens(along, over, memory_effect(model, input_ids, attention_mask))


def marked(model: UndertowForCausalLM, input_ids: Tensor, memory_mask: Tensor | None = None) -> Tensor | None:
    """The memory mask of a forward: the one given, else where the model's method marks tokens (None: everywhere)."""
    return memory_mask_for(model.time_parts, input_ids, input_ids, memory_mask)


def visit_name(model: UndertowForCausalLM, step: Step) -> str:
    """`layer 3`, and where a block is visited several times, which visit it is."""
    from undertow.analysis.show import block_name

    times = sum(other.block == step.block for other in model.program.steps)
    return block_name(step.block) + (f", visit {step.repeat + 1} of {times}" if times > 1 else "")


def view_of(name: str, logits_BTV: Tensor, following_BT: Tensor) -> View:
    """What logits say, given the token that follows each (`following`)."""
    best_logp, best = _log_softmax(logits_BTV).max(-1)
    return View(name, _logp(logits_BTV, following_BT), best, best_logp)


def following(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The token that follows each, -1 where there is none."""
    after_BT = F.pad(input_ids[:, 1:], (0, 1), value=-1)
    if attention_mask is None:
        return after_BT
    real = attention_mask.bool() & F.pad(attention_mask[:, 1:], (0, 1)).bool()
    return torch.where(real, after_BT, -1)


def _logp(logits_BTV: Tensor, following_BT: Tensor) -> Tensor:
    logp = _log_softmax(logits_BTV).gather(-1, following_BT.clamp(min=0)[..., None])[..., 0]
    return logp.masked_fill(following_BT < 0, torch.nan)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits, -1)
