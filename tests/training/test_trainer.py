"""Parameter groups, budgets, precision, metrics files."""

import pytest
import torch

from undertow.recipe import RecipeError, Training
from undertow.training import budget, precision, run
from undertow.training.callbacks import Curve, read_metrics
from undertow.training.trainer import parameter_groups


def test_groups_decay_matrices_only_and_scale_our_learning_rate(recipe):
    model = run.build_model(recipe)
    groups = parameter_groups(model, learning_rate=0.1, weight_decay=0.2, recurrent_lr=3.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            ours = names[id(parameter)].startswith("undertow.")
            assert group["lr"] == pytest.approx(0.3 if ours else 0.1)
            assert group["weight_decay"] == (0.2 if parameter.ndim >= 2 else 0.0)
    assert {group["lr"] for group in groups} == {0.1, 0.1 * 3.0}


def test_the_first_limit_ends_training():
    limits = Training(batch_size=4, accumulation=2)
    with pytest.raises(RecipeError, match="max_steps, max_tokens, max_flops"):
        budget.steps_for(limits, 10.0, 32)
    steps = {"max_steps": 100, "max_tokens": 8 * 32 * 50.0, "max_flops": 8 * 10.0 * 30}
    assert budget.steps_for(Training(batch_size=4, accumulation=2, max_steps=100), 10.0, 32) == 100
    assert budget.steps_for(Training(batch_size=4, accumulation=2, max_tokens=steps["max_tokens"]), 10.0, 32) == 50
    assert budget.steps_for(Training(batch_size=4, accumulation=2, **steps), 10.0, 32) == 30
    assert budget.steps_for(Training(batch_size=4, accumulation=2, **steps), 10.0, 32, processes=2) == 15
    assert budget.steps_for(Training(max_flops=1.0), 10.0, 32) == 1


def test_devices_and_precision():
    assert precision.device_of("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="--device 'gpu': allowed are auto, cpu, cuda, mps"):
        precision.device_of("gpu")
    cpu = torch.device("cpu")
    assert not precision.uses_bfloat16("float32", cpu) and precision.uses_bfloat16("bfloat16", cpu)
    assert precision.uses_bfloat16("auto", cpu) == precision.bfloat16_is_fast(cpu)


def test_curve_ends_at_the_end():
    class Control:
        should_evaluate = False

    class State:
        max_steps = 7

    asked = []
    for step in range(1, 8):
        State.global_step, control = step, Control()
        Curve(3).on_step_end(None, State, control)
        asked += [step] * control.should_evaluate
    assert asked == [2, 4, 7]


def test_metrics_with_a_torn_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_metrics(path)


def test_converge_is_counted_as_cyclic_rounds_and_says_so():
    import undertow as ut
    from models import build

    model = build(time=ut.T2MLR(1, 2))
    with pytest.warns(UserWarning, match="Converge"):
        counted = budget.flops_per_row(model, 32, ut.Converge(adjoint=2))
    assert counted == budget.flops_per_row(model, 32, ut.Cyclic(16, 3, adjoint=2))
    assert budget.flops_per_row(build(), 32, ut.Converge()) > 0  # no memory: one sweep, nothing to warn about
