"""`undertow data`: what it writes, what it shows, how it says no."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from commands import call
from undertow.tasks import TASKS, Example, Generated
from undertow.tasks.folder import Folder


@dataclass(frozen=True)
class Doubles(Generated):
    """Numbers, twice."""

    train: int = 40
    validation: int = 5
    test: int = 5
    top: int = 10_000

    def draw(self, rng, split):
        return {"n": rng.randrange(self.top)}

    def example(self, record):
        return Example(f"twice {record['n']} is ", str(2 * record["n"]), bucket="easy")

    def correct(self, record, text):
        return text == str(2 * record["n"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "Doubles", Doubles)
    monkeypatch.chdir(tmp_path)


def test_without_a_task_all_are_listed(capsys):
    status, out, _ = call(capsys, "data")
    assert status == 0
    said = " ".join(out.split())
    assert all(f"{name} {task.__doc__.splitlines()[0]}" in said for name, task in TASKS.items())


def test_a_task_becomes_files_a_table_and_an_example(capsys):
    changes = ("--set", "train=1_000", "--set", "train=60")
    status, out, err = call(capsys, "data", "doubles(top=500)", "--out", "d", *changes)
    assert (status, err) == (0, "")
    task = Doubles(train=60, top=500)
    read = Folder("d")
    assert read.task == task and list(read.records("train")) == list(task.records("train"))
    rows = [line.split() for line in out.splitlines()]
    for split, said in json.loads(Path("d/task.json").read_text())["splits"].items():
        assert [split, str(said["records"]), f"{said['bytes']:,}", said["sha256"][:16]] in rows
    first = task.example(next(task.records("train")))
    assert f"--- prompt\n{first.prompt.rstrip()}\n--- response\n{first.response}\n--- bucket\neasy\n" in out
    assert "source: d" in out

    again, shown, _ = call(capsys, "data", "Doubles", "--set", "top=500", "--set", "train=60", "--out", "d")
    assert (again, shown) == (0, out)


def test_text_and_tokens_are_shown_too(capsys, tmp_path):
    import datasets

    with open("pages.jsonl", "w") as file:
        file.writelines(json.dumps({"text": f"page {i} " + "word " * 500}) + "\n" for i in range(20))
    status, out, _ = call(capsys, "data", "fineweb(path='pages.jsonl', holdout=2, limit=9)", "--out", "f")
    assert status == 0 and "--- text\npage 2 word" in out and " ...\n" in out
    ids = {"input_ids": [[i, 5, 0] for i in range(300)], "attention_mask": [[1, 1, 0]] * 300}
    datasets.Dataset.from_dict(ids).save_to_disk("tokens")
    status, out, _ = call(capsys, "data", "Tokenised('tokens')", "--out", "t")
    assert status == 0 and "--- tokens\n" in out and len(list(Folder("t").records("train"))) > 200


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("doubled", "--out", "x"), "task: 'doubled' is unknown; did you mean 'Doubles'? allowed: "),
        (
            ("Doubles(tip=3)", "--out", "x"),
            "tip: unknown key (value 3) of Doubles; did you mean 'top'? allowed: train,",
        ),
        (("Doubles", "--out", "x", "--set", "tip=3"), "tip: unknown key (value 3) of Doubles; did you mean 'top'?"),
        (("Doubles", "--out", "x", "--set", "top=much"), "top: 'much': should be a valid integer"),
        (("Doubles", "--out", "x", "--set", "top"), "--set top: must be"),
        (("Doubles(", "--out", "x"), "'Doubles(': must be a name or a call"),
        (("Doubles(top=3)", "--out", "x"), "Doubles test=5: only 3 different problems were found"),
        (("Doubles",), "--out: missing: the folder to write Doubles to"),
        (("Doubles", "--out", "full"), "full: is not empty and holds no task.json; name a new folder"),
        (("Doubles", "--out", "other"), "other: holds another task (Doubles("),
        (("Doubles", "--out", "torn"), "torn/test.jsonl: has "),
        (("gsm8k", "--out", "x"), "openai/gsm8k: cannot be had from the hub"),
        (("gsm8k", "--out", "x", "--set", "path=none.jsonl"), "none.jsonl: no such file"),
        (("fineweb", "--out", "x"), "FineWeb limit=None: is a stream; give limit="),
        (("tokenised", "--out", "x"), "path: missing: Tokenised needs path"),
        (("reasoninggym", "--out", "x"), "ReasoningGym dataset='gsm_symbolic': it is not installed: pip install"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(capsys, tmp_path, arguments, line):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    call(capsys, "data", "Doubles(top=11, train=2, validation=2)", "--out", "other")
    call(capsys, "data", "Doubles", "--out", "torn")
    (tmp_path / "torn/test.jsonl").write_text('{"n": 3')
    status, _, err = call(capsys, "data", *arguments)
    assert status == 2
    assert err.startswith("error: ") and line in err and err.count("\n") == 1
