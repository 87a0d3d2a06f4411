"""Statistics of gates and norms: what they say, and that looking changes nothing."""

import json

import pytest
import torch
from torch import nn

import undertow as ut
from models import build, gradients, ids
from rounding import same
from undertow.recipe import Recipe
from undertow.training import run
from undertow.training.callbacks import read_metrics
from undertow.training.statistics import Statistics, statistics


class Gates(nn.Module):
    """A mixer with one gate a channel, dropout in it, and scalars."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.dropout = nn.Linear(2 * width, width), nn.Dropout(0.5)
        self.scale_m, self.gamma = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.tensor(0.3))

    def gates(self, x, m, a=None):
        return {"m": torch.sigmoid(self.linear(self.dropout(torch.cat([x, m], -1)))), "x": torch.full_like(x, 0.5)}

    def forward(self, x, m, a):
        return x + self.scale_m * self.gates(x, m)["m"] * m


def test_each_number_is_what_it_says():
    mixer = Gates(4).double().train()
    x, m, y = torch.randn(3, 2, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        mixer.linear.weight.mul_(20)  # gates near both ends
    values = {name: float(value) for name, value in statistics(mixer, x, m, x, y).items()}
    gate = torch.sigmoid(torch.cat([x, m], -1) @ mixer.linear.weight.T + mixer.linear.bias).flatten().tolist()
    n, mean = len(gate), sum(gate) / len(gate)
    expected = {
        "gate_m_mean": mean,
        "gate_m_std": (sum((g - mean) ** 2 for g in gate) / n) ** 0.5,
        "gate_m_min": min(gate),
        "gate_m_max": max(gate),
        "gate_m_closed": sum(g < 0.05 for g in gate) / n,
        "gate_m_open": sum(g > 0.95 for g in gate) / n,
        **{f"gate_x_{name}": 0.5 for name in ("mean", "min", "max")},
        **{f"gate_x_{name}": 0.0 for name in ("std", "closed", "open")},
        **{f"norm_{k}": float((t**2).sum(-1).sqrt().mean()) for k, t in (("x", x), ("m", m), ("out", y))},
        "scale_m": 0.7,
        "gamma": 0.3,
    }
    assert 0 < expected["gate_m_closed"] < 1 and 0 < expected["gate_m_open"] < 1
    assert values == pytest.approx(expected, rel=1e-5)
    assert mixer.training and mixer.dropout.training


def with_gates(**keywords):
    model = build(time=ut.T2MLR(1, 2), **keywords).train()
    model.undertow["memory_mixer"] = Gates(32).double()
    return model


def hooks(model):
    return [len(module._forward_hooks) for module in model.modules()]


@pytest.mark.parametrize("schedule", [ut.Jacobi(3), ut.Cyclic(4, 2, adjoint=2), ut.Interleaved(2)], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_last_call_of_a_forward(schedule, checkpointing):
    """Under any sweeps, also where backward runs calls again; gradients and random numbers are untouched."""
    model = with_gates()
    model.checkpointing = checkpointing

    def once():
        torch.manual_seed(3)
        return gradients(model, model(ids(), labels=ids(), schedule=schedule).loss), torch.rand(1)

    model(ids())  # hooks the taps
    expected, before = once(), hooks(model)
    calls = []
    spy = model.undertow["memory_mixer"].register_forward_hook(lambda mixer, xma, y: calls.append((*xma, y)))
    model.register_forward_hook(lambda *_: spy.remove())  # backward may call again
    watching = Statistics()
    watching.watch(model)
    found = once()
    assert len(calls) > 1 and torch.equal(found[1], expected[1])
    assert all(same(found[0][name], expected[0][name]) for name in expected[0])
    last = {name: float(value) for name, value in statistics(model.undertow["memory_mixer"], *calls[-1]).items()}
    values = watching.take()
    assert values == pytest.approx({f"gates/memory_mixer/{name}": value for name, value in last.items()})
    assert watching.take() == {} and not watching.calls and sum(hooks(model)) == sum(before) + 1
    once()
    assert watching.take() == {}, "one forward only"


def test_gates_are_looked_at_outside_autocast():
    """In it, torch before 2.11 would go on training with the weights that a look without gradient had cast."""
    mixer, (x, m) = Gates(32), torch.randn(2, 3, 5, 32)
    expected = statistics(mixer, x, m, x, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert mixer.gates(x, m)["m"].dtype == torch.bfloat16
        values = statistics(mixer, x, m, x, x)
        of_bfloat16 = statistics(mixer, x.bfloat16(), m.bfloat16(), x, x)
    assert values.keys() == expected.keys() and all(same(values[name], expected[name]) for name in expected)
    assert float(of_bfloat16["gate_m_mean"]) == pytest.approx(float(expected["gate_m_mean"]), rel=1e-2)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({}, set()),
        ({"depth": ut.BlockLoop(2, inject=True)}, {"inject"}),
        ({"depth": ut.TRMBlock(layers=1)}, {"trm_gate"}),
        ({"time": ut.LRT(source=2)}, {f"{kind}_{i}" for kind in ("residual", "gate") for i in range(4)}),
    ],
    ids=["baseline", "loop", "block", "layers"],
)
def test_every_mixer_of_every_method(parts, names):
    """Mixers without gates are no reason to stop (the published logging crashed on some)."""
    model, watching = build(**parts).train(), Statistics()
    before = hooks(model)
    watching.watch(model)
    model(ids(), labels=ids())
    values = watching.take()
    assert {key.split("/")[1] for key in values} == names
    assert all(key.startswith("gates/") and torch.isfinite(torch.tensor(value)) for key, value in values.items())
    assert {key.split("/")[2] for key in values} >= ({"norm_x", "norm_m", "norm_out"} if names else set())
    model.eval()(ids())
    assert names or hooks(model) == before


def test_of_a_run(values, tmp_path):
    """Bit for bit the same run with and without, and the numbers in its files, only there."""
    folders = {}
    for wanted in (True, False):
        training = values["training"] | {
            "max_steps": 5, "log_every": 2, "save_every": 3, "statistics": wanted, "checkpointing": True,
            "accumulation": 2, "tensorboard": True, "precision": "bfloat16",
        }  # fmt: skip
        recipe = Recipe.parse(values | {"training": training, "evaluation": {"points": 2, "rows": 4, "new_tokens": 2}})
        folders[wanted] = run.folder_for(recipe, tmp_path / str(wanted))
        run.train(recipe, folders[wanted], device="cpu")
    lines = {wanted: read_metrics(folder / "metrics.jsonl") for wanted, folder in folders.items()}
    logged = [line for line in lines[True] if "loss" in line]
    gated = {line["step"]: {k: v for k, v in line.items() if k.startswith("gates/")} for line in logged}
    assert set(gated) == {1, 2, 3, 4, 5} and all("gates/memory_mixer/norm_m" in line for line in gated.values())
    assert gated[4]["gates/memory_mixer/scale_m"] != gated[1]["gates/memory_mixer/scale_m"] == 0.0
    assert not any(key.startswith("gates/") for line in lines[False] for key in line)
    assert [line.get("loss") for line in lines[True]] == [line.get("loss") for line in lines[False]]
    looks = [line for line in lines[True] if "eval_residual" in line]
    assert [line["step"] for line in looks] == [2, 5] and all(line["eval_visit_gradient_1"] > 0 for line in looks)
    assert not any("eval_residual" in line for line in lines[False])
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in folders.values()]
    assert weights[0] == weights[1]
    state = (folders[True] / "checkpoints" / "checkpoint-5" / "trainer_state.json").read_text()
    assert "gates/" not in state and json.loads(state)["global_step"] == 5

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folders[True] / "tensorboard")).Reload()
    shown = events.Scalars("gates/memory_mixer/norm_m")
    assert [point.step for point in shown] == [1, 2, 3, 4, 5] and "train/loss" in events.Tags()["scalars"]
