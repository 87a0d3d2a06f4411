"""A task as a recipe writes it: a call, a mapping, or the folder that `undertow data` wrote."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Any

from undertow.tasks.base import Task


def open_source(value: Any) -> Task | None:
    """The task that a recipe's `data.source` names; None where it names plain text."""
    from undertow.tasks import TASKS

    if isinstance(value, Mapping | Task):
        return parse(value)
    if isinstance(value, str) and (value in TASKS or re.fullmatch(r"\s*\w+\s*\(.*\)\s*", value, re.DOTALL)):
        return parse(value)
    return None


def parse(value: Any) -> Task:
    """The task that `value` says: `"S5(retrieval=True)"`, `{task: S5, retrieval: true}`, or a task itself.

    Raises:
        RecipeError: unknown task, unknown option, or a value it refuses. One line.
    """
    from pydantic import TypeAdapter, ValidationError

    from undertow.recipe_sections import RecipeError, choices
    from undertow.tasks import TASKS

    if isinstance(value, Task):
        return value
    values = _called(value) if isinstance(value, str) else dict(value)
    name = values.pop("task", None)
    if name not in TASKS:
        raise RecipeError(f"task {name!r} is unknown; {choices(name, list(TASKS))}")
    cls: Any = TASKS[name]
    hints, allowed = typing.get_type_hints(cls), [field.name for field in dataclasses.fields(cls)]
    for key, given in values.items():
        if key not in allowed:
            raise RecipeError(f"{name}: unknown option {key} (value {given!r}); {choices(key, allowed)}")
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(given)
        except ValidationError as error:
            raise RecipeError(f"{name} {key}={given!r}: {error.errors()[0]['msg']}") from None
    try:
        return cls(**values)
    except TypeError as error:
        raise RecipeError(f"{name}: {error}") from None


def _called(text: str) -> dict[str, Any]:
    from undertow.recipe_sections import RecipeError
    from undertow.tasks import TASKS

    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        name = typing.cast(ast.Name, call.func).id
        positional = [ast.literal_eval(value) for value in call.args]
        named = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise RecipeError(f"task {text!r}: must be a name or a call, e.g. S5(train=1000)") from None
    fields = [field.name for field in dataclasses.fields(typing.cast(Any, TASKS[name]))] if name in TASKS else []
    return {"task": name, **dict(zip(fields, positional, strict=False)), **named}
