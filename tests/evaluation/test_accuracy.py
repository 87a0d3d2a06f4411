"""Task accuracy, against one record at a time without batches or caches; the numbers computed from the outcomes."""

import itertools
import json
from functools import cache
from math import sqrt

import pytest
import torch

import undertow as ut
from models import build
from sums import END, Sums, Tagged, tokenizer
from undertow.data.format import TextFormat
from undertow.evaluation.accuracy import exact, generated, pass_at_k, wilson
from undertow.evaluation.writing import write
from undertow.tasks import Tags

NEW = 4
MODELS = {
    "plain": lambda: build(),
    "t2mlr": lambda: build(time=ut.T2MLR(1, 2, carry="residual")),
    "lrt": lambda: build(time=ut.LRT(2)),
    "learned": lambda: build("gpt2", time=ut.T2MLR(0, 3), depth=ut.ReuseMap([1, 2, 1, 1])),
}


def likeliest(model, ids, memory):
    """The next token after `ids`, computed position by position and from nothing."""
    with torch.no_grad():
        x, mask = torch.tensor([ids]), torch.tensor([memory])
        out = model(x, memory_mask=mask, schedule=ut.Sequential(), use_cache=False)
    return int(out.logits[0, -1].argmax())


@cache
def greedy(name, memory):
    """What the model writes after every test prompt, `NEW` tokens of each, and an end token that some of them hold."""
    model, task, form = MODELS[name](), Sums(), TextFormat(tokenizer(), memory=memory)
    rows = []
    for record in task.records("test"):
        ids, written = form.begin(task.example(record).prompt).ids, []
        for _ in range(NEW):
            before = [int(memory == "all")] * len(ids) + [1] * len(written)
            written.append(likeliest(model, ids + written, before))
        rows.append(written)
    count = {token: sum(token in row for row in rows) for token in range(10, 36)}  # letters: no prompt holds one
    return rows, min(count, key=lambda token: abs(count[token] - len(rows) / 2))


def texts_of(name, memory):
    """The form with that end token, and the texts before it."""
    rows, end = greedy(name, memory)
    form = TextFormat(tokenizer(end), memory=memory)
    return form, [form.tokenizer.decode(row[: (row + [end]).index(end)]) for row in rows]


@pytest.mark.parametrize(("name", "memory"), [*((name, "response") for name in MODELS), ("t2mlr", "all")])
def test_generated_equals_one_token_at_a_time(name, memory):
    """Left padding, memory masks, the cache and rows that end at different places change nothing."""
    model, task = MODELS[name](), Sums()
    records = list(task.records("test"))
    form, texts = texts_of(name, memory)
    assert len({len(form.tokenizer.tokenize(text)) for text in texts}) > 1, "some rows must end early"
    prompts = [form.begin(task.example(record).prompt) for record in records]
    assert len({len(prompt) for prompt in prompts}) > 1, "some rows must be padded"
    for size in (1, 4):
        assert write(model, form, prompts, NEW, size) == [[text] for text in texts]

    # Every second gold answer is what the model writes: those, and no others, are right.
    gold = tuple((task.example(r).prompt, text) for r, text in zip(records[::2], texts[::2], strict=True))
    known = Sums(answers=gold)
    right = [text == known.example(record).response for record, text in zip(records, texts, strict=True)]
    assert 0 < sum(right) < len(right)
    found = generated(model, known, form, records, 4, max_new_tokens=NEW)
    assert found.solved == tuple(map(float, right))
    assert found.overall.accuracy == sum(right) / len(right)
    for bucket in found.buckets:
        here = [r for r, record in zip(right, records, strict=True) if known.example(record).bucket == bucket.name]
        assert (bucket.records, bucket.accuracy) == (len(here), sum(here) / len(here))
    assert [bucket.name for bucket in found.buckets] == sorted(bucket.name for bucket in found.buckets)
    assert [one.right for one in found.shown] == [True, True, False, False]
    assert all((one.written == one.gold) == one.right for one in found.shown)


def test_memory_of_the_prompt_matters_here():
    """Else the test above could not fail for a wrong mask."""
    assert greedy("t2mlr", "response")[0] != greedy("t2mlr", "all")[0]


def read_off(model, form, example):
    """Every target of one record as the model reads it after all gold tokens before it."""
    one = form.example(example)
    if isinstance(example, Tags):
        return [likeliest(model, one.ids[:t], one.memory[:t]) for t in range(1, len(one.ids))]
    first = len(form.tokenizer(example.prompt)["input_ids"])
    return [likeliest(model, one.ids[:t], one.memory[:t]) for t in range(first, len(one.ids))]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("plain", "tags"), *((name, kind) for name in ("t2mlr", "learned") for kind in ("answers", "tags"))],
)
def test_exact_equals_one_record_at_a_time(name, kind):
    """Gold answers are what the model writes, gold tags what it reads, but for one tag in every other record."""
    model, records = MODELS[name](), list(Sums().records("test"))
    form, texts = texts_of(name, "response")
    if kind == "answers":
        prompts = [Sums().example(record).prompt for record in records]
        task = Sums(answers=tuple(zip(prompts, texts, strict=True)))
        gold = [[*form.tokenizer(text)["input_ids"], form.tokenizer.eos_token_id] for text in texts]
        read = [read_off(model, form, task.example(record)) for record in records]
    else:
        read = [read_off(model, form, Tagged().example(record)) for record in records]
        end = form.tokenizer.eos_token_id
        gold = [[token if token < 41 and token != end else 3 for token in row] for row in read]  # one character each
        for row in gold[::2]:
            row[-1] = (row[-1] + 1) % 10
        inputs = [Tagged().example(record).input for record in records]
        targets = map(form.tokenizer.decode, gold)
        task = Tagged(answers=tuple(zip(inputs, targets, strict=True)))
    same = [[a == b for a, b in zip(*one, strict=True)] for one in zip(gold, read, strict=True)]
    assert {True, False} == {all(one) for one in same} and sum(map(sum, same)) > 3
    for size, loss in ((1, "response"), (4, "all")):  # what the loss counts is not what is scored
        found = exact(model, task, TextFormat(form.tokenizer, loss, "response"), records, batch_size=size)
        assert found.solved == tuple(float(all(one)) for one in same)
        assert found.overall.token_accuracy == sum(map(sum, same)) / sum(map(len, same))
        for bucket in found.buckets:
            here = [one for r, one in zip(records, same, strict=True) if task.example(r).bucket == bucket.name]
            assert (bucket.records, bucket.accuracy) == (len(here), sum(map(all, here)) / len(here))
            assert bucket.token_accuracy == sum(map(sum, here)) / sum(map(len, here))
    assert {one.right for one in found.shown} == {True, False}
    assert all((one.written == one.gold) == one.right for one in found.shown)


def test_exact_under_a_schedule_reads_merged_logits():
    model, task, form = MODELS["lrt"](), Tagged(), TextFormat(tokenizer(), memory="response")
    records = list(task.records("test"))
    right = tokens = 0
    for record in records:
        one = form.example(task.example(record))
        x, mask = torch.tensor([one.ids]), torch.tensor([one.memory])
        with torch.no_grad():
            logits = model(x, memory_mask=mask, schedule=ut.Jacobi(0)).logits[0]
        right += sum(int(logits[t - 1].argmax()) == one.labels[t] for t in range(1, len(one.ids)))
        tokens += len(one.ids) - 1
    found = exact(model, task, form, records, ut.Jacobi(0), batch_size=4)
    assert found.overall.token_accuracy == right / tokens


def test_a_perfect_and_a_useless_model():
    """A stub that knows the next gold token: accuracy 1; one that is off by one token: 0."""
    task, form = Sums(), TextFormat(tokenizer(), memory="response")
    records = list(task.records("test"))
    model = build()
    for off, expected in ((0, 1.0), (1, 0.0)):

        def forward(input_ids, attention_mask, memory_mask, logits_to_keep, schedule, use_cache, off=off):
            told = (input_ids[:, logits_to_keep + 1] + off) % 43
            return type("Out", (), {"logits": torch.nn.functional.one_hot(told, 43)})

        model.forward = forward
        found = exact(model, task, form, records, batch_size=3)
        assert (found.overall.accuracy, found.overall.token_accuracy) == (expected, expected)


def test_learned_positions_run_out():
    """Records that do not fit are unsolved, with a warning; the others are what they are alone."""
    model = build("gpt2", time=ut.T2MLR(0, 3), n_positions=10)
    task, form = Sums(), TextFormat(tokenizer(), memory="response")
    records = list(task.records("test"))
    prompts = [form.begin(task.example(record).prompt) for record in records]
    written = write(model, form, prompts, 4, batch_size=5)
    assert written == [write(model, form, [prompt], 4)[0] for prompt in prompts]
    counts = [len(text.replace("<unknown>", "u")) for (text,) in written]
    assert all(count <= 10 - len(prompt) for count, prompt in zip(counts, prompts, strict=True))
    assert (
        min(len(prompt) for prompt in prompts) + 4 < 10 < max(len(form.example(task.example(r)).ids) for r in records)
    )
    with pytest.warns(UserWarning, match="of 6 records have more tokens than the model's 10 learned positions"):
        found = exact(model, task, form, records, batch_size=5)
    assert found.overall.records == len(records)


def test_pass_at_k_is_the_share_of_draws():
    """Against all ways of choosing k of n samples."""
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                ways = list(itertools.combinations(range(n), k))
                share = sum(any(i < right for i in way) for way in ways) / len(ways)
                assert pass_at_k(n, right, k) == pytest.approx(share)


def test_samples():
    """Deterministic from the seed; pass@1 is the accuracy, more tries never solve less."""
    model, form = MODELS["t2mlr"](), TextFormat(tokenizer(), memory="response")

    class Any(Sums):
        def correct(self, record, text):
            return text[:1] in CHOSEN

    CHOSEN = set("abcdefghijklm012345")
    records = list(Sums().records("test"))
    keywords = dict(batch_size=8, samples=6, temperature=5.0, pass_at=(1, 3, 6), max_new_tokens=2)
    state = torch.random.get_rng_state()
    first, again, other = (generated(model, Any(), form, records, **keywords, seed=s) for s in (0, 0, 1))
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == again and first.solved != other.solved
    overall = first.overall
    assert overall.pass_at[1] == pytest.approx(overall.accuracy)
    assert 0 < overall.pass_at[1] < overall.pass_at[3] < overall.pass_at[6] <= 1
    counts = [round(6 * share) for share in first.solved]
    assert overall.pass_at[3] == pytest.approx(sum(pass_at_k(6, c, 3) for c in counts) / len(counts))
    texts = write(model, form, [form.begin(Sums().example(r).prompt) for r in records], 2, 8, samples=6, temperature=5)
    assert [sum(text[:1] in CHOSEN for text in one) for one in texts] == counts


def test_a_models_own_generation_settings_do_not_count():
    model, form = MODELS["plain"](), TextFormat(tokenizer(), memory="response")
    prompts = [form.begin(Sums().example(record).prompt) for record in Sums().records("test")]
    before = write(model, form, prompts, NEW)
    settings = {"repetition_penalty": 3.0, "no_repeat_ngram_size": 1, "do_sample": True, "num_beams": 2, "top_k": 3}
    model.generation_config.update(**settings)
    assert write(model, form, prompts, NEW) == before
    model.generation_config.update(num_beams=1)
    assert model.generate(torch.tensor([prompts[0].ids]), max_new_tokens=NEW).shape[1]  # they are valid settings


def test_wilson():
    """The interval's ends are the shares p at which the count seen is 1.96 standard deviations away."""
    for right, count in ((0, 10), (3, 10), (10, 10), (470, 1000)):
        for end in wilson(right, count):
            if 1e-12 < end < 1 - 1e-12:
                assert abs(right / count - end) == pytest.approx(1.959964 * sqrt(end * (1 - end) / count), rel=1e-5)
        low, high = wilson(right, count)
        assert low <= right / count <= high
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1


def test_plain_values():
    model, form = MODELS["plain"](), TextFormat(tokenizer(), memory="response")
    found = generated(model, Sums(), form, Sums().records("test"), samples=2, pass_at=(1, 2)).to_dict()
    assert json.loads(json.dumps(found)) == found
    assert {"records", "accuracy", "low", "high", "pass@1", "pass@2", "buckets", "shown"} == set(found)
    assert "token_accuracy" in exact(model, Sums(), form, Sums().records("test")).to_dict()


def test_bad_input():
    model, form = MODELS["plain"](), TextFormat(tokenizer(), memory="response")
    records = list(Sums().records("test"))
    for wrong, line in (
        (lambda: generated(model, Sums(), form, []), "there are no records"),
        (lambda: exact(model, Sums(), form, []), "there are no records"),
        (lambda: generated(model, Tagged(), form, records), "Tagged: tags are read off"),
        (lambda: generated(model, Sums(), form, records, pass_at=(2,)), "pass_at=2: must be from 1 to samples=1"),
        (lambda: write(model, form, [form.given([3]), form.given([])], 4), "prompt 1: must hold at least one token"),
        (lambda: write(model, form, [form.given([3])], 0), "max_new_tokens=0"),
        (lambda: write(model, form, [form.given([3])], 4, samples=2, temperature=0), "temperature=0"),
    ):
        with pytest.raises(ValueError, match=line):
            wrong()


def test_the_end_token_alone_ends_a_text():
    """Token 0 and spelled-out words are kept; nothing after the first end is."""
    from undertow.evaluation.writing import decoded

    t = tokenizer()
    end = t.eos_token_id
    assert t.convert_tokens_to_ids(END) == end
    assert decoded(t, [0, 1, 0, end, 2, end]) == "010"
    assert decoded(t, [end, 0]) == "" and decoded(t, [0, 0]) == "00"
