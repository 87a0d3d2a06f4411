"""Recipes of puzzles: what they say, every mistake on one line, and every shipped one takes a step in small."""

import copy
import json
import re
from pathlib import Path

import pytest
import tiny_run as tiny
import yaml

from undertow import recipe as recipes
from undertow.recipe import Recipe, RecipeError, load_any
from undertow.trm import puzzles, run, show
from undertow.trm.puzzles import Folder, Maze, Sudoku
from undertow.trm.recipe import PuzzleRecipe, title

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "trm").glob("*.yaml"))
PARAMETERS = {  # published, without the puzzles' vectors
    "sudoku_extreme": 5_028_866,
    "maze_hard": 6_822_914,
    "arc1": 6_829_058,
    "arc2": 6_829_058,
}


def complain(tmp_path, values, *overrides):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError) as caught:
        load_any(tmp_path / "x.yaml", overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_puzzle_is_a_call_a_mapping_or_a_folder(tmp_path):
    made = Sudoku(size=4, train=3, test=2, augmentations=1, clues=(8, 10))
    texts = ["Sudoku(4, 3, 2, 1, clues=[8, 10])", json.dumps(made.to_dict())]
    found = [PuzzleRecipe.parse({"puzzle": yaml.safe_load(text)}) for text in texts]
    assert [recipe.puzzle for recipe in found] == [made, made]
    assert PuzzleRecipe.parse(found[0].to_dict()) == found[0]

    puzzles.write(made, tmp_path / "data")
    stored = PuzzleRecipe.parse({"puzzle": str(tmp_path / "data")})
    assert stored.puzzle == Folder(str(tmp_path / "data")) and stored.puzzle.source == made
    assert PuzzleRecipe.parse(stored.to_dict()) == stored and stored.to_dict()["puzzle"] == str(tmp_path / "data")
    for ours, theirs in zip(run.open_data(stored), puzzles.load(made, tmp_path / "cache"), strict=True):
        assert (ours.inputs_ES == theirs.inputs_ES).all() and (ours.labels_ES == theirs.labels_ES).all()
    assert title(stored.puzzle) == "Sudoku 4x4"
    assert title(Maze(size=(4, 5), augmentations=0)) == "Maze 4x5"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"puzzle": "Sudoko(size=4)"}, "puzzle.puzzle: 'Sudoko' is unknown; did you mean 'Sudoku'?"),
        ({"puzzle": "nowhere"}, "puzzle: 'nowhere': neither a folder nor a puzzle; allowed: Sudoku, Maze, ARC"),
        ({"puzzle": "."}, "puzzle: .: holds no puzzles (train/dataset.json is not there)"),
        (
            {"puzzle": {"puzzle": "Sudoku", "sise": 4}},
            "puzzle.sise: unknown key (value 4) of Sudoku; did you mean 'size'",
        ),
        ({"puzzle": {"puzzle": "Sudoku", "size": 5}}, "puzzle: Sudoku size=5: allowed: 4, 6, 9"),
        ({"puzzle": 3}, "puzzle: 3: must be a mapping"),
        ({"network": {"widht": 3}}, "network.widht: unknown key (value 3); did you mean 'width'?"),
        ({"network": {"variant": "trn"}}, "network.variant: 'trn' is not allowed; did you mean 'trm'?"),
        ({"network": {"width": 15, "heads": 2}}, "network.heads: 2: gives heads of odd width 7"),
        ({"training": {"max_steps": 3}}, "training.max_steps: unknown key (value 3); did you mean 'steps'?"),
        ({"evaluation": {"sure": [1.0]}}, "evaluation.sure.0: 1.0: should be less than 1"),
        ({"backbone": {"family": "llama"}}, "backbone: unknown key"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, changes, said):
    monkeypatch.chdir(tmp_path)
    assert f"x.yaml: {said}" in complain(tmp_path, tiny.VALUES | changes)


def test_overrides(tmp_path):
    (tmp_path / "x.yaml").write_text("puzzle: Sudoku(size=4)\n")
    found = load_any(tmp_path / "x.yaml", ["puzzle.size=6", "network.width=64", "training.steps=7", "seed=3"])
    assert (found.puzzle.size, found.network.width, found.training.steps, found.seed) == (6, 64, 7, 3)
    assert load_any(tmp_path / "x.yaml", ["puzzle=Maze(size=8)"]).puzzle == Maze(size=8)
    assert found.name == "x"
    assert "--set network.width" in complain(tmp_path, tiny.VALUES, "network.width.x=1")


def test_what_wants_text_says_so(tmp_path):
    (tmp_path / "x.yaml").write_text("puzzle: Sudoku(size=4)\n")
    with pytest.raises(RecipeError, match="x.yaml: puzzle: is a recipe of puzzles; this needs one of text"):
        recipes.load(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match="puzzle: unknown key"):
        Recipe.parse({"puzzle": "Sudoku", "backbone": {"family": "llama"}})


def test_what_is_absent_is_named(tmp_path):
    for source, said in (
        (Sudoku(path=str(tmp_path)), "train.csv: no such file; docs/puzzles.md"),
        (Maze(path=str(tmp_path)), "train.csv: no such file; docs/puzzles.md"),
        (puzzles.ARC(test=str(tmp_path / "arc")), "arc: no such file or folder"),
    ):
        with pytest.raises(FileNotFoundError, match=said):
            puzzles.load(source, tmp_path / "cache")


# ---------------------------------------------------------------------- the shipped ones


def test_the_shipped_ones_are_there_and_the_page_names_them():
    page = (ROOT / "docs" / "puzzles.md").read_text()
    assert set(PARAMETERS) < {file.stem for file in FILES}
    for file in FILES:
        assert f"`{file.stem}.yaml`" in page


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_one_begins_with_what_it_is_and_is_shown(file):
    text, recipe = file.read_text(), load_any(file)
    assert text.startswith("# ")
    for word in ("# Source: ", "# Expected", "# Hardware: ", "# Differs: ") if file.stem in PARAMETERS else ():
        assert word in text, f"{file} lacks {word}"
    counted = show.parameters(show.on_meta(recipe))[-1][1]
    assert counted == PARAMETERS.get(file.stem, counted)
    said = re.search(r"of ([\d.]+)M parameters", text)
    assert file.stem in PARAMETERS or float(said[1]) == pytest.approx(counted / 1e6, rel=0.05)


def test_published_runs_are_as_long_as_their_epochs():
    """Steps are floor(epochs * groups * mean examples / 768); measured ten times, as published, and at the end."""
    for name, steps, epochs in (
        ("sudoku_extreme", 65_104, 50_000),
        ("maze_hard", 65_104, 50_000),
        ("arc1", 519_270, 100_000),
        ("arc2", 725_651, 100_000),
    ):
        training = load_any(ROOT / "recipes" / "trm" / f"{name}.yaml").training
        assert (training.steps, training.evaluate_every) == (steps, steps // 10), name
        assert training.batch_size == 768 and training.ema == 0.999 and training.warmup == 2000 and training.floor == 1
        assert epochs == (50_000 if training.weight_decay == 1 else 100_000)  # ARC decays by 0.1
    assert 50_000 * 1000 * 1 // 768 == 65_104  # a puzzle of one example in every group


SMALL = [  # the slow ones differ from the first in sizes only
    pytest.param(f, id=f.stem, marks=[pytest.mark.slow] if f.stem in ("sudoku_6x6", "sudoku_9x9") else [])
    for f in FILES
    if f.stem not in PARAMETERS
]


@pytest.mark.parametrize("file", SMALL)
def test_a_shipped_one_takes_a_step_in_small(file, tmp_path, monkeypatch):
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    values = copy.deepcopy(load_any(file).to_dict())
    values["puzzle"] |= {"train": 3, "test": 2, "augmentations": 1}
    values["network"] |= {"width": 16} | ({} if values["network"]["mixing"] == "mlp" else {"heads": 2})
    values["training"] |= {"steps": 1, "batch_size": 2}
    result = run.train(PuzzleRecipe.parse(values), tmp_path / "run", device="cpu")
    assert result["steps"] == 1 and result["puzzles"] == 2 and 0 <= result["accuracy"] <= 1
