"""What every task must hold, whatever it is about."""

import dataclasses
import json
from itertools import islice

from undertow.data.format import TextFormat
from undertow.tasks import SPLITS, Example, Tags


def check_task(task, split="test", count=40):
    """Check `count` records of a split (all of them, if fewer): they are plain values and the same every time, no
    problem is in two splits, and the scorer accepts each record's own answer and refuses those of others."""
    records = list(islice(task.records(split), count))
    assert records
    assert json.loads(json.dumps(records)) == records
    assert list(islice(dataclasses.replace(task).records(split), count)) == records
    check_splits(task, count)
    if task.kind in ("answers", "tags"):
        examples = [task.example(record) for record in records]
        for example in examples:
            (check_tags if task.kind == "tags" else check_answer)(task, example)
        check_scorer(task, records, [e.target if isinstance(e, Tags) else e.response for e in examples])


def check_splits(task, count):
    keys = {split: {task.key(record) for record in islice(task.records(split), count)} for split in SPLITS}
    assert not keys["train"] & keys["test"]
    assert not keys["train"] & keys["validation"]
    assert not keys["validation"] & keys["test"]


def check_scorer(task, records, golds):
    """1.0 on the gold answers, 0 on shuffled ones: each record gets the next answer that differs from its own."""
    assert len(set(golds)) > 1, "the records have one answer only: nothing to shuffle"
    for i, (record, gold) in enumerate(zip(records, golds, strict=True)):
        wrong = next(other for other in golds[i + 1 :] + golds if other != gold)
        assert task.correct(record, gold) is True
        assert task.correct(record, wrong) is False
        assert task.correct(record, "") is False


def check_answer(task, example):
    assert isinstance(example, Example)
    assert example.prompt and example.response and example.bucket
    assert example.response == example.response.strip()  # what is joined to the prompt, and ends with an end token


def check_tags(task, tags):
    tokenizer = task.tokenizer()
    encoded = TextFormat(tokenizer, memory="response").example(
        tags
    )  # raises where input, target and memory differ in length
    assert encoded.ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in encoded.ids + encoded.labels
    assert tokenizer.decode(encoded.ids[:-1]) == tags.input
    assert tokenizer.decode(encoded.labels[1:]) == tags.target
    assert set(tags.memory) <= {0, 1}
