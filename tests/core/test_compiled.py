"""`torch.compile(model)`: the graph breaks at the sweeps of a state over time, and nothing changes."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import undertow as ut
from models import build, gap, gradient_gap, gradients, ids

CASES = {
    "loop": (ut.ReuseMap([1, 2, 1, 1]), None),
    "t2mlr": (None, ut.T2MLR(1, 2)),
    "lrt": (None, ut.LRT(2)),
    "coconut": (None, ut.Coconut(7)),
    "both": (ut.MiddleLoop(1, 2, times=2), ut.T2MLR(1, 2, carry="residual")),
}


@torch.no_grad()
def test_a_forward_is_the_same():
    model, x = build("llama", time=ut.T2MLR(0, 1), num_hidden_layers=2), ids(2, 6)
    assert gap(torch.compile(model, backend="eager")(x).logits, model(x).logits) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_forward_gradients_and_text_are_the_same(case):
    model, x = build("llama", *CASES[case]), ids(2, 8)
    again = torch.compile(model, backend="eager")
    with torch.no_grad():
        assert gap(again(x).logits, model(x).logits) < 1e-12
        arguments = dict(max_new_tokens=3, do_sample=False, pad_token_id=1)
        assert torch.equal(again.generate(x, **arguments), model.generate(x, **arguments))
    model.train()
    wanted = gradients(model, model(x, labels=x).loss)
    assert gradient_gap(gradients(model, again(x, labels=x).loss), wanted) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_through_hugging_faces_trainer(case, tmp_path):
    losses = []
    for compiled in (False, True):
        model, rows = build("llama", *CASES[case]).float(), ids(4, 8)
        args = TrainingArguments(
            str(tmp_path), max_steps=2, torch_compile=compiled, torch_compile_backend="aot_eager" if compiled else None,
            per_device_train_batch_size=2, report_to="none", use_cpu=True, save_strategy="no", logging_steps=1,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
