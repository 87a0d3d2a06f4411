"""The store: what is written is read back, batches by the definition, from any step on; damage is found."""

import itertools
import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from undertow.trm.puzzles import PUZZLES, Maze, PuzzleData, Sudoku, load, read, write
from undertow.trm.puzzles.base import Group, Source


def made(sizes: list[list[int]], width: int = 3) -> PuzzleData:
    """Groups of puzzles of so many examples; example e is filled with e + 1, its labels too but for the first."""
    flat = [size for group in sizes for size in group]
    inputs = np.repeat(np.arange(1, sum(flat) + 1, dtype=np.uint8)[:, None], width, axis=1)
    labels = inputs.copy()
    labels[:, 0] = 0
    return PuzzleData(
        inputs, labels, np.cumsum([0, *flat]), np.cumsum([0, *map(len, sizes)]), np.arange(1, len(flat) + 1),
        tuple(map(str, range(len(flat) + 1))), 256,
    )  # fmt: skip


def equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def rows(batch: dict) -> list[tuple[int, int]]:
    """(example, identifier) of each row."""
    return list(zip((batch["inputs"][:, 1] - 1).tolist(), batch["puzzle_identifiers"].tolist(), strict=True))


def test_a_batch():
    (batch,) = made([[1], [2, 1], [1]]).batches(3, seed=0, epochs=1)
    assert batch["inputs"].shape == batch["labels"].shape == (3, 3) and batch["puzzle_identifiers"].shape == (3,)
    assert all(value.dtype == torch.int64 for value in batch.values())
    assert (batch["labels"][:, 0] == -100).all() and torch.equal(batch["labels"][:, 1:], batch["inputs"][:, 1:])


layouts = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(layouts, st.integers(1, 9), st.integers(0, 10**6))
def test_an_epoch_is_each_group_once_one_puzzle_of_it(sizes, batch_size, seed):
    """Read off the batches: puzzle by puzzle, whole unless the batch is full, the next puzzle of another group."""
    data = made(sizes)
    group_of = np.repeat(np.arange(len(sizes)), list(map(len, sizes)))
    size_of = np.diff(data.puzzle_starts)
    visited = []
    batches = list(data.batches(batch_size, seed, epochs=3))
    for batch in batches:
        found = rows(batch)
        assert len(found) == batch_size
        left = batch_size
        while left:
            puzzle = found[batch_size - left][1] - 1
            taken = min(size_of[puzzle], left)
            part = found[batch_size - left : batch_size - left + taken]
            assert {identifier for _, identifier in part} == {puzzle + 1}
            examples = [example for example, _ in part]
            assert len(set(examples)) == taken  # no example twice
            assert all(data.puzzle_starts[puzzle] <= e < data.puzzle_starts[puzzle + 1] for e in examples)
            visited.append(int(group_of[puzzle]))
            left -= taken
    for epoch in chunks(visited, len(sizes)):
        assert len(set(epoch)) == len(epoch)
    dropped = 3 * len(sizes) - len(visited)
    assert 0 <= dropped < batch_size  # only what did not fill a last batch


def chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


@pytest.mark.parametrize("sizes", [[[1]] * 7, [[2, 3], [1, 1, 4], [5]]], ids=["ones", "many"])
def test_batches_go_on_from_any_step(sizes):
    data = made(sizes)
    whole = list(itertools.islice(data.batches(4, seed=3), 20))
    for start in (0, 1, 7, 19):
        rest = list(itertools.islice(data.batches(4, seed=3, start=start), 20 - start))
        assert all(equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    assert not all(equal(a, b) for a, b in zip(whole, data.batches(4, seed=4), strict=False))
    assert len({tuple(rows(batch)) for batch in whole}) > 10


def test_the_global_generators_play_no_part():
    data = made([[2, 3], [1, 1, 4], [5]])
    np.random.seed(0)
    torch.manual_seed(0)
    one = next(data.batches(4, seed=0))
    np.random.seed(1)
    torch.manual_seed(1)
    assert equal(one, next(data.batches(4, seed=0)))


def test_puzzles_and_examples_are_equally_likely():
    counts = Counter(
        row for batch in itertools.islice(made([[2, 2, 2]]).batches(1, seed=0), 3000) for row in rows(batch)
    )
    assert len(counts) == 6 and all(400 < count < 600 for count in counts.values())


def test_a_batch_may_be_larger_than_an_epoch():
    data = made([[1], [1], [1]])
    batch = next(data.batches(7, seed=0))
    assert [sorted(e for e, _ in part) for part in (rows(batch)[:3], rows(batch)[3:6])] == [[0, 1, 2]] * 2
    assert len(list(data.batches(7, seed=0, epochs=2))) == 0 and len(list(data.batches(7, seed=0, epochs=3))) == 1
    assert data.epoch_examples == 3


def test_in_order_every_example_once_and_padding_after():
    data = made([[2, 1], [3]])
    batches = list(data.in_order(4))
    assert [row for batch in batches for row in rows(batch)][:6] == [(0, 1), (1, 1), (2, 2), (3, 3), (4, 3), (5, 3)]
    last = batches[-1]
    assert last["inputs"].shape == (4, 3) and (last["inputs"][2:] == 0).all() and (last["labels"][2:] == -100).all()
    assert (last["puzzle_identifiers"][2:] == 0).all() and (last["labels"][:2, 1:] != -100).all()
    assert equal(last, next(data.in_order(4, start=1))) and not list(data.in_order(4, start=2))


@pytest.mark.parametrize("call", [
    lambda d: d.batches(0, 0), lambda d: d.batches(2, 0, start=-1), lambda d: list(d.in_order(0)),
], ids=["empty", "start", "in_order"])  # fmt: skip
def test_bad_arguments(call):
    with pytest.raises(ValueError, match="at least"):
        call(made([[1]]))


@dataclass(frozen=True)
class Counted(Source):
    """Groups as said, with names; counts how often it is asked for them."""

    asked = []
    vocab_size = 9
    seq_len = 2

    def groups(self, split):
        self.asked.append(split)
        for number in range(3 if split == "train" else 2):
            rows_ES = np.full((4, 2), number + 1, dtype=np.uint8)
            yield Group(rows_ES, rows_ES, [f"{number}", f"{number}/x"], [1, 3], rating=number)


def test_what_is_written_is_read_back(tmp_path):
    write(Counted(), tmp_path)
    train, test = (read(tmp_path, split) for split in ("train", "test"))
    assert isinstance(train.inputs_ES, np.memmap)
    assert train.inputs_ES.tolist() == [[n, n] for n in (1, 2, 3) for _ in range(4)]
    assert train.puzzle_starts.tolist() == [0, 1, 4, 5, 8, 9, 12] and train.group_starts.tolist() == [0, 2, 4, 6]
    assert train.names == test.names == ("<blank>", "0", "0/x", "1", "1/x", "2", "2/x")
    assert train.identifiers_P.tolist() == [1, 2, 3, 4, 5, 6] and test.identifiers_P.tolist() == [1, 2, 3, 4]
    assert train.ratings_G.tolist() == [0, 1, 2] and train.vocab_size == 9 and train.num_identifiers == 7
    assert train.seq_len == 2 and len(train) == 12 and train.num_groups == 3 and train.epoch_examples == 6
    about = json.loads((tmp_path / "train" / "dataset.json").read_text())
    assert about == {
        "pad_id": 0, "ignore_label_id": 0, "blank_identifier_id": 0, "vocab_size": 9, "seq_len": 2, "total_groups": 3,
        "mean_puzzle_examples": 2.0, "total_puzzles": 6, "sets": ["all"], "num_puzzle_identifiers": 7,
    }  # fmt: skip
    assert not list(tmp_path.rglob("*.tmp"))


def test_made_once_and_again_only_if_not_whole(tmp_path):
    Counted.asked.clear()
    first = load(Counted(), tmp_path)
    assert Counted.asked == ["train", "test"]
    assert equal(next(first.train.batches(5, 0)), next(load(Counted(), tmp_path).train.batches(5, 0)))
    assert Counted.asked == ["train", "test"]
    (folder,) = tmp_path.iterdir()
    (folder / "puzzles.json").unlink()  # as a kill would leave it
    load(Counted(), tmp_path)
    assert Counted.asked == ["train", "test"] * 2


@dataclass(frozen=True)
class Failing(Counted):
    """Comes to an end before the test split is whole."""

    def groups(self, split):
        for group in super().groups(split):
            yield group
            if split == "test":
                raise ValueError("no more")


def test_a_source_that_fails_leaves_nothing_that_looks_whole(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="no more"):
            load(Failing(), tmp_path)
        assert not list(tmp_path.rglob("puzzles.json")) and not list(tmp_path.rglob("test/*.npy"))


def test_another_option_or_file_is_another_folder(tmp_path):
    def folders() -> int:
        return len(list((tmp_path / "cache").iterdir()))

    for count, source in enumerate([Maze(4, 2, 1), Maze(4, 2, 1, seed=1), Maze(4, 2, 1, loops=0.0)], start=1):
        load(source, tmp_path / "cache")
        assert folders() == count
    (tmp_path / "test.csv").write_text("source,question,answer,rating\nown,SG##,SG##,1\n")
    for answer in ("So G", "S oG"):
        (tmp_path / "train.csv").write_text(f"source,question,answer,rating\nown,S  G,{answer},1\n")
        data = load(Maze(2, 1, 1, 0, path=str(tmp_path)), tmp_path / "cache")
        assert (data.train.labels_ES == 5).argmax() == answer.index("o")
    assert folders() == 5


@pytest.mark.parametrize("source", [Sudoku(4, 10, 5, 3, clues=(5, 8)), Maze(5, 6, 3)], ids=["sudoku", "maze"])
def test_sources_in_the_store(source, tmp_path):
    train, test = load(source, tmp_path)
    assert (train.vocab_size, train.seq_len, train.num_identifiers) == (source.vocab_size, source.seq_len, 1)
    assert train.num_groups == source.train and test.num_groups == source.test == len(test)
    assert len(train) == source.train * (1 + source.augmentations)
    for inputs, labels in zip(test.inputs_ES, test.labels_ES, strict=True):
        assert (source.solve(inputs) == labels).all() and (source.parse(source.render(inputs)) == inputs).all()
    assert PUZZLES[type(source).__name__](**{k: v for k, v in source.to_dict().items() if k != "puzzle"}) == source


def test_damage_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no puzzles"):
        read(tmp_path, "train")
    write(Counted(), tmp_path)
    path = tmp_path / "train" / "all__inputs.npy"
    whole = path.read_bytes()
    for damage in (b"", b"not numpy", whole[:-3]):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match="damaged") as error:
            read(tmp_path, "train")
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    np.save(tmp_path / "train" / "all__puzzle_indices.npy", np.arange(7))
    with pytest.raises(ValueError, match="offsets do not fit"):
        read(tmp_path, "train")
