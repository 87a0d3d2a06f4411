"""Puzzles on disk, mapped and not read, in the published layout: groups of puzzles of examples, by offset arrays.

FOLDER/identifiers.json, and for each split FOLDER/SPLIT/dataset.json and SET__{inputs, labels, puzzle_identifiers,
puzzle_indices, group_indices}.npy of each of its sets, as a rule `all`; ours have all__ratings.npy besides, and
FOLDER/puzzles.json, which says what made them and is written last: without it the folder is not complete. A folder that
the published scripts wrote is read too (`layout`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from undertow.data import cache
from undertow.trm.puzzles.base import BLANK, PAD, SPLITS, Source
from undertow.trm.puzzles.data import IGNORED, PuzzleData
from undertow.trm.puzzles.folder import MANIFEST, Folder
from undertow.trm.puzzles.layout import read

__all__ = ["IGNORED", "PuzzleData", "Splits", "load", "read", "write"]

logger = logging.getLogger(__name__)

_RECIPE = "puzzles-2"  # part of the cache key: change it when what is stored would differ


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
        splits = Splits(*(read(source.path, split) for split in SPLITS))
        for name in ("vocab_size", "seq_len", "num_identifiers"):
            train, test = (getattr(split, name) for split in splits)
            if train != test:
                raise ValueError(f"{source.path}: {name} is {train} in train and {test} in test; must be the same")
        return splits
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


def _write_split(source: Source, split: str, folder: Path, identifiers: dict[str, int]) -> None:
    sizes: list[int] = []
    forms: list[int] = []
    given: list[int] = []
    ratings: list[float] = []

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
        "ratings": np.array(ratings, dtype=np.int32 if all(r == int(r) for r in ratings) else np.float32),
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
