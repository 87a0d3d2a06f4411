"""Reading records: every mistake in a file is one line that names it."""

import gzip
import json

import pytest
from pyarrow import Table, parquet

from undertow.tasks import files

RECORDS = [{"question": f"q{i}?", "answer": f"ä{i}"} for i in range(5)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
CELLS = "question,answer\n" + "".join(f"{record['question']},{record['answer']}\n" for record in RECORDS)


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
        ("bom.jsonl", LINES.encode("utf-8-sig")),
        ("bom.json", json.dumps(RECORDS).encode("utf-8-sig")),
        ("crlf.jsonl", LINES.replace("\n", "\r\n")),
        ("cr.jsonl", LINES.replace("\n", "\r")),
        ("wide.jsonl", LINES.encode("utf-16")),
        ("wider.jsonl", LINES.encode("utf-32")),
        ("called.JSONL", LINES),
        ("called.ndjson", LINES),
        ("inside.json", json.dumps({"version": "1", "data": RECORDS}, indent=1)),
        ("inside.jsonl", json.dumps({"data": RECORDS})),
        ("array.jsonl", json.dumps(RECORDS)),
        ("printed.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS)),
        ("printed.jsonl", "".join(json.dumps(record, indent=1) for record in RECORDS)),
        ("excel.csv", CELLS.replace(",", "\t").encode("utf-16")),
        ("semicolons.csv", CELLS.replace(",", ";")),
        ("spaced.csv", CELLS.replace("question,answer", " question , answer ")),
        ("a.tsv", CELLS.replace(",", "\t")),
        ("a.CSV.GZ", gzip.compress(CELLS.encode(), mtime=0)),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)),
        ("a.json.gz", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, content):
    assert list(files.read(lines(tmp_path / name, content), ("question", "answer"))) == RECORDS


def test_parquet(tmp_path):
    parquet.write_table(Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert list(files.read(tmp_path / "a.parquet", ("answer",))) == RECORDS


def test_text_that_parquet_keeps_as_bytes_is_text(tmp_path):
    parquet.write_table(Table.from_pylist([{"answer": "ä".encode(), "image": b"\xff"}]), tmp_path / "a.parquet")
    assert list(files.read(tmp_path / "a.parquet", ("answer",))) == [{"answer": "ä", "image": b"\xff"}]
    with pytest.raises(ValueError, match="record 1: image is bytes that are not UTF-8; must be text"):
        list(files.read(tmp_path / "a.parquet", ("image",)))


def test_cells_of_any_size_and_with_quotes(tmp_path):
    text = "x " * 100_000
    path = lines(tmp_path / "a.csv", f'topic,text,\nt,{text},\nt,"a ""b"" c, d\ne",1\nt,5" disk,\n\nt,,\n')
    found = list(files.read(path, ("topic", "text")))
    assert [record["text"] for record in found] == [text, 'a "b" c, d\ne', '5" disk', ""]
    assert found[1][""] == "1"  # as pandas writes its index


def test_records_that_hold_a_list_of_records_are_not_taken_apart(tmp_path):
    chat = {"messages": [{"role": "user"}], "id": 1}
    for name, content in (("a.jsonl", json.dumps(chat) + "\n" + json.dumps(chat)), ("a.json", json.dumps([chat] * 2))):
        assert list(files.read(lines(tmp_path / name, content), ("messages",))) == [chat, chat]
    assert list(files.read(lines(tmp_path / "one.json", json.dumps(chat)), ("messages",))) == [chat]


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
        ("binary.jsonl", bytes(range(256)), "not text: holds NUL bytes; must be in UTF-8, or UTF-16"),
        ("later.csv", b"question,answer\n" + b"q,a\n" * 9999 + b"caf\xe9,a\n", "line 10001: not text in UTF-8"),
        ("commas.jsonl", LINES.replace("}", "},"), "line 1: not JSON (a comma after a record); must be one JSON"),
        ("second.jsonl", '{"question": "q", "answer": "a"}\n{"a":}', "line 2: not JSON (Expecting value at column 6)"),
        ("half.jsonl", '{"question": "\\ud83d", "answer": "a"}', "line 1: not JSON (half a character, \\ud83d)"),
        ("half.json", '[{"question": "q",\n"answer": "\\ud83d"}]', "line 1: not JSON (half a character, \\ud83d)"),
        ("nan.jsonl", '{"question": "q", "answer": NaN}', "record 1: lacks answer"),
        ("quote.csv", 'question,answer\nq,"5" disk"\n', "line 2: not CSV (',' expected after '\"'); a quote inside"),
        ("twice.csv", "answer, answer\nq,a\n", "line 1: names the column 'answer' twice"),
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
