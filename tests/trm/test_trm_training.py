"""The training loop: it learns, goes on after a kill as if nothing had happened, and divides over processes."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_trm as tiny
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from processes import run_ranks
from undertow.training.callbacks import read_metrics
from undertow.trm import training
from undertow.trm.losses import losses
from undertow.trm.model import TRM
from undertow.trm.settings import TRMTraining
from undertow.trm.solving import SURE, answers, evaluate, solve

SETTINGS = {"steps": 9, "batch_size": 4, "warmup": 2, "learning_rate": 1e-3, "save_every": 3, "log_every": 2}
LONGER = {"steps": 110, "batch_size": 16, "warmup": 5, "learning_rate": 4e-3, "weight_decay": 0.0, "ema": 0.9}


def settings(**changes):
    return TRMTraining(**{**SETTINGS, "precision": "float32", "evaluate_every": 4, **changes})


def run(folder, data=None, config=None, resume=False, measure=None, seed=0, **changes):
    return training.train(
        config or tiny.config(), settings(**changes), data or tiny.Copying(), folder, seed, resume, "cpu", measure
    )


def held_out():
    return [tiny.batch(8, 10_000 + i) for i in range(2)]


def measured(model):
    return {"exact_accuracy": evaluate(model, held_out())["exact_accuracy"]}


def lines(folder):
    return [
        {k: v for k, v in line.items() if k != "seconds_per_step"} for line in read_metrics(folder / "metrics.jsonl")
    ]


def everything(folder, step):
    """All tensors of a run's checkpoint and of its model."""
    files = [
        *sorted((folder / "checkpoints" / f"checkpoint-{step}").rglob("*.safetensors")),
        folder / "model/model.safetensors",
    ]
    assert len(files) == 4
    return {f"{file.parent.name}/{file.name}/{n}": x for file in files for n, x in load_file(file).items()}


@pytest.mark.parametrize(
    "changes", [{}, {"optimiser": "adamw", "ema": None, "loss": "softmax"}], ids=["atan2", "adamw"]
)
@pytest.mark.parametrize("batch", [2, 7])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path, changes, batch):
    config = tiny.config(variant="hrm", layers=1) if changes else tiny.config()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole, config=config, measure=measured, **changes)
    with pytest.raises(KeyboardInterrupt):
        run(cut, tiny.Copying(interrupt=batch), config, measure=measured, **changes)
    run(cut, config=config, resume=True, measure=measured, **changes)
    expected, found = everything(whole, 9), everything(cut, 9)
    assert expected["checkpoint-9/training.safetensors/model.puzzles.table"].any()
    assert expected.keys() == found.keys() and all(expected[name].equal(found[name]) for name in expected)
    assert lines(cut) == lines(whole)
    assert [line["step"] for line in lines(whole) if "loss" in line] == [1, 2, 4, 6, 8, 9]
    assert [line["step"] for line in lines(whole) if "eval_exact_accuracy" in line] == [4, 8, 9]
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["checkpoint-6", "checkpoint-9"]


def test_a_checkpoint_half_written_does_not_exist_and_a_finished_run_stays(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["part"]
    model = run(tmp_path, resume=True)
    again = run(tmp_path, resume=True)
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    kept = TRM.load(tmp_path / "checkpoints" / "checkpoint-9" / "model")
    assert kept.head.weight.equal(model.head.weight)


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(ValueError, match="vocab_size: the data has 7, the network 8"):
        run(tmp_path, config=tiny.config(vocab_size=8))
    run(tmp_path, steps=3)
    with pytest.raises(ValueError, match="cannot resume, seed is 0 there and 1 here"):
        run(tmp_path, resume=True, seed=1)
    with pytest.raises(ValueError, match="cannot resume, network is"):
        run(tmp_path, resume=True, config=tiny.config(inner=3))
    with pytest.raises(ValueError, match="cannot resume, ema is"):
        run(tmp_path, resume=True, ema=None)


def test_a_gradient_that_is_not_finite_stops_training(tmp_path, monkeypatch):
    seen = []

    def breaking(*arguments):
        seen.append(arguments)
        found = losses(*arguments)
        return found if len(seen) < 5 else replace(found, loss=found.loss / 0)

    monkeypatch.setattr(training, "losses", breaking)
    with pytest.raises(FloatingPointError, match="step 5: the gradient is not finite"):
        run(tmp_path)
    assert TRM.load(tmp_path / "checkpoints" / "checkpoint-3" / "model").head.weight.isfinite().all()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-3"]


def test_it_learns_to_solve_and_to_halt_and_what_is_logged_is_what_happened(tmp_path):
    config = tiny.config(width=32, inner=1, puzzle_width=0)
    model = run(tmp_path, config=config, evaluate_every=0, measure=measured, log_every=1, clip=1.0, **LONGER)
    logged = lines(tmp_path)
    train = [line for line in logged if "loss" in line]
    assert train[-1]["cell_loss"] < 0.3 * train[0]["cell_loss"] and logged[-1]["eval_exact_accuracy"] > 0.5
    assert train[0]["puzzles"] == 16 and train[1]["puzzles"] == 0  # nobody halts at the first step: q starts at -5
    finished = [line for line in train if "steps" in line]
    assert finished and all(1 <= line["steps"] <= 4 and 0 <= line["exact_accuracy"] <= 1 for line in finished)

    found = evaluate(model, held_out())
    assert found["puzzles"] == 16 and found["by_step"]["exact_accuracy"][-1] == found["exact_accuracy"]
    assert [e["sure"] for e in found["early_exit"]] == list(SURE)
    halved = found["early_exit"][0]
    assert 1 <= halved["steps"] < 4  # it is sure enough to stop


def test_early_exit_leaves_each_puzzle_where_the_halt_head_stops_it():
    """Rows that leave change nothing for those that stay: the answers of all steps tell what must come out."""
    model, batch = tiny.model(), tiny.batch(12, 0)
    inputs, ids = batch["inputs"], batch["puzzle_identifiers"]
    every = list(answers(model, inputs, ids))
    assert [a.step for a in every] == [1, 2, 3, 4]
    tokens, steps = solve(model, inputs, ids)
    assert len(set(steps.tolist())) > 1
    for row in range(12):
        stops = [a.step for a in every if a.margin_B[row] > 0] + [4]
        assert steps[row] == stops[0] and tokens[row].equal(every[stops[0] - 1].tokens_BL[row])
    tokens, steps = solve(model, inputs, ids, early_exit=False)
    assert (steps == 4).all() and tokens.equal(every[-1].tokens_BL)

    labels = every[-1].tokens_BL.clone()
    labels[0, 0] += 1
    found = evaluate(model, [{**batch, "labels": labels}])
    assert found["exact_accuracy"] == pytest.approx(11 / 12) and found["accuracy"] == pytest.approx(1 - 1 / 60)
    exits = found["early_exit"][0]
    tokens, steps = solve(model, inputs, ids)
    assert exits["steps"] == pytest.approx(steps.double().mean().item())
    assert exits["exact_accuracy"] == pytest.approx((tokens == labels).all(-1).double().mean().item())


def test_puzzles_of_another_kind_are_refused():
    model = tiny.model()
    for inputs, ids, said in (
        (torch.zeros(1, 4, dtype=torch.int64), None, r"shape \(1, 4\): this model takes \(rows, 5\)"),
        (torch.full((1, 5), 7), None, "tokens 7..7: this model knows 0..6"),
        (torch.zeros(1, 5, dtype=torch.int64), torch.tensor([9]), "identifiers 9..9: this model knows 0..3"),
    ):
        with pytest.raises(ValueError, match=said):
            list(answers(model, inputs, ids))
    with pytest.raises(ValueError, match="no labelled puzzle"):
        evaluate(model, [])


def test_bfloat16_trains(tmp_path):
    model = run(tmp_path, steps=3, precision="bfloat16", evaluate_every=0)
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert model.head.weight.dtype == torch.float32 and logged[-1]["loss"] < 10
    run(tmp_path / "exact", steps=3, evaluate_every=0)
    exact = [line for line in lines(tmp_path / "exact") if "loss" in line]
    assert logged[0]["gradient_norm"] == pytest.approx(exact[0]["gradient_norm"], rel=0.1)
    assert logged[0]["gradient_norm"] != exact[0]["gradient_norm"]


def worker(rank, world, folder):
    """One of two processes: five steps, then three more."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    for steps in (5, 8):
        run(folder / "two", steps=steps, evaluate_every=0, log_every=5, resume=steps == 8)
    dist.destroy_process_group()


def test_two_processes_train_what_one_does(tmp_path):
    """Gradient, puzzle vectors, exploration and metrics; stopped at step 5 and resumed."""
    run_ranks(worker, 2, tmp_path)
    one = run(tmp_path / "one", steps=8, evaluate_every=0, log_every=5)
    two = TRM.load(tmp_path / "two" / "model")
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    for a, b in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    with pytest.raises(ValueError, match="cannot resume, processes is 2 there and 1 here"):
        run(tmp_path / "two", steps=9, resume=True)


TORCHRUN = """
import sys
import tiny_trm as tiny
from pathlib import Path
from undertow.trm import training
from undertow.trm.settings import TRMTraining
settings = TRMTraining(steps=3, batch_size=4, precision="float32")
training.train(tiny.config(), settings, tiny.Copying(), Path(sys.argv[1]), device="cpu")
"""


@pytest.mark.slow
def test_it_runs_under_torchrun(tmp_path):
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    script = tmp_path / "script.py"
    script.write_text(TORCHRUN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": here, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*torchrun, str(script), str(tmp_path / "run")], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    one = run(tmp_path / "one", steps=3, warmup=2000, learning_rate=1e-4, evaluate_every=0)
    two = TRM.load(tmp_path / "run" / "model")
    torch.testing.assert_close(one.head.weight, two.head.weight, rtol=1e-3, atol=1e-5)
