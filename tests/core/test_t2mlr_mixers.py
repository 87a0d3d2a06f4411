"""T2MLR's mixers: every formula of the publication written out, forward and backward, their start and their sizes."""

import math
from functools import partial

import pytest
import torch
from test_mixers import D, inputs, moved, same_with_gradients

from rounding import assert_same
from undertow.methods.t2mlr import MIXERS, Detached, LowRank
from undertow.mixers import Gated, Skip, projection


def sig(z):
    return 1 / (1 + torch.exp(-z))


def N(y):
    return y * (1 / ((y.detach() ** 2).mean(-1, keepdim=True) + 1e-6).sqrt()).clamp(0.2, 5)


def act(z, name):
    if name == "gelu":
        return z * (1 + torch.erf(z / math.sqrt(2))) / 2
    return {"relu": z * (z > 0), "silu": z * sig(z), "tanh": 1 - 2 / (1 + torch.exp(2 * z))}[name]


def affine(net, z, o):
    """Affine maps with the activation between them."""
    for i, layer in enumerate(x for x in net.modules() if isinstance(x, torch.nn.Linear)):
        z = act(z, o.get("activation") or "gelu") if i else z
        z = z @ layer.weight.T + (0 if layer.bias is None else layer.bias)
    return z


def standardised(z, norm, eps=1e-5):
    z = z - z.mean(-1, keepdim=True)
    return z / ((z**2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight + norm.bias


def streams(module, x, m, o):
    """x^ and m^."""
    norm = {
        None: lambda z, norm: z,
        "rmsnorm": lambda z, norm: z / ((z**2).mean(-1, keepdim=True) + 2.0**-23).sqrt() * norm.weight,
        "layernorm": standardised,
    }[o.get("pre_norm")]
    return norm(x, module.norm_x) if module.reads_x else x, module.strength * norm(m, module.norm_m)


def gated(module, x, xh, mh, post, o):
    both = torch.cat([xh, mh], -1)
    g_m = sig(affine(module.gate_m, both.detach() if o.get("detach_m") else both, o))
    rezero = o.get("rezero", True)
    if not o.get("x_branch", True):
        return x + post(torch.tanh(module.scale_m) * g_m * mh) if rezero else post(g_m * mh)
    g_x = sig(affine(module.gate_x, both.detach() if o.get("detach_x") else both, o))
    if o.get("normalize"):
        total = (g_m + g_x).detach().clamp(min=1e-6)
        g_m, g_x = g_m / total, g_x / total
    if not rezero:
        return post(g_m * mh + g_x * xh)
    return x + post(torch.tanh(module.scale_m) * g_m * mh + torch.tanh(module.scale_x) * g_x * xh)


def coupled(module, x, xh, mh, post, o, root=False):
    both = torch.cat([xh, mh], -1)
    w = sig(affine(module.gate, both.detach() if o.get("detach") else both, o)).clamp(1e-4, 1 - 1e-4)
    y = post(w.sqrt() * mh + (1 - w).sqrt() * xh if root else w * mh + (1 - w) * xh)
    return x + torch.tanh(module.scale) * y if o.get("rezero", True) else y


def rotational(module, x, xh, mh, post, o):
    u = torch.cat([xh, mh], -1) if o.get("concat") else xh
    u = u.detach() if o.get("detach") else u
    rho, i = sig(affine(module.gate_rho, u, o)), sig(affine(module.gate_i, u, o))
    A = torch.exp(-8 * torch.log(1 + torch.exp(module.decay_D)) * rho)
    return post(A * xh + (1 - A**2 + 1e-8).sqrt() * (i * mh))


FORMULAS = {
    "gated": gated,
    "alpha_coupled": coupled,
    "var_norm_gated": partial(coupled, root=True),
    "exponential_rotational_gated": rotational,
    # The published code of these takes a post-norm and does not apply it.
    "constant_weight": lambda M, x, xh, mh, post, o: (1 - M.weight.clamp(0, 1)) * xh + M.weight.clamp(0, 1) * mh,
    "concat": lambda M, x, xh, mh, post, o: xh @ M.map.weight[:, :D].T + mh @ M.map.weight[:, D:].T,
    "baseline_coconut": lambda M, x, xh, mh, post, o: mh,
    "baseline_codi": lambda M, x, xh, mh, post, o: standardised(affine(M.net, mh, o), M.norm),
}
OPTIONS = [
    ("gated", {}),
    ("gated", {"layers": 3, "hidden": 5, "activation": "silu", "detach_m": True}),
    ("gated", {"layers": 2, "normalize": True, "detach_x": True}),
    ("gated", {"rezero": False, "normalize": True}),
    ("gated", {"x_branch": False, "vector": True}),
    ("gated", {"x_branch": False, "rezero": False}),
    ("gated", {"vector": True, "gain": 0.0, "init_m": None, "init_x": 0.9}),
    ("alpha_coupled", {}),
    ("alpha_coupled", {"vector": True, "detach": True, "layers": 2, "activation": "tanh"}),
    ("var_norm_gated", {"init": 0.5}),
    ("var_norm_gated", {"rezero": False, "layers": 2, "hidden": 3, "activation": "relu"}),
    ("exponential_rotational_gated", {}),
    ("exponential_rotational_gated", {"concat": True, "detach": True}),
    ("constant_weight", {"weight": 0.3, "learned": True}),
    ("constant_weight", {}),
    ("concat", {}),
    ("baseline_coconut", {}),
    ("baseline_codi", {"bottleneck": 3}),
    ("baseline_codi", {"bottleneck": 12, "activation": "relu"}),
]
AROUND = [{}, {"pre_norm": "rmsnorm"}, {"pre_norm": "layernorm", "post_norm": True}, {"post_norm": True}]
every_mixer = pytest.mark.parametrize("name, options", OPTIONS, ids=str)
every_norm = pytest.mark.parametrize("around", AROUND, ids=str)


@every_mixer
@every_norm
@pytest.mark.parametrize("retrofit", [False, True])
def test_mixer_formula_forward_and_backward(name, options, around, retrofit):
    module, (x, m, a) = moved(MIXERS[name](D, **options, **around, retrofit=retrofit)), inputs()
    module.strength.fill_(0.7)
    post = N if around.get("post_norm") else lambda y: y
    theirs = FORMULAS[name](module, x, *streams(module, x, m, around), post, options)
    if module.opening is not None:
        assert retrofit
        theirs = x + torch.tanh(module.opening) * (theirs - x)
    same_with_gradients(module(x, m, a), theirs, (x, m, *module.parameters()))


@every_mixer
@every_norm
def test_gates_are_what_the_forward_uses(name, options, around):
    module, (x, m, a) = moved(MIXERS[name](D, **options, **around)), inputs()
    xh, mh = streams(module, x, m, around)
    gates = module.gates(x, m)
    if name in ("concat", "baseline_coconut", "baseline_codi"):
        assert gates == {}
        return
    t_m, t_x = (
        torch.tanh(s) if isinstance(s, torch.Tensor) else 1
        for s in (getattr(module, "scale_m", None), getattr(module, "scale_x", None))
    )
    y = t_m * gates["m"] * mh + (t_x * gates["x"] * xh if "x" in gates else 0)
    y = N(y) if around.get("post_norm") and name != "constant_weight" else y
    torch.testing.assert_close(module(x, m, a), module.join(x, y), rtol=0, atol=1e-12)


@every_mixer
@every_norm
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_retrofit_starts_as_the_identity_bit_for_bit(name, options, around, dtype):
    module = MIXERS[name](D, **options, **around, retrofit=True).to(dtype)
    x, m, _ = (2 * z.detach().to(dtype) for z in inputs())
    assert torch.equal(module(x, m, x), x)


@every_mixer
@every_norm
def test_retrofit_is_not_dead(name, options, around):
    """At the start only what closes the mixer has gradient; after two steps everything has."""
    module, (x, m, _) = MIXERS[name](D, **options, **around, retrofit=True).double(), inputs()
    parameters = dict(module.named_parameters())
    for step in range(3):
        loss = (module(x, m, x) * torch.randn_like(x)).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
        alive = {n for n, g in zip(parameters, found, strict=True) if g.any()}
        if step == 0:  # concat is the identity by itself: behind a zero scalar neither would ever move
            assert alive == ({n for n in parameters if n.startswith(("scale", "opening"))} or {"map.weight"})
        with torch.no_grad():
            for p, g in zip(parameters.values(), found, strict=True):
                p.add_(g, alpha=0.1 / max(1e-9, float(g.abs().max())))
    assert alive == set(parameters)


def test_post_norm_of_nothing_is_nothing():
    """At zero gammas N sees exact zeros: still the identity, still finite gradients."""
    module, (x, m, a) = Gated(D, post_norm=True).double(), inputs()
    y = module(x, m, a)
    assert torch.equal(y, x)
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (x, m, module.scale_m)))


@pytest.mark.parametrize("weight, used", [(-0.5, 0.0), (0.3, 0.3), (1.7, 1.0)])
def test_constant_weight_is_clamped_where_it_is_used(weight, used):
    module, (x, m, a) = MIXERS["constant_weight"](D, learned=True).double(), inputs()
    module.weight.data.fill_(weight)
    torch.testing.assert_close(module(x, m, a), (1 - used) * x + used * m)


@pytest.mark.parametrize("name", ["alpha_coupled", "var_norm_gated"])
@pytest.mark.parametrize("bias", [-60.0, 60.0])
def test_saturated_weights_are_clipped_above_half_precision(name, bias):
    """1 - 1e-4 is 1 in bfloat16: the root of 1 - w would have an infinite slope."""
    module = MIXERS[name](D, rezero=False).bfloat16()
    module.gate.bias.data.fill_(bias)
    x, m, a = (z.detach().bfloat16().requires_grad_() for z in inputs())
    least = 1e-4 if name == "alpha_coupled" else 1e-2
    gates = module.gates(x, m)
    closed = gates["m" if bias < 0 else "x"]
    torch.testing.assert_close(closed, torch.full_like(closed, least), rtol=1e-3, atol=0)
    y = module(x, m, a)
    assert y.dtype == torch.bfloat16
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (x, m)))


@every_mixer
def test_autocast_keeps_the_streams_precision(name, options):
    """What enters a layer must have one precision, mixed or not."""
    module, (x, m, a) = MIXERS[name](D, **options), (z.detach().float() for z in inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x, m.bfloat16(), a).dtype == torch.float32


# ---------------------------------------------------------------------- T2MLR: the published start and sizes


def test_gates_start_as_published():
    W = 96
    module = Gated(W, gain=0.5, init_m=0.2, init_x=None)
    for linear in (module.gate_m, module.gate_x):
        assert linear.weight.std().item() == pytest.approx(0.5 * (2 / (3 * W)) ** 0.5, rel=0.03)
    assert torch.sigmoid(module.gate_m.bias).sub(0.2).abs().max() < 1e-6
    assert 0 < module.gate_x.bias.abs().max() <= (2 * W) ** -0.5  # torch's own
    assert module.scale_m.tolist() == module.scale_x.tolist() == [0.0]
    assert Gated(W).gate_m.weight.std().item() == pytest.approx((2 / (3 * W)) ** 0.5, rel=0.03)
    assert not Gated(W, gain=0.0).gate_m.weight.any() and not Gated(W).gate_m.bias.any()
    assert Gated(W, vector=True).scale_m.shape == (W,)
    assert float(torch.sigmoid(Gated(2, init_m=1.0).gate_m.bias[0].detach().double())) == pytest.approx(
        1 - 1e-4, abs=1e-6
    )
    assert torch.sigmoid(MIXERS["var_norm_gated"](W).gate.bias).sub(0.2).abs().max() < 1e-6
    assert MIXERS["alpha_coupled"](W).gate.bias.std() > 0


def test_gate_perceptron_starts_as_published():
    W = 64
    net = Gated(W, layers=3, hidden=48, gain=0.1, init_m=0.9, activation="tanh").gate_m
    assert [type(layer).__name__ for layer in net] == ["Linear", "Tanh", "Linear", "Tanh", "Linear"]
    assert [tuple(layer.weight.shape) for layer in net[::2]] == [(48, 2 * W), (48, 48), (W, 48)]
    for layer in net[::2]:
        assert layer.weight.std().item() == pytest.approx(0.1 * (2 / sum(layer.weight.shape)) ** 0.5, rel=0.06)
    assert torch.sigmoid(net[-1].bias).sub(0.9).abs().max() < 1e-6 and net[0].bias.std() > 0
    assert Gated(W, layers=2).gate_m[0].weight.shape == (W, 2 * W)


def test_other_mixers_start_as_published():
    assert torch.equal(MIXERS["concat"](D).map.weight, torch.cat([torch.eye(D), torch.zeros(D, D)], 1))
    assert MIXERS["constant_weight"](D).weight.tolist() == [0.5]
    module = MIXERS["exponential_rotational_gated"](4096 // 8, concat=True)
    decay = torch.exp(-8 * torch.nn.functional.softplus(module.decay_D.double()))
    assert 0.99 <= decay.min() < 0.9905 and 0.9985 < decay.max() <= 0.999
    assert decay.mean().item() == pytest.approx(0.9945, abs=4e-4)
    for linear in (module.gate_rho, module.gate_i):
        assert linear.weight.abs().max() <= 1024**-0.5
        assert linear.weight.std().item() == pytest.approx((3 * 1024) ** -0.5, rel=0.02)


@pytest.mark.parametrize("bottleneck, layers", [(3, 2), (12, 2), (5, 3)])
def test_low_rank_map_of_the_memory(bottleneck, layers):
    made = LowRank(D, bottleneck=bottleneck, layers=layers, activation="tanh")
    assert made.scale.tolist() == pytest.approx([1e-4])
    for weight in (p for p in made.parameters() if p.ndim == 2):
        small = weight if weight.shape[0] <= weight.shape[1] else weight.T
        torch.testing.assert_close(small @ small.T, torch.eye(len(small)), rtol=0, atol=1e-5)
    module, (_, m, _) = moved(made), inputs()
    theirs = m + module.scale * affine(module.net, m, {"activation": "tanh"})
    same_with_gradients(module(m), theirs, (m, *module.parameters()))


def test_maps_of_the_memory_start_near_the_identity_or_not():
    """The published help text says that the linear map starts as the identity; its code has torch's default start."""
    m = torch.randn(50, 64)
    assert (LowRank(64, bottleneck=16)(m) - m).norm() < 1e-3 * m.norm()
    assert (projection(64, 64)(m) - m).norm() > 0.5 * m.norm()
    assert projection(64, 64).weight.abs().max() <= 1 / 8


SIZES = {  # the publication's counts, d = D
    ("gated", ()): 2 * (2 * D**2 + D) + 2,
    ("gated", (("vector", True),)): 2 * (2 * D**2 + D) + 2 * D,
    ("gated", (("rezero", False),)): 2 * (2 * D**2 + D),
    ("gated", (("x_branch", False),)): 2 * D**2 + D + 1,
    ("gated", (("layers", 2),)): 2 * (2 * D**2 + D + D**2 + D) + 2,
    ("alpha_coupled", ()): 2 * D**2 + D + 1,
    ("var_norm_gated", ()): 2 * D**2 + D + 1,
    ("exponential_rotational_gated", ()): 2 * D**2 + 3 * D,
    ("exponential_rotational_gated", (("concat", True),)): 4 * D**2 + 3 * D,
    ("constant_weight", ()): 0,
    ("constant_weight", (("learned", True),)): 1,
    ("concat", ()): 2 * D**2,
    ("baseline_coconut", ()): 0,
    ("baseline_codi", (("bottleneck", 3),)): 2 * D * 3 + 3 + 3 * D,
}


@pytest.mark.parametrize("name, options", SIZES, ids=str)
def test_parameter_counts_of_the_mixers(name, options):
    def count(**around):
        return sum(p.numel() for p in MIXERS[name](D, **dict(options), **around).parameters())

    size, streams = SIZES[name, options], 1 if name.startswith("baseline") else 2
    assert count() == size and count(post_norm=True) == size
    assert count(pre_norm="rmsnorm") == size + streams * D and count(pre_norm="layernorm") == size + 2 * streams * D


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("retrofit", [False, True])
def test_skip_formula(norm, detach, retrofit):
    module, (x, m, a) = moved(Skip(D, weight=-0.4, norm=norm, detach=detach, retrofit=retrofit)), inputs()
    module.strength.fill_(0.7)
    r = -0.4 * (m.detach() if detach else m)
    y = 0.7 * (N(r) if norm else r)
    y = x + torch.tanh(module.opening) * y if retrofit else x + y
    same_with_gradients(module(x, m, a), y, (x, m, *module.parameters()))
    fresh = Skip(D, norm=norm, retrofit=True).double()
    assert torch.equal(fresh(x, m, a), x)


def test_detached_map_of_the_memory():
    (_, m, _), inner = inputs(), projection(D, D).double()
    y = Detached(inner)(m)
    assert_same(y, inner(m))
    assert not Detached(None)(m).requires_grad
    found = torch.autograd.grad(y.sum(), (m, inner.weight), materialize_grads=True)
    assert not found[0].any() and found[1].any()
