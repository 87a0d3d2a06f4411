"""Puzzles that were written before: by `undertow data`, or by the published scripts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from undertow.registry import from_mapping
from undertow.trm.puzzles import layout
from undertow.trm.puzzles.arc import ARC
from undertow.trm.puzzles.base import SPLITS, Source
from undertow.trm.puzzles.maze import GOAL, START, SYMBOLS, WALL, Maze
from undertow.trm.puzzles.solver import BOXES
from undertow.trm.puzzles.sudoku import Sudoku

MADE_BY = (Sudoku, Maze, ARC)
MANIFEST = "puzzles.json"


@dataclass(frozen=True)
class Cells(Source):
    """Puzzles of which only the sizes are known: cells are written as the numbers of their tokens.

    Args:
        cells: S.
        tokens: of the vocabulary, the padding counted.
    """

    cells: int
    tokens: int

    @property
    def vocab_size(self) -> int:
        return self.tokens

    @property
    def seq_len(self) -> int:
        return self.cells

    def parse(self, text: str) -> np.ndarray:
        """Numbers with blanks between them. Raises ValueError: something else, too many or too few."""
        words = text.split()
        if wrong := [word for word in words if not word.isdecimal() or int(word) >= self.tokens]:
            raise ValueError(f"{wrong[0]!r}: no token of these puzzles; allowed: 0 to {self.tokens - 1}")
        if len(words) != self.cells:
            raise ValueError(f"a puzzle has {self.cells} cells, this text has {len(words)}")
        return np.array([int(word) for word in words])

    def render(self, tokens_S: np.ndarray) -> str:
        """Numbers, in rows where the cells make a square."""
        side, wide = math.isqrt(self.cells), len(str(self.tokens - 1))
        words = [str(int(token)).rjust(wide) for token in np.asarray(tokens_S)]
        row = side if side**2 == self.cells else self.cells
        return "\n".join(" ".join(words[i : i + row]) for i in range(0, self.cells, row))


@dataclass(frozen=True)
class Folder(Source):
    """Puzzles in a folder, of whatever size: one that `undertow data` wrote, or in the published layout.

    Args:
        path: the folder, with `train/dataset.json` and `test/dataset.json`.

    Raises:
        FileNotFoundError: no puzzles there.
        ValueError: `dataset.json` or `puzzles.json` is damaged.
    """

    path: str

    def __post_init__(self):
        missing = [split for split in SPLITS if not (self.place / split / "dataset.json").is_file()]
        if missing:
            inside = sorted(path.parent.parent.name for path in self.place.glob("*/train/dataset.json"))
            others = f"; folders in it that do: {', '.join(inside)}" if inside else ""
            raise FileNotFoundError(f"{self.path}: holds no puzzles ({missing[0]}/dataset.json is not there){others}")
        self.source  # noqa: B018 (raises)

    @property
    def place(self) -> Path:
        """The folder itself."""
        return Path(self.path).expanduser()

    @cached_property
    def about(self) -> dict:
        """What is said of the training split."""
        return layout.about(self.place / "train")

    @cached_property
    def source(self) -> Source:
        """What the puzzles are: as `puzzles.json` says, else what has these sizes, else `Cells`."""
        manifest = self.place / MANIFEST
        if manifest.exists():
            try:
                values = json.loads(manifest.read_bytes())
            except ValueError as error:
                raise ValueError(f"{manifest}: damaged (not JSON: {error})") from None
            return from_mapping(values, "puzzle", {source.__name__: source for source in MADE_BY}, "puzzle")
        if self._maze:
            return Maze(math.isqrt(self.seq_len), augmentations=0)
        for known in (*map(Sudoku, BOXES), ARC(test=self.path)):
            if (known.seq_len, known.vocab_size) == (self.seq_len, self.vocab_size):
                return known
        return Cells(self.seq_len, self.vocab_size)

    @property
    def _maze(self) -> bool:
        """Whether the first puzzle is a square maze: a Sudoku of 4x4 has as many cells and tokens, but no walls."""
        if self.vocab_size != len(SYMBOLS) + 1 or math.isqrt(self.seq_len) ** 2 != self.seq_len:
            return False
        train = layout.read(self.place, "train")
        if len(train) == 0:
            return False
        question, answer = train.inputs_ES[0], train.labels_ES[0]
        return all((question == mark).sum() == 1 for mark in (START, GOAL)) and bool((answer == WALL).any())

    @property
    def vocab_size(self) -> int:
        return self.about["vocab_size"]

    @property
    def seq_len(self) -> int:
        return self.about["seq_len"]

    def parse(self, text: str) -> np.ndarray:
        return self.source.parse(text)

    def render(self, tokens_S: np.ndarray) -> str:
        return self.source.render(tokens_S)

    def solve(self, inputs_S: np.ndarray) -> np.ndarray:
        return self.source.solve(inputs_S)
