"""Random plans, edges, carries and schedules: what holds for the published methods holds for all of their kind.

The default run draws a few dozen; `make test-all` draws over 2,000.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import undertow as ut
from models import LAYERS, V, build, gap, gradient_gap, gradients, ids
from undertow import reference
from undertow.edges import Edge, compile_program, output_of
from undertow.methods.trm_block import TRMLayer
from undertow.mixers import Add, Blend, Gated, HeadGate, Residual, Scaled, Start, projection
from undertow.plan import EMBED, NORM, Loop, Visit

D, G, T = 32, 4, 7
BLOCKS = ("extra", "minus")
few = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
many = settings(max_examples=550, deadline=None, suppress_health_check=list(HealthCheck))


class Minus(torch.nn.Module):
    """Twice the input minus what is handed beside it."""

    def forward(self, x, view, mask, injected):
        return 2 * x - injected


@st.composite
def plans(draw):
    """Loops and visits over three layers and an extra block, shared slots, registers, rounds without gradient."""

    def visit():
        if draw(st.integers(0, 5)) == 0:  # a block without keys and values, that is handed a second state
            return Visit(
                "minus",
                ("h",),
                draw(st.sampled_from(["h", "z"])),
                "",
                inject=draw(st.sampled_from([("z",), ("h", "z")])),
            )
        block = draw(st.sampled_from([0, 1, 2, "extra"]))
        reads = draw(st.sampled_from([("h",), ("h", "z"), ("z",)]))
        # Slots of layers and of the extra block hold heads of the same shape in this model, so any may be shared.
        slot = draw(st.sampled_from([None, None, None, "shared"]))
        return Visit(block, reads, draw(st.sampled_from(["h", "h", "z"])), slot)

    body = tuple(visit() for _ in range(draw(st.integers(1, 3))))
    times = draw(st.integers(1, 2))
    loop = Loop(body, times, draw(st.sampled_from([None, 1])))
    tail = (Visit(3), Visit(NORM)) if draw(st.booleans()) else (Visit(3),)
    return (Visit(0), loop, *tail) if draw(st.booleans()) else (loop, *tail)


@st.composite
def programs(draw):
    """`(program, modules)`: one to three delay-1 edges, perhaps one of delay 0, with and without carries and norms."""
    plan = draw(plans())
    modules = {
        "extra": TRMLayer(D, G),
        "minus": Minus(),
        "start": Start(D),
        "carry": Residual(0.5, draw(st.booleans()), False),
    }
    plain = compile_program(plan, (), LAYERS, BLOCKS, {"z": "start"})
    blocks = [b for b in dict.fromkeys(step.block for step in plain.steps) if b != NORM]
    edges = []
    for i in range(draw(st.integers(1, 3))):
        source = draw(st.sampled_from([*blocks, EMBED, NORM]))
        target = draw(st.sampled_from(blocks))
        port = draw(st.sampled_from(["input", "output", "key", "value"]))
        discards = any(s.shares for s in plain.steps if s.block == target)
        if port in ("key", "value") and (isinstance(target, str) or discards):
            port = "input"
        kv = port in ("key", "value")
        modules[f"mixer{i}"] = (
            HeadGate(D, G, retrofit=False) if kv else draw(st.sampled_from([Add, Scaled, lambda: Gated(D)]))()
        )
        project = f"project{i}" if kv or draw(st.booleans()) else None
        if project:
            modules[project] = projection(D, D)
        carry = draw(st.sampled_from([None, "carry"]))
        visits = draw(st.sampled_from(["first", "last", "all"]))
        norm = draw(st.sampled_from([None, 1e-6]))
        edges.append(Edge(source, target, f"mixer{i}", port, 1, visits, project, norm, carry))
    if draw(st.booleans()):
        modules["blend"] = Blend(False, start=0.3)
        edges.append(Edge(EMBED, blocks[-1], "blend", "output", 0, "last"))
    return compile_program(plan, tuple(edges), LAYERS, BLOCKS, {"z": "start"}), modules


schedules = st.one_of(
    st.builds(ut.Sequential),
    st.builds(ut.Jacobi, st.integers(0, 3), start=st.sampled_from(["zero", "unmixed"])),
    st.builds(ut.Jacobi, st.integers(0, 3), loss=st.just("mean")),
    st.builds(ut.Jacobi, st.integers(1, 3), backward=st.integers(0, 3), settle=st.booleans()),
    st.builds(ut.Interleaved, st.integers(1, T + 1), refresh=st.booleans()),
    st.builds(ut.Cyclic, st.integers(1, T + 1), st.integers(0, 2), backward=st.sampled_from([None, 0, 1])),
    st.builds(ut.Chunked, st.integers(1, T + 1)),
    st.builds(ut.Converge, st.sampled_from([0.0, 0.1]), st.integers(1, 4)),
)
exact = st.sampled_from([ut.Jacobi(T), ut.Interleaved(T), ut.Cyclic(3, 3), ut.Chunked(1), ut.Converge(0.0, G=4)])


def model_of(drawn):
    """The tiny GPT-2 running a drawn program: exact to float64."""
    program, modules = drawn
    model = build("gpt2")
    model.undertow = torch.nn.ModuleDict(modules).double()
    with torch.no_grad():
        for p in model.undertow.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    model.program = program
    return model


def equals_reference(drawn, schedule):
    """Row 2: outputs and gradients of the literal sweeps."""
    model, x = model_of(drawn), ids(2, T)
    w = torch.randn(2, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.arange(T).expand(2, T) % 3 != 2
    out = model(x, schedule=schedule, memory_mask=mask).logits
    literal = reference.sweep(model, schedule, x, memory_mask=mask)[0]
    assert gap(out, literal) < 1e-9
    assert gradient_gap(gradients(model, (out * w).sum()), gradients(model, (literal * w).sum())) < 1e-8


@torch.no_grad()
def equals_recurrence(drawn, schedule):
    """Rows 2 and 6: the exact limits are the recurrence."""
    model, x = model_of(drawn), ids(2, T)
    assert gap(model(x, schedule=schedule).logits, reference.recur(model, x)[0]) < 1e-9


@torch.no_grad()
def is_exact_so_far(drawn, k, G):
    """Row 6 before the limit: positions 0..k after sweep k, 0..kG-1 after k rounds over G subsets."""
    model, x = model_of(drawn), ids(2, T)
    true = reference.recur(model, x)[1]
    for schedule, exact in ((ut.Jacobi(k), k + 1), (ut.Cyclic(G, k), k * G), (ut.Jacobi(k, start="unmixed"), k)):
        memory = model(x, schedule=schedule).memory
        memory = memory if memory.dim() == 4 else memory[:, :, None]
        assert exact == 0 or gap(memory[:, :exact], true[:, :exact]) < 1e-9, schedule


@torch.no_grad()
def decodes(drawn, sizes):
    """Row 3: any chunking of cached calls equals one forward."""
    model, x = model_of(drawn), ids(2, T)
    cache, parts, start = None, [], 0
    for size in [*sizes, T]:
        part = x[:, start : start + size]
        if part.shape[1]:
            out = model(part, past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, start + size
            parts.append(out.logits)
    assert gap(torch.cat(parts, 1), model(x).logits) < 1e-9


@torch.no_grad()
def is_causal(drawn, schedule, t):
    """Row 5: changing token t changes no logit before t."""
    if isinstance(schedule, ut.Converge):
        schedule = ut.Converge(0.0, G=schedule.G)
    model, x = model_of(drawn), ids(2, T)
    changed = x.clone()
    changed[:, t] = (x[:, t] + 1) % V
    a, b = model(x, schedule=schedule).logits, model(changed, schedule=schedule).logits
    assert t == 0 or gap(a[:, :t], b[:, :t]) < 1e-12


CHECKS = {
    equals_reference: (programs(), schedules),
    equals_recurrence: (programs(), exact),
    is_exact_so_far: (programs(), st.integers(0, 3), st.integers(1, 4)),
    decodes: (programs(), st.lists(st.integers(1, 3), max_size=4)),
    is_causal: (programs(), schedules, st.integers(0, T - 1)),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_few(check):
    few(given(st.tuples(*CHECKS[check]))(lambda drawn: check(*drawn)))()


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
def test_many(check):
    many(given(st.tuples(*CHECKS[check]))(lambda drawn: check(*drawn)))()


def test_programs_drawn_are_not_trivial():
    """The strategy reaches spans, tails with memory, shared slots and several memories."""
    seen = set()

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(programs())
    def look(drawn):
        program = drawn[0]
        seen.add(("span", bool(program.span)))
        seen.add(("memories", len(program.memories) > 1))
        seen.add(("shares", any(s.shares for s in program.steps)))
        seen.add(("tail reads", program.reads_memory(program.tail)))
        seen.add(("dead rounds", any(not s.grad for s in program.steps)))
        seen.add(("outputs", output_of(EMBED) in program.kept or bool(program.kept)))

    look()
    for what in ("span", "memories", "shares", "tail reads", "dead rounds"):
        assert (what, True) in seen and (what, False) in seen, what
