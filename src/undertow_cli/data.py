"""`undertow data`: a task's records as files that anyone can read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undertow_cli.console import out, quiet

if TYPE_CHECKING:
    from rich.table import Table

    from undertow.tasks import Task

_LONGEST = 600  # letters of an example that are shown


def data(
    task: Annotated[
        str | None, typer.Argument(metavar="[TASK]", help="Its name, or a call: 'S5(retrieval=True)'.")
    ] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write: new, or one of the same task.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change one option, e.g. train=1000. Repeats.")
    ] = [],  # noqa: B006
) -> None:
    """Make or fetch a task's data as JSON lines, or puzzles as arrays; without a task, list them all."""
    from undertow.tasks import TASKS
    from undertow.trm.puzzles import PUZZLES

    if task is None:
        out.print(_listing(TASKS | PUZZLES))
        return
    if task.partition("(")[0].strip() in PUZZLES:
        from undertow_cli import puzzles

        puzzles.write(task, folder, overrides)
        return
    from undertow.recipe import RecipeError, override
    from undertow.tasks import folder as folders
    from undertow.tasks import parse

    quiet()
    values = parse.mapping(task)
    override(values, overrides)
    try:
        chosen = parse.parse(values)
    except RecipeError as error:
        key = getattr(error, "key", "")
        raise RecipeError(f"{key}: {error}" if key else str(error)) from None
    if folder is None:
        raise RecipeError(f"--out: missing: the folder to write {type(chosen).__name__} to")
    with _progress() as watch:
        held = folders.write(chosen, folder, watch)
    out.print(_table(held))
    out.print(_shown(folders.Folder(str(folder))), highlight=False, soft_wrap=True)
    out.print(f"The records lie in {folder}; in a recipe: data: {{source: {folder}}}", soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], None]]:
    """A line a split that counts its records while they are written."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:10} {task.completed:,} records", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bars:
        rows = {}

        def watch(split: str, count: int) -> None:
            if split not in rows:
                rows[split] = bars.add_task(split, total=None)
            bars.update(rows[split], completed=count)

        yield watch


def _listing(known: Mapping[str, type]) -> Table:
    """A line for every task: the first of what it says about itself."""
    from rich.table import Table

    made = Table("task", "", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for name, task in known.items():
        made.add_row(name, (task.__doc__ or "").strip().partition("\n")[0])
    return made


def _table(held: Mapping) -> Table:
    from rich.table import Table

    made = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("split", "records", "bytes", "sha256"):
        made.add_column(title, justify="right" if title in ("records", "bytes") else "left")
    for split, said in held["splits"].items():
        made.add_row(split, f"{said['records']:,}", f"{said['bytes']:,}", said["sha256"][:16])
    return made


def _shown(task: Task) -> str:
    """One record as a model is shown it, the long parts cut."""
    from undertow.tasks import SPLITS, Tags

    record = next(record for split in SPLITS for record in task.records(split))
    if task.kind == "text":
        parts = {"text": record["text"]}
    elif task.kind == "tokens":
        parts = {"tokens": " ".join(map(str, record["input_ids"]))}
    else:
        example = task.example(record)
        names = ("input", "target") if isinstance(example, Tags) else ("prompt", "response")
        parts = {name: getattr(example, name) for name in names} | {"bucket": example.bucket}
    cut = {name: text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..." for name, text in parts.items()}
    return "\n".join(f"--- {name}\n{text.rstrip()}" for name, text in cut.items())
