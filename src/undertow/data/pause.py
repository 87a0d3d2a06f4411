"""Pause tokens (T2MLR's baseline, arXiv 2607.15178; Goyal et al., arXiv 2310.02226): time to think that is not text.

Either Poisson-many copies of one token are inserted before each eligible token, or eligible tokens are replaced by it.
Nothing is to predict a pause; the last pause before a token predicts that token.

A row is a dict of numpy arrays of shape (T,), as `Rows` gives it: `input_ids` and, where there are any, `labels`,
`attention_mask`, `position_ids`, `memory_mask`. All of them stay aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from undertow.data.packing import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class Pauses:
    """How pauses are drawn; what they do to a row depends on the seed and the row's number alone.

    Args:
        token: the pause's id.
        mean: copies inserted before an eligible token, on average (Poisson).
        replace: probability with which an eligible token is replaced.
        seed: at least 0, below 2^32.
        only_recurrent: eligible are the tokens whose `memory_mask` is 1 (all, where a row has none); else all.

    Raises:
        ValueError: not exactly one of `mean` and `replace`, or one that is out of range.
    """

    token: int
    mean: float | None = None
    replace: float | None = None
    seed: int = 0
    only_recurrent: bool = True

    def __post_init__(self):
        if (self.mean is None) == (self.replace is None):
            raise ValueError(f"Pauses mean={self.mean}, replace={self.replace}: exactly one of them must be given")
        if self.mean is not None and not self.mean > 0:
            raise ValueError(f"Pauses mean={self.mean}: must be above 0")
        if self.replace is not None and not 0 < self.replace <= 1:
            raise ValueError(f"Pauses replace={self.replace}: must be above 0 and at most 1")

    def __call__(self, row: Row, number: int) -> Row:
        """Row `number` with its pauses; inserted ones make it longer. The row itself is left as it is."""
        draw = np.random.RandomState([self.seed, number])  # numpy promises never to change its numbers
        eligible_T = self.eligible(row)
        if self.mean is not None:
            return insert(row, np.where(eligible_T, draw.poisson(self.mean, eligible_T.shape), 0), self.token)
        assert self.replace is not None, "one of the two is given"
        return replaced(row, eligible_T & (draw.random_sample(eligible_T.shape) < self.replace), self.token)

    def eligible(self, row: Row) -> np.ndarray:
        """Where a pause may come, bool (T,): never at padding."""
        eligible_T = np.ones(row["input_ids"].shape, dtype=bool)
        for name in ("attention_mask", *(("memory_mask",) if self.only_recurrent else ())):
            if name in row:
                eligible_T &= row[name].astype(bool)
        return eligible_T


def insert(row: Row, count_T: np.ndarray, token: int) -> Row:
    """`count_T[t]` pauses before token t, of its document and with its masks; positions count them."""
    last_T = np.cumsum(count_T + 1) - 1  # where token t comes to stand
    source_N = np.repeat(np.arange(len(count_T)), count_T + 1)
    pause_N = np.ones(len(source_N), dtype=bool)
    pause_N[last_T] = False
    made = _fill({name: values[source_N] for name, values in row.items()}, pause_N, token)
    if "position_ids" in row:
        real_T = row.get("attention_mask", np.ones_like(count_T)).astype(bool)
        before_T = np.cumsum(count_T) - count_T  # pauses before those of token t, since the row began
        start_T = (row["position_ids"] == 0) & real_T
        document_T = np.maximum.accumulate(np.where(start_T, before_T, 0))  # of them, those before its document
        nth_N = np.arange(len(source_N)) - (last_T - count_T)[source_N]  # 0 at the first of token t's pauses
        made["position_ids"] += np.where(real_T, before_T - document_T, 0)[source_N] + nth_N
    return made


def replaced(row: Row, where_T: np.ndarray, token: int) -> Row:
    """Tokens replaced by pauses: what followed them is now predicted from a pause."""
    return _fill({name: values.copy() for name, values in row.items()}, where_T, token)


def _fill(row: Row, where_T: np.ndarray, token: int) -> Row:
    row["input_ids"][where_T] = token
    if "labels" in row:
        row["labels"][where_T] = IGNORED
    return row


@dataclass(frozen=True, eq=False)
class Paused:
    """Rows with pauses, as a dataset whose rows keep their length: what no longer fits falls off the end.

    So a step costs what it costs without pauses; it reads less text.
    """

    rows: Sequence[Row]
    pauses: Pauses

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Row:
        row = self.rows[i]
        return {name: values[: len(row["input_ids"])] for name, values in self.pauses(row, i).items()}


def token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a token spelled out. Raises ValueError if the vocabulary has no such token."""
    vocabulary = tokenizer.get_vocab()
    if text not in vocabulary:
        special = ", ".join(repr(token) for token in tokenizer.all_special_tokens)
        raise ValueError(f"data.pause.token: {text!r} is not a token; special tokens are {special}")
    return vocabulary[text]
