"""Learning in context: how much later tokens gain from the text before them, and tasks with solved examples before."""

from __future__ import annotations

import random
import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import torch
from torch.nn import functional

from undertow.data import Document
from undertow.data.format import TextFormat
from undertow.data.packing import tokenise
from undertow.evaluation import tables
from undertow.evaluation.accuracy import Accuracy, generated
from undertow.schedules import Converge, Schedule
from undertow.tasks.base import Example, Record, Task
from undertow.training.precision import autocast

EARLY, LATE, OF = 50, 500, 512  # Olsson et al. compare the 500th with the 50th token of contexts of 512


@dataclass(frozen=True)
class InContext:
    """Loss by position, over documents that are at least `length` tokens long: all positions see the same documents.

    Attributes:
        length: tokens of every document that are read.
        documents: how many.
        nats: of token 1, 2, .., length - 1: the mean over the documents.
        early, late: nats around the early and the late position.
        gain: early - late, what the context is worth; Olsson et al. (arXiv 2209.11895) call late - early the in-context
            learning score.
        error: standard error of the gain, over documents (None for one document).
    """

    length: int
    documents: int
    nats: tuple[float, ...]
    early: float
    late: float
    gain: float
    error: float | None

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self) | {"nats": list(self.nats)}


@torch.no_grad()
def in_context(
    model,
    documents: Sequence[Document],
    form: TextFormat,
    length: int,
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> InContext:
    """Loss by position in the first `length` tokens of documents, and how much it falls from early to late.

    The positions are the published ones, 50 and 500 of 512, scaled to `length`; each is the mean over the length / 32
    tokens around it, since there are fewer documents than in print.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        documents: those that are shorter are left out.
        form: how they become tokens (of a tokenizer: see `packing.tokenise`).
        schedule: None takes true decoding.
        precision: `auto`, `float32` or `bfloat16`.

    Raises:
        ValueError: `length` is below 16, or no document is that long.
    """
    if length < 16:
        raise ValueError(f"in-context learning: length={length}: must be at least 16")
    form = TextFormat.of(form, trained=True)
    ids_L, counts = tokenise(documents, form)
    starts = counts.cumsum() - counts
    chosen = [ids_L[start : start + length] for start, n in zip(starts, counts, strict=True) if n >= length]
    if not chosen:
        raise ValueError(
            f"in-context learning: none of {len(documents)} documents has length={length} tokens; "
            f"the longest has {counts.max()}"
        )
    parts = []
    for begin in range(0, len(chosen), batch_size):
        ids_BT = torch.stack([torch.from_numpy(ids).long() for ids in chosen[begin : begin + batch_size]])
        ids_BT = ids_BT.to(model.device)
        off = {"memory_mask": torch.zeros_like(ids_BT)} if form.memory == "none" else {}
        with autocast(precision, model.device):
            out = model(input_ids=ids_BT, **off, schedule=schedule or Converge(), use_cache=False)
        for logits_TV, ids_T in zip(out.logits, ids_BT, strict=True):  # float32 logits are the largest tensor here
            nats_T = functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
            parts.append(nats_T.double().cpu())
    nats_RT = torch.stack(parts)
    early_R, late_R = (_around(nats_RT, round(length * place / OF)) for place in (EARLY, LATE))
    gains = (early_R - late_R).tolist()
    return InContext(
        length,
        len(gains),
        tuple(nats_RT.mean(0).tolist()),
        early_R.mean().item(),
        late_R.mean().item(),
        statistics.fmean(gains),
        statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
    )


def _around(nats_RT: torch.Tensor, token: int) -> torch.Tensor:
    """`_R`: the mean around a token, whose nats lie at `token - 1` (the first token is not predicted)."""
    T = nats_RT.shape[1]
    width = max(1, (T + 1) // 32)
    first = min(max(token - 1 - width // 2, 0), T - width)
    return nats_RT[:, first : first + width].mean(1)


@dataclass(frozen=True)
class Shots:
    """Accuracy with so many solved examples before the prompt."""

    shots: int
    accuracy: Accuracy

    def to_dict(self) -> dict:
        """Plain values, for JSON."""
        return {"shots": self.shots, **self.accuracy.to_dict()}


def few_shot(
    model,
    task: Task,
    form: TextFormat,
    records: Iterable[Record],
    shots: Sequence[int] = (0, 1, 4),
    between: str = "\n\n",
    pool: int = 1000,
    seed: int = 0,
    **keywords,
) -> tuple[Shots, ...]:
    """Accuracy by generation with k solved training examples before each prompt.

    Which examples stand before a record depends on the seed and on the record alone; the first k are the same whatever
    k is. The record itself is never among them, nor is another form of it (`Task.key`).

    Args:
        records: of a task of kind `answers`.
        shots: the numbers k, one result each.
        between: text after each solved example.
        pool: shots are drawn from this many records, the first of the training split.
        keywords: of `accuracy.generated`.

    Raises:
        ValueError: tags, a negative number of shots, or too few training records.
    """
    if task.kind != "answers":
        raise ValueError(f"shots: {type(task).__name__} is of kind {task.kind!r}; only 'answers' have a prompt")
    for k in shots:
        if k < 0:
            raise ValueError(f"shots={k}: must be at least 0")
    records, known = list(records), list(islice(task.records("train"), pool)) if max(shots) else []
    keys = [task.key(record) for record in known]
    before: dict[Hashable, list[str]] = {}
    for own in map(task.key, records):
        order = random.Random(f"{seed}/{own!r}").sample(range(len(known)), len(known))
        chosen = list(islice((i for i in order if keys[i] != own), max(shots)))
        if len(chosen) < max(shots):
            raise ValueError(f"shots={max(shots)}: {type(task).__name__} has {len(chosen)} other training records")
        before[own] = [_solved(task, known[i]) + between for i in chosen]
    found = []
    for k in shots:
        shown = _WithShots(task, {own: "".join(texts[:k]) for own, texts in before.items()})
        found.append(Shots(k, generated(model, shown, form, records, **keywords)))
    return tuple(found)


def _solved(task: Task, record: Record) -> str:
    example = task.example(record)
    assert isinstance(example, Example), "only answers have a prompt"
    return example.prompt + example.response


class _WithShots(Task):
    """A task whose prompts begin with a text of their own, found by the record's key."""

    def __init__(self, task: Task, before: Mapping[Hashable, str]):
        self.task, self.before = task, before

    def example(self, record: Record) -> Example:
        example = self.task.example(record)
        assert isinstance(example, Example), "only answers have a prompt"
        return replace(example, prompt=self.before[self.task.key(record)] + example.prompt)

    def correct(self, record: Record, text: str) -> bool:
        return self.task.correct(record, text)


def position_table(found: InContext):
    """Nats by position, in buckets that double, and the gain."""
    made = tables.plain("token", "nats")
    first = 1
    while first < found.length:
        last = min(2 * first, found.length) - 1
        nats = statistics.fmean(found.nats[first - 1 : last])
        made.add_row(str(first) if first == last else f"{first}-{last}", f"{nats:.4f}")
        first = last + 1
    spread = "" if found.error is None else f" ± {found.error:.4f}"
    made.add_row("early - late", f"{found.gain:.4f}{spread}")
    return made


def shots_table(found: Sequence[Shots]):
    """A line for every number of shots."""
    made = tables.plain("shots", "records", "accuracy", "95 %")
    for one in found:
        all_ = one.accuracy.overall
        made.add_row(str(one.shots), f"{all_.records:,}", f"{all_.accuracy:.1%}", f"{all_.low:.1%} - {all_.high:.1%}")
    return made
