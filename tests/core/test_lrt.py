"""LRT on the backbone it was published with, against its equations and schedules written out (arXiv 2605.26797)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import matrix
import undertow as ut
from matrix import Case, T
from models import TOLERANCE, V, build, gap, gradient_gap, gradients, ids
from undertow import reference

FAMILY = "undertow_nanochat"
EXACT = TOLERANCE[FAMILY]


def norm(x):
    return x / (x.pow(2).mean(-1, keepdim=True) + 2.0**-23).sqrt()


def rope(x_BSGE, positions):
    """Every pair (x_j, x_{j + E/2}), as a complex number, times exp(i t theta^(-2j/E))."""
    half = x_BSGE.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None, None] * frequency
    z = torch.complex(x_BSGE[..., :half], x_BSGE[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], -1)


class Published:
    """The published functions on a model's own parameters: `run` is F(I, m, KV), the rest are the schedules."""

    def __init__(self, model, tokens):
        self.config, self.lrt, self.tokens = model.view.config, model.time, tokens
        self.p = dict(model.named_parameters())
        self.T, self.L = tokens.shape[1], self.config.num_hidden_layers
        self.x0 = norm(self.p["backbone.model.embed_tokens.weight"][tokens])
        self.source = self.lrt.source % self.L
        self.every = list(range(self.T))

    def layer(self, i, name):
        return self.p[f"backbone.model.layers.{i}.{name}"]

    def maps(self, i, port):
        """P^K or P^V of layer i (None: this injection is off)."""
        on = self.lrt.key if port == "key" else self.lrt.value
        return self.p[f"undertow.memory_{port}{'' if self.lrt.shared else f'_{i}'}.weight"] if on else None

    def gates(self, i, a):
        """g_loc, g_mem, g_tok, each `_BSG1`; 1 where there is none."""
        G, ones = self.config.num_key_value_heads, torch.ones(())
        g_loc = g_mem = g_tok = ones
        if self.lrt.gates and (self.lrt.key or self.lrt.value):
            w = self.p[f"undertow.gate_{i}.gate.weight"]
            g = 2 / (1 + torch.exp(-a[..., : w.shape[1]] @ w.T))
            g_loc, g_mem = g[..., :G, None], g[..., G:, None]
        if self.config.has_table(i):
            w = self.layer(i, "self_attn.value_gate.weight")
            g_tok = (2 / (1 + torch.exp(-a[..., : w.shape[1]] @ w.T)))[..., None]
        return g_loc, g_mem, g_tok

    def run(self, rows, m, KV):
        """Layers on positions I with memory m; `(h_I, logits_I, KV)`."""
        G, E = self.config.num_key_value_heads, self.config.head_dim
        heads, x0, KV = (*m.shape[:2], -1, E), self.x0[:, rows], dict(KV)
        x, source = x0, None
        q_pos, k_pos = torch.tensor(rows)[:, None], torch.tensor(self.every)[None]
        for i in range(self.L):
            u = self.layer(i, "scale.alpha") * x + self.layer(i, "scale.beta") * x0
            if self.lrt.residual:
                u = u + self.p[f"undertow.residual_{i}.scale"] * m
            a = norm(u)
            q, k, v = ((a @ self.layer(i, f"self_attn.{n}_proj.weight").T).view(heads) for n in "qkv")
            g_loc, g_mem, g_tok = self.gates(i, a)
            self.first.setdefault(i, (k, v, g_loc, g_mem, g_tok))
            k, v = self.memory_in(i, rows, k, v, g_loc, g_mem, g_tok, m)
            K, Val = KV.get(i) or (torch.zeros(m.shape[0], self.T, G, E, dtype=x.dtype),) * 2
            KV[i] = K, Val = K.index_copy(1, torch.tensor(rows), k), Val.index_copy(1, torch.tensor(rows), v)
            window = self.config.sliding_window if self.config.layer_types[i] == "sliding_attention" else self.T
            allowed = (k_pos <= q_pos) & (q_pos - k_pos < window)
            q = norm(rope(q, rows)).unflatten(2, (G, -1))
            scores = torch.einsum("bsgre,btge->bgrst", q, K) / E**0.5
            weights = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1)
            y = torch.einsum("bgrst,btge->bsgre", weights, Val).flatten(2)
            x = u + y @ self.layer(i, "self_attn.o_proj.weight").T
            hidden = F.relu(norm(x) @ self.layer(i, "mlp.up_proj.weight").T) ** 2
            x = x + hidden @ self.layer(i, "mlp.down_proj.weight").T
            source = norm(x) if i == self.source else source
        cap = self.config.final_logit_softcapping
        return source, cap * torch.tanh(norm(x) @ self.p["backbone.lm_head.weight"].T / cap), KV

    def memory_in(self, i, rows, k_loc, v_loc, g_loc, g_mem, g_tok, m):
        """The keys and values of positions I, from their local parts and a memory."""
        PK, PV = self.maps(i, "key"), self.maps(i, "value")
        k = k_loc if PK is None else g_loc * k_loc + g_mem * (m @ PK.T).view_as(k_loc)
        v = v_loc if PV is None else g_loc * v_loc + g_mem * (m @ PV.T).view_as(v_loc)
        if self.config.has_table(i):
            v = v + g_tok * self.p[f"backbone.model.value_tables.{i}.weight"][self.tokens[:, rows]].view_as(v)
        return norm(rope(k, rows)), v

    def shift(self, h):
        return torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)

    def initial(self):
        self.first = {}
        return self.run(self.every, torch.zeros_like(self.x0), {})

    def refresh(self, rows, m, KV):
        """Key-value refresh: V += g_mem P^V (m_new - m_old), K_pre likewise; gates and local parts stay the first."""
        for i, (k, v, *gates) in self.first.items():
            parts = [x[:, rows] if x.dim() else x for x in (k, v, *gates)]
            new = self.memory_in(i, rows, *parts, m)
            KV[i] = tuple(old.index_copy(1, torch.tensor(rows), x) for old, x in zip(KV[i], new, strict=True))

    def interleaved(self, S, refresh=False):
        h, logits, KV = self.initial()
        parts = [(logits, self.every, 1.0)]
        for i in range(S):
            rows = self.every[i::S]
            if refresh:
                left = [t for t in self.every if t % S >= i]  # never visited
                self.refresh(left, self.shift(h)[:, left], KV)
            new, logits, KV = self.run(rows, self.shift(h)[:, rows], KV)
            h = h.index_copy(1, torch.tensor(rows), new)
            parts.append((logits, rows, 1.0))
        return parts

    def multi_refine(self, weights, detach=False):
        h, logits, _ = self.initial()
        parts = [(logits, self.every, weights[0])]
        for w in weights[1:]:
            h, logits, _ = self.run(self.every, self.shift(h.detach() if detach else h), {})
            parts.append((logits, self.every, w))
        return parts

    def blocks(self, C):
        """Chunked; C = 1 is the recurrence. Memory crosses the borders of chunks only."""
        self.first, KV, m, whole = {}, {}, torch.zeros_like(self.x0[:, :1]), []
        for start in range(0, self.T, C):
            rows = self.every[start : start + C]
            m = torch.cat([m, torch.zeros_like(self.x0[:, rows[1:]])], 1)
            h, logits, KV = self.run(rows, m, KV)
            m = h[:, -1:]
            whole.append(logits)
        return [(torch.cat(whole, 1), self.every, 1.0)]

    def loss(self, parts):
        """Weighted mean over sweeps of the mean over their own targets."""
        total = 0.0
        for logits, rows, weight in parts:
            within = [j for j, t in enumerate(rows) if t < self.T - 1]
            nats = -torch.log_softmax(logits[:, within], -1)
            total = total + weight * nats.gather(-1, self.tokens[:, [rows[j] + 1 for j in within], None]).mean()
        return total / sum(w for _, _, w in parts)

    def merged(self, parts):
        out = torch.zeros(*self.tokens.shape, V, dtype=torch.float64)
        for logits, rows, _ in parts:
            out = out.index_copy(1, torch.tensor(rows), logits)
        return out


SCHEDULES = {
    "interleaved-1": (ut.Interleaved(1), lambda p: p.interleaved(1)),
    "interleaved-2": (ut.Interleaved(2), lambda p: p.interleaved(2)),
    "interleaved-3": (ut.Interleaved(3), lambda p: p.interleaved(3)),
    "refresh-2": (ut.Interleaved(2, refresh=True), lambda p: p.interleaved(2, refresh=True)),
    "refresh-4": (ut.Interleaved(4, refresh=True), lambda p: p.interleaved(4, refresh=True)),
    "zero-memory": (ut.Jacobi(0), lambda p: p.multi_refine([1.0])),
    "refine-3": (ut.Jacobi(3, loss="mean"), lambda p: p.multi_refine([1.0] * 4)),
    "refine-weights": (ut.Jacobi(2, loss=(0.1, 0.3, 0.6)), lambda p: p.multi_refine([0.1, 0.3, 0.6])),
    "chunked": (ut.Chunked(4), lambda p: p.blocks(4)),
    "sequential": (ut.Sequential(), lambda p: p.blocks(1)),
}
METHODS = {
    "shared": ut.LRT(),
    "layerwise": ut.LRT(1, shared=False, gate_channels=9),
    "keys": ut.LRT(2, residual=False, value=False),
    "values": ut.LRT(2, residual=False, key=False, gate_channels=32),
    "residual": ut.LRT(-2, key=False, value=False),
    "ungated": ut.LRT(gates=False),
}
FULL = [(m, s) for m in METHODS for s in ("interleaved-2", "refresh-2", "sequential")]
FULL += [(m, s) for m in ("shared", "layerwise") for s in SCHEDULES if (m, s) not in FULL]


@pytest.mark.parametrize("method, schedule", FULL)
def test_equations_forward_and_backward(method, schedule):
    """Loss, merged logits and the gradient of every parameter, on windows shorter than the text."""
    model, x = build(FAMILY, time=METHODS[method]), ids(2, T)
    assert model.view.config.sliding_window < T
    ours, theirs = SCHEDULES[schedule]
    mine = model(x, labels=x, schedule=ours)
    written = Published(model, x)
    parts = theirs(written)
    loss = written.loss(parts)
    assert abs(float((mine.loss - loss).detach())) < EXACT
    assert gap(mine.logits, written.merged(parts)) < EXACT
    assert gradient_gap(gradients(model, mine.loss), gradients(model, loss)) < EXACT


@pytest.mark.parametrize("value", ["none", "alternate"])
def test_equations_without_tables_everywhere(value):
    model, x = build(FAMILY, time=ut.LRT(), value=value), ids(2, T)
    written = Published(model, x)
    mine, loss = model(x, labels=x, schedule=ut.Interleaved(2)).loss, written.loss(written.interleaved(2))
    assert abs(float((mine - loss).detach())) < EXACT
    assert gradient_gap(gradients(model, mine), gradients(model, loss)) < EXACT


# ---------------------------------------------------------------------- identities of section 4


def outcome(model, x, schedule):
    out = model(x, labels=x, schedule=schedule)
    return out, gradients(model, out.loss)


@pytest.mark.parametrize("method", ["shared", "layerwise"])
def test_one_subset_is_one_refinement(method):
    model, x = build(FAMILY, time=METHODS[method]), ids(2, T)
    (a, da), (b, db) = (outcome(model, x, s) for s in (ut.Interleaved(1), ut.Jacobi(1, loss="mean")))
    assert gap(a.sweep_losses, b.sweep_losses) < EXACT and gap(a.logits, b.logits) < EXACT
    assert gradient_gap(da, db) < EXACT


@pytest.mark.parametrize("schedule", [ut.Interleaved(T), ut.Interleaved(T, refresh=True), ut.Jacobi(T - 1)], ids=str)
@pytest.mark.parametrize("method", ["shared", "layerwise"])
def test_exact_limits_are_the_recurrence(method, schedule):
    model, x = build(FAMILY, time=METHODS[method]), ids(2, T)
    w = torch.randn(2, T, V, dtype=torch.float64)
    (a, da), (b, db) = (
        (out, gradients(model, (out.logits * w).sum()))
        for out in (model(x, schedule=s) for s in (schedule, ut.Sequential()))
    )
    assert gap(a.logits, b.logits) < EXACT and gap(a.memory, b.memory) < EXACT
    assert gradient_gap(da, db) < EXACT


@torch.no_grad()
def test_positions_up_to_k_are_exact_after_k_refinements_and_no_more():
    model, x = build(FAMILY, time=ut.LRT()), ids(2, T)
    true = model(x, schedule=ut.Sequential()).memory
    for k in range(4):
        memory = model(x, schedule=ut.Jacobi(k)).memory
        assert gap(memory[:, : k + 1], true[:, : k + 1]) < EXACT
        assert gap(memory[:, k + 1], true[:, k + 1]) > 1e-3


@torch.no_grad()
def test_no_memory_is_a_memory_of_zeros():
    """With no memory the key gate cancels in the norm over the head (but for its epsilon): k_loc alone will do."""
    model, x = build(FAMILY, time=ut.LRT()), ids(2, T)
    written = Published(model, x)
    written.memory_in = lambda i, rows, k, v, g_loc, g_mem, g_tok, m: (
        norm(rope(k, rows)),
        g_loc * v + g_tok * written.p[f"backbone.model.value_tables.{i}.weight"][x[:, rows]].view_as(v),
    )
    assert gap(model(x, schedule=ut.Jacobi(0)).logits, written.initial()[1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("method", ["shared", "layerwise"])
def test_without_gamma_and_maps_it_is_the_baseline(method):
    model, x = build(FAMILY, time=METHODS[method]), ids(2, T)
    baseline = model.backbone(x).logits
    for name, p in model.undertow.named_parameters():
        assert name.startswith(("residual_", "memory_", "gate_"))
        p.zero_()
    for schedule in (ut.Jacobi(0), ut.Interleaved(2), ut.Interleaved(2, refresh=True), ut.Sequential()):
        assert gap(model(x, schedule=schedule).logits, baseline) < EXACT, schedule


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_how_far_one_pass_of_refinement_gets(seed):
    """Random weights: stale keys make subsets worse than one whole pass at S = 2; refreshed, they are better."""
    torch.manual_seed(seed)
    sizes = ut.UndertowNanoChatConfig.from_depth(4, hidden_size=64, num_attention_heads=4, vocab_size=V, value="every")
    model = ut.from_scratch(sizes, time=ut.LRT(shared=False)).double().eval()
    for name, p in model.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            p.uniform_(-((3 / 64) ** 0.5), (3 / 64) ** 0.5)
        elif "gate" in name:
            p.normal_(std=1 / 8)
    x = ids(4, 64, seed)
    true = model(x, schedule=ut.Sequential()).memory

    def distance(schedule):
        return float((model(x, schedule=schedule).memory - true).norm() / true.norm())

    one = distance(ut.Jacobi(1))
    assert one < distance(ut.Interleaved(2)) < distance(ut.Jacobi(0))
    for S in (2, 4, 8):
        assert distance(ut.Interleaved(S, refresh=True)) < min(one, distance(ut.Interleaved(S))), S
    assert distance(ut.Interleaved(32)) < distance(ut.Interleaved(16)) < one
    errors = [distance(ut.Jacobi(k)) for k in (2, 3, 4)]
    assert one > errors[0] > errors[1] > errors[2]


def test_detached_refinement_is_a_sum_of_refinements_that_differentiate_their_last_pass():
    """`detach` between passes: the gradient of sum_k w_k L_k with every h^(k-1) held fixed."""
    model, x, weights = build(FAMILY, time=ut.LRT()), ids(2, T), (0.1, 0.3, 0.6)
    published, live = (
        gradients(model, written.loss(written.multi_refine(weights, detach)))
        for written, detach in ((Published(model, x), True), (Published(model, x), False))
    )
    losses = [model(x, labels=x, schedule=ut.Jacobi(k, backward=0)).loss for k in range(3)]
    mine = gradients(model, sum(w * loss for w, loss in zip(weights, losses, strict=True)))
    assert gradient_gap(mine, published) < EXACT
    assert gradient_gap(live, published) > 0.01  # it does cut something


@torch.no_grad()
def test_zero_memory_decoding_equals_the_parallel_pass():
    """The sanity check of the release: token by token, the memory emptied before every token."""
    model, x = build(FAMILY, time=ut.LRT()), ids(2, T)
    parallel, cache, steps = model(x, schedule=ut.Jacobi(0)).logits, None, []
    for t in range(T):
        out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        cache.memory_BND = torch.zeros_like(cache.memory_BND)
        steps.append(out.logits)
    assert gap(torch.cat(steps, 1), parallel) < EXACT


def test_recomputing_visits_and_accumulating_change_no_gradient():
    """As the matrix's row 10, under LRT's own schedules."""
    model, x = build(FAMILY, time=ut.LRT()), ids(4, T)
    for schedule in (ut.Interleaved(2, refresh=True), ut.Jacobi(2, loss="mean")):
        whole = gradients(model, model(x, labels=x, schedule=schedule).loss)
        model.gradient_checkpointing_enable()
        assert gradient_gap(gradients(model, model(x, labels=x, schedule=schedule).loss), whole) < EXACT
        model.gradient_checkpointing_disable()
        count = 4 * (T - 1)
        rows = [
            gradients(model, model(r, labels=r, schedule=schedule, num_items_in_batch=count).loss) for r in x.split(1)
        ]
        assert gradient_gap({n: sum(g[n] for g in rows) for n in whole}, whole) < EXACT


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(residual=False, key=False, value=False), "at least one injection"),
        (dict(gate_channels=0), "gate_channels=0: must be a whole number of at least 1"),
        (dict(gates=False, gate_channels=3), "gates=False, gate_channels=3"),
        (dict(shared=1), "shared=1: must be True or False"),
    ],
)
def test_wrong_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        ut.LRT(**fields)


def test_more_gate_channels_than_width():
    with pytest.raises(ValueError, match="gate_channels=33: the model has a width of 32"):
        build(FAMILY, time=ut.LRT(gate_channels=33))


# ---------------------------------------------------------------------- a memory that is known to be zero


def test_a_single_sweep_reaches_every_parameter():
    """What a memory of zeros adds is left out, but not in training where no other sweep follows (DDP waits for all)."""
    model, x = build(FAMILY, time=ut.LRT()), ids()
    for schedule in (ut.Jacobi(0), ut.Jacobi(1), ut.Interleaved(2)):
        model.zero_grad()
        model(x, labels=x, schedule=schedule).loss.backward()
        assert all(p.grad is not None for p in model.undertow.parameters()), schedule


def test_a_map_with_a_bias_is_not_left_out():
    """It makes something of zeros, which the definition says too."""
    model, x = build(FAMILY, time=ut.LRT()), ids()
    for port in ("key", "value"):
        old = model.undertow[f"memory_{port}"]
        model.undertow[f"memory_{port}"] = torch.nn.Linear(old.in_features, old.out_features).double()
    for schedule in (ut.Jacobi(0), ut.Jacobi(1)):
        with torch.no_grad():
            assert gap(model(x, schedule=schedule).logits, reference.sweep(model, schedule, x)[0]) < 1e-10


# ---------------------------------------------------------------------- the matrix, beyond tests/test_matrix.py

CASES = [
    pytest.param(Case(FAMILY, None, ut.LRT()), marks=pytest.mark.slow),  # as LRT(2) in tests/test_matrix.py
    Case(FAMILY, None, ut.LRT(1, shared=False, gate_channels=9)),
    Case(FAMILY, ut.ReuseMap([2, 1, 3, 1]), ut.LRT(2, gates=False)),
]


@matrix.every_row(CASES)
def test_matrix(row, case, tmp_path):
    matrix.run(row, case, tmp_path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", FAMILY])
@torch.no_grad()
def test_the_memory_has_the_eps_of_the_backbones_norms(family):
    """Seen in small states: with an eps as large as they are, the norm of a memory is not one."""
    name = {"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"}.get(family, "rms_norm_eps")
    model = build(family, time=ut.LRT(1), **{name: 0.5})
    assert {norm for _, norm, _ in model.program.memories} == {0.5}
    memory = model(ids(1, T), schedule=ut.Sequential()).memory
    source = {}
    hook = model.view.layers[1].register_forward_hook(
        lambda m, i, y: source.update(h=y[0] if isinstance(y, tuple) else y)
    )
    model(ids(1, T), schedule=ut.Jacobi(0))
    hook.remove()
    h = source["h"][:, 0]  # the first token reads no memory
    assert gap(memory[:, 0], h / (h.pow(2).mean(-1, keepdim=True) + 0.5).sqrt()) < 1e-5
