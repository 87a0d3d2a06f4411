"""Plans unroll, edges find their visits, the span is what must be repeated, and what cannot be is refused in a line."""

import pytest
import torch

import undertow as ut
from models import LAYERS, build, gap, ids
from undertow.edges import Edge, compile_program
from undertow.plan import EMBED, Loop, Visit, each_layer_once, unroll


def blocks(plan):
    return [s.block for s in unroll(plan, LAYERS)]


def test_loops_unroll_in_order():
    plan = (Visit(0), Loop((Visit(1), Loop((Visit(2),), 2)), 2), Visit(3))
    assert blocks(plan) == [0, 1, 2, 2, 1, 2, 2, 3]
    assert blocks((Visit(0), Loop((Visit(1),), 0))) == [0]


def test_only_the_last_rounds_carry_gradient():
    plan = (Visit(0), Loop((Visit(1), Loop((Visit(2),), 3, grad_last=2)), 2, grad_last=1))
    assert [s.grad for s in unroll(plan, LAYERS)] == [True] + [False] * 4 + [True, False, True, True]


def test_slots_are_one_a_visit_and_may_be_shared():
    own = unroll((Visit(0), Visit(0)), LAYERS)
    assert own[0].slot != own[1].slot and not own[1].shares
    shared = unroll((Visit(0, slot="a"), Visit(0, slot="a")), LAYERS)
    assert [s.shares for s in shared] == [False, True]


def test_shared_slots_are_shared_in_decoding_too():
    """Training and decoding see the same sharing: cached decoding equals the full forward."""
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, 9)
    plan = (Visit(0, slot="a"), Visit(0, slot="a"), *(Visit(i) for i in range(1, LAYERS)))
    separate = model(x).logits
    model.program = compile_program(plan, (*_edges(model),), LAYERS)
    full = model(x).logits
    assert gap(full, separate) > 1e-3
    out = model(x[:, :4], use_cache=True)
    parts = [out.logits]
    for t in range(4, 9):
        parts.append(model(x[:, t : t + 1], past_key_values=out.past_key_values).logits)
    assert gap(torch.cat(parts, 1), full) < 1e-10
    assert len(out.past_key_values.layers) == LAYERS


def _edges(model):
    return {edge for step in model.program.steps for edges in step.edges.values() for edge in edges}


@pytest.mark.parametrize(
    "source, target, head, span, tail",
    [(2, 1, 1, 2, 1), (3, 0, 0, 4, 0), (1, 1, 1, 1, 2), (1, 3, 2, 0, 2), (EMBED, 2, 0, 0, 4)],
)
def test_span(source, target, head, span, tail):
    program = compile_program(each_layer_once(LAYERS), (Edge(source, target, mixer="m"),), LAYERS)
    assert (len(program.head), len(program.span), len(program.tail)) == (head, span, tail)


def test_targets_after_the_latest_source_lie_in_the_tail():
    edges = tuple(Edge(1, layer, mixer="m", visits="all") for layer in range(LAYERS))
    program = compile_program(each_layer_once(LAYERS), edges, LAYERS)
    assert [len(p) for p in (program.head, program.span, program.tail)] == [0, 2, 2]
    assert program.reads_memory(program.tail)


def test_edges_reach_the_visits_they_name():
    plan = (Loop((Visit(0), Visit(1)), 3),)
    for visits, expected in (("first", [0]), ("later", [2, 4]), ("last", [4]), ("all", [0, 2, 4])):
        program = compile_program(plan, (Edge(1, 0, mixer="m", visits=visits),), LAYERS)
        assert [s.index for s in program.steps if s.edges] == expected
    assert program.steps[-1].writes == ("h", "@1")


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: unroll((Visit(4),), LAYERS), "layers are 0..3"),
        (lambda: unroll((Visit("x"),), LAYERS), "no such block"),
        (lambda: unroll((), LAYERS), "empty"),
        (lambda: unroll((Visit(0, reads=("z",)),), LAYERS), "register 'z' before it is written"),
        (lambda: unroll((Visit(0, slot="s", read_only=True),), LAYERS), "slot 's' before it is written"),
        (lambda: Loop((Visit(0),), -1), "times=-1"),
        (lambda: Edge(0, 1, mixer="m", port="query"), "port='query'"),
        (lambda: Edge(0, 1, mixer="m", delay=2), "delay=2"),
        (lambda: Edge(0, 1, mixer="m", delay=0, carry="c"), "carry='c'"),
        (lambda: compile_program(each_layer_once(4), (Edge(9, 1, mixer="m"),), 4), "source 9"),
        (lambda: compile_program(each_layer_once(4), (Edge(1, 9, mixer="m"),), 4), "target 9"),
        (lambda: compile_program(each_layer_once(4), (Edge(3, 1, mixer="m", delay=0),), 4), "comes later"),
        (
            lambda: compile_program((Visit(0, slot="a"), Visit(1, slot="a")), (Edge(0, 1, mixer="m", port="key"),), 4),
            "discards its keys",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)
