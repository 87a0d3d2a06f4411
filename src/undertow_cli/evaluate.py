"""`undertow eval`: how good a trained model is, as it was trained and as it decodes.

What is measured only when asked for is one function each: it checks what was asked at once and returns what to run
after the long part. Another one is another line in `evaluate` and another function.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undertow_cli.console import Accept, Device, Memory, Overrides, Run, of_puzzles, only, out, quiet

if TYPE_CHECKING:
    from rich.table import Table

Measured = tuple[Any, "Table"]  # plain values for evaluation.json, and what is printed
Later = Callable[[], Measured]


def evaluate(
    context: typer.Context,
    folder: Run,
    schedules: Annotated[
        list[str], typer.Option("--schedule", help="One more schedule, e.g. 'Cyclic(16, 2)'. Repeats.")
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    memory: Memory = "run",
    accept: Accept = False,
    device: Device = "auto",
    buckets: Annotated[int | None, typer.Option(min=1, help="Also score buckets of so many positions.")] = None,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="Also score every sweep, and zero memory.")] = False,
    exits: Annotated[list[str], typer.Option("--exit", help="Decode with an exit rule, e.g. kl:5e-4. Repeats.")] = [],  # noqa: B006
    readahead: Annotated[
        int | None,
        typer.Option(min=0, help="Also read later tokens off the model without its last 0..N layers."),
    ] = None,
    accuracy: Annotated[
        bool | None,
        typer.Option("--accuracy/--no-accuracy", help="Accuracy on the task (default: if the data is one)."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of the task: train, validation or test.")] = None,
    records: Annotated[int | None, typer.Option(min=1, help="At most so many records (of text: documents).")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Answers to draw for each record.")] = None,
    pass_at: Annotated[str | None, typer.Option(metavar="K,K,..", help="pass@k for each k up to --samples.")] = None,
    lengths: Annotated[str | None, typer.Option(metavar="N,N,..", help="Also score contexts of N tokens.")] = None,
    context_lengths: Annotated[
        str | None, typer.Option(metavar="N,N,..", help="Also each text cut to its first N tokens: the mean of texts.")
    ] = None,
    shots: Annotated[str | None, typer.Option(metavar="K,K,..", help="Accuracy after K solved examples.")] = None,
    icl: Annotated[bool, typer.Option("--icl", help="Also loss by position, and what context is worth.")] = False,
    tasks: Annotated[
        list[str],
        typer.Option("--tasks", metavar="NAME,..", help="Also tasks of lm-eval, or YAML files of tasks. Repeats."),
    ] = [],  # noqa: B006
    include: Annotated[Path | None, typer.Option(metavar="DIR", help="A folder with more tasks for --tasks.")] = None,
    task_shots: Annotated[int | None, typer.Option(min=0, help="Examples before each item of --tasks.")] = None,
    core: Annotated[Path | None, typer.Option(metavar="DIR", help="Also CORE: the folder of its bundle.")] = None,
) -> None:
    """Measure bits per byte under the training schedule and under true decoding, accuracy on a task, and speed.

    Of a run on puzzles: accuracy against supervision steps, and with early exit.
    """
    from undertow.analysis.columns import table
    from undertow.evaluation.accuracy import table as accuracy_table
    from undertow.training import run

    quiet()
    if of_puzzles(folder):
        from undertow_cli import puzzles

        only(context, "a run on puzzles", "folder", "overrides", "device")
        puzzles.evaluate(folder, overrides, device)
        return
    passes = _numbers("--pass-at", pass_at, least=1)
    changed = {"accuracy": accuracy, "split": split, "records": records, "samples": samples, "pass_at": passes}
    overrides = [*overrides, *(f"evaluation.{k}={json.dumps(v)}" for k, v in changed.items() if v is not None)]
    ready = Ready(folder, tuple(overrides), device, memory, accept)
    asked = {
        "modes": _modes(ready, buckets, sweeps),
        "readahead": _readahead(ready, readahead),
        "exits": _exits(ready, exits),
        "lengths": _lengths(ready, _numbers("--lengths", lengths, least=2)),
        "context_lengths": _context_lengths(ready, _numbers("--context-lengths", context_lengths, least=2)),
        "shots": _shots(ready, _numbers("--shots", shots, least=0)),
        "icl": _in_context(ready) if icl else None,
        "lm_eval": _lm_eval(ready, tasks, include, records, task_shots),
        "core": _core(ready, core, records),
    }
    result = run.evaluate(folder, overrides=overrides, schedules=schedules, device=device, memory=memory, accept=accept)
    out.print(table({folder.name: [result]}))
    if "accuracy" in result and ready.settings.accuracy is not False:  # else it is what was measured after training
        out.print("", accuracy_table(result["accuracy"]))
    for name, measure in asked.items():
        if measure is not None:
            result[name], shown = measure()
            out.print("", shown)
            run.write_json(folder / "evaluation.json", result)


@dataclass(frozen=True)
class Ready:
    """The run that is evaluated; model and data are loaded when first used."""

    folder: Path
    overrides: Sequence[str]
    device: str
    memory: str
    accept: bool

    @cached_property
    def recipe(self):
        from undertow import recipe

        return recipe.load(self.folder, self.overrides)

    @cached_property
    def loaded(self):
        from undertow.training import run

        return run.load(self.folder, self.device)

    @property
    def model(self):
        return self.loaded.model

    @cached_property
    def data(self):
        from undertow.training import run

        return run.reopen(self.folder, self.recipe, self.accept, self.memory)

    @property
    def settings(self):
        return self.recipe.evaluation

    @property
    def how(self) -> dict:
        """Keywords of nearly everything that measures."""
        return {"batch_size": self.settings.batch_size, "precision": self.settings.precision}

    @cached_property
    def documents(self):
        from undertow.evaluation.documents import validation_documents

        source, data = self.recipe.data, self.data
        return validation_documents(source.source, source.validation, data.task, data.tokenizer, self.settings.records)


def _numbers(option: str, text: str | None, least: int) -> list[int] | None:
    """ "1,5" as [1, 5]. Raises ValueError: not whole numbers, or below the least allowed."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ValueError(f"{option} {text!r}: must be whole numbers of at least {least}, with commas between them")
    return [int(part) for part in parts]


def _modes(ready: Ready, bucket: int | None, sweeps: bool) -> Later | None:
    if bucket is None and not sweeps:
        return None

    def measure() -> Measured:
        from undertow.evaluation import bits

        data = ready.data
        found = bits.modes(ready.model, data.validation, data.token_bytes, bucket=bucket, sweeps=sweeps, **ready.how)
        return {name: score.to_dict() for name, score in found.items()}, _modes_table(found)

    return measure


def _modes_table(found):
    """A line for every mode, merged, and below it one for each of its parts."""
    from undertow.evaluation.tables import plain

    made = plain("mode", "part", "tokens", "nats/token", "bits/byte", left=2)
    for mode, score in found.items():
        made.add_row(mode, "merged", f"{score.tokens:,}", f"{score.nats_per_token:.4f}", f"{score.bits_per_byte:.4f}")
        for part in (*score.sweeps, *score.buckets):
            size = "-" if part.bits_per_byte is None else f"{part.bits_per_byte:.4f}"
            made.add_row("", part.name, f"{part.tokens:,}", f"{part.nats_per_token:.4f}", size)
    return made


def _readahead(ready: Ready, most: int | None) -> Later | None:
    if most is None:
        return None
    from undertow.analysis import readahead as ahead

    ahead.cut(ready.model, most)  # too many layers: said before the long part

    def measure() -> Measured:
        found = [ahead.readahead(ready.model, ready.data.validation, skip, **ready.how) for skip in range(most + 1)]
        return [depth.to_dict() for depth in found], ahead.table(found)

    return measure


def _exits(ready: Ready, texts: Sequence[str]) -> Later | None:
    if not texts:
        return None
    from undertow.evaluation import exits
    from undertow.exits import Exit

    rules = [Exit("change", 0.0), *map(Exit.parse, texts)]  # the first never leaves: the same rows whole

    def measure() -> Measured:
        data = ready.data
        rows = data.validation.head(ready.settings.rows or len(data.validation))  # token by token: those of the curve
        found = exits.exits(ready.model, rows, data.token_bytes, rules, **ready.how)
        return [one.to_dict() for one in found], exits.table(found)

    return measure


def _lengths(ready: Ready, numbers: Sequence[int] | None) -> Later | None:
    if numbers is None:
        return None

    def measure() -> Measured:
        from undertow.evaluation import lengths

        data = ready.data
        found = lengths.lengths(ready.model, ready.documents, data.format, data.token_bytes, numbers, **ready.how)
        return [one.to_dict() for one in found], lengths.table(found)

    return measure


def _context_lengths(ready: Ready, numbers: Sequence[int] | None) -> Later | None:
    if numbers is None:
        return None

    def measure() -> Measured:
        from undertow.evaluation import documents, lengths

        source, data = ready.recipe.data, ready.data
        how = (source.source, source.validation, data.task, data.tokenizer, ready.settings.records)
        found = lengths.first_tokens(ready.model, documents.validation_tokens(*how), numbers, **ready.how)
        return [one.to_dict() for one in found], lengths.cut_table(found)

    return measure


def _shots(ready: Ready, numbers: Sequence[int] | None) -> Later | None:
    if numbers is None:
        return None
    task, settings = ready.data.task, ready.settings
    if task is None or task.kind != "answers":
        raise ValueError("--shots: data.source must be a task with answers")

    def measure() -> Measured:
        from undertow.evaluation import incontext

        records = islice(task.records(settings.split), settings.records)
        keywords = {"max_new_tokens": settings.max_new_tokens, **ready.how}
        found = incontext.few_shot(ready.model, task, ready.data.format, records, numbers, **keywords)
        return [one.to_dict() for one in found], incontext.shots_table(found)

    return measure


def _in_context(ready: Ready) -> Later:
    def measure() -> Measured:
        from undertow.evaluation import incontext

        length = ready.recipe.data.seq_len
        found = incontext.in_context(ready.model, ready.documents, ready.data.format, length, **ready.how)
        return found.to_dict(), incontext.position_table(found)

    return measure


def _lm_eval(
    ready: Ready, names: Sequence[str], include: Path | None, limit: int | None, shots: int | None
) -> Later | None:
    asked = [name.strip() for text in names for name in text.split(",") if name.strip()]
    if not asked:
        return None
    from undertow.evaluation import harness

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # defaults that a task leaves open, shots that were asked for
    tasks = harness.load(asked, include)

    def measure() -> Measured:
        found = harness.score(ready.model, ready.data.format, tasks, limit, shots, show=True, **ready.how)
        return found, harness.table(found)

    return measure


def _core(ready: Ready, folder: Path | None, limit: int | None) -> Later | None:
    if folder is None:
        return None
    from undertow.evaluation import core

    core.read(folder)  # what is missing there is said before the long part

    def measure() -> Measured:
        found = core.run(ready.model, ready.data.format, folder, limit, show=True, **ready.how)
        return found.to_dict(), core.table(found)

    return measure
