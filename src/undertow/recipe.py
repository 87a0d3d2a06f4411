"""Recipes: what a run is, as YAML, checked before anything is built.

A recipe has the sections `backbone`, `depth`, `time`, `schedule`, `data`, `training` and `evaluation`. Every mistake is
one line that names the key, the value, what is allowed and the nearest match (`RecipeError`). `depth`, `time` and
`schedule` are written as a mapping (`{method: NAME, field: value}`, `{kind: NAME, field: value}`) or as the call one
would type in Python (`Cyclic(8, n=3)`); both become the same object.

A recipe with the key `puzzle` is one of puzzles: `undertow.trm.recipe`. `load_any` reads either kind.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from undertow.recipe_base import Bad, DoesNotApply, RecipeError, choices, folder_name, one_line
from undertow.recipe_sections import Backbone, Data, Evaluation, Future, Section, Training
from undertow.recipe_yaml import Loader, read_yaml

if TYPE_CHECKING:
    from typing import Self

    from undertow.trm.recipe import PuzzleRecipe

__all__ = [
    *("Recipe", "RecipeError", "Section", "Backbone", "Data", "Training", "Evaluation"),
    *("component", "load", "load_any"),
]

# The key that names the class, in each section.
WORDS = {"depth": "method", "time": "method", "schedule": "kind", "source": "task", "puzzle": "puzzle"}


class NotRead(RecipeError):
    """A recipe sets `key` (dotted) where nothing reads it."""

    def __init__(self, text: str, key: str):
        super().__init__(text)
        self.key = key


class Run(Section):
    """What a recipe of any kind has: a name, a seed, a way in and a way out."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value):
        return folder_name(value)

    @property
    def runner(self) -> ModuleType:
        """The module that trains it: `open_data`, `train`, `evaluate`, `cost`."""
        raise NotImplementedError

    @property
    def common(self) -> dict[str, Any]:
        """What models must have in common to be compared, by key."""
        raise NotImplementedError

    @classmethod
    def parse(cls, values: Mapping, where: str = "") -> Self:
        """A recipe from plain values. Raises RecipeError, its line begun with `where`."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            said, cause = translate(error, cls), error.errors()[0].get("ctx", {}).get("error")
            wrong = RecipeError(f"{where}: {said}" if where else said)
            if isinstance(cause, DoesNotApply):
                wrong = NotRead(str(wrong), said.partition(":")[0])
            raise wrong from None

    def replace(self, section: str | None = None, **values) -> Self:
        """A copy with some values changed, in `section` or (None) at the top; checked again."""
        plain = self.to_dict()
        (plain if section is None else plain[section]).update(values)
        return self.parse(plain)

    def to_dict(self) -> dict:
        """Plain values, every default written out; `parse` is the inverse."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the resolved recipe as YAML."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def to_yaml(self) -> str:
        """The resolved recipe as `save` writes it."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, width=120)


class Recipe(Run):
    """One run on text. `depth`, `time` and `schedule` hold the library's own objects (or None)."""

    backbone: Backbone
    depth: Any = None
    time: Any = None
    schedule: Any = None
    future: Future | None = None
    data: Data = Data()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()

    @field_validator("depth", "time", "schedule", mode="before")
    @classmethod
    def _component(cls, value, info):
        return component(info.field_name, value)

    @model_validator(mode="after")
    def _fits(self):
        if self.backbone.family is not None:
            import torch

            from undertow.backbone.adapter import shape_of

            try:
                shape = shape_of(self.backbone.hf_config())
            except Bad:
                raise
            except (ValueError, TypeError, ArithmeticError) as error:
                raise Bad("backbone", one_line(error)) from error
            own = self.future is not None  # parameters that are not the backbone's
            for section in ("depth", "time"):
                method = getattr(self, section)
                try:
                    with torch.device("meta"):  # layer numbers are checked, nothing is allocated
                        modules = {} if method is None else method.build(shape, retrofit=False).modules
                except (
                    ValueError,
                    TypeError,
                    ArithmeticError,
                    RuntimeError,
                ) as error:  # torch's and Python's own words
                    raise Bad(section, one_line(error)) from error
                own = own or any(True for module in modules.values() for _ in module.parameters())
            if self.training.recurrent_lr != 1 and not own:
                self._refuse("training", "recurrent_lr", "a model whose methods have no parameters of their own")
            if self.future is not None and not -shape.layers <= self.future.source < shape.layers:
                raise Bad("future.source", f"{self.future.source}: the model has {shape.layers} layers")
        return self

    @model_validator(mode="after")
    def _read(self):
        """What is set must be read: keys that apply to other kinds of models or of data are refused."""
        from undertow.tasks import Task

        task = self.data.source if isinstance(self.data.source, Task) else None
        kind = "text" if task is None else task.kind
        if self.schedule is not None and self.time is None:
            raise DoesNotApply("schedule", self.schedule, "a model without a time method")
        if self.data.vocab_size is not None and self.backbone.pretrained is not None:
            self._refuse("data", "vocab_size", "a pretrained backbone, which has its tokenizer")
        for key in ("samples", "pass_at", "temperature", "max_new_tokens") if kind != "answers" else ():
            self._refuse("evaluation", key, "data without answers to write")
        if kind not in ("answers", "tags"):
            self._refuse("evaluation", "split", "data that is no task with answers or tags")
        return self

    def _refuse(self, section: str, key: str, what: str) -> None:
        """Raise DoesNotApply if the key is not at its default: it does not apply to `what`."""
        held = getattr(self, section)
        value = getattr(held, key)
        if value != type(held).model_fields[key].default:
            raise DoesNotApply(f"{section}.{key}", value, what)

    @property
    def runner(self) -> ModuleType:
        from undertow.training import run

        return run

    @property
    def common(self) -> dict[str, Any]:
        return {"data": self.data}

    def to_dict(self) -> dict:
        plain: dict = {"name": self.name, "seed": self.seed}
        for section in ("backbone", "depth", "time", "schedule", "future", "data", "training", "evaluation"):
            held = getattr(self, section)
            if held is not None:
                plain[section] = held.to_dict() if section in WORDS else held.model_dump(exclude_none=True)
        return json.loads(json.dumps(plain))  # tuples become lists, as YAML knows them


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe of text.

    Args:
        path: a YAML file, or a run folder (its `recipe.yaml`).
        overrides: `section.key=value` texts; the value is read as YAML.

    Raises:
        RecipeError: one line: file, key, value, what is allowed, nearest match.
        FileNotFoundError: no such file.
    """
    found = load_any(path, overrides)
    if not isinstance(found, Recipe):
        raise RecipeError(f"{path}: puzzle: is a recipe of puzzles; this needs one of text")
    return found


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> Recipe | PuzzleRecipe:
    """A recipe of text or, where it has the key `puzzle`, of puzzles; arguments as of `load`.

    Raises:
        RecipeError, FileNotFoundError: as `load`.
    """
    path = Path(path) / "recipe.yaml" if Path(path).is_dir() else Path(path)
    values = read_yaml(path)
    if "models" in values:
        raise RecipeError(f"{path}: models: is a comparison; `undertow compare` runs it")
    values.setdefault("name", path.stem)
    override(values, overrides)
    return kind_of(values).parse(values, str(path))


def kind_of(values: Mapping) -> type[Recipe] | type[PuzzleRecipe]:
    """The class of a recipe's plain values."""
    if "puzzle" not in values:
        return Recipe
    from undertow.trm.recipe import PuzzleRecipe

    return PuzzleRecipe


def override(values: dict, texts: Sequence[str]) -> None:
    """Apply `section.key=value` texts to plain values, in place. Raises RecipeError."""
    for text in texts:
        name, equals, value = text.partition("=")
        keys, inner = name.strip().split("."), values
        if not equals or not all(keys):
            raise RecipeError(f"--set {text}: must be section.key=value")
        for depth, key in enumerate(keys[:-1]):
            if isinstance(inner.get(key), str) and key in WORDS:
                inner[key] = called(key, inner[key])
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"--set {text}: {'.'.join(keys[: depth + 1])} is {inner!r}, not a section")
        if keys[:-1] == ["backbone"]:  # the new value also stands for what the file calls by another name
            for alias in _other_names(inner.get("family"), keys[-1]):
                inner.pop(alias, None)
        try:
            inner[keys[-1]] = yaml.load(value, Loader=Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise RecipeError(f"--set {text}: {one_line(error)}") from None


def _other_names(family, field: str) -> set[str]:
    """Every other name of a field of the backbone's config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from undertow.backbone.config_fields import other_names

    return other_names(CONFIG_MAPPING[family], field) if family in CONFIG_MAPPING else set()


def registry(section: str) -> dict[str, type]:
    """The classes allowed in `depth`, `time`, `schedule` or `data.source`, by name."""
    if section == "source":
        from undertow.tasks import TASKS

        return dict(TASKS)
    if section == "schedule":
        from undertow.schedules import SCHEDULES

        return dict(SCHEDULES)
    if section == "puzzle":
        from undertow.trm.puzzles import PUZZLES

        return dict(PUZZLES)
    from undertow.methods import METHODS

    return {name: cls for name, cls in METHODS.items() if cls.kind == section}


def component(section: str, value):
    """The object that `value` (a mapping, a call as text, the object itself or None) says. Raises RecipeError."""
    classes, word = registry(section), WORDS[section]
    if value is None or type(value) in classes.values():
        return value
    if isinstance(value, str):
        value = called(section, value)
    if not isinstance(value, Mapping):
        raise Bad("", f"{value!r}: must be a mapping with the key {word}, or a call such as {next(iter(classes))}(...)")
    values = dict(value)
    name = values.pop(word, None)
    if not isinstance(name, str) or name not in classes:
        other = {"depth": "time", "time": "depth"}.get(section)
        if other and isinstance(name, str) and name in registry(other):
            raise Bad(word, f"{name!r} belongs under {other}; here: {', '.join(classes)}")
        raise Bad(word, f"{name!r} is unknown; {choices(name, list(classes))}")
    cls = classes[name]
    hints, allowed = typing.get_type_hints(cls), [f.name for f in dataclasses.fields(cls)]
    for key, given in values.items():
        if key not in allowed:
            raise Bad(key, f"unknown key (value {given!r}) of {name}; {choices(key, allowed)}")
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(given)
        except ValidationError as error:
            raise Bad(key, f"{given!r}: {_said(error.errors()[0])}") from None
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    for key in (key for key in required if key not in values):
        raise Bad(key, f"missing: {name} needs {', '.join(required)}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise Bad("", one_line(error)) from error


def called(section: str, text: str) -> dict:
    """`Name(1, key=2)` as a mapping; positional values take the fields' names in order."""
    classes = registry(section)
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        name = typing.cast(ast.Name, call.func).id
        positional = [ast.literal_eval(value) for value in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise Bad("", f"{text!r}: must be a name or a call, e.g. {next(iter(classes))}(...)") from None
    if name not in classes:
        return {WORDS[section]: name}  # `component` says what is allowed
    fields = [f.name for f in dataclasses.fields(classes[name])]
    if len(positional) > len(fields):
        raise Bad("", f"{text!r}: {name} takes at most {len(fields)} values ({', '.join(fields)})")
    return {WORDS[section]: name, **dict(zip(fields, positional, strict=False)), **named}


def translate(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's complaints as one line: dotted key, value, what is allowed, nearest match."""
    first = error.errors()[0]
    keys = [str(key) for key in first["loc"] if _is_key(key)]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, Bad):
        return f"{'.'.join([*keys, str(cause.key)] if cause.key != '' else keys)}: {cause}"
    dotted, section = ".".join(keys), model
    for key in keys[:-1]:
        annotation = section.model_fields[key].annotation if key in section.model_fields else None
        for inner in (annotation, *typing.get_args(annotation)):  # a section, or one that may be left out
            if isinstance(inner, type) and typing.get_origin(inner) is None and issubclass(inner, BaseModel):
                section = inner
    if first["type"] == "extra_forbidden":
        allowed = list(section.model_fields)
        return f"{dotted}: unknown key (value {first['input']!r}); {choices(keys[-1], allowed)}"
    if first["type"] == "literal_error":
        name = [key for key in keys if key in section.model_fields][-1]  # after it, a place in a list
        annotation = section.model_fields[name].annotation  # the words, a list of them, or the words or None
        literals = [a for a in (annotation, *typing.get_args(annotation)) if typing.get_origin(a) is typing.Literal]
        allowed = [word for literal in literals for word in typing.get_args(literal)]
        return f"{dotted}: {first['input']!r} is not allowed; {choices(first['input'], allowed)}"
    return f"{dotted}: missing" if first["type"] == "missing" else f"{dotted}: {first['input']!r}: {_said(first)}"


def _is_key(part) -> bool:
    """Pydantic adds the branch of a union to the place ("str", "tuple[str, ...]"): not a key of the file."""
    return isinstance(part, int) or not (part in ("str", "int", "float") or "[" in part)


def _said(first: Mapping[str, Any]) -> str:
    """Pydantic's own sentence, begun as ours are."""
    said = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return said[:1].lower() + said[1:]
