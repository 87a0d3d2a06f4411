"""Accuracy on a task: exactly, with the gold answer given token by token, and by what the model writes itself."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice

import torch

from undertow.data.format import Encoded, TextFormat, Tokens
from undertow.evaluation import tables
from undertow.evaluation.batches import batches, most_positions, padded
from undertow.evaluation.writing import decoded, write
from undertow.schedules import Converge, Schedule
from undertow.tasks.base import Example, Record, Tags, Task
from undertow.training.precision import autocast

Z = 1.959963984540054  # of a 95 % interval
SHOWN = 2  # examples of each outcome that are kept


@dataclass(frozen=True)
class Bucket:
    """The accuracy on some of the records.

    Attributes:
        name: the bucket, or `all`.
        records: how many.
        accuracy: share of the records that are solved; with several samples a record, the mean share of its samples.
        low, high: 95 % interval (Wilson's, over records).
        token_accuracy: share of the target tokens that are the likeliest (None: nothing was compared by token).
        pass_at: k -> probability that one of k samples solves the record.
    """

    name: str
    records: int
    accuracy: float
    low: float
    high: float
    token_accuracy: float | None = None
    pass_at: Mapping[int, float] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Plain values; `pass@5` a key of its own, what was not measured left out."""
        values = asdict(self)
        ks = values.pop("pass_at")
        if self.token_accuracy is None:
            del values["token_accuracy"]
        return values | {f"pass@{k}": value for k, value in ks.items()}


@dataclass(frozen=True)
class Shown:
    """One example: what was given, what was to be written, what was written (the first sample), if that is right."""

    prompt: str
    gold: str
    written: str
    right: bool

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Accuracy:
    """What was measured.

    Attributes:
        overall: on all records.
        buckets: by `Example.bucket`, in the order of the numbers in their names.
        shown: a few solved and a few unsolved examples.
        solved: in the order of the records, the share of each one's samples that are right.
    """

    overall: Bucket
    buckets: tuple[Bucket, ...]
    shown: tuple[Shown, ...]
    solved: tuple[float, ...]

    def to_dict(self) -> dict:
        """Plain values, without the records' own ones."""
        lists = {name: [one.to_dict() for one in getattr(self, name)] for name in ("buckets", "shown")}
        return {key: value for key, value in self.overall.to_dict().items() if key != "name"} | lists


@dataclass(frozen=True)
class _Scored:
    """One record: how many of `samples` are right, how many of `tokens` (0: not compared by token)."""

    right: int
    shown: Shown
    samples: int = 1
    tokens: int = 0
    tokens_right: int = 0


@torch.no_grad()
def exact(
    model,
    task: Task,
    form: TextFormat,
    records: Iterable[Record],
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> Accuracy:
    """Sequence and token accuracy: is every target token the likeliest one, all before it being the gold ones?

    Targets are the response and the end token after it, whatever the loss counts; of tags, every token's tag. Each is
    read from the merged logits (the last sweep that read its position out). A record with more tokens than the model
    has learned positions counts as unsolved, with a warning.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        records: of a task of kind `answers` or `tags`.
        schedule: None takes true decoding, `Converge()`.
        batch_size: rows at a time, right-padded; it does not change the result.
        precision: `auto`, `float32` or `bfloat16`.

    Raises:
        ValueError: no records, or a prompt without a token.
    """
    examples, encoded = _encode(model, task, form, records)
    firsts = [1 if isinstance(e, Tags) else one.prompt for e, one in zip(examples, encoded, strict=True)]
    if 0 in firsts:
        raise ValueError(f"accuracy: record {firsts.index(0)} has a prompt without a token")
    limit = most_positions(model)
    read: list[list[int]] = [[] for _ in encoded]
    fitting = [i for i, one in enumerate(encoded) if limit is None or len(one.ids) <= limit]
    for places in batches([len(encoded[i].ids) for i in fitting], batch_size):
        rows = [fitting[place] for place in places]
        batch = {
            "input_ids": padded([encoded[i].ids for i in rows], form.tokenizer.eos_token_id),
            "attention_mask": padded([[1] * len(encoded[i].ids) for i in rows], 0),
        }
        if form.memory != "all":
            batch["memory_mask"] = padded([encoded[i].memory for i in rows], 0)
        before = min(firsts[i] for i in rows) - 1  # the first position that any target is read from
        asked = torch.arange(before, batch["input_ids"].shape[1] - 1)
        batch = {name: x.to(model.device) for name, x in (batch | {"logits_to_keep": asked}).items()}
        with autocast(precision, model.device):
            out = model(**batch, schedule=schedule or Converge(), use_cache=False)
        likeliest = out.logits.argmax(-1).tolist()
        for row, i in zip(likeliest, rows, strict=True):
            read[i] = row[firsts[i] - 1 - before : len(encoded[i].ids) - 1 - before]
    scored = []
    for example, one, first, found in zip(examples, encoded, firsts, read, strict=True):
        target = one.labels[first:]
        same = sum(a == b for a, b in zip(found, target, strict=False))  # nothing was read where it does not fit
        text = decoded(form.tokenizer, found)
        shown = Shown(*_texts(example), text, same == len(target))
        scored.append(_Scored(int(shown.right), shown, tokens=len(target), tokens_right=same))
    return _summed(examples, scored, ())


def generated(
    model,
    task: Task,
    form: TextFormat,
    records: Iterable[Record],
    batch_size: int = 16,
    precision: str = "float32",
    samples: int = 1,
    temperature: float = 0.8,
    pass_at: Sequence[int] = (),
    max_new_tokens: int | None = None,
    seed: int = 0,
) -> Accuracy:
    """Accuracy of what the model writes after the prompts, by the task's own scorer.

    Args:
        model, batch_size, precision, temperature, seed: as in `writing.write`.
        records: of a task of kind `answers`.
        samples: texts a record; one is greedy.
        pass_at: each k from 1 to `samples`; estimated without bias as 1 - C(n-c, k) / C(n, k), c of n samples right
            (Chen et al., arXiv 2107.03374).
        max_new_tokens: None takes the tokens of the longest gold response of these records.

    Raises:
        ValueError: no records, tags, or a number out of its range.
    """
    for k in pass_at:
        if not 1 <= k <= samples:
            raise ValueError(f"pass_at={k}: must be from 1 to samples={samples}")
    records = list(records)
    examples, encoded = _encode(model, task, form, records)
    if isinstance(examples[0], Tags):
        raise ValueError(f"{type(task).__name__}: tags are read off, not written; measure them with `exact`")
    longest = max(len(one.ids) - one.prompt for one in encoded)
    written = write(
        model,
        form,
        [Tokens(one.ids[: one.prompt], one.memory[: one.prompt]) for one in encoded],
        longest if max_new_tokens is None else max_new_tokens,
        batch_size,
        precision,
        samples,
        temperature,
        seed,
    )
    scored = []
    for record, example, texts in zip(records, examples, written, strict=True):
        right = [task.correct(record, text) for text in texts]
        scored.append(_Scored(sum(right), Shown(*_texts(example), texts[0], right[0]), samples))
    return _summed(examples, scored, pass_at)


def wanted(data, settings) -> bool:
    """Whether task accuracy is to be measured: as the recipe's `evaluation.accuracy` says, else where there is a task.

    Raises:
        ValueError: it is asked for, but the data has neither answers nor tags.
    """
    possible = data.task is not None and data.task.kind in ("answers", "tags")
    if settings.accuracy and not possible:
        what = "plain text" if data.task is None else f"{type(data.task).__name__}, a task of kind {data.task.kind!r}"
        raise ValueError(f"evaluation.accuracy: data.source is {what}; it needs a task of kind 'answers' or 'tags'")
    return possible if settings.accuracy is None else settings.accuracy


def measure(model, data, settings) -> dict:
    """Task accuracy of a run, as plain values: `exact`, and for answers `generated`.

    Args:
        data: with `task` and `format`.
        settings: the recipe's section `evaluation`.
    """
    records = list(islice(data.task.records(settings.split), settings.records))
    size, precision = settings.batch_size, settings.precision
    found = exact(model, data.task, data.format, records, None, size, precision)
    result = {"split": settings.split, "exact": found.to_dict()}
    if data.task.kind == "answers":
        choice = {"samples": settings.samples, "temperature": settings.value("temperature")}
        passes = settings.pass_at or ((settings.samples,) if settings.samples > 1 else ())
        choice |= {"pass_at": passes, "max_new_tokens": settings.max_new_tokens}
        found = generated(model, data.task, data.format, records, size, precision, **choice)
        result["generated"] = found.to_dict()
    return result


def wilson(right: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: `right` of `count`."""
    p, spread = right / count, Z * Z / count
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))  # rounding must not leave p outside


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Without bias, the probability that one of k samples is right, if `right` of `samples` were."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def table(found: Mapping):
    """A line for every way of measuring and, below it, one for each bucket; `found` as `measure` returns it."""
    ways = {way: found[way] for way in ("exact", "generated") if way in found}
    passes = list(dict.fromkeys(key for way in ways.values() for key in way if key.startswith("pass@")))
    made = tables.plain(f"on {found['split']}", "records", "accuracy", "95 %", "tokens", *passes, left=1)
    for way, overall in ways.items():
        several = overall["buckets"] if len(overall["buckets"]) > 1 else []
        for name, one in ((way, overall), *((f"  {bucket['name']}", bucket) for bucket in several)):
            more = [_percent(one.get(key)) for key in ("token_accuracy", *passes)]
            interval = f"{one['low']:.1%} - {one['high']:.1%}"
            made.add_row(name, f"{one['records']:,}", _percent(one["accuracy"]), interval, *more)
    return made


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _encode(
    model, task: Task, form: TextFormat, records: Iterable[Record]
) -> tuple[list[Example | Tags], list[Encoded]]:
    """The records as examples and as tokens; says how many of them the model has no positions for."""
    if task.kind not in ("answers", "tags"):
        raise ValueError(
            f"accuracy: {type(task).__name__} is of kind {task.kind!r}; allowed are those of 'answers' and 'tags'"
        )
    examples = [task.example(record) for record in records]
    if not examples:
        raise ValueError("accuracy: there are no records")
    encoded, limit = [form.example(example) for example in examples], most_positions(model)
    long = 0 if limit is None else sum(len(one.ids) > limit for one in encoded)
    if long:
        warnings.warn(
            f"accuracy: {long} of {len(encoded)} records have more tokens than the model's {limit} learned positions; "
            "they count as unsolved",
            stacklevel=3,
        )
    return examples, encoded


def _texts(example: Example | Tags) -> tuple[str, str]:
    """What is given and what is to be written."""
    return (example.input, example.target) if isinstance(example, Tags) else (example.prompt, example.response)


def _summed(examples: Sequence[Example | Tags], scored: Sequence[_Scored], pass_at: Sequence[int]) -> Accuracy:
    by_name: dict[str, list[_Scored]] = {}
    for example, one in zip(examples, scored, strict=True):
        by_name.setdefault(example.bucket, []).append(one)
    shown = [[one.shown for one in scored if one.shown.right is right][:SHOWN] for right in (True, False)]
    return Accuracy(
        _bucket("all", scored, pass_at),
        tuple(_bucket(name, by_name[name], pass_at) for name in sorted(by_name, key=_in_numbers)),
        tuple(shown[0] + shown[1]),
        tuple(one.right / one.samples for one in scored),
    )


def _bucket(name: str, scored: Sequence[_Scored], pass_at: Sequence[int]) -> Bucket:
    count, tokens = len(scored), sum(one.tokens for one in scored)
    right = sum(one.right / one.samples for one in scored)
    passes = {k: sum(pass_at_k(one.samples, one.right, k) for one in scored) / count for k in pass_at}
    by_token = sum(one.tokens_right for one in scored) / tokens if tokens else None
    return Bucket(name, count, right / count, *wilson(right, count), by_token, passes)


def _in_numbers(name: str) -> list[str | int]:
    """A sort key: "depth 2" before "depth 10"."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
