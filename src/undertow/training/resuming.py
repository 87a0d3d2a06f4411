"""What must be the same for a run to go on from its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from undertow import recipe as recipes
from undertow.recipe import Recipe, RecipeError
from undertow.training import checkpoints

# What may differ between a run and its resumption: nothing that the trained weights so far depend on.
FREE = {
    "training": (
        *("log_every", "save_every", "evaluate_every", "keep"),
        *("workers", "tensorboard", "report_to", "statistics", "nonfinite"),
    ),
    "data": ("cache_dir",),
}


def same_rows(recipe: recipes.Run, folder: Path) -> tuple[str, ...]:
    """What deals out the rows of a step, where checkpoints say how many those are: it may change, they may not.

    Raises:
        RecipeError: a step would have another number of rows.
    """
    there = checkpoints.rows_of_step(folder / "checkpoints")
    if there is None or not isinstance(recipe, Recipe):
        return ()
    settings, processes = recipe.training, int(os.environ.get("WORLD_SIZE", "1"))
    here = settings.batch_size * settings.accumulation * processes
    if here != there:
        raise RecipeError(
            f"{folder}: cannot resume, a step has {there} rows there and {here} here (training.batch_size "
            f"{settings.batch_size} x accumulation {settings.accumulation} x {processes} processes)"
        )
    return ("training.batch_size", "training.accumulation")


def same_run(there: recipes.Run, here: recipes.Run, folder: Path, free: Sequence[str] = ()) -> None:
    """Raise RecipeError naming the first value, not `free`, that would make the resumed run another one."""
    old, new = there.to_dict(), here.to_dict()
    for section in sorted(set(old) | set(new) - {"evaluation"}):
        a, b = ({"": x.get(section)} if not isinstance(x.get(section), dict) else x[section] for x in (old, new))
        for key in sorted(set(a) | set(b)):
            name = f"{section}.{key}".rstrip(".")
            if section == "evaluation" or key in FREE.get(section, ()) or name in free:
                continue
            if a.get(key) != b.get(key):
                raise RecipeError(f"{folder}: cannot resume, {name} is {a.get(key)!r} there and {b.get(key)!r} here")
