"""lm-eval's tasks and CORE on the command line: the options of `undertow eval`, and what it prints of them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from undertow.evaluation.core import Core
    from undertow.schedules import Schedule
    from undertow.training.run import Loaded

Tasks = Annotated[
    list[str],
    typer.Option("--tasks", metavar="NAME", help="Tasks of lm-eval, or YAML files of tasks; commas or repeats."),
]
Bundle = Annotated[Path | None, typer.Option("--core", metavar="DIR", help="Folder of the CORE bundle.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first so many items of each task.")]
Shots = Annotated[int | None, typer.Option(min=0, help="Examples before each item (default: as the task says).")]


def lm_eval(
    loaded: Loaded,
    tasks: list[str],
    limit: int | None = None,
    shots: int | None = None,
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> dict[str, dict]:
    """Scores on lm-eval's tasks, with bars; arguments and errors as those of `undertow.evaluation.harness.run`."""
    from undertow.evaluation import harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # defaults that a task leaves open, shots that were asked for
    names = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    return harness.run(
        loaded.model,
        loaded.tokenizer,
        names,
        limit=limit,
        shots=shots,
        batch_size=batch_size,
        schedule=schedule,
        precision=precision,
        show=True,
    )


def core(
    loaded: Loaded,
    folder: Path,
    limit: int | None = None,
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> Core:
    """CORE, with bars; arguments and errors as those of `undertow.evaluation.core.run`."""
    from undertow.evaluation import core as bundle

    return bundle.run(loaded.model, loaded.tokenizer, folder, limit, batch_size, schedule, precision, show=True)


def lm_eval_table(scores: dict[str, dict]) -> Table:
    """A line for every metric of every task."""
    made = _table("task", "items", "metric", "value", "standard error")
    for task, values in scores.items():
        for name in _metrics(values):
            title, comma, kind = name.partition(",")
            error = values.get(f"{title}_stderr{comma}{kind}")
            items = f"{values['samples']:,}" if "samples" in values else ""
            made.add_row(task, items, name, _number(values[name]), "-" if error is None else f"{error:.4f}")
    return made


def _metrics(values: dict) -> list[str]:
    return [name for name in values if name != "samples" and not name.partition(",")[0].endswith("_stderr")]


def _number(value: float | str | None) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-" if value is None else str(value)


def core_table(found: Core) -> Table:
    """A line for every task, and CORE below them."""
    made = _table("task", "items", "accuracy", "centred")
    for score in found.tasks:
        made.add_row(score.label, f"{score.items:,}", f"{score.accuracy:.4f}", f"{score.centred:.4f}")
    made.add_section()
    made.add_row("CORE", f"{sum(score.items for score in found.tasks):,}", "", f"{found.core:.4f}")
    return made


def _table(*titles: str) -> Table:
    from rich.table import Table

    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for title in titles:
        made.add_column(title, justify="left" if title in ("task", "metric") else "right")
    return made
