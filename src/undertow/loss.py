"""The loss of a read-out: with its logits, or without ever holding all of them."""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from undertow.backbone import Backbone

__all__ = ["nats"]


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
