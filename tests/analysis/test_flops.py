"""Costs by formula against torch's own counter, which runs the real thing, and against closed forms on paper."""

import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import undertow as ut
from models import CONFIGS, LAYERS
from undertow import adjoint
from undertow.analysis.flops import (
    decode_flops,
    forward_flops,
    kv_bytes,
    layer_evaluations,
    prefill_flops,
    training_flops,
)
from undertow.edges import compile_program
from undertow.plan import Loop, Visit

D, VOCAB, T, B = 64, 101, 12, 2


class Untracked:
    """In place of the counter's module tracker, which slows it down and hangs hooks on states without gradient."""

    parents = {"Global"}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def counted(call) -> tuple[int, object]:
    """FLOPs of `call()`, and its result. The math backend: the fused one on the CPU counts as nothing."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Untracked()
    with sdpa_kernel(SDPBackend.MATH), counter:
        result = call()
    return counter.get_total_flops(), result


def make(family="llama", depth=None, time=None):
    """Random weights, float32, wide enough that no part hides within 1 %."""
    config = CONFIGS[family]()
    width = {"hidden_size": D, "intermediate_size": 3 * D // 2, "head_dim": 16}
    for key, value in (width if family != "gpt2" else {"n_embd": D}).items():
        if hasattr(config, key):
            setattr(config, key, value)
    config.vocab_size = VOCAB
    return ut.from_scratch(config, depth=depth, time=time).train()


def ids(rows=B, length=T):
    return torch.randint(3, VOCAB, (rows, length))


@pytest.fixture(autouse=True)
def no_fallback(monkeypatch):
    """Random weights need not contract; what is counted is the schedule itself, not what replaces it then."""
    monkeypatch.setattr(adjoint, "UNSOLVED", float("inf"))
    monkeypatch.setattr(adjoint, "_grew", lambda *rest: False)


def trained(model, schedule, x=None):
    x = ids() if x is None else x
    flops, _ = counted(lambda: model(x, labels=x, schedule=schedule).loss.backward())
    return flops


SEQUENTIAL_LIKE = [ut.Sequential(), ut.Chunked(5)]
JACOBI = [
    ut.Jacobi(0),
    ut.Jacobi(2),
    ut.Jacobi(3, backward=1),
    ut.Jacobi(1, loss="mean", start="unmixed"),
    ut.Jacobi(2, adjoint=2),
    ut.Jacobi(2, settle=True),
]
CYCLIC = [
    ut.Interleaved(3),
    ut.Cyclic(3, 2),
    ut.Cyclic(3, 2, backward=1),
    ut.Cyclic(4, 1, adjoint=0),
    ut.Cyclic(4, 1, adjoint=1),
    ut.Cyclic(4, 1, adjoint=3),
    ut.Cyclic(4, 1, adjoint=2, solve="cyclic"),
    ut.Interleaved(3, refresh=True),
]
TYPICAL = [ut.Interleaved(2), ut.Cyclic(2, 1, adjoint=2)]
DEPTHS = {
    "none": None,
    "reuse": ut.ReuseMap([2, 1, 3, 1]),
    "block": ut.BlockLoop(2, inject=True),
    "middle": ut.MiddleLoop(1, 2, 3, inject=True),
    "trm-b": ut.TRMBlock(inner=2),
    "trm-a": ut.TRMBlock(insert=-1, layers=1, inner=2, outer=3),
}
TIMES = {
    "none": None,
    "t2mlr": ut.T2MLR(1, 2),
    "t2mlr-carry": ut.T2MLR(0, -1, carry="residual"),
    "lrt": ut.LRT(source=2),
    "lrt-layerwise": ut.LRT(shared=False),
}


EVERY = SEQUENTIAL_LIKE + JACOBI + CYCLIC
SCHEDULES = [("t2mlr", schedule) for schedule in EVERY] + [("lrt", schedule) for schedule in EVERY[::3]]
SCHEDULES += [
    pytest.param("lrt", schedule, marks=pytest.mark.slow) for schedule in EVERY if schedule not in EVERY[::3]
]  # which are costed alike, whatever the method


@pytest.mark.parametrize("time, schedule", SCHEDULES, ids=str)
def test_training_under_every_schedule(time, schedule):
    model, length = make(time=TIMES[time]), 5 if schedule == ut.Sequential() else T
    assert training_flops(model, length, schedule, batch=B) == trained(model, schedule, ids(B, length))


ROWS = [("llama", depth, "none") for depth in DEPTHS]
ROWS += [("llama", "none", "t2mlr-carry"), ("llama", "none", "lrt-layerwise")]
ROWS += [("llama", "trm-b", "t2mlr"), ("llama", "reuse", "lrt"), ("llama", "middle", "t2mlr-carry")]
ROWS += [("gpt2", "none", "t2mlr"), ("gpt2", "none", "lrt"), ("gpt_neox", "none", "lrt"), ("qwen3", "none", "t2mlr")]
ROWS += [("undertow_nanochat", depth, time) for depth, time in (("reuse", "t2mlr"), ("trm-a", "lrt"), ("none", "none"))]
ROWS += [("undertow_nanochat", "none", time) for time in ("lrt-layerwise", "t2mlr-carry")]
ROWS += [("gpt_neox", "reuse", "none")]
ALL = [
    pytest.param(family, depth, time, marks=() if (family, depth, time) in ROWS else pytest.mark.slow)
    for family in ("llama", "gpt2", "gpt_neox", "qwen3", "undertow_nanochat")
    for depth in DEPTHS
    for time in TIMES
]


@pytest.mark.parametrize("family, depth, time", ALL)
def test_training(family, depth, time):
    model = make(family, DEPTHS[depth], TIMES[time])
    for schedule in TYPICAL if time != "none" else TYPICAL[:1]:
        assert training_flops(model, T, schedule, batch=B) == trained(model, schedule), schedule


@pytest.mark.parametrize("family, depth, time", ALL)
@torch.no_grad()
def test_forward_prefill_and_decode(family, depth, time):
    model, x, schedule = make(family, DEPTHS[depth], TIMES[time]).eval(), ids(), ut.Cyclic(3, 1)
    assert forward_flops(model, T, schedule, batch=B) == counted(lambda: model(x, schedule=schedule))[0]
    flops, out = counted(lambda: model(x[:1], schedule=schedule, logits_to_keep=1))
    assert prefill_flops(model, T, schedule) == flops
    cache = out.past_key_values
    memory = 0 if cache.memory_BND is None else cache.memory_BND.nbytes
    assert kv_bytes(model, T) == memory + sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    flops, _ = counted(lambda: model(x[:1, :1], past_key_values=cache, logits_to_keep=1))
    assert decode_flops(model, T) == flops


@pytest.mark.parametrize("family", ["llama", "gpt2", "undertow_nanochat"])
def test_refreshing_keys_costs_projections_only(family):
    """A value gate is counted with the queries, which a refresh does not use: below 0.1 %."""
    model = make(family, time=ut.LRT(source=2))
    for S in (1, 2, 3):
        plain, renewed = ut.Interleaved(S), ut.Interleaved(S, refresh=True)
        assert training_flops(model, T, renewed, batch=B) == pytest.approx(trained(model, renewed), rel=1e-3), S
        dearer = training_flops(model, T, renewed) > training_flops(model, T, plain)
        assert dearer == (S > 1)  # with one subset nothing is left to renew
        with torch.no_grad():
            flops, _ = counted(lambda s=renewed: model(ids(), schedule=s))
        assert forward_flops(model, T, renewed, batch=B) == flops, S


@torch.no_grad()
def test_forward_with_and_without_a_loss():
    model, x = make(time=ut.LRT(source=2)), ids()
    for schedule in (ut.Chunked(5), ut.Jacobi(1, loss="mean"), ut.Jacobi(1, adjoint=1), ut.Interleaved(3)):
        assert forward_flops(model, T, schedule, batch=B) == counted(lambda s=schedule: model(x, schedule=s))[0]
        flops, _ = counted(lambda s=schedule: model(x, labels=x, schedule=s))
        assert forward_flops(model, T, schedule, batch=B, labels=True) == flops, schedule


@torch.no_grad()
def test_converge_costs_the_rounds_it_took():
    model, x = make(time=ut.T2MLR(1, 2)).eval(), ids()
    flops, out = counted(lambda: model(x, schedule=ut.Converge(1e-2, G=3)))
    assert forward_flops(model, T, ut.Cyclic(3, round(out.passes) - 1), batch=B) == flops


@torch.no_grad()
def test_generate_is_a_prefill_and_one_decoding_a_token():
    model, x = make(depth=ut.ReuseMap([1, 2, 1, 1])).eval(), ids(1, 7)
    flops, _ = counted(lambda: model.generate(x, max_new_tokens=3, do_sample=False, pad_token_id=1))
    assert prefill_flops(model, 7) + decode_flops(model, 7) + decode_flops(model, 8) == flops


@pytest.mark.parametrize(
    "family, key", [("llama", True), ("llama", False), ("gpt2", False), ("gpt_neox", True), ("gpt_neox", False)]
)
def test_paths_that_start_inside_a_layer(family, key):
    """A gate is taken to need an input gradient even where its input does not depend on the memory: below 0.3 %."""
    model, schedule = make(family, time=ut.LRT(source=2, residual=False, key=key)), ut.Cyclic(2, 1, adjoint=2)
    assert training_flops(model, T, schedule, batch=B) == pytest.approx(trained(model, schedule), rel=3e-3)


CORE = (Visit(1), Visit(2))
PLANS = {
    "cut loop": (Visit(0), Loop(CORE, 3, grad_last=1), Visit(3)),  # layer 0 is never reached by the backward
    "shared slots": (Visit(0), *(Visit(b, slot=f"s{b}") for b in (1, 2, 1, 2)), Visit(3)),  # k, v made in vain
}


@pytest.mark.parametrize("plan, method", [("cut loop", ut.LRT(source=2)), ("shared slots", ut.T2MLR(1, 2))], ids=str)
def test_plans_that_no_method_has(plan, method):
    model = make(time=method)
    edges = tuple(edge for step in model.program.steps for entering in step.edges.values() for edge in entering)
    model.program = compile_program(PLANS[plan], edges, LAYERS)
    for schedule in TYPICAL:
        assert training_flops(model, T, schedule, batch=B) == trained(model, schedule), schedule


def test_frozen_parameters_cost_no_weight_gradient():
    model = make(time=ut.T2MLR(1, 2))
    whole = training_flops(model, T)
    model.backbone.requires_grad_(False)
    for schedule in TYPICAL:
        assert training_flops(model, T, schedule, batch=B) == trained(model, schedule), schedule
    assert training_flops(model, T) < whole


def test_checkpointing_adds_at_most_a_forward_per_backward():
    model, schedule = make(time=ut.T2MLR(1, 2)), ut.Cyclic(2, 1, adjoint=2)
    plain = training_flops(model, T, schedule, batch=B)
    model.gradient_checkpointing_enable()
    formula, flops = training_flops(model, T, schedule, batch=B), trained(model, schedule)
    assert plain < 0.9 * flops < flops <= formula < 1.1 * flops


def test_layer_evaluations_in_closed_form():
    n, L = 2, LAYERS
    model = make(time=ut.T2MLR(1, 2))
    for schedule, passes in (
        (None, 1),
        (ut.Sequential(), 1),
        (ut.Chunked(5), 1),
        (ut.Jacobi(3), 4),
        (ut.Jacobi(3, adjoint=2), 4),
        (ut.Cyclic(4, 3), 4),
        (ut.Cyclic(4, 3, adjoint=2), 5),
    ):
        assert layer_evaluations(model, T, schedule) == pytest.approx(L + (passes - 1) * n), schedule
    # Where every sweep is in the loss, the tail runs with it: all but the layers below the span, twice.
    assert layer_evaluations(model, T, ut.Interleaved(2)) == pytest.approx(1 + 2 * (L - 1))
    assert layer_evaluations(make(depth=ut.ReuseMap([2, 1, 3, 1])), T, ut.Cyclic(8, 3)) == 7
    assert layer_evaluations(make(depth=ut.TRMBlock())) == L + 2 * 2 * (4 + 1)  # spec: L + nl H (Lc + 1), norms not


def test_jacobi_costs_layers_plus_k_spans():
    model, K, one = make(time=ut.T2MLR(1, 2)), 3, ut.Jacobi(0)
    sweep = forward_flops(model, T, ut.Jacobi(1)) - forward_flops(model, T, one)
    assert forward_flops(model, T, ut.Jacobi(K)) == forward_flops(model, T, one) + K * sweep
    layer = (
        2 * T * (2 * D * D + 2 * D * D // 2 + 3 * D * 3 * D // 2) + 4 * T * T * D
    )  # q, o; k, v of half the heads; mlp
    half = 2 * T * 2 * D * D  # of two gates over [x; m]; x's is made once for all sweeps
    assert sweep == 2 * layer + half + 2 * T * D * D  # and the projection of the memory
    zero = 2 * D * D  # of which the first sweep makes one row
    assert forward_flops(model, T, one) == LAYERS * layer + 2 * half + zero + 2 * T * D * VOCAB


def test_the_backward_costs_twice_the_forward():
    """But for the first sweep's memory of zeros, whose projection needs no input gradient."""
    plain, model = make(), make(time=ut.T2MLR(1, 2))
    assert training_flops(plain, T) == 3 * forward_flops(plain, T)
    assert training_flops(model, T, ut.Jacobi(2)) == 3 * forward_flops(model, T, ut.Jacobi(2)) - 2 * D * D


@pytest.mark.parametrize("shared", [True, False])
def test_lrt_overhead(shared):
    """Maps of the memory once a token (shared) or once a layer: 2 D^2 or 2 L D^2 beside 12 L D^2; and the gates.

    The first sweep maps nothing: zeros add nothing. A layer's keys and values share the reading of their gates.
    """
    config = LlamaConfig(
        hidden_size=D, intermediate_size=4 * D, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=VOCAB
    )
    config.bos_token_id = config.eos_token_id = None
    plain, model = ut.from_scratch(config), ut.from_scratch(config, time=ut.LRT(shared=shared))
    first, second = (forward_flops(model, T, ut.Jacobi(K)) - (K + 1) * forward_flops(plain, T) for K in (0, 1))
    maps, gates, head = 2 * D * D * (1 if shared else LAYERS), LAYERS * (D * 2 * 4), 2 * T * D * VOCAB
    assert first == 2 * T * gates
    assert second == 2 * first + 2 * T * maps - head  # one read-out of two sweeps


def test_instant_on_the_meta_device():
    config = LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = ut.from_scratch(config, time=ut.T2MLR(20, -10))
    start = time.perf_counter()
    flops = [training_flops(model, 4096, s) for s in (ut.Sequential(), ut.Cyclic(8, 3, adjoint=4), ut.Interleaved(2))]
    assert time.perf_counter() - start < 5
    assert all(1e15 < f < 1e16 for f in flops)
    assert kv_bytes(model, 4096, torch.bfloat16) == 2 * (80 * 2 * 4096 * 8 * 128 + 8192)


def test_defaults():
    model = make(time=ut.T2MLR(1, 2))  # projects a row of zeros, once for the whole batch
    assert training_flops(model, T) == training_flops(model, T, model.schedule) > training_flops(model, T, batch=3) / 3
    plain = make()
    assert training_flops(plain, T) == training_flops(plain, T, batch=3) / 3
    assert prefill_flops(plain, T) == prefill_flops(plain, T, ut.Sequential())  # one sweep whatever the schedule
    assert kv_bytes(plain, 5, torch.float64) == 2 * kv_bytes(plain, 5)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: forward_flops(m, T), r"Converge.*Cyclic\(G, n\)"),
        (lambda m: prefill_flops(m, T), r"Converge.*Cyclic\(G, n\)"),
        (lambda m: training_flops(m, T, ut.Converge(adjoint=2)), r"Converge.*Cyclic\(G, n\)"),
        (lambda m: training_flops(m, 0), "T=0: must be at least 1"),
        (lambda m: decode_flops(m, -1), "context=-1: must be at least 0"),
    ],
)
def test_what_has_no_cost_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(make(time=ut.T2MLR(1, 2)))
