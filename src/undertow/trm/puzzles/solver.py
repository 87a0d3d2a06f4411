"""A Sudoku solver on bit boards: for each digit a number whose bit c says whether cell c may still hold the digit.

One pass of a few operations on such numbers finds the forced moves of all cells at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size: rows and columns of a box

Cells = list[int]  # digits row by row, 0 blank


@dataclass(frozen=True)
class _Shape:
    """Masks of a size: `everywhere` of all cells, `units` of each row, column and box, `peers` of what each cell sees
    (itself not)."""

    everywhere: int
    units: tuple[int, ...]
    peers: tuple[int, ...]


@cache
def _shape(size: int) -> _Shape:
    box_rows, box_columns = BOXES[size]
    lines: dict[tuple, int] = {}
    seen_by = []
    for cell in range(size**2):
        row, column = divmod(cell, size)
        seen_by.append([("row", row), ("column", column), ("box", row // box_rows, column // box_columns)])
        for line in seen_by[-1]:
            lines[line] = lines.get(line, 0) | 1 << cell
    peers = [(lines[a] | lines[b] | lines[c]) & ~(1 << cell) for cell, (a, b, c) in enumerate(seen_by)]
    return _Shape((1 << size**2) - 1, tuple(lines.values()), tuple(peers))


@dataclass
class _Guesses:
    """How many turned out wrong; after `most` of them the search gives up."""

    wrong: int = 0
    most: int | None = None


def search(size: int, puzzle: Cells, limit: int = 2, most: int | None = None) -> tuple[list[Cells], int]:
    """Solutions of a puzzle, at most `limit`, and how many guesses turned out wrong on the way.

    After all forced moves (a cell with one digit left, a row, column or box with one place left for a digit) it
    guesses in the first of the cells with the fewest digits left, the digits in order. After `most` wrong guesses it
    gives up, and there may be more solutions than it found (None: it never does).
    """
    found: list[Cells] = []
    guesses = _Guesses(most=most)
    for boards in _solutions(_shape(size), _start(size, puzzle), guesses):
        found.append(_cells(boards))
        if len(found) == limit:
            break
    return found, guesses.wrong


def fill(size: int, rng: random.Random) -> Cells:
    """A random full grid."""
    shape = _shape(size)
    first = [0] * size**2
    first[:size] = rng.sample(range(1, size + 1), size)
    return _cells(next(_solutions(shape, _start(size, first), _Guesses(), rng)))


def reduce(size: int, solution: Cells, rng: random.Random, clues: int = 0) -> Cells:
    """Clues left out, in random order, while the solution stays the only one and more than `clues` are left."""
    shape, puzzle = _shape(size), list(solution)
    left = len(puzzle)
    for cell in rng.sample(range(len(puzzle)), len(puzzle)):
        if left <= clues:
            break
        digit, puzzle[cell] = puzzle[cell], 0
        boards = _start(size, puzzle)
        boards[digit - 1] &= ~(1 << cell)  # is there a solution with another digit here?
        if next(_solutions(shape, boards, _Guesses()), None) is None:
            left -= 1
        else:
            puzzle[cell] = digit
    return puzzle


def _start(size: int, puzzle: Cells) -> list[int]:
    shape = _shape(size)
    boards, clues = [0] * size, 0
    seen = [0] * size
    for cell, digit in enumerate(puzzle):
        if digit:
            boards[digit - 1] |= 1 << cell
            seen[digit - 1] |= shape.peers[cell]
            clues |= 1 << cell
    free = shape.everywhere & ~clues
    return [(placed | free) & ~taken for placed, taken in zip(boards, seen, strict=True)]


def _solutions(
    shape: _Shape, boards: list[int], guesses: _Guesses, rng: random.Random | None = None
) -> Iterator[list[int]]:
    """The solutions, one after the other. Counts the guesses that lead to none.

    rng: guess the digits in random order.
    """
    pair = _forced(shape, boards)
    if pair is None:
        guesses.wrong += 1
        return
    several, exactly_two = pair
    if not several:
        yield boards
        return
    cell = exactly_two & -exactly_two or _fewest(boards, several)
    digits = [d for d, board in enumerate(boards) if board & cell]
    if rng is not None:
        rng.shuffle(digits)
    for digit in digits:
        if guesses.most is not None and guesses.wrong > guesses.most:
            return
        tried = [board & ~cell for board in boards]
        tried[digit] |= cell
        yield from _solutions(shape, tried, guesses, rng)


def _forced(shape: _Shape, boards: list[int]) -> tuple[int, int] | None:
    """Make all forced moves, in place.

    Returns:
        The cells with more than one digit left, and those with two; None: a contradiction.
    """
    everywhere, peers, units = shape.everywhere, shape.peers, shape.units
    done = 0  # cells whose digit their peers have lost
    while True:
        one = two = three = 0
        for board in boards:
            three |= two & board
            two |= one & board
            one |= board
        if one != everywhere:
            return None
        fresh = everywhere & ~two & ~done
        if fresh:
            for digit, board in enumerate(boards):
                left = new = board & fresh
                while left:
                    bit = left & -left
                    board &= ~peers[bit.bit_length() - 1]
                    left ^= bit
                if new:
                    boards[digit] = board
            done |= fresh
            continue
        if done == everywhere:
            return 0, 0
        moved = False
        for digit, board in enumerate(boards):
            if not board & two:
                continue
            for unit in units:
                places = board & unit
                if not places & (places - 1):
                    if not places:
                        return None
                    if places & two:
                        for other in range(len(boards)):
                            if other != digit:
                                boards[other] &= ~places
                        two &= ~places
                        moved = True
        if not moved:
            return two, two & ~three


def _fewest(boards: list[int], cells: int) -> int:
    """The first of the cells with the fewest digits left, as a mask."""
    best, fewest = 0, len(boards) + 1
    while cells:
        bit = cells & -cells
        count = sum(1 for board in boards if board & bit)
        if count < fewest:
            best, fewest = bit, count
        cells ^= bit
    return best


def _cells(boards: list[int]) -> Cells:
    cells = [0] * boards[0].bit_count() * len(boards)
    for digit, board in enumerate(boards, start=1):
        while board:
            bit = board & -board
            cells[bit.bit_length() - 1] = digit
            board ^= bit
    return cells
