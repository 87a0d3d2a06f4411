"""`undertow bench`: times and memory against the plain models, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from undertow_cli.console import out, quiet


def bench(
    rows: Annotated[
        list[str] | None, typer.Argument(help="Rows to measure (default: all that need no compiler).")
    ] = None,
    file: Annotated[Path | None, typer.Option("--out", help="Write the figures there as JSON.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds a row; the median counts.")] = 5,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Tiny sizes: see that every row runs; figures mean nothing.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="List the rows and measure nothing.")] = False,
) -> None:
    """Measure the table of costs against the plain models: 1 thread, one process, medians of interleaved rounds."""
    quiet()
    from undertow.bench import report
    from undertow.bench.rows import ROWS, run

    chosen = report.choose(rows or [], ROWS)
    if listed:
        out.print(report.table([], chosen))
        return
    report.one_thread()
    results = []
    for row in chosen:
        with out.status(Text(f"{row.name}: {row.about}")):
            results.append(run(row, rounds, tiny))
        out.print(report.line(results[-1]), highlight=False, soft_wrap=True)
        if file is not None:
            report.write(file, results, rounds, tiny)  # after every row: the whole table takes an hour
    out.print(report.table(results))
