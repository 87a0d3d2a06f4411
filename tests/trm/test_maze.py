"""Mazes: one shortest path, counted by walking all of them; symmetries; the published files."""

import numpy as np
import pytest

from undertow.trm.puzzles.base import dihedral, undo_dihedral
from undertow.trm.puzzles.maze import GOAL, OPEN, PATH, START, SYMBOLS, WALL, Maze


def beside(cell: tuple[int, int]) -> list[tuple[int, int]]:
    r, c = cell
    return [(r - 1, c), (r + 1, c), (r, c - 1), (r, c + 1)]


def shortest_paths(question: np.ndarray) -> list[list[tuple[int, int]]]:
    """All of them: walks of growing length that visit no cell twice, until some end at the goal."""
    opened = {tuple(map(int, cell)) for cell in np.argwhere(question != WALL)}
    start, goal = (tuple(map(int, np.argwhere(question == mark)[0])) for mark in (START, GOAL))
    walks = [[start]]
    while walks:
        if ended := [walk for walk in walks if walk[-1] == goal]:
            return ended
        walks = [[*walk, n] for walk in walks for n in beside(walk[-1]) if n in opened and n not in walk]
    return []


def groups(source: Maze, split: str):
    sides = source.size if isinstance(source.size, tuple) else (source.size, source.size)
    return [
        (g.inputs_ES.reshape(-1, *sides).astype(int), g.labels_ES.reshape(-1, *sides).astype(int), g.rating)
        for g in source.groups(split)
    ]


@pytest.mark.parametrize("source", [
    Maze(10, 8, 5, loops=0), Maze(7, 8, 5, loops=0.3), Maze((4, 9), 8, 5, augmentations=3), Maze(2, 1, 1, 0, loops=0),
    Maze((2, 8), 3, 3, 0),
], ids=["tree", "loops", "oblong", "tiny", "narrow"])  # fmt: skip
def test_the_label_marks_the_only_shortest_path(source):
    for split, forms in (("train", 1 + source.augmentations), ("test", 1)):
        found = groups(source, split)
        assert len(found) == getattr(source, split)
        for inputs, labels, rating in found:
            assert len(inputs) == len(labels) == forms
            for question, answer in zip(inputs, labels, strict=True):
                (path,) = shortest_paths(question)
                assert {tuple(map(int, cell)) for cell in np.argwhere(answer == PATH)} == set(path[1:-1])
                assert (np.where(answer == PATH, OPEN, answer) == question).all()
                assert rating == len(path) - 1
                assert not (question == PATH).any()


def test_without_loops_there_is_one_way_between_any_two_cells():
    for inputs, _, _ in groups(Maze(30, 2, 1, 0, loops=0), "train"):
        opened = {tuple(map(int, cell)) for cell in np.argwhere(inputs[0] != WALL)}
        links = sum(n in opened for cell in opened for n in beside(cell)) // 2
        reached, front = set(), [next(iter(opened))]
        while front:
            reached.add(cell := front.pop())
            front += [n for n in beside(cell) if n in opened and n not in reached]
        assert reached == opened and links == len(opened) - 1  # a tree
        assert len(opened) > 450  # and a large one


def smallest(grid: np.ndarray) -> bytes:
    return min(np.ascontiguousarray(dihedral(grid, form)).tobytes() for form in range(8))


def test_the_splits_share_no_maze_in_any_symmetry():
    source = Maze(3, 8, 6, augmentations=7)  # so small that chance would repeat them
    train, test = ([smallest(inputs[0]) for inputs, _, _ in groups(source, split)] for split in ("train", "test"))
    assert len(set(train)) == 8 and len(set(test)) == 6 and not set(train) & set(test)
    for inputs, _, _ in groups(source, "train"):
        assert len({smallest(form) for form in inputs}) == 1


def test_the_symmetries():
    grid = np.arange(6).reshape(2, 3)
    published = [
        grid, np.rot90(grid), np.rot90(grid, 2), np.rot90(grid, 3), np.fliplr(grid), np.flipud(grid), grid.T,
        np.fliplr(np.rot90(grid)),
    ]  # fmt: skip
    for form, expected in enumerate(published):
        assert np.array_equal(dihedral(grid, form), expected)
        assert np.array_equal(undo_dihedral(dihedral(grid, form), form), grid)
    assert len({dihedral(grid, form).tobytes() + bytes(dihedral(grid, form).shape) for form in range(8)}) == 8


def test_the_options_are_kept():
    assert all(8 <= rating <= 10 for _, _, rating in groups(Maze(6, 5, 1, 0, length=(8, 10)), "train"))
    one, two, other = (groups(Maze(6, 3, 1, 0, seed=s), "train") for s in (1, 1, 2))
    assert all((a[0] == b[0]).all() for a, b in zip(one, two, strict=True))
    assert any((a[0] != b[0]).any() for a, b in zip(one, other, strict=True))
    few, many = (groups(Maze(5, n, 4, 0), "test") for n in (1, 9))
    assert all((a[0] == b[0]).all() for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize("options, said", [
    ({"size": 1}, "size=1"), ({"size": (3, 4, 5)}, "size"), ({"size": (3, 4), "augmentations": 7}, "from 0 to 3"),
    ({"loops": 2}, "loops=2"), ({"length": 0}, "length=0"),
    ({"path": "x", "length": 3}, "length=3: does not apply to path="),
    ({"path": "x", "loops": 0.5}, "loops=0.5: does not apply to path="),
    ({"size": 2, "length": 40}, "no path of that length"), ({"size": 2, "train": 999, "augmentations": 0}, "different"),
])  # fmt: skip
def test_mistakes_are_one_line(options, said):
    with pytest.raises(ValueError, match=said) as error:
        list(Maze(**options).groups("train"))
    assert "\n" not in str(error.value)


TEXT = "S #\n# #\n#  \n##G"


def test_text():
    source = Maze((4, 3), augmentations=0)
    tokens = source.parse(TEXT)
    assert source.render(tokens) == TEXT
    assert (source.parse("S.#\n#.#\n#..\n##G\n") == tokens).all()
    assert (source.parse("S #\n# #\n#\n##G") == tokens).all()  # an editor took the blanks at a line's end
    assert (source.parse(TEXT.replace("\n", "")) == tokens).all()
    assert source.render(source.solve(tokens)) == "So#\n#o#\n#oo\n##G"
    for text, said in (("S #", "12 cells"), (TEXT.replace("G", "x"), "'x'"), (TEXT.replace("G", " "), "one G"),
                       (TEXT.replace("#  ", "#o "), "no o")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            source.parse(text)
    with pytest.raises(ValueError, match="no path"):
        source.solve(source.parse("S##\n###\n###\n##G"))
    with pytest.raises(ValueError, match="more than one"):
        source.solve(source.parse("S  \n # \n  G\n###"))


def test_the_published_files(tmp_path):
    made = groups(Maze(4, 6, 1, 0), "train")
    rows = ["".join("".join(SYMBOLS[t - 1] for t in row) for row in grid) for a, b, _ in made for grid in (a[0], b[0])]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    for split, own in (("train", pairs[3:]), ("test", pairs[:3])):
        lines = [f"own,{q},{a},1\n" for q, a in own]
        (tmp_path / f"{split}.csv").write_text("source,question,answer,rating\n" + "".join(lines))
    source = Maze(4, 2, 5, augmentations=7, path=str(tmp_path))
    train, test = (groups(source, split) for split in ("train", "test"))
    assert len(train) == 2 and len(test) == 3
    assert all((a[1] == b[1]).all() and (a[0] == b[0]).all() for a, b in zip(test, made, strict=False))
    assert all(len(inputs) == 8 for inputs, _, _ in train)
    (tmp_path / "train.csv").write_text(f"source,question,answer,rating\nown,{rows[6]},{rows[9]},1\n")
    with pytest.raises(ValueError, match=r"train\.csv, record 1: the answer is not the question"):
        groups(source, "train")


def test_a_start_anywhere():
    """Neither corner nor border is special."""
    places = {int(np.argmax(inputs[0] == START)) for inputs, _, _ in groups(Maze(4, 150, 1, 0), "train")}
    assert len(places) == 16
