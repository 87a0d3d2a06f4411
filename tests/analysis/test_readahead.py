"""The skip-layer read-out: a cut model against one built with fewer layers, and the numbers written out."""

import pytest
import torch

import undertow as ut
from models import LAYERS, build, gap, ids
from rounding import assert_same, same
from undertow.analysis.readahead import cut, readahead, table

T = 12
CASES = [  # the whole model's methods, how many layers go, the methods of the model with that many fewer
    (dict(time=ut.T2MLR(1, 2)), 1, dict(time=ut.T2MLR(1, 2))),
    (dict(time=ut.T2MLR(1, 2)), 2, dict(time=ut.T2MLR(1, 1))),
    (dict(time=ut.T2MLR(0, 3, carry="residual")), 2, dict(time=ut.T2MLR(0, 1, carry="residual"))),
    (dict(time=ut.T2MLR(1, 2)), 3, {}),  # the edge's target is gone
    (dict(time=ut.LRT(-1)), 1, dict(time=ut.LRT(-1))),
    (dict(time=ut.LRT(1, shared=False)), 2, dict(time=ut.LRT(1, shared=False))),
    (dict(depth=ut.ReuseMap([2, 1, 3, 2])), 1, dict(depth=ut.ReuseMap([2, 1, 3]))),
    (dict(depth=ut.BlockLoop(2, inject=True)), 2, dict(depth=ut.BlockLoop(2, inject=True))),
    (dict(depth=ut.MiddleLoop(1, -2, 3, inject=True)), 2, dict(depth=ut.MiddleLoop(1, 1, 3, inject=True))),
    (dict(depth=ut.TRMBlock(2, inner=2)), 1, dict(depth=ut.TRMBlock(2, inner=2))),
    (dict(depth=ut.TRMBlock(-1, inner=2, layers=1)), 2, dict(depth=ut.TRMBlock(-1, inner=2, layers=1))),
    (dict(depth=ut.ReuseMap([1, 2, 1, 1]), time=ut.T2MLR(1, 3)), 2,
     dict(depth=ut.ReuseMap([1, 2]), time=ut.T2MLR(1, 1))),
]  # fmt: skip


def hand_cut(model, kept, methods, family="llama"):
    """A model of `kept` layers on the weights of the first layers of `model`."""
    count = "n_layer" if family == "gpt2" else "num_hidden_layers"
    small = build(family, seed=5, **methods, **{count: kept}, **({"layer_types": None} if family != "gpt2" else {}))
    theirs = model.state_dict()
    small.load_state_dict({name: theirs[name] for name in small.state_dict()})
    return small


@pytest.mark.parametrize(("methods", "skip", "fewer"), CASES, ids=str)
@torch.no_grad()
def test_cut_equals_a_model_with_fewer_layers(methods, skip, fewer):
    model, x = build(**methods), ids(2, T)
    before, program = model(x).logits, model.program
    hand = hand_cut(model, LAYERS - skip, fewer)
    for schedule in (None, ut.Sequential(), ut.Jacobi(2), ut.Interleaved(2)):
        assert_same(cut(model, skip)(x, schedule=schedule).logits, hand(x, schedule=schedule).logits)
    assert gap(hand(x).logits, before) > 1e-3
    assert model.program is program and same(model(x).logits, before)


@torch.no_grad()
def test_cut_of_another_family_and_of_nothing():
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(2, T)
    assert_same(cut(model, 1)(x).logits, hand_cut(model, 3, dict(time=ut.T2MLR(1, 2)), "gpt2")(x).logits)
    assert_same(cut(model, 0)(x).logits, model(x).logits)


@torch.no_grad()
def test_weights_and_random_numbers_are_untouched():
    model = build(time=ut.LRT(2))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    readahead(model, rows(2), skip=1)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(a is b for a, b in zip(cut(model, 1).parameters(), model.parameters(), strict=True))


def rows(B, **more):
    x = ids(B, T)
    return [{"input_ids": x[b].numpy(), **{k: v[b].numpy() for k, v in more.items()}} for b in range(B)]


def written_out(logits_BTV, x_BT, pairs, ahead):
    """Mean ln p, top-1 and mean p of x_{t+k} in the logits at t, over `pairs(b, t, t + k)`."""
    found = []
    for k in range(1, ahead + 1):
        p = [
            (
                torch.softmax(logits_BTV[b, t], -1)[x_BT[b, t + k]].item(),
                int(logits_BTV[b, t].argmax()) == x_BT[b, t + k],
            )
            for b in range(len(x_BT))
            for t in range(x_BT.shape[1] - k)
            if pairs(b, t, t + k)
        ]
        n = len(p)
        nats = sum(torch.tensor(q).log().item() for q, _ in p) / n
        found.append((nats, sum(int(hit) for _, hit in p) / n, sum(q for q, _ in p) / n, n))
    return found


def matches(result, expected):
    columns = zip(result.log_probability, result.accuracy, result.probability, result.tokens, strict=True)
    for got, want in zip(columns, expected, strict=True):
        assert got[:3] == pytest.approx(want[:3], rel=1e-5, abs=1e-9) and got[3] == want[3]


@pytest.mark.parametrize("skip", [0, 1, 2])
@torch.no_grad()
def test_numbers(skip):
    model, x = build(time=ut.T2MLR(1, 2)), ids(3, T)
    x[:, 2::2] = x[:, :1]  # repeats, so that some argmax is right
    given = [{"input_ids": row.numpy()} for row in x]
    result = readahead(model, given, skip, ahead=5, batch_size=2)
    logits = cut(model, skip)(x).logits
    matches(result, written_out(logits, x, lambda b, t, u: True, 5))
    assert (result.skip, result.layers) == (skip, LAYERS - skip)


@torch.no_grad()
def test_documents_padding_and_labels():
    """A pair counts inside one document, between real tokens, where the later one is a target."""
    model, x = build(time=ut.LRT(2)), ids(2, T)
    position = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, T).clone()
    mask = torch.ones(2, T, dtype=torch.long)
    mask[1, 9:], position[1, 9:] = 0, 0  # right padding, as packed rows have it
    labels = torch.where(position > 0, x, -100)
    labels[0, 3] = -100
    given = rows(2, position_ids=position, attention_mask=mask, labels=labels)
    document = torch.tensor([0] * 5 + [1] * 7)
    logits = cut(model, 1)(x, attention_mask=mask, position_ids=position).logits
    expected = written_out(
        logits,
        x,
        lambda b, t, u: document[t] == document[u] and mask[b, u] == 1 and labels[b, u] != -100,
        4,
    )
    result = readahead(model, given, 1, ahead=4)
    matches(result, expected)
    assert result.tokens[0] == 2 * 10 - 3 - 1

    left = torch.ones(2, T, dtype=torch.long)
    left[1, :4] = 0  # left padding, positions derived
    result = readahead(model, rows(2, attention_mask=left), 1, ahead=2)
    logits = cut(model, 1)(x, attention_mask=left).logits
    matches(result, written_out(logits, x, lambda b, t, u: left[b, t] == 1, 2))


@torch.no_grad()
def test_schedule_changes_what_is_read():
    model = build(time=ut.LRT(-1))
    true, zero = readahead(model, rows(2), 1), readahead(model, rows(2), 1, schedule=ut.Jacobi(0))
    assert true.log_probability != zero.log_probability
    assert true == readahead(model, rows(2), 1, batch_size=1)


@pytest.mark.parametrize(
    ("keywords", "line"),
    [
        (dict(skip=LAYERS), rf"skip={LAYERS}: the model has {LAYERS} layers; allowed are 0..{LAYERS - 1}"),
        (dict(skip=-1), "skip=-1"),
        (dict(ahead=0), "ahead=0: must be at least 1"),
        (dict(ahead=T), f"no two tokens of one document {T} apart"),
    ],
    ids=str,
)
def test_bad_input(keywords, line):
    with pytest.raises(ValueError, match=line):
        readahead(build(), rows(1), **keywords)


def test_table():
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as captured:
        console.print(table([readahead(build(), rows(2), skip) for skip in (0, 1)]))
    lines = captured.get().splitlines()
    assert "t+5" in lines[1] and lines[2].split()[:3] == [str(LAYERS), "log", "p"] and len(lines) == 8
