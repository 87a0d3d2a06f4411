"""CORE: one number from 22 few-shot tasks (DCLM, arXiv 2406.11794), on the bundle that nanochat publishes.

    core.yaml             icl_tasks: [{label, icl_task_type, dataset_uri, num_fewshot: [n], continuation_delimiter}]
    eval_data/TASK.jsonl  the items of each task, one a line
    eval_meta_data.csv    columns "Eval Task" and "Random baseline" (percent)

LRT's release (arXiv 2605.26797) scores CORE with a pass that reads no memory; here the model recurs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os.path import commonprefix
from pathlib import Path

import yaml

from undertow.data.format import TextFormat, checked
from undertow.evaluation import likelihood
from undertow.evaluation.tables import plain
from undertow.recipe_base import one_line
from undertow.schedules import Schedule
from undertow.tasks import files

FIELDS = {  # of an item, by type of task
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}  # what `gold` counts


@dataclass(frozen=True)
class Task:
    """A task of the bundle.

    Attributes:
        label: its name.
        kind: `multiple_choice`, `schema` or `language_modeling`.
        items: in the order in which they are asked (shuffled with the published seed, then cut).
        shots: examples before each item, drawn among the other items.
        delimiter: what stands between context and continuation.
        baseline: percent right by chance.
    """

    label: str
    kind: str
    items: tuple[dict, ...]
    shots: int
    delimiter: str
    baseline: float


@dataclass(frozen=True)
class Score:
    """A task's accuracy, and centred: 0 at chance, 1 when all is right."""

    label: str
    accuracy: float
    centred: float
    items: int


@dataclass(frozen=True)
class Core:
    """CORE, the mean of the centred accuracies, and each of them."""

    core: float
    tasks: tuple[Score, ...]

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {"core": self.core, "tasks": [asdict(task) for task in self.tasks]}


def run(
    model,
    tokenizer,
    folder: str | Path,
    limit: int | None = None,
    batch_size: int = 16,
    schedule: Schedule | None = None,
    precision: str = "float32",
    max_length: int | None = None,
    show: bool = False,
) -> Core:
    """CORE of a model.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        tokenizer: its `TextFormat`, or a tokenizer that carries it: texts begin as in training, and the memory acts
            where it did, a continuation being the response. A text of which nothing else stands before what is scored
            begins with eos.
        folder: the published bundle.
        limit: only the first so many items of each task, after shuffling (nanochat takes 500 during training).
        batch_size: texts at a time.
        schedule: None takes the model's default in evaluation, true decoding.
        precision: `auto`, `float32` or `bfloat16`.
        max_length: most tokens read at once; None: the model's positions. Longer texts lose their start.
        show: a bar a task on stderr, if that is a terminal.

    Raises:
        FileNotFoundError: the bundle or one of its files is not there.
        ValueError: a file of the bundle is torn or does not say what it must, or an answer does not fit the model.
    """
    form = checked(TextFormat.of(tokenizer, trained=True))
    room = max_length or likelihood.positions(model)
    scores = []
    for task in read(folder, limit):
        asked = [spans(task, i, form) for i in range(len(task.items))]
        texts = [span for item in asked for span in item]
        fitting = likelihood.fit(texts, room, task.label)
        title = task.label if show else None
        found = iter(likelihood.ends(model, fitting, schedule, batch_size, precision, form.memory, show=title))
        right = sum(_right(task, i, [next(found) for _ in item]) for i, item in enumerate(asked))
        accuracy = right / len(task.items)
        scores.append(Score(task.label, accuracy, centred(accuracy, task.baseline), len(task.items)))
    return Core(sum(score.centred for score in scores) / len(scores), tuple(scores))


def centred(accuracy: float, baseline: float) -> float:
    """The share of what chance leaves open; `baseline` in percent."""
    return (accuracy - 0.01 * baseline) / (1 - 0.01 * baseline)


def prompts(task: Task, index: int) -> list[str]:
    """The texts of an item after its examples: one a choice, one a context; of language modelling the text without its
    continuation and with it."""
    others = [i for i in range(len(task.items)) if i != index]
    drawn = random.Random(1234 + index).sample(others, task.shots)
    before = "".join(f"{_answered(task, task.items[i])}\n\n" for i in drawn)
    item = task.items[index]
    if task.kind == "multiple_choice":
        return [f"{before}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{before}{context}{task.delimiter}{item['continuation']}" for context in item["context_options"]]
    # A space that ends the context would be a token of its own, but part of the continuation's first one.
    without = f"{before}{item['context'].strip()}{task.delimiter}"
    return [without.strip(), without + item["continuation"]]


def _answered(task: Task, item: dict) -> str:
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    context = item["context_options"][item["gold"]] if task.kind == "schema" else item["context"].strip()
    return f"{context}{task.delimiter}{item['continuation']}"


def spans(task: Task, index: int, form: TextFormat) -> list[tuple[list[int], int]]:
    """`(tokens, N)`, one a text: the last N are what is scored, where the texts differ (schema: where they agree).

    Raises:
        ValueError: a continuation without a token of its own.
    """
    form = TextFormat.of(form, trained=True)
    texts = [form.begun(ids) for ids in form.encode(prompts(task, index))]
    if not form.before and task.kind != "schema" and not commonprefix(texts):
        texts = [[form.tokenizer.eos_token_id, *ids] for ids in texts]
    if task.kind == "schema":
        shared = len(commonprefix([text[::-1] for text in texts]))
        sizes = [min(shared, len(text) - 1) for text in texts]
    else:
        sizes = [len(text) - len(commonprefix(texts)) for text in texts]
    if task.kind == "language_modeling":
        texts, sizes = texts[1:], sizes[1:]
    else:
        sizes = [max(1, N) for N in sizes]  # a choice that begins another one, or contexts that end differently
    if not all(sizes):
        raise ValueError(f"{task.label}, item {index + 1} as shuffled: the continuation has no token of its own")
    return list(zip(texts, sizes, strict=True))


def _right(task: Task, index: int, found: Sequence[tuple]) -> bool:
    """Whether every token is the likeliest, or the right option has the least loss a token."""
    if task.kind == "language_modeling":
        return bool(found[0][1].all())
    losses = [-log_p.mean().item() for log_p, _ in found]
    return losses.index(min(losses)) == task.items[index]["gold"]


def read(folder: str | Path, limit: int | None = None) -> list[Task]:
    """The tasks of a bundle. Arguments as of `run`; raises what it raises, ValueError and FileNotFoundError."""
    folder = Path(folder)
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: must be at least 1")
    listed = folder / "core.yaml"
    if not listed.is_file():
        raise FileNotFoundError(f"{listed}: no such file; a CORE bundle has core.yaml, eval_data/, eval_meta_data.csv")
    try:
        values = yaml.safe_load(listed.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{listed}: not readable as YAML: {one_line(error)}") from None
    entries = values.get("icl_tasks") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{listed}: icl_tasks: must be a list of tasks")
    meta = folder / "eval_meta_data.csv"
    baselines = {row["Eval Task"]: row for row in files.read(meta, ("Eval Task", "Random baseline"))}
    return [_task(folder, listed, entry, meta, baselines, limit) for entry in entries]


def _task(folder: Path, listed: Path, entry, meta: Path, baselines: dict, limit: int | None) -> Task:
    try:
        label, kind, place = entry["label"], entry["icl_task_type"], folder / "eval_data" / entry["dataset_uri"]
        shots = int(entry["num_fewshot"][0])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"{listed}: {entry!r}: needs label, icl_task_type, dataset_uri and num_fewshot: [n] ({error!r})"
        ) from None
    if kind not in FIELDS:
        raise ValueError(f"{listed}: {label}: icl_task_type {kind!r}: allowed: {', '.join(FIELDS)}")
    try:
        baseline = float(baselines[label]["Random baseline"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{meta}: {label}: no Random baseline in percent ({error!r})") from None
    if not 0 <= baseline < 100:
        raise ValueError(f"{meta}: {label}: Random baseline {baseline}: must be in 0..100 percent, 100 not included")
    items = list(files.read(place, FIELDS[kind]))
    for line, item in enumerate(items, start=1):
        count = len(item[OPTIONS[kind]]) if kind in OPTIONS else 1
        if kind in OPTIONS and item["gold"] not in range(count):
            raise ValueError(f"{place}, record {line}: gold {item['gold']!r}: must be in 0..{count - 1}")
    random.Random(1337).shuffle(items)
    items = items[:limit]
    if len(items) <= shots:
        raise ValueError(f"{place}: {label}: {len(items)} items: {shots} examples and one item need more")
    return Task(label, kind, tuple(items), shots, entry.get("continuation_delimiter", " "), baseline)


def table(found: Core):
    """A line for every task, and CORE below them."""
    made = plain("task", "items", "accuracy", "centred", left=1)
    for score in found.tasks:
        made.add_row(score.label, f"{score.items:,}", f"{score.accuracy:.4f}", f"{score.centred:.4f}")
    made.add_section()
    made.add_row("CORE", f"{sum(score.items for score in found.tasks):,}", "", f"{found.core:.4f}")
    return made
