"""Documents -> rows of equal length, packed so that little is padding and nothing crosses a document's border.

A document is `bos, its tokens, eos` (as its `TextFormat` says). One longer than a row is cut into pieces of
a row's length; the pieces are then placed by best fit, the longest first, each where the least room is left over.

The rows lie in one `.npy` file that is mapped, not read: a numpy file is its own format, one rename makes it appear
whole, and workers share its pages. `datasets` would add a table format around the same integers. Of documents only the
ids and the positions are stored, labels and mask follow from them; a task's examples, which are never cut, come with
labels and a memory mask of their own. Building holds the corpus and its tokens in memory (`stream` does not).

Names here: R rows, T positions of a row, P pieces, L tokens in line (all documents one after the other), V vocabulary,
C what is stored of a token.
"""

from __future__ import annotations

import itertools
import logging
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from undertow.data import cache
from undertow.data.background import heard
from undertow.data.corpus import Document, corpus_hash
from undertow.data.format import IGNORED, TextFormat, pad_id

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PADDING = -1  # the stored position of padding
_BATCH = 256  # documents tokenised at once
_RECIPE = "rows-1"  # part of the cache key: change it when the stored rows would differ

Values = tuple[np.ndarray, int]  # one for each token in line (L,), and the one at padding


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows, as a map-style dataset: `len(rows)`, `rows[i]`.

    stored_R2T: int32, `[:, 0]` token ids, `[:, 1]` positions (they restart at 0 with each piece; -1: padding).
    """

    stored_R2T: np.ndarray

    def __len__(self) -> int:
        return len(self.stored_R2T)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Row i: int64 arrays of shape (T,).

        `input_ids`; `labels`, equal to them but -100 at padding and at the first token of each piece (the model shifts
        them: `labels[t]` is the target of position t-1, and no piece is to be predicted from the one before it);
        `position_ids`, 0 at the start of each piece and at padding; `attention_mask`, 0 at padding, left out where no
        row of the split has any.
        """
        ids_T, position_T = self.stored_R2T[i].astype(np.int64)
        row = {
            "input_ids": ids_T,
            "labels": np.where(position_T > 0, ids_T, IGNORED),
            "position_ids": np.maximum(position_T, 0),
        }
        if self.has_padding:
            row["attention_mask"] = (position_T != _PADDING).astype(np.int64)
        return row

    def head(self, count: int) -> Rows:
        """The first rows. Rows are stored in a shuffled order, so they are a fair sample."""
        return Rows(self.stored_R2T[:count])

    @cached_property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int((self.stored_R2T[:, 1] != _PADDING).sum())

    @cached_property
    def pieces(self) -> int:
        """Documents' pieces, or examples."""
        return int((self.stored_R2T[:, 1] == 0).sum())

    @property
    def waste(self) -> float:
        """Fraction of all positions that is padding."""
        return 1 - self.tokens / self.stored_R2T[:, 0].size

    @property
    def has_padding(self) -> bool:
        """Whether any position is padding."""
        return self.tokens < self.stored_R2T[:, 0].size

    def text_bytes(self, bytes_V: Tensor) -> int:
        """UTF-8 bytes of the text in these rows."""
        return self._bytes(bytes_V, first=0)

    def predicted_bytes(self, bytes_V: Tensor) -> int:
        """UTF-8 bytes of the tokens that are predicted (label not -100): the denominator of bits per byte."""
        return self._bytes(bytes_V, first=1)

    def _bytes(self, bytes_V: Tensor, first: int) -> int:
        counted = self.stored_R2T[:, 1] >= first
        return int(bytes_V.numpy()[self.stored_R2T[:, 0][counted]].sum())


@dataclass(frozen=True, eq=False)
class LabelledRows(Rows):
    """Rows whose targets are not simply the tokens: of a task's examples, or of documents with labels.

    marks_R2T: int32, `[:, 0]` labels (-100: none), `[:, 1]` 0 where a token takes in no memory.
    """

    marks_R2T: np.ndarray

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """As of `Rows`, with the examples' labels, and `memory_mask`, left out where it is 1 in all rows."""
        row = super().__getitem__(i)
        row["labels"] = self.marks_R2T[i, 0].astype(np.int64)
        if self.has_memory_mask:
            row["memory_mask"] = self.marks_R2T[i, 1].astype(np.int64)
        return row

    def head(self, count: int) -> LabelledRows:
        return LabelledRows(self.stored_R2T[:count], self.marks_R2T[:count])

    @cached_property
    def has_memory_mask(self) -> bool:
        return not self.marks_R2T[:, 1].all()

    def predicted_bytes(self, bytes_V: Tensor) -> int:
        labels = self.marks_R2T[:, 0]
        return int(bytes_V.numpy()[labels[labels != IGNORED]].sum())


def rows_of(stored_RCT: np.ndarray) -> Rows:
    """The dataset of what `pack` or `place` made."""
    if stored_RCT.shape[1] == 2:
        return Rows(stored_RCT)
    return LabelledRows(stored_RCT[:, :2], stored_RCT[:, 2:])


def collate(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """A batch: each entry stacked to an int64 tensor of shape (B, T)."""
    import torch

    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def pack_documents(
    documents: Sequence[Document],
    form: TextFormat | PreTrainedTokenizerBase,
    seq_len: int,
    cache_dir: str | Path | None = None,
) -> Rows:
    """Tokenise and pack the documents, or map the rows that an earlier call left in `cache_dir`.

    Args:
        documents: at least one.
        form: how a text becomes tokens; of a tokenizer the format that it carries, else the default one.
        seq_len: T, tokens of a row.
        cache_dir: see `cache.folder`.

    Raises:
        ValueError: `seq_len` is below 2.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len: {seq_len}: must be at least 2, or nothing is predicted")
    form = TextFormat.of(form, trained=True)
    key = cache.digest([_RECIPE, seq_len, *form.parts(), corpus_hash(documents)])

    def packed_R2T() -> np.ndarray:
        logger.info("tokenising %d documents", len(documents))
        return pack(*tokenise(documents, form), seq_len, pad_id(form.tokenizer), form.memory != "none")

    return rows_of(kept(cache.folder(cache_dir) / f"rows-{key[:24]}.npy", seq_len, packed_R2T))


def kept(path: Path, seq_len: int, make: Callable[[], np.ndarray]) -> np.ndarray:
    """The rows in a cache file, mapped; made and written first where there is none or it is damaged."""
    stored_RCT = read(path, seq_len)
    if stored_RCT is None:
        made_RCT = make()
        cache.write(path, lambda file: np.save(file, made_RCT, allow_pickle=False))
        stored_RCT = np.load(path, mmap_mode="r", allow_pickle=False)
    return stored_RCT


def tokenise(
    documents: Sequence[Document], form: TextFormat | PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """The documents' tokens, each begun and ended as the format says (of a tokenizer: see `pack_documents`).

    Returns:
        int32 of shape (L,), all documents in line; int64, the number of tokens of each document.
    """
    form = TextFormat.of(form, trained=True)
    parts, lengths = [], []
    for first in range(0, len(documents), _BATCH):
        texts = [document.text for document in documents[first : first + _BATCH]]
        encoded = heard(partial(_encoded, form, texts))
        framed = [ids for ids in map(form.framed, encoded) if ids]
        lengths += [len(ids) for ids in framed]
        parts.append(np.fromiter(itertools.chain.from_iterable(framed), dtype=np.int32))
    return np.concatenate([np.empty(0, dtype=np.int32), *parts]), np.array(lengths, dtype=np.int64)


def _encoded(form: TextFormat, texts: list[str], left: threading.Event) -> list[list[int]]:
    return form.encode(texts)


def pack(
    ids_L: np.ndarray,
    lengths: np.ndarray,
    seq_len: int,
    pad: int,
    memory: bool = True,
    labels_L: np.ndarray | None = None,
) -> np.ndarray:
    """Cut documents into pieces and place them in rows; every token has exactly one place.

    Args:
        ids_L: the tokens of all documents in line.
        lengths: tokens of each document, all above 0; their sum is L.
        seq_len: T.
        pad: the id written at padding.
        memory: False marks every token as one that takes in no memory.
        labels_L: the targets, in the model's convention; None: the tokens.

    Returns:
        int32 of shape (R, 2, T): see `Rows`; with labels or marks (R, 4, T): see `LabelledRows`. Padding is at the
        right end of a row.
    """
    length_P = _cut(lengths, seq_len)
    if memory and labels_L is None:
        return place(length_P, seq_len, (ids_L, pad))
    labels_L = (ids_L if labels_L is None else labels_L).copy()
    labels_L[np.cumsum(length_P) - length_P] = IGNORED  # no piece is predicted from the one before it
    return place(length_P, seq_len, (ids_L, pad), (labels_L, IGNORED), (np.full_like(ids_L, int(memory)), 1))


def place(
    length_P: np.ndarray, seq_len: int, ids: tuple[np.ndarray, int], *marks: tuple[np.ndarray, int]
) -> np.ndarray:
    """Place whole pieces in rows, each where best fit says.

    Args:
        length_P: tokens of each piece, from 1 to `seq_len`; their sum is L.
        seq_len: T.
        ids: the tokens of all pieces in line.
        marks: more that is stored of each token.

    Returns:
        int32 of shape (R, C, T): ids, positions, marks. Padding is at the right end of a row.
    """
    if len(length_P) == 0:
        return np.empty((0, 2 + len(marks), seq_len), dtype=np.int32)
    start_P = np.cumsum(length_P) - length_P
    row_P, offset_P = best_fit(length_P, seq_len)
    row_count = int(row_P.max()) + 1
    # Best fit puts full rows first, in the documents' order. Shuffled, any first rows are a fair sample;
    # RandomState is the generator whose numbers numpy promises never to change.
    row_P = np.random.RandomState(0).permutation(row_count)[row_P]
    position_L = np.arange(len(ids[0])) - np.repeat(start_P, length_P)
    row_L, column_L = np.repeat(row_P, length_P), np.repeat(offset_P, length_P) + position_L
    packed_RCT = np.empty((row_count, 2 + len(marks), seq_len), dtype=np.int32)
    for channel, (values_L, padding) in enumerate((ids, (position_L, _PADDING), *marks)):
        packed_RCT[:, channel] = padding
        packed_RCT[row_L, channel, column_L] = values_L
    return packed_RCT


def best_fit(length_P: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Place pieces, the longest first, each into the open row with the least sufficient room, or into a new row.

    Args:
        length_P: lengths, from 1 to `capacity`.

    Returns:
        row of each piece, counted from 0; its offset in that row (pieces of a row are adjacent, from 0 on).
    """
    row_P, offset_P = np.empty_like(length_P), np.zeros_like(length_P)
    full_P = length_P == capacity
    rows = int(full_P.sum())
    row_P[full_P] = np.arange(rows)
    open_rows: list[list[int]] = [[] for _ in range(capacity)]  # by room left
    rooms = 0  # bit r is set where open_rows[r] is not empty: the least sufficient room in one shift
    order = np.argsort(-length_P, kind="stable")[rows:]
    for piece, length in zip(order.tolist(), length_P[order].tolist(), strict=True):
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
            row = open_rows[room].pop()
            rooms ^= 0 if open_rows[room] else 1 << room
        else:
            room, row = capacity, rows
            rows += 1
        row_P[piece], offset_P[piece] = row, capacity - room
        if room > length:
            open_rows[room - length].append(row)
            rooms |= 1 << (room - length)
    return row_P, offset_P


def _cut(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Lengths of the pieces, in the documents' order: as many whole rows as there are, then the rest."""
    pieces = -(-lengths // seq_len)
    length_P = np.full(int(pieces.sum()), seq_len, dtype=np.int64)
    length_P[np.cumsum(pieces) - 1] = lengths - (pieces - 1) * seq_len
    return length_P


def read(path: Path, seq_len: int) -> np.ndarray | None:
    """The rows in a cache file, mapped; None where there is none, or (with a warning) if it is damaged."""
    if not path.exists():
        return None
    try:
        stored_RCT = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        stored_RCT = np.empty(0)
    if stored_RCT.ndim != 3 or stored_RCT.shape[1] not in (2, 4) or stored_RCT.shape[2] != seq_len:
        warnings.warn(f"{path}: damaged; the documents are tokenised and packed anew", stacklevel=3)
        return None
    return stored_RCT
