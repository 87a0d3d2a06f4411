"""Loops over depth: injection, drawn rounds, truncated gradient and other loop counts, against the loop written out."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import matrix
import undertow as ut
from matrix import Case
from models import LAYERS, V, build, gap, gradient_gap, gradients, ids
from rounding import assert_same
from undertow.analysis.flops import training_flops

T = 9
KINDS = [False, True, "concat"]


def written_out(model, x, times=None):
    """Hugging Face's own GPT-2 layers in a Python loop."""
    gpt2, d = model.backbone.transformer, model.depth
    middle = hasattr(d, "start")
    start, end = (d.start, d.end % LAYERS) if middle else (0, LAYERS - 1)
    times = times or d.times
    cut = times - d.grad_last if middle and d.grad_last is not None else 0
    h = gpt2.wte(x) + gpt2.wpe(torch.arange(x.shape[1]))
    for layer in gpt2.h[:start]:
        h = layer(h)
    e = s = h
    for r in range(times):
        with torch.set_grad_enabled(torch.is_grad_enabled() and r >= cut):
            if d.inject == "concat":
                s = torch.cat([s, e], -1) @ model.undertow["inject"].map.weight.T
            elif d.inject and r:
                s = s + e
            for layer in gpt2.h[start : end + 1]:
                s = layer(s)
    for layer in gpt2.h[end + 1 :]:
        s = layer(s)
    return model.backbone.lm_head(gpt2.ln_f(s))


DEPTHS = [
    *(ut.MiddleLoop(1, 2, 3, inject=kind) for kind in KINDS),
    *(ut.MiddleLoop(0, 1, 4, inject=kind, grad_last=2) for kind in KINDS[1:]),
    ut.MiddleLoop(2, -1, 3, inject="concat", grad_last=1),
    ut.MiddleLoop(1, 2, 2, grad_last=2),
    ut.MiddleLoop(1, 2, 3, inject=True, sample=0.5, grad_last=2),
    ut.BlockLoop(2),
    ut.BlockLoop(3, inject=True),
]


@pytest.mark.parametrize("depth", DEPTHS, ids=str)
def test_the_loop_written_out(depth):
    """Outputs and the gradient of every parameter, truncated where it says so."""
    model, x = build("gpt2", depth=depth), ids(2, T)
    w = torch.randn(2, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, mine = model(x).logits, written_out(model, x)
    assert gap(out, mine) < 1e-9
    a = gradients(model, (out * w).sum())
    assert gradient_gap(a, gradients(model, (mine * w).sum())) < 1e-9
    assert all(float(g.norm()) > 0 for g in a.values())  # the prelude too


def test_a_truncated_gradient_is_another_one():
    x, found = ids(2, T), []
    for last in (1, 3, None):
        model = build("gpt2", depth=ut.MiddleLoop(1, 2, 3, inject=True, grad_last=last))
        found.append(gradients(model, model(x, labels=x).loss))
    assert gradient_gap(found[0], found[2]) > 1e-2 and gradient_gap(found[1], found[2]) < 1e-12


@pytest.mark.parametrize("mean, sigma", [(4, 0.5), (2, 0.5), (8, 1.0)])
def test_draws_have_the_mean_and_the_spread_they_should(mean, sigma):
    """E r = times; Var r = E lambda + Var lambda, with lambda log-normal."""
    method = ut.MiddleLoop(1, 2, mean, inject=True, sample=sigma)
    torch.manual_seed(0)
    n = 4000
    drawn = torch.tensor([method.draw() for _ in range(n)], dtype=torch.float64)
    rate = mean - 1
    variance = rate + rate**2 * math.expm1(sigma**2)
    assert abs(float(drawn.mean()) - mean) < 4 * math.sqrt(variance / n) + 0.02 * mean  # the cut of the tail
    assert 0.75 < float(drawn.var()) / variance < 1.15
    assert drawn.min() >= 1 and drawn.max() <= 8 * mean
    torch.manual_seed(5)
    again = [method.draw() for _ in range(20)]
    torch.manual_seed(5)
    assert again == [method.draw() for _ in range(20)]  # torch's own generator
    assert ut.MiddleLoop(1, 2, 3).draw() is None


def test_training_draws_and_evaluation_does_not(monkeypatch):
    model, x = build("gpt2", depth=ut.MiddleLoop(1, 2, 3, inject="concat", sample=0.5)), ids(2, T)
    with torch.no_grad():
        three, five = model(x).logits, model(x, loops=5).logits
        monkeypatch.setattr(ut.MiddleLoop, "draw", lambda self: 5)
        assert_same(model(x).logits, three)
        assert_same(model.train()(x).logits, five)
        assert_same(model(x, loops=3).logits, three)  # a caller's count is nobody's draw


COUNTED = [
    ut.BlockLoop(2),
    ut.BlockLoop(1, inject=True),
    ut.MiddleLoop(1, 2, 2, inject=True),
    ut.MiddleLoop(0, -2, 1, inject="concat"),
    ut.MiddleLoop(1, 2, 2, grad_last=2),
    ut.MiddleLoop(1, 2, 3, inject=True, sample=1.0, grad_last=1),
]


@pytest.mark.parametrize("time", [None, ut.T2MLR(1, 2)], ids=str)
@pytest.mark.parametrize("depth", COUNTED, ids=str)
@torch.no_grad()
def test_another_count_equals_a_model_built_with_it(depth, time):
    model, x = build("gpt2", depth=depth, time=time), ids(2, 6)
    for n in (1, 4):
        other = build("gpt2", depth=depth.looped(n), time=time)
        other.load_state_dict(model.state_dict())
        assert_same(model(x, loops=n).logits, other(x).logits)
        if time is None:
            assert gap(other(x).logits, written_out(model, x, n)) < 1e-9
        mine = model.generate(x, loops=n, max_new_tokens=4, do_sample=False, pad_token_id=1)
        assert torch.equal(mine, other.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=1))
    assert gap(model(x, loops=4).logits, model(x, loops=2).logits) > 1e-6
    out = model(x, loops=4, use_cache=True)
    with pytest.raises(ValueError, match="another loop count"):
        model(x[:, :1], past_key_values=out.past_key_values, loops=3)


def test_concat_starts_as_the_identity():
    """Wrapped or from scratch: at the start a round reads its state alone, and the matrix has gradient."""
    backbone = build("gpt2").backbone
    once = ut.wrap(backbone, depth=ut.MiddleLoop(1, 2, 1, inject="concat"))
    assert_same(once(ids()).logits, backbone(ids()).logits)
    plain = ut.wrap(backbone, depth=ut.MiddleLoop(1, 2, 3))
    looped = ut.wrap(backbone, depth=ut.MiddleLoop(1, 2, 3, inject="concat"))
    assert_same(looped(ids()).logits, plain(ids()).logits)
    looped(ids(), labels=ids()).loss.backward()
    assert looped.undertow["inject"].map.weight.grad.norm() > 0
    assert looped.undertow["inject"].map.bias is None


def test_a_drawn_loop_costs_what_its_mean_costs():
    """Training FLOPs are affine in the number of rounds, so the mean cost is the cost at the mean."""

    def cost(times, **options):
        return training_flops(build("gpt2", depth=ut.MiddleLoop(1, 2, times, inject="concat", **options)), 16)

    assert cost(4) - cost(3) == cost(3) - cost(2) > 0
    assert cost(4, sample=0.5) == cost(4)
    assert cost(6, grad_last=2) - cost(5, grad_last=2) == cost(5, grad_last=2) - cost(4, grad_last=2) > 0
    assert cost(6, grad_last=2) < cost(6)


CASES = [
    Case("gpt2", ut.MiddleLoop(1, 2, 2, inject="concat"), None),
    Case("llama", ut.MiddleLoop(0, 1, 2, inject="concat"), ut.T2MLR(2, 3)),
    Case("gpt2", ut.MiddleLoop(1, 2, 3, inject=True, grad_last=1), ut.LRT(2)),
    Case("gpt2", ut.MiddleLoop(1, 2, 3, inject="concat", sample=0.5, grad_last=2), None),
]


@matrix.every_row(CASES, but=("row_8_saved_equals_loaded",))
def test_matrix(row, case):
    row(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_equals_loaded(case, tmp_path):
    matrix.row_8_saved_equals_loaded(case, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.depth == case.depth


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: ut.MiddleLoop(1, 2, 3, inject="add"), "inject='add'"),
        (lambda: ut.MiddleLoop(1, 2, 3, inject=1), "inject=1"),
        (lambda: ut.BlockLoop(2, inject="concat"), "inject='concat'"),
        (lambda: ut.MiddleLoop(1, 2, 1, sample=0.5), "times=1"),
        (lambda: ut.MiddleLoop(1, 2, 3, sample=-0.5), "sample=-0.5"),
        (lambda: ut.MiddleLoop(1, 2, 3, grad_last=0), "grad_last=0"),
        (lambda: ut.MiddleLoop(1, 2, 3, grad_last=2), "never be trained"),
        (lambda: ut.MiddleLoop(1, 2, 3, grad_last=3, sample=0.5), "never be trained"),
        (lambda: build("gpt2", depth=ut.MiddleLoop(1, 2, 3))(ids(), loops=(2, 1)), "times=(2, 1)"),
        (lambda: build("gpt2", depth=ut.BlockLoop(2))(ids(), loops=0), "times=0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)
