"""The nanochat-style backbone: its equations, its start, its sizes, and Hugging Face's view of it."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import matrix
import undertow as ut
from matrix import Case, T
from models import CONFIGS, V, build, gap, ids, randomise
from rounding import assert_copied, assert_same, same
from undertow.backbone.nanochat import Layer
from undertow.versions import CACHE

FAMILY = "undertow_nanochat"


def config(**fields):
    return ut.UndertowNanoChatConfig(**(CONFIGS[FAMILY]().to_dict() | {"layer_types": None} | fields))


def plain(**fields):
    torch.manual_seed(0)
    return randomise(AutoModelForCausalLM.from_config(config(**fields)).double()).eval()


# ---------------------------------------------------------------------- the equations


def norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 2.0**-23).sqrt()


def turned(x_BSE, positions):
    """RoPE as rotations of the pairs (x_j, x_{j + E/2})."""
    half = x_BSE.shape[-1] // 2
    out = torch.empty_like(x_BSE)
    for s, t in enumerate(positions):
        for j in range(half):
            angle = torch.tensor(t * 10_000.0 ** (-j / half), dtype=torch.float64)
            a, b = x_BSE[:, s, j], x_BSE[:, s, j + half]
            out[:, s, j] = a * angle.cos() - b * angle.sin()
            out[:, s, j + half] = a * angle.sin() + b * angle.cos()
    return out


def layer_by_hand(p, config, x, x0, value, positions, window):
    """The equations of the file's head, one head and one query at a time."""
    H, G, E = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    u = p["scale.alpha"] * x + p["scale.beta"] * x0
    a = norm(u)
    q, k, v = (a @ p[f"self_attn.{n}_proj.weight"].T for n in "qkv")
    if value is not None:
        w = p["self_attn.value_gate.weight"]
        gate = 2 / (1 + torch.exp(-a[..., : w.shape[1]] @ w.T))
        v = v + torch.cat([gate[..., g : g + 1] * value[..., g * E : (g + 1) * E] for g in range(G)], -1)
    heads = []
    for h in range(H):
        g = h // (H // G)
        qh = norm(turned(q[..., h * E : (h + 1) * E], positions))
        kg, vg = norm(turned(k[..., g * E : (g + 1) * E], positions)), v[..., g * E : (g + 1) * E]
        rows = []
        for s, t in enumerate(positions):
            seen = [j for j, other in enumerate(positions) if other <= t and t - other < window]
            weights = torch.softmax((qh[:, s, None] * kg[:, seen]).sum(-1) / E**0.5, -1)
            rows.append((weights[..., None] * vg[:, seen]).sum(1))
        heads.append(torch.stack(rows, 1))
    x = u + torch.cat(heads, -1) @ p["self_attn.o_proj.weight"].T
    return x + torch.relu(norm(x) @ p["mlp.up_proj.weight"].T).square() @ p["mlp.down_proj.weight"].T


@pytest.mark.parametrize("value", ["none", "every"])
@pytest.mark.parametrize("window", [3, 100])
@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 4, "head_dim": 16, "value_gate_channels": 0}], ids=str)
def test_layer_forward_and_backward(sizes, window, value):
    lm = plain(value=value, **sizes)
    B, S, layer, K = 2, 7, lm.model.layers[1], lm.config.num_key_value_heads * lm.config.head_dim
    assert isinstance(layer, Layer)
    x, x0 = (torch.randn(B, S, 32, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(B, S, K, dtype=torch.float64, requires_grad=True)
    positions = list(range(4, 4 + S))
    position_ids = torch.tensor(positions)[None]
    context = lm.model.context(ids(B, S), x0, position_ids, position_ids)
    context |= {"value_1": v} if value == "every" else {}
    t = torch.arange(S)
    mask = ((t[:, None] >= t) & (t[:, None] - t < window))[None, None]
    mine = layer(x, None, None if window > S else mask, **context)
    p = dict(layer.named_parameters())
    theirs = layer_by_hand(p, lm.config, x, x0, v if value == "every" else None, positions, window)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    w, inputs = torch.randn_like(mine), [x, x0, *p.values(), *([v] if value == "every" else [])]
    a, b = (torch.autograd.grad((y * w).sum(), inputs) for y in (mine, theirs))
    for one, other in zip(a, b, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("value", ["none", "alternate", "every"])
def test_model_is_its_layers_between_norms(value):
    lm, x = plain(value=value), ids(2, T)
    h = x0 = norm(lm.model.embed_tokens(x))
    for i, layer in enumerate(lm.model.layers):
        table = lm.model.value_tables[str(i)](x) if lm.config.has_table(i) else None
        window = 5 if i < 3 else T  # SSSL
        h = layer_by_hand(dict(layer.named_parameters()), lm.config, h, x0, table, range(T), window)
    logits = 4 * torch.tanh(norm(h) @ lm.lm_head.weight.T / 4)
    assert gap(lm(x).logits, logits) < 1e-11
    assert gap(ut.wrap(lm)(x).logits, logits) < 1e-11


def test_the_loss_is_hugging_faces():
    lm, x = plain(), ids(2, T)
    nats = torch.nn.functional.cross_entropy(lm(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    assert gap(lm(x, labels=x).loss, nats) < 1e-6  # computed in float32 there


# ---------------------------------------------------------------------- sizes, names, start


def count(layers, time=None, **fields):
    with torch.device("meta"):
        model = ut.from_scratch(ut.UndertowNanoChatConfig.from_depth(layers, **fields), time=time)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("layers", "alternate", "every", "layerwise", "shared"),
    [(12, 0.286, 0.437, 0.452, 0.295), (20, 0.897, 1.316, 1.382, 0.288), (24, 1.384, 1.989, 2.103, 0.282)],
)
def test_published_parameter_counts(layers, alternate, every, layerwise, shared):
    """Billions, and percent for the shared maps with the gates (the digest's table; c = D)."""
    assert round(count(layers) / 1e9, 3) == alternate
    baseline = count(layers, value="every")
    assert round(baseline / 1e9, 3) == every
    assert round(count(layers, ut.LRT(shared=False), value="every") / 1e9, 3) == layerwise
    more = count(layers, ut.LRT(), value="every") - baseline
    assert round(100 * more / baseline, 3) == shared
    D, G = 64 * layers, layers // 2
    assert more == 2 * D * D + 2 * G * D * layers + layers  # maps, two more gates a head and layer, gamma


@pytest.mark.parametrize(
    ("layers", "width", "heads"), [(4, 256, 2), (5, 384, 3), (6, 384, 3), (12, 768, 6), (20, 1280, 10), (24, 1536, 12)]
)
def test_from_depth(layers, width, heads):
    made = ut.UndertowNanoChatConfig.from_depth(layers)
    assert (made.num_hidden_layers, made.hidden_size, made.num_attention_heads) == (layers, width, heads)
    assert (made.head_dim, made.num_key_value_heads, made.intermediate_size) == (128, heads, 4 * width)
    assert (made.max_position_embeddings, made.sliding_window, made.vocab_size) == (2048, 1025, 32768)
    windows = ["full_attention" if i % 4 == 3 or i == layers - 1 else "sliding_attention" for i in range(layers)]
    assert made.layer_types == windows
    assert ut.UndertowNanoChatConfig.from_depth(layers, vocab_size=V, value="every").vocab_size == V


@pytest.mark.parametrize(("value", "layers"), [("none", []), ("alternate", [1, 3]), ("every", [0, 1, 2, 3])])
def test_parameter_names(value, layers):
    names = {n for n, _ in plain(value=value).named_parameters()}
    expected = {"model.embed_tokens.weight", "lm_head.weight"} | {f"model.value_tables.{i}.weight" for i in layers}
    expected |= {f"model.layers.{i}.self_attn.value_gate.weight" for i in layers}
    for i in range(4):
        expected |= {f"model.layers.{i}.self_attn.{p}_proj.weight" for p in "qkvo"}
        expected |= {f"model.layers.{i}.mlp.{p}_proj.weight" for p in ("up", "down")}
        expected |= {f"model.layers.{i}.scale.{p}" for p in ("alpha", "beta")}
    assert names == expected


@pytest.mark.parametrize("make", ["alone", "recurrent"])
def test_start_is_the_published_one(make):
    D = 256
    sizes = ut.UndertowNanoChatConfig.from_depth(4, vocab_size=1000, value="every")
    model = AutoModelForCausalLM.from_config(sizes) if make == "alone" else ut.from_scratch(sizes, time=ut.LRT())
    lm = model if make == "alone" else model.backbone
    bound = (3 / D) ** 0.5
    for name, p in lm.named_parameters():
        if "embed" in name or "lm_head" in name:
            std = 1.0 if "embed" in name else 0.001
            assert p.std().item() == pytest.approx(std, rel=0.02) and p.abs().max() > 3 * std, name
        elif re.search("o_proj|down_proj|value_gate", name):
            assert not p.any(), name
        elif "scale" in name:
            assert p.tolist() == pytest.approx([1.0 if "alpha" in name else 0.1]), name
        else:
            assert 0.99 * bound < p.abs().max() <= bound and p.std().item() == pytest.approx(D**-0.5, rel=0.02), name
    if make == "recurrent":
        for name, p in model.undertow.named_parameters():
            if "memory" in name:
                assert p.abs().max() <= bound and p.std().item() == pytest.approx(D**-0.5, rel=0.02)
            else:
                assert p.tolist() == pytest.approx([0.1]) if "residual" in name else not p.any()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(value="some"), r"value='some': must be one of \('none', 'alternate', 'every'\)"),
        (dict(value_gate_channels=33), "value_gate_channels=33: must be at most hidden_size=32"),
        (dict(window_pattern="SXL"), "window_pattern='SXL': must be letters S, L"),
        (dict(window_pattern=""), "window_pattern=''"),
        (dict(sliding_window=0), "sliding_window=0: must be a whole number of at least 1"),
        (dict(num_key_value_heads=3), "num_key_value_heads=3: must be a divisor of num_attention_heads=4"),
        (dict(head_dim=5), "head_dim=5: must be even"),
        (dict(head_dim=None, num_attention_heads=5), "hidden_size=32: must be a multiple of num_attention_heads=5"),
        (dict(rope_theta=0.0), "rope_theta=0.0: must be a number greater than 0"),
        (dict(final_logit_softcapping=0.0), "final_logit_softcapping=0.0"),
        (dict(num_hidden_layers=0), "num_hidden_layers=0: must be a whole number of at least 1"),
        (dict(layer_types=["full_attention"] * 4), "layer_types=.*window_pattern"),
        (dict(tie_word_embeddings=True), "tie_word_embeddings=True"),
        (dict(intermediate_size=0), "intermediate_size=0"),
        (dict(vocab_size="many"), "vocab_size='many': must be a whole number"),
        (dict(head_dim=True), "head_dim=True"),
        (dict(rms_norm_eps="1e-6"), "rms_norm_eps='1e-6': must be a number"),
        (dict(window_pattern=3), "window_pattern=3"),
        (dict(value=None), "value=None"),
        (dict(rotary_tables="float16"), r"rotary_tables='float16': must be one of \('exact', 'bfloat16'\)"),
    ],
)
def test_wrong_configs_are_one_line(fields, says):
    with pytest.raises(ValueError, match=says) as caught:
        config(**fields)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- as Hugging Face sees it


@torch.no_grad()
def test_saved_equals_loaded(tmp_path):
    lm, x = plain(value="alternate"), ids()
    lm.save_pretrained(tmp_path)
    read, written = AutoConfig.from_pretrained(tmp_path).to_dict(), lm.config.to_dict()
    assert {n: v for n, v in read.items() if written[n] != v}.keys() <= {"_name_or_path"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_copied(loaded, lm)
    assert_same(loaded(x).logits, lm(x).logits)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["SSSL", "L"])
def test_its_own_generation(pattern):
    """Cached, left-padded greedy decoding of the backbone alone, past the window, equals argmax of full forwards."""
    lm = plain(window_pattern=pattern)
    x, mask = matrix.padded(ids(2, 7), [0, 3])
    made = lm.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1)
    for b, n in enumerate([0, 3]):
        text = x[b : b + 1, n:]
        for _ in range(6):
            text = torch.cat([text, lm(text).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(made[b, n:], text[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rotary_tables_are_rounded_where_the_config_says_so(dtype):
    """In every precision the tables are numbers that bfloat16 holds; otherwise they are as exact as the model."""
    x, rows = ids(1, T), torch.arange(T)[None]
    made = {kind: plain(rotary_tables=kind).to(dtype) for kind in ("exact", "bfloat16")}
    tables = {}
    for kind, lm in made.items():
        h = lm.model.embed_tokens(x)
        tables[kind] = lm.model.context(x, h, rows, rows)["position_embeddings"]
        assert all(table.dtype == dtype for table in tables[kind])
    for exact, rounded in zip(tables["exact"], tables["bfloat16"], strict=True):
        torch.testing.assert_close(
            rounded, exact.bfloat16().to(dtype), rtol=0, atol=0 if dtype != torch.bfloat16 else 1e-2
        )
        assert torch.equal(rounded, rounded.bfloat16().to(dtype))
    if dtype == torch.float64:
        assert 1e-6 < gap(made["bfloat16"](x).logits, made["exact"](x).logits) < 5e-2


@torch.no_grad()
def test_windows_bite_in_all_layers_but_the_last():
    x = ids(1, T)
    wide, narrow, full = plain(sliding_window=64), plain(), plain(window_pattern="L")
    assert_same(wide(x).logits[:, :5], narrow(x).logits[:, :5])  # nothing to cut yet
    assert gap(narrow(x).logits[:, 5:], wide(x).logits[:, 5:]) > 1e-4
    assert gap(full(x).logits, wide(x).logits) < 1e-12
    reach = [ut.wrap(narrow).view.window(i) for i in range(4)]
    assert reach == [5, 5, 5, None]


@torch.no_grad()
def test_embeddings_without_ids():
    lm, x = plain(value="none"), ids()
    for model in (lm, ut.wrap(lm)):
        assert_same(model(inputs_embeds=lm.get_input_embeddings()(x)).logits, model(x).logits)
    for model in (plain(), ut.wrap(plain())):
        with pytest.raises(ValueError, match="inputs_embeds without input_ids: value='every'") as caught:
            model(inputs_embeds=lm.get_input_embeddings()(x))
        assert "\n" not in str(caught.value)
    for wrong in ({}, {"input_ids": x, "inputs_embeds": lm.get_input_embeddings()(x)}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            lm(**wrong)


def test_tables_are_looked_up_once_however_many_sweeps():
    model, calls = build(FAMILY, time=ut.LRT()), []
    for table in model.backbone.model.value_tables.values():
        table.register_forward_hook(lambda *args: calls.append(1))
    model(ids(), labels=ids(), schedule=ut.Interleaved(3)).loss.backward()
    assert len(calls) == 4
    assert all(t.weight.grad.any() for t in model.backbone.model.value_tables.values())


def test_logits_are_float32_at_least():
    lm, x = plain().bfloat16(), ids()
    h = lm.model(x).last_hidden_state
    logits = 4 * torch.tanh(lm.lm_head(h) / 4)
    assert h.dtype == torch.bfloat16 and lm.lm_head(h).dtype == torch.float32
    for model in (lm, ut.wrap(lm)):
        assert model(x).logits.dtype == torch.float32 and same(model(x).logits, logits)
    assert plain()(x).logits.dtype == torch.float64


def test_autocast_keeps_keys_and_values_small():
    model, x = build(FAMILY, time=ut.LRT()).float(), ids()
    whole = model(x, use_cache=True, schedule=ut.Sequential())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, use_cache=True, schedule=ut.Sequential())
    kept = [t.dtype for layer in out[CACHE].layers for t in (layer.keys, layer.values)]
    assert set(kept) == {torch.bfloat16} and gap(out.logits, whole.logits) < 0.2


def test_copies_are_independent():
    model, x = build(FAMILY, time=ut.LRT()), ids()
    before, twin = model(x).logits, copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(twin(x).logits, before)


def test_input_edges_enter_beside_the_scales():
    """`u = alpha x + beta x0 + gamma m`: gamma is outside alpha, in every visit."""
    model, x = build(FAMILY, time=ut.LRT(key=False, value=False)), ids(2, T)
    out = model(x, schedule=ut.Sequential())
    before = torch.cat([torch.zeros_like(out.memory[:, :1]), out.memory[:, :-1]], 1)
    x0 = norm(model.backbone.model.embed_tokens(x))
    h, lm = x0, model.backbone.model
    for i, layer in enumerate(lm.layers):
        p, gamma = dict(layer.named_parameters()), model.undertow[f"residual_{i}"].scale
        joined = p["scale.beta"] * x0 + gamma * before  # the layer by hand adds it with a weight of 1
        p["scale.beta"] = torch.ones(1, dtype=torch.float64)
        window = lm.config.sliding_window if i < 3 else T
        h = layer_by_hand(p, lm.config, h, joined, lm.value_tables[str(i)](x), range(T), window)
    assert gap(norm(h), out.memory) < 1e-9


# ---------------------------------------------------------------------- the matrix, beyond tests/test_matrix.py

CASES = [
    Case(FAMILY),
    Case(FAMILY, None, ut.T2MLR(2, 2, carry="residual", project=None)),
    Case(FAMILY, ut.ReuseMap([2, 1, 3, 1]), None),
    Case(FAMILY, ut.BlockLoop(2, inject=True), ut.T2MLR(0, -1)),
]


@matrix.every_row(CASES)
def test_matrix(row, case, tmp_path):
    matrix.run(row, case, tmp_path)
