"""Sudoku of 4x4, 6x6 and 9x9 cells: generated, each with one solution and rated, or the published files.

Tokens as published: 0 pads, 1 is blank, digit d is d + 1; all cells are labels.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product
from pathlib import Path

import numpy as np

from undertow.tasks.options import Range, check_choice, check_range, check_whole, highest, pick
from undertow.trm.puzzles import tables
from undertow.trm.puzzles.base import SPLITS, Group, Source, check_split, draw_apart
from undertow.trm.puzzles.solver import BOXES, Cells, fill, reduce, search

_LEAST_CLUES = 17  # fewer leave a Sudoku of size 9 more than one solution (McGuire et al., arXiv 1201.0749)
_SEARCHED = 1000  # of a file's puzzles so many are searched for a second solution, with at most as many wrong guesses
_BETWEEN = str.maketrans("", "", "|+-")  # the lines between boxes
_TRIES = 1000  # grids in a row that give no puzzle as asked, before that is said to be impossible


@dataclass(frozen=True)
class Sudoku(Source):
    """Fill in a Sudoku. Puzzles of the two splits differ, and stay different under every augmentation.

    Rating of a generated puzzle: the guesses that turn out wrong when the solver of `solver.search` goes through all
    possibilities; 0 where forced moves alone solve it. Of a published one: its own.

    Args:
        size: cells of a side: 4, 6 (boxes of 2 rows and 3 columns) or 9.
        train, test: puzzles of each split; of published files at most that many, chosen at random.
        augmentations: random forms of each training puzzle, beside itself: digits permuted, bands and stacks and the
            rows and columns in them shuffled, transposed (not at 6, where boxes are not square).
        clues: given cells, or a range to draw them from; None: minimal, no clue can be left out.
        rating: the least rating.
        seed: of all draws.
        path: a folder with train.csv and test.csv of sapientinc/sudoku-extreme, or of another set with such columns
            (`tables.NAMES`; a rating is needed only where `rating` asks for one). None: generate. Training puzzles
            that are in the test file too, in whatever symmetry, are left out with a warning.
    """

    size: int = 9
    train: int = 1000
    test: int = 1000
    augmentations: int = 1000
    clues: Range | None = None
    rating: int = 0
    seed: int = 0
    path: str | None = None

    def __post_init__(self):
        check_choice(self, "size", tuple(BOXES))
        for name, least in (("train", 1), ("test", 1), ("augmentations", 0), ("rating", 0), ("seed", 0)):
            check_whole(self, name, least)
        if self.clues is not None:
            check_range(self, "clues", least=1)
            if highest(self.clues) > self.size**2:
                raise ValueError(f"Sudoku clues={self.clues!r}: there are {self.size**2} cells")
        if self.path is not None and (self.size != 9 or self.clues is not None):
            raise ValueError(f"Sudoku path={self.path!r}: the published puzzles have size 9 and the clues they have")

    @property
    def vocab_size(self) -> int:
        return self.size + 2

    @property
    def seq_len(self) -> int:
        return self.size**2

    def groups(self, split: str) -> Iterator[Group]:
        check_split(split)
        rng = np.random.RandomState([self.seed, 1])
        for puzzle, solution, rating in self._puzzles(split):
            both = np.array([puzzle, solution], dtype=np.uint8)
            forms = both[:, None]
            if split == "train" and self.augmentations:
                cells, digits = symmetries(self.size, self.augmentations, rng)
                forms = np.concatenate([forms, augment(both, cells, digits)], axis=1)
            inputs, labels = forms + np.uint8(1)
            yield Group(inputs, labels, rating=rating)

    def files(self) -> list[Path]:
        return [] if self.path is None else tables.paths(self.path)

    def parse(self, text: str) -> np.ndarray:
        """Digits, and `.`, `0` or `_` for a blank, row by row; spaces and the lines between boxes may be there.

        Raises:
            ValueError: another symbol, or not as many cells as the Sudoku has.
        """
        read = _symbols(text)
        cells = [0 if c in "._" else int(c) if c in "0123456789" else -1 for c in read]
        if wrong := [c for c, cell in zip(read, cells, strict=True) if not 0 <= cell <= self.size]:
            raise ValueError(
                f"{wrong[0]!r}: no cell of a Sudoku of size {self.size}; allowed: 1 to {self.size}, . and 0"
            )
        if len(cells) != self.seq_len:
            raise ValueError(f"a Sudoku of size {self.size} has {self.seq_len} cells, this text has {len(cells)}")
        return np.array(cells, dtype=np.uint8) + np.uint8(1)

    def render(self, tokens_S: np.ndarray) -> str:
        """Rows of digits, `.` for a blank, with lines between boxes."""
        rows, columns = BOXES[self.size]
        symbols = [str(int(t) - 1) if t > 1 else "." for t in np.asarray(tokens_S)]
        rule = "-+-".join(["-" * (2 * columns - 1)] * (self.size // columns))
        lines = []
        for row in range(self.size):
            if row and row % rows == 0:
                lines.append(rule)
            line = symbols[row * self.size : (row + 1) * self.size]
            lines.append(" | ".join(" ".join(line[c : c + columns]) for c in range(0, self.size, columns)))
        return "\n".join(lines)

    def solve(self, inputs_S: np.ndarray) -> np.ndarray:
        found, _ = search(self.size, [max(int(t) - 1, 0) for t in inputs_S])
        if len(found) != 1:
            raise ValueError(f"this Sudoku has {'no solution' if not found else 'more than one solution'}")
        return np.array(found[0], dtype=np.uint8) + np.uint8(1)

    def _puzzles(self, split: str) -> Iterator[tuple[Cells, Cells, float]]:
        if self.path is not None:
            yield from self._published(split)
            return
        try:
            yield from draw_apart({"train": self.train, "test": self.test}, split, self.seed, self._draw)
        except ValueError as error:
            raise ValueError(f"Sudoku size={self.size}, clues={self.clues}, rating={self.rating}: {error}") from None

    def _draw(self, rng: random.Random):
        for _ in range(_TRIES):
            solution = fill(self.size, rng)
            wanted = None if self.clues is None else pick(rng, self.clues)
            puzzle = reduce(self.size, solution, rng, wanted or 0)
            if wanted is not None and sum(map(bool, puzzle)) != wanted:
                continue
            _, rating = search(self.size, puzzle)
            if rating >= self.rating:
                return puzzle_class(self.size, puzzle, solution), (puzzle, solution, rating)
        raise ValueError(f"none found among {_TRIES} puzzles; ask for more clues or a lower rating")

    def _published(self, split: str) -> Iterator[tuple[Cells, Cells, float]]:
        assert self.path is not None, "generated otherwise"
        counts = {"train": self.train, "test": self.test}
        rows = tables.Choice(self.path, counts, self.seed, _plain, self.rating).rows(split)
        read = [_record(row, check=i < _SEARCHED) for i, row in enumerate(rows)]
        if restored := sum(len(_symbols(row.question)) < 81 for row in rows):
            path = self.files()[SPLITS.index(split)]
            warnings.warn(f"{path}: {restored:,} questions had lost zeros at their start: put back", stacklevel=2)
        if split == "train":
            test = self.files()[1]
            apart = _apart(read, [(row.question, row.answer) for row in tables.read(test)])
            if len(apart) < len(read):
                tables.left_out(self.files()[0], len(read) - len(apart), f"are in {test.name} too, as symmetric copies")
            if not apart:
                raise ValueError(f"{self.files()[0]}: all puzzles chosen are in {test.name} too, as symmetric copies")
            read = apart
        yield from read


def symmetries(size: int, count: int, rng: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Random symmetries of Sudoku: they take valid grids to valid grids.

    Returns:
        int (A, S): cell i of the new grid is cell `[a, i]` of the old; uint8 (A, size + 1): what each digit becomes,
        0 (blank) stays.
    """
    box_rows, box_columns = BOXES[size]
    rows = _lines(size, box_rows, count, rng)
    columns = _lines(size, box_columns, count, rng)
    cells = rows[:, :, None] * size + columns[:, None, :]
    if box_rows == box_columns:
        flip = rng.random_sample(count) < 0.5
        cells[flip] = columns[flip][:, None, :] * size + rows[flip][:, :, None]
    digits = np.zeros((count, size + 1), dtype=np.uint8)
    digits[:, 1:] = 1 + rng.random_sample((count, size)).argsort(axis=1)
    return cells.reshape(count, -1), digits


def augment(grids: np.ndarray, cells: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Grids (..., S) of digits under A symmetries: (..., A, S)."""
    return digits[np.arange(len(digits))[:, None], grids[..., cells]]


def undo(grids_AS: np.ndarray, cells: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """The grid that symmetry a made each grid a from."""
    back = np.argsort(digits, axis=1).astype(grids_AS.dtype)
    old = np.take_along_axis(back, grids_AS.astype(np.int64), axis=1)
    return np.take_along_axis(old, np.argsort(cells, axis=1), axis=1)


def puzzle_class(size: int, puzzle: Cells, solution: Cells) -> tuple:
    """Equal for puzzles that a symmetry takes to each other.

    Up to size 6 also different for all others: the smallest of all forms of the puzzle. Size 9 has too many forms
    (1.2e12): there it is what the symmetries leave alone of the solution, so other puzzles may be taken for equal.
    """
    return _smallest(size, puzzle) if size < 9 else _invariant(size, solution)


def _lines(size: int, block: int, count: int, rng: np.random.RandomState) -> np.ndarray:
    """Random orders of the rows (columns) that keep blocks of them together: (A, size)."""
    blocks = rng.random_sample((count, size // block)).argsort(axis=1)
    within = rng.random_sample((count, size // block, block)).argsort(axis=2)
    return (blocks[:, :, None] * block + within).reshape(count, size)


@cache
def _all_cells(size: int) -> np.ndarray:
    """All symmetries of the cells (K, S), as in `symmetries`."""

    def orders(block: int) -> np.ndarray:
        within = list(permutations(range(block)))
        choices = product(permutations(range(size // block)), product(within, repeat=size // block))
        return np.array([[b * block + i for b, w in zip(bs, ws, strict=True) for i in w] for bs, ws in choices])

    box_rows, box_columns = BOXES[size]
    rows, columns = orders(box_rows), orders(box_columns)
    cells = (rows[:, None, :, None] * size + columns[None, :, None, :]).reshape(-1, size**2)
    return np.concatenate([cells, cells % size * size + cells // size]) if box_rows == box_columns else cells


def _smallest(size: int, puzzle: Cells) -> tuple:
    """The first in order of all forms of a puzzle, digits named in the order in which they appear."""
    forms = np.array(puzzle)[_all_cells(size)]
    first = np.stack([np.zeros(len(forms), dtype=int) - 1] + [
        np.where((found := forms == d).any(axis=1), found.argmax(axis=1), size**2) for d in range(1, size + 1)
    ], axis=1)  # fmt: skip
    named = np.take_along_axis(first.argsort(axis=1, kind="stable").argsort(axis=1), forms, axis=1)
    for cell in range(size**2):
        named = named[named[:, cell] == named[:, cell].min()]
    return tuple(named[0].tolist())


def _invariant(size: int, solution: Cells) -> tuple:
    """Of every two rows, the cycles of the permutation that takes one to the other; of every two columns likewise.

    Digits and the other direction's order do not count in it, the order of lines is sorted away.
    """
    box_rows, box_columns = BOXES[size]
    rows = [solution[i * size : (i + 1) * size] for i in range(size)]
    columns = [solution[i::size] for i in range(size)]
    return tuple(sorted([_cycles(rows, box_rows), _cycles(columns, box_columns)]))


def _cycles(lines: list[Cells], block: int) -> tuple:
    lengths: dict[tuple[int, int], tuple] = {}
    for i, j in combinations(range(len(lines)), 2):
        following, found = dict(zip(lines[i], lines[j], strict=True)), []
        while following:
            start, digit, length = next(iter(following)), None, 0
            digit = start
            while digit in following:
                digit, length = following.pop(digit), length + 1
            found.append(length)
        lengths[i, j] = lengths[j, i] = tuple(sorted(found))
    blocks = [range(first, first + block) for first in range(0, len(lines), block)]

    def line(i: int) -> tuple:
        to = [tuple(sorted(lengths[i, j] for j in others if j != i)) for others in blocks]
        return to.pop(i // block), tuple(sorted(to))

    return tuple(sorted(tuple(sorted(map(line, lines_of))) for lines_of in blocks))


def _symbols(text: str) -> str:
    """The cells of a question as a text, without what may stand between them."""
    return "".join(text.split()).translate(_BETWEEN)


def _plain(text: str) -> str:
    """A question in one spelling: 0 for a blank, and the blanks at its start that a spreadsheet took for zeros."""
    found = _symbols(text)
    return found.rjust(81, "0") if found.isdecimal() else found.replace(".", "0").replace("_", "0")


def _record(row: tables.Row, check: bool) -> tuple[Cells, Cells, float]:
    """`check`: whether to search for a second solution."""
    source = Sudoku()
    try:
        puzzle, solution = (source.parse(text) - 1 for text in (_plain(row.question), row.answer))
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from None
    kept = (puzzle == 0) | (puzzle == solution)
    units = np.sort(solution[_units()], axis=1)
    if not kept.all() or (units != np.arange(1, 10)).any():
        lost = 81 - len(_symbols(row.question))
        said = f"; its question has {81 - lost} cells, and zeros put at its start do not mend that" if lost > 0 else ""
        raise ValueError(f"{row.place}: the answer is no solution of the question{said}")
    clues = puzzle.tolist()
    several = np.count_nonzero(puzzle) < _LEAST_CLUES or len(set(clues) - {0}) < 8
    if several or (check and len(search(9, clues, most=_SEARCHED)[0]) > 1):
        raise ValueError(f"{row.place}: the question has more than one solution")
    return clues, solution.tolist(), row.rating or 0


def _apart(
    trained: list[tuple[Cells, Cells, float]], tested: list[tuple[str, str]]
) -> list[tuple[Cells, Cells, float]]:
    """The puzzles that no symmetry takes to one of the texts (question, answer).

    Where the clues lie says most; only where that agrees are the solutions' classes compared.
    """
    read = [(_plain(question), _symbols(answer)) for question, answer in tested]
    read = [pair for pair in read if all(len(t) == 81 and t.isascii() and t.isdecimal() for t in pair)]
    if not read or not trained:
        return trained
    keys = _clue_keys(np.array([puzzle for puzzle, _, _ in trained]))
    known, classes = set(keys), dict[tuple, set]()
    digits = np.frombuffer("".join(question for question, _ in read).encode(), np.uint8) - ord("0")
    for key, (_, answer) in zip(_clue_keys(digits.reshape(-1, 81)), read, strict=True):
        if key in known:
            classes.setdefault(key, set()).add(_invariant(9, [int(c) for c in answer]))
    return [
        one for key, one in zip(keys, trained, strict=True)
        if key not in classes or _invariant(9, one[1]) not in classes[key]
    ]  # fmt: skip


def _clue_keys(puzzles_NS: np.ndarray) -> list[tuple]:
    """What no symmetry changes of a puzzle of size 9: how many clues each digit and each line has."""
    given = (puzzles_NS > 0).reshape(-1, 9, 9)
    digits = np.sort((puzzles_NS[:, None] == np.arange(1, 10)[:, None]).sum(-1), axis=1)

    def lines(counts: np.ndarray) -> np.ndarray:  # in a band any order, and bands in any order
        bands = np.sort(counts.reshape(-1, 3, 3), axis=2) @ np.array([100, 10, 1])
        return np.sort(bands, axis=1) @ np.array([1_000_000, 1_000, 1])

    both = np.sort(np.stack([lines(given.sum(2)), lines(given.sum(1))], axis=1), axis=1)
    return list(map(tuple, np.concatenate([both, digits], axis=1).tolist()))


@cache
def _units() -> np.ndarray:
    """The cells of each row, column and box of size 9: (27, 9)."""
    cells = np.arange(81).reshape(9, 9)
    boxes = cells.reshape(3, 3, 3, 3).transpose(0, 2, 1, 3).reshape(9, 9)
    return np.concatenate([cells, cells.T, boxes])
