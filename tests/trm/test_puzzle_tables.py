"""Puzzles from tables as people have them: other names, spellings and losses; nothing tested on is trained on."""

import random
import warnings

import numpy as np
import pytest

from undertow.trm.puzzles import Maze, Sudoku, load
from undertow.trm.puzzles.solver import fill, reduce
from undertow.trm.puzzles.sudoku import augment, symmetries

RNG = random.Random(0)
HEAD = "source,question,answer,rating"


def pair(clues: int = 36) -> tuple[str, str]:
    solution = fill(9, RNG)
    return "".join(map(str, reduce(9, solution, RNG, clues))), "".join(map(str, solution))


PAIRS = [pair() for _ in range(7)]
PAIRS[0] = next(p for p in iter(pair, None) if p[0].startswith("00"))  # what a spreadsheet makes shorter


def table(folder, split, pairs, head=HEAD, line="own,{q},{a},3", spell=str, encoding="utf-8", name="{}.csv"):
    rows = [head, *(line.format(q=spell(q), a=a) for q, a in pairs)]
    (folder / name.format(split)).write_text("\n".join(rows) + "\n", encoding=encoding)


def sudoku(folder, **options) -> Sudoku:
    return Sudoku(path=str(folder), train=100, test=100, augmentations=0, **options)


def questions(source, split) -> list[bytes]:
    return [group.inputs_ES[0].tobytes() for group in source.groups(split)]


def tokens(pairs) -> list[bytes]:
    return [Sudoku().parse(q).tobytes() for q, _ in pairs]


FORMS = {
    "dots": {"spell": lambda q: q.replace("0", ".")},
    "zeros": {},
    "underscores": {"spell": lambda q: q.replace("0", "_")},
    "spaces": {"spell": lambda q: " ".join(q)},
    "byte order mark": {"encoding": "utf-8-sig"},
    "quizzes, solutions": {"head": "quizzes,solutions", "line": "{q},{a}"},
    "no rating": {"head": "question,answer", "line": "{q},{a}"},
    "no rating in a cell": {"line": "own,{q},{a},"},
    "half a rating": {"line": "own,{q},{a},2.5"},
    "many columns": {"head": "id, Puzzle ,Solution,clues,difficulty", "line": "7,{q},{a},30,0.5"},
    "lost zeros": {"spell": lambda q: q.lstrip("0")},
    "json lines": {"head": "", "line": '{{"question": "{q}", "answer": "{a}"}}', "name": "{}.jsonl"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_spelling_gives_the_same_puzzles(form, tmp_path):
    table(tmp_path, "train", PAIRS[:4], **FORMS[form])
    table(tmp_path, "test", PAIRS[4:], **FORMS[form])
    source = sudoku(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert questions(source, "train") == tokens(PAIRS[:4]) and questions(source, "test") == tokens(PAIRS[4:])
    lost = sum(q.startswith("0") for q, _ in PAIRS[:4])
    said = [str(one.message) for one in said if "train.csv" in str(one.message)]
    assert lost and said == ([f"{tmp_path}/train.csv: {lost} questions had lost zeros at their start: put back"]
                             if form == "lost zeros" else [])  # fmt: skip


def test_ratings_are_kept_as_they_are(tmp_path):
    table(tmp_path, "train", PAIRS[:3], line="own,{q},{a},2.5")
    table(tmp_path, "test", PAIRS[3:5], line="own,{q},{a},2")
    data = load(sudoku(tmp_path, rating=2), tmp_path / "cache")
    assert data.train.ratings_G.tolist() == [2.5] * 3 and data.test.ratings_G.tolist() == [2] * 2
    with pytest.raises(ValueError, match=r"test\.csv: no puzzle has a rating of at least 3"):
        questions(sudoku(tmp_path, rating=3), "test")


def two_solutions() -> tuple[str, str]:
    """A question of many clues of which two digits of a rectangle may change places."""
    while True:
        _, answer = pair()
        for a, b in ((r * 9 + c, r * 9 + d) for r in range(9) for c in range(9) for d in range(c + 1, 9)):
            for step in (9, 18):  # a row below in the same band, and both columns in other stacks or the same
                c, d = a + step, b + step
                if d < 81 and a // 27 == c // 27 and answer[a] == answer[d] and answer[b] == answer[c]:
                    return "".join("0" if i in (a, b, c, d) else x for i, x in enumerate(answer)), answer


Q, A = PAIRS[1]
WRONG = {  # the training file: what is said of it
    "another answer": ([(Q, PAIRS[2][1])], {}, "record 1: the answer is no solution of the question"),
    "an answer with a blank": ([(Q, "0" + A[1:])], {}, "record 1: the answer is no solution"),
    "few clues": ([("0" * 75 + Q[75:], A)], {}, "record 1: the question has more than one solution"),
    "two digits nowhere": (
        [("".join("0" if c in "12" else c for c in A), A)], {}, "record 1: the question has more than one solution",
    ),
    "two digits that change places": ([two_solutions()], {}, "record 1: the question has more than one solution"),
    "cells lost at the end": ([(Q[:-2], A)], {}, "no solution of the question; its question has 79 cells, and zeros"),
    "a dot too few": ([(Q.replace("0", ".").replace(".", "", 1), A)], {}, "record 1: .* has 80"),
    "a number of a spreadsheet": ([("5.3007E+80", A)], {}, "record 1: 'E': no cell"),
    "a rating in words": ([(Q, A)], {"line": "own,{q},{a},hard"}, "record 1: its rating is 'hard'; must be a number"),
    "an empty question": ([("", A)], {}, "record 1: its question is empty"),
    "no answers": ([(Q, A)], {"head": "source,question", "line": "own,{q}"}, "lacks a column answer .* has source, q"),
    "no rows": ([], {}, "holds no records"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_line(case, tmp_path):
    pairs, form, said = WRONG[case]
    table(tmp_path, "train", pairs, **form)
    table(tmp_path, "test", PAIRS[4:])
    with pytest.raises(ValueError, match=said) as error:
        questions(sudoku(tmp_path), "train")
    assert "\n" not in str(error.value) and f"{tmp_path}/train.csv" in str(error.value)


def test_a_rating_that_is_asked_for_must_be_there(tmp_path):
    for split, pairs in (("train", PAIRS[:2]), ("test", PAIRS[4:])):
        table(tmp_path, split, pairs, head="question,answer", line="{q},{a}")
    with pytest.raises(ValueError, match="record 1: has no rating, and rating=2 is asked for"):
        questions(sudoku(tmp_path, rating=2), "test")


def symmetric(q: str, a: str) -> tuple[str, str]:
    both = np.array([[int(c) for c in text] for text in (q, a)], dtype=np.uint8)
    cells, digits = symmetries(9, 1, np.random.RandomState(RNG.randrange(10**6)))
    return tuple("".join(map(str, grid[0])) for grid in augment(both, cells, digits))


@pytest.mark.parametrize("copies", ["identical", "spelt otherwise", "symmetric"])
def test_what_is_tested_on_is_not_trained_on(copies, tmp_path):
    made = {"identical": lambda q, a: (q, a), "spelt otherwise": lambda q, a: (q.replace("0", "."), a)}
    twins = [made.get(copies, symmetric)(q, a) for q, a in PAIRS[4:]]
    table(tmp_path, "train", [*twins, *PAIRS[:4]])
    table(tmp_path, "test", PAIRS[4:])
    with pytest.warns(UserWarning) as said:
        assert questions(sudoku(tmp_path), "train") == tokens(PAIRS[:4])
    as_copies = ", as symmetric copies" if copies == "symmetric" else ""
    line = f"{tmp_path}/train.csv: 3 puzzles are in test.csv too{as_copies}: they are not trained on"
    assert [str(one.message) for one in said] == [line]
    assert questions(sudoku(tmp_path), "test") == tokens(PAIRS[4:])  # what is tested on stays
    few = Sudoku(path=str(tmp_path), train=100, test=1, augmentations=0)
    with pytest.warns(UserWarning, match="3 puzzles"):
        assert len(questions(few, "train")) == 4  # also where only some are tested on
    table(tmp_path, "train", twins)
    with pytest.raises(ValueError, match="all .*puzzles .*are in test.csv too"):
        questions(sudoku(tmp_path), "train")


def test_other_clues_of_one_solution_are_another_puzzle(tmp_path):
    q, a = PAIRS[4]
    other = next(p for p in ("".join(map(str, reduce(9, list(map(int, a)), RNG, 30))) for _ in range(9)) if p != q)
    table(tmp_path, "train", [(other, a)])
    table(tmp_path, "test", [(q, a)])
    assert questions(sudoku(tmp_path), "train") == tokens([(other, a)])


MAZE = ("S  ## ##G", "Soo##o##G")  # three lines of three cells
MIRRORED = ("  S ##G##", "ooSo##G##")
OTHER = ("S #  ##G ", "S #oo##G ")


def mazes(folder, train, test) -> Maze:
    for split, rows in (("train", train), ("test", test)):
        table(folder, split, rows, line='own,"{q}","{a}",1')
    return Maze(3, 100, 100, 0, path=str(folder))


@pytest.mark.parametrize("twin", [MAZE, MIRRORED, tuple(text.replace(" ", ".") for text in MAZE)])
def test_no_maze_is_tested_on_and_trained_on(twin, tmp_path):
    source = mazes(tmp_path, [twin, OTHER], [MAZE])
    with pytest.warns(UserWarning, match="train.csv: 1 puzzles are in test.csv too: they are not trained on"):
        (group,) = source.groups("train")
    assert source.render(group.labels_ES[0]).replace("\n", "") == OTHER[1]


@pytest.mark.parametrize(("answer", "said"), [
    (OTHER[1], "not the question with a path"), ("So ## ##G", "no way from S to G"), (MAZE[0], "no way from S to G"),
    ("Soo##o##", "has 9 cells, not 8"), ("Sxx##x##G", "'x': no cell of a maze"),
])  # fmt: skip
def test_a_wrong_way_is_one_line(answer, said, tmp_path):
    source = mazes(tmp_path, [(MAZE[0], answer)], [OTHER])
    with pytest.raises(ValueError, match=said) as error:
        list(source.groups("train"))
    assert "\n" not in str(error.value) and "train.csv, record 1" in str(error.value)


def test_cells_beside_a_way_are_none_of_it(tmp_path):
    source = mazes(tmp_path, [(OTHER[0], "So#oo##G ")], [MAZE])
    with pytest.raises(ValueError, match="no way from S to G"):
        list(source.groups("train"))
