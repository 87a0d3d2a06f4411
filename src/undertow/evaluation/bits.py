"""Bits per byte: how well a model compresses text, whatever its vocabulary, under any schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch.nn import functional

from undertow.data import collate
from undertow.schedules import Schedule
from undertow.training.precision import autocast


@dataclass(frozen=True)
class Bits:
    """What was measured.

    Attributes:
        bits_per_byte: nats / (ln 2 * bytes).
        nats, tokens, bytes: sums over the predicted tokens.
        passes: passes over the span, the mean over batches (None: the schedule does not report it).
        residual: the largest relative change of the memory in the last round (None: not reported).
    """

    bits_per_byte: float
    nats: float
    tokens: int
    bytes: int
    passes: float | None = None
    residual: float | None = None

    def to_dict(self) -> dict:
        return asdict(self)


@torch.no_grad()
def bits_per_byte(
    model,
    rows: Sequence[dict],
    token_bytes,
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> Bits:
    """Bits per byte of a model on rows, each token predicted from those before it.

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        rows: as `undertow.data.collate` takes them; labels of -100 are not counted.
        token_bytes: bytes of every token of the vocabulary.
        schedule: None takes the model's default in evaluation, true decoding.
        batch_size: rows at a time; the logits of one batch are the most that is held.
        precision: `auto`, `float32` or `bfloat16`.

    Raises:
        ValueError: no rows, or no byte to predict.
    """
    if len(rows) == 0:
        raise ValueError("bits per byte: there are no validation rows")
    device = model.device
    sizes = torch.as_tensor(token_bytes, device=device)
    nats, tokens, size, passes, residual = 0.0, 0, 0, [], []
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        batch = {key: value.to(device) for key, value in batch.items()}
        labels_BT = batch.pop("labels")
        with autocast(precision, device):
            out = model(**batch, schedule=schedule, use_cache=False)
        for logits_TV, labels_T in zip(out.logits[:, :-1], labels_BT[:, 1:], strict=True):  # a row at a time: float32
            counted = labels_T != -100
            nats += functional.cross_entropy(logits_TV.float(), labels_T, reduction="sum", ignore_index=-100).item()
            tokens += int(counted.sum())
            size += int(sizes[labels_T[counted]].sum())
        if out.passes is not None:
            passes.append(float(out.passes))
        if out.residual is not None:
            residual.append(float(out.residual))
    if size == 0:
        raise ValueError("bits per byte: the validation rows hold no byte to predict")
    return Bits(
        nats / (math.log(2) * size),
        nats,
        tokens,
        size,
        sum(passes) / len(passes) if passes else None,
        max(residual) if residual else None,
    )
