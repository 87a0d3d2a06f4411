"""Reading records: every mistake in a file is one line that names it."""

import gzip
import json

import pytest
from pyarrow import Table, parquet

from undertow.tasks import files

RECORDS = [{"question": f"q{i}?", "answer": f"ä{i}"} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)


def lines(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("spaced.jsonl", LINES.replace("\n", "\n\n")),
        ("unended.jsonl", LINES.rstrip("\n")),
        ("array.json", json.dumps(RECORDS, indent=1)),
        ("lines.json", LINES),
        ("a.csv", "question,answer\r\n" + "".join(f"{r['question']},{r['answer']}\r\n" for r in RECORDS)),
        ("bom.csv", "\ufeffquestion,answer\n" + "".join(f'"{r["question"]}",{r["answer"]}\n' for r in RECORDS)),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, content):
    assert list(files.read(lines(tmp_path / name, content), ("question", "answer"))) == RECORDS


def test_parquet(tmp_path):
    parquet.write_table(Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert list(files.read(tmp_path / "a.parquet", ("answer",))) == RECORDS


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    path = lines(tmp_path / "a.jsonl", '{"question": "a\u2028b\x85c"}\n')
    assert [record["question"] for record in files.read(path)] == ["a\u2028b\x85c"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", b"", "holds no records"),
        ("blank.jsonl", b"\n \n", "holds no records"),
        ("empty.json", b"", "holds no records"),
        ("none.json", b"[]", "holds no records"),
        ("empty.csv", b"", "holds no records"),
        ("header.csv", b"question,answer\n", "holds no records"),
        ("empty.parquet", b"", "not parquet"),
        ("torn.jsonl", LINES[:-9], "line 5: not JSON (Unterminated string"),
        ("torn.json", json.dumps(RECORDS)[:-9], "not JSON (Unterminated string"),
        ("torn.csv", 'question,answer\nq,"a', "line 2: not CSV (unexpected end of data)"),
        ("wide.csv", "question,answer\nq,a,b\n", "line 2: more cells than the header names"),
        ("short.csv", "question,answer\nq\n", "record 1: lacks answer; has question, answer"),
        ("torn.parquet", b"PAR1....", "not parquet"),
        ("torn.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], "not a whole gzip file"),
        ("not.jsonl.gz", LINES, "not a whole gzip file (Not a gzipped file"),
        (
            "schema.jsonl",
            '{"question": "q", "answer": "a"}\n{"text": "t"}\n',
            "record 2: lacks question, answer; has text",
        ),
        ("null.jsonl", '{"question": "q", "answer": null}', "record 1: lacks answer; has question, answer"),
        ("list.jsonl", "[1, 2]", "record 1: is list, not a mapping of fields"),
        ("number.json", "[3]", "record 1: is int, not a mapping of fields"),
        (
            "latin.jsonl",
            '{"question": "ä"}'.encode("latin-1"),
            "not text in UTF-8 (invalid continuation byte at",
        ),
        ("latin.json", '[{"question": "ä"}]'.encode("latin-1"), "not text in UTF-8"),
        ("latin.csv", "question,answer\nä,b\n".encode("latin-1"), "not text in UTF-8"),
        ("latin.jsonl.gz", gzip.compress('{"question": "ä"}'.encode("latin-1"), mtime=0), "not text in UTF-8"),
        ("binary.jsonl", bytes(range(256)), "not"),
        ("notes.txt", "hello", "unknown kind of file; allowed: .jsonl, .json, .csv, .parquet"),
        ("a.txt.gz", b"", "unknown kind of file"),
        ("a.parquet.gz", b"", "unknown kind of file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_it(tmp_path, name, content, said):
    path = lines(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        list(files.read(path, ("question", "answer")))
    assert str(error.value).startswith(str(path)) and said in str(error.value) and "\n" not in str(error.value)


def test_a_folder_and_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="is a folder; must be a file"):
        list(files.read(tmp_path))
    with pytest.raises(FileNotFoundError, match="a.jsonl: no such file"):
        list(files.read(tmp_path / "a.jsonl"))


def test_what_the_hub_does_not_give_is_one_line_that_says_what_else_to_do():
    """The tests run offline: this is what someone without a network reads."""
    for attempt in (lambda: list(files.hub("openai/gsm8k", "train", "main")), lambda: files.hub_stream("a/b", "train")):
        with pytest.raises(
            ValueError, match=r"^(openai/gsm8k|a/b): cannot be had from the hub \(.*\); give path="
        ) as error:
            attempt()
        assert "\n" not in str(error.value)


def test_records_of_the_hub_are_checked(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(files.hub("some/thing", "train", "main", ("answer",))) == RECORDS
    with pytest.raises(ValueError, match=r"^some/thing \(test\), record 1: lacks steps; has question, answer$"):
        list(files.hub("some/thing", "test", fields=("steps",)))
    assert asked == [("some/thing", "main", "train"), ("some/thing", None, "test")]
