"""Gains that are counts, held as counts: operators launched, bytes kept for the backward, layers and products run.

Nothing here is timed. What a number means is in docs/schedules.md; a count that falls is an improvement, and the test
that holds it then says so.
"""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

import undertow as ut
from models import CONFIGS, LAYERS, ids
from undertow.analysis.counts import launches, saved_bytes
from undertow.versions import CACHE

T = 24
TIMES = {"t2mlr": ut.T2MLR(1, 2), "lrt": ut.LRT(), "lrt-layerwise": ut.LRT(shared=False)}
PRODUCTS = ("mm", "addmm", "bmm")
SDPA = "_scaled_dot_product_flash_attention_for_cpu"


def make(time=None, family="llama", **config):
    """Fresh weights, and embeddings beside which a memory is small, so that no adjoint falls back on live sweeps."""
    torch.manual_seed(0)
    sizes = CONFIGS[family]()
    for name, value in config.items():
        setattr(sizes, name, value)
    model = ut.from_scratch(sizes, time=time).train()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)
    return model


def kept(model, schedule, x=None):
    x = ids(2, T) if x is None else x
    return saved_bytes(lambda: model(x, labels=x, schedule=schedule), model)


def forward(model, schedule, **arguments):
    return launches(lambda: model(ids(2, T), schedule=schedule, **arguments))


def backward(model, schedule):
    model.zero_grad()  # a second gradient is added to the first
    x = ids(2, T)
    loss = model(x, labels=x, schedule=schedule).loss
    return launches(loss.backward)


def products(found):
    return sum(found[name] for name in PRODUCTS)


# ---------------------------------------------------------------------- dead sweeps, and the adjoint


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_dead_sweeps_keep_nothing(time):
    """To the byte: whatever runs before the one live sweep leaves no tensor for the backward, and no operator in it."""
    model, one = make(time), ut.Jacobi(1, backward=0)
    for dead in (ut.Jacobi(2, backward=0), ut.Jacobi(6, backward=0)):
        assert kept(model, dead) == kept(model, one)
        assert backward(model, dead) == backward(model, one)


@pytest.mark.filterwarnings("error")  # a fallback would be another schedule
@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_an_adjoint_keeps_one_sweep(time):
    model, x, one = make(time), ids(2, T), kept(make(time), ut.Jacobi(1, backward=0))
    for schedule in (ut.Cyclic(4, 3, adjoint=4), ut.Jacobi(4, adjoint=2), ut.Converge(1e-2, G=4, adjoint=2)):
        assert kept(model, schedule) == one, schedule
        with_backward = saved_bytes(lambda s=schedule: model(x, labels=x, schedule=s).loss.backward(), model)
        assert with_backward == one, schedule  # its products are not themselves differentiated


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_live_sweeps_keep_what_they_run(time):
    """Bytes grow by one sweep's a live sweep: the reason for the adjoint. (The span is half the layers, or all.)"""
    model = make(time)
    bytes_ = [kept(model, ut.Jacobi(K)) for K in range(4)]
    assert bytes_[3] - bytes_[2] == bytes_[2] - bytes_[1]
    assert bytes_[2] - bytes_[1] > 0.4 * bytes_[0]


def test_an_adjoint_product_makes_no_weight_gradient():
    """Each more is as many products as the live pass's backward to its memory alone, no more than the forward ran."""
    model = make(ut.T2MLR(1, 2))
    counts = [products(backward(model, ut.Jacobi(6, adjoint=k))) for k in (1, 2, 3)]
    spans = products(forward(model, ut.Jacobi(6))) - products(forward(model, ut.Jacobi(5)))
    assert counts[1] - counts[0] == counts[2] - counts[1] == spans


# ---------------------------------------------------------------------- one sweep


@pytest.mark.parametrize("time, span", [(ut.T2MLR(1, 2), 2), (ut.LRT(), LAYERS)], ids=["t2mlr", "lrt"])
def test_a_sweep_attends_in_its_span_alone(time, span):
    model = make(time)
    for schedule, sweeps in (
        (ut.Jacobi(0), 1),
        (ut.Jacobi(3), 4),
        (ut.Cyclic(4, 2), 9),
        (ut.Cyclic(4, 2, adjoint=0), 10),
    ):
        assert forward(model, schedule)[SDPA] == LAYERS - span + sweeps * span


@pytest.mark.parametrize("shared", [True, False])
def test_lrt_projects_its_memory_once_a_sweep(shared):
    """Shared maps: two products a sweep, whatever the depth; a layer's own: two for each."""
    model = make(ut.LRT(shared=shared))
    sweep = products(forward(model, ut.Jacobi(2))) - products(forward(model, ut.Jacobi(1)))
    layer, gates = 7, 1  # q, k, v, o and the MLP's three; one pair of gates for keys and values
    assert sweep == LAYERS * (layer + gates) + (2 if shared else 2 * LAYERS)


def test_a_pass_over_all_positions_needs_no_mask():
    """The attention's own causal path: no mask is made, in none of these sweeps."""
    for model, schedule in (
        (make(), ut.Jacobi(0)),
        (make(ut.T2MLR(1, 2)), ut.Jacobi(3)),
        (make(ut.LRT()), ut.Jacobi(2)),
    ):
        seen = []
        for layer in model.view.layers:
            layer.register_forward_pre_hook(
                lambda m, a, k, seen=seen: seen.append(k["attention_mask"]), with_kwargs=True
            )
        found = forward(model, schedule)
        assert seen and all(mask is None for mask in seen)
        assert found["le"] == found["where"] == 0


def test_a_mask_is_made_once_for_all_subsets():
    """However many rounds and layers read it."""
    model = make(ut.T2MLR(1, 2))
    assert [forward(model, ut.Cyclic(4, n))["ge"] for n in (1, 2, 5)] == [1, 1, 1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("time", [TIMES["t2mlr"], TIMES["lrt"]], ids=["t2mlr", "lrt"])
def test_a_round_launches_the_same_every_time(time):
    """Masks are made in the first round; each one after it launches exactly what the last did."""
    model = make(time)
    rounds = [forward(model, ut.Cyclic(2, n)).total() for n in (2, 3, 4)]
    assert rounds[2] - rounds[1] == rounds[1] - rounds[0]


@pytest.mark.parametrize(
    "time, sweep",
    [(ut.T2MLR(1, 2), 2 * 41 + 15), (ut.LRT(), LAYERS * 48 + 8), (ut.LRT(shared=False), LAYERS * 49 + 10)],
    ids=TIMES,
)
def test_launches_of_a_subset_sweep(time, sweep):
    """At most this many in float32 Llama: its layers, what a subset takes and puts back, its mixers and the rest."""
    model = make(time)
    assert (forward(model, ut.Cyclic(2, 3)).total() - forward(model, ut.Cyclic(2, 2)).total()) / 2 <= sweep


# ---------------------------------------------------------------------- plain models, and decoding


def step(model, cache):
    return launches(lambda: model(input_ids=ids(2, 1), **{CACHE: cache}, use_cache=True))


def decoding(model):
    """Operators of one token after T cached ones."""
    with torch.no_grad():
        cache = model.eval()(ids(2, T), use_cache=True)[CACHE]
        return step(model, cache)


def plain():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()


@torch.no_grad()
def test_no_recurrence_costs_no_launch():
    """A backbone run by our executor launches what Hugging Face's own forward does, or less."""
    theirs, ours = plain(), make().eval()
    assert forward(ours, ut.Jacobi(0)).total() <= launches(lambda: theirs(ids(2, T), use_cache=False)).total()
    assert decoding(ours).total() <= step(theirs, theirs(ids(2, T), **{CACHE: DynamicCache()})[CACHE]).total()


@pytest.mark.parametrize(
    "time, more, matrices",
    [
        (ut.T2MLR(1, 2), 17, 3),
        (ut.LRT(), 2 + 10 * LAYERS, 2 + LAYERS),
        (ut.LRT(shared=False), 12 * LAYERS, 3 * LAYERS),
    ],
    ids=TIMES,
)
def test_what_a_recurrence_adds_to_a_decoded_token(time, more, matrices):
    """Launches at most; products exactly: the map and two gates, or maps once (or once a layer) and a layer's gates."""
    base, found = decoding(make()), decoding(make(time))
    assert found.total() - base.total() <= more
    assert products(found) - products(base) == matrices
    assert found[SDPA] == base[SDPA] == LAYERS


@torch.no_grad()
def test_a_decoded_token_runs_every_layer_once():
    model = make(ut.LRT()).eval()
    cache = model(ids(2, T), use_cache=True)[CACHE]
    calls = []
    for layer in model.view.layers:
        layer.register_forward_hook(lambda *a: calls.append(1))
    step(model, cache)
    assert len(calls) == LAYERS


# ---------------------------------------------------------------------- still to gain: each fails once it is gained


def test_a_memory_of_zeros_is_not_projected():
    model, calls = make(ut.LRT(shared=False)), []
    for module in model.undertow.values():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, a, y: calls.append(a[0].shape[:2].numel()))
    forward(model, ut.Jacobi(0))
    assert calls == [1] * 2 * LAYERS  # a row each: in training the only sweep reaches every parameter
    calls.clear()
    forward(model, ut.Jacobi(1))
    assert calls == [2 * T] * 2 * LAYERS  # of the second sweep; the first needs none


def test_a_layers_gates_are_made_once():
    model, calls = make(ut.LRT()), []
    for module in model.undertow.values():
        if hasattr(module, "gate"):
            module.gate.register_forward_hook(lambda *a: calls.append(1))
    forward(model, ut.Jacobi(0))
    assert len(calls) == LAYERS


@pytest.mark.xfail(strict=True, reason="sweeps begin at position 0 although the first are exact")
def test_exact_positions_are_not_computed_again():
    model, rows = make(ut.T2MLR(1, 2)), []
    model.view.layers[1].register_forward_pre_hook(lambda m, a: rows.append(a[0].shape[1]))
    forward(model, ut.Jacobi(4, backward=0))
    assert sum(rows[:-1]) < (len(rows) - 1) * T  # of the dead ones: live ones carry the gradient of every position


def test_masks_are_converted_once():
    model = make(ut.LRT())
    assert forward(model, ut.Cyclic(4, 3))["where"] <= 4 + forward(model, ut.Jacobi(0))["where"]


def test_logits_of_sweeps_are_not_copied_together():
    model = make(ut.LRT(), vocab_size=97)
    x, copies = ids(2, T), []
    scatter = torch.slice_scatter

    def counted(buffer, *arguments):
        copies.append(buffer.shape[-1] == 97)
        return scatter(buffer, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "slice_scatter", counted)
        model(x, labels=x, schedule=ut.Interleaved(2))
    assert copies and not any(copies)
