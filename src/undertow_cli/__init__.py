"""The command line: one file a verb. Only typer and rich load here; torch loads inside the verb that needs it."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from undertow.training import signals
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
from undertow_cli.console import errors, out

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
app.command("show")(show.show)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.command("sweep")(sweep.sweep)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("check")(check.check)
app.command("report")(report.report)
app.command("bench")(bench.bench)
app.command("data")(data.data)
app.command("import")(import_.import_)
app.command("export")(export.export)


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
    try:
        with signals.raised():
            status = app(arguments, prog_name="undertow", standalone_mode=False)
    except signals.Stopped as stop:
        errors.print(str(stop), soft_wrap=True, highlight=False, markup=False)
        sys.exit(stop.status)
    except ClickException as error:
        status = _say(error.format_message(), error)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except (ValueError, OSError, FloatingPointError) as error:
        status = _say(str(error), error)
    if status == 130:  # typer turns an interrupt into this status itself
        errors.print("stopped; --resume goes on from the last checkpoint", highlight=False)
    sys.exit(status or 0)


def _say(message: str, error: Exception) -> int:
    """One line on stderr (with UNDERTOW_DEBUG=1 the traceback first); returns the exit status."""
    if os.environ.get("UNDERTOW_DEBUG", "0") not in ("", "0"):
        errors.print_exception()
    line = " ".join(message.split()) or type(error).__name__
    errors.print(f"error: {line}", soft_wrap=True, highlight=False, markup=False)
    return 2
