"""Rows of unequal length in batches: which rows go together, and how they are padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn


def most_positions(model) -> int | None:
    """How many positions a model's learned position table has; None: the model has no such table, hence no limit."""
    name = model.view.family.positions
    table = getattr(model.view.base, name) if name else None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def batches(lengths: Sequence[int], size: int, alone_above: int | None = None) -> Iterator[list[int]]:
    """Indices of rows, at most `size` at a time, the shortest rows first: little of a batch is padding.

    Args:
        alone_above: rows longer than this go with rows of their own length only, so that none of them is padded.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        apart = alone_above is not None and lengths[i] > alone_above and batch and lengths[batch[-1]] != lengths[i]
        if len(batch) == size or apart:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False) -> Tensor:
    """int64 `_BT`: rows of unequal length, filled up with `pad` at the right end (or at the left one)."""
    T = max(map(len, rows))
    filled = [[pad] * (T - len(row)) + list(row) if left else list(row) + [pad] * (T - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64)
