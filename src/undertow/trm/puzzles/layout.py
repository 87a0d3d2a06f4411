"""A split as it lies on disk, whoever wrote it: `dataset.json` and the arrays of every set, mapped and not read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from undertow.trm.puzzles.data import PuzzleData, Rows, Stacked

ARRAYS = ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices")
NUMBERS = ("vocab_size", "seq_len", "pad_id", "blank_identifier_id")  # that `dataset.json` must have


def about(folder: Path) -> dict[str, Any]:
    """What `dataset.json` of a split says; `sets` are those it names, or whose arrays are there.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is no account of puzzles. One line.
    """
    path = folder / "dataset.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no puzzles (dataset.json is not there)")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: damaged (not JSON: {error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: damaged (is {type(values).__name__}, not a mapping)")
    for name in NUMBERS:
        if type(values.get(name)) is not int:
            raise ValueError(f"{path}: {name} is {values.get(name, 'missing')!r}; must be a whole number")
    there = sorted(array.name.removesuffix("__inputs.npy") for array in folder.glob("*__inputs.npy"))
    sets = values.setdefault("sets", there)
    if not isinstance(sets, list) or not sets or not all(isinstance(name, str) for name in sets):
        raise ValueError(f"{path}: sets is {sets!r}; must be names, and of each NAME__inputs.npy and the other arrays")
    return values


def read(folder: str | Path, split: str) -> PuzzleData:
    """A split that `store.write`, or the published scripts, wrote: of any size, all its sets one after the other.

    `identifiers.json` and ratings may be missing: identifiers are then called by their numbers.

    Raises:
        FileNotFoundError: no such split there, or one of its arrays is missing.
        ValueError: it is damaged. One line.
    """
    folder = Path(folder).expanduser() / split
    said = about(folder)
    sets = [_set(folder, name, said["seq_len"]) for name in said["sets"]]
    puzzles, groups = (_joined([one[name] for one in sets]) for name in ("puzzle_indices", "group_indices"))
    identifiers = np.concatenate([one["puzzle_identifiers"] for one in sets])
    names = _names(folder.parent / "identifiers.json", said.get("num_puzzle_identifiers"), identifiers)
    rated = [folder / f"{name}__ratings.npy" for name in said["sets"]]
    ratings = np.concatenate([_array(path) for path in rated]) if all(path.exists() for path in rated) else None
    if identifiers.size and not 0 <= identifiers.min() <= identifiers.max() < len(names):
        found = f"{identifiers.min()}..{identifiers.max()}"
        raise ValueError(f"{folder}: damaged (puzzles have identifiers {found}, there are {len(names)} of them)")
    return PuzzleData(
        _stacked([one["inputs"] for one in sets]),
        _stacked([one["labels"] for one in sets]),
        puzzles,
        groups,
        identifiers,
        names,
        said["vocab_size"],
        ratings,
        said["pad_id"],
        said.get("ignore_label_id"),
        said["blank_identifier_id"],
    )


def _set(folder: Path, name: str, width: int) -> dict[str, np.ndarray]:
    found = {kind: _array(folder / f"{name}__{kind}.npy") for kind in ARRAYS}
    for kind, array in found.items():
        if array.dtype.kind not in "iu" or array.ndim != (2 if kind in ("inputs", "labels") else 1):
            raise ValueError(f"{folder}: damaged ({name}__{kind}.npy holds {array.dtype} of shape {array.shape})")
    if not found["inputs"].shape == found["labels"].shape == (len(found["inputs"]), width):
        shapes = f"{found['inputs'].shape} and {found['labels'].shape}"
        raise ValueError(f"{folder}: damaged (inputs and labels of set {name} are {shapes}, each with {width} cells)")
    inside = (("puzzle_indices", len(found["inputs"])), ("group_indices", len(found["puzzle_identifiers"])))
    for kind, count in inside:
        offsets = found[kind]
        if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
            raise ValueError(f"{folder}: damaged (the offsets do not fit the examples: {name}__{kind}.npy)")
    if len(found["puzzle_indices"]) != len(found["puzzle_identifiers"]) + 1:
        raise ValueError(f"{folder}: damaged (the offsets do not fit the examples: {name}__puzzle_identifiers.npy)")
    return found


def _array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent}: holds no {path.name}, which dataset.json speaks of") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path.parent}: damaged ({path.name}: {' '.join(str(error).split())})") from None


def _stacked(parts: Sequence[np.ndarray]) -> Rows:
    return parts[0] if len(parts) == 1 else Stacked(parts)


def _joined(offsets: Sequence[np.ndarray]) -> np.ndarray:
    """Offsets of several arrays as those of the arrays one after the other."""
    joined = [np.zeros(1, dtype=np.int64)]
    for one in offsets:
        joined.append(np.asarray(one[1:], dtype=np.int64) + joined[-1][-1] if len(one) > 1 else joined[-1][:0])
    return np.concatenate(joined)


def _names(path: Path, count: int | None, identifiers: np.ndarray) -> tuple[str, ...]:
    """What each identifier stands for: as `identifiers.json` says, or else its number."""
    names: list[str] = []
    if path.is_file():
        try:
            names = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: damaged (not JSON: {error})") from None
        if not isinstance(names, list):
            raise ValueError(f"{path}: damaged (is {type(names).__name__}, not a list of names)")
    if count is None:
        count = len(names) or int(identifiers.max(initial=0)) + 1
    return tuple(map(str, [*names[:count], *range(len(names), count)]))
