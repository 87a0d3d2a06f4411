"""Schedules whose sweeps are not the same in every forward, and the refresh of keys and values."""

import pytest
import torch

import matrix
import undertow as ut
from models import build, gap, gradient_gap, gradients, ids
from rounding import assert_same
from undertow import reference
from undertow.masks import Masks
from undertow.schedules import strided
from undertow.store import overwrite, write

T = 12


def test_random_depth_is_drawn_per_forward_and_only_with_gradient():
    """T2MLR's random depth: every training forward is one of the listed depths; evaluation keeps K."""
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, T)
    schedule = ut.Jacobi(4, sample=(1, 3))
    allowed = {float(k + 1) for k in schedule.sample}
    assert {model(x, schedule=schedule).passes for _ in range(20)} == allowed
    with torch.no_grad():
        assert model(x, schedule=schedule).passes == 5
    torch.manual_seed(3)
    first = [model(x, schedule=schedule).passes for _ in range(6)]
    torch.manual_seed(3)
    assert first == [model(x, schedule=schedule).passes for _ in range(6)]
    fixed = model(x, schedule=ut.Jacobi(3)).logits
    while (drawn := model(x, schedule=schedule)).passes != 4:
        pass
    assert_same(drawn.logits, fixed)


@pytest.mark.parametrize("sample", [(), (0.5,), (-1,), 3])
def test_sample_must_list_numbers_of_sweeps(sample):
    with pytest.raises((ValueError, TypeError), match="sample"):
        ut.Jacobi(4, sample=sample)


def written_out(model, x, S):
    """lrt.md's kv-refresh on one-layer-after-the-other code of the test's own: GPT-2, LRT, source the last layer."""
    lm, ours = model.backbone.transformer, model.undertow
    L, D, H = len(lm.h), lm.embed_dim, 4
    rows = torch.arange(T)
    x0 = lm.wte(x) + lm.wpe(rows)

    def shifted(h):
        m = torch.nn.functional.rms_norm(h, (D,), eps=1e-5)  # the backbone's
        return torch.cat([torch.zeros_like(m[:, :1]), m[:, :-1]], 1)

    def keys_values(layer, a, m):
        block, gate = lm.h[layer], ours[f"gate_{layer}"].gate
        _, k, v = block.attn.c_attn(a).split(D, -1)
        g_loc, g_mem = (2 * torch.sigmoid(gate(a))).chunk(2, -1)
        g_loc, g_mem = (g.repeat_interleave(D // H, -1) for g in (g_loc, g_mem))
        return g_loc * k + g_mem * ours["memory_key"](m), g_loc * v + g_mem * ours["memory_value"](m)

    def heads(z):
        return z.unflatten(-1, (H, D // H)).transpose(1, 2)

    inputs, k, v = [None] * L, [None] * L, [None] * L
    h = torch.zeros_like(x0)
    memory = shifted(h)  # zero everywhere

    def run(at, m):
        z = x0[:, at]
        for layer, block in enumerate(lm.h):
            z = z + ours[f"residual_{layer}"].scale * m[:, at]
            a = block.ln_1(z)
            new_k, new_v = keys_values(layer, a, m[:, at])
            if inputs[layer] is None:
                inputs[layer] = a  # of the first sweep, all positions
                k[layer], v[layer] = new_k, new_v
            else:
                k[layer], v[layer] = k[layer].index_copy(1, at, new_k), v[layer].index_copy(1, at, new_v)
            q = block.attn.c_attn(a).split(D, -1)[0]
            scores = heads(q) @ heads(k[layer]).transpose(-1, -2) / (D // H) ** 0.5
            scores = scores.masked_fill(rows[None] > at[:, None], -torch.inf)
            attended = (scores.softmax(-1) @ heads(v[layer])).transpose(1, 2).flatten(2)
            z = z + block.attn.c_proj(attended)
            z = z + block.mlp(block.ln_2(z))
        return z

    h = run(rows, memory)
    merged = h
    for i in range(S):
        memory = shifted(h)
        fresh = torch.cat([rows[j::S] for j in range(i, S)])  # never visited yet
        for layer in range(L):
            new_k, new_v = keys_values(layer, inputs[layer][:, fresh], memory[:, fresh])
            k[layer], v[layer] = k[layer].index_copy(1, fresh, new_k), v[layer].index_copy(1, fresh, new_v)
        h = h.index_copy(1, rows[i::S], run(rows[i::S], memory))
        merged = h
    return lm.ln_f(merged) @ lm.wte.weight.T


@pytest.mark.parametrize("S", [1, 2, 3])
def test_refresh_is_the_published_formula(S):
    """V += g (P m_new - P m_old), K likewise before attention, where no subset was; forward and backward."""
    model, x = build("gpt2", time=ut.LRT(-1)), ids(2, T)
    mine, theirs = model(x, schedule=ut.Interleaved(S, refresh=True)).logits, written_out(model, x, S)
    assert gap(mine, theirs) < 1e-10
    w = torch.randn(mine.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert gradient_gap(gradients(model, (mine * w).sum()), gradients(model, (theirs * w).sum())) < 1e-9
    changed = gap(model(x, schedule=ut.Interleaved(S)).logits, theirs)
    assert changed < 1e-12 if S == 1 else changed > 1e-3  # with one subset nothing is left to renew


def test_refresh_with_a_cache_pads_and_checkpointing():
    model, x = build("llama", depth=ut.MiddleLoop(1, 2, 2, inject=True), time=ut.LRT(2)), ids(2, T)
    schedule = ut.Interleaved(3, refresh=True)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    real = mask.bool()
    literal = reference.sweep(model, schedule, x, attention_mask=mask)[0]
    assert gap(model(x, attention_mask=mask, schedule=schedule).logits[real], literal[real]) < 1e-5
    whole = gradients(model, model(x, labels=x, schedule=schedule).loss)
    model.gradient_checkpointing_enable()
    assert gradient_gap(gradients(model, model(x, labels=x, schedule=schedule).loss), whole) < 1e-12
    model.gradient_checkpointing_disable()
    exact = ut.Interleaved(T, refresh=True)
    first = model(x[:, :5], use_cache=True)
    rest = model(x[:, 5:], past_key_values=first.past_key_values, schedule=exact).logits
    assert gap(rest, model(x).logits[:, 5:]) < 1e-5


# ---------------------------------------------------------------------- buffers and masks of dead sweeps


@pytest.mark.parametrize("positions", [range(1, 7, 3), range(7), range(2, 5)])
def test_a_buffer_is_overwritten_in_place(positions):
    """`write`, which copies, is the slow way."""
    new, buffer = torch.randn(2, len(positions), 3), torch.randn(2, 7, 3)
    before, expected = buffer.clone(), write(buffer, new, positions, 1)
    assert torch.equal(buffer, before)
    assert torch.equal(overwrite(buffer, new, positions, 1), expected) and torch.equal(buffer, expected)


@pytest.mark.parametrize("window", [None, 3])
def test_masks_that_are_added_say_what_boolean_ones_do(window):
    documents = torch.tensor([[1, 1, 1, 2, 2, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
    for docs in (None, documents):
        masks = Masks(7, 0, docs, torch.device("cpu"))
        for positions in (range(7), range(1, 7, 3), range(2, 5)):
            allowed, added = masks(positions, window), masks.added(positions, window, torch.float64)
            assert (allowed is None) == (added is None)
            if allowed is not None:
                assert torch.equal(added == 0, allowed) and torch.equal(added.isneginf(), ~allowed)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("G", [2, 3, 16, 40])
def test_subsets_share_one_mask(G, past, window):
    """The definition, a comparison of positions; and all subsets together hold no more than T/G rows."""
    T = 31
    masks, seen = Masks(T, past, None, torch.device("cpu")), {}
    for positions in strided(T, G):
        distance = past + torch.tensor(positions)[:, None] - torch.arange(past + T)
        expected = (distance >= 0) & (distance < (window or T + past))
        assert torch.equal(masks(positions, window)[0, 0], expected)
        added = masks.added(positions, window, torch.float64)
        assert torch.equal(added[0, 0] == 0, expected) and torch.equal(added[0, 0].isneginf(), ~expected)
        seen[added.untyped_storage().data_ptr()] = added.untyped_storage().nbytes()
    assert sum(seen.values()) <= 8 * len(range(0, T, G)) * (past + T + G + 1)


@pytest.mark.parametrize("time", [ut.T2MLR(1, 2, carry="residual"), ut.LRT(2)], ids=["t2mlr", "lrt"])
@pytest.mark.parametrize("depth", [None, ut.MiddleLoop(1, 2, 2, inject=True)], ids=["plain", "loop"])
def test_buffers_written_in_place_change_nothing(depth, time):
    """Without gradient, and in dead sweeps, buffers are overwritten; with it every sweep makes new ones."""
    model, x = build("llama", depth, time), ids(2, 9)
    for schedule in (*matrix.exact(9), *matrix.INEXACT):
        live = model(x, schedule=schedule).logits
        with torch.no_grad():
            dead = model(x, schedule=schedule)
        assert gap(dead.logits, live) < 1e-11, schedule
    model.backbone.requires_grad_(False)  # whose keys and values a graph holds although they have no gradient
    for schedule in (ut.Jacobi(4, backward=2), ut.Cyclic(3, 2), ut.Interleaved(3), ut.Jacobi(3, loss="mean")):
        model.zero_grad()
        model(x, labels=x, schedule=schedule).loss.backward()
