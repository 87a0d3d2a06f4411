"""The executor: one loop that runs any schedule of any program over a whole sequence.

The head runs once. Each sweep takes the memory as it stands, shifts it right by one, runs the span on its positions
and writes states, keys, values and memory into their buffers. What the schedule calls its read-out runs the tail.
`reference.py` says the same the slow way; the tests hold the two together, outputs and gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from undertow.adjoint import Unsolved, live_pass
from undertow.agree import moved
from undertow.backbone.adapter import Backbone, tapped
from undertow.edges import Edge, Program, output_of
from undertow.frames import Frame, Readout, Sequence, Trace
from undertow.maps import silent
from undertow.mixers import HeadGate, Mixer
from undertow.plan import EMBED, NORM, Step
from undertow.scan import normed, settled
from undertow.schedules import Jacobi, Schedule, Sweep
from undertow.store import KV, Filled, View, Written, overwrite, take, write


def shifted(memory_BTND: Tensor | None, seq: Sequence, positions: range) -> Tensor:
    """The memory entering `positions`: that of the position before, the call's entry at 0, zero at document starts."""
    B, N, D = seq.entry_BND.shape
    first = int(positions.start == 0)
    m = seq.x_BTD.new_zeros(B, 0, N, D) if memory_BTND is None else memory_BTND
    m = m[:, (positions.step if first else positions.start) - 1 : positions.stop - 1 : positions.step]
    unknown = len(positions) - first - m.shape[1]  # not computed yet: zero
    if first or unknown:
        entry = [seq.entry_BND[:, None].to(m.dtype)] if first else []
        m = torch.cat([*entry, m, m.new_zeros(B, unknown, N, D)], 1)
    if seq.inside_BT is not None:
        m = m * take(seq.inside_BT, positions)[..., None, None]
    return m


class Executor:
    """Runs schedules of one program on one backbone; `modules` are mixers, projections, carries, blocks and starts.

    `checkpoint`: recompute each visit in backward instead of keeping its activations.
    """

    def __init__(self, program: Program, backbone: Backbone, modules: nn.ModuleDict, checkpoint: bool = False):
        self.program, self.backbone, self.modules, self.checkpoint = program, backbone, modules, checkpoint

    # ------------------------------------------------------------------ one schedule

    def run(self, seq: Sequence, schedule: Schedule) -> Trace:
        """Compute the whole sequence by `schedule`. With no delay-1 edge every schedule is one sweep."""
        program, everywhere = self.program, seq.everywhere
        schedule = schedule.resolved(double=seq.x_BTD.dtype == torch.float64, training=torch.is_grad_enabled())
        if not program.memories:
            schedule = Jacobi(0)
        live, training = schedule.adjoint is None, torch.is_grad_enabled()
        tail_reads = program.reads_memory(program.tail)
        state = {"h": seq.x_BTD, output_of(EMBED): seq.x_BTD}
        state |= {register: self.modules[name]().expand_as(seq.x_BTD) for register, name in program.starts}
        written: Written = {}
        state = self.steps(program.head, state, Frame(everywhere, None, None), seq, written)
        state |= self._steady(state, seq)

        memory: Tensor | None = None  # this and the next two are buffers over all positions
        entered, spanned = None, dict[str, Tensor]()
        readouts, passes, residual = [], 0.0, None
        mixed, dead, lived = True, False, False
        sweeps = schedule.sweeps(len(everywhere))
        sweep: Sweep | None = next(sweeps)
        first: Frame | None = None  # of the first sweep, whose keys and values a refresh renews
        while sweep is not None:
            change, was_dead, dead = None, dead, not (sweep.grad and live)
            if was_dead and not dead:
                _forget_casts()
            with torch.no_grad() if dead else nullcontext():
                lived = lived or torch.is_grad_enabled()  # from then on a graph may hold any buffer as it was
                put = write if lived else overwrite
                keep = write if schedule.readout == "each" else put  # a read-out may be a register itself
                if sweep.settle:
                    if program.carries:
                        memory = settled(self, state | spanned, seq)
                elif sweep.refresh:
                    assert first is not None, "all positions come before"
                    self._refresh(first, self._frame(memory, sweep, seq), seq, written)
                else:
                    positions, mixed = sweep.positions, sweep.mixed
                    passes += len(positions) / len(everywhere)
                    frame = replace(self._frame(memory, sweep, seq), put=put)
                    if schedule.refresh and first is None:
                        first = frame = replace(frame, entered={})
                    rows = {r: take(x, positions) for r, x in state.items()}
                    rows = self.steps(program.span, rows, frame, seq, written)
                    for register in program.kept:
                        spanned[register] = keep(spanned.get(register), rows[register], positions, 1)
                    if tail_reads and schedule.readout == "read" and frame.memory_BSND is not None:
                        entered = write(entered, frame.memory_BSND, positions, 1)
                    if program.memories:
                        left = self.leave(rows, frame, seq)
                        if sweep.measure and memory is not None:
                            change = moved(left, take(memory, positions), training)
                        memory = keep(memory, left, positions, 1)  # the frame's own may be a view of it
                    if schedule.readout == "each":
                        readouts.append(self._read_out(rows, frame, seq, written, sweep.loss_weight))
            try:
                sweep = sweeps.send(change)
            except StopIteration as stop:
                sweep, residual = None, stop.value

        if schedule.adjoint is not None:
            passes += 1
            _forget_casts()
            assert memory is not None
            try:
                frame, memory, spanned = live_pass(self, schedule, memory, state, seq, written)
            except Unsolved as why:
                warnings.warn(f"{schedule}: {why}, so its gradient is taken by live sweeps instead", stacklevel=2)
                return self.run(seq, replace(schedule, adjoint=None))  # type: ignore[call-arg]  # a field of those with one
        elif schedule.readout != "each":
            m = shifted(memory, seq, everywhere) if tail_reads and schedule.readout == "newest" else entered
            frame = Frame(everywhere, m, mixed_where(seq, everywhere), mixed=mixed)
        if schedule.readout != "each":
            readouts.append(self._read_out(state | spanned, frame, seq, written, 1.0))
        return Trace(tuple(readouts), memory, written, passes, residual)

    # ------------------------------------------------------------------ one sweep

    def _frame(self, memory: Tensor | None, sweep: Sweep, seq: Sequence) -> Frame:
        m = shifted(memory, seq, sweep.positions) if self.program.memories else None
        if m is not None and sweep.border:
            m = torch.cat([m[:, :1], torch.zeros_like(m[:, 1:])], 1)
        where, zero = mixed_where(seq, sweep.positions), memory is None and seq.begins
        unread = zero and not (sweep.only and torch.is_grad_enabled())
        return Frame(sweep.positions, m, where, mixed=sweep.mixed, zero=zero, unread=unread)

    def _steady(self, state: Mapping[str, Tensor], seq: Sequence) -> dict[str, Tensor]:
        """What no sweep changes although a sweep needs it: the mixer's own share of the head's states, by register.

        It is there where the span begins with a mixer around its first block, and more than one token is computed.
        """
        step = self.program.span[0] if self.program.span else None
        edges = () if step is None else step.edges.get("input", ())
        inside = step is not None and isinstance(step.block, int) and self.backbone.tap("input") is not None
        if step is None or not edges or inside or len(seq.everywhere) == 1:
            return {}
        mixer = self.modules[edges[0].mixer]
        half = mixer.x_half(_read(step, state)) if isinstance(mixer, Mixer) and edges[0].delay == 1 else None
        return {} if half is None else {half_of(step): half}

    def leave(self, state: Mapping[str, Tensor], frame: Frame, seq: Sequence) -> Tensor:
        """The memories these positions leave behind, `M_BSND`."""
        left = []
        for n, (source, norm, carry) in enumerate(self.program.memories):
            m = normed(state[output_of(source)], norm)
            if carry and frame.mixed:
                assert frame.memory_BSND is not None, "the span's frame has the memory"
                updated = self.modules[carry](m, frame.memory_BSND[:, :, n])
                m = updated if frame.mask_BS is None else torch.where(frame.mask_BS[..., None], updated, m)
            left.append(m)
        m_BSND = torch.stack(left, 2)
        return m_BSND if seq.real_BT is None else m_BSND * take(seq.real_BT, frame.positions)[..., None, None]

    def _read_out(self, state: dict, frame: Frame, seq: Sequence, written: Written, weight: float) -> Readout:
        state, watch = self.steps(self.program.tail, state, frame, seq, written), self.program.watch
        h_BSD = state["h"] if self.program.normed else self.backbone.final_norm(state["h"])
        return Readout(h_BSD, frame.positions, weight, None if watch is None else state[output_of(watch)])

    def _refresh(self, first: Frame, frame: Frame, seq: Sequence, written: Written):
        """Renew what the memory adds to the keys and values at the frame's positions (LRT's kv-refresh).

        All else that made them, gates and inputs included, stays what it was in the first sweep.
        """
        assert first.entered is not None
        for step in self.program.span + self.program.tail:
            edges = [e for port in ("key", "value") for e in step.edges.get(port, ()) if e.delay == 1]
            if not edges:
                continue
            x, carried = first.entered[step.index]
            carried = {edge: m if m is None else take(m, frame.positions) for edge, m in carried.items()}
            carried |= {edge: self._carried(edge, {}, frame) for edge in edges}
            x = self._around(step, "input", take(x, frame.positions), carried, frame)
            view = View(None, written[step.slot][0], frame.positions, shares=False, only=True)
            with suppress(Filled):
                self._block(step, x, None, view, carried, frame, seq)
            assert view.current is not None
            written[step.slot] = (view.current, None)

    # ------------------------------------------------------------------ one visit

    def steps(self, steps: tuple[Step, ...], state: Mapping, frame: Frame, seq: Sequence, written: Written) -> dict:
        """Run steps on the rows of `state`; keys and values go into `written`."""
        state, cut = dict(state), False
        for step in steps:
            if cut and step.grad:
                _forget_casts()
            cut = not step.grad
            with nullcontext() if step.grad else torch.no_grad():
                y = self._visit(step, state, frame, seq, written)
            state.update(dict.fromkeys(step.writes, y))
        return state

    def _visit(self, step: Step, state: Mapping, frame: Frame, seq: Sequence, written: Written) -> Tensor:
        x, half = _read(step, state), state.get(half_of(step))
        entering = [e for edges in step.edges.values() for e in edges if frame.mixed or e.delay == 0]
        carried = {edge: self._carried(edge, state, frame) for edge in entering}
        injected = sum((state[r] for r in step.inject[1:]), state[step.inject[0]]) if step.inject else None
        past, (current, _) = seq.past.get(step.slot), written.get(step.slot, (None, None))
        if frame.entered is not None:
            frame.entered[step.index] = (x, carried)

        def call(x: Tensor) -> tuple[Tensor, KV | None, KV | None]:
            view = View(past, current, frame.positions, step.shares, put=frame.put)
            x = self._around(step, "input", x, carried, frame, half)
            y = self._block(step, x, injected, view, carried, frame, seq)
            return self._around(step, "output", y, carried, frame), view.current, view.full

        if self.checkpoint and torch.is_grad_enabled():
            y, current, full = checkpoint(call, x, use_reentrant=False)
        else:
            y, current, full = call(x)
        if not step.shares and current is not None:
            written[step.slot] = (current, full if len(frame.positions) == len(seq.everywhere) else None)
        return y

    def _block(
        self, step: Step, x: Tensor, injected: Tensor | None, view: View, carried: dict, frame: Frame, seq: Sequence
    ) -> Tensor:
        if step.block == NORM:
            return self.backbone.final_norm(x)
        if isinstance(step.block, str):
            mask = seq.masks(frame.positions, None, step.prefix)
            return self.modules[step.block](x, view, mask, *(() if injected is None else (injected,)))
        mask = self.backbone.mask(seq.masks, step.block, frame.positions, x)
        shared: dict[str, tuple] = {}
        ports = {
            port: partial(self._mix, step, port, carried=carried, frame=frame, shared=shared)
            for port in step.edges
            if self.backbone.tap(port) is not None
        }
        with tapped(self.backbone.ports(step.block, ports)):
            return self.backbone.layer(step.block, x, view, mask, seq.context, frame.positions, step.repeat)

    def _around(
        self, step: Step, port: str, x: Tensor, carried: dict, frame: Frame, half: Tensor | None = None
    ) -> Tensor:
        """Mix into what a block is called with or returns, unless the port lies inside the block."""
        inside = isinstance(step.block, int) and self.backbone.tap(port) is not None
        return x if inside else self._mix(step, port, x, x, carried, frame, {}, half)

    def _mix(
        self, step: Step, port: str, x: Tensor, a: Tensor, carried: dict, frame: Frame, shared: dict,
        half: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """What edges bring to a port. `half`: see `_steady`; `shared`: this visit's gates and their input, by mixer."""
        for edge in step.edges.get(port, ()):
            if edge not in carried:
                continue
            mixer = self.modules[edge.mixer]
            if isinstance(mixer, HeadGate):
                if edge.mixer not in shared or shared[edge.mixer][0] is not a:
                    shared[edge.mixer] = a, mixer.read(a)
                mixed = mixer(x, carried[edge], a, read=shared[edge.mixer][1])
            elif half is not None:
                mixed, half = mixer(x, carried[edge], a, half=half), None  # x is the head's for the first edge alone
            else:
                mixed = mixer(x, carried[edge], a)
            if edge.delay == 1 and frame.mask_BS is not None:
                mixed = torch.where(frame.mask_BS[..., None], mixed, x)
            x = mixed
        return x

    def _carried(self, edge: Edge, state: Mapping, frame: Frame) -> Tensor | None:
        """What an edge brings: the source's output now (delay 0) or the memory (delay 1), projected once per sweep.

        None: the memory is zero, and that is all the mixer needs to know.
        """
        if edge.delay == 0:
            m = state[output_of(edge.source)]
            return m if edge.project is None else self.modules[edge.project](m)
        project = None if edge.project is None else self.modules[edge.project]
        if frame.unread and silent(self.modules[edge.mixer], project):
            return None
        n = self.program.memories.index(edge.memory)
        key = (n, edge.project, torch.is_grad_enabled())  # what a round without gradient made has none to give
        if key not in frame.carried:
            assert frame.memory_BSND is not None, "a frame whose steps read the memory has it"
            m = frame.memory_BSND[:, :, n]
            if project is not None:
                rows = project(m[:1, :1] if frame.zero else m)
                m = rows.expand(*m.shape[:2], -1)
            frame.carried[key] = m
        return frame.carried[key]


def _forget_casts():
    """Before torch 2.11, autocast reuses low-precision weights it made without gradient, and silently cuts it."""
    torch.clear_autocast_cache()


def half_of(step: Step) -> str:
    """The register that holds what the step's mixer makes of its input alone (`Mixer.x_half`), if it is there."""
    return f"half of {step.index}"


def _read(step: Step, state: Mapping[str, Tensor]) -> Tensor:
    """The sum of the registers that a step reads."""
    return sum((state[r] for r in step.reads[1:]), state[step.reads[0]])


def mixed_where(seq: Sequence, positions: range) -> Tensor | None:
    """Where delay-1 targets mix, `_BS` (None: everywhere)."""
    return None if seq.memory_mask_BT is None else take(seq.memory_mask_BT, positions)
