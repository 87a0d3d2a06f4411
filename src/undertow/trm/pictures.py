"""A solution as a picture: the grid after every step, as a film (GIF) or beside each other (PNG)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from undertow.trm.puzzles import Folder, Maze, Source, Sudoku
from undertow.trm.puzzles.maze import GOAL, OPEN, PATH, START, WALL
from undertow.trm.puzzles.solver import BOXES

CELL, MARGIN, PAUSE, LAST = 24, 12, 400, 2000  # pixels; milliseconds a frame, and for the last
PAPER, INK, GIVEN, CHANGED = "#ffffff", "#20304a", "#e8ebf0", "#ffd873"
MAZE = {WALL: "#20304a", OPEN: "#ffffff", START: "#3fa34d", GOAL: "#d1495b", PATH: "#5b9bd5"}
FORMATS = (".gif", ".png")
Grids = Sequence[np.ndarray]  # tokens (S,): the puzzle, then the answer after each step


def drawer(path: Path, source: Source) -> Callable[[Grids], None]:
    """What draws a solution to that file.

    Raises:
        ValueError: neither a GIF nor a PNG, or a puzzle that is not drawn.
    """
    source = source.source if isinstance(source, Folder) else source
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"--picture {path}: must end in {' or '.join(FORMATS)}")
    if not isinstance(source, Sudoku | Maze):
        raise ValueError(f"--picture: {type(source).__name__} is not drawn; Sudoku and Maze are")

    def draw(grids: Grids) -> None:
        from PIL import Image

        # Where nothing changes, one frame says it all.
        steps = [i for i, grid in enumerate(grids) if i == 0 or (grid != grids[i - 1]).any()]
        frames = [frame(source, grids[0], grids[i], grids[max(i - 1, 0)], i) for i in steps]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".gif":
            pauses = [PAUSE] * (len(frames) - 1) + [LAST]
            frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses, loop=0)
            return
        strip = Image.new("RGB", (sum(f.width for f in frames), frames[0].height), PAPER)
        for i, one in enumerate(frames):
            strip.paste(one, (i * one.width, 0))
        strip.save(path)

    return draw


def frame(source: Sudoku | Maze, puzzle: np.ndarray, answer: np.ndarray, before: np.ndarray, step: int):
    """One step: what was given, what is said now, and what changed since the step before. An image of Pillow."""
    from PIL import Image, ImageDraw, ImageFont

    rows, columns = source.size if isinstance(source.size, tuple) else (source.size, source.size)
    image = Image.new("RGB", (columns * CELL + 2 * MARGIN, rows * CELL + 3 * MARGIN), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=CELL * 0.6)
    for i, token in enumerate(answer.tolist()):
        y, x = MARGIN + i // columns * CELL, MARGIN + i % columns * CELL
        box, middle = (x, y, x + CELL, y + CELL), (x + CELL / 2, y + CELL / 2)
        changed = token != before[i]
        if isinstance(source, Maze):
            pen.rectangle(box, fill=MAZE.get(token, PAPER), outline=CHANGED if changed else None, width=3)
            continue
        fill = CHANGED if changed else GIVEN if puzzle[i] > 1 else PAPER
        pen.rectangle(box, fill=fill, outline="#b8c0cc")
        if token > 1:
            pen.text(middle, str(token - 1), INK, font, anchor="mm")
    if isinstance(source, Maze):
        pen.rectangle((MARGIN, MARGIN, MARGIN + columns * CELL, MARGIN + rows * CELL), outline=INK)
    else:
        high, wide = BOXES[source.size]
        for y in range(0, rows + 1, high):
            pen.line((MARGIN, MARGIN + y * CELL, MARGIN + columns * CELL, MARGIN + y * CELL), INK, 2)
        for x in range(0, columns + 1, wide):
            pen.line((MARGIN + x * CELL, MARGIN, MARGIN + x * CELL, MARGIN + rows * CELL), INK, 2)
    said = f"step {step}" if step else "puzzle"
    pen.text((MARGIN, rows * CELL + 1.3 * MARGIN), said, INK, ImageFont.load_default(size=CELL * 0.5))
    return image
