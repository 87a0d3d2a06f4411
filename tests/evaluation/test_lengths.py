"""Scores at several context lengths, against pieces of documents scored one at a time."""

import math
import warnings

import pytest
import torch

import undertow as ut
from models import V, build
from sums import CHARACTERS, Sums, Tagged, tokenizer
from undertow.data import Document
from undertow.data.packing import tokenise
from undertow.evaluation.documents import validation_documents, validation_tokens
from undertow.evaluation.lengths import cut_table, first_tokens, lengths, table
from undertow.tasks import Task

BYTES = torch.tensor([1] * 41 + [0, 0])


def documents(sizes=(20, 3, 30)):
    generator = torch.Generator().manual_seed(1)
    return [
        Document(str(i), "".join(CHARACTERS[int(j)] for j in torch.randint(41, (size,), generator=generator)))
        for i, size in enumerate(sizes)
    ]


class Written(Task):
    """The documents as the validation split of a task."""

    kind = "text"

    def records(self, split):
        return iter([{"text": document.text} for document in documents()])


def nats_of(model, ids):
    """Sum of nats of every token but the first, and of those among them that have bytes."""
    with torch.no_grad():
        scores = model(torch.tensor([ids]), schedule=ut.Sequential()).logits[0].log_softmax(-1)
    each = [(-float(scores[t - 1, ids[t]]), bool(BYTES[ids[t]])) for t in range(1, len(ids))]
    return sum(nats for nats, _ in each), sum(nats for nats, text in each if text)


def test_lengths_equal_pieces_scored_alone():
    """Longer contexts than the model was made for among them (its rotary embedding goes on)."""
    model = build(time=ut.T2MLR(1, 2, carry="residual"), max_position_embeddings=17)
    ids_L, counts = tokenise(documents(), tokenizer())
    texts = [part.tolist() for part in torch.from_numpy(ids_L).split(counts.tolist())]
    found = lengths(model, documents(), tokenizer(), BYTES, [24, 8, 17], batch_size=3)
    assert [one.length for one in found] == [24, 8, 17]
    for one in found:
        n = one.length
        pieces = [text[i : i + n] for text in texts for i in range(0, len(text), n)]
        nats, text = (sum(sums) for sums in zip(*(nats_of(model, piece) for piece in pieces), strict=True))
        tokens = sum(len(piece) - 1 for piece in pieces)
        size = sum(int(BYTES[piece[1:]].sum()) for piece in pieces)
        assert (one.bits.tokens, one.bits.bytes) == (tokens, size)
        assert one.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert one.bits.bits_per_byte == pytest.approx(text / math.log(2) / size, rel=1e-5)
        assert one.to_dict()["perplexity"] == one.perplexity


def test_first_tokens_are_a_mean_over_texts_of_their_means():
    """Short texts count as much as long ones; what comes after the first n tokens is not read."""
    model = build(time=ut.T2MLR(1, 2, carry="residual"), max_position_embeddings=17)
    texts = validation_tokens("unread", None, Written(), tokenizer())
    assert [len(text) for text in texts] == [21, 4, 31]  # with the end token
    found = first_tokens(model, [*texts, [7]], [24, 8, 17], batch_size=3)
    for one, n in zip(found, (24, 8, 17), strict=True):
        means = [nats_of(model, text[:n])[0] / (len(text[:n]) - 1) for text in texts]
        assert one.loss == pytest.approx(sum(means) / 3, rel=1e-5) and one.perplexity == pytest.approx(
            math.exp(one.loss)
        )
        assert (one.length, one.texts, one.tokens) == (n, 3, sum(len(text[:n]) - 1 for text in texts))
    assert abs(found[0].loss - math.fsum(nats_of(model, t[:24])[0] for t in texts) / found[0].tokens) > 1e-3
    assert cut_table(found).row_count == 3 and found[1].to_dict()["length"] == 8
    with pytest.raises(ValueError, match="lengths: 1: must be at least 2"):
        first_tokens(model, texts, [1])
    with pytest.raises(ValueError, match="no validation documents"):
        first_tokens(model, [[7]], [8])
    limited = build("gpt2", n_positions=16)
    with pytest.warns(UserWarning, match="lengths: 17: not possible, the model has 16 learned positions"):
        assert [one.loss is None for one in first_tokens(limited, texts, [8, 17])] == [False, True]


def test_what_was_tokenised_before_is_cut_as_it_is():
    """No bos, no eos, no decoding in between: the published rows."""

    class Ready(Task):
        kind = "tokens"

        def records(self, split):
            return iter([{"input_ids": [5, 6, 42, 7]}, {"input_ids": [8, 9]}])

    assert validation_tokens("unread", None, Ready(), tokenizer()) == [[5, 6, 42, 7], [8, 9]]
    assert validation_tokens("unread", None, Ready(), tokenizer(), 1) == [[5, 6, 42, 7]]


def test_learned_positions_are_not_exceeded():
    model = build("gpt2", n_positions=16)
    with pytest.warns(UserWarning, match="lengths: 17, 64: not possible, the model has 16 learned positions"):
        found = lengths(model, documents(), tokenizer(), BYTES, [8, 16, 17, 64])
    assert [one.bits is None for one in found] == [False, False, True, True]
    assert found[2].to_dict() == {
        "length": 17, "perplexity": None, "bits_per_byte": None, "nats": None, "tokens": None, "bytes": None
    }  # fmt: skip
    assert table(found).row_count == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lengths(model, documents(), tokenizer(), BYTES, [16])


def test_validation_documents(tmp_path):
    """Text as it is, tokens as text, prompt and response, inputs; plain text is read as it is for training."""

    class Told(Task):
        def records(self, split):
            return iter([{"text": "abc", "input_ids": [1, 2, 0]}, {"text": "b", "input_ids": [3]}])

    for kind, expected in (("text", ["abc", "b"]), ("tokens", ["120", "3"])):
        task = type("Told", (Told,), {"kind": kind})()
        found = validation_documents("unread", None, task, tokenizer())
        assert [document.text for document in found] == expected
        assert validation_documents("unread", None, task, tokenizer(), 1) == found[:1]
    record = next(Sums().records("validation"))
    example, tags = Sums().example(record), Tagged().example(record)
    assert validation_documents("unread", None, Sums(), tokenizer())[0].text == example.prompt + example.response
    assert validation_documents("unread", None, Tagged(), tokenizer())[0].text == tags.input
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name * 9)
    source, held_out = str(tmp_path / "a.txt"), [str(tmp_path / "b.txt"), str(tmp_path / "c.txt")]
    found = validation_documents(source, held_out, None, tokenizer())
    assert sorted(document.text for document in found) == ["b" * 9, "c" * 9]
    assert len(validation_documents(source, held_out, None, tokenizer(), 1)) == 1


def test_bad_input():
    model = build(vocab_size=V)
    for wrong, line in (([1], "lengths: 1: must be at least 2"), ([8, 0], "lengths: 0: must be")):
        with pytest.raises(ValueError, match=line):
            lengths(model, documents(), tokenizer(), BYTES, wrong)
    with pytest.raises(ValueError, match="no validation documents"):
        lengths(model, [], tokenizer(), BYTES, [8])
