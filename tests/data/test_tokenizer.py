import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from undertow.data import check_vocabulary, load_tokenizer, token_bytes, train_tokenizer
from undertow.data import tokenizer as tokenizers_of
from undertow.data.corpus import Document
from undertow.data.tokenizer import END, budget, tokenizer_hash

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # lone surrogates are not text: UTF-8 cannot hold them


def fast(model, end=END, **parts):
    raw = Tokenizer(model)
    for name, part in parts.items():
        setattr(raw, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end)


@given(text=TEXT)
def test_every_text_survives_and_every_byte_is_counted(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    assert tokenizer.decode(ids) == text
    assert int(token_bytes(tokenizer)[ids].sum()) == len(text.encode())


def test_documents_survive(tokenizer, corpus):
    bytes_V = token_bytes(tokenizer)
    for document in corpus.train + corpus.validation:
        ids = tokenizer(document.text)["input_ids"]
        assert tokenizer.decode(ids) == document.text
        assert int(bytes_V[ids].sum()) == len(document.text.encode())


def test_shape_and_ends(tokenizer):
    assert len(tokenizer) == len(token_bytes(tokenizer)) == 300
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == END
    assert token_bytes(tokenizer)[tokenizer.eos_token_id] == 0
    assert (token_bytes(tokenizer) == 0).sum() == 1


def test_training_is_deterministic(corpus, tokenizer, tmp_path):
    again = train_tokenizer(corpus.train, 300, tmp_path)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer)
    assert tokenizer_hash(train_tokenizer(corpus.train, 299, tmp_path)) != tokenizer_hash(tokenizer)


def test_it_is_read_from_the_cache(corpus, tokenizer, tmp_path, monkeypatch):
    train_tokenizer(corpus.train, 300, tmp_path)
    monkeypatch.delattr("undertow.data.tokenizer._train")
    assert tokenizer_hash(train_tokenizer(corpus.train, 300, tmp_path)) == tokenizer_hash(tokenizer)


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_a_torn_cache_file_is_trained_anew(corpus, tokenizer, tmp_path, keep):
    train_tokenizer(corpus.train, 300, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.warns(UserWarning, match=f"{path.name}: damaged"):
        again = train_tokenizer(corpus.train, 300, tmp_path)
    assert tokenizer_hash(again) == tokenizer_hash(tokenizer) and path.read_bytes() == whole


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
    assert loaded.decode(loaded.encode(" a , b 's\r\n")) == " a , b 's\r\n"


@pytest.mark.parametrize("letters", ["ACGT", "=", " ", "流水不腐", "0123456789"])
def test_time_to_train_is_linear_in_a_line_without_spaces(tmp_path, letters):
    """Quadratic, the longer line took 16 times as long as the shorter one, several seconds."""
    draw, took = random.Random(0), {}
    for n in (30_000, 120_000):
        text = "".join(draw.choices(letters, k=n // len(letters[0].encode())))
        begun = time.process_time()
        trained = train_tokenizer([Document("a", text)], 320, tmp_path / str(n))
        took[n] = time.process_time() - begun
        assert trained.decode(trained.encode(text[:5000])) == text[:5000]
    assert took[120_000] < 8 * took[30_000] + 0.5


def test_long_words_alone_are_counted_in_parts(tmp_path):
    """What is trained on words of ordinary length is what `tokenizers` alone makes of them."""
    texts = ["a word or two, " * 20, "x" * 1000 + " " + "流" * 300]
    expected = Tokenizer(models.BPE())
    expected.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    expected.train_from_iterator(texts, trainer)
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    trained = train_tokenizer(documents, 300, tmp_path)
    assert trained.get_vocab() == expected.get_vocab()
    assert json.loads(trained.backend_tokenizer.to_str())["pre_tokenizer"]["type"] == "ByteLevel"


def test_too_small_a_vocabulary(corpus, tmp_path):
    with pytest.raises(ValueError, match="vocab_size: 256: must be at least 257"):
        train_tokenizer(corpus.train, 256, tmp_path)


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match="^tokenizer: '.*': neither a tokenizer's folder nor its hub id") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_no_eos_token(tmp_path):
    fast(models.BPE(vocab={"a": 0}, merges=[]), end=None).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no eos token"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_model(tokenizer):
    check_vocabulary(tokenizer, 300)
    with pytest.raises(ValueError, match="has 300 tokens, but the model's vocab_size is 299"):
        check_vocabulary(tokenizer, 299)


def test_gaps_between_ids_count():
    gaps = fast(models.BPE(vocab={"a": 0, "b": 9, END: 4}, merges=[]), decoder=decoders.ByteLevel())
    assert token_bytes(gaps).tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="has 10 tokens"):
        check_vocabulary(gaps, 9)


def test_added_tokens_that_are_text_have_their_length(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    wider = load_tokenizer(tmp_path)
    wider.add_tokens(["naïve "])
    wider.add_tokens(["<|tool|>"], special_tokens=True)
    assert token_bytes(wider)[300:].tolist() == [len("naïve ".encode()), 0]


def test_sentencepiece_like_vocabularies():
    vocab = {END: 0, "▁": 1, "▁é": 2, "<0x0A>": 3, "流": 4, "a": 5}
    model = models.BPE(vocab=vocab, merges=[], byte_fallback=True)
    parts = {
        "normalizer": normalizers.Replace(" ", "▁"),
        "decoder": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    }
    assert token_bytes(fast(model, **parts)).tolist() == [0, 1, 3, 1, 3, 1]


def test_bytes_of_other_kinds_are_unknown():
    words = fast(models.WordPiece({"a": 0, END: 1}, unk_token=END), pre_tokenizer=pre_tokenizers.Whitespace())
    with pytest.raises(ValueError, match="neither byte-level, SentencePiece-like nor of whole words"):
        token_bytes(words)


def test_bytes_of_whole_words_leave_out_what_is_between_them():
    vocabulary = {"a": 0, "naïve": 1, END: 2}
    words = fast(models.WordLevel(vocabulary, unk_token=END), pre_tokenizer=pre_tokenizers.Whitespace())
    assert token_bytes(words).tolist() == [1, 6, 0]


def test_a_budget_of_characters(monkeypatch):
    """Whole documents until there are so many characters, of long ones their beginning; nothing more is read."""
    monkeypatch.setattr(tokenizers_of, "LONGEST", 10)
    read = iter(["a" * 4, "b" * 30, "c" * 3, "d" * 3, "e"])
    assert [one.text for one in budget(read, 15)] == ["a" * 4, "b" * 10, "c" * 3]
    assert next(read) == "d" * 3
    assert [one.text for one in budget(["x", "y"], 99)] == ["x", "y"]
