"""Losses, halting, puzzle vectors, optimisers and average, each against its formula."""

import math

import pytest
import tiny_trm as tiny
import torch
import torch.nn.functional as F

from undertow.trm import halting, optimisers
from undertow.trm.ema import EMA
from undertow.trm.halting import least_steps
from undertow.trm.losses import losses, softmax, stablemax
from undertow.trm.optimisers import AdamATan2, rate
from undertow.trm.puzzle_embeddings import PuzzleEmbeddings
from undertow.trm.solving import answers

# ------------------------------------------------------------------ losses


def test_stablemax_is_its_formula():
    logits = torch.tensor([[2.0, -1.0, 0.0], [1.0, 1.0, -3.0]], dtype=torch.float64)
    s = [[3, 1 / 2, 1], [2, 2, 1 / 4]]
    expected = [-math.log(s[0][1] / sum(s[0])), -math.log(s[1][0] / sum(s[1]))]
    assert stablemax(logits, torch.tensor([1, 0])).tolist() == pytest.approx(expected, rel=1e-12)


def test_stablemax_has_its_gradient_everywhere_even_at_one():
    """`1 / (1 - v)` is infinite at v = 1, where the other branch holds: a careless `where` gives NaN there."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([[1.0, 0.0, -2.0, 300.0, -300.0]], dtype=dtype, requires_grad=True)
        stablemax(logits, torch.tensor([2])).sum().backward()
        assert logits.grad.isfinite().all()
    x = torch.tensor([[0.5, -0.7, 1.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: stablemax(v, torch.tensor([1])), x)


@pytest.mark.parametrize("loss", [stablemax, softmax])
def test_cells_without_a_label_cost_nothing(loss):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[1, -100, 2], [-100, -100, -100]])
    found = loss(logits, labels)
    found.sum().backward()
    assert found.shape == (2, 3) and (found[labels == -100] == 0).all() and (found[labels != -100] > 0).all()
    assert not logits.grad[labels == -100].any()
    assert loss(logits.bfloat16(), labels).dtype == torch.float32


def test_softmax_is_cross_entropy():
    logits, labels = torch.randn(2, 3, 5, dtype=torch.float64), torch.randint(5, (2, 3))
    torch.testing.assert_close(softmax(logits, labels), F.cross_entropy(logits.mT, labels, reduction="none"))


def test_the_loss_is_the_published_sum():
    logits, q = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    labels = logits.argmax(-1)
    labels[1, 0] = (labels[1, 0] + 1) % 5  # row 1 is wrong in one cell of three; row 2 has no label
    labels[1, 3], labels[2] = -100, -100
    worth = torch.tensor([0.2, 0.7, 0.9], dtype=torch.float64)
    found = losses(logits, q, labels, "softmax", worth)
    expected = 0.0
    for row, (solved, labelled) in enumerate([(1.0, 4), (0.0, 3), (1.0, 0)]):
        p = logits[row].softmax(-1)
        cells = sum(-math.log(p[i, label]) for i, label in enumerate(labels[row].tolist()) if label != -100)
        halt, go_on = q[row].sigmoid().tolist()
        w = worth[row].item()
        expected += cells / max(labelled, 1)
        expected -= 0.5 * (solved * math.log(halt) + (1 - solved) * math.log(1 - halt))
        expected -= 0.5 * (w * math.log(go_on) + (1 - w) * math.log(1 - go_on))
    assert found.loss.item() == pytest.approx(expected / 3, rel=1e-9)
    assert found.solved_B.tolist() == [True, False, True] and found.labelled_B.tolist() == [True, True, False]
    assert found.accuracy_B.tolist() == pytest.approx([1, 2 / 3, 0])
    without = losses(logits, q, labels, "softmax")
    assert without.loss < found.loss and not without.go_on_B.any()


# ------------------------------------------------------------------ halting


HALTING = {  # changes of the network: whether q_halt is held against q_continue, as published, and not against 0
    "trm": ({}, False),
    "trm-continue": ({"continue_loss": True}, True),
    "singlez": ({"variant": "singlez"}, False),
    "hier6": ({"variant": "hier6"}, False),
    "hrm": ({"variant": "hrm", "layers": 1}, True),
    "transformer": ({"variant": "transformer"}, True),
    "transformer-continue": ({"variant": "transformer", "continue_loss": True}, True),
}


@pytest.mark.parametrize("case", HALTING)
def test_the_carry_of_every_row_is_the_published_loop(case):
    changes, compared = HALTING[case]
    model = tiny.model(**changes)
    with torch.no_grad():
        model.q_head.bias.copy_(torch.tensor([0.5, 0.5]))  # so that the two rules differ
    limit, rows, seed = model.config.max_steps, 6, 3
    carry = None
    state, steps, halted, data = model.start(rows), [0] * rows, [True] * rows, {}
    seen = []
    for step in range(1, 8):
        offered, least = tiny.batch(rows, step), least_steps(seed, step, rows, 0.5, limit)

        carry = halting.first(model, offered) if carry is None else carry
        carry = halting.admit(model, carry, offered)
        vectors = model.vectors(carry.data["puzzle_identifiers"])
        new, _, q = model(carry.state, carry.data["inputs"], vectors)
        worth = halting.worth_of_going_on(model, carry, new, vectors)
        carry = halting.halt(model, carry, new, q, least)

        fresh = model.start(rows)  # published, row by row
        data = {name: x.clone() for name, x in (data or offered).items()}
        state = {name: x.clone() for name, x in state.items()}
        for row in (row for row in range(rows) if halted[row]):
            steps[row] = 0
            for new, old in ((offered, data), (fresh, state)):
                for name in old:
                    old[name][row] = new[name][row]
        vectors = model.vectors(data["puzzle_identifiers"])
        state, _, q = model(state, data["inputs"], vectors)
        after = model(state, data["inputs"], vectors)[2].sigmoid().detach()
        for row in range(rows):
            steps[row] += 1
            last = steps[row] >= limit
            wants = q[row, 0] > q[row, 1] if compared else q[row, 0] > 0
            halted[row] = bool(last or wants) and steps[row] >= least[row]
            target = after[row, 0] if last else max(after[row])
            assert worth[row].item() == pytest.approx(float(target), rel=1e-9)
        seen += halted

        assert carry.steps_B.tolist() == steps and carry.halted_B.tolist() == halted
        torch.testing.assert_close((carry.state, carry.data), (state, data))
    assert 0 < sum(seen) < len(seen)


@pytest.mark.parametrize("case", HALTING)
def test_what_is_trained_of_going_on(case):
    """Only Q-learning trains q_continue; the transformer compares it untrained. Early exit asks what halting asks."""
    changes, compared = HALTING[case]
    model, batch = tiny.model(**changes), tiny.batch(3, 0)
    learned = changes.get("continue_loss", changes.get("variant") == "hrm")
    assert (model.config.q_learning, model.config.compares) == (learned, compared)
    q = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [3.0, -1.0]])
    assert model.wants_to_halt(q).tolist() == ([False, True, True] if compared else [True, False, True])
    first = next(answers(model, batch["inputs"], batch["puzzle_identifiers"]))
    _, _, q = model(model.start(3), batch["inputs"], model.vectors(batch["puzzle_identifiers"]))
    torch.testing.assert_close(first.margin_B, (q[:, 0] - q[:, 1] if compared else q[:, 0]).detach())


def test_least_steps_are_drawn_as_published_and_depend_on_nothing_else():
    drawn = least_steps(0, 1, 20_000, 0.1, 16)
    assert set(drawn.tolist()) == {0, *range(2, 17)}
    assert (drawn > 0).double().mean().item() == pytest.approx(0.1, abs=0.01)
    torch.rand(1)
    assert drawn.equal(least_steps(0, 1, 20_000, 0.1, 16))
    for other in ((1, 1), (0, 2)):
        assert not drawn.equal(least_steps(*other, 20_000, 0.1, 16))
    assert not least_steps(0, 1, 100, 0.0, 16).any() and least_steps(0, 1, 100, 0.5, 1).max() <= 2


# ------------------------------------------------------------------ puzzle vectors


def test_a_step_on_puzzle_vectors_is_sign_sgd_on_the_summed_gradient():
    table = PuzzleEmbeddings(5, 2).double()
    torch.nn.init.normal_(table.table)
    before, ids = table.table.clone(), torch.tensor([3, 1, 3])
    vectors = table(ids)
    assert vectors.is_leaf and vectors.requires_grad and not list(table.parameters())
    (vectors * torch.tensor([[1.0, -4.0], [2.0, 0.0], [-3.0, 5.0]])).sum().backward()
    table.step(ids, vectors.grad, lr=0.1, decay=0.5)
    expected = before.clone()
    expected[1] = before[1] * 0.95 - 0.1 * torch.tensor([1.0, 0.0])
    expected[3] = before[3] * 0.95 - 0.1 * torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(table.table, expected)
    with torch.no_grad():
        assert not table(ids).requires_grad


# ------------------------------------------------------------------ what moves the weights


def test_adam_atan2_is_its_formula():
    b1, b2, lr, decay = 0.8, 0.9, 0.1, 0.3
    p = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    expected, m, v = p.detach().clone(), torch.zeros(7), torch.zeros(7)
    optimiser = AdamATan2([p], lr, (b1, b2), decay)
    for t in range(1, 6):
        p.grad = torch.randn(7, dtype=torch.float64) * (torch.arange(7) > 0)  # the first never has a gradient
        m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
        angle = torch.atan2(m, (v / (1 - b2**t)).sqrt())  # of the plain first moment; its correction stands outside
        expected = expected * (1 - lr * decay) - lr / (1 - b1**t) * angle
        optimiser.step()
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


def test_adam_atan2_knows_no_scale_and_says_what_is_wrong():
    found = []
    for scale in (1.0, 1e-6):
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimiser = AdamATan2([p], 0.1)
        for gradient in ([1.0, -2.0, 3.0], [2.0, 2.0, -1.0]):
            p.grad = torch.tensor(gradient, dtype=torch.float64) * scale
            optimiser.step()
        found.append(p.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="betas=.*0..1"):
        AdamATan2([p], betas=(0.9, 1.0))
    with pytest.raises(ValueError, match="negative"):
        AdamATan2([p], lr=-1.0)


def test_every_parameter_decays_but_puzzle_vectors_are_not_among_them():
    model = tiny.model()
    for name in ("adamw", "adam_atan2"):
        (group,) = optimisers.build(model, name, (0.9, 0.95), 0.3).param_groups
        assert group["weight_decay"] == 0.3 and len(group["params"]) == len(list(model.parameters()))


def test_the_learning_rate_rises_and_then_stays_or_falls():
    assert [rate(step, 10, 4, 1.0) for step in (1, 2, 4, 7, 10)] == [0.25, 0.5, 1, 1, 1]
    assert [rate(step, 8, 0, 0.2) for step in (0, 4, 8)] == pytest.approx([1, 0.6, 0.2])


def test_the_average_follows_the_parameters_alone():
    model = tiny.model()
    ema, expected = EMA(model, 0.75), model.head.weight.detach().clone()
    for i in range(3):
        with torch.no_grad():
            model.head.weight.normal_()
            model.puzzles.table.fill_(i)
        ema.update(model)
        expected = 0.75 * expected + 0.25 * model.head.weight.detach()
    made = ema.averaged(model)
    torch.testing.assert_close(made.head.weight.detach(), expected)
    assert (made.puzzles.table == 2).all() and not made.training and model.training
    assert not made.head.weight.equal(model.head.weight)
