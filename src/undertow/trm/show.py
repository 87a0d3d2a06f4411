"""What a recipe of puzzles computes: the recursion, parameters, blocks and FLOPs of a supervision step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rich.console import Group
from rich.table import Table
from rich.text import Text

from undertow.analysis.show import drawn, picture_table, short, table_of
from undertow.trm.model import TRM
from undertow.trm.recipe import PuzzleRecipe, title


@dataclass(frozen=True)
class Cost:
    """One supervision step of one puzzle: blocks run without and with gradient, FLOPs of evaluation and of training.

    FLOPs are those of the matrix products, as torch counts them; the training's are of forward and backward.
    """

    without: int
    live: int
    forward: float
    training: float


def on_meta(recipe: PuzzleRecipe, num_identifiers: int = 1) -> TRM:
    """The model of a recipe without weights; how many puzzles have vectors is known when the data is open."""
    source = recipe.puzzle
    sizes = f"{config.seq_len} cells after {config.prefixed} tokens for the puzzle, vocabulary {config.vocab_size}"
    said = f"{title(recipe.puzzle)}: {sizes}; {config.variant}, width {config.width}, {mixing}"
    run = f"{settings.steps:,} steps of {settings.batch_size} puzzles, each puzzle at most {config.max_steps} times"
    rows = [replace(row, slots="") for row in drawn(model, model.recursion.plan)]

    counts = table_of("parameters", "")
    for name, number in parameters(model):
        counts.add_row(name, f"{number:,}", style="bold" if name == "all" else "")
    made = table_of("a supervision step of one puzzle", "blocks", "FLOPs")
    whole = costs.without + costs.live
    made.add_row("evaluation", f"{whole}", short(costs.forward))
    made.add_row(f"training: {costs.live} of {whole} with gradient", f"{whole}", short(costs.training))
    _right(counts), _right(made)
    total = f"{costs.training * settings.steps * settings.batch_size:.3g}"
    return Group(
        *(Text(recipe.name, "bold"), Text(said), Text()),
        *(picture_table(rows), Text(), counts, Text(), made, Text(f"in all {run}: {total} FLOPs")),
    )


def _right(table: Table) -> None:
    for column in table.columns[1:]:
        column.justify = "right"
