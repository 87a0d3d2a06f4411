"""`undertow eval`: how good a trained model is, as it was trained and as it decodes."""

from __future__ import annotations

from typing import Annotated

import typer

from undertow.cli.console import Device, Overrides, Run, out, quiet


def evaluate(
    folder: Run,
    schedules: Annotated[
        list[str], typer.Option("--schedule", help="One more schedule, e.g. 'Cyclic(16, 2)'. Repeats.")
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Measure bits per byte under the training schedule and under true decoding, and speed."""
    from undertow.analysis.compare import table
    from undertow.training import run

    quiet()
    result = run.evaluate(folder, overrides=overrides, schedules=schedules, device=device)
    out.print(table({folder.name: [result]}))
