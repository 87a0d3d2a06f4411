"""One new token a row, with a cache: what `execute.Executor` computes at one position, with nothing made twice.

Everything that does not change from token to token is worked out when the loop starts: what every visit reads, mixes
and writes, where its keys and values go, its mask. The executor is the definition; tests hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from undertow.backbone import adapter
from undertow.backbone.adapter import tapped
from undertow.cache import Place, Room, UndertowCache
from undertow.edges import Edge, Program, output_of
from undertow.inputs import memory_mask_for
from undertow.mixers import HeadGate, opened
from undertow.plan import EMBED, NORM, Step
from undertow.scan import normed

if TYPE_CHECKING:
    from undertow.model import UndertowForCausalLM

__all__ = ["Stepper", "compiling"]

LEAST_ROOM = 256  # tokens that room is made for at once: a long limit that an end token cuts short costs no memory
TABLE = 64  # positions whose rotary tables are made at once


@dataclass
class _Token:
    """What the visits of one token share: the memory that enters it, and its projections, made where first needed."""

    memories_B1D: list[Tensor]
    marked_B1: Tensor | None = None  # where delay-1 targets mix (None: everywhere)
    carried: dict[tuple, Tensor] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    # Of the layer that runs: its gates, one for its keys and values, and its ports, for `tapped`.
    gates: dict[nn.Module, tuple[Tensor, ...]] = field(default_factory=dict)
    ports: dict[int, list] = field(default_factory=dict)


class Stepper:
    """The program at one new position a row. Call it with the newest tokens `_B1`; it returns logits `_BV` of the next.

    It takes over the cache of a prefill and gives it back with `release`; between the two the cache must not be used.

    Args:
        model: in `eval()`.
        cache: of at least one token.
        position_B1: the position of the first new token in its row's text.
        most: new tokens at most.
        loops: rounds of the depth method, those of the prefill.
        compiled: run the layers through `torch.compile`.
    """

    def __init__(
        self,
        model: UndertowForCausalLM,
        cache: UndertowCache,
        position_B1: Tensor,
        most: int,
        loops: int | tuple[int, ...] | None = None,
        compiled: bool = False,
    ):
        self.view, self.modules, self.cache = model.view, model.undertow, cache
        self.program: Program = model.program_for(loops)
        # Additive masks save every layer a conversion; our own attention takes boolean ones, autocast its own types.
        kind, autocast = self.view.attention(), torch.is_autocast_enabled(position_B1.device.type)
        additive = kind == "added" or not (self.view.family.ours or autocast)
        self.room = Room(cache, most, LEAST_ROOM, additive)
        self.time, self.masked = model.time_parts, cache.masked
        self.limit = _positions(model)
        self.memories = [] if cache.memory_BND is None else [*cache.memory_BND.split(1, 1)]
        self.visits = [_Visit(step, self) for step in self.program.steps]
        self.starts = {register: self.modules[name]() for register, name in self.program.starts}
        same = bool((position_B1 == position_B1[:1]).all())
        self.position_B1 = position_B1[:1].clone() if same else position_B1.clone()
        self.ahead = _rotary_ahead(self.view)
        self.tables: tuple[Tensor, ...] = ()  # rotary tables of the next positions
        self.table_at = TABLE
        self.call: Callable = _compiled() if compiled else _call

    def __call__(self, ids_B1: Tensor) -> Tensor:
        view, room = self.view, self.room
        if self.limit is not None and room.length == self.limit:
            raise ValueError(f"{room.length + 1} positions: the backbone's learned position table has {self.limit}")
        room.advance()
        x_B1D = view.embed(ids_B1, None, self.position_B1)
        context = self._context(ids_B1, x_B1D)
        marked = memory_mask_for(self.time, ids_B1, ids_B1, masked=self.masked) if self.program.memories else None
        state = {"h": x_B1D, output_of(EMBED): x_B1D}
        for register, start in self.starts.items():
            state[register] = start.expand_as(x_B1D)
        token = _Token(self.memories, marked, state=state)
        with tapped(token.ports):
            for visit in self.visits:
                visit(token, context)
        self.position_B1 += 1
        if self.program.memories:
            self.memories = [self._left(token, n) for n in range(len(self.program.memories))]
        h_B1D = state["h"] if self.program.normed else view.final_norm(state["h"])
        return view.head(h_B1D)[:, -1]

    def release(self) -> UndertowCache:
        """The cache, with all tokens so far."""
        self.room.release()
        if self.memories:
            self.cache.memory_BND = torch.cat(self.memories, 1)
        return self.cache

    def _left(self, token: _Token, n: int) -> Tensor:
        """The memory that this token leaves behind."""
        source, norm, carry = self.program.memories[n]
        m = normed(token.state[output_of(source)], norm)
        if not carry:
            return m
        updated = self.modules[carry](m, self.memories[n])
        return updated if token.marked_B1 is None else torch.where(token.marked_B1[..., None], updated, m)

    def _context(self, ids_B1: Tensor, x_B1D: Tensor) -> Mapping[str, Any]:
        """What every layer gets beside the stream; plain rotary tables are made for many positions at once."""
        if self.ahead is None:
            return self.view.context(ids_B1, x_B1D, self.position_B1, self.room.length - 1)
        if self.table_at == TABLE:
            self.tables = self.ahead(x_B1D, position_ids=self.position_B1 + torch.arange(TABLE, device=x_B1D.device))
            self.table_at = 0
        at, self.table_at = self.table_at, self.table_at + 1
        return {"position_embeddings": tuple(table[:, at : at + 1] for table in self.tables)}


def _positions(model) -> int | None:
    """How many positions a learned table has (None: there is no table, hence no limit)."""
    name = model.view.family.positions
    table = getattr(model.view.base, name) if name else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def _rotary_ahead(view) -> Callable | None:
    """The module that makes rotary tables, where those of a position do not depend on how long the text is."""
    if view.family.ours or view.family.rotary is None:
        return None
    rotary = getattr(view.base, view.family.rotary)
    return None if "dynamic" in rotary.rope_type or rotary.rope_type == "longrope" else rotary


class _Mix:
    """One edge into a visit, its names looked up. `memory`: which one it brings (None: the source's output now)."""

    def __init__(self, edge: Edge, stepper: Stepper):
        self.mixer: Any = stepper.modules[edge.mixer]
        self.gated = isinstance(self.mixer, HeadGate)
        self.project = None if edge.project is None else stepper.modules[edge.project]
        self.memory = stepper.program.memories.index(edge.memory) if edge.delay else None
        self.source = output_of(edge.source)


class _Visit:
    """One step of the program at one position, everything that does not change from token to token worked out."""

    def __init__(self, step: Step, stepper: Stepper):
        view, modules = stepper.view, stepper.modules
        self.step, self.stepper = step, stepper
        self.reads, self.writes, self.inject = step.reads, step.writes, step.inject
        self.input, self.output = self._around("input"), self._around("output")
        self.layer: nn.Module | None = None
        self.keywords: dict[str, object] = {}
        self.ports: dict[int, list] = {}
        self.token: _Token | None = None
        window = None
        if isinstance(step.block, int):
            self.layer, window = view.layers[step.block], view.window(step.block)
            self.keywords = {"repeat": step.repeat} if view.family.ours else {}
            inside = {name: edges for name, edges in step.edges.items() if view.tap(name) is not None}
            self.ports = view.ports(step.block, {n: _Port(self, es) for n, es in inside.items()})
        elif step.block != NORM:
            self.layer = modules[step.block]
        self.place: Place = stepper.room.place(step.slot, window, step.shares)
        if isinstance(step.block, int):
            self.keywords[view.cache_keyword] = self.place

    def _around(self, port: str) -> tuple[_Mix, ...]:
        """The edges that mix into what the block is called with or returns, not inside it."""
        inside = isinstance(self.step.block, int) and self.stepper.view.tap(port) is not None
        return () if inside else tuple(_Mix(edge, self.stepper) for edge in self.step.edges.get(port, ()))

    def __call__(self, token: _Token, context: Mapping[str, Any]) -> None:
        state, stepper = token.state, self.stepper
        x = state[self.reads[0]]
        for register in self.reads[1:]:
            x = x + state[register]
        if self.input:
            x = self.mixed(self.input, x, x, token)
        if self.layer is None:
            y = stepper.view.final_norm(x)
        elif isinstance(self.step.block, str):
            injected = (sum((state[r] for r in self.inject[1:]), state[self.inject[0]]),) if self.inject else ()
            y = self.layer(x, self.place, self.place.mask, *injected)
        else:
            self.token = token
            token.gates.clear()
            token.ports.clear()
            token.ports.update(self.ports)
            y = stepper.call(self.layer, x, self.place.mask, self.keywords, context)
        if self.output:
            y = self.mixed(self.output, y, y, token)
        for register in self.writes:
            state[register] = y

    def mixed(self, mixes: tuple[_Mix, ...], x: Tensor, a: Tensor, token: _Token) -> Tensor:
        """What edges carry mixed into `x`; `a`: what a mixer reads beside it.

        All in one function: at one token a call of a function costs as much as the operator inside.
        """
        for mix in mixes:
            mixer, project = mix.mixer, mix.project
            m = token.state[mix.source] if mix.memory is None else token.memories_B1D[mix.memory]
            if project is not None and mix.memory is None:
                m = project(m)
            elif project is not None:  # a memory is projected once a token
                key = (mix.memory, project)
                known = token.carried.get(key)
                m = token.carried[key] = project(m) if known is None else known
            if mix.gated:
                gates = token.gates.get(mixer)
                if gates is None:
                    gates = token.gates[mixer] = mixer.read(a, wide=x.shape[-1] // mixer.kv_heads)
                y = opened(x, mixer.mix(x, m, *gates), mixer.scale)
            else:
                y = mixer(x, m, a)
            if mix.memory is not None and token.marked_B1 is not None:
                y = torch.where(token.marked_B1[..., None], y, x)
            x = y
        return x


class _Port:
    """What a tapped projection of one visit adds."""

    def __init__(self, visit: _Visit, edges: tuple[Edge, ...]):
        self.visit, self.mixes = visit, tuple(_Mix(edge, visit.stepper) for edge in edges)

    def __call__(self, x: Tensor, a: Tensor) -> Tensor:
        assert self.visit.token is not None, "the layer runs"
        return self.visit.mixed(self.mixes, x, a, self.visit.token)


@contextmanager
def compiling(on: bool) -> Iterator[None]:
    """Around steps of compiled layers: what is compiled for one layer serves all, whatever number a layer has.

    A layer is left where something is mixed into its projections: that differs from layer to layer.
    """
    if not on:
        yield
        return
    mix, adapter.mix_taps = adapter.mix_taps, _uncompiled()
    try:
        with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
            yield
    finally:
        adapter.mix_taps = mix


@cache
def _uncompiled() -> Callable:
    """One for all decoding: another one would be another program."""
    return torch.compiler.disable(adapter.mix_taps)


@cache
def _compiled() -> Callable:
    """One compiled function for all layers of all models."""
    return torch.compile(_call, dynamic=True)


def _call(layer: nn.Module, x_B1D: Tensor, mask: Tensor | None, keywords: dict, context: Mapping[str, Any]) -> Tensor:
    return layer(x_B1D, attention_mask=mask, **keywords, **context)
