"""Tasks of text and tokens: streamed, in files, tokenised before."""

import json

import datasets
import pytest

from undertow.tasks import SPLITS
from undertow.tasks.fineweb import FineWeb
from undertow.tasks.text import Stdlib, TextFiles
from undertow.tasks.tokenised import Tokenised
from undertow.tasks.topics import Topics


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def splits_of(task):
    return {split: list(task.records(split)) for split in SPLITS}


def parts(tmp_path, texts, kind="jsonl"):
    """The texts in three files."""
    paths = []
    for i in range(3):
        rows = [{"id": j, "text": text} for j, text in enumerate(texts[i::3])]
        paths.append(str(tmp_path / f"{i}.{kind}"))
        if kind == "jsonl":
            jsonl(tmp_path / f"{i}.jsonl", rows)
        else:
            datasets.Dataset.from_list(rows).to_parquet(paths[-1])
    return [text for i in range(3) for text in texts[i::3]], paths


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_fineweb_holds_the_first_documents_out_of_training(tmp_path, kind):
    texts = [f"page {i % 50}" for i in range(80)] + ["", " \n"]
    order, paths = parts(tmp_path, texts, kind)
    task = FineWeb(path=str(tmp_path), holdout=7)
    held = order[:7]
    expected = [text for text in order[7:] if text.strip() and text not in held]
    assert len(expected) < 73  # some page is there again
    assert [r["text"] for r in task.records("validation")] == held
    assert [r["text"] for r in task.records("train")] == expected
    assert list(task.records("test")) == []
    for path in (str(tmp_path / f"*.{kind}"), tuple(paths)):
        assert [r["text"] for r in FineWeb(path=path, holdout=7, limit=5).records("train")] == expected[:5]


def test_fineweb_goes_on_in_the_middle_of_a_stream(tmp_path):
    parts(tmp_path, [f"page {i}" for i in range(60)])
    whole = [record["text"] for record in FineWeb(path=str(tmp_path), holdout=5).stream("train")]
    for stop in (1, 20, 54):
        stream = FineWeb(path=str(tmp_path), holdout=5).stream("train")
        rows = iter(stream)
        first, state = [next(rows)["text"] for _ in range(stop)], json.loads(json.dumps(stream.state_dict()))
        again = FineWeb(path=str(tmp_path), holdout=5).stream("train")
        again.load_state_dict(state)
        assert first + [record["text"] for record in again] == whole


def test_fineweb_from_the_hub_is_the_same_code(tmp_path, monkeypatch):
    _, paths = parts(tmp_path, [f"page {i}" for i in range(30)])
    load, asked = datasets.load_dataset, []

    def hub(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return load("json", data_files=paths, split="train", streaming=True)

    local = [list(FineWeb(path=tuple(paths), holdout=3).records(split)) for split in SPLITS]
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert [list(FineWeb(holdout=3).records(split)) for split in SPLITS] == local
    assert set(asked) == {("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True)}
    next(FineWeb(edu=False, subset="CC-MAIN-2024-10").records("validation"))
    assert asked[-1][:2] == ("HuggingFaceFW/fineweb", "CC-MAIN-2024-10")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"\n", "holds no records"),
        ("a.jsonl", b'{"text": "a"}\n{"te', "JSON parse error"),
        ("a.jsonl", '{"text": "ä"}\n'.encode("latin-1"), "not text in UTF-8"),
        ("a.jsonl", b'{"page": "a"}\n', "lacks text; has page"),
        ("a.jsonl", b'{"text": "a"}\n{"page": "b"}\n', "a document's text is None; must be a string"),
        ("a.jsonl", b'{"text": "a"}\n' * 3, "gives no document of train"),
        ("a.parquet", b"PAR1....", "arquet"),
        ("a.txt", b"text", "unknown kind of file; allowed: .parquet, .jsonl, .json"),
    ],
)
def test_fineweb_says_what_is_wrong_with_a_file(tmp_path, name, content, said, caplog):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        list(FineWeb(path=str(tmp_path / name), holdout=5).records("train"))
    assert said in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    assert not caplog.records


def test_fineweb_says_what_is_wrong_with_its_options(tmp_path):
    for options, said in (
        ({"holdout": 0}, "FineWeb holdout=0: must be at least 1"),
        ({"limit": 0}, "FineWeb limit=0: must be at least 1"),
        ({"path": str(tmp_path / "no.jsonl")}, "no.jsonl: no such file"),
        ({"path": str(tmp_path)}, "holds no .parquet or .jsonl file"),
        ({}, "HuggingFaceFW/fineweb-edu: cannot be had from the hub"),
    ):
        with pytest.raises((ValueError, OSError), match=said):
            list(FineWeb(**options).records("validation"))


def test_text_files_are_documents(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    task = TextFiles(str(tmp_path))
    found = splits_of(task)
    assert sorted(r["text"] for r in found["train"] + found["validation"]) == sorted(f"text {i}" for i in range(40))
    assert found["validation"] and found["test"] == []
    given = TextFiles((str(tmp_path / "1.txt"), str(tmp_path / "2.txt")), validation=str(tmp_path / "3.txt"))
    assert [r["text"] for r in given.records("validation")] == ["text 3"]
    for name in ("train", "valid", "test"):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / f"{name}.txt").write_text(name)
    own = splits_of(TextFiles(str(tmp_path / "own")))
    assert [own[split][0]["text"] for split in SPLITS] == ["train", "valid", "test"]
    with pytest.raises(ValueError, match="no such file or folder"):
        list(TextFiles(str(tmp_path / "none")).records("train"))


def test_the_standard_library_is_the_corpus_of_that_name():
    from undertow.data import load_corpus

    assert [r["text"] for r in Stdlib().records("validation")] == [d.text for d in load_corpus("stdlib").validation]


def test_topics_are_csv_files_named_as_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train_data.csv").write_text('topic,text\nsea,"Waves, high."\nsea,Salt.\nsky,Blue.\nsky, \n')
    (tmp_path / "data/valid_data.csv").write_text("topic,text\nsky,Blue.\n")
    found = splits_of(Topics())
    assert [r["text"] for r in found["train"]] == ["Waves, high.", "Salt."]  # without what is validated on
    assert found["validation"] == found["test"] == [{"topic": "sky", "text": "Blue."}]
    (tmp_path / "other.csv").write_text("label,sentence\na,b\n")
    with pytest.raises(ValueError, match="^other.csv, record 1: lacks topic, text; has label, sentence$"):
        list(Topics(validation="other.csv").records("validation"))
    with pytest.raises(FileNotFoundError, match="^none.csv: no such file$"):
        list(Topics(train="none.csv").records("train"))


def test_pads_of_tokenised_data_are_dropped(tmp_path):
    ids = [[i, i + 1, i + 2, 9, 9] for i in range(200)]  # 9 is a token, and the pad
    masks = [[1] * (2 + i % 4) + [0] * (3 - i % 4) for i in range(200)]
    masks[0] = [0] * 5  # nothing but pads
    rows = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": masks})
    rows.save_to_disk(tmp_path / "one")
    task = Tokenised(str(tmp_path / "one"))
    found = splits_of(task)
    expected = [ids[i][: sum(masks[i])] for i in range(1, 200)]
    assert [len(found[split]) > 0 for split in SPLITS] == [True] * 3
    assert sorted(r["input_ids"] for split in SPLITS for r in found[split]) == sorted(expected)
    assert all(type(token) is int for record in found["train"] for token in record["input_ids"])

    datasets.DatasetDict({"train": rows, "test": rows.select(range(5))}).save_to_disk(tmp_path / "two")
    rows.select(range(10, 14)).remove_columns("attention_mask").save_to_disk(tmp_path / "three")
    task = Tokenised(str(tmp_path / "two"), validation=str(tmp_path / "three"))
    assert [r["input_ids"] for r in task.records("test")] == expected[:4]
    assert [r["input_ids"] for r in task.records("validation")] == ids[10:14]  # no mask: all are tokens
    train = [r["input_ids"] for r in task.records("train")]
    assert train == [one for one in expected if one not in expected[:4] and one not in ids[10:14]]


def test_labels_of_tokenised_data_are_the_targets(tmp_path):
    """As supervised fine-tuning tools save them: the prompt is -100, pads are masked; two more columns are not read."""
    rows = [
        {"input_ids": [3, 4, 5, i, 2, 0], "labels": [-100] * 3 + [i, 2, -100], "attention_mask": [1] * 5 + [0]}
        for i in range(6, 60)
    ]
    extra = [{**row, "position_ids": list(range(6)), "text": "a"} for row in rows]
    datasets.Dataset.from_list(extra).save_to_disk(tmp_path / "one")
    task = Tokenised(str(tmp_path / "one"))
    with pytest.warns(UserWarning, match="columns that are not read: position_ids, text") as said:
        found = splits_of(task)
    assert len(said) == 1
    expected = [{"input_ids": [3, 4, 5, i, 2], "labels": [-100] * 3 + [i, 2]} for i in range(6, 60)]
    assert sorted((r for split in SPLITS for r in found[split]), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"input_ids": [3, 4, 5], "labels": [3, 4]}, r"one \(train\), record 1: labels has 2 entries, input_ids 3"),
        ({"input_ids": [3, 4, 5], "attention_mask": [1]}, "attention_mask has 1 entries, input_ids 3"),
        ({"input_ids": [3, 4, 5, 6], "labels": [-100, 5, 6, -100]}, "labels are shifted already"),
    ],
)
def test_columns_that_do_not_fit_each_other_are_one_line(tmp_path, row, said):
    datasets.Dataset.from_list([row]).save_to_disk(tmp_path / "one")
    with pytest.raises(ValueError, match=said):
        list(Tokenised(str(tmp_path / "one")).records("train"))


def test_tokenised_data_of_another_kind_is_one_line(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    datasets.DatasetDict({"test": datasets.Dataset.from_dict({"input_ids": [[1]]})}).save_to_disk(tmp_path / "test")
    for name, said in (
        ("none", "none not found"),
        (".", "neither a `Dataset` directory nor"),
        ("text", "lacks input_ids; has text"),
        ("test", "holds test; must hold train"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            list(Tokenised(str(tmp_path / name)).records("train"))
        assert "\n" not in str(error.value)
