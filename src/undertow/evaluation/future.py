"""How well future-token heads predict: nats and perplexity a head."""

from __future__ import annotations

from math import exp

import torch
from torch.utils.data import DataLoader

from undertow.data import collate
from undertow.schedules import Schedule


@torch.no_grad()
def future_losses(model, rows, schedule: Schedule, batch_size: int) -> list[dict[str, float]]:
    """One `{"ahead", "nats", "perplexity"}` a head, over all labels it can be asked for.

    Args:
        model: with future heads, in evaluation mode.
        rows: a dataset of rows as `undertow.data.build` makes them.
        schedule: how the states that the heads read are computed.
    """
    heads = len(model.undertow["future"].heads)
    total, count = torch.zeros(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
    for batch in DataLoader(rows, batch_size, collate_fn=collate):
        batch = {name: x.to(model.device) for name, x in batch.items()}
        labels = batch["labels"]
        sums = model(**batch, schedule=schedule, use_cache=False, num_items_in_batch=1).future_losses
        total += sums.double().cpu()
        count += torch.tensor([int((labels[:, j + 2 :] != -100).sum()) for j in range(heads)])
    nats = (total / count.clamp(min=1)).tolist()
    return [{"ahead": j + 2, "nats": n, "perplexity": exp(min(n, 700.0))} for j, n in enumerate(nats)]
