"""Exit rules against the same thing written the slow way: token by token, no cache, every row alone."""

import json

import numpy as np
import pytest
import torch

import undertow as ut
from matrix import padded
from models import LAYERS, V, build, gap, ids
from rounding import assert_same, same
from undertow.analysis.flops import layer_evaluations
from undertow.evaluation.bits import bits_per_byte
from undertow.evaluation.exits import exits
from undertow.exits import Exit, loops_of

T = 8
R = 4
MIDDLE = ut.MiddleLoop(1, 2, R, inject="concat")


@torch.no_grad()
def slowly(model, x, rule):
    """`(logits_TV, rounds)` of one text. What a visit attends to is made anew from what it was called with before.

    Where a token did not run a round, its place there is taken by what it had in its last round.
    """
    gpt2, d = model.backbone.transformer, model.depth
    start, end = (d.start, d.end) if hasattr(d, "start") else (0, LAYERS - 1)
    called: dict = {}  # visit -> what every token so far called it with
    logits, counts = [], []

    def visit(place, layer, h):
        called.setdefault(place, []).append(h)
        return gpt2.h[layer](torch.cat(called[place], 1))[:, -1:]

    def coda(h, keep):
        before = {place: list(found) for place, found in called.items()}
        for layer in range(end + 1, LAYERS):
            h = visit(("coda", layer), layer, h)
        if not keep:
            called.clear()
            called.update(before)
        return model.backbone.lm_head(gpt2.ln_f(h))[0, 0]

    for t, token in enumerate(x):
        h = gpt2.wte(token)[None, None] + gpt2.wpe(torch.tensor([[t]]))
        for layer in range(start):
            h = visit(("prelude", layer), layer, h)
        e, p = h, None
        for r in range(1, d.times + 1):
            old, old_p = h, p
            if d.inject == "concat":
                h = torch.cat([h, e], -1) @ model.undertow["inject"].map.weight.T
            elif d.inject and r > 1:
                h = h + e
            for layer in range(start, end + 1):
                h = visit((r, layer), layer, h)
            p = coda(h, keep=False).softmax(-1)
            if rule.rule == "fixed":
                leaves = r >= rule.threshold
            elif rule.rule == "change":
                leaves = (h - old).norm() / old.norm() < rule.threshold
            elif rule.rule == "entropy":
                leaves = -(p * p.log()).sum() < rule.threshold
            else:
                leaves = old_p is not None and (p * (p / old_p).log()).sum() < rule.threshold
            if r >= rule.least and (leaves or r == rule.most):
                break
        for skipped in range(r + 1, d.times + 1):
            for layer in range(start, end + 1):
                called.setdefault((skipped, layer), []).append(called[r, layer][-1])
        logits.append(coda(h, keep=True))
        counts.append(r)
    return torch.stack(logits), counts


def median_rule(model, x, name, **options):
    """A threshold that about half of the tokens reach early: the rule must have something to decide."""
    low, high = 1e-6, 1e3
    for _ in range(12):  # no finer: at a token's own value, rounding would decide
        middle = (low * high) ** 0.5
        with torch.no_grad():
            counted = model(x, exit_rule=Exit(name, middle, **options)).rounds.double().mean()
        low, high = (middle, high) if counted > (1 + R) / 2 else (low, middle)
    return Exit(name, high, **options)


DEPTHS = [MIDDLE, ut.MiddleLoop(1, 2, R, inject=True), ut.MiddleLoop(0, 1, R), ut.BlockLoop(R, inject=True)]


@pytest.mark.parametrize(
    "depth, name",
    [
        pytest.param(
            depth, name, marks=() if depth is MIDDLE or name == "change" else pytest.mark.slow, id=f"{depth}-{name}"
        )
        for depth in DEPTHS
        for name in ("fixed", "change", "entropy", "kl")
    ],
)  # every rule on one loop, one rule on every loop
def test_the_rule_written_the_slow_way(depth, name):
    """Logits and rounds of every row, though rows of one batch leave at different rounds."""
    model, x = build("gpt2", depth=depth), ids(3, T)
    rule = Exit("fixed", 2) if name == "fixed" else median_rule(model, x, name)
    with torch.no_grad():
        out = model(x, exit_rule=rule)
    if name != "fixed":
        assert len(out.rounds.unique()) > 1
    for b in range(3):
        logits, counts = slowly(model, x[b], rule)
        assert out.rounds[b].tolist() == counts
        assert gap(out.logits[b], logits) < 1e-9


def test_least_and_most_bound_every_rule():
    model, x = build("gpt2", depth=MIDDLE), ids(2, T)
    for rule in (Exit("change", 1e9, least=3), Exit("kl", 0.0, most=3), Exit("entropy", 1e9, least=2, most=3)):
        with torch.no_grad():
            out = model(x, exit_rule=rule)
        assert gap(out.logits[0], slowly(model, x[0], rule)[0]) < 1e-9
        assert out.rounds.unique().tolist() == [2 if rule.rule == "entropy" else 3]
    with torch.no_grad():
        assert model(x, exit_rule=Exit("change", 0.0, most=99)).rounds.unique().tolist() == [R]
        assert model(x, exit_rule=Exit("fixed", 1, least=3)).rounds.unique().tolist() == [3]


LOOPS = [*DEPTHS, *(ut.TRMBlock(at, form=form, inner=2, outer=R, gate=0.5) for at, form in
                    ((None, "post"), (-1, "post"), (0, "branch"), (2, "dual")))]  # fmt: skip
TIMES = [None, ut.T2MLR(1, 2), ut.T2MLR(0, -1, carry="residual"), ut.LRT(2)]


@pytest.mark.parametrize(
    "depth, time",
    [
        pytest.param(depth, time, marks=() if i in (0, 6) or j == 1 else pytest.mark.slow, id=f"{depth}-{time}")
        for i, depth in enumerate(LOOPS)
        for j, time in enumerate(TIMES)
    ],
)  # every memory in a loop of layers and in one of a block, one memory in every loop
@torch.no_grad()
def test_never_leaving_is_the_model_and_leaving_after_n_the_model_with_n(depth, time):
    """Both to rounding: what changes is only that it goes token by token. The memory, too."""
    model, x = build("gpt2", depth=depth, time=time), ids(2, T)
    full = model(x)
    for name in ("change", "entropy", "kl"):
        out = model(x, exit_rule=Exit(name, 0.0))
        assert gap(out.logits, full.logits) < 1e-12
        assert out.rounds.tolist() == [[R] * T] * 2
        if time is not None:
            assert gap(out.memory, full.memory) < 1e-9
    for n in (1, 3):
        out, other = model(x, exit_rule=Exit("fixed", n)), model(x, loops=n)
        assert gap(out.logits, other.logits) < 1e-9 and gap(out.logits, full.logits) > 1e-6
        assert out.rounds.tolist() == [[n] * T] * 2
        if time is not None:
            assert gap(out.memory, other.memory) < 1e-9


@torch.no_grad()
def test_token_by_token_without_leaving_is_the_cached_model():
    """Every key and value; the logits but for the LM head, which runs on all positions at once."""
    model, x = build("gpt2", depth=MIDDLE), ids(2, T)
    cache, parts = None, []
    for t in range(T):
        out = model(x[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    out = model(x, exit_rule=Exit("change", 0.0), use_cache=True)
    for mine, wanted in zip(out.past_key_values.layers, cache.layers, strict=True):
        assert same(mine.keys, wanted.keys) and same(mine.values, wanted.values)
    assert gap(out.logits, torch.cat(parts, 1)) < 1e-12


BLOCK = ut.TRMBlock(inner=1, outer=R, gate=1.0)


@pytest.mark.parametrize("time", [None, ut.T2MLR(1, 2)], ids=str)
@pytest.mark.parametrize(
    "depth, name",
    [
        (MIDDLE, "change"),
        (BLOCK, "kl"),
        pytest.param(MIDDLE, "kl", marks=pytest.mark.slow),
        pytest.param(BLOCK, "change", marks=pytest.mark.slow),
    ],
    ids=str,
)
@torch.no_grad()
def test_rows_pads_and_the_cache_change_nothing(depth, name, time):
    """A row of a padded batch equals the row alone; in pieces with a cache equals at once; packed equals separate."""
    model, pads = build("gpt2", depth=depth, time=time), [0, 3, 1]
    x, mask = padded(ids(3, T), pads)
    rule = median_rule(model, ids(3, T), name)
    batch = model(x, attention_mask=mask, exit_rule=rule)
    for b, n in enumerate(pads):
        single = model(x[b : b + 1, n:], exit_rule=rule)
        assert gap(batch.logits[b, n:], single.logits[0]) < 1e-9
        assert torch.equal(batch.rounds[b, n:], single.rounds[0])
    cache, parts, start = None, [], 0
    for size in (3, 1, 2, 1, 1):
        stop = start + size
        out = model(
            x[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True, exit_rule=rule
        )
        cache, start = out.past_key_values, stop
        parts.append(out.logits)
    real = mask.bool()
    assert gap(torch.cat(parts, 1)[real], batch.logits[real]) < 1e-9
    positions = torch.cat([torch.arange(3), torch.arange(T - 3)])[None]
    packed = model(x[:1], position_ids=positions, exit_rule=rule)
    separate = [model(piece, exit_rule=rule) for piece in (x[:1, :3], x[:1, 3:])]
    assert gap(packed.logits, torch.cat([s.logits for s in separate], 1)) < 1e-9
    changed = x[:1].clone()
    changed[:, 5] = (x[:1, 5] + 1) % V
    assert_same(model(changed, exit_rule=rule).logits[:, :5], model(x[:1], exit_rule=rule).logits[:, :5])


@pytest.mark.parametrize("time", [None, ut.LRT(2)], ids=str)
@torch.no_grad()
def test_generate_with_a_rule(time):
    """Greedy generate == argmax of forwards under the same rule; left-padded rows; beams == their text scored again."""
    model = build("gpt2", depth=MIDDLE, time=time)
    x, mask = padded(ids(2, 6), [0, 2])
    rule, new = median_rule(model, ids(3, T), "change"), 4
    out = model.generate(x, attention_mask=mask, exit_rule=rule, max_new_tokens=new, do_sample=False, pad_token_id=1)
    for b, n in enumerate([0, 2]):
        text = x[b : b + 1, n:]
        for _ in range(new):
            text = torch.cat([text, model(text, exit_rule=rule).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(text[0], out[b, n:])
    beams = model.generate(
        x[:1], exit_rule=rule, max_new_tokens=new, num_beams=3, num_return_sequences=3, do_sample=False,
        length_penalty=0.0, pad_token_id=1, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for text, score in zip(beams.sequences, beams.sequences_scores, strict=True):
        nats = torch.log_softmax(model(text[None], exit_rule=rule).logits[0, :-1], -1)
        nats = nats.gather(-1, text[1:, None])[-new:].sum()
        assert abs(float(nats - score)) < 1e-5
    deeper = model.generate(
        x[:1], exit_rule=Exit("fixed", 6), loops=8, max_new_tokens=new, do_sample=False, pad_token_id=1
    )
    assert torch.equal(deeper, model.generate(x[:1], loops=6, max_new_tokens=new, do_sample=False, pad_token_id=1))


@torch.no_grad()
def test_a_loop_that_all_rows_left_runs_no_further(monkeypatch):
    """What is saved is saved: layers really called, for a batch as slow as its slowest row."""
    model, x = build("gpt2", depth=MIDDLE), ids(2, T)
    calls = [0]
    for layer in model.backbone.transformer.h:
        layer.register_forward_hook(lambda *a: calls.__setitem__(0, calls[0] + 1))
    for name in ("change", "kl"):
        rule = median_rule(model, x, name)
        calls[0] = 0
        rounds = model(x[:1], exit_rule=rule).rounds
        assert calls[0] == float(rule.evaluations(model.program, rounds).sum())
        calls[0] = 0
        rounds = model(x, exit_rule=rule).rounds.amax(0)
        assert calls[0] == float(rule.evaluations(model.program, rounds).sum())


def rows_of(x):
    return [{"input_ids": row.numpy(), "labels": row.numpy()} for row in x]


def test_bits_rounds_and_savings_of_every_rule():
    model, x = build("gpt2", depth=MIDDLE), ids(5, T)
    sizes = np.arange(V) % 3  # a third is special tokens, which no bits per byte count
    half = median_rule(model, x, "change")
    rules = [Exit("kl", 0.0), Exit("fixed", 2), half]
    full, two, change = exits(model, rows_of(x), sizes, rules, batch_size=2)
    plain = bits_per_byte(model, rows_of(x), sizes)
    assert full.bits_per_byte == pytest.approx(plain.bits_per_byte, rel=1e-6) and full.rounds == R
    whole = layer_evaluations(model)
    assert full.saved == pytest.approx(1 - (1 + 2 * R + R) / whole) and full.saved < 0  # the coda in every round
    assert (two.rounds, two.rule) == (2, "fixed:2") and two.saved == pytest.approx(1 - (1 + 4 + 1) / whole)
    assert 1 < change.rounds < R and change.saved == pytest.approx(1 - (2 + 2 * change.rounds) / whole)
    assert json.loads(json.dumps(full.to_dict()))["rule"] == "kl:0"
    with pytest.raises(ValueError, match="no validation rows"):
        exits(model, [], sizes, rules)
    with pytest.raises(ValueError, match="no byte"):
        exits(model, rows_of(x), np.zeros(V, int), rules[:1])


def test_the_loop_is_found_in_the_plan():
    trm = loops_of(build("gpt2", depth=ut.TRMBlock(1, layers=1, inner=3, outer=2)).program)
    assert [len(part) for part in (trm.before, *trm.rounds, trm.after)] == [1, 4, 4, 3]
    middle = loops_of(build("gpt2", depth=MIDDLE).program)
    assert [[s.block for s in steps] for steps in middle.rounds] == [[1, 2]] * R
    one = loops_of(build("gpt2", depth=ut.ReuseMap([1, 3, 1, 1])).program)
    assert [[s.block for s in steps] for steps in one.rounds] == [[1]] * 3


@pytest.mark.parametrize(
    "depth", [None, ut.MiddleLoop(1, 2, 1), ut.ReuseMap([2, 2, 1, 1]), ut.ReuseMap([2, 1, 2, 1]), ut.TRMBlock(outer=1)]
)
@torch.no_grad()
def test_without_one_loop_there_is_a_line(depth):
    with pytest.raises(ValueError, match="exit_rule: "):
        build("gpt2", depth=depth)(ids(), exit_rule=Exit("change", 0.1))


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Exit("margin", 0.1), "rule='margin'"),
        (lambda: Exit("fixed", 0), "threshold=0"),
        (lambda: Exit("fixed", 1.5), "threshold=1.5"),
        (lambda: Exit("kl", -0.1), "threshold=-0.1"),
        (lambda: Exit("kl", float("nan")), "threshold=nan"),
        (lambda: Exit("kl", 0.1, least=0), "least=0"),
        (lambda: Exit("kl", 0.1, least=3, most=2), "least=3, most=2"),
        (lambda: Exit.parse("kl"), "'kl'"),
        (lambda: Exit.parse("margin:1"), "rule='margin'"),
        (lambda: build("gpt2", depth=MIDDLE)(ids(), exit_rule=Exit("kl", 0.1)), "no_grad"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_rule_as_text():
    assert Exit.parse("kl:5e-4") == Exit("kl", 5e-4) and Exit.parse("fixed:4") == Exit("fixed", 4)
    assert str(Exit("kl", 5e-4)) == "kl:0.0005"


@torch.no_grad()
def test_a_prefix_is_refused():
    model, x = build("gpt2", depth=ut.TRMBlock(prefix=True)), ids()
    with pytest.raises(ValueError, match="both directions"):
        model(x, prefix_mask=torch.ones_like(x), exit_rule=Exit("kl", 0.1))
    assert gap(model(x, exit_rule=Exit("kl", 0.0)).logits, model(x).logits) < 1e-12


@torch.no_grad()
def test_other_families_and_precisions():
    for family in ("llama", "mistral"):
        model, x = build(family, depth=MIDDLE), ids(2, T)
        assert gap(model(x, exit_rule=Exit("entropy", 0.0)).logits, model(x).logits) < 1e-5
        low = model.to(torch.bfloat16)
        assert low(x, exit_rule=Exit("kl", 1e-3)).logits.isfinite().all()
