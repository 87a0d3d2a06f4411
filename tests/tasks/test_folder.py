"""A task's records in a folder: written whole or not at all, read back the same, checked, gone on with."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from undertow.recipe import Recipe, RecipeError
from undertow.tasks import S5, SPLITS, TASKS, Example, Generated, Tags
from undertow.tasks.fineweb import FineWeb
from undertow.tasks.folder import Folder, is_folder, write
from undertow.tasks.parse import open_source, parse


@dataclass(frozen=True)
class Sums(Generated):
    """Sums of two numbers."""

    train: int = 40
    validation: int = 5
    test: int = 5
    top: int = 1000
    name: str = "ä"
    tags: bool = False

    def draw(self, rng, split):
        return {"terms": [rng.randrange(self.top), rng.randrange(self.top)], "name": self.name}

    def example(self, record):
        a, b = record["terms"]
        return Tags(f"{a} {b}", f"{b} {a}", (0, 1)) if self.tags else Example(f"{a} + {b} = ", str(a + b))

    def correct(self, record, text):
        return text == str(sum(record["terms"]))

    def key(self, record):
        return tuple(record["terms"])


@pytest.fixture(autouse=True)
def listed(monkeypatch):
    monkeypatch.setitem(TASKS, "Sums", Sums)


def test_what_is_read_back_is_what_the_task_gives(tmp_path):
    task = Sums(seed=3)
    held = write(task, tmp_path / "a")
    assert json.loads((tmp_path / "a/task.json").read_text()) == held
    assert held["task"] == task.to_dict() and parse(held["task"]) == task
    for split in SPLITS:
        data = (tmp_path / "a" / f"{split}.jsonl").read_bytes()
        counts = {"records": getattr(task, split), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        assert held["splits"][split] == counts
    read = Folder(str(tmp_path / "a"))
    assert [list(read.records(split)) for split in SPLITS] == [list(task.records(split)) for split in SPLITS]
    assert [read.count(split) for split in SPLITS] == [40, 5, 5]
    record = next(read.records("test"))
    assert (read.example(record), read.key(record), read.task) == (task.example(record), task.key(record), task)
    assert read.correct(record, str(sum(record["terms"]))) and not read.correct(record, "")
    assert (read.kind, read.streams, read.tokenizer()) == ("answers", False, None)
    with pytest.raises(ValueError, match="split 'dev': allowed"):
        list(read.records("dev"))


def test_text_has_no_test_split(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"téxt {i}")
    task = parse({"task": "TextFiles", "path": [str(tmp_path / "*.txt")]})
    write(task, tmp_path / "out")
    read = Folder(str(tmp_path / "out"))
    assert read.kind == "text" and list(read.records("test")) == []
    assert list(read.records("train")) == list(task.records("train"))
    assert read.task == task  # tuples are lists in task.json


def test_a_stream_needs_an_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"page {i}"}) + "\n" for i in range(20)))
    with pytest.raises(ValueError, match="^FineWeb limit=None: is a stream; give limit="):
        write(FineWeb(path=str(path), holdout=3), tmp_path / "out")
    write(FineWeb(path=str(path), holdout=3, limit=10), tmp_path / "out")
    assert [Folder(str(tmp_path / "out")).count(split) for split in SPLITS] == [10, 3, 0]


class Killed(Exception):
    pass


@pytest.mark.parametrize("stop", [("train", 0), ("train", 30), ("validation", 4), ("test", 5)])
def test_what_a_kill_left_is_gone_on_with(tmp_path, monkeypatch, stop):
    whole = write(Sums(), tmp_path / "whole")
    records = Sums.records

    def killed(self, split):
        for i, record in enumerate(records(self, split)):
            if (split, i) == stop:
                raise Killed
            yield record
        if (split, i + 1) == stop:
            raise Killed

    monkeypatch.setattr(Sums, "records", killed)
    with pytest.raises(Killed):
        write(Sums(), tmp_path / "a")
    assert not (tmp_path / "a" / f"{stop[0]}.jsonl").exists()
    (tmp_path / "a/train.jsonl.1.tmp").write_text("left by a kill that nothing could clean up after")
    with pytest.raises(ValueError, match="a: lacks .*the same `undertow data` again goes on with it"):
        Folder(str(tmp_path / "a"))

    done, asked = [split for split in SPLITS if (tmp_path / "a" / f"{split}.jsonl").exists()], []
    monkeypatch.setattr(Sums, "records", lambda self, split: (asked.append(split), records(self, split))[1])
    assert write(Sums(), tmp_path / "a") == whole
    assert done + asked == list(SPLITS)  # what was whole is not made again
    for split in SPLITS:
        assert (tmp_path / "a" / f"{split}.jsonl").read_bytes() == (tmp_path / "whole" / f"{split}.jsonl").read_bytes()


def test_the_same_task_again_is_checked_and_kept(tmp_path, monkeypatch):
    held = write(Sums(), tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    seen = []
    assert write(Sums(), tmp_path, lambda split, count: seen.append((split, count))) == held
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    assert seen == [("train", 40), ("validation", 5), ("test", 5)]
    (tmp_path / "validation.jsonl").unlink()  # what is missing is written again
    assert write(Sums(), tmp_path) == held and (tmp_path / "validation.jsonl").exists()


def test_nothing_of_anyone_elses_is_written_over(tmp_path):
    write(Sums(), tmp_path / "a")
    with pytest.raises(ValueError, match=r"a: holds another task \(Sums\(.*top=1000.*\), not Sums\(.*top=9,.*\); name"):
        write(Sums(top=9), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="full: is not empty and holds no task.json"):
        write(Sums(), tmp_path / "full")
    with pytest.raises(ValueError, match="notes.txt: is a file; must be a folder"):
        write(Sums(), tmp_path / "full/notes.txt")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    write(Sums(), tmp_path / "empty")


def torn(path):
    path.write_bytes(path.read_bytes()[:-3])


def changed(path):
    path.write_bytes(path.read_bytes().replace(b"ters", b"tres").replace(b"1", b"2", 1))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (torn, "says .*: torn or changed"),
        (changed, "changed since it was written"),
        (Path.unlink, "no such file"),
    ],
    ids=["torn", "changed", "gone"],
)
def test_a_damaged_file_is_one_line(tmp_path, damage, said):
    write(Sums(), tmp_path)
    damage(tmp_path / "train.jsonl")
    read = Folder(str(tmp_path))
    with pytest.raises((ValueError, OSError), match=f"train.jsonl: .*{said}") as error:
        list(read.records("train"))
    assert "\n" not in str(error.value)
    assert len(list(read.records("test"))) == 5  # the others are whole
    if said != "no such file":
        with pytest.raises(ValueError, match=said):
            write(Sums(), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        '{"format": 2}',
        '{"format": 1, "splits": {}}',
        '{"format": 1, "task": {"task": "Sums"}, "splits": {"train": {}}}',
    ],
)
def test_a_manifest_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "task.json").write_text(content)
    with pytest.raises(ValueError, match="task.json: not as `undertow data` writes it") as error:
        Folder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_folder_of_a_task_that_is_not_known(tmp_path):
    write(Sums(), tmp_path)
    text = (tmp_path / "task.json").read_text()
    (tmp_path / "task.json").write_text(text.replace('"Sums"', '"Sams"'))
    with pytest.raises(ValueError, match=r"task.json: 'Sams' is unknown; did you mean 'Sums'\?"):
        Folder(str(tmp_path))


def test_a_record_that_json_has_no_words_for_names_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(Sums, "draw", lambda self, rng, split: {"terms": [rng.random(), 1], "name": {1}})
    with pytest.raises(ValueError, match="^Sums train, record 1: not JSON"):
        write(Sums(), tmp_path)


# ---- what names a task


def test_a_task_is_a_call_a_mapping_or_a_name_in_any_case():
    for value in (
        "Sums(top=9, tags=True)",
        "sums(top=9,tags=True)",
        {"task": "SUMS", "top": 9, "tags": True},
        Sums(top=9, tags=True),
    ):
        assert parse(value) == Sums(top=9, tags=True)
    assert parse("sums") == parse("Sums()") == Sums() and parse("Sums(7)") == Sums(train=7)
    assert parse(Sums(seed=4).to_dict()) == Sums(seed=4)


@pytest.mark.parametrize(
    ("value", "key", "said"),
    [
        ("Sams", "task", "'Sams' is unknown; did you mean 'Sums'? allowed: "),
        ("Sums(to=9)", "to", "unknown key (value 9) of Sums; did you mean 'top'?"),
        ("Sums(top='many')", "top", "'many': should be a valid integer"),
        ("Sums(train=-1)", "", "Sums train=-1: must be at least 0"),
        ("Sums(1, 2, 3, 4, 5, 6, 7, 8)", "", "takes at most 7 values"),
        ("Sums(", "", "must be a name or a call"),
        ("a/b.txt", "", "must be a name or a call"),
        ("Tokenised", "path", "missing: Tokenised needs path"),
        ("GSM8K(variant='large')", "variant", "'large': should be 'main' or 'aug'"),
        ({"top": 3}, "task", "None is unknown"),
        ({"task": 3}, "task", "3 is unknown"),
    ],
)
def test_a_mistake_in_naming_a_task_is_one_line(value, key, said):
    with pytest.raises(RecipeError) as error:
        parse(value)
    assert error.value.key == key and said in str(error.value) and "\n" not in str(error.value)


def test_a_source_is_a_task_a_folder_of_one_or_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(Sums(), "made")
    (tmp_path / "Topics").mkdir()
    assert open_source("Sums(top=9)") == open_source({"task": "sums", "top": 9}) == Sums(top=9)
    assert open_source("Sums") == Sums()
    assert open_source("made") == Folder("made") and is_folder("made") and not is_folder("Topics")
    text = (
        "stdlib",
        "Topics",
        "sums",
        "nothing.txt",
        "texts/*.txt",
        ("a.txt", "b.txt"),
        ["made"],
        "./stdlib",
        "a (copy).txt",
    )
    assert [open_source(value) for value in text] == [None] * len(text)
    with pytest.raises(RecipeError, match="'Sams' is unknown"):
        open_source("Sams(top=9)")


def test_a_recipe_keeps_the_folder(tmp_path):
    write(S5(train=8, validation=2, test=2, actions=2), tmp_path / "s5")
    backbone = {"family": "llama", "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    read = Recipe.parse({"backbone": backbone, "data": {"source": str(tmp_path / "s5")}})
    assert Recipe.parse(read.to_dict()) == read
    assert list(read.data.source.records("test")) == list(S5(train=8, validation=2, test=2, actions=2).records("test"))
