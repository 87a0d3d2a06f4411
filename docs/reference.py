"""What the reference pages are filled with at build time: `python docs/reference.py` prints the command line's.

A page says `<!-- commands -->`, and the command line is described there, read off the program that runs it; or
`<!-- modules: PACKAGE -->`, and every module of the package is documented there from its docstrings.
"""

import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import typer

from undertow_cli import app

MARK = "<!-- commands -->"
WORDS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}  # what an option without a metavar takes


def filled(page: str) -> str:
    """The page with what it asks for."""
    page = re.sub(r"<!-- modules: (\S+) -->", lambda found: modules(found[1]), page)
    return page.replace(MARK, commands()) if MARK in page else page


def modules(package: str) -> str:
    """A section for every module of a package."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}.")
    return "\n\n".join(f"## {m.name}\n\n```{{eval-rst}}\n.. automodule:: {m.name}\n   :members:\n```" for m in found)


def commands() -> str:
    """Every command as Markdown: what it does, how it is called, its arguments and options."""
    group = typer.main.get_command(app)
    return "\n\n".join(_command(name, command) for name, command in group.commands.items())


def _command(name, command) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    call = " ".join(["undertow", name, *(_called(p) for p in arguments), *(["[OPTIONS]"] if options else [])])
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    rows = [(_called(p).strip("[]"), p) for p in arguments] + [(_names(p, hints[p.name]), p) for p in options]
    table = ["| | |", "|---|---|", *(f"| `{said}` | {_help(p)} |" for said, p in rows)]
    return "\n".join([f"## undertow {name}", "", inspect.cleandoc(command.help), "", f"    {call}", "", *table])


def _called(parameter) -> str:
    """An argument as one types it: brackets around what may be left out, dots after what repeats."""
    word = (parameter.metavar or parameter.name.upper()).strip("[]") + (" ..." if parameter.nargs == -1 else "")
    return word if parameter.required else f"[{word}]"


def _names(parameter, hint) -> str:
    """The names of an option, and of its value if it takes one."""
    names = " / ".join([*parameter.opts, *parameter.secondary_opts])
    if parameter.is_flag:
        return names
    kinds = {hint, *typing.get_args(hint)}
    return f"{names} {parameter.metavar or next(word for kind, word in WORDS.items() if kind in kinds)}"


def _help(parameter) -> str:
    """What a parameter means, and its default where that says something."""
    said, default = (parameter.help or "").replace("|", "\\|"), parameter.default
    if default is None or default is False or default == [] or parameter.required or "efault" in said:
        return said
    return f"{said} Default: {default}."


if __name__ == "__main__":
    print(commands())
