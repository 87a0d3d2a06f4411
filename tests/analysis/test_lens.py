"""The lens of visits, of sweeps and of the memory, each against the slow obvious way."""

import pytest
import torch

import undertow as ut
from models import build, gap, ids
from undertow.analysis import lens

BOTH = {"depth": ut.ReuseMap([2, 1, 2, 1]), "time": ut.T2MLR(1, 2)}


@torch.no_grad()
def test_of_a_plain_model_it_is_what_hooks_on_its_layers_see():
    model, x = build("gpt2"), ids()
    left = []
    hooks = [
        layer.register_forward_hook(lambda _, __, y: left.append(y[0] if isinstance(y, tuple) else y))
        for layer in model.backbone.transformer.h
    ]
    logits = model.backbone(x, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    expected = [model.backbone.lm_head(model.backbone.transformer.ln_f(h)) for h in left]
    found = list(lens.visits(model, x))
    assert [step.block for step, _ in found] == [0, 1, 2, 3]
    assert all(gap(a, b) < 1e-9 for (_, a), b in zip(found, expected, strict=True))
    assert gap(found[-1][1], logits) < 1e-9


@pytest.mark.parametrize("schedule", [None, ut.Jacobi(2), ut.Interleaved(2), ut.Cyclic(4, 2, adjoint=2)], ids=str)
@pytest.mark.parametrize(
    "methods",
    [BOTH, {"time": ut.LRT(2)}, {"time": ut.LRT(-1)}, {"depth": ut.TRMBlock(-1, layers=1)}, {"depth": ut.TRMBlock(2)}],
    ids=["loop and memory", "every layer", "last layer", "block after the norm", "block in the middle"],
)
@torch.no_grad()
def test_the_last_visit_says_what_the_model_says(methods, schedule):
    model, x = build("gpt2", **methods), ids()
    steps, logits = zip(*lens.visits(model, x, schedule=schedule), strict=True)
    assert [step.index for step in steps] == list(range(len(model.program.steps)))
    assert gap(logits[-1], model(x, schedule=schedule or ut.Converge()).logits) < 1e-9
    assert gap(logits[0], logits[-1]) > 1e-3


@torch.no_grad()
def test_of_the_true_recurrence_it_is_what_single_tokens_leave():
    """Positions one after the other through the cache, the state of every visit caught by hooks."""
    model, x = build("gpt2", time=ut.T2MLR(1, 2, carry="residual")), ids(1)
    seen, cache = [[] for _ in range(4)], None
    hooks = [
        layer.register_forward_hook(lambda _, __, y, n=n: seen[n].append(y[0] if isinstance(y, tuple) else y))
        for n, layer in enumerate(model.backbone.transformer.h)
    ]
    for t in range(x.shape[1]):
        cache = model(x[:, t : t + 1], past_key_values=cache, use_cache=True, schedule=ut.Sequential()).past_key_values
    for hook in hooks:
        hook.remove()
    states = [torch.cat(states, 1) for states in seen]
    for (_, logits), h in zip(lens.visits(model, x), states, strict=True):
        assert gap(logits, model.backbone.lm_head(model.backbone.transformer.ln_f(h))) < 1e-8


@pytest.mark.parametrize(
    ("schedule", "cuts"),
    [
        (ut.Jacobi(3), [ut.Jacobi(0), ut.Jacobi(1), ut.Jacobi(2), ut.Jacobi(3)]),
        (ut.Cyclic(4, 2), [ut.Jacobi(0), ut.Cyclic(4, 1), ut.Cyclic(4, 2)]),
        (ut.Cyclic(4, 1, adjoint=1), [ut.Jacobi(0), ut.Cyclic(4, 1), ut.Cyclic(4, 1, adjoint=1)]),
        (ut.Sequential(), [ut.Sequential()]),
        (ut.Chunked(4), [ut.Chunked(4)]),
    ],
    ids=str,
)
@torch.no_grad()
def test_sweeps_are_the_schedule_cut_off(schedule, cuts):
    model, x = build("gpt2", **BOTH), ids()
    found = list(lens.sweeps(model, x, schedule=schedule))
    assert len(found) == len(cuts)
    for (_, logits, memory), cut in zip(found, cuts, strict=True):
        out = model(x, schedule=cut)
        assert gap(memory, out.memory) < 1e-9
        assert gap(logits, out.logits) < 1e-9
    assert len(cuts) == 1 or gap(found[0][1], found[-1][1]) > 1e-3


@torch.no_grad()
def test_the_memory_s_effect_and_what_follows():
    """Against log-probabilities taken one by one, of a model with and without its memory, padded and not."""
    model, x = build("gpt2", time=ut.LRT(2)), ids(1)
    effect = lens.memory_effect(model, x)
    true = model(x, schedule=ut.Sequential()).logits
    ablated = model(x, schedule=ut.Sequential(), memory_mask=torch.zeros_like(x)).logits
    for t in range(x.shape[1] - 1):
        said = [float(torch.log(torch.softmax(logits[0, t], -1)[x[0, t + 1]])) for logits in (true, ablated)]
        assert float(effect[0, t]) == pytest.approx(said[0] - said[1], abs=1e-9)
    assert effect[0, -1].isnan() and effect[0, :-1].abs().max() > 1e-3
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x], 1)
    mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(x)], 1)
    again = lens.memory_effect(model, padded, mask)
    assert again[0, :3].isnan().all() and gap(again[0, 3:-1], effect[0, :-1]) < 1e-8
    assert lens.memory_effect(build("gpt2"), x) is None


@torch.no_grad()
def test_a_reading_of_a_text():
    model, x = build("gpt2", **BOTH), ids()
    seen = lens.read(model, x, schedule=ut.Cyclic(4, 1))
    assert [view.name for view in seen.visits][:3] == ["layer 0, visit 1 of 2", "layer 0, visit 2 of 2", "layer 1"]
    assert [view.name for view in seen.sweeps] == ["1 pass", "Cyclic(G=4, n=1)"]
    logp = torch.log_softmax(model(x, schedule=ut.Cyclic(4, 1)).logits, -1)
    for view in (seen.visits[-1], seen.sweeps[-1]):
        assert gap(view.logp_BT[:, :-1], logp[:, :-1].gather(-1, x[:, 1:, None])[..., 0]) < 1e-9
        assert torch.equal(view.best_BT, logp.argmax(-1)) and gap(view.best_logp_BT, logp.amax(-1)) < 1e-9
    assert seen.memory_BT.shape == x.shape
    plain = lens.read(build("gpt2"), x)
    assert plain.memory_BT is None and [view.name for view in plain.sweeps] == ["one sweep"]
