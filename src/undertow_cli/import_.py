"""`undertow import`: a published checkpoint becomes one of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undertow_cli.console import out, quiet


def import_(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="Folder with its config and weights.")],
    into: Annotated[Path, typer.Option("--out", help="New folder for the imported model.")],
    method: Annotated[str | None, typer.Option(help="t2mlr or lrt (default: what the config looks like).")] = None,
    names: Annotated[
        Path | None, typer.Option(help="YAML, regular expression -> our name: before the built-in table.")
    ] = None,
) -> None:
    """Import a published T2MLR or LRT checkpoint: every tensor finds its place, or nothing is written."""
    from undertow import convert

    quiet()
    found = convert.import_checkpoint(folder, into, method, convert.read_names(names) if names else None)
    time = ", ".join(f"{key}={value}" for key, value in found.time.items())
    out.print(f"{found.tensors} tensors, {found.backbone}, {time}", soft_wrap=True)
    out.print(f"Trained with {found.training}, memory: {found.memory}; the model lies in {into}", soft_wrap=True)
    if not found.tokenizer:
        how = f"undertow.TextFormat(tokenizer, memory={found.memory!r}).save_pretrained({str(into)!r})"
        out.print(f"There is no tokenizer; with one, {how} says where the memory acts", soft_wrap=True)
