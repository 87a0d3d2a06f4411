"""LRT's evaluation modes: each sweep at its own positions, merged, zero memory, buckets of positions."""

import json
import math

import pytest
import torch

import undertow as ut
from models import V, build, ids
from undertow import reference
from undertow.evaluation.bits import bits_per_byte, modes

T, BYTES = 11, torch.arange(V) % 4  # every fourth token has no byte, like a special one


def rows(B=3, **more):
    """Plain rows, as `collate` takes them; the first label is never a target."""
    x = ids(B, T)
    labels = x.clone()
    labels[0, 5] = -100
    return [{"input_ids": x[b].numpy(), "labels": labels[b].numpy(), **more} for b in range(B)]


def nats_of(logits_BTV, rows):
    """`(-ln p of the next token)_BT` and where there is one, written out."""
    labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
    nats, counted = torch.zeros(labels.shape, dtype=torch.float64), torch.zeros(labels.shape, dtype=torch.bool)
    for b in range(len(rows)):
        for t in range(T - 1):
            counted[b, t] = labels[b, t + 1] != -100
            if counted[b, t]:
                nats[b, t] = -torch.log_softmax(logits_BTV[b, t], -1)[labels[b, t + 1]]
    return nats, counted, torch.where(counted, BYTES[labels.roll(-1, 1).clamp(min=0)], 0)


@pytest.fixture
def model():
    return build(time=ut.LRT(2))


def test_merged_is_each_position_by_the_last_sweep_that_wrote_it(model):
    for schedule in (ut.Interleaved(2), ut.Interleaved(3), ut.Jacobi(2, loss="mean"), ut.Jacobi(1, loss=(1, 3))):
        found = bits_per_byte(model, rows(), BYTES, schedule, batch_size=2, sweeps=True)
        _, parts, _ = reference.sweep(model, schedule, ids(3, T))
        last = torch.full((3, T, V), math.nan, dtype=torch.float64)
        for logits, positions, _ in parts:
            for s, t in enumerate(positions):
                last[:, t] = logits[:, s]
        nats, counted, size = nats_of(last.detach(), rows())
        assert found.nats == pytest.approx(nats[counted].sum().item(), rel=1e-5)
        assert (found.tokens, found.bytes) == (int(counted.sum()), int(size.sum()))
        text = nats[size > 0].sum().item()  # what has no byte costs nats, but no bits per byte
        assert found.text_nats == pytest.approx(text, rel=1e-5) and found.text_nats < found.nats
        assert found.bits_per_byte == pytest.approx(text / math.log(2) / found.bytes, rel=1e-5)


@pytest.mark.parametrize(
    ("schedule", "names"),
    [
        (ut.Interleaved(2), ["full", "interleaved1", "interleaved2"]),
        (ut.Interleaved(1), ["full", "interleaved1"]),
        (ut.Jacobi(2, loss="mean"), ["refine0", "refine1", "refine2"]),
    ],
    ids=str,
)
def test_each_sweep_is_scored_at_its_own_positions(model, schedule, names):
    found = bits_per_byte(model, rows(), BYTES, schedule, batch_size=2, sweeps=True)
    assert [part.name for part in found.sweeps] == names
    _, parts, _ = reference.sweep(model, schedule, ids(3, T))
    for part, (logits, positions, _) in zip(found.sweeps, parts, strict=True):
        whole = torch.zeros(3, T, V, dtype=torch.float64)
        whole[:, positions] = logits.detach()
        nats, counted, size = (x[:, positions] for x in nats_of(whole, rows()))
        total = nats[counted].sum().item()
        assert (part.tokens, part.bytes) == (int(counted.sum()), int(size.sum()))
        assert part.nats_per_token == pytest.approx(total / part.tokens, rel=1e-5)
        text = nats[size > 0].sum().item()
        assert part.bits_per_byte == pytest.approx(text / math.log(2) / part.bytes, rel=1e-5)


def test_one_readout_has_no_sweeps_of_its_own(model):
    for schedule in (None, ut.Converge(), ut.Jacobi(2), ut.Cyclic(4, 2), ut.Sequential()):
        assert bits_per_byte(model, rows(), BYTES, schedule, sweeps=True).sweeps == ()
    plain = build(depth=ut.ReuseMap([2, 1, 1, 1]))
    assert bits_per_byte(plain, rows(), BYTES, ut.Interleaved(2), sweeps=True).sweeps == ()


@pytest.mark.parametrize("time", [ut.LRT(2), ut.T2MLR(1, 2, carry="residual")], ids=["lrt", "t2mlr"])
def test_zero_memory_is_one_pass_that_reads_no_memory(time):
    """Decoding every token with a fresh zero memory (LRT's full-pass sanity check) says the same."""
    model = build(time=time)
    found = modes(model, rows(), BYTES, sweeps=True)
    assert list(found) == ["trained", "decoded", "zero memory"]
    alone = torch.zeros(3, T, V, dtype=torch.float64)
    with torch.no_grad():
        cache = None
        for t in range(T):
            out = model(ids(3, T)[:, t : t + 1], past_key_values=cache, use_cache=True)
            alone[:, t], cache = out.logits[:, 0], out.past_key_values
            cache.memory_BND = torch.zeros_like(cache.memory_BND)
    nats, counted, _ = nats_of(alone, rows())
    assert found["zero memory"].nats == pytest.approx(nats[counted].sum().item(), rel=1e-5)
    assert abs(found["zero memory"].nats - found["decoded"].nats) > 1e-3 * found["decoded"].nats
    if isinstance(time, ut.LRT):  # Interleaved's first sweep is that pass
        assert found["trained"].sweeps[0].nats_per_token == pytest.approx(found["zero memory"].nats_per_token, rel=1e-6)


def test_a_model_without_memory_has_one_mode():
    assert list(modes(build(), rows(), BYTES)) == ["decoded"]


@pytest.mark.parametrize("packed", [False, True])
def test_buckets(model, packed):
    """Position counts from the start of the document; empty buckets are left out, a byteless one has no bits."""
    lengths = [4, 7] if packed else [T]
    position = torch.cat([torch.arange(n) for n in lengths])
    more = {"position_ids": position.numpy()} if packed else {}
    given = rows(**more)
    for b in range(3):
        for t in position.eq(0).nonzero().flatten().tolist():
            given[b]["labels"][t] = -100  # as `Rows` says it: no piece is predicted from the one before
    found = bits_per_byte(model, given, BYTES, ut.Interleaved(2), batch_size=2, bucket=4)
    with torch.no_grad():
        keywords = {"position_ids": position.expand(3, T)} if packed else {}
        logits = model(ids(3, T), schedule=ut.Interleaved(2), **keywords).logits
    nats, counted, size = nats_of(logits, given)
    names = ["0-3", "4-7"] if packed else ["0-3", "4-7", "8-11"]
    assert [part.name for part in found.buckets] == names
    for number, part in enumerate(found.buckets):
        here = counted & (position // 4 == number)
        assert (part.tokens, part.bytes) == (int(here.sum()), int(size[here].sum()))
        assert part.nats_per_token == pytest.approx(nats[here].mean().item(), rel=1e-5)
        text = nats[here & (size > 0)].sum().item()
        assert part.bits_per_byte == pytest.approx(text / math.log(2) / part.bytes, rel=1e-5)
    assert sum(part.tokens for part in found.buckets) == found.tokens


def test_a_bucket_without_a_byte_has_no_bits(model):
    size = torch.zeros(V, dtype=torch.long)
    given = rows(1)
    size[int(given[0]["labels"][1])] = 2
    found = bits_per_byte(model, given, size, ut.Jacobi(0), bucket=1)
    assert found.buckets[0].bits_per_byte is not None
    later = [part for part in found.buckets if part.bytes == 0]
    assert later and all(part.bits_per_byte is None and part.nats_per_token > 0 for part in later)


def test_fewer_tokens_than_a_batch(model):
    """The published evaluator takes no step then, and returns infinity."""
    for schedule in (ut.Sequential(), ut.Interleaved(2), ut.Converge()):
        few = bits_per_byte(model, rows(1), BYTES, schedule, batch_size=64, bucket=256, sweeps=True)
        assert 0 < few.bits_per_byte < 100 and few.tokens == T - 2
        one = bits_per_byte(model, rows(3)[:1], BYTES, schedule, batch_size=1)
        assert few.nats == pytest.approx(one.nats, rel=1e-9)
        assert [part.name for part in few.buckets] == ["0-255"]
        assert few.buckets[0].nats_per_token == pytest.approx(few.nats_per_token)


def test_result_is_plain_and_says_only_what_was_asked(model):
    assert {"sweeps", "buckets"}.isdisjoint(bits_per_byte(model, rows(), BYTES).to_dict())
    result = bits_per_byte(model, rows(), BYTES, ut.Interleaved(2), bucket=4, sweeps=True).to_dict()
    assert isinstance(result["sweeps"], list) and isinstance(result["buckets"], list)
    assert json.loads(json.dumps(result)) == result
    assert set(result["buckets"][0]) == {"name", "nats_per_token", "bits_per_byte", "tokens", "bytes"}


def test_bad_bucket(model):
    with pytest.raises(ValueError, match="bucket=0: must be at least 1"):
        bits_per_byte(model, rows(), BYTES, bucket=0)
