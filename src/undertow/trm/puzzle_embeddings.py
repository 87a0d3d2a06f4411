"""A vector for every puzzle, moved by sign-SGD: a step touches only the rows of the puzzles in the batch.

The table is a buffer, not a parameter: no optimiser keeps moments of rows it seldom sees, and no average smooths them.
Vectors are handed out as a leaf, and their gradient is handed back; nothing is kept on the module in between.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from undertow.agree import together


class PuzzleEmbeddings(nn.Module):
    """A table `(puzzles, width)`, zero at the start.

    `p <- p (1 - lr decay) - lr sign(g)` for the rows of a batch, where g is the sum of the gradients of all rows of
    that puzzle, on all ranks.
    """

    table: Tensor

    def __init__(self, puzzles: int, width: int):
        super().__init__()
        self.register_buffer("table", torch.zeros(puzzles, width))

    def forward(self, ids_B: Tensor) -> Tensor:
        """The vectors of these puzzles, `(B, width)`: a leaf whose `.grad` a backward fills."""
        return self.table[ids_B].requires_grad_(torch.is_grad_enabled())

    @torch.no_grad()
    def step(self, ids_B: Tensor, gradient: Tensor, lr: float, decay: float) -> None:
        """Move the rows of `ids_B` by their gradient `(B, width)`. Every rank must call it, with as many rows."""
        puzzles, where = all_rows(ids_B).unique(return_inverse=True)
        rows = self.table[puzzles]
        g = torch.zeros_like(rows).index_add_(0, where, all_rows(gradient).to(rows.dtype))
        self.table[puzzles] = rows * (1 - lr * decay) - lr * g.sign()


def all_rows(x: Tensor) -> Tensor:
    """The rows of every rank, in the order of the ranks."""
    if not together():
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)
