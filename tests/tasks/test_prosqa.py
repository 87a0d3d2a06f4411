"""ProsQA: what follows and what does not, the scorer, published files."""

import json
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from task_checks import check_task

from undertow.tasks import SPLITS, ProsQA


def distances(edges, start):
    following, found, front, distance = defaultdict(set), {}, {start}, 0
    for u, v in edges:
        following[u].add(v)
    while front:
        found |= dict.fromkeys(front, distance)
        front = {v for u in front for v in following[u]} - set(found)
        distance += 1
    return found


@settings(max_examples=60, deadline=None)
@given(hops=st.integers(1, 12), spare=st.integers(0, 80), seed=st.integers(0, 999))
def test_one_concept_follows_and_the_other_does_not(hops, spare, seed):
    (record,) = ProsQA(hops=hops, nodes=2 * hops + 2 + spare, seed=seed, test=1).records("test")
    symbols, edges = record["idx_to_symbol"], record["edges"]
    root, target, other = record["root"], record["target"], record["neg_target"]
    assert len(set(symbols)) == len(symbols) == 2 * hops + 2 + spare
    reached = distances(edges, root)
    assert reached[target] == hops
    assert other not in reached
    assert not {target, other} & {u for u, _ in edges}  # leaves
    second = root + 1
    assert distances(edges, second)[other] == hops  # as deep below the second person
    assert target not in distances(edges, second)

    people = {symbol for symbol in symbols if symbol[0].isupper()}
    facts = [f"{'' if symbols[u] in people else 'Every '}{symbols[u]} is a {symbols[v]}." for u, v in edges]
    options = {f"{symbols[target]} or {symbols[other]}", f"{symbols[other]} or {symbols[target]}"}
    assert record["question"] in {f"{' '.join(facts)} Is {symbols[root]} a {option}?" for option in options}
    assert record["answer"] == f"{symbols[root]} is a {symbols[target]}."
    assert len(record["steps"]) == hops and set(record["steps"]) <= set(facts)
    assert not any(symbols[v] in people for _, v in edges)


def test_size_is_about_the_published():
    records = list(ProsQA(test=300).records("test"))
    edges = sum(len(record["edges"]) for record in records) / 300
    assert 32 < edges < 40  # 36 in Coconut's table 2, with 23 nodes
    last = sum(r["question"].endswith(f" {r['idx_to_symbol'][r['target']]}?") for r in records)
    assert 120 < last < 180  # the right concept is as often first as last
    assert {ProsQA().example(record).bucket for record in records} == {"3 hops", "4 hops", "5 hops"}


RECORD = {
    "question": "Tom is a terpus. Every terpus is a brimpus. Every terpus is an impus. Every impus is a brimpus. "
    "Every brimpus is a lempus. Every lempus is a yerpus. Is Tom a lempus or scrompus?",
    "steps": ["Tom is a terpus.", "Every terpus is a brimpus.", "Every brimpus is a lempus."],
    "answer": "Tom is a lempus.",
    "edges": [[0, 1], [1, 2], [1, 5], [5, 2], [2, 3], [3, 4]],
    "idx_to_symbol": ["Tom", "terpus", "brimpus", "lempus", "yerpus", "impus", "scrompus"],
}


def test_example_of_a_published_record():
    example = ProsQA().example(RECORD)
    assert example.prompt == RECORD["question"] + "\n\n"
    assert example.response == (
        "Tom is a terpus.\nEvery terpus is a brimpus.\nEvery brimpus is a lempus.\n### Tom is a lempus."
    )
    assert example.bucket == "3 hops"


T, TB, BL = RECORD["steps"]
GOLD = "### Tom is a lempus."


@pytest.mark.parametrize(
    "text",
    [
        f"{T}\n{TB}\n{BL}\n{GOLD}",
        f"{T}\n{TB}\n{BL}\n###Tom is a lempus\n",
        f"{T}\nEvery terpus is an impus.\nEvery impus is a brimpus.\n{BL}\n{GOLD}",  # another chain
        f" {T}\n\n{TB}\n{BL}\n{GOLD} ",
    ],
)
def test_chains_that_are_right(text):
    assert ProsQA().correct(RECORD, text)


@pytest.mark.parametrize(
    "text",
    [
        GOLD,  # no chain
        f"{T}\n{TB}\n{BL}",  # no conclusion
        f"{T}\n{TB}\n{BL}\n### Tom is a scrompus.",
        f"{T}\n{TB}\n{BL}\n### Davis is a lempus.",
        f"{T}\n{TB}\n{GOLD}",  # ends too early
        f"{T}\n{BL}\n{GOLD}",  # a gap
        f"{TB}\n{BL}\n{GOLD}",  # does not begin with the person
        f"{T}\nEvery terpus is a lempus.\n{GOLD}",  # was not said
        f"{T}\n{TB}\n{BL}\nEvery lempus is a yerpus.\n{GOLD}",  # goes past it
        f"{T}\nwell\n{TB}\n{BL}\n{GOLD}",
        "###",
    ],
)
def test_chains_that_are_wrong(text):
    assert not ProsQA().correct(RECORD, text)


def test_order_is_no_other_problem():
    task = ProsQA()
    *facts, asked = RECORD["question"].split(". ")
    swapped = ". ".join([*facts[::-1], asked])
    assert task.key({**RECORD, "question": swapped}) == task.key(RECORD)
    assert task.key({**RECORD, "question": swapped.replace("lempus or scrompus", "scrompus or lempus")}) == task.key(
        RECORD
    )
    assert task.key({**RECORD, "question": ". ".join([*facts[1:], asked])}) != task.key(RECORD)
    assert task.key({**RECORD, "question": RECORD["question"].replace("Is Tom", "Is Davis")}) != task.key(RECORD)


@pytest.fixture
def published(tmp_path):
    """A folder of published files: 30 records of training, 6 of the test, one of which is also in training."""
    records = list(ProsQA(train=0, validation=0, test=35).records("test"))
    (tmp_path / "prosqa_hard_train.json").write_text(json.dumps(records[:30]))
    (tmp_path / "prosqa_hard_test.json").write_text(json.dumps(records[29:]))
    return tmp_path, records


def test_published_files(published):
    folder, records = published
    task = ProsQA(files=str(folder))
    check_task(task)
    check_task(ProsQA(files=f"{folder}/prosqa_*.json"), split="validation", count=2)
    splits = {split: list(task.records(split)) for split in SPLITS}
    assert splits["test"] == records[29:]
    assert len(splits["validation"]) == 3 and len(splits["train"]) == 26
    key = json.dumps
    assert {key(r) for r in splits["train"] + splits["validation"]} == {key(r) for r in records[:29]}

    # The choice does not hang on the order of the file.
    (folder / "prosqa_hard_train.json").write_text(json.dumps(records[29::-1]))
    assert list(task.records("validation")) == splits["validation"]
    assert list(ProsQA(files=str(folder), validation=1).records("validation")) == splits["validation"][:1]

    # A validation file is used where there is one.
    (folder / "prosqa_hard_valid.json").write_text(json.dumps(records[:4]))
    assert list(task.records("validation")) == records[:4]
    assert len(list(task.records("train"))) == 25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records"),
        ('[{"question": "Every', "not JSON"),
        (json.dumps([{**RECORD, "edges": None}]), "record 1: lacks edges; has question, steps"),
        (json.dumps([RECORD, {**RECORD, "steps": "Tom"}]), "record 2: steps is str, must be list"),
        (json.dumps([{**RECORD, "edges": [[0, 7]]}]), r"record 1: edges: \[0, 7\] is not a pair of numbers below 7"),
        (json.dumps([{**RECORD, "edges": [["Tom", "terpus"]]}]), "record 1: edges: .* is not a pair of numbers"),
        (json.dumps([{**RECORD, "answer": "yes"}]), "record 1: answer: 'yes' does not read 'X is a Y.'"),
    ],
)
def test_a_broken_file_is_one_line(published, content, message):
    folder, _ = published
    (folder / "prosqa_hard_test.json").write_text(content)
    with pytest.raises(ValueError, match=f"prosqa_hard_test.json.*{message}") as error:
        list(ProsQA(files=str(folder)).records("test"))
    assert "\n" not in str(error.value)


def test_a_missing_file_is_one_line(published):
    folder, _ = published
    (folder / "prosqa_hard_test.json").unlink()
    with pytest.raises(ValueError, match="no file whose name says test; found: prosqa_hard_train.json"):
        list(ProsQA(files=str(folder)).records("test"))
    with pytest.raises(ValueError, match="no file whose name says train; found: nothing"):
        list(ProsQA(files=str(folder / "none")).records("test"))
