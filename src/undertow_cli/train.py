"""`undertow train`: one run."""

from __future__ import annotations

from typing import Annotated

import typer

from undertow_cli.console import Accept, Device, Out, Overrides, Target, headline, out, quiet


def train(
    target: Target,
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest complete checkpoint.")] = False,
    accept: Accept = False,
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
    if accept and not (resume and isinstance(chosen, recipe.Recipe)):
        raise ValueError("--accept-changed-data: only with --resume, for a run on text")
    data = None if resume else chosen.runner.open_data(chosen)  # a mistake in the data leaves no folder behind
    folder = run.folder_for(chosen, folder, resume=resume)
    headline(chosen.name, f" in {folder}")
    if isinstance(data, Data):
        out.print(data.sizes, highlight=False, soft_wrap=True)
    with run.nothing_left(folder, resume), progress(out) as bars:
        watch = [bars.callback(chosen.name)]
        more = {"accept": True} if accept else {}
        result = chosen.runner.train(chosen, folder, resume=resume, device=device, callbacks=watch, data=data, **more)
        bars.measured(chosen.name, result)
    out.print(table({chosen.name: [result]}))
    if "puzzle" in result:
        from undertow_cli import puzzles

        out.print(puzzles.accuracy_line(result), highlight=False)
    elif report.speaks():
        report.write(folder, device, data)
    out.print(f"Everything lies in {folder}", soft_wrap=True)
