"""Two processes over gloo, FSDP2 and DDP: the losses of one, and checkpoints that another number of them takes up."""

import os

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from torch.nn.parallel import DistributedDataParallel

import undertow as ut
from models import build, ids
from processes import run_ranks
from undertow.training.sharding import load_sharded, save_sharded, shard

STEPS, AT = 4, 2  # steps in all, and after how many a checkpoint is written
CASES = {
    "plain": (None, None, None),
    "t2mlr-jacobi": (None, ut.T2MLR(1, 2), ut.Jacobi(3)),
    "t2mlr-cyclic": (None, ut.T2MLR(1, 2), ut.Cyclic(4, 2, backward=1)),
    "t2mlr-adjoint": (None, ut.T2MLR(1, 2, carry="residual"), ut.Cyclic(4, 2, adjoint=2)),
    "lrt-interleaved": (None, ut.LRT(2), ut.Interleaved(2)),
    "lrt-sequential": (None, ut.LRT(2), ut.Sequential()),
    "reuse": (ut.ReuseMap([2, 1, 1, 2]), ut.T2MLR(1, 2), ut.Jacobi(2)),
    "loop": (ut.MiddleLoop(1, 2, 3, inject=True), None, None),
    "drawn": (ut.MiddleLoop(1, 2, 2, sample=0.5), ut.T2MLR(1, 2), ut.Jacobi(3, sample=(1, 2, 3))),
    "coconut": (None, ut.Coconut(token=3), None),
    "converge": (None, ut.T2MLR(1, 2), ut.Converge(1e-3, G=2)),
    "recursion": (ut.TRMBlock(inner=2), ut.LRT(2), ut.Chunked(4)),
}


def begun(name):
    depth, time, schedule = CASES[name]
    model = build("llama", depth, time).train()
    model.schedule = schedule or model.schedule
    return model


def train(model, optimiser, first, last, rank=0, ranks=1):
    """Losses of the whole batch, of which each process has its rows."""
    losses = []
    for step in range(first, last):
        x = ids(4, 9, seed=step)[rank * (4 // ranks) : (rank + 1) * (4 // ranks)]
        torch.manual_seed(step + rank)  # of depths that are drawn: the first rank's counts
        loss = model(x, labels=x, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach().clone()
        if ranks > 1:
            dist.all_reduce(mean)
        losses.append(float(mean) / ranks)
    return losses


def one_rank(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name in CASES:
        parallel = DistributedDataParallel(begun(name))
        found["ddp", name] = train(parallel, torch.optim.AdamW(parallel.parameters(), lr=1e-2), 0, STEPS, rank, 2)
        model = shard(begun(name))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found[name] = train(model, optimiser, 0, AT, rank, 2)
        save_sharded(os.path.join(folder, name), model, optimiser)
        found[name] += train(model, optimiser, AT, STEPS, rank, 2)
    torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The two processes run once, whichever of pytest's own processes asks first."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sharded"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir()
            run_ranks(one_rank, str(folder))
            (folder / "done").touch()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_process(sharded, name):
    model = begun(name)
    alone = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), 0, STEPS)
    first, second = (torch.load(sharded / f"rank{rank}.pt") for rank in (0, 1))
    assert first[name] == second[name] == pytest.approx(alone, abs=1e-6)
    assert first["ddp", name] == second["ddp", name] == pytest.approx(alone, abs=1e-6)
    assert len(set(alone)) == STEPS


@pytest.mark.parametrize("name", CASES)
def test_one_process_goes_on_from_what_two_saved(sharded, name):
    model = begun(name)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    load_sharded(sharded / name, model, optimiser)
    both = torch.load(sharded / "rank0.pt")[name]
    assert train(model, optimiser, AT, STEPS) == pytest.approx(both[AT:], abs=1e-6)


def test_without_processes_it_says_so():
    with pytest.raises(RuntimeError, match="^shard: no process group; start with torchrun"):
        shard(begun("plain"))
