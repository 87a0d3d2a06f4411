"""Compiled layers train as plain ones do, and what was compiled serves every sweep, loop and length."""

import copy
import logging

import pytest
import torch

import undertow as ut
from models import build, gap, gradient_gap, gradients, ids
from undertow import store
from undertow.backbone import adapter
from undertow.training import compiling
from undertow.training.compiling import compiled

DRAWN = ut.MiddleLoop(1, 1, 3, sample=0.5)
CASES = {
    "t2mlr, adjoint": ("llama", dict(time=ut.T2MLR(1, 1)), ut.Cyclic(4, 2, adjoint=2)),
    "lrt": ("llama", dict(time=ut.LRT(1)), ut.Interleaved(2)),
    "lrt, fused projection": ("gpt2", dict(time=ut.LRT(1)), ut.Interleaved(2)),
    "loop": ("llama", dict(depth=ut.BlockLoop(2, inject=True)), None),
    "drawn loop, t2mlr, adjoint": ("llama", dict(depth=DRAWN, time=ut.T2MLR(1, 1)), ut.Cyclic(4, 2, adjoint=2)),
    "trm": ("llama", dict(depth=ut.TRMBlock(layers=1)), None),
}


def counting(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    return CompileCounterWithBackend(backend)


def trained(case: str, backend: str, steps: int, checkpointing: bool = False) -> tuple[list[int], set]:
    """Frames compiled after each step, and the depths drawn. On the way: losses and gradients are the plain model's."""
    family, methods, schedule = CASES[case]
    plain = build(family, **methods, num_hidden_layers=3).train()
    if checkpointing:
        plain.gradient_checkpointing_enable()
    model, counter, frames, depths = copy.deepcopy(plain), counting(backend), [], set()
    with torch.no_grad():
        model(ids(), schedule=schedule)  # as an evaluation before training: taps are there, once
    with compiled(model, backend=counter):
        for step in range(steps):
            x, found = ids(2, 12 + step % 2, seed=step), []
            for m in (model, plain):
                torch.manual_seed(step)
                loss = m(x, labels=x, schedule=schedule).loss
                found.append((loss.detach(), gradients(m, loss)))
            (loss, gradient), (plain_loss, plain_gradient) = found
            assert torch.stack([g.norm() for g in plain_gradient.values()]).norm() > 0.1  # there is something to equal
            assert gap(loss, plain_loss) < 1e-6
            assert gradient_gap(gradient, plain_gradient) < 1e-5
            frames.append(counter.frame_count)
            torch.manual_seed(step)
            depths.add(model.depth.draw() if model.depth else None)
    assert all(layer._compiled_call_impl is None for layer in model.view.layers)
    return frames, depths


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_again_from_step_to_step(case):
    """Other rows, lengths and drawn depths."""
    frames, depths = trained(case, "eager", steps=6)
    assert frames[0] > 0 and frames[2:] == [frames[1]] * 4, frames
    assert "drawn" not in case or len(depths) > 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", ["t2mlr, adjoint", "lrt"])
def test_compiled_backwards_too(case, backend):
    """Visits recomputed in backward with one of the two, so that both ways are compiled."""
    frames, _ = trained(case, backend, steps=4, checkpointing=case == "t2mlr, adjoint")
    assert frames[0] > 0 and frames[2:] == [frames[1]] * 2, frames


@pytest.mark.slow
def test_a_projection_tapped_after_its_layer_ran_plain():
    """Layers that two models share: what was compiled without a tap does not serve with one."""
    plain = build("llama", num_hidden_layers=3).train()
    tapped = ut.wrap(plain.backbone, time=ut.LRT(1)).double().train()
    x, schedule = ids(), ut.Jacobi(2)  # no sweep has a mask: each could run what was compiled first
    apart = copy.deepcopy(tapped)
    expected = apart(x, labels=x, schedule=schedule).loss
    with compiled(plain, backend=counting("eager")):
        plain(x, labels=x)
        loss = tapped(x, labels=x, schedule=schedule).loss
    assert gap(loss, expected) < 1e-6


@pytest.mark.slow
def test_the_limit_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(compiling, "LIMIT", 1)
    model, counter, x = build("llama", time=ut.T2MLR(1, 2)).train(), counting("eager"), ids()
    expected = model(x, labels=x, schedule=ut.Cyclic(3, 1)).loss
    with compiled(model, backend=counter):
        loss = model(x, labels=x, schedule=ut.Cyclic(3, 1)).loss
        loss.backward()
    said = [str(w.message) for w in recwarn if "training.compile" in str(w.message)]
    assert len(said) == 1 and "\n" not in said[0] and "compiled 1 times" in said[0]
    assert gap(loss, expected) < 1e-6
    assert not logging.getLogger("torch._dynamo.convert_frame").filters


def test_off_is_off():
    model = build("llama")
    with compiled(model, on=False):
        assert all(layer._compiled_call_impl is None for layer in model.view.layers)


def test_layers_are_compiled_within_and_as_they_were_after():
    model, before = build("llama"), (store.View.update, adapter.mix_taps)
    with compiled(model, backend="eager"):
        assert all(layer._compiled_call_impl is not None for layer in model.view.layers)
        assert store.View.update is not before[0] and adapter.mix_taps is not before[1]
    assert all(layer._compiled_call_impl is None for layer in model.view.layers)
    assert (store.View.update, adapter.mix_taps) == before


@pytest.mark.slow
def test_what_cannot_be_compiled_is_one_line():
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nfound")

    torch._dynamo.reset()  # functions that were given up are not compiled again
    model, x = build("llama", num_hidden_layers=1), ids(1, 4)
    with pytest.raises(ValueError, match="training.compile: no compiler found$"), compiled(model, backend=backend):
        model(x)
