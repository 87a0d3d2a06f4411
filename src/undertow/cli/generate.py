"""`undertow generate`: text from a trained model, as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from undertow.cli.console import Device, Run, of_puzzles, only, out, quiet


def generate(
    context: typer.Context,
    folder: Run,
    prompt: Annotated[str, typer.Argument(help="The text to go on from; a puzzle as text, its file, or - for stdin.")],
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most this many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
    sure: Annotated[float | None, typer.Option(help="Of puzzles: stop where the halt head is so sure, 0 to 1.")] = None,
    puzzle: Annotated[str | None, typer.Option(help="Of ARC: the puzzle's name.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Of puzzles: every step, as a .gif or a .png.")] = None,
) -> None:
    """Stream text from a trained model, or solve a puzzle step by step."""
    from undertow.evaluation import samples
    from undertow.training import run

    quiet()
    if of_puzzles(folder):
        from undertow.cli import puzzles

        only(context, "a run on puzzles", "folder", "prompt", "device", "sure", "puzzle", "picture")
        puzzles.solve(folder, prompt, device, sure, puzzle, picture)
        return
    only(context, "a run on text", "folder", "prompt", "tokens", "temperature", "top_k", "seed", "device")

    def write(piece: str) -> None:
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    loaded = run.load(folder, device)
    out.print(prompt, end="", style="dim", markup=False, highlight=False, soft_wrap=True)
    samples.sample(loaded.model, loaded.tokenizer, prompt, tokens, temperature, top_k, seed, write)
    out.print()
