"""The TRM block against its recursion written out by hand, in every form; causal always, and what a leak looks like."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

import matrix
import undertow as ut
from matrix import Case
from models import LAYERS, V, build, gap, gradient_gap, gradients, ids
from rounding import assert_same, same
from undertow import analysis
from undertow.analysis import check
from undertow.analysis.recursion import rounds
from undertow.plan import NORM

FORMS = ("post", "branch", "dual")
T = 9


def causal(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()


def attention(layer, x, allowed):
    B, T, D = x.shape
    q, k, v = (x @ layer.qkv.weight.T + layer.qkv.bias).split(D, -1)
    q, k, v = (y.view(B, T, layer.heads, -1).transpose(1, 2) for y in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D) @ layer.out.weight.T + layer.out.bias


def mlp(layer, x):
    return (F.silu(x @ layer.gate.weight.T) * (x @ layer.up.weight.T)) @ layer.down.weight.T


def normed(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def block(form, layers, allowed):
    """`(Z, Y)`: the updates of z from (z, y, x) and of y from (y, z, x), as the formulas say."""

    def post(u):
        for f in layers:
            u = normed(f.norm_attention, u + attention(f, u, allowed))
            u = normed(f.norm_mlp, u + mlp(f, u))
        return u

    def branch(u, i):
        for f in layers:
            u = u + attention(f, normed(f.norm_attention, u + i), allowed)
            u = u + mlp(f, normed(f.norm_mlp, u + i))
        return u

    if form == "post":
        return (lambda z, y, x: post(z + y + x)), (lambda y, z: post(y + z))
    if form == "branch":
        return (lambda z, y, x: branch(z, y + x)), (lambda y, z: branch(y, z))
    pre = lambda u: branch(u, 0.0)  # noqa: E731
    return (lambda z, y, x: z + (pre(x + y + z) - (x + y + z))), (lambda y, z: y + (pre(y + z) - (y + z)))


def written_out(model, x, allowed):
    """What leaves the block: `s y + (1 - s) x` after T cycles, of which the last `grad_cycles` carry gradient."""
    config, mine = model.depth, model.undertow
    Z, Y = block(config.form, [mine[f"trm_{i}"] for i in range(config.layers)], allowed)
    dual = config.form == "dual"
    z, y = (torch.zeros_like(x), x) if dual else (mine[f"trm_start_{r}"].value_D.expand_as(x) for r in "zy")
    for c in range(config.outer):
        live = config.outer - c <= config.grad_cycles
        with torch.set_grad_enabled(torch.is_grad_enabled() and live):
            for _ in range(config.inner):
                z = Z(z, y, x)
            y = Y(y, z)
        if dual and not live:  # there the register is y - x, and x carries its gradient all along
            y = y + x - x.detach()
    s = torch.sigmoid(mine["trm_gate"].gate) if "trm_gate" in mine and hasattr(mine["trm_gate"], "gate") else 1.0
    return s * y + (1 - s) * x


def logits_written_out(model, input_ids, at):
    """The whole model: Hugging Face's own GPT-2 layers around the block written out."""
    gpt2 = model.backbone.transformer
    h = gpt2.wte(input_ids) + gpt2.wpe(torch.arange(input_ids.shape[1]))
    for layer in gpt2.h[: LAYERS if at == -1 else at]:
        h = layer(h)
    h = gpt2.ln_f(h) if at == -1 else h
    h = written_out(model, h, causal(input_ids))
    for layer in () if at == -1 else gpt2.h[at:]:
        h = layer(h)
    return model.backbone.lm_head(h if at == -1 else gpt2.ln_f(h))


VARIANTS = [
    ut.TRMBlock(form=form, layers=layers, inner=inner, outer=outer, grad_cycles=live, gate=gate, insert=insert)
    for form in FORMS
    for layers, inner, outer, live, gate, insert in (
        (2, 2, 3, 1, "published", None),
        (1, 3, 2, 1, 0.5, 0),
        (2, 1, 3, 2, None, -1),
        (1, 2, 1, 5, 0.0, 3),
    )
]


@pytest.mark.parametrize("depth", VARIANTS, ids=str)
def test_the_recursion_written_out(depth):
    """Outputs and the gradient of every parameter, start vectors too where every cycle is live."""
    model, x = build("gpt2", depth=depth), ids(2, T)
    at = LAYERS // 2 if depth.insert is None else depth.insert
    w = torch.randn(2, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out, mine = model(x).logits, logits_written_out(model, x, at)
    assert gap(out, mine) < 1e-9
    a, b = gradients(model, (out * w).sum()), gradients(model, (mine * w).sum())
    assert gradient_gap(a, b) < 1e-9
    learned = {name for name, p in model.undertow.named_parameters(prefix="undertow") if p.requires_grad}
    assert {name for name, g in a.items() if name.startswith("undertow.") and g.norm() > 0} == learned


def test_cycles_without_gradient_give_none():
    """With one live cycle the gradient is that of a model whose earlier states are constants, hence another one."""
    x = ids(2, T)
    found = []
    for live in (1, 2, 3, 9):
        model = build("gpt2", depth=ut.TRMBlock(inner=1, outer=3, gate=1.0, grad_cycles=live))
        found.append(gradients(model, model(x, labels=x).loss))
    assert gradient_gap(found[0], found[2]) > 1e-3 and gradient_gap(found[1], found[2]) > 1e-3
    assert gradient_gap(found[3], found[2]) < 1e-12


def test_published_defaults():
    block = ut.TRMBlock()
    assert (block.layers, block.inner, block.outer, block.grad_cycles) == (2, 4, 2, 1)
    for form, start in (("post", -5.0), ("branch", -2.0)):
        model = ut.from_scratch(LlamaConfig(**SMALL), depth=ut.TRMBlock(form=form))
        assert model.undertow["trm_gate"].gate.item() == start
    model = ut.from_scratch(LlamaConfig(**SMALL), depth=ut.TRMBlock(form="dual"))
    assert not list(model.undertow["trm_gate"].parameters()) and not list(model.undertow["trm_start_z"].parameters())
    model = ut.from_scratch(LlamaConfig(**SMALL), depth=ut.TRMBlock(gate=None))
    assert "trm_gate" not in model.undertow
    for form in FORMS:  # a wrapped model always has a gate, closed
        backbone = build("gpt2").backbone
        model = ut.wrap(backbone, depth=ut.TRMBlock(form=form, gate=None))
        assert_same(model(ids()).logits, backbone(ids()).logits)


SMALL = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=V,
    max_position_embeddings=96, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["scratch", "wrapped"])
def test_weights_and_biases_begin_as_published(form, wrapped):
    """Uniform in +-1/sqrt(fan in), the bounds reached, every tenth of the range as full as the next."""
    width = 128
    config = LlamaConfig(**SMALL | {"hidden_size": width})
    depth = ut.TRMBlock(form=form)
    model = (
        ut.wrap(AutoModelForCausalLM.from_config(config), depth=depth)
        if wrapped
        else ut.from_scratch(config, depth=depth)
    )
    for name in ("trm_0", "trm_1"):
        layer = model.undertow[name]
        assert {n for n, _ in layer.named_parameters() if n.endswith("bias")} == {
            "qkv.bias", "out.bias", "norm_attention.bias", "norm_mlp.bias",
        }  # fmt: skip
        for linear in (layer.qkv, layer.out, layer.gate, layer.up, layer.down):
            bound = linear.in_features**-0.5
            for drawn in (linear.weight, linear.bias):
                if drawn is None:
                    continue
                share = torch.histc(drawn.detach() / bound, 10, -1, 1) / drawn.numel()
                assert float(share.sum()) == pytest.approx(1) and float(drawn.abs().max()) <= bound
                spread = 6 * (0.1 * 0.9 / drawn.numel()) ** 0.5  # six deviations of a tenth's share
                assert float((share - 0.1).abs().max()) < spread
    if not wrapped and form != "dual":
        start = torch.stack([model.undertow[f"trm_start_{r}"].value_D for r in "zy"])
        assert float(start.std()) == pytest.approx(0.02, rel=0.25)


def test_where_the_block_stands():
    def steps(insert):
        return [s.block for s in build("gpt2", depth=ut.TRMBlock(insert, layers=1, inner=1, outer=1)).program.steps]

    two = ["trm_0", "trm_0"]
    assert steps(0) == [*two, 0, 1, 2, 3]  # not the middle
    assert steps(None) == [0, 1, *two, 2, 3]
    assert steps(-1) == [0, 1, 2, 3, NORM, *two]  # after the final norm, which is applied once


@pytest.mark.parametrize("gate", [-5.0, 0.0, None])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("insert", [-1, 0, None])
@torch.no_grad()
def test_no_logit_depends_on_later_tokens(form, gate, insert):
    model = build("gpt2", depth=ut.TRMBlock(insert, inner=2, form=form, gate=gate))
    x, changed, t = ids(2, T), ids(2, T), 5
    changed[:, t:] = (x[:, t:] + 1) % V
    assert model.program.causal
    a, b = model(x).logits, model(changed).logits
    assert same(a[:, :t], b[:, :t]) and not same(a[:, t], b[:, t])


def both_ways(model):
    """The published block: the same layers, their attention not causal."""
    for name, layer in model.undertow.items():
        if name in ("trm_0", "trm_1"):
            causal, everything = layer.forward, torch.ones(1, 1, dtype=torch.bool)
            layer.forward = lambda h, view, mask, causal=causal, all=everything: causal(h, view, all)
    return model


@pytest.mark.parametrize("insert", [None, -1])
def test_the_published_block_leaks_and_is_found_out(insert):
    """Options A and B as published: every logit depends on the tokens after it, and the check says so."""
    model = build("gpt2", depth=ut.TRMBlock(insert), n_positions=96)
    assert {c.name: c.ok for c in check.run(model).checks}["causal"]
    x, t = ids(2, 32), 16
    changed = torch.cat([x[:, :t], ids(2, 16, seed=1)], 1)
    with torch.no_grad():
        assert gap(model(changed).logits[:, :t], model(x).logits[:, :t]) < 1e-12
        both_ways(model)
        assert gap(model(changed).logits[:, :t], model(x).logits[:, :t]) > 1e-6
    report = check.run(model)
    assert isinstance(report, analysis.Report)
    verdict = next(c for c in report.checks if c.name == "causal")
    assert verdict.ok is False and verdict.line.startswith("NO: ")


def prefixed(form="post", insert=None, **options):
    return build("gpt2", depth=ut.TRMBlock(insert, inner=2, form=form, prefix=True, gate=0.0, **options))


@pytest.mark.parametrize("insert", [None, -1])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_prefix_is_both_ways_within_itself_only(form, insert):
    model, x, p = prefixed(form, insert), ids(2, T), 4
    assert not model.program.causal
    mask = (torch.arange(T) < p).expand(2, T)
    plain, out = model(x).logits, model(x, prefix_mask=mask).logits
    causal_model = build("gpt2", depth=ut.TRMBlock(insert, inner=2, form=form, gate=0.0))
    causal_model.load_state_dict(model.state_dict())
    assert_same(plain, causal_model(x).logits)  # nothing is bidirectional unless a caller marks it
    inside, after = x.clone(), x.clone()
    inside[:, p - 1] = (x[:, p - 1] + 1) % V
    after[:, p + 2] = (x[:, p + 2] + 1) % V
    assert gap(model(inside, prefix_mask=mask).logits[:, 0], out[:, 0]) > 1e-6  # the prefix sees itself
    assert_same(model(after, prefix_mask=mask).logits[:, : p + 2], out[:, : p + 2])  # and nothing after it


def test_prefix_equals_a_dense_mask_written_out():
    model, x, p = prefixed(), ids(2, T), 4
    rows = torch.tensor([4, 2])[:, None]
    mask = torch.arange(T)[None] < rows  # another prefix in every row
    allowed = causal(x)[None] | (mask[:, :, None] & mask[:, None])
    gpt2 = model.backbone.transformer
    h = gpt2.wte(x) + gpt2.wpe(torch.arange(T))
    for layer in gpt2.h[:2]:
        h = layer(h)
    h = written_out(model, h, allowed[:, None])
    for layer in gpt2.h[2:]:
        h = layer(h)
    mine, out = model.backbone.lm_head(gpt2.ln_f(h)), model(x, prefix_mask=mask).logits
    assert gap(out, mine) < 1e-9
    w = torch.randn(2, T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert gradient_gap(gradients(model, (out * w).sum()), gradients(model, (mine * w).sum())) < 1e-9
    with torch.no_grad():
        first = model(x[:, :p], prefix_mask=mask[:, :p], use_cache=True)
        parts = [first.logits]
        for t in range(p, T):
            parts.append(model(x[:, t : t + 1], past_key_values=first.past_key_values).logits)
        assert gap(torch.cat(parts, 1), out) < 1e-9
    text = model.generate(x, prefix_mask=torch.ones_like(x), max_new_tokens=3, do_sample=False, pad_token_id=1)
    expected = x
    for _ in range(3):
        marked = F.pad(torch.ones_like(x), (0, expected.shape[1] - T))
        expected = torch.cat([expected, model(expected, prefix_mask=marked).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(text, expected)


def test_a_prefix_has_no_labels_and_no_memory():
    model, x = prefixed(), ids(2, T)
    mask = (torch.arange(T) < 4).expand(2, T)
    with pytest.raises(ValueError, match="labels inside the prefix"):
        model(x, labels=x, prefix_mask=mask)
    labels = torch.where(mask, -100, x)
    assert torch.isfinite(model(x, labels=labels, prefix_mask=mask).loss)
    with pytest.raises(ValueError, match="prefix"):
        build("gpt2", depth=ut.TRMBlock(prefix=True), time=ut.T2MLR(1, 2))
    with pytest.raises(ValueError, match="no part of this model"):
        build("gpt2", depth=ut.TRMBlock())(x, prefix_mask=mask)


@pytest.mark.parametrize("depth", [ut.TRMBlock(outer=2, inner=1), ut.TRMBlock(-1, form="dual", inner=1)], ids=str)
@torch.no_grad()
def test_another_number_of_cycles_is_another_model(depth, tmp_path):
    model, x = build("gpt2", depth=depth), ids()
    other = build("gpt2", depth=depth.looped(4))
    other.load_state_dict(model.state_dict())
    assert_same(model(x, loops=4).logits, other(x).logits)
    text = model.generate(x, loops=4, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert torch.equal(text, other.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=1))
    with pytest.raises(ValueError, match="outer"):
        model(x, loops=0)


CASES = [
    Case("gpt2", ut.TRMBlock(form="branch", inner=1, layers=1), None),
    Case("gpt2", ut.TRMBlock(form="dual", inner=1, grad_cycles=2), ut.T2MLR(1, 2)),
    Case("llama", ut.TRMBlock(-1, form="dual", inner=1, gate=None, layers=1), None),
    Case("gpt2", ut.TRMBlock(0, gate=None, inner=1, layers=1), ut.T2MLR(2, 3)),
    Case("llama", ut.TRMBlock(form="branch", inner=1, layers=1, outer=3), ut.T2MLR(1, 2)),
]


@matrix.every_row(CASES, but=("row_8_saved_equals_loaded",))
def test_matrix(row, case):
    row(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saved_equals_loaded(case, tmp_path):
    matrix.row_8_saved_equals_loaded(case, tmp_path)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: ut.TRMBlock(form="pre"), "form='pre'"),
        (lambda: ut.TRMBlock(gate="open"), "gate='open'"),
        (lambda: ut.TRMBlock(gate=True), "gate=True"),
        (lambda: ut.TRMBlock(grad_cycles=0), "grad_cycles=0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)


@torch.no_grad()
def test_diagnostics_are_those_of_the_recursion_written_out():
    """Gate, norms, cosine and change of every cycle, against the states computed by hand; the model stays as it was."""
    depth = ut.TRMBlock(0, inner=2, outer=3)
    model, x = build("gpt2", depth=depth), ids(2, T)
    modules = {name: set(vars(m)) for name, m in model.named_modules()}
    seen = rounds(model, x)
    assert modules == {name: set(vars(m)) for name, m in model.named_modules()}
    gpt2, mine = model.backbone.transformer, model.undertow
    h = gpt2.wte(x) + gpt2.wpe(torch.arange(T))
    Z, Y = block("post", [mine["trm_0"], mine["trm_1"]], causal(x))
    z, y = (mine[f"trm_start_{r}"].value_D.expand_as(h) for r in "zy")
    for c, found in enumerate(seen):
        for _ in range(2):
            z = Z(z, y, h)
        before, y = y, Y(y, z)
        assert found.norms["z"] == pytest.approx(float(z.norm(dim=-1).mean()), rel=1e-9)
        assert found.norms["y"] == pytest.approx(float(y.norm(dim=-1).mean()), rel=1e-9)
        assert found.cosine == pytest.approx(float(F.cosine_similarity(z, y, dim=-1).mean()), rel=1e-9)
        assert found.gate == pytest.approx(float(torch.sigmoid(mine["trm_gate"].gate)), rel=1e-9)
        moved = float(((y - before).norm(dim=-1) / before.norm(dim=-1)).mean())
        assert found.change == (None if c == 0 else pytest.approx(moved, rel=1e-9))
    assert len(seen) == 3 and set(seen[0].to_dict()) == {"norms", "change", "cosine", "gate"}
    recurrent = build("gpt2", depth=depth, time=ut.T2MLR(1, 2))  # under a schedule of many sweeps
    assert rounds(recurrent, x, schedule=ut.Sequential())[1].norms["y"] == pytest.approx(seen[1].norms["y"], rel=0.5)
    assert len(rounds(build("gpt2", depth=ut.MiddleLoop(1, 2, 3)), x, loops=5)) == 5
