import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from undertow.data import build, collate, token_bytes


def test_everything_of_a_folder(folder, corpus, cache_dir):
    data = build(str(folder), vocab_size=300, seq_len=32, cache_dir=cache_dir)
    assert len(data.tokenizer) == 300 and data.token_bytes.dtype == torch.int64
    assert (data.train_bytes, data.validation_bytes) == (corpus.train_bytes, corpus.validation_bytes)
    assert data.validation.text_bytes(data.token_bytes) == data.validation_bytes
    assert 0 <= data.waste == data.train.waste < 0.05
    batch = collate([data.train[0], data.train[1]])
    assert batch["input_ids"].shape == (2, 32) and int(batch["input_ids"].max()) < 300


def test_two_calls_give_the_same_with_and_without_cache(folder, cache_dir, tmp_path):
    first, second, fresh = (
        build([str(folder)], vocab_size=300, seq_len=32, cache_dir=where) for where in (cache_dir, cache_dir, tmp_path)
    )
    for other in (second, fresh):
        assert np.array_equal(first.train.stored_R2T, other.train.stored_R2T)
        assert np.array_equal(first.validation.stored_R2T, other.validation.stored_R2T)
        assert torch.equal(first.token_bytes, other.token_bytes)


def test_a_tokenizer_or_its_folder(folder, tokenizer, cache_dir, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    given = build(str(folder), tokenizer=tokenizer, seq_len=32, cache_dir=cache_dir)
    loaded = build(str(folder), tokenizer=str(tmp_path), vocab_size=4096, seq_len=32, cache_dir=cache_dir)
    assert np.array_equal(given.train.stored_R2T, loaded.train.stored_R2T)


def test_validation_of_its_own_and_cut(folder, cache_dir):
    held = f"{folder}/sub"
    data = build(f"{folder}/*.txt", vocab_size=300, seq_len=32, cache_dir=cache_dir, validation=held)
    cut = build(f"{folder}/*.txt", vocab_size=300, seq_len=32, cache_dir=cache_dir, validation=held, validation_rows=3)
    assert len(cut.validation) == 3 < len(data.validation) and cut.validation_bytes == data.validation_bytes
    assert np.array_equal(cut.validation.stored_R2T, data.validation.stored_R2T[:3])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"validation_rows": 0}, "validation_rows: 0: must be at least 1"),
        ({"seq_len": 1}, "seq_len: 1: must be at least 2"),
        ({"vocab_size": 9}, "vocab_size: 9: must be at least 257"),
        ({"tokenizer": "no/such"}, "tokenizer: 'no/such': neither"),
        ({"tokenizer": "no/such", "tokenizer_characters": 9}, "tokenizer_characters: 9: no tokenizer is trained"),
    ],
)
def test_wrong_arguments(folder, cache_dir, arguments, said):
    with pytest.raises(ValueError, match=said):
        build(str(folder), cache_dir=cache_dir, **{"vocab_size": 300, **arguments})


def test_a_tokenizer_that_changes_the_text_is_reported(folder, cache_dir):
    alphabet = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    raw.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lossy = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")
    assert lossy.bos_token_id is None and int(token_bytes(lossy).sum()) == 256
    with pytest.warns(UserWarning, match="does not keep the text"):
        build(str(folder), tokenizer=lossy, seq_len=32, cache_dir=cache_dir)
