"""Our trainer in two processes over gloo and in one: every method, every schedule, drawn depths, the same losses.

The two have half the rows each, with different numbers of labels, in two micro-batches a step.
"""

import os

import pytest
import torch
import torch.distributed as dist

import undertow as ut
from models import CONFIGS, ids, randomise
from processes import run_ranks
from undertow import schedules
from undertow.methods import METHODS
from undertow.recipe import Training
from undertow.training import trainer

STEPS, ROWS, MICRO = 3, 8, 2
CASES = {
    "plain": (None, None, None),
    "block loop": (ut.BlockLoop(2), None, None),
    "drawn loop": (ut.MiddleLoop(1, 1, 3, inject=True, sample=0.5), None, None),
    "drawn loop, cyclic": (ut.MiddleLoop(1, 2, 2, sample=0.5), ut.T2MLR(1, 2), ut.Cyclic(4, 2, backward=1)),
    "reuse map": (ut.ReuseMap([2, 1, 1, 2]), ut.T2MLR(1, 2), ut.Jacobi(2)),
    "trm block": (ut.TRMBlock(inner=2), ut.LRT(2), ut.Chunked(4)),
    "coconut": (None, ut.Coconut(token=3), None),
    "drawn sweeps": (None, ut.T2MLR(1, 2), ut.Jacobi(4, sample=(1, 2, 3))),
    "drawn sweeps, all read": (None, ut.T2MLR(1, 2), ut.Jacobi(3, sample=(1, 2, 3), loss="mean", start="unmixed")),
    "settled": (None, ut.T2MLR(1, 2, carry="residual"), ut.Jacobi(2, settle=True)),
    "adjoint": (None, ut.T2MLR(1, 2, carry="residual"), ut.Cyclic(4, 2, adjoint=2)),
    "adjoint, solved": (None, ut.T2MLR(1, 2), ut.Cyclic(4, 3, adjoint=3, solve="cyclic")),
    "interleaved": (None, ut.LRT(2), ut.Interleaved(3)),
    "interleaved, refresh": (None, ut.LRT(2), ut.Interleaved(2, refresh=True)),
    "sequential": (None, ut.LRT(2), ut.Sequential()),
    "future heads": (None, ut.T2MLR(1, 2), None),
    "converge": (None, ut.T2MLR(1, 2), ut.Converge(1e-3, G=2)),
    "converge, adjoint": (None, ut.T2MLR(1, 2), ut.Converge(1e-6, adjoint=2)),
}


def test_no_method_and_no_schedule_is_left_out():
    tried = [part for case in CASES.values() for part in case]
    assert {type(part) for part in tried} >= {*METHODS.values(), *schedules.SCHEDULES.values()}


def watched(model):
    """How often each forward of the model ran its second layer, by sweeps and by loops: a list that grows."""
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(0))

    def count(*_):
        seen[-1] += 1

    model.view.layers[1].register_forward_hook(count)
    return seen


def made(name):
    depth, time, schedule = CASES[name]
    torch.manual_seed(0)
    ahead = {"heads": 2, "layers": 1, "source": 0, "trunk": 0.5} if name == "future heads" else None
    model = ut.from_scratch(CONFIGS["llama"](), depth=depth, time=time, future=ahead)
    model = randomise(model.double(), 0).train()
    model.schedule = schedule or model.schedule
    return model


def rows():
    data = []
    for i, x in enumerate(ids(STEPS * ROWS, 9)):
        labels = x.clone()
        labels[: i % 6] = -100
        data.append({"input_ids": x, "labels": labels})
    return data


def logged(name, folder, ranks):
    """Every number that one run logs; and what its forwards cost (see `watched`)."""
    model = made(name)
    calls = watched(model)
    settings = Training(
        batch_size=ROWS // MICRO // ranks, accumulation=MICRO, learning_rate=1e-2, max_steps=STEPS,
        save_every=STEPS + 1, log_every=1, precision="float32",
    )  # fmt: skip
    worker = trainer.UndertowTrainer(
        model=model,
        args=trainer.arguments(settings, folder, STEPS, 0, torch.device("cpu"), in_order=True),
        train_dataset=rows(),
        optimiser=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    )
    worker.train()
    lines = [line for line in worker.state.log_history if "loss" in line]
    return [{key: x for key, x in line.items() if key not in ("epoch", "learning_rate")} for line in lines], calls


def one_rank(rank: int, folder: str):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: logged(name, f"{folder}/{rank}", 2) for name in CASES}
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(one_rank, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_log_what_one_does(two, tmp_path, name):
    alone, calls = logged(name, tmp_path, 1)
    assert len(alone) == STEPS and len({line["loss"] for line in alone}) == STEPS
    assert ("sweep_loss_1" in alone[0]) == (name in ("interleaved", "interleaved, refresh", "drawn sweeps, all read"))
    assert ("future_loss_1" in alone[0]) == (name == "future heads")
    assert len(calls) == STEPS * MICRO and (len(set(calls)) > 1) == ("drawn" in name)
    for lines, theirs in (two[0][name], two[1][name]):
        assert theirs == calls and [line.keys() for line in lines] == [line.keys() for line in alone]
        for mine, expected in zip(lines, alone, strict=True):
            assert mine == pytest.approx(expected, abs=1e-6)


def test_forwards_of_different_depths_are_logged_together(tmp_path):
    """The mean of a sweep's loss is over the forwards that had this sweep."""
    alone, calls = logged("drawn sweeps, all read", tmp_path, 1)
    assert len(set(calls)) > 1 and any(calls[i] != calls[i + 1] for i in range(0, len(calls), MICRO))
    for line, i in zip(alone, range(0, len(calls), MICRO), strict=True):
        swept = [key for key in line if key.startswith("sweep_loss")]
        assert len(swept) == max(calls[i : i + MICRO])
