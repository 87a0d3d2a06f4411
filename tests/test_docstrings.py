"""Docstrings are complete: every public name has one, tensors have shapes in it, and errors are announced.

Public is what a module's `__all__` says; without one, what it defines under a name that does not begin with `_`.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import undertow

REFERENCE = (
    "plan",
    "edges",
    "mixers",
    "exits",
    "analysis",
    "evaluation",
    "tasks",
    "backbone.adapter",
    "backbone.families",
)


def documented() -> list:
    """Modules with an `__all__`, and those that the site's reference documents whole."""
    found = [m.name for m in pkgutil.walk_packages(undertow.__path__, "undertow.")]
    whole = tuple(f"undertow.{name}" for name in REFERENCE)
    chosen = [name for name in found if name.startswith(whole) or "__all__" in source(name)]
    slow = "undertow.evaluation.harness_model"  # loads lm-eval
    return [pytest.param(name, marks=pytest.mark.slow if name == slow else ()) for name in chosen]


def source(name: str) -> str:
    """The text of a module, which is not loaded for it."""
    return Path(importlib.util.find_spec(name).origin).read_text()


SHAPE = re.compile(r"`_?[BTSKDNHGEVLR1]{1,5}`|_[BTSKDNHGEVLR1]{1,5}\b|`\(\w+(, [^`]+)*\)`|scalar|[Oo]f any shape")
RAISE = re.compile(r"^\s*raise (?:ValueError|RecipeError)\b", re.M)
SUFFIX = re.compile(r"_[BTSKDNHGEVLR1]{1,5}$")  # a tensor whose name carries its dimensions, by the package's legend


def public(module) -> dict:
    """The classes and functions that a module offers, by name."""
    names = vars(module).get("__all__")
    found = {name: getattr(module, name) for name in names or vars(module)}
    ours = {
        name: value
        for name, value in found.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and not name.startswith("_")
    }
    return ours if names else {n: v for n, v in ours.items() if v.__module__ == module.__name__}


def methods(cls) -> dict:
    """The public functions and properties written in a class."""
    kinds = (property, staticmethod, classmethod)
    return {
        name: getattr(cls, name)
        for name, value in vars(cls).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, kinds))
    }


def complaints(where: str, function) -> list[str]:
    """What is missing in the docstring of a function or method."""
    said = inspect.getdoc(function)
    if not said:
        return [f"{where}: no docstring"]
    if not inspect.isroutine(function) or "torch.nn" in function.__module__:
        return []
    found = []
    tensors = [n for n, kind in function.__annotations__.items() if re.search(r"\bTensor\b", str(kind))]
    bare = [n for n in tensors if n != "return" and not SUFFIX.search(n)]
    if inspect.isfunction(function) and "." not in function.__qualname__ and bare and not SHAPE.search(said):
        found.append(f"{where}: no shape for {', '.join(bare)}")
    if RAISE.search(inspect.getsource(function)) and "aises" not in said:
        found.append(f"{where}: raises, and does not say so")
    return found


def missing(module) -> list[str]:
    found = [] if module.__doc__ else [f"{module.__name__}: no docstring"]
    for name, value in public(module).items():
        where = f"{module.__name__}.{name}"
        found += complaints(where, value)
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        if inspect.isclass(value):
            made = own or ""
            if not made or made.startswith(f"{name}("):  # what dataclass writes where there is none
                found.append(f"{where}: no docstring of its own")
            for method, function in methods(value).items():
                found += complaints(f"{where}.{method}", function)
    return found


@pytest.mark.parametrize("name", documented())
def test_public_names_say_what_they_are(name):
    assert not missing(importlib.import_module(name))


def test_what_is_missing_is_noticed():
    """Each rule has something that breaks it."""

    def bare(x: "Tensor"):  # noqa: F821
        """Twice x."""
        raise ValueError

    def shaped(x: "Tensor"):  # noqa: F821
        """Twice x, `_BT`. Raises ValueError, always."""
        raise ValueError

    bare.__qualname__ = shaped.__qualname__ = "f"
    assert complaints("f", bare) == ["f: no shape for x", "f: raises, and does not say so"]
    assert complaints("f", shaped) == [] and complaints("g", lambda: 0) == ["g: no docstring"]
