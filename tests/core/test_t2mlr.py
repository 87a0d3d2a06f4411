"""T2MLR as a whole: its recurrence written out, its options, and the published code's wrong results as regressions."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import matrix
import undertow as ut
from matrix import Case, padded
from models import CONFIGS, V, build, gap, gradient_gap, gradients, ids, randomise
from rounding import assert_same, same
from undertow import reference
from undertow.methods import Method
from undertow.methods.t2mlr import MIXERS, LowRank
from undertow.recipe import component

T = 11
LOW = {"mixer_options": {"bottleneck": 8}}
BASELINES = {"baseline_coconut": {}, "baseline_codi": LOW}  # they replace x: token t itself is not seen where mixed
every_mixer = pytest.mark.parametrize("mixer", MIXERS)
every_carry = pytest.mark.parametrize("carry", [None, "residual", "skip"])


def of(mixer, **fields):
    return ut.T2MLR(1, 2, mixer=mixer, **BASELINES.get(mixer, {}), **fields)


def weighted(logits):
    w = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (logits * w).sum()


# ---------------------------------------------------------------------- the recurrence


def N(y):
    return y * (1 / ((y.detach() ** 2).mean(-1, keepdim=True) + 1e-6).sqrt()).clamp(0.2, 5)


def by_hand(model, x, mask, residual=None, skip=None):
    """Section 1 of the paper, token by token: each token's memory from a full pass over all tokens up to it."""
    gpt2, parts, left, logits = model.backbone.transformer, model.undertow, [], []
    for t in range(x.shape[1]):
        r = torch.stack([torch.zeros(len(x), 32, dtype=torch.float64), *left], 1)
        on = mask[:, : t + 1, None]
        h = gpt2.wte(x[:, : t + 1]) + gpt2.wpe(torch.arange(t + 1))
        h = gpt2.h[0](h)
        h = torch.where(on, parts["memory_mixer"](h, r @ parts["memory_projection"].weight.T, h), h)
        h = gpt2.h[2](gpt2.h[1](h))
        if skip:
            h = torch.where(on, h + skip(r), h)
        logits.append(model.backbone.lm_head(gpt2.ln_f(gpt2.h[3](h)))[:, -1])
        left.append((torch.where(on, residual(h, r), h) if residual else h)[:, -1])
    return torch.stack(logits, 1), torch.stack(left, 1)


@pytest.mark.parametrize(
    "fields, update",
    [
        ({}, {}),
        ({"carry": "residual"}, {"residual": lambda h, r: N(h + r.detach())}),
        (
            {"carry": "residual", "carry_weight": 0.3, "carry_norm": False, "carry_detach": False},
            {"residual": lambda h, r: h + 0.3 * r},
        ),
        ({"carry": "skip"}, {"skip": lambda r: N(r.detach())}),
        ({"carry": "skip", "carry_weight": 3.0, "carry_detach": False}, {"skip": lambda r: N(3 * r)}),
        ({"carry": "skip", "carry_weight": -0.4, "carry_norm": False}, {"skip": lambda r: -0.4 * r.detach()}),
    ],
    ids=lambda given: ",".join(f"{k}={v}" for k, v in given.items() if not callable(v)),
)
def test_recurrence_written_out(fields, update):
    model, x = build("gpt2", time=ut.T2MLR(1, 2, **fields)), ids(2, 7)
    mask = torch.tensor([[True] * 7, [False, False, True, True, False, True, True]])
    logits, memory = by_hand(model, x, mask, **update)
    expected = gradients(model, weighted(logits))
    for schedule in (ut.Sequential(), ut.Converge()):
        out = model(x, memory_mask=mask, schedule=schedule)
        assert gap(out.logits, logits) < 1e-9 and gap(out.memory, memory) < 1e-9
        assert gradient_gap(gradients(model, weighted(out.logits)), expected) < 1e-8
    mine, left = reference.recur(model, x, memory_mask=mask)
    assert gap(mine, logits) < 1e-9 and gap(left[:, :, 0], memory) < 1e-9


@every_mixer
@pytest.mark.parametrize("D", [1, 3, 5])
@torch.no_grad()
def test_unmixed_start_is_exact_below_the_number_of_sweeps(mixer, D):
    """The published training forward: D sweeps after an unmixed one give positions 0..D-1, and not D."""
    model, x = build("gpt2", time=of(mixer)), ids(2, T)
    true = reference.recur(model, x)[0]
    logits = model(x, schedule=ut.Jacobi(D, start="unmixed")).logits
    assert gap(logits[:, :D], true[:, :D]) < 1e-12
    assert gap(logits[:, D], true[:, D]) > 1e-10
    mask = torch.arange(T).expand(2, T) >= 4  # a plain prompt: its positions are exact too
    true = reference.recur(model, x, memory_mask=mask)[0]
    logits = model(x, memory_mask=mask, schedule=ut.Jacobi(D, start="unmixed")).logits
    assert gap(logits[:, : 4 + D], true[:, : 4 + D]) < 1e-12
    assert gap(logits[:, 4 + D], true[:, 4 + D]) > 1e-10


@pytest.mark.parametrize("mixer", ["gated", "alpha_coupled", "var_norm_gated"])
@pytest.mark.parametrize("schedule", [ut.Jacobi(4, start="unmixed"), ut.Cyclic(4, 2, adjoint=2)], ids=str)
def test_only_gammas_have_gradient_while_they_are_zero(mixer, schedule):
    model = randomise(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).double()).eval()
    model = ut.wrap(model, time=of(mixer))
    x = ids(2, T)
    found = gradients(model, model(x, labels=x, schedule=schedule).loss)
    for name, g in found.items():
        if name.startswith("undertow."):
            assert bool(g.any()) == (".scale" in name), name


@every_mixer
@every_carry
def test_wrapped_models_leave_their_start(mixer, carry):
    """Nothing is closed for good: after a few steps every added parameter has moved."""
    torch.manual_seed(3)
    base = randomise(AutoModelForCausalLM.from_config(CONFIGS["gpt2"]()).double()).eval()
    x = ids(2, T)
    plain = base(x).logits
    model = ut.wrap(base, time=of(mixer, carry=carry))
    assert_same(model(x, schedule=ut.Jacobi(0)).logits, plain)
    assert gap(model(x).logits, plain) < 1e-12
    before = {n: p.detach().clone() for n, p in model.undertow.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        model(x, labels=x, schedule=ut.Jacobi(3)).loss.backward()
        optimiser.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.undertow.named_parameters())


@every_carry
def test_detach_takes_the_memory_as_a_constant(carry):
    """`connection_detach`: every schedule has the gradient of one pass that reads a memory of constants."""
    x, live = ids(2, T), {"carry_detach": False} if carry else {}
    constant = build("gpt2", time=ut.T2MLR(1, 2, carry=carry, **live))
    model = build("gpt2", time=ut.T2MLR(1, 2, carry=carry, detach=True))

    def renamed(values):
        return {n.replace("memory_projection", "memory_projection.project"): v for n, v in values.items()}

    model.load_state_dict(renamed(constant.state_dict()))
    once = renamed(gradients(constant, weighted(constant(x, schedule=ut.Jacobi(T, backward=0)).logits)))
    true = renamed(gradients(constant, weighted(reference.recur(constant, x)[0])))
    assert gradient_gap(once, true) > 1e-2  # the comparisons below can fail
    for schedule in (ut.Sequential(), ut.Jacobi(T), ut.Cyclic(4, 3, adjoint=2), ut.Converge(), model.schedule):
        out = model(x, schedule=schedule)
        assert gradient_gap(gradients(model, weighted(out.logits)), once) < 1e-8, schedule
    assert gradient_gap(gradients(model, weighted(reference.recur(model, x)[0])), once) < 1e-9
    assert once["undertow.memory_projection.project.weight"].any()  # the map itself is trained


# ---------------------------------------------------------------------- what the published code gets wrong


@pytest.mark.parametrize("carry", ["residual", "skip"])
def test_weight_zero_is_no_carry(carry):
    """It raised an unbound variable."""
    plain, model = (
        build("gpt2", time=ut.T2MLR(1, 2, **f)) for f in ({}, dict(carry=carry, carry_weight=0.0, carry_norm=False))
    )
    model.load_state_dict(plain.state_dict(), strict=False)
    x = ids(2, T)
    for schedule in (ut.Sequential(), ut.Jacobi(2, start="unmixed"), ut.Cyclic(4, 1), ut.Interleaved(3)):
        assert gap(model(x, schedule=schedule).logits, plain(x, schedule=schedule).logits) < 1e-12
    assert gap(greedy(model, x).logits, greedy(plain, x).logits) < 1e-9


def greedy(model, x):
    """Logits of cached decoding, as an output."""
    cache = None
    for t in range(x.shape[1]):
        out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    return out


def test_skip_does_not_depend_on_batch_mates():
    model, x = build("gpt2", time=ut.T2MLR(1, 2, carry="skip")), ids(2, 8)
    mask = torch.tensor([[0] * 6 + [1] * 2, [0] * 2 + [1] * 6])
    both = model(x, memory_mask=mask).logits
    for b in range(2):
        assert gap(both[b], model(x[b : b + 1], memory_mask=mask[b : b + 1]).logits[0]) < 1e-12


def test_settings_of_the_map_of_the_memory_reach_the_module():
    """They were dropped by every mixer."""
    options = {"bottleneck": 5, "layers": 3, "activation": "silu"}
    for time in (
        ut.T2MLR(1, 2, project="mlp", project_options=options),
        ut.T2MLR(1, 2, mixer="baseline_coconut", project="mlp", project_options=options, detach=True),
    ):
        made = build("gpt2", time=time).undertow["memory_projection"]
        made = made.project if time.detach else made
        assert isinstance(made, LowRank)
        assert [type(layer).__name__ for layer in made.net] == ["Linear", "SiLU", "Linear", "SiLU", "Linear"]
        assert [tuple(layer.weight.shape) for layer in made.net[::2]] == [(5, 32), (5, 5), (32, 5)]


def test_settings_of_the_mixer_reach_the_module():
    options = {"layers": 3, "hidden": 7, "activation": "relu", "normalize": True, "detach_m": True, "vector": True}
    mixer = build("gpt2", time=of("gated", pre_norm="layernorm", post_norm=True, mixer_options=options)).undertow
    mixer = mixer["memory_mixer"]
    assert [tuple(p.shape) for p in mixer.gate_m.parameters() if p.ndim == 2] == [(7, 64), (7, 7), (32, 7)]
    assert type(mixer.gate_x[1]) is torch.nn.ReLU and mixer.normalize and mixer.detach_m and not mixer.detach_x
    assert mixer.scale_m.shape == (32,) and type(mixer.norm_m) is torch.nn.LayerNorm and mixer.post_norm


@pytest.mark.parametrize("name", ["constant_weight", "concat", "baseline_coconut", "baseline_codi"])
def test_a_post_norm_that_the_published_mixer_leaves_out_is_said(name):
    options = {"bottleneck": 8} if name == "baseline_codi" else {}
    with pytest.warns(UserWarning, match=f"post_norm=True: mixer='{name}' does not apply it"):
        asked = ut.T2MLR(1, 2, mixer=name, post_norm=True, mixer_options=options)
    plain = ut.T2MLR(1, 2, mixer=name, mixer_options=options)
    mine, x = build(time=asked), ids()
    assert gap(mine(x).logits, build(time=plain)(x).logits) < 1e-12


@pytest.mark.parametrize("fields", [{}, {"carry": "residual"}, {"carry": "skip"}], ids=str)
@pytest.mark.parametrize("pre_norm", [None, "rmsnorm"])
def test_strength_scales_what_the_memory_brings_in(fields, pre_norm, tmp_path):
    """The published curriculum set an attribute that nothing read."""
    model, x = build("gpt2", time=ut.T2MLR(1, 2, pre_norm=pre_norm, **fields)), ids(2, T)
    full = model(x).logits
    buffers = [module.strength for module in model.undertow.modules() if hasattr(module, "strength")]
    assert len(buffers) == (2 if fields.get("carry") == "skip" else 1) and all(b == 1 for b in buffers)
    for buffer in buffers:
        buffer.fill_(0.0)
    for schedule in (ut.Sequential(), ut.Jacobi(3), ut.Cyclic(4, 1)):  # as if no token left any memory
        assert gap(model(x, schedule=schedule).logits, model(x, schedule=ut.Jacobi(0)).logits) < 1e-12
    for buffer in buffers:
        buffer.fill_(0.25)
    part = model(x).logits
    assert gap(part, full) > 1e-3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert loaded.undertow["memory_mixer"].strength == 0.25 and same(loaded(x).logits, part)
    if pre_norm is None and not fields:
        for buffer in buffers:
            buffer.fill_(1.0)
        model.undertow["memory_projection"].weight.data.mul_(0.25)
        assert gap(model(x).logits, part) < 1e-12


# ---------------------------------------------------------------------- the baselines, with control flow

REPLACE = [Case("gpt2", None, of(mixer)) for mixer in BASELINES]
replacing = pytest.mark.parametrize("case", REPLACE, ids=str)
FREE = [  # rows of the matrix that hold though a mixed token is not seen
    matrix.row_1_identity_at_start,
    matrix.row_3_cached_equals_full,
    matrix.row_4_padded_equals_single,
    matrix.row_6_exact_limits,
    matrix.row_7_packed_equals_separate,
    matrix.row_9_generate,
]


@replacing
@pytest.mark.parametrize("row", FREE, ids=lambda row: row.__name__)
def test_baselines_in_the_matrix(case, row):
    row(case)


@replacing
def test_baselines_saved_equals_loaded(case, tmp_path):
    matrix.row_8_saved_equals_loaded(case, tmp_path)


@replacing
def test_baselines_replace_marked_tokens_only(case):
    """Latent tokens amid text: equal to the definition, with gradients; what stood at one does not matter."""
    model, x = case.build(), ids(2, T)
    mask = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    true = reference.recur(model, x, memory_mask=mask)[0]
    expected = gradients(model, weighted(true))
    for schedule in (ut.Sequential(), ut.Jacobi(5, start="unmixed"), ut.Cyclic(4, 3), ut.Converge()):
        out = model(x, memory_mask=mask, schedule=schedule).logits
        assert gap(out, true) < 1e-9, schedule
        assert gradient_gap(gradients(model, weighted(out)), expected) < 1e-7, schedule
    other = torch.where(mask, (x + 5) % V, x)
    top = build("gpt2", time=dataclasses.replace(case.time, start=0))
    assert gap(top(other, memory_mask=mask).logits, top(x, memory_mask=mask).logits) < 1e-12
    x2, pads = padded(x, [0, 3])
    mask[1] = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0, 1, 0, 0]).bool()  # the first real token is latent: it reads zeros
    batch = model(x2, attention_mask=pads, memory_mask=mask).logits
    assert gap(batch[1, 3:], model(x2[1:, 3:], memory_mask=mask[1:, 3:]).logits[0]) < 1e-9


# ---------------------------------------------------------------------- options

WRONG = [
    (dict(mixer="none"), ["mixer='none'", "'gated'", "'baseline_codi'"]),
    (dict(mixer_options={"gian": 1.0}), ["mixer='gated'", "gian=1.0", "'gain'", "'layers'"]),
    (dict(mixer_options={"pre_norm": "rmsnorm"}), ["pre_norm='rmsnorm'", "allowed are ['activation'"]),
    (dict(mixer_options={"gain": "big"}), ["gain='big'", "must be float"]),
    (dict(mixer_options={"vector": 1}), ["vector=1", "must be bool"]),
    (dict(mixer_options={"layers": True}), ["layers=True", "must be int"]),
    (dict(mixer_options={"init_m": "half"}), ["init_m='half'", "float or NoneType"]),
    (dict(mixer="concat", mixer_options={"gain": 1.0}), ["mixer='concat'", "gain=1.0", "no options"]),
    (dict(mixer="baseline_coconut", mixer_options={"identity": True}), ["identity=True", "no options"]),
    (dict(mixer="baseline_codi"), ["bottleneck is missing"]),
    (dict(project="mlp"), ["project='mlp'", "bottleneck is missing"]),
    (dict(project="mlp", project_options={"width": 3}), ["width=3", "'bottleneck'"]),
    (dict(project_options={"bottleneck": 3}), ["project='auto'", "bottleneck=3", "no options"]),
    (dict(project=None, project_options={"layers": 3}), ["project=None", "layers=3", "no options"]),
    (dict(project="cubic"), ["project='cubic'", "'linear'", "'mlp'", "None"]),
    (dict(pre_norm="batchnorm"), ["pre_norm='batchnorm'", "'rmsnorm'", "'layernorm'"]),
    (dict(carry="magic"), ["carry='magic'", "'residual'", "'skip'"]),
    (dict(carry_weight=0.5), ["carry_weight", "0.5", "carry=None"]),
    (dict(carry="skip", carry_detach=False, detach=True), ["carry_detach=False", "detach=True"]),
]
WRONG_WHEN_BUILT = [
    (dict(mixer_options={"layers": 0}), ["layers=0", "at least 1"]),
    (dict(mixer_options={"layers": 2, "activation": "swish"}), ["activation='swish'", "'silu'"]),
    (dict(mixer_options={"hidden": 8}), ["hidden=8", "layers=2"]),
    (dict(mixer_options={"x_branch": False, "normalize": True}), ["normalize=True", "x_branch=False"]),
    (dict(mixer_options={"rezero": False, "vector": True}), ["vector=True", "rezero=True"]),
    (dict(mixer="constant_weight", mixer_options={"weight": 1.5}), ["weight=1.5", "[0, 1]"]),
    (dict(project="mlp", project_options={"bottleneck": 0}), ["inner width 0", "at least 1"]),
    (dict(project="mlp", project_options={"bottleneck": 4, "layers": 1}), ["layers=1", "at least 2"]),
]


@pytest.mark.parametrize("fields, says", WRONG + WRONG_WHEN_BUILT, ids=str)
def test_a_wrong_or_unread_option_is_one_line(fields, says):
    with pytest.raises(ValueError) as error:
        time = ut.T2MLR(1, 2, **fields)
        assert (fields, says) in WRONG_WHEN_BUILT, "should have failed at once"
        build("gpt2", time=time)
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in says), message


def test_options_survive_config_recipe_and_json(tmp_path):
    time = ut.T2MLR(
        1, -2, mixer="var_norm_gated", carry="skip", project="mlp", pre_norm="layernorm", post_norm=True,
        mixer_options={"init": None, "layers": 2, "hidden": 9, "gain": 1}, project_options={"bottleneck": 6},
    )  # fmt: skip
    values = json.loads(json.dumps(time.to_dict()))
    assert Method.from_dict(values, "time") == time == component("time", values) and hash(time) == hash(time)
    assert time != dataclasses.replace(time, mixer_options={})
    text = "T2MLR(1, 2, mixer_options={'gain': 0.1, 'vector': True})"
    assert component("time", text) == ut.T2MLR(1, 2, mixer_options={"gain": 0.1, "vector": True})
    options = {"gain": 0.1}
    time = ut.T2MLR(1, 2, mixer_options=options)
    options["gain"] = 5.0
    assert time.mixer_options == {"gain": 0.1}
    model = ut.from_scratch(CONFIGS["gpt2"](), time=time)
    model.config.save_pretrained(tmp_path)
    assert ut.UndertowConfig.from_pretrained(tmp_path).methods() == (None, time)


def test_auto_takes_the_published_map():
    for mixer in MIXERS:
        modules = build("gpt2", time=of(mixer)).undertow
        published = mixer in ("gated", "concat", "alpha_coupled", "var_norm_gated")
        assert ("memory_projection" in modules) == published
    for mixer in ("constant_weight", "gated"):
        assert "memory_projection" in build("gpt2", time=of(mixer, project="linear")).undertow
        assert "memory_projection" not in build("gpt2", time=of(mixer, project=None)).undertow


def test_half_precision_checkpoint(tmp_path):
    """Orthogonal starts know no half precision; loading in it must not meet them."""
    time = ut.T2MLR(1, 2, project="mlp", project_options={"bottleneck": 8})
    ut.from_scratch(CONFIGS["llama"](), time=time).bfloat16().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    loss = model(ids(), labels=ids()).loss
    assert model.undertow["memory_projection"].scale.dtype == torch.bfloat16 and loss.isfinite()
