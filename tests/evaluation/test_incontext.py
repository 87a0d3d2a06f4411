"""Loss by position and few-shot accuracy, against documents and prompts taken one by one."""

import json
import statistics
from dataclasses import dataclass

import pytest
import torch

import undertow as ut
from models import build
from sums import CHARACTERS, Sums, Tagged, tokenizer
from undertow.data import Document
from undertow.data.format import TextFormat
from undertow.evaluation import incontext
from undertow.evaluation.incontext import few_shot, in_context


def documents(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        Document(str(i), "".join(CHARACTERS[int(j)] for j in torch.randint(41, (size,), generator=generator)))
        for i, size in enumerate(sizes)
    ]


def test_loss_by_position():
    """Only documents that are long enough count, cut to the length; the gain is a mean over documents."""
    model, length = build(), 64
    given = documents((70, 10, 64, 63, 130))  # with its end token a text of 63 characters is just long enough
    found = in_context(model, given, tokenizer(), length, batch_size=3)
    rows = []
    for document in (given[0], given[2], given[3], given[4]):
        ids = (tokenizer()(document.text)["input_ids"] + [42])[:length]
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rows.append([-float(scores[t - 1, ids[t]]) for t in range(1, length)])
    assert (found.length, found.documents, len(found.nats)) == (length, 4, length - 1)
    for t in range(1, length):
        assert found.nats[t - 1] == pytest.approx(statistics.mean(row[t - 1] for row in rows), rel=1e-5)
    # 50 of 512 is token 6 of 64, 500 of 512 is 62; two tokens each: the one before, and it.
    early = [(row[5 - 1] + row[6 - 1]) / 2 for row in rows]
    late = [(row[61 - 1] + row[62 - 1]) / 2 for row in rows]
    gains = [a - b for a, b in zip(early, late, strict=True)]
    assert found.early == pytest.approx(statistics.mean(early), rel=1e-5)
    assert found.late == pytest.approx(statistics.mean(late), rel=1e-5)
    assert found.gain == pytest.approx(statistics.mean(gains), rel=1e-5)
    assert found.error == pytest.approx(statistics.stdev(gains) / 2, rel=1e-5)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert incontext.position_table(found).row_count == 7  # 1, 2-3, .. 32-63 and the gain


def test_a_model_that_copies_gains_from_context():
    """Of a text that repeats itself a model that remembers tokens knows the second half."""

    class Copies:
        device = torch.device("cpu")

        def __call__(self, input_ids, schedule, use_cache):
            logits = torch.zeros(*input_ids.shape, 43)
            logits[:, 31:].scatter_(2, input_ids[:, : input_ids.shape[1] - 31, None], 20.0)  # 32 tokens before the next
            return type("Out", (), {"logits": logits})

    given = [Document(d.name, d.text * 2) for d in documents((32, 32, 32))]
    found = in_context(Copies(), given, tokenizer(), 64)
    assert found.gain == pytest.approx(torch.tensor(43.0).log().item(), rel=1e-3)
    assert found.error == pytest.approx(0, abs=1e-6)


def test_one_document_has_no_error():
    assert in_context(build(), documents((20,)), tokenizer(), 16).error is None


@dataclass(frozen=True)
class Shared(Sums):
    """Training and test records are the same ones."""

    def records(self, split):
        return super().records("test")


def seen_prompts(monkeypatch, task, form, shots, seed=0):
    """Which prompts the model is given, for every k."""
    seen = []

    def generated(model, task, form, records, **keywords):
        seen.append([task.example(record) for record in records])
        return keywords

    monkeypatch.setattr(incontext, "generated", generated)
    found = few_shot(None, task, form, task.records("test"), shots, seed=seed, batch_size=3)
    assert [(one.shots, one.accuracy) for one in found] == [(k, {"batch_size": 3}) for k in shots]
    return seen


@pytest.mark.parametrize("task", [Sums(), Shared()], ids=["apart", "same records"])
def test_which_examples_stand_before_a_prompt(monkeypatch, task):
    form, records = TextFormat(tokenizer(), memory="response"), list(task.records("test"))
    zero, two, five = seen_prompts(monkeypatch, task, form, (0, 2, 5))
    assert zero == [task.example(record) for record in records]
    solved = {e.prompt + e.response: e for e in map(task.example, task.records("train"))}
    chosen = []
    for plain, some, more in zip(zero, two, five, strict=True):
        *before, last = more.prompt.split("\n\n")
        assert last == plain.prompt and (more.response, more.bucket) == (plain.response, plain.bucket)
        assert len(before) == len(set(before)) == 5 and set(before) <= set(solved)
        assert plain.prompt + plain.response not in before  # never the record itself
        assert some.prompt == "\n\n".join([*before[:2], last])
        chosen.append(tuple(before))
    assert len(set(chosen)) > 1  # not the same ones for all
    assert seen_prompts(monkeypatch, task, form, (5,)) == [five]
    assert seen_prompts(monkeypatch, task, form, (5,), seed=1) != [five]


def test_few_shot_accuracy_is_that_of_the_longer_prompts():
    """Against greedy decoding of one prompt, from nothing."""
    model, task, form = (
        build(time=ut.T2MLR(1, 2, carry="residual")),
        Sums(test=3),
        TextFormat(tokenizer(), memory="response"),
    )

    class Told(Sums):
        def correct(self, record, text):
            told.append(text)
            return len(told) % 2 == 0

    told: list[str] = []
    found = few_shot(model, Told(test=3), form, task.records("test"), (0, 1), max_new_tokens=3, batch_size=2)
    assert [one.accuracy.overall.accuracy for one in found] == [1 / 3, 2 / 3]
    shown = {example.prompt: example.written for one in found for example in one.accuracy.shown}
    assert len(shown) == 6 and sorted(shown.values()) == sorted(told)
    for prompt, written in shown.items():
        given = form.begin(prompt).ids
        ids = list(given)
        while len(ids) < len(given) + 3:
            mask = [0] * len(given) + [1] * (len(ids) - len(given))
            with torch.no_grad():
                logits = model(torch.tensor([ids]), memory_mask=torch.tensor([mask]), schedule=ut.Sequential()).logits
            ids.append(int(logits[0, -1].argmax()))
        assert written == form.tokenizer.decode((ids + [42])[len(given) : (ids + [42]).index(42)])


def test_bad_input():
    model, form = build(), TextFormat(tokenizer(), memory="response")
    for wrong, line in (
        (
            lambda: in_context(model, documents((40,)), tokenizer(), 64),
            "none of 1 documents has length=64 tokens; .*41",
        ),
        (lambda: in_context(model, documents((40,)), tokenizer(), 8), "length=8: must be at least 16"),
        (lambda: few_shot(model, Tagged(), form, [], (1,)), "Tagged is of kind 'tags'"),
        (lambda: few_shot(model, Sums(), form, [], (-1,)), "shots=-1"),
        (lambda: few_shot(model, Shared(), form, Sums().records("test"), (6,)), "shots=6: Shared has 5 other"),
    ):
        with pytest.raises(ValueError, match=line):
            wrong()
