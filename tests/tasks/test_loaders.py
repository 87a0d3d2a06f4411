"""Tasks whose records are read: published formats, prompts, scorers, splits that share nothing, clear errors."""

import json
import sys
import types
from itertools import combinations
from random import Random

import datasets
import pytest

from undertow.tasks import SPLITS
from undertow.tasks.gsm8k import GSM8K
from undertow.tasks.hotpotqa import HotpotQA, normal
from undertow.tasks.loaded import drawn
from undertow.tasks.reasoning_gym import ReasoningGym


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
        ("2000\nor so", False),
        ("or 2000", False),
        ("<<1000*2=2000>>", False),  # it ended before it answered
        ("", False),
        ("###", False),
        ("\n\n", False),
    ],
)
def test_gsm8k_scores_the_text_after_the_last_mark(text, right):
    assert GSM8K().correct({"question": "", "steps": [], "answer": "2,000"}, text) is right


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("1,080", "### 1080"),
        ("70000", "### 70,000"),
        ("1 000", "### 1000"),
        ("18", "### $18"),
        ("18", "### 18.00"),
        ("18", "### 18 hats"),
        ("18", "###18"),
        ("18", "### 18 </s>"),
        ("18", "The answer is 18."),
        ("-18", "### -$18"),
        ("-18", "### \u221218"),
        ("0.5", "### .5"),
        ("3/4", "### 0.75"),
        ("1 1/2", "### 1.5"),
        ("50%", "### 50"),
        ("yes", "### Yes."),
    ],
)
def test_gsm8k_compares_values(gold, said):
    record = {"question": "", "steps": [], "answer": gold}
    assert GSM8K().correct(record, said)
    for other in ("### 19", "### -19", "### none", "### " + "9" * 9000, "### 3/0", f"{said}\n### 19"):
        assert not GSM8K().correct(record, other)


@pytest.mark.parametrize(
    ("record", "steps", "answer"),
    [
        ({"steps": ["<<1+1=2>>"], "answer": 2}, ["<<1+1=2>>"], "2"),
        ({"steps": ["<<1+1=2>>"], "answer": 2.0}, ["<<1+1=2>>"], "2"),
        ({"steps": "<<1+1=2>> <<2+2=4>>", "answer": "4"}, ["<<1+1=2>>", "<<2+2=4>>"], "4"),
        ({"steps": "a <<1+1=2>>\nb", "answer": "so\n#### 4"}, ["a <<1+1=2>>", "b"], "4"),
    ],
)
def test_gsm8k_reads_steps_as_text_and_answers_as_numbers(tmp_path, record, steps, answer):
    (found,) = GSM8K(test=jsonl(tmp_path / "a.jsonl", [{"question": "q", **record}])).records("test")
    assert (found["steps"], found["answer"]) == (steps, answer)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"question": ["q"], "answer": "#### 1"}, "question is list; must be text"),
        ({"question": "q", "answer": ["1"]}, "answer is list; must be text or a number"),
        ({"question": "q", "answer": 1}, "neither steps nor '####' in its answer"),
        ({"question": "q", "steps": {"a": 1}, "answer": "1"}, "steps is dict; must be a list or text"),
        ({"question": "q", "answer": float("nan")}, "lacks answer"),
    ],
)
def test_gsm8k_says_what_a_field_must_be(tmp_path, record, said):
    with pytest.raises(ValueError, match=f"a.jsonl, record 1: {said}"):
        list(GSM8K(test=jsonl(tmp_path / "a.jsonl", [record])).records("test"))


def test_gsm8k_says_how_many_solutions_hold_no_formula(tmp_path):
    bare = {"question": "q", "answer": "He has four.\n#### 4"}
    with pytest.raises(ValueError, match="none of 1 solutions holds a formula.*; try 'words'"):
        list(GSM8K(test=jsonl(tmp_path / "a.jsonl", [bare])).records("test"))
    with pytest.warns(UserWarning, match="1 of 2 solutions hold no formula .*: their response is the answer alone"):
        assert len(list(GSM8K(test=jsonl(tmp_path / "b.jsonl", [bare, main(1)])).records("test"))) == 2


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
