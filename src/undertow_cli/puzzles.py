"""What `eval`, `generate` and `data` do with puzzles."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from undertow_cli.console import out, quiet

if TYPE_CHECKING:
    from rich.table import Table

    from undertow.trm.puzzles import Source


def evaluate(folder: Path, overrides: Sequence[str], device: str) -> None:
    """Print accuracy, its growth over the supervision steps, and what early exit makes of it."""
    from undertow.analysis.columns import table
    from undertow.trm import run

    found = run.evaluate(folder, overrides, device)
    if found["exact_accuracy"] is None:
        out.print(table({folder.name: [found]}), accuracy_line(found))
        return
    out.print(table({folder.name: [found]}), "", _by_step(found), "", _exits(found))
    for k, right in found.get("passes", {}).items():
        out.print(f"pass@{k}: {right:.1%}", highlight=False)
    out.print(accuracy_line(found), highlight=False)


def accuracy_line(found: dict) -> str:
    """What a run came to, in a line."""
    right = found["exact_accuracy"]
    said = "not measured: no test puzzle has an answer" if right is None else f"{100 * right:.1f} %"
    return f"{found['puzzle']} exact accuracy: {said}"


def _by_step(found: dict) -> Table:
    from undertow.evaluation.tables import plain

    made = plain("supervision steps", "exact accuracy", "cell accuracy")
    both = zip(found["by_step"]["exact_accuracy"], found["by_step"]["accuracy"], strict=True)
    for step, (exact, cells) in enumerate(both, 1):
        made.add_row(f"{step}", f"{exact:.1%}", f"{cells:.1%}")
    return made


def _exits(found: dict) -> Table:
    from undertow.evaluation.tables import plain

    made = plain("early exit, halt head sure of", "steps", "exact accuracy", "cell accuracy")
    for one in found["early_exit"]:
        made.add_row(
            f"{one['sure']:g}", f"{one['steps']:.2f}", f"{one['exact_accuracy']:.1%}", f"{one['accuracy']:.1%}"
        )
    return made


def solve(folder: Path, given: str, device: str, sure: float | None, name: str | None, picture: Path | None) -> None:
    """Print the answer after every supervision step, what changed in it marked, and whether it is right."""
    import torch

    from undertow.trm import pictures, run, solving

    if sure is not None and not 0 < sure < 1:
        raise ValueError(f"--sure {sure}: must lie between 0 and 1, both not included")
    loaded = run.load(folder, device)
    source = loaded.recipe.puzzle
    draw = None if picture is None else pictures.drawer(picture, source)  # what cannot be drawn is said first
    inputs = source.parse(_text(given))
    known = None if name is None else torch.tensor([_identifier(loaded.recipe, name)])
    shown = source.render(inputs)
    out.print(shown, highlight=False)
    grids = [inputs]
    rows = torch.from_numpy(inputs).long()[None]
    for answer in solving.answers(loaded.model, rows, known, early_exit=sure is not None, sure=sure or 0.5):
        grids.append(answer.tokens_BL[0].cpu().numpy())
        before, shown = shown, source.render(grids[-1])
        changed = int((grids[-1] != grids[-2]).sum())
        halt = answer.margin_B.sigmoid().item()
        out.print(f"\nstep {answer.step}: cells changed: {changed}, halt head: {halt:.1%}", highlight=False)
        if changed:
            out.print(_marked(before, shown))
    out.print(_verdict(source, inputs, grids[-1]), highlight=False)
    if draw is not None:
        draw(grids)
        out.print(f"The steps lie in {picture}", soft_wrap=True)


def _text(given: str) -> str:
    if given == "-":
        if sys.stdin is None:
            raise ValueError("-: stdin is closed")
        return sys.stdin.read()
    return Path(given).read_text(encoding="utf-8") if os.path.isfile(given) else given


def _identifier(recipe, name: str) -> int:
    from undertow.recipe_base import choices
    from undertow.trm import run

    names = run.open_data(recipe).train.names
    if name not in names:
        raise ValueError(f"--puzzle {name!r}: not trained on; {choices(name, names[:20])} ...")
    return names.index(name)


def _marked(before: str, shown: str) -> Text:
    """The lines of a grid, the letters that differ from those before in reverse."""
    made, old = [], before.splitlines()
    for number, line in enumerate(shown.splitlines()):
        made.append(Text(line))
        was = old[number] if number < len(old) else ""
        for i in (i for i, letter in enumerate(line) if was[i : i + 1] != letter):
            made[-1].stylize("reverse", i, i + 1)
    return Text("\n").join(made)


def _verdict(source: Source, inputs, answer) -> str:
    try:
        wrong = int((source.solve(inputs) != answer).sum())
    except ValueError as error:
        return f"whether it is right cannot be told: {error}"
    return "right: all rules are met" if not wrong else f"wrong: {wrong} cells are not those of the one solution"


def write(puzzle: str, folder: Path | None, overrides: Sequence[str]) -> None:
    """Write both splits of a source of puzzles to a folder."""
    from undertow.recipe import RecipeError, override
    from undertow.trm import puzzles
    from undertow.trm.recipe import source_of

    quiet()
    values = {"puzzle": puzzle}
    override(values, [f"puzzle.{text}" for text in overrides])
    try:
        source = source_of(values["puzzle"])
    except RecipeError as error:
        key = getattr(error, "key", "")
        raise RecipeError(f"{key}: {error}" if key else str(error)) from None
    if folder is None:
        raise RecipeError(f"--out: missing: the folder to write {type(source).__name__} to")
    puzzles.write(source, folder)
    for split in ("train", "test"):
        data = puzzles.read(folder, split)
        out.print(f"{split}: {data.num_groups:,} puzzles, {len(data):,} examples", highlight=False)
    out.print(source.render(data.inputs_ES[0]), highlight=False)
    out.print(f"The puzzles lie in {folder}; in a recipe: puzzle: {folder}", soft_wrap=True)
