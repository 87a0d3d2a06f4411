"""One step of the recurrence with everything seen: gates, norms, and what the model would say after every visit.

What a visit predicts is its logit lens: the final norm and the LM head on the state it writes. Nothing is kept on
modules: the executor of one step remembers its visits and mixings, and goes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from undertow.cache import UndertowCache
from undertow.edges import Edge, Program
from undertow.execute import Executor
from undertow.inputs import memory_mask_for, sequence
from undertow.plan import NORM, Step
from undertow.schedules import Sequential
from undertow.serve.decode import mask_with
from undertow.training.statistics import statistics

SHOWN = 3  # likeliest tokens of every visit


@dataclass(frozen=True)
class Mixed:
    """One call of a mixer, `y = mixer(x, m, a)`."""

    step: Step
    edge: Edge
    x: Tensor
    m: Tensor
    a: Tensor
    y: Tensor


@dataclass(frozen=True)
class Look:
    """One token, seen.

    Attributes:
        logits_V: of the next token.
        lens_NV: logits after every visit of the plan (those of `visits_of`).
        memory_ND: what the token left behind, one vector a source (None: the model carries nothing over time).
        entered_ND: what the token before it had left behind.
        mixed: the mixers' calls, in order.
    """

    logits_V: Tensor
    lens_NV: Tensor
    memory_ND: Tensor | None
    entered_ND: Tensor | None
    mixed: tuple[Mixed, ...]


class _Watching(Executor):
    """An executor that remembers what its visits write and what its mixers do."""

    def __init__(self, model):
        super().__init__(model.program, model.view, model.undertow)
        self.visits: dict[int, Tensor] = {}
        self.mixed: list[Mixed] = []

    def _visit(self, step, state, frame, seq, written):
        self.visits[step.index] = super()._visit(step, state, frame, seq, written)
        return self.visits[step.index]

    def _mix(self, step, port, x, a, carried, frame, shared, half=None):
        for edge in step.edges.get(port, ()):
            y = super()._mix(replace(step, edges={port: (edge,)}), port, x, a, carried, frame, shared, half)
            self.mixed.append(Mixed(step, edge, x, carried[edge], a, y))
            x = y
        return x


@torch.no_grad()
def look(model, token: int, cache: UndertowCache | None, mixed: bool | None = None) -> tuple[Look, UndertowCache]:
    """One more token, on a cache of one row (None: the first token). The cache takes the token in.

    The logits are those of `model(token, past_key_values=cache)`. mixed: whether the token takes in the memory of the
    one before it (None: as the model does without a `memory_mask`).
    """
    program: Program = model.program
    cache = UndertowCache(program.slots) if cache is None else cache
    ids_11 = torch.tensor([[token]], device=model.device)
    given = None if mixed is None else torch.full_like(ids_11, mixed, dtype=torch.bool)
    mark = memory_mask_for(model.time_parts, ids_11, ids_11, given, masked=cache.masked)
    seq, documents = sequence(
        model.view, program, ids_11, attention_mask=mask_with(cache, 1), memory_mask=mark, cache=cache
    )
    executor = _Watching(model)
    trace = executor.run(seq, Sequential())
    memory = None if trace.memory_BTND is None else trace.memory_BTND[:, -1]
    cache.commit(trace.written, trace.memory_BTND, documents, 1)
    shown = [executor.visits[step.index] for step in visits_of(program)]
    lens = model.view.head(model.view.final_norm(torch.cat(shown, 1)))[0]
    return (
        Look(
            logits_V=model.view.head(trace.readouts[-1].h_BSD)[0, -1],
            lens_NV=lens,
            memory_ND=None if memory is None else memory[0],
            entered_ND=None if memory is None else seq.entry_BND[0],
            mixed=tuple(executor.mixed),
        ),
        cache,
    )


def visits_of(program: Program) -> tuple[Step, ...]:
    """The visits that a lens can read: all but that of the final norm, whose output is normed already."""
    return tuple(step for step in program.steps if step.block != NORM)


def legend(model) -> dict:
    """What the numbers of `predicted` and `state` are, in their order: visits, edges and memories, as JSON values."""
    program: Program = model.program
    again = {step.block for step in program.steps if step.repeat}

    def name(step: Step) -> str:
        block = f"layer {step.block}" if isinstance(step.block, int) else str(step.block)
        return f"{block}, pass {step.repeat + 1}" if step.block in again else block

    edges = [
        {"name": f"{name(step)}: {edge.port}", "from": str(edge.source), "delay": edge.delay}
        for step, edge in _edges(program)
    ]
    memories = [f"layer {source}" if isinstance(source, int) else str(source) for source, _, _ in program.memories]
    return {"visits": [name(step) for step in visits_of(program)], "edges": edges, "memories": memories}


def predicted(seen: Look, tokenizer, chosen: int) -> list[dict]:
    """What every visit took for the next token, as JSON values: the likeliest with their probabilities, and that of
    `chosen`, the token that came. Numbers that are not finite are None.
    """
    p_NV = seen.lens_NV.float().softmax(-1)
    top = p_NV.topk(min(SHOWN, p_NV.shape[-1]))
    return [
        {
            "top": [[tokenizer.decode([i]), _number(p)] for i, p in zip(ids, ps, strict=True)],
            "chosen": _number(float(p_V[chosen])),
        }
        for ids, ps, p_V in zip(top.indices.tolist(), top.values.tolist(), p_NV, strict=True)
    ]


def state(seen: Look, model) -> dict:
    """What the mixers did and what the token left behind, as JSON values.

    Per edge the mean of each gate and the norms of `x`, `m` and the result; per memory its
    norm and its change relative to that norm.
    """
    calls = {(call.step.index, call.edge): call for call in seen.mixed}
    edges = []
    for step, edge in _edges(model.program):
        call = calls[step.index, edge]
        found = statistics(model.undertow[edge.mixer], call.x, call.m, call.a, call.y)
        gates = {k[5:-5]: _number(float(v)) for k, v in found.items() if k.startswith("gate_") and k.endswith("_mean")}
        norms = {name: _number(float(found[f"norm_{name}"])) for name in ("x", "m", "out")}
        edges.append({"gates": gates, "norms": norms})
    memories = []
    if seen.memory_ND is not None and seen.entered_ND is not None:
        for new, old in zip(seen.memory_ND.float(), seen.entered_ND.float(), strict=True):
            change = float((new - old).norm() / new.norm())
            memories.append({"norm": _number(float(new.norm())), "change": _number(change)})
    return {"edges": edges, "memories": memories}


def _edges(program: Program) -> list[tuple[Step, Edge]]:
    return [(step, edge) for step in program.steps for edges in step.edges.values() for edge in edges]


def _number(value: float) -> float | None:
    """JSON knows no NaN; five digits are enough to look at."""
    return float(f"{value:.5g}") if value - value == 0 else None
