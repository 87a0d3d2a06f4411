"""`undertow generate`: text from a trained model, as it is written."""

from __future__ import annotations

from typing import Annotated

import typer

from undertow.cli.console import Device, Run, out, quiet


def generate(
    folder: Run,
    prompt: Annotated[str, typer.Argument(help="The text to go on from.")],
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most this many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    device: Device = "auto",
) -> None:
    """Stream text from a trained model."""
    from undertow.evaluation import samples
    from undertow.training import run

    quiet()

    def write(piece: str) -> None:
        out.print(piece, end="", markup=False, highlight=False, soft_wrap=True)

    loaded = run.load(folder, device)
    out.print(prompt, end="", style="dim", markup=False, highlight=False, soft_wrap=True)
    samples.sample(loaded.model, loaded.tokenizer, prompt, tokens, temperature, top_k, seed, write)
    out.print()
