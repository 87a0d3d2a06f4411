"""Each mixer against its formula written out, its start, and the parameter counts the publications give."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

import undertow as ut
from models import CONFIGS, build
from undertow.mixers import Add, Blend, Gated, HeadGate, Residual, Scaled, projection

B, S, D, G = 2, 5, 8, 2


def inputs(width=D):
    x, m = (torch.randn(B, S, width, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return x, m, torch.randn(B, S, D, dtype=torch.float64)


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    return module.double()


def same_with_gradients(mine, theirs, inputs):
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    w = torch.randn_like(mine)
    found = (torch.autograd.grad((y * w).sum(), inputs, materialize_grads=True) for y in (mine, theirs))
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-11)


def by_hand(module, x, m, a):
    """The formulas of the publications, element by element."""
    if isinstance(module, HeadGate):
        gates = 2 / (1 + torch.exp(-a @ module.gate.weight.T))
        heads = []
        for g in range(G):
            part = slice(g * D // G, (g + 1) * D // G)
            heads.append(gates[..., g : g + 1] * x[..., part] + gates[..., G + g : G + g + 1] * m[..., part])
        mixed = torch.cat(heads, -1)
        return mixed if module.scale is None else x + torch.tanh(module.scale) * (mixed - x)
    if isinstance(module, Blend):
        s = torch.tanh(module.gate) if module.retrofit else 1 / (1 + torch.exp(-module.gate))
        return s * x + (1 - s) * m
    return x + (module.scale if isinstance(module, Scaled) else 1) * m


@pytest.mark.parametrize(
    "make",
    [
        Add,
        Scaled,
        lambda: HeadGate(D, G, retrofit=False),
        lambda: HeadGate(D, G, retrofit=True),
        lambda: Blend(False),
        lambda: Blend(True),
    ],
)
def test_formula_forward_and_backward(make):
    module, (x, m, a) = moved(make()), inputs()
    same_with_gradients(module(x, m, a), by_hand(module, x, m, a), (x, m, *module.parameters()))


def test_cache_residual_formula():
    h, r = (torch.randn(B, S, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    h.data[0, 0] = r.data[0, 0] = 1e-4  # small enough for the clamp
    y = h + 0.5 * r
    factor = (1 / (y.detach() ** 2).mean(-1, keepdim=True).add(1e-6).sqrt()).clamp(0.2, 5)
    torch.testing.assert_close(Residual(0.5, detach=False)(h, r), y * factor)
    torch.testing.assert_close(Residual(0.5, norm=False)(h, r), y)
    assert torch.autograd.grad(Residual(0.5)(h, r).sum(), r, allow_unused=True)[0] is None
    (g,) = torch.autograd.grad(Residual(0.5, detach=False)(h, r).sum(), r)
    torch.testing.assert_close(g, (0.5 * factor).expand_as(g))


def test_identity_at_the_start_bit_for_bit():
    x, m, a = inputs()
    for module in (Gated(D).double(), HeadGate(D, G, retrofit=True).double(), Scaled().double()):
        assert torch.equal(module(x, m, a), x)
    assert torch.equal(Blend(True).double()(x, m, a), m)
    assert torch.equal(HeadGate(D, G, retrofit=False).double()(x, m, a), x + m)  # published: both gates exactly 1


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_parameter_count_of_the_t2mlr_mixer():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=4, vocab_size=512
    )
    plain, model = ut.from_scratch(config), ut.from_scratch(config, time=ut.T2MLR(2, 5))
    assert count(model) - count(plain) == 328_194  # the published mixer with its projection, 5 % of 6.59 M


def test_parameter_count_of_intra_layer_recurrence():
    config = LlamaConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, vocab_size=1024,
        tie_word_embeddings=True,
    )  # fmt: skip
    for counts in ([1, 1, 1, 1], [4, 2, 1, 1]):
        assert count(ut.from_scratch(config, depth=ut.ReuseMap(counts))) == 1_180_800


def test_parameter_count_of_the_trm_block_in_gpt2():
    config = GPT2Config(n_embd=256, n_layer=6, n_head=4, vocab_size=50258, n_positions=256)
    with torch.device("meta"):
        assert count(ut.from_scratch(config)) == 17_670_656
        for insert in (None, -1):
            assert count(ut.from_scratch(config, depth=ut.TRMBlock(insert))) == 18_789_377


@pytest.mark.parametrize("shared", [True, False])
def test_parameter_count_of_lrt_maps(shared):
    config = CONFIGS["llama"]()  # D 32, 2 key/value heads of 8, 4 layers
    extra = count(ut.from_scratch(config, time=ut.LRT(shared=shared))) - count(ut.from_scratch(config))
    maps = 2 * 32 * 16 * (1 if shared else 4)
    gates, residual = 4 * 2 * 2 * 32, 4
    assert extra == maps + gates + residual


def test_projection_starts_as_published():
    weight = projection(64, 512, uniform=True).weight
    assert weight.abs().max() <= (3 / 64) ** 0.5 and weight.std().item() == pytest.approx(1 / 8, rel=0.03)


def test_start_vectors_learn_where_every_cycle_carries_gradient():
    """Else they are only read where there is none, as in the published block, and nothing is made up for them."""
    x = torch.arange(10)[None]
    for live in (1, 2, 3, 4):
        model = build("gpt2", depth=ut.TRMBlock(inner=2, outer=3, grad_cycles=live))
        model(x, labels=x).loss.backward()
        for name in ("trm_start_z", "trm_start_y"):
            start = model.undertow[name].value_D
            assert start.requires_grad == (live >= 3)
            assert start.grad is None if live < 3 else start.grad.norm() > 0


# ---------------------------------------------------------------------- what sweeps share


@pytest.mark.parametrize(
    "options", [{}, {"x_branch": False}, {"normalize": True}, {"pre_norm": "rmsnorm", "post_norm": True}], ids=repr
)
def test_gates_from_the_half_of_x_are_the_gates(options):
    """The slow way is the mixer itself, which knows no halves."""
    torch.manual_seed(0)
    mixer, (x, m, _) = moved(Gated(D, **options)), inputs()
    same_with_gradients(mixer(x, m, x, half=mixer.x_half(x)), mixer(x, m, x), [x, m, *mixer.parameters()])


@pytest.mark.parametrize("options", [{"layers": 2}, {"detach_x": True}, {"detach_m": True}], ids=repr)
def test_other_gates_have_no_half(options):
    assert Gated(D, **options).x_half(torch.randn(B, S, D)) is None


def test_gates_read_before_are_the_gates():
    torch.manual_seed(0)
    mixer, (x, m, a) = moved(HeadGate(D, G, False)), inputs()
    same_with_gradients(mixer(x, m, a, read=mixer.read(a)), by_hand(mixer, x, m, a), [x, m, *mixer.parameters()])
