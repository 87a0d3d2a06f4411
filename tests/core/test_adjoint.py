"""The gradient of the true recurrence from one live pass, and what autocast must not do to it."""

import pytest
import torch

import undertow as ut
from models import CONFIGS, build, gap, gradient_gap, gradients, ids, randomise
from rounding import assert_same, same
from undertow import reference

T = 20
TIMES = [
    ut.T2MLR(1, 2),
    ut.T2MLR(1, 1, carry="residual", carry_detach=False, carry_weight=0.3),
    ut.LRT(2),
    ut.LRT(1, shared=False),  # targets in the tail too
]


EVERY = [  # time method, and every way in which a memory may be kept or come in
    *TIMES,
    ut.T2MLR(0, -1, carry="skip", carry_detach=False),
    ut.T2MLR(1, 2, mixer="exponential_rotational_gated"),
    ut.LRT(-1, key=False, value=False),
    ut.Coconut(),
]


def weighted(logits):
    w = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (logits * w).sum()


def contracting(time):
    """Random weights, but what comes from the memory is weak: products with the Jacobian shrink."""
    model = build("gpt2", time=time)
    with torch.no_grad():
        for p in model.undertow.parameters():
            p.mul_(0.4)
    return model


@pytest.mark.parametrize("time", EVERY, ids=str)
def test_adjoint_of_all_orders_is_backpropagation_through_time(time):
    model, x = build("gpt2", time=time), ids(2, T)
    true = gradients(model, weighted(reference.recur(model, x)[0]))
    for schedule in (
        ut.Cyclic(8, 3, adjoint=T),
        ut.Jacobi(T, adjoint=T),
        ut.Jacobi(T, adjoint=T, settle=True),
        ut.Converge(adjoint=T),
        ut.Cyclic(8, 3, adjoint=3, solve="cyclic"),
    ):
        out = model(x, schedule=schedule)
        assert gradient_gap(gradients(model, weighted(out.logits)), true) < 1e-8, schedule


@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("time", TIMES, ids=str)
def test_adjoint_k_is_k_plus_one_live_sweeps(time, k):
    model, x = contracting(time), ids(2, T)
    settle = model.program.carries  # a live sweep runs the carry to the end of the text, as the adjoint's pass does
    live = gradients(model, weighted(model(x, schedule=ut.Jacobi(T + k, backward=k, settle=settle)).logits))
    solved = model(x, schedule=ut.Jacobi(T, adjoint=k, settle=True) if settle else ut.Cyclic(8, 3, adjoint=k))
    assert gradient_gap(gradients(model, weighted(solved.logits)), live) < 1e-10
    further = gradients(model, weighted(model(x, schedule=ut.Jacobi(T + k + 2, backward=k + 2, settle=settle)).logits))
    assert gradient_gap(live, further) > 1e-6  # each further sweep counts: the comparison above can fail


def test_adjoint_with_pads_and_documents():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, T)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    positions = torch.stack([(mask[0].cumsum(0) - 1).clamp(min=0), torch.cat([torch.arange(7), torch.arange(T - 7)])])
    memory_mask = torch.arange(T).expand(2, T) % 4 != 1
    arguments = dict(attention_mask=mask, position_ids=positions, memory_mask=memory_mask)
    real = mask.bool()
    true = reference.recur(model, x, **arguments)[0]
    expected = gradients(model, weighted(torch.where(real[..., None], true, 0)))
    out = model(x, schedule=ut.Cyclic(8, 3, adjoint=T), **arguments).logits
    assert gap(out[real], true[real]) < 1e-10
    assert gradient_gap(gradients(model, weighted(torch.where(real[..., None], out, 0))), expected) < 1e-8


def test_no_graph_without_gradient():
    """The sweeps that solve the recurrence are dead, and evaluation without gradient has the same values."""
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, T)
    schedule = ut.Cyclic(4, 2, adjoint=2)
    live = model(x, schedule=schedule)
    with torch.no_grad():
        dead = model(x, schedule=schedule)
    assert same(live.logits, dead.logits) and not dead.logits.requires_grad
    assert live.passes == dead.passes == 4


@pytest.mark.parametrize("depth", [None, ut.TRMBlock(inner=2)], ids=str)
@pytest.mark.parametrize(
    "schedule", [ut.Cyclic(4, 2, adjoint=3), ut.Jacobi(3, backward=1), ut.Cyclic(4, 2, backward=1)], ids=str
)
def test_autocast_keeps_every_gradient(depth, schedule):
    """Weights first used without gradient under autocast must not lose theirs in the live sweeps that follow."""
    torch.manual_seed(0)
    model = randomise(ut.from_scratch(CONFIGS["gpt2"](), depth=depth, time=ut.T2MLR(0, -1))).train()
    x = ids(2, T)
    exact = gradients(model, model(x, labels=x, schedule=schedule).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, labels=x, schedule=schedule).loss
    low = gradients(model, loss)
    for name, g in exact.items():
        cosine = torch.nn.functional.cosine_similarity(g.flatten(), low[name].flatten(), dim=0)
        assert cosine > 0.8 or g.norm() < 1e-6, (name, float(cosine))


@pytest.mark.parametrize("time", TIMES, ids=str)
def test_adjoint_by_cyclic_rounds_is_backpropagation_through_time(time):
    """Exact when rounds times subsets reach T; before that closer than as many products where the memory is strong."""
    model, x = contracting(time), ids(2, T)
    true = gradients(model, weighted(reference.recur(model, x)[0]))

    def error(schedule):
        return gradient_gap(gradients(model, weighted(model(x, schedule=schedule).logits)), true)

    for schedule in (
        ut.Cyclic(8, 3, adjoint=3, solve="cyclic"),
        ut.Cyclic(T, 1, adjoint=1, solve="cyclic"),
        ut.Converge(G=4, adjoint=5, solve="cyclic"),
    ):
        assert error(schedule) < 1e-8, schedule
    if isinstance(time, ut.LRT):
        assert error(ut.Cyclic(8, 3, adjoint=2, solve="cyclic")) < error(ut.Cyclic(8, 3, adjoint=2)) / 3


def test_adjoint_by_cyclic_rounds_with_pads_documents_and_a_mask():
    model, x = contracting(ut.LRT(2)), ids(2, T)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    positions = torch.stack([(mask[0].cumsum(0) - 1).clamp(min=0), torch.cat([torch.arange(7), torch.arange(T - 7)])])
    memory_mask = torch.arange(T).expand(2, T) % 4 != 1
    arguments = dict(attention_mask=mask, position_ids=positions, memory_mask=memory_mask)
    real = mask.bool()[..., None]
    expected = gradients(model, weighted(torch.where(real, reference.recur(model, x, **arguments)[0], 0)))
    out = model(x, schedule=ut.Cyclic(8, 3, adjoint=3, solve="cyclic"), **arguments).logits
    assert gradient_gap(gradients(model, weighted(torch.where(real, out, 0))), expected) < 1e-8


def test_a_model_that_does_not_contract_gets_live_sweeps_or_more_products():
    """Neither an unsolved memory nor products that grow are differentiated silently."""
    model, x = build("gpt2", time=ut.LRT(1, shared=False)), ids(2, T)
    with pytest.warns(UserWarning, match="live sweeps instead"):
        out = model(x, schedule=ut.Cyclic(2, 1, adjoint=2))
    live = model(x, schedule=ut.Cyclic(2, 1))
    assert_same(out.logits, live.logits)
    mine, theirs = (gradients(model, weighted(o.logits)) for o in (out, live))
    assert gradient_gap(mine, theirs) < 1e-12
    true = gradients(model, weighted(reference.recur(model, x)[0]))
    for solve in ("jacobi", "cyclic"):
        out = model(x, schedule=ut.Cyclic(8, 3, adjoint=2, solve=solve))
        if solve == "jacobi":
            with pytest.warns(UserWarning, match="does not contract"):
                found = gradients(model, weighted(out.logits))
        else:
            found = gradients(model, weighted(out.logits))
        assert gradient_gap(found, true) < 0.02, solve
