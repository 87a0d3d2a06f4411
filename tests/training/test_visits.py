"""One look along depth and over sweeps, against hooks on the layers and a loss differentiated by hand."""

import pytest
import torch

import undertow as ut
from models import build, ids
from undertow.training.visits import look


def by_hand(model, x, schedule):
    """Change and gradient norm of every layer of a model that visits each once, the calls of a layer together.

    The last calls that together cover all positions say how it changed: one full sweep, or the strided subsets.
    """
    seen = {n: [] for n in range(len(model.view.layers))}
    hooks = [
        layer.register_forward_hook(lambda _, a, y, n=n: seen[n].append((a[0], y[0] if isinstance(y, tuple) else y)))
        for n, layer in enumerate(model.view.layers)
    ]
    loss = model(x, labels=x, schedule=schedule, use_cache=False).loss
    for hook in hooks:
        hook.remove()
    change, norms = {}, {}
    for n, calls in seen.items():
        moved = torch.cat([((y - a).norm(dim=-1) / a.norm(dim=-1))[0].detach() for a, y in reversed(calls)])
        covered = moved[: x.shape[1]]
        assert sum(len(a[0]) for a, _ in calls) >= len(covered) == x.shape[1]
        change[n] = float(covered.mean())
        total = torch.zeros((), dtype=torch.float64)
        for _, y in calls:
            (g,) = torch.autograd.grad(loss, [y], retain_graph=True, allow_unused=True)
            total += 0 if g is None else g.square().sum()
        norms[n] = float(total.sqrt())
    return change, norms


@pytest.mark.parametrize("schedule", [ut.Jacobi(2), ut.Cyclic(4, 1), ut.Interleaved(2)], ids=str)
def test_each_number_is_what_it_says(schedule):
    model, x = build("gpt2", time=ut.LRT(2, residual=False)), ids(1)  # into keys and values: a layer's input is x
    model.schedule = schedule
    found = look(model, {"input_ids": x})
    change, norms = by_hand(model, x, schedule)
    assert [found[f"visit_change_{n}"] for n in range(4)] == pytest.approx([change[n] for n in range(4)])
    assert [found[f"visit_gradient_{n}"] for n in range(4)] == pytest.approx([norms[n] for n in range(4)])
    with torch.no_grad():
        mine, true = (model(x, schedule=s).memory for s in (schedule, ut.Sequential()))
    far = [float((m - t).norm() / t.norm()) for m, t in zip(mine[0], true[0], strict=True)]
    assert found["residual"] == pytest.approx(sum(far) / len(far)) and found["residual"] > 1e-3
    assert found["memory_norm"] == pytest.approx(float(mine.norm(dim=-1).mean()))
    assert all(p.grad is None for p in model.parameters())


def test_pads_and_documents_of_a_batch():
    """A padded row of two documents says what the forward of the model says: loss, memory, only real positions."""
    model, x = build("gpt2", time=ut.LRT(2, residual=False)), ids(1)
    model.schedule = ut.Jacobi(1)
    alone = look(model, {"input_ids": x})
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(x)], 1)
    labels = padded.masked_fill(mask == 0, -100)
    labels[:, 3] = -100  # predicted by a pad
    found = look(model, {"input_ids": padded, "attention_mask": mask, "labels": labels})
    assert found == pytest.approx(alone, rel=1e-8)
    places = torch.tensor([[*range(5), *range(6)]])
    packed = look(model, {"input_ids": x, "position_ids": places, "labels": x})
    assert packed["residual"] != pytest.approx(alone["residual"], rel=1e-3)


def test_visits_of_a_loop_and_rounds_without_gradient():
    found = look(build("gpt2", depth=ut.ReuseMap([2, 1, 1, 1])), {"input_ids": ids(1)})
    assert {key for key in found} == {f"visit_{what}_{n}" for what in ("change", "gradient") for n in range(5)}
    model = build("gpt2", depth=ut.TRMBlock(2, layers=1))
    found = look(model, {"input_ids": ids(1)})
    dead = [step.index for step in model.program.steps if not step.grad]
    assert dead and all(found[f"visit_gradient_{n}"] == 0 for n in dead)
    assert all(found[f"visit_gradient_{step.index}"] > 0 for step in model.program.steps if step.grad)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_the_adjoint_s_gradient_is_that_of_live_sweeps(checkpointing):
    model, x = build("gpt2", time=ut.T2MLR(1, 2)), ids(1)
    model.checkpointing = checkpointing
    model.schedule = ut.Cyclic(4, 3, adjoint=11)
    solved = look(model, {"input_ids": x})
    assert solved["residual"] < 1e-6
    model.schedule = ut.Jacobi(11)
    assert solved["visit_gradient_3"] == pytest.approx(
        look(model, {"input_ids": x})["visit_gradient_3"], rel=1e-6
    )  # the tail
