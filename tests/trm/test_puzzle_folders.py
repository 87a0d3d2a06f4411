"""Folders in the published layout, as the published scripts and other people write them: of any size, mapped."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import tiny_run as tiny

from undertow.recipe import RecipeError
from undertow.trm import pictures, run
from undertow.trm.puzzles import Cells, Folder, Maze, Sudoku, load, read, write
from undertow.trm.puzzles.data import Stacked
from undertow.trm.recipe import PuzzleRecipe, title

ABOUT = {"pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0}


def arrays(sizes: list[list[int]], width: int, tokens: int, first: int = 0, dtype=np.uint8) -> dict:
    """Groups of puzzles of so many examples, cells drawn at random; identifiers from `first` on."""
    flat = [size for group in sizes for size in group]
    inputs = np.random.RandomState(first).randint(1, tokens, (sum(flat), width)).astype(dtype)
    return {
        "inputs": inputs,
        "labels": np.roll(inputs, 1, axis=1),
        "puzzle_identifiers": np.arange(first, first + len(flat), dtype=np.int32),
        "puzzle_indices": np.cumsum([0, *flat], dtype=np.int32),
        "group_indices": np.cumsum([0, *map(len, sizes)], dtype=np.int32),
    }


def published(place, width=6, tokens=9, sets=("all",), identifiers=30, dtype=np.uint8, **more):
    """A folder as the published scripts write it: int32 offsets, no ratings, no account of what made it."""
    for split in ("train", "test"):
        (place / split).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(sets):
            made = arrays([[1], [2, 1], [3]], width, tokens, 1 + 4 * number, dtype)
            for kind, array in made.items():
                np.save(place / split / f"{name}__{kind}.npy", array)
        values = ABOUT | {"vocab_size": tokens, "seq_len": width, "num_puzzle_identifiers": identifiers}
        values |= {"total_groups": 3, "mean_puzzle_examples": 1.75, "total_puzzles": 4, "sets": list(sets)} | more
        (place / split / "dataset.json").write_text(json.dumps(values))
    names = ["<blank>", *(f"name {i}" for i in range(1, identifiers))]
    (place / "identifiers.json").write_text(json.dumps(names))
    return place


def change(place, split="train", drop=(), **values):
    path = place / split / "dataset.json"
    said = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in said.items() if name not in drop}))


SIZES = [(6, 9), (1, 3), (81, 40), (400, 12), (25, 300), (961, 12), (36, 6)]


@pytest.mark.parametrize(("width", "tokens"), SIZES)
def test_a_folder_of_any_size_is_read_and_trained_on(width, tokens, tmp_path):
    place = published(tmp_path / "mine", width, tokens, dtype=np.int64 if tokens > 255 else np.uint8)
    recipe = PuzzleRecipe.parse(tiny.merged(puzzle=str(place), training={"steps": 1}, evaluation={"puzzles": None}))
    assert recipe.puzzle.source == Cells(width, tokens) and title(recipe.puzzle) == "mine"
    assert (recipe.puzzle.seq_len, recipe.puzzle.vocab_size) == (width, tokens)
    data = load(recipe.puzzle)
    assert isinstance(data.train.inputs_ES, np.memmap) and isinstance(data.train.labels_ES, np.memmap)
    assert data.train.names[:3] == ("<blank>", "name 1", "name 2") and data.train.num_identifiers == 30
    source, question = recipe.puzzle, data.test.inputs_ES[0]
    assert (source.parse(source.render(question)) == question).all()
    if width < 100:
        result = run.train(recipe, tmp_path / "run", device="cpu")
        assert result["puzzle"] == "mine" and result["puzzles"] == 7 and "passes" not in result


def test_what_has_a_known_size_is_that_puzzle(tmp_path):
    assert Folder(str(published(tmp_path / "a", 81, 11))).source == Sudoku()
    assert Folder(str(published(tmp_path / "b", 900, 12))).source.__class__.__name__ == "ARC"
    for made in (Sudoku(4, 3, 2, 1, clues=(8, 10)), Sudoku(6, 2, 1, 0, clues=30), Maze(4, 3, 1, 0), Maze(5, 3, 1, 2)):
        place = tmp_path / f"{type(made).__name__}{made.size}"
        write(made, place)
        assert Folder(str(place)).source == made
        (place / "puzzles.json").unlink()  # as from the published scripts
        found = Folder(str(place)).source
        assert type(found) is type(made) and found.size == made.size  # 4x4: both have 16 cells of 6 tokens
        assert title(Folder(str(place))) == title(made)


def test_sets_are_one_after_the_other(tmp_path):
    place = published(tmp_path, sets=("easy", "hard", "odd"))
    data = read(place, "train")
    assert isinstance(data.inputs_ES, Stacked) and len(data) == 21 and data.num_groups == 9
    parts = [np.load(place / "train" / f"{name}__inputs.npy") for name in ("easy", "hard", "odd")]
    whole = np.concatenate(parts)
    assert data.inputs_ES.shape == whole.shape and (data.inputs_ES[:] == whole).all()
    for index in (3, -1, slice(5, 16), slice(None, None, 4), np.array([20, 0, 7, 7, 13]), [6, 8]):
        assert np.array_equal(data.inputs_ES[index], whole[index])
    assert all((row == expected).all() for row, expected in zip(data.inputs_ES, whole, strict=True))
    assert data.identifiers_P.tolist() == list(range(1, 13))
    assert data.puzzle_starts.tolist() == [0, 1, 3, 4, 7, 8, 10, 11, 14, 15, 17, 18, 21]
    assert data.group_starts.tolist() == [0, 1, 3, 4, 5, 7, 8, 9, 11, 12]
    flat = dataclasses.replace(data, inputs_ES=whole, labels_ES=data.labels_ES[:])
    for one, other in zip(
        itertools.chain(itertools.islice(data.batches(4, seed=1), 9), data.in_order(5)),
        itertools.chain(itertools.islice(flat.batches(4, seed=1), 9), flat.in_order(5)),
        strict=True,
    ):
        assert all(one[name].equal(other[name]) for name in one)
    change(place, drop=["sets"])  # then what is there
    assert len(read(place, "train")) == 21
    recipe = PuzzleRecipe.parse(tiny.merged(puzzle=str(place), training={"steps": 1}, evaluation={"puzzles": 20}))
    assert run.train(recipe, tmp_path / "run", device="cpu")["puzzles"] == 20


def test_what_may_be_missing(tmp_path):
    place = published(tmp_path)
    (place / "identifiers.json").unlink()
    data = read(place, "train")
    assert data.names == tuple(map(str, range(30))) and data.ratings_G is None
    for split in ("train", "test"):
        change(place, split, drop=["num_puzzle_identifiers", "total_groups", "mean_puzzle_examples", "ignore_label_id"])
    assert read(place, "train").names == ("0", "1", "2", "3", "4") and read(place, "train").ignored is None
    (place / "identifiers.json").write_text(json.dumps(["<blank>", "a", "b", "c", "d", "e"]))
    assert read(place, "test").names[-1] == "e"
    change(place, num_puzzle_identifiers=8)
    assert read(place, "train").names == ("<blank>", "a", "b", "c", "d", "e", "6", "7")
    with pytest.raises(ValueError, match="num_identifiers is 8 in train and 6 in test"):
        load(Folder(str(place)))


def save(kind, array, name="all"):
    return lambda place: np.save(place / "train" / f"{name}__{kind}.npy", array)


DAMAGE = {  # what was done: what is said
    "an array is gone": (lambda p: (p / "train/all__labels.npy").unlink(), "holds no all__labels.npy"),
    "a set is gone": (lambda p: change(p, sets=["all", "hard"]), "holds no hard__inputs.npy"),
    "no sets": (lambda p: change(p, sets=[]), r"sets is \[\]; must be names"),
    "no vocabulary": (lambda p: change(p, drop=["vocab_size"]), "vocab_size is 'missing'; must be a whole number"),
    "a list": (lambda p: (p / "train/dataset.json").write_text("[]"), "is list, not a mapping"),
    "no json": (lambda p: (p / "train/dataset.json").write_text("{"), "damaged .not JSON"),
    "names that are none": (lambda p: (p / "identifiers.json").write_text("{}"), "is dict, not a list of names"),
    "another width": (lambda p: change(p, seq_len=7), r"are \(7, 6\) and \(7, 6\), each with 7 cells"),
    "other labels": (save("labels", np.ones((3, 6), np.uint8)), r"are \(7, 6\) and \(3, 6\)"),
    "half a cell": (save("inputs", np.ones((7, 6)) / 2), "all__inputs.npy holds float64"),
    "offsets": (save("puzzle_indices", np.array([0, 1, 3, 2, 7])), "offsets do not fit"),
    "offsets that end early": (save("group_indices", np.array([0, 1, 2])), "offsets do not fit"),
    "too few identifiers": (save("puzzle_identifiers", np.array([1, 2])), "offsets do not fit"),
    "an identifier too many": (lambda p: change(p, num_puzzle_identifiers=3), "identifiers 1..4, there are 3 of them"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_line(case, tmp_path):
    place = published(tmp_path)
    damage, said = DAMAGE[case]
    damage(place)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load(Folder(str(place)))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_tokens_beyond_the_vocabulary_are_said_before_a_table_is_asked_for_them(tmp_path):
    place = published(tmp_path, tokens=9)
    for split in ("train", "test"):
        change(place, split, vocab_size=5)
    data = load(Folder(str(place)))
    with pytest.raises(ValueError, match=r"puzzle inputs hold tokens 1..\d, the vocabulary is 0..4"):
        next(data.train.batches(8, seed=0))


def test_which_folder_is_meant(tmp_path):
    published(tmp_path / "sudoku")
    published(tmp_path / "maze")
    said = r"holds no puzzles \(train/dataset.json is not there\); folders in it that do: maze, sudoku"
    with pytest.raises(RecipeError, match=said):
        PuzzleRecipe.parse({"puzzle": str(tmp_path)})
    (tmp_path / "maze/test/dataset.json").unlink()
    with pytest.raises(RecipeError, match=r"holds no puzzles \(test/dataset.json is not there\)$"):
        PuzzleRecipe.parse({"puzzle": str(tmp_path / "maze")})


def test_cells_as_text(tmp_path):
    source = Cells(4, 12)
    assert (
        source.render(np.array([1, 11, 0, 3])) == " 1 11\n 0  3" and Cells(3, 5).render(np.array([1, 2, 4])) == "1 2 4"
    )
    for text, said in (
        ("1 2 x 4", "'x': no token"),
        ("1 2 3 12", "'12': no token .* 0 to 11"),
        ("1 2", "4 cells, .* 2"),
    ):
        with pytest.raises(ValueError, match=said):
            source.parse(text)
    with pytest.raises(ValueError, match="has no solver"):
        source.solve(np.ones(4))
    with pytest.raises(ValueError, match="Cells is not drawn"):
        pictures.drawer(tmp_path / "a.gif", Folder(str(published(tmp_path / "x"))))
