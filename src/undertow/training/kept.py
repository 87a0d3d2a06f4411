"""What a run keeps of its data, so that it is measured and gone on with as it was trained, from wherever that is done.

    recipe.yaml        where the texts lie: every path absolute
    data.json          which texts they were (`undertow.data.fingerprint`); written when training begins
    model/             the tokenizer, and on it how texts are read (`undertow.data.format`); checkpoints have it, too

Opened again, the texts must be the same ones: with others, a run would go on as another run, and a score would be of
something else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

from undertow import recipe as recipes
from undertow.data import Data, build, cache, fingerprint, format_of, load_tokenizer, paths
from undertow.data.format import SAVED, Memory, TextFormat
from undertow.model import UndertowForCausalLM
from undertow.recipe import Recipe, RecipeError
from undertow.tasks import Task
from undertow.tasks.folder import Folder
from undertow.training import checkpoints
from undertow.training.precision import parallel

DATA = "data.json"
ACCEPT = "--accept-changed-data"
POLICIES = ("run", "all", "response", "none")
PATHS = ("path", "files", "train", "validation", "test")  # options of tasks that name files, where they are text


def absolute(recipe: recipes.Run) -> recipes.Run:
    """The recipe with every path that is relative to this working folder made absolute (of puzzles: as it is)."""
    if not isinstance(recipe, Recipe):
        return recipe
    plain, data = recipe.to_dict(), recipe.data
    sections: dict[str, dict[str, Any]] = {name: plain[name] for name in ("backbone", "data", "evaluation")}
    source = rooted(data.source) if isinstance(data.source, Task) else paths.absolute(data.source)
    if isinstance(source, Task):
        source = source.path if isinstance(source, Folder) else source.to_dict()
    sections["data"]["source"] = source
    for section, key in (("data", "validation"), ("data", "tokenizer"), ("backbone", "pretrained")):
        if sections[section].get(key) is not None:
            sections[section][key] = paths.absolute(sections[section][key])
    if data.cache_dir is not None:
        sections["data"]["cache_dir"] = os.path.abspath(Path(data.cache_dir).expanduser())
    if recipe.evaluation.text is not None:
        sections["evaluation"]["text"] = paths.absolute(recipe.evaluation.text)
    return recipe.parse(plain)


def rooted(task: Task) -> Task:
    """A task with the paths among its options made absolute."""
    held = {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.name in PATHS}  # type: ignore[arg-type]
    changed = {name: paths.absolute(value) for name, value in held.items() if isinstance(value, str | tuple | list)}
    return dataclasses.replace(task, **changed) if changed else task  # type: ignore[type-var]


def alike(folder: Path, recipe: Recipe, data: Data) -> None:
    """Hold the texts of a sweep's run that begins against those of another one beside it on the same data.

    Raises RecipeError: the files have changed since that one began.
    """
    section = recipe.to_dict()["data"]
    for note in sorted(folder.parent.glob(f"*/{DATA}")):
        other = note.parent
        if other != folder and recipes.read_yaml(other / "recipe.yaml").get("data") == section:
            check(other, data)
            return


def keep(folder: Path, data: Data) -> None:
    """Write which texts a run is made of."""
    text = json.dumps({"texts": data.texts}, indent=1)
    cache.write(folder / DATA, lambda file: file.write(text.encode()))


def check(folder: Path, data: Data, accept: bool = False) -> None:
    """Hold texts against those a run was made of.

    Args:
        accept: go on with other ones, with a warning.

    Raises:
        RecipeError: they are others. One line that names what changed.
    """
    then = _noted(folder)
    if then is None:
        return
    changed = fingerprint.difference(then, data.texts)
    if changed is None:
        return
    line = f"{folder}: the texts are not those of the run: {changed}"
    if not accept:
        raise RecipeError(f"{line}; {ACCEPT} goes on with them")
    warnings.warn(line, stacklevel=3)


def _noted(folder: Path) -> dict | None:
    path = folder / DATA
    if not path.exists():
        warnings.warn(f"{folder}: has no {DATA}: whether the texts are those of the run is not known", stacklevel=4)
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["texts"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: torn or not as a run writes it; without it nothing is compared") from None


def tokenizer_place(folder: Path) -> Path | None:
    """Where a run keeps its tokenizer: its model, else its newest whole checkpoint (None: it has neither yet)."""
    places = (folder / "model", checkpoints.newest_complete(folder / "checkpoints"))
    return next((place for place in places if place and (place / "tokenizer_config.json").exists()), None)


def format_in(place: Path, recipe: Recipe | None, tokenizer=None) -> TextFormat:
    """The format that the tokenizer in a folder carries.

    Where it carries none, it was saved before formats were kept, or by others. A run's is then what its recipe says
    and what was the rule then, with a warning; others' what the tokenizer itself does (`TextFormat.of`).
    """
    tokenizer = load_tokenizer(place) if tokenizer is None else tokenizer
    if recipe is None or SAVED in tokenizer.init_kwargs:
        return TextFormat.of(tokenizer)
    data = recipe.data
    task = data.source if isinstance(data.source, Task) else None
    form = format_of(task, tokenizer, None, data.loss, data.memory)
    warnings.warn(
        f"{place}: written before it was kept how texts are read: assuming a bos ({'yes' if form.before else 'no'}), "
        f"special tokens as text, {form.layout} prompts, memory: {form.memory}",
        stacklevel=3,
    )
    return form


def format_for(model, form: TextFormat) -> TextFormat:
    """The format for a model: without a state over time the memory acts nowhere, so nothing is to be masked."""
    carries = isinstance(model, UndertowForCausalLM) and bool(model.program.memories)
    return form if carries else dataclasses.replace(form, memory="all")


def open_data(recipe: Recipe, form: TextFormat | None = None) -> Data:
    """The data of a recipe, read as `form` says (None: as the recipe says)."""
    chosen = recipe.data
    given = {name: getattr(chosen, name) for name in type(chosen).model_fields if name != "pause"}
    given |= {name: chosen.value(name) for name in ("vocab_size", "documents")}
    task = chosen.source if isinstance(chosen.source, Task) else None
    if form is not None:
        given["tokenizer"] = form
    elif chosen.tokenizer is None and (task is None or task.tokenizer() is None):
        given["tokenizer"] = recipe.backbone.pretrained  # what the weights were trained with
    with parallel().main_process_first():
        return build(**given)


def opened(folder: Path, recipe: Recipe, resume: bool, data: Data | None, accept: bool) -> Data:
    """The data to train on: `data` where it is open already. A new run notes which texts these are; one that goes on
    holds them against those it began with.

    Raises: as `reopen`.
    """
    began = resume and ((folder / DATA).exists() or tokenizer_place(folder) is not None)
    if data is None:
        data = reopen(folder, recipe, accept) if began else open_data(recipe)
    elif began:
        check(folder, data, accept)
    if not began and (folder.parent.parent / "sweep.json").exists():
        alike(folder, recipe, data)
    if (not began or accept) and parallel().is_main_process:
        keep(folder, data)
    return data


def reopen(
    folder: Path, recipe: Recipe, accept: bool = False, memory: str | None = None, changed: bool = False
) -> Data:
    """The data of a run, read as the run reads it: with its tokenizer, never a new one, and held against its texts.

    Args:
        recipe: of the run (what is measured of it may be changed).
        accept: take other texts, with a warning.
        memory: where the memory acts instead (None or `run`: as in the run).
        changed: other data is asked for: its texts are not compared.

    Raises:
        ValueError: as `undertow.data.build`; a policy that has no meaning for the data.
        RecipeError: the texts are others.
    """
    place = tokenizer_place(folder)
    form = None if place is None else with_memory(format_in(place, recipe), memory)
    data = open_data(recipe, form)
    if not changed:
        check(folder, data, accept)
    return data


def with_memory(form: TextFormat, memory: str | None) -> TextFormat:
    """A format in which the memory acts elsewhere (None or `run`: as it says). Raises ValueError: no such policy."""
    if memory in (None, "run"):
        return form
    if memory not in POLICIES:
        raise ValueError(f"--memory {memory}: allowed: {', '.join(POLICIES)}")
    return dataclasses.replace(form, memory=cast(Memory, memory))
