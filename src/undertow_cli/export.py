"""`undertow export`: a model recurrent over depth becomes a plain one that any tool loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undertow_cli.console import Run, of_puzzles, out, quiet


def export(
    folder: Run,
    into: Annotated[Path, typer.Option("--out", help="New folder for the plain model.")],
) -> None:
    """Unroll a model that is recurrent over depth alone into a plain checkpoint of its family, with equal logits."""
    from undertow import convert

    quiet()
    if of_puzzles(folder):
        raise ValueError(f"{folder}: is a run on puzzles; there is no plain model to export it to")
    plain = convert.export(folder, into)
    size = sum(parameter.numel() for parameter in plain.parameters())
    said = f"{plain.config.model_type}, {plain.config.num_hidden_layers} layers, {size:,} parameters"
    out.print(f"{said}; the model lies in {into}", soft_wrap=True, highlight=False)
