"""Rows of a text too large to tokenise at once: made a chunk at a time, when they are first asked for.

A chunk is so many records of the source, packed and shuffled on its own. It is kept in the cache folder as one `.npy`
file, and beside it how many rows it has and where in the source the next one begins. So row i depends on the source,
the tokenizer, the row length, the chunk's size and i alone; whoever asks for it again, after a kill or in another
process, finds its chunk by counting rows and tokenises nothing. Memory holds one chunk.

This makes a stream an ordinary dataset with a length, read in order: skipping to a step, dividing rows among
processes and among workers is what trainers do with any dataset.
"""

from __future__ import annotations

import bisect
import itertools
import json
import logging
import os
import sys
import warnings
import weakref
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from undertow.data import cache
from undertow.data.examples import has_examples, pack_records, report_left_out
from undertow.data.format import TextFormat
from undertow.data.packing import Rows, read, rows_of
from undertow.tasks.base import Record, Task

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

_HEAD = 8  # records that tell one source from another


@dataclass(frozen=True)
class Chunk:
    """What is written beside a chunk's rows.

    Attributes:
        rows, tokens: of the chunk.
        left_out: examples that were too long.
        records: records of the source up to the end of this chunk.
        state: of the `datasets` stream at the end of this chunk (None: the task has none).
        last: whether the source ended in it.
    """

    rows: int
    tokens: int
    left_out: int
    records: int
    state: dict | None
    last: bool


class Chunks:
    """The chunks of one split of a task, made in order.

    Args:
        task, split: the source.
        form: how a record becomes tokens.
        seq_len: tokens of a row.
        documents: records of a chunk.
        cache_dir: see `cache.folder`.
    """

    def __init__(
        self,
        task: Task,
        split: str,
        form: TextFormat,
        seq_len: int,
        documents: int,
        cache_dir: str | Path | None = None,
    ):
        self.task, self.split, self.form = task, split, form
        self.seq_len, self.documents = seq_len, documents
        options = json.dumps(task.to_dict(), sort_keys=True, default=str)
        head = [repr(record) for record in itertools.islice(first_records(task, split), _HEAD)]
        if not head:
            raise ValueError(f"{type(task).__name__}: there are no records in its {split} split")
        key = cache.digest([*form.parts(), options, split, seq_len, documents, *head])
        self.folder = cache.folder(cache_dir) / f"stream-{key[:24]}"
        self._known: list[Chunk] = []
        self._ends: list[int] = []  # rows up to the end of each known chunk
        self._open: tuple[int, Rows] | None = None
        self._reading: tuple[int, int, Any, Iterator[Record]] | None = None  # process, next chunk, stream, iterator
        self._said: set[str] = set()

    def __getstate__(self) -> dict:
        """For processes that are spawned: a place in a file cannot be handed on, but can be found again."""
        return self.__dict__ | {"_open": None, "_reading": None}

    def row(self, i: int) -> dict[str, np.ndarray]:
        """Row i, counted over all passes through the source. Raises ValueError: no row can be made of it."""
        number, at = self._place(i)
        if self._open is None or self._open[0] != number:
            self._open = (number, self._rows(number))
        row = self._open[1][at]
        ones = {"attention_mask": np.ones(self.seq_len, dtype=np.int64)}
        if has_examples(self.task) and self.form.memory != "all":
            ones["memory_mask"] = ones["attention_mask"]
        return ones | row  # the same entries in every row, whichever chunk it is of

    def used(self, count: int) -> list[Chunk]:
        """The chunks that hold the first `count` rows."""
        number = self._place(count - 1)[0] if count <= self._total(count) else len(self._known) - 1
        return self._known[: number + 1]

    def _total(self, wanted: int) -> int:
        """Rows known, once there are `wanted` or the source has ended."""
        while (self._ends[-1] if self._ends else 0) < wanted and not (self._known and self._known[-1].last):
            chunk = self._chunk(len(self._known))
            self._known.append(chunk)
            self._ends.append((self._ends[-1] if self._ends else 0) + chunk.rows)
        return self._ends[-1] if self._ends else 0

    def _place(self, i: int) -> tuple[int, int]:
        """The chunk that holds row i, and which of its rows it is."""
        total = self._total(i + 1)
        if total == 0:
            raise ValueError(f"{type(self.task).__name__}: no record of {self.split} fits in seq_len={self.seq_len}")
        if i >= total:
            if "end" not in self._said:
                self._said.add("end")
                name = type(self.task).__name__
                warnings.warn(f"{name}: the stream ended after {total} rows; it is read again from there", stacklevel=4)
            i %= total
        number = bisect.bisect_right(self._ends, i)
        return number, i - (self._ends[number] - self._known[number].rows)

    # ------------------------------------------------------------------ on disk

    def _paths(self, number: int) -> tuple[Path, Path]:
        return self.folder / f"{number:06d}.npy", self.folder / f"{number:06d}.json"

    def _chunk(self, number: int) -> Chunk:
        """What is written beside chunk `number`, which is made if need be."""
        written = self._paths(number)[1]
        chunk = _noted(written) or self._make(number)
        if has_examples(self.task) and chunk.left_out and "long" not in self._said:
            self._said.add("long")
            report_left_out(chunk.left_out, self.documents, self.task, self.seq_len)
        return chunk

    def _rows(self, number: int) -> Rows:
        path = self._paths(number)[0]
        stored_RCT = read(path, self.seq_len)
        if stored_RCT is None:
            self._make(number, anew=True)
            stored_RCT = np.load(path, mmap_mode="r", allow_pickle=False)
        return rows_of(stored_RCT)

    def _make(self, number: int, anew: bool = False) -> Chunk:
        """Read, tokenise, pack and write a chunk. Of several processes that want it, one does so, the others wait."""
        from filelock import FileLock

        path, beside = self._paths(number)
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "lock"):
            made = _noted(beside)
            if made is not None and not anew:
                return made
            records, stream = self._read(number)
            stored_RCT = pack_records(records, self.task, self.form, self.seq_len)
            rows = rows_of(stored_RCT)
            logger.info("%s: chunk %d, %d rows of %d records", self.folder, number, len(rows), len(records))
            before = self._known[number - 1].records if number else 0
            chunk = Chunk(
                rows=len(rows),
                tokens=rows.tokens,
                left_out=len(records) - rows.pieces if has_examples(self.task) else 0,
                records=before + len(records),
                state=None if stream is None else stream.state_dict(),
                last=len(records) < self.documents,
            )
            cache.write(path, lambda file: np.save(file, stored_RCT, allow_pickle=False))
            # The note comes last: where it is, the rows are whole.
            cache.write(beside, lambda file: file.write(json.dumps(chunk.__dict__).encode()))
            return chunk

    def _read(self, number: int) -> tuple[list[Record], IterableDataset | None]:
        """The records of chunk `number`, and the stream as it stands after them."""
        import pyarrow
        from datasets.exceptions import DatasetsError

        # A forked process shares its parent's open files, hence their positions: it must open its own.
        if self._reading is None or self._reading[:2] != (os.getpid(), number):
            stream, before = self.task.stream(self.split), self._known[number - 1] if number else None
            if stream is not None and before is not None:
                stream.load_state_dict(before.state)
            source = self.task.records(self.split) if stream is None else _each(stream)
            if isinstance(source, Generator):  # closed before the modules go that its files need
                weakref.finalize(self, source.close)
            skipped = before.records if before is not None and stream is None else 0
            self._reading = (os.getpid(), number, stream, itertools.islice(source, skipped, None))
        _, _, stream, iterator = self._reading
        self._reading = None  # if reading fails, nobody goes on from the middle
        try:
            records = list(itertools.islice(iterator, self.documents))
        except (pyarrow.ArrowException, DatasetsError) as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{type(self.task).__name__}, {self.split}, chunk {number}: {said}") from error
        self._reading = (os.getpid(), number + 1, stream, iterator)
        return records, stream


@dataclass(frozen=True, eq=False)
class Stream:
    """The first `count` rows of a stream (without it, all that are wanted): a map-style dataset to be read in order.

    A source that ends earlier is read again, with a warning.
    """

    chunks: Chunks
    count: int = sys.maxsize

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """As of `Rows`; `attention_mask` (and `memory_mask` where prompts take in no memory) in every row."""
        if not 0 <= i < self.count:
            raise IndexError(i)
        return self.chunks.row(i)

    def head(self, count: int) -> Stream:
        """The first `count` rows, from the same chunks."""
        return Stream(self.chunks, count)

    @property
    def waste(self) -> float | None:
        """Fraction of all positions that is padding, in the chunks that hold these rows; None without a count."""
        if self.count == sys.maxsize:
            return None
        used = self.chunks.used(self.count)
        return 1 - sum(chunk.tokens for chunk in used) / (sum(chunk.rows for chunk in used) * self.chunks.seq_len)


def first_records(task: Task, split: str) -> Iterator[Record]:
    """The records of a split from the first on, from whichever of its two ways a task has to read them."""
    stream = task.stream(split)
    return task.records(split) if stream is None else _each(stream)


def _each(stream: IterableDataset) -> Iterator[Record]:
    """The records of a stream. In a loader's worker its own iterator would give every worker a part of them."""
    for batch in stream.iter(batch_size=1):
        yield {name: values[0] for name, values in batch.items()}


def _noted(path: Path) -> Chunk | None:
    """What a chunk's note says; None where there is none, or (with a warning) if it is damaged."""
    try:
        return Chunk(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        warnings.warn(f"{path}: damaged; the chunk is made anew", stacklevel=4)
        return None
