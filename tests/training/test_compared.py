"""Comparisons at equal parameters and at equal wall-clock, and of runs that are there already."""

import json

import pytest
import yaml

from commands import call
from undertow.analysis import compare
from undertow.recipe import RecipeError
from undertow.training import pace
from undertow.training.budget import on_meta


def plan_of(values, models, **budget):
    shared = {key: values[key] for key in ("backbone", "data", "evaluation")}
    training = {key: value for key, value in values["training"].items() if key != "max_steps"}
    return {**shared, "training": training, "budget": budget, "models": models}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_equal_parameters(values, family):
    """To less than what one unit of every MLP has."""
    small = {"family": family, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = values | {"backbone": small}
    models = [
        {"name": "carried", "time": "T2MLR(0, 1)"},
        {"name": "wide", "parameters_of": "carried"},
        {"name": "deep", "backbone": {"num_hidden_layers": 3}, "parameters_of": "carried"},
    ]
    plan = compare.parse(plan_of(values, models, steps=2), "equal")
    counts = {name: sum(p.numel() for p in on_meta(recipe).parameters()) for name, recipe in plan.recipes.items()}
    for name, layers in (("wide", 2), ("deep", 3)):
        assert abs(counts[name] - counts["carried"]) <= layers * (3 * 32 + 1) / 2
    read = compare.parse(yaml.safe_load(yaml.safe_dump(plan_of(values, models, steps=2))), "equal")
    assert read == plan


def test_parameters_of_what_cannot_be(values):
    for model, said in (
        ({"name": "b", "parameters_of": "c"}, "must be a model of text before it"),
        ({"name": "b", "backbone": {"num_hidden_layers": 40}, "parameters_of": "a"}, "has fewer parameters than b"),
    ):
        with pytest.raises(RecipeError, match=rf"^models\[1\].parameters_of: '.': .*{said}") as found:
            compare.parse(plan_of(values, [{"name": "a"}, model], steps=2), "none")
        assert "\n" not in str(found.value)


def test_equal_seconds(values, monkeypatch, tmp_path):
    """Each model gets the steps that the seconds buy at its own pace; a resumed one those that it began with."""
    paces = {"plain": 0.5, "carried": 2.0}
    monkeypatch.setattr(pace, "seconds_per_step", lambda recipe, data, device: paces[recipe.name])
    models = [{"name": "plain"}, {"name": "carried", "time": values["time"], "schedule": values["schedule"]}]
    plan = compare.parse(plan_of(values, models, steps=6, match="seconds"), "timed")
    assert plan.limit(100.0, pace=0.5) == {"seconds": 3.0}
    plan = compare.parse(plan_of(values, models, seconds=2, match="tokens"), "timed")
    row = values["training"]["batch_size"] * values["data"]["seq_len"]
    assert plan.limit(100.0, pace=0.5) == {"max_tokens": 4 * row}
    plan = compare.parse(plan_of(values, models, seconds=6, match="seconds"), "timed")
    assert [found[0]["steps"] for found in compare.run(plan, tmp_path, device="cpu").values()] == [12, 3]
    (tmp_path / "carried" / "result.json").unlink()
    paces["carried"] = 1.0
    assert compare.run(plan, tmp_path, resume=True, device="cpu")["carried"][0]["steps"] == 3
    assert compare.load([tmp_path / "comparison.yaml"]).budget == plan.budget


def test_a_pace_is_of_steps_that_train(values, monkeypatch):
    """The median of the timed steps, each of which forwards, backs up and steps `accumulation` times."""
    from undertow.recipe import Recipe
    from undertow.training import run

    recipe = Recipe.parse(values | {"training": values["training"] | {"accumulation": 3}})
    data = run.open_data(recipe)
    clock = iter([0, 100, 200, 300, 400, 401, 500, 502, 600, 603, 700, 704, 800, 899])
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(clock))
    assert pace.seconds_per_step(recipe, data, "cpu") == 3
    monkeypatch.undo()
    assert 0 < pace.seconds_per_step(recipe, data, "cpu") < 60


def test_runs_that_are_there(values, tmp_path, capsys, monkeypatch):
    """Nothing is trained; seeds of a model are one row; the page links to the runs where they are."""
    monkeypatch.chdir(tmp_path)
    plan = plan_of(values, [{"name": "plain"}, {"name": "other", "time": values["time"]}], steps=2, match="tokens")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(plan | {"seeds": [0, 1]}))
    status, _, err = call(capsys, "compare", "two.yaml", "--out", "first", "--device", "cpu")
    assert status == 0, err
    one = ("first/plain-seed1", "first/plain-seed0", "first/other-seed0")
    status, out, err = call(capsys, "compare", *one, "--out", "again", "--device", "cpu")
    assert status == 0 and "plain" in out and "other" in out, err
    first, again = (json.loads((tmp_path / name / "table.json").read_text()) for name in ("first", "again"))
    assert {name: sorted(run["seed"] for run in found) for name, found in again.items()} == {
        "plain": [0, 1],
        "other": [0],
    }
    assert again["other"][0] == first["other"][0] | {"folder": "../first/other-seed0"}
    page = (tmp_path / "again" / "report.html").read_text()
    assert 'href="../first/other-seed0/report.html"' in page and " of 1" in page
    assert "undertow compare again/../first/plain-seed1" in page
    status, out, err = call(capsys, "compare", "first", "--out", "whole", "--device", "cpu")
    assert status == 0, err
    tables = [(tmp_path / name / "table.md").read_text().splitlines() for name in ("first", "whole")]
    assert sorted(tables[0]) == sorted(tables[1])

    (tmp_path / "first" / "plain-seed0" / "result.json").unlink()
    status, _, err = call(capsys, "compare", *one, "--out", "none", "--device", "cpu")
    assert status == 2 and err == "error: first/plain-seed0: not a finished run (no result.json)\n"
    (tmp_path / "empty").mkdir()
    status, _, err = call(capsys, "compare", "empty", "--out", "nothing", "--device", "cpu")
    assert status == 2 and err.startswith("error: empty: holds no finished run")
