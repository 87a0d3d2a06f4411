"""Pauses: inserted or replaced, everything aligned, the same for the same seed and row."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import undertow as ut
from models import build
from undertow.data import Rows, collate
from undertow.data.packing import pack
from undertow.data.pause import Paused, Pauses, insert, token_id

PAUSE, PADDING = 999, 0


def row_of(lengths, seq_len, memory=None):
    """The first packed row of documents whose tokens are 1, 2, 3, ..."""
    ids_L = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    row = Rows(pack(ids_L, np.array(lengths), seq_len, PADDING))[0]
    return row if memory is None else row | {"memory_mask": np.array(memory)}


def spelled_out(row, count_T, token):
    """`insert`, one token at a time."""
    made = {name: [] for name in row}
    position = -1
    for t, ident in enumerate(row["input_ids"]):
        real = row.get("attention_mask", np.ones(len(row["input_ids"])))[t] == 1
        if real and row["position_ids"][t] == 0:
            position = -1
        for pause in [True] * count_T[t] + [False]:
            position += 1
            values = {name: int(array[t]) for name, array in row.items()}
            values["position_ids"] = position if real else 0
            if pause:
                values |= {"input_ids": token, "labels": -100}
            else:
                assert values["input_ids"] == ident
            for name, value in values.items():
                made[name].append(value)
    return made


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    seq_len=st.integers(2, 12),
    counts=st.lists(st.integers(0, 3), min_size=12, max_size=12),
)
def test_insertion_is_what_it_says(lengths, seq_len, counts):
    row = row_of(lengths, seq_len, memory=np.arange(seq_len) % 2)
    count_T = np.array(counts[:seq_len]) * row.get("attention_mask", np.ones(seq_len, int))
    before = {name: values.copy() for name, values in row.items()}
    made = insert(row, count_T, PAUSE)
    assert {name: values.tolist() for name, values in made.items()} == spelled_out(row, count_T, PAUSE)
    assert all(np.array_equal(row[name], before[name]) for name in before), "the row itself is left as it is"


def test_two_documents_and_padding():
    row = row_of([3, 2], 6)
    made = insert(row, np.array([1, 0, 2, 1, 0, 0]), PAUSE)
    assert made["input_ids"].tolist() == [PAUSE, 1, 2, PAUSE, PAUSE, 3, PAUSE, 4, 5, 0]
    assert made["labels"].tolist() == [-100, -100, 2, -100, -100, 3, -100, -100, 5, -100]
    assert made["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0]
    assert made["attention_mask"].tolist() == [1] * 9 + [0]


@pytest.mark.parametrize("options", [{"mean": 1.5}, {"replace": 0.5}], ids=str)
def test_only_where_memory_is_mixed(options):
    row = row_of([200, 40], 256)
    row |= {"memory_mask": (np.arange(256) % 3 != 0).astype(np.int64)}
    recurrent, anywhere = Pauses(PAUSE, **options), Pauses(PAUSE, **options, only_recurrent=False)
    made = recurrent(row, 0)
    paused = made["input_ids"] == PAUSE
    assert paused.any() and (made["memory_mask"][paused] == 1).all() and (made["labels"][paused] == -100).all()
    assert (made["attention_mask"][paused] == 1).all(), "padding is never eligible"
    everywhere = anywhere(row, 0)
    assert (everywhere["memory_mask"][everywhere["input_ids"] == PAUSE] == 0).any()
    plain = {name: values for name, values in row.items() if name != "memory_mask"}
    assert all(np.array_equal(recurrent(plain, 0)[name], everywhere[name]) for name in plain), "no mask: all are ones"


def test_how_many():
    row = {"input_ids": np.ones(20000, dtype=np.int64)}
    assert (Pauses(PAUSE, mean=0.3)(row, 0)["input_ids"] == PAUSE).sum() / 20000 == pytest.approx(0.3, abs=0.02)
    assert (Pauses(PAUSE, replace=0.3)(row, 0)["input_ids"] == PAUSE).mean() == pytest.approx(0.3, abs=0.02)
    assert (Pauses(PAUSE, replace=1.0)(row, 0)["input_ids"] == PAUSE).all()


@pytest.mark.parametrize("options", [{"mean": 1.0}, {"replace": 0.5}], ids=str)
def test_seed_and_row_decide(options):
    row = row_of([60], 64)
    drawn = [Pauses(PAUSE, **options, seed=seed)(row, number) for seed, number in ((3, 5), (3, 5), (3, 6), (4, 5))]
    np.random.seed(1)  # whatever else draws
    again = Pauses(PAUSE, **options, seed=3)(row, 5)
    texts = [made["input_ids"].tolist() for made in drawn]
    assert texts[0] == texts[1] == again["input_ids"].tolist() and texts[0] != texts[2] != texts[3] != texts[0]


def test_the_numbers_are_these():
    """Runs of last year can be repeated: what is drawn from a seed may not change."""
    row = {"input_ids": np.arange(1, 9)}
    inserted, swapped = (
        Pauses(PAUSE, **kind, seed=2)(row, 2)["input_ids"] for kind in ({"mean": 1.0}, {"replace": 0.5})
    )
    assert inserted.tolist() == [PAUSE, 1, 2, 3, PAUSE, 4, 5, PAUSE, 6, 7, 8]
    assert swapped.tolist() == [PAUSE, 2, PAUSE, PAUSE, 5, PAUSE, PAUSE, 8]


def test_rows_keep_their_length():
    rows = Rows(pack(np.arange(1, 41, dtype=np.int32), np.array([25, 15]), 16, PADDING))
    paused = Paused(rows, Pauses(PAUSE, mean=1.0))
    assert len(paused) == len(rows)
    batch = collate([paused[i] for i in range(len(paused))])
    assert {name: tuple(x.shape) for name, x in batch.items()} == {name: (len(rows), 16) for name in rows[0]}
    for i, row in enumerate(rows):
        text = [ident for ident in paused[i]["input_ids"] if ident not in (PAUSE, PADDING)]
        assert text == row["input_ids"][: len(text)].tolist() and (paused[i]["input_ids"] == PAUSE).any()
    with pytest.raises(IndexError):
        paused[len(rows)]


def test_a_model_reads_pauses_as_part_of_their_document():
    """Two documents with pauses in one row give the losses that they give alone."""
    model = build(time=ut.T2MLR(1, 2))
    counts = np.array([0, 2, 1, 1, 0, 0])
    packed = collate([insert(row_of([3, 2], 6), counts, 41)])
    first = collate([insert(row_of([3], 3), counts[:3], 41)])
    ids_second = np.array([4, 5])
    second = {"input_ids": ids_second, "labels": np.array([-100, 5]), "position_ids": np.arange(2)}
    second = collate([insert(second, counts[3:5], 41)])
    with torch.no_grad():
        whole = model(**packed, num_items_in_batch=1).loss
        apart = model(**first, num_items_in_batch=1).loss + model(**second, num_items_in_batch=1).loss
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "exactly one of them"),
        ({"mean": 1.0, "replace": 0.1}, "exactly one of them"),
        ({"mean": 0.0}, "mean=0.0: must be above 0"),
        ({"replace": 1.5}, "replace=1.5: must be above 0 and at most 1"),
    ],
    ids=str,
)
def test_mistakes(options, line):
    with pytest.raises(ValueError, match=line):
        Pauses(PAUSE, **options)


def test_token_by_name(tokenizer):
    assert token_id(tokenizer, tokenizer.eos_token) == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="data.pause.token: '<pause>' is not a token; special tokens are '<") as caught:
        token_id(tokenizer, "<pause>")
    assert "\n" not in str(caught.value)
