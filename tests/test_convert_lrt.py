"""LRT's checkpoints: names and splits as functions of tensors, formulas from tensors by their names."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import undertow as ut
from models import V, build, gap, ids
from undertow import convert
from undertow.convert import import_checkpoint, rename
from undertow.published import LRT_NAMES, read_lrt, unstacked

L, D, H, G, E, C = 4, 32, 4, 2, 8, 12  # C: channels the gate reads
PADDED = 64  # rows of the tables, V of them used
CONFIG = dict(vocab_size=V, n_embd=D, n_layer=L, n_head=H, n_kv_head=G, sequence_len=8, use_interleaved=True)
CONFIG |= dict(window_pattern="SSL", ve_gate_channels=C)


def published(gate="triple_gate", c=C) -> dict[str, torch.Tensor]:
    """Tensors under the names of LRT's code."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"transformer.wte.weight": (PADDED, D), "lm_head.weight": (PADDED, D)}
    shapes |= dict.fromkeys(("resid_lambdas", "x0_lambdas", "interleaved_lambdas"), (L,))
    for i in range(L):
        attention = {"c_q": (H * E, D), "c_k": (G * E, D), "c_v": (G * E, D), "c_proj": (D, H * E), gate: (3 * G, c)}
        shapes |= {f"transformer.h.{i}.attn.{n}.weight": s for n, s in attention.items()}
        shapes |= {f"transformer.h.{i}.mlp.c_fc.weight": (4 * D, D), f"transformer.h.{i}.mlp.c_proj.weight": (D, 4 * D)}
        shapes |= {f"interleaved_init_value_embeds.{i}.weight": (PADDED, G * E)}
        shapes |= {f"interleaved{kind}_projections.{i}.W_v.weight": (G * E, D) for kind in ("", "_key")}
    random = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return {n: 0.3 * x if x.dim() > 1 else x for n, x in random.items()}


def ours_of(theirs):
    return {rename(n, LRT_NAMES): x for n, x in unstacked(theirs, vocab=V, kv_heads=G, head_width=E).items()}


def turned(x):
    """Rows of heads with the sign of each head's second half changed."""
    x = x.clone().view(-1, E, x.shape[1])
    x[:, E // 2 :] *= -1
    return x.flatten(0, 1)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_every_name_has_its_place(prefix):
    theirs = published()
    ours = ours_of({prefix + name: x for name, x in theirs.items()})
    expected = {"backbone.model.embed_tokens.weight": theirs["transformer.wte.weight"][:V]}
    expected["backbone.lm_head.weight"] = theirs["lm_head.weight"][:V]
    for i in range(L):
        layer, h = f"backbone.model.layers.{i}.", f"transformer.h.{i}."
        W_g = theirs[f"{h}attn.triple_gate.weight"]
        expected |= {
            f"{layer}self_attn.q_proj.weight": turned(theirs[f"{h}attn.c_q.weight"]),
            f"{layer}self_attn.k_proj.weight": turned(theirs[f"{h}attn.c_k.weight"]),
            f"{layer}self_attn.v_proj.weight": theirs[f"{h}attn.c_v.weight"],
            f"{layer}self_attn.o_proj.weight": theirs[f"{h}attn.c_proj.weight"],
            f"{layer}self_attn.value_gate.weight": W_g[2 * G :],
            f"{layer}mlp.up_proj.weight": theirs[f"{h}mlp.c_fc.weight"],
            f"{layer}mlp.down_proj.weight": theirs[f"{h}mlp.c_proj.weight"],
            f"{layer}scale.alpha": theirs["resid_lambdas"][i : i + 1],
            f"{layer}scale.beta": theirs["x0_lambdas"][i : i + 1],
            f"backbone.model.value_tables.{i}.weight": theirs[f"interleaved_init_value_embeds.{i}.weight"][:V],
            f"undertow.residual_{i}.scale": theirs["interleaved_lambdas"][i : i + 1],
            f"undertow.gate_{i}.gate.weight": W_g[: 2 * G],
            f"undertow.memory_key_{i}.weight": turned(theirs[f"interleaved_key_projections.{i}.W_v.weight"]),
            f"undertow.memory_value_{i}.weight": theirs[f"interleaved_projections.{i}.W_v.weight"],
        }
    assert set(ours) == set(expected)
    for name, x in expected.items():
        assert torch.equal(ours[name], x), name


def test_our_modules_are_exactly_those_of_a_model():
    model = build(time=ut.LRT(-1, shared=False, gate_channels=C), head_dim=E)
    mine = {name: x.shape for name, x in model.state_dict().items() if name.startswith("undertow.")}
    found = {name: x.shape for name, x in ours_of(published()).items() if name.startswith("undertow.")}
    assert found == mine


def heads(x_TK):
    return x_TK.unflatten(-1, (-1, E)).transpose(0, 1)


def rotated(x_HTE, sign, rounded=False):
    """Rotary embedding by `sign * t / 10000^(2i/E)`, halves of a head as real and imaginary parts.

    `rounded`: cosines and sines in bfloat16, as the release keeps them.
    """
    angle_TE = torch.arange(x_HTE.shape[1], dtype=torch.float64)[:, None]
    angle_TE = sign * angle_TE * 10000 ** -(torch.arange(0, E, 2, dtype=torch.float64) / E)
    cos_TE, sin_TE = angle_TE.cos(), angle_TE.sin()
    if rounded:
        cos_TE, sin_TE = cos_TE.bfloat16().double(), sin_TE.bfloat16().double()
    a, b = x_HTE.chunk(2, -1)
    return torch.cat([a * cos_TE - b * sin_TE, a * sin_TE + b * cos_TE], -1)


def test_turning_the_other_way_gives_the_same_scores():
    theirs, ours = published(), ours_of(published())
    a = torch.randn(7, D, dtype=torch.float64)
    q, k = (rotated(heads(a @ theirs[f"transformer.h.1.attn.c_{n}.weight"].T), -1) for n in "qk")
    mine = [rotated(heads(a @ ours[f"backbone.model.layers.1.self_attn.{n}_proj.weight"].T), 1) for n in "qk"]
    scores = q @ k.repeat_interleave(H // G, 0).transpose(1, 2)
    assert torch.allclose(mine[0] @ mine[1].repeat_interleave(H // G, 0).transpose(1, 2), scores, rtol=1e-12)
    wrong = rotated(heads(a @ theirs["transformer.h.1.attn.c_q.weight"].T), 1)
    assert not torch.allclose(wrong @ mine[1].repeat_interleave(H // G, 0).transpose(1, 2), scores, rtol=1e-2)


@pytest.mark.parametrize("c", [C, D])
@torch.no_grad()
def test_gate_is_the_published_formula(c):
    """`v = g_loc v_loc + g_mem v_mem`, `(g_loc, g_mem, g_tok) = 2 sig(W_g a[0:c])`, from their rows."""
    theirs = published(c=c)
    model = build(time=ut.LRT(-1, shared=False, gate_channels=c), head_dim=E)
    ours = {n.removeprefix("undertow."): x for n, x in ours_of(theirs).items() if n.startswith("undertow.")}
    model.undertow.load_state_dict(ours)
    a, m = (torch.randn(2, 5, D, dtype=torch.float64) for _ in range(2))
    local = torch.randn(2, 5, G * E, dtype=torch.float64)
    gates = 2 * torch.sigmoid(a[..., :c] @ theirs["transformer.h.1.attn.triple_gate.weight"].T)
    carried = m @ theirs["interleaved_projections.1.W_v.weight"].T
    g_loc, g_mem, _ = gates[..., None].split(G, -2)
    expected = g_loc * local.unflatten(-1, (G, E)) + g_mem * carried.unflatten(-1, (G, E))
    mixed = model.undertow["gate_1"](local, model.undertow["memory_value_1"](m), a)
    assert torch.allclose(mixed, expected.flatten(-2), rtol=1e-12)


def test_gates_without_memory_and_rows_that_fit_no_head():
    gate, table = torch.randn(G, C), torch.randn(PADDED, G * E)
    ours = ours_of({"transformer.h.3.attn.ve_gate.weight": gate, "value_embeds.3.weight": table})
    assert set(ours) == {"backbone.model.layers.3.self_attn.value_gate.weight", "backbone.model.value_tables.3.weight"}
    assert torch.equal(ours["backbone.model.layers.3.self_attn.value_gate.weight"], gate)
    assert set(ours_of(published("ve_gate"))) == set(ours_of(published()))
    with pytest.raises(ValueError, match="triple_gate.weight has 6 rows: 3 key/value heads need 3 or 9"):
        unstacked(published(), V, 3, E)
    with pytest.raises(ValueError, match="c_q.weight has 32 rows: no multiple of the head width, 12"):
        unstacked(published(), V, G, 12)


def test_config():
    found = read_lrt(CONFIG | {"interleaved_num_passes": 3})
    assert found.training == "Interleaved(S=3)"
    sizes = {"num_hidden_layers": L, "num_key_value_heads": G, "value": "every", "value_gate_channels": C}
    assert sizes.items() <= found.backbone.items()
    assert found.time["gate_channels"] == C and read_lrt(CONFIG | {"ve_gate_channels": 0}).time["gate_channels"] is None
    refined = CONFIG | {"use_interleaved": False, "use_multi_refine": True}
    assert read_lrt(refined).training == "Jacobi(K=2, loss='mean')"
    assert read_lrt(refined | {"multi_refine_loss_weights": [1, 3, 6]}).training == "Jacobi(K=2, loss=(1, 3, 6))"
    with pytest.raises(ValueError, match="a plain model"):
        read_lrt(CONFIG | {"use_interleaved": False})
    with pytest.raises(ValueError, match="n_kv_head is missing"):
        read_lrt({k: v for k, v in CONFIG.items() if k != "n_kv_head"})


def write(folder, tensors):
    """A folder as nanochat leaves it: two steps of everything."""
    folder.mkdir()
    for step in (100, 200):
        (folder / f"meta_{step:06}.json").write_text(json.dumps({"step": step, "model_config": CONFIG}))
        torch.save({n: x * (step / 200) for n, x in tensors.items()}, folder / f"model_{step:06}.pt")
    torch.save({"state": torch.zeros(1)}, folder / "optim_000200_rank0.pt")
    return folder


def test_the_newest_step_is_read(tmp_path):
    folder = write(tmp_path / "theirs", {"x": torch.ones(1)})
    assert convert.read_config(folder) == CONFIG
    assert convert.read_tensors(folder) == {"x": torch.ones(1)}


def norm(x):
    return F.rms_norm(x, x.shape[-1:], eps=2.0**-23)


def recurrence(w, tokens) -> torch.Tensor:
    """Section 2 of the paper, token by token, everything computed again each time: logits `_TV`."""
    left, logits = [], []  # what each token leaves behind
    window = CONFIG["sequence_len"] // 2
    for t in range(len(tokens)):
        seen = tokens[: t + 1]
        m = torch.stack([torch.zeros(D, dtype=torch.float64), *left])
        x0 = x = norm(w["transformer.wte.weight"][seen])
        ago = torch.arange(t + 1)[:, None] - torch.arange(t + 1)[None]
        for i in range(L):
            h = f"transformer.h.{i}."
            u = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0 + w["interleaved_lambdas"][i] * m
            a = norm(u)
            q, k, v = (heads(a @ w[f"{h}attn.c_{n}.weight"].T) for n in "qkv")
            gates_TR = 2 * torch.sigmoid(a[:, :C] @ w[f"{h}attn.triple_gate.weight"].T)
            g_loc, g_mem, g_tok = gates_TR.T[..., None].split(G)
            k = g_loc * k + g_mem * heads(m @ w[f"interleaved_key_projections.{i}.W_v.weight"].T)
            v = g_loc * v + g_mem * heads(m @ w[f"interleaved_projections.{i}.W_v.weight"].T)
            v = v + g_tok * heads(w[f"interleaved_init_value_embeds.{i}.weight"][seen])
            q, k = norm(rotated(q, -1, rounded=True)), norm(rotated(k, -1, rounded=True))
            short = CONFIG["window_pattern"][i % 3] == "S" and i < L - 1
            allowed = (ago >= 0) & (ago <= (window if short else t))
            scores = q @ k.repeat_interleave(H // G, 0).transpose(1, 2) / math.sqrt(E)
            y = scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v.repeat_interleave(H // G, 0)
            x = u + y.transpose(0, 1).flatten(1) @ w[f"{h}attn.c_proj.weight"].T
            x = x + (norm(x) @ w[f"{h}mlp.c_fc.weight"].T).relu().square() @ w[f"{h}mlp.c_proj.weight"].T
        left.append(norm(x[-1]))
        logits.append(15 * torch.tanh(left[-1] @ w["lm_head.weight"][:V].T / 15))
    return torch.stack(logits)


@torch.no_grad()
def test_imported_model_is_the_published_recurrence(tmp_path):
    pytest.importorskip("undertow.backbone.nanochat", reason="needs the backbone that LRT stands on")
    theirs = published()
    found = import_checkpoint(write(tmp_path / "theirs", theirs), tmp_path / "ours")
    assert (found.backbone, found.training) == ("undertow_nanochat", "Interleaved(S=2)")
    model = ut.UndertowForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float64).eval()
    x = ids(2, 9)
    expected = torch.stack([recurrence(theirs, row) for row in x])
    for schedule in (ut.Sequential(), ut.Converge()):
        assert gap(model(x, schedule=schedule).logits, expected) < 1e-9
    assert gap(model(x, schedule=ut.Jacobi(0)).logits, expected) > 1e-3
