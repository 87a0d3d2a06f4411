"""`undertow check`: is the model causal, is what is cached what is computed, is what is trained what is decoded?"""

from __future__ import annotations

import typer

from undertow_cli.console import Accept, Device, Overrides, Target, out, quiet


def check(
    target: Target,
    overrides: Overrides = [],  # noqa: B006
    accept: Accept = False,
    device: Device = "auto",
) -> None:
    """Check causality, caching and padding, and how far the training schedule is from true decoding."""
    from undertow.analysis.check import run

    quiet()
    report = run(target, overrides=overrides, device=device, accept=accept)
    out.print(report)
    if not report.ok:
        raise typer.Exit(1)
