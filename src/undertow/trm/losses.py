"""What one supervision step is trained on, row by row (arXiv 2510.04871; stablemax: arXiv 2501.04697)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def stablemax(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of p = s(v) / sum s, s(v) = v + 1 for v >= 0 and 1 / (1 - v) below; in float64 where there is one.

    Args:
        logits: `(..., V)`; `labels`: `(...)`, -100 where there is none.

    Returns:
        `(...)`: one loss a label, 0 where there is none.
    """
    v = logits.float() if logits.device.type == "mps" else logits.double()
    s = torch.where(v < 0, 1 / (1 - v.clamp(max=0)), v.clamp(min=0) + 1)
    known = labels != IGNORED
    picked = s.gather(-1, labels.where(known, 0).unsqueeze(-1)).squeeze(-1)
    return ((s.sum(-1).log() - picked.log()) * known).to(torch.promote_types(logits.dtype, torch.float32))


def softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """The usual cross-entropy, in float32 at least; arguments and result as of `stablemax`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    flat = F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return flat.view(labels.shape)


LOSSES = {"stablemax": stablemax, "softmax": softmax}


@dataclass(frozen=True)
class Losses:
    """The loss of a batch (a mean over its rows), and of every row what it is made of.

    Attributes:
        cells_B: mean cross-entropy of the labelled cells; `halt_B`, `go_on_B`: of the two Q logits (0 without).
        accuracy_B: share of labelled cells that are right; `solved_B`: whether all of them are.
        labelled_B: whether the row has any.
    """

    loss: Tensor
    cells_B: Tensor
    halt_B: Tensor
    go_on_B: Tensor
    accuracy_B: Tensor
    solved_B: Tensor
    labelled_B: Tensor


def losses(
    logits_BLV: Tensor, q_B2: Tensor, labels_BL: Tensor, kind: str = "stablemax", worth_B: Tensor | None = None
) -> Losses:
    """`CE + 0.5 BCE(q_halt, solved) [+ 0.5 BCE(q_continue, worth)]`, the mean over rows.

    Args:
        kind: `stablemax` or `softmax`.
        worth_B: what going on is worth, in 0..1 (None: that is not learned).
    """
    known = labels_BL != IGNORED
    count_B = known.sum(-1)
    cells_B = LOSSES[kind](logits_BLV, labels_BL).sum(-1) / count_B.clamp(min=1)
    right_B = ((logits_BLV.argmax(-1) == labels_BL) & known).sum(-1)
    solved_B = right_B == count_B
    halt_B = F.binary_cross_entropy_with_logits(q_B2[:, 0], solved_B.to(q_B2.dtype), reduction="none")
    go_on_B = torch.zeros_like(halt_B)
    if worth_B is not None:
        go_on_B = F.binary_cross_entropy_with_logits(q_B2[:, 1], worth_B, reduction="none")
    loss = (cells_B + (halt_B + go_on_B) / 2).mean()
    accuracy_B = right_B / count_B.clamp(min=1)
    return Losses(loss, cells_B.detach(), halt_B.detach(), go_on_B.detach(), accuracy_B, solved_B, count_B > 0)
