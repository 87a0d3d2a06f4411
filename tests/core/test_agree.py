"""Two processes with different random states draw the same numbers, and stop at the same round."""

import os

import torch
import torch.distributed as dist

import undertow as ut
from models import build, ids
from processes import run_ranks
from undertow import agree


def one_rank(rank: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.manual_seed(rank)  # as after different data
    drawn = [agree.pick((3, 5, 7, 9, 11)) for _ in range(12)]
    model = build("gpt2", depth=ut.MiddleLoop(1, 2, 6, inject=True, sample=0.5), time=ut.T2MLR(1, 2)).train()
    torch.manual_seed(10 + rank)
    x, passes, loops = ids(2, 9, seed=rank), [], []
    for _ in range(4):
        passes.append(model(x, schedule=ut.Jacobi(4, sample=(1, 2, 3, 4))).passes)
        loops.append(model.depth.draw())
    rounds = model(x, schedule=ut.Converge(1e-3, G=2), loops=2).passes
    torch.save((drawn, passes, loops, rounds), os.path.join(folder, f"rank{rank}.pt"))
    dist.destroy_process_group()


def test_ranks_agree(tmp_path):
    run_ranks(one_rank, str(tmp_path))
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert first == second
    drawn, passes, loops, _ = first
    assert len(set(drawn)) > 2 and len(set(passes)) > 1 and len(set(loops)) > 1
