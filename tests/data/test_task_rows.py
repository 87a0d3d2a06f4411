"""A task's records as rows: nothing lost, nothing cut, nothing seen across a border; and a task in a recipe."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import yaml

import tiny_tasks
import undertow as ut
from models import build as tiny_model
from tiny_tasks import Blocks, Pages, Parity, Sums
from undertow.data import TextFormat, build, collate, examples, train_tokenizer
from undertow.data.corpus import Document
from undertow.data.examples import record_rows
from undertow.recipe import Recipe, RecipeError
from undertow.tasks import TASKS, Example, Task

BACKBONE = {"family": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def letters(cache_dir):
    return train_tokenizer([Document("a", "some text")], 257, cache_dir)


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, cls in tiny_tasks.CLASSES.items():
        monkeypatch.setitem(TASKS, name, cls)


def pieces(rows):
    """Every piece in the rows: (ids, labels, memory), by a loop over positions."""
    found = []
    for row in (rows[i] for i in range(len(rows))):
        real = row.get("attention_mask", np.ones_like(row["input_ids"]))
        memory = row.get("memory_mask", np.ones_like(row["input_ids"]))
        for t in range(len(real)):
            if not real[t]:
                continue
            if row["position_ids"][t] == 0:
                found.append(([], [], []))
            assert row["position_ids"][t] == len(found[-1][0])
            for part, values in zip(found[-1], (row["input_ids"], row["labels"], memory), strict=True):
                part.append(int(values[t]))
    return found


@dataclass(frozen=True)
class Labelled(Task):
    """Documents tokenised before, every other one with targets of its own."""

    kind = "tokens"
    shift: int = 0

    def records(self, split):
        for i in range(20):
            ids = [(7 * i + j) % 250 for j in range(3 + 5 * (i % 7))]
            labels = [-100] * (len(ids) // 2) + [token + self.shift for token in ids[len(ids) // 2 :]]
            yield {"input_ids": ids} | ({"labels": labels} if i % 2 else {})


def test_labels_of_tokens_go_with_them_through_packing(cache_dir, letters):
    seq_len = 12
    rows = build(Labelled(), tokenizer=letters, seq_len=seq_len, cache_dir=cache_dir).train
    expected = []
    for record in Labelled().records("train"):
        ids, labels = record["input_ids"], record.get("labels", record["input_ids"])
        for at in range(0, len(ids), seq_len):  # the model shifts: what stands first in a piece is not predicted
            expected.append((ids[at : at + seq_len], [-100, *labels[at + 1 : at + seq_len]]))
    assert sorted((ids, labels) for ids, labels, _ in pieces(rows)) == sorted(expected)
    assert "memory_mask" not in rows[0]
    other = build(Labelled(shift=1), tokenizer=letters, seq_len=seq_len, cache_dir=cache_dir).train
    assert any((other[i]["labels"] != rows[i]["labels"]).any() for i in range(len(rows)))  # the cache knows labels
    with pytest.raises(ValueError, match="Labelled: label 1.* is neither -100 nor in the vocabulary of"):
        build(Labelled(shift=1000), tokenizer=letters, seq_len=seq_len, cache_dir=cache_dir)


def longest(task, form, split="train"):
    return max(len(form.example(task.example(record)).ids) for record in task.records(split))


@pytest.mark.parametrize("loss", ["response", "all"])
@pytest.mark.parametrize("memory", ["response", "all"])
def test_every_example_is_in_one_row_whole(cache_dir, loss, memory):
    data = build(Sums(), seq_len=32, vocab_size=270, cache_dir=cache_dir, loss=loss, memory=memory)
    assert data.task == Sums() and data.format == TextFormat(data.tokenizer, loss, memory)
    for rows, split in ((data.train, "train"), (data.validation, "validation")):
        expected = [data.format.example(data.task.example(record)) for record in Sums().records(split)]
        assert sorted(pieces(rows)) == sorted((e.ids, e.labels, e.memory) for e in expected)
        assert rows.pieces == len(expected) and rows.tokens == sum(len(e.ids) for e in expected)
        assert rows.waste == pytest.approx(1 - rows.tokens / (32 * len(rows)))
        assert ("memory_mask" in rows[0]) == (memory == "response")
        counted = sum(data.token_bytes[label].item() for e in expected for label in e.labels if label != -100)
        assert rows.predicted_bytes(data.token_bytes) == counted
        head = rows.head(2)
        assert len(head) == 2 and all(np.array_equal(head[1][key], rows[1][key]) for key in rows[1])
    assert data.waste == data.train.waste < 0.3


def test_tags_with_a_tokenizer_of_their_own(cache_dir):
    data = build(Parity(), seq_len=16, cache_dir=cache_dir)
    expected = [data.format.example(Parity().example(record)) for record in Parity().records("train")]
    assert sorted(pieces(data.train)) == sorted((e.ids, e.labels, e.memory) for e in expected)
    assert data.token_bytes.tolist() == [0, 1, 1, 4, 3]


@pytest.mark.parametrize(
    ("task", "time", "schedule"),
    [
        (Sums(), ut.T2MLR(1, 2), ut.Jacobi(2)),
        (Parity(), ut.T2MLR(0, 3), ut.Converge()),
        (Parity(), ut.LRT(), ut.Jacobi(1)),
    ],
)
def test_packed_examples_are_as_good_as_separate_ones(task, time, schedule, cache_dir):
    """Attention and memory both stop at borders: logits, labels and loss are those of each example by itself."""
    tokenizer = task.tokenizer() or train_tokenizer([Document("", "0123456789 + = ")], 260, cache_dir)
    form = TextFormat(tokenizer, memory="response")
    records = list(task.records("train"))[:12]
    rows = record_rows(records, task, form, longest(task, form) * 2, cache_dir)
    assert len(rows) < len(records) / 1.5, "or nothing is packed"
    model = tiny_model(time=time, vocab_size=260)
    with torch.no_grad():
        batch = collate([rows[i] for i in range(len(rows))])
        packed = model(**batch, schedule=schedule)
        total, counted = 0.0, 0
        apart = {}
        for record in records:
            one = form.example(task.example(record))
            out = model(
                torch.tensor([one.ids]), labels=torch.tensor([one.labels]), memory_mask=torch.tensor([one.memory]),
                schedule=schedule,
            )  # fmt: skip
            number = sum(label != -100 for label in one.labels)
            total, counted = total + out.loss.item() * number, counted + number
            apart[tuple(one.ids)] = out.logits[0]
        unmasked = model(**{**batch, "memory_mask": torch.ones_like(batch["memory_mask"])}, schedule=schedule)
    seen = 0
    for b, t in np.argwhere((batch["position_ids"] == 0).numpy() & (batch["attention_mask"] == 1).numpy()):
        ids = next(ids for ids in apart if batch["input_ids"][b, t : t + len(ids)].tolist() == list(ids))
        torch.testing.assert_close(packed.logits[b, t : t + len(ids)], apart[ids], rtol=0, atol=1e-5)
        seen += 1
    assert seen == len(records) and packed.loss.item() == pytest.approx(total / counted, rel=1e-6)
    assert (unmasked.logits - packed.logits).abs().max() > 1e-3, "the memory mask reaches the model"


def test_too_long_examples_are_left_out_and_counted(cache_dir):
    task, tokenizer = Sums(train=40), train_tokenizer([Document("", "0123456789 + = ")], 260, cache_dir)
    form, records = TextFormat(tokenizer, memory="response"), list(Sums(train=40).records("train"))
    limit = longest(task, form) - 1
    fitting = [e for e in (form.example(task.example(r)) for r in records) if len(e.ids) <= limit]
    for _ in range(2):  # what is read from the cache says so too
        with pytest.warns(UserWarning, match=f"Sums: {40 - len(fitting)} of 40 examples .* seq_len={limit}: left out"):
            rows = record_rows(records, task, form, limit, cache_dir)
    assert sorted(pieces(rows)) == sorted((e.ids, e.labels, e.memory) for e in fitting)
    with pytest.raises(ValueError, match="Sums: none of 40 records can be used: all are longer than seq_len=4 tokens"):
        record_rows(records, task, form, 4, cache_dir)


def test_the_second_time_nothing_is_tokenised(tmp_path, monkeypatch):
    first = build(Sums(), seq_len=32, vocab_size=270, cache_dir=tmp_path)
    monkeypatch.setattr(examples, "pack_records", lambda *_: pytest.fail("tokenised again"))
    again = build(Sums(), seq_len=32, vocab_size=270, cache_dir=tmp_path)
    assert all(np.array_equal(a[key], b[key]) for a, b in zip(first.train, again.train, strict=False) for key in a)


@pytest.mark.parametrize("changed", [{"loss": "all"}, {"memory": "all"}, {"seq_len": 40}, {"source": Sums(seed=1)}])
def test_other_rows_are_not_taken_from_the_cache(tmp_path, changed):
    def rows(**arguments):
        data = build(**{"source": Sums(), "seq_len": 32, "cache_dir": tmp_path, "tokenizer": tokenizer, **arguments})
        return [{key: values.tolist() for key, values in data.train[i].items()} for i in range(len(data.train))]

    tokenizer = train_tokenizer([Document("", "0123456789 + = ")], 260, tmp_path)
    first = rows()
    assert rows(**changed) != first == rows()


def test_an_example_written_otherwise_is_other_rows(tmp_path, monkeypatch):
    first = build(Sums(), seq_len=32, vocab_size=270, cache_dir=tmp_path)
    monkeypatch.setattr(Sums, "example", lambda self, r: Example(f"{r['a']}+{r['b']}=", "0"))
    again = build(Sums(), seq_len=32, tokenizer=first.tokenizer, cache_dir=tmp_path)
    assert pieces(again.train) != pieces(first.train)


def test_text_of_a_task_is_packed_as_documents(cache_dir):
    data = build(Pages(), seq_len=32, vocab_size=300, cache_dir=cache_dir)
    texts = [record["text"] for record in Pages().records("train") if record["text"]]
    size = sum(len(text.encode()) for text in texts)
    assert data.train.text_bytes(data.token_bytes) == data.train_bytes == size
    assert set(data.train[0]) <= {"input_ids", "labels", "position_ids", "attention_mask"}
    assert data.format == TextFormat(data.tokenizer, "all", "all") and len(data.train) > 10
    documents = [
        [*ids, data.tokenizer.eos_token_id] for ids in data.tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    assert data.train.tokens == sum(len(ids) + 1 for ids in documents)


def test_tokenised_documents_need_the_tokenizer_and_its_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="tokenizer: Blocks is tokenised already"):
        build(Blocks(), seq_len=16, cache_dir=tmp_path)
    tokenizer = train_tokenizer([Document("", "a")], 257, tmp_path)
    data = build(Blocks(), tokenizer=tokenizer, seq_len=16, cache_dir=tmp_path)
    cut = [r["input_ids"][i : i + 16] for r in Blocks().records("train") for i in range(0, len(r["input_ids"]), 16)]
    assert sorted(ids for ids, _, _ in pieces(data.train)) == sorted(cut)
    with pytest.raises(ValueError, match="Blocks: token id 2.. is not in the tokenizer's vocabulary of 257"):
        build(Blocks(largest=299), tokenizer=tokenizer, seq_len=16, cache_dir=tmp_path)


def test_a_split_without_records(tmp_path):
    with pytest.raises(ValueError, match="Sums: there are no records in its validation split"):
        build(Sums(validation=0), seq_len=32, vocab_size=270, cache_dir=tmp_path)


# ---------------------------------------------------------------------- in a recipe


def recipe(**data):
    return Recipe.parse({"backbone": BACKBONE, "data": data})


@pytest.mark.parametrize("source", ["Sums(train=5)", {"task": "Sums", "train": 5}, Sums(train=5)])
def test_a_task_in_a_recipe_round_trips(source, tmp_path):
    one = recipe(source=source, loss="all", stream=True)
    assert one.data.source == Sums(train=5) and one == recipe(source=Sums(train=5), loss="all", stream=True)
    one.save(tmp_path / "recipe.yaml")
    plain = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]
    assert plain["source"] == {"task": "Sums", "train": 5, "validation": 12, "test": 12, "seed": 0, "digits": 3}
    assert Recipe.parse(one.to_dict()) == one and hash(one.data.source) == hash(Sums(train=5))


@pytest.mark.parametrize("source", ["stdlib", "some/folder", ["a", "b"]])
def test_paths_stay_paths(source):
    one = recipe(source=source)
    assert one.data.source == (source if isinstance(source, str) else tuple(source))
    assert one.to_dict()["data"]["source"] == source


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"source": "Summs(train=5)"}, "data.source.*'Summs' is unknown; did you mean 'Sums'"),
        ({"source": "Sums(trian=5)"}, "data.source.*trian.*did you mean 'train'"),
        ({"source": "Sums(train=-1)"}, "data.source: Sums train=-1: must be at least 0"),
        ({"source": {"task": "Sums", "train": "many"}}, "data.source.*train.*many"),
        ({"source": 3}, "data.source: 3: should be a valid string"),
        ({"source": "Sums", "validation": "x"}, "data.validation: 'x': Sums has a validation split of its own"),
        ({"source": "Pages", "loss": "response"}, "data.loss: 'response': Pages has no prompt and response"),
        ({"memory": "response"}, "data.memory: 'response': text has no prompt and response"),
        ({"stream": True}, "data.stream: only tasks are read as a stream"),
        ({"source": "Sums", "loss": "some"}, "data.loss: 'some' is not allowed"),
    ],
)
def test_mistakes_are_one_line(data, line):
    with pytest.raises(RecipeError, match=line) as caught:
        recipe(**data)
    assert "\n" not in str(caught.value)
    if data.get("loss") != "some" and not line.startswith("data.source"):
        with pytest.raises(ValueError, match=line.removeprefix("data.")):
            build(data.pop("source", "stdlib"), **data)
