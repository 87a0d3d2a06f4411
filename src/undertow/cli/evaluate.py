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
    buckets: Annotated[int | None, typer.Option(min=1, help="Also score buckets of so many positions.")] = None,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="Also score every sweep, and zero memory.")] = False,
    exits: Annotated[list[str], typer.Option("--exit", help="Decode with an exit rule, e.g. kl:5e-4. Repeats.")] = [],  # noqa: B006
    readahead: Annotated[
        int | None,
        typer.Option(min=0, help="Also read later tokens off the model without its last 0..N layers."),
    ] = None,
) -> None:
    """Measure bits per byte under the training schedule and under true decoding, and speed."""
    from undertow import recipe
    from undertow.analysis import readahead as ahead
    from undertow.analysis.compare import table
    from undertow.evaluation import bits
    from undertow.evaluation.exits import exits as leave_early
    from undertow.evaluation.exits import table as exit_table
    from undertow.exits import Exit
    from undertow.training import run

    quiet()
    rules = [Exit("change", 0.0), *(Exit.parse(text) for text in exits)]  # the first never leaves: the same rows whole
    if readahead is not None:
        ahead.cut(run.load(folder, device).model, readahead)  # too many layers: said before the long part
    result = run.evaluate(folder, overrides=overrides, schedules=schedules, device=device)
    out.print(table({folder.name: [result]}))
    if buckets is None and not sweeps and readahead is None and not exits:
        return

    chosen = recipe.load(folder, overrides)
    model, data, settings = run.load(folder, device).model, run.open_data(chosen), chosen.evaluation
    size, precision = settings.batch_size, settings.precision
    if buckets is not None or sweeps:
        keywords = {"batch_size": size, "precision": precision, "bucket": buckets, "sweeps": sweeps}
        found = bits.modes(model, data.validation, data.token_bytes, **keywords)
        result["modes"] = {name: score.to_dict() for name, score in found.items()}
        out.print("", _modes(found))
    if readahead is not None:
        depths = [
            ahead.readahead(model, data.validation, skip, batch_size=size, precision=precision)
            for skip in range(readahead + 1)
        ]
        result["readahead"] = [depth.to_dict() for depth in depths]
        out.print("", ahead.table(depths))
    if exits:
        some = data.validation.head(settings.rows or len(data.validation))  # token by token: the rows of the curve
        found_exits = leave_early(model, some, data.token_bytes, rules, size, precision)
        result["exits"] = [one.to_dict() for one in found_exits]
        out.print("", exit_table(found_exits))
    run.write_json(folder / "evaluation.json", result)


def _modes(found):
    """A line for every mode, merged, and below it one for each of its parts."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for title in ("mode", "part", "tokens", "nats/token", "bits/byte"):
        made.add_column(title, justify="left" if title in ("mode", "part") else "right")
    for mode, score in found.items():
        made.add_row(mode, "merged", f"{score.tokens:,}", f"{score.nats_per_token:.4f}", f"{score.bits_per_byte:.4f}")
        for part in (*score.sweeps, *score.buckets):
            size = "-" if part.bits_per_byte is None else f"{part.bits_per_byte:.4f}"
            made.add_row("", part.name, f"{part.tokens:,}", f"{part.nats_per_token:.4f}", size)
    return made
