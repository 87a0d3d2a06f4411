"""Puzzles that were written before: by `undertow data`, or by the published scripts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from undertow.registry import from_mapping
from undertow.trm.puzzles.arc import ARC
from undertow.trm.puzzles.base import SPLITS, Source
from undertow.trm.puzzles.maze import Maze
from undertow.trm.puzzles.sudoku import Sudoku

MADE_BY = (Sudoku, Maze, ARC)
MANIFEST = "puzzles.json"


@dataclass(frozen=True)
class Folder(Source):
    """Puzzles in a folder.

    Args:
        path: the folder, with `train/dataset.json` and `test/dataset.json`.

    Raises:
        FileNotFoundError: no puzzles there.
        ValueError: puzzles of no kind that is known.
    """

    path: str

    def __post_init__(self):
        for split in SPLITS:
            if not (self.place / split / "dataset.json").is_file():
                raise FileNotFoundError(f"{self.path}: holds no puzzles ({split}/dataset.json is not there)")
        self.source  # noqa: B018 (raises)

    @property
    def place(self) -> Path:
        """The folder itself."""
        return Path(self.path).expanduser()

    @cached_property
    def source(self) -> Source:
        """What made the puzzles: as `puzzles.json` says, else the published one of these sizes."""
        if (self.place / MANIFEST).exists():
            values = json.loads((self.place / MANIFEST).read_text(encoding="utf-8"))
            return from_mapping(values, "puzzle", {source.__name__: source for source in MADE_BY}, "puzzle")
        about = json.loads((self.place / "train" / "dataset.json").read_text(encoding="utf-8"))
        for published in (Sudoku(), Maze(), ARC(test=self.path)):
            if (published.seq_len, published.vocab_size) == (about["seq_len"], about["vocab_size"]):
                return published
        raise ValueError(
            f"{self.path}: {about['seq_len']} cells of {about['vocab_size']} tokens are no puzzle that was published"
        )

    @property
    def vocab_size(self) -> int:
        return self.source.vocab_size

    @property
    def seq_len(self) -> int:
        return self.source.seq_len

    def parse(self, text: str) -> np.ndarray:
        return self.source.parse(text)

    def render(self, tokens_S: np.ndarray) -> str:
        return self.source.render(tokens_S)

    def solve(self, inputs_S: np.ndarray) -> np.ndarray:
        return self.source.solve(inputs_S)
