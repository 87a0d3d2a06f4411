"""Several models at one budget, on the same data in the same order: a table, a plot, a sample of each.

A comparison file is a recipe whose sections all models share, with `models` (a list of `name` and the sections that
differ), `budget` (one of `flops`, `tokens`, `steps`, `tokens_per_parameter`, `seconds`: what the first model gets) and,
if not one, `seeds`. With `match: flops` (the default) every other model gets the first one's training FLOPs. A model
with `flops_of: NAME` gets the training FLOPs of that model, listed before it: so one file compares at equal tokens and
at equal FLOPs. One with `parameters_of: NAME` has its MLPs widened or narrowed until it has as many parameters.

Seconds are of training steps on this machine, measured over a few of each model before it trains (`training.pace`); how
many steps they buy is written into its recipe, so that a resumed run does not depend on them again.

A file with the key `puzzle` compares models on puzzles. It has no `budget`: each trains for its own `training.steps`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from undertow import recipe as recipes
from undertow.analysis import outcome
from undertow.recipe import Recipe, RecipeError, Section, translate
from undertow.recipe_base import folder_name

if TYPE_CHECKING:
    from undertow.training.progress import Bars

LIMITS = {
    "flops": "max_flops",
    "tokens": "max_tokens",
    "steps": "max_steps",
    "tokens_per_parameter": "tokens_per_parameter",
}
SECONDS = "seconds"  # a budget that no recipe has
MLP_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim")  # what configurations call it
SECTIONS = ("backbone", "data", "network", "training", "evaluation")  # merged key by key; the others are replaced


class Budget(Section):
    """What the first model gets, and what of it all others get too."""

    flops: Annotated[float, Field(gt=0)] | None = None
    tokens: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    tokens_per_parameter: Annotated[float, Field(gt=0)] | None = None
    seconds: Annotated[float, Field(gt=0)] | None = None
    match: Literal["flops", "tokens", "steps", "tokens_per_parameter", "seconds"] = "flops"

    @property
    def given(self) -> tuple[str, float]:
        """The unit and the amount. Raises RecipeError unless there is exactly one."""
        units = (*LIMITS, SECONDS)
        found = [(unit, getattr(self, unit)) for unit in units if getattr(self, unit) is not None]
        if len(found) != 1:
            raise RecipeError(f"budget: needs exactly one of {', '.join(units)}, has {len(found)}")
        return found[0]


@dataclass(frozen=True)
class Comparison:
    """Recipes without a limit of their own, by name in the order of the file, and the budget they share (None: they
    have the same limit).

    `flops_of` names, for the models that do not share it, the earlier model whose training FLOPs they get.
    """

    name: str
    recipes: Mapping[str, recipes.Run]
    budget: Budget | None
    seeds: tuple[int, ...] = field(default=(0,))
    flops_of: Mapping[str, str] = field(default_factory=dict)

    @property
    def text(self) -> bool:
        """Whether these are models of text; else of puzzles."""
        return self.budget is not None

    def shared(self, data, device: str = "auto") -> dict[str, float]:
        """The limit of every model, given the data they share: `limit` of the first one."""
        first = next(iter(self.recipes.values()))
        if not isinstance(first, Recipe):
            return {}
        from undertow.training import budget
        from undertow.training.pace import seconds_per_step
        from undertow.training.run import build_model

        assert self.budget is not None
        timed = SECONDS in (self.budget.given[0], self.budget.match)
        pace = seconds_per_step(first, data, device) if timed else None
        model = build_model(first, data.tokenizer)
        return self.limit(budget.flops_per_row(model, first.data.seq_len), budget.scaling_parameters(model), pace)

    def limit(self, row_flops: float, parameters: int | None = None, pace: float | None = None) -> dict[str, float]:
        """The limit of every model, as a value of `training`, or its `seconds`.

        Args:
            row_flops: training FLOPs of one row of the first model.
            parameters: its `training.budget.scaling_parameters`, where tokens per parameter are given or matched.
            pace: seconds of one of its steps, where seconds are given or matched.
        """
        from undertow.training.budget import steps_for

        first = next(iter(self.recipes.values()))
        assert isinstance(first, Recipe) and self.budget is not None, "of puzzles there is none"
        unit, amount = self.budget.given
        limits = LIMITS | {SECONDS: SECONDS}
        if unit == self.budget.match:
            return {limits[unit]: amount}
        if unit == SECONDS:
            assert pace is not None
            unit, amount = "steps", max(1, round(amount / pace))
        rows, seq_len = first.training.batch_size * first.training.accumulation, first.data.seq_len
        steps = steps_for(first.training.model_copy(update={LIMITS[unit]: amount}), row_flops, seq_len, 1, parameters)
        tokens = float(steps * rows * seq_len)
        amounts = {"steps": steps, "tokens": tokens, "flops": steps * rows * row_flops}
        if parameters is not None:
            amounts["tokens_per_parameter"] = tokens / parameters
        if pace is not None:
            amounts[SECONDS] = steps * pace
        return {limits[self.budget.match]: amounts[self.budget.match]}


def load(files: Sequence[str | Path], overrides: Sequence[str] = ()) -> Comparison:
    """Read one comparison file, or make a comparison of several recipes.

    Several recipes must have the same `data`; the first one's limit is the budget.

    Args:
        overrides: `section.key=value` texts, for the shared sections (of every recipe, if there are several).

    Raises:
        RecipeError: one line: file, key, value, what is allowed, nearest match.
        FileNotFoundError: no such file.
    """
    values = recipes.read_yaml(files[0])
    if len(files) == 1 and "models" in values:
        recipes.override(values, overrides)
        return parse(values, Path(files[0]).stem, str(files[0]))
    loaded = [recipes.load(file, overrides) for file in files]
    first = loaded[0]
    by_name = {recipe.name: recipe for recipe in loaded}
    if len({name.casefold() for name in by_name}) < len(loaded):  # some systems take their folders for one
        raise RecipeError("compare: two recipes have the same name; set name: in them")
    for recipe in loaded[1:]:
        if recipe.data != first.data:
            raise RecipeError(f"compare: {recipe.name} and {first.name} differ in data; one comparison has one data")
    amounts = {unit: getattr(first.training, limit) for unit, limit in LIMITS.items()}
    bare = {
        name: Recipe.parse(_merge(recipe.to_dict(), {"training": dict.fromkeys(LIMITS.values())}))
        for name, recipe in by_name.items()
    }
    budget = Budget(**amounts)
    budget.given  # noqa: B018 (raises unless there is exactly one)
    return Comparison("compare", bare, budget, (first.seed,))


def parse(values: Mapping, name: str, where: str = "") -> Comparison:
    """A comparison from plain values. Raises RecipeError, its line begun with `where`."""
    shared = dict(values)
    models, seeds = shared.pop("models"), shared.pop("seeds", [shared.get("seed", 0)])
    name, prefix = shared.pop("name", name), f"{where}: " if where else ""
    try:
        folder_name(name)
    except RecipeError as error:
        raise RecipeError(f"{prefix}name: {error}") from None
    kind = recipes.kind_of(shared)
    if kind is not Recipe and "budget" in shared:
        raise RecipeError(f"{prefix}budget: models of puzzles have training.steps; leave it out")
    budget = _budget(shared.pop("budget", {}), prefix) if kind is Recipe else None
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise RecipeError(f"{prefix}seeds: {seeds!r}: must be a list of whole numbers of at least 0")
    if not isinstance(models, list) or not models:
        raise RecipeError(f"{prefix}models: must be a list of mappings, each with a name and the sections that differ")
    made: dict[str, recipes.Run] = {}
    unread: dict[str, RecipeError] | None = None  # shared keys that no model so far reads
    flops_of: dict[str, str] = {}
    for number, given in enumerate(models):
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise RecipeError(f"{prefix}models[{number}]: must be a mapping with a name")
        model = dict(given)
        other, wide = model.pop("flops_of", None), model.pop("parameters_of", None)
        if other is not None and kind is not Recipe:
            raise RecipeError(f"{prefix}models[{number}].flops_of: {other!r}: not of puzzles; steps are equal")
        if other is not None and other not in made:
            raise RecipeError(f"{prefix}models[{number}].flops_of: {other!r}: must be a model before it: {list(made)}")
        if other is not None:
            flops_of[model["name"]] = other
        if model["name"].casefold() in {name.casefold() for name in made}:  # as folders some systems take them for one
            raise RecipeError(f"{prefix}models[{number}].name: {model['name']!r} is given twice")
        recipe, left = _parsed(kind, shared, model, f"{prefix}models[{number}] ({model['name']})")
        unread = left if unread is None else {key: error for key, error in unread.items() if key in left}
        if wide is not None:
            recipe = _widened(recipe, made.get(wide), f"{prefix}models[{number}].parameters_of: {wide!r}", made)
        for limit in LIMITS.values() if isinstance(recipe, Recipe) else ():
            if getattr(recipe.training, limit) is not None:
                raise RecipeError(f"{prefix}training.{limit}: in a comparison the budget decides; leave it out")
        for key, value in next(iter(made.values()), recipe).common.items():
            if recipe.common[key] != value:
                raise RecipeError(f"{prefix}models[{number}].{key}: all models of a comparison have the same {key}")
        made[model["name"]] = recipe
    if unread:
        raise next(iter(unread.values()))
    return Comparison(name, made, budget, tuple(seeds), flops_of)


def _parsed(kind, shared: Mapping, own: Mapping, where: str) -> tuple[Any, dict[str, RecipeError]]:
    """The recipe of one model, and the shared keys that do not apply to it (left out of it) with what is said of them.

    A key of the file's shared sections is for the models that read it; one of the model's own must be read.
    """
    left: dict[str, RecipeError] = {}
    merged = _merge(shared, own)
    while True:
        try:
            return kind.parse(merged, where), left
        except recipes.NotRead as error:
            section, _, key = error.key.partition(".")
            of_its_own = own.get(section, {}) if key else own
            if error.key in left or (key or section) in of_its_own:
                raise
            left[error.key] = error
            if key:
                merged[section] = {name: value for name, value in merged[section].items() if name != key}
            else:
                del merged[section]


def _widened(recipe, other, where: str, made: Mapping) -> Recipe:
    """The recipe with MLPs as wide as gives it the parameters of `other`: they are linear in that width."""
    from undertow.training.budget import on_meta

    if not isinstance(other, Recipe):
        raise RecipeError(f"{where}: must be a model of text before it: {list(made)}")
    if recipe.backbone.pretrained is not None:
        raise RecipeError(f"{where}: {recipe.name} has pretrained weights, whose MLPs have their width")
    config = on_meta(recipe).config.get_text_config()
    key = next((key for key in MLP_WIDTHS if hasattr(config, key)), None)
    if key is None:
        raise RecipeError(f"{where}: backbone.family {config.model_type} does not say how wide its MLPs are")

    def at(width: int) -> Recipe:
        return Recipe.parse(_merge(recipe.to_dict(), {"backbone": {key: width}}), where)

    def parameters(one: Recipe) -> int:
        return sum(p.numel() for p in on_meta(one).parameters())

    one, two = parameters(at(1)), parameters(at(2))
    width = round((parameters(other) - one) / (two - one)) + 1
    if width < 1:
        raise RecipeError(f"{where}: has fewer parameters than {recipe.name} without MLPs")
    return at(width)


def _budget(values: Mapping, prefix: str) -> Budget:
    try:
        budget = Budget.model_validate(values)
        budget.given  # noqa: B018 (raises unless there is exactly one)
    except ValidationError as error:
        raise RecipeError(f"{prefix}budget.{translate(error, Budget)}") from None
    except RecipeError as error:
        raise RecipeError(f"{prefix}{error}") from None
    return budget


def run(
    plan: Comparison,
    folder: Path,
    resume: bool = False,
    device: str = "auto",
    watch: Bars | None = None,
    accept: bool = False,
) -> dict[str, list[dict]]:
    """Train and measure every model of a comparison in `folder`, and write what it shows.

    Args:
        folder: of `pick_folder`.
        resume: keep finished models, continue the one that was interrupted.
        watch: shows how far it is.
        accept: with `resume`, go on with texts that are not those the comparison began with.

    Returns:
        Model -> one result a seed (`training.result.measure`). One that diverged has the key `failed`, and why.
    """
    from undertow.training import run as runs

    first = next(iter(plan.recipes.values()))
    data = _data(first, folder if resume else None, accept)
    save(plan, folder / "comparison.yaml")
    limit = plan.shared(data, device)
    results: dict[str, list[dict]] = {name: [] for name in plan.recipes}
    folders: dict[str, list[Path]] = {name: [] for name in plan.recipes}
    for seed in plan.seeds:
        for name, recipe in plan.recipes.items():
            label = name if len(plan.seeds) == 1 else f"{name}-seed{seed}"
            place = folder / label
            try:
                own = limit if name not in plan.flops_of else _like(results[plan.flops_of[name]][-1])
                there = resume and (place / "recipe.yaml").exists()
                if SECONDS in own and isinstance(recipe, Recipe):
                    own = _bought(own[SECONDS], recipe, place if there else None, data, device)
                one = recipe.parse(_merge(recipe.to_dict(), {"name": label, "seed": seed, "training": own}))
                runs.folder_for(one, place, resume=there)
                callbacks = [] if watch is None else [watch.callback(label)]
                more = {"accept": True} if accept and isinstance(one, Recipe) else {}
                watched = {"callbacks": callbacks, "data": data}
                result = recipe.runner.train(one, place, resume=there, device=device, **watched, **more)
            except FloatingPointError as error:  # the others go on
                result = {"name": label, "failed": str(error)}
            if watch is not None:
                watch.measured(label, result)
            results[name].append(result)
            folders[name].append(place)
            runs.write_json(folder / "table.json", results)  # after each: what is done survives an interruption
    outcome.write(plan.name, folder, results, folders)
    return results


def _data(first, folder: Path | None, accept: bool):
    """The data of all models: that of a run in `folder` that has begun, if any, which must still be the same."""
    from undertow.training import kept

    begun = sorted(path.parent for path in folder.glob(f"*/{kept.DATA}")) if folder is not None else []
    if begun and isinstance(first, Recipe):
        return kept.reopen(begun[0], first, accept)
    return first.runner.open_data(first)


def _bought(seconds: float, recipe: Recipe, place: Path | None, data, device: str) -> dict[str, float]:
    """The steps that so many seconds buy: those of the run that is resumed, else by the model's pace here and now."""
    from undertow.training.pace import seconds_per_step

    if place is not None:
        return {"max_steps": recipes.load(place / "recipe.yaml").training.max_steps or 1}
    return {"max_steps": max(1, round(seconds / seconds_per_step(recipe, data, device)))}


def save(plan: Comparison, path: Path) -> None:
    """Write a comparison with every value of every model, as `load` reads it."""
    from undertow.training.kept import absolute

    models = [
        {**absolute(recipe).to_dict(), "name": name}
        | ({"flops_of": plan.flops_of[name]} if name in plan.flops_of else {})
        for name, recipe in plan.recipes.items()
    ]
    values: dict = {"name": plan.name, "seeds": list(plan.seeds)}
    if plan.budget is not None:
        unit, amount = plan.budget.given
        values["budget"] = {unit: amount, "match": plan.budget.match}
    path.write_text(yaml.safe_dump(values | {"models": models}, sort_keys=False, width=120), encoding="utf-8")


def _like(result: Mapping) -> dict[str, float]:
    """The limit that gives a model the training FLOPs of one that has run. Raises FloatingPointError: it failed."""
    if "failed" in result:
        raise FloatingPointError(f"flops_of: {result['name']} has no training FLOPs to match: {result['failed']}")
    return {"max_flops": result["training_flops"]}


def _merge(shared: Mapping, own: Mapping) -> dict:
    """`own` over `shared`: sections of settings key by key, everything else replaced."""
    merged = dict(shared)
    for key, value in own.items():
        both = key in SECTIONS and isinstance(value, Mapping) and isinstance(shared.get(key), Mapping)
        merged[key] = {**shared[key], **value} if both else value
    return merged
