"""`undertow generate`: text from a trained model, as it is written; without a prompt, a conversation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from undertow_cli.console import Device, Memory, Run, as_text, of_puzzles, only, out, quiet


def generate(
    context: typer.Context,
    folder: Run,
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to go on from (none, on a terminal: a conversation); a puzzle as text, a file, - for stdin."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="At most this many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among this many likeliest tokens; 0: all.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    memory: Memory = "run",
    device: Device = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the layers first: worth it for long texts.")
    ] = False,
    sure: Annotated[float | None, typer.Option(help="Of puzzles: stop where the halt head is so sure, 0 to 1.")] = None,
    puzzle: Annotated[str | None, typer.Option(help="Of ARC: the puzzle's name.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Of puzzles: every step, as a .gif or a .png.")] = None,
) -> None:
    """Stream text from a trained model, talk with it (if its tokenizer has a chat template), or solve a puzzle."""
    from undertow.evaluation import samples
    from undertow.training import run

    quiet()
    if of_puzzles(folder):
        from undertow_cli import puzzles

        if prompt is None:
            raise ValueError("Missing argument 'PROMPT': a puzzle as text, its file, or - for stdin")
        only(context, "a run on puzzles", "folder", "prompt", "device", "sure", "puzzle", "picture")
        puzzles.solve(folder, prompt, device, sure, puzzle, picture)
        return
    own = ("folder", "prompt", "tokens", "temperature", "top_k", "seed", "memory", "device", "compiled")
    only(context, "a run on text", *own)
    if prompt is None and (sys.stdin is None or not sys.stdin.isatty()):
        raise ValueError("Missing argument 'PROMPT': a conversation needs a terminal")

    def write(piece: str) -> None:
        out.print(piece, end="", highlight=False, soft_wrap=True)

    loaded = run.load(folder, device, memory)
    if prompt is None:
        if compiled:
            raise ValueError("--compile: needs a PROMPT; a conversation is not compiled")
        _talk(loaded, tokens, temperature, top_k, seed, write)
        return
    loaded.format.say_spelt([prompt], "the prompt")
    out.print(prompt, end="", style="dim", highlight=False, soft_wrap=True)
    try:
        samples.sample(loaded.model, loaded.format, prompt, tokens, temperature, top_k, seed, write, compiled)
    finally:
        out.print()


def _line() -> str:
    """What is typed next. Bytes that are no text stay in it."""
    line = out.input(Text("> ", "bold"))
    try:
        return as_text(line)
    except ValueError:
        return line


def _talk(loaded, tokens: int, temperature: float, top_k: int, seed: int, write) -> None:
    from undertow.serve.chat import chat
    from undertow.serve.decode import Sampling

    if not loaded.tokenizer.chat_template:
        raise ValueError("Missing argument 'PROMPT': a conversation needs a tokenizer with a chat template")
    how = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    chat(
        loaded.model, loaded.format, how, tokens, _line, write,
        lambda line: out.print(line, style="dim", highlight=False),
    )  # fmt: skip
