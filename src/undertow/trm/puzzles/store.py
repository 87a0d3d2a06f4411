"""Puzzles on disk, mapped and not read, in the published layout: groups of puzzles of examples, by offset arrays.

FOLDER/identifiers.json, and for each split FOLDER/SPLIT/dataset.json and all__{inputs, labels, puzzle_identifiers,
puzzle_indices, group_indices}.npy; ours have all__ratings.npy besides, and FOLDER/puzzles.json, which says what made
them and is written last: without it the folder is not complete. A folder that the published scripts wrote is read too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from undertow.data import cache
from undertow.trm.puzzles.base import BLANK, PAD, SPLITS, Source
from undertow.trm.puzzles.folder import MANIFEST, Folder

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

IGNORED = -100  # the label that no loss counts
_RECIPE = "puzzles-1"  # part of the cache key: change it when what is stored would differ


@dataclass(frozen=True, eq=False)
class PuzzleData:
    """One split. As a dataset: `batches` to train on, `in_order` to test on.

    Attributes:
        inputs_ES, labels_ES: uint8; a label that equals `ignored` is not scored.
        puzzle_starts: int (P + 1,): the examples of puzzle p are those from start p up to start p + 1.
        group_starts: int (G + 1,): likewise the puzzles of a group.
        identifiers_P: the identifier of each puzzle.
        names: what each identifier stands for; `num_identifiers` of them.
        ratings_G: how hard each group is; None: not known.
        vocab_size, pad, ignored, blank: number of tokens; the token of padding, the label of padding, the identifier
            of padding rows.
    """

    inputs_ES: np.ndarray
    labels_ES: np.ndarray
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
        identifiers[:count] = self.identifiers_P[np.searchsorted(self.puzzle_starts, examples, side="right") - 1]
        if self.ignored is not None:
            labels[labels == self.ignored] = IGNORED
        return {
            "inputs": torch.from_numpy(inputs),
            "labels": torch.from_numpy(labels),
            "puzzle_identifiers": torch.from_numpy(identifiers),
        }


class Splits(NamedTuple):
    """What is trained on, and what is not."""

    train: PuzzleData
    test: PuzzleData


def load(source: Source, cache_dir: str | Path | None = None) -> Splits:
    """Both splits of a source, mapped; made and written first where neither it nor the cache folder holds them.

    Raises:
        ValueError, OSError: what the source raises. One line.
    """
    if isinstance(source, Folder):
        return Splits(*(read(source.path, split) for split in SPLITS))
    for path in source.files():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; docs/puzzles.md says where the published puzzles are from")
    contents = [part for path in source.files() for part in (path.name, _content(path))]
    key = cache.digest([_RECIPE, json.dumps(source.to_dict(), sort_keys=True), *contents])
    folder = cache.folder(cache_dir) / f"puzzles-{key[:24]}"
    if not (folder / MANIFEST).exists():
        logger.info("making puzzles: %s", source)
        write(source, folder)
    return Splits(*(read(folder, split) for split in SPLITS))


def write(source: Source, folder: str | Path) -> None:
    """Write both splits of a source. Groups are never all held in memory. Raises what the source raises."""
    folder = Path(folder)
    identifiers = {BLANK: 0}
    for split in SPLITS:
        _write_split(source, split, folder / split, identifiers)
    for split in SPLITS:  # the number of identifiers is only known here
        path = folder / split / "dataset.json"
        _save(path, {**json.loads(path.read_text(encoding="utf-8")), "num_puzzle_identifiers": len(identifiers)})
    _save(folder / "identifiers.json", list(identifiers))
    _save(folder / MANIFEST, source.to_dict())


def read(folder: str | Path, split: str) -> PuzzleData:
    """A split that `write`, or the published scripts, wrote.

    Raises:
        FileNotFoundError: no such split there.
        ValueError: it is damaged. One line.
    """
    folder = Path(folder).expanduser() / split
    if not (folder / "dataset.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no puzzles (dataset.json is not there)")
    try:
        about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        names = json.loads((folder.parent / "identifiers.json").read_text(encoding="utf-8"))
        found = {
            name: np.load(folder / f"all__{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
        }
        rated = folder / "all__ratings.npy"
        data = PuzzleData(
            found["inputs"],
            found["labels"],
            np.asarray(found["puzzle_indices"], dtype=np.int64),
            np.asarray(found["group_indices"], dtype=np.int64),
            found["puzzle_identifiers"],
            tuple(names),
            about["vocab_size"],
            np.load(rated, mmap_mode="r", allow_pickle=False) if rated.exists() else None,
            about["pad_id"],
            about["ignore_label_id"],
            about["blank_identifier_id"],
        )
    except (ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{folder}: damaged ({' '.join(str(error).split())}); remove the folder") from None
    if len(data) != data.puzzle_starts[-1] or len(data.identifiers_P) != data.group_starts[-1]:
        raise ValueError(f"{folder}: damaged (the offsets do not fit the examples); remove the folder")
    return data


def _write_split(source: Source, split: str, folder: Path, identifiers: dict[str, int]) -> None:
    sizes: list[int] = []
    forms: list[int] = []
    given: list[int] = []
    ratings: list[int] = []

    def fill(inputs: BinaryIO, labels: BinaryIO) -> None:
        for group in source.groups(split):
            _rows(inputs, group.inputs_ES, source.seq_len)
            _rows(labels, group.labels_ES, source.seq_len)
            names = [BLANK] * len(group.inputs_ES) if group.names_P is None else group.names_P
            sizes.extend([1] * len(names) if group.sizes_P is None else group.sizes_P)
            forms.append(len(names))
            given.extend(identifiers.setdefault(name, len(identifiers)) for name in names)
            ratings.append(group.rating)
        for file in (inputs, labels):
            _header(file, sum(sizes), source.seq_len)

    def with_inputs(inputs: BinaryIO) -> None:
        _header(inputs, 0, source.seq_len)

        def with_labels(labels: BinaryIO) -> None:
            _header(labels, 0, source.seq_len)
            fill(inputs, labels)

        cache.write(folder / "all__labels.npy", with_labels)

    cache.write(folder / "all__inputs.npy", with_inputs)
    arrays = {
        "puzzle_identifiers": np.array(given, dtype=np.int32),
        "puzzle_indices": np.cumsum([0, *sizes], dtype=np.int64),
        "group_indices": np.cumsum([0, *forms], dtype=np.int64),
        "ratings": np.array(ratings, dtype=np.int32),
    }
    for name, array in arrays.items():
        cache.write(folder / f"all__{name}.npy", lambda file, array=array: np.save(file, array, allow_pickle=False))  # type: ignore[misc]
    about = {
        "pad_id": PAD,
        "ignore_label_id": PAD,
        "blank_identifier_id": 0,
        "vocab_size": source.vocab_size,
        "seq_len": source.seq_len,
        "total_groups": len(forms),
        "mean_puzzle_examples": sum(sizes) / max(len(sizes), 1),
        "total_puzzles": len(sizes),
        "sets": ["all"],
    }
    _save(folder / "dataset.json", about)


def _rows(file: BinaryIO, rows_ES: np.ndarray, width: int) -> None:
    assert rows_ES.dtype == np.uint8 and rows_ES.shape[1] == width
    file.write(np.ascontiguousarray(rows_ES).data)


def _header(file: BinaryIO, rows: int, width: int) -> None:
    """The head of an npy file of uint8 rows. Numpy leaves room in it for their number to grow."""
    file.seek(0)
    about: dict[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": (rows, width)}
    np.lib.format.write_array_header_1_0(file, about)


def _save(path: Path, value: object) -> None:
    cache.write(path, lambda file: file.write(json.dumps(value).encode()))


def _content(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
