"""Sudoku: one solution by brute force, symmetries and their undoing, no test puzzle trained on in another form."""

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.trm.puzzles.base import sample
from undertow.trm.puzzles.solver import BOXES, fill, reduce, search
from undertow.trm.puzzles.sudoku import Sudoku, augment, puzzle_class, symmetries, undo

SIZES = list(BOXES)


def sees(size: int, a: int, b: int) -> bool:
    """The rule: two cells of a row, a column or a box."""
    rows, columns = BOXES[size]
    (r, c), (s, d) = divmod(a, size), divmod(b, size)
    return a != b and (r == s or c == d or (r // rows, c // columns) == (s // rows, d // columns))


def valid(size: int, grid) -> bool:
    """No digit twice where two cells see each other; blanks do not count."""
    cells = range(size**2)
    return not any(grid[a] and grid[a] == grid[b] and sees(size, a, b) for a in cells for b in cells)


def brute(size: int, puzzle: list[int], cell: int = 0) -> list[list[int]]:
    """All solutions: every digit in every cell, in order, where the rule allows it."""
    if cell == size**2:
        return [list(puzzle)]
    if puzzle[cell]:
        return brute(size, puzzle, cell + 1)
    found = []
    taken = {puzzle[other] for other in range(size**2) if sees(size, cell, other)}
    for digit in set(range(1, size + 1)) - taken:
        puzzle[cell] = digit
        found += brute(size, puzzle, cell + 1)
    puzzle[cell] = 0
    return found


def test_the_4x4_grids_are_288():
    found, _ = search(4, [0] * 16, limit=1000)
    assert len(found) == 288 and sorted(found) == sorted(brute(4, [0] * 16))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 12))
def test_the_solver_finds_what_brute_force_finds(seed, clues):
    rng = random.Random(seed)
    puzzle = fill(4, rng)
    for cell in rng.sample(range(16), 16 - clues):
        puzzle[cell] = 0
    found, _ = search(4, list(puzzle), limit=1000)
    assert sorted(found) == sorted(brute(4, list(puzzle)))


def test_a_search_gives_up_after_as_many_wrong_guesses_as_it_may_make():
    hard = [int(c) for c in "400000805030000000000700000020000060000080400000010000000603070500200000104000000"]
    (solution,), wrong = search(9, hard)
    assert wrong > 20 and search(9, hard, most=wrong) == ([solution], wrong)
    assert search(9, hard, most=3)[1] <= wrong // 2


def test_what_contradicts_has_no_solution():
    assert search(4, [1, 1] + [0] * 14) == ([], 1)


@pytest.mark.parametrize("size", SIZES)
def test_a_minimal_puzzle_has_one_solution_and_no_clue_too_many(size):
    rng = random.Random(1)
    for _ in range(3):
        solution = fill(size, rng)
        assert valid(size, solution) and set(solution) == set(range(1, size + 1))
        puzzle = reduce(size, solution, rng)
        assert search(size, puzzle)[0] == [solution]
        assert all(cell in (0, digit) for cell, digit in zip(puzzle, solution, strict=True))
        for clue in [cell for cell, digit in enumerate(puzzle) if digit]:
            assert len(search(size, [0 if cell == clue else d for cell, d in enumerate(puzzle)])[0]) == 2


def test_the_rating_counts_wrong_guesses():
    rng = random.Random(0)
    easy = fill(9, rng)
    assert search(9, [0, *easy[1:]]) == ([easy], 0)
    # Known to need search (Norvig's "hard1" takes long, "hard2" little); both have one solution.
    hard = "4.....8.5.3..........7......2.....6.....8.4......1.......6.3.7.5..2.....1.4......"
    solutions, rating = search(9, [int(c) if c != "." else 0 for c in hard])
    assert len(solutions) == 1 and valid(9, solutions[0]) and rating > 0


@settings(deadline=None, max_examples=20)
@given(st.sampled_from(SIZES), st.integers(0, 10**6))
def test_symmetries_keep_the_rule_and_can_be_undone(size, seed):
    rng = random.Random(seed)
    solution = fill(size, rng)
    puzzle = [d if rng.random() < 0.5 else 0 for d in solution]
    cells, digits = symmetries(size, 5, np.random.RandomState(seed))
    new_puzzle, new_solution = augment(np.array([puzzle, solution], dtype=np.uint8), cells, digits)
    for a in range(5):
        # The definition, cell by cell.
        assert new_puzzle[a].tolist() == [digits[a][puzzle[cells[a][i]]] for i in range(size**2)]
        assert sorted(cells[a]) == list(range(size**2)) and digits[a][0] == 0
        assert valid(size, new_solution[a].tolist())
        assert ((new_puzzle[a] == 0) | (new_puzzle[a] == new_solution[a])).all()
        assert puzzle_class(size, new_puzzle[a].tolist(), new_solution[a].tolist()) == puzzle_class(
            size, puzzle, solution
        )
    assert (undo(new_puzzle, cells, digits) == puzzle).all() and (undo(new_solution, cells, digits) == solution).all()


@pytest.mark.parametrize("size, cells", [(4, 128), (6, 3456)])
def test_random_symmetries_are_all_there_are(size, cells):
    """Cell symmetries of a box grid: bands, rows in bands, likewise columns, and the transpose of square boxes."""
    drawn, _ = symmetries(size, 14 * cells, np.random.RandomState(0))
    assert len(np.unique(drawn, axis=0)) == cells


def test_4x4_has_36_minimal_puzzles():
    """The known number: what a class is, is neither too coarse nor too fine."""
    rng, classes = random.Random(0), set()
    for _ in range(400):
        solution = fill(4, rng)
        classes.add(puzzle_class(4, reduce(4, solution, rng), solution))
    assert len(classes) == 36


def examples(source: Sudoku, split: str) -> list:
    return [(g.inputs_ES.astype(int), g.labels_ES.astype(int), g.rating) for g in source.groups(split)]


@pytest.mark.parametrize("source", [
    Sudoku(4, 40, 20, 3, clues=(4, 8)), Sudoku(6, 6, 4, 3), Sudoku(9, 3, 2, 3, clues=30),
], ids=["4", "6", "9"])  # fmt: skip
def test_the_splits_share_no_puzzle_in_any_form(source):
    classes = {}
    for split, forms in (("train", 4), ("test", 1)):
        groups = examples(source, split)
        assert len(groups) == getattr(source, split)
        classes[split] = set()
        for inputs, labels, rating in groups:
            assert inputs.shape == labels.shape == (forms, source.seq_len)
            assert inputs.min() >= 1 and inputs.max() < source.vocab_size and labels.min() >= 2
            for question, answer in zip(inputs - 1, labels - 1, strict=True):
                assert search(source.size, question.tolist())[0] == [answer.tolist()]
                classes[split].add(puzzle_class(source.size, question.tolist(), answer.tolist()))
            assert rating == search(source.size, (inputs[0] - 1).tolist())[1]
        assert len(classes[split]) == len(groups)  # all forms of a puzzle are one class
    assert not classes["train"] & classes["test"]


def test_the_options_are_kept():
    source = Sudoku(9, 2, 2, 0, clues=(28, 32), rating=0, seed=3)
    clues = [(inputs > 1).sum() for inputs, _, _ in examples(source, "train")]
    assert all(28 <= n <= 32 for n in clues)
    assert all(rating >= 2 for _, _, rating in examples(Sudoku(9, 2, 1, 0, rating=2), "train"))
    one, two, other = (examples(Sudoku(4, 3, 2, 2, seed=s), "train") for s in (5, 5, 6))
    same = [all((a[i] == b[i]).all() for i in (0, 1)) for a, b in zip(one, two, strict=True)]
    assert all(same) and any((a[0] != b[0]).any() for a, b in zip(one, other, strict=True))


def test_more_for_training_changes_no_test():
    few, many = (examples(Sudoku(4, n, 5, 0), "test") for n in (1, 10))
    assert all((a[0] == b[0]).all() for a, b in zip(few, many, strict=True))


@pytest.mark.parametrize("options, said", [
    ({"size": 5}, "size=5"), ({"train": 0}, "train=0"), ({"clues": 17, "size": 4}, "there are 16 cells"),
    ({"clues": (5, 4)}, "clues"), ({"augmentations": -1}, "augmentations"), ({"path": "x", "size": 4}, "size 9"),
    ({"size": 4, "clues": 4, "train": 20, "test": 1}, "only 13 different"), ({"size": 4, "clues": 3}, "clues=3"),
])  # fmt: skip
def test_mistakes_are_one_line(options, said):
    with pytest.raises(ValueError, match=said) as error:
        list(Sudoku(**options).groups("train"))
    assert "\n" not in str(error.value)


def test_text():
    source = Sudoku(6)
    rng = random.Random(0)
    solution = fill(6, rng)
    puzzle = reduce(6, solution, rng)
    tokens = source.parse("".join(".123456"[d] for d in puzzle))
    assert (tokens == np.array(puzzle) + 1).all()
    drawn = source.render(tokens)
    assert (source.parse(drawn) == tokens).all() and (source.parse(drawn.replace(".", "0")) == tokens).all()
    assert drawn.splitlines()[2] == "------+------" and len(drawn.splitlines()) == 8
    assert len({len(line) for line in drawn.splitlines()}) == 1
    assert (source.solve(tokens) == np.array(solution) + 1).all()
    for text, said in (("12", "36 cells"), ("7" * 36, "'7'"), ("1" * 35 + "x", "'x'")):
        with pytest.raises(ValueError, match=said):
            source.parse(text)
    for text, said in (("." * 36, "more than one"), ("11" + "." * 34, "no solution")):
        with pytest.raises(ValueError, match=said):
            source.solve(source.parse(text))


def csv(path, rows):
    path.write_text("source,question,answer,rating\n" + "".join(f"own,{q},{a},{r}\n" for q, a, r in rows))


def solved(rng) -> tuple[str, str]:
    """A question and its answer, as published."""
    solution = fill(9, rng)
    puzzle = reduce(9, solution, rng, 40)
    return "".join(".123456789"[d] for d in puzzle), "".join(map(str, solution))


def test_the_published_files(tmp_path):
    rng = random.Random(0)
    rows = [(*solved(rng), rating) for rating in range(6)]
    csv(tmp_path / "train.csv", rows[1:])
    csv(tmp_path / "test.csv", [rows[0], (*solved(rng), 4)])
    source = Sudoku(path=str(tmp_path), train=3, test=9, augmentations=2, rating=1)
    found = examples(source, "train")
    assert len(found) == 3 and all(inputs.shape == (3, 81) and rating >= 1 for inputs, _, rating in found)
    texts = {tuple(source.parse(q).tolist()): tuple(source.parse(a).tolist()) for q, a, _ in rows[1:]}
    assert all(texts[tuple(inputs[0])] == tuple(labels[0]) for inputs, labels, _ in found)
    assert len(examples(source, "test")) == 1  # rating 0 is left out
    csv(tmp_path / "train.csv", [(rows[2][0], rows[1][1], 1)])
    with pytest.raises(ValueError, match=r"train\.csv, record 1: the answer is no solution"):
        examples(source, "train")
    csv(tmp_path / "train.csv", [(rows[2][0][1:], rows[2][1], 1)])
    with pytest.raises(ValueError, match="record 1: .*has 80"):
        examples(source, "train")
    with pytest.raises(FileNotFoundError, match="no such file"):
        examples(Sudoku(path=str(tmp_path / "none")), "train")


def test_a_sample_is_every_choice_equally_likely():
    counts = dict.fromkeys([(a, b) for a, b in product(range(4), repeat=2) if a < b], 0)
    rng = random.Random(0)
    for _ in range(1200):
        counts[tuple(sample(iter(range(4)), 2, rng))] += 1
    assert all(150 < count < 250 for count in counts.values())
    assert sample(iter("abc"), 5, rng) == ["a", "b", "c"]
