"""Learning rates, budgets, precision, metrics files."""

import math

import pytest
import torch
from transformers import get_scheduler

from undertow.recipe import RecipeError, Training
from undertow.training import budget, precision, trainer
from undertow.training.callbacks import Curve, read_metrics


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"decay": "constant"}, lambda u: 1.0),
        ({"decay": "linear", "floor": 0.1}, lambda u: 1 - 0.9 * u),
        ({"decay": "cosine"}, lambda u: (1 + math.cos(math.pi * u)) / 2),
        ({"decay": "cosine", "floor": 0.1}, lambda u: 0.1 + 0.9 * (1 + math.cos(math.pi * u)) / 2),
        ({"decay": "stable", "cooldown": 0.4, "floor": 0.1}, lambda u: 1.0 if u < 0.5 else 1 - 0.9 * (u - 0.5) / 0.5),
    ],
    ids=lambda given: "" if callable(given) else str(given),
)
def test_learning_rates(tmp_path, settings, expected):
    """Warm-up of 20 steps, then 80 in which the learning rate falls as it says."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    made = trainer.arguments(Training(warmup=0.2, **settings), tmp_path, 100, 0, torch.device("cpu"))
    optimiser = torch.optim.SGD([parameter], lr=2.0)
    scheduler = get_scheduler(
        made.lr_scheduler_type, optimiser, made.warmup_steps, 100, scheduler_specific_kwargs=made.lr_scheduler_kwargs
    )
    for step in range(100):
        if step >= 20:
            assert scheduler.get_last_lr() == pytest.approx([2.0 * expected((step - 20) / 80)]), step
        optimiser.step()
        scheduler.step()


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
    many = Training(max_tokens=1e6)  # accumulation is what it says, whatever the number of processes
    assert many.accumulation == 1 and budget.steps_for(many, 10.0, 32, processes=4096) == 1
    with pytest.raises(ValueError, match="greater than 0"):
        Training(accumulation=0)


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
