"""Two processes of a test that train or decide together."""

import sys

import torch
import torch.multiprocessing as mp


def run_ranks(worker, *arguments, ranks: int = 2) -> None:
    """`worker(rank, *arguments)` in each of `ranks` processes; raises what one of them raised.

    Forked where that is safe, which spares each the seconds that its imports take; a GPU in use knows no fork.
    """
    how = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"
    mp.start_processes(worker, arguments, nprocs=ranks, start_method=how)
