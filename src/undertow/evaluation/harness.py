"""lm-eval's tasks on a model that recurs while it is scored: EleutherAI's harness, our model object.

LRT's own release (arXiv 2605.26797) scores its benchmarks with a pass that reads no memory; here they are scored under
true decoding, or under any schedule that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undertow.data.format import Memory, TextFormat
from undertow.evaluation.tables import plain
from undertow.recipe_base import choices, one_line
from undertow.schedules import Schedule

MISSING = "lm-eval is not installed: pip install 'undertow[eval]'"

Scores = dict[str, dict[str, float | int | None]]


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval, found and loaded: its `TaskManager` and its task and group objects."""

    manager: Any
    found: list


def run(model, tokenizer, tasks: Sequence[str], include: str | Path | None = None, **how) -> Scores:
    """Score a model on tasks of lm-eval, named as for `load`; `how`: keywords of `score`. Raises as these do."""
    _check(how.get("limit"), how.get("shots"))  # before the long part
    return score(model, tokenizer, load(tasks, include), **how)


def score(
    model,
    tokenizer,
    tasks: Tasks,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 16,
    schedule: Schedule | None = None,
    precision: str = "float32",
    memory: Memory | None = None,
    chat: bool | None = None,
    bos: bool | None = None,
    max_length: int | None = None,
    bootstrap: int = 1000,
    show: bool = False,
) -> Scores:
    """Score a model on tasks of lm-eval. Sets the global seeds, as lm-eval does.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        tokenizer: its `TextFormat`, or a tokenizer that carries it.
        tasks: of `load`.
        limit: only the first so many items of each task.
        shots: examples before each item; None: as the task says.
        batch_size: texts at a time.
        schedule: None takes the model's default in evaluation, true decoding.
        precision: `auto`, `float32` or `bfloat16`.
        memory: where it acts, see `TextFormat` (what is scored or generated is the response); None: as the format says.
        chat: lay questions out by the tokenizer's chat template; None: where it has one.
        bos: put the bos token, if there is one, before every text; None: as in training. lm-eval's `HFLM` leaves this
            to the tokenizer (most GPT-2 ones add none): False is what it does with those.
        max_length: most tokens read at once; None: the model's positions. Longer contexts lose their start.
        bootstrap: resamples for standard errors that have no formula; 0: no standard error at all.
        show: bars on stderr, if that is a terminal.

    Returns:
        A mapping for every task and group, with `samples`, every metric's value, and that of METRIC_stderr or None. A
        metric of another filter than lm-eval's `none` is named `metric,filter`.

    Raises:
        ValueError: a text that does not fit the model, `shots` or `limit` out of range. One line.
    """
    from lm_eval.evaluator import simple_evaluate

    from undertow.evaluation.harness_model import Recurrent

    _check(limit, shots)
    form = TextFormat.of(tokenizer, trained=True)
    chat = form.has_template if chat is None else chat
    results = simple_evaluate(
        model=Recurrent(model, form, batch_size, schedule, precision, memory, bos, max_length, show, chat),
        tasks=tasks.found,
        task_manager=tasks.manager,
        num_fewshot=shots,
        limit=limit,
        bootstrap_iters=bootstrap,
        log_samples=False,
        apply_chat_template=chat,
    )
    return {name: _flat(values) for name, values in results["results"].items()}


def _check(limit: int | None, shots: int | None) -> None:
    for name, value, least in (("shots", shots, 0), ("limit", limit, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")


def _flat(values: dict) -> dict[str, float | int | None]:
    flat: dict[str, float | int | None] = {"samples": values["sample_len"]} if "sample_len" in values else {}
    for key, value in values.items():
        name, comma, kind = key.partition(",")
        if comma:  # the others describe the task
            flat[name if kind == "none" else key] = None if value == "N/A" else value
    return flat


def load(tasks: Sequence[str], include: str | Path | None = None) -> Tasks:
    """Find tasks and read their data.

    Args:
        tasks: names of tasks, groups or tags (with `*`), or YAML files.
        include: a folder with more tasks. Where it holds all that are asked for, lm-eval's own thousands stay unread.

    Raises:
        ValueError: lm-eval is not installed, an unknown task, or one whose data cannot be had. One line.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise ValueError(MISSING) from error
    from datasets.exceptions import DatasetsError

    if include is not None and not Path(include).is_dir():
        raise ValueError(f"{include}: no such folder of tasks")
    if not tasks:
        raise ValueError("tasks: name at least one")
    files = [name for name in tasks if Path(name).suffix in (".yaml", ".yml")]
    named = [name for name in tasks if name not in files]
    for name in files:
        if not Path(name).is_file():
            raise ValueError(f"task {name}: no such file")
    manager = TaskManager(include_path=include, include_defaults=False)
    if not all(manager.match_tasks([name]) for name in named):
        manager = TaskManager(include_path=include)  # reads thousands of files
    for name in named:
        if not manager.match_tasks([name]):
            where = "lm-eval" if include is None else f"lm-eval or of {include}"
            raise ValueError(f"task {name!r}: not a task of {where}; {_near(name, manager.all_tasks)}")
    found: list = []
    for name in dict.fromkeys([*manager.match_tasks(named), *files]):
        try:
            loaded = manager.load(name)
        except (OSError, KeyError, ValueError, DatasetsError) as error:
            raise ValueError(f"task {name!r}: cannot be loaded: {one_line(error)}") from error
        inner = {child for children in loaded["group_map"].values() for child in children}
        found.extend([g for key, g in loaded["groups"].items() if key not in inner] or loaded["tasks"].values())
    return Tasks(manager, found)


def _near(name: str, known: list[str]) -> str:
    said = choices(name, known)
    return said if len(known) <= 20 else said.split("allowed:")[0] + f"{len(known)} are known"


def table(scores: Scores):
    """A line for every metric of every task."""
    made = plain("task", "metric", "items", "value", "standard error", left=2)
    for task, values in scores.items():
        for name, value in values.items():
            title, comma, kind = name.partition(",")
            if name == "samples" or title.endswith("_stderr"):
                continue
            error = values.get(f"{title}_stderr{comma}{kind}")
            items = f"{values['samples']:,}" if "samples" in values else ""
            made.add_row(task, name, items, _number(value), _number(error))
    return made


def _number(value: float | str | None) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "-" if value is None else str(value)
