"""What a model costs: FLOPs of training, prefill and decoding, layer evaluations, bytes of the cache. All by formula.

A FLOP count here is that of the matrix products a call executes, `2 m n k` each and nothing else: what torch's
`FlopCounterMode` counts under the math attention backend. Attention is counted dense, over all keys that a sweep's
queries are given, masked or not: the whole buffer for strided subsets, up to the block's end for contiguous blocks,
past and present in cached calls. A kernel that skips masked keys saves up to half of that part. CoPE's product of
queries and table is attention's; FIRE's MLP, which sees every distance once a call, is left out.

The walk below repeats the executor's without tensors: it adds up the forward products and, where there is gradient,
notes them in the graph that autograd would build, so that a backward costs exactly what it reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from undertow import plan
from undertow.backbone.positions import Cope
from undertow.edges import Edge, output_of
from undertow.model import UndertowForCausalLM
from undertow.schedules import Converge, Jacobi, Schedule, Sequential

ROUNDS = 3  # in which Converge is taken to converge where a cost must be stated: what it takes depends on the data

__all__ = ["decode_flops", "forward_flops", "kv_bytes", "layer_evaluations", "prefill_flops", "training_flops"]


def layer_evaluations(model: UndertowForCausalLM, T: int = 1, schedule: Schedule | None = None) -> float:
    """Blocks (layers and extra blocks, not norms) that one forward runs per token; a sweep counts by its positions.

    `schedule=None` counts every visit once: the cost of a token in decoding. Others and errors as `forward_flops`.
    """
    return _Walk(model, T, schedule or Sequential()).evaluations


def forward_flops(
    model: UndertowForCausalLM, T: int, schedule: Schedule | None = None, batch: int = 1, labels: bool = False
) -> float:
    """FLOPs of `model(input_ids_BT)` without gradient.

    Args:
        T: tokens a row; `batch`: rows.
        schedule: None is evaluation's, `Converge()`, which has a cost only on models without a delay-1 edge, where
            all schedules are one sweep. On others give `Cyclic(G, n)`: n is `out.passes` less one.
        labels: a loss is asked for, so the LM head runs on every read-out and not on the merged states.

    Raises:
        ValueError: T below 1, or a schedule whose cost depends on the data.
    """
    return batch * _Walk(model, T, schedule or Converge(), heads=None if labels else T).forward


def training_flops(model: UndertowForCausalLM, T: int, schedule: Schedule | None = None, batch: int = 1) -> float:
    """FLOPs of `model(input_ids_BT, labels=...).loss.backward()`, without the optimiser's step.

    Parameters that need no gradient cost none, nor do sweeps and rounds without gradient. Gradient checkpointing adds
    the forward of a visit to every backward through it (an upper bound: torch stops a recomputation early).
    `schedule=None` is the model's own for training; others and errors as `forward_flops`.
    """
    walk = _Walk(model, T, schedule or model.schedule, grad=True)
    return batch * (walk.forward + walk.products + walk.backward(walk.losses))


def prefill_flops(model: UndertowForCausalLM, T: int, schedule: Schedule | None = None) -> float:
    """FLOPs of a generation's first call: a forward of T tokens, logits for the last. Rest as `forward_flops`."""
    return _Walk(model, T, schedule or Converge(), heads=1).forward


def decode_flops(model: UndertowForCausalLM, context: int) -> float:
    """FLOPs of one new token after `context` cached ones. Raises ValueError for a context below 0."""
    return _Walk(model, 1, Sequential(), heads=1, past=context).forward


def kv_bytes(model: UndertowForCausalLM, context: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of keys, values and memory in the cache of one sequence of `context` tokens (`dtype=None`: the model's)."""
    owners = {step.slot: step.block for step in reversed(model.program.steps)}
    numbers = 2 * context * sum(_block(model, owners[slot]).kv_width for slot in model.program.slots)
    return (numbers + len(model.program.memories) * model.view.shape.width) * (dtype or model.dtype).itemsize


# ---------------------------------------------------------------------- the weights a visit multiplies by

Weights = tuple[int, int]  # numbers in the matrices of some projections, and how many of them are trained


def _projections(module: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _weights(*modules: nn.Module) -> Weights:
    matrices = [p.weight for module in modules for p in _projections(module).values()]
    return sum(w.numel() for w in matrices), sum(w.numel() for w in matrices if w.requires_grad)


@dataclass(frozen=True)
class _Block:
    """Projections before attention (keys' and values' apart, None where fused) and after it; widths of all heads.

    `table`: what attention multiplies its queries by beside the keys (CoPE; None elsewhere).
    """

    module: nn.Module
    before: Weights
    key: Weights | None
    value: Weights | None
    after: Weights
    width: int
    kv_width: int
    table: nn.Parameter | None = None


def _block(model: UndertowForCausalLM, name: plan.Block) -> _Block:
    """A layer is cut at its key and value projections; what follows is taken to read the attention's output.

    An extra block is taken to attend with the backbone's width.
    """
    shape, family = model.view.shape, model.view.family
    if isinstance(name, str):
        block = model.undertow[name]
        return _Block(block, _weights(block), None, None, (0, 0), shape.width, shape.width)
    layer, width = model.view.layers[name], shape.heads * shape.head_width
    found, taps = _projections(layer), (family.key, family.value)
    key, value = ([n for n in found if f"{n}.".startswith(f"{tap.module}.")] for tap in taps)  # adapters nest below
    names = list(found)
    end = 1 + max(names.index(n) for n in (*key, *value))  # projections are declared in the order of their use
    before, after = names[:end], _weights(*(found[n] for n in names[end:]))
    if family.key.parts > 1:
        return _Block(layer, _weights(*(found[n] for n in before)), None, None, after, width, shape.kv_width)
    query, k, v = (_weights(*(found[n] for n in part)) for part in ({*before} - {*key, *value}, key, value))
    table = next((m.table_EP for m in layer.modules() if isinstance(m, Cope)), None)
    return _Block(layer, query, k, v, after, width, shape.kv_width, table)


# ---------------------------------------------------------------------- the executor's walk, without tensors

Node = int | None  # a tensor: its number in the graph, or None if it has no gradient
State = Mapping[str, Node]
LEAF = 0  # every trained parameter


@dataclass(frozen=True)
class _Frame:
    """One sweep, or several: its rows, its pairs of query and key, whether it covers all positions, what it reads."""

    rows: int
    pairs: int
    whole: bool = True
    grad: bool = True
    memory: Node = None
    carried: dict[tuple, Node] = field(default_factory=dict)  # projections of the memory made so far


def _frames(schedule: Schedule, T: int, past: int) -> list[_Frame]:
    """The sweeps of a schedule. In a series of one kind, all from the second on are one frame: what the second reads
    has gradient if it ever has, so they differ in rows and keys only, and cost follows these linearly."""
    frames: list[_Frame] = []
    for sweep in schedule.sweeps(T):
        if sweep.measure:
            raise ValueError(f"{schedule} costs what the data need: give a number of rounds, Cyclic(G, n)")
        positions, rows = sweep.positions, len(sweep.positions)
        keys = past + (positions.stop if positions.step == 1 else T)
        frame = _Frame(rows, rows * keys, positions == range(T), sweep.grad and schedule.adjoint is None)
        if [(f.whole, f.grad) for f in frames[-2:]] == 2 * [(frame.whole, frame.grad)]:
            last = frames.pop()
            frame = replace(frame, rows=last.rows + rows, pairs=last.pairs + frame.pairs)
        frames.append(frame)
    return frames


class _Walk:
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
    ):
        for name, value, least in (("T", T, 1), ("context", past, 0)):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.model, self.program, self.T, self.past, self.grad = model, model.program, T, past, grad
        self.forward = self.products = self.evaluations = 0.0
        self.nodes: list[tuple[tuple[int, ...], float, float, float]] = [((), 0.0, 0.0, 0.0)]
        self.written: dict[str, tuple[Node, Node]] = {}
        self.leaves: dict[nn.Module, Node] = {}
        self.blocks = {step.block: _block(model, step.block) for step in self.program.steps if step.block != plan.NORM}
        self.weights = {name: _weights(m) for name, m in model.undertow.items()}
        self.losses = self.run(schedule if self.program.memories else Jacobi(0), heads)

    @contextmanager
    def no_grad(self, really: bool):
        before, self.grad = self.grad, self.grad and not really
        yield
        self.grad = before

    def leaf(self, module: nn.Module) -> Node:
        if module not in self.leaves:
            self.leaves[module] = LEAF if any(p.requires_grad for p in module.parameters()) else None
        return self.leaves[module]

    def node(self, *inputs: Node, cost: float = 0.0, weights: float = 0.0, again: float = 0.0) -> Node:
        live = tuple(i for i in inputs if i is not None)
        if not self.grad or not (live or weights):
            return None
        if len(live) == 1 and not (cost or weights or again):
            return live[0]
        self.nodes.append((live, cost, weights, again))
        return len(self.nodes) - 1

    def multiply(self, rows: int, weights: Weights, *inputs: Node) -> Node:
        """Projections of what the inputs make together."""
        total, trained = weights
        self.forward += 2 * rows * total
        return self.node(self.node(*inputs), cost=2 * rows * total, weights=2 * rows * trained)

    def attend(self, pairs: int, width: int, q: Node, k: Node, v: Node) -> Node:
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
        memory = entered = self.node()
        spanned: dict[str, Node] = {}
        readouts = []
        for frame in _frames(schedule, self.T, self.past):
            frame = replace(frame, memory=memory, carried={})
            with self.no_grad(not frame.grad):
                rows = self.steps(self.program.span, state, frame)
                for register in self.program.kept:
                    spanned[register] = self.write(spanned.get(register), rows[register], frame)
                memory = self.write(memory, self.leave(rows, frame), frame)
                entered = self.write(entered, frame.memory, frame)
                if each:
                    readouts.append(self.read_out(rows, frame))
        if schedule.adjoint is not None:
            frame, spanned = self.live_pass(schedule.adjoint, state, everything)
        else:
            frame = replace(everything, memory=memory if schedule.readout == "newest" else entered, carried={})
        if not each:
            readouts.append(self.read_out({**state, **spanned}, frame))
        if heads is not None:
            readouts = [(self.node(*(h for h, _ in readouts)), heads)]
        head = _weights(self.model.get_output_embeddings())
        return [self.multiply(rows, head, h) for h, rows in readouts]

    def live_pass(self, k: int, state: State, everything: _Frame) -> tuple[_Frame, dict[str, Node]]:
        """The adjoint's pass over all positions, and the k products of its backward."""
        r = self.node(LEAF, LEAF)  # a leaf of its own
        frame = replace(everything, memory=r, carried={})
        rows = self.steps(self.program.span, state, frame)
        memory, spanned = self.leave(rows, frame), {register: rows[register] for register in self.program.kept}
        if memory is None:
            return frame, spanned
        if k:
            self.products += self.backward(spanned.values(), r) + (k - 1) * self.backward([memory], r)
        after = self.node(memory if k else None, *spanned.values())
        return replace(everything, memory=after, carried={}), dict.fromkeys(spanned, after)

    def write(self, buffer: Node, new: Node, frame: _Frame) -> Node:
        return new if frame.whole else self.node(buffer, new)

    def leave(self, state: State, frame: _Frame) -> Node:
        left = []
        for source, _, carry in self.program.memories:
            m = state[output_of(source)]
            left.append(self.module(carry, frame, m, frame.memory) if carry else m)
        return self.node(*left)

    def read_out(self, state: State, frame: _Frame) -> tuple[Node, int]:
        h = self.steps(self.program.tail, state, frame)["h"]
        return self.node(h, self.leaf(self.model.view.final_norm)), frame.rows

    def steps(self, steps: tuple[plan.Step, ...], state: State, frame: _Frame) -> dict[str, Node]:
        state = dict(state)
        for step in steps:
            with self.no_grad(not step.grad):
                y = self.visit(step, state, frame)
            state.update(dict.fromkeys(step.writes, y))
        return state

    def visit(self, step: plan.Step, state: State, frame: _Frame) -> Node:
        carried = {edge: self.carried(edge, state, frame) for edges in step.edges.values() for edge in edges}
        before = self.forward

        def mix(port: str, x: Node, a: Node) -> Node:
            for edge in step.edges.get(port, ()):
                x = self.module(edge.mixer, frame, x, carried[edge], a)
            return x

        x = self.node(*(state[register] for register in step.reads))
        y = self.block(step, mix("input", x, x), mix, frame)
        y = mix("output", y, y)
        return self.node(y, again=self.forward - before) if self.model.checkpointing else y

    def block(self, step: plan.Step, x: Node, mix: Callable[[str, Node, Node], Node], frame: _Frame) -> Node:
        if step.block == plan.NORM:
            return self.node(x, self.leaf(self.model.view.final_norm))
        block, rows = self.blocks[step.block], frame.rows
        self.evaluations += rows / self.T
        a = self.node(x, self.leaf(block.module))
        q = self.multiply(rows, block.before, a)
        k, v = (q if weights is None else self.multiply(rows, weights, a) for weights in (block.key, block.value))
        k, v = mix("key", k, a), mix("value", v, a)
        if block.key is None:
            q = k = v = self.node(k, v)  # slices of one output
        if not step.shares:
            old_k, old_v = self.written.get(step.slot, (None, None))
            self.written[step.slot] = self.write(old_k, k, frame), self.write(old_v, v, frame)
        attended = self.attend(frame.pairs, block.width, q, *self.written[step.slot])
        if block.table is not None:  # as many columns as the keys can reach, or all of them and the last one again
            cost = 2 * block.width * min(frame.pairs + 2 * rows, rows * (block.table.shape[1] + 1))
            self.forward += cost
            attended = self.node(attended, self.node(q, cost=cost, weights=cost * block.table.requires_grad))
        return self.node(a, self.multiply(rows, block.after, attended, a))

    def module(self, name: str, frame: _Frame, *inputs: Node) -> Node:
        """A mixer, projection or carry: its projections read all inputs."""
        made = self.multiply(frame.rows, self.weights[name], *inputs)
        return self.node(made, *inputs, self.leaf(self.model.undertow[name]))

    def carried(self, edge: Edge, state: State, frame: _Frame) -> Node:
        """What an edge brings: the memory projected once a sweep, a state of the same token every time."""
        source = frame.memory if edge.delay else state[output_of(edge.source)]
        if edge.project is None:
            return source
        key = (edge.memory, edge.project, edge.delay, self.grad)
        if not edge.delay or key not in frame.carried:
            frame.carried[key] = self.module(edge.project, frame, source)
        return frame.carried[key]
