"""Position encodings against their formulas written out densely, float64, outputs and gradients."""

import math

import pytest
import torch

from dense import causal, cope, fire_bias, softmax
from models import gap
from undertow.backbone import positions
from undertow.backbone.positions import Fire, alibi, alibi_slopes, attend

B, H, E = 2, 3, 8


def random(*shape: int, seed: int, size: float = 1.0) -> torch.Tensor:
    x = size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.requires_grad_()


def assert_same(out, expected, inputs, seed=9):
    w = random(*out.shape, seed=seed).detach()
    assert gap(out, expected) < 1e-12
    mine, direct = (torch.autograd.grad((x * w).sum(), inputs) for x in (out, expected))
    for a, b in zip(mine, direct, strict=True):
        assert float(b.abs().max()) > 0
        assert gap(a, b) < 1e-11


def test_alibi_slopes_are_the_published_ones():
    assert alibi_slopes(4) == [1 / 4, 1 / 16, 1 / 64, 1 / 256]
    assert alibi_slopes(8) == [2.0**-k for k in range(1, 9)]
    assert alibi_slopes(6) == [2.0**-k for k in (2, 4, 6, 8, 1, 3)]
    assert alibi_slopes(3) == [1 / 16, 1 / 256, 1 / 4]
    assert alibi_slopes(1) == [1 / 256]


@pytest.mark.parametrize("past", [0, 5])
def test_alibi(past):
    rows = torch.arange(past, past + 4)[None]
    bias = alibi(rows, 4, torch.float64)
    assert bias.shape == (1, 4, 4, past + 4)
    for t, i in enumerate(range(past, past + 4)):
        for h, m in enumerate((1 / 4, 1 / 16, 1 / 64, 1 / 256)):
            for j in range(past + 4):
                wanted = -m * (i - j) if j <= i else torch.finfo(torch.float64).min
                assert float(bias[0, t, h, j]) == wanted


def fire(heads=H, threshold=6.0, seed=0) -> Fire:
    module = Fire(heads, threshold=threshold).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.dim():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return module


@pytest.mark.parametrize("threshold", [3.5, -6.0, 100.0], ids=["beyond", "negative", "within"])
@pytest.mark.parametrize("past", [0, 4])
def test_fire(past, threshold, monkeypatch):
    """Within and beyond the threshold, rows with positions of their own, after a past; c, a and L0 are trained."""
    monkeypatch.setattr(positions, "PIECE", 7)
    module = fire(threshold=threshold)
    with torch.no_grad():
        module.c.mul_(-2)
        module.a.mul_(1.25)
    rows = torch.arange(past, past + 9)[None]
    packed = torch.tensor([[7, 8, 9, 10, 0, 1, 2, 3, 4], list(range(past, past + 9))])
    for position_ids in (rows, packed):
        bias, dense = module(position_ids, rows), fire_bias(module, position_ids, rows, past + 9)
        allowed = causal(9, past + 9)[None, :, None]
        shared = threshold == 100.0 or len(position_ids) == 1
        assert bias.shape == (1 if shared else 2, 9, H, past + 9)
        assert_same((bias * allowed).expand_as(dense), dense * allowed, list(module.parameters()))


def test_fire_asks_its_mlp_once_a_distance(monkeypatch):
    """Within the threshold the MLP sees as many numbers as there are keys, not their square."""
    seen, hidden = [], positions._hidden
    monkeypatch.setattr(positions, "_hidden", lambda x, *more: (seen.append(len(x)), hidden(x, *more))[1])
    rows = torch.arange(20)[None]
    fire(threshold=512.0)(rows, rows)
    fire(threshold=15.0)(rows, rows)
    assert seen == [20, 20 + 17 + 18 + 19 + 20]  # rows 16..19 lie beyond, each over the keys it sees


@torch.no_grad()
def test_fire_in_half_precision_counts_exactly():
    """Positions that bfloat16 cannot tell apart: 513 lies beyond a threshold of 512, and 1001 is not 1000."""
    module = fire(threshold=512.0)
    rows = torch.arange(1002)[None, -1:]
    exact, low = module(rows, rows), module.to(torch.bfloat16)(rows, rows)
    rounded = fire(threshold=512.0).to(torch.bfloat16).double()(rows, rows)  # the same weights, exact arithmetic
    assert gap(low.double(), rounded) < 1e-2 and gap(low.double(), exact) < 0.1


MASKS = {
    "causal": (150, 150, None),  # over more than two blocks
    "one": (1, 9, None),
    "past": (5, 9, lambda: causal(5, 9).expand(B, 1, 5, 9)),
    "holes": (70, 70, lambda: (causal(70, 70) & (torch.arange(70) % 3 != 1) | torch.eye(70).bool())[None, None]),
    "subset": (3, 9, lambda: causal(9, 9)[2::3].expand(B, 1, 3, 9)),
}  # fmt: skip


def case(name):
    S, K, mask = MASKS[name]
    q, k, v = random(B, H, S, E, seed=1), random(B, H, K, E, seed=2), random(B, H, K, E, seed=3)
    mask = mask and mask()
    return q, k, v, mask, (causal(S, K) if mask is None else mask)


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("name", MASKS)
def test_attention_with_a_trained_bias(name, batch):
    q, k, v, mask, allowed = case(name)
    bias = random(batch, H, q.shape[2], k.shape[2], seed=4)
    expected = softmax(0.3 * q @ k.mT + bias, allowed) @ v
    out = attend(q, k, v, mask, 0.3, bias)
    inputs = [q, k, v, bias] if k.shape[2] > 1 else [v]
    assert_same(out, expected, inputs)


@pytest.mark.parametrize("size", [2, 4, 400])
@pytest.mark.parametrize("name", MASKS)
def test_attention_with_contextual_positions(name, size):
    """Tables that positions exceed, and one that is longer than all of them."""
    q, k, v, mask, allowed = case(name)
    table = random(E, size, seed=5)
    s = 0.3 * q @ k.mT
    expected = softmax(s + cope(q, s, allowed, table), allowed) @ v
    assert_same(attend(q, k, v, mask, 0.3, table_EP=table), expected, [q, k, v, table])


def test_gates_that_are_fully_open_stay_within_the_table():
    """Scores at which a sigmoid is exactly 1: positions are whole numbers, up to the number of keys."""
    q, k, v = torch.full((1, 1, 9, E), 9.0), torch.full((1, 1, 9, E), 9.0), random(1, 1, 9, E, seed=3).float()
    table = random(E, 400, seed=5).float()
    s = q @ k.mT
    expected = softmax(s + cope(q, s, causal(9, 9), table), causal(9, 9)) @ v
    assert gap(attend(q, k, v, None, 1.0, table_EP=table), expected) < 1e-5


@pytest.mark.parametrize("extra", ["bias", "table"])
def test_a_query_that_sees_nothing_stays_finite(extra):
    """Hugging Face's own masks have such rows at pads; a NaN there would reach every later layer."""
    q, k, v, mask, _ = case("past")
    mask = mask.clone()
    mask[0, 0, 1] = False
    given = {"bias_BHSK": random(1, H, 5, 9, seed=4)} if extra == "bias" else {"table_EP": random(E, 4, seed=5)}
    out = attend(q, k, v, mask, 0.3, **given)
    assert all(bool(x.isfinite().all()) for x in (out, *torch.autograd.grad(out.sum(), [q, k, v, *given.values()])))


@pytest.mark.parametrize("extra", ["bias", "table"])
def test_half_precision(extra):
    """bfloat16 tensors, and bfloat16 by autocast, are the float64 result to their precision; gradients too."""
    q, k, v, mask, _ = case("past")
    given = random(1, H, 5, 9, seed=4) if extra == "bias" else random(E, 4, seed=5)
    name = "bias_BHSK" if extra == "bias" else "table_EP"
    exact = attend(q, k, v, mask, 0.3, **{name: given})
    exact_gradient = torch.autograd.grad(exact.sum(), [q, v, given])
    for cast in (torch.bfloat16, torch.float32):
        low = [x.detach().to(cast).requires_grad_() for x in (q, k, v, given)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast == torch.float32):
            out = attend(low[0], low[1], low[2].to(torch.bfloat16), mask, 0.3, **{name: low[3]})
        assert out.dtype == torch.bfloat16 and gap(out.double(), exact) < 0.05
        for mine, true in zip(torch.autograd.grad(out.sum(), [low[0], low[2], low[3]]), exact_gradient, strict=True):
            assert mine.dtype == cast and gap(mine.double(), true) < 0.1


def test_blocks_change_nothing(monkeypatch):
    q, k, v, _, _ = case("causal")
    table, bias = random(E, 40, seed=5), random(1, H, 150, 150, seed=4)
    found = []
    for size in (16, 64, 1000):
        monkeypatch.setattr(positions, "BLOCK", size)
        out = attend(q, k, v, None, 0.3, bias, table)
        found.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v, table, bias])))
    for other in found[1:]:
        assert all(gap(a, b) < 1e-12 for a, b in zip(other, found[0], strict=True))


def test_scale_of_the_log_is_natural():
    """A check of the dense formula above by hand: distance 3 of position 5, threshold 4, c = 0.1."""
    module = fire(threshold=4.0)
    c = float(module.c.detach())  # 0.1 to single precision
    x = math.log(1 + c * 3) / (math.log(1 + c * 5) + 1e-6)
    bias = module(torch.tensor([[5]]), torch.tensor([[5]]))[0, 0, :, 2]
    by_hand = module.out_weight @ (x * module.in_weight + module.in_bias).relu() + module.out_bias
    assert gap(bias, by_hand) < 1e-12
