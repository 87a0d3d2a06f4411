"""The weight of the carried state over training. The published one set an attribute that nothing read."""

import math

import pytest
import torch
from torch import nn
from training_runs import Kill, losses, trained, weights
from transformers import TrainerCallback

from undertow.recipe import Recipe
from undertow.recipe_sections import RecurrentWeight
from undertow.training import run
from undertow.training.callbacks import Curriculum, recurrent_weight


@pytest.mark.parametrize("shape", ["linear", "cosine", "exponential", "step"])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 0.75), (1.0, 0.5)])
def test_weights(shape, start, end):
    settings = RecurrentWeight(start=start, end=end, shape=shape, warmup=0.4)
    for step in range(101):
        u = min(step / 40, 1)
        f = {"linear": u, "cosine": 0.5 - 0.5 * math.cos(math.pi * u), "exponential": u * u, "step": float(step >= 40)}
        assert recurrent_weight(settings, step, 100) == pytest.approx(start + f[shape] * (end - start))
    assert recurrent_weight(RecurrentWeight(start=start, end=end, shape=shape, warmup=0.0), 0, 100) == end


class Strength(nn.Module):
    """A module with the buffer that the curriculum sets."""

    def __init__(self):
        super().__init__()
        self.register_buffer("strength", torch.ones(()), persistent=False)


class Watch(TrainerCallback):
    """What the strength was when each step was done."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = float(model.undertow["stand_in"].strength)


@pytest.fixture
def weighted(monkeypatch):
    """Models whose carried state is weighted by a strength."""
    make, built = run.build_model, []

    def build_model(*args):
        model = make(*args)
        model.undertow["stand_in"] = stand_in = Strength()
        model.undertow["memory_mixer"].register_forward_pre_hook(
            lambda _, xma: (xma[0], stand_in.strength * xma[1], xma[2])
        )
        built.append(model)
        return model

    monkeypatch.setattr(run, "build_model", build_model)
    return built


def test_it_acts_and_resumes_bit_for_bit(weighted, values, tmp_path):
    def recipe(**settings):
        training = values["training"] | {"recurrent_lr": 10} | settings
        return Recipe.parse(values | {"training": training, "evaluation": {"points": 0, "rows": 4, "new_tokens": 2}})

    rising = recipe(recurrent_weight={"start": 0.2, "end": 0.6, "shape": "exponential", "warmup": 0.5})
    watch = Watch()
    trained(rising, tmp_path / "rising", callbacks=[watch])
    expected = {step + 1: 0.2 + 0.4 * min(step / 4, 1) ** 2 for step in range(8)}
    assert watch.seen == pytest.approx(expected)
    trained(recipe(), tmp_path / "plain")
    first, second = weights(tmp_path / "rising"), weights(tmp_path / "plain")
    assert any(not torch.equal(first[name], second[name]) for name in first), "it has an effect on training"

    with pytest.raises(KeyboardInterrupt):
        trained(rising, tmp_path / "killed", callbacks=[Kill(5)])
    resumed = Watch()
    trained(rising, tmp_path / "killed", resume=True, callbacks=[resumed])
    assert resumed.seen == {step: watch.seen[step] for step in (4, 5, 6, 7, 8)}
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(tmp_path / "killed").items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "rising")


def test_the_model_that_is_saved_has_the_last_weight(weighted, values, tmp_path):
    training = values["training"] | {"max_steps": 2, "recurrent_weight": {"start": 0.0, "end": 0.5}}
    short = Recipe.parse(values | {"training": training, "evaluation": {"points": 0, "rows": 4, "new_tokens": 2}})
    trained(short, tmp_path / "short")
    assert float(weighted[0].undertow["stand_in"].strength) == 0.5


def test_nothing_to_set_is_an_error_before_training(values, tmp_path):
    plain = values | {"time": None, "schedule": None}
    plain = plain | {"training": plain["training"] | {"recurrent_weight": {}}}
    with pytest.raises(ValueError, match="training.recurrent_weight: no module .* strength .*none") as caught:
        trained(Recipe.parse(plain), tmp_path / "plain")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "plain" / "metrics.jsonl").exists()


def test_every_strength_is_set():
    class Model:
        undertow = nn.ModuleDict({"a": Strength(), "b": nn.Sequential(Strength(), nn.Linear(2, 2))})

    class State:
        global_step, max_steps = 5, 10

    Curriculum(Model, RecurrentWeight()).on_step_begin(None, State, None)
    assert [float(b) for _, b in Model.undertow.named_buffers()] == [0.5, 0.5]
