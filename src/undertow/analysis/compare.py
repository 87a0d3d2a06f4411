"""Several models at one budget, on the same data in the same order: a table, a plot, a sample of each.

A comparison file is a recipe whose sections all models share, with `models` (a list of `name` and the sections that
differ), `budget` (one of `flops`, `tokens`, `steps`, `tokens_per_parameter`: what the first model gets) and, if not
one, `seeds`. With `match: flops` (the default) every other model gets the first one's training FLOPs. A model with
`flops_of: NAME` gets the training FLOPs of that model, listed before it: so one file compares at equal tokens *and* at
equal FLOPs.

A file with the key `puzzle` compares models on puzzles. It has no `budget`: each trains for its own `training.steps`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import yaml
from pydantic import Field, ValidationError
from rich.table import Table

from undertow import recipe as recipes
from undertow.recipe import Recipe, RecipeError, Section, translate
from undertow.recipe_sections import folder_name

if TYPE_CHECKING:
    from undertow.training.progress import Bars

LIMITS = {
    "flops": "max_flops",
    "tokens": "max_tokens",
    "steps": "max_steps",
    "tokens_per_parameter": "tokens_per_parameter",
}
SECTIONS = ("backbone", "data", "network", "training", "evaluation")  # merged key by key; the others are replaced


class Budget(Section):
    """What the first model gets, and what of it all others get too."""

    flops: Annotated[float, Field(gt=0)] | None = None
    tokens: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    tokens_per_parameter: Annotated[float, Field(gt=0)] | None = None
    match: Literal["flops", "tokens", "steps", "tokens_per_parameter"] = "flops"

    @property
    def given(self) -> tuple[str, float]:
        """The unit and the amount. Raises RecipeError unless there is exactly one."""
        found = [(unit, getattr(self, unit)) for unit in LIMITS if getattr(self, unit) is not None]
        if len(found) != 1:
            raise RecipeError(f"budget: needs exactly one of {', '.join(LIMITS)}, has {len(found)}")
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

    def shared(self, data) -> dict[str, float]:
        """The limit of every model, given the data they share: `limit` of the first one."""
        first = next(iter(self.recipes.values()))
        if not isinstance(first, Recipe):
            return {}
        from undertow.training import budget
        from undertow.training.run import build_model

        model = build_model(first, data.tokenizer)
        return self.limit(budget.flops_per_row(model, first.data.seq_len), budget.scaling_parameters(model))

    def limit(self, row_flops: float, parameters: int | None = None) -> dict[str, float]:
        """The limit of every model, as a value of `training`.

        Args:
            row_flops: training FLOPs of one row of the first model.
            parameters: its `training.budget.scaling_parameters`, where tokens per parameter are given or matched.
        """
        from undertow.training.budget import steps_for

        first = next(iter(self.recipes.values()))
        assert isinstance(first, Recipe) and self.budget is not None, "of puzzles there is none"
        unit, amount = self.budget.given
        if unit == self.budget.match:
            return {LIMITS[unit]: amount}
        rows, seq_len = first.training.batch_size * first.training.accumulation, first.data.seq_len
        steps = steps_for(first.training.model_copy(update={LIMITS[unit]: amount}), row_flops, seq_len, 1, parameters)
        tokens = float(steps * rows * seq_len)
        amounts = {"steps": steps, "tokens": tokens, "flops": steps * rows * row_flops}
        if parameters is not None:
            amounts["tokens_per_parameter"] = tokens / parameters
        return {LIMITS[self.budget.match]: amounts[self.budget.match]}


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
    if len(by_name) < len(loaded):
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
    flops_of: dict[str, str] = {}
    for number, given in enumerate(models):
        if not isinstance(given, dict) or not isinstance(given.get("name"), str):
            raise RecipeError(f"{prefix}models[{number}]: must be a mapping with a name")
        model = dict(given)
        other = model.pop("flops_of", None)
        if other is not None and kind is not Recipe:
            raise RecipeError(f"{prefix}models[{number}].flops_of: {other!r}: not of puzzles; steps are equal")
        if other is not None and other not in made:
            raise RecipeError(f"{prefix}models[{number}].flops_of: {other!r}: must be a model before it: {list(made)}")
        if other is not None:
            flops_of[model["name"]] = other
        if model["name"] in made:
            raise RecipeError(f"{prefix}models[{number}].name: {model['name']!r} is given twice")
        recipe = kind.parse(_merge(shared, model), f"{prefix}models[{number}] ({model['name']})")
        for limit in LIMITS.values() if isinstance(recipe, Recipe) else ():
            if getattr(recipe.training, limit) is not None:
                raise RecipeError(f"{prefix}training.{limit}: in a comparison the budget decides; leave it out")
        for key, value in next(iter(made.values()), recipe).common.items():
            if recipe.common[key] != value:
                raise RecipeError(f"{prefix}models[{number}].{key}: all models of a comparison have the same {key}")
        made[model["name"]] = recipe
    return Comparison(name, made, budget, tuple(seeds), flops_of)


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
) -> dict[str, list[dict]]:
    """Train and measure every model of a comparison in `folder`, and write what it shows.

    Args:
        folder: of `pick_folder`.
        resume: keep finished models, continue the one that was interrupted.
        watch: shows how far it is.

    Returns:
        Model -> one result a seed (`training.result.measure`). One that diverged has the key `failed`, and why.
    """
    from undertow.training import run as runs

    first = next(iter(plan.recipes.values()))
    data = first.runner.open_data(first)
    save(plan, folder / "comparison.yaml")
    limit = plan.shared(data)
    results: dict[str, list[dict]] = {name: [] for name in plan.recipes}
    folders: dict[str, list[Path]] = {name: [] for name in plan.recipes}
    for seed in plan.seeds:
        for name, recipe in plan.recipes.items():
            label = name if len(plan.seeds) == 1 else f"{name}-seed{seed}"
            place = folder / label
            try:
                own = limit if name not in plan.flops_of else _like(results[plan.flops_of[name]][-1])
                one = recipe.parse(_merge(recipe.to_dict(), {"name": label, "seed": seed, "training": own}))
                there = resume and (place / "recipe.yaml").exists()
                runs.folder_for(one, place, resume=there)
                callbacks = [] if watch is None else [watch.callback(label)]
                result = recipe.runner.train(one, place, resume=there, device=device, callbacks=callbacks, data=data)
            except FloatingPointError as error:  # the others go on
                result = {"name": label, "failed": str(error)}
            if watch is not None:
                watch.measured(label, result)
            results[name].append(result)
            folders[name].append(place)
            runs.write_json(folder / "table.json", results)  # after each: what is done survives an interruption
    write(plan, folder, results, folders)
    return results


def save(plan: Comparison, path: Path) -> None:
    """Write a comparison with every value of every model, as `load` reads it."""
    models = [
        {**recipe.to_dict(), "name": name} | ({"flops_of": plan.flops_of[name]} if name in plan.flops_of else {})
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


def write(plan: Comparison, folder: Path, results: Mapping, folders: Mapping[str, Sequence[Path]]) -> None:
    """Write `table.md` and, of models of text, `curves.json`, `curves.png` and `samples.md`."""
    columns = columns_of(results.values())
    head = ["model", *(title.replace("\n", " ") for title, _ in columns)]
    rows = ([name, *(cell(found) for _, cell in columns)] for name, found in results.items())
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    (folder / "table.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
    if not isinstance(next(iter(plan.recipes.values())), Recipe):
        return
    from undertow.analysis import plots
    from undertow.training.callbacks import read_metrics

    points = {
        name: [
            [
                {"flops": line["flops"], "tokens": line["tokens"], "bits_per_byte": line["eval_bits_per_byte"]}
                for line in read_metrics(place / "metrics.jsonl")
                if "eval_bits_per_byte" in line
            ]
            for place in places
        ]
        for name, places in folders.items()
    }
    (folder / "curves.json").write_text(json.dumps({"seeds": list(plan.seeds), "models": points}, indent=1))
    plots.curves(points, folder / "curves.png", title=plan.name)
    text = [f"# Samples: {plan.name}\n"]
    samples = {name: found[0].get("samples", []) for name, found in results.items()}
    for number, first in enumerate(next((s for s in samples.values() if s), [])):
        text.append(f"\nPrompt {number + 1}:\n{_fenced(first['prompt'])}")
        text += [f"\n{name}:\n{_fenced(made[number]['text'])}" for name, made in samples.items() if made]
    (folder / "samples.md").write_text("".join(text))


Cell = Callable[[Sequence[dict]], str]


def table(
    results: Mapping[str, Sequence[dict]], columns: Sequence[tuple[str, Cell]] | None = None, first: str = "model"
) -> Table:
    """What was measured, a model a row; several seeds as mean ± standard deviation.

    Args:
        columns: titles, and what is written of the results of one row; None: `columns_of` the results.
        first: title of the names.
    """
    columns = columns_of(results.values()) if columns is None else columns
    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    made.add_column(first, overflow="fold")
    for title, _ in columns:
        made.add_column(title, justify="right")
    for name, found in results.items():
        made.add_row(name, *(cell(found) for _, cell in columns))
    return made


def number(key: str, write: Callable[[float], str]) -> Cell:
    """A cell: the mean of one number over the seeds (± its deviation, if they differ)."""

    def cell(found: Sequence[dict]) -> str:
        values = [result[key] for result in found if result.get(key) is not None]
        if not values:
            return "diverged" if any("failed" in result for result in found) else "-"
        spread = f" ± {write(statistics.stdev(values))}" if len(set(values)) > 1 else ""
        return write(statistics.mean(values)) + spread

    return cell


def _short(number: float) -> str:
    """4,210,000 as "4.21M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("params", number("parameters", _short)),
    ("evals/\ntoken", number("layer_evaluations", "{:.4g}".format)),
    ("train\nFLOPs", number("training_flops", "{:.2e}".format)),
    ("train\ntokens", number("tokens", _short)),
    ("bits/byte\ntrained", number("bits_training", "{:.4f}".format)),
    ("bits/byte\ndecoded", number("bits_true", "{:.4f}".format)),
    ("tokens/s\ntrain", number("training_tokens_per_second", "{:,.0f}".format)),
    ("tokens/s\ngenerate", number("generation_tokens_per_second", "{:,.0f}".format)),
)


PUZZLES: tuple[tuple[str, Cell], ...] = (
    COLUMNS[0],
    ("steps", number("steps", "{:,.0f}".format)),
    ("train\nFLOPs", number("training_flops", "{:.2e}".format)),
    ("exact\naccuracy", number("exact_accuracy", "{:.1%}".format)),
    ("cell\naccuracy", number("accuracy", "{:.1%}".format)),
    ("seconds", number("seconds", "{:,.0f}".format)),
    ("puzzles/s\ntrain", number("puzzles_per_second", "{:,.0f}".format)),
)
TEXT = ("bits/byte\nother text", number("bits_text", "{:.4f}".format))
SOLVED = ("problems\nsolved", number("solved", "{:.3f}".format))  # of a task's test split


def columns_of(results: Iterable[Sequence[dict]], columns: Sequence[tuple[str, Cell]] = COLUMNS) -> list:
    """The columns, `SOLVED` and `TEXT` where a result has such a number; `PUZZLES` where one is a run's on puzzles."""
    results = list(results)
    if any("exact_accuracy" in result for found in results for result in found):
        return list(PUZZLES)
    held = {key for found in results for result in found for key in result}
    return [*columns, *(column for key, column in (("solved", SOLVED), ("bits_text", TEXT)) if key in held)]


def _fenced(text: str) -> str:
    return f"\n~~~~text\n{text}\n~~~~\n"


def _merge(shared: Mapping, own: Mapping) -> dict:
    """`own` over `shared`: sections of settings key by key, everything else replaced."""
    merged = dict(shared)
    for key, value in own.items():
        both = key in SECTIONS and isinstance(value, Mapping) and isinstance(shared.get(key), Mapping)
        merged[key] = {**shared[key], **value} if both else value
    return merged
