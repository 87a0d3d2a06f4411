"""The loss of a read-out: with its logits, or without ever holding all of them.

A forward reads out one or more sweeps, each over its own positions I_s, and its loss is a mean of theirs,
`sum_s w_s L_s` with `sum_s w_s = 1`. L_s is a mean over the sweep's own targets, as LRT was published
(arXiv 2605.26797): the nats of a sweep, summed, over the number of targets at its positions.

That number is not counted but worked out from N, the targets of all positions, so that micro-batches add up:

    L_s = nats_s / N_s,    N_s = N n_s / (T - 1),    n_s = the positions of I_s but the last of all, T - 1

In a row of T tokens every position but the last has a target, n_s of these T - 1 in I_s; where nothing else is masked
N_s is exactly the count. What is summed are the nats of a micro-batch; what they are divided by is N of the whole batch
(`num_items_in_batch`) and a number that T and I_s alone decide. So the losses, and the gradients, of any micro-batches
add up to those of one batch, whatever is masked in which of them. Counts of each subset's own targets would not: a
micro-batch does not know those of the others. Where labels are masked, N_s takes the masked ones to be spread evenly
over the subsets, as strided subsets of a text spread them.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undertow.backbone import Backbone

__all__ = ["nats", "share"]


def share(positions: range, T: int) -> float:
    """`n_s / (T - 1)`: which part of a row's targets is at these positions; 0 where they have none.

    Of T positions every one but the last has a target. `nats / (N * share)` is a mean over the sweep's own targets.
    """
    own = len(positions) - ((T - 1) in positions)
    return own / max(T - 1, 1)


def nats(view: Backbone, h_BSD: Tensor, targets_BS: Tensor, skip_logits: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy summed over the targets that are not -100, in float32 at least, and the logits `_BSV`.

    `skip_logits`: no logits are returned, and only those of some rows exist at a time (torch's chunked
    `linear_cross_entropy`, whose gradients are made in forward). Where the LM head is not a plain linear map of the
    states in float32 or more, they are made as usual, with one warning.
    """
    why = _needs_logits(view, h_BSD) if skip_logits else None
    if why is not None:
        warnings.warn(f"skip_logits: {why}, so logits of whole read-outs are made", stacklevel=2)
    if skip_logits and why is None:
        head = view.lm.get_output_embeddings()
        total = F.linear_cross_entropy(
            h_BSD.flatten(0, 1), head.weight, targets_BS.flatten(), linear_bias=head.bias, reduction="sum",
            ignore_index=-100, options=nn.LinearCrossEntropyOptions(),
        )  # fmt: skip
        return total, None
    logits = view.head(h_BSD)
    scores = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    total = F.cross_entropy(scores.flatten(0, 1), targets_BS.flatten(), ignore_index=-100, reduction="sum")
    return total, None if skip_logits else logits


def _needs_logits(view: Backbone, h_BSD: Tensor) -> str | None:
    """Why the loss cannot be had without whole logits (None: it can)."""
    head = view.lm.get_output_embeddings()
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no chunked linear_cross_entropy"
    if view.logit_cap is not None:
        return f"logits are capped at {view.logit_cap}"
    if type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return f"the LM head is a {type(head).__name__} of its own or has hooks"
    if h_BSD.dtype != head.weight.dtype or h_BSD.dtype not in (torch.float32, torch.float64):
        return f"states are {h_BSD.dtype} and the LM head is {head.weight.dtype}, not both float32 or float64"
    return None
