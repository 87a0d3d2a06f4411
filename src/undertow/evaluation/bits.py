"""Bits per byte: how well a model compresses text, whatever its vocabulary, under any schedule.

As published (nanochat): the nats of the predicted tokens that have bytes, over ln 2 times their bytes. An end of text
or another special token is no text: it costs nats, which `Bits.nats` and perplexities count, but not bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from undertow.data import collate
from undertow.evaluation.buckets import Part, Tally, add_buckets, in_order, named_sweeps
from undertow.loss import share
from undertow.schedules import Converge, Jacobi, Schedule
from undertow.training.precision import autocast


@dataclass(frozen=True)
class Bits:
    """What was measured.

    Attributes:
        bits_per_byte: text_nats / (ln 2 * bytes).
        nats, tokens, bytes: sums over the predicted tokens, each scored by the last sweep that wrote its position.
        text_nats: of those that have bytes: special tokens are left out.
        passes: passes over the span, the mean over batches (None: the schedule does not report it).
        residual: the largest relative change of the memory in the last round (None: not reported).
        sweeps: each sweep's own score, over the positions it wrote, if asked for and the schedule scores its sweeps.
        buckets: the score by position, if asked for.
    """

    bits_per_byte: float
    nats: float
    tokens: int
    bytes: int
    text_nats: float
    passes: float | None = None
    residual: float | None = None
    sweeps: tuple[Part, ...] = ()
    buckets: tuple[Part, ...] = ()

    @property
    def nats_per_token(self) -> float:
        """The loss: mean over the predicted tokens."""
        return self.nats / self.tokens

    def to_dict(self) -> dict:
        """Plain values; parts as lists, left out where there are none."""
        values = asdict(self) | {name: [part.to_dict() for part in getattr(self, name)] for name in PARTS}
        return {key: value for key, value in values.items() if key not in PARTS or value}


PARTS = ("sweeps", "buckets")


@torch.no_grad()
def bits_per_byte(
    model,
    rows: Sequence[dict],
    token_bytes,
    schedule: Schedule | None = None,
    batch_size: int = 16,
    precision: str = "float32",
    bucket: int | None = None,
    sweeps: bool = False,
) -> Bits:
    """Bits per byte of a model on rows, each token predicted from those before it; those without bytes do not count.

    `Jacobi(0)` scores a model without its memory; `sweeps` and `bucket` are modes of LRT (arXiv 2605.26797).

    Args:
        model: an `UndertowForCausalLM` in `eval()`.
        rows: as `undertow.data.collate` takes them; labels of -100 are not counted.
        token_bytes: bytes of every token of the vocabulary.
        schedule: None takes the model's default in evaluation, true decoding.
        batch_size: rows at a time; the logits of one batch are the most that is held (of every sweep, with `sweeps`).
        precision: `auto`, `float32` or `bfloat16`.
        bucket: also score buckets of so many positions, counted from the start of each document (`position_ids`).
        sweeps: also score every sweep by itself, where the schedule reads every sweep out.

    Raises:
        ValueError: no rows, no byte to predict, or a bucket below 1.
    """
    if len(rows) == 0:
        raise ValueError("bits per byte: there are no validation rows")
    if bucket is not None and bucket < 1:
        raise ValueError(f"bits per byte: bucket={bucket}: must be at least 1")
    device = model.device
    sizes = torch.as_tensor(token_bytes)
    nats, tokens, text_nats, size, passes, residual = 0.0, 0, 0.0, 0, [], []
    by_sweep, by_bucket = Tally(), Tally()
    for start in range(0, len(rows), batch_size):
        batch = collate([rows[i] for i in range(start, min(start + batch_size, len(rows)))])
        labels_BT = batch.pop("labels")
        position_BT = batch.get("position_ids", torch.arange(labels_BT.shape[1]).expand_as(labels_BT))
        batch = {key: value.to(device) for key, value in batch.items()}
        scored = {"labels": labels_BT.to(device), "num_items_in_batch": 1} if sweeps else {}
        with autocast(precision, device):
            out = model(**batch, **scored, schedule=schedule, use_cache=False)
        targets_BT = functional.pad(labels_BT[:, 1:], (0, 1), value=-100)
        if out.sweep_losses is not None and schedule is not None:
            text_losses = out.sweep_losses
            special_BT = (labels_BT != -100) & (sizes[labels_BT.clamp(min=0)] == 0)
            if special_BT.any():  # a sweep reports one sum: of the text alone in a run of its own
                scored["labels"] = labels_BT.masked_fill(special_BT, -100).to(device)
                with autocast(precision, device):
                    text_losses = model(**batch, **scored, schedule=schedule, use_cache=False).sweep_losses
            _score_sweeps(by_sweep, schedule, out.sweep_losses, text_losses, targets_BT, sizes)
        for logits_TV, targets_T, position_T in zip(out.logits, targets_BT, position_BT, strict=True):
            # A row at a time: float32 logits are the largest tensor here.
            each_T = functional.cross_entropy(
                logits_TV.float(), targets_T.to(device), reduction="none", ignore_index=-100
            )
            counted_T = targets_T != -100
            nats_S, size_S = each_T.cpu().double()[counted_T], sizes[targets_T[counted_T]]
            nats, tokens, size = nats + nats_S.sum().item(), tokens + len(nats_S), size + int(size_S.sum())
            text_nats += nats_S[size_S > 0].sum().item()
            if bucket is not None:
                add_buckets(by_bucket, bucket, position_T[counted_T], nats_S, size_S)
        if out.passes is not None:
            passes.append(float(out.passes))
        if out.residual is not None:
            residual.append(float(out.residual))
    if size == 0:
        raise ValueError("bits per byte: the validation rows hold no byte to predict")
    return Bits(
        text_nats / (math.log(2) * size),
        nats,
        tokens,
        size,
        text_nats,
        sum(passes) / len(passes) if passes else None,
        max(residual) if residual else None,
        by_sweep.parts(),
        in_order(by_bucket.parts()),
    )


def modes(model, rows: Sequence[dict], token_bytes, **keywords) -> dict[str, Bits]:
    """LRT's evaluation modes (arXiv 2605.26797, its code), for any model.

    Args:
        keywords: of `bits_per_byte`, the same for every mode.

    Returns:
        `trained` under the model's own schedule, `decoded` truly, `zero memory` in one pass that reads no memory (what
        the published code calls its full pass). A model without a state over time has `decoded` alone: all are equal.
    """
    schedules: dict[str, Schedule] = {"decoded": Converge()}
    if model.program.memories:
        schedules = {"trained": model.schedule, **schedules, "zero memory": Jacobi(0)}
    return {name: bits_per_byte(model, rows, token_bytes, s, **keywords) for name, s in schedules.items()}


def _score_sweeps(
    tally: Tally, schedule: Schedule, losses: Tensor, text_losses: Tensor, targets_BT: Tensor, sizes: Tensor
) -> None:
    """Add each sweep's nats over its own positions. Losses are means with N = 1, one a read-out."""
    T = targets_BT.shape[1]
    sweeps = named_sweeps(schedule, T)
    if len(sweeps) != len(losses):  # a model without a memory runs one sweep, whatever the schedule says
        return
    for (name, sweep), loss, text_loss in zip(sweeps, losses.tolist(), text_losses.tolist(), strict=True):
        targets = targets_BT[:, sweep.positions.start : sweep.positions.stop : sweep.positions.step]
        targets, part = targets[targets != -100], share(sweep.positions, T)
        tally.add(name, loss * part, len(targets), text_loss * part, int(sizes[targets].sum()))
