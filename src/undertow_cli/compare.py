"""`undertow compare`: several models at one budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undertow_cli.console import Accept, Device, Out, Overrides, headline, out, quiet


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(help="One comparison, or recipes with the same data; or folders of runs."),
    ],
    overrides: Overrides = [],  # noqa: B006
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished models, go on with the others.")] = False,
    accept: Accept = False,
    device: Device = "auto",
    folder: Out = None,
) -> None:
    """Train several models at one budget on the same data; end with a table, a plot and a sample of each.

    Of folders of finished runs (or of comparisons), only what they measured is put together.
    """
    from undertow.analysis import compare as comparison
    from undertow.analysis import report
    from undertow.analysis.columns import table
    from undertow.analysis.outcome import gather
    from undertow.training.progress import progress
    from undertow.training.run import pick_folder

    quiet()
    if all(file.is_dir() for file in files):
        folder = pick_folder("compare", folder, resume)
        out.print(table(gather(files, folder)))
        report.write(folder, device, accept=accept)
        out.print(f"Everything lies in {folder}", soft_wrap=True)
        return
    plan = comparison.load(files, overrides)
    folder = pick_folder(plan.name, folder, resume)
    headline(plan.name, f": {len(plan.recipes)} models, {len(plan.seeds)} seed(s), in {folder}")
    with progress(out) as bars:
        results = comparison.run(plan, folder, resume=resume, device=device, watch=bars, accept=accept)
    out.print(table(results))
    if plan.text and report.speaks():
        report.write_all(folder, device, accept)
    out.print(f"Everything lies in {folder}", soft_wrap=True)
