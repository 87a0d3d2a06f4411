"""CORE on a small bundle: prompts, spans and scores written out by hand; the recurrence is on."""

import io
import json
import random

import pytest
import torch
from letters import recurrent, tokenizer
from rich.console import Console

import undertow as ut
from undertow.evaluation import core
from undertow.evaluation.harness_model import Recurrent

TOK = tokenizer()
BOS = TOK.eos_token_id
CHOICES = [
    {"query": "q", "choices": ["ten", "two hens"], "gold": 1},
    {"query": "r", "choices": ["a hen", "a man", "two"], "gold": 0},
    {"query": "s", "choices": ["go", "ran"], "gold": 1},
    {"query": "u", "choices": ["in", "on"], "gold": 0},
]
SCHEMA = [
    {"context_options": ["the hen", "the man"], "continuation": "ran", "gold": 0},
    {"context_options": ["a cat", "two big cats"], "continuation": "go on", "gold": 1},
    {"context_options": ["who", "why"], "continuation": "is it", "gold": 1},
]
TEXT = [
    {"context": "go on and ", "continuation": "on"},
    {"context": " hen hen hen", "continuation": "hen"},
    {"context": "x", "continuation": "y z"},
]
BUNDLE = {
    "pick": ("multiple_choice", CHOICES, 2, "\n. ", 25.0),
    "who": ("schema", SCHEMA, 1, " ", 50.0),
    "next": ("language_modeling", TEXT, 0, " ", 0.0),
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return recurrent(time=ut.LRT(1))


def write(folder, tasks=BUNDLE):
    listed, meta = [], ["Eval Task,Task Category,Random baseline"]
    for label, (kind, items, shots, delimiter, baseline) in tasks.items():
        place = folder / "eval_data" / "some" / f"{label}.jsonl"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("".join(json.dumps(item) + "\n" for item in items))
        task = {"label": label, "icl_task_type": kind, "dataset_uri": f"some/{label}.jsonl", "num_fewshot": [shots]}
        listed.append(task if delimiter == " " else {**task, "continuation_delimiter": delimiter})
        meta.append(f"{label},some,{baseline}")
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))
    (folder / "eval_meta_data.csv").write_text("\n".join(meta) + "\n")
    return folder


@pytest.fixture
def bundle(tmp_path):
    return write(tmp_path)


def encode(text):
    return [BOS, *TOK(text, add_special_tokens=False)["input_ids"]]


def shuffled(items):
    items = list(items)
    random.Random(1337).shuffle(items)
    return items


def test_prompts_are_the_published_ones(bundle):
    pick, who, following = core.read(bundle)
    assert [task.label for task in (pick, who, following)] == list(BUNDLE)
    assert list(pick.items) == shuffled(CHOICES) and (pick.delimiter, who.delimiter) == ("\n. ", " ")
    for i, item in enumerate(pick.items):
        others = [other for j, other in enumerate(pick.items) if j != i]
        first, second = random.Random(1234 + i).sample(others, 2)
        shots = "".join(f"{o['query']}\n. {o['choices'][o['gold']]}\n\n" for o in (first, second))
        assert core.prompts(pick, i) == [f"{shots}{item['query']}\n. {choice}" for choice in item["choices"]]
    for i, item in enumerate(who.items):
        shot = random.Random(1234 + i).sample([other for j, other in enumerate(who.items) if j != i], 1)[0]
        before = f"{shot['context_options'][shot['gold']]} {shot['continuation']}\n\n"
        assert core.prompts(who, i) == [f"{before}{c} {item['continuation']}" for c in item["context_options"]]
    texts = {item["context"]: core.prompts(following, i) for i, item in enumerate(following.items)}
    assert texts["go on and "] == ["go on and", "go on and on"]
    assert texts[" hen hen hen"] == ["hen hen hen", "hen hen hen hen"]
    shot = core.Task("next", "language_modeling", tuple(TEXT[:2]), 1, " ", 0.0)
    assert core.prompts(shot, 0) == ["hen hen hen hen\n\ngo on and", "hen hen hen hen\n\ngo on and on"]


def scored(task, index):
    """The texts of each span, as `spans` says it."""
    return [TOK.decode(tokens[len(tokens) - N :]) for tokens, N in core.spans(task, index, TOK)]


def test_what_is_scored():
    """Choices from where they part, contexts by the end that they share, language modelling by the continuation."""
    task = core.Task("t", "multiple_choice", tuple(CHOICES), 0, " ", 25.0)
    assert scored(task, 0) == ["en", "wo hens"]  # " t" is one token, and both begin with it
    task = core.Task("t", "schema", tuple(SCHEMA), 0, " ", 50.0)
    assert [scored(task, i) for i in range(3)] == [[text] * 2 for text in (" ran", " go on", " is it")]
    task = core.Task("t", "language_modeling", tuple(TEXT), 0, " ", 0.0)
    assert [scored(task, i) for i in range(3)] == [[" on"], [" hen"], [" y z"]]
    assert all(tokens[0] == BOS for tokens, _ in core.spans(task, 0, TOK))
    bare = core.spans(task, 0, tokenizer(bos=False))
    assert bare[0][0][0] != BOS  # where there is no bos, a text begins as it was trained
    words = [{"query": "", "choices": ["hen", "x y"], "gold": 0}] * 2
    alone = core.spans(core.Task("t", "multiple_choice", tuple(words), 0, "", 0.0), 0, tokenizer(bos=False))
    assert all(tokens[0] == BOS for tokens, _ in alone)  # but something must stand before what is scored: eos


def test_a_choice_that_begins_another_one_keeps_a_token():
    task = core.Task("t", "multiple_choice", ({"query": "q", "choices": ["a", "a hen"], "gold": 0},), 0, " ", 50.0)
    assert scored(task, 0) == ["a", " hen"]
    same = core.Task("t", "schema", ({"context_options": ["x", "x"], "continuation": "y", "gold": 0},), 0, " ", 0.0)
    assert scored(same, 0) == ["x y", "x y"]
    empty = core.Task("t", "language_modeling", ({"context": "x", "continuation": ""},), 0, "", 0.0)
    with pytest.raises(ValueError, match="t, item 1 as shuffled: the continuation has no token of its own"):
        core.spans(empty, 0, TOK)


def answer(model, task, index, schedule):
    """Whether the model is right, from plain calls of the model: one text at a time."""
    item, losses = task.items[index], []
    texts = [encode(text) for text in core.prompts(task, index)]
    if task.kind == "language_modeling":
        without, ids = texts
        best = model(torch.tensor([ids]), schedule=schedule, use_cache=False).logits[0].argmax(-1).tolist()
        return best[len(without) - 1 : -1] == ids[len(without) :]
    first = next(t for t in range(99) if len({text[t] for text in texts}) > 1) if task.kind == "multiple_choice" else 0
    last = next(t for t in range(99) if len({text[-1 - t] for text in texts}) > 1) if task.kind == "schema" else 0
    for ids in texts:
        logits = model(torch.tensor([ids]), schedule=schedule, use_cache=False).logits[0]
        start = first or len(ids) - last
        nats = [-logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(start, len(ids))]
        losses.append(sum(nats) / len(nats))
    return losses.index(min(losses)) == item["gold"]


@pytest.mark.parametrize("schedule", [None, ut.Jacobi(0)], ids=["recurring", "zero memory"])
def test_core_is_what_is_computed_by_hand(bundle, model, schedule):
    found = core.run(model, TOK, bundle, batch_size=3, schedule=schedule)
    expected = {}
    for task in core.read(bundle):
        right = [answer(model, task, i, schedule) for i in range(len(task.items))]
        expected[task.label] = sum(right) / len(right)
    assert {score.label: score.accuracy for score in found.tasks} == pytest.approx(expected)
    by_chance = {"pick": 0.25, "who": 0.5, "next": 0.0}
    centred = {label: (expected[label] - chance) / (1 - chance) for label, chance in by_chance.items()}
    assert {score.label: score.centred for score in found.tasks} == pytest.approx(centred)
    assert found.core == pytest.approx(sum(centred.values()) / 3)
    assert json.loads(json.dumps(found.to_dict()))["core"] == found.core
    with Console(file=io.StringIO(), width=80) as console:
        console.print(core.table(found))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[0] == ["task", "items", "accuracy", "centred"] and lines[-1] == ["CORE", "10", f"{found.core:.4f}"]
    assert lines[1] == ["pick", "4", f"{expected['pick']:.4f}", f"{centred['pick']:.4f}"]


def test_the_recurrence_is_on(tmp_path, model):
    """With the answers that a recurring model gives as gold, CORE is 1, and less when the memory is not read."""
    items, words = [], ["hen", "ran", "go", "why", "man", "two", "on", "big"]
    for word in words:
        losses = [
            -Recurrent(model, TOK)._loglikelihood_tokens([(None, encode(f"q {word} "), TOK(c)["input_ids"])])[0][0]
            for c in "bcdf"
        ]
        items.append({"query": f"q {word}", "choices": list("bcdf"), "gold": losses.index(min(losses))})
    write(tmp_path, {"own": ("multiple_choice", items, 0, " ", 25.0)})
    assert core.run(model, TOK, tmp_path).core == 1.0
    assert core.run(model, TOK, tmp_path, schedule=ut.Sequential()).core == 1.0
    assert core.run(model, TOK, tmp_path, schedule=ut.Jacobi(0)).core < 1.0


def test_all_of_a_continuation_must_be_what_the_model_would_write(tmp_path, model):
    ids = encode("q")
    for _ in range(2):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    first, second = TOK.decode(ids[-2:-1]), TOK.decode(ids[-1:])
    assert encode(f"q{first}{second}") == ids and not (first + second).isspace() and first != "z" != second
    items = [{"context": "q", "continuation": text} for text in (first + second, first + "z", "z" + second)]
    write(tmp_path, {"own": ("language_modeling", items, 0, "", 0.0)})
    assert core.run(model, TOK, tmp_path).core == pytest.approx(1 / 3)


def test_limit_and_long_texts(bundle, model):
    some = core.run(model, TOK, bundle, limit=3)
    assert [score.items for score in some.tasks] == [3, 3, 3]
    with pytest.warns(UserWarning) as said:
        core.run(model, TOK, bundle, limit=3, max_length=12)
    cut = [str(warning.message) for warning in said]
    assert cut[0] == "pick: 7 of 7 texts exceed 12 positions: they lose their start"
    assert [line.split(":")[0] for line in cut] == ["pick", "who"]
    with pytest.raises(ValueError, match=r"pick: a text to score of \d tokens: must be at most 2 \(positions\)"):
        core.run(model, TOK, bundle, max_length=2)


def test_centred():
    assert core.centred(0.25, 25.0) == 0 and core.centred(1.0, 25.0) == 1 and core.centred(0.0, 50.0) == -1


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "path, old, new, line",
    [
        ("core.yaml", '"icl_tasks"', '"tasks"', "core.yaml: icl_tasks: must be a list of tasks"),
        ("core.yaml", "{", "{{", "core.yaml: not readable as YAML: "),
        ("core.yaml", '"label"', '"name"', "needs label, icl_task_type, dataset_uri and num_fewshot: .n. "),
        ("core.yaml", "schema", "scheme", "core.yaml: who: icl_task_type 'scheme': allowed: multiple_choice, schema, "),
        ("core.yaml", "[2]", "[4]", "pick.jsonl: pick: 4 items: 4 examples and one item need more"),
        ("core.yaml", "some/who", "other/who", "other/who.jsonl: no such file"),
        ("eval_meta_data.csv", "Random baseline", "baseline", "record 1: lacks Random baseline"),
        ("eval_meta_data.csv", "who,", "whom,", "eval_meta_data.csv: who: no Random baseline in percent"),
        ("eval_meta_data.csv", "50.0", "half", "eval_meta_data.csv: who: no Random baseline in percent"),
        ("eval_meta_data.csv", "50.0", "100", "who: Random baseline 100.0: must be in 0..100 percent"),
        ("eval_data/some/who.jsonl", '"gold": 1}', '"gold": 2}', r"who.jsonl, record 2: gold 2: must be in 0..1"),
        ("eval_data/some/who.jsonl", '"continuation"', '"end"', "who.jsonl, record 1: lacks continuation"),
        ("eval_data/some/next.jsonl", '"y z"}\n', '"y', r"next.jsonl"),
    ],
)
def test_a_torn_bundle_is_one_line(bundle, path, old, new, line):
    change(bundle / path, old, new)
    with pytest.raises((ValueError, OSError), match=line) as error:
        core.read(bundle)
    assert "\n" not in str(error.value) and str(bundle) in str(error.value)


@pytest.mark.parametrize("path", ["core.yaml", "eval_meta_data.csv", "eval_data/some/pick.jsonl"])
def test_a_file_that_is_missing_is_one_line(bundle, path):
    (bundle / path).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path}: no such file"):
        core.read(bundle)
    with pytest.raises(ValueError, match="limit=0: must be at least 1"):
        core.read(bundle, limit=0)
