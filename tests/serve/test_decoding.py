"""Rows that come and go: what each holds and says is what it would alone."""

import pytest
import torch
from served import byte_tokenizer, tiny

import undertow as ut
from models import CONFIGS, LAYERS, build, gap
from undertow import stepper
from undertow.evaluation.samples import sample
from undertow.serve.decode import Sampling, choose, join, keep, prefill, step
from undertow.serve.text import Text

MODELS = [
    (None, ut.T2MLR(1, 2, carry="residual")),
    (ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)),
    (ut.TRMBlock(inner=2), None),
]


def rows(*lengths, vocabulary=40):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def alone(model, ids):
    return model(torch.tensor([ids])).logits[0, -1]


def comes_and_goes(model, tolerance=1e-9):
    """Two rows start, a third joins, the longest leaves, a fourth joins: always the logits of the whole text alone."""
    a, b, c, d = rows(3, 6, 2, 9)
    texts = [a, b]

    def same(logits):
        for i, text in enumerate(texts):
            assert gap(logits[i], alone(model, text)) < tolerance

    def go_on(cache, logits):
        tokens = [int(row.argmax()) for row in logits]
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        return step(model, tokens, cache)

    logits, cache = prefill(model, texts)
    logits = go_on(cache, logits)
    same(logits)
    more, other = prefill(model, [c])
    cache, logits = join(cache, other), torch.cat([logits, more])
    texts.append(c)
    for _ in range(2):
        logits = go_on(cache, logits)
    same(logits)
    cache, logits = keep(cache, [2, 0]), logits[[2, 0]]
    texts = [c, a]
    assert cache.length == len(a)
    logits = go_on(cache, logits)
    more, other = prefill(model, [d])
    cache, logits = join(cache, other), torch.cat([logits, more])
    texts.append(d)
    for _ in range(2):
        logits = go_on(cache, logits)
    same(logits)


@pytest.mark.parametrize("depth, time", MODELS, ids=str)
def test_rows_come_and_go(depth, time):
    comes_and_goes(build("gpt2", depth, time))


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "gpt2"])
def test_rows_come_and_go_in_every_family(family):
    comes_and_goes(build(family, time=ut.T2MLR(1, 2)), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["learned", "alibi", "fire", "nope"])
def test_rows_come_and_go_with_every_position_encoding(position):
    comes_and_goes(build("undertow_llama", time=ut.LRT(2), position=position), 1e-4)


def test_every_row_may_leave_but_one_without_pads():
    model = build("gpt2")
    logits, cache = prefill(model, rows(4, 7))
    cache = keep(cache, [1])
    assert cache.documents_BT is None and cache.length == 7
    a, b = rows(4, 7)
    assert gap(step(model, [5], cache)[0], alone(model, [*b, 5])) < 1e-9


def test_choosing_follows_the_distribution():
    """Frequencies of 1,000 draws against the definition, within five standard deviations."""
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    p = logits.double().div(0.7).softmax(-1)
    cases = {
        Sampling(0.7): p,
        Sampling(0.7, top_k=2): torch.where(p >= p.topk(2).values[-1], p, 0),
        Sampling(0.7, top_p=0.75): torch.where(p >= p.topk(2).values[-1], p, 0),  # 0.57, 0.28: two make 0.75
        Sampling(0.7, top_p=0.0): torch.where(p == p.max(), p, 0),
    }
    for how, expected in cases.items():
        expected = expected / expected.sum()
        generator = how.generator()
        found = torch.bincount(torch.tensor([choose(logits, how, generator) for _ in range(1000)]), minlength=5) / 1000
        assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / 1000).sqrt()).all(), how
    assert choose(logits, Sampling(0), Sampling(0).generator()) == 1


def test_seeds():
    generators = [Sampling(seed=3).generator(i) for i in (0, 0, 1)]
    a, b, c = (torch.rand(3, generator=g) for g in generators)
    assert torch.equal(a, b) and not torch.equal(a, c)
    drawn = [torch.rand(3, generator=Sampling().generator()) for _ in range(2)]
    assert not torch.equal(*drawn)


def cut(tokenizer, ids, stop):
    """The definition: the text of the first tokens in which a stop string is whole, cut there."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=True)
        found = [text.find(s) for s in stop if s in text]
        if found:
            return text[: min(found)], n
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


@pytest.mark.parametrize(
    ("said", "stop"),
    [
        ("plain text", ()),
        ("one, two, three", (", t",)),
        ("aaab aab", ("aab",)),
        ("überall: 漢字 und 🙂 Ende", ("🙂",)),
        ("überall: 漢字", ("字x",)),
        ("abcabd", ("abd", "bc")),
        ("almost a sto", ("stop",)),
    ],
)
def test_pieces_are_the_text_up_to_the_stop(said, stop):
    tokenizer = byte_tokenizer()
    ids = tokenizer(said)["input_ids"]
    text, pieces, taken = Text(tokenizer, stop), [], 0
    for token in ids:
        pieces.append(text.add(token))
        taken += 1
        assert not any("\ufffd" in piece for piece in pieces)
        if text.stopped:
            break
    pieces.append(text.end())
    assert ("".join(pieces), taken) == cut(tokenizer, ids, stop)
    assert stop or len([p for p in pieces if p]) > 1


def test_bytes_that_are_no_character_come_at_the_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("é")["input_ids"][:1]
    text = Text(tokenizer)
    assert text.add(ids[0]) == "" and text.end() == "\ufffd"


def test_a_batch_of_float32_says_what_its_rows_say_alone():
    model = tiny(time=ut.T2MLR(1, 2), dtype=torch.float32)
    prompts = rows(4, 11, 7, vocabulary=250)

    def greedy(some):
        logits, cache = prefill(model, some)
        said = [logits.argmax(-1).tolist()]
        for _ in range(12):
            said.append(step(model, said[-1], cache).argmax(-1).tolist())
        return [list(row) for row in zip(*said, strict=True)]

    assert greedy(prompts) == [greedy([prompt])[0] for prompt in prompts]
    ids = torch.tensor([prompts[1]])
    theirs = model.generate(ids, max_new_tokens=13, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert greedy(prompts)[1] == theirs[0, ids.shape[1] :].tolist()


def test_text_is_written_compiled_on_request(monkeypatch):
    """What compiles is replaced: only whether it is asked for is of interest."""
    model, tokenizer, calls, pieces = build("gpt2", vocab_size=300), byte_tokenizer(), [], []
    monkeypatch.setattr(stepper, "_compiled", lambda: lambda *given: calls.append(1) or stepper._call(*given))
    plain = sample(model, tokenizer, "abc", 6, seed=2)
    assert not calls
    assert sample(model, tokenizer, "abc", 6, seed=2, write=pieces.append, compiled=True) == plain == "".join(pieces)
    assert calls and len(calls) % LAYERS == 0
