"""Folders that bring their own split: which file is for what, by its name and by nothing else."""

import pytest

from undertow.data import load_corpus
from undertow.data.splits import by_name

T, V, X = "train", "validation", "test"


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["d/train.txt", "d/valid.txt", "d/test.txt"], [T, V, X]),
        (["d/TinyStoriesV2-GPT4-train.txt", "d/TinyStoriesV2-GPT4-valid.txt"], [T, V]),
        (["d/wiki.train.tokens", "d/wiki.valid.raw", "d/wiki.test.tokens", "d/README.md"], [T, V, X, None]),
        (["d/TRAIN/a.TXT", "d/Validation/0.txt", "d/deep/train/x/001.txt"], [T, V, T]),
        (["d/train/valid.txt", "d/train/a.txt", "d/b.txt"], [V, T, None]),  # the file's own name comes first
        (["d/train_data.txt", "d/val_set_01.txt", "d/held-out.txt"], [T, V, V]),
        (["d/train-00000-of-00002.txt", "d/dev1.txt", "d/eval 2.txt"], [T, V, V]),
        (["d/wiki.train", "d/train.en", "d/heldout"], [T, T, V]),
        (["d/training-monolingual.tokenized.shuffled/en-1-of-9", "d/held/news.en.heldout-1-of-5"], [T, V]),
        (["train/a.txt", "dev/a.txt"], [T, V]),  # two sources
        (["d/a.txt", "d/valid.txt"], [None, V]),
        (["c/train/a.py", "c/valid/b.py"], [T, V]),  # a set of programs that brings its split
        # none of these bring one
        (
            ["d/a.txt", "d/contest.txt", "d/training_notes.txt", "d/latest.txt", "d/trainval.txt", "d/test_utils.txt"],
            None,
        ),
        (["d/training.md", "d/testing.md", "d/valid.rst"], None),
        (["d/dev/a.md", "d/test/b.txt", "d/x.md"], None),
        (["c/train.py", "c/test.py", "c/eval/x.py", "c/tests/y.py", "c/u.py", "c/requirements/dev.txt"], None),
        (["c/train/a.py", "c/test/b.py", "c/setup.py"], None),
        (["train/a.txt", "train/b.txt"], None),
        (["d/a-test.txt", "d/b-test.txt"], None),
        (["stdlib/test.py", "stdlib/ast.py"], None),
    ],
)
def test_what_names_say(names, said):
    assert by_name(names) == said
    assert by_name(names[::-1]) == (None if said is None else said[::-1])


def folder(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"text {number} of {name}")
    return str(root)


def found(corpus):
    return [
        [document.name.split("/", 1)[1] for document in part] for part in (corpus.train, corpus.validation, corpus.test)
    ]


def test_files_are_in_the_split_that_they_say(tmp_path):
    names = ("train/000.txt", "train/001.txt", "valid/000.txt", "test/000.txt", "notes.txt", "README.txt", "LICENSE")
    corpus = load_corpus(folder(tmp_path, *names))
    assert found(corpus) == [["notes.txt", "train/000.txt", "train/001.txt"], ["valid/000.txt"], ["test/000.txt"]]
    reading = corpus.reading
    assert (reading.rule, reading.test_files, reading.aside) == ("names", 1, 2)
    assert corpus.train_bytes == sum(len(document.text) for document in corpus.train)
    said = str(reading)
    assert said.startswith(f"training on {corpus.train_bytes} bytes of 3 files, validating on ")
    assert said.endswith("of 1 file, split by the files' names; left out: 1 of a test split, 2 beside the split")


def test_without_validation_the_hash_holds_files_out_but_never_the_only_training_file(tmp_path):
    corpus = load_corpus(folder(tmp_path / "a", *(f"train/{i}.txt" for i in range(40)), "test.txt"))
    assert corpus.reading.rule == "hash" and found(corpus)[2] == ["test.txt"] and len(corpus.validation) < 8
    assert not any("test" in document.name for document in corpus.train + corpus.validation)
    for i in range(8):  # whatever the hash says of the other one
        assert found(load_corpus(folder(tmp_path / f"b{i}", "train.txt", f"{i}.txt")))[0] == ["train.txt"]
    with pytest.raises(ValueError, match="a single text cannot be split by file; give more files or `validation`"):
        load_corpus(folder(tmp_path / "c", "train.txt", "test.txt"))
    with pytest.raises(ValueError, match="no text is left to train on"):
        load_corpus(folder(tmp_path / "d", "valid.txt", "test.txt"))


def test_validation_that_is_named_leaves_the_files_own_out_of_training(tmp_path):
    root, other = folder(tmp_path / "a", "train.txt", "valid.txt", "test.txt"), folder(tmp_path / "b", "x.txt")
    corpus = load_corpus(root, validation=other)
    assert found(corpus) == [["train.txt"], ["x.txt"], ["test.txt"]]
    assert (corpus.reading.rule, corpus.reading.aside) == ("given", 1)


def test_a_text_is_in_one_split(tmp_path):
    root = tmp_path / "a"
    folder(root, "train/a.txt", "train/b.txt", "train/c.txt", "valid.txt", "test.txt")
    (root / "train/b.txt").write_text((root / "valid.txt").read_text())
    (root / "train/c.txt").write_text((root / "test.txt").read_text())
    assert found(load_corpus(str(root))) == [["train/a.txt"], ["valid.txt"], ["test.txt"]]


def test_lists_and_globs_bring_their_split_too(tmp_path):
    root = folder(tmp_path, "train/a.txt", "dev/b.txt", "test/c.txt")
    expected = [["a.txt"], ["b.txt"], ["c.txt"]]
    assert found(load_corpus([f"{root}/{name}" for name in ("train", "dev", "test")])) == expected
    assert found(load_corpus([f"{root}/train/a.txt", f"{root}/dev/b.txt", f"{root}/test/c.txt"])) == expected
    assert found(load_corpus(f"{root}/**/*.txt")) == [["train/a.txt"], ["dev/b.txt"], ["test/c.txt"]]
