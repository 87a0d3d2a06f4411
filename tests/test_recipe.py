"""Recipes: every shipped one loads, and every mistake is one line that names key, value and what is allowed."""

from pathlib import Path

import pytest

from undertow import recipe as recipes
from undertow.analysis import compare
from undertow.methods import METHODS
from undertow.recipe import Recipe, RecipeError, load_any
from undertow.schedules import SCHEDULES, Cyclic

RECIPES = Path(__file__).parents[1] / "recipes"
SHIPPED = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "sweeps")  # those: test_sweep.py
BACKBONE = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


def complain(values, overrides=()):
    values = {"backbone": dict(BACKBONE), **values}
    with pytest.raises(RecipeError) as caught:
        recipes.override(values, overrides)
        Recipe.parse(values, "x.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path):
    if "models" in recipes.read_yaml(path):
        plan = compare.load([path])
        assert len(plan.recipes) > 1
        for recipe in plan.recipes.values():
            assert Recipe.parse(recipe.to_dict()) == recipe
    else:
        recipe = load_any(path)
        assert recipe.name == path.stem
        assert recipe.parse(recipe.to_dict()) == recipe
        assert not isinstance(recipe, Recipe) or any(
            getattr(recipe.training, limit) for limit in compare.LIMITS.values()
        )


def test_every_method_has_a_small_recipe():
    used = {
        type(part).__name__ for path in SHIPPED if path.parent.name == "small" for part in _parts(recipes.load(path))
    }
    assert set(METHODS) <= used


def _parts(recipe):
    return [part for part in (recipe.depth, recipe.time) if part is not None]


def test_a_saved_recipe_loads_again(tmp_path):
    own = {"backbone": BACKBONE, "time": "T2MLR(1, 2)"}
    recipe = Recipe.parse({**own, "schedule": "Cyclic(4, n=1)", "training": {"betas": [0.8, 0.9]}})
    recipe.save(tmp_path / "recipe.yaml")
    assert recipes.load(tmp_path) == recipe
    assert recipe.schedule == Cyclic(4, 1)


def test_nested_values_survive_saving(tmp_path):
    training = {
        "lr_groups": {r"gate_[mx]\.": 10.0, "scale": 2.0},
        "recurrent_weight": {"shape": "cosine", "warmup": 0.3},
    }
    recipe = Recipe.parse({"backbone": BACKBONE, "training": training, "data": {"pause": {"token": "x", "mean": 0.5}}})
    recipe.save(tmp_path / "recipe.yaml")
    again = recipes.load(tmp_path, ["training.recurrent_weight.warmup=0.4"])
    assert list(again.training.lr_groups) == list(training["lr_groups"]), "the last match wins: their order counts"
    assert again.training.recurrent_weight.shape == "cosine" and again.training.recurrent_weight.warmup == 0.4
    assert again.data == recipe.data and again.data.pause.mean == 0.5


def test_both_spellings_of_a_component_are_one():
    spelled = [
        {"method": "ReuseMap", "counts": [1, 2, 1, 1]},
        "ReuseMap([1, 2, 1, 1])",
        METHODS["ReuseMap"]((1, 2, 1, 1)),
    ]
    made = [Recipe.parse({"backbone": BACKBONE, "depth": value}).depth for value in spelled]
    assert made[0] == made[1] == made[2]
    recipe = Recipe.parse({"backbone": BACKBONE, "time": "T2MLR(1, 2)", "schedule": "Sequential"})
    assert recipe.schedule == SCHEDULES["Sequential"]()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"trainign": {}}, "trainign: unknown key (value {}); did you mean 'training'?"),
        (
            {"training": {"max_step": 3}},
            "training.max_step: unknown key (value 3); did you mean 'max_steps'? allowed: max_steps,",
        ),
        ({"training": {"max_steps": "many"}}, "training.max_steps: 'many': should be a valid integer"),
        ({"training": {"max_steps": -3}}, "training.max_steps: -3: should be greater than 0"),
        ({"training": {"max_steps": True}}, "training.max_steps: True: should be a valid integer"),
        (
            {"training": {"precision": "bfloat"}},
            "training.precision: 'bfloat' is not allowed; did you mean 'bfloat16'? allowed: auto,",
        ),
        ({"training": {"betas": [0.9, "x"]}}, "training.betas.1: 'x': should be a valid number"),
        ({"training": 3}, "training: 3: should be"),
        ({"training": {"accumulation": 0}}, "training.accumulation: 0: should be greater than 0"),
        ({"training": {"optimiser": "muno"}}, "training.optimiser: 'muno' is not allowed; did you mean 'muon'?"),
        ({"training": {"lr_groups": {"a(": 1}}}, "training.lr_groups: 'a(' is not a regular expression: "),
        ({"training": {"lr_groups": {"a": "x"}}}, "training.lr_groups.a: 'x': should be a valid number"),
        ({"training": {"lr_groups": {"a": -1.0}}}, "training.lr_groups.a: -1.0: should be greater than or equal to 0"),
        (
            {"training": {"decay": "stable", "warmup": 0.6, "cooldown": 0.5}},
            "training.cooldown: 0.5: with warmup 0.6 it exceeds all steps",
        ),
        (
            {"training": {"recurrent_weight": {"shape": "liner"}}},
            "training.recurrent_weight.shape: 'liner' is not allowed; did you mean 'linear'? allowed: linear, cosine,",
        ),
        (
            {"training": {"recurrent_weight": {"steps": 0}}},
            "training.recurrent_weight.steps: unknown key (value 0); allowed: start, end, shape, warmup",
        ),
        ({"data": {"pause": {"token": "x"}}}, "data.pause: needs either mean"),
        ({"data": {"pause": {"mean": 1.0}}}, "data.pause.token: missing"),
        ({"data": {"pause": {"token": "x", "mean": 0.0}}}, "data.pause.mean: 0.0: should be greater than 0"),
        ({"data": {"source": 3}}, "data.source: 3: should be a valid string"),
        ({"name": "a/b"}, "name: 'a/b': must be usable as the name of a folder"),
        ({"backbone": {}}, "backbone: needs either family"),
        (
            {"backbone": {"family": "lama"}},
            "backbone.family: 'lama' is not supported; did you mean 'llama'? allowed: llama,",
        ),
        (
            {"backbone": {"family": "llama", "hidden_sze": 3}},
            "backbone.hidden_sze: unknown key (value 3); did you mean 'hidden_size'?",
        ),
        (
            {"backbone": BACKBONE | {"num_key_value_heads": 4}},
            "backbone: num_key_value_heads=4: must divide num_attention_heads=2",
        ),
        (
            {"backbone": {"family": "llama", "hidden_size": "x"}},
            "backbone.hidden_size: 'x': must be a whole number from 1 to",
        ),
        (
            {"backbone": {"pretrained": "x", "hidden_size": 3}},
            "backbone.hidden_size: unknown key (value 3); with pretrained",
        ),
        ({"depth": {"method": "ReuseMp"}}, "depth.method: 'ReuseMp' is unknown; did you mean 'ReuseMap'? allowed: "),
        ({"depth": {"method": "LRT"}}, "depth.method: 'LRT' belongs under time; here: "),
        ({"depth": {"kind": "ReuseMap"}}, "depth.method: None is unknown"),
        (
            {"depth": {"method": "ReuseMap", "count": [1]}},
            "depth.count: unknown key (value [1]) of ReuseMap; did you mean 'counts'?",
        ),
        ({"depth": {"method": "ReuseMap"}}, "depth.counts: missing: ReuseMap needs counts"),
        ({"depth": {"method": "ReuseMap", "counts": "many"}}, "depth.counts: 'many': "),
        ({"depth": "ReuseMap([1, 2])"}, "depth: ReuseMap counts=[1, 2] has 2 entries: the model has 4 layers"),
        ({"time": "T2MLR(3, 1)"}, "time: T2MLR start=3, end=1: "),
        ({"time": "T2MLR(1, 9)"}, "9: the model has 4 layers"),
        ({"time": "LRT(9)"}, "time: LRT source=9: the model has 4 layers"),
        ({"time": "T2MLR(1,"}, "time: 'T2MLR(1,': must be a name or a call"),
        ({"schedule": "Cyclic(1, 2, 'last', None, None, 'jacobi', 7)"}, "Cyclic takes at most 6 values"),
        ({"schedule": "Cyclc"}, "schedule.kind: 'Cyclc' is unknown; did you mean 'Cyclic'? allowed: Sequential,"),
        ({"schedule": {"kind": "Cyclic", "G": 0}}, "schedule: Cyclic G=0: must be a whole number of at least 1"),
        ({"schedule": 3}, "schedule: 3: must be a mapping with the key kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_line(values, line):
    said = complain(values)
    assert said.startswith("x.yaml: ") and line in said


def test_overrides():
    values = {"backbone": dict(BACKBONE), "time": "T2MLR(1, 2)"}
    recipes.override(values, ["training.learning_rate=1e-4", "time.start=0", "seed=3", "evaluation.prompts=[a, b]"])
    recipe = Recipe.parse(values)
    assert (recipe.training.learning_rate, recipe.time.start, recipe.time.end, recipe.seed) == (1e-4, 0, 2, 3)
    assert recipe.evaluation.prompts == ("a", "b")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("training.max_steps", "--set training.max_steps: must be section.key=value"),
        ("training..x=1", "must be section.key=value"),
        ("training.max_step=1", "training.max_step: unknown key (value 1); did you mean 'max_steps'?"),
        ("name.x=1", "name"),
        ("training.max_steps=[1", "--set training.max_steps=[1: "),
    ],
)
def test_wrong_overrides(text, line):
    assert line in complain({"name": "x"}, [text])


def test_yaml_mistakes(tmp_path):
    path = tmp_path / "x.yaml"
    for text, line in (
        ("seed: 1\ndata:\n  seq_len: 2\n  seq_len: 3\n", "line 4, column 3: key 'seq_len' is given twice"),
        ("a: [1\nb: 2", "line 2"),
        ("- 1\n", "must be a mapping of sections such as backbone"),
        ("", "must be a mapping of sections"),
        ("models: []\n", "is a comparison"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeError, match=line.replace("(", r"\(")) as caught:
            recipes.load(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nothing.yaml: no such file"):
        recipes.load(tmp_path / "nothing.yaml")


def comparison(**changes):
    values = {
        "backbone": BACKBONE,
        "budget": {"steps": 10},
        "models": [{"name": "a"}, {"name": "b", "time": "T2MLR(1, 2)"}],
    }
    return compare.parse(values | changes, "test", "c.yaml")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"budget": {}}, "budget: needs exactly one of flops, tokens, steps, tokens_per_parameter, seconds, has 0"),
        ({"budget": {"steps": 1, "flops": 1.0}}, "has 2"),
        ({"budget": {"steps": 1, "match": "flop"}}, "budget.match: 'flop' is not allowed; did you mean 'flops'?"),
        ({"budget": {"step": 1}}, "budget.step: unknown key (value 1); did you mean 'steps'?"),
        ({"models": []}, "models: must be a list"),
        ({"models": [{"time": "LRT"}]}, "models[0]: must be a mapping with a name"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "models[1].name: 'a' is given twice"),
        ({"models": [{"name": "a"}, {"name": "A"}]}, "models[1].name: 'A' is given twice"),
        (
            {"models": [{"name": "a", "tim": "LRT"}]},
            "models[0] (a): tim: unknown key (value 'LRT'); did you mean 'time'?",
        ),
        ({"models": [{"name": "a"}, {"name": "b", "data": {"seq_len": 8}}]}, "models[1].data: all models"),
        (
            {"models": [{"name": "a", "flops_of": "b"}, {"name": "b"}]},
            "models[0].flops_of: 'b': must be a model before",
        ),
        ({"training": {"max_steps": 3}}, "training.max_steps: in a comparison the budget decides"),
        ({"seeds": 3}, "seeds: 3: must be a list"),
    ],
)
def test_wrong_comparisons(changes, line):
    with pytest.raises(RecipeError) as caught:
        comparison(**changes)
    assert str(caught.value).startswith("c.yaml: ") and line in str(caught.value) and "\n" not in str(caught.value)


def test_a_budget_is_what_the_first_model_gets():
    training = {"batch_size": 4}
    rows, seq_len, row_flops = 4, 256, 1e6
    same = comparison(training=training, budget={"steps": 10, "match": "steps"})
    assert same.limit(row_flops) == {"max_steps": 10}
    assert comparison(training=training).limit(row_flops) == {"max_flops": 10 * rows * row_flops}
    tokens = comparison(training=training, budget={"flops": 8 * rows * row_flops, "match": "tokens"})
    assert tokens.limit(row_flops) == {"max_tokens": 8 * rows * seq_len}
    assert comparison(budget={"flops": 1e9}).limit(row_flops) == {"max_flops": 1e9}


def test_several_recipes_are_a_comparison():
    small = [path for path in SHIPPED if path.parent.name == "small"][:2]
    plan = compare.load(small, ["training.max_steps=7"])
    assert list(plan.recipes) == [path.stem for path in small] and plan.budget.given == ("steps", 7)
    assert all(recipe.training.max_steps is None for recipe in plan.recipes.values())
    with pytest.raises(RecipeError, match="same name"):
        compare.load([small[0], small[0]])
