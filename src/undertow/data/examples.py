"""A task's records as packed rows, and as texts."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from undertow.data import cache
from undertow.data.corpus import Document
from undertow.data.fingerprint import contents
from undertow.data.format import IGNORED, TextFormat, pad_id
from undertow.data.packing import Rows, kept, pack, place, rows_of, tokenise
from undertow.data.tokenizer import vocabulary_size
from undertow.tasks.base import Example, Record, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_RECIPE = "records-2"  # part of the cache key: change it when the stored rows would differ


def texts(records: Sequence[Record], task: Task) -> list[str]:
    """The whole text of each record (kinds `text`, `answers` and `tags`): what a tokenizer is trained on."""
    if task.kind == "text":
        return [_field(record, "text", task) for record in records]
    shown = [task.example(record) for record in records]
    return [f"{e.prompt}{e.response}" if isinstance(e, Example) else f"{e.input}\n{e.target}" for e in shown]


def record_rows(
    records: Sequence[Record], task: Task, form: TextFormat, seq_len: int, cache_dir: str | Path | None = None
) -> Rows:
    """Records as packed rows, or the rows that an earlier call left in `cache_dir`.

    Documents (kinds `text`, `tokens`) are cut where they are longer than a row; an example never is: those that are too
    long are left out, with one warning that counts them.

    Raises:
        ValueError: `seq_len` is below 2, nothing is left, or what `pack_records` raises. One line.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len: {seq_len}: must be at least 2, or nothing is predicted")
    name = type(task).__name__
    key = cache.digest(itertools.chain([_RECIPE, *form.parts()], [task.kind, seq_len], contents(records, task)))

    def packed_RCT() -> np.ndarray:
        logger.info("tokenising %d records of %s", len(records), name)
        return pack_records(records, task, form, seq_len)

    rows = rows_of(kept(cache.folder(cache_dir) / f"rows-{key[:24]}.npy", seq_len, packed_RCT))
    if len(rows) == 0:
        why = f"all are longer than seq_len={seq_len} tokens" if has_examples(task) else "they hold no text"
        raise ValueError(f"{name}: none of {len(records)} records can be used: {why}")
    if has_examples(task):
        report_left_out(len(records) - rows.pieces, len(records), task, seq_len)
    return rows


def report_left_out(count: int, of: int, task: Task, seq_len: int) -> None:
    """Warn that examples were left out, if any were."""
    if count:
        name = type(task).__name__
        warnings.warn(f"{name}: {count} of {of} examples are longer than seq_len={seq_len}: left out", stacklevel=3)


def has_examples(task: Task) -> bool:
    """Whether its records are examples, which are never cut; else they are documents."""
    return task.kind in ("answers", "tags")


def pack_records(records: Sequence[Record], task: Task, form: TextFormat, seq_len: int) -> np.ndarray:
    """Records as packed rows, int32 (R, C, T) as `packing.place` makes them; R = 0 where none can be used.

    Raises:
        ValueError: a record lacks its text or its ids, an id or a label is not in the vocabulary, or what `TextFormat`
            raises.
    """
    pad = pad_id(form.tokenizer)
    if task.kind == "text":
        documents = [Document("", text) for text in texts(records, task) if text.strip()]
        return pack(*tokenise(documents, form), seq_len, pad, form.memory != "none")
    if task.kind == "tokens":
        documents_ids = [_ids(record, task, form.tokenizer) for record in records]
        parts = [ids for ids in documents_ids if len(ids)]
        lengths = np.array([len(ids) for ids in parts], dtype=np.int64)
        labels_L = None
        if any(record.get("labels") is not None for record in records):
            size = vocabulary_size(form.tokenizer)
            labels = [_labels(r, ids, task, size) for r, ids in zip(records, documents_ids, strict=True)]
            labels_L = _line(labels)
        return pack(_line(parts), lengths, seq_len, pad, form.memory != "none", labels_L)
    encoded = [form.example(task.example(record)) for record in records]
    encoded = [one for one in encoded if len(one.ids) <= seq_len]
    lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)
    labels_L, memory_L = _line([one.labels for one in encoded]), _line([one.memory for one in encoded])
    return place(lengths, seq_len, (_line([one.ids for one in encoded]), pad), (labels_L, IGNORED), (memory_L, 1))


def _line(parts: Sequence[Sequence[int]]) -> np.ndarray:
    """All parts one after the other, int32 (L,)."""
    return np.fromiter(itertools.chain.from_iterable(parts), dtype=np.int32)


def _field(record: Record, field: str, task: Task):
    if record.get(field) is None:
        raise ValueError(
            f"{type(task).__name__}: a record lacks {field}; has {', '.join(map(str, record)) or 'nothing'}"
        )
    return record[field]


def _ids(record: Record, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids, size = list(_field(record, "input_ids", task)), vocabulary_size(tokenizer)
    wrong = next((i for i in ids if not 0 <= i < size), None)
    if wrong is not None:
        raise ValueError(f"{type(task).__name__}: token id {wrong} is not in the tokenizer's vocabulary of {size}")
    return ids


def _labels(record: Record, ids: list[int], task: Task, size: int) -> list[int]:
    """A record's own labels, its tokens where it has none."""
    labels = ids if record.get("labels") is None else list(record["labels"])
    if len(labels) != len(ids):
        raise ValueError(f"{type(task).__name__}: a record has {len(labels)} labels, but {len(ids)} tokens")
    wrong = next((i for i in labels if i != IGNORED and not 0 <= i < size), None)
    if wrong is not None:
        raise ValueError(f"{type(task).__name__}: label {wrong} is neither -100 nor in the vocabulary of {size}")
    return labels
