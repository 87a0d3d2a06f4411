"""Streams: row i is what it is defined to be, whoever asks for it, in whatever order, after whatever kill."""

import errno
import itertools
import json

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import tiny_tasks
from tiny_tasks import Pages, Parity, Sharded, Sums
from undertow.data import Stream, build, cache, collate
from undertow.data import stream as streams
from undertow.data.examples import pack_records
from undertow.data.packing import rows_of
from undertow.data.stream import Chunks
from undertow.tasks import TASKS

N, T = 10, 24  # records of a chunk, tokens of a row


@pytest.fixture(autouse=True)
def known(monkeypatch):
    for name, cls in tiny_tasks.CLASSES.items():
        monkeypatch.setitem(TASKS, name, cls)


@pytest.fixture
def sharded(tmp_path):
    (tmp_path / "shards").mkdir()
    return Sharded(folder=str(tmp_path / "shards")).write()


def opened(task, where, **arguments):
    return build(task, seq_len=T, vocab_size=300, documents=N, stream=True, cache_dir=where, **arguments)


def by_definition(task, form):
    """All rows of one pass through the source: each chunk's records packed by themselves, one chunk after the other."""
    records, rows = task.records("train"), []
    while chunk := list(itertools.islice(records, N)):
        rows += list(rows_of(pack_records(chunk, task, form, T)))
    return rows


def same(row, other):
    """Masks may be left out where they are all ones."""
    return set(other) <= set(row) and all(np.array_equal(v, other.get(k, np.ones_like(v))) for k, v in row.items())


@pytest.mark.parametrize("task", [Pages(), Pages(count=40), Sums(), Parity()], ids=["pages", "even", "sums", "parity"])
def test_rows_are_the_packed_chunks_in_order_again_and_again(task, tmp_path):
    data = opened(task, tmp_path)
    expected = by_definition(task, data.format)
    rows = data.train.head(2 * len(expected) + 3)
    assert len(rows) == 2 * len(expected) + 3 and isinstance(rows, Stream)
    with pytest.warns(UserWarning, match=f"the stream ended after {len(expected)} rows; it is read again"):
        for i in range(len(rows)):
            assert same(rows[i], expected[i % len(expected)])
    assert len({frozenset(rows[i]) for i in range(len(rows))}) == 1, "every row has the same entries"
    with pytest.raises(IndexError):
        rows[len(rows)]
    one = data.train.head(len(expected))
    tokens = sum(int(row.get("attention_mask", np.ones(T)).sum()) for row in expected)
    assert one.waste == pytest.approx(1 - tokens / (T * len(expected))) and data.train.waste is data.waste is None


@pytest.mark.parametrize("kind", ["records", "datasets"])
def test_any_order_and_any_process_gives_the_same_rows(kind, sharded, tmp_path):
    task = Pages() if kind == "records" else sharded
    data = opened(task, tmp_path / "a")
    expected = by_definition(task, data.format)
    for i in (17, 3, 30, 0, len(expected) - 1):
        assert same(Stream(Chunks(task, "train", data.format, T, N, tmp_path / "b"), 99)[i], expected[i])
    # Two workers make the chunks between them, each from its own place in the source.
    for where in ("c", "d"):
        chunks = Chunks(task, "train", data.format, T, N, tmp_path / where)
        if where == "d":
            chunks.row(0)  # the parent has begun to read: its place must not be the workers'
        loader = DataLoader(Stream(chunks, len(expected)), batch_size=4, collate_fn=collate, num_workers=2)
        got = torch.cat([batch["input_ids"] for batch in loader])
        assert np.array_equal(got, np.stack([row["input_ids"] for row in expected]))


@pytest.mark.parametrize("kind", ["records", "datasets"])
def test_going_on_tokenises_and_reads_nothing_twice(kind, sharded, tmp_path, monkeypatch):
    task = Pages() if kind == "records" else sharded
    data = opened(task, tmp_path)
    expected = by_definition(task, data.format)
    data.train.head(12)[11]
    made = sorted(path.name for path in data.train.chunks.folder.glob("*.npy"))

    packed = []
    monkeypatch.setattr(
        streams, "pack_records", lambda records, *rest: packed.append(records) or pack_records(records, *rest)
    )
    again = opened(task, tmp_path).train.head(len(expected))
    assert same(again[11], expected[11]) and not packed
    for i in range(12, len(expected)):
        assert same(again[i], expected[i])
    everything = list(task.records("train"))
    assert [record for chunk in packed for record in chunk] == everything[len(made) * N :]
    assert sorted(path.name for path in again.chunks.folder.glob("*.npy"))[: len(made)] == made


def test_a_stream_of_datasets_goes_on_from_its_state(sharded, tmp_path, monkeypatch):
    """Parquet shards are not read again from the first: with the state lost, the rows would be others."""
    data = opened(sharded, tmp_path)
    expected = by_definition(sharded, data.format)
    chunks = data.train.chunks
    chunks.row(0)
    assert json.loads((chunks.folder / "000000.json").read_text())["state"]["examples_iterable"]
    monkeypatch.setattr(Sharded, "records", lambda *_: pytest.fail("read from the start"))
    again = Chunks(sharded, "train", data.format, T, N, tmp_path)
    assert all(same(again.row(i), expected[i]) for i in range(len(expected)))


@pytest.mark.parametrize("damage", ["no note", "torn note", "torn rows", "no rows", "left over"])
def test_a_chunk_that_a_kill_left_unfinished_is_made_again(damage, tmp_path):
    task = Pages()
    data = opened(task, tmp_path)
    expected = by_definition(task, data.format)
    chunks = data.train.chunks
    for i in range(len(expected)):
        chunks.row(i)
    rows, note = chunks.folder / "000001.npy", chunks.folder / "000001.json"
    before = rows.read_bytes(), note.read_bytes()
    if damage == "no note":
        note.unlink()
    elif damage == "torn note":
        note.write_bytes(note.read_bytes()[:20])
    elif damage == "torn rows":
        rows.write_bytes(rows.read_bytes()[:100])
    elif damage == "no rows":
        rows.unlink()
    else:
        (chunks.folder / "000001.npy.1.ab.tmp").write_bytes(b"half")
    again = Chunks(task, "train", data.format, T, N, tmp_path)
    if damage.startswith("torn"):
        with pytest.warns(UserWarning, match="damaged"):
            got = [again.row(i) for i in range(len(expected))]
    else:
        got = [again.row(i) for i in range(len(expected))]
    assert all(map(same, got, expected)) and before == (rows.read_bytes(), note.read_bytes())


@pytest.mark.parametrize("changed", ["task", "tokenizer", "seq_len", "documents", "memory", "records"])
def test_other_streams_have_chunks_of_their_own(changed, tmp_path, monkeypatch):
    def folder(task=Sums(), documents=N, **arguments):  # noqa: B008
        return build(
            task, stream=True, documents=documents, cache_dir=tmp_path, **{"seq_len": T, "vocab_size": 270, **arguments}
        ).train.chunks.folder

    first = folder()
    assert folder() == first
    if changed == "records":  # the same options, but the source has changed
        monkeypatch.setattr(Sums, "draw", lambda self, rng, split: {"a": rng.randrange(999), "b": 1})
        assert folder() != first
    else:
        other = {
            "task": Sums(digits=2),
            "tokenizer": Parity().tokenizer(),
            "seq_len": 32,
            "documents": 9,
            "memory": "all",
        }
        assert folder(**{changed: other[changed]}) != first


def test_validation_is_the_first_rows_of_its_split(tmp_path):
    data = opened(Pages(), tmp_path, validation_rows=3)
    whole = opened(Pages(), tmp_path)
    expected = rows_of(pack_records(list(Pages().records("validation")), Pages(), data.format, T))
    assert len(data.validation) == 3 < len(whole.validation) == len(expected)
    assert all(
        np.array_equal(data.validation[i][key], whole.validation[i][key])
        for i in range(3)
        for key in whole.validation[i]
    )
    limited = build(Sums(), stream=True, documents=4, seq_len=T, vocab_size=270, cache_dir=tmp_path)
    assert limited.validation.pieces == 4, "validation, too, is bounded"


def test_examples_that_are_too_long_are_counted_once(tmp_path):
    data = opened(Sums(digits=6), tmp_path)
    lengths = [len(data.format.example(data.task.example(r)).ids) for r in data.task.records("train")]
    short = max(lengths[:N]) - 1
    chunks = Chunks(data.task, "train", data.format, short, N, tmp_path)
    with pytest.warns(UserWarning, match="examples are longer than seq_len") as caught:
        rows = [chunks.row(i) for i in range(20)]
    assert sum("longer than" in str(warning.message) for warning in caught) == 1
    first = rows_of(pack_records(list(itertools.islice(data.task.records("train"), N)), data.task, data.format, short))
    assert 0 < first.pieces < N and all(map(same, rows, first))
    nothing = Chunks(data.task, "train", data.format, 3, N, tmp_path)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="Sums: no record of train fits in seq_len=3"):
        nothing.row(0)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    chunks = opened(Pages(), tmp_path).train.chunks

    def full(path, writer):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write", full)
        with pytest.raises(OSError, match="No space left") as caught:
            chunks.row(0)
    assert "\n" not in str(caught.value) and not list(chunks.folder.glob("0*"))
    assert chunks.row(0)["input_ids"].shape == (T,), "and once there is room it goes on"


def test_a_torn_shard_is_one_line(sharded, tmp_path):
    data = opened(sharded, tmp_path)
    shard = tmp_path / "shards" / "train-2.parquet"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ValueError, match="Sharded, train, chunk ") as caught:
        for i in range(200):
            data.train[i]
    assert "\n" not in str(caught.value)


def test_an_empty_split(tmp_path):
    with pytest.raises(ValueError, match="Pages: there are no records in its train split"):
        opened(Pages(count=0), tmp_path)


def test_a_forked_process_opens_the_source_itself(tmp_path, monkeypatch):
    """Open files, and with them the places in them, are shared after a fork."""
    chunks, opens = opened(Pages(), tmp_path).train.chunks, []
    read = Pages.records
    monkeypatch.setattr(Pages, "records", lambda self, split: opens.append(split) or read(self, split))
    chunks.row(0)
    chunks.row(15)
    assert opens == ["train"], "one process reads on"
    monkeypatch.setattr(streams.os, "getpid", lambda: -1)
    chunks.row(50)
    assert opens == ["train", "train"]


def test_the_tokenizer_may_read_more_than_a_chunk(tmp_path, monkeypatch):
    """`tokenizer_characters`: of the stream's records, however few a chunk has."""
    from undertow import data

    seen = []
    train = data.train_tokenizer
    monkeypatch.setattr(data, "train_tokenizer", lambda shown, *more: seen.append(list(shown)) or train(shown, *more))
    task = Pages()
    opened(task, tmp_path)
    opened(task, tmp_path, tokenizer_characters=10**6)
    opened(task, tmp_path, tokenizer_characters=1)
    every = sum(1 for _ in task.records("train"))
    assert [len(shown) for shown in seen] == [N, every, 1] and every > N
