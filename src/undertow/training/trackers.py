"""Experiment trackers beside TensorBoard's files: trackio and wandb, through accelerate."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from undertow.recipe import Recipe, RecipeError

PROJECT = "undertow"


def check(names: Sequence[str]) -> None:
    """Raise RecipeError where a tracker's package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"training.report_to: {name} is not installed: pip install 'undertow[{name}]'")


def started(names: Sequence[str], folder: Path, recipe: Recipe) -> list[GeneralTracker]:
    """A tracker of each name, on the main process: the run is called as its folder, its configuration is the recipe.

    A folder is one run: what is resumed goes on in the same one. Where that is shown (a server, an account, offline)
    each tracker reads from its own settings and variables; nothing of them is kept or logged here.
    """
    how: dict[str, dict] = {
        "trackio": {"resume": "allow", "embed": False},
        "wandb": {"resume": "allow", "id": hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]},
    }
    found = []
    for name in names:
        tracker = LOGGER_TYPE_TO_CLASS[name](PROJECT, name=folder.name, config=recipe.to_dict(), **how[name])
        tracker.start()
        found.append(tracker)
    return found
