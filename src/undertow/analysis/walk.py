"""The executor's walk without tensors: what a forward multiplies, and what its backward will.

It adds up the forward products and, where there is gradient, notes them in the graph that autograd would build, so that
a backward costs exactly what it reaches. What the executor does once (a zero memory's projection, the half of a mixer
that no sweep changes, gates that keys and values share) is done once here, too: tests hold both to torch's own counter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from torch import nn

from undertow import plan
from undertow.analysis.weights import Weights, block_of, weights_of
from undertow.edges import Edge, output_of
from undertow.execute import half_of
from undertow.maps import silent
from undertow.mixers import HeadGate, Mixer
from undertow.model import UndertowForCausalLM
from undertow.schedules import Cyclic, Jacobi, Schedule

__all__ = ["Walk"]

Node = int | None  # a tensor: its number in the graph, or None if it has no gradient
State = Mapping[str, Node]
Mix = Callable[[str, Node, Node], Node]  # port, what it holds, the projection's input
LEAF = 0  # every trained parameter
NO_HALF = -1  # no sweep shares what a mixer makes of x


@dataclass(frozen=True)
class _Frame:
    """One sweep, or several: its rows, its pairs of query and key, whether it covers all positions, what it reads.

    `refresh`: only keys and values are renewed; `entered`: what steps read in the first sweep, if a refresh needs it;
    `mixed`: whether delay-1 edges mix; `zero`: no memory is there yet, and its projection is that of one zero row.
    """

    rows: float
    pairs: float
    whole: bool = True
    grad: bool = True
    refresh: bool = False
    mixed: bool = True
    zero: bool = False
    only: bool = False
    entered: dict[int, tuple] | None = None
    memory: Node = None
    carried: dict[tuple, Node] = field(default_factory=dict)  # projections of the memory made so far


def _frames(schedule: Schedule, T: int, past: int) -> list[_Frame]:
    """The sweeps of a schedule. In a series of one kind, all from the second on are one frame: what the second reads
    has gradient if it ever has, so they differ in rows and keys only, and cost follows these linearly."""
    frames: list[_Frame] = []
    for sweep in schedule.sweeps(T):
        if sweep.measure:
            raise ValueError(f"{schedule} costs what the data need: give a number of rounds, Cyclic(G, n)")
        if sweep.settle:  # a carry has no matrices
            continue
        positions, rows = sweep.positions, len(sweep.positions)
        keys = past + (positions.stop if positions.step == 1 else T)
        grad = sweep.grad and schedule.adjoint is None
        zero = not frames and not past
        frame = _Frame(rows, rows * keys, positions == range(T), grad, sweep.refresh, sweep.mixed, zero, sweep.only)
        alike = [(f.whole, f.grad, f.refresh, f.mixed, f.zero) for f in (*frames[-2:], frame)]
        if len(alike) == 3 and len(set(alike)) == 1:
            last = frames.pop()
            frame = replace(frame, rows=last.rows + rows, pairs=last.pairs + frame.pairs)
        frames.append(frame)
    return frames


class Walk:
    """One forward of one row: `forward` FLOPs, `evaluations` a token, and the graph whose `losses` start a backward.

    A node of the graph is `(inputs, cost, weights, again)`: the tensors it was made of, the FLOPs of the gradient of
    each, those of the gradient of its weights, and those computed anew before its backward (checkpointing).
    `products` is what the adjoint's vector-Jacobian products add to the backward.
    """

    def __init__(
        self,
        model: UndertowForCausalLM,
        T: int,
        schedule: Schedule,
        heads: int | None = None,
        past: int = 0,
        grad: bool = False,
        batch: int = 1,
    ):
        for name, value, least in (("T", T, 1), ("context", past, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.model, self.program, self.T, self.past, self.grad = model, model.program, T, past, grad
        self.zero_rows = 1 / batch  # a zero memory is projected once for the whole batch
        self.forward = self.products = self.evaluations = 0.0
        self.nodes: list[tuple[tuple[int, ...], float, float, float]] = [((), 0.0, 0.0, 0.0)]
        self.written: dict[str, tuple[Node, Node]] = {}
        self.gates: dict[str, tuple[Node, Node]] = {}  # of the block that runs: mixer -> its gates, and what they read
        self.leaves: dict[nn.Module, Node] = {}
        self.blocks = {
            step.block: block_of(model, step.block) for step in self.program.steps if step.block != plan.NORM
        }
        self.weights = {name: weights_of(m) for name, m in model.undertow.items()}
        self.losses = self.run(schedule if self.program.memories else Jacobi(0), heads)

    @contextmanager
    def no_grad(self, really: bool):
        """Within it nothing is noted in the graph, if `really`."""
        before, self.grad = self.grad, self.grad and not really
        yield
        self.grad = before

    def leaf(self, module: nn.Module) -> Node:
        """The trained parameters of a module (None: all are frozen)."""
        if module not in self.leaves:
            self.leaves[module] = LEAF if any(p.requires_grad for p in module.parameters()) else None
        return self.leaves[module]

    def node(self, *inputs: Node, cost: float = 0.0, weights: float = 0.0, again: float = 0.0) -> Node:
        """A tensor made of others: see the class."""
        live = tuple(i for i in inputs if i is not None)
        if not self.grad or not (live or weights):
            return None
        if len(live) == 1 and not (cost or weights or again):
            return live[0]
        self.nodes.append((live, cost, weights, again))
        return len(self.nodes) - 1

    def multiply(self, rows: float, weights: Weights, *inputs: Node) -> Node:
        """Projections of what the inputs make together."""
        total, trained = weights
        self.forward += 2 * rows * total
        return self.node(self.node(*inputs), cost=2 * rows * total, weights=2 * rows * trained)

    def attend(self, pairs: float, width: int, q: Node, k: Node, v: Node) -> Node:
        """Scores and weighted values of so many pairs of query and key."""
        cost = 2 * pairs * width
        self.forward += 2 * cost
        return self.node(self.node(q, k, cost=cost), v, cost=cost)

    def backward(self, roots: Iterable[Node], through: Node = None) -> float:
        """FLOPs of a backward from `roots`; `through`: of a vector-Jacobian product with respect to that node."""
        on_path = [through is None] * len(self.nodes)
        if through is not None:
            on_path[through] = True
            for i in range(through + 1, len(self.nodes)):
                on_path[i] = any(on_path[j] for j in self.nodes[i][0])
        total, reached = 0.0, {root for root in roots if root is not None and on_path[root]}
        for i in range(len(self.nodes) - 1, 0, -1):
            if i in reached:
                inputs, cost, weights, again = self.nodes[i]
                wanted = [j for j in inputs if on_path[j]]
                total += cost * len(wanted) + again + (weights if through is None else 0.0)
                reached.update(wanted)
        return total

    def run(self, schedule: Schedule, heads: int | None) -> list[Node]:
        """All that `Executor.run` computes, then the LM head on `heads` rows (None: on those of every read-out)."""
        everything, each = _Frame(self.T, self.T * (self.past + self.T)), schedule.readout == "each"
        x = self.node(self.leaf(self.model.get_input_embeddings()))
        state: State = {"h": x, output_of(plan.EMBED): x} | {
            register: self.node(self.leaf(self.model.undertow[name])) for register, name in self.program.starts
        }
        state = self.steps(self.program.head, state, everything)
        state = self.with_half(state)
        memory = entered = self.node()
        spanned: dict[str, Node] = {}
        readouts, entered_first = [], dict[int, tuple]() if schedule.refresh else None
        for i, frame in enumerate(_frames(schedule, self.T, self.past)):
            frame = replace(frame, memory=memory, carried={}, entered=entered_first if i == 0 else None)
            if frame.refresh:
                assert entered_first is not None, "a refresh comes after the first sweep"
                self.refresh(frame, entered_first)
                continue
            with self.no_grad(not frame.grad):
                rows = self.steps(self.program.span, state, frame)
                for register in self.program.kept:
                    spanned[register] = self.write(spanned.get(register), rows[register], frame)
                memory = self.write(memory, self.leave(rows, frame), frame)
                entered = self.write(entered, frame.memory, frame)
                if each:
                    readouts.append(self.read_out(rows, frame))
        if schedule.adjoint is not None:
            cyclic = isinstance(schedule, Cyclic) and schedule.solve == "cyclic"
            frame, spanned = self.live_pass(schedule.adjoint, cyclic, state, everything)
        else:
            memory = memory if schedule.readout == "newest" else entered
            frame = replace(everything, memory=memory, carried={}, mixed=frame.mixed)
        if not each:
            readouts.append(self.read_out({**state, **spanned}, frame))
        if heads is not None:
            readouts = [(self.node(*(h for h, _ in readouts)), heads)]
        head = weights_of(self.model.get_output_embeddings())
        return [self.multiply(rows, head, h) for h, rows in readouts]

    def refresh(self, frame: _Frame, entered: dict[int, tuple]):
        """What `Executor._refresh` runs: layers up to their keys and values, where the memory enters these."""
        for step in self.program.span + self.program.tail:
            edges = [e for port in ("key", "value") for e in step.edges.get(port, ()) if e.delay == 1]
            if edges:
                x, carried = entered[step.index]
                carried = carried | {edge: self.carried(edge, {}, frame) for edge in edges}
                mix = self.mixing(step, carried, frame)
                self.gates.clear()
                self.keys_and_values(step, self.node(mix("input", x, x)), mix, frame)

    def live_pass(self, k: int, cyclic: bool, state: State, everything: _Frame) -> tuple[_Frame, dict[str, Node]]:
        """The adjoint's pass over all positions, and the k products (or rounds) of its backward."""
        r, before = self.node(LEAF, LEAF), self.forward  # a leaf of its own
        frame = replace(everything, memory=r, carried={})
        rows = self.steps(self.program.span, state, frame)
        memory, spanned = self.leave(rows, frame), {register: rows[register] for register in self.program.kept}
        if memory is None:
            return frame, spanned
        if k and cyclic:  # the rows of every subset once more, then k rounds back through them
            self.products += self.forward - before + k * self.backward([memory, *spanned.values()], r)
        elif k:
            self.products += self.backward(spanned.values(), r) + (k - 1) * self.backward([memory], r)
        after = self.node(memory if k else None, *spanned.values())
        return replace(everything, memory=after, carried={}), dict.fromkeys(spanned, after)

    def write(self, buffer: Node, new: Node, frame: _Frame) -> Node:
        """A buffer with some rows new, or all."""
        return new if frame.whole else self.node(buffer, new)

    def leave(self, state: State, frame: _Frame) -> Node:
        """The memories that are left behind, as one."""
        left = []
        for source, _, carry in self.program.memories:
            m = state[output_of(source)]
            left.append(self.module(carry, frame, m, frame.memory) if carry and frame.mixed else m)
        return self.node(*left)

    def read_out(self, state: State, frame: _Frame) -> tuple[Node, float]:
        """What the LM head reads, and how many rows."""
        h = self.steps(self.program.tail, state, frame)["h"]
        return self.node(h, self.leaf(self.model.view.final_norm)), frame.rows

    def steps(self, steps: tuple[plan.Step, ...], state: State, frame: _Frame) -> dict[str, Node]:
        """The state after these steps."""
        state = dict(state)
        for step in steps:
            with self.no_grad(not step.grad):
                y = self.visit(step, state, frame)
            state.update(dict.fromkeys(step.writes, y))
        return state

    def visit(self, step: plan.Step, state: State, frame: _Frame) -> Node:
        """What one step puts out."""
        edges = [e for mixed in step.edges.values() for e in mixed if frame.mixed or e.delay == 0]
        carried = {edge: self.carried(edge, state, frame) for edge in edges}
        half = state.get(half_of(step), NO_HALF)
        before, mix = self.forward, self.mixing(step, carried, frame, half)
        self.gates.clear()
        x = self.node(*(state[register] for register in (*step.reads, *step.inject)))
        if frame.entered is not None:
            frame.entered[step.index] = (x, carried)
        y = self.block(step, mix("input", x, x), mix, frame)
        y = mix("output", y, y)
        return self.node(y, again=self.forward - before) if self.model.checkpointing else y

    def mixing(self, step: plan.Step, carried: dict[Edge, Node], frame: _Frame, half: Node = NO_HALF) -> Mix:
        """A function that mixes what edges bring into a port."""

        def mix(port: str, x: Node, a: Node) -> Node:
            for number, edge in enumerate(step.edges.get(port, ())):
                if edge not in carried:
                    continue
                if isinstance(self.model.undertow[edge.mixer], HeadGate):
                    x = self.gated(edge.mixer, frame, x, carried[edge], a)
                elif half != NO_HALF and port == "input" and number == 0:
                    made = self.multiply(frame.rows, self.half(edge.mixer), carried[edge])
                    x = self.node(made, half, x, carried[edge], self.leaf(self.model.undertow[edge.mixer]))
                else:
                    x = self.module(edge.mixer, frame, x, carried[edge], a)
            return x

        return mix

    def gated(self, name: str, frame: _Frame, x: Node, m: Node, a: Node) -> Node:
        """`HeadGate`: one reading of `a` serves a block's keys and values."""
        if name not in self.gates or self.gates[name][1] != a:
            self.gates[name] = self.multiply(frame.rows, self.weights[name], a), a
        return self.node(self.gates[name][0], x, m, self.leaf(self.model.undertow[name]))

    def half(self, name: str) -> Weights:
        """The half of a mixer's matrices that reads x, or m."""
        total, trained = self.weights[name]
        return total // 2, trained // 2

    def with_half(self, state: State) -> State:
        """`Executor._steady`: what the span's first mixer makes of x alone, once for all sweeps."""
        step = self.program.span[0] if self.program.span else None
        edges = () if step is None else step.edges.get("input", ())
        inside = step is not None and isinstance(step.block, int) and self.model.view.tap("input") is not None
        if step is None or not edges or inside or self.T == 1 or edges[0].delay == 0:
            return state
        mixer = self.model.undertow[edges[0].mixer]
        if (
            not isinstance(mixer, Mixer)
            or mixer.x_half(mixer.strength.new_empty(0, self.model.view.shape.width)) is None
        ):
            return state
        x = self.node(*(state[register] for register in step.reads))
        return {**state, half_of(step): self.multiply(self.T, self.half(edges[0].mixer), x)}

    def block(self, step: plan.Step, x: Node, mix: Mix, frame: _Frame) -> Node:
        """A layer or an extra block, keys and values written."""
        if step.block == plan.NORM:
            return self.node(x, self.leaf(self.model.view.final_norm))
        block, rows = self.blocks[step.block], frame.rows
        self.evaluations += rows / self.T
        a, q = self.keys_and_values(step, x, mix, frame)
        attended = self.attend(frame.pairs, block.width, q, *self.written[step.slot])
        if block.table is not None:  # as many columns as the keys can reach, or all of them and the last one again
            cost = 2 * block.width * min(frame.pairs + 2 * rows, rows * (block.table.shape[1] + 1))
            self.forward += cost
            attended = self.node(attended, self.node(q, cost=cost, weights=cost * block.table.requires_grad))
        if sum(block.beside):  # a parallel MLP: what follows attention reads nothing else
            return self.node(a, self.multiply(rows, block.after, attended), self.multiply(rows, block.beside, a))
        return self.node(a, self.multiply(rows, block.after, attended, a))

    def keys_and_values(self, step: plan.Step, x: Node, mix: Mix, frame: _Frame) -> tuple[Node, Node]:
        """Write a block's keys and values: `(what its projections read, queries)`."""
        block, rows = self.blocks[step.block], frame.rows
        a = self.node(x, self.leaf(block.module))
        q = self.multiply(rows, block.before, a)
        k, v = (q if weights is None else self.multiply(rows, weights, a) for weights in (block.key, block.value))
        k, v = mix("key", k, a), mix("value", v, a)
        if block.key is None:
            q = k = v = self.node(k, v)  # slices of one output
        if not step.shares:
            old_k, old_v = self.written.get(step.slot, (None, None))
            self.written[step.slot] = self.write(old_k, k, frame), self.write(old_v, v, frame)
        return a, q

    def module(self, name: str, frame: _Frame, *inputs: Node) -> Node:
        """A mixer, projection or carry: its projections read all inputs."""
        made = self.multiply(frame.rows, self.weights[name], *inputs)
        return self.node(made, *inputs, self.leaf(self.model.undertow[name]))

    def carried(self, edge: Edge, state: State, frame: _Frame) -> Node:
        """What an edge brings: the memory projected once a sweep, a state of the same token every time."""
        source = frame.memory if edge.delay else state[output_of(edge.source)]
        modules = self.model.undertow
        unread = frame.zero and edge.delay and not (frame.only and self.grad)
        if unread and silent(modules[edge.mixer], None if edge.project is None else modules[edge.project]):
            return None
        if edge.project is None:
            return source
        key = (edge.memory, edge.project, edge.delay, self.grad)
        if not edge.delay or key not in frame.carried:
            one = replace(frame, rows=self.zero_rows) if frame.zero and edge.delay else frame
            frame.carried[key] = self.module(edge.project, one, source)
        return frame.carried[key]
