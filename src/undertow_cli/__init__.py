"""The command line: one file a verb.

It lies beside the library, not in it: `import undertow` loads torch and transformers, and `undertow --help` must
answer at once. Only typer and rich load here; the library is imported inside the verbs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from undertow_cli import (
    bench,
    check,
    compare,
    data,
    evaluate,
    export,
    generate,
    import_,
    report,
    serve,
    show,
    sweep,
    train,
)
from undertow_cli.console import Closed, as_text, errors, finish, out, say, show_anything, there

__all__ = ["app", "main"]

# Newer typer carries its own copy of click: take the classes from typer, which exports this one in every version.
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="undertow",
    help="Recurrent transformers: layers reused over depth, a latent state carried over time.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
RESUMES = "--resume goes on from the last checkpoint"
VERBS: dict[str, tuple[Callable[..., None], str]] = {  # and what each says when a signal ends it
    "show": (show.show, "nothing was changed"),
    "train": (train.train, RESUMES),
    "compare": (compare.compare, RESUMES),
    "sweep": (sweep.sweep, RESUMES),
    "eval": (evaluate.evaluate, "what was measured before is kept"),
    "generate": (generate.generate, "the text ends here"),
    "serve": (serve.serve, "the server is closed"),
    "check": (check.check, "the checks were not finished; nothing was changed"),
    "report": (report.report, "the page is drawn again by the same command"),
    "bench": (bench.bench, "rows that were measured are kept where --out says"),
    "data": (data.data, "the same command begins anew"),
    "import": (import_.import_, "what --out holds, if anything, is not whole"),
    "export": (export.export, "what --out holds, if anything, is not whole"),
}
READ = {  # the argument that names what a verb reads, and what that is
    **dict.fromkeys(("show", "train", "check"), ("target", "file")),
    **dict.fromkeys(("eval", "generate", "serve", "report", "import", "export"), ("folder", "folder")),
    "compare": ("files", "file"),
    "sweep": ("file", "file"),
}


def _stoppable(name: str, verb: Callable[..., None], said: str) -> Callable[..., None]:
    """The verb, ended by a signal with words of its own; what it reads is there before the library loads."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        given = {key: as_text(value) for key, value in kwargs.items()}
        argument, kind = READ.get(name, (None, ""))
        paths = () if argument is None else given[argument]
        for path in paths if isinstance(paths, list | tuple) else (paths,):
            there(path, kind)
        from undertow.training import signals

        try:
            with signals.raised(), signals.stopped_with(said):
                verb(*args, **given)
        except signals.Stopped as stop:
            say(str(stop))
            raise typer.Exit(stop.status) from None

    return run


for _name, (_verb, _said) in VERBS.items():
    app.command(_name)(_stoppable(_name, _verb, _said))


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", envvar="UNDERTOW_DEBUG", help="Show the traceback of every error."),
) -> None:
    if debug:
        os.environ["UNDERTOW_DEBUG"] = "1"
    if context.invoked_subcommand is None:
        context.get_help()  # typer prints it


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 a mistake in what was asked (one line on stderr), 128 + n: signal n."""
    # OpenMP threads that spin while they wait stop each other dead on a machine that has other work: measured 4 times
    # slower training and 9 times slower decoding. Torch reads this when it loads, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out.quiet = os.environ.get("RANK", "0") != "0"  # under torchrun one process speaks
    show_anything()
    status = _run(arguments)
    finish()
    sys.exit(status)


def _run(arguments: list[str] | None) -> int:
    """The exit status."""
    try:
        return app(arguments, prog_name="undertow", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):  # before a verb began
        say("stopped by SIGINT; nothing had begun")
        return 128 + signal.SIGINT
    except Closed:
        return 141  # as of a program that SIGPIPE ends
    except UnicodeEncodeError as error:
        return _refused(f"{error.object[:60]!r}: is not UTF-8", error)
    except ClickException as error:
        return _refused(error.format_message(), error)
    except (ValueError, OSError, FloatingPointError) as error:
        return _refused(str(error), error)


def _refused(message: str, error: Exception) -> int:
    """One line on stderr (with UNDERTOW_DEBUG=1 the traceback first); returns the exit status."""
    if os.environ.get("UNDERTOW_DEBUG", "0") not in ("", "0"):
        errors.print_exception()
    say(f"error: {' '.join(message.split()) or type(error).__name__}")
    return 2
