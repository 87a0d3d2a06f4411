"""Puzzles for the Tiny Recursive Model: where they come from, and how they lie on disk.

train, test = load(Sudoku(size=4, clues=(4, 10)))
for batch in train.batches(batch_size=64, seed=0): ...
"""

from __future__ import annotations

from undertow.trm.puzzles.arc import ARC
from undertow.trm.puzzles.base import Group, Source
from undertow.trm.puzzles.folder import MADE_BY, Cells, Folder
from undertow.trm.puzzles.maze import Maze
from undertow.trm.puzzles.store import IGNORED, PuzzleData, Splits, load, read, write
from undertow.trm.puzzles.sudoku import Sudoku

PUZZLES: dict[str, type[Source]] = {source.__name__: source for source in MADE_BY}  # by class name

__all__ = [
    "ARC",
    "IGNORED",
    "PUZZLES",
    "Cells",
    "Folder",
    "Group",
    "Maze",
    "PuzzleData",
    "Source",
    "Splits",
    "Sudoku",
    "load",
    "read",
    "write",
]
