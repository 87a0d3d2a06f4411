import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from undertow.data import Document, Rows, collate, pack_documents, token_bytes
from undertow.data.packing import best_fit, pack, tokenise

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def lines(lengths):
    """Documents of the given lengths whose tokens are all different: 1, 2, 3, ... in line."""
    return np.arange(1, sum(lengths) + 1, dtype=np.int32), np.array(lengths)


def pieces_of(rows):
    """The pieces of all rows, cut where positions restart."""
    found = []
    for row in rows:
        real = row.get("attention_mask", np.ones_like(row["input_ids"])).astype(bool)
        ids, positions = row["input_ids"][real], row["position_ids"][real]
        found += np.split(ids, np.flatnonzero(positions == 0)[1:])
    return found


@given(lengths=LENGTHS, seq_len=st.integers(2, 17))
def test_every_token_once_and_in_order(lengths, seq_len):
    ids_L, lengths = lines(lengths)
    rows = Rows(pack(ids_L, lengths, seq_len, pad=0))
    found = sorted(pieces_of(rows), key=lambda piece: piece[0])  # tokens are numbered: back in line
    assert np.array_equal(np.concatenate(found), ids_L)
    documents = np.split(ids_L, np.cumsum(lengths)[:-1])
    expected = [document[i : i + seq_len] for document in documents for i in range(0, len(document), seq_len)]
    assert [piece.tolist() for piece in found] == [piece.tolist() for piece in expected]


@given(lengths=LENGTHS, seq_len=st.integers(2, 17))
def test_what_a_row_holds(lengths, seq_len):
    rows = Rows(pack(*lines(lengths), seq_len, pad=0))
    masked = 0
    for row in rows:
        assert {name: (array.shape, array.dtype) for name, array in row.items()} == {
            name: ((seq_len,), np.dtype("int64")) for name in row
        }
        real = row.get("attention_mask", np.ones(seq_len, int)) == 1
        ids, labels, positions = row["input_ids"], row["labels"], row["position_ids"]
        assert not np.diff(real.astype(int)).max(initial=0) > 0 and real[0], "padding is at the right end only"
        assert (ids[~real] == 0).all() and (positions[~real] == 0).all()
        starts = real & (positions == 0)
        assert starts[0] and (np.diff(positions)[real[1:] & ~starts[1:]] == 1).all()
        assert (labels[starts | ~real] == -100).all()
        assert np.array_equal(labels[real & ~starts], ids[real & ~starts])
        masked += int(starts.sum())
    assert masked == sum(-(-length // seq_len) for length in lengths)
    assert rows.tokens == sum(lengths)
    assert rows.waste == pytest.approx(1 - sum(lengths) / (len(rows) * seq_len))
    assert all(("attention_mask" in row) == (rows.waste > 0) for row in rows)


@given(st.lists(st.integers(1, 16), min_size=1, max_size=200))
def test_best_fit_wastes_little(lengths):
    length_P = np.array(lengths)
    row_P, offset_P = best_fit(length_P, 16)
    used = np.zeros((row_P.max() + 1, 16), int)
    for row, offset, length in zip(row_P, offset_P, length_P, strict=True):
        used[row, offset : offset + length] += 1
    assert used.max() == 1 and used.sum() == length_P.sum()
    assert (used[:, 0] == 1).all() and (np.diff(used) <= 0).all(), "pieces of a row are adjacent"
    emptiest = np.sort(used.sum(1))[:2]
    assert len(used) == 1 or emptiest.sum() > 16, "a row is opened only for what fits into no other"


def test_best_fit_takes_the_tightest_row():
    row_P, offset_P = best_fit(np.array([3, 10, 7, 6, 10]), 10)
    assert row_P.tolist() == [2, 0, 2, 3, 1] and offset_P.tolist() == [7, 0, 0, 0, 0]


def test_documents_are_between_bos_and_eos(tokenizer):
    documents = [Document("a", "x<|endoftext|>y"), Document("b", "🌊")]
    ids_L, lengths = tokenise(documents, tokenizer)
    first, second = np.split(ids_L, [lengths[0]])
    for ids, document in ((first, documents[0]), (second, documents[1])):
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert not np.isin(ids[1:-1], tokenizer.all_special_ids).any(), "text never becomes a special token"
        assert tokenizer.decode(ids[1:-1].tolist()) == document.text


def test_bytes_of_rows(tokenizer, corpus, cache_dir):
    bytes_V = token_bytes(tokenizer)
    rows = pack_documents(corpus.train, tokenizer, 32, cache_dir)
    assert rows.text_bytes(bytes_V) == corpus.train_bytes
    labels = torch.cat([collate([row])["labels"].flatten() for row in rows])
    assert rows.predicted_bytes(bytes_V) == int(bytes_V[labels[labels != -100]].sum()) < corpus.train_bytes
    longest = max(len(document.text.encode()) for document in corpus.train) + 2
    whole = pack_documents(corpus.train, tokenizer, longest, cache_dir)
    assert whole.predicted_bytes(bytes_V) == corpus.train_bytes, "uncut documents are predicted to the last byte"


def test_cached_rows_are_mapped_and_the_same(tokenizer, corpus, tmp_path, monkeypatch):
    first = pack_documents(corpus.train, tokenizer, 32, tmp_path)
    monkeypatch.delattr("undertow.data.packing.tokenise")
    second = pack_documents(corpus.train, tokenizer, 32, tmp_path)
    assert isinstance(second.stored_R2T, np.memmap)
    assert np.array_equal(first.stored_R2T, second.stored_R2T)


@pytest.mark.parametrize("keep", [0, 10, 200, -1])
def test_torn_rows_are_packed_anew(tokenizer, corpus, tmp_path, keep):
    expected = np.array(pack_documents(corpus.validation, tokenizer, 16, tmp_path).stored_R2T)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.warns(UserWarning, match=f"{path.name}: damaged"):
        rows = pack_documents(corpus.validation, tokenizer, 16, tmp_path)
    assert np.array_equal(rows.stored_R2T, expected)


def test_rows_are_a_dataset(tokenizer, corpus, cache_dir):
    rows = pack_documents(corpus.train, tokenizer, 32, cache_dir)
    loader = torch.utils.data.DataLoader(rows, batch_size=4, shuffle=True, collate_fn=collate)
    seen = torch.cat([batch["input_ids"] for batch in loader])
    assert seen.shape == (len(rows), 32) and seen.dtype == torch.int64
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_mask_only_where_the_split_has_padding():
    padded = Rows(pack(*lines([4, 3, 4]), 4, pad=0))
    assert set(collate([padded[0], padded[1]])) == {"input_ids", "labels", "position_ids", "attention_mask"}
    full = Rows(pack(*lines([4, 3, 1]), 4, pad=0))
    assert full.waste == 0 and set(collate([full[0]])) == {"input_ids", "labels", "position_ids"}


def test_seq_len_of_one(tokenizer, corpus):
    with pytest.raises(ValueError, match="seq_len: 1: must be at least 2"):
        pack_documents(corpus.train, tokenizer, 1)
