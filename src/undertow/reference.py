"""The definition, the slowest honest way: everything faster is tested against this file, outputs and gradients.

`recur` is the recurrence itself, one token after the other, with no cache of any kind. `sweep` runs a schedule
literally: every visit in every sweep, dense masks, nothing reused.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from undertow.agree import MOVED_EPS
from undertow.backbone.adapter import tapped
from undertow.edges import output_of
from undertow.plan import EMBED, NORM
from undertow.schedules import Schedule


class _Buffer:
    """Keys and values of one slot over all T positions; a visit overwrites rows I and attends to all."""

    def __init__(self, T: int, rows: list[int], old: tuple | None, shares: bool):
        self.T, self.rows, self.kv, self.shares = T, rows, old, shares

    def update(self, k: Tensor, v: Tensor, *args, **kwargs):
        if not self.shares:
            old = self.kv or tuple(x.new_zeros(*x.shape[:2], self.T, x.shape[3]) for x in (k, v))
            self.kv = tuple(o.index_copy(2, torch.tensor(self.rows), x) for o, x in zip(old, (k, v), strict=True))
        return self.kv


class _Run:
    """One text batch on one model, with what is fixed about it."""

    def __init__(self, model, input_ids, attention_mask=None, position_ids=None, memory_mask=None, prefix_mask=None):
        B, T = input_ids.shape
        self.program, self.backbone, self.modules, self.T = model.program, model.view, model.undertow, T
        self.real = torch.ones(B, T, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            position_ids = (self.real.cumsum(1) - 1).clamp(min=0)
        first_real = self.real & (self.real.cumsum(1) == 1)
        self.starts = self.real & ((position_ids == 0) | first_real)
        self.document = torch.where(self.real, self.starts.cumsum(1), 0)
        self.mix = torch.ones(B, T, dtype=torch.bool) if memory_mask is None else memory_mask.bool()
        self.prefix = torch.zeros(B, T, dtype=torch.bool) if prefix_mask is None else prefix_mask.bool()
        self.x = self.backbone.embed(input_ids, None, position_ids)
        context = self.backbone.context(input_ids, self.x, position_ids.expand(B, T), 0)
        self.context = {n: c if isinstance(c, tuple) else (c,) for n, c in context.items()}
        self.first: dict[int, tuple] = {}  # for refreshes: what every step read in the first sweep
        self.entered: tuple | None = None  # during a refresh: the edges that bring the new memory, and the old one

    def mask(self, rows: list[int], window: int | None, prefix: bool = False) -> Tensor:
        q, k = torch.tensor(rows)[:, None], torch.arange(self.T)[None]
        allowed = (k <= q) & (q - k < (window or self.T + 1))
        if prefix:
            allowed = allowed | (self.prefix[:, rows, None] & self.prefix[:, None])
            return (allowed & (self.document[:, rows, None] == self.document[:, None, :]))[:, None]
        same = self.document[:, rows, None] == self.document[:, None, :]
        return (allowed[None] & same)[:, None]

    def visits(self, steps, state: dict, rows: list[int], m_BSND: Tensor | None, mix_BS: Tensor, kv: dict) -> dict:
        """Run steps on the rows, dense; `kv` maps slots to their buffers and is updated."""
        state = dict(state)
        for step in steps:
            with torch.set_grad_enabled(torch.is_grad_enabled() and step.grad):
                y = self.visit(step, state, rows, m_BSND, mix_BS, kv)
            state.update(dict.fromkeys(step.writes, y))
        return state

    def visit(self, step, state, rows, m_BSND, mix_BS, kv):
        def mix(port, x, a):
            for edge in step.edges.get(port, ()):
                if edge.delay == 0:
                    m = state[output_of(edge.source)]
                else:
                    stale = self.entered is not None and edge not in self.entered[0]
                    m = (self.entered[1] if stale else m_BSND)[:, :, self.program.memories.index(edge.memory)]
                m = self.modules[edge.project](m) if edge.project else m
                mixed = self.modules[edge.mixer](x, m, a)
                x = mixed if edge.delay == 0 else torch.where(mix_BS[..., None], mixed, x)
            return x

        x = sum(state[r] for r in step.reads)
        if step.index not in self.first:
            self.first[step.index] = (x, state)
        inside = isinstance(step.block, int) and self.backbone.tap("input") is not None
        x = x if inside else mix("input", x, x)
        buffer = _Buffer(self.T, rows, kv.get(step.slot), step.shares)
        if step.block == NORM:
            y = self.backbone.final_norm(x)
        elif isinstance(step.block, str):
            injected = [sum(state[r] for r in step.inject)] if step.inject else []
            y = self.modules[step.block](x, buffer, self.mask(rows, None, step.prefix), *injected)
        else:
            ports = {p: (lambda z, a, p=p: mix(p, z, a)) for p in step.edges if self.backbone.tap(p) is not None}
            layer = self.backbone.layers[step.block]
            mask = self.mask(rows, self.backbone.window(step.block))
            if self.backbone.attention() == "added":
                mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -torch.inf)
            keywords = {self.backbone.cache_keyword: buffer, "attention_mask": mask}
            for name, parts in self.context.items():
                parts = tuple(c.expand(len(self.x), *c.shape[1:])[:, rows] for c in parts)
                keywords[name] = parts if name == "position_embeddings" else parts[0]
            if self.backbone.family.ours:
                keywords["repeat"] = step.repeat
            with tapped(self.backbone.ports(step.block, ports)):
                y = layer(x, **keywords)
        if buffer.kv is not None:
            kv[step.slot] = buffer.kv
        return mix("output", y, y)

    def refresh(self, rows: list[int], m_BSND: Tensor, mix_BS: Tensor, kv: dict):
        """Keys and values at `rows` as in the first sweep, but for the memory that key and value ports add."""
        for step in self.program.span + self.program.tail:
            fresh = {e for p in ("key", "value") for e in step.edges.get(p, ()) if e.delay == 1}
            if fresh:
                x, state = self.first[step.index]
                before = {r: s[:, rows] for r, s in state.items()}
                old = torch.zeros_like(m_BSND)  # what the first sweep read
                copy, self.entered = replace(step, reads=("x",)), (fresh, old)
                self.visit(copy, before | {"x": x[:, rows]}, rows, m_BSND, mix_BS, kv)
                self.entered = None

    def settle(self, state: dict, memory_BTND: Tensor) -> Tensor:
        """The memory of the newest sources, token after token."""
        for t in range(self.T):
            rows = [t]
            left = self.leave(
                {r: x[:, rows] for r, x in state.items()}, rows, self.entering(memory_BTND, rows), self.mix[:, rows]
            )
            memory_BTND = memory_BTND.index_copy(1, torch.tensor(rows), left)
        return memory_BTND

    def start(self, rows: list[int]) -> dict:
        x = self.x[:, rows]
        return {"h": x, output_of(EMBED): x} | {r: self.modules[n]().expand_as(x) for r, n in self.program.starts}

    def leave(self, state: dict, rows: list[int], m_BSND: Tensor, mix_BS: Tensor) -> Tensor:
        """`M_t = U(source_t, M_{t-1})`, zero at pads; `_BSND`."""
        left = []
        for n, (source, norm, carry) in enumerate(self.program.memories):
            m = state[output_of(source)]
            m = F.rms_norm(m, m.shape[-1:], eps=norm) if norm is not None else m
            left.append(torch.where(mix_BS[..., None], self.modules[carry](m, m_BSND[:, :, n]), m) if carry else m)
        return torch.stack(left, 2) * self.real[:, rows, None, None]

    def entering(self, memory_BTND: Tensor, rows: list[int]) -> Tensor:
        """What each row reads: the memory of the position before, zero at a document's start; `_BSND`."""
        before = torch.cat([torch.zeros_like(memory_BTND[:, :1]), memory_BTND[:, :-1]], 1)
        return before[:, rows] * ~self.starts[:, rows, None, None]

    def logits(self, h: Tensor) -> Tensor:
        return self.backbone.head(h if self.program.normed else self.backbone.final_norm(h))


def moved(new: Tensor, old: Tensor) -> float:
    """The largest relative change of a position's memory."""
    new, old = new.detach(), old.detach()
    return float(((new - old).norm(dim=-1) / (old.norm(dim=-1) + MOVED_EPS)).max())


def recur(model, input_ids, attention_mask=None, position_ids=None, memory_mask=None) -> tuple[Tensor, Tensor | None]:
    """The recurrence by definition: `(logits_BTV, memory_BTND)`.

    Token t is a plain pass over tokens 0..t, each given the memory the token before it left; only its last row is new.
    No cache: everything else is computed again.
    """
    run = _Run(model, input_ids, attention_mask, position_ids, memory_mask)
    B, T, D = run.x.shape
    N = len(run.program.memories)
    left, rows_out = list[Tensor](), []
    for t in range(T):
        rows = list(range(t + 1))
        # The newest token's own memory is not known yet; nothing reads it, so zeros stand in for it.
        m = run.entering(torch.stack([*left, run.x.new_zeros(B, N, D)], 1), rows) if N else None
        state = run.visits(run.program.steps, run.start(rows), rows, m, run.mix[:, rows], {})
        if m is not None:
            left.append(run.leave(state, rows, m, run.mix[:, rows])[:, -1])
        rows_out.append(run.logits(state["h"])[:, -1])
    return torch.stack(rows_out, 1), (torch.stack(left, 1) if N else None)


def sweep(model, schedule: Schedule, input_ids: Tensor, attention_mask=None, position_ids=None, memory_mask=None):
    """A schedule, literally: `(logits_BTV merged, [(logits_BSV, rows, weight)] of every read-out, memory_BTND)`."""
    run = _Run(model, input_ids, attention_mask, position_ids, memory_mask)
    program, (B, T, D) = run.program, run.x.shape
    every = list(range(T))
    if schedule.adjoint is not None:
        raise ValueError("the reference runs live sweeps only; compare the adjoint with them")
    if not program.memories:
        out = run.logits(run.visits(program.steps, run.start(every), every, None, run.mix, {})["h"])
        return out, [(out, every, 1.0)], None
    memory, entered = (run.x.new_zeros(B, T, len(program.memories), D) for _ in range(2))
    kv, spanned, parts = dict[str, tuple](), dict[str, Tensor](), []
    sweeps, change = schedule.resolved(run.x.dtype == torch.float64).sweeps(T), None
    run.first.clear()
    while True:
        try:
            s = sweeps.send(change)
        except StopIteration:
            break
        rows = list(s.positions)
        if s.refresh:
            run.refresh(rows, run.entering(memory, rows), run.mix[:, rows], kv)
            continue
        if s.settle:
            with torch.set_grad_enabled(torch.is_grad_enabled() and s.grad):
                memory = run.settle(spanned, memory)
            continue
        index = torch.tensor(rows)
        # Nothing in the head can differ between sweeps, so a cut of the gradient does not concern it.
        state = run.visits(program.head, run.start(rows), rows, None, run.mix, kv)
        with torch.set_grad_enabled(torch.is_grad_enabled() and s.grad):
            m = run.entering(memory, rows)
            if s.border:
                m = m * (torch.arange(len(rows)) == 0)[:, None, None]
            mix = run.mix[:, rows] & s.mixed
            middle = run.visits(program.span, state, rows, m, mix, kv)
            left = run.leave(middle, rows, m, mix)
            change = moved(left, memory[:, rows]) if s.measure else None
            memory, entered = memory.index_copy(1, index, left), entered.index_copy(1, index, m)
            out = run.logits(run.visits(program.tail, middle, rows, m, mix, kv)["h"])
            parts.append((out, rows, s.loss_weight))
        for r, x in middle.items():  # what the head wrote keeps its gradient
            spanned[r] = spanned.get(r, x.new_zeros(B, T, D)).index_copy(1, index, x)
        mixed = s.mixed
    if schedule.readout != "each":
        m = run.entering(memory, every) if schedule.readout == "newest" else entered
        out = run.logits(run.visits(program.tail, spanned, every, m, run.mix & mixed, kv)["h"])
        parts = [(out, every, 1.0)]
    merged = torch.zeros(B, T, parts[0][0].shape[-1], dtype=run.x.dtype)
    for out, rows, _ in parts:
        merged = merged.index_copy(1, torch.tensor(rows), out)
    return merged, parts, memory
