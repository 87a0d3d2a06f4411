"""`undertow report`: the page of a run or a comparison, drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undertow_cli.console import Accept, Device, out, quiet


def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a run or of a comparison.")],
    accept: Accept = False,
    device: Device = "auto",
) -> None:
    """Write report.html from what lies in the folder; no result file is changed."""
    from undertow.analysis.report import write

    quiet()
    out.print(f"The report is {write(folder, device, accept=accept)}", soft_wrap=True)
