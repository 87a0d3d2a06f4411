"""Tasks whose records are read: published formats, prompts, scorers, splits that share nothing, clear errors."""

import json
import sys
import types
from itertools import combinations
from random import Random

import datasets
import pytest

from undertow.tasks import SPLITS
from undertow.tasks.fineweb import FineWeb
from undertow.tasks.gsm8k import GSM8K
from undertow.tasks.hotpotqa import HotpotQA, normal
from undertow.tasks.loaded import drawn
from undertow.tasks.reasoning_gym import ReasoningGym
from undertow.tasks.text import Stdlib, TextFiles
from undertow.tasks.tokenised import Tokenised
from undertow.tasks.topics import Topics


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def main(i):
    """As openai/gsm8k has it."""
    j, k = i + 1, 2 * i + 2
    said = f"She has {i}+1 = <<{i}+1={j}>>{j} hats.\nLet it be.\nTwice that is <<{j}*2={k}>>{k}."
    return {"question": f"Anna has {i} hats ...?", "answer": f"{said}\n#### {k:,}"}


def aug(i):
    """As whynlp/gsm8k-aug has it."""
    steps = [f"<<{i}+1={i + 1}>>", f"<<{i + 1}*2={2 * i + 2}>>"]
    return {"question": f"Anna has {i} hats ...?", "steps": steps, "answer": str(2 * i + 2)}


def hotpot(i, pairs=False):
    titles, lines = ["Rome", f"Hat {i}"], [["Rome is old."], [f"Hat {i} is red.", f" It lies in the City{i}."]]
    facts = ["Rome", f"Hat {i}", f"Hat {i}"], [0, 1, 7]  # the last points past the end, as some published ones do
    return {
        "id": str(i),
        "question": f"Where is hat {i}?",
        "answer": f"the City{i}",
        "type": "bridge",
        "level": ("easy", "medium", "hard")[i % 3],
        "context": [list(pair) for pair in zip(titles, lines, strict=True)]
        if pairs
        else {"title": titles, "sentences": lines},
        "supporting_facts": [list(pair) for pair in zip(*facts, strict=True)]
        if pairs
        else {"title": facts[0], "sent_id": facts[1]},
    }


@pytest.fixture
def gym(monkeypatch):
    """A module with reasoning-gym's interface: items of one data set follow from consecutive seeds."""

    class Data:
        def __init__(self, size, seed, top=10**6):
            self.size, self.seed, self.top = size, seed, top

        def __len__(self):
            return self.size

        def __getitem__(self, i):
            a, b = (Random(self.seed + i).randrange(self.top) for _ in "ab")
            return {"question": f"{a} + {b} = ?", "answer": str(a + b), "metadata": {"terms": (a, b), "seen": {a, b}}}

        def score_answer(self, answer, entry):
            terms = entry["metadata"]["terms"]
            assert isinstance(terms, tuple)
            return 1.0 if answer == str(sum(terms)) else 0.01

    def create_dataset(name, **config):
        if name != "sums":
            raise ValueError(f"Dataset '{name}' not registered")
        return Data(**config)

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))


# ---- the splits


def test_a_split_that_was_not_published_is_drawn_by_hash():
    keys = [f"key {i}" for i in range(20_000)]
    both = [drawn(key, ("validation", "test")) for key in keys]
    assert all(800 < both.count(split) < 1200 for split in ("validation", "test"))  # 5 % each, 31 standard deviation
    assert [drawn(key, ()) for key in keys[:100]] == ["train"] * 100
    # Where only one lacks, the other's share stays with training; no record changes sides among those that are drawn.
    one = [drawn(key, ("validation",)) for key in keys]
    assert [split == "validation" for split in one] == [split == "validation" for split in both]


def splits_of(task):
    return {split: list(task.records(split)) for split in SPLITS}


def test_no_question_is_in_two_splits_and_nothing_else_is_lost(tmp_path):
    """Against the definition: test whole, validation without test, training without either."""
    train = [main(i % 300) for i in range(330)]  # thirty twice
    test = [main(i) for i in range(250, 320)]
    test[0]["question"] = "  " + test[0]["question"].upper()  # the same problem, written down otherwise
    task = GSM8K(path=jsonl(tmp_path / "train.jsonl", train), test=jsonl(tmp_path / "test.jsonl", test))
    found = splits_of(task)
    keys = {split: [task.key(record) for record in found[split]] for split in SPLITS}
    assert not any(set(keys[a]) & set(keys[b]) for a, b in combinations(SPLITS, 2))
    assert keys["test"] == [" ".join(r["question"].lower().split()) for r in test]
    rest = [main(i % 300)["question"].lower() for i in range(330) if i % 300 < 250]
    assert sorted(keys["train"] + keys["validation"]) == sorted(rest)
    assert keys["train"] == [key for key in rest if drawn(key, ("validation",)) == "train"]
    assert 1 <= len(keys["validation"]) < 40
    assert splits_of(task) == found  # the same ones every time

    validation = jsonl(tmp_path / "v.jsonl", [main(3), main(260), main(900)])
    given = GSM8K(path=task.path, test=task.test, validation=validation)
    expected = [main(3)["question"], main(900)["question"]]
    assert [record["question"] for record in given.records("validation")] == expected
    assert main(3)["question"] not in {record["question"] for record in given.records("train")}


def test_a_split_that_would_be_empty_is_an_error(tmp_path):
    lacking = ("validation", "test")
    staying = [main(i) for i in range(20) if drawn(main(i)["question"].lower(), lacking) == "train"]
    path = jsonl(tmp_path / "train.jsonl", staying[:3])
    with pytest.raises(ValueError, match=r"^GSM8K validation: .*train.jsonl gives nothing \(of so few .*; give valid"):
        list(GSM8K(path).records("validation"))
    with pytest.raises(ValueError, match=r"^GSM8K train: .* gives nothing \(its records are all in validation"):
        list(GSM8K(path, validation=path, test=jsonl(tmp_path / "t.jsonl", [main(9)])).records("train"))
    with pytest.raises(ValueError, match="^split 'dev': allowed: train, validation, test$"):
        list(GSM8K(path).records("dev"))


def test_the_hub_is_asked_for_what_was_published(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        make = {"openai/gsm8k": main, "hotpotqa/hotpot_qa": hotpot}.get(name, aug)
        numbers = range(100, 110) if split in ("test", "validation") and name != "x" else range(60)
        return datasets.Dataset.from_list([make(i + (split == "validation") * 50) for i in numbers])

    monkeypatch.setattr(datasets, "load_dataset", load)

    def asks(task, split):
        asked.clear()
        return list(task.records(split)), asked[:]

    assert asks(GSM8K(), "test")[1] == [("openai/gsm8k", "main", "test")]
    records, names = asks(GSM8K(), "validation")  # there is none: taken out of training
    assert names == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    assert {r["question"] for r in records} < {main(i)["question"] for i in range(60)}
    assert asks(GSM8K(variant="aug"), "validation")[1][-1] == ("whynlp/gsm8k-aug", None, "validation")
    assert asks(HotpotQA(), "test")[1] == [("hotpotqa/hotpot_qa", "distractor", "validation")]
    with pytest.raises(
        ValueError, match=r"^whynlp/gsm8k-aug-nl \(test\), record 1: steps='words': none of its steps holds such"
    ):
        asks(GSM8K(variant="aug", steps="words"), "test")


# ---- prompts and scorers


def test_gsm8k_writes_what_was_published(tmp_path):
    expected = {"question": "Anna has 999 hats ...?", "answer": "2,000"}
    path = jsonl(tmp_path / "a.jsonl", [main(999)])
    (record,) = GSM8K(test=path).records("test")
    assert record.items() >= expected.items() and len(record["steps"]) == 3
    symbolic, words = (GSM8K(test=path, steps=steps).example(record) for steps in ("symbolic", "words"))
    assert symbolic.prompt == words.prompt == "Anna has 999 hats ...?\n\n"
    assert symbolic.response == "<<999+1=1000>>\n<<1000*2=2000>>\n### 2,000"
    assert words.response == "She has 999+1 = 1000 hats.\nLet it be.\nTwice that is 2000.\n### 2,000"
    assert symbolic.bucket == "3 steps"
    (record,) = GSM8K(test=jsonl(tmp_path / "b.jsonl", [aug(999)])).records("test")
    assert GSM8K().example(record).response == symbolic.response.replace(",", "")
    assert GSM8K().example({**record, "steps": []}).response == "### 2000"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("### 2000", True),
        ("<<1+1=2>>\n#### 2,000.", True),
        ("### 7\n### 2000", True),  # the last counts
        ("so it is\n2000\n", True),  # no mark: the last line
        ("### 2000 hats", False),
        ("2000\nor so", False),
        ("### 2000.0", False),
        ("", False),
        ("###", False),
        ("\n\n", False),
    ],
)
def test_gsm8k_scores_the_text_after_the_last_mark(text, right):
    assert GSM8K().correct({"question": "", "steps": [], "answer": "2,000"}, text) is right


@pytest.mark.parametrize("pairs", [False, True])
def test_hotpotqa_reads_both_published_forms(tmp_path, pairs):
    path = jsonl(tmp_path / "a.json", [hotpot(i, pairs) for i in range(3)])
    first, *_ = records = list(HotpotQA(test=path).records("test"))
    assert [HotpotQA().example(record).bucket for record in records] == ["easy", "medium", "hard"]
    plain, chain = (HotpotQA(chain=chain).example(first) for chain in (False, True))
    paragraphs = "Rome: Rome is old.\nHat 0: Hat 0 is red. It lies in the City0."
    assert plain.prompt == chain.prompt == f"{paragraphs}\n\nWhere is hat 0?\n\n"
    assert plain.response == "the City0"
    assert chain.response == "Rome is old.\nIt lies in the City0.\n### the City0"
    assert HotpotQA().correct(first, "The city0.") and not HotpotQA().correct(first, "in City0")
    assert HotpotQA(chain=True).correct(first, "I think\n### City0") and not HotpotQA().correct(first, "x\n### City0")


def test_exact_match_is_the_standard_one():
    assert normal("  The Beatles' album, “An A”!  ") == "beatles album “ ”"
    assert normal("another theatre") == "another theatre"  # articles only as whole words


def test_reasoning_gym_draws_and_scores_as_it_does(gym):
    task = ReasoningGym(train=50, validation=10, test=10, dataset="sums", config={"top": 500})
    found = splits_of(task)
    assert [len(found[split]) for split in SPLITS] == [50, 10, 10] and splits_of(task) == found
    questions = [task.key(record) for split in SPLITS for record in found[split]]
    assert len(set(questions)) == 70
    assert json.loads(json.dumps(found)) == found  # sets and tuples stay out of the records
    shifted = ReasoningGym(
        train=50, validation=10, test=10, seed=1, dataset="sums"
    )  # close seeds share next to nothing
    assert len({task.key(record) for record in shifted.records("train")} & set(questions)) < 3


def test_reasoning_gym_says_what_is_missing(gym, monkeypatch):
    for config, said in (
        ({"dataset": "suns"}, "ReasoningGym dataset='suns', config={}: Dataset 'suns' not registered"),
        ({"dataset": "sums", "config": {"tip": 1}}, "config={'tip': 1}: .*unexpected keyword argument 'tip'"),
    ):
        with pytest.raises(ValueError, match=said):
            list(ReasoningGym(**config).records("test"))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="^ReasoningGym dataset='gsm_symbolic': it is not installed: pip install"):
        list(ReasoningGym().records("test"))


def scored(tmp_path):
    numbers = range(20)
    plain, symbolic = (
        jsonl(tmp_path / "main.jsonl", map(main, numbers)),
        jsonl(tmp_path / "aug.jsonl", map(aug, numbers)),
    )
    questions = jsonl(tmp_path / "hotpot.jsonl", map(hotpot, numbers))
    return [
        GSM8K(test=plain),
        GSM8K(test=plain, steps="words"),
        GSM8K(test=symbolic, variant="aug"),
        HotpotQA(test=questions),
        HotpotQA(test=questions, chain=True),
        ReasoningGym(test=20, dataset="sums"),
    ]


def test_every_scorer_gives_one_on_gold_and_nought_on_shuffled_answers(tmp_path, gym):
    for task in scored(tmp_path):
        records = list(task.records("test"))
        answers = [task.example(record).response for record in records]
        assert len(records) == len(set(answers)) == 20
        assert all(task.correct(record, answer) for record, answer in zip(records, answers, strict=True)), task
        for turn in range(1, 20):  # every other answer is wrong
            shuffled = answers[turn:] + answers[:turn]
            assert not any(map(task.correct, records, shuffled)), task
        assert not any(task.correct(records[0], text) for text in ("", "\n", "###", "\0", "no idea", "#### ####"))


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        (GSM8K, {"question": "q", "answer": "7"}, "record 1: neither steps nor '####' in its answer ('7')"),
        (
            GSM8K,
            {"question": "q", "answer": "7", "steps": ["four and three"]},
            "record 1: steps='symbolic': none of its",
        ),
        (GSM8K, {"prompt": "q"}, "record 1: lacks question, answer; has prompt"),
        (GSM8K, {"question": 3, "answer": "#### 1"}, "record 1: "),
        (HotpotQA, {"question": "q", "answer": "a"}, "record 1: lacks context"),
        (HotpotQA, {"question": "q", "answer": "a", "context": {"title": []}}, "record 1: 'sentences'"),
        (HotpotQA, {"question": "q", "answer": "a", "context": ["abc"]}, "must be a pair of title and sentences"),
    ],
)
def test_a_record_of_another_schema_is_one_line(tmp_path, task, record, said):
    path = jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(ValueError) as error:
        list(task(test=path).records("test"))
    assert str(error.value).startswith(path) and said in str(error.value) and "\n" not in str(error.value)


# ---- text and tokens


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
