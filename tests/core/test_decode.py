"""The decode loop against Hugging Face's own on the same model: the same tokens, scores and cache, and less work."""

import pytest
import torch
from transformers import GenerationMixin, StoppingCriteria

import undertow as ut
from matrix import padded
from models import LAYERS, build, gap, ids
from undertow import stepper
from undertow.analysis.counts import launches
from undertow.decode import lean, why_not
from undertow.stepper import Stepper
from undertow.versions import CACHE

SLOW = GenerationMixin._sample  # Hugging Face's loop, on `forward`: the definition
SWEEP = dict(schedule=ut.Jacobi(0))  # how a prompt is read is not what is tested here: the cheapest will do
PLANTED = 7
CASES = [
    ("llama", None, None, {}),
    ("mistral", None, ut.T2MLR(1, 2, carry="residual", post_norm=True), {}),
    ("qwen2", ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2), {}),
    ("qwen3", ut.BlockLoop(2, inject=True), None, {}),
    ("undertow_llama", ut.ReuseMap([2, 1, 1, 1]), None, {"position": "fire"}),
    ("undertow_llama", None, ut.T2MLR(1, 2, carry="skip"), {"position": "alibi"}),
    ("undertow_nanochat", None, ut.LRT(shared=False), {}),
    ("nanochat", None, ut.LRT(gates=False), {}),
    ("gpt2", ut.TRMBlock(inner=2), None, {}),
    ("gpt2", ut.TRMBlock(insert=-1, inner=1, form="branch"), None, {}),
    ("gpt2", None, ut.Coconut(PLANTED), {}),
    ("gpt_neox", None, ut.LRT(-2), {}),
]
cases = pytest.mark.parametrize(
    "family, depth, time, config", CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)


def made(model, x, **arguments):
    """What our loop and Hugging Face's make of the same call."""
    arguments = dict(pad_token_id=1, return_dict_in_generate=True, output_scores=True, **SWEEP) | arguments
    arguments = dict(max_new_tokens=6) | arguments
    found = []
    for custom in (None, SLOW):
        torch.manual_seed(3)
        found.append(model.generate(x, custom_generate=custom, **arguments))
    return found


def same(ours, slow, tolerance=1e-6):
    assert torch.equal(ours.sequences, slow.sequences)
    assert len(ours.scores) == len(slow.scores)
    for a, b in zip(ours.scores, slow.scores, strict=True):  # float32, whatever the model is
        finite = b.isfinite()
        assert torch.equal(finite, a.isfinite()) and gap(a[finite], b[finite]) < tolerance


def same_cache(a, b):
    assert a.length == b.length and a.get_seq_length() == b.get_seq_length()
    for x, y in zip(a.layers, b.layers, strict=True):
        assert gap(x.keys, y.keys) < 1e-10 and gap(x.values, y.values) < 1e-10
    for x, y in ((a.memory_BND, b.memory_BND), (a.documents_BT, b.documents_BT)):
        assert (x is None) == (y is None)
        assert x is None or gap(x.double(), y.double()) < 1e-10


@cases
def test_tokens_scores_and_cache_are_those_of_hugging_faces_loop(family, depth, time, config):
    model, (x, mask) = build(family, depth, time, **config), padded(ids(3, 6), [0, 3, 1])
    x[0, -1] = x[1, -2] = PLANTED
    ours, slow = made(model, x, attention_mask=mask, do_sample=False)
    same(ours, slow)
    same_cache(ours[CACHE], slow[CACHE])


@torch.no_grad()
@cases
def test_logits_are_those_of_forward(family, depth, time, config):
    """In float64, one row, token by token; a mark among the new tokens too."""
    model, x = build(family, depth, time, **config), ids(1, 10)
    x[0, 6] = PLANTED
    cache, slow = (model(x[:, :4], use_cache=True, **SWEEP).past_key_values for _ in range(2))
    step = Stepper(model, cache, torch.tensor([[4]]), most=6)
    for t in range(4, 10):
        with torch.inference_mode():
            logits = step(x[:, t : t + 1])
        assert gap(logits, model(x[:, t : t + 1], past_key_values=slow).logits[:, -1]) < 1e-10
    same_cache(step.release(), slow)


MODELS = [(None, ut.T2MLR(1, 2)), (ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2))]
models = pytest.mark.parametrize("depth, time", MODELS, ids=str)


@models
def test_samples_of_a_seed(depth, time):
    model, (x, mask) = build("gpt2", depth, time), padded(ids(2, 6), [0, 2])
    how = dict(do_sample=True, temperature=1.3, top_k=9, top_p=0.9, repetition_penalty=1.2, num_return_sequences=2)
    ours, slow = made(model, x, attention_mask=mask, output_logits=True, **how)
    same(ours, slow)
    assert len({tuple(row.tolist()) for row in ours.sequences}) == 4
    assert gap(torch.stack(ours.logits), torch.stack(slow.logits)) < 1e-6


@models
def test_rows_end_at_different_steps(depth, time):
    """Each of the first two rows has a token among its own that ends it; then come pads."""
    model, (x, mask) = build("gpt2", depth, time), padded(ids(3, 6), [0, 2, 1])
    free = model.generate(x, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=1, **SWEEP)
    ends = [int(free[0, 7]), int(free[1, 10])]
    ours, slow = made(model, x, attention_mask=mask, do_sample=False, eos_token_id=ends)
    same(ours, slow)
    assert len({int((row[6:] != 1).sum()) for row in ours.sequences}) > 1


class Recorder:
    """A streamer that keeps what it gets."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


class Third(StoppingCriteria):
    """Ends a row whose text is divisible by three."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.sum(1) % 3 == 0


def test_streamers_and_criteria_of_ones_own():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, 6)
    ours, slow = Recorder(), Recorder()
    a = model.generate(x, max_new_tokens=5, do_sample=False, streamer=ours, pad_token_id=1)
    b = model.generate(
        x, max_new_tokens=5, do_sample=False, pad_token_id=1,
        custom_generate=lambda model, *given, **more: SLOW(model, *given, streamer=slow, **more),
    )  # fmt: skip
    assert torch.equal(a, b) and ours.got == [x.tolist(), *slow.got] and ours.got[-1] == "end"
    same(*made(model, x, do_sample=False, stopping_criteria=[Third()]))
    same(*made(model, x, do_sample=False, stopping_criteria=[Third()], eos_token_id=int(a[0, 7])))


def test_what_a_prompt_may_bring():
    model, x = build("llama", ut.ReuseMap([1, 2, 1, 1]), ut.LRT(2)), ids(2, 6)
    (first, slow), few = made(model, x, do_sample=False), dict(max_new_tokens=3, do_sample=False)
    plain = first.sequences
    for arguments in (
        dict(memory_mask=torch.zeros_like(x)),
        dict(loops=[2, 1, 1, 3]),
        dict(schedule=ut.Sequential(), prefill_chunk_size=4),
        dict(eos_token_id=int(plain[0, 6]), min_new_tokens=2),
        dict(suppress_tokens=[int(plain[0, 6])]),
    ):
        same(*made(model, x, **few, **arguments))
    more = torch.cat([plain, ids(2, 3, seed=5)], 1)
    again = [model.generate(more, **{CACHE: c[CACHE]}, pad_token_id=1, **few) for c in (first, slow)]
    assert torch.equal(*again)
    marked, x[0, -1] = build("gpt2", time=ut.Coconut(PLANTED)), PLANTED
    same(*made(marked, x, **few, memory_mask=torch.ones_like(x), logits_processor=[_plant]))
    prefix = build("gpt2", ut.TRMBlock(inner=1, prefix=True))
    same(*made(prefix, x, **few, prefix_mask=torch.ones_like(x)))


def _plant(input_ids, scores):
    """Makes the mark the likeliest token now and then."""
    scores[:, PLANTED] += 100.0 * (input_ids.shape[1] % 3 == 0)
    return scores


def test_room_grows(monkeypatch):
    model, (x, mask) = build("mistral", time=ut.LRT(2)), padded(ids(2, 3), [0, 1])
    grown = []
    monkeypatch.setattr(stepper, "LEAST_ROOM", 1)
    monkeypatch.setattr(stepper, "TABLE", 4)
    grow = stepper.Room._grow
    monkeypatch.setattr(stepper.Room, "_grow", lambda room, more: (grow(room, more), grown.append(room.capacity)))
    same(*made(model, x, attention_mask=mask, do_sample=False, max_new_tokens=12))
    assert grown == [6, 12, 15]


def test_a_learned_table_says_where_it_ends():
    model = build("gpt2", time=ut.T2MLR(1, 2))
    with pytest.raises(ValueError, match="97 positions: the backbone's learned position table has 96"):
        model.generate(ids(1, 94), max_new_tokens=5, do_sample=False, pad_token_id=1, **SWEEP)


def test_what_comes_out_can_be_trained_on():
    model = build("gpt2", time=ut.T2MLR(1, 2))
    out = model.generate(
        ids(2, 5), max_new_tokens=3, do_sample=True, pad_token_id=1, return_dict_in_generate=True, output_scores=True
    )
    cache = out[CACHE]
    tensors = [out.sequences, *out.scores, cache.memory_BND, *(x for s in cache.layers for x in (s.keys, s.values))]
    assert not any(x.is_inference() or x.requires_grad for x in tensors)
    model.train()(out.sequences, labels=out.sequences).loss.backward()


# ---------------------------------------------------------------------- what this loop does not do


def test_beams_are_hugging_faces_and_it_says_so():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, 5)
    arguments = dict(max_new_tokens=4, num_beams=3, do_sample=False, pad_token_id=1)
    with pytest.warns(UserWarning, match="Hugging Face's own loop: beam_search"):
        named = model.generate(x, custom_generate=lean, **arguments)
    assert torch.equal(named, model.generate(x, **arguments))


def test_why_not(caplog):
    model, x = build("gpt2", ut.ReuseMap([1, 2, 2, 1])), ids(1, 4)
    arguments = dict(max_new_tokens=2, do_sample=False, pad_token_id=1)
    seen = []

    def spy(model, *given, generation_config, **more):
        seen.append(why_not(model, generation_config, more))
        return lean(model, *given, generation_config=generation_config, **more)

    model.generate(x, custom_generate=spy, **arguments)
    with pytest.warns(UserWarning, match="Hugging Face's own loop"):
        model.generate(x, custom_generate=spy, use_cache=False, **arguments)
        looped = build("gpt2", ut.BlockLoop(3))
        looped.generate(x, custom_generate=spy, exit_rule=ut.Exit("change", 0.1), **arguments)
        model.train().generate(x, custom_generate=spy, **arguments)
        looped.backbone.generate(x, custom_generate=spy, **arguments)
    assert seen[0] is None
    for why, word in zip(seen[1:], ("use_cache", "exit_rule", "training", "undertow.wrap"), strict=True):
        assert word in why
    with caplog.at_level("INFO", "undertow.decode"):
        model.generate(x, use_cache=False, **arguments)
    assert "use_cache" in caplog.text


# ---------------------------------------------------------------------- what a token costs


@torch.no_grad()
def tokens_of(model, x, new=4):
    """Operators of every token after the first two (the room and the rotary tables are made by then)."""
    cache = model(x, use_cache=True).past_key_values
    step = Stepper(model, cache, torch.full((len(x), 1), x.shape[1]), most=new + 2)
    for _ in range(2):
        step(x[:, :1])
    return [launches(lambda: step(x[:, :1])) for _ in range(new)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_plain_token_launches_less_than_the_backbone(family):
    model, x = build(family), ids(2, 8)
    found = tokens_of(model, x)
    assert len({tuple(sorted(f.items())) for f in found}) == 1  # nothing grows with the text
    cache = model.backbone(x, use_cache=True)[CACHE]
    theirs = launches(lambda: model.backbone(x[:, :1], **{CACHE: cache}, use_cache=True))
    assert found[0].total() < theirs.total()
    written = found[0]["copy_"] - theirs["copy_"]
    assert written == 2 * LAYERS and theirs["cat"] - found[0]["cat"] >= 2 * LAYERS  # in place, nothing copied whole


@torch.no_grad()
def test_what_a_memory_adds_to_a_token():
    x = ids(2, 8)
    plain = tokens_of(build("llama"), x)[0]
    products = ("mm", "addmm", "bmm", "linear", "matmul")

    def added(time):
        found = tokens_of(build("llama", time=time), x)
        assert len({f.total() for f in found}) == 1
        return found[0] - plain, sum(found[0][p] - plain[p] for p in products)

    more, matrices = added(ut.T2MLR(1, 2))
    assert matrices == 3 and more["cat"] == 1  # the map of the memory and two gates, which read one [x; m]
    more, matrices = added(ut.LRT())
    assert matrices == 2 + LAYERS  # two maps for all layers, one pair of gates a layer
    assert more["sigmoid"] == LAYERS and more["_fused_rms_norm"] + more["rsqrt"] <= 1
    assert more["cat"] == more["where"] == 0


@torch.no_grad()
def test_a_new_token_runs_every_visit_and_the_head_once():
    model, calls, x = build("llama", ut.ReuseMap([2, 1, 1, 3]), ut.LRT()), [], ids(1, 6)
    step = Stepper(model, model(x, use_cache=True).past_key_values, torch.tensor([[6]]), most=2)
    for module in (*model.view.layers, model.get_output_embeddings()):
        module.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    step(x[:, :1])
    assert calls == [1] * (7 + 1)
    step(x[:, :1])
    with pytest.raises(AssertionError, match="announced"):
        step(x[:, :1])


@pytest.mark.slow
@models
def test_compiled_layers_write_the_same_and_are_compiled_once(depth, time, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    monkeypatch.setattr(stepper, "_compiled", lambda: torch.compile(stepper._call, dynamic=True, backend=counter))
    torch._dynamo.reset()
    model, x = build("llama", depth, time), ids(1, 6)
    plain = model.generate(x, max_new_tokens=4, do_sample=False, pad_token_id=1)
    kwargs = dict(do_sample=False, pad_token_id=1, custom_generate=lean, compiled=True)
    assert torch.equal(model.generate(x, max_new_tokens=4, **kwargs), plain)
    before = counter.frame_count
    model.generate(x, max_new_tokens=12, **kwargs)
    assert before >= 1 and counter.frame_count == before  # no length is new to it
