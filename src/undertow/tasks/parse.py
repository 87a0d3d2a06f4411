"""From what a recipe or the command line says to a task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from undertow.tasks.base import Task


def parse(value: str | Mapping[str, Any] | Task) -> Task:
    """The task that a call (`S5(retrieval=True)`, `s5`) or a mapping (`{task: S5, retrieval: true}`) says.

    Raises:
        Bad: (a RecipeError) one line; `key` is the option that it is about.
    """
    from undertow.recipe import component

    return value if isinstance(value, Task) else component("source", mapping(value))


def mapping(value: str | Mapping[str, Any]) -> dict[str, Any]:
    """The same as `{"task": name, option: value}`, the name spelt as the class is. Options are not yet checked."""
    from undertow.recipe import called

    if isinstance(value, str):
        value = called("source", re.sub(r"^\s*(\w+)", lambda found: _spelt(found[1]), value))
    named = value.get("task")
    return {**value, "task": _spelt(named)} if isinstance(named, str) else dict(value)


def open_source(value: Any) -> Task | None:
    """The task that a recipe's `data.source` names; None where it names plain text.

    A mapping, and text with brackets, is a task. Other text is first a path: a folder written by `undertow data` is
    the task that it holds, anything else that is there is text; and then a task's name, spelt as its class. `stdlib`
    is plain text, always.

    Raises:
        Bad, ValueError, OSError: one line: what is wrong with the task or the folder.
    """
    from undertow.tasks import TASKS
    from undertow.tasks.folder import Folder, is_folder

    if isinstance(value, Mapping | Task):
        return parse(value)
    if not isinstance(value, str) or value == "stdlib":
        return None
    if re.fullmatch(r"\s*\w+\s*\(.*\)\s*", value, re.DOTALL):
        return parse(value)
    if is_folder(value):
        return Folder(value)
    return parse(value) if value in TASKS and not Path(value).exists() else None


def _spelt(name: str) -> str:
    """The class name that `name` is in any case; `name` itself where there is none."""
    from undertow.tasks import TASKS

    return {known.lower(): known for known in TASKS}.get(name.lower(), name)
