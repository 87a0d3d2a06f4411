"""Future-token heads in a run: frozen or trained trunk, their losses logged and measured, resumed bit for bit."""

import json

import pytest
import torch
import yaml

from undertow import recipe as recipes
from undertow.recipe import RecipeError
from undertow.training import run as runs


@pytest.fixture
def future_recipe(values):
    def made(**training):
        plain = json.loads(json.dumps(values))
        plain["future"] = {"heads": 2, "layers": 1, "source": 0, "trunk": 0.5}
        plain["training"].update(training)
        return recipes.Recipe.parse(plain)

    return made


def test_heads_are_logged_measured_and_resumed(future_recipe, tmp_path):
    recipe = future_recipe(max_steps=4, save_every=2, log_every=1, accumulation=2)
    whole = runs.train(recipe, runs.folder_for(recipe, tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "future_loss_1" in line]
    assert len(logged) == 4
    for line in logged:  # the loss is half the next-token loss plus the mean of the heads'
        heads = (line["future_loss_0"] + line["future_loss_1"]) / 2
        assert line["loss"] > heads * 0.99
    assert [h["ahead"] for h in whole["future"]] == [2, 3]
    for head in whole["future"]:
        assert head["perplexity"] == pytest.approx(torch.tensor(head["nats"]).exp().item(), rel=1e-4)

    folder = runs.folder_for(recipe, tmp_path / "part")
    (tmp_path / "part" / "checkpoints").mkdir()
    (tmp_path / "whole" / "checkpoints" / "checkpoint-2").rename(tmp_path / "part" / "checkpoints" / "checkpoint-2")
    runs.train(recipe, folder, resume=True)
    a, b = (runs.load(tmp_path / name, "cpu").model.state_dict() for name in ("whole", "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(name.startswith("undertow.future.") for name in a)


def test_a_frozen_trunk_stays_what_it_was(future_recipe, tmp_path):
    recipe = future_recipe(max_steps=2, train_only=r"undertow\.future")
    before = runs.build_model(recipe, runs.open_data(recipe).tokenizer).state_dict()
    runs.train(recipe, runs.folder_for(recipe, tmp_path / "run"))
    after = runs.load(tmp_path / "run", "cpu").model.state_dict()
    for name, x in after.items():
        assert torch.equal(x, before[name]) != name.startswith("undertow.future"), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"future": {"heads": 0}}, "future.heads: 0"),
        ({"future": {"source": 9}}, "future.source: 9"),
        ({"future": {"head": 1}}, "future.head: unknown key"),
        ({"training": {"train_only": "("}}, "training.train_only"),
    ],
)
def test_wrong_settings_are_one_line(values, change, message):
    plain = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(values))))
    for section, given in change.items():
        plain.setdefault(section, {}).update(given)
    with pytest.raises(RecipeError) as error:
        recipes.Recipe.parse(plain)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pattern_that_freezes_everything_is_refused(future_recipe):
    with pytest.raises(RecipeError, match="matches no parameter"):
        runs.build_model(future_recipe(train_only="nothing_like_this"))
