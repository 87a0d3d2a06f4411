"""Compiled layers train as plain ones do, and what was compiled serves every sweep, loop and length."""

import copy
import logging

import pytest
import torch

import undertow as ut
from models import build, gap, gradient_gap, gradients, ids
from undertow.training import compiling
from undertow.training.compiling import compiled

LOOP = ut.MiddleLoop(1, 2, 3, sample=0.5)
CASES = {
    "t2mlr": (dict(time=ut.T2MLR(1, 2)), ut.Cyclic(4, 2, adjoint=2)),
    "lrt": (dict(time=ut.LRT(2)), ut.Interleaved(2)),
    "loops": (dict(depth=LOOP, time=ut.T2MLR(1, 2)), ut.Cyclic(4, 2)),
    "trm": (dict(depth=ut.TRMBlock(layers=1)), None),
}


def counting(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    return CompileCounterWithBackend(backend)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nothing_is_compiled_again_from_step_to_step(case):
    """Other rows, lengths and drawn depths. On the way: losses and gradients are the plain model's."""
    methods, schedule = CASES[case]
    plain = build("llama", **methods).train()
    model, counter, frames, depths = copy.deepcopy(plain), counting("eager"), [], set()
    with compiled(model, backend=counter):
        for step in range(6):
            x, outs = ids(2, 12 + step % 2, seed=step), []
            for m in (plain, model):
                torch.manual_seed(step)
                outs.append(m(x, labels=x, schedule=schedule))
            assert gap(outs[1].loss, outs[0].loss) < 1e-6
            assert gradient_gap(*(gradients(m, o.loss) for m, o in zip((model, plain), outs, strict=True))) < 1e-5
            frames.append(counter.frame_count)
            if case == "loops":
                torch.manual_seed(step)
                depths.add(model.depth.draw())
    assert frames[0] > 0 and frames[2:] == [frames[2]] * 4, frames
    assert case != "loops" or len(depths) > 2
    assert all(layer._compiled_call_impl is None for layer in model.view.layers)


@pytest.mark.slow
def test_the_limit_is_said_once(monkeypatch, recwarn):
    monkeypatch.setattr(compiling, "LIMIT", 1)
    model, counter, x = build("llama", time=ut.T2MLR(1, 2)).train(), counting("eager"), ids()
    with compiled(model, backend=counter):
        model(x, labels=x, schedule=ut.Cyclic(3, 1)).loss.backward()
    said = [str(w.message) for w in recwarn if "training.compile" in str(w.message)]
    assert said and "\n" not in said[0] and "compiled 1 times" in said[0]
    assert not logging.getLogger("torch._dynamo.convert_frame").filters


def test_off_is_off():
    model = build("llama")
    with compiled(model, on=False):
        assert all(layer._compiled_call_impl is None for layer in model.view.layers)
