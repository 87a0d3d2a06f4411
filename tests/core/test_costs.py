"""What runs, counted by hooks: a sweep re-runs the span and nothing else, head and loss run only where asked."""

import pytest
import torch

import undertow as ut
from models import LAYERS, build, ids

T = 12


class Count:
    """Layer evaluations, in passes over all T positions, and rows through the LM head."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.layers, self.head, self.live = 0.0, 0, 0.0
        hooks = [layer.register_forward_pre_hook(self._layer) for layer in self.model.view.layers]
        self.hooks = [*hooks, self.model.get_output_embeddings().register_forward_pre_hook(self._head)]
        return self

    def _layer(self, module, args):
        self.layers += args[0].shape[1] / T
        self.live += torch.is_grad_enabled() * args[0].shape[1] / T

    def _head(self, module, args):
        self.head += args[0].shape[1]

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def count(model, schedule, **arguments):
    with Count(model) as c:
        model(ids(2, T), schedule=schedule, **arguments)
    return c


@pytest.mark.parametrize("start, end, n", [(1, 2, 2), (0, 3, 4), (2, 2, 1)])
@pytest.mark.parametrize("K", [0, 1, 3])
def test_jacobi_costs_layers_plus_k_spans(start, end, n, K):
    c = count(build(time=ut.T2MLR(start, end)), ut.Jacobi(K))
    assert c.layers == LAYERS + K * n
    assert c.head == T


def test_every_schedule_costs_what_it_says():
    model, n = build(time=ut.T2MLR(1, 2)), 2
    for schedule, passes in (
        (ut.Sequential(), 1),
        (ut.Cyclic(4, 3), 4),
        (ut.Cyclic(4, 3, adjoint=2), 5),
        (ut.Chunked(4), 1),
        (ut.Jacobi(2, start="unmixed"), 3),
        (ut.Converge(tol=0.0, G=4), 4),
    ):
        c = count(model, schedule)
        assert c.layers == pytest.approx(LAYERS - n + n * passes), schedule
        assert model(ids(2, T), schedule=schedule).passes == pytest.approx(passes)
        assert c.head == T


def test_sweeps_in_the_loss_run_the_tail_too():
    model = build(time=ut.T2MLR(1, 2))
    c = count(model, ut.Interleaved(2), labels=ids(2, T))
    assert c.layers == pytest.approx(1 + 2 * 3)  # layer 0 once; layers 1..3 in the first sweep and in the two halves
    assert c.head == 2 * T
    assert count(model, ut.Interleaved(2)).head == T  # no loss: each position's logits once


def test_dead_sweeps_run_without_gradient():
    model, n = build(time=ut.T2MLR(1, 2)), 2
    assert count(model, ut.Jacobi(5, backward=1)).live == LAYERS + n
    assert count(model, ut.Cyclic(4, 3, adjoint=3)).live == LAYERS
    assert count(model, ut.Cyclic(4, 3, backward=1)).live == pytest.approx(LAYERS)


def test_no_memory_means_one_sweep():
    model = build(depth=ut.ReuseMap([2, 1, 1, 3]))
    for schedule in (ut.Jacobi(3), ut.Interleaved(2), ut.Converge(), ut.Cyclic(2, 2, adjoint=2), ut.Sequential()):
        assert count(model, schedule).layers == 7


@pytest.mark.parametrize("depth, visits", [(None, LAYERS), (ut.ReuseMap([2, 1, 1, 3]), 7)], ids=str)
@pytest.mark.parametrize("time", [ut.T2MLR(1, 2), ut.LRT()], ids=str)
def test_generation_costs_one_evaluation_per_visit_per_token(depth, visits, time):
    model, x = build(depth=depth, time=time), ids(1, 6)
    calls = []
    for layer in model.view.layers:
        layer.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    head = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: head.append(args[0].shape[1]))
    model.generate(x, max_new_tokens=5, do_sample=False)
    assert calls.count(1) >= 4 * visits and calls[-4 * visits :] == [1] * (4 * visits)
    assert head == [1] * 5


def test_projection_runs_once_a_sweep_when_shared():
    calls = []
    for shared, expected in ((True, 2), (False, 2 * LAYERS)):
        model = build(time=ut.LRT(-1, shared=shared))
        calls.clear()
        for name, module in model.undertow.items():
            if name.startswith(("memory_key", "memory_value")):
                module.register_forward_hook(lambda *a: calls.append(1))
        model(ids(2, T), schedule=ut.Jacobi(0))
        assert len(calls) == expected
