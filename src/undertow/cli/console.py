"""The two consoles of the command line, and options that several verbs share."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console()
errors = Console(stderr=True)

Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value, e.g. training.max_steps=100. Repeats."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Memory = Annotated[
    str, typer.Option(help="Where the memory acts: all, response, none; run: where it acted in training.")
]
Accept = Annotated[
    bool, typer.Option("--accept-changed-data", help="Go on although the texts are not those of the run any more.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the run (default: runs/NAME-N).")]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Target = Annotated[Path, typer.Argument(help="A recipe (YAML) or a run folder.")]


def of_puzzles(folder: Path) -> bool:
    """Whether a run's recipe is one of puzzles."""
    from undertow import recipe

    return (folder / "recipe.yaml").is_file() and "puzzle" in recipe.read_yaml(folder / "recipe.yaml")


def only(context: typer.Context, what: str, *allowed: str) -> None:
    """Raise ValueError where an option was given that means nothing for `what`."""
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name)
        if parameter.name not in allowed and given is not None and given.name == "COMMANDLINE":
            raise ValueError(f"{parameter.opts[0]}: means nothing for {what}")


def quiet() -> None:
    """Keep Hugging Face's own bars and remarks about saving out of ours; warnings are one line."""
    from transformers.utils.logging import disable_progress_bar

    warnings.formatwarning = lambda message, *where, **more: f"warning: {' '.join(str(message).split())}\n"
    disable_progress_bar()
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)  # "mtime may not be reliable"
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # a table of keys: `run.load` says it
