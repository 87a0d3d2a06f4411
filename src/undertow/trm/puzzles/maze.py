"""Mazes with one shortest path: generated at any size, or the published files.

Tokens as published: 0 pads, then `# SGo`: wall, open, start, goal, and path (in labels, between start and goal).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from undertow.tasks.options import Range, check_range, check_whole
from undertow.trm.puzzles import tables
from undertow.trm.puzzles.base import Group, Source, check_split, dihedral, draw_apart

SYMBOLS = "# SGo"
WALL, OPEN, START, GOAL, PATH = range(1, 6)
_TRIES = 1000  # mazes in a row of which none is as asked, before that is said to be impossible


@dataclass(frozen=True)
class Maze(Source):
    """Mark the shortest path from S to G; there is exactly one. Moves go up, down, left and right.

    A winding passage with branches is cut into the walls, so that there is one way between any two cells; then walls
    are opened, which makes other ways. No maze is in two splits, in whatever symmetry. Rating: moves of the path.

    Args:
        size: cells of a side, or rows and columns.
        train, test: mazes of each split; of published files at most that many, chosen at random.
        augmentations: so many other symmetries of each training maze: up to 7, of one that is not square up to 3.
        loops: the fraction of the walls that are opened again.
        length: moves of the path, or a range they must be in; None: the goal is the farthest cell from the start.
        seed: of all draws.
        path: a folder with train.csv and test.csv of sapientinc/maze-30x30-hard-1k, or of another set with such columns
            (`tables.NAMES`). None: generate. Training mazes that are in the test file too, in whatever symmetry, are
            left out with a warning.
    """

    size: int | tuple[int, int] = 30
    train: int = 1000
    test: int = 1000
    augmentations: int = 7
    loops: float = 0.05
    length: Range | None = None
    seed: int = 0
    path: str | None = None

    def __post_init__(self):
        sides = self._sides()
        for name, least, most in (
            ("train", 1, None),
            ("test", 1, None),
            ("seed", 0, None),
            ("augmentations", 0, len(_forms(sides)) - 1),
        ):
            check_whole(self, name, least, most)
        if not isinstance(self.loops, int | float) or not 0 <= self.loops <= 1:
            raise ValueError(f"Maze loops={self.loops!r}: must be a number from 0 to 1")
        if self.length is not None:
            check_range(self, "length", least=1)
        for name, unset in (("length", None), ("loops", Maze.loops)) if self.path is not None else ():
            if getattr(self, name) != unset:
                given = getattr(self, name)
                raise ValueError(f"Maze {name}={given!r}: does not apply to path=, where mazes are given; leave it out")

    def _sides(self) -> tuple[int, int]:
        sides = tuple(self.size) if isinstance(self.size, list | tuple) else (self.size, self.size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 2 for side in sides):
            raise ValueError(f"Maze size={self.size!r}: must be a whole number of at least 2, or a pair of them")
        if isinstance(self.size, list):  # as JSON and YAML write a pair
            object.__setattr__(self, "size", sides)
        return sides

    @property
    def vocab_size(self) -> int:
        return len(SYMBOLS) + 1

    @property
    def seq_len(self) -> int:
        rows, columns = self._sides()
        return rows * columns

    def groups(self, split: str) -> Iterator[Group]:
        check_split(split)
        sides = self._sides()
        forms = _forms(sides)[: 1 + (self.augmentations if split == "train" else 0)]
        for both in self._mazes(split):
            shaped = both.reshape(2, *sides)
            inputs, labels = np.stack([dihedral(shaped, form).reshape(2, -1) for form in forms], axis=1)
            yield Group(inputs, labels, rating=int((both[1] == PATH).sum()) + 1)

    def files(self) -> list[Path]:
        return [] if self.path is None else tables.paths(self.path)

    def parse(self, text: str) -> np.ndarray:
        """Lines of `#` (wall), a blank or `.` (open), S and G, as many as the maze has rows; or all in one line.

        Lines that lost blanks at their right end get them back.

        Raises:
            ValueError: another symbol, another size, or not one S and one G.
        """
        tokens = self._tokens(text)
        if (tokens == PATH).any() or [(tokens == mark).sum() for mark in (START, GOAL)] != [1, 1]:
            raise ValueError("a maze has one S and one G, and no o: the path is to be found")
        return tokens

    def render(self, tokens_S: np.ndarray) -> str:
        symbols = "?" + SYMBOLS
        _, columns = self._sides()
        line = "".join(symbols[int(t)] for t in np.asarray(tokens_S))
        return "\n".join(line[i : i + columns] for i in range(0, len(line), columns))

    def solve(self, inputs_S: np.ndarray) -> np.ndarray:
        tokens = np.asarray(inputs_S)
        neighbours, opened = _neighbours(self._sides()), (tokens != WALL).tolist()
        start, goal = (int(np.flatnonzero(tokens == mark)[0]) for mark in (START, GOAL))
        distance, ways = shortest(opened, neighbours, start)
        if ways[goal] != 1:
            raise ValueError(f"this maze has {'no path' if not ways[goal] else 'more than one shortest path'}")
        return _marked(tokens, distance, neighbours, goal)

    def _mazes(self, split: str) -> Iterator[np.ndarray]:
        """Question and answer: uint8 (2, S)."""
        if self.path is not None:
            yield from self._published(split)
            return
        try:
            yield from draw_apart({"train": self.train, "test": self.test}, split, self.seed, self._draw)
        except ValueError as error:
            raise ValueError(f"Maze size={self.size!r}, length={self.length!r}: {error}") from None

    def _draw(self, rng: random.Random):
        sides = self._sides()
        neighbours = _neighbours(sides)
        for _ in range(_TRIES):
            opened = _carve(neighbours, rng)
            walls = [cell for cell, free in enumerate(opened) if not free]
            for cell in rng.sample(walls, round(self.loops * len(walls))):
                opened[cell] = True
            start = rng.choice([cell for cell, free in enumerate(opened) if free])
            distance, ways = shortest(opened, neighbours, start)
            reached = [cell for cell, count in enumerate(ways) if count == 1 and cell != start]
            if self.length is None:
                farthest = max((distance[cell] for cell in reached), default=0)
                goals = [cell for cell in reached if distance[cell] == farthest]
            else:
                least, most = (self.length, self.length) if isinstance(self.length, int) else self.length
                goals = [cell for cell in reached if least <= distance[cell] <= most]
            if goals:
                goal = rng.choice(goals)
                question = np.where(opened, OPEN, WALL).astype(np.uint8)
                question[start], question[goal] = START, GOAL
                both = np.stack([question, _marked(question, distance, neighbours, goal)])
                shaped = question.reshape(sides)
                return min(dihedral(shaped, form).tobytes() for form in _forms(sides)), both
        raise ValueError(f"no path of that length in {_TRIES} mazes; ask for a shorter one")

    def _published(self, split: str) -> Iterator[np.ndarray]:
        assert self.path is not None, "generated otherwise"
        counts = {"train": self.train, "test": self.test}
        for row in tables.Choice(self.path, counts, self.seed, self._plain).rows(split):
            yield self._record(row)

    def _plain(self, text: str) -> str:
        """The first in order of all symmetries of a question; what cannot be read stays as it is."""
        try:
            shaped = self.parse(text).reshape(self._sides())
        except ValueError:
            return text
        return min(dihedral(shaped, form).tobytes() for form in _forms(self._sides())).decode("latin-1")

    def _record(self, row: tables.Row) -> np.ndarray:
        try:
            question, answer = self.parse(row.question), self._tokens(row.answer)
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from None
        if (np.where(answer == PATH, OPEN, answer) != question).any():
            raise ValueError(f"{row.place}: the answer is not the question with a path")
        self._check_way(row.place, answer)
        return np.stack([question, answer])

    def _check_way(self, place: str, answer: np.ndarray) -> None:
        """Raise ValueError unless the marked cells, and no others, lead from S to G."""
        way, neighbours = np.isin(answer, (START, PATH, GOAL)), _neighbours(self._sides())
        distance, _ = shortest(way.tolist(), neighbours, int(np.flatnonzero(answer == START)[0]))
        moves = distance[int(np.flatnonzero(answer == GOAL)[0])]
        if moves != way.sum() - 1:
            raise ValueError(f"{place}: the cells that the answer marks are no way from S to G")

    def _tokens(self, text: str) -> np.ndarray:
        """The cells of a question or an answer. Raises ValueError: another symbol, another size."""
        rows, columns = self._sides()
        lines = text.strip("\r\n").splitlines()
        if len(lines) == rows and all(len(line) <= columns for line in lines):
            text = "".join(line.ljust(columns) for line in lines)
        if len(text) != self.seq_len:
            raise ValueError(f"a maze of {rows} rows and {columns} columns has {self.seq_len} cells, not {len(text)}")
        tokens = [SYMBOLS.find(symbol) + 1 for symbol in text.replace(".", " ")]
        if 0 in tokens:
            raise ValueError(f"{text[tokens.index(0)]!r}: no cell of a maze; allowed: {SYMBOLS!r}")
        return np.array(tokens, dtype=np.uint8)


def shortest(opened: list[bool], neighbours: list[list[int]], start: int) -> tuple[list[int], list[int]]:
    """Of each cell the moves from the start (-1: out of reach), and whether 0, 1 or more (2) paths are so short."""
    distance, ways = [-1] * len(opened), [0] * len(opened)
    distance[start], ways[start] = 0, 1
    queue = [start]
    for cell in queue:
        for near in neighbours[cell]:
            if opened[near]:
                if distance[near] < 0:
                    distance[near] = distance[cell] + 1
                    queue.append(near)
                if distance[near] == distance[cell] + 1:
                    ways[near] = min(2, ways[near] + ways[cell])
    return distance, ways


def _carve(neighbours: list[list[int]], rng: random.Random) -> list[bool]:
    """A passage that goes on at random, and branches where it can go no further.

    A wall is opened only if one open cell is beside it: so the open cells stay a tree, at any size.
    """
    opened = [False] * len(neighbours)
    way = [rng.randrange(len(opened))]
    opened[way[0]] = True
    while way:
        free = [n for n in neighbours[way[-1]] if not opened[n] and sum(opened[m] for m in neighbours[n]) == 1]
        if free:
            way.append(rng.choice(free))
            opened[way[-1]] = True
        else:
            way.pop()
    return opened


def _marked(question: np.ndarray, distance: list[int], neighbours: list[list[int]], goal: int) -> np.ndarray:
    """The question with the shortest path to the goal, of which there is one."""
    answer = question.astype(np.uint8)
    cell = goal
    while distance[cell] > 1:
        cell = next(near for near in neighbours[cell] if distance[near] == distance[cell] - 1)
        answer[cell] = PATH
    return answer


@cache
def _neighbours(sides: tuple[int, int]) -> list[list[int]]:
    rows, columns = sides
    found = []
    for row in range(rows):
        for column in range(columns):
            beside = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            found.append([r * columns + c for r, c in beside if 0 <= r < rows and 0 <= c < columns])
    return found


def _forms(sides: tuple[int, int]) -> tuple[int, ...]:
    """The symmetries of a grid of that shape."""
    return tuple(range(8)) if sides[0] == sides[1] else (0, 2, 4, 5)
