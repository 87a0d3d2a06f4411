"""`undertow sweep`: many runs of one file, here or on a Slurm cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from undertow_cli.console import Device, Out, Overrides, headline, out, quiet

if TYPE_CHECKING:
    from rich.progress import TaskID

    from undertow.training.progress import Bars


def sweep(
    file: Annotated[Path, typer.Argument(help="A sweep (YAML).")],
    overrides: Overrides = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and their cost; train nothing.")] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at a time (default: what the file says).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished runs, go on with the others.")] = False,
    device: Device = "auto",
    folder: Out = None,
) -> None:
    """Train lists and grids of recipes, each in a process of its own; end with one table. Status 1: a run failed."""
    from undertow.analysis import results
    from undertow.training import sweep as sweeps
    from undertow.training.progress import progress
    from undertow.training.run import pick_folder

    quiet()
    plan = sweeps.load(file, overrides)
    if dry_run:
        _list(plan)
        return
    folder = pick_folder(plan.name, folder, resume)
    headline(plan.name, f": {len(plan.runs)} runs in {folder}")
    with progress(out) as bars:
        found = sweeps.run(plan, folder, _Board(bars, folder, len(plan.runs)), workers, device)
    out.print(results.table(found, short=True))
    failed = results.failures(found)
    for line in failed:
        out.print(line, style="red", highlight=False, soft_wrap=True)
    out.print(f"Table and runs lie in {folder}", soft_wrap=True)
    if failed:
        raise typer.Exit(1)


def _list(plan) -> None:
    """All runs with what they cost, and the sum."""
    from undertow.analysis import results
    from undertow.training import sweep as sweeps

    costs = sweeps.costs(plan)
    out.print(results.costs({cost["name"]: [cost] for cost in costs}))
    tokens, flops = (sum(cost[key] for cost in costs) for key in ("tokens", "training_flops"))
    out.print(f"{plan.name}: {len(costs)} runs, {tokens:,} tokens, {flops:.3g} training FLOPs")


class _Board:
    """A bar for the sweep and a line for every run that is being worked on; without a terminal, a line for each end."""

    def __init__(self, bars: Bars, folder: Path, runs: int):
        self.bars, self.folder = bars, folder
        self.all = bars.bars.add_task("runs", total=runs, said="")
        self.shown: dict[str, TaskID] = {}
        self.failed = 0

    def running(self, lines: Mapping[str, Mapping]) -> None:
        for name in [name for name in self.shown if name not in lines]:
            self.bars.bars.remove_task(self.shown.pop(name))
        for name, line in lines.items():
            if name not in self.shown:
                self.shown[name] = self.bars.bars.add_task(name, total=None, said="starting")
            if line:
                said = f"step {line['step']}, loss {line['loss']:.3f}"
                self.bars.bars.update(self.shown[name], completed=line["step"], said=said)
        self.bars.bars.update(self.all, said=f"{len(lines)} running, {self.failed} failed")

    def settled(self, name: str) -> None:
        import json

        place = self.folder / "runs" / name
        if (place / "result.json").exists():
            self.bars.measured(name, json.loads((place / "result.json").read_text(encoding="utf-8")))
        else:
            self.failed += 1
            self.say(f"{name}: failed: {json.loads((place / 'failed.json').read_text(encoding='utf-8'))['failed']}")
        self.bars.bars.advance(self.all)

    def say(self, text: str) -> None:
        self.bars.say(text)
