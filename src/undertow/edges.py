"""Hidden states carried from a source to a target port, and the program that plan and edges make together."""

from __future__ import annotations

from dataclasses import dataclass, replace

from undertow.plan import EMBED, NORM, Block, Plan, Step, Visit, unroll

PORTS = ("input", "key", "value", "output")
VISITS = ("first", "later", "last", "all")


@dataclass(frozen=True)
class Edge:
    """A hidden state carried from the output of `source` to a port of `target`.

    `delay=0` carries within a token: the target reads the latest output of the source so far. `delay=1` carries from
    token t-1 to token t: the target reads the memory, which is what the *last* visit of the source left.

    Args:
        source: a block, or `EMBED` for the token embedding.
        target: a block; `visits` says which of its visits: the first, the later ones (all but it), the last, or all.
        port: `input` and `output` mix into the residual stream around the visit; `key` and `value` mix into the
            result of the key or value projection, before any key norm or rotary embedding.
        mixer: name of the module `mixer(x_BSD, m_BSD, a_BSD) -> x_BSD`; `a` is the projection's own input (ports key
            and value) or `x` itself.
        project: name of a module applied to the carried state once per sweep, shared by every edge that names it.
        norm: carry the weightless RMS norm of the source, with this eps (None: the source itself).
        carry: name of the module `U(source_BSD, memory_BSD) -> memory_BSD` of `M_t = U(source_t, M_{t-1})`.
    """

    source: Block
    target: Block
    mixer: str
    port: str = "input"
    delay: int = 1
    visits: str = "first"
    project: str | None = None
    norm: float | None = None
    carry: str | None = None

    def __post_init__(self):
        for name, allowed in (("port", PORTS), ("visits", VISITS), ("delay", (0, 1))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"Edge {name}={getattr(self, name)!r}: allowed are {allowed}")
        if self.delay == 0 and self.carry:
            raise ValueError(f"Edge carry={self.carry!r}: only a delay-1 edge has a carry")

    @property
    def memory(self) -> tuple[Block, float | None, str | None]:
        """What identifies the memory this edge reads: edges with equal keys read the same one."""
        return (self.source, self.norm, self.carry)


@dataclass(frozen=True)
class Program:
    """Plan and edges, compiled: the steps before, within and after the part that a sweep must repeat."""

    head: tuple[Step, ...]
    span: tuple[Step, ...]
    tail: tuple[Step, ...]
    memories: tuple[tuple[Block, float | None, str | None], ...]  # `(source, norm, carry)`; the index is N in `M_BTND`
    kept: tuple[str, ...]  # registers written in the span that the tail or a memory reads: one buffer each
    starts: tuple[tuple[str, str], ...] = ()  # register -> name of the module that holds its learned start vector
    watch: Block | None = None  # a block whose last output every read-out hands on

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in the order in which they run."""
        return self.head + self.span + self.tail

    @property
    def carries(self) -> bool:
        """Whether a memory is more than its newest source."""
        return any(carry for _, _, carry in self.memories)

    @property
    def normed(self) -> bool:
        """Whether the plan visits the final norm itself, so that the read-out must not."""
        return any(step.block == NORM for step in self.steps)

    @property
    def slots(self) -> tuple[str, ...]:
        """Slots in order of their first visit: one entry of the generation cache each."""
        return tuple(step.slot for step in self.steps if step.slot and not step.shares and step.block != NORM)

    @property
    def causal(self) -> bool:
        """Whether no visit can attend to later positions, whatever prefix a caller marks."""
        return not any(step.prefix for step in self.steps)

    def reads_memory(self, steps: tuple[Step, ...]) -> bool:
        """Whether a delay-1 edge enters any of these steps."""
        return any(edge.delay == 1 for step in steps for edges in step.edges.values() for edge in edges)


def output_of(block: Block) -> str:
    """The register that holds the latest output of a block that is the source of an edge."""
    return f"@{block}"


def _targets(edge: Edge, steps: list[Step]) -> list[int]:
    visits = [s.index for s in steps if s.block == edge.target]
    if not visits:
        raise ValueError(f"edge target {edge.target!r} is never visited by the plan")
    return {"first": visits[:1], "later": visits[1:], "last": visits[-1:], "all": visits}[edge.visits]


def compile_program(
    plan: Plan,
    edges: tuple[Edge, ...],
    layers: int,
    blocks: tuple[str, ...] = (),
    starts: dict[str, str] | None = None,
    watch: Block | None = None,
) -> Program:
    """Unroll the plan, hang the edges on its steps, and find the span.

    The span runs from the earliest delay-1 target to the latest delay-1 source: nothing else can change from sweep to
    sweep. Targets after the latest source lie in the tail and need no sweep. An edge from the final norm appends a
    visit of it to a plan that has none.

    Raises:
        ValueError: a source or target that the plan never visits, a delay-0 edge whose source comes after its target,
            a bidirectional prefix together with a delay-1 edge, and whatever `unroll` raises.
    """
    starts = starts or {}
    steps = unroll(plan, layers, blocks, tuple(starts))
    if any(edge.source == NORM for edge in edges) and all(step.block != NORM for step in steps):
        steps = unroll((*plan, Visit(NORM)), layers, blocks, tuple(starts))
    for edge in edges:
        if edge.source != EMBED and all(step.block != edge.source for step in steps):
            raise ValueError(f"edge source {edge.source!r} is never visited by the plan; layers are 0..{layers - 1}")
    if watch is not None and all(step.block != watch for step in steps):
        raise ValueError(f"watch={watch!r} is never visited by the plan; layers are 0..{layers - 1}")
    sources = ({edge.source for edge in edges} | {watch}) - {EMBED, None}
    steps = [
        replace(s, writes=tuple(dict.fromkeys((*s.writes, output_of(s.block))))) if s.block in sources else s
        for s in steps
    ]
    memories = tuple(dict.fromkeys(edge.memory for edge in edges if edge.delay == 1))
    if memories and any(step.prefix for step in steps):
        raise ValueError(
            "a bidirectional prefix and a state carried over time exclude each other: a prefix has no order"
        )

    last_source = max([s.index for s in steps if s.block in {m[0] for m in memories}], default=-1)
    begin = end = last_source + 1
    for edge in edges:
        for index in _targets(edge, steps):
            step = steps[index]
            if edge.delay == 0 and edge.source != EMBED and all(s.block != edge.source for s in steps[:index]):
                raise ValueError(f"edge from {edge.source!r} to {edge.target!r} with delay 0: the source comes later")
            if edge.port in ("key", "value") and step.shares:
                raise ValueError(f"edge to the {edge.port} of visit {index}, which discards its keys and values")
            entering = {**step.edges, edge.port: (*step.edges.get(edge.port, ()), edge)}
            steps[index] = replace(step, edges=entering)
            if edge.delay == 1 and index < end:
                begin = min(begin, index)

    head, span, tail = tuple(steps[:begin]), tuple(steps[begin:end]), tuple(steps[end:])
    used = {"h", *(output_of(m[0]) for m in memories), *(r for s in tail for r in s.reads)}
    used |= {output_of(e.source) for s in tail for es in s.edges.values() for e in es if e.delay == 0}
    used |= {r for s in tail for r in s.inject} | (set() if watch is None else {output_of(watch)})
    kept = tuple(dict.fromkeys(r for s in span for r in s.writes if r in used))
    return Program(head, span, tail, memories, kept, tuple(starts.items()), watch)
