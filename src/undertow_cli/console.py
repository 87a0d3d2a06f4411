"""The two consoles of the command line, what any terminal can show, and options that several verbs share."""

from __future__ import annotations

import codecs
import difflib
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

# What we draw, for a terminal whose encoding lacks it.
PLAIN = str.maketrans("│─╭╰╮╯→←↻✓✗·×−±…▁●◂▸⏎⇥•", "|-++++><@+x.x-~._*<>$>*")


class Closed(Exception):
    """Nobody reads what is printed any more (`undertow show RUN | head -1`)."""


class Terminal(Console):
    """A console that prints texts as they are: names in [brackets] are no markup, :names: in colons no pictures."""

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, markup=False, emoji=False)

    def on_broken_pipe(self) -> None:
        raise Closed from None


out = Terminal()
errors = Terminal(stderr=True)


def say(line: str) -> None:
    """A line on stderr, if somebody hears it."""
    try:
        errors.print(line, soft_wrap=True, highlight=False)
    except (OSError, Closed):
        errors.quiet = True


def headline(name: str, more: str) -> None:
    """A line that begins with a name in bold."""
    out.print(Text.assemble((name, "bold"), more), soft_wrap=True)


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


def as_text(value: Any) -> Any:
    """What was typed (a list: each of it), its bytes read as UTF-8 where the locale knew no such letters.

    Raises ValueError: they are not UTF-8; or a path whose letters the locale does not know. safetensors and pictures
    take no such paths, and a run would end where its weights are saved.
    """
    if isinstance(value, list):
        return [as_text(one) for one in value]
    if not isinstance(value, str | Path) or not is_broken(str(value)):
        return value
    said = escaped(str(value) if len(str(value)) <= 80 else str(value)[:80] + "...")
    try:
        text = str(value).encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        raise ValueError(f"{said}: is not UTF-8") from None
    if isinstance(value, Path):
        raise ValueError(f"{said}: this locale has no such letters; PYTHONUTF8=1 reads names as UTF-8")
    return text


def is_broken(text: str) -> bool:
    """Whether there are bytes in it that were not read as letters."""
    return any("\ud800" <= c <= "\udfff" for c in text)


def there(path: Path, kind: str) -> None:
    """Raise FileNotFoundError, with the nearest name, where there is nothing: said before anything else is loaded."""
    if os.path.lexists(path):
        return
    missing = next(part for part in (*reversed(path.parents), path) if not os.path.lexists(part))
    above = missing.parent
    names = sorted(os.listdir(above)) if above.is_dir() and os.access(above, os.R_OK) else []
    near = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.5)
    raise FileNotFoundError(f"{path}: no such {kind}" + (f"; did you mean {str(above / near[0])!r}?" if near else ""))


Run = Annotated[Path, typer.Argument(help="A run folder.")]
Target = Annotated[Path, typer.Argument(help="A recipe (YAML) or a run folder.")]


def show_anything() -> None:
    """What a terminal cannot show is written in other letters instead of ending the program."""
    codecs.register_error("undertow.plain", _plain)
    for stream, how in ((sys.stdin, "surrogateescape"), (sys.stdout, "undertow.plain"), (sys.stderr, "undertow.plain")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=how)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """A handler of what an encoding lacks: our own drawings in ASCII, anything else as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return escaped(error.object[error.start : error.end].translate(PLAIN)), error.end


def escaped(text: str) -> str:
    """In ASCII; bytes that came as no UTF-8 are written as such."""
    return (
        "".join(f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)
        .encode("ascii", "backslashreplace")
        .decode()
    )


def finish() -> None:
    """Flush what was printed. Where that fails it is lost: nothing more is said about it when the process leaves."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
    for terminal in (out, errors):
        with terminal.capture():  # takes what could not be written, too
            pass


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
    """As `undertow.training.progress.quiet`, which loads the library."""
    from undertow.training import progress

    progress.quiet()
