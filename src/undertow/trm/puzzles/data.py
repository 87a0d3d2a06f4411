"""One split of puzzles as a dataset: what a batch holds is a function of the seed and its number alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from undertow.trm.puzzles.base import PAD

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the label that no loss counts
_SCANNED = 4096  # rows looked at at once


class Stacked:
    """Arrays of rows (n, S), one below the other, of which only what is asked for is copied. Indices as of an array."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])
        self.shape, self.dtype = (int(self.ends[-1]), *parts[0].shape[1:]), np.result_type(*parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        rows = np.arange(len(self))[index]
        flat = np.atleast_1d(rows)
        which = np.searchsorted(self.ends, flat, side="right")
        found = np.empty((len(flat), *self.shape[1:]), self.dtype)
        for i in np.unique(which):
            here = which == i
            found[here] = self.parts[i][flat[here] - (self.ends[i] - len(self.parts[i]))]
        return found if rows.ndim else found[0]


Rows = np.ndarray | Stacked


@dataclass(frozen=True, eq=False)
class PuzzleData:
    """One split. As a dataset: `batches` to train on, `in_order` to test on.

    Attributes:
        inputs_ES, labels_ES: whole numbers, mapped where they come from a folder; a label that equals `ignored` is not
            scored.
        puzzle_starts: int (P + 1,): the examples of puzzle p are those from start p up to start p + 1.
        group_starts: int (G + 1,): likewise the puzzles of a group.
        identifiers_P: the identifier of each puzzle.
        names: what each identifier stands for; `num_identifiers` of them.
        ratings_G: how hard each group is; None: not known.
        vocab_size, pad, ignored, blank: number of tokens; the token of padding, the label of padding, the identifier
            of padding rows.
    """

    inputs_ES: Rows
    labels_ES: Rows
    puzzle_starts: np.ndarray
    group_starts: np.ndarray
    identifiers_P: np.ndarray
    names: tuple[str, ...]
    vocab_size: int
    ratings_G: np.ndarray | None = None
    pad: int = PAD
    ignored: int | None = PAD
    blank: int = 0

    def __len__(self) -> int:
        """E."""
        return len(self.inputs_ES)

    @property
    def seq_len(self) -> int:
        """S."""
        return self.inputs_ES.shape[1]

    @property
    def num_identifiers(self) -> int:
        """Puzzles with an identifier of their own, the blank one counted."""
        return len(self.names)

    @property
    def num_groups(self) -> int:
        """Puzzles, all forms of one counted once."""
        return len(self.group_starts) - 1

    @property
    def labelled(self) -> bool:
        """Whether any label is scored."""
        if self.ignored is None:
            return len(self) > 0
        parts = (self.labels_ES[i : i + _SCANNED] for i in range(0, len(self), _SCANNED))
        return any(bool((part != self.ignored).any()) for part in parts)

    @property
    def epoch_examples(self) -> float:
        """Examples of a training epoch, on average."""
        return self.num_groups * len(self) / (len(self.puzzle_starts) - 1)

    def batches(self, batch_size: int, seed: int, start: int = 0, epochs: int | None = None) -> Iterator[dict]:
        """Training batches, from batch `start` on: the same ones whether those before were asked for or not.

        An epoch has every group once, in a random order: one random puzzle of it, all its examples in a random order.
        Batches go on from one epoch to the next. The examples of a puzzle that no longer fit a batch are left out, as
        in the published code.

        Args:
            batch_size: B.
            epochs: where to end; the last batch is left out if it is not full. None: without end.

        Returns:
            `inputs` (B, S), `labels` (B, S) with -100 where not scored, `puzzle_identifiers` (B,): int64 tensors.

        Raises:
            ValueError: a batch of no rows, or a split without groups.
        """
        if batch_size < 1 or start < 0 or self.num_groups == 0:
            raise ValueError(
                f"batch_size={batch_size}, start={start}, {self.num_groups} groups: "
                "must be at least 1, at least 0, and some"
            )
        draws = self._draws(batch_size, seed, epochs, start)
        return (self._batch(np.concatenate(pieces), batch_size) for pieces in draws)

    def in_order(self, batch_size: int, start: int = 0) -> Iterator[dict]:
        """All examples once, in order, in batches as above. The last one is filled with rows of no scored label.

        Raises:
            ValueError: `batch_size` is less than 1.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        for first in range(start * batch_size, len(self), batch_size):
            yield self._batch(np.arange(first, min(first + batch_size, len(self))), batch_size)

    def _draws(self, batch_size: int, seed: int, epochs: int | None, start: int) -> Iterator[list[np.ndarray]]:
        """The examples of every full batch from `start` on, in pieces."""
        if len(self) > len(self.puzzle_starts) - 1:  # how much of a puzzle fits depends on all that came before
            yield from itertools.islice(self._from(batch_size, seed, epochs, 0, 0), start, None)
        else:  # one example a puzzle
            yield from self._from(batch_size, seed, epochs, *divmod(start * batch_size, self.num_groups))

    def _from(
        self, batch_size: int, seed: int, epochs: int | None, epoch: int, position: int
    ) -> Iterator[list[np.ndarray]]:
        """The examples of every full batch from a place in an epoch on."""
        pieces: list[np.ndarray] = []
        missing = batch_size
        while epochs is None or epoch < epochs:
            examples, ends = self._epoch(seed, epoch)
            while position < len(examples):
                pieces.append(examples[position : position + missing])
                missing -= len(pieces[-1])
                # The next puzzle begins where the one that was cut ends.
                position = int(ends[np.searchsorted(ends, position + len(pieces[-1]))])
                if missing == 0:
                    yield pieces
                    pieces, missing = [], batch_size
            epoch, position = epoch + 1, 0

    def _epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The examples of an epoch in line, and where in that line each puzzle ends."""
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))  # 30 times cheaper to start than RandomState
        order = rng.permutation(self.num_groups)
        first, past = self.group_starts[order], self.group_starts[order + 1]
        puzzles = first + (rng.random(len(order)) * (past - first)).astype(np.int64)
        starts = self.puzzle_starts[puzzles]
        sizes = self.puzzle_starts[puzzles + 1] - starts
        ends = np.cumsum(sizes)
        if len(ends) == ends[-1]:
            return starts, ends
        examples = np.repeat(starts - (ends - sizes), sizes) + np.arange(ends[-1])
        shuffled = np.lexsort((rng.random(len(examples)), np.repeat(np.arange(len(sizes)), sizes)))
        return examples[shuffled], ends

    def _batch(self, examples: np.ndarray, batch_size: int) -> dict[str, Tensor]:
        import torch

        inputs = np.full((batch_size, self.seq_len), self.pad, dtype=np.int64)
        labels = np.full((batch_size, self.seq_len), IGNORED, dtype=np.int64)
        identifiers = np.full(batch_size, self.blank, dtype=np.int64)
        count = len(examples)
        inputs[:count], labels[:count] = self.inputs_ES[examples], self.labels_ES[examples]
        for name, tokens in (("inputs", inputs), ("labels", labels)):
            low = IGNORED if name == "labels" else 0
            if count and not low <= tokens[:count].min() <= tokens[:count].max() < self.vocab_size:
                said = f"{tokens[:count].min()}..{tokens[:count].max()}"
                raise ValueError(f"puzzle {name} hold tokens {said}, the vocabulary is 0..{self.vocab_size - 1}")
        identifiers[:count] = self.identifiers_P[np.searchsorted(self.puzzle_starts, examples, side="right") - 1]
        if self.ignored is not None:
            labels[labels == self.ignored] = IGNORED
        return {
            "inputs": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "puzzle_identifiers": torch.from_numpy(identifiers),
        }
