"""What tables of results say: one row a model (or a run), several seeds as mean ± standard deviation."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.table import Table

Cell = Callable[[Sequence[dict]], str]


def table(
    results: Mapping[str, Sequence[dict]], columns: Sequence[tuple[str, Cell]] | None = None, first: str = "model"
) -> Table:
    """What was measured, a model a row; several seeds as mean ± standard deviation.

    Args:
        columns: titles, and what is written of the results of one row; None: `columns_of` the results.
        first: title of the names.
    """
    columns = columns_of(results.values()) if columns is None else columns
    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    made.add_column(first, overflow="fold")
    for title, _ in columns:
        made.add_column(title, justify="right")
    for name, found in results.items():
        made.add_row(name, *(cell(found) for _, cell in columns))
    return made


def number(key: str, write: Callable[[float], str]) -> Cell:
    """A cell: the mean of one number over the seeds (± its deviation, if they differ).

    Writing it raises ValueError where a result (a file that somebody changed) has something else there.
    """

    def cell(found: Sequence[dict]) -> str:
        values = [result[key] for result in found if result.get(key) is not None]
        for value in values:
            if not isinstance(value, int | float):
                raise ValueError(f"a result's {key} is {value!r}: must be a number")
        if not values:
            return "diverged" if any("failed" in result for result in found) else "-"
        spread = f" ± {write(statistics.stdev(values))}" if len(set(values)) > 1 else ""
        return write(statistics.mean(values)) + spread

    return cell


def _short(number: float) -> str:
    """4,210,000 as "4.21M"."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


COLUMNS: tuple[tuple[str, Cell], ...] = (
    ("params", number("parameters", _short)),
    ("evals/\ntoken", number("layer_evaluations", "{:.4g}".format)),
    ("train\nFLOPs", number("training_flops", "{:.2e}".format)),
    ("train\ntokens", number("tokens", _short)),
    ("bits/byte\ntrained", number("bits_training", "{:.4f}".format)),
    ("bits/byte\ndecoded", number("bits_true", "{:.4f}".format)),
    ("tokens/s\ntrain", number("training_tokens_per_second", "{:,.0f}".format)),
    ("tokens/s\ngenerate", number("generation_tokens_per_second", "{:,.0f}".format)),
)


PUZZLES: tuple[tuple[str, Cell], ...] = (
    COLUMNS[0],
    ("steps", number("steps", "{:,.0f}".format)),
    ("train\nFLOPs", number("training_flops", "{:.2e}".format)),
    ("exact\naccuracy", number("exact_accuracy", "{:.1%}".format)),
    ("cell\naccuracy", number("accuracy", "{:.1%}".format)),
    ("seconds", number("seconds", "{:,.0f}".format)),
    ("puzzles/s\ntrain", number("puzzles_per_second", "{:,.0f}".format)),
)
TEXT = ("bits/byte\nother text", number("bits_text", "{:.4f}".format))
SOLVED = ("problems\nsolved", number("solved", "{:.3f}".format))  # of a task's test split


def columns_of(results: Iterable[Sequence[dict]], columns: Sequence[tuple[str, Cell]] = COLUMNS) -> list:
    """The columns, `SOLVED` and `TEXT` where a result has such a number; `PUZZLES` where one is a run's on puzzles."""
    results = list(results)
    if any("exact_accuracy" in result for found in results for result in found):
        return list(PUZZLES)
    held = {key for found in results for result in found for key in result}
    return [*columns, *(column for key, column in (("solved", SOLVED), ("bits_text", TEXT)) if key in held)]
