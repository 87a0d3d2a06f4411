"""What a loop over depth does to its states, round by round: norms, how they differ, how far they still move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from undertow.execute import Executor
from undertow.exits import loops_of
from undertow.inputs import sequence
from undertow.model import UndertowForCausalLM
from undertow.plan import Step
from undertow.schedules import Converge, Schedule
from undertow.store import write

__all__ = ["Round", "rounds"]


@dataclass(frozen=True)
class Round:
    """One round of a loop, means over all positions of 2-norms over the width.

    Attributes:
        norms: register -> size of what the round left in it (of a TRM block: z and y).
        change: relative change of the state the round hands on, `|y_r - y_{r-1}| / |y_{r-1}|` (None in the first).
        cosine: between the two registers, if there are two.
        gate: share of the result that the loop's gated exit lets into the stream (None: there is no gate).
    """

    norms: Mapping[str, float]
    change: float | None
    cosine: float | None
    gate: float | None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


class _Recorder(Executor):
    """An executor that also keeps what every step's block returned, over all positions, before its output port."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen: dict[int, Tensor] = {}

    def _block(self, step: Step, x, injected, view, carried, frame, seq) -> Tensor:
        y = super()._block(step, x, injected, view, carried, frame, seq)
        self.seen[step.index] = write(self.seen.get(step.index), y.detach(), frame.positions, 1)
        return y


@torch.no_grad()
def rounds(
    model: UndertowForCausalLM,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    schedule: Schedule | None = None,
    loops: int | None = None,
) -> tuple[Round, ...]:
    """Watch the loop of a model in one forward. Nothing is stored on the model.

    Args:
        input_ids: `_BT`; attention_mask: `_BT`, 0 at pads, which are not counted.
        schedule: None is evaluation's, `Converge()`; where positions ran several times, their last run counts.
        loops: rounds, if not the model's own.

    Raises:
        ValueError: a model without one loop of at least two rounds.
    """
    program = model.program_for(loops)
    parts = loops_of(program).rounds
    recorder = _Recorder(program, model.view, model.undertow)
    recorder.run(sequence(model.view, program, input_ids, attention_mask=attention_mask)[0], schedule or Converge())
    real_BT = torch.ones_like(input_ids).bool() if attention_mask is None else attention_mask.bool()
    gate, found, before = _gate(model, parts[-1][-1]), list[Round](), None
    for steps in parts:
        # The very last step writes the stream; what it computed is the register the rounds before it hand on.
        names = [step.writes[0] for step in steps[:-1]] + [parts[0][-1].writes[0]]
        left = {name: recorder.seen[step.index][real_BT] for name, step in zip(names, steps, strict=True)}
        y = left[names[-1]]
        change = None if before is None else float(((y - before).norm(dim=-1) / before.norm(dim=-1)).mean())
        pair = list(left.values())
        cosine = float(torch.cosine_similarity(pair[0], pair[1], dim=-1).mean()) if len(pair) == 2 else None
        norms = {name: float(x.norm(dim=-1).mean()) for name, x in left.items()}
        found.append(Round(norms, change, cosine, gate))
        before = y
    return tuple(found)


def _gate(model: UndertowForCausalLM, last: Step) -> float | None:
    """What a mixer at the loop's exit makes of a result of 1 and a stream of 0."""
    for edge in last.edges.get("output", ()):
        if edge.delay == 0:
            one = torch.ones(1, 1, model.view.shape.width, device=model.device, dtype=model.dtype)
            return float(model.undertow[edge.mixer](one, torch.zeros_like(one), one).mean())
    return None
