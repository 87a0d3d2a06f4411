"""Sweeps: many runs of one file, kept in one folder.

    recipes: [../small/baseline.yaml, ../small/lrt.yaml]   # models, each a curve
    set: {training.batch_size: 8}                           # for every run
    grid: {training.tokens_per_parameter: [2, 4, 8, 16], seed: [0, 1, 2]}

Every recipe (`recipes`, and `base`: a file or its sections in place) runs once at each point of the product of `grid`,
but for the points that match an entry of `exclude`. `runs` adds single runs, `{name, set}`, each of `recipe: NAME`
(else of `base`, else of the only recipe); a file with `runs` and no grid is these runs and no others. Keys are dotted,
as with `--set`. Where the sweep gives a limit of training, the recipes' own limits do not hold.

runs/NAME-N/sweep.json                what resuming must not change: the threads of a run
            runs/RUN/                 one folder a run (`training.run`), with log.txt, lock, failed.json if it failed
            results.json, table.csv   every run: what was swept, what was measured; after each finished run
            table.txt                 the same, mean and deviation over seeds
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from undertow import recipe as recipes
from undertow.analysis.compare import LIMITS, SECTIONS
from undertow.recipe import Recipe, RecipeError, Section, translate
from undertow.recipe_base import Bad, choices, folder_name, one_line
from undertow.recipe_sections import Positive
from undertow.training import launch
from undertow.training.launch import Watch, write_text

BUDGETS = tuple(f"training.{limit}" for limit in LIMITS.values())
RATIO = "training.tokens_per_parameter"
Values = dict[str, Any]
# Of submitit: these it would run, or write into a shell script as they are.
COMMANDS = ("setup", "python", "srun_args")


class Single(Section):
    """One run that is not a point of the grid: of `recipe`, with the values of `set`."""

    name: str
    recipe: str | None = None
    set: Values = {}


class Sweep(Section):
    """What a sweep file may say; the module's docstring says what it means."""

    name: str | None = None
    recipes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    base: str | Values | None = None
    set: Values = {}
    grid: dict[str, list[Any]] = {}
    runs: list[Single] = []
    exclude: list[Values] = []
    workers: Positive = 1  # runs at a time
    threads: Positive | None = None  # of each run; None: the cores shared among the workers
    where: Literal["local", "slurm"] = "local"
    slurm: Values = {}  # of submitit's AutoExecutor.update_parameters; `cluster: local` runs the jobs here

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value):
        return None if value is None else folder_name(value)

    @field_validator("slurm")
    @classmethod
    def _no_commands(cls, value):
        for key, given in value.items():
            if str(key).removeprefix("slurm_") in COMMANDS:
                raise Bad(str(key), "a recipe runs no commands; set up the environment that the sweep is started in")
            if "\\" in json.dumps(given, default=str, ensure_ascii=False):  # what JSON must escape
                raise Bad(str(key), f"{given!r}: may not hold line breaks, quotes or backslashes")
        return value

    @field_validator("grid")
    @classmethod
    def _lists(cls, value):
        for key, values in value.items():
            if key == "name":
                raise Bad(key, "cannot be swept: runs are named after their values")
            if not values:
                raise Bad(key, "[]: needs at least one value")
            if any(values[i] in values[:i] for i in range(len(values))):
                raise Bad(key, f"{values}: a value is given twice")
        return value


@dataclass(frozen=True)
class Run:
    """One run: its name in the sweep, the recipe it comes from, the values that tell it from its siblings."""

    name: str
    model: str
    values: Mapping[str, Any]
    recipe: recipes.Run

    @property
    def curve(self) -> str:
        """What runs at several budgets and seeds have in common."""
        rest = {key: value for key, value in self.values.items() if key not in ("seed", *BUDGETS)}
        return label(self.model, rest) or self.model

    @property
    def group(self) -> str:
        """What runs that differ in nothing but the seed have in common; alone, a run is its own group."""
        rest = {key: value for key, value in self.values.items() if key != "seed"}
        return label(self.model, rest) if "seed" in self.values else self.name


@dataclass(frozen=True)
class Plan:
    """A sweep that was read: its settings, and its runs by name in order."""

    name: str
    settings: Sweep
    runs: Mapping[str, Run]

    @property
    def keys(self) -> list[str]:
        """Everything that is swept, in the order of the file."""
        return list(dict.fromkeys(key for run in self.runs.values() for key in run.values))

    @property
    def scales(self) -> bool:
        """Whether runs differ in tokens per parameter."""
        return len({run.values[RATIO] for run in self.runs.values() if RATIO in run.values}) > 1


def load(file: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read and check a sweep, every run of it.

    Args:
        overrides: `section.key=value` texts, for the recipe of every run; what is swept cannot be among them.

    Raises:
        RecipeError: one line: file, run, key, value, what is allowed, nearest match.
        FileNotFoundError: no such file.
    """
    file = Path(file)
    try:
        settings = Sweep.model_validate(recipes.read_yaml(file))
    except ValidationError as error:
        raise RecipeError(f"{file}: {translate(error, Sweep)}") from None
    try:
        return Plan(settings.name or file.stem, settings, _runs(file, settings, overrides))
    except RecipeError as error:
        raise RecipeError(f"{file}: {error}") from None


def costs(plan: Plan) -> list[dict[str, Any]]:
    """What every run will be and cost, nothing trained and no data opened: rows as `training.result.describe` has them.

    The vocabulary is that of `data.tokenizer`, else of the task's own tokenizer, else `data.vocab_size`.
    """
    made: dict[str, dict] = {}  # models that differ in their weights only are costed once
    rows = []
    for one in plan.runs.values():
        recipe = one.recipe
        key = json.dumps(recipe.to_dict() | {"name": "", "seed": 0, "evaluation": {}}, sort_keys=True)
        if key not in made:
            made[key] = recipe.runner.cost(recipe)
        rows.append(made[key] | {"name": one.name, "seed": recipe.seed})
    return rows


def run(plan: Plan, folder: Path, watch: Watch, workers: int | None = None, device: str = "auto") -> list[dict]:
    """Work on all runs of a sweep until each has finished or failed; what lies in `folder` already is gone on with.

    Finished runs are kept, unfinished ones go on from their newest complete checkpoint, failed ones are tried again.

    Args:
        folder: of `training.run.pick_folder`.
        workers: runs at a time; None: what the file says.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Returns:
        The rows of `analysis.results`.

    Raises:
        ValueError: a run of this name in the folder is another one.
    """
    from undertow.analysis import results, scaling

    workers, settings = workers or plan.settings.workers, plan.settings
    places = {name: folder / "runs" / name for name in plan.runs}
    threads = prepare(plan, folder, workers)

    class Writing:
        """`watch`, and the table written whenever a run has settled."""

        running, say = staticmethod(watch.running), staticmethod(watch.say)

        def settled(self, name: str) -> None:
            results.write(plan, folder)
            watch.settled(name)

    results.write(plan, folder)
    if settings.where == "slurm":
        jobs = {"slurm_array_parallelism": workers} | settings.slurm
        launch.slurm(places, folder / "slurm", jobs, device, settings.threads, Writing())
    else:
        launch.local(places, workers, threads, device, Writing())
    found = results.write(plan, folder)
    if plan.scales:
        scaling.draw(found, folder, plan.name)
    return found


def prepare(plan: Plan, folder: Path, workers: int) -> int:
    """Make the folders of all runs, each with its recipe, and forget failures; returns the threads of a run.

    Threads change the order of sums, so a sweep that goes on keeps those it began with.

    Raises:
        RecipeError: a run in the folder was another one; nothing is written then.
    """
    from undertow.training.kept import absolute
    from undertow.training.resuming import same_run

    places = {name: folder / "runs" / name for name in plan.runs}
    for name, place in places.items():
        if (place / "recipe.yaml").exists():
            same_run(absolute(recipes.load_any(place)), absolute(plan.runs[name].recipe), place)
    kept = folder / "sweep.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["threads"] if kept.exists() else None
    threads = plan.settings.threads or before or max(1, _cores() // workers)
    if before not in (None, threads):
        raise RecipeError(f"{folder}: cannot resume, threads is {before} there and {threads} here")
    write_text(kept, json.dumps({"name": plan.name, "threads": threads}, indent=1))
    for name, place in places.items():
        text = absolute(plan.runs[name].recipe).to_yaml()
        place.mkdir(parents=True, exist_ok=True)
        if launch.state(place) in ("open", "failed"):
            write_text(place / "recipe.yaml", text)
            (place / "failed.json").unlink(missing_ok=True)
    return threads


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _runs(file: Path, settings: Sweep, overrides: Sequence[str]) -> dict[str, Run]:
    models = _models(file, settings)
    shared = [*_texts(settings.set), *overrides]
    swept = {text.partition("=")[0].strip() for text in overrides}
    for key in settings.grid.keys() & _flat(settings.set).keys():
        raise RecipeError(f"set.{key}: is in the grid too")
    made: dict[str, Run] = {}
    for name, model, values in _points(settings, models):
        for key in values:
            if key in swept:
                raise RecipeError(f"--set {key}: is swept; change it in the file")
        given = {*values, *_flat(settings.set), *swept}
        recipe = copy.deepcopy(models[model])
        if isinstance(recipe.get("training"), dict) and given & set(BUDGETS):
            recipe["training"] = {k: v for k, v in recipe["training"].items() if f"training.{k}" not in BUDGETS}
        if name in made:
            raise RecipeError(f"runs: {name}: there is a run of that name already")
        name = name or _fresh(label(model if len(models) > 1 else "", values) or model, made)
        try:
            recipes.override(recipe, [*shared, *_texts(values)])
            checked = recipes.kind_of(recipe).parse(recipe | {"name": name})
        except RecipeError as error:
            raise RecipeError(f"run {name}: {str(error).removeprefix('--set ')}") from None
        if isinstance(checked, Recipe) and all(getattr(checked.training, limit) is None for limit in LIMITS.values()):
            raise RecipeError(f"run {name}: training: needs one of {', '.join(LIMITS.values())}")
        made[name] = Run(name, model, values, checked)
    return made


def _models(file: Path, settings: Sweep) -> dict[str, dict]:
    """The values of every recipe, by its name."""
    made: dict[str, dict] = {}
    for given in [*([] if settings.base is None else [settings.base]), *settings.recipes]:
        if isinstance(given, str):
            beside = file.parent / given
            try:
                path = beside if beside.exists() else Path(given)
                folder = path.is_dir()
            except (OSError, ValueError) as error:  # a name that no file can have
                raise RecipeError(f"recipes: {given!r}: {one_line(error)}") from None
            if folder:
                path = path / "recipe.yaml"  # of a run
            try:
                values = recipes.read_yaml(path)
            except OSError as error:
                raise RecipeError(f"recipes: {one_line(error)}") from None
            if "models" in values or "grid" in values:
                raise RecipeError(f"recipes: {given} is not a recipe of one model")
            values.setdefault("name", path.stem)
        else:
            values = {"name": "base"} | given
        if values["name"] in made:
            raise RecipeError(f"recipes: two have the name {values['name']!r}; set name: in them")
        made[values["name"]] = values
    if not made:
        raise RecipeError("recipes: needs at least one, or a base")
    return made


def _points(settings: Sweep, models: Mapping[str, dict]) -> Iterator[tuple[str | None, str, Values]]:
    """(name or None, model, swept values) of every run, the last key of the grid changing fastest."""
    keys, left = list(settings.grid), [dict(point) for point in settings.exclude]
    for point in left:
        for key in point:
            if key not in (*keys, "recipe"):
                raise RecipeError(f"exclude: {key} is not in the grid; {choices(key, [*keys, 'recipe'])}")
    used = [False] * len(left)
    if settings.grid or not settings.runs:
        for model in models:
            for values in itertools.product(*settings.grid.values()):
                point = dict(zip(keys, values, strict=True))
                here = point | {"recipe": model}
                hit = [all(here[key] == value for key, value in out.items()) for out in left]
                used = [a or b for a, b in zip(used, hit, strict=True)]
                if not any(hit):
                    yield None, model, _flat(point)
    for point, found in zip(left, used, strict=True):
        if not found:
            raise RecipeError(f"exclude: {json.dumps(point)} matches no point of the grid")
    for single in settings.runs:
        model = single.recipe or next(iter(models))
        if single.recipe is None and settings.base is None and len(models) > 1:
            raise RecipeError(f"runs: {single.name}: needs recipe, one of {', '.join(models)}")
        if model not in models:
            raise RecipeError(f"runs: {single.name}: recipe {model!r} is unknown; {choices(model, list(models))}")
        yield single.name, model, _flat(single.set)


def _flat(values: Mapping[str, Any]) -> Values:
    """Sections that are merged key by key, written as mappings, with dotted keys; everything else as it is."""
    made: Values = {}
    for key, value in values.items():
        inner = key in SECTIONS and isinstance(value, Mapping)
        made |= {f"{key}.{k}": v for k, v in value.items()} if inner else {key: value}
    return made


def _texts(values: Mapping[str, Any]) -> list[str]:
    """As `recipe.override` takes them."""
    return [f"{key}={json.dumps(value, ensure_ascii=False, default=str)}" for key, value in _flat(values).items()]


def label(model: str, values: Mapping[str, Any]) -> str:
    """The name of a run: `model-learning_rate=0.001-seed=0`; keys by their last part where that is clear."""
    last = [key.rpartition(".")[2] for key in values]
    parts = [f"{s if last.count(s) == 1 else k}={_word(v)}" for s, (k, v) in zip(last, values.items(), strict=True)]
    return "-".join([model, *parts] if model else parts)


def _word(value) -> str:
    """A value in letters that a folder may have: `Cyclic(8, 3)` as "Cyclic_8_3"."""
    said = value if isinstance(value, str) else "none" if value is None else json.dumps(value, default=str)
    return re.sub(r"[^\w.+-]+", "_", said).strip("_")[:60]


def _fresh(name: str, taken: Mapping) -> str:
    """The name, or with a number where another run has it."""
    return next(n for i in itertools.count(1) if (n := name if i == 1 else f"{name}-{i}") not in taken)
