"""`undertow train`: one run."""

from __future__ import annotations

from typing import Annotated

import typer

from undertow.cli.console import Device, Out, Overrides, Target, out, quiet


def train(
    target: Target,
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    device: Device = "auto",
    folder: Out = None,
) -> None:
    """Train one model and measure it; everything lies in one folder under runs/."""
    from undertow import recipe
    from undertow.analysis import report
    from undertow.analysis.columns import table
    from undertow.data import Data
    from undertow.training import run
    from undertow.training.progress import progress

    quiet()
    if target.is_dir() and folder is None:
        folder = target  # a run folder carries its own recipe
    chosen = recipe.load_any(target, overrides)
    data = None if resume else chosen.runner.open_data(chosen)  # a mistake in the data leaves no folder behind
    folder = run.folder_for(chosen, folder, resume=resume)
    out.print(f"[bold]{chosen.name}[/] in {folder}")
    if isinstance(data, Data):
        out.print(data.sizes, highlight=False, markup=False, soft_wrap=True)
    with run.nothing_left(folder, resume), progress(out) as bars:
        watch = [bars.callback(chosen.name)]
        result = chosen.runner.train(chosen, folder, resume=resume, device=device, callbacks=watch, data=data)
        bars.measured(chosen.name, result)
    out.print(table({chosen.name: [result]}))
    if "puzzle" in result:
        out.print(f"{result['puzzle']} exact accuracy: {100 * result['exact_accuracy']:.1f} %", highlight=False)
    elif report.speaks():
        report.write(folder, device, data)
    out.print(f"Everything lies in {folder}", soft_wrap=True)
