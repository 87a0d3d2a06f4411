"""Optimisers: who gets which rule, Muon and AdamW as formulas, one state for both, nanochat's table."""

import math

import pytest
import torch
from torch import nn

import undertow as ut
from models import build, ids
from undertow.recipe import RecipeError, Training
from undertow.training import optimisers
from undertow.training.optimisers import MuonAdamW, NanochatMuon, multipliers, nanochat_groups, parameter_groups
from undertow.training.run import freeze

BATCH = 1 << 19


def by_name(model, groups):
    """name -> its group; every trainable parameter is in exactly one."""
    names = {id(p): n for n, p in model.named_parameters()}
    found = {names[id(p)]: group for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert set(found) == {n for n, p in model.named_parameters() if p.requires_grad}
    return found


def carried(**config):
    return build(time=ut.T2MLR(1, 2), **config)


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_matrices_decay_in_every_group_and_nothing_else_does(optimiser):
    """The published code lost the weight decay of every group as soon as one had a multiplier of its own."""
    model = carried()
    settings = Training(
        learning_rate=0.1, weight_decay=0.2, optimiser=optimiser, lr_groups={r"\.gate_m\.": 7.0, r"mlp": 3.0}
    )
    found = by_name(model, parameter_groups(model, settings, BATCH))
    assert len({group["lr"] for group in found.values()}) == 3
    for name, parameter in model.named_parameters():
        assert found[name]["weight_decay"] == (0.2 if parameter.ndim >= 2 else 0.0), name
    made = optimisers.build(model, settings, BATCH)
    assert {group["weight_decay"] for group in made.param_groups} == {0.0, 0.2}, "no default of torch's slips in"


def test_groups_of_the_learning_rate():
    model = carried()
    settings = Training(learning_rate=0.1, recurrent_lr=3.0, lr_groups={"gate": 5.0, r"gate_x\.weight": 7.0})
    found = by_name(model, parameter_groups(model, settings, BATCH))
    factors = {name: group["lr"] / 0.1 for name, group in found.items()}
    assert factors["backbone.model.norm.weight"] == 1.0
    assert factors["backbone.model.layers.0.mlp.gate_proj.weight"] == 5.0, "a pattern is searched for in the whole name"
    assert factors["undertow.memory_mixer.scale_m"] == pytest.approx(3.0)
    assert factors["undertow.memory_mixer.gate_x.bias"] == 5.0
    assert factors["undertow.memory_mixer.gate_x.weight"] == pytest.approx(7.0), "the last match wins"
    with pytest.raises(RecipeError, match="training.lr_groups: 'gate_y' matches no trainable parameter") as caught:
        multipliers(list(found), Training(lr_groups={"gate": 2.0, "gate_y": 3.0}))
    assert "\n" not in str(caught.value)
    model.backbone.requires_grad_(False)
    with pytest.raises(RecipeError, match="'embed_tokens'"):
        parameter_groups(model, Training(lr_groups={"embed_tokens": 2.0}), BATCH)


def test_multiplier_zero_freezes():
    model = carried()
    settings = Training(learning_rate=0.1, weight_decay=0.2, lr_groups={"^backbone": 0.0})
    optimiser = optimisers.build(model, settings, BATCH)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()(ids(), labels=ids()).loss.backward()
    optimiser.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("undertow.") for name in changed)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_muon_takes_the_hidden_matrices(family):
    model = build(family, depth=ut.TRMBlock(layers=1), time=ut.LRT())
    found = by_name(model, parameter_groups(model, Training(optimiser="muon"), BATCH))
    inside = ("layers.", ".h.", "undertow.")
    for name, parameter in ((n, p) for n, p in model.named_parameters() if p.requires_grad):
        assert found[name]["muon"] == (parameter.ndim == 2 and any(part in name for part in inside)), name
    assert {group["muon"] for group in found.values()} == {True, False}


def test_what_never_learns_stays_out_when_parts_are_frozen():
    """Start vectors that no gradient reaches: a process of several would wait for one."""
    for cycles, learned in ((1, False), (2, True)):
        model = build("gpt2", depth=ut.TRMBlock(layers=1, outer=2, grad_cycles=cycles))
        freeze(model, "undertow")
        found = by_name(model, parameter_groups(model, Training(), BATCH))
        assert ("undertow.trm_start_z.value_D" in found) == learned and "undertow.trm_0.qkv.weight" in found
        assert all(name.startswith("undertow.") for name in found)


def test_tables_of_embeddings_are_not_matrices():
    model = carried()
    model.undertow["table"] = nn.Embedding(5, 4)
    model.view.layers[0].value_table = nn.Embedding(5, 4)
    hidden = optimisers.hidden_matrices(model)
    assert not any("table" in name for name in hidden) and "undertow.memory_projection.weight" in hidden


def newton_schulz(g):
    """Five steps of the quintic iteration with Jordan's coefficients, in float64 (torch: in bfloat16)."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        s = x @ x.T
        x = 3.4445 * x + (-4.7750 * s + 2.0315 * (s @ s)) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 3), (3, 6)])
def test_a_step_is_the_formula(adjust, shape):
    matrix, vector = (nn.Parameter(torch.randn(size, dtype=torch.float64)) for size in (shape, (5,)))
    groups = [
        {"params": [matrix], "lr": 0.1, "weight_decay": 0.3, "muon": True, "adjust_lr_fn": adjust},
        {"params": [vector], "lr": 0.2, "weight_decay": 0.4, "muon": False, "betas": (0.8, 0.95), "eps": 1e-10},
    ]
    optimiser = MuonAdamW(groups)
    w, v = matrix.detach().clone(), vector.detach().clone()
    buffer, first, second = torch.zeros_like(w), torch.zeros_like(v), torch.zeros_like(v)
    for step in range(1, 5):
        matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
        optimiser.step()
        buffer = 0.95 * buffer + 0.05 * matrix.grad
        update = newton_schulz(0.05 * matrix.grad + 0.95 * buffer)
        size = max(1, shape[0] / shape[1]) ** 0.5 if adjust == "original" else 0.2 * max(shape) ** 0.5
        made = (w * (1 - 0.1 * 0.3) - matrix.detach()) / (0.1 * size)
        torch.testing.assert_close(made, update, rtol=0, atol=0.05)  # of entries of about 0.4
        w = matrix.detach().clone()
        first = 0.8 * first + 0.2 * vector.grad
        second = 0.95 * second + 0.05 * vector.grad**2
        ratio = (first / (1 - 0.8**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-10)
        v = v * (1 - 0.2 * 0.4) - 0.2 * ratio
        torch.testing.assert_close(vector.detach(), v, rtol=1e-9, atol=1e-9)


def test_one_state_for_both(tmp_path):
    """Saved, loaded into a fresh one and stepped on, it goes on bit for bit, the learning rate schedule included."""
    torch.manual_seed(1)
    gradients = torch.randn(6, 2, 4, 4)

    def start():
        torch.manual_seed(2)
        parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
        groups = [{"params": [p], "lr": 0.1, "weight_decay": 0.1, "muon": i == 0} for i, p in enumerate(parameters)]
        optimiser = MuonAdamW(groups)
        return parameters, optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))

    def go(parameters, optimiser, scheduler, steps):
        for step in steps:
            for parameter, gradient in zip(parameters, gradients[step], strict=True):
                parameter.grad = gradient.clone()
            optimiser.step()
            scheduler.step()

    whole = start()
    go(*whole, range(6))
    half = start()
    go(*half, range(3))
    torch.save([half[1].state_dict(), half[2].state_dict()], tmp_path / "state.pt")
    resumed = start()
    with torch.no_grad():
        for mine, theirs in zip(resumed[0], half[0], strict=True):
            mine.copy_(theirs)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed[1].load_state_dict(saved[0])
    resumed[2].load_state_dict(saved[1])
    go(*resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(resumed[0], whole[0], strict=True))
    assert [group["lr"] for group in resumed[1].param_groups] == pytest.approx([0.1 / 7, 0.1 / 7])
    assert {len(state) for state in whole[1].state.values()} == {1, 3}, "a momentum; a step and two moments"
    closure = torch.tensor(3.0)
    assert whole[1].step(lambda: closure) is closure


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))


def nanochat_like():
    """A llama with the names of the nanochat backbone's own parameters added."""
    model = build(time=ut.LRT(source=2))
    base, width = model.backbone.model, model.view.shape.width
    base.value_tables = nn.ModuleList([nn.Embedding(43, width)])
    for layer in base.layers:
        layer.scale = Scale()
        layer.self_attn.value_gate = nn.Linear(width, 4, bias=False)
    return model, width


def test_nanochat_groups_are_the_published_table():
    model, width = nanochat_like()
    s, b = (width / 768) ** -0.5, math.sqrt(2**17 / 2**19)
    assert b == 0.5
    found = by_name(model, nanochat_groups(model, 2**17, weight_decay=0.7))
    adamw = {
        "backbone.model.embed_tokens.weight": (0.3 * s, (0.8, 0.95)),
        "backbone.model.value_tables.0.weight": (0.3 * s, (0.8, 0.95)),
        "backbone.lm_head.weight": (0.004 * s, (0.8, 0.95)),
        "backbone.model.layers.1.scale.alpha": (0.005, (0.8, 0.95)),
        "backbone.model.layers.1.scale.beta": (0.5, (0.96, 0.95)),
        "undertow.residual_3.scale": (0.5, (0.8, 0.95)),
    }
    for name, (rate, betas) in adamw.items():
        group = found[name]
        assert not group["muon"] and group["betas"] == betas and group["eps"] == 1e-10 and group["weight_decay"] == 0
        assert group["lr"] == pytest.approx(rate * b), name
    muon = (
        *(f"backbone.model.layers.0.self_attn.{part}_proj.weight" for part in "qkvo"),
        "backbone.model.layers.0.self_attn.value_gate.weight",
        *(f"backbone.model.layers.3.mlp.{part}_proj.weight" for part in ("up", "down")),
        *(f"undertow.{part}.weight" for part in ("gate_0.gate", "memory_key", "memory_value")),
    )
    for name in muon:
        group = found[name]
        assert group["muon"] and group["adjust_lr_fn"] == "original" and group["weight_decay"] == 0.7, name
        assert group["lr"] == pytest.approx(0.02 * b), name


def test_nanochat_rates_keep_their_ratio():
    model, _ = nanochat_like()
    published = by_name(model, nanochat_groups(model, BATCH))
    settings = Training(optimiser="nanochat", learning_rate=0.05, weight_decay=0.3, lr_groups={r"\.gate\.": 4.0})
    chosen = by_name(model, parameter_groups(model, settings, BATCH))
    for name, group in chosen.items():
        factor = 2.5 * (4.0 if ".gate." in name else 1.0)
        assert group["lr"] == pytest.approx(published[name]["lr"] * factor), name
        assert group["weight_decay"] == (0.3 if group["muon"] else 0.0)
    assert isinstance(optimisers.build(model, settings, BATCH), MuonAdamW)


def test_nanochat_muon_over_time():
    class State:
        max_steps = 1000

    matrix, vector = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3))
    groups = [
        {"params": [matrix], "lr": 0.1, "weight_decay": 0.2, "muon": True},
        {"params": [vector], "lr": 0.1, "weight_decay": 0.0, "muon": False},
    ]
    optimiser = MuonAdamW(groups)
    for step, momentum, decay in ((0, 0.85, 0.2), (150, 0.90, 0.17), (300, 0.95, 0.14), (900, 0.95, 0.02)):
        State.global_step = step
        NanochatMuon(0.2).on_step_begin(None, State, None, optimizer=optimiser)
        muon, adamw = optimiser.param_groups
        assert (muon["momentum"], muon["weight_decay"]) == pytest.approx((momentum, decay))
        assert adamw["weight_decay"] == 0.0 and "momentum" not in adamw
        buffer = optimiser.state[matrix].get("momentum_buffer", torch.zeros(3, 3)).clone()
        matrix.grad, vector.grad = torch.randn(3, 3), torch.randn(3)
        optimiser.step()
        expected = momentum * buffer + (1 - momentum) * matrix.grad
        torch.testing.assert_close(optimiser.state[matrix]["momentum_buffer"], expected)
